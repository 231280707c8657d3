"""Triton's interpreter made as unforgiving as a GPU, and more: whatever hardware leaves undefined goes wrong here.

- A lane that a mask turns off reads a number no test uses, where the interpreter has zero.
- An access outside the tensors that a launch was given raises; so do two stores to one address, a race of programs.
- float32 rounds to bfloat16, and bfloat16's denormal numbers are kept, as on hardware.
- ``tl.maximum`` and ``tl.minimum`` lose NaN unless told to keep it, where the interpreter always keeps it.

``program_order`` runs programs in another order. ``last_program`` runs one program of a launch that is too large for
memory, and tells which addresses it asked for.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from fastwgan.kernels import guard, project, update

POISON = 97
REGION = 52  # a stand-in for argument i lies at (i + 1) << REGION, where no memory is

Executor: Any = interpreter.GridExecutor  # what ``kernel[grid]`` gives
_Builder, _Executor, Handle = interpreter.InterpreterBuilder, interpreter.GridExecutor, interpreter.TensorHandle
_load, _store, _atomic = _Builder.create_masked_load, _Builder.create_masked_store, _Builder.create_atomic_rmw
_set_grid_dim, _set_grid_idx = _Builder.set_grid_dim, _Builder.set_grid_idx
_run, _init_args, _restore_args = _Executor.__call__, _Executor._init_args_hst, _Executor._restore_args_dev
_launch_update, _launch_guard = update.Update.launch, guard.Guard.launch
_launch_project = project.Project.launch
_convert_float, _patch_lang_tensor = interpreter._convert_float, interpreter._patch_lang_tensor


class _Launch:
    """What one launch may touch, and what its programs have stored."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        spans = sorted({(0, 0), *((x.data_ptr(), x.data_ptr() + _extent(x)) for x in tensors if x.numel())})
        self.first, self.end = np.array(spans, dtype=np.int64).reshape(-1, 2).T
        self.stored: list[np.ndarray] = []

    def outside(self, addresses: np.ndarray, size: int) -> np.ndarray:
        owner = np.searchsorted(self.first, addresses, side="right") - 1
        return addresses + size > self.end[owner]


class _State:
    launch: _Launch | None = None
    by_address: tuple[torch.Tensor, ...] = ()  # tensors that a launch knows by address alone
    order: Callable[[int, int], int] | None = None
    asked: dict[str, list[np.ndarray]] | None = None  # in last_program: accesses outside real tensors
    programs = 0


_state = _State()


