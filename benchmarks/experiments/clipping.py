"""What clipping does to a deep critic: gradients that explode or vanish on their way down, weights pushed to the bound.

A critic of 12 hidden ReLU layers is trained on the Swiss roll against the same with unit Gaussian noise, as in the
paper: there is no generator to depend on. Every critic of a seed starts with the same Gaussian weights, of the variance
that PyTorch gives linear layers: one in twenty starts beyond the largest bound. After training, the gradient of
mean(D(fake)) - mean(D(real)), the critic's loss without the penalty, is taken with respect to each hidden layer's
activations, in float64, as float32 cannot square it.

Source: arXiv 1704.00028, figure 1.
"""

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.experiments.common import COLORS, PALETTE, Check, Fixed, at_least, at_most, new_figure, scaled
from fastwgan import Adam, GradientPenalty, RMSprop, Trainer, WeightClip, models
from fastwgan.data import swissroll

TITLE = (
    "Clipping a deep critic: gradients explode or vanish, weights pile up; not so under the penalty (WGAN-GP, fig. 1)"
)

WIDTH, DEPTH = 128, 12
BATCH = 256
WEIGHT = 10.0
BOUNDS = (0.1, 0.01, 0.001)
BINS, RANGE = 51, 0.255  # of the histograms, to either side of zero; the bound is in the middle of a bin


def _noisy(n: int, random: torch.Generator) -> Tensor:
    return swissroll(n, random) + torch.randn(n, 2, generator=random)


def _gradient_norms(critic: nn.Sequential, random: torch.Generator) -> list[float]:
    """Of the loss of 1024 real and as many fake samples, by hidden layer, the first one first."""
    x = torch.cat((swissroll(1024, random), _noisy(1024, random))).double()
    activations = []
    for layer in copy.deepcopy(critic).double():
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            activations.append(x)
    real, fake = x.chunk(2)
    return [float(g.norm()) for g in torch.autograd.grad(fake.mean() - real.mean(), activations)]


def _growth(norms: list[float]) -> float:
    """Slope of log10(norm) per layer, from the output towards the input, by least squares."""
    layers = torch.arange(len(norms), 0.0, -1, dtype=torch.float64)  # from the output
    logs = torch.tensor(norms, dtype=torch.float64).log10()
    away = layers - layers.mean()
    return float(away @ (logs - logs.mean()) / away.square().sum())


def _weights(critic: nn.Module) -> Tensor:
    """Those between hidden layers, which are nearly all, and start with one variance."""
    return torch.cat([p.detach().flatten() for p in critic.parameters() if p.shape == (WIDTH, WIDTH)]).double()


def _train(constraint: WeightClip | GradientPenalty, seed: int, scale: float) -> dict[str, Any]:
    torch.manual_seed(seed)
    critic = models.mlp([2, *[WIDTH] * DEPTH, 1])
    for p in critic.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, 0.0, 1 / math.sqrt(3 * p.shape[1]))
    random = torch.Generator().manual_seed(seed)
    steps = scaled(500, scale)
    optimizer: torch.optim.Optimizer
    schedule = None
    if isinstance(constraint, WeightClip):  # about 400 steps from zero to the bound
        optimizer = RMSprop(critic.parameters(), lr=constraint.bound / 400)
    else:
        optimizer = Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
        schedule = CosineAnnealingLR(optimizer, steps)
    trainer = Trainer(
        Fixed(),
        critic,
        latent=lambda n, _: _noisy(n, random),
        constraint=constraint,
        critic_optimizer=optimizer,
        critic_scheduler=schedule,
        seed=seed,
    )
    for _ in range(steps):
        metrics = trainer.critic_step(swissroll(BATCH, random))

    norms, weights = _gradient_norms(critic, random), _weights(critic)
    spread = weights - weights.mean()
    result = {
        "norms": norms,
        "growth": _growth(norms),
        "histogram": torch.histc(weights, BINS, -RANGE, RANGE).int().tolist(),
        "kurtosis": float(spread.pow(4).mean() / spread.square().mean().square()),
        "near_largest": float((weights.abs() > 0.95 * weights.abs().max()).double().mean()),
    }
    if isinstance(constraint, WeightClip):
        assert metrics.saturation is not None
        clipped = torch.cat([p.detach().flatten() for p in critic.parameters()])
        result["saturation"] = float(metrics.saturation)
        result["on_bound"] = float((clipped.abs() >= constraint.bound).double().mean())
    return result


