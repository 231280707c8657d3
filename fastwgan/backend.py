"""Which implementation runs an op: Triton kernels or the plain-PyTorch reference."""

from typing import Literal, get_args

import torch

__all__ = ["DTYPES", "Backend", "Resolved", "check_backend", "kernels", "resolve", "triton_problem", "wide"]

_import_problem: str | None = None
try:
    from fastwgan import kernels
except ImportError as error:
    if error.name is None or error.name.split(".")[0] != "triton":
        raise
    kernels, _import_problem = None, str(error)  # type: ignore[assignment]

Backend = Literal["auto", "triton", "torch"]
Resolved = Literal["triton", "torch"]
BACKENDS = get_args(Backend)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# MKL looks for a function's code on its first call. If several threads make that call together, one of them may run
# code that is 1000 ulp off (pytorch/pytorch#188792). So one thread calls each, for one seed to have one outcome.
for _function in (
    torch.acos, torch.asin, torch.atan, torch.cos, torch.cosh, torch.erf, torch.erfc, torch.erfinv, torch.exp,
    torch.expm1, torch.log, torch.log10, torch.log1p, torch.log2, torch.sin, torch.sinh, torch.sqrt, torch.tan,
    torch.tanh, torch.trunc,
):  # fmt: skip
    for _dtype in (torch.float32, torch.float64):
        _function(torch.zeros(1, dtype=_dtype, device="cpu"))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that arithmetic on a floating ``dtype`` runs in: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_backend(backend: object) -> Backend:
    """Return ``backend`` if it is one of the three words, or raise."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected 'auto', 'triton' or 'torch', got {backend!r}")
    return backend  # type: ignore[return-value]


def triton_problem(device: torch.device) -> str | None:
    """Return why Triton cannot run on ``device``, or None if it can."""
    if torch.compiler.is_compiling():
        return "inside torch.compile the ops are plain PyTorch, for the compiler to fuse"
    if _import_problem is not None:
        return f"Triton cannot be imported ({_import_problem})"
    if kernels.INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs kernels on CPU tensors only"
    needs = f"Triton needs a GPU tensor, or TRITON_INTERPRET=1 for a CPU one; the device is {device}"
    return None if device.type == "cuda" else needs


def resolve(backend: str, device: torch.device) -> Resolved:
    """Return the implementation that ``backend`` asks for on ``device``.

    ``auto`` takes Triton wherever it can run; only ``auto`` falls back.

    Raises:
        ValueError: ``backend`` is not one of the three words.
        RuntimeError: ``backend="triton"`` cannot be met; the message says why.
    """
    if backend == "torch":
        return "torch"
    problem = triton_problem(device)
    if problem is None and backend in BACKENDS:
        return "triton"
    if backend == "auto":
        return "torch"
    check_backend(backend)
    raise RuntimeError(f"backend: 'triton' was asked for, but {problem}")
