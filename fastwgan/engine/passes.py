"""The forward and backward passes of the two steps, which leave gradients in the parameters.

:class:`Eager` seeds backward directly at the scores (-1/N at real ones, +1/N at fake ones) and at the input gradient
(the penalty's cotangent), so there are no loss tensors and no kernels for them. :class:`Compiled` has the whole of a
step's passes traced by torch.compile into one graph.

In mixed precision the forward passes alone run under autocast. The input gradient is divided by the loss scale before
the penalty is taken of it, in float32; the penalty's cotangent then needs no scale, as the input gradient has it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad

from fastwgan import checks, reference
from fastwgan.backend import Backend
from fastwgan.constraints import Clip, GradientPenalty
from fastwgan.engine import structure
from fastwgan.ops.calls import call_module, changed_tensors, empty_buffers, rebind_buffers
from fastwgan.ops.penalty import NO_DEPENDENCE, WRITES, input_gradient, penalty_cotangent, traced_input_gradient
from fastwgan.ops.samples import perturb
from fastwgan.ops.scores import objective

__all__ = ["Compiled", "Eager"]

Scores = tuple[Tensor, ...]
Noise = tuple[float | Tensor, int, int | Tensor]  # scale, seed and offset; see functional.perturb

NO_GRAPH = "its output: expected to depend on its parameters, got one without a graph"


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients for the module's parameters, so that none are computed and less is kept for the backward."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


def is_batched(cond: Any, batch: int) -> bool:
    """Whether a condition has a row for each sample."""
    return isinstance(cond, Tensor) and cond.dim() > 0 and len(cond) == batch


def scores_of_both(critic: Callable[..., Tensor], both: Tensor, cond: tuple[Any, ...], pack: int) -> Tensor:
    """The scores of real samples, the first half of ``both``, and fake ones from one forward pass."""
    twice = (torch.cat((c, c)) if is_batched(c, len(both) // 2) else c for c in cond)
    scores = critic(both, *twice)
    checks.scores("critic", scores, len(both), pack)
    return scores


def _packed(x: Tensor, pack: int) -> Tensor:
    """Samples [N, ...] as packs [N / pack, pack, ...]."""
    return x if pack == 1 else x.reshape(-1, pack, *x.shape[1:])


def _noisy(x: Tensor, noise: Noise | None, backend: Backend) -> Tensor:
    if noise is None:
        return x
    scale, seed, offset = noise
    return perturb(x, scale=scale, seed=seed, offset=offset, backend=backend)


def has_hooks(p: Tensor) -> bool:
    """Return whether a backward pass would call hooks on a parameter."""
    return bool(p._backward_hooks or p._post_accumulate_grad_hooks)


class Eager:
    """The passes, op by op.

    Args:
        generator, critic, constraint, backend: the trainer's.
        amp: what autocast computes in, or None.
        pack: samples to a score.
        blend, drift: of the losses; see :func:`fastwgan.functional.critic_loss`.
        share: what the gradients are multiplied by beside the loss scale: this rank's share of the batch.
    """

    def __init__(
        self, generator: nn.Module, critic: nn.Module, constraint: Clip | GradientPenalty, backend: Backend, *,
        amp: torch.dtype | None = None, pack: int = 1, blend: float = 0.0, drift: float = 0.0, share: float = 1.0,
    ) -> None:  # fmt: skip
        self._generator, self._critic, self._constraint, self._backend = generator, critic, constraint, backend
        self._amp, self._pack, self._blend, self._drift, self._share = amp, pack, blend, drift, share
        self._device = next(critic.parameters()).device
        self._constants: dict[tuple[Any, ...], Tensor] = {}

    def _autocast(self) -> AbstractContextManager[Any]:
        """What forward passes run under: the trainer's mixed precision, or the caller's.

        Without autocast's cache, which would hold weights as they were until the outermost context ends.
        """
        if self._amp is not None:
            return torch.autocast(self._device.type, self._amp, cache_enabled=False)
        if torch.is_autocast_enabled(self._device.type):
            return torch.autocast(self._device.type, cache_enabled=False)
        return nullcontext()

    def score(self, samples: Tensor, *cond: Any) -> Tensor:
        """The critic's scores."""
        with self._autocast():
            scores: Tensor = self._critic(samples, *cond)
        checks.samples("critic: its output", scores, self._device)
        return scores

    def samples(self, z: Any, *cond: Any) -> Tensor:
        """The generator's samples."""
        with self._autocast():
            samples: Tensor = self._generator(z, *cond)
        checks.samples("generator: its output", samples, self._device)
        return samples

    @torch.no_grad()
    def generate(self, z: Any, cond: tuple[Any, ...]) -> Tensor:
        """Fake samples, without a graph through the generator."""
        return self.samples(z, *cond)

    def critic(
        self, parameters: list[nn.Parameter], samples: tuple[Tensor, ...], x: Tensor | None, cond: tuple[Any, ...], *,
        weight: float, known: bool = False, scale: Tensor | None = None,
    ) -> tuple[Scores, Tensor | None, Tensor | None]:  # fmt: skip
        """Take the gradients of the critic's loss.

        Args:
            parameters: the critic's that are trained, without gradients.
            samples: real and fake ones [N, ...], without a graph; or both as one batch [2 N, ...], real ones first, to
                go through the critic in one pass.
            x: where the penalty is taken, [N, ...], or None for no penalty.
            cond: further arguments of the critic.
            weight: of the penalty.
            known: whether the critic's layers are known. Then the scores have a backward pass of their own, which
                frees what their forward pass has kept before the penalty needs as much. In others two parameters'
                gradients may share memory, into which a second backward pass would add twice.
            scale: of the gradients, 0-d, or None for 1.

        Returns:
            ((real scores, fake scores), score statistics [4] if they are known by now, else None; penalty statistics
            [4] or None).
        """
        with torch.enable_grad():
            roots, seeds, scores, statistics = self._scores(samples, cond, scale)
            if not all(root.requires_grad for root in roots):
                raise ValueError(f"critic: {NO_GRAPH}")
            if x is None or (known and not any(map(has_hooks, parameters))):  # hooks get whole gradients, once
                torch.autograd.backward(roots, seeds, inputs=parameters)
                roots, seeds = [], []
            if x is None:
                return scores, statistics, None
            assert isinstance(self._constraint, GradientPenalty)
            seeds_like: Callable[[Tensor], Tensor] = self._ones_like
            if scale is not None:
                rounded = (scale / (len(x) // self._pack)).half()  # as in the loss; float16 holds no 65536
                seeds_like = rounded.expand_as
            gradients = input_gradient(self.score, x.requires_grad_(), cond, seeds_like, self._pack)
            unscaled = gradients.detach()
            weight *= self._share
            if scale is not None:
                unscaled = unscaled / rounded.float()
            penalty, cotangent = penalty_cotangent(
                _packed(unscaled, self._pack), self._constraint.kind, self._constraint.target, weight, self._backend
            )
            if scale is not None:
                cotangent = cotangent * (scale / rounded.float())
            if gradients.requires_grad:
                roots, seeds = [*roots, gradients], [*seeds, cotangent.view(gradients.shape)]
            if roots:
                torch.autograd.backward(roots, seeds, inputs=parameters)
        return scores, statistics, penalty

    def _ones_like(self, x: Tensor) -> Tensor:
        return self._constant(x, 1.0)

    def generator(
        self, parameters: list[nn.Parameter], z: Any, cond: tuple[Any, ...], batch: int,
        dtype: torch.dtype | None = None, scale: Tensor | None = None, noise: Noise | None = None,
    ) -> tuple[Scores, Tensor | None]:  # fmt: skip
        """Take the gradients of the generator's loss; return ((fake scores,), [loss] if it is known by now).

        ``parameters`` are the generator's that are trained, without gradients; ``dtype`` is the samples' where the
        critic has them in another than the generator's; ``noise`` is put on them.
        """
        with torch.enable_grad(), _frozen(self._critic):
            fake = self.samples(z, *cond)
            if len(fake) != batch:
                raise ValueError(f"generator: its output: expected shape [{batch}, ...], got {tuple(fake.shape)}")
            if not fake.requires_grad:
                raise ValueError(f"generator: {NO_GRAPH}")
            scores = self.score(_noisy(fake.to(dtype or fake.dtype), noise, self._backend), *cond)
            checks.scores("critic", scores, batch, self._pack)
            if not scores.requires_grad:
                raise ValueError(NO_DEPENDENCE)
            loss = None
            if self._blend:
                loss, seed = self._objective(None, scores, scale)
                seed = seed.view(scores.shape)
            else:
                seed = self._seed(scores, scale, -self._share / scores.numel())
            torch.autograd.backward([scores], [seed], inputs=parameters)
        return (scores.detach(),), loss

    def _objective(
        self, real_scores: Tensor | None, fake_scores: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(statistics of scores, cotangents of them all, flat), of losses whose gradients are no constants."""
        return objective(
            real_scores, fake_scores, blend=self._blend, drift=0.0 if real_scores is None else self._drift,
            weight=self._share, scale=scale, backend=self._backend,
        )  # fmt: skip

    def _scores(
        self, samples: tuple[Tensor, ...], cond: tuple[Any, ...], scale: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], Scores, Tensor | None]:
        """(roots of the backward pass, their cotangents, scores, statistics of them where the cotangents' launch has
        taken some).
        """
        constant = not (self._blend or self._drift)
        if len(samples) == 1:
            both = scores_of_both(self.score, *samples, cond, self._pack)
            scores = both.detach().tensor_split(2)
            if constant:
                value = self._share / (both.numel() // 2)
                return [both], [self._seed(both, scale, -value, value)], scores, None
            statistics, slopes = self._objective(scores[0], scores[1], scale)
            return [both], [slopes.view(both.shape)], scores, statistics
        real, fake = samples
        before = real._version, fake._version
        real_scores, fake_scores = self.score(real, *cond), self.score(fake, *cond)
        if (real._version, fake._version) != before:  # another batch than the caller's from then on
            raise ValueError(WRITES)
        checks.scores("critic", real_scores, len(real), self._pack)
        checks.like("critic: its output", fake_scores, "that for real samples", real_scores, shape=True)
        roots, scores = [real_scores, fake_scores], (real_scores.detach(), fake_scores.detach())
        if constant:
            value = self._share / real_scores.numel()
            return roots, [self._seed(real_scores, scale, -value), self._seed(fake_scores, scale, value)], scores, None
        statistics, slopes = self._objective(scores[0], scores[1], scale)
        return roots, [part.view(real_scores.shape) for part in slopes.tensor_split(2)], scores, statistics

    def _seed(self, scores: Tensor, scale: Tensor | None, value: float, second_half: float | None = None) -> Tensor:
        """A constant cotangent of scores. Scaled before it is rounded, as 1 / N may be too small for float16."""
        if scale is None:
            return self._constant(scores, value, second_half)
        return (self._constant(scores, value, second_half, torch.float32) * scale).to(scores.dtype)

    def _constant(
        self, like: Tensor, value: float, second_half: float | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A constant shaped like ``like``, made once; ``second_half`` is the value of the later half of the batch."""
        dtype = dtype or like.dtype
        key = (like.shape, dtype, like.device, value, second_half)
        constant = self._constants.get(key)
        if constant is None:
            constant = torch.full_like(like, value, requires_grad=False, dtype=dtype)
            if second_half is not None:
                constant[len(constant) // 2 :] = second_half
            self._constants[key] = constant  # for good: a graph may read it
        return constant


State = tuple[dict[str, Tensor], dict[str, Tensor]]  # what is differentiated, and all else a module holds


def _state(module: nn.Module) -> State:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rest = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    return trained, rest | dict(module.named_buffers())  # type: ignore[return-value]


class Compiled(Eager):
    """The passes of each step as one graph by torch.compile.

    torch.func differentiates inside the compiled function, to the second order for the penalty, and the gradients are
    what it returns: nothing is left for an ordinary backward pass, which torch.compile could not do twice. Parameters
    and buffers are arguments, as a function being differentiated must not write to anything else (BatchNorm does).
    A parameter without influence gets a gradient of zeros here, where the eager pass leaves it None.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._forms: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._modules: list[nn.Module] = []
        self._compiled_of: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_forms": {}, "_modules": [], "_compiled_of": None}  # a copy compiles its own

    def _parts(self) -> list[Any]:
        """Return what a form depends on and the compiler does not look at: parts, hooks, which buffers are None."""
        parts: list[Any] = [structure.hooked_everywhere()]
        for m in self._modules:
            parts += [*m._modules.values()], structure.hooks(m), [x is None for x in m._buffers.values()]
        return parts

    def _call(self, trace: Callable[..., Any], shape: Any, *args: Any, **options: Any) -> Any:
        """``trace(*args, **options)``, compiled for batches of a shape: not every PyTorch can differentiate twice
        through a convolution of sizes that are left open.
        """
        if self._parts() != self._compiled_of:
            networks = self._generator, self._critic
            self._modules = [m for network in networks for m in network.modules()]
            self._compiled_of = self._parts()
            self._empty = [empty_buffers(network) for network in networks]
            self._forms.clear()
        key = (trace.__name__, shape, *options.values())
        if key not in self._forms:

            def call(*args: Any) -> Any:
                return trace(*args, **options)

            # Dynamo allows a code object a few forms in a process; here each form, of each trainer, has its own.
            code = call.__code__.replace()
            own = FunctionType(code, call.__globals__, call.__name__, call.__defaults__, call.__closure__)
            self._forms[key] = torch.compile(own, fullgraph=True, dynamic=False)
        try:
            return self._forms[key](*args)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                "compile: expected forward passes that read few Python numbers that change, as each is compiled anew; "
                "got too many: keep such a number in a buffer (register_buffer, fill_), or leave compile out"
            ) from error

    @torch.no_grad()
    def generate(self, z: Any, cond: tuple[Any, ...]) -> Tensor:
        shape = z.shape if isinstance(z, Tensor) else None
        return self._call(self._trace_samples, shape, z, cond)  # type: ignore[no-any-return]

    @torch.no_grad()
    def critic(
        self, parameters: list[nn.Parameter], samples: tuple[Tensor, ...], x: Tensor | None, cond: tuple[Any, ...], *,
        weight: float, known: bool = False, scale: Tensor | None = None,
    ) -> tuple[Scores, Tensor | None, Tensor | None]:  # fmt: skip
        state = _state(self._critic)
        shapes = tuple(x.shape for x in samples)
        gradients, rebound, scores, statistics, penalty = self._call(
            self._trace_critic, shapes, state, samples, x, cond, scale, weight=weight
        )
        self._hand_over(state[0], gradients)
        rebind_buffers(self._critic, rebound)
        return scores, statistics, None if x is None else penalty

    @torch.no_grad()
    def generator(
        self, parameters: list[nn.Parameter], z: Any, cond: tuple[Any, ...], batch: int,
        dtype: torch.dtype | None = None, scale: Tensor | None = None, noise: Noise | None = None,
    ) -> tuple[Scores, Tensor | None]:  # fmt: skip
        state = _state(self._generator)
        if noise is not None:  # as tensors, for a number that changes would be compiled anew
            size, seed, offset = noise
            noise = (
                self._device_scalar(size, torch.float32), seed, self._device_scalar(offset, torch.int64)
            )  # fmt: skip
        gradients, rebound, scores, loss = self._call(
            self._trace_generator, batch, state, _state(self._critic), z, cond, scale, noise, batch=batch, dtype=dtype
        )
        self._hand_over(state[0], gradients)
        for module, changed in zip((self._generator, self._critic), rebound, strict=True):
            rebind_buffers(module, changed)
        return (scores,), loss

    def _device_scalar(self, value: float | Tensor, dtype: torch.dtype) -> Tensor:
        """By a launch that fills it: a copy from the host would wait for the device."""
        return value if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=self._device)

    @staticmethod
    def _hand_over(parameters: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        for name, p in parameters.items():
            if gradients[name] is None:
                raise RuntimeError(f"compile: the compiled pass gave no gradient for {name}")
            if has_hooks(p):
                torch.autograd.backward([p], [gradients[name]])
            else:
                p.grad = gradients[name]

    def _trace_samples(self, z: Any, cond: tuple[Any, ...]) -> Any:
        return self.samples(z, *cond)

    def _trace_critic(
        self, state: State, samples: tuple[Tensor, ...], x: Tensor | None, cond: tuple[Any, ...], scale: Tensor | None,
        *, weight: float,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Scores, Tensor, Tensor]:  # fmt: skip
        factor = self._share if scale is None else self._share * scale

        def loss(trained: dict[str, Tensor], given: dict[str, Tensor]) -> tuple[Tensor, Any]:
            rest = dict(given)  # with what a forward pass rebinds

            def forward(samples: Tensor, rest: dict[str, Tensor], cond: tuple[Any, ...] = cond) -> Tensor:
                with self._autocast():
                    return call_module(self._critic, trained, rest, (samples, *cond), self._empty[1])

            if len(samples) == 1:
                both = scores_of_both(lambda samples, *cond: forward(samples, rest, cond), *samples, cond, self._pack)
                real_scores, fake_scores = both[: len(both) // 2], both[len(both) // 2 :]
            else:
                real_scores, fake_scores = (forward(x, rest) for x in samples)
                checks.scores("critic", real_scores, len(samples[0]), self._pack)
            scores = (real_scores.detach(), fake_scores.detach())
            statistics = reference.score_statistics(real_scores, fake_scores, blend=self._blend, drift=self._drift)
            total, statistics = statistics[3], statistics.detach()
            if x is None:
                return total * factor, (changed_tensors(given, rest), scores, statistics, statistics)
            assert isinstance(self._constraint, GradientPenalty)
            gradients = traced_input_gradient(forward, x, rest, self._pack, scale)
            penalty, _ = reference.penalty_cotangent(
                _packed(gradients, self._pack), kind=self._constraint.kind, target=self._constraint.target
            )
            rebound = changed_tensors(given, rest)
            return (total + weight * penalty[0]) * factor, (rebound, scores, statistics, penalty.detach())

        gradients, (rebound, scores, statistics, penalty) = grad(loss, has_aux=True)(*state)
        return gradients, rebound, scores, statistics, penalty

    def _trace_generator(
        self, state: State, critic_state: State, z: Any, cond: tuple[Any, ...], scale: Tensor | None,
        noise: Noise | None, *, batch: int, dtype: torch.dtype | None,
    ) -> tuple[dict[str, Tensor], tuple[dict[str, Tensor], ...], Tensor, Tensor]:  # fmt: skip
        factor = self._share if scale is None else self._share * scale

        def loss(trained: dict[str, Tensor], given: dict[str, Tensor], critic_state: State) -> tuple[Tensor, Any]:
            rest, critic_rest = dict(given), dict(critic_state[1])
            with self._autocast():
                fake = call_module(self._generator, trained, rest, (z, *cond), self._empty[0])
                fake = _noisy(fake.to(dtype or fake.dtype), noise, self._backend)
                scores = call_module(self._critic, critic_state[0], critic_rest, (fake, *cond), self._empty[1])
            checks.scores("critic", scores, batch, self._pack)
            total = reference.generator_loss(scores, blend=self._blend)
            rebound = changed_tensors(given, rest), changed_tensors(critic_state[1], critic_rest)
            return total * factor, (rebound, scores.detach(), total.detach().reshape(1))

        gradients, (rebound, scores, total) = grad(loss, has_aux=True)(*state, critic_state)
        return gradients, rebound, scores, total
