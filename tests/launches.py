"""Counting what a step asks of the device: dispatcher calls that reach a kernel, and our own launches."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from fastwgan.kernels import table
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

# Views, allocations and bookkeeping: dispatched, but nothing runs on the device for them.
HOST_ONLY = {
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
    "detach", "alias", "as_strided", "split", "narrow", "unbind", "empty", "empty_like", "new_empty", "empty_strided",
    "new_empty_strided", "set_",
    "lift_fresh", "_local_scalar_dense", "is_pinned", "_record_function_enter_new", "_record_function_exit",
}  # fmt: skip


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
    executor = triton.runtime.interpreter.GridExecutor
    run, upload = executor.__call__, table.upload

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        mode.counts[self.fn.__name__] += 1
        with _disable_current_modes():  # the interpreter's own tensor work is not the step's
            run(self, *args, **kwargs)

    def uncounted_upload(*args: Any) -> bool:
        with _disable_current_modes():  # a copy engine's work, and none once addresses repeat: see test_kernels.py
            return upload(*args)

    executor.__call__, table.upload = counted, uncounted_upload
    try:
        with mode:
            yield mode.counts
    finally:
        executor.__call__, table.upload = run, upload


def ours(counts: Counter[str]) -> dict[str, int]:
    """The counted Triton launches, by kernel name."""
    return {name: n for name, n in counts.items() if name.endswith("_kernel")}
