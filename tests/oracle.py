"""The tolerance rule: at most twice as far from float64 as eager PyTorch in the same dtype, and a floor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def tensors(value: Any) -> tuple[Tensor, ...]:
    """One tensor or several, as several."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def assert_close(fused: Tensor, eager: Tensor, exact: Tensor, length: int = 1) -> None:
    """|fused - exact| <= 2 |eager - exact| + a floor of a few roundings that grows with sqrt(reduction length)."""
    assert fused.dtype == eager.dtype
    assert fused.shape == exact.shape
    eps = torch.finfo(fused.dtype).eps
    fused, eager, exact = (x.detach().cpu().double() for x in (fused, eager, exact))
    assert torch.equal(fused.isnan(), exact.isnan())
    floor = eps * length**0.5 * exact.nan_to_num().abs().max()
    error, allowed = (fused - exact).abs().nan_to_num(), 2 * (eager - exact).abs().nan_to_num().max() + floor
    worst = int(error.argmax())
    assert error.max() <= allowed, (
        f"at {worst}: fused {fused.flatten()[worst]}, exact {exact.flatten()[worst]}, "
        f"error {error.max():.3g}, allowed {allowed:.3g}"
    )


def check_op(op: Callable[..., Any], eager: Callable[..., Any], *inputs: Tensor, length: int = 1) -> None:
    """Values and first derivatives of ``op`` against ``eager`` in the same dtype and in float64."""
    results = []
    for fn, dtype in ((op, inputs[0].dtype), (eager, inputs[0].dtype), (eager, torch.float64)):
        leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
        outputs = tensors(fn(*leaves))
        cotangents = [torch.full_like(y, 1.0 + i) for i, y in enumerate(outputs)]
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, cotangents)))
    for fused, plain, exact in zip(*results, strict=True):
        assert_close(fused, plain, exact, length)
