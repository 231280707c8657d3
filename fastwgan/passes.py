"""The forward and backward passes of the two steps, which leave gradients in the parameters.

:class:`Eager` seeds backward directly at the scores (-1/N at real ones, +1/N at fake ones) and at the input gradient
(the penalty's cotangent), so there are no loss tensors and no kernels for them. :class:`Compiled` has the whole of a
step's passes traced by torch.compile into one graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fastwgan import functional, reference
from fastwgan.backend import Backend
from fastwgan.constraints import GradientPenalty, WeightClip

__all__ = ["Compiled", "Eager"]

NO_GRAPH = "generator: its output: expected to depend on its parameters, got one without a graph"


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


def scores_of_both(critic: Callable[..., Tensor], real: Tensor, fake: Tensor, cond: tuple[Any, ...]) -> Tensor:
    """The scores of real and fake samples from one forward pass, real ones first."""
    twice = (torch.cat((c, c)) if is_batched(c, len(real)) else c for c in cond)
    scores = critic(torch.cat((real, fake)), *twice)
    functional.check_scores("critic", scores, 2 * len(real))
    return scores


def drop_gradients(name: str, module: nn.Module) -> list[Tensor]:
    """Drop all the module's gradients, those of frozen parameters too; return the parameters to be trained."""
    parameters = list(module.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise ValueError(f"{name}: expected trainable parameters, got none")
    for p in parameters:
        p.grad = None
    return trainable  # type: ignore[return-value]


class Eager:
    """The passes, op by op."""

    def __init__(
        self, generator: nn.Module, critic: nn.Module, constraint: WeightClip | GradientPenalty, backend: Backend
    ) -> None:
        self._generator, self._critic, self._constraint, self._backend = generator, critic, constraint, backend
        self._constants: dict[tuple[Any, ...], Tensor] = {}

    @torch.no_grad()
    def generate(self, z: Any, cond: tuple[Any, ...]) -> Tensor:
        """Fake samples, without a graph through the generator."""
        fake: Tensor = self._generator(z, *cond)
        return fake

    def critic(
        self, real: Tensor, fake: Tensor, x: Tensor | None, cond: tuple[Any, ...], *, together: bool, weight: float
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of the critic's loss; return (score statistics [4], penalty statistics [4] or None).

        Args:
            real, fake: samples [N, ...], without a graph.
            x: where the penalty is taken, [N, ...], or None for no penalty.
            cond: further arguments of the critic.
            together: whether real and fake samples go through the critic in one batch.
            weight: of the penalty.
        """
        parameters = drop_gradients("critic", self._critic)
        with torch.enable_grad():
            roots, seeds, scores = self._scores(real, fake, cond, together)
            # A backward pass of its own, which frees what the forward pass has kept before the penalty needs as much.
            torch.autograd.backward(roots, seeds, inputs=parameters)
            del roots
            if x is None:
                return scores, None
            assert isinstance(self._constraint, GradientPenalty)
            gradients = functional.input_gradient(self._critic, x.requires_grad_(), cond, self._ones_like)
            penalty, cotangent = functional.penalty_cotangent(
                gradients, self._constraint.kind, self._constraint.target, weight, self._backend
            )
            if gradients.requires_grad:
                torch.autograd.backward([gradients], [cotangent], inputs=parameters)
        return scores, penalty

    def generator(self, z: Any, cond: tuple[Any, ...], batch: int) -> Tensor:
        """Gradients of the generator's loss, which is returned."""
        parameters = drop_gradients("generator", self._generator)
        with torch.enable_grad(), _frozen(self._critic):
            fake = self._generator(z, *cond)
            functional.check_samples("generator: its output", fake, parameters[0].device)
            scores = self._critic(fake, *cond)
            functional.check_scores("critic", scores, batch)
            if not scores.requires_grad:
                raise ValueError(NO_GRAPH)
            loss = functional.generator_loss(scores.detach(), backend=self._backend)
            torch.autograd.backward([scores], [self._constant(scores, -1 / scores.numel())], inputs=parameters)
        return loss

    def _scores(
        self, real: Tensor, fake: Tensor, cond: tuple[Any, ...], together: bool
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """(roots of the backward pass, their cotangents, score statistics)."""
        batch = len(real)
        if together:
            both = scores_of_both(self._critic, real, fake, cond)
            count = both.numel() // 2
            statistics = functional.score_statistics(both[:batch], both[batch:], self._backend)
            return [both], [self._constant(both, -1 / count, 1 / count)], statistics
        real_scores, fake_scores = self._critic(real, *cond), self._critic(fake, *cond)
        functional.check_scores("critic", real_scores, batch)
        statistics = functional.score_statistics(real_scores, fake_scores, self._backend)
        count = real_scores.numel()
        seeds = [self._constant(real_scores, -1 / count), self._constant(fake_scores, 1 / count)]
        return [real_scores, fake_scores], seeds, statistics

    def _constant(self, like: Tensor, value: float, second_half: float | None = None) -> Tensor:
        """A constant shaped like ``like``, made once; ``second_half`` is the value of the later half of the batch."""
        key = (like.shape, like.dtype, like.device, value, second_half)
        constant = self._constants.get(key)
        if constant is None:
            constant = torch.full_like(like, value, requires_grad=False)
            if second_half is not None:
                constant[len(constant) // 2 :] = second_half
            self._constants[key] = constant  # for good: a graph may read it
        return constant

    def _ones_like(self, x: Tensor) -> Tensor:
        return self._constant(x, 1.0)


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

    def __init__(
        self, generator: nn.Module, critic: nn.Module, constraint: WeightClip | GradientPenalty, backend: Backend
    ) -> None:
        super().__init__(generator, critic, constraint, backend)
        self._forms: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def _call(self, trace: Callable[..., Any], shape: Any, *args: Any, **options: Any) -> Any:
        """``trace(*args, **options)``, compiled for batches of a shape: not every PyTorch can differentiate twice
        through a convolution of sizes that are left open.
        """
        key = (trace.__name__, shape, *options.values())
        if key not in self._forms:

            def call(*args: Any) -> Any:
                return trace(*args, **options)

            # Dynamo allows a code object a few forms in a process; here each form, of each trainer, has its own.
            code = call.__code__.replace()
            own = FunctionType(code, call.__globals__, call.__name__, call.__defaults__, call.__closure__)
            self._forms[key] = torch.compile(own, fullgraph=True, dynamic=False)
        return self._forms[key](*args)

    @torch.no_grad()
    def generate(self, z: Any, cond: tuple[Any, ...]) -> Tensor:
        shape = z.shape if isinstance(z, Tensor) else None
        return self._call(self._trace_samples, shape, z, cond)  # type: ignore[no-any-return]

    @torch.no_grad()
    def critic(
        self, real: Tensor, fake: Tensor, x: Tensor | None, cond: tuple[Any, ...], *, together: bool, weight: float
    ) -> tuple[Tensor, Tensor | None]:
        drop_gradients("critic", self._critic)
        state = _state(self._critic)
        gradients, scores, penalty = self._call(
            self._trace_critic, real.shape, state, real, fake, x, cond, together=together, weight=weight
        )
        self._hand_over(state[0], gradients)
        return scores, None if x is None else penalty

    @torch.no_grad()
    def generator(self, z: Any, cond: tuple[Any, ...], batch: int) -> Tensor:
        drop_gradients("generator", self._generator)
        state = _state(self._generator)
        loss: Tensor
        gradients, loss = self._call(self._trace_generator, batch, state, _state(self._critic), z, cond, batch)
        self._hand_over(state[0], gradients)
        return loss

    @staticmethod
    def _hand_over(parameters: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        for name, p in parameters.items():
            if gradients[name] is None:
                raise RuntimeError(f"compile: the compiled pass gave no gradient for {name}")
            p.grad = gradients[name]

    def _trace_samples(self, z: Any, cond: tuple[Any, ...]) -> Any:
        return self._generator(z, *cond)

    def _trace_critic(
        self, state: State, real: Tensor, fake: Tensor, x: Tensor | None, cond: tuple[Any, ...], *,
        together: bool, weight: float,
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:  # fmt: skip
        def loss(trained: dict[str, Tensor], rest: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            def forward(samples: Tensor, rest: dict[str, Tensor], cond: tuple[Any, ...] = cond) -> Tensor:
                return functional_call(self._critic, (trained, rest), (samples, *cond))  # type: ignore[no-any-return]

            if together:
                both = scores_of_both(lambda samples, *cond: forward(samples, rest, cond), real, fake, cond)
                real_scores, fake_scores = both[: len(real)], both[len(real) :]
            else:
                real_scores, fake_scores = forward(real, rest), forward(fake, rest)
                functional.check_scores("critic", real_scores, len(real))
            scores = reference.score_statistics(real_scores, fake_scores)
            if x is None:
                return scores[3], (scores.detach(), scores.detach())
            assert isinstance(self._constraint, GradientPenalty)
            gradients = functional.traced_input_gradient(forward, x, rest)
            penalty, _ = reference.penalty_cotangent(
                gradients, kind=self._constraint.kind, target=self._constraint.target
            )
            return scores[3] + weight * penalty[0], (scores.detach(), penalty.detach())

        gradients, (scores, penalty) = grad(loss, has_aux=True)(*state)
        return gradients, scores, penalty

    def _trace_generator(
        self, state: State, critic_state: State, z: Any, cond: tuple[Any, ...], batch: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        def loss(trained: dict[str, Tensor], rest: dict[str, Tensor], critic_state: State) -> tuple[Tensor, Tensor]:
            fake = functional_call(self._generator, (trained, rest), (z, *cond))
            scores = functional_call(self._critic, critic_state, (fake, *cond))
            functional.check_scores("critic", scores, batch)
            value = reference.generator_loss(scores)
            return value, value.detach()

        gradients, value = grad(loss, has_aux=True)(*state, critic_state)
        return gradients, value
