"""Momentum in a clipped critic: training gets worse with it, as the WGAN paper found, which is why it took RMSProp.

Eight Gaussians under clipping. The generator always has RMSProp; the critic has RMSProp, Adam without momentum
(beta_1 = 0), Adam with it (0.9), or RMSProp with a momentum of 0.9. The latter adds ten steps up, so that it gets a
tenth of the rate; with all of it training is worse than without momentum, too, though by less. Quality is the exact W1
between 500 samples and 500 real points, in the mean over the second half of training. All of it is at a learning rate
of 1e-3, twenty times the paper's, and a bound of 0.03.

The trainer warns of a critic with momentum under clipping, which is expected here.

Source: arXiv 1701.07875, section 4.2.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.experiments.common import PALETTE, Check, at_least, at_most, new_figure, scaled
from benchmarks.experiments.training import column, save
from fastwgan import Adam, RMSprop, Trainer, WeightClip, models
from fastwgan.data import SampledBatches, gaussians8
from fastwgan.distances import wasserstein

TITLE = "Momentum in a clipped critic makes training worse (WGAN, section 4)"

WIDTH, DEPTH = 128, 3
BATCH = 256
STEPS = 3000  # of the critic
LOOKS = 20
MEASURED = 500
LR, BOUND = 1e-3, 0.03
OPTIMIZERS = {
    "rmsprop": "RMSProp",
    "adam": r"Adam, $\beta_1$ = 0",
    "adam-momentum": r"Adam, $\beta_1$ = 0.9",
    "rmsprop-momentum": "RMSProp, momentum 0.9",
}


def _optimizer(name: str, critic: nn.Module) -> Adam | RMSprop:
    if name == "rmsprop":
        return RMSprop(critic.parameters(), lr=LR)
    if name == "rmsprop-momentum":
        return RMSprop(critic.parameters(), lr=LR / 10, momentum=0.9)
    return Adam(critic.parameters(), lr=LR, betas=(0.9 if name == "adam-momentum" else 0.0, 0.999))


def _train(name: str, seed: int, scale: float) -> dict[str, Any]:
    torch.manual_seed(seed)
    generator = models.mlp([2, *[WIDTH] * DEPTH, 2])
    critic = models.mlp([2, *[WIDTH] * DEPTH, 1], slope=0.2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="WeightClip with a critic optimizer that has momentum")
        trainer = Trainer(
            generator,
            critic,
            latent=2,
            constraint=WeightClip(BOUND),
            critic_optimizer=_optimizer(name, critic),
            generator_optimizer=RMSprop(generator.parameters(), lr=LR),
            seed=seed,
        )
    batches = SampledBatches(gaussians8, BATCH, seed, torch.device("cpu"))
    random = torch.Generator().manual_seed(seed + 1_000_000)  # not the training's
    every, measured = scaled(STEPS // LOOKS, scale), scaled(MEASURED, min(scale, 1.0))
    seen = []
    for look in range(1, LOOKS + 1):
        estimates = [trainer.step(next(batches)).wasserstein for _ in range(every)]
        estimate = float(torch.stack([w for w in estimates if w is not None]).mean())
        exact = float(wasserstein(trainer.sample(measured), gaussians8(measured, random)))
        seen.append({"step": look * every, "estimate": estimate, "exact": exact})
    return {"seen": seen, "exact": sum(column(seen, "exact")[LOOKS // 2 :]) / (LOOKS - LOOKS // 2)}


def run(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Each optimizer: estimates and exact distances through training, and the latter's mean over its second half."""
    return {name: _train(name, seed, scale) for name in OPTIMIZERS}


def judge(results: list[dict[str, Any]]) -> list[Check]:
    """For each seed, of the exact W1: momentum makes it larger; Adam without does not."""
    checks = []
    for r in results:
        times = {name: r[name]["exact"] / r["rmsprop"]["exact"] for name in OPTIMIZERS}
        seed = f"seed {r['seed']}: exact W1 over RMSProp's, "
        checks += [
            at_least(f"{seed}Adam with momentum", times["adam-momentum"], 1.5),
            at_least(f"{seed}RMSProp with momentum", times["rmsprop-momentum"], 1.1),
            at_most(f"{seed}Adam without", times["adam"], 1.25),
        ]
    return checks


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """The exact distance and the estimate through training, by the critic's optimizer."""
    figure, (exact, estimate) = new_figure(TITLE, 1, 2, height=4.8)
    colors = dict(zip(OPTIMIZERS, (PALETTE[0], PALETTE[2], PALETTE[1], PALETTE[3]), strict=True))
    for name, label in OPTIMIZERS.items():
        style = "--" if name.endswith("momentum") else "-"
        for i, r in enumerate(results):
            seen = r[name]["seen"]
            for axes, quantity in ((exact, "exact"), (estimate, "estimate")):
                axes.plot(
                    column(seen, "step"), column(seen, quantity), style, color=colors[name], linewidth=1.4, alpha=0.85,
                    label=None if i else label,
                )  # fmt: skip
    exact.set_ylim(bottom=0)
    exact.set_ylabel(f"exact W1 of {MEASURED} samples to as many real ones")
    exact.legend(title="critic's optimizer", frameon=False, fontsize="small")
    estimate.set_yscale("symlog", linthresh=0.01)
    estimate.axhline(0, color="0.6", linewidth=0.8)
    estimate.set_ylabel("critic's estimate of K W, mean since the last look")
    for axes in (exact, estimate):
        axes.set_xlabel("critic step")
    save(figure, path)
