"""RMSprop's and Adam's common part: torch.optim's groups and state, and a step that obeys a gate on the device."""

import copy
import math
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastwgan import checks, reference
from fastwgan.backend import Backend, check_backend, kernels, resolve
from fastwgan.ops.layout import is_dense, laid_out, write_back
from fastwgan.ops.weights import Share, combine_shares, read, saturation

Options = dict[str, Any]  # of a parameter group, or what a parameter has for state
Params = Iterable[Tensor] | Iterable[Options] | Iterable[tuple[str, Tensor]]
_Key = tuple[torch.device, torch.dtype, bool, bool, bool]  # has momentum, centered, averaged: one launch's parameters
flat = chain.from_iterable
_params, _grad = itemgetter("params"), attrgetter("grad")
_layout, _kind = attrgetter("layout"), attrgetter("shape", "dtype", "device")
_Member = tuple[Tensor, Options, float | None]  # a parameter, its group, and the bound of that


class Together(NamedTuple):
    """The work of a trainer's step in the optimizer's launch, beside the update."""

    gate: Tensor | None = None  # [2] float64: 1 to leave the step out, else 0; a factor of gradients
    averages: dict[Tensor, Tensor] | None = None  # running averages of weights, float32 or wider
    decay: float = 0.0  # of these
    bound: float | None = None  # to clamp weights to
    bounded: frozenset[int] | set[int] = frozenset()  # ids of the parameters that have it


class _Launch(NamedTuple):
    """A launch of the update: its parameters, of one device, dtype and variant of the algorithm, and their numbers."""

    key: _Key
    backend: Literal["triton", "torch"]
    params: list[Tensor]
    rows: list[int]  # of each in ``hyper``, which has one for each group
    hyper: tuple[tuple[float, ...], ...]
    by_group: list[tuple[Options, float | None, list[Tensor]]]  # group, bound, parameters
    clamped: int  # weights that have a bound
    straight: bool  # whether parameters are dense, and gradients lie in memory as they do
    columns: list[list[Tensor]]  # the state, and the counts of steps


def equal(a: Any, b: Any) -> bool:
    """Return a == b, or False where comparing tensors or arrays in them has no single answer."""
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):
        return False


