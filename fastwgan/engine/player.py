"""One network in training, with its optimizer, guard, bound and running averages. It settles its own step.

Networks change while they train: layers come, go, freeze and unfreeze, users add groups. So each step looks anew.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from fastwgan.backend import DTYPES, resolve, wide
from fastwgan.constraints import Constraint
from fastwgan.engine.eager import Passed
from fastwgan.engine.guard import PATIENCE, Guard, statistics
from fastwgan.engine.ranks import Ranks, refuse_uneven
from fastwgan.engine.settings import Settings, check_optimizer
from fastwgan.engine.watch import Watch
from fastwgan.metrics import Lazy, Settled
from fastwgan.ops.weights import Share
from fastwgan.optim import Gated
from fastwgan.optim.adopt import MarksStepTaken, adopt, follow_loads
from fastwgan.optim.base import Together


def _trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Return those that may be trained, now or once they are unfrozen."""
    return [p for p in parameters if p.requires_grad or (p.dtype in DTYPES and p.layout == torch.strided)]


class Player:
    """The generator or the critic, by name, with the user's optimizer or the constraint's default for None."""

    def __init__(
        self, name: str, module: nn.Module, optimizer: torch.optim.Optimizer | None, settings: Settings, ranks: Ranks,
        *, ema: float | None = None, constraint: Constraint | None = None,
    ) -> None:  # fmt: skip
        self.name, self.module, self.ema = name, module, ema
        self.averages: dict[Tensor, Tensor] = {}  # of each parameter, in the precision that updates are computed in
        self._ranks, self._given = ranks, settings.backend  # of optimizers
        self._backend = resolve(settings.backend, next(module.parameters()).device)
        scaled = settings.amp == torch.float16  # whose loss scale finds its range by steps that are left out
        limit = 0 if settings.nonfinite == "raise" and not scaled else PATIENCE - 1
        norm = settings.max_norm.get(name) if isinstance(settings.max_norm, dict) else settings.max_norm
        self.guard = Guard(name, module, self._backend, limit=limit, scaled=scaled, max_norm=norm)
        self._constraint = constraint if constraint is not None and constraint.bounds_weights else None
        self._held: list[nn.Parameter] = []
        self._excluded: set[nn.Parameter] = set()
        self._averaged = 0  # parameters that have running averages
        self._unread: ref[Callable[[], Tensor]] | None = None  # the last step's share of weights on their bound
        self._watch: Watch | None = None
        self.version, self._followed = 0, 0  # how many changes have been seen, and the last that was taken up
        self._left: dict[Any, Any] = {}  # states of parameters that have left, until a step is taken without them
        # What all ranks have the same of.
        self._shared: set[Any] = set() if ranks.world == 1 else {*module.modules(), *module.parameters()}
        default = settings.constraint.default_optimizer
        given = default(_trainable(module.parameters()), settings.backend) if optimizer is None else optimizer
        self._replace(given, default=optimizer is None)
        self.follow()

    def assign(self, optimizer: torch.optim.Optimizer) -> None:
        """Take another optimizer of the user's. It may leave out any of the parameters that can be trained by now."""
        check_optimizer(f"{self.name}_optimizer", optimizer, self.module)
        self._replace(optimizer)

    def _replace(self, optimizer: torch.optim.Optimizer, *, default: bool = False) -> None:
        self.optimizer, self._default = adopt(optimizer, self._given), default
        # Whose step obeys the gate on the device.
        self.gated = self.optimizer if isinstance(self.optimizer, Gated) else None
        self._known = set() if default else {p for p in self.module.parameters() if p.requires_grad}
        self._listed = _trainable(self.module.parameters())
        self._watch = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy, with the hooks that PyTorch's own copies lose."""
        hooked = [
            (p, [*(p._backward_hooks or {}).values()], [*(p._post_accumulate_grad_hooks or {}).values()])
            for p in self.module.parameters()
            if p._backward_hooks or p._post_accumulate_grad_hooks
        ]
        of_steps = self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks
        return self.__dict__ | {"hooks": (*of_steps, hooked), "_watch": None, "_unread": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        before, after, hooked = state.pop("hooks")
        self.__dict__.update(state)
        self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks = before, after
        for p, own, accumulated in hooked:
            p._backward_hooks = p._post_accumulate_grad_hooks = None
            frozen = not p.requires_grad
            p.requires_grad_(True)  # without which PyTorch takes no hooks
            for hook in own:
                p.register_hook(hook)
            for hook in accumulated:
                p.register_post_accumulate_grad_hook(hook)
            p.requires_grad_(not frozen)
        for hook in after.values():
            if isinstance(hook, MarksStepTaken):
                follow_loads(hook.optimizer, self.optimizer)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the network into evaluation mode; afterwards each of its modules is back in its own."""
        modes = [(m, m.training) for m in self.module.modules()]
        self.module.eval()
        try:
            yield
        finally:
            for m, training in modes:  # outer ones first; by train(), which a module may have overridden
                if m.training != training:
                    m.train(training)

    # Before the passes

    def share(self) -> None:
        """Give all ranks what the first one has in layers that have come since the last call."""
        parameters, modules = list(self.module.parameters()), list(self.module.modules())
        before, self._shared = self._shared, {*modules, *parameters}
        new = [p for p in parameters if p not in before]
        buffers = [x for m in modules if m not in before for x in m.buffers(recurse=False)]
        self._ranks.broadcast_([*new, *buffers])
        for p in new:
            self.averages.pop(p, None)  # of what it was before
            self._watch = None  # which has it made anew

    def look(self) -> Watch:
        """Return the network as it is now; a change since the last look makes another ``version``."""
        if self._watch is None or not self._watch.same():
            self._watch = Watch(self.module, self.optimizer)
            self.version += 1
        return self._watch

    def follow(self) -> list[nn.Parameter]:
        """Take up changes; return the parameters to train. ValueError: there are none, or the optimizer lacks some."""
        watch = self.look()
        if self._followed == self.version:
            return watch.trained
        if not watch.trained:
            raise ValueError(f"{self.name}: expected trainable parameters, got none")
        if not self._default:
            self._refuse_unknown(watch.trained)
        self._follow(watch.parameters)
        self._dropped = {*watch.parameters, *self._held_by_optimizer()}
        together = Together(gate=self.guard.gate, averages=self.averages, decay=self.ema or 0.0)
        self._together = together if self._constraint is None else self._constraint.fuse_into(together, self._held)
        self._watch = Watch(self.module, self.optimizer)  # anew, as the optimizer's groups may have followed
        self._followed = self.version
        return self._watch.trained

    def _refuse_unknown(self, trained: list[nn.Parameter]) -> None:
        """Raise ValueError if the user's optimizer lacks parameters that are trained since it was given."""
        if lacks := {*trained} - self._known - self._held_by_optimizer():
            names = ", ".join(name for name, p in self.module.named_parameters() if p in lacks)
            raise ValueError(
                f"{self.name}_optimizer: expected the parameters that are trainable since the trainer was made, lacks "
                f"{names}: add them by trainer.{self.name}_optimizer.add_param_group, or freeze them by "
                "requires_grad_(False)"
            )
        self._known = {p for p in self.module.parameters() if p.requires_grad or p in self._known}

    def prepare(self) -> list[nn.Parameter]:
        """Take up changes of the network, and drop all gradients; return the parameters to be trained."""
        watch = self.look()
        trained = watch.trained if self._followed == self.version else self.follow()
        if self._unread is not None:
            self._read_saturation()
        for p in self._dropped:  # some may have left the network
            p.grad = None
        return trained

    def _read_saturation(self) -> None:
        """Count the weights on their bound for whoever still holds the last step's metrics, before they change."""
        if self.gated is not None:
            self.gated.shares = []  # only others may hold it now
        if self._unread is not None and (saturation := self._unread()) is not None:
            saturation()
        self._unread = None

    def _held_by_optimizer(self) -> set[nn.Parameter]:
        return {p for group in self.optimizer.param_groups for p in group["params"]}

    def _follow(self, parameters: list[nn.Parameter]) -> None:
        """Give a default optimizer, the bound and the averages the parameters that the network has now."""
        self._follow_by_default(parameters)
        if self._constraint is not None:
            # By the names that parameters come with, which may be others' later.
            now, seen = self._constraint.excluded(self.module), {*self._held, *self._excluded}
            self._excluded = {p for p in parameters if p in (self._excluded if p in seen else now)}
            self._held = [p for p in parameters if p not in self._excluded]
            self._constraint.prepare(self._held, self._backend)
        if self.ema is not None:
            floating = [*filter(torch.is_floating_point, parameters)]
            self._averaged = len(floating)
            for p in floating:
                average = self.averages.get(p, p)
                begins = average is p or average.shape != p.shape or average.device != p.device
                self.averages[p] = (p.detach() if begins else average).to(wide(p.dtype), copy=begins)

    def _follow_by_default(self, parameters: list[nn.Parameter]) -> None:
        """Give a default optimizer the network's parameters, but those that the user took out or gave to a group."""
        before, self._listed = self._listed, _trainable(parameters)
        if not self._default or list(map(id, before)) == list(map(id, self._listed)):
            return
        first, *others = self.optimizer.param_groups
        out = {p for group in others for p in group["params"]} | (set(before) - set(first["params"]))
        first["params"][:] = [p for p in self._listed if p not in out]
        held, state, left = self._held_by_optimizer(), self.optimizer.state, self._left
        for p in [p for p in state if p not in held]:
            left[p] = state.pop(p)
        for p in [p for p in left if p in held]:
            state[p] = left.pop(p)

    # After the passes

    def settle(self, found: Passed) -> Settled:
        """Finish a step whose gradients are there: add up the ranks, set the guard's gate, update, bound, average."""
        assert self._watch is not None
        scores, penalty, nonfinite, term = self._measured(self._watch, *found)
        return Settled(scores, penalty, nonfinite, self._updated(self._watch.trained), term)

    def _measured(
        self, watch: Watch, scores: tuple[Tensor, ...], known: Tensor | None, penalty: Tensor | None,
        term: Tensor | None,
    ) -> tuple[Lazy, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
        """Return (score statistics, penalty statistics, nonfinite, term) of all ranks, and set the guard's gate."""
        guard = self.guard
        guard.dense = self.gated is not None or self._ranks.world > 1 or guard.max_norm is not None
        if self._ranks.world == 1:
            found, nonfinite = guard.check(watch.parameters, scores if known is None else ())
            return known if found is None else found, penalty, nonfinite, term  # type: ignore[return-value]
        trained, own = watch.trained, statistics(scores, self._backend) if known is None else known
        used = own.new_ones(len(trained))
        without = [i for i, p in enumerate(trained) if p.grad is None]
        for i in without:  # another rank may have used it
            trained[i].grad = torch.zeros_like(trained[i])
            used[i] = 0
        parts = (own.new_full((1,), scores[-1].numel()), used, own, *[x for x in (term, penalty) if x is not None])
        gradients = guard.gradients(watch.parameters)
        table = self._ranks.sum_(gradients, torch.cat(parts))
        sizes, counts, own, *rest = torch.split(table, [len(part) for part in parts], dim=1)
        refuse_uneven("real" if len(scores) == 2 else "batch_size", sizes, gradients)
        for i in without:
            if not counts[:, i].any():  # nobody has: an optimizer is not to take zeros for its gradient
                trained[i].grad = None
        if term is not None:
            term = rest.pop(0).mean(0)
        if rest:
            means, least, greatest = rest[0][:, :2].mean(0), rest[0][:, 2].amin(), rest[0][:, 3].amax()
            penalty = torch.cat((means, least[None], greatest[None]))
        _, nonfinite = guard.check(watch.parameters)
        return own.mean(0), penalty, nonfinite, term

    def _updated(self, trained: list[nn.Parameter]) -> Lazy | None:
        """Update, bound and average the weights, unless the gate says no; return the share on their bound, or None."""
        shares, bounded, averaged = list[Share](), set[int](), set[Tensor]()
        if self.gated is not None:
            shares, bounded = self.gated.step_gated(self._together)
            if self.averages:
                averaged = {p for group in self.gated.param_groups for p in group["params"] if p.grad is not None}
        else:
            skip, factor = self.guard.gate.tolist()  # any optimizer may come, so the host has to know
            if skip:
                MarksStepTaken(self.optimizer)()
            else:
                for p in trained if factor != 1 else ():  # not in place, as two gradients may share memory
                    p.grad = None if p.grad is None else p.grad * factor
                self.optimizer.step()
        for weight, average in self.averages.items():
            if weight not in averaged:
                taken = (1 - self.guard.gate[0]).to(average.dtype)  # or 0, where the step is left out
                average.lerp_(weight.detach().to(average.dtype), taken * (1 - (self.ema or 0.0)))
        self._left.clear()
        if len(self.averages) > self._averaged:  # some of parameters that have left
            present = set(self.module.parameters())
            for gone in [x for x in self.averages if x not in present]:
                del self.averages[gone]
        if self._constraint is None:
            return None
        saturation = self._constraint.apply_(self._held, bounded, shares, self.guard.gate, self._backend)
        self._unread = ref(saturation) if callable(saturation) else None
        return saturation

    def refresh(self) -> None:
        """Have a step that a CUDA graph replays use the optimizer's present numbers."""
        if self.gated is not None:
            self.gated.refresh(self._together)

    def named_averages(self) -> dict[str, Tensor]:
        """Return the averages by name: of a parameter that has just come, what it is."""
        if self.ema is None:
            return {}
        floating = ((name, p) for name, p in self.module.named_parameters() if p.is_floating_point())
        return {
            name: self.averages[p] if p in self.averages else p.detach().to(wide(p.dtype), copy=True)
            for name, p in floating
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the parts, of the network as it is; the optimizer follows it when a step is taken."""
        first, kept = self.optimizer.param_groups[0], (self._left.copy(), self._listed)
        params, state = list(first["params"]), dict(self.optimizer.state)
        self._follow_by_default(list(self.module.parameters()))
        optimizer = self.optimizer.state_dict()
        if self._default:
            (self._left, self._listed), first["params"][:] = kept, params
            self.optimizer.state.clear()
            self.optimizer.state.update(state)
        return {
            "module": self.module.state_dict(),
            "optimizer": optimizer,
            "guard": self.guard.state_dict(),
            "averages": None if self.ema is None else self.named_averages(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up states of the parts; without averages among them these begin with the weights."""
        self._read_saturation()
        self.module.load_state_dict(state["module"])
        self._follow([*self.module.parameters()])
        self._watch = None
        clips = [group.get("clip") for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(self._widened(copy.deepcopy(state["optimizer"])))
        for group, clip in zip(self.optimizer.param_groups, clips, strict=True):
            if "clip" in group:
                group["clip"] = clip  # the constraint is the trainer's, not the checkpoint's
        self.guard.load_state_dict(state["guard"])
        weights = dict(self.module.named_parameters())
        for name, average in self.named_averages().items():
            average.copy_(weights[name].detach() if state["averages"] is None else state["averages"][name])

    def _widened(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state for all parameters; an older default had those alone that were trained."""
        listed, group = self.optimizer.param_groups[0]["params"], state["param_groups"][0]
        trained = [i for i, p in enumerate(listed) if p.requires_grad]
        if not self._default or len(state["param_groups"]) > 1 or len(group["params"]) != len(trained):
            return state
        places = dict(zip(group["params"], trained, strict=True))
        group["params"] = [*range(len(listed))]
        return {**state, "state": {places[i]: kept for i, kept in state["state"].items()}}
