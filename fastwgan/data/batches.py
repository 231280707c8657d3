"""Streams of batches, endless and with a position to save for a resumed run; other iterables are made endless, too."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fastwgan import checks

Draw = Callable[[int, torch.Generator], Tensor]


class Samples(Protocol):
    """A fixed set of samples, read when they are asked for. A tensor [N, ...] is one, too."""

    def __len__(self) -> int: ...
    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """Return the samples [n, ...] of int64 ``indices`` [n] on the CPU. Several threads may call it at once."""


class _Batches(Iterator[Tensor]):
    """The random numbers of a stream, and the rows of each batch of all ranks that are this rank's."""

    def __init__(self, batch_size: int, seed: int, rank: int, world: int) -> None:
        if world < 1 or batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size: expected a positive multiple of world, {world}, got {batch_size}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected an int from 0 to {world - 1}, got {rank}")
        own = batch_size // world
        self._batch_size, self._rows = batch_size, slice(rank * own, (rank + 1) * own)
        self._random = torch.Generator().manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch that was handed out; the same on all ranks."""
        return {"random": self._random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        self._random.set_state(state["random"].cpu())


class ShuffledBatches(_Batches):
    """Endless batches of a fixed set of samples, each drawn once per epoch, every batch full.

    Args:
        samples: a tensor [N, ...], or anything that reads its samples when they are asked for; none raise ValueError.
        batch_size: of all ranks together, a multiple of ``world``; may exceed N, and runs on into the next epoch then.
        seed: of the order, the same for all ranks.
        rank, world: which process of how many this is. Of each batch it reads batch_size / world rows, its own.
        workers: threads that read the batches to come, one each, which changes no batch; 0 reads one when it is due.
    """

    def __init__(
        self, samples: Samples, batch_size: int, seed: int, *, rank: int = 0, world: int = 1, workers: int = 0
    ) -> None:
        if not len(samples):
            raise ValueError("samples: expected at least one, got none")
        super().__init__(batch_size, seed, rank, world)
        self._samples, self._workers = samples, workers
        self._order = torch.empty(0, dtype=torch.int64)  # what comes next; also what workers are reading
        self._reading: deque[Future[Tensor]] = deque()
        self._pool = ThreadPoolExecutor(workers, "fastwgan-read") if workers else None

    def _read(self, indices: Tensor) -> Tensor:
        own = indices[self._rows]
        if isinstance(self._samples, Tensor):
            own = own.to(self._samples.device, non_blocking=True)
        return self._samples[own]

    def __next__(self) -> Tensor:
        size = self._batch_size
        while len(self._order) < size * (1 + self._workers):
            self._order = torch.cat((self._order, torch.randperm(len(self._samples), generator=self._random)))
        if self._pool is None:
            batch = self._read(self._order[:size])
        else:
            for i in range(len(self._reading), 1 + self._workers):
                self._reading.append(self._pool.submit(self._read, self._order[i * size : (i + 1) * size]))
            batch = self._reading[0].result()
            self._reading.popleft()
        self._order = self._order[size:]  # only now, so that a batch that could not be read is not lost
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"samples": len(self._samples), "order": self._order.clone(), **super().state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position; ValueError if it is one in another number of samples."""
        if state["samples"] != len(self._samples):
            raise ValueError(f"state: expected one of {len(self._samples)} samples, got {state['samples']}")
        super().load_state_dict(state)
        self._reading.clear()
        self._order = state["order"].cpu()


class SampledBatches(_Batches):
    """Endless batches of fresh points.

    Args:
        draw: (n, generator) -> points [n, ...], one of :data:`fastwgan.data.TOYS`.
        batch_size, seed, rank, world: as of :class:`ShuffledBatches`; each rank gets its own of a batch's points.
        device: where the batches go.
    """

    def __init__(self, draw: Draw, batch_size: int, seed: int, device: torch.device, *, rank: int = 0, world: int = 1):
        super().__init__(batch_size, seed, rank, world)
        self._draw, self._device = draw, device

    def __next__(self) -> Tensor:
        return self._draw(self._batch_size, self._random)[self._rows].to(self._device, non_blocking=True)


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
    """Yield each batch's samples and conditions on ``device``, endlessly, in whole packs; None where it fills none."""
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
            else:
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
