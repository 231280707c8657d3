"""The WGAN-GP paper's two-dimensional toys, learned under the penalty and under clipping.

A generator is measured by 10 times 1000 of its samples, made by running averages of its weights:

- share near the data: within 3 standard deviations of the noise from the nearest centre of a Gaussian, or from the
  spiral (of real samples, 98.9% of a Gaussian's and 99.7% of the spiral's);
- parts covered: a Gaussian, or one of ten arcs of the spiral that hold as much data, counts if at least a quarter of
  its fair share of the samples lies in it and near the data;
- W1, exactly, between 1000 samples and 1000 real ones, as a mean over ten such pairs, divided by the same between two
  independent sets of 1000 real samples. That is not zero, as no two such sets have as many points in each part.

Both constraints get as many steps of the same networks. Clipping is reported; what has to hold, does under the penalty.

Source: arXiv 1704.00028, figure 1, whose generator is held fixed; here it is trained.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.experiments.common import COLORS, Check, at_least, at_most, new_figure, scaled
from benchmarks.experiments.training import packed, save, unpacked
from fastwgan import Adam, GradientPenalty, RMSprop, Trainer, WeightClip, data, models
from fastwgan.data import SampledBatches
from fastwgan.distances import wasserstein

__all__ = ["GAUSSIANS8", "GAUSSIANS25", "SWISSROLL", "Toy"]

WIDTH, DEPTH = 128, 3
BATCH = 256
N_CRITIC = 2
WEIGHT, BOUND = 0.1, 0.03
PAIRS, POINTS = 10, 1000
SIDE, EXTENT = 48, 2.1  # of the grid on which the critic is kept
DRAWN = 600  # points
CONSTRAINTS = {"clip": f"weight clipping (c = {BOUND:g})", "penalty": f"gradient penalty (weight {WEIGHT:g})"}


def _linear_decay(total: int) -> Callable[[int], float]:
    """A constant rate for half of the steps, then in a line to zero."""
    return lambda step: min(1.0, 2 * (1 - step / (total + 1)))


def _train(sample: Callable[[int, torch.Generator], Tensor], constraint: str, seed: int, steps: int) -> Trainer:
    torch.manual_seed(seed)
    generator = models.mlp([2, *[WIDTH] * DEPTH, 2])
    critic = models.mlp([2, *[WIDTH] * DEPTH, 1], slope=0.2)
    optimizers: list[Optimizer]
    if constraint == "clip":
        optimizers = [RMSprop(m.parameters(), lr=5e-4) for m in (critic, generator)]
    else:
        optimizers = [Adam(m.parameters(), lr=1e-3, betas=(0.0, 0.9)) for m in (critic, generator)]
    totals = (steps, steps // N_CRITIC)
    schedulers = [LambdaLR(o, _linear_decay(total)) for o, total in zip(optimizers, totals, strict=True)]
    trainer = Trainer(
        generator,
        critic,
        latent=2,
        constraint=WeightClip(BOUND) if constraint == "clip" else GradientPenalty(WEIGHT),
        critic_optimizer=optimizers[0],
        generator_optimizer=optimizers[1],
        critic_scheduler=schedulers[0],
        generator_scheduler=schedulers[1],
        n_critic=N_CRITIC,
        seed=seed,
        ema=0.99,
    )
    batches = SampledBatches(sample, BATCH, seed, torch.device("cpu"))
    for _ in range(steps):
        trainer.step(next(batches))
    return trainer


def _mean_distance(xs: Tensor, ys: Tensor) -> float:
    """The exact W1 of a pair of clouds, in the mean over pairs [N, POINTS, 2]."""
    return sum(float(wasserstein(xs[i], ys[i])) for i in range(len(xs))) / len(xs)


def _grid() -> Tensor:
    """The points [SIDE^2, 2] of a square round the data, row by row."""
    ticks = torch.linspace(-EXTENT, EXTENT, SIDE)
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    return torch.stack((x, y), -1).reshape(-1, 2)


@dataclass(frozen=True)
class Toy:
    """An experiment on one of the toys.

    Attributes:
        TITLE: what is shown.
        sample: (n, generator) -> real points [n, 2].
        skeleton: points [M, 2] that the data lies round: the centres, or a line of points along the spiral.
        parts: how many the skeleton has; equally many of its points in a row are one.
        noise: standard deviation of the data round the skeleton.
        steps: of the critic.
        least_covered, least_near, largest_ratio: what has to hold under the penalty, for each seed.
    """

    TITLE: str
    sample: Callable[[int, torch.Generator], Tensor]
    skeleton: Tensor
    parts: int
    noise: float
    steps: int
    least_covered: int
    least_near: float
    largest_ratio: float

    def run(self, seed: int, scale: float = 1.0) -> dict[str, Any]:
        """Both constraints: the measures, and for the picture some samples and the critic on a grid."""
        random = torch.Generator().manual_seed(seed + 1_000_000)  # not the training's
        pairs = scaled(PAIRS, min(scale, 1.0))
        real, more = (self.sample(pairs * POINTS, random).view(pairs, POINTS, 2) for _ in range(2))
        w_real = _mean_distance(real, more)
        result: dict[str, Any] = {"w_real": w_real, "real": packed(real[0][:DRAWN])}
        for constraint in CONSTRAINTS:
            trainer = _train(self.sample, constraint, seed, scaled(self.steps, scale))
            fake = trainer.sample(pairs * POINTS, ema=True)
            w = _mean_distance(real, fake.view(pairs, POINTS, 2))
            distance, nearest = torch.cdist(fake, self.skeleton).min(1)
            near = distance <= 3 * self.noise
            counts = (nearest[near] // (len(self.skeleton) // self.parts)).bincount(minlength=self.parts)
            with torch.no_grad():
                surface = trainer.critic(_grid()).reshape(SIDE, SIDE)
            result[constraint] = {
                "w": w,
                "ratio": w / w_real,
                "near": float(near.double().mean()),
                "covered": int((counts >= len(fake) / self.parts / 4).sum()),
                "fake": packed(fake[:DRAWN]),
                "surface": packed(surface),
            }
        return result

    def judge(self, results: list[dict[str, Any]]) -> list[Check]:
        """For each seed, of the penalty; what clipping comes to is said beside it."""
        checks = []
        for r in results:
            ours, clip, seed = r["penalty"], r["clip"], f"seed {r['seed']}: "
            checks += [
                at_most(f"{seed}W1 over that of real samples (clipped {clip['ratio']:.3g})", ours["ratio"],
                        self.largest_ratio),
                at_least(f"{seed}parts covered, of {self.parts} (clipped {clip['covered']})", ours["covered"],
                         self.least_covered),
                at_least(f"{seed}share within 3 sigma (clipped {clip['near']:.3g})", ours["near"], self.least_near),
            ]  # fmt: skip
        return checks

    def draw(self, results: list[dict[str, Any]], path: Path) -> None:
        """Generated over real points on the critic's level sets: a column for each of the first three seeds."""
        shown = results[:3]
        figure, panels = new_figure(self.TITLE, 2, len(shown), height=1.0 + 19 / len(shown))
        ticks = torch.linspace(-EXTENT, EXTENT, SIDE).numpy()
        cells = [(constraint, r) for constraint in CONSTRAINTS for r in shown]
        for axes, (constraint, r) in zip(panels, cells, strict=True):
            ours = r[constraint]
            axes.contour(ticks, ticks, unpacked(ours["surface"]), levels=12, cmap="cividis", linewidths=0.6)
            clouds = (("real", "real", r["real"], 5), (constraint, "generated", ours["fake"], 2.5))
            for name, label, points, size in clouds:
                x, y = unpacked(points).T
                axes.plot(x, y, "o", color=COLORS[name], markersize=size, markeredgewidth=0, label=label)
            axes.set_title(
                f"seed {r['seed']}: W1 {ours['ratio']:.2f} times that of real samples,\n"
                f"{ours['covered']} of {self.parts} parts covered, {ours['near']:.0%} within 3σ",
                fontsize="small",
            )
            axes.set(xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), aspect="equal", xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for axes, (constraint, label) in zip(panels[:: len(shown)], CONSTRAINTS.items(), strict=True):
            axes.set_ylabel(label, color=COLORS[constraint])
            axes.legend(loc="lower left", markerscale=1.5, fontsize="small", borderpad=0.3)
        save(figure, path)


