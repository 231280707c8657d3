"""How many steps the critic takes to one of the generator: with too few, its estimate says nothing about the samples.

Digits under the penalty, equally many generator steps each, from the same networks. At generator steps that grow by a
constant factor, the critic's estimate of W, in the mean over its last 20 steps, is set beside the exact W1 between 500
fresh samples and 500 held-out digits. A critic of one or two steps starts far from its best and rises towards it while
the samples get better: the two go opposite ways. From five steps on they fall together. The samples themselves gain
less from more critic steps than the estimate does.

Source: arXiv 1701.07875, section 3 (the critic is to be trained till optimality) and figure 3.
"""

from pathlib import Path
from typing import Any

from benchmarks.experiments.common import PALETTE, Check, at_least, at_most, new_figure, scaled
from benchmarks.experiments.training import LATENT, checkpoints, column, digit_networks, follow, save, spearman
from fastwgan import Adam, GradientPenalty, Trainer

TITLE = "Critic steps per generator step: only a trained critic's estimate tracks the samples (WGAN, section 3)"

COUNTS = (1, 2, 5, 10)
STEPS = 600  # of the generator
WEIGHT = 10.0


def _train(n_critic: int, seed: int, scale: float) -> dict[str, Any]:
    generator, critic = digit_networks(seed)
    trainer = Trainer(
        generator,
        critic,
        latent=LATENT,
        constraint=GradientPenalty(WEIGHT),
        critic_optimizer=Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.9)),
        generator_optimizer=Adam(generator.parameters(), lr=1e-4, betas=(0.0, 0.9)),
        n_critic=n_critic,
        seed=seed,
    )
    seen = list(follow(trainer, seed, checkpoints(5, scaled(STEPS, scale))))
    return {"seen": seen, "spearman": spearman(seen)}


def run(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """For each of COUNTS: estimates and exact distances through training, and their rank correlation."""
    return {str(n): _train(n, seed, scale) for n in COUNTS}


def judge(results: list[dict[str, Any]]) -> list[Check]:
    """For each seed: the estimates of many critic steps follow the exact distance, those of one step do not."""
    checks = []
    for r in results:
        rho = {n: r[str(n)]["spearman"] for n in COUNTS}
        checks += [
            at_least(f"seed {r['seed']}: Spearman's rho, 10 critic steps", rho[10], 0.8),
            at_least(f"seed {r['seed']}: Spearman's rho, 5 critic steps", rho[5], 0.6),
            at_most(f"seed {r['seed']}: Spearman's rho, 1 critic step", rho[1], 0.4),
        ]
    return checks


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """The exact distance, the estimate, and how they go together, by the number of critic steps."""
    figure, (exact, estimate, rank) = new_figure(TITLE, 1, 3, height=4.6, width_ratios=(1, 1, 0.7))
    for n, color in zip(COUNTS, PALETTE, strict=False):
        for i, r in enumerate(results):
            seen = r[str(n)]["seen"]
            label = None if i else f"{n} critic step{'s' * (n > 1)}"
            for axes, name in ((exact, "exact"), (estimate, "estimate")):
                axes.plot(column(seen, "step"), column(seen, name), color=color, linewidth=1.3, alpha=0.85, label=label)
    for axes, label in ((exact, "exact W1 to held-out digits"), (estimate, "critic's estimate of W")):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("generator step")
        axes.set_ylabel(label)
    exact.legend(frameon=False, fontsize="small")
    for place, (n, color) in enumerate(zip(COUNTS, PALETTE, strict=False)):
        rhos = [r[str(n)]["spearman"] for r in results]
        rank.plot([place] * len(rhos), rhos, "o", color=color, markersize=8, fillstyle="none", markeredgewidth=1.6)
    rank.axhline(0, color="0.6", linewidth=0.8)
    rank.set(xticks=range(len(COUNTS)), xticklabels=COUNTS, xlim=(-0.6, len(COUNTS) - 0.4), ylim=(-1.05, 1.05))
    rank.set_xlabel("critic steps")
    rank.set_ylabel("Spearman's ρ of estimate and exact W1")
    save(figure, path)
