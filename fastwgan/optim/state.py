"""Parameter groups and state as ``torch.optim`` has them, checked before anything is changed."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastwgan import checks
from fastwgan.backend import Backend, check_backend

__all__ = ["Checked", "Params"]

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class Checked(Optimizer):
    """An optimizer with the options and state of one of torch's, which a subclass names, and ``clip`` in each group."""

    adopts: type[Optimizer]  # torch's optimizer with the same algorithm, options and state
    _states: tuple[str, ...]  # every state tensor the algorithm can have, in the kernel's order
    _required: tuple[str, ...]  # options that tell a state of this algorithm from another's
    _numbers: tuple[str, ...] = ("lr", "eps", "weight_decay")  # options that are numbers >= 0

    def __init__(self, params: Params, backend: Backend, **defaults: Any) -> None:
        self.backend = check_backend(backend)
        if not isinstance(params, Iterable):
            raise TypeError(f"params: expected tensors or groups of them, got {type(params).__name__}")
        super().__init__(params, {**defaults, "differentiable": False})  # an option that torch's base class looks for

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise unless a group's options can be used."""
        for name in self._numbers:
            checks.number(name, group[name], minimum=0)
        if group.get("clip") is not None:
            checks.number("clip", group["clip"], minimum=0, exclusive=True)
        for variant in ("amsgrad", "decoupled_weight_decay"):
            if group.get(variant, False):
                raise ValueError(f"{variant}: expected False, which {type(self).__name__} computes, got True")

    def _used_states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        """Return the names of the state tensors that ``group`` uses, None where one is not used."""
        return self._states

    def add_param_group(self, param_group: dict[str, Any]) -> None:
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

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def _ensure_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return p's state: made where it is missing, and following p to another dtype or device."""
        state: dict[str, Any] = self.state[p]
        for name in ("step", *filter(None, self._used_states(group))):
            dtype = torch.float32 if name == "step" else p.dtype
            if name not in state:
                state[name] = p.new_zeros((), dtype=dtype) if name == "step" else torch.zeros_like(p)
            elif state[name].dtype != dtype or state[name].device != p.device:
                state[name] = state[name].to(p.device, dtype)
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state as ``torch.optim``'s optimizer of the same name has it."""
        result = super().state_dict()
        for i, state in result["state"].items():
            kept = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            result["state"][i] = {k: v.cpu() if k == "step" else v for k, v in kept.items()}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state from :meth:`state_dict`, or from ``torch.optim``'s optimizer of the same name.

        A torch state has no ``clip``; the groups keep theirs.

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
        for own, loaded in zip(own_groups, self.param_groups, strict=True):
            own.clear()
            own.update(loaded)
        own_state.clear()
        own_state.update(self.state)
        self.param_groups, self.state = own_groups, own_state
        for p, state in self.state.items():
            if state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(p.device).clone()

    def _check_loaded(self, group: dict[str, Any], own: dict[str, Any], states: dict[int, dict[str, Any]]) -> None:
        """Give a group to be loaded the options that it lacks; raise unless it and its state can be ``own``'s."""
        missing = [name for name in self._required if name not in group]
        if missing:
            raise ValueError(f"state_dict: expected a state of {type(self).__name__}, missing {', '.join(missing)}")
        group.setdefault("clip", own.get("clip"))
        for name, default in self.defaults.items():
            group.setdefault(name, default)  # an older torch did not save them all
        try:
            self._check_group(group)
        except (TypeError, ValueError) as error:
            raise type(error)(f"state_dict: {error}") from error
        if len(group["params"]) != len(own["params"]):
            expected, got = len(own["params"]), len(group["params"])
            raise ValueError(f"state_dict: expected {expected} parameters in a group, got {got}")
        for i, p in zip(group["params"], own["params"], strict=True):
            state = states.get(i, {})
            for name in ("step", *filter(None, self._used_states(group))) if state else ():
                if name not in state:
                    raise ValueError(f"state_dict: parameter {i}: expected {name}, got {', '.join(map(str, state))}")
                shape, came = () if name == "step" else tuple(p.shape), tuple(torch.as_tensor(state[name]).shape)
                if came != shape:
                    raise ValueError(f"state_dict: {name} of parameter {i}: expected shape {shape}, got {came}")
