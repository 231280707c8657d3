"""ReLU and leaky ReLU whose second derivative is known to be nothing, for the critic's pass at the penalised points.

The penalty differentiates the critic's input gradient. PyTorch answers for a rectifier's second derivative with a
tensor of zeros, which then runs backward through the whole forward graph: for an MLP half of the penalty's backward
pass computes weight gradients that are exactly zero, and adds them up. Here the slope is a constant of that backward
pass, as it is almost everywhere, so that graph is not entered at all.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _Rectify(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, slope: float | None, inplace: bool) -> Tensor:
        return F.relu(x, inplace) if slope is None else F.leaky_relu(x, slope, inplace)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.slope, inplace = inputs  # a slope of None is ReLU
        if inplace:
            ctx.mark_dirty(x)
        # Either is positive where the other is. As PyTorch does, keep the one that a user may not change in place.
        ctx.save_for_backward(x if ctx.slope and not inplace else output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        if ctx.slope is None:  # at NaN this slope is 1, and that of a leaky ReLU the one below zero
            return torch.ops.aten.threshold_backward(grad, kept.detach(), 0), None, None
        return torch.ops.aten.leaky_relu_backward(grad, kept.detach(), ctx.slope, False), None, None


def _rectify(x: Any, slope: float | None, inplace: bool) -> Tensor | None:
    """Return the rectified x, or None where PyTorch's own function has to do it."""
    if torch.compiler.is_compiling():  # a compiler sees that this form has no second derivative
        result = torch.where(x <= 0, 0, x) if slope is None else torch.where(x > 0, x, x * slope)  # a NaN stays one
        return x.copy_(result) if inplace else result
    if not isinstance(x, Tensor) or not x.requires_grad or (slope or 0) < 0 or (inplace and x._is_view()):
        return None
    return _Rectify.apply(x, slope, inplace)  # type: ignore[no-untyped-call, no-any-return]


_OURS: dict[Any, Any] = {
    F.leaky_relu: lambda input, negative_slope=0.01, inplace=False: _rectify(input, float(negative_slope), inplace),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), lambda input, inplace=False: _rectify(input, None, inplace)),
}


class LinearPieces(TorchFunctionMode):
    """Within it, the rectifiers that any module calls are those above. Values and derivatives are PyTorch's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = _OURS[func](*args, **kwargs) if func in _OURS else None
        return func(*args, **kwargs) if result is None else result
