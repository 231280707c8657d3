"""BatchNorm of [N, C] with the rectifier behind it, in one launch, and their gradients in another.

    xhat = (x - mean) / sqrt(var + eps),  z = weight * xhat + bias,  y = z if z > 0 else slope * z
    running_mean = (1 - m) * running_mean + m * mean,  running_var = (1 - m) * running_var + m * var * N / (N - 1)

    d = dy * (1 if y > 0 else slope),  dbias = sum(d),  dweight = sum(d * xhat)
    dx = weight / sqrt(var + eps) * (d - dbias / N - xhat * dweight / N), without the sums for running statistics

m is the momentum or, for a cumulative average, 1 / num_batches_tracked, which the launch counts on. The variance is the
mean square of differences from the mean. Arrays are contiguous; arithmetic is float32 (float64 for float64). A program
has all rows of some columns, so programs share no sum. It reads x three times, twice from cache, and writes y once.

Source: Ioffe and Szegedy, arXiv 1502.03167, Algorithm 1; formulas and options are torch.nn.BatchNorm1d's.
"""

import torch
import triton
import triton.language as tl

from .arithmetic import divide, mean, sqrt
from .arrival import is_last, zero
from .layout import accumulator

COLUMNS = 16  # of a program: 64 bytes of a float32 row
MOST_ROWS = 256  # at a time


@triton.jit
def _tile(first, rows, columns, column, ROWS: tl.constexpr):
    """Return where the rows from ``first`` on lie in some columns, and which of these places there are."""
    row = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    return row * columns + column[None, :], (row < rows) & (column < columns)[None, :]


