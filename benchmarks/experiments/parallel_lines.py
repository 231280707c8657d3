"""The WGAN paper's first example: two parallel lines, one at x = 0, one at x = theta, both uniform over y in [0, 1].

Exactly: W = |theta|, while JS = log 2 and KL is infinite wherever theta is not 0. A critic is trained for each theta,
on the lines alone. Under the penalty of weight lambda, a slope s is worth s |theta| - lambda (s - 1)^2 to it, so that
it settles on s = 1 + |theta| / (2 lambda): with lambda = 20 its estimate is up to 2.5% too large. Under clipping its
slope is the largest that the bound allows, some K whatever theta is, so that the estimate is K |theta|.

Source: arXiv 1701.07875, example 1 and figure 1.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.experiments.common import COLORS, Check, Fixed, at_least, at_most, new_figure, scaled, starting_at_zero
from fastwgan import Adam, GradientPenalty, RMSprop, Trainer, WeightClip
from fastwgan.distances import js_divergence, kl_divergence, wasserstein

TITLE = "Parallel lines: W and the critic's estimate move with the distance, JS and KL do not (WGAN, example 1)"

THETAS = [round(-1 + 0.1 * i, 1) for i in range(21)]
WIDTH = 64
BATCH = 64
WEIGHT = 20.0
BOUND = 0.1


def _heights(n: int) -> Tensor:
    """The middles of n equal parts of [0, 1]."""
    return (torch.arange(n) + 0.5) / n


def _line(x: float, y: Tensor) -> Tensor:
    return torch.stack((torch.full_like(y, x), y), 1)


def _exact(theta: float) -> tuple[float, float, float]:
    """W, JS and KL of the lines as 64 points each, or as 64 cells in each of THETAS' columns."""
    y = _heights(64).double()
    p, q = torch.zeros(2, len(THETAS), len(y), dtype=torch.float64)
    p[THETAS.index(0.0)], q[THETAS.index(theta)] = 1 / len(y), 1 / len(y)
    p, q = p.flatten(), q.flatten()
    w = wasserstein(_line(0.0, y), _line(theta, y))
    return float(w), float(js_divergence(p, q)), float(kl_divergence(p, q))


def _estimate(theta: float, constraint: WeightClip | GradientPenalty, seed: int, scale: float) -> float:
    """What a critic trained on the two lines says of their distance."""
    torch.manual_seed(seed)  # the same critic for each theta
    critic = starting_at_zero(nn.Sequential(nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)))
    random = torch.Generator().manual_seed(seed)
    optimizer: torch.optim.Optimizer
    if isinstance(constraint, WeightClip):
        steps, optimizer = scaled(200, scale), RMSprop(critic.parameters(), lr=2e-3)
    else:
        steps, optimizer = scaled(300, scale), Adam(critic.parameters(), lr=5e-3, betas=(0.0, 0.9))
    trainer = Trainer(
        Fixed(),
        critic,
        latent=lambda n, _: _line(theta, torch.rand(n, generator=random)),
        constraint=constraint,
        critic_optimizer=optimizer,
        critic_scheduler=CosineAnnealingLR(optimizer, steps),
        seed=seed,
    )
    for _ in range(steps):
        trainer.critic_step(_line(0.0, torch.rand(BATCH, generator=random)))
    with torch.no_grad():
        y = _heights(BATCH)
        return float(critic(_line(0.0, y)).mean() - critic(_line(theta, y)).mean())


def run(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """For each of THETAS: what is exact, and what the two critics say."""
    w, js, kl = zip(*map(_exact, THETAS), strict=True)
    return {
        "theta": THETAS,
        "w": w,
        "js": js,
        "kl": kl,
        "penalty": [_estimate(theta, GradientPenalty(WEIGHT), seed, scale) for theta in THETAS],
        "clip": [_estimate(theta, WeightClip(BOUND), seed, scale) for theta in THETAS],
    }


def _fit(result: dict[str, Any]) -> tuple[float, float]:
    """K of the clipped critic's estimates by least squares through the origin, and R^2 (against their mean)."""
    distance, estimate = torch.tensor(result["theta"]).abs(), torch.tensor(result["clip"])
    k = distance @ estimate / (distance @ distance)
    left = (estimate - k * distance).square().sum() / (estimate - estimate.mean()).square().sum()
    return float(k), float(1 - left)


def judge(results: list[dict[str, Any]]) -> list[Check]:
    """What is exact is as theory has it; the penalised critic comes near W, the clipped one near a multiple of it."""
    rows = [
        (abs(theta), w, js, float(kl), estimate)
        for r in results
        for theta, w, js, kl, estimate in zip(r["theta"], r["w"], r["js"], r["kl"], r["penalty"], strict=True)
    ]
    off_w = [abs(w - d) for d, w, *_ in rows]
    off_js = [abs(js - math.log(2)) for d, _, js, *_ in rows if d > 0]
    infinite = [kl == math.inf for d, _, _, kl, _ in rows if d > 0]
    off_penalty = [abs(estimate / d - 1) for d, *_, estimate in rows if d >= 0.2]
    return [
        at_most("exact W: largest difference from |theta|", off_w, 1e-6),
        at_most("JS off zero: largest difference from log 2", off_js, 1e-5),
        at_least("KL off zero: share that is infinite", sum(infinite) / len(infinite), 1),
        at_most("penalised critic, |theta| >= 0.2: largest relative error", off_penalty, 0.05),
        at_least("clipped critic: R^2 of K |theta|", [_fit(r)[1] for r in results], 0.99),
    ]


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """W and what the critics make of it on the left, the divergences on the right."""
    figure, (left, right) = new_figure(TITLE, 1, 2, height=4.6)
    theta = results[0]["theta"]
    ks = [_fit(r)[0] for r in results]
    left.plot(theta, results[0]["w"], color=COLORS["exact"], linewidth=1.2, label="W, exact")
    labels: tuple[str | None, ...] = (
        f"critic, gradient penalty (weight {WEIGHT:g})",
        f"critic, clipped at {BOUND:g}, divided by K = {sum(ks) / len(ks):.3f}",
        "the same as it is",
    )
    for r, k in zip(results, ks, strict=True):
        scaled_up = [each / k for each in r["clip"]]
        left.plot(theta, r["penalty"], "o", color=COLORS["penalty"], markersize=7, fillstyle="none", label=labels[0])
        left.plot(theta, scaled_up, "x", color=COLORS["clip"], markersize=7, label=labels[1])
        left.plot(theta, r["clip"], color=COLORS["clip"], linewidth=1, alpha=0.35, label=labels[2])
        labels = (None, None, None)  # once is enough
    left.set_ylabel("distance of the two lines")
    left.legend(loc="upper center", frameon=False, fontsize="small")

    js, kl = results[0]["js"], [float(each) for each in results[0]["kl"]]
    infinity = 1.05  # where to draw it
    right.axhline(math.log(2), color=COLORS["exact"], linewidth=0.8, linestyle=":", label="log 2")
    right.plot(theta, js, "s", color=COLORS["gan"], markersize=6, label="JS")
    right.plot(theta, [min(each, infinity) for each in kl], "^", color=COLORS["other"], markersize=6, label="KL")
    right.set_yticks([0.0, 0.2, 0.4, 0.6, 0.8, infinity], ["0.0", "0.2", "0.4", "0.6", "0.8", "∞"])
    right.set_ylabel("divergence, nats")
    right.legend(loc="upper center", frameon=False, fontsize="small", ncols=3)
    for axes in (left, right):
        axes.set_ylim(-0.05, 1.45)
        axes.set_xlabel(r"$\theta$, where the second line stands")
    figure.savefig(path)
