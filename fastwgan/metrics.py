"""The numbers that a step measured."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Metrics", "read"]

# The entries of a step's scores and of its penalty. The loss has no penalty in it yet.
SCORES = ("real_score", "fake_score", "wasserstein", "critic_loss")
PENALTY = ("penalty", "gradient_norm", "gradient_norm_min", "gradient_norm_max")

Lazy = Tensor | Callable[[], Tensor]  # a tensor, or what makes it when it is read, and then gives the same again


class Settled(NamedTuple):
    """The results of a step that is done, on the device."""

    scores: Lazy  # [mean real, mean fake, their difference, loss] of a critic, [loss] of a generator
    penalty: Lazy | None = None  # [mean penalty; mean, least and greatest norm]
    nonfinite: Lazy | None = None  # how many elements of the gradients were not finite, 0-d
    saturation: Lazy | None = None  # the share of weights on their bound, 0-d
    term: Lazy | None = None  # the value of the network's further term, [1]


class Results:
    """The entries of one step's results, or of all steps in a graph, one step after the other.

    A graph's come as one tensor, ``packed``, split when one is read; ``like`` has each entry's shape and dtype.
    """

    def __init__(self, entries: Sequence[Lazy | None] = (), packed: Tensor | None = None, like: Any = ()) -> None:
        self._entries, self._packed, self._like = entries, packed, like

    def read(self, step: int, name: str) -> Tensor | None:
        """Return an entry of the results of a step, by its name in Settled."""
        if self._packed is not None:
            parts = torch.split(self._packed, [each[0].numel() if each else 0 for each in self._like])
            pairs = zip(parts, self._like, strict=True)
            self._entries, self._packed = [x.view(each[0]).to(each[1]) if each else None for x, each in pairs], None
        fields = Settled._fields
        x = self._entries[len(fields) * step + fields.index(name)]
        return x() if callable(x) else x


Found = tuple[Results, int]  # the latter is a step's number there
CRITIC, GENERATOR = range(2)
PARTS = (
    ("scores", CRITIC, SCORES), ("penalty", CRITIC, PENALTY), ("saturation", CRITIC, ("saturation",)),
    ("scores", GENERATOR, ("generator_loss",)), ("term", CRITIC, ("critic_term",)),
    ("term", GENERATOR, ("generator_term",)), *(("nonfinite", player, ("nonfinite",)) for player in range(2)),
)  # fmt: skip


def _entry(name: str, i: Any, player: int = CRITIC) -> Tensor | None:
    """Return a property that gives an entry of a step's results, or None. It is typed as what it gives."""
    return property(lambda own: None if (x := own._read(name, player)) is None else x[i])  # type: ignore[return-value]


class Metrics:
    """The numbers that one step measured, as 0-d device tensors; None where the step has no such thing.

    Reading a value (``float``, ``print``, :meth:`as_dict`) is the only thing here that waits for the device.

    Attributes:
        critic_loss: -wasserstein + weight * penalty + critic_term, of which a step may have only the first.
        wasserstein: mean(D(real)) - mean(D(fake)); positive when the critic is any good.
        penalty: the mean penalty, without its weight; None under WeightClip and on a lazy penalty's off steps.
        real_score, fake_score: mean(D(real)), mean(D(fake)).
        gradient_norm, gradient_norm_min, gradient_norm_max: mean, least and greatest norm, over the samples, of the
            critic's input gradient; None where penalty is.
        saturation: share of the clamped weights on their bound, on a CPU counted when it is read, or as the next critic
            step begins; under NormClip, of rows whose norm was the bound or more before; None under GradientPenalty.
        generator_loss: -mean(D(G(z))) + generator_term, if any; None when no generator step was due.
        critic_term, generator_term: the values of these functions of the user's; None where the step had none.
        nonfinite: how many elements of the gradients were infinite or NaN. Unless it is 0, the update was skipped.
    """

    NAMES = (
        "critic_loss", "wasserstein", "penalty", "real_score", "fake_score", "gradient_norm", "gradient_norm_min",
        "gradient_norm_max", "saturation", "generator_loss", "critic_term", "generator_term", "nonfinite",
    )  # fmt: skip

    real_score, fake_score, wasserstein, _loss = (_entry("scores", i) for i in range(len(SCORES)))
    penalty, gradient_norm, gradient_norm_min, gradient_norm_max = (_entry("penalty", i) for i in range(len(PENALTY)))

    saturation, critic_term = _entry("saturation", ()), _entry("term", 0)
    generator_term, _generator_loss = _entry("term", 0, GENERATOR), _entry("scores", 0, GENERATOR)

    def __init__(self, critic: Found | None = None, generator: Found | None = None, *, weight: float = 0.0) -> None:
        self._found, self._weight = [critic, generator], weight

    def _read(self, name: str, player: int) -> Tensor | None:
        found = self._found[player]
        return None if found is None else found[0].read(found[1], name)

    def include(self, other: "Metrics") -> None:
        """Take in what the generator step behind this critic step measured."""
        self._found[GENERATOR] = other._found[GENERATOR]

    @property
    def critic_loss(self) -> Tensor | None:
        loss = self._loss
        if loss is not None and self.penalty is not None:
            loss = loss + self._weight * self.penalty
        return loss if loss is None or self.critic_term is None else loss + self.critic_term

    @property
    def generator_loss(self) -> Tensor | None:
        loss = self._generator_loss
        return loss if loss is None or self.generator_term is None else loss + self.generator_term

    @property
    def nonfinite(self) -> Tensor | None:
        counts = [x for player in (CRITIC, GENERATOR) if (x := self._read("nonfinite", player)) is not None]
        return sum(counts[1:], counts[0]) if counts else None

    def as_dict(self) -> dict[str, float]:
        """Return the values that there are, as floats. Waits for the device."""
        return read([self])[0]

    def _parts(self) -> list[tuple[Tensor, tuple[str, ...]]]:
        return [(x, names) for name, player, names in PARTS if (x := self._read(name, player)) is not None]

    def _values(self, numbers: Iterator[float]) -> dict[str, float]:
        values: dict[str, float] = {}
        for name in (name for _, names in self._parts() for name in names):
            values[name] = next(numbers) + values.get(name, 0.0)
        if "critic_loss" in values:
            values["critic_loss"] += self._weight * values.get("penalty", 0.0) + values.get("critic_term", 0.0)
        if "generator_loss" in values:
            values["generator_loss"] += values.get("generator_term", 0.0)
        return {name: values[name] for name in self.NAMES if name in values}

    def __repr__(self) -> str:
        return f"Metrics({', '.join(f'{k}={v:.4g}' for k, v in self.as_dict().items())})"


def read(metrics: Sequence[Metrics]) -> list[dict[str, float]]:
    """Return :meth:`Metrics.as_dict` of each of many steps, with one transfer. Waits for the device."""
    tensors = [x.detach().reshape(-1) for each in metrics for x, _ in each._parts()]
    numbers = iter(torch.cat(tensors).tolist() if tensors else ())
    return [each._values(numbers) for each in metrics]
