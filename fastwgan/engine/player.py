"""One network in training, with its optimizer, guard and running averages, and an update of it.

A network may change while it trains: layers come and go, are frozen and unfrozen, and a user adds parameter groups. So
each step looks at its parameters anew.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastwgan import checks
from fastwgan.backend import DTYPES, Backend, resolve
from fastwgan.constraints import Clip, GradientPenalty, NormClip, WeightClip
from fastwgan.engine.arguments import Called, check_optimizer, follow_loads, take_over
from fastwgan.engine.guard import Guard
from fastwgan.engine.ranks import Ranks, refuse_uneven
from fastwgan.ops.scores import score_statistics
from fastwgan.ops.weights import clip_and_count_, combine_shares, project_and_count_
from fastwgan.optim import Adam, RMSprop
from fastwgan.optim.base import Together

__all__ = ["Player", "default_optimizer", "evaluating"]


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return those that may be trained, now or once they are unfrozen."""
    return [p for p in parameters if p.requires_grad or (p.dtype in DTYPES and p.layout == torch.strided)]


def _wide_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _wide(p: Tensor) -> Tensor:
    return p.detach().to(_wide_dtype(p), copy=True)


def default_optimizer(constraint: Clip | GradientPenalty, module: nn.Module, backend: Backend) -> RMSprop | Adam:
    """Return the paper's optimizer for a constraint, over all of a network's parameters."""
    if isinstance(constraint, Clip):
        return RMSprop(_trainable(module.parameters()), lr=5e-5, backend=backend)
    return Adam(_trainable(module.parameters()), lr=1e-4, betas=(0.0, 0.9), backend=backend)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode; afterwards each submodule is back in its own."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:  # outer ones first; by train(), which a module may have overridden
            if m.training != training:
                m.train(training)


