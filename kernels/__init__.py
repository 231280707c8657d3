"""FastWGAN's Triton kernels, imported as ``fastwgan.kernels``.

Each module holds device functions and, below them, one launcher per kernel that allocates the outputs, chooses the grid
and launches once. Nothing here checks arguments or knows autograd: that is fastwgan/ops. Importing it needs Triton.
"""

import triton

from . import activation, arrival, batchnorm, guard, interpolate, penalty, perturb, project, scores, table, update

# Triton decides at definition time whether a kernel is compiled or interpreted, so this holds for the process.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

__all__ = [
    "INTERPRETED", "activation", "arrival", "batchnorm", "guard", "interpolate", "penalty", "perturb", "project",
    "scores", "table", "update",
]  # fmt: skip
