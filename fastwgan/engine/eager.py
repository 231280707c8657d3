"""The forward and backward passes of the two steps, op by op, which leave gradients in the parameters.

Backward is seeded directly at the scores (-1/N at real ones, +1/N at fake ones) and at the input gradient (the
penalty's cotangent), so there are no loss tensors and no kernels for them.

In mixed precision the forward passes alone run under autocast. The input gradient is divided by the loss scale before
the penalty is taken of it, in float32; the penalty's cotangent then needs no scale, as the input gradient has it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastwgan import checks
from fastwgan.backend import resolve
from fastwgan.constraints import Penalised, Samples
from fastwgan.engine.fused import fused
from fastwgan.engine.piecewise import Block, Pass
from fastwgan.engine.settings import Settings
from fastwgan.engine.terms import Scored, StepRecord, halves, split
from fastwgan.ops.penalty import NO_DEPENDENCE, WRITES, input_gradient, packed, penalty_cotangent

_form = attrgetter("shape", "dtype", "device", "layout")
hooks_of = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")  # of a parameter, which backward passes call
NO_GRAPH = "its output: expected to depend on its parameters, got one without a graph"


Points = Callable[..., Penalised]  # takes samples, and perhaps an ``out`` tensor for the points


class Passed(NamedTuple):
    """The results of a step's passes, beside the gradients that they leave."""

    scores: tuple[Tensor, ...]  # of real and fake samples, or of fake ones alone, without a graph
    statistics: Tensor | None = None  # as a settled step's scores, where the passes know them
    penalty: Tensor | None = None  # [mean penalty; mean, least and greatest norm]
    term: Tensor | None = None  # the user's, [1]


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


def hand_over(gradients: dict[nn.Parameter, Tensor]) -> None:
    """Give parameters without gradients theirs, as a backward pass does."""
    for p, gradient in gradients.items():
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            torch.autograd.backward([p], [gradient])
        else:
            p.grad = gradient


def conditions_of_both(samples: Samples) -> list[Any]:
    """Return the conditions of real samples and fake ones as one batch."""
    n, pairs = len(samples.real), zip(samples.cond, samples.fake_cond, strict=True)
    return [torch.cat((c, other)) if checks.is_batched(c, n) else c for c, other in pairs]


