"""The tensors that go through a trainer's step, as its passes hand them on."""

from functools import partial
from typing import Any

from torch import Tensor

from fastwgan.engine.eager import Eager
from fastwgan.engine.piecewise import Pass


class Observed:
    """The tensors that went through a trainer's passes since the last :meth:`forget`."""

    z: Any  # the generator's input
    fake: Tensor | None  # its output
    between: tuple[Tensor, ...] | None  # what the penalty's points are between, and the points
    x: Tensor | None  # where the penalty is taken, if that is a sample
    gradient: Tensor | None  # the critic's there
    cotangent: Tensor | None  # the gradient that the penalty's backward pass began with
    scores: list[Tensor]  # of each pass of the critic but the penalty's: of all samples at once, or of each kind
    seeds: list[Tensor | None]  # the gradients that the backward pass began with there
    bent: list[Tensor]  # where each block's output is above zero, of a critic without a second backward pass

    def __init__(self, passes: Eager) -> None:
        self._samples, self._score = passes.samples, passes.score
        passes.samples, passes.score = self._of_generator, self._of_critic  # type: ignore[assignment, method-assign]
        passes.way = partial(_ObservedPass, self)

    def forget(self) -> None:
        self.z = self.fake = self.between = self.x = self.gradient = self.cotangent = None
        self.scores, self.seeds, self.bent = [], [], []

    def _of_generator(self, z: Any, *cond: Any) -> Any:
        found = self._samples(z, *cond)
        self.z, self.fake = copied(z), copied(found[0])
        return found

    def _of_critic(self, x: Any, *cond: Any) -> Any:
        penalised = isinstance(x, Tensor) and x.requires_grad and x.is_leaf  # as only the penalty's points are
        scored = self._score(x, *cond)
        if penalised:
            self.x = copied(x)
            x.register_hook(self._on_gradient)
        else:
            i = len(self.scores)
            self.scores.append(copied(scored[0]))
            self.seeds.append(None)
            if scored[0].requires_grad:
                scored[0].register_hook(lambda seed: self.seeds.__setitem__(i, copied(seed)))  # type: ignore[no-untyped-call]
        return scored

    def _on_gradient(self, gradient: Tensor) -> None:
        if self.gradient is None:
            self.gradient = copied(gradient)
            if gradient.requires_grad:
                gradient.register_hook(lambda x: setattr(self, "cotangent", copied(x)))  # type: ignore[no-untyped-call]


class _ObservedPass(Pass):
    """A pass of a piecewise linear critic that records its tensors in ``seen``."""

    def __init__(self, seen: Observed, blocks: Any, backend: Any, real: Tensor, fake: Tensor, points: Any, *rest: Any):
        def between(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
            x: Tensor = points(a, b, out)
            seen.between, seen.x = (copied(a), copied(b), copied(x)), copied(x) if out is None else None
            return x

        self._seen = seen
        super().__init__(blocks, backend, real, fake, points and between, *rest)

    def backward(self, seeds: Tensor) -> Tensor | None:
        seen, rows = self._seen, self._rows
        seen.scores, seen.seeds = [copied(self.states[-1][:rows])], [copied(seeds[:rows])]
        seen.bent = [x > 0 for block, x in zip(self._blocks, self.states[1:], strict=True) if block.bends]
        seen.gradient = copied(gradient := super().backward(seeds))
        return gradient

    def gradients(self, wanted: Any) -> Any:
        self._seen.cotangent = copied(self.states[0][self._rows :])
        return super().gradients(wanted)


def parts(values: list[Any], n: int) -> list[Any]:
    """Return what is of each of ``n`` kinds of samples: of values that are one for all, or one for each; else None."""
    values = values[:n]  # a term may have had other passes
    if len(values) == 1 and values[0] is not None:
        return [*values[0].tensor_split(n)]
    return values if len(values) == n else [None] * n


def copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x
