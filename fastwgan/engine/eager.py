"""The forward and backward passes of the two steps, op by op, which leave gradients in the parameters.

Backward is seeded directly at the scores (-1/N at real ones, +1/N at fake ones) and at the input gradient (the
penalty's cotangent), so there are no loss tensors and no kernels for them.

In mixed precision the forward passes alone run under autocast. The input gradient is divided by the loss scale before
the penalty is taken of it, in float32; the penalty's cotangent then needs no scale, as the input gradient has it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastwgan import checks
from fastwgan.constraints import Penalised
from fastwgan.engine.settings import Settings
from fastwgan.ops.penalty import NO_DEPENDENCE, WRITES, input_gradient, penalty_cotangent
from fastwgan.ops.scores import objective

NO_GRAPH = "its output: expected to depend on its parameters, got one without a graph"


class Passed(NamedTuple):
    """The results of a step's passes, beside the gradients that they leave."""

    scores: tuple[Tensor, ...]  # of real and fake samples, or of fake ones alone, without a graph
    statistics: Tensor | None = None  # as a settled step's scores, where the passes know them
    penalty: Tensor | None = None  # [mean penalty; mean, least and greatest norm]


@contextmanager
def _without_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Compute no gradients for these parameters within, and keep less for the backward pass."""
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def scores_of_both(critic: Callable[..., Tensor], both: Tensor, cond: tuple[Any, ...], pack: int) -> Tensor:
    """Return the scores of real samples, the first half of ``both``, and fake ones from one forward pass."""
    twice = (torch.cat((c, c)) if checks.is_batched(c, len(both) // 2) else c for c in cond)
    scores = critic(both, *twice)
    checks.scores("critic", scores, len(both), pack)
    return scores


def packed(x: Tensor, pack: int) -> Tensor:
    """Return samples [N, ...] as packs [N / pack, pack, ...]."""
    return x if pack == 1 else x.reshape(-1, pack, *x.shape[1:])


def has_hooks(p: Tensor) -> bool:
    """Return whether a backward pass would call hooks on a parameter."""
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)


class Eager:
    """The passes, op by op. ``share`` is this rank's share of the batch, which its gradients are multiplied by."""

    def __init__(self, generator: nn.Module, critic: nn.Module, settings: Settings, share: float) -> None:
        self._generator, self._critic, self._settings, self._share = generator, critic, settings, share
        self._device = next(critic.parameters()).device
        self._constants: dict[tuple[Any, ...], Tensor] = {}

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return the context of forward passes: the trainer's mixed precision, or the caller's."""
        # Without autocast's cache, which would hold weights as they were until the outermost context ends.
        kind, amp = self._device.type, self._settings.amp
        wanted = amp is not None or torch.is_autocast_enabled(kind)
        return torch.autocast(kind, amp, cache_enabled=False) if wanted else nullcontext()

    def score(self, samples: Tensor, *cond: Any) -> Tensor:
        """Return the critic's scores."""
        with self._autocast():
            scores: Tensor = self._critic(samples, *cond)
        return checks.samples("critic: its output", scores, self._device)

    def samples(self, z: Any, *cond: Any) -> Tensor:
        """Return the generator's samples."""
        with self._autocast():
            samples: Tensor = self._generator(z, *cond)
        return checks.samples("generator: its output", samples, self._device)

    @torch.no_grad()
    def _fake(self, z: Any, cond: tuple[Any, ...]) -> Tensor:
        return self.samples(z, *cond)

    def pair(self, real: Tensor, z: Any, cond: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """Return real and fake samples of one shape and dtype, made without a graph through the generator."""
        fake = self._fake(z, cond)
        if self._settings.amp is not None:
            real = real.float()
        if real.dtype == next(self._critic.parameters()).dtype:  # if not, it is real samples that do not fit
            fake = fake.to(real.dtype)
        checks.like("generator: its output", fake, "real", real, shape=True)
        return real, fake

    def critic(
        self, parameters: list[nn.Parameter], batch: tuple[Tensor, ...], penalised: Penalised | None,
        cond: tuple[Any, ...], *, known: bool = False, scale: Tensor | None = None,
    ) -> Passed:  # fmt: skip
        """Take the gradients of the critic's loss, times the loss scale, for parameters without gradients.

        ``batch`` is real and fake samples [N, ...] without a graph, or both as one batch [2 N, ...], real ones first.
        If the critic's layers are ``known``, the scores have a backward pass of their own, which frees what their
        forward pass has kept before the penalty needs as much. In other critics two parameters' gradients may share
        memory, into which a second backward pass would add twice.
        """
        pack, penalty = self._settings.pack, None
        with torch.enable_grad():
            roots, seeds, scores, statistics = self._scores(batch, cond, scale)
            if not all(root.requires_grad for root in roots):
                raise ValueError(f"critic: {NO_GRAPH}")
            if penalised is not None:
                if known and not any(map(has_hooks, parameters)):  # hooks get whole gradients, once
                    torch.autograd.backward(roots, seeds, inputs=parameters)
                    roots, seeds = [], []
                x, weight, kind, target = penalised
                seeds_like: Callable[[Tensor], Tensor] = partial(self._constant, value=1.0)
                if scale is not None:
                    rounded = (scale / (len(x) // pack)).half()  # as in the loss; float16 holds no 65536
                    seeds_like = rounded.expand_as
                gradients = input_gradient(self.score, x.requires_grad_(), cond, seeds_like, pack)
                unscaled = gradients.detach() if scale is None else gradients.detach() / rounded.float()
                penalty, cotangent = penalty_cotangent(
                    packed(unscaled, pack), kind, target, weight * self._share, self._settings.backend
                )
                if scale is not None:
                    cotangent = cotangent * (scale / rounded.float())
                if gradients.requires_grad:
                    roots, seeds = [*roots, gradients], [*seeds, cotangent.view(gradients.shape)]
            if roots:
                torch.autograd.backward(roots, seeds, inputs=parameters)
        return Passed(scores, statistics, penalty)

    def generator(
        self, parameters: list[nn.Parameter], frozen: list[nn.Parameter], z: Any, cond: tuple[Any, ...], batch: int,
        dtype: torch.dtype, scale: Tensor | None = None,
    ) -> Passed:  # fmt: skip
        """Take the gradients of the generator's loss; the critic, whose parameters are ``frozen``, gets ``dtype``."""
        with torch.enable_grad(), _without_gradients(frozen):
            fake = self.samples(z, *cond)
            if len(fake) != batch:
                raise ValueError(f"generator: its output: expected shape [{batch}, ...], got {tuple(fake.shape)}")
            if not fake.requires_grad:
                raise ValueError(f"generator: {NO_GRAPH}")
            scores = self.score(fake.to(dtype), *cond)
            checks.scores("critic", scores, batch, self._settings.pack)
            if not scores.requires_grad:
                raise ValueError(NO_DEPENDENCE)
            if self._settings.blend:
                loss, seed = self._objective(None, scores, scale)
            else:
                loss, seed = None, self._seed(scores, scale, -self._share / scores.numel())
            torch.autograd.backward([scores], [seed.view(scores.shape)], inputs=parameters)
        return Passed((scores.detach(),), loss)

    def _objective(self, real_scores: Tensor | None, fake: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return (statistics of scores, cotangents of them all, flat), of losses whose gradients are no constants."""
        options = {"blend": self._settings.blend, "drift": 0.0 if real_scores is None else self._settings.drift}
        backend = self._settings.backend
        return objective(real_scores, fake, weight=self._share, scale=scale, backend=backend, **options)

    def _scores(
        self, batch: tuple[Tensor, ...], cond: tuple[Any, ...], scale: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...], Tensor | None]:
        """Return (roots of the backward pass, their cotangents, scores, statistics that come with the cotangents)."""
        if len(batch) == 1:
            roots = [scores_of_both(self.score, *batch, cond, self._settings.pack)]
            scores = roots[0].detach().tensor_split(2)
        else:
            versions = [x._version for x in batch]
            roots = [self.score(x, *cond) for x in batch]
            if [x._version for x in batch] != versions:  # another batch than the caller's from then on
                raise ValueError(WRITES)
            checks.scores("critic", roots[0], len(batch[0]), self._settings.pack)
            checks.like("critic: its output", roots[1], "that for real samples", roots[0], shape=True)
            scores = tuple(root.detach() for root in roots)
        if self._settings.blend or self._settings.drift:
            statistics, slopes = self._objective(scores[0], scores[1], scale)
            parts = zip(slopes.tensor_split(len(roots)), roots, strict=True)
            return roots, [part.view(root.shape) for part, root in parts], scores, statistics
        value = self._share / scores[0].numel()
        if len(roots) == 1:
            return roots, [self._seed(roots[0], scale, -value, value)], scores, None
        return roots, [self._seed(roots[0], scale, -value), self._seed(roots[1], scale, value)], scores, None

    def _seed(self, scores: Tensor, scale: Tensor | None, value: float, second_half: float | None = None) -> Tensor:
        """Return a constant cotangent of scores, scaled before it is rounded: 1 / N may be too small for float16."""
        if scale is None:
            return self._constant(scores, value, second_half)
        return (self._constant(scores, value, second_half, torch.float32) * scale).to(scores.dtype)

    def _constant(
        self, like: Tensor, value: float, second_half: float | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a constant shaped like ``like``, made once; the later half of the batch may have another value."""
        dtype = dtype or like.dtype
        key = (like.shape, dtype, like.device, value, second_half)
        constant = self._constants.get(key)
        if constant is None:
            constant = torch.full_like(like, value, requires_grad=False, dtype=dtype)
            if second_half is not None:
                constant[len(constant) // 2 :] = second_half
            self._constants[key] = constant  # for good: a graph may read it
        return constant
