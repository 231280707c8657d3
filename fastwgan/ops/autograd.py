"""What differentiable launches have in common."""

from typing import Any

import torch
from torch import Tensor


def apply(function: Any, *args: Any) -> Any:
    """Return ``function.apply(*args)``, which PyTorch leaves untyped."""
    return function.apply(*args)


class Op(torch.autograd.Function):
    """A differentiable launch. Under torch.func.vmap it launches once for each element of the batch."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        elements = [
            apply(cls, *(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(elements[0], tuple):
            return tuple(map(torch.stack, zip(*elements, strict=True))), (0,) * len(elements[0])
        return torch.stack(elements), 0


def differentiable(*tensors: Tensor) -> bool:
    """Return whether a backward pass through any of the tensors may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def recompute(slopes: Tensor) -> bool:
    """Return whether a backward pass is to compute in PyTorch what the forward launch has made as ``slopes``.

    Recompute in PyTorch when the caller wants a double-backward graph, which the kernel's result lacks, or when the
    kernel skipped the slopes because vmap hid requires_grad.
    """
    return torch.is_grad_enabled() or slopes.numel() == 0
