"""What the experiments share: their form, checks, a generator that is not trained, and the look of the pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "PALETTE",
    "Check",
    "Experiment",
    "Fixed",
    "at_least",
    "at_most",
    "new_figure",
    "scaled",
    "starting_at_zero",
]


# The form of an experiment


@dataclass(frozen=True)
class Check:
    """A claim, as measured.

    Attributes:
        name: what was measured.
        value: the figure, of the worst seed where it is one of several.
        bound: such as ">= 0.99".
        passed: whether the value keeps to it.
    """

    name: str
    value: float
    bound: str
    passed: bool


def at_least(name: str, value: float | Sequence[float], bound: float) -> Check:
    """A check that value >= bound, of several values the least. NaN fails it."""
    least = float(np.min(value))  # unlike Python's min, NaN if one of them is
    return Check(name, least, f">= {bound:g}", least >= bound)


def at_most(name: str, value: float | Sequence[float], bound: float) -> Check:
    """A check that value <= bound, of several values the largest. NaN fails it."""
    largest = float(np.max(value))
    return Check(name, largest, f"<= {bound:g}", largest <= bound)


class Experiment(Protocol):
    """What an experiment has: a module with these names, or an object."""

    @property
    def TITLE(self) -> str:  # noqa: N802 - in a module it is a constant
        """One line: what is shown, of which paper."""

    def run(self, seed: int, scale: float = 1.0) -> dict[str, Any]:
        """Train with one seed, ``scale`` times as long as the bounds are meant for; the results, ready for JSON."""

    def judge(self, results: list[dict[str, Any]]) -> list[Check]:
        """What has to hold over all seeds."""

    def draw(self, results: list[dict[str, Any]], path: Path) -> None:
        """Write the picture, a PNG."""


def scaled(steps: int, scale: float) -> int:
    """So many times the steps, but at least one."""
    return max(1, round(steps * scale))


# Training


class Fixed(nn.Module):
    """A generator that hands on its latents: the samples are what the trainer's ``latent`` draws. For critics alone."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))  # an optimizer wants something to train

    def forward(self, z: Tensor) -> Tensor:
        return z


def starting_at_zero(network: nn.Sequential) -> nn.Sequential:
    """The network, its last layer's weights and biases set to zero.

    For critics under the penalty in one or two dimensions: the two-sided one is for any slope of norm 1, and may keep a
    critic that starts with one of the wrong sign from turning. From zero the first step turns the right way.
    """
    for p in network[-1].parameters():
        nn.init.zeros_(p)
    return network


# Pictures

# Okabe and Ito's colours, which colour-blind readers tell apart. What a colour stands for is the same in all pictures.
COLORS = {
    "real": "#8c8c8c",  # real samples
    "fake": "#e69f00",  # generated ones, where they are not one constraint's
    "exact": "#000000",  # what theory or an exact solver says
    "penalty": "#0072b2",  # WGAN-GP, and what its generator makes
    "clip": "#d55e00",  # WGAN with weight clipping
    "gan": "#009e73",  # the GAN loss, or another that is compared with
    "other": "#cc79a7",
}
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#56b4e9", "#000000")  # for a family of settings


def new_figure(
    title: str, rows: int = 1, columns: int = 1, *, height: float = 5.5, **options: Any
) -> "tuple[Figure, list[Axes]]":
    """An empty picture 1200 pixels wide, and its panels, row by row.

    Args:
        title: over all of it.
        rows, columns: of panels.
        height: inches, of 120 pixels; it is 10 wide.
        options: on to ``Figure.subplots``, such as ``sharex=True`` or ``height_ratios=(2, 1)``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize="large")
    panels: list[Axes] = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, panels
