"""What the command line trains on: handwritten digits and the WGAN-GP paper's two-dimensional toys.

A stream of batches is an endless iterator whose position can be saved and restored, so that a resumed run sees the
batches that the uninterrupted one would have seen.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["TOYS", "SampledBatches", "ShuffledBatches", "digits", "gaussians8", "gaussians25", "swissroll"]

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


class ShuffledBatches:
    """Endless batches of a fixed set of samples, each drawn once per epoch, every batch full.

    Args:
        samples: [N, ...].
        batch_size: may exceed N; a batch runs on into the next epoch.
        seed: of the order.

    Raises:
        ValueError: there are no samples.
    """

    def __init__(self, samples: Tensor, batch_size: int, seed: int) -> None:
        if not len(samples):
            raise ValueError("samples: expected at least one, got none")
        self._samples, self._batch_size = samples, batch_size
        self._random = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        while len(self._order) < self._batch_size:
            self._order = torch.cat((self._order, torch.randperm(len(self._samples), generator=self._random)))
        indices, self._order = self._order[: self._batch_size], self._order[self._batch_size :]
        return self._samples[indices.to(self._samples.device)]

    def state_dict(self) -> dict[str, Any]:
        return {"order": self._order.clone(), "random": self._random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._order = state["order"].cpu()
        self._random.set_state(state["random"].cpu())


class SampledBatches:
    """Endless batches of fresh points.

    Args:
        draw: (n, generator) -> points [n, ...], one of :data:`TOYS`.
        batch_size: points in a batch.
        seed: of the points.
        device: where the batches go.
    """

    def __init__(
        self, draw: Callable[[int, torch.Generator], Tensor], batch_size: int, seed: int, device: torch.device
    ) -> None:
        self._draw, self._batch_size, self._device = draw, batch_size, device
        self._random = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return self._draw(self._batch_size, self._random).to(self._device)

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._random.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random.set_state(state["random"].cpu())
