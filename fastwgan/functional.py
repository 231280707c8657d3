"""The public ops: each checks its arguments, picks a backend, launches once and differentiates.

Every op takes ``backend="auto" | "triton" | "torch"`` (see :mod:`fastwgan.backend`); the torch backend is
:mod:`fastwgan.reference`. First derivatives come out of the launch or cost one elementwise op; asked for a graph
(``create_graph=True``), a backward pass is made of differentiable PyTorch ops, so derivatives of any order are right.
They compose with ``torch.func`` (``grad``, ``vjp``, ``jacrev``, ``vmap``), except that the Triton backend has no
forward mode: PyTorch raises NotImplementedError then. Inside ``torch.compile``, with ``fullgraph=True`` too, they are
their plain PyTorch form, which the compiler fuses with what stands round them. Under autocast, where a network gives
another dtype than it gets, two samples or scores of different dtypes are promoted as PyTorch's own ops promote them.
"""

from fastwgan.ops.penalty import gradient_penalty, penalty
from fastwgan.ops.samples import interpolate, perturb
from fastwgan.ops.scores import critic_loss, generator_loss, hinge_critic_loss, wasserstein_loss
from fastwgan.ops.weights import clip_norms_, clip_weights_

__all__ = [
    "clip_norms_", "clip_weights_", "critic_loss", "generator_loss", "gradient_penalty", "hinge_critic_loss",
    "interpolate", "penalty", "perturb", "wasserstein_loss",
]  # fmt: skip
