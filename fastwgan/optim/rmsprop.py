"""RMSprop, WGAN's optimizer."""

import math
from typing import Any

import torch
from torch import Tensor

from fastwgan import reference
from fastwgan.backend import Backend
from fastwgan.optim.base import Gated
from fastwgan.optim.cpu import can_fuse, fused_step_
from fastwgan.optim.state import Params

__all__ = ["RMSprop"]

NO_BIAS_CORRECTION = torch.tensor(1e30, device="cpu")  # a step count t at which 1 - beta^t is 1 for every beta < 1


class RMSprop(Gated):
    r"""RMSprop and the weight clamp, in place, in one launch per device and dtype.

    .. code-block:: text

        g = grad + weight_decay * p                           (-grad with maximize)
        s = alpha * s + (1 - alpha) * g^2
        a = sqrt(s) + eps                                     sqrt(s - m^2) + eps with centered, m the mean of g
        p = p - lr * g / a                                    b = momentum * b + g / a;  p = p - lr * b with momentum
        p = min(max(p, -clip), clip)

    Args:
        params: tensors or dicts of groups, as ``torch.optim`` takes them.
        lr, alpha, eps, weight_decay, momentum, centered, maximize: as in ``torch.optim.RMSprop``.
        clip: bound > 0 of the weights after the step, or None; also per group.
        backend: see :mod:`fastwgan.backend`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: WGAN, arXiv 1701.07875, Algorithm 1, lines 6 and 7; formula and defaults of torch.optim.RMSprop.

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
        super().__init__(
            params, backend, lr=lr, momentum=momentum, alpha=alpha, eps=eps, centered=centered,
            weight_decay=weight_decay, maximize=maximize, clip=clip,
        )  # fmt: skip

    def _used_states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        mean, buffer = "grad_avg" if group["centered"] else None, "momentum_buffer" if group["momentum"] > 0 else None
        return "square_avg", mean, buffer

    def _hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
        alpha, sign = group["alpha"], -1.0 if group["maximize"] else 1.0
        return (group["lr"], 0.0, 1.0, -math.inf, alpha, 1 - alpha, 0.0, group["eps"], group["weight_decay"],
                group["momentum"], sign)  # fmt: skip

    def _step_group(
        self, params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], finite: bool
    ) -> None:
        grads, squares = [p.grad for p in params if p.grad is not None], [state["square_avg"] for state in states]
        plain = not group["momentum"] and not group["centered"] and group["alpha"] < 1
        if plain and can_fuse(*params, *grads, *squares):
            # RMSprop is Adam with beta1 = 0 and no bias correction. Adam's mean is then the gradient itself, so p.grad
            # can serve as that buffer, which saves a copy. Not if the step modifies the gradient (maximize, weight
            # decay), and not if it may be infinite (the step would write inf - inf).
            kept = finite and not group["maximize"] and group["weight_decay"] == 0
            means = grads if kept else [grad.clone() for grad in grads]
            counts = [NO_BIAS_CORRECTION] * len(params)
            fused_step_(params, grads, means, squares, counts, group, (0.0, group["alpha"]))
        else:
            options = {k: group[k] for k in ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")}
            for p, grad, state in zip(params, grads, states, strict=True):
                _, mean, buffer = (None if name is None else state[name] for name in self._used_states(group))
                reference.rmsprop_step_(p, grad, state["square_avg"], grad_avg=mean, momentum_buffer=buffer, **options)
        torch._foreach_add_([state["step"] for state in states], 1)