class Player:
    """One of the two networks.

    Args:
        name: "generator" or "critic".
        module: the network.
        optimizer: of it.
        guard: of its gradients.
        ranks: that train it.
        backend: see :mod:`fastwgan.backend`.
        default: whether the optimizer is the trainer's choice, which has all of the network's parameters.
        ema: the decay of running averages of its weights, or None.
        clip: what its weights are held to after an update, or None.

    Attributes:
        averages: of each parameter, in the precision that updates are computed in.
    """

    def __init__(
        self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer, guard: Guard, ranks: Ranks,
        backend: Backend, *, default: bool, ema: float | None = None, clip: Clip | None = None,
    ) -> None:  # fmt: skip
        self.name, self.module, self.guard = name, module, guard
        self.ema, self.averages = ema, dict[Tensor, Tensor]()
        self._ranks, self._backend, self._clip = ranks, backend, clip
        self._clipped: list[nn.Parameter] = []
        self._excluded: set[nn.Parameter] = set()
        self._left: dict[Any, Any] = {}  # states of parameters that have left, until a step is taken without them
        # What all ranks have the same of.
        self._shared: set[Any] = set() if ranks.world == 1 else {*module.modules(), *module.parameters()}
        self.replace(optimizer, default=default)
        self.follow()

    def assign(self, optimizer: torch.optim.Optimizer) -> None:
        """Take an optimizer of the user's."""
        check_optimizer(f"{self.name}_optimizer", optimizer, self.module)
        self.replace(take_over(optimizer, self._backend))

    def replace(self, optimizer: torch.optim.Optimizer, *, default: bool = False) -> None:
        """Take another optimizer. It may leave out any of the parameters that can be trained by now."""
        self.optimizer, self._default = optimizer, default
        self._known = set() if default else {p for p in self.module.parameters() if p.requires_grad}
        self._listed = _trainable(self.module.parameters())

    def _held(self) -> set[int]:
        return {id(p) for group in self.optimizer.param_groups for p in group["params"]}

    @property
    def gated(self) -> RMSprop | Adam | None:
        """Return the optimizer if its step obeys the guard's gate on the device."""
        return self.optimizer if isinstance(self.optimizer, (RMSprop, Adam)) else None

    def hooks(self) -> list[Any]:
        """Return the step hooks of the optimizer, and the hooks of each parameter that has some."""
        parameters = [
            (p, [*(p._backward_hooks or {}).values()], [*(p._post_accumulate_grad_hooks or {}).values()])
            for p in self.module.parameters()
        ]
        hooked = [part for part in parameters if part[1] or part[2]]
        return [self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks, hooked]

    def hook(self, hooks: list[Any]) -> None:
        """Put hooks on the optimizer and the parameters of a copy."""
        self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks, hooked = hooks
        for p, own, accumulated in hooked:
            p._backward_hooks = p._post_accumulate_grad_hooks = None
            frozen = not p.requires_grad
            p.requires_grad_(True)  # without which PyTorch takes no hooks
            for hook in own:
                p.register_hook(hook)
            for hook in accumulated:
                p.register_post_accumulate_grad_hook(hook)
            p.requires_grad_(not frozen)
        for hook in self.optimizer._optimizer_step_post_hooks.values():
            if isinstance(hook, Called):
                follow_loads(hook.optimizer, self.optimizer)

    # Before the passes

    def share(self) -> None:
        """Give all ranks what the first one has in layers that have come since the last call."""
        if self._ranks.world == 1:
            return
        parameters, modules = list(self.module.parameters()), list(self.module.modules())
        before, self._shared = self._shared, {*modules, *parameters}
        new = [p for p in parameters if p not in before]
        buffers = [x for m in modules if m not in before for x in m.buffers(recurse=False)]
        self._ranks.broadcast_([*new, *buffers])
        for p in new:
            self.averages.pop(p, None)  # of what it was before

    def check(self) -> list[nn.Parameter]:
        """Return the parameters to be trained.

        Raises:
            ValueError: there are none, or the optimizer lacks some that came after the trainer was made.
        """
        trained = [p for p in self.module.parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"{self.name}: expected trainable parameters, got none")
        new = [] if self._default else [p for p in trained if p not in self._known]
        held = self._held() if new else set()
        if lacks := {p for p in new if id(p) not in held}:
            names = ", ".join(name for name, p in self.module.named_parameters() if p in lacks)
            raise ValueError(
                f"{self.name}_optimizer: expected the parameters that are trainable since the trainer was made, lacks "
                f"{names}: add them by trainer.{self.name}_optimizer.add_param_group, or freeze them by "
                "requires_grad_(False)"
            )
        if not self._default:
            self._known = {p for p in self.module.parameters() if p.requires_grad or p in self._known}
        return trained

    def prepare(self) -> list[nn.Parameter]:
        """Take up changes of the network, and drop all gradients; return the parameters to be trained.

        Raises:
            ValueError: as :meth:`check`; or with NormClip on a GPU, two parameters are over one memory.
        """
        trained = self.check()
        self.follow()
        if isinstance(self._clip, NormClip) and resolve(self._backend, self.guard.gate.device) == "triton":
            checks.refuse_overlap(self._clipped)
        for p in self.module.parameters():
            p.grad = None
        for group in self.optimizer.param_groups:  # parameters that have left the network, too
            for p in group["params"]:
                p.grad = None
        return trained

    def follow(self) -> None:
        """Give a default optimizer, the clip and the averages the parameters that the network has now."""
        parameters = list(self.module.parameters())
        if self._default:
            before, self._listed = self._listed, _trainable(parameters)
            if list(map(id, before)) != list(map(id, self._listed)):
                first, *others = self.optimizer.param_groups
                out = {p for group in others for p in group["params"]} | (set(before) - set(first["params"]))
                first["params"][:] = [p for p in self._listed if p not in out]
                self._move(self.optimizer.state, self._left)
        if self._clip is not None:
            if self._clip.exclude:  # by the names that parameters come with, which may be others' later
                now, seen = self._clip.excluded(self.module), {*self._clipped, *self._excluded}
                self._excluded = {p for p in parameters if p in (self._excluded if p in seen else now)}
            self._clipped = [p for p in parameters if p not in self._excluded]
        if self.ema is not None:
            for p in filter(torch.is_floating_point, parameters):
                average = self.averages.get(p)
                if average is None or average.shape != p.shape or average.device != p.device:
                    self.averages[p] = _wide(p)
                elif average.dtype != _wide_dtype(p):
                    self.averages[p] = average.to(_wide_dtype(p))

    def _move(self, state: dict[Any, Any], left: dict[Any, Any]) -> None:
        """Put aside the state of parameters that have left the optimizer, and take back that of those that are back."""
        held = self._held()
        for p in [p for p in state if id(p) not in held]:
            left[p] = state.pop(p)
        for p in [p for p in left if id(p) in held]:
            state[p] = left.pop(p)

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state, of the network as it is; the optimizer follows when a step is taken."""
        if not self._default:
            return self.optimizer.state_dict()
        first, kept = self.optimizer.param_groups[0], (self._left.copy(), self._listed, self.averages.copy())
        params, state = list(first["params"]), dict(self.optimizer.state)
        self.follow()
        result = self.optimizer.state_dict()
        self._left, self._listed, self.averages = kept
        first["params"][:] = params
        self.optimizer.state.clear()
        self.optimizer.state.update(state)
        return result

    # After the passes

    def settle(
        self, scores: tuple[Tensor, ...], known: Tensor | None, penalty: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Add up what the ranks have, and set the guard's gate: (score statistics, penalty statistics, nonfinite).

        ``known`` are the score statistics, if the passes have taken some.
        """
        guard = self.guard
        guard.dense = self.gated is not None or self._ranks.world > 1
        if self._ranks.world == 1:
            statistics, nonfinite = guard.check(scores if known is None else ())
            return statistics if known is None else known, penalty, nonfinite
        own = known
        if own is None:
            own = score_statistics(scores[0], scores[-1], self._backend)
            own = own if len(scores) == 2 else -own[:1]
        trained = guard.trained()
        used = own.new_ones(len(trained))
        without = [i for i, p in enumerate(trained) if p.grad is None]
        for i in without:  # another rank may have used it
            trained[i].grad = torch.zeros_like(trained[i])
            used[i] = 0
        parts = (own.new_full((1,), scores[-1].numel()), used, own, *([] if penalty is None else [penalty]))
        gradients = guard.gradients()
        sizes, counts, own, *rest = torch.split(
            self._ranks.sum_(gradients, torch.cat(parts)), [len(part) for part in parts], dim=1
        )  # fmt: skip
        refuse_uneven("real" if len(scores) == 2 else "batch_size", sizes, gradients)
        for i in without:
            if not counts[:, i].any():  # nobody has: an optimizer is not to take zeros for its gradient
                trained[i].grad = None
        statistics = own.mean(0)
        if rest:
            means, least, greatest = rest[0][:, :2].mean(0), rest[0][:, 2].amin(), rest[0][:, 3].amax()
            penalty = torch.cat((means, least[None], greatest[None]))
        _, nonfinite = guard.check()
        return statistics, penalty, nonfinite

    def update(self) -> Tensor | None:
        """Take a step of the optimizer, hold the weights to their bound, and average them, unless the gate says no.

        Returns:
            The share of weights on their bound, 0-d, or None where they have none.
        """
        averaged: set[Tensor] = set()
        if self.gated is not None:
            self._shares, self._fused = self.gated.step_gated(self._together())
            if self.averages:
                averaged = {p for group in self.gated.param_groups for p in group["params"] if p.grad is not None}
        else:
            skip, factor = self.guard.gate.tolist()  # any optimizer may come, so the host has to know
            if skip:
                Called(self.optimizer)()
            else:
                if factor != 1:  # not in place, as two gradients may share memory
                    for p in self.guard.trained():
                        p.grad = None if p.grad is None else p.grad * factor
                self.optimizer.step()
        for weight, average in self.averages.items():
            if weight not in averaged:
                taken = (1 - self.guard.gate[0]).to(average.dtype)  # or 0, where the step is left out
                average.lerp_(weight.detach().to(average.dtype), taken * (1 - (self.ema or 0.0)))
        self._left.clear()
        if self.averages:
            present = set(self.module.parameters())
            for gone in [x for x in self.averages if x not in present]:
                del self.averages[gone]
        return None if self._clip is None else self._hold(self._clip)

    def refresh(self) -> None:
        """Have a step that a CUDA graph replays use the optimizer's present numbers."""
        if self.gated is not None:
            self.gated.refresh(self._together())

    def _together(self) -> Together:
        bound, ids = (
            (self._clip.bound, {id(p) for p in self._clipped})
            if isinstance(self._clip, WeightClip)
            else (None, set[int]())
        )
        return Together(self.guard.gate, self.averages, self.ema or 0.0, bound, ids)

    def _hold(self, clip: Clip) -> Tensor | None:
        """Clamp what the optimizer's launch did not, or project; return the share on bound."""
        held, gate = self._clipped, self.guard.gate
        if isinstance(clip, NormClip):
            projected = project_and_count_(held, clip.bound, clip.per, self._backend, gate)
            return None if projected is None else projected[0]
        shares, fused = [], set[int]()
        if self.gated is not None:
            shares, fused = self._shares, self._fused
        apart = [p for p in held if id(p) not in fused]
        if apart and (share := clip_and_count_(apart, clip.bound, self._backend, gate)) is not None:
            shares.append(share)
        combined = combine_shares(shares)
        return None if combined is None else combined[0]

    # State

    def named_averages(self) -> dict[str, Tensor]:
        """Return the averages by name: of a parameter that has just come, what it is."""
        if self.ema is None:
            return {}
        floating = ((name, p) for name, p in self.module.named_parameters() if p.is_floating_point())
        return {name: self.averages[p] if p in self.averages else _wide(p) for name, p in floating}

    def widened(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state for all parameters; an older default had those alone that were trained."""
        trained = [i for i, p in enumerate(self.optimizer.param_groups[0]["params"]) if p.requires_grad]
        group = state["param_groups"][0]
        if not self._default or len(state["param_groups"]) > 1 or len(group["params"]) != len(trained):
            return state
        places = dict(zip(group["params"], trained, strict=True))
        group["params"] = list(range(len(self.optimizer.param_groups[0]["params"])))
        return {**state, "state": {places[i]: kept for i, kept in state["state"].items()}}
