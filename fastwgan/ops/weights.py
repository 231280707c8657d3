"""Bounds on weights, in place."""

import math
from collections.abc import Callable, Iterable
from functools import cache

import torch
from torch import Tensor

from fastwgan import checks, reference
from fastwgan.backend import Backend, kernels, resolve
from fastwgan.ops.layout import is_dense, lies_in_rows


@cache
def _clipper(device: torch.device, dtype: torch.dtype, stream: int, bound: float) -> "kernels.update.Update":
    # To each bound one of its own, as a graph keeps the bound that it was captured with.
    return kernels.update.Update(device, dtype)


def _constrain_(
    parameters: Iterable[Tensor],
    bound: float,
    backend: Backend,
    gate: Tensor | None,
    *,
    plain: Callable[[list[Tensor]], Tensor],
    launch: Callable[[list[Tensor], float], Tensor],
    bounded: Callable[[Tensor], int],
    fits: Callable[[Tensor], bool],
) -> tuple[Tensor, int] | None:
    """Keep parameters within a bound, in place: (the share of what lies on its bound, of how many), or None of none.

    ``plain`` and ``launch`` do it to tensors of one device and dtype, and give the share; ``launch`` gets the bound as
    the dtype holds it. ``bounded`` says how many things in a tensor have a bound, ``fits`` whether a kernel can work on
    it as it lies. ``gate`` is [2] float32, or None: 1 to leave the weights alone, else 0; the share is NaN then.
    """
    unique = {id(p): p for p in parameters}
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for i, p in enumerate(unique.values()):
        checks.parameter(f"parameters[{i}]", p)
        if p.numel():
            groups.setdefault((p.device, p.dtype), []).append(p)
    checks.number("bound", bound, minimum=0, exclusive=True)
    limits = [checks.bound("bound", bound, dtype) for _, dtype in groups]
    backends = [resolve(backend, device) for device, _ in groups]
    shares = []
    for params, limit, name in zip(groups.values(), limits, backends, strict=True):
        total = sum(map(bounded, params))
        if name == "torch":
            if gate is not None and gate[0]:  # on a GPU this waits, as PyTorch's optimizers do
                shares.append((gate.new_tensor(math.nan), total))
            else:
                shares.append((plain(params), total))
            continue
        dense = [p.detach() if fits(p) else p.detach().contiguous() for p in params]
        share = launch(dense, limit)
        torch.autograd.graph.increment_version(params)
        for p, work in zip(params, dense, strict=True):
            if work.data_ptr() != p.data_ptr():
                p.detach().copy_(work)
        shares.append((share, total))
    return combine_shares(shares)


def clip_and_count_(
    parameters: Iterable[Tensor], bound: float, backend: Backend, gate: Tensor | None = None
) -> tuple[Tensor, int] | None:
    """:func:`clip_weights_` that also tells (the share of weights on their bound, of how many). For the trainer.

    ``gate`` is [2] float32, or None: 1 to leave the weights alone, else 0; the share is NaN then.
    """

    def plain(params: list[Tensor]) -> Tensor:
        reference.clip_weights_(params, bound)
        on_bound, total = reference.saturation(params, bound)
        return on_bound / total

    def launch(params: list[Tensor], limit: float) -> Tensor:
        device, dtype = params[0].device, params[0].dtype
        launcher = _clipper(device, dtype, kernels.arrival.stream_of(device), limit)
        return launcher.clamp(params, limit, gate)

    return _constrain_(
        parameters, bound, backend, gate, plain=plain, launch=launch, bounded=Tensor.numel, fits=is_dense
    )


@cache
def _projector(device: torch.device, dtype: torch.dtype, stream: int) -> "kernels.project.Project":
    return kernels.project.Project(device, dtype)


def project_and_count_(
    parameters: Iterable[Tensor], bound: float, per: str, backend: Backend, gate: Tensor | None = None
) -> tuple[Tensor, int] | None:
    """:func:`clip_norms_` that also tells (the share of rows on their bound, of how many). For the trainer.

    On it are those whose norm was the bound or more before. ``gate`` is [2] float32, or None: 1 to leave the weights
    alone, else 0; the share is NaN then.
    """
    checks.per(per)

    def rows(p: Tensor) -> int:
        return len(p) if per == "row" and p.dim() else 1

    def plain(params: list[Tensor]) -> Tensor:
        on_bound, total = reference.norm_saturation(params, bound, per)
        reference.clip_norms_(params, bound, per)
        return on_bound / total

    def launch(params: list[Tensor], _: float) -> Tensor:  # a norm is wide, so its bound is not rounded
        device, dtype = params[0].device, params[0].dtype
        launcher = _projector(device, dtype, kernels.arrival.stream_of(device))
        return launcher.launch(params, [p.numel() // rows(p) for p in params], float(bound), gate)

    fits = lies_in_rows if per == "row" else is_dense
    return _constrain_(parameters, bound, backend, gate, plain=plain, launch=launch, bounded=rows, fits=fits)


def combine_shares(shares: list[tuple[Tensor, int]]) -> tuple[Tensor, int] | None:
    """Shares of several sets of weights as the share of them all; None of none."""
    if len(shares) <= 1:
        return shares[0] if shares else None
    total = sum(n for _, n in shares)
    parts = [share.double() * (n / total) for share, n in shares]
    return sum((part.to(parts[0].device) for part in parts[1:]), parts[0]), total


def clip_weights_(parameters: Iterable[Tensor], bound: float, *, backend: Backend = "auto") -> None:
    """Clamp every weight to [-bound, bound] in place, in one launch per device and dtype. NaN stays NaN.

    Args:
        parameters: tensors of any shapes and floating dtypes; any layout but expanded.
        bound: c > 0.
        backend: see :mod:`fastwgan.backend`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range. Nothing is changed then.

    Source: WGAN, arXiv 1701.07875, Algorithm 1, line 7.

    >>> w = torch.tensor([-3.0, 0.005, 2.0])
    >>> clip_weights_([w], 0.01)
    >>> w
    tensor([-0.0100,  0.0050,  0.0100])
    """
    clip_and_count_(_listed(parameters), bound, backend)


def clip_norms_(parameters: Iterable[Tensor], bound: float, *, per: str = "row", backend: Backend = "auto") -> None:
    """Scale rows whose L2 norm exceeds the bound down to it, w = w * min(1, bound / ||w||), in place.

    One launch per device and dtype. A row within the bound is left bit for bit, and so is one with NaN or an infinity.

    Args:
        parameters: tensors of any shapes and floating dtypes; any layout but expanded.
        bound: c > 0.
        per: what has a norm: "row", each slice along the first dimension, so the weights of one output of a linear or
            convolutional layer, and each element of a vector, as ``torch.renorm(w, 2, 0, bound)`` has it; or "tensor",
            each tensor as a whole.
        backend: see :mod:`fastwgan.backend`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range. Nothing is changed then.

    Source: Hinton et al., arXiv 1207.0580.

    >>> w = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    >>> clip_norms_([w], 1.0)
    >>> w
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    project_and_count_(_listed(parameters), bound, per, backend)


def _listed(parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    """Tensors, also where it is one."""
    if isinstance(parameters, Tensor):
        return [parameters]
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters: expected tensors, got {type(parameters).__name__}")
    return parameters
