"""Compile every kernel for GPUs that are not here, from the launchers' own arguments; print one JSON row for each.

Run without TRITON_INTERPRET. A launch is replaced by the compilation of what it would have launched.
"""

import json
import re
import sys
from typing import Any

import torch
import triton
from fastwgan.kernels import interpolate, penalty, scores, update
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
_target = ""
_dtype = torch.float32


def _compile(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    target = TARGETS[_target]
    backend = make_backend(target)
    binder = create_function_from_signature(self.signature, self.params, backend)
    bound, specialization, options = binder(*args, **kwargs, debug=False)
    options, signature, constexprs, attrs = self._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(self, signature, constexprs, attrs)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    numbers = [value for value in args if isinstance(value, int)]
    row = {"kernel": self.__name__, "target": _target, "dtype": str(_dtype), "numbers": numbers}
    if "ptx" in compiled.asm:
        ptx = compiled.asm["ptx"]
        row["wide_loads"] = len(re.findall(r"ld\.global\S*\.v4\.b32", ptx))
        row["wide_stores"] = len(re.findall(r"st\.global\S*\.v4\.b32", ptx))
        row["float64"] = len(re.findall(r"\.f64", ptx))
    print(json.dumps(row))


def _launch_all() -> None:
    x = torch.empty(4096, dtype=_dtype)
    for form in ("critic", "generator", "labels", "hinge"):
        scores.mean_scores(form, x, x)
    for size in (1, 2, 3072, 16384):
        for batch in (1, 64):
            penalty.gradient_penalty(torch.empty(batch, size, dtype=_dtype), "one-sided", 1.0, 10.0, _dtype)
    penalty.gradient_penalty(torch.empty(64, 8, dtype=_dtype), "two-sided", 1.0, 10.0, None)
    small, large = torch.empty(64, 784, dtype=_dtype), torch.empty(2, 3, 256, 256, dtype=_dtype)
    interpolate.interpolate(small, small, 7, 0)
    interpolate.interpolate(large, large, 2**62, torch.zeros(1, dtype=torch.int64))
    for kind in ("two-sided", "one-sided", "zero-centered", "power"):
        penalty.gradient_penalty(small, kind, 1.0, 10.0, _dtype)
    penalty.gradient_penalty(large, "two-sided", 1.0, 10.0, torch.float32)
    tensors = [torch.empty(5000, dtype=_dtype) for _ in range(3)]
    state, steps = [(x, x, x)] * 3, [torch.zeros(())] * 3
    hyper = ((0.5,) * update.HYPER_COLUMNS.value,)
    for algorithm, momentum, centered in (
        ("rmsprop", False, False),
        ("rmsprop", True, True),
        ("adam", False, False),
        ("clamp", False, False),
    ):
        launcher = update.Update(torch.device("cpu"), _dtype)
        launcher.launch(algorithm, tensors, tensors, state, steps, hyper, [0] * 3, momentum=momentum, centered=centered)


if __name__ == "__main__":
    JITFunction.run = _compile
    for _target in TARGETS:
        for _dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            _launch_all()
    sys.exit(0)