class Gated(Optimizer):
    """An optimizer whose step is one launch for all parameters of a device and dtype, and obeys a gate there.

    A subclass is an algorithm, with the options and state of one of torch's, and ``clip`` in each group.
    """

    adopts: type[Optimizer]  # torch's optimizer with the same algorithm, options and state
    _states: tuple[str, ...]  # every state tensor the algorithm can have, in the kernel's order
    _required: tuple[str, ...]  # options that tell a state of this algorithm from another's
    _numbers: tuple[str, ...] = ("lr", "eps", "weight_decay")  # options that are numbers >= 0
    _algorithm: str  # as the kernel has it
    _step_supports_amp_scaling = True  # so a GradScaler sets found_inf and grad_scale, and leaves the rest to the step
    _together = Together()  # of the call of step_gated that is under way

    _updates: dict[_Key, Any]  # launchers, whose tables a CUDA graph may read
    _apart: dict[_Key, list[int]]  # where parameters lie that are known not to overlap
    shares: list[Share]  # of weights on their bound, after the last step
    _plan: list[_Launch]  # the launches of the last step, which serve again if these two are the same:
    _planned_for: Any  # what _seen returned
    _planned_with: Together  # what the step did beside the update
    _bounded: set[int]  # ids of parameters that it holds to the trainer's bound
    _sent: tuple[list[Any], Together] | None  # the numbers on the device, where CUDA graphs read them

    def __new__(cls, *_: Any, **__: Any) -> "Gated":
        self = super().__new__(cls)
        self._updates, self._apart, self.shares = {}, {}, []  # a copy, or one that was pickled, has its own
        self._plan, self._planned_for, self._planned_with = [], None, self._together
        self._bounded, self._sent = set(), None
        return self

    def __init__(self, params: Params, backend: Backend, **defaults: Any) -> None:
        self.backend = check_backend(backend)
        if not isinstance(params, Iterable):
            raise TypeError(f"params: expected tensors or groups of them, got {type(params).__name__}")
        super().__init__(params, {**defaults, "differentiable": False})  # an option that torch's base class looks for

    def _check_group(self, group: Options) -> None:
        for name in self._numbers:
            checks.number(name, group[name], minimum=0)
        if group.get("clip") is not None:
            checks.number("clip", group["clip"], minimum=0, exclusive=True)
        for variant in ("amsgrad", "decoupled_weight_decay"):
            if group.get(variant, False):
                raise ValueError(f"{variant}: expected False, which {type(self).__name__} computes, got True")

    def _used_states(self, group: Options) -> tuple[str | None, ...]:
        """Return the names of the state tensors that ``group`` uses, None where one is not used."""
        return self._states

    def add_param_group(self, param_group: Options) -> None:
        """Add a group of parameters; options it does not name take the optimizer's defaults.

        Raises:
            TypeError, ValueError: an option or a parameter cannot be used. Nothing is changed then.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group: expected a dict with params, got {param_group!r}")
        self._check_group({**self.defaults, **param_group})
        params = param_group["params"]
        if not isinstance(params, set):  # torch refuses sets, whose order changes
            params = param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
            seen = set()
            for i, entry in enumerate(params):
                p = checks.parameter(f"params[{i}]", entry[1] if isinstance(entry, tuple) else entry)
                if id(p) in seen:
                    raise ValueError(f"params[{i}]: expected each parameter once, got one that stands before it")
                seen.add(id(p))
        super().add_param_group(param_group)

    def __getstate__(self) -> Options:
        return {**super().__getstate__(), "backend": self.backend}

    def _ensure_state(self, p: Tensor, group: Options) -> Options:
        """Return p's state: made where it is missing, and following p to another dtype or device."""
        state: Options = self.state[p]
        for name in ("step", *filter(None, self._used_states(group))):
            dtype = torch.float32 if name == "step" else p.dtype
            if name not in state:
                state[name] = p.new_zeros((), dtype=dtype) if name == "step" else torch.zeros_like(p)
            else:
                state[name] = state[name].to(p.device, dtype)
        return state

    def state_dict(self) -> Options:
        """Return a copy of the state as ``torch.optim``'s optimizer of the same name has it."""
        result = super().state_dict()
        for i, state in result["state"].items():
            kept = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            result["state"][i] = {k: v.cpu() if k == "step" else v for k, v in kept.items()}
        return result

    def load_state_dict(self, state_dict: Options) -> None:
        """Take a state from :meth:`state_dict`, or from torch.optim's namesake, without ``clip``: groups keep theirs.

        Raises:
            ValueError: the state belongs to other parameters, or to a variant this optimizer does not compute
                (``amsgrad``, ``decoupled_weight_decay``). Nothing is changed then.
        """
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            came = ", ".join(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ValueError(f"state_dict: expected a dict of state and param_groups, got {came}")
        state_dict = copy.deepcopy(state_dict)
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError(f"state_dict: expected {len(self.param_groups)} parameter groups, got {len(groups)}")
        for group, own in zip(groups, self.param_groups, strict=True):
            self._check_loaded(group, own, state_dict["state"])
        # The group dicts stay the same objects: a scheduler, or the torch optimizer they were taken from, holds them.
        own_groups, own_state = self.param_groups, self.state
        super().load_state_dict(state_dict)
        pairs: list[tuple[Any, Any]] = [*zip(own_groups, self.param_groups, strict=True), (own_state, self.state)]
        for own, loaded in pairs:
            own.clear()
            own.update(loaded)
        self.param_groups, self.state = own_groups, own_state
        for p, state in self.state.items():
            if state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(p.device).clone()

    def _check_loaded(self, group: Options, own: Options, states: dict[int, Options]) -> None:
        """Give a group to be loaded the options that it lacks; raise unless it and its state can be ``own``'s."""
        if missing := [name for name in self._required if name not in group]:
            raise ValueError(f"state_dict: expected a state of {type(self).__name__}, missing {', '.join(missing)}")
        group.setdefault("clip", own.get("clip"))
        for name, default in self.defaults.items():
            group.setdefault(name, default)  # an older torch did not save them all
        try:
            self._check_group(group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"state_dict: {error}") from error
        if (got := len(group["params"])) != (expected := len(own["params"])):
            raise ValueError(f"state_dict: expected {expected} parameters in a group, got {got}")
        for i, p in zip(group["params"], own["params"], strict=True):
            state = states.get(i, {})
            for name in ("step", *filter(None, self._used_states(group))) if state else ():
                if name not in state:
                    raise ValueError(f"state_dict: parameter {i}: expected {name}, got {', '.join(map(str, state))}")
                shape, came = () if name == "step" else tuple(p.shape), tuple(torch.as_tensor(state[name]).shape)
                if came != shape:
                    raise ValueError(f"state_dict: {name} of parameter {i}: expected shape {shape}, got {came}")

    @staticmethod
    def variant(group: Options) -> tuple[bool, bool]:
        """Return what makes another kernel of the algorithm: (has momentum, centered)."""
        return group.get("momentum", 0) > 0, bool(group.get("centered", False))

    def _step_group(self, params: list[Tensor], states: list[Options], group: Options, finite: bool) -> None:
        """Take the step of a group's parameters in PyTorch; ``finite`` if the gradients are known to be."""
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    # A compiled training loop calls it as it is: a graph cannot hold addresses.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and clamp it.

        Return the loss of ``closure``, which computes it, with gradients, before the update; or None.

        Raises:
            TypeError, ValueError: a gradient or an option cannot be used. Nothing is changed then.
            RuntimeError: ``backend="triton"`` cannot be met.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        together, self._sent, self.shares = self._together, None, []
        seen = self._seen(together)
        if seen is None or together is not self._planned_with or not equal(seen, self._planned_for):
            self._planned_for = None  # until all is known to be right
            self._plan = self._planned(together)
            self._planned_for, self._planned_with = self._seen(together), together  # which has its state by now
        gate = together.gate if getattr(self, "found_inf", None) is None or not self._plan else self._gate_of_scaler()
        with torch.no_grad():
            for launch in self._plan:
                take = self._step_torch if launch.backend == "torch" else self._step_triton
                take(launch, gate, together)
        return loss

    def _seen(self, together: Together) -> Any:
        """Return what a plan depends on: groups, tensors, and how they lie in memory; None where that is unusual."""
        params, numbers = [*flat(map(_params, self.param_groups))], [*flat(map(dict.values, self.param_groups))]
        states = [*flat([state.values() for state in map(self.state.get, params) if state])]
        others = [*map(_grad, params), *(map(together.averages.get, params) if together.averages else ())]
        arrays = [*params, *states, *[x for x in others if x is not None]]
        if any(map(Tensor.is_neg, arrays)) or {*map(_layout, arrays)} != {torch.strided}:
            return None
        owners, missing = [*map(id, params), *map(id, states)], [x is None for x in others]
        return self.backend, numbers, owners, missing, [*map(_kind, arrays)], [*map(Tensor.stride, arrays)]

    def _planned(self, together: Together) -> list[_Launch]:
        members: dict[_Key, list[_Member]] = {}
        averages, self._bounded = together.averages or {}, set[int]()
        for group in self.param_groups:
            self._check_group(group)
            variant, bound = self.variant(group), self._bound(group, together)
            used = [p for p in group["params"] if p.grad is not None]
            if bound is not None and together.bound is not None:
                self._bounded.update(map(id, used))
            for p in used:
                if p.numel():
                    self._check_member(p, bound)
                    key = (p.device, p.dtype, *variant, p in averages)
                    members.setdefault(key, []).append((p, group, bound))
        return [self._launch(key, own, together) for key, own in members.items()]

    def step_gated(self, together: Together) -> tuple[list[Share], set[int]]:
        """Take a trainer's step; return the shares of weights on their bound, and the ids of those bounded."""
        self._together = together
        try:
            self.step()  # which schedulers and users wrap, and which calls the hooks
        finally:
            del self._together
        return self.shares, self._bounded

    @property
    def saturation(self) -> Tensor | None:
        """Return the share of clamped weights that lie on their bound after the last step, 0-d; None of none.

        Of the last call of :meth:`step`, that is: a CUDA graph's replays make no call.
        """
        combined = combine_shares(self.shares)
        return None if combined is None else read(combined[0])

    def _bound(self, group: Options, together: Together) -> float | None:
        """Return the bound of a group's weights: the trainer's, where all of them have it, or the group's own."""
        if together.bound is None:
            return group.get("clip")  # which a group that was added to a torch optimizer, whose groups are ours, lacks
        return together.bound if together.bounded.issuperset(map(id, group["params"])) else None

    def _gate_of_scaler(self) -> Tensor:
        found: Tensor = self.found_inf  # type: ignore[attr-defined]
        scale: Tensor | None = getattr(self, "grad_scale", None)  # None once gradients have been unscaled
        factor = torch.ones_like(found) if scale is None else 1 / scale
        return torch.stack((found.reshape(()), factor.reshape(()))).double()

    def _check_member(self, p: Tensor, bound: float | None) -> None:
        """Raise unless a kernel given addresses alone would read and write the right memory."""
        grad = p.grad
        assert grad is not None
        if (grad.shape, grad.dtype, grad.device, grad.layout) != (p.shape, p.dtype, p.device, torch.strided):
            expected, got = (f"{tuple(x.shape)} {x.dtype} {x.layout} on {x.device}" for x in (p, grad))
            raise TypeError(f"grad: expected {expected}, got {got}")
        for name, x in self.state.get(p, {}).items():
            if name in self._states and x.shape != p.shape:
                raise ValueError(f"state: {name}: expected shape {tuple(p.shape)}, got {tuple(x.shape)}")
        if bound is not None:
            checks.bound("clip", bound, p.dtype)

    def _launch(self, key: _Key, members: list[_Member], together: Together) -> _Launch:
        """Return the launch of a key's parameters, with their state: made, if need be, and laid out as they are."""
        hyper, by_group = self._hyper(key, together), dict[int, tuple[Options, float | None, list[Tensor]]]()
        backend, names, averages = resolve(self.backend, key[0]), self._used_states(members[0][1]), together.averages
        straight = True
        for p, group, bound in members:
            if backend == "triton" and kernels.arrival.capturing(key[0]) and not self.state[p]:
                raise RuntimeError(kernels.table.NOT_WARM)  # a replay would make the state anew
            state, like, grad = self._ensure_state(p, group), p if is_dense(p) else p.detach().contiguous(), p.grad
            assert grad is not None
            straight = straight and like is p and not grad.is_neg() and laid_out(grad, p) is grad
            state.update({name: laid_out(state[name], like) for name in names if name is not None})
            if key[-1] and averages:
                averages[p] = laid_out(averages[p], like)
            by_group.setdefault(id(group), (group, bound, []))[2].append(p)
        params, states, rows = [p for p, *_ in members], [self.state[p] for p, *_ in members], [*hyper]
        return _Launch(
            key, backend, params, [rows.index(id(group)) for _, group, _ in members], tuple(hyper.values()),
            [*by_group.values()], sum(p.numel() for p, _, bound in members if bound is not None), straight,
            [[] if name is None else [state[name] for state in states] for name in (*names, "step")],
        )  # fmt: skip

    def _step_torch(self, launch: _Launch, gate: Tensor | None, together: Together) -> None:
        skip, factor = (0.0, 1.0) if gate is None else gate.tolist()  # on a GPU this waits, as PyTorch's optimizers do
        if skip:
            if launch.clamped:
                self.shares.append((launch.params[0].new_tensor(math.nan, dtype=torch.float32), launch.clamped))
            return
        if factor != 1:  # not in place, as two gradients may share memory
            for p, grad in zip(launch.params, torch._foreach_mul([*map(_grad, launch.params)], factor), strict=True):
                p.grad = grad
        for group, _, params in launch.by_group:
            self._step_group(params, [self.state[p] for p in params], group, finite=together.gate is not None)
        for _, bound, params in launch.by_group:  # after all updates, of which two may be of one memory
            if bound is not None:
                reference.clip_weights_(params, bound)
                count = sum(map(Tensor.numel, params))
                self.shares.append((cache(lambda given=params, bound=bound: saturation(given, bound)[0]), count))
        if averages := together.averages:
            kept = [p for p in launch.params if p in averages]
            reference.average_([averages[p] for p in kept], kept, together.decay)

    def _step_triton(self, launch: _Launch, gate: Tensor | None, together: Together) -> None:
        (device, dtype, momentum, centered, averaged), given = launch.key, launch.params
        places = [*map(Tensor.data_ptr, given)]
        if places != self._apart.get(launch.key):
            checks.refuse_overlap(given)
            self._apart[launch.key] = places
        if gate is not None:  # a GradScaler has one, on one of the devices
            gate = gate.to(device, non_blocking=True)
        works, grads = given, [*map(_grad, given)]
        if not launch.straight:
            works = [p if is_dense(p) else p.detach().contiguous() for p in given]
            grads = [laid_out(grad.resolve_neg(), work) for grad, work in zip(grads, works, strict=True)]
        if launch.key not in self._updates:
            self._updates[launch.key] = kernels.update.Update(device, dtype)
        averages = [*map(together.averages.get, given)] if averaged and together.averages else None
        share = self._updates[launch.key].launch(
            self._algorithm, works, grads, launch.columns[:-1], launch.columns[-1], launch.hyper, launch.rows,
            gate=gate, averages=averages, momentum=momentum, centered=centered,
        )  # fmt: skip
        write_back(given, works)
        if share is not None:
            self.shares.append((share, launch.clamped))

    def _hyper(self, key: _Key, together: Together) -> dict[int, tuple[float, ...]]:
        """Return the kernel's numbers of each group of a launch's variant, by its id."""
        rows: dict[int, tuple[float, ...]] = {}
        # Groups without gradients are among them, so that a group's place never changes: a captured graph relies on it.
        for group in [group for group in self.param_groups if self.variant(group) == key[2:4]]:
            # The bound as this dtype holds it, so that weights on it are counted.
            bound = self._bound(group, together)
            none = bound is None or bound > torch.finfo(key[1]).max
            limit = math.inf if none else checks.bound("clip", bound, key[1])
            betas = group["betas"] if "betas" in self.defaults else (0.0, group["alpha"])
            decays = [(beta, 1 - beta, math.log(beta) if beta > 0 else -math.inf) for beta in betas]
            rows[id(group)] = (
                group["lr"], *decays[0], *decays[1], group["eps"], group["weight_decay"], group.get("momentum", 0.0),
                -1.0 if group["maximize"] else 1.0, together.decay, 1 - together.decay, limit,
            )  # fmt: skip
        return rows

    def refresh(self, together: Together) -> None:
        """Have launches that a CUDA graph replays use the present numbers, all of them: a replay runs no Python."""
        numbers = [*flat(map(dict.values, self.param_groups))]
        if self._sent is not None and self._sent[1] is together and equal(numbers, self._sent[0]):
            return
        for group in self.param_groups:
            self._check_group(group)
        for key, update in self._updates.items():
            update.hyper.set(tuple(self._hyper(key, together).values()))
        self._sent = numbers, together
