"""A generator's forward pass, with each BatchNorm of [N, C] and the rectifier behind it in one launch."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastwgan import models, reference
from fastwgan.backend import kernels
from fastwgan.engine.structure import hooked_everywhere, is_itself

Call = Callable[[Tensor], Tensor]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, running: tuple[Tensor, ...], *options: Any) -> Tensor:
        y, stats = kernels.batchnorm.batch_norm(x, weight, bias, running, *options)
        ctx.of_batch, *_, ctx.slope = options
        if ctx.of_batch:
            torch.autograd.graph.increment_version(running)
        ctx.save_for_backward(x, weight, bias, y, stats)
        ctx.options = (() if ctx.of_batch else running, *options)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, y, stats = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph is wanted, which the kernel's result lacks
            wanted = [a for a, needed in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if needed]
            again = reference.batch_norm(x, weight, bias, *ctx.options)
            found = iter(torch.autograd.grad(again, wanted, dy, create_graph=True))
            return *[next(found) if needed else None for needed in ctx.needs_input_grad[:3]], *[None] * 5
        dx, sums = kernels.batchnorm.batch_norm_backward(dy.contiguous(), x, y, weight, stats, ctx.of_batch, ctx.slope)
        return dx, *([None] * 2 if weight is None else sums.to(weight.dtype)), *[None] * 5


class _Norm(NamedTuple):
    """A BatchNorm and the rectifier behind it, by its slope below zero: 1 where there is none."""

    module: Any
    slope: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        m, slope = self
        kept = m.running_mean, m.running_var, m.num_batches_tracked
        whole = len({a is None for a in kept}) == 1 and (m.weight is None) == (m.bias is None)
        whole = whole and all(a is None or a.is_contiguous() for a in (*kept, m.weight, m.bias))
        of_batch = m.training or kept[0] is None
        if x.dim() != 2 or not whole or (of_batch and len(x) == 1):
            return F.leaky_relu(m(x), slope)
        running = () if kept[0] is None or (m.training and not m.track_running_stats) else kept
        options = running, of_batch, m.momentum, m.eps, slope
        return _BatchNorm.apply(x.contiguous(), m.weight, m.bias, *options)  # type: ignore[no-any-return, no-untyped-call]


def fused(module: nn.Module) -> Call:
    """Return a function that does what a network does, with its BatchNorm layers fused; or the network, if it has none.

    Layers are merged where they follow each other in a Sequential, and nothing about these is patched or hooked.
    """
    calls = [module] if hooked_everywhere() else _calls(module)
    return module if calls == [module] else partial(_through, calls)


def _through(calls: list[Any], x: Tensor) -> Tensor:
    for call in calls:
        x = call(x)
    return x


def _concatenated(calls: list[Any], x: Tensor) -> Tensor:
    return torch.cat((_through(calls, x), x), dim=1)


def _calls(m: Any) -> list[Any]:
    """Return calls that do what a module does, one after the other."""
    kind = type(m)
    if kind not in (nn.Sequential, nn.BatchNorm1d, models.Concatenated) or not is_itself(m):
        return [m]
    if kind is nn.BatchNorm1d:
        return [_Norm(m)]
    if kind is models.Concatenated:
        return [partial(_concatenated, _calls(m.layers))]
    merged: list[Any] = []
    for call in [call for child in m for call in _calls(child)]:
        rectifies = type(call) in (nn.ReLU, nn.LeakyReLU) and is_itself(call)
        slope = getattr(call, "negative_slope", 0.0) if rectifies else -1.0
        plain = slope > 0 or (type(call) is nn.ReLU and rectifies)  # at NaN, a leaky ReLU of slope 0 is no ReLU
        if plain and merged and isinstance(merged[-1], _Norm) and merged[-1].slope == 1:
            merged[-1] = merged[-1]._replace(slope=slope)
        else:
            merged.append(call)
    return merged
