"""PyTorch's fused Adam step on a CPU, which reads and writes each array once, as our kernel does on a GPU."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["can_fuse", "fused_step_"]


def can_fuse(*tensors: Tensor) -> bool:
    """Return whether the fused step can take them: on a CPU, and contiguous, as it takes every array to be."""
    for x in tensors:
        if (
            x.device.type != "cpu"
            or x.dtype not in (torch.float32, torch.float64)
            or not x.is_contiguous()
            or x.is_neg()
        ):
            return False
    return True


def fused_step_(
    params: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor], steps: list[Tensor],
    group: dict[str, Any], betas: tuple[float, float],
) -> None:  # fmt: skip
    """Take the step numbered ``steps`` with the options of ``group``, in place."""
    torch._fused_adam_(
        params, grads, means, squares, [], steps, lr=float(group["lr"]), beta1=betas[0], beta2=betas[1],
        weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=group["maximize"],
    )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # the fused step leaves it to its caller
