"""Counting what a step asks of the device: dispatcher calls that reach a kernel, our own launches, and memory."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import poisoned_interpreter
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fastwgan.kernels import table

# Views, allocations and bookkeeping: dispatched, but nothing runs on the device for them.
HOST_ONLY = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
    "detach", "alias", "as_strided", "split", "narrow", "unbind", "empty", "empty_like", "new_empty", "empty_strided",
    "new_empty_strided", "set_",
    "lift_fresh", "_local_scalar_dense", "is_pinned", "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip

# Of one critic step, generator excluded, by workload: (textbook's, ours).
BUDGETS = {"mlp-clip": (85, 16), "mlp-penalty": (146, 24), "dcgan-clip": (149, 67), "dcgan-penalty": (168, 37)}


class _Dispatches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in HOST_ONLY:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def count_kernels() -> Iterator[Counter[str]]:
    """Counts by name: PyTorch ops that reach a device kernel, and Triton launches under their kernels' names."""
    mode = _Dispatches()
    executor = poisoned_interpreter.Executor
    run, upload = executor.__call__, table.upload

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        mode.counts[self.fn.__name__] += 1
        with _disable_current_modes():  # the interpreter's own tensor work is not the step's
            run(self, *args, **kwargs)

    def uncounted_upload(*args: Any, **how: Any) -> bool:
        with _disable_current_modes():  # a copy engine's work, and none once addresses repeat: see test_kernels.py
            return upload(*args, **how)

    executor.__call__, table.upload = counted, uncounted_upload
    try:
        with mode:
            yield mode.counts
    finally:
        executor.__call__, table.upload = run, upload


class Live(TorchDispatchMode):
    """Within it, bytes in tensors that have been made since and are alive: ``now``, and at the ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage not in self._seen:
            self._seen.add(storage)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.now -= size


def ours(counts: Counter[str]) -> dict[str, int]:
    """The counted Triton launches, by kernel name."""
    return {name: n for name, n in counts.items() if name.endswith("_kernel")}
