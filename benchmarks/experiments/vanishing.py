"""Two Gaussians that hardly overlap, and what a GAN's discriminator and a WGAN's critics tell the generator there.

Real samples are N(-2.5, 0.5^2), generated ones N(2.5, 0.5^2), ten standard deviations apart. Each network is trained on
fresh samples of both while its learning rate decays to zero. What the generator then follows at its own samples is the
slope of log(1 - D(x)), downhill, or of a critic's score, uphill. The better the discriminator, the less slope it leaves
there, while the best critic of two such heaps is a straight line.

Source: arXiv 1701.07875, figure 2.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.experiments.common import COLORS, Check, Fixed, at_least, at_most, new_figure, scaled, starting_at_zero
from fastwgan import Adam, GradientPenalty, RMSprop, Trainer, WeightClip, models

TITLE = "Two distant Gaussians: the discriminator's gradient vanishes, the critics' do not (WGAN, figure 2)"

MEAN, DEVIATION = 2.5, 0.5  # of the generated samples; of the real ones the mean is the negative
SIZES, SLOPE = (1, 64, 64, 1), 0.2
BATCH = 256
WEIGHT = 10.0
BOUND = 0.1


def _gaussian(mean: float, n: int, random: torch.Generator) -> Tensor:
    return mean + DEVIATION * torch.randn(n, 1, generator=random)


def _discriminator(random: torch.Generator, steps: int) -> nn.Module:
    """Logits of D, trained by the GAN loss."""
    network = models.mlp(SIZES, slope=SLOPE)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.5, 0.999))
    schedule = CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        real, fake = _gaussian(-MEAN, BATCH, random), _gaussian(MEAN, BATCH, random)
        loss = softplus(-network(real)).mean() + softplus(network(fake)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return network


def _critic(constraint: WeightClip | GradientPenalty, random: torch.Generator, steps: int, seed: int) -> nn.Module:
    network = starting_at_zero(models.mlp(SIZES, slope=SLOPE))
    optimizer: torch.optim.Optimizer
    if isinstance(constraint, WeightClip):
        optimizer = RMSprop(network.parameters(), lr=2e-3)
    else:
        optimizer = Adam(network.parameters(), lr=2e-3, betas=(0.0, 0.9))
    trainer = Trainer(
        Fixed(),
        network,
        latent=lambda n, _: _gaussian(MEAN, n, random),
        constraint=constraint,
        critic_optimizer=optimizer,
        critic_scheduler=CosineAnnealingLR(optimizer, steps),
        seed=seed,
    )
    for _ in range(steps):
        trainer.critic_step(_gaussian(-MEAN, BATCH, random))
    return network


def _pull(values: Tensor, x: Tensor) -> Tensor:
    """-d values / dx [N] at x [N, 1]: the slope towards the real samples, which lie to the left of the generated."""
    (gradient,) = torch.autograd.grad(values.sum(), x)
    return -gradient.flatten()


def run(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Each network's values and slopes on the line, and its slopes at generated samples."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    logits = _discriminator(random, scaled(3000, scale))
    penalised = _critic(GradientPenalty(WEIGHT), random, scaled(1500, scale), seed)
    clipped = _critic(WeightClip(BOUND), random, scaled(500, scale), seed)
    # By network: what is drawn, and what the generator raises. (It lowers log(1 - D), which is logsigmoid(-logits).)
    networks: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "gan": (lambda x: logits(x).sigmoid(), lambda x: -logsigmoid(-logits(x))),
        "penalty": (penalised, penalised),
        "clip": (clipped, clipped),
    }
    line = torch.linspace(-5, 5, 121)[:, None].requires_grad_()
    fakes = _gaussian(MEAN, 4096, random).requires_grad_()
    result: dict[str, Any] = {"x": line.flatten().tolist()}
    for name, (value, raised) in networks.items():
        on_line, on_fakes = _pull(raised(line), line), _pull(raised(fakes), fakes)
        result[name] = {
            "value": value(line).flatten().tolist(),
            "slope": on_line.tolist(),
            "least": on_fakes.min().item(),
            "mean": on_fakes.mean().item(),
            "largest": torch.cat((on_line, on_fakes)).abs().max().item(),
        }
    return result


def judge(results: list[dict[str, Any]]) -> list[Check]:
    """At the generated samples the critics' slopes, which lead to the real ones, stay; the discriminator's is gone."""
    ratio = [r["clip"]["least"] / r["clip"]["largest"] for r in results]
    least = [r["penalty"]["least"] for r in results]
    vanished = [abs(r["gan"]["mean"]) for r in results]
    share = [abs(r["gan"]["mean"]) / r[name]["mean"] for r in results for name in ("penalty", "clip")]
    return [
        at_least("penalised critic: least slope at generated samples", least, 0.5),
        at_least("clipped critic: least slope there over its largest anywhere", ratio, 0.1),
        at_most("discriminator: mean slope of log(1 - D) there", vanished, 1e-3),
        at_most("the same over a critic's mean slope", share, 1e-2),
    ]


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Densities and what the networks of the first seed say, and under it their slopes, of all seeds."""
    figure, (upper, lower) = new_figure(TITLE, 2, 1, height=7, sharex=True, height_ratios=(3, 2))
    x = results[0]["x"]
    for name, mean in (("real", -MEAN), ("fake", MEAN)):
        density = [
            math.exp(-(((each - mean) / DEVIATION) ** 2) / 2) / (DEVIATION * math.sqrt(2 * math.pi)) for each in x
        ]
        label = "real" if name == "real" else "generated"
        upper.fill_between(x, density, color=COLORS[name], alpha=0.35, linewidth=0, label=f"{label}, density")
    labels = {
        "gan": "discriminator D",
        "penalty": f"critic, gradient penalty (weight {WEIGHT:g})",
        "clip": f"critic, clipped at {BOUND:g}",
    }
    for name, label in labels.items():
        value = results[0][name]["value"]
        low, high = min(value), max(value)
        upper.plot(x, [(each - low) / (high - low) for each in value], color=COLORS[name], linewidth=1.8, label=label)
        for r in results:
            lower.plot(x, [abs(each) for each in r[name]["slope"]], color=COLORS[name], linewidth=1.2, alpha=0.8)
    steepness = 2 * MEAN / DEVIATION**2  # of the optimal discriminator's logits, a straight line
    optimum = [steepness / (1 + math.exp(steepness * each)) for each in x]
    lower.plot(x, optimum, color=COLORS["exact"], linewidth=1, linestyle=":", label="of the optimal D")
    upper.set_ylabel("density; scores, from 0 to 1")
    upper.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize="small", ncols=5)
    lower.legend(loc="center left", frameon=False, fontsize="small")
    lower.set_yscale("log")
    lower.set_ylim(1e-12, 100)
    lower.set_ylabel("|slope|: of log(1 - D), of a critic")
    lower.set_xlabel("x")
    figure.savefig(path)
