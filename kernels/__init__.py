"""FastWGAN's Triton kernels, imported as ``fastwgan.kernels``.

Each module holds device functions and, below them, one launcher per kernel that allocates the outputs,
chooses the grid and launches once. Nothing here checks arguments or knows autograd; that is
:mod:`fastwgan.functional`'s part. Importing this package needs Triton.
"""

from typing import Any

import triton

from . import arrival, guard, interpolate, objective, penalty, perturb, project, scores, table, update

# Triton decides at definition time whether a kernel is compiled or interpreted, so this holds for the process.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

if INTERPRETED and triton.__version__.startswith("3.6."):
    # Loop bounds are arrays of one element there, which NumPy has ceased to take for numbers; 3.7 takes the element.
    from triton.runtime import interpreter

    _patch_lang_tensor = interpreter._patch_lang_tensor

    def _with_index(tensor: Any, scope: Any) -> None:
        _patch_lang_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _with_index

__all__ = [
    "INTERPRETED", "arrival", "guard", "interpolate", "objective", "penalty", "perturb", "project", "scores", "table",
    "update",
]  # fmt: skip
