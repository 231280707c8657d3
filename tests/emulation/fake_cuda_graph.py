"""What a CUDA graph does, on a CPU: the same kernels on the same memory, and all that can go wrong.

CPU memory plays the device's. The host's is what ``torch.tensor`` makes, what is made with ``device="cpu"`` in so many
words, and what comes of these alone: it may be read during a capture, and a recording keeps its numbers as they were.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import poisoned_interpreter
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from fastwgan.kernels import arrival, table

T = TypeVar("T")

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.__repr__, Tensor.__format__}


def _key(x: Tensor) -> int:
    """Tells the memory of x from any other that is alive."""
    return x.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _poison(x: Tensor) -> None:
    fraction = x.is_floating_point() or x.is_complex()
    x.fill_(math.nan if fraction else x.dtype == torch.bool or torch.iinfo(x.dtype).max)


def _waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an op's result, or its size, has to be known on the host."""
    if func.overloadpacket.__name__ in ("index", "index_put", "index_put_"):
        mask = any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1]))
        return mask and (len(args) < 3 or args[2].numel() > 1)  # one number is filled in, and waits for nothing
    return bool(WAITS & set(func.tags)) and kwargs.get("output_size") is None


def _mode(base: type, method: str, see: Callable[..., Any]) -> Any:
    """A mode of PyTorch's, entered by ``with``, that hands what it sees to a function."""
    return type(
        "_Mode", (base,), {method: lambda self, func, types, args=(), kwargs=None: see(func, args, kwargs or {})}
    )()


class Recording:
    """Stands in for a CUDA graph: Python runs once, in :meth:`capture`; a replay runs kernels on the same memory.

    A capture leaves garbage in the memory that it took, and all else as it was. RuntimeError comes of what a graph
    refuses, and of a replay on memory from outside the capture that nobody else holds any more.

    Args:
        generators: those that the work may draw from, beside PyTorch's default one.
    """

    def __init__(self, generators: Iterable[torch.Generator] = ()) -> None:
        self._generators = [torch.default_generator, *generators]
        self._run: Callable[..., None] | None = None
        self._tape: list[Callable[[], None]] | None = None
        self._made: dict[int, list[Tensor]] = {}  # memory of the capture's own, as a graph's private pool
        self._outside: Counter[int] = Counter()  # other memory, and how often the tape holds it
        self._before: dict[int, tuple[Any, Any]] = {}  # other memory, and what it held
        self._host: dict[int, Tensor] = {}
        self._asked: Any = None  # the device that the current call names

    def capture(self, work: Callable[[], T]) -> T:
        """Call ``work`` once and record what it asks of the device."""
        if self._run is not None:
            raise RuntimeError("capture: expected a new recording")
        self._run, capturing = poisoned_interpreter.Executor.__call__, (arrival.capturing, table.capturing)
        states = [generator.get_state() for generator in self._generators]
        self._tape = []
        arrival.capturing = table.capturing = lambda device: True
        poisoned_interpreter.Executor.__call__ = lambda launch, *args, **kwargs: self._launch(launch, args, kwargs)
        try:
            calls = _mode(TorchFunctionMode, "__torch_function__", self._call)
            with calls, _mode(TorchDispatchMode, "__torch_dispatch__", self._op):
                return work()
        except BaseException:
            self._tape = None
            raise
        finally:
            poisoned_interpreter.Executor.__call__ = self._run
            arrival.capturing, table.capturing = capturing
            with _disable_current_modes(), torch.no_grad():
                for memory, content in self._before.values():
                    memory.copy_(content)
                for x in _tensors(list(self._made.values())):
                    _poison(x)
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
            self._before, self._host = {}, {}

    def replay(self) -> None:
        """Run what was recorded, in order."""
        if self._tape is None:
            raise RuntimeError("replay: expected a recording with a capture")
        own, holders = torch.empty(1, device="cpu"), torch._C._storage_Use_Count
        extra = holders(_key(own)) - 1  # Python may count as a holder of any memory
        if any(holders(key) - extra <= count for key, count in self._outside.items()):
            raise RuntimeError("replay: it would touch memory that has been freed")
        with _disable_current_modes(), torch.no_grad():
            for step in self._tape:
                step()

    def _on_host(self, *tensors: Tensor) -> bool:
        return all(_key(x) in self._host for x in tensors)

    def _hold(self, x: Tensor) -> Tensor:
        """The memory of x as it is now, whatever becomes of the tensor."""
        if self._on_host(x):
            return x.data.clone()
        if _key(x) not in self._made and _key(x) not in self._before:
            self._before[_key(x)] = x.untyped_storage(), x.untyped_storage().clone()
        return x.data

    def _record(self, step: Callable[[], None], held: Any) -> None:
        self._tape.append(step)
        self._outside.update(_key(x) for x in _tensors(held) if _key(x) in self._before)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call of PyTorch's interface. Not every one is an op, and an op does not know what words it was given."""
        words = [x for x in (*args, *kwargs.values()) if isinstance(x, str)]
        if (func in READS or (func is Tensor.to and "cpu" in words)) and not self._on_host(args[0]):
            raise RuntimeError(f"{func.__name__}: a capture cannot read the device")
        self._asked = kwargs.get("device")
        try:
            return func(*args, **kwargs)
        finally:
            self._asked = None

    def _op(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An op, of a call or of the autograd engine."""
        name, tensors = func.overloadpacket.__name__, _tensors((args, kwargs))
        to_device = kwargs.get("device") is not None or isinstance(self._asked, torch.device)
        if self._asked == "cpu" or ((name == "lift_fresh" or (tensors and self._on_host(*tensors))) and not to_device):
            result = func(*args, **kwargs)
            self._host.update((_key(x), x) for x in _tensors(result))
            return result

        if _waits(func, args, kwargs):
            raise RuntimeError(f"{name}: a capture cannot read the device")
        copies = name == "lift_fresh" or any(x.dim() and self._on_host(x) for x in tensors)
        if copies and name not in ALLOCATIONS:
            raise RuntimeError(f"{name}: a capture cannot copy the host's memory, which may be gone at a replay")
        registered = {generator._cdata for generator in self._generators}
        if any(isinstance(x, torch.Generator) and x._cdata not in registered for x in tree_leaves((args, kwargs))):
            raise RuntimeError(f"{name}: a capture cannot draw from a generator that is not registered")

        with _disable_current_modes():
            held = tree_map_only(Tensor, self._hold, (args, kwargs))
        result = func(*args, **kwargs)
        given = {_key(x) for x in tensors}
        made = [(i, x.data) for i, x in enumerate(_tensors(result)) if _key(x) not in given]
        for _, x in made:
            self._made.setdefault(_key(x), []).append(x)

        def step() -> None:
            results = _tensors(func(*held[0], **held[1]))
            for i, x in made:
                x.untyped_storage().copy_(results[i].untyped_storage())

        def allocated() -> None:  # stricter than a device, where memory keeps what the last replay left in it
            for _, x in made:
                _poison(x)

        if name in ALLOCATIONS:
            self._record(allocated, ())
        elif made or (tensors and func._schema.is_mutable):  # all others are views
            self._record(step, held)
        return result

    def _launch(self, launch: Any, args: Any, kwargs: Any) -> None:
        with _disable_current_modes():
            held = args, kwargs, by_address = tree_map_only(
                Tensor, self._hold, (args, kwargs, poisoned_interpreter._state.by_address)
            )

        def step() -> None:
            poisoned_interpreter._state.by_address = by_address
            try:
                self._run(launch, *args, **kwargs)
            finally:
                poisoned_interpreter._state.by_address = ()

        self._record(step, held)
