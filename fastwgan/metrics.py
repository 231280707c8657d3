"""The numbers that a step measured."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Metrics", "read"]

# The entries of a step's scores and of its penalty. The loss has no penalty in it yet.
SCORES = ("real_score", "fake_score", "wasserstein", "critic_loss")
PENALTY = ("penalty", "gradient_norm", "gradient_norm_min", "gradient_norm_max")


def _entry(name: str, i: int) -> Tensor | None:
    """Return a property that gives an entry of an attribute, None without one. It is typed as what it gives."""

    def entry(metrics: "Metrics") -> Any:
        entries = getattr(metrics, name)
        return None if entries is None else entries[i]

    return property(entry)  # type: ignore[return-value]


class Metrics:
    """The numbers that one step measured, as 0-d device tensors; None where the step has no such thing.

    Reading a value (``float``, ``print``, :meth:`as_dict`) is the only thing here that waits for the device.

    Attributes:
        critic_loss: -wasserstein, or what ``blend`` and ``drift`` make of it, + weight * penalty.
        wasserstein: mean(D(real)) - mean(D(fake)); positive when the critic is any good.
        penalty: the mean penalty, without its weight; None under WeightClip and on a lazy penalty's off steps.
        real_score, fake_score: mean(D(real)), mean(D(fake)).
        gradient_norm, gradient_norm_min, gradient_norm_max: mean, least and greatest norm, over the samples, of the
            critic's input gradient; None where penalty is.
        saturation: share of the clamped weights that lie on their bound; under NormClip, of the rows whose norm was the
            bound or more before the projection; None under GradientPenalty.
        generator_loss: -mean(D(G(z))), or what ``blend`` makes of it; None when no generator step was due.
        nonfinite: how many elements of the gradients were infinite or NaN. Unless it is 0, the update was skipped.
    """

    NAMES = (
        "critic_loss", "wasserstein", "penalty", "real_score", "fake_score", "gradient_norm", "gradient_norm_min",
        "gradient_norm_max", "saturation", "generator_loss", "nonfinite",
    )  # fmt: skip

    real_score, fake_score, wasserstein, _loss = (_entry("_scores", i) for i in range(len(SCORES)))
    penalty, gradient_norm, gradient_norm_min, gradient_norm_max = (_entry("_penalty", i) for i in range(len(PENALTY)))

    def __init__(
        self, *, scores: Tensor | None = None, penalty: Tensor | None = None, weight: float = 0.0,
        saturation: Tensor | None = None, generator_loss: Tensor | None = None, nonfinite: tuple[Tensor, ...] = (),
    ) -> None:  # fmt: skip
        self._scores, self._penalty, self._weight = scores, penalty, weight
        self.saturation, self.generator_loss, self._nonfinite = saturation, generator_loss, nonfinite

    def include(self, other: "Metrics") -> None:
        """Take in what the generator step behind this critic step measured."""
        self.generator_loss = other.generator_loss
        self._nonfinite += other._nonfinite

    @property
    def critic_loss(self) -> Tensor | None:
        if self._loss is None or self.penalty is None:
            return self._loss
        return self._loss + self._weight * self.penalty

    @property
    def nonfinite(self) -> Tensor | None:
        return sum(self._nonfinite[1:], self._nonfinite[0]) if self._nonfinite else None

    def as_dict(self) -> dict[str, float]:
        """Return the values that there are, as floats. Waits for the device."""
        return read([self])[0]

    def _parts(self) -> list[tuple[Tensor, tuple[str, ...]]]:
        """Return the tensors that there are, each with the names of its entries."""
        parts = [(self._scores, SCORES), (self._penalty, PENALTY), (self.saturation, ("saturation",))]
        parts += [(self.generator_loss, ("generator_loss",)), *((count, ("nonfinite",)) for count in self._nonfinite)]
        return [(x, names) for x, names in parts if x is not None]

    def _values(self, numbers: Iterator[float]) -> dict[str, float]:
        """Return by name what the parts were, read from the device."""
        values: dict[str, float] = {}
        for name in (name for _, names in self._parts() for name in names):
            values[name] = next(numbers) + values.get(name, 0.0)
        if "critic_loss" in values and "penalty" in values:
            values["critic_loss"] += self._weight * values["penalty"]
        return {name: values[name] for name in self.NAMES if name in values}

    def __repr__(self) -> str:
        return f"Metrics({', '.join(f'{k}={v:.4g}' for k, v in self.as_dict().items())})"


def read(metrics: Sequence[Metrics]) -> list[dict[str, float]]:
    """Return :meth:`Metrics.as_dict` of each of many steps, with one transfer. Waits for the device."""
    tensors = [x.detach().reshape(-1) for each in metrics for x, _ in each._parts()]
    numbers = iter(torch.cat(tensors).tolist() if tensors else ())
    return [each._values(numbers) for each in metrics]
