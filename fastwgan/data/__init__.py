"""Handwritten digits, the WGAN-GP paper's two-dimensional toys, and streams of batches of these or other samples."""

import math

import numpy as np
import torch
from torch import Tensor

from fastwgan.data.batches import Draw, SampledBatches, Samples, ShuffledBatches

__all__ = ["TOYS", "SampledBatches", "Samples", "ShuffledBatches", "digits", "gaussians8", "gaussians25", "swissroll"]

HELD_OUT = 500


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 scanned digits in [-1, 1]: [1297, 1, 8, 8] to train on, [500, 1, 8, 8] held out.

    Held out are the last 500 of the permutation ``numpy.random.default_rng(0).permutation(1797)``. Needs scikit-learn.
    """
    from sklearn.datasets import load_digits

    images = load_digits().images.astype(np.float32) / 8 - 1
    order = np.random.default_rng(0).permutation(len(images))
    shuffled = torch.from_numpy(images[order]).unsqueeze(1)
    return shuffled[:-HELD_OUT], shuffled[-HELD_OUT:]


def gaussians8(n: int, random: torch.Generator) -> Tensor:
    """Return points [n, 2] of 8 Gaussians (standard deviation 0.02) on a circle of radius 2, all divided by sqrt(2)."""
    angle = torch.randint(8, (n,), generator=random) * (math.pi / 4)
    centers = 2 * torch.stack((angle.cos(), angle.sin()), 1)
    return (centers + 0.02 * torch.randn(n, 2, generator=random)) / math.sqrt(2)


def gaussians25(n: int, random: torch.Generator) -> Tensor:
    """Return points [n, 2] of 25 Gaussians (standard deviation 0.05) on {-4, -2, 0, 2, 4}^2, divided by 2.828."""
    centers = torch.randint(-2, 3, (n, 2), generator=random) * 2.0
    return (centers + 0.05 * torch.randn(n, 2, generator=random)) / (2 * math.sqrt(2))


def swissroll(n: int, random: torch.Generator) -> Tensor:
    """Return points [n, 2] of a spiral of one and a half turns with N(0, 0.25^2) noise, divided by 7.5."""
    t = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=random))
    points = torch.stack((t * t.cos(), t * t.sin()), 1)
    return (points + 0.25 * torch.randn(n, 2, generator=random)) / 7.5


TOYS: dict[str, Draw] = {"gaussians8": gaussians8, "gaussians25": gaussians25, "swissroll": swissroll}
