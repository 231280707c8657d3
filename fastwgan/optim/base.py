"""The step of RMSprop and Adam: one launch for all parameters of a device and dtype, which obeys a gate there."""

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fastwgan import checks, reference
from fastwgan.backend import kernels, resolve
from fastwgan.ops.layout import same_layout, written
from fastwgan.ops.weights import Share, combine_shares, saturation
from fastwgan.optim.state import Checked

__all__ = ["Gated", "Together"]

_Key = tuple[torch.device, torch.dtype, bool, bool, bool]  # has momentum, centered, averaged: one launch's parameters
_Member = tuple[Tensor, dict[str, Any], float | None]  # a parameter, its group, and the bound of that


class Together(NamedTuple):
    """What a trainer's step does in the optimizer's launch beside the update."""

    gate: Tensor | None = None  # [2] float32: 1 to leave the step out, else 0; a factor of gradients
    averages: dict[Tensor, Tensor] | None = None  # running averages of weights, float32 or wider
    decay: float = 0.0  # of these
    bound: float | None = None  # to clamp weights to
    bounded: frozenset[int] | set[int] = frozenset()  # ids of the parameters that have it


class Gated(Checked):
    """An optimizer whose step obeys a gate on the device. A subclass is an algorithm."""

    _algorithm: str  # as the kernel has it
    _step_supports_amp_scaling = True  # so a GradScaler sets found_inf and grad_scale, and leaves the rest to the step
    _together = Together()  # of the call of step_gated that is under way

    _updates: dict[_Key, Any]  # launchers, whose tables a CUDA graph may read
    _apart: dict[_Key, list[int]]  # where parameters lie that are known not to overlap
    _shares: list[Share]  # of weights on their bound, after the last step

    def __new__(cls, *_: Any, **__: Any) -> "Gated":
        self = super().__new__(cls)
        self._updates, self._apart, self._shares = {}, {}, []  # a copy, or one that was pickled, has its own
        return self

    @staticmethod
    def _variant(group: dict[str, Any]) -> tuple[bool, bool]:
        """Return what makes another kernel of the algorithm: (has momentum, centered)."""
        return group.get("momentum", 0) > 0, bool(group.get("centered", False))

    def _hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
        """Return the kernel's numbers but the last three, which are not the algorithm's."""
        raise NotImplementedError

    def _step_group(
        self, params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any], finite: bool
    ) -> None:
        """Take the step of a group's parameters in PyTorch; ``finite`` if the gradients are known to be."""
        raise NotImplementedError

    # The step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    # A compiled training loop calls it as it is: a graph cannot hold addresses.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and clamp it.

        Args:
            closure: computes and returns the loss, with gradients, before the update.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError, ValueError: a gradient or an option cannot be used. Nothing is changed then.
            RuntimeError: ``backend="triton"`` cannot be met.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        launches: dict[_Key, list[_Member]] = {}
        together, averages = self._together, self._together.averages or {}
        for group in self.param_groups:
            self._check_group(group)
            variant, bound = self._variant(group), self._bound(group, together)
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self._check_member(p, bound)
                    key = (p.device, p.dtype, *variant, p in averages)
                    launches.setdefault(key, []).append((p, group, bound))
        gate = self._gate(together) if launches else None
        backends = [resolve(self.backend, key[0]) for key in launches]
        self._shares = []
        with torch.no_grad():
            for (key, members), backend in zip(launches.items(), backends, strict=True):
                if backend == "torch":
                    self._step_torch(members, gate, together)
                else:
                    self._step_triton(key, members, gate, together)
        return loss

    def step_gated(self, together: Together) -> tuple[list[Share], set[int]]:
        """Take a step with all that a trainer wants done together with it.

        Returns:
            (the shares of weights on their bound, the ids of the parameters that were clamped to ``together.bound``:
            those with a gradient, in groups all of whose parameters have that bound).
        """
        self._together = together
        try:
            self.step()  # which schedulers and users wrap, and which calls the hooks
        finally:
            del self._together
        clamped: set[int] = set()
        for group in self.param_groups if together.bound is not None else ():
            if together.bounded.issuperset(map(id, group["params"])):
                clamped |= {id(p) for p in group["params"] if p.grad is not None}
        return [*self._shares], clamped

    @property
    def saturation(self) -> Tensor | None:
        """Return the share of clamped weights that lay on their bound after the last step, 0-d; None of none.

        Of the last call of :meth:`step`, that is: a CUDA graph's replays make no call.
        """
        combined = combine_shares(self._shares)
        return None if combined is None else combined[0]

    def _bound(self, group: dict[str, Any], together: Together) -> float | None:
        """Return the bound of a group's weights: the trainer's, where all of them have it, or the group's own.

        A group that was added to a torch optimizer, whose groups are ours, has none of its own.
        """
        if together.bound is None:
            return group.get("clip")
        return together.bound if together.bounded.issuperset(map(id, group["params"])) else None

    def _gate(self, together: Together) -> Tensor | None:
        """Return the trainer's gate, or one of what a GradScaler has set for this step."""
        found: Tensor | None = getattr(self, "found_inf", None)
        if found is None:
            return together.gate
        scale: Tensor | None = getattr(self, "grad_scale", None)  # None once gradients have been unscaled
        factor = torch.ones_like(found) if scale is None else 1 / scale
        return torch.stack((found.reshape(()), factor.reshape(()))).float()

    def _check_member(self, p: Tensor, bound: float | None) -> None:
        """Raise unless a kernel given addresses alone would read and write the right memory."""
        grad = p.grad
        assert grad is not None
        if (grad.shape, grad.dtype, grad.device, grad.layout) != (p.shape, p.dtype, p.device, torch.strided):
            expected, got = (f"{tuple(x.shape)} {x.dtype} {x.layout} on {x.device}" for x in (p, grad))
            raise TypeError(f"grad: expected {expected}, got {got}")
        state = self.state.get(p, {})
        for name in self._states:
            if name in state and state[name].shape != p.shape:
                raise ValueError(f"state: {name}: expected shape {tuple(p.shape)}, got {tuple(state[name].shape)}")
        if bound is not None:
            checks.bound("clip", bound, p.dtype)

    def _step_torch(self, members: list[_Member], gate: Tensor | None, together: Together) -> None:
        skip, factor = (0.0, 1.0) if gate is None else gate.tolist()  # on a GPU this waits, as PyTorch's optimizers do
        if skip:
            clamped = sum(p.numel() for p, _, bound in members if bound is not None)
            if clamped:
                self._shares.append((members[0][0].new_tensor(math.nan, dtype=torch.float32), clamped))
            return
        if factor != 1:  # not in place, as two gradients may share memory
            grads = torch._foreach_mul([p.grad for p, *_ in members if p.grad is not None], factor)
            for (p, *_), grad in zip(members, grads, strict=True):
                p.grad = grad
        groups: dict[int, tuple[dict[str, Any], float | None, list[Tensor]]] = {}
        for p, group, bound in members:
            groups.setdefault(id(group), (group, bound, []))[2].append(p)
        for group, _, params in groups.values():
            states = [self._ensure_state(p, group) for p in params]
            self._step_group(params, states, group, finite=together.gate is not None)
        for _, bound, params in groups.values():  # after all updates, of which two may be of one memory
            if bound is not None:
                reference.clip_weights_(params, bound)
                self._shares.append(saturation(params, bound))
        if averages := together.averages:
            kept = [p for p, *_ in members if p in averages]
            reference.average_([averages[p] for p in kept], kept, together.decay)

    def _step_triton(self, key: _Key, members: list[_Member], gate: Tensor | None, together: Together) -> None:
        device, dtype, momentum, centered, averaged = key
        given, averages = [p for p, *_ in members], together.averages or {}
        places = [p.data_ptr() for p in given]
        if places != self._apart.get(key):
            checks.refuse_overlap(given)
            self._apart[key] = places
        row_of_group = {id(group): row for row, group in enumerate(self._groups_of(key))}
        grads, states, steps, rows = [], [], [], []
        if gate is not None:  # a GradScaler has one, on one of the devices
            gate = gate.to(device, non_blocking=True)
        with written(given) as params:
            for (p, group, _), work in zip(members, params, strict=True):
                if kernels.arrival.capturing(device) and not self.state[p]:
                    raise RuntimeError(kernels.table.NOT_WARM)  # a replay would make the state anew
                state, names = self._ensure_state(p, group), self._used_states(group)
                assert p.grad is not None
                grad = p.grad.resolve_neg()
                grads.append(grad if same_layout(grad, work) else torch.empty_like(work).copy_(grad))
                for name in names:
                    if name is not None and not same_layout(state[name], work):
                        state[name] = torch.empty_like(work).copy_(state[name])
                if averaged and not same_layout(averages[p], work):
                    averages[p] = torch.empty_like(work, dtype=averages[p].dtype).copy_(averages[p])
                states.append([None if name is None else state[name] for name in names])
                steps.append(state["step"])
                rows.append(row_of_group[id(group)])
            if key not in self._updates:
                self._updates[key] = kernels.update.Update(device, dtype)
            share = self._updates[key].launch(
                self._algorithm, params, grads, states, steps, self._hyper_rows(key, together), rows, gate=gate,
                averages=[averages[p] for p in given] if averaged else None, momentum=momentum, centered=centered,
            )  # fmt: skip
        if share is not None:
            self._shares.append((share, sum([p.numel() for p, _, bound in members if bound is not None])))

    def _groups_of(self, key: _Key) -> list[dict[str, Any]]:
        """Return all groups of a launch's variant, one row of numbers each.

        Those whose parameters have no gradients are among them, so that a group's row never changes: a captured graph
        relies on it.
        """
        return [group for group in self.param_groups if self._variant(group) == key[2:4]]

    def _hyper_rows(self, key: _Key, together: Together) -> tuple[tuple[float, ...], ...]:
        rows = []
        for group in self._groups_of(key):
            # The bound as this dtype holds it, so that weights on it are counted.
            bound = self._bound(group, together)
            none = bound is None or bound > torch.finfo(key[1]).max
            limit = math.inf if none else checks.bound("clip", bound, key[1])
            rows.append((*self._hyper(group), together.decay, 1 - together.decay, limit))
        return tuple(rows)

    def refresh(self, together: Together) -> None:
        """Have launches that a CUDA graph replays use the present numbers, as a replay runs no Python.

        Not only ``lr`` but every number counts, as long as the same algorithm and the same parameters are meant.

        Raises:
            TypeError, ValueError: an option cannot be used. Nothing is changed then.
        """
        for group in self.param_groups:
            self._check_group(group)
        for key, update in self._updates.items():
            update.set_hyper(self._hyper_rows(key, together))

    def capture_key(self) -> Hashable:
        """Return what of the groups a captured graph depends on: their parameters, and which kernel updates them."""
        return tuple(
            (*map(id, group["params"]), *self._variant(group), group.get("clip") is None) for group in self.param_groups
        )
