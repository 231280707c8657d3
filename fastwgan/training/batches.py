"""Batches of every kind as a trainer takes them: over and over, on its device, in whole packs."""

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fastwgan import checks


def refuse_samples(batches: object) -> None:
    """Raise TypeError on what would be iterated sample by sample, which a network may well take for batches."""
    got = type(batches).__name__
    if isinstance(batches, (Tensor, np.ndarray)):
        got += "; put a single batch into a list, or make batches of samples by torch.utils.data.DataLoader"
    elif isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        got = f"the dataset {got}, whose items are single samples; torch.utils.data.DataLoader makes batches of them"
    elif hasattr(batches, "__iter__") or hasattr(batches, "__getitem__"):
        return
    raise TypeError(f"batches: expected an iterable of batches, got {got}")


def endless(batches: Iterable[Any], device: torch.device, pack: int) -> Iterator[list[Any] | None]:
    """Yield the samples and conditions of each batch, begun again when the batches end, in whole packs, on ``device``.

    Samples that fill no pack are left out; None is yielded for a batch that fills none.
    """
    set_epoch = getattr(getattr(batches, "sampler", None), "set_epoch", None)
    for epoch in count():
        if set_epoch is not None:  # a DistributedSampler would have the same order again
            set_epoch(epoch)
        empty = True
        for batch in batches:
            parts = [_moved(part, device) for part in (batch if isinstance(batch, (tuple, list)) else [batch])]
            if not parts:
                raise ValueError("batches: expected samples in each batch, got an empty one")
            n = len(parts[0]) if isinstance(parts[0], Tensor) and parts[0].dim() else 0
            whole = n - n % pack
            if n and not whole:
                yield None
                continue
            empty = False
            yield parts if whole == n else [x[:whole] if checks.is_batched(x, n) else x for x in parts]
        if empty:
            got = "is empty, has no batch that fills a pack, or has ended or been closed and cannot be started again"
            raise ValueError(f"batches: expected more batches, but the iterable {got}")


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, np.ndarray):
        try:
            part = torch.tensor(part)
        except TypeError as error:
            raise TypeError(f"batches: expected arrays of numbers, got one of dtype {part.dtype}") from error
    return part.to(device, non_blocking=True) if isinstance(part, Tensor) else part
