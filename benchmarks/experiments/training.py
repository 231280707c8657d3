"""What the experiments that train generators share: arrays and pictures kept small, and digits followed in training."""

import base64
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastwgan import Trainer, data, models
from fastwgan.data import ShuffledBatches
from fastwgan.distances import wasserstein

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LATENT", "checkpoints", "column", "digit_networks", "follow", "packed", "save", "spearman", "unpacked"]

LATENT, WIDTH, BATCH = 64, 256, 64
MEASURED = data.HELD_OUT  # samples, as many as digits are held out
AVERAGED = 20  # critic steps, for an estimate


# Digits


def digit_networks(seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """A generator from :data:`LATENT` numbers and a critic, MLPs of two hidden layers."""
    torch.manual_seed(seed)
    generator = models.mlp([LATENT, WIDTH, WIDTH, 64], shape=(1, 8, 8), tanh=True)
    return generator, models.mlp([64, WIDTH, WIDTH, 1], slope=0.2)


def checkpoints(first: int, last: int, n: int = 24) -> list[int]:
    """At most n generator steps, each about so many times the one before."""
    return sorted({round(step) for step in np.geomspace(min(first, last), last, n).tolist()})


def follow(trainer: Trainer, seed: int, steps: Sequence[int]) -> Iterator[dict[str, float]]:
    """Train on digits up to each of ``steps``, generator steps in ascending order, and look at the trainer there.

    Yields:
        "step": as given; "estimate": the critic's W in the mean over the last 20 critic steps, as the trainer reports
        it; "exact": W1 between 500 fresh samples and the 500 held-out digits.
    """
    train, held_out = data.digits()
    batches = ShuffledBatches(train, BATCH, seed)
    estimates: list[Tensor] = []
    for step in steps:
        while trainer.generator_iterations < step:
            w = trainer.step(next(batches)).wasserstein
            assert w is not None
            estimates.append(w)
        estimate = float(torch.stack(estimates[-AVERAGED:]).mean())
        yield {"step": step, "estimate": estimate, "exact": float(wasserstein(trainer.sample(MEASURED), held_out))}


def column(seen: list[dict[str, float]], name: str) -> list[float]:
    """One quantity of what :func:`follow` saw."""
    return [each[name] for each in seen]


def spearman(seen: list[dict[str, float]]) -> float:
    """The rank correlation of the estimates with the exact distances."""
    from scipy.stats import spearmanr

    return float(spearmanr(column(seen, "estimate"), column(seen, "exact")).statistic)


# Results


def packed(values: Tensor) -> dict[str, Any]:
    """Values of any shape as base64 of 16 bits each, little-endian, evenly spaced from "low" to "high"."""
    low, high = values.min().item(), values.max().item()
    whole = ((values.double() - low) / max(high - low, 1e-12) * 65535).round().numpy().astype("<u2")
    text = base64.b64encode(whole.tobytes()).decode()
    return {"shape": list(values.shape), "low": low, "high": high, "base64": text}


def unpacked(kept: dict[str, Any]) -> NDArray[np.float64]:
    """The values of :func:`packed`, but for rounding."""
    whole = np.frombuffer(base64.b64decode(kept["base64"]), "<u2").reshape(kept["shape"])
    values: NDArray[np.float64] = kept["low"] + whole * ((kept["high"] - kept["low"]) / 65535)
    return values


def save(figure: "Figure", path: Path) -> None:
    """Write a picture in 192 colours, half of the bytes."""
    from PIL import Image  # which matplotlib needs

    written = BytesIO()
    figure.savefig(written, format="png")
    picture = Image.open(written).convert("RGB")
    picture.quantize(192, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
