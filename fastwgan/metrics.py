"""What a step measured."""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

__all__ = ["Metrics", "read"]


class Metrics:
    """What one step measured, as 0-d device tensors; None where the step has no such thing.

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

    def __init__(
        self,
        *,
        scores: Tensor | None = None,
        penalty: Tensor | None = None,
        weight: float = 0.0,
        saturation: Tensor | None = None,
        generator_loss: Tensor | None = None,
        nonfinite: tuple[Tensor, ...] = (),
    ) -> None:
        self._scores, self._penalty, self._weight = scores, penalty, weight
        self.saturation = saturation
        self.generator_loss = generator_loss
        self._nonfinite = nonfinite

    def include(self, other: "Metrics") -> None:
        """Take in what the generator step behind this critic step measured."""
        self.generator_loss = other.generator_loss
        self._nonfinite += other._nonfinite

    @property
    def nonfinite(self) -> Tensor | None:
        return sum(self._nonfinite[1:], self._nonfinite[0]) if self._nonfinite else None

    @property
    def real_score(self) -> Tensor | None:
        return None if self._scores is None else self._scores[0]

    @property
    def fake_score(self) -> Tensor | None:
        return None if self._scores is None else self._scores[1]

    @property
    def wasserstein(self) -> Tensor | None:
        return None if self._scores is None else self._scores[2]

    @property
    def critic_loss(self) -> Tensor | None:
        if self._scores is None or self._penalty is None:
            return None if self._scores is None else self._scores[3]
        return self._scores[3] + self._weight * self._penalty[0]

    @property
    def penalty(self) -> Tensor | None:
        return None if self._penalty is None else self._penalty[0]

    @property
    def gradient_norm(self) -> Tensor | None:
        return None if self._penalty is None else self._penalty[1]

    @property
    def gradient_norm_min(self) -> Tensor | None:
        return None if self._penalty is None else self._penalty[2]

    @property
    def gradient_norm_max(self) -> Tensor | None:
        return None if self._penalty is None else self._penalty[3]

    def as_dict(self) -> dict[str, float]:
        """The values that there are, as floats. Waits for the device."""
        return read([self])[0]

    def _parts(self) -> list[Tensor]:
        parts = (self._scores, self._penalty, self.saturation, self.generator_loss, *self._nonfinite)
        return [x.detach().reshape(-1) for x in parts if x is not None]

    def _values(self, numbers: Iterator[float]) -> dict[str, float]:
        """What :meth:`_parts` were, read from the device, by name."""
        values = {}
        if self._scores is not None:
            values["real_score"], values["fake_score"], values["wasserstein"], values["critic_loss"] = islice(
                numbers, 4
            )
        if self._penalty is not None:
            names = ("penalty", "gradient_norm", "gradient_norm_min", "gradient_norm_max")
            values |= dict(zip(names, islice(numbers, 4), strict=True))
            if self._scores is not None:
                values["critic_loss"] += self._weight * values["penalty"]
        if self.saturation is not None:
            values["saturation"] = next(numbers)
        if self.generator_loss is not None:
            values["generator_loss"] = next(numbers)
        if self._nonfinite:
            values["nonfinite"] = sum(islice(numbers, len(self._nonfinite)))
        return {name: values[name] for name in self.NAMES if name in values}

    def __repr__(self) -> str:
        return f"Metrics({', '.join(f'{k}={v:.4g}' for k, v in self.as_dict().items())})"


def read(metrics: Sequence[Metrics]) -> list[dict[str, float]]:
    """The values of many steps as floats, with one transfer: :meth:`Metrics.as_dict` of each. Waits for the device."""
    tensors = [part for each in metrics for part in each._parts()]
    numbers = iter(torch.cat(tensors).tolist() if tensors else ())
    return [each._values(numbers) for each in metrics]