def run(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """A critic under the penalty and one for each bound: gradient norms by layer, and how the weights lie."""
    clipped = {f"{bound:g}": _train(WeightClip(bound), seed, scale) for bound in BOUNDS}
    return {"penalty": _train(GradientPenalty(WEIGHT), seed, scale), **clipped}


def judge(results: list[dict[str, Any]]) -> list[Check]:
    """Gradients explode for the first bound, vanish for the others, and are steady under the penalty; weights pile up
    on the bound, as Metrics.saturation says, and keep their bell shape under the penalty."""
    large, small, least = (f"{bound:g}" for bound in BOUNDS)
    grown = {name: [r[name]["growth"] for r in results] for name in ("penalty", large, small, least)}
    further = [b - a for a, b in zip(grown[small], grown[least], strict=True)]
    miscounted = [abs(r[name]["saturation"] - r[name]["on_bound"]) for r in results for name in (large, small, least)]
    per_layer = "log10 of the gradient's growth per layer down"
    return [
        at_least(f"c = {large}: {per_layer}", grown[large], 0.3),
        at_most(f"c = {small}: {per_layer}", grown[small], -0.5),
        at_most(f"c = {least}: the same, beyond that of c = {small}", further, -0.5),
        at_most("penalty: the same, either way", [abs(each) for each in grown["penalty"]], 0.1),
        at_least(f"c = {large}: share of weights on the bound", [r[large]["on_bound"] for r in results], 0.3),
        at_most("Metrics.saturation: difference from that share, counted", miscounted, 1e-6),
        at_most("penalty: share of weights near the largest", [r["penalty"]["near_largest"] for r in results], 0.01),
        at_least("penalty: kurtosis of weights (Gauss 3)", [r["penalty"]["kurtosis"] for r in results], 2.5),
    ]


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Gradient norms by layer of all seeds on the left, weights of the first on the right."""
    figure, (left, right) = new_figure(TITLE, 1, 2, height=5, width_ratios=(3, 2))
    bounds = [f"{bound:g}" for bound in BOUNDS]
    colors = {"penalty": COLORS["penalty"], bounds[0]: COLORS["clip"], bounds[1]: PALETTE[3], bounds[2]: PALETTE[4]}
    labels = {"penalty": f"gradient penalty (weight {WEIGHT:g})"} | {each: f"clipped at {each}" for each in bounds}
    for name in (bounds[0], "penalty", *bounds[1:]):
        for i, r in enumerate(results):
            layers = range(1, len(r[name]["norms"]) + 1)
            label = None if i else labels[name]
            left.plot(layers, r[name]["norms"], "o-", color=colors[name], linewidth=1.3, markersize=3, label=label)
    left.set_yscale("log")
    left.set_xlabel("hidden layer, counted from the input")
    left.set_ylabel("norm of the loss's gradient at the layer's activations")
    left.set_xticks(range(1, DEPTH + 1))
    left.legend(frameon=False, fontsize="small")

    width = 2 * RANGE / BINS
    edges = [-RANGE + width * i for i in range(BINS + 1)]
    for name in (bounds[0], "penalty"):
        counts = results[0][name]["histogram"]
        shares = [count / sum(counts) for count in counts]
        right.stairs(shares, edges, color=colors[name], alpha=0.3, fill=True)
        right.stairs(shares, edges, color=colors[name], linewidth=1.3, label=labels[name])
    right.set_xlabel("weight between hidden layers")
    right.set_ylabel(f"share of weights, in bins of {width:g}")
    right.legend(frameon=False, fontsize="small")
    figure.savefig(path)
