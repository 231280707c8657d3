"""Notice what has changed about a network and its optimizer since the last step, in a few passes that run in C.

A step depends on layers and tensors, on layers' plain attributes, hooks and code, and on the optimizer's groups. What
is made of them (lists of parameters, decisions, CUDA graphs) serves for as long as a :class:`Watch` finds no change.
"""

from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.optim import Optimizer

from fastwgan.optim import Gated
from fastwgan.optim.base import equal

flat = chain.from_iterable
_parts = attrgetter("_modules", "_parameters", "_buffers")
_hooks = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_hooks_of_tensor = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")
_requires_grad = attrgetter("requires_grad")
_params: Any = itemgetter("params")
_code, _code_of_convolution = attrgetter("__call__", "_call_impl", "forward"), attrgetter("_conv_forward")
EVERY_MODULES = frozenset(vars(nn.Module()))  # attributes, of which those that count are looked at by name


def _containers(x: Any, found: dict[int, Any]) -> None:
    """Collect by id a container and those inside it, each of which may change while it stays the same object."""
    if isinstance(x, (dict, list, set, tuple)) and id(x) not in found:
        found[id(x)] = x
        for part in x.values() if isinstance(x, dict) else x:
            _containers(part, found)


def _alike(a: Any, b: Any) -> bool:
    """Return whether two values are equal; tensors only if they are one object, as comparing them waits for a GPU."""
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and equal(a, b))


class Watch:
    """A network and its optimizer as they were when this was made: all ``parameters``, and those ``trained``."""

    def __init__(self, module: nn.Module, optimizer: Optimizer) -> None:
        self.parameters, self._modules, self._optimizer = [*module.parameters()], [*module.modules()], optimizer
        self.trained = [p for p in self.parameters if p.requires_grad]
        self._tensors = [x for x in (*self.parameters, *module.buffers()) if x.layout == torch.strided]
        self._part_dicts: list[dict[str, Any]] = [*flat(map(_parts, self._modules))]
        self._kept = [*flat(map(dict.values, self._part_dicts))]  # while these live, no other object has one's id
        self._kinds = [*{type(m): None for m in self._modules}]
        self._convolutions = [kind for kind in self._kinds if hasattr(kind, "_conv_forward")]
        self._hook_dicts: list[Any] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
        self._hook_dicts += flat(map(_hooks, self._modules))
        self._hook_dicts += [hooks for hooks in flat(map(_hooks_of_tensor, self._tensors)) if hooks is not None]
        found: dict[int, Any] = {}
        for name, x in flat(vars(m).items() for m in self._modules):
            if name not in EVERY_MODULES:
                _containers(x, found)
        self._dicts = [x for x in found.values() if isinstance(x, dict)]
        self._sequences = [x for x in found.values() if not isinstance(x, dict)]
        self._numbers: list[Any] = []
        self._variants: Any = None
        self._state, self._values = self._now()

    def same(self) -> bool:
        """Return whether all is as it was."""
        state, values = self._now()
        alike = all(map(is_, values, self._values)) or all(map(_alike, values, self._values))
        return state == self._state and alike

    def _now(self) -> tuple[tuple[Any, ...], list[Any]]:
        """Return what can be compared at once, and the values of attributes and in containers."""
        modules, tensors, groups = self._modules, self._tensors, self._optimizer.param_groups
        named = [*map(vars, modules), *self._dicts]
        if isinstance(self._optimizer, Gated):  # whose kernel a graph keeps, with the addresses of its state
            tensors = [*tensors, *flat(map(dict.values, self._optimizer.state.values()))]
            numbers = [*flat(map(dict.values, groups))]
            if len(numbers) != len(self._numbers) or not all(map(is_, numbers, self._numbers)):
                self._numbers = numbers
                self._variants = [(*Gated.variant(group), group.get("clip") is None) for group in groups]
        return (
            [*flat(named)], [*map(len, self._sequences)], [*map(type, modules)],
            [*map(id, flat(map(_parts, modules)))], [*map(id, flat(map(dict.values, self._part_dicts)))],
            [*map(_code, self._kinds)], [*map(_code_of_convolution, self._convolutions)],
            [*map(id, flat(map(_hooks, modules)))], [*map(id, flat(map(_hooks_of_tensor, self._tensors)))],
            [*flat(self._hook_dicts)], [*map(_requires_grad, self._tensors)], [*map(Tensor.data_ptr, tensors)],
            [*map(id, groups)], [*map(id, flat(map(_params, groups)))], self._variants,
            _has_any_global_hook(),  # type: ignore[no-untyped-call]
        ), [*flat(map(dict.values, named)), *flat(self._sequences)]  # fmt: skip
