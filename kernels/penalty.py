"""WGAN-GP's penalty: each sample's gradient norm, the mean of a function of it, and that mean's gradient.

    n[i] = ||g[i]||_2,  loss = mean_i phi(n[i]),  v[i] = weight / N * phi'(n[i]) / n[i] * g[i]

    kind            phi(n)                  phi'(n) / n
    two-sided       (n - target)^2          2 (n - target) / n,       0 at n = 0
    one-sided       max(n - target, 0)^2    2 max(n - target, 0) / n, 0 at n = 0
    zero-centered   n^2                     2
    power           n^6                     6 n^4

Arrays are [N, size] with dense samples. Arithmetic is float32 (float64 for float64 input), so a half-precision
gradient cannot overflow when squared. One launch reads g once where a sample fits one block (up to MAX_BLOCK elements;
beyond, the second read comes from cache) and writes v once. A program handles one sample; the last takes the mean.
"""

import torch
import triton
import triton.language as tl

from .arithmetic import divide, mean, sqrt
from .arrival import is_last, zero
from .layout import accumulator, dense_samples

MAX_BLOCK = 16384  # the largest sample held in registers: 32 per thread with 16 warps
LOOP_BLOCK = 8192  # of a larger one, by as many threads as a program may have: there is one program to a sample
MOST_WARPS = 16 if torch.version.hip else 32  # 1024 threads
NORMS_BLOCK = tl.constexpr(1024)  # that the last program takes at a time


@triton.jit
def _phi(norm, KIND: tl.constexpr, TARGET: tl.constexpr):
    """Return phi(norm) and phi'(norm) / norm, which is the factor between a gradient and its cotangent."""
    if KIND == "zero-centered":
        value, factor = norm * norm, tl.full([], 2, norm.dtype)
    elif KIND == "power":
        square = norm * norm
        value, factor = square * square * square, 6 * square * square
    else:
        excess = norm - TARGET
        if KIND == "one-sided":
            excess = tl.maximum(excess, 0, propagate_nan=tl.PropagateNan.ALL)
        value = excess * excess
        factor = tl.where(norm == 0, 0, divide(2 * excess, tl.where(norm == 0, 1, norm)))
    return value, factor


@triton.jit(do_not_specialize=["batch"])
def _penalty_kernel(
    g_ptr,  # [N, size]
    v_ptr,  # [N, size], written where COTANGENT, in its own dtype
    loss_ptr,  # [], in the accumulator's dtype as all that follows: a float16 penalty could be beyond float16
    stats_ptr,  # [4] mean penalty; mean, least and greatest norm
    norm_ptr,  # [N]
    counter_ptr,  # [1] int32
    batch: tl.int64,
    size,
    KIND: tl.constexpr, TARGET: tl.constexpr, WEIGHT: tl.constexpr, COTANGENT: tl.constexpr, ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    acc = stats_ptr.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64)
    start = sample * size
    lanes = tl.arange(0, BLOCK)

    if ONE_BLOCK:
        mask = lanes < size
        g = tl.load(g_ptr + start + lanes, mask, other=0).to(acc)
        norm = sqrt(tl.sum(g * g, axis=0))
        if COTANGENT:
            scale = mean(WEIGHT * _phi(norm, KIND, TARGET)[1], batch)
            tl.store(v_ptr + start + lanes, scale * g, mask)
    else:
        squares = tl.zeros([BLOCK], acc)
        origin = tl.full([], 0, tl.int64)
        for column in range(origin, size, BLOCK):
            mask = column + lanes < size
            g = tl.load(g_ptr + start + column + lanes, mask, other=0).to(acc)
            squares += g * g
        norm = sqrt(tl.sum(squares, axis=0))
        if COTANGENT:
            scale = mean(WEIGHT * _phi(norm, KIND, TARGET)[1], batch)
            last = (size - 1) // BLOCK
            for i in range(origin, last + 1):
                column = (last - i) * BLOCK  # backwards: what was read last is still in cache
                mask = column + lanes < size
                g = tl.load(g_ptr + start + column + lanes, mask, other=0).to(acc)
                tl.store(v_ptr + start + column + lanes, scale * g, mask)
    tl.store(norm_ptr + sample, norm)

    if is_last(counter_ptr):
        slots = tl.arange(0, NORMS_BLOCK)
        penalties = tl.zeros([NORMS_BLOCK], acc)
        norms = tl.zeros([NORMS_BLOCK], acc)
        least = tl.full([NORMS_BLOCK], float("inf"), acc)
        greatest = tl.zeros([NORMS_BLOCK], acc)
        for first in range(0, batch, NORMS_BLOCK):
            valid = first + slots < batch  # not "mask": in a loop a name keeps its shape
            each = tl.load(norm_ptr + first + slots, valid, other=0, cache_modifier=".cg")
            norms += each
            least = tl.minimum(least, tl.where(valid, each, float("inf")))
            greatest = tl.maximum(greatest, each)
            penalties += tl.where(valid, _phi(each, KIND, TARGET)[0], 0)
        loss = mean(tl.sum(penalties, axis=0), batch)
        tl.store(loss_ptr, loss)
        tl.store(stats_ptr + 0, loss)
        average = mean(tl.sum(norms, axis=0), batch)
        defined = average >= 0  # not NaN, which the extremes would not show
        tl.store(stats_ptr + 1, average)
        tl.store(stats_ptr + 2, tl.where(defined, tl.min(least, axis=0), average))
        tl.store(stats_ptr + 3, tl.where(defined, tl.max(greatest, axis=0), average))


def gradient_penalty(
    g: torch.Tensor, kind: str, target: float, weight: float, cotangent: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch once; return (loss [], stats [4], v like g in dtype ``cotangent``, empty where that is None).

    ``loss`` and ``stats`` are without the weight.
    """
    with torch.cuda.device_of(g):
        g = dense_samples(g)
        batch, size = g.shape[0], g[0].numel()
        acc = accumulator(g.dtype)
        v = g.new_empty(0) if cotangent is None else torch.empty_like(g, dtype=cotangent)
        loss, stats, norms = (torch.empty(shape, dtype=acc, device=g.device) for shape in ((), 4, batch))
        one_block = size <= MAX_BLOCK
        block = triton.next_power_of_2(size) if one_block else LOOP_BLOCK
        warps = min(max(block * acc.itemsize // 2048, 4), 16)  # 64 bytes of the accumulator per thread
        _penalty_kernel[(batch,)](
            g, g if cotangent is None else v, loss, stats, norms, zero(g.device), batch, size,
            KIND=kind, TARGET=target, WEIGHT=weight, COTANGENT=cotangent is not None, ONE_BLOCK=one_block,
            BLOCK=block, num_warps=warps if one_block else MOST_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, stats, v