@triton.jit
def _batchnorm_kernel(
    x_ptr, y_ptr,  # [N, C]
    weight_ptr, bias_ptr,  # [C], where AFFINE
    running_mean_ptr, running_var_ptr,  # [C], where TRACKED, and where not OF_BATCH
    tracked_ptr,  # [] int64, where TRACKED
    stats_ptr,  # [2, C] mean and 1 / sqrt(var + eps), in the accumulator's dtype
    counter_ptr,  # [1] int32
    rows, columns,
    EPS: tl.constexpr, MOMENTUM: tl.constexpr, SLOPE: tl.constexpr,  # a MOMENTUM of None is a cumulative average's
    AFFINE: tl.constexpr, OF_BATCH: tl.constexpr, TRACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    acc = stats_ptr.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own = column < columns
    if OF_BATCH:
        total = tl.zeros([ROWS, COLUMNS], acc)
        for first in range(0, rows, ROWS):
            at, inside = _tile(first, rows, columns, column, ROWS)
            total += tl.load(x_ptr + at, inside, other=0).to(acc)
        center = mean(tl.sum(total, axis=0), rows)
        total = tl.zeros([ROWS, COLUMNS], acc)
        for first in range(0, rows, ROWS):
            at, inside = _tile(first, rows, columns, column, ROWS)
            x = tl.load(x_ptr + at, inside, other=0).to(acc) - center[None, :]
            total += tl.where(inside, x * x, 0)
        squares = tl.sum(total, axis=0)
        var = mean(squares, rows)
    else:
        center = tl.load(running_mean_ptr + column, own, other=0).to(acc)
        var = tl.load(running_var_ptr + column, own, other=0).to(acc)
    if TRACKED:
        momentum, tracked = tl.full([], 0 if MOMENTUM is None else MOMENTUM, acc), tl.load(tracked_ptr) + 1
        if MOMENTUM is None:
            momentum = divide(momentum + 1, tracked.to(acc))
        old_mean = tl.load(running_mean_ptr + column, own, other=0).to(acc)
        old_var = tl.load(running_var_ptr + column, own, other=0).to(acc)
        tl.debug_barrier()  # several threads load each element, and one of them stores it
        tl.store(running_mean_ptr + column, (1 - momentum) * old_mean + momentum * center, own)
        tl.store(running_var_ptr + column, (1 - momentum) * old_var + momentum * mean(squares, rows - 1), own)
        if is_last(counter_ptr):  # all others have read it
            tl.store(tracked_ptr, tracked)
    inverse = divide(tl.full([], 1, acc), sqrt(var + EPS))
    tl.store(stats_ptr + column, center, own)
    tl.store(stats_ptr + columns + column, inverse, own)
    factor, shift = inverse, tl.zeros([COLUMNS], acc)
    if AFFINE:
        factor *= tl.load(weight_ptr + column, own, other=0).to(acc)
        shift = tl.load(bias_ptr + column, own, other=0).to(acc)
    for first in range(0, rows, ROWS):
        at, inside = _tile(first, rows, columns, column, ROWS)
        y = (tl.load(x_ptr + at, inside, other=0).to(acc) - center[None, :]) * factor[None, :] + shift[None, :]
        if SLOPE == 0:
            y = tl.maximum(y, 0, propagate_nan=tl.PropagateNan.ALL)
        elif SLOPE != 1:
            y = tl.where(y > 0, y, SLOPE * y)
        tl.store(y_ptr + at, y, inside)


@triton.jit
def _gradients(dy_ptr, x_ptr, y_ptr, at, inside, center, inverse, SLOPE: tl.constexpr):
    """Return d and xhat."""
    d, y = tl.load(dy_ptr + at, inside, other=0).to(center.dtype), tl.load(y_ptr + at, inside, other=0).to(center.dtype)
    if SLOPE == 0:
        d = tl.where(y <= 0, 0, d)  # d at NaN, as PyTorch has it
    elif SLOPE != 1:
        d = tl.where(y > 0, d, SLOPE * d)
    return d, (tl.load(x_ptr + at, inside, other=0).to(center.dtype) - center[None, :]) * inverse[None, :]


@triton.jit
def _batchnorm_backward_kernel(
    dy_ptr, x_ptr, y_ptr, dx_ptr,  # [N, C]
    weight_ptr,  # [C], where AFFINE
    sums_ptr,  # [2, C] dweight and dbias
    stats_ptr,  # [2, C]
    rows, columns,
    SLOPE: tl.constexpr, AFFINE: tl.constexpr, OF_BATCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own = column < columns
    center = tl.load(stats_ptr + column, own, other=0)
    inverse = tl.load(stats_ptr + columns + column, own, other=0)
    of_weight, of_bias = tl.zeros([ROWS, COLUMNS], center.dtype), tl.zeros([ROWS, COLUMNS], center.dtype)
    for first in range(0, rows, ROWS):
        at, inside = _tile(first, rows, columns, column, ROWS)
        d, xhat = _gradients(dy_ptr, x_ptr, y_ptr, at, inside, center, inverse, SLOPE)
        of_weight += d * xhat
        of_bias += d
    dweight, dbias, factor = tl.sum(of_weight, axis=0), tl.sum(of_bias, axis=0), inverse
    tl.store(sums_ptr + column, dweight, own)
    tl.store(sums_ptr + columns + column, dbias, own)
    if AFFINE:
        factor *= tl.load(weight_ptr + column, own, other=0).to(center.dtype)
    for first in range(0, rows, ROWS):
        at, inside = _tile(first, rows, columns, column, ROWS)
        d, xhat = _gradients(dy_ptr, x_ptr, y_ptr, at, inside, center, inverse, SLOPE)
        if OF_BATCH:
            d -= mean(dbias, rows)[None, :] + xhat * mean(dweight, rows)[None, :]
        tl.store(dx_ptr + at, factor[None, :] * d, inside)


def _launch(kernel, x: torch.Tensor, *args, **options) -> None:
    rows, columns = x.shape
    down = min(triton.next_power_of_2(rows), MOST_ROWS)
    options |= {"ROWS": down, "COLUMNS": COLUMNS, "num_warps": max(4, down // 32), "enable_fp_fusion": True}
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(columns, COLUMNS),)](*args, rows, columns, **options)


def batch_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, running: tuple[torch.Tensor, ...],
    of_batch: bool, momentum: float | None, eps: float, slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch once; return (y like x, stats [2, C]).

    ``running`` has the running mean and variance and num_batches_tracked, or nothing. With ``of_batch`` they are
    brought up to date in place; else x is normalised by them.
    """
    y, stats = torch.empty_like(x), x.new_empty(2, x.shape[1], dtype=accumulator(x.dtype))
    of_affine = (x, x) if weight is None else (weight, bias)
    _launch(
        _batchnorm_kernel, x, x, y, *of_affine, *(running or (x, x, x)), stats, zero(x.device), EPS=eps,
        MOMENTUM=momentum, SLOPE=slope, AFFINE=weight is not None, OF_BATCH=of_batch,
        TRACKED=bool(running) and of_batch,
    )  # fmt: skip
    return y, stats


def batch_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor | None, stats: torch.Tensor,
    of_batch: bool, slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch once; return (dx like x, [dweight, dbias] like stats)."""
    dx, sums, affine = torch.empty_like(x), torch.empty_like(stats), weight is not None
    arrays = dy, x, y, dx, weight if affine else x, sums, stats
    _launch(_batchnorm_backward_kernel, x, *arrays, SLOPE=slope, AFFINE=affine, OF_BATCH=of_batch)
    return dx, sums
