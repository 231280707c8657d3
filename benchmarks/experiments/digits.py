"""Digits learned under the penalty and under clipping: the critic's W falls as the samples come nearer the data.

Through training, at generator steps that grow by a constant factor, the critic's estimate of W is set beside the exact
W1 between 500 fresh samples and 500 held-out digits (pixels in [-1, 1]). What 500 training digits come to is the floor.
The critic gets 100 steps for each of the first generator steps, as in the WGAN authors' code, and a larger learning
rate than the generator: an estimate means something if the critic is near its best.

What has to hold, does under the penalty. The estimates under clipping are of another scale, some K times W, and K
changes in training as the weights go to the bound.

Source: arXiv 1701.07875, figure 3; arXiv 1704.00028, figure 5.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.experiments.common import COLORS, Check, at_least, at_most, new_figure, scaled
from benchmarks.experiments.training import (
    LATENT,
    checkpoints,
    column,
    digit_networks,
    follow,
    packed,
    save,
    spearman,
    unpacked,
)
from fastwgan import Adam, GradientPenalty, RMSprop, Trainer, WeightClip, data
from fastwgan.distances import wasserstein

TITLE = "Handwritten digits: the critic's estimate tells how near the samples are (WGAN, fig. 3; WGAN-GP, fig. 5)"

STEPS = 1200  # of the generator
N_CRITIC = 5
WEIGHT, BOUND = 10.0, 0.03
EVERY, PER_ROW = 3, 10  # which checkpoints have a row of samples in the picture, and how many
CONSTRAINTS = {"clip": f"weight clipping (c = {BOUND:g})", "penalty": f"gradient penalty (weight {WEIGHT:g})"}


def _trainer(constraint: str, seed: int, scale: float) -> Trainer:
    first = scaled(100, min(scale, 1.0))

    def n_critic(iteration: int) -> int:
        return first if iteration < 5 else N_CRITIC

    generator, critic = digit_networks(seed)
    if constraint == "clip":
        return Trainer(
            generator, critic, latent=LATENT, constraint=WeightClip(BOUND), n_critic=n_critic, seed=seed,
            critic_optimizer=RMSprop(critic.parameters(), lr=5e-4),
            generator_optimizer=RMSprop(generator.parameters(), lr=5e-5),
        )  # fmt: skip
    return Trainer(
        generator, critic, latent=LATENT, constraint=GradientPenalty(WEIGHT), n_critic=n_critic, seed=seed,
        critic_optimizer=Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.9)),
        generator_optimizer=Adam(generator.parameters(), lr=1e-4, betas=(0.0, 0.9)),
    )  # fmt: skip


def run(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Both constraints followed through training, with samples of the same latents at a few steps."""
    train, held_out = data.digits()
    result: dict[str, Any] = {"floor": float(wasserstein(train[: len(held_out)], held_out))}
    steps = checkpoints(5, scaled(STEPS, scale))
    latents = torch.randn(PER_ROW, LATENT, generator=torch.Generator().manual_seed(seed))
    for constraint in CONSTRAINTS:
        trainer = _trainer(constraint, seed, scale)
        seen, images = [], []
        for i, row in enumerate(follow(trainer, seed, steps)):
            seen.append(row)
            if i % EVERY == EVERY - 1:
                with torch.no_grad():
                    images.append(trainer.generator(latents).squeeze(1))
        result[constraint] = {"seen": seen, "spearman": spearman(seen), "images": packed(torch.stack(images))}
    return result


def judge(results: list[dict[str, Any]]) -> list[Check]:
    """For each seed, of the penalty: the estimate and the exact distance fall together, and come far down."""
    checks = []
    for r in results:
        ours, clip, seed = r["penalty"], r["clip"], f"seed {r['seed']}: "
        left, left_clip = ((each["seen"][-1]["exact"] - r["floor"]) / r["floor"] for each in (ours, clip))
        checks += [
            at_least(f"{seed}Spearman's rho of estimate and exact W1 (clipped {clip['spearman']:.3g})",
                     ours["spearman"], 0.8),
            at_most(f"{seed}exact W1 at the end, beyond the floor, by it (clipped {left_clip:.3g})", left, 0.3),
        ]  # fmt: skip
    return checks


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Above, estimate and exact distance through training, all seeds; below, samples of the first; by constraint."""
    figure, panels = new_figure(TITLE, 2, 2, height=7.4, height_ratios=(1, 1))
    floor = sum(r["floor"] for r in results) / len(results)
    for (constraint, label), axes, samples in zip(CONSTRAINTS.items(), panels[:2], panels[2:], strict=True):
        color = COLORS[constraint]
        right = axes.twinx()
        for r in results:
            seen = r[constraint]["seen"]
            axes.plot(column(seen, "step"), column(seen, "estimate"), color=color, linewidth=1.5)
            right.plot(
                column(seen, "step"), column(seen, "exact"), color=COLORS["exact"], linewidth=1.2, linestyle="--"
            )
        right.axhline(floor, color=COLORS["real"], linewidth=1)
        right.annotate("500 training digits", (0.02, floor), xycoords=("axes fraction", "data"), xytext=(0, 4),
                       textcoords="offset points", fontsize="small", color="0.4")  # fmt: skip
        right.set_ylim(2.4, 7)
        right.set_ylabel("exact W1 to held-out digits (dashed)")
        right.spines[["top", "left"]].set_visible(False)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("generator step")
        axes.set_ylabel("critic's estimate of W", color=color)
        axes.tick_params(axis="y", colors=color)
        rhos = ", ".join(f"{r[constraint]['spearman']:.2f}" for r in results)
        axes.set_title(f"{label}\nSpearman's ρ by seed: {rhos}", fontsize="medium")

        images = unpacked(results[0][constraint]["images"])  # [row, column, y, x]
        rows, columns, height, width = images.shape
        canvas = np.ones((rows * (height + 1), columns * (width + 1)))
        for i in range(rows):
            for j in range(columns):
                top, left = i * (height + 1), j * (width + 1)
                canvas[top : top + height, left : left + width] = images[i, j]
        samples.imshow(canvas, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        steps = column(results[0][constraint]["seen"], "step")[EVERY - 1 :: EVERY]
        samples.set_yticks([i * (height + 1) + height / 2 for i in range(rows)], [f"{step:,}" for step in steps])
        samples.set_xticks([])
        samples.set_xlabel(f"the same {columns} latents")
        samples.set_ylabel("generator step")
        samples.tick_params(length=0)
        samples.grid(False)
        samples.spines[:].set_visible(False)
    save(figure, path)
