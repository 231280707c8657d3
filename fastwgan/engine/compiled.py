"""The passes of each step as one graph by torch.compile.

torch.func differentiates inside the compiled function, to the second order for the penalty, and the gradients are
what it returns: nothing is left for an ordinary backward pass, which torch.compile could not do twice. Parameters and
buffers are arguments, as a function being differentiated must not write to anything else (BatchNorm does).
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad

from fastwgan import checks, reference
from fastwgan.constraints import Penalised
from fastwgan.engine import structure
from fastwgan.engine.eager import Eager, Passed, hooks_of, packed, scores_of_both
from fastwgan.ops.calls import call_module, changed_tensors, empty_buffers, rebind_buffers
from fastwgan.ops.penalty import traced_input_gradient

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

    def samples(self, z: Any, *cond: Any) -> Tensor:
        shape = z.shape if isinstance(z, Tensor) else None
        return self._call(super().samples, shape, z, *cond)  # type: ignore[no-any-return]

    def critic(
        self, parameters: list[nn.Parameter], batch: tuple[Tensor, ...], penalised: Penalised | None,
        cond: tuple[Any, ...], *, layers: Sequence[nn.Module] | None = None, scale: Tensor | None = None,
    ) -> Passed:  # fmt: skip
        state, shapes = _state(self._critic), tuple(x.shape for x in batch)
        x, penalty = (None, None) if penalised is None else (penalised.x, penalised[1:])
        gradients, (rebound, scores, statistics, measured) = self._call(
            self._trace_critic, shapes, state, batch, x, cond, scale, penalty=penalty
        )
        self._hand_over(state[0], gradients)
        rebind_buffers(self._critic, rebound)
        return Passed(scores, statistics, None if x is None else measured)

    def generator(
        self, parameters: list[nn.Parameter], frozen: list[nn.Parameter], z: Any, cond: tuple[Any, ...], batch: int,
        dtype: torch.dtype, scale: Tensor | None = None,
    ) -> Passed:  # fmt: skip
        state = _state(self._generator)
        gradients, (rebound, scores, loss) = self._call(
            self._trace_generator, batch, state, _state(self._critic), z, cond, scale, batch=batch, dtype=dtype
        )
        self._hand_over(state[0], gradients)
        for module, changed in zip((self._generator, self._critic), rebound, strict=True):
            rebind_buffers(module, changed)
        return Passed((scores,), loss)

    @staticmethod
    @torch.no_grad()
    def _hand_over(parameters: Tensors, gradients: Tensors) -> None:
        for name, p in parameters.items():
            if gradients[name] is None:
                raise RuntimeError(f"compile: the compiled pass gave no gradient for {name}")
            if any(hooks_of(p)):
                torch.autograd.backward([p], [gradients[name]])
            else:
                p.grad = gradients[name]

    def _trace_critic(
        self, state: State, batch: tuple[Tensor, ...], x: Tensor | None, cond: tuple[Any, ...], scale: Tensor | None,
        *, penalty: tuple[float, str, float] | None,
    ) -> Any:  # fmt: skip
        factor, pack = self._share if scale is None else self._share * scale, self._settings.pack

        def loss(trained: Tensors, given: Tensors) -> tuple[Tensor, Any]:
            rest = dict(given)  # with what a forward pass rebinds

            def forward(samples: Tensor, rest: Tensors, cond: tuple[Any, ...] = cond) -> Tensor:
                with self._autocast():
                    scores = call_module(self._critic, trained, rest, (samples, *cond), self._empty[1])
                return checks.scores("critic", scores, len(samples), pack)

            if len(batch) == 1:
                both = scores_of_both(lambda samples, *cond: forward(samples, rest, cond), *batch, cond)
                real_scores, fake_scores = both[: len(both) // 2], both[len(both) // 2 :]
            else:
                real_scores, fake_scores = (forward(x, rest) for x in batch)
            statistics = reference.score_statistics(
                real_scores, fake_scores, blend=self._settings.blend, drift=self._settings.drift
            )
            total, statistics = statistics[3], statistics.detach()
            measured = statistics  # torch.func wants tensors
            if x is not None and penalty is not None:
                weight, kind, target = penalty
                gradients = traced_input_gradient(forward, x, rest, pack, scale)
                found, _ = reference.penalty_cotangent(packed(gradients, pack), kind=kind, target=target)
                total, measured = total + weight * found[0], found.detach()
            scores = (real_scores.detach(), fake_scores.detach())
            return total * factor, (changed_tensors(given, rest), scores, statistics, measured)

        return grad(loss, has_aux=True)(*state)

    def _trace_generator(
        self, state: State, critic_state: State, z: Any, cond: tuple[Any, ...], scale: Tensor | None, *,
        batch: int, dtype: torch.dtype,
    ) -> Any:  # fmt: skip
        factor = self._share if scale is None else self._share * scale

        def loss(trained: Tensors, given: Tensors, critic_state: State) -> tuple[Tensor, Any]:
            rest, critic_rest = dict(given), dict(critic_state[1])
            with self._autocast():
                fake = call_module(self._generator, trained, rest, (z, *cond), self._empty[0]).to(dtype)
                scores = call_module(self._critic, critic_state[0], critic_rest, (fake, *cond), self._empty[1])
            checks.scores("critic", scores, batch, self._settings.pack)
            total = reference.generator_loss(scores, blend=self._settings.blend)
            rebound = changed_tensors(given, rest), changed_tensors(critic_state[1], critic_rest)
            return total * factor, (rebound, scores.detach(), total.detach().reshape(1))

        return grad(loss, has_aux=True)(*state, critic_state)
