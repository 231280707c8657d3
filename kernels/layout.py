"""Arrays as the per-sample kernels want them."""

import torch


def dense_samples(x: torch.Tensor) -> torch.Tensor:
    """x itself where its samples lie dense one after another (contiguous or channels_last), else a contiguous copy."""
    x = x.resolve_neg()
    if x.is_contiguous():
        return x
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return x
    return x.contiguous()
