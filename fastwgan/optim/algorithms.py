"""RMSprop, WGAN's optimizer, and Adam, WGAN-GP's."""

from operator import attrgetter

import torch
from torch import Tensor

from fastwgan import checks, reference
from fastwgan.backend import Backend
from fastwgan.optim.base import Gated, Options, Params

_place = attrgetter("is_cpu", "dtype")
NO_BIAS_CORRECTION = torch.tensor(1e30, device="cpu")  # a step count t at which 1 - beta^t is 1 for every beta < 1


def _can_fuse(*tensors: Tensor) -> bool:
    """Return whether PyTorch's fused step on a CPU can take them: it takes every array to be contiguous."""
    here = {*map(_place, tensors)} <= {(True, torch.float32), (True, torch.float64)}
    return here and all(map(Tensor.is_contiguous, tensors)) and not any(map(Tensor.is_neg, tensors))


def _step_fused(
    params: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor], steps: list[Tensor],
    group: Options, betas: tuple[float, float],
) -> None:  # fmt: skip
    """Take PyTorch's fused Adam step numbered ``steps``: it reads and writes each array once, as our kernel does."""
    torch._fused_adam_(
        params, grads, means, squares, [], steps, lr=float(group["lr"]), beta1=betas[0], beta2=betas[1],
        weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=group["maximize"],
    )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # the fused step leaves it to its caller


class RMSprop(Gated):
    r"""RMSprop and the weight clamp, in place, in one launch per device and dtype::

        g = grad + weight_decay * p                           (-grad with maximize)
        s = alpha * s + (1 - alpha) * g^2
        a = sqrt(s) + eps                                     sqrt(s - m^2) + eps with centered, m the mean of g
        p = p - lr * g / a                                    b = momentum * b + g / a;  p = p - lr * b with momentum
        p = min(max(p, -clip), clip)

    ``params``, lr, alpha, eps, weight_decay, momentum, centered, maximize are as in ``torch.optim.RMSprop``. ``clip``
    is the bound > 0 of weights after the step, or None, also per group; ``backend``: see :mod:`fastwgan.backend`.
    Source: WGAN, arXiv 1701.07875, Algorithm 1, lines 6 and 7; formula and defaults of torch.optim.RMSprop.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> w.grad = torch.ones(2)
    >>> RMSprop([w], lr=5e-5, clip=0.01).step()
    >>> w.data
    tensor([0.0100, 0.0100])
    """

    adopts = torch.optim.RMSprop
    _algorithm = "rmsprop"
    _states = ("square_avg", "grad_avg", "momentum_buffer")
    _required = ("lr", "alpha", "eps")
    _numbers = ("lr", "eps", "weight_decay", "alpha", "momentum")

    def __init__(
        self, params: Params, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0,
        momentum: float = 0, centered: bool = False, *, clip: float | None = None, maximize: bool = False,
        backend: Backend = "auto",
    ) -> None:  # fmt: skip
        options = {"lr": lr, "momentum": momentum, "alpha": alpha, "eps": eps, "centered": centered}
        super().__init__(params, backend, **options, weight_decay=weight_decay, maximize=maximize, clip=clip)

    def _used_states(self, group: Options) -> tuple[str | None, ...]:
        mean, buffer = "grad_avg" if group["centered"] else None, "momentum_buffer" if group["momentum"] > 0 else None
        return "square_avg", mean, buffer

    def _step_group(self, params: list[Tensor], states: list[Options], group: Options, finite: bool) -> None:
        grads, squares = [p.grad for p in params if p.grad is not None], [state["square_avg"] for state in states]
        plain = not group["momentum"] and not group["centered"] and group["alpha"] < 1
        if plain and _can_fuse(*params, *grads, *squares):
            # RMSprop is Adam with beta1 = 0 and no bias correction. Adam's mean is then the gradient itself, so p.grad
            # can serve as that buffer, which saves a copy. Not if the step modifies the gradient (maximize, weight
            # decay), and not if it may be infinite (the step would write inf - inf).
            kept = finite and not group["maximize"] and group["weight_decay"] == 0
            means = grads if kept else [grad.clone() for grad in grads]
            _step_fused(params, grads, means, squares, [NO_BIAS_CORRECTION] * len(params), group, (0.0, group["alpha"]))
        else:
            options = {k: group[k] for k in ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")}
            for p, grad, state in zip(params, grads, states, strict=True):
                _, mean, buffer = (None if name is None else state[name] for name in self._used_states(group))
                reference.rmsprop_step_(p, grad, state["square_avg"], grad_avg=mean, momentum_buffer=buffer, **options)
        torch._foreach_add_([state["step"] for state in states], 1)


class Adam(Gated):
    r"""Adam and the weight clamp, in place, in one launch per device and dtype::

        g = grad + weight_decay * p                           (-grad with maximize)
        t = t + 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
        p = min(max(p, -clip), clip)

    ``params``, lr, betas, eps, weight_decay and maximize are as in ``torch.optim.Adam``, ``clip`` and ``backend`` as of
    :class:`RMSprop`. Source: Kingma and Ba, arXiv 1412.6980, Algorithm 1; formula and defaults of torch.optim.Adam.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> w.grad = torch.ones(2)
    >>> Adam([w], lr=1e-4, betas=(0.0, 0.9)).step()
    >>> w.data
    tensor([0.9999, 0.9999])
    """

    adopts = torch.optim.Adam
    _algorithm = "adam"
    _states = ("exp_avg_sq", "exp_avg")
    _required = ("lr", "betas", "eps")

    def __init__(
        self, params: Params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0, *, clip: float | None = None, maximize: bool = False, backend: Backend = "auto",
    ) -> None:  # fmt: skip
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, backend, **options, maximize=maximize, clip=clip)

    def _check_group(self, group: Options) -> None:
        super()._check_group(group)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas: expected two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            if checks.number(f"betas[{i}]", beta, minimum=0) >= 1:
                raise ValueError(f"betas[{i}]: expected a number in [0, 1), got {beta}")
        group["betas"] = tuple(betas)  # a list could change and stay the same object

    def _step_group(self, params: list[Tensor], states: list[Options], group: Options, finite: bool) -> None:
        grads = [p.grad.resolve_neg() for p in params if p.grad is not None]
        means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        if _can_fuse(*params, *grads, *means, *squares):
            torch._foreach_add_(steps, 1)
            _step_fused(params, grads, means, squares, steps, group, group["betas"])
            return
        options = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay", "maximize")}
        for arrays in zip(params, grads, means, squares, steps, strict=True):
            reference.adam_step_(*arrays, **options)
