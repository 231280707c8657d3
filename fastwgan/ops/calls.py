"""Calls of a module with other parameters and buffers, as torch.func and torch.compile need them."""

from typing import Any

import torch
from torch import Tensor, nn

Empty = list[tuple[str, nn.Module, str]]


def empty_buffers(module: nn.Module) -> Empty:
    """Return a module's buffers that are None: (name in it, the module that has it, name there)."""
    return [
        (f"{path}.{name}" if path else name, m, name)
        for path, m in module.named_modules()
        for name, x in m._buffers.items()
        if x is None
    ]


def call_module(
    module: nn.Module, trained: dict[str, Tensor], rest: dict[str, Tensor], args: tuple[Any, ...], empty: Empty
) -> Tensor:
    """Return ``module(*args)`` with these tensors. Those it rebinds are rebound in ``rest``; ``empty`` stay None."""
    state = {**trained, **rest}
    output: Tensor = torch.func.functional_call(module, state, args)
    for name in rest:
        rest[name] = state[name]
    for name, m, own_name in empty:
        if (x := m._buffers[own_name]) is not None and name not in state:
            rest[name] = x
            m._buffers[own_name] = None
    return output


def changed_tensors(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors of ``after`` that are others than in ``before``."""
    return {name: x.detach() for name, x in after.items() if x is not before.get(name)}


def rebind_buffers(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a module other tensors for its buffers of these names."""
    for name, x in tensors.items():
        owner, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(owner), own_name, x)
