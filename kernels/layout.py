"""Arrays and number formats as the kernels want them."""

from functools import cache

import torch
import triton.language as tl


@cache
def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of arithmetic on ``dtype``, and of sums and statistics: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's name of ``dtype``."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def dense_samples(x: torch.Tensor) -> torch.Tensor:
    """x itself where its samples lie dense one after another (contiguous or channels_last), else a contiguous copy."""
    x = x.resolve_neg()
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format)
    return x if x.is_contiguous(memory_format=channels_last) else x.contiguous()
