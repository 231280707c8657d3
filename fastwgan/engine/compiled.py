"""The passes of each step as one graph by torch.compile.

torch.func differentiates inside the compiled function, to the second order for the penalty, and the gradients are
what it returns: nothing is left for an ordinary backward pass, which torch.compile could not do twice. Parameters and
buffers are arguments, as a function being differentiated must not write to anything else (BatchNorm does).
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn.utils.stateless import _reparametrize_module

from fastwgan import checks, reference
from fastwgan.constraints import Penalised, Samples
from fastwgan.engine import structure
from fastwgan.engine.eager import Eager, Passed, conditions_of_both, hand_over
from fastwgan.engine.terms import Scored, StepRecord, halves, split
from fastwgan.ops.calls import call_module, changed_tensors, empty_buffers, rebind_buffers
from fastwgan.ops.penalty import packed, traced_input_gradient

Tensors = dict[str, Tensor]
State = tuple[Tensors, Tensors]  # what is differentiated, and all else a module holds


def _state(module: nn.Module) -> State:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rest = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    return trained, rest | dict(module.named_buffers())  # type: ignore[return-value]


class Compiled(Eager):
    """The passes as compiled graphs, in which a parameter without influence gets a gradient of zeros, not None."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
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

    @torch.no_grad()
    def _call(self, trace: Callable[..., Any], shape: Any, *args: Any, **options: Any) -> Any:
        """Return ``trace(*args, **options)``, compiled for batches of a shape."""
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
            own = FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
            # Not every PyTorch can differentiate twice through a convolution of sizes that are left open.
            self._forms[key] = torch.compile(own, fullgraph=True, dynamic=False)
        try:
            return self._forms[key](*args)
        except torch._dynamo.exc.FailOnRecompileLimitHit as error:
            raise RuntimeError(
                "compile: expected forward passes that read few Python numbers that change, as each is compiled anew; "
                "got too many: keep such a number in a buffer (register_buffer, fill_), or leave compile out"
            ) from error

    def doubt(self) -> str | None:
        return "compile=True has passes of its own"

    def samples(self, z: Any, *cond: Any) -> tuple[Any, tuple[Any, ...]]:
        shape = z.shape if isinstance(z, Tensor) else None
        return self._call(super().samples, shape, z, *cond)  # type: ignore[no-any-return]

    def critic(
        self, parameters: list[nn.Parameter], samples: Samples, batch: tuple[Tensor, ...],
        penalised: Penalised | None, *, layers: Sequence[nn.Module] | None = None, scale: Tensor | None = None,
    ) -> Passed:  # fmt: skip
        state, shapes = _state(self._critic), (*(x.shape for x in batch), *([] if penalised is None else penalised[2:]))
        gradients, (rebound, scores, statistics, measured, term) = self._call(
            self._trace_critic, shapes, state, samples, batch, penalised, scale
        )
        self._hand_over(state[0], gradients)
        rebind_buffers(self._critic, rebound)
        term = None if self._settings.critic_term is None else term
        return Passed(scores, statistics, measured if penalised else None, term)

    def generator(
        self, parameters: list[nn.Parameter], frozen: list[nn.Parameter], given: Samples, z: Any, batch: int,
        dtype: torch.dtype, scale: Tensor | None = None,
    ) -> Passed:  # fmt: skip
        state = _state(self._generator)
        gradients, (rebound, scores, loss, term) = self._call(
            self._trace_generator, batch, state, _state(self._critic), given, z, scale, batch=batch, dtype=dtype
        )
        self._hand_over(state[0], gradients)
        for module, changed in zip((self._generator, self._critic), rebound, strict=True):
            rebind_buffers(module, changed)
        return Passed((scores,), loss, term=None if self._settings.generator_term is None else term)

    @staticmethod
    @torch.no_grad()
    def _hand_over(parameters: Any, gradients: Tensors) -> None:
        for name in parameters:
            if gradients[name] is None:
                raise RuntimeError(f"compile: the compiled pass gave no gradient for {name}")
        hand_over({p: gradients[name] for name, p in parameters.items()})

    def _traced_term(self, name: str, record: StepRecord, state: State) -> Tensor:
        """Return the value of a network's term, in which that network has the tensors that are differentiated."""
        with _reparametrize_module(getattr(self, f"_{name}"), state[0] | state[1]):
            return self.term(name, record)

    def _trace_critic(
        self, state: State, samples: Samples, batch: Any, penalised: Penalised | None, scale: Tensor | None
    ) -> Any:
        factor, pack = self._share if scale is None else self._share * scale, self._settings.pack

        def loss(trained: Tensors, given: Tensors) -> tuple[Tensor, Any]:
            rest = dict(given)  # with what a forward pass rebinds

            def forward(rest: Tensors, x: Tensor, *cond: Any) -> Scored:
                return self._traced_score((trained, rest), x, *cond)

            if len(batch) == 1:
                both, outputs = forward(rest, *batch, *conditions_of_both(samples))
                real, fake = zip(both.chunk(2), halves(outputs, len(both)), strict=True)
            else:
                real, fake = forward(rest, batch[0], *samples.cond), forward(rest, batch[1], *samples.fake_cond)
            statistics = reference.score_statistics(real[0], fake[0])
            total, statistics = statistics[3], statistics.detach()
            measured = term = statistics  # torch.func wants tensors
            if self._settings.critic_term is not None:
                record = StepRecord(samples, partial(forward, rest), real, fake)
                value = self._traced_term("critic", record, (trained, rest))
                total, term = total + value, value.detach().reshape(1)
            if penalised is not None:
                inputs = penalised.inputs
                gradients = traced_input_gradient(
                    lambda x, rest: forward(rest, *inputs(x))[0], penalised.x, rest, pack, scale
                )
                kind, target = penalised.kind, penalised.target
                found, _ = reference.penalty_cotangent(packed(gradients, pack), kind=kind, target=target)
                total, measured = total + penalised.weight * found[0], found.detach()
            scores = (real[0].detach(), fake[0].detach())
            return total * factor, (changed_tensors(given, rest), scores, statistics, measured, term)

        return grad(loss, has_aux=True)(*state)

    def _traced_score(self, state: State, x: Tensor, *cond: Any) -> Scored:
        """Return the critic's scores, and what it returned behind them, with tensors of which it rebinds some."""
        with self._autocast():
            scores, outputs = split(call_module(self._critic, *state, (x, *cond), self._empty[1]))
        return checks.scores("critic", scores, len(x), self._settings.pack), outputs

    def _trace_generator(
        self, state: State, critic_state: State, samples: Samples, z: Any, scale: Tensor | None, *, batch: int,
        dtype: torch.dtype,
    ) -> Any:  # fmt: skip
        factor = self._share if scale is None else self._share * scale

        def loss(trained: Tensors, given: Tensors, critic_state: State) -> tuple[Tensor, Any]:
            rest, critic = dict(given), (critic_state[0], dict(critic_state[1]))
            with self._autocast():
                output = call_module(self._generator, trained, rest, (z, *samples.fake_cond), self._empty[0])
            fake, outputs = split(output)
            fake = fake.to(dtype)
            scored = self._traced_score(critic, fake, *samples.fake_cond)
            checks.scores("critic", scored[0], batch, self._settings.pack)
            total = reference.generator_loss(scored[0])
            loss = term = total.detach().reshape(1)
            if self._settings.generator_term is not None:
                made = samples._replace(fake=fake, outputs=outputs)
                record = StepRecord(made, partial(self._traced_score, critic), None, scored)
                value = self._traced_term("generator", record, (trained, rest))
                total, term = total + value, value.detach().reshape(1)
            rebound = changed_tensors(given, rest), changed_tensors(critic_state[1], critic[1])
            return total * factor, (rebound, scored[0].detach(), loss, term)

        return grad(loss, has_aux=True)(*state, critic_state)
