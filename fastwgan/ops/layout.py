"""How a tensor's elements lie in memory."""

from torch import Tensor


def is_dense(x: Tensor) -> bool:
    """Whether x's elements fill one stretch of memory, each once, in some order of the dimensions."""
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
    """Whether two dense tensors of one shape hold corresponding elements at corresponding places."""
    return x.stride() == y.stride() or (x.is_contiguous() and y.is_contiguous())  # strides of size 1 say nothing


def lies_in_rows(x: Tensor) -> bool:
    """Whether x's slices along its first dimension are dense and lie one after the other."""
    return x.dim() == 0 or (is_dense(x[0]) and (len(x) == 1 or x.stride(0) == x[0].numel()))
