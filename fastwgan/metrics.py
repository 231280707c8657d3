"""The numbers that a step measured."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Metrics", "read"]

# The entries of a step's scores and of its penalty. The loss has no penalty in it yet.
SCORES = ("real_score", "fake_score", "wasserstein", "critic_loss")
PENALTY = ("penalty", "gradient_norm", "gradient_norm_min", "gradient_norm_max")


class Settled(NamedTuple):
    """The results of a step that is done, on the device."""

    scores: Tensor | None = None  # [mean real, mean fake, their difference, loss] of a critic, [loss] of a generator
    penalty: Tensor | None = None  # [mean penalty; mean, least and greatest norm]
    nonfinite: Tensor | None = None  # how many elements of the gradients were not finite, 0-d
    saturation: Tensor | None = None  # the share of weights on their bound, 0-d


Like = Sequence[tuple[torch.Size, torch.dtype] | None]


class Results:
    """The results of the steps of a graph or of one step, each a Settled; ``packed`` ones are unpacked when one is read.

    Of these ``like`` has the shape and dtype of each entry, or None.
    """

    def __init__(self, entries: Sequence[Tensor | None] = (), packed: Tensor | None = None, like: Like = ()) -> None:
        self._entries, self._packed, self._like = entries, packed, like

    def step(self, i: int) -> Settled:
        """Return the results of step ``i``."""
        if self._packed is not None:
            parts = torch.split(self._packed, [each[0].numel() if each else 0 for each in self._like])
            pairs = zip(parts, self._like, strict=True)
            self._entries, self._packed = [x.view(each[0]).to(each[1]) if each else None for x, each in pairs], None
        width = len(Settled._fields)
        return Settled._make(self._entries[width * i : width * (i + 1)])


Found = tuple[Results, int]  # the latter is a step's number there
NOTHING: Found = (Results([None] * len(Settled._fields)), 0)


def _entry(name: str, i: int) -> Tensor | None:
    """Return a property that gives an entry of a critic step's results, or None. It is typed as what it gives."""

    def entry(metrics: "Metrics") -> Any:
        entries = getattr(metrics._settled(0), name)
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

    real_score, fake_score, wasserstein, _loss = (_entry("scores", i) for i in range(len(SCORES)))
    penalty, gradient_norm, gradient_norm_min, gradient_norm_max = (_entry("penalty", i) for i in range(len(PENALTY)))

    def __init__(self, critic: Found = NOTHING, generator: Found = NOTHING, *, weight: float = 0.0) -> None:
        self._found, self._weight = [critic, generator], weight

    def _settled(self, i: int) -> Settled:
        """Return what the critic's step measured, or with 1 the generator's."""
        results, step = self._found[i]
        return results.step(step)

    def include(self, other: "Metrics") -> None:
        """Take in what the generator step behind this critic step measured."""
        self._found[1] = other._found[1]

    @property
    def saturation(self) -> Tensor | None:
        return self._settled(0).saturation

    @property
    def generator_loss(self) -> Tensor | None:
        loss = self._settled(1).scores
        return None if loss is None else loss[0]

    @property
    def critic_loss(self) -> Tensor | None:
        if self._loss is None or self.penalty is None:
            return self._loss
        return self._loss + self._weight * self.penalty

    @property
    def nonfinite(self) -> Tensor | None:
        counts = [x for x in (self._settled(0).nonfinite, self._settled(1).nonfinite) if x is not None]
        return sum(counts[1:], counts[0]) if counts else None

    def as_dict(self) -> dict[str, float]:
        """Return the values that there are, as floats. Waits for the device."""
        return read([self])[0]

    def _parts(self) -> list[tuple[Tensor, tuple[str, ...]]]:
        """Return the tensors that there are, each with the names of its entries."""
        critic, generator = self._settled(0), self._settled(1)
        parts = [(critic.scores, SCORES), (critic.penalty, PENALTY), (critic.saturation, ("saturation",))]
        parts += [(generator.scores, ("generator_loss",))]
        parts += [(each.nonfinite, ("nonfinite",)) for each in (critic, generator)]
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
