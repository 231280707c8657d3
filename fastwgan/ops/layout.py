"""How a tensor's elements lie in memory."""

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Return whether x's elements fill one stretch of memory, each once, in some order of the dimensions."""
    return x.is_contiguous() or x.permute(sorted(range(x.dim()), key=x.stride, reverse=True)).is_contiguous()


def laid_out(x: Tensor, like: Tensor) -> Tensor:
    """Return dense x, or a copy of it that lies in memory as ``like`` does, which is dense and of its shape."""
    if x.stride() == like.stride() or (x.is_contiguous() and like.is_contiguous()):  # strides of size 1 say nothing
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def lies_in_rows(x: Tensor) -> bool:
    """Return whether x's slices along its first dimension are dense and lie one after the other."""
    return x.dim() == 0 or (is_dense(x[0]) and (len(x) == 1 or x.stride(0) == x[0].numel()))


def write_back(params: list[Tensor], works: list[Tensor]) -> None:
    """Copy what a launch wrote to, where that was no parameter itself, and tell autograd of the change."""
    torch.autograd.graph.increment_version(params)
    for p, work in zip(params, works, strict=True):
        if work is not p:
            p.detach().copy_(work)