def _spiral(parts: int) -> Tensor:
    """400 points to a part along the Swiss roll's curve, evenly in the angle, as its data lies."""
    n = 400 * parts
    t = 1.5 * math.pi * (1 + 2 * (torch.arange(n) + 0.5) / n)
    return torch.stack((t * t.cos(), t * t.sin()), 1) / 7.5


def _circle() -> Tensor:
    angle = torch.arange(8) * (math.pi / 4)
    return math.sqrt(2) * torch.stack((angle.cos(), angle.sin()), 1)


def _lattice() -> Tensor:
    ticks = torch.arange(-2, 3) / math.sqrt(2)
    return torch.cartesian_prod(ticks, ticks)


GAUSSIANS8 = Toy(
    TITLE="Eight Gaussians: learned under the penalty, beside clipping (WGAN-GP, figure 1)",
    sample=data.gaussians8,
    skeleton=_circle(),
    parts=8,
    noise=0.02 / math.sqrt(2),
    steps=6000,
    least_covered=8,
    least_near=0.85,
    largest_ratio=2.0,
)
GAUSSIANS25 = Toy(
    TITLE="Twenty-five Gaussians: learned under the penalty, beside clipping (WGAN-GP, figure 1)",
    sample=data.gaussians25,
    skeleton=_lattice(),
    parts=25,
    noise=0.05 / (2 * math.sqrt(2)),
    steps=8000,
    least_covered=25,
    least_near=0.5,
    largest_ratio=2.0,
)
SWISSROLL = Toy(
    TITLE="The Swiss roll: learned under the penalty, beside clipping (WGAN-GP, figure 1)",
    sample=data.swissroll,
    skeleton=_spiral(10),
    parts=10,
    noise=0.25 / 7.5,
    steps=6000,
    least_covered=10,
    least_near=0.9,
    largest_ratio=1.5,
)
