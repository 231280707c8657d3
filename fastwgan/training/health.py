"""Tells by the numbers of WGAN training what goes wrong in it, and what to do about it.

The thresholds lie between what was measured, over windows of 500 steps, on training that works (``fastwgan train`` on
all its data, both constraints) and on training made to fail (learning rates, bounds and weights off by 10 to 1000).
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from fastwgan.constraints import WeightClip

WINDOW = 500  # steps that are judged together; the first window is judged by its non-finite steps alone
NONFINITE = 10  # steps of a window; fewer are no fault: a loss scale finds its range by overflowing
# Share of steps in each of two windows in a row. Working runs: one window of at most 0.42, later ones 0.25; sign
# changes 0.27. Critics that learn too slowly: 0.5 to 1; those whose learning rate is far too high change sign in 0.5.
NEGATIVE, SIGN_CHANGES = 0.45, 0.4
# Times the penalty's target. Working runs: a mean of 1.0 to 2.2 and no norm above 7.3, with penalties of a hundredth of
# the usual weight. Where the penalty has lost its grip: means from 6.5 to 85,000, and norms from 23 up.
STEEP_MEAN, STEEP_MAX = 6, 20
# Times the target of a two-sided penalty, which pulls norms up as well. Working runs: above 1.0; slow ones 0.15. Other
# penalties may rightly bring the norm near 0, though not to 0.
FLAT_MEAN = 0.1
SATURATION = 0.95  # mean share of weights on their bound, up to 0.41 in working runs; at 1 the critic is their signs


class HealthWarning(UserWarning):
    """The numbers of a training run look like a known kind of failure."""


def _mean(steps: Sequence[Mapping[str, float]], name: str) -> float:
    """Return the mean over the steps that have a finite value; NaN, neither above nor below anything, for none."""
    values = [step[name] for step in steps if math.isfinite(step.get(name, math.nan))]
    return sum(values) / len(values) if values else math.nan


class Health:
    """Looks at every step's values and gives each piece of advice once; norms by the constraint's kind and target."""

    def __init__(self, constraint: object) -> None:
        self._kind, self._target = getattr(constraint, "kind", None), getattr(constraint, "target", 0.0)
        self._clamps = isinstance(constraint, WeightClip)  # rows on NormClip's bound still have a direction
        self._window: list[Mapping[str, float]] = []
        self._bad, self._first, self._lagged = 0, True, False  # steps of this window; this one; the one before
        self._given: set[str] = set()

    def watch(self, steps: Sequence[Mapping[str, float]]) -> list[str]:
        """Take up the values of the next steps; return advice, a sentence each, that has not been given yet."""
        new = []
        for step in steps:
            self._window.append(step)
            self._bad += step.get("nonfinite", 0) != 0 or not math.isfinite(step.get("wasserstein", 0))
            advice = {}
            if self._bad >= NONFINITE:
                symptom = f"{self._bad} of {len(self._window)} steps had gradients or scores that were infinite or NaN"
                advice[symptom] = "lower the learning rates, and look for such numbers in the data"
            if len(self._window) == WINDOW:
                advice |= {} if self._first else self._judge_window()
                self._window, self._bad, self._first = [], 0, False
            new += [f"{symptom}: {remedy}" for symptom, remedy in advice.items() if remedy not in self._given]
            self._given |= set(advice.values())
        return new

    def _judge_window(self) -> dict[str, str]:
        """Return what is wrong with the window's steps: the symptom and its remedy."""
        kind, target = self._kind, self._target
        norm, saturation = (_mean(self._window, name) for name in ("gradient_norm", "saturation"))
        most = max(step.get("gradient_norm_max", 0.0) for step in self._window)
        values = [step["wasserstein"] for step in self._window if "wasserstein" in step]
        negative = sum(value < 0 for value in values) / max(1, len(values))
        changes = sum(a * b < 0 for a, b in pairwise(values)) / max(1, len(values))
        lagged, self._lagged = self._lagged, negative > NEGATIVE or changes > SIGN_CHANGES
        average = f"the critic's gradient norm was {norm:.3g} on average"
        if kind in ("two-sided", "one-sided") and target and (norm > STEEP_MEAN * target or most > STEEP_MAX * target):
            symptom = f"{average} and {most:.3g} at most, far above the penalty's target {target:g}"
            return {symptom: "raise the penalty's weight or lower the critic's learning rate"}
        if norm <= (FLAT_MEAN * target if kind == "two-sided" else 0):
            symptom = f"{average}, so the generator learns next to nothing from it"
            return {symptom: "raise the critic's learning rate or n_critic, and look for layers that died"}
        if self._clamps and saturation > SATURATION:
            symptom = f"{saturation:.0%} of the clipped weights lie on their bound"
            symptom += ", which leaves the critic little but their signs"
            return {symptom: "widen WeightClip's bound or lower the critic's learning rate"}
        if lagged and self._lagged:  # last, as any other cause is more definite
            symptom = f"the Wasserstein estimate was negative in {negative:.0%} of the last {WINDOW} steps and changed "
            symptom += f"its sign in {changes:.0%}, as when the critic does not keep ahead of the generator"
            return {symptom: "raise n_critic or the critic's learning rate (lower that one if its scores jump)"}
        return {}
