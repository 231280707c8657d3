"""Adam, WGAN-GP's optimizer."""

import math
from typing import Any

import torch
from torch import Tensor

from fastwgan import checks, reference
from fastwgan.backend import Backend
from fastwgan.optim.base import Gated
from fastwgan.optim.cpu import can_fuse, fused_step_
from fastwgan.optim.state import Params

__all__ = ["Adam"]


class Adam(Gated):
    r"""Adam and the weight clamp, in place, in one launch per device and dtype.

    .. code-block:: text

        g = grad + weight_decay * p                           (-grad with maximize)
        t = t + 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
        p = min(max(p, -clip), clip)

    Args:
        params: tensors or dicts of groups, as ``torch.optim`` takes them.
        lr, betas, eps, weight_decay, maximize: as in ``torch.optim.Adam``; no amsgrad.
        clip: bound > 0 of the weights after the step, or None; also per group.
        backend: see :mod:`fastwgan.backend`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: Kingma and Ba, arXiv 1412.6980, Algorithm 1; formula and defaults of torch.optim.Adam.

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
        super().__init__(
            params, backend, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize, clip=clip
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas: expected two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            if checks.number(f"betas[{i}]", beta, minimum=0) >= 1:
                raise ValueError(f"betas[{i}]: expected a number in [0, 1), got {beta}")

    def _hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
        (beta1, beta2), sign = group["betas"], -1.0 if group["maximize"] else 1.0
        log1, log2 = [math.log(beta) if beta > 0 else -math.inf for beta in group["betas"]]
        return (group["lr"], beta1, 1 - beta1, log1, beta2, 1 - beta2, log2, group["eps"], group["weight_decay"], 0.0,
                sign)  # fmt: skip

    def _step_group(
        self, params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], finite: bool
    ) -> None:
        grads = [p.grad.resolve_neg() for p in params if p.grad is not None]
        means, squares, steps = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step"))
        if can_fuse(*params, *grads, *means, *squares):
            torch._foreach_add_(steps, 1)
            fused_step_(params, grads, means, squares, steps, group, group["betas"])
            return
        options = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay", "maximize")}
        for p, grad, mean, square, step in zip(params, grads, means, squares, steps, strict=True):
            reference.adam_step_(p, grad, mean, square, step, **options)
