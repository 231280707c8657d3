"""The tolerance rule: at most twice as far from float64 as eager PyTorch in the same dtype, and a floor.

The floor is one rounding of the largest value to its dtype; and one rounding in the dtype that sums run in, times the
square root of the reduction's length, as errors of a sum add up like a random walk, or of a summand where summands
cancel and leave a small sum. float64 runs on the CPU, so that a GPU is not judged by itself.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import fastwgan


def tensors(value: Any) -> tuple[Tensor, ...]:
    """One tensor or several, as several."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def assert_close(
    label: str, fused: Tensor, eager: Tensor, exact: Tensor, length: int = 1, summand: float = 0.0
) -> None:
    """|fused - exact| <= 2 max |eager - exact| + floor; NaN and infinities where float64 has them.

    Nothing is asked of an element that eager PyTorch itself cannot hold in the dtype.
    """
    assert fused.dtype == eager.dtype, f"{label}: dtype {fused.dtype}, eager {eager.dtype}"
    assert fused.shape == exact.shape, f"{label}: shape {tuple(fused.shape)}, float64 {tuple(exact.shape)}"
    info = torch.finfo(fused.dtype)
    fused, eager, exact = (x.detach().cpu().double() for x in (fused, eager, exact))
    judged = eager.isfinite() | ~exact.isfinite()
    finite = judged & exact.isfinite()
    error, eager_error = (fused - exact).abs(), (eager - exact).abs()
    largest, eager_worst = (x[finite].abs().max().item() if finite.any() else 0.0 for x in (exact, eager_error))
    wide = torch.finfo(torch.float64 if info.bits == 64 else torch.float32)  # what sums run in
    floor = info.eps * (largest + info.tiny) + wide.eps * max(length**0.5 * largest, summand)
    allowed = 2 * eager_worst + floor
    same = (fused == exact) | (fused.isnan() & exact.isnan())
    wrong = judged & ~same & ~(finite & (error <= allowed))
    if wrong.any():
        worst = torch.where(wrong, error.nan_to_num(nan=torch.inf), -1).argmax()
        index = tuple(int(i) for i in torch.unravel_index(worst, fused.shape))
        at = [x.flatten()[worst].item() for x in (fused, eager, exact, error, eager_error)]
        raise AssertionError(
            f"{label}: {int(wrong.sum())} of {wrong.numel()} wrong, worst at {index}: fused {at[0]:.9g}, eager "
            f"{at[1]:.9g}, float64 {at[2]:.17g}; fused error {at[3]:.3g}, eager error {at[4]:.3g} (at most "
            f"{eager_worst:.3g}), allowed {allowed:.3g}"
        )


def check_op(
    label: str,
    op: Callable[..., Any],
    eager: Callable[..., Any],
    *inputs: Tensor,
    length: int = 1,
    summand: float = 0.0,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Values and first derivatives of ``op`` by the rule. ``layout`` rearranges the inputs in memory."""
    results = []
    for fn, dtype, device in (
        (op, inputs[0].dtype, inputs[0].device),
        (eager, inputs[0].dtype, inputs[0].device),
        (eager, torch.float64, torch.device("cpu")),
    ):
        leaves = [x.detach().to(device, dtype, copy=True).requires_grad_() for x in inputs]
        outputs = tensors(fn(*(layout(x) for x in leaves)))
        cotangents = [torch.full_like(y, 1.0 + i) for i, y in enumerate(outputs)]
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, cotangents)))
    for i, (fused, plain, exact) in enumerate(zip(*results, strict=True)):
        part = f"output {i}" if i < len(outputs) else f"gradient of input {i - len(outputs)}"
        assert_close(f"{label}, {part}", fused, plain, exact, length, summand if i < len(outputs) else 0.0)


def check_optimizer(
    label: str,
    name: str,
    options: dict[str, Any],
    params: list[Tensor],
    gradients: Iterable[list[Tensor | None]],
    *,
    clip: float | None = None,
    backend: str = "triton",
) -> None:
    """Weights after a step for each list of gradients by the rule: ours against torch.optim and a clamp after it."""
    weights = [
        [torch.nn.Parameter(p) for p in params],
        [torch.nn.Parameter(p.detach().clone()) for p in params],
        [torch.nn.Parameter(p.detach().to("cpu", torch.float64, copy=True)) for p in params],
    ]
    theirs = getattr(torch.optim, name)
    optimizers = [
        getattr(fastwgan, name)(weights[0], clip=clip, backend=backend, **options),
        theirs(weights[1], foreach=False, **options),
        theirs(weights[2], foreach=False, **options),
    ]
    gradients = list(gradients)
    for grads in gradients:
        for optimizer, ps in zip(optimizers, weights, strict=True):
            for p, g in zip(ps, grads, strict=True):
                p.grad = None if g is None else g if ps is weights[0] else g.to(p.device, p.dtype, copy=True)
            optimizer.step()
        if clip is not None:
            for p in (*weights[1], *weights[2]):
                p.data.clamp_(-clip, clip)
    # float64 is its own oracle, so what cancels there is only as good as its summands, which are numbers about 1.
    summand = 8.0 if params[0].dtype == torch.float64 else 0.0
    for i, same in enumerate(zip(*weights, strict=True)):
        p = same[0]
        if p.numel():
            assert_close(f"{label}, parameter {i}", *(x.data for x in same), len(gradients) ** 2, summand)
            states = [optimizer.state[x] for optimizer, x in zip(optimizers, same, strict=True)]
            for key in states[1]:
                values = [state[key].to(p.dtype) if key == "step" else state[key] for state in states[:2]]
                assert_close(f"{label}, {key} of parameter {i}", *values, states[2][key], len(gradients) ** 2, summand)
            assert clip is None or not (p.abs() > clip).any(), f"{label}, parameter {i}: past the bound"
