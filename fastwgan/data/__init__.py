"""What the command line trains on beside files: handwritten digits and the WGAN-GP paper's two-dimensional toys; and
the streams of batches of all of them.

A stream of batches is an endless iterator whose position can be saved and restored, so that a resumed run sees the
batches that the uninterrupted one would have seen.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["TOYS", "SampledBatches", "Samples", "ShuffledBatches", "digits", "gaussians8", "gaussians25", "swissroll"]

HELD_OUT = 500


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 scanned digits as ([1297, 1, 8, 8] to train on, [500, 1, 8, 8] held out), in [-1, 1].

    Held out are the last 500 of the permutation ``numpy.random.default_rng(0).permutation(1797)``.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.float32) / 8 - 1
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = torch.from_numpy(images[order]).unsqueeze(1)
    return shuffled[:-HELD_OUT], shuffled[-HELD_OUT:]


def gaussians8(n: int, random: torch.Generator) -> Tensor:
    """n points [n, 2] of 8 Gaussians (standard deviation 0.02) on a circle of radius 2, all divided by sqrt(2)."""
    angle = torch.randint(8, (n,), generator=random) * (math.pi / 4)
    centers = 2 * torch.stack((angle.cos(), angle.sin()), 1)
    return (centers + 0.02 * torch.randn(n, 2, generator=random)) / math.sqrt(2)


def gaussians25(n: int, random: torch.Generator) -> Tensor:
    """n points [n, 2] of 25 Gaussians (standard deviation 0.05) on the grid {-4, -2, 0, 2, 4}^2, divided by 2.828."""
    centers = torch.randint(-2, 3, (n, 2), generator=random) * 2.0
    return (centers + 0.05 * torch.randn(n, 2, generator=random)) / (2 * math.sqrt(2))


def swissroll(n: int, random: torch.Generator) -> Tensor:
    """n points [n, 2] of a spiral of one and a half turns with noise of standard deviation 0.25, divided by 7.5."""
    t = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=random))
    points = torch.stack((t * t.cos(), t * t.sin()), 1)
    return (points + 0.25 * torch.randn(n, 2, generator=random)) / 7.5


TOYS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "gaussians8": gaussians8,
    "gaussians25": gaussians25,
    "swissroll": swissroll,
}


class Samples(Protocol):
    """A fixed set of samples, read when they are asked for. A tensor [N, ...] is one, too."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """The samples [n, ...] of int64 ``indices`` [n] on the CPU. May be called by several threads at once."""


def _rows(batch_size: int, rank: int, world: int) -> slice:
    """The rows of each global batch that are this rank's."""
    if world < 1 or batch_size < 1 or batch_size % world:
        raise ValueError(f"batch_size: expected a positive multiple of world, {world}, got {batch_size}")
    if not 0 <= rank < world:
        raise ValueError(f"rank: expected an int from 0 to {world - 1}, got {rank}")
    own = batch_size // world
    return slice(rank * own, (rank + 1) * own)


class ShuffledBatches:
    """Endless batches of a fixed set of samples, each drawn once per epoch, every batch full.

    Args:
        samples: a tensor [N, ...], or anything that reads its samples when they are asked for.
        batch_size: of all ranks together; may exceed N, as a batch runs on into the next epoch.
        seed: of the order, the same for all ranks.
        rank, world: which process of how many this is. Of each batch it reads batch_size / world rows, its own.
        workers: threads that read the batches to come, one each; 0 reads a batch when it is due. The batches are the
            same for any number.

    Raises:
        ValueError: there are no samples, or ``batch_size``, ``rank`` and ``world`` do not fit together.
    """

    def __init__(
        self, samples: Samples, batch_size: int, seed: int, *, rank: int = 0, world: int = 1, workers: int = 0
    ) -> None:
        if not len(samples):
            raise ValueError("samples: expected at least one, got none")
        self._samples, self._batch_size, self._workers = samples, batch_size, workers
        self._rows = _rows(batch_size, rank, world)
        self._random = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)  # what comes next; also what workers are reading
        self._reading: deque[Future[Tensor]] = deque()
        self._pool = ThreadPoolExecutor(workers, "fastwgan-read") if workers else None

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def _read(self, indices: Tensor) -> Tensor:
        own = indices[self._rows]
        return self._samples[
            own.to(self._samples.device, non_blocking=True) if isinstance(self._samples, Tensor) else own
        ]

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
        """The position after the last batch that was handed out; the same on all ranks."""
        return {"samples": len(self._samples), "order": self._order.clone(), "random": self._random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position.

        Raises:
            ValueError: it is one in another number of samples.
        """
        if state["samples"] != len(self._samples):
            raise ValueError(f"state: expected one of {len(self._samples)} samples, got {state['samples']}")
        self._reading.clear()
        self._order = state["order"].cpu()
        self._random.set_state(state["random"].cpu())


class SampledBatches:
    """Endless batches of fresh points.

    Args:
        draw: (n, generator) -> points [n, ...], one of :data:`TOYS`.
        batch_size: points in a batch of all ranks together.
        seed: of the points, the same for all ranks.
        device: where the batches go.
        rank, world: which process of how many this is; each gets batch_size / world of a batch's points, its own.

    Raises:
        ValueError: ``batch_size``, ``rank`` and ``world`` do not fit together.
    """

    def __init__(
        self,
        draw: Callable[[int, torch.Generator], Tensor],
        batch_size: int,
        seed: int,
        device: torch.device,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._draw, self._batch_size, self._device = draw, batch_size, device
        self._rows = _rows(batch_size, rank, world)
        self._random = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return self._draw(self._batch_size, self._random)[self._rows].to(self._device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random.set_state(state["random"].cpu())
