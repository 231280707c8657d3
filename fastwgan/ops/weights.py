"""Bounds on weights, in place."""

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from math import nan

import torch
from torch import Tensor

from fastwgan import checks, reference
from fastwgan.backend import Backend, kernels, resolve, wide
from fastwgan.metrics import Lazy
from fastwgan.ops.layout import is_dense, lies_in_rows, write_back

Share = tuple[Lazy, int]  # the share of some weights, or rows of them, that lie on their bound; of how many

FEW = 2**14  # elements: a call on fewer takes longer than they do


def read(x: Lazy) -> Tensor:
    """Return a lazy tensor's value."""
    return x() if callable(x) else x


def combine_shares(shares: Sequence[Share]) -> Share | None:
    """Return the shares of several sets of weights as the share of them all; None of none."""
    if len(shares) <= 1:
        return shares[0] if shares else None
    total = sum(n for _, n in shares)

    def combined() -> Tensor:
        parts = [read(share).double() * (n / total) for share, n in shares]
        return sum((part.to(parts[0].device) for part in parts[1:]), parts[0])

    return (cache(combined) if any(callable(share) for share, _ in shares) else combined()), total


def saturation(params: list[Tensor], bound: float) -> tuple[Tensor, int]:
    """Return what :func:`fastwgan.reference.saturation` does, of weights of one dtype, in fewer and shorter calls."""
    limit = checks.bound("bound", bound, params[0].dtype)
    arrays = [p.detach().to(wide(p.dtype)).reshape(-1) for p in params]
    total = sum(map(len, arrays))
    if small := [x for x in arrays if len(x) < FEW]:
        arrays = [*(x for x in arrays if len(x) >= FEW), torch.cat(small)]
    on_bound = [x.abs().ge_(limit).sum() for x in arrays]  # in place of booleans, whose sum takes longer
    return torch.stack(on_bound).sum() / total, total


def _by_kind(parameters: Iterable[Tensor], bound: float, backend: Backend) -> list[tuple[list[Tensor], float, str]]:
    """Return the parameters of each device and dtype, the bound as it holds it, and what runs there; or raise."""
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters: expected tensors, got {type(parameters).__name__}")
    unique = {id(p): p for p in ([parameters] if isinstance(parameters, Tensor) else parameters)}
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for i, p in enumerate(unique.values()):
        checks.parameter(f"parameters[{i}]", p)
        if p.numel():
            kinds.setdefault((p.device, p.dtype), []).append(p)
    checks.number("bound", bound, minimum=0, exclusive=True)
    return [(own, checks.bound("bound", bound, dtype), resolve(backend, at)) for (at, dtype), own in kinds.items()]


@lru_cache(64)
def _clipper(device: torch.device, dtype: torch.dtype, stream: int, bound: float) -> "kernels.update.Update":
    """Return the launcher of one bound, as a CUDA graph reads it from there. A schedule of bounds drops the oldest."""
    return kernels.update.Update(device, dtype)


_captured: set["kernels.update.Update"] = set()  # launchers that a CUDA graph reads from, for as long as it lives


@cache
def _projector(device: torch.device, dtype: torch.dtype, stream: int) -> "kernels.project.Project":
    return kernels.project.Project(device, dtype)


def project_and_count_(
    parameters: Iterable[Tensor], bound: float, per: str, backend: Backend, gate: Tensor | None = None
) -> Share | None:
    """Do what :func:`clip_norms_` does, with a ``per`` of "weight" :func:`clip_weights_`. For the trainer.

    Return the share of rows, or weights, on their bound, None of none: of those whose norm was the bound or more.
    ``gate`` is [2] float64, or None: 1 to leave the weights alone, else 0; the share is NaN then.
    """
    shares = []
    for params, limit, runs in _by_kind(parameters, bound, backend):
        rows = [p.numel() if per == "weight" else len(p) if per == "row" and p.dim() else 1 for p in params]
        if runs == "triton":
            device, dtype = params[0].device, params[0].dtype
            stream = kernels.arrival.stream_of(device)
            fits = lies_in_rows if per == "row" else is_dense
            works = [p if fits(p) else p.detach().contiguous() for p in params]
            if per == "weight":
                clipper = _clipper(device, dtype, stream, limit)
                if kernels.arrival.capturing(device):
                    _captured.add(clipper)
                share = clipper.clamp(works, limit, gate)
            else:  # a norm is wide, so its bound is not rounded
                sizes = [p.numel() // n for p, n in zip(params, rows, strict=True)]
                share = _projector(device, dtype, stream).launch(works, sizes, float(bound), gate)
            write_back(params, works)
        elif gate is not None and gate[0]:  # on a GPU this waits, as PyTorch's optimizers do
            share = gate.new_tensor(nan, dtype=torch.float32)
        elif per == "weight":
            reference.clip_weights_(params, bound)
            share, _ = saturation(params, bound)
        else:
            share, _ = reference.norm_saturation(params, bound, per)
            reference.clip_norms_(params, bound, per)
        shares.append((share, sum(rows)))
    return combine_shares(shares)


def clip_weights_(parameters: Iterable[Tensor], bound: float, *, backend: Backend = "auto") -> None:
    """Clamp every weight to [-bound, bound] in place, in one launch per device and dtype. NaN stays NaN.

    ``parameters`` are tensors of any shapes and floating dtypes, in any layout but expanded; ``bound`` is c > 0;
    ``backend``: see :mod:`fastwgan.backend`. Source: WGAN, arXiv 1701.07875, Algorithm 1, line 7.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range. Nothing is changed then.

    >>> w = torch.tensor([-3.0, 0.005, 2.0])
    >>> clip_weights_([w], 0.01)
    >>> w
    tensor([-0.0100,  0.0050,  0.0100])
    """
    project_and_count_(parameters, bound, "weight", backend)


def clip_norms_(parameters: Iterable[Tensor], bound: float, *, per: str = "row", backend: Backend = "auto") -> None:
    """Scale rows whose L2 norm exceeds the bound down to it, w = w * min(1, bound / ||w||), in place.

    One launch per device and dtype. A row within the bound is left bit for bit, and so is one with NaN or an infinity.
    ``per`` says what has a norm: "row", each slice along the first dimension, so the weights of one output of a linear
    or convolutional layer, and each element of a vector, as ``torch.renorm(w, 2, 0, bound)`` has it; or "tensor", each
    tensor as a whole. The others are :func:`clip_weights_`'s. Source: Hinton et al., arXiv 1207.0580.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range. Nothing is changed then.

    >>> w = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    >>> clip_norms_([w], 1.0)
    >>> w
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    project_and_count_(parameters, bound, checks.per(per), backend)