def _extent(x: torch.Tensor) -> int:
    """Bytes from x's first element to the end of its last."""
    return (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def _allowed(kind: str, pointers: Any, mask: np.ndarray) -> np.ndarray:
    """``mask`` where the access may be made; raises where it may not, or takes note in last_program."""
    assert _state.launch is not None
    mask = np.broadcast_to(mask, pointers.data.shape)
    addresses = pointers.data[mask].astype(np.int64)
    outside = _state.launch.outside(addresses, max(1, pointers.get_element_ty().primitive_bitwidth // 8))
    if outside.any() and _state.asked is None:
        raise IndexError(f"{kind}: {outside.sum()} of {outside.size} lanes outside the tensors of the launch")
    if _state.asked is not None:
        _state.asked[kind].append(addresses[outside])
        mask = mask.copy()
        mask[mask] = ~outside
    if kind == "store":
        _state.launch.stored.append(addresses)
    return mask


def _masked_load(self: Any, pointers: Any, mask: Any, other: Any, *modifiers: Any) -> Any:
    if other is None:
        dtype = pointers.get_element_ty()
        poison = np.float32([POISON]).view(np.uint16)[1] if dtype == tl.bfloat16 else POISON
        other = Handle(np.full_like(pointers.data, poison, dtype=interpreter._get_np_dtype(dtype)), dtype)
    return _load(self, pointers, Handle(_allowed("load", pointers, mask.data), tl.int1), other, *modifiers)


def _masked_store(self: Any, pointers: Any, value: Any, mask: Any, *modifiers: Any) -> Any:
    return _store(self, pointers, value, Handle(_allowed("store", pointers, mask.data), tl.int1), *modifiers)


def _atomic_rmw(self: Any, operation: Any, pointer: Any, value: Any, mask: Any, *modifiers: Any) -> Any:
    allowed = _allowed("atomic", pointer, mask.data)
    if _state.asked is not None:  # also on real counters, which one program alone would leave in disorder
        return Handle(np.zeros_like(value.data), value.dtype)
    assert allowed.all()
    return _atomic(self, operation, pointer, value, mask, *modifiers)


def _convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if (source, target) == (tl.bfloat16, tl.float32):
        return np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert_float(data, source, target, rounding)
    bits = np.ascontiguousarray(data).view(np.uint32)
    nearest_even = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(data), (bits >> 16) | 0x40, nearest_even).astype(np.uint16).reshape(data.shape)


def _grid_dim(self: Any, x: int, y: int, z: int) -> None:
    _set_grid_dim(self, x if _state.asked is None else _state.programs, y, z)


def _grid_idx(self: Any, x: int, y: int, z: int) -> None:
    if _state.asked is not None:
        x = _state.programs - 1
    _set_grid_idx(self, x if _state.order is None else _state.order(x, self.grid_dim[0]), y, z)


class _StandIn:
    """A tensor that is too large for memory, for the interpreter's eyes."""

    def __init__(self, dtype: torch.dtype, address: int) -> None:
        self.dtype, self.data_ptr = dtype, lambda: address


def _args(self: Any, args: Any, kwargs: Any) -> Any:
    if _state.asked is None:
        return _init_args(self, args, kwargs)
    return [
        _StandIn(x.dtype, (i + 1) << REGION) if isinstance(x, torch.Tensor) and x.is_meta else x
        for i, x in enumerate(args)
    ], kwargs


def _restore(self: Any, *args: Any) -> None:
    if _state.asked is None:
        _restore_args(self, *args)


def _call(self: Any, *args: Any, **kwargs: Any) -> None:
    outer = _state.launch
    real = [x for x in args if isinstance(x, torch.Tensor) and not x.is_meta]
    _state.launch = _Launch([*real, *_state.by_address])
    if _state.asked is not None:
        _state.programs, self.grid = self.grid[0], (1,)
    try:
        with np.errstate(all="ignore"):  # hardware does not warn
            _run(self, *args, **kwargs)
        stored = np.concatenate([*_state.launch.stored, np.empty(0, np.int64)])
        if len(np.unique(stored)) != len(stored):
            raise IndexError("store: two stores to one address")
    finally:
        _state.launch = outer


def _update(
    self: Any, algorithm: str, params: Any, grads: Any, states: Any, steps: Any, *args: Any, **kwargs: Any
) -> Any:
    averages = kwargs.get("averages")
    tensors = (*params, *(grads or ()), *(x for state in states for x in state), *(steps or ()), *(averages or ()))
    with _reached_by_address(tensors):
        return _launch_update(self, algorithm, params, grads, states, steps, *args, **kwargs)


def _guard(self: Any, gradients: Any, *args: Any) -> Any:
    with _reached_by_address(gradients):
        return _launch_guard(self, gradients, *args)


def _project(self: Any, params: Any, *args: Any) -> Any:
    with _reached_by_address(params):
        return _launch_project(self, params, *args)


@contextmanager
def _reached_by_address(tensors: Iterable[Any]) -> Iterator[None]:
    """A launch reaches these, which are none of its arguments."""
    _state.by_address = tuple(x for x in tensors if x is not None and x.data_ptr() >> REGION == 0)
    try:
        yield
    finally:
        _state.by_address = ()


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def install() -> None:
    """Put all this in the interpreter's place, for the process."""
    if triton.__version__.startswith("3.6."):  # its loop bounds are arrays of one element, not numbers to NumPy
        interpreter._patch_lang_tensor = _patch_tensor
    _Builder.create_masked_load, _Builder.create_masked_store = _masked_load, _masked_store
    _Builder.create_atomic_rmw, interpreter._convert_float = _atomic_rmw, _convert
    _Builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    _Builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)
    _Builder.set_grid_dim, _Builder.set_grid_idx = _grid_dim, _grid_idx
    _Executor.__call__, _Executor._init_args_hst, _Executor._restore_args_dev = _call, _args, _restore
    update.Update.launch, guard.Guard.launch, project.Project.launch = _update, _guard, _project


@contextmanager
def program_order(order: Callable[[int, int], int]) -> Iterator[None]:
    """Where program i of n stands, run program ``order(i, n)``."""
    _state.order = order
    try:
        yield
    finally:
        _state.order = None


@contextmanager
def last_program() -> Iterator[dict[str, list[np.ndarray]]]:
    """Run the last program of each launch alone. Memory that is not there reads as poison and swallows what is stored.

    Yields the addresses by "load", "store" and "atomic"; argument i of a launch, a meta tensor, lies at
    (i + 1) << REGION. No program finds itself to be the last to arrive.
    """
    _state.asked = {"load": [], "store": [], "atomic": []}
    try:
        yield _state.asked
    finally:
        _state.asked = None
