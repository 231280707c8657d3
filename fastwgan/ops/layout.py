"""How a tensor's elements lie in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Return whether x's elements fill one stretch of memory, each once, in some order of the dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_layout(x: Tensor, y: Tensor) -> bool:
    """Return whether two dense tensors of one shape hold corresponding elements at corresponding places."""
    return x.stride() == y.stride() or (x.is_contiguous() and y.is_contiguous())  # strides of size 1 say nothing


def lies_in_rows(x: Tensor) -> bool:
    """Return whether x's slices along its first dimension are dense and lie one after the other."""
    return x.dim() == 0 or (is_dense(x[0]) and (len(x) == 1 or x.stride(0) == x[0].numel()))


@contextmanager
def written(params: list[Tensor], fits: Callable[[Tensor], bool] = is_dense) -> Iterator[list[Tensor]]:
    """Yield parameters for a launch to write to, which autograd hears of; copies of those that do not lie as it needs.

    The copies are copied back.
    """
    works = [p if fits(p) else p.detach().contiguous() for p in params]
    yield works
    torch.autograd.graph.increment_version(params)
    for p, work in zip(params, works, strict=True):
        if work is not p:
            p.detach().copy_(work)