class Eager:
    """The passes, op by op. ``share`` is this rank's share of the batch, which its gradients are multiplied by."""

    def __init__(self, generator: nn.Module, critic: nn.Module, settings: Settings, share: float) -> None:
        self._generator, self._critic, self._settings, self._share = generator, critic, settings, share
        self._device, self._commutes = next(critic.parameters()).device, settings.constraint.commutes
        self._backend = resolve(settings.backend, self._device)
        self._constants: dict[tuple[Any, ...], Tensor] = {}
        self._fused: Callable[[Any], Any] = generator
        self._version = 0  # the generator's when ``_fused`` was made
        self.way: Callable[..., Pass] = Pass  # makes the pass of critic_by_blocks; verification replaces it

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return the context of forward passes: the trainer's mixed precision, or the caller's."""
        # Without autocast's cache, which would hold weights as they were until the outermost context ends.
        kind, amp = self._device.type, self._settings.amp
        wanted = amp is not None or torch.is_autocast_enabled(kind)
        return torch.autocast(kind, amp, cache_enabled=False) if wanted else nullcontext()

    def doubt(self) -> str | None:
        """Return why :meth:`critic_by_blocks` cannot take a step now, or None."""
        mixed = self._settings.amp is not None or torch.is_autocast_enabled(self._device.type)
        packs = "packs of samples are scored together" if self._settings.pack > 1 else None
        return "mixed precision is on" if mixed else packs

    def follow(self, version: int) -> None:
        """Merge the layers of a new version of the generator; a compiler merges them by itself."""
        if self._backend == "triton" and self._version != version and not self._settings.compile:
            self._fused, self._version = fused(self._generator), version

    def score(self, samples: Tensor, *cond: Any) -> Scored:
        """Return the critic's scores, and what it returned behind them."""
        with self._autocast():
            output = self._critic(samples, *cond)
        scores = checks.scores("critic", output, samples.shape[0], self._settings.pack, self._device)
        return scores, output[1:] if isinstance(output, tuple) else ()

    def samples(self, z: Any, *cond: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return the generator's samples, whatever they are, and what it returned behind them."""
        with self._autocast():
            output = self._generator(z, *cond) if cond else self._fused(z)
        return (output, ()) if isinstance(output, Tensor) else split(output)

    def pair(self, given: Samples, z: Any) -> Samples:
        """Return real samples, and fake ones of their shape and dtype, made without a graph through the generator."""
        real = given.real
        with torch.no_grad():
            fake, outputs = self.samples(z, *given.fake_cond)
        if self._settings.amp is not None:
            real = real.float()
        # If real samples have another dtype than the critic, it is they that do not fit.
        floating = isinstance(fake, Tensor) and fake.is_floating_point()
        if floating and real.dtype != fake.dtype and real.dtype == next(self._critic.parameters()).dtype:
            fake = fake.to(real.dtype)
        if not isinstance(fake, Tensor) or _form(fake) != _form(real):
            checks.samples("generator: its output", fake, device=self._device)
            checks.like("generator: its output", fake, "real", real, shape=True)
        return given._replace(real=real, fake=fake, outputs=outputs)

    def critic(
        self, parameters: list[nn.Parameter], samples: Samples, batch: tuple[Tensor, ...],
        penalised: Penalised | None, *, layers: Sequence[nn.Module] | None = None, scale: Tensor | None = None,
    ) -> Passed:  # fmt: skip
        """Take the gradients of the critic's loss, times the loss scale, for parameters without gradients.

        ``batch`` is real and fake samples [N, ...] without a graph, or both as one batch [2 N, ...], real ones first.
        If the critic's ``layers`` are known, the scores have a backward pass of their own, which frees what their
        forward pass has kept before the penalty needs as much. In other critics two parameters' gradients may share
        memory, into which a second backward pass would add twice.
        """
        pack, penalty, term = self._settings.pack, None, None
        with torch.enable_grad():
            roots, seeds, real, fake = self._scores(samples, batch, scale)
            if not all(root.requires_grad for root in roots):
                raise ValueError(f"critic: {NO_GRAPH}")
            if self._settings.critic_term is not None:
                term = self._add_term("critic", StepRecord(samples, self.score, real, fake), roots, seeds, scale)
            if penalised is not None:
                hooked = any(chain.from_iterable(map(hooks_of, parameters)))  # hooks get whole gradients, once
                if layers is not None and not hooked:
                    torch.autograd.backward(roots, seeds, inputs=parameters)
                    roots, seeds = [], []
                x, cond, weight, kind, target, joined, _ = penalised
                seeds_like: Callable[[Tensor], Tensor] = partial(self._constant, values=(1.0,))
                if scale is not None:
                    rounded = (scale / (len(x) // pack)).half()  # as in the loss; float16 holds no 65536
                    seeds_like = rounded.expand_as
                score: Callable[..., Any] = self.score
                if joined:
                    score, cond = lambda x: self.score(*penalised.inputs(x)), ()
                gradients = input_gradient(score, x.requires_grad_(), cond, seeds_like, pack)
                unscaled = gradients.detach() if scale is None else gradients.detach() / rounded.float()
                of_packs = unscaled if pack == 1 else packed(unscaled, pack)
                penalty, cotangent = penalty_cotangent(of_packs, kind, target, weight * self._share, self._backend)
                if scale is not None:
                    cotangent = cotangent * (scale / rounded.float())
                if gradients.requires_grad:
                    roots, seeds = [*roots, gradients], [*seeds, cotangent.view(gradients.shape)]
            if roots:
                torch.autograd.backward(roots, seeds, inputs=parameters)
        return Passed((real[0].detach(), fake[0].detach()), None, penalty, term)

    @torch.no_grad()
    def critic_by_blocks(
        self, parameters: list[nn.Parameter], samples: Samples, points: Points | None, blocks: Sequence[Block]
    ) -> Passed:
        """Take the gradients of a piecewise linear critic's loss, as :mod:`fastwgan.engine.piecewise` explains."""
        n, penalised, gradients = len(samples.real), list[Penalised](), dict[nn.Parameter, Tensor]()
        term = penalty = None

        def seeds(scores: Tensor) -> Tensor:
            parts = len(scores) // n
            value = self._share * parts / scores.numel()
            return self._constant(scores, (-value, value, 1.0)[:parts])

        def between(real: Tensor, fake: Tensor, out: Tensor | None = None) -> Tensor:
            assert points is not None
            penalised.append(points(samples._replace(real=real, fake=fake), out=out))
            return penalised[-1].x

        termless = self._settings.critic_term is None
        given = samples.real.detach(), samples.fake, points and between, self._commutes, seeds if termless else None
        run = self.way(blocks, self._backend, *given)
        options: Any = penalised.pop()[2:5] if penalised else None  # drops the points, which frees their memory
        scores = checks.scores("critic", run.states[-1], len(run.states[0]), 1, self._device)
        at_scores, real, fake = run.seeds if run.seeds is not None else seeds(scores), scores[:n], scores[n : 2 * n]
        if not termless:
            with torch.enable_grad():
                both, roots, cotangents = scores[: 2 * n].detach().requires_grad_(), list[Tensor](), list[Tensor]()
                record = StepRecord(samples, self.score, *((x, ()) for x in both.tensor_split(2)))
                term = self._add_term("critic", record, roots, cotangents, None)
            of_both, *own = torch.autograd.grad(roots, [both, *parameters], cotangents, allow_unused=True)
            gradients = {p: g for p, g in zip(parameters, own, strict=True) if g is not None}
            if of_both is not None:
                at_scores = at_scores.clone()
                at_scores[: 2 * n] += of_both
        if (g := run.backward(at_scores)) is not None:
            weight, kind, target = options
            penalty, v = penalty_cotangent(g, kind, target, weight * self._share, self._backend)
            run.states[0][2 * n :] = v
        for p, gradient in run.gradients({*parameters}):
            gradients[p] = gradients[p] + gradient if p in gradients else gradient  # tied weights have several
        hand_over(gradients)
        return Passed((real, fake), None, penalty, term)

    def generator(
        self, parameters: list[nn.Parameter], frozen: list[nn.Parameter], given: Samples, z: Any, batch: int,
        dtype: torch.dtype, scale: Tensor | None = None,
    ) -> Passed:  # fmt: skip
        """Take the gradients of the generator's loss; the critic, whose parameters are ``frozen``, gets ``dtype``."""
        term = None
        with torch.enable_grad(), _without_gradients(frozen):
            fake, outputs = self.samples(z, *given.fake_cond)
            fake = checks.samples("generator: its output", fake, device=self._device)
            if len(fake) != batch:
                raise ValueError(f"generator: its output: expected shape [{batch}, ...], got {tuple(fake.shape)}")
            if not fake.requires_grad:
                raise ValueError(f"generator: {NO_GRAPH}")
            fake = fake.to(dtype)
            scored = scores, _ = self.score(fake, *given.fake_cond)
            if not scores.requires_grad:
                raise ValueError(NO_DEPENDENCE)
            roots, seeds = [scores], [self._constant(scores, (-self._share / scores.numel(),), scale)]
            if self._settings.generator_term is not None:
                record = StepRecord(given._replace(fake=fake, outputs=outputs), self.score, None, scored)
                term = self._add_term("generator", record, roots, seeds, scale)
            torch.autograd.backward(roots, seeds, inputs=parameters)
        return Passed((scores.detach(),), term=term)

    def term(self, name: str, record: StepRecord) -> Tensor:
        """Return the value of a network's further term."""
        with self._autocast():
            value = getattr(self._settings, f"{name}_term")(record)
        return checks.term(f"{name}_term", value, self._device)

    def _add_term(
        self, name: str, record: StepRecord, roots: list[Tensor], seeds: list[Tensor], scale: Tensor | None
    ) -> Tensor:  # fmt: skip
        """Add a further term to the roots of a backward pass, and its cotangent; return its value, [1]."""
        value = self.term(name, record)
        if not value.requires_grad:
            raise ValueError(f"{name}_term: its result: expected to depend on the {name}, got one without a graph")
        roots.append(value)
        seeds.append(self._constant(value, (self._share,), scale))
        return value.detach().reshape(1)

    def _scores(
        self, samples: Samples, batch: tuple[Tensor, ...], scale: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Scored, Scored]:
        """Return (roots of the backward pass, their cotangents, scores and outputs of real samples, of fake ones)."""
        if len(batch) == 1:
            root, outputs = self.score(*batch, *(conditions_of_both(samples) if samples.cond else ()))
            (real, fake), rest = root.tensor_split(2), halves(outputs, len(root)) if outputs else ((), ())
            value = self._share / real.numel()
            return [root], [self._constant(root, (-value, value), scale)], (real, rest[0]), (fake, rest[1])
        versions = [x._version for x in batch]
        scored = self.score(batch[0], *samples.cond), self.score(batch[1], *samples.fake_cond)
        if [x._version for x in batch] != versions:  # another batch than the caller's from then on
            raise ValueError(WRITES)
        roots = [scores for scores, _ in scored]
        checks.like("critic: its output", roots[1], "that for real samples", roots[0], shape=True)
        value = self._share / roots[0].numel()
        seeds = [self._constant(root, (sign * value,), scale) for root, sign in zip(roots, (-1, 1), strict=True)]
        return roots, seeds, *scored

    def _constant(self, like: Tensor, values: tuple[float, ...], scale: Tensor | None = None) -> Tensor:
        """Return a constant shaped like ``like``, made once, whose rows have these values, in equal parts.

        It is scaled before it is rounded, as 1 / N may be too small for float16.
        """
        dtype = like.dtype if scale is None else torch.float32
        key = (like.shape, dtype, like.device, values)
        constant = self._constants.get(key)
        if constant is None:
            constant = torch.full_like(like, values[0], requires_grad=False, dtype=dtype)
            for i, value in enumerate(values[1:], 1):
                constant[i * len(constant) // len(values) :] = value
            self._constants[key] = constant  # for good: a graph may read it
        return constant if scale is None else (constant * scale).to(like.dtype)
