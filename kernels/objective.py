"""The losses that blend WGAN with the non-saturating GAN, and their gradients at the scores.

    critic      mean(f(b)) + mean(f(-a) + drift a^2)     a real scores, b fake ones
    generator   mean(f(-a))                              a fake scores
    with        f(x) = blend * log(1 + exp(x)) + (1 - blend) * x

so blend = 0 is WGAN's loss and blend = 1 the GAN's. The launch writes the loss, the statistics, and d loss / d score
times a weight, which is what a backward pass starts from. Scores are read and added up as in scores.py.
"""

import torch
import triton
import triton.language as tl

from .arithmetic import divide, log1p, mean
from .arrival import MAX_PROGRAMS, blocks_of_program, is_last, mean_of_partials, zero
from .layout import accumulator

BLOCK = 1024


@triton.jit
def _term(x, SIGN: tl.constexpr, BLEND: tl.constexpr, DRIFT: tl.constexpr):
    """f(SIGN x) + DRIFT x^2 and its derivative."""
    y = SIGN * x
    value, slope = y, tl.full(y.shape, SIGN, y.dtype)
    if BLEND != 0:  # here and below not + 0 times it, which an infinite score would turn into NaN
        small = tl.exp(-tl.abs(y))
        softplus = tl.maximum(y, 0, propagate_nan=tl.PropagateNan.ALL) + log1p(small)
        sigmoid = divide(tl.where(y >= 0, 1, small), 1 + small)
        value = softplus if BLEND == 1 else BLEND * softplus + (1 - BLEND) * y
        slope = SIGN * (BLEND * sigmoid + (1 - BLEND))
    if DRIFT != 0:
        value += DRIFT * x * x
        slope += 2 * DRIFT * x
    return value, slope


@triton.jit
def _walk(
    x_ptr, slope_ptr, partial_ptr, numel, factor, acc: tl.constexpr, SIGN: tl.constexpr, BLEND: tl.constexpr,
    DRIFT: tl.constexpr, SLOPES: tl.constexpr, BLOCK: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """This program's share of an array: sums of scores and of terms to the partials, slopes to their places."""
    program = tl.program_id(0)
    first, stride, lanes = blocks_of_program(tl.num_programs(0), BLOCK)
    total = tl.zeros([BLOCK], acc)
    terms = tl.zeros([BLOCK], acc)
    for start in range(first, numel, stride):
        mask = start + lanes < numel
        x = tl.load(x_ptr + start + lanes, mask, other=0).to(acc)
        value, slope = _term(x, SIGN, BLEND, DRIFT)
        total += x
        terms += tl.where(mask, value, 0)
        if SLOPES:
            tl.store(slope_ptr + start + lanes, slope * factor, mask)
    tl.store(partial_ptr + program, tl.sum(total, axis=0))
    tl.store(partial_ptr + MAX_PROGRAMS + program, tl.sum(terms, axis=0))


@triton.jit
def _objective_kernel(
    a_ptr,  # [a_numel] scores
    b_ptr,  # [b_numel] scores, where CRITIC
    slope_ptr,  # [a_numel + b_numel], where SLOPES
    loss_ptr,  # [], in the accumulator's dtype as the statistics
    stats_ptr,  # [4] mean a, mean b, mean a - mean b, loss; [1] loss
    partial_ptr,  # [4, MAX_PROGRAMS]
    scale_ptr,  # [1] float32, of slopes, where SCALED
    counter_ptr,  # [1] int32
    a_numel,
    b_numel,
    WEIGHT: tl.constexpr,  # of slopes
    CRITIC: tl.constexpr, BLEND: tl.constexpr, DRIFT: tl.constexpr, SCALED: tl.constexpr, SLOPES: tl.constexpr,
    BLOCK: tl.constexpr, MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = stats_ptr.dtype.element_ty
    weight = tl.full([], WEIGHT, acc)
    if SCALED:
        weight *= tl.load(scale_ptr)
    _walk(
        a_ptr, slope_ptr, partial_ptr, a_numel, mean(weight, a_numel), acc, -1, BLEND, DRIFT, SLOPES, BLOCK,
        MAX_PROGRAMS,
    )  # fmt: skip
    if CRITIC:
        _walk(
            b_ptr, slope_ptr + a_numel, partial_ptr + 2 * MAX_PROGRAMS, b_numel, mean(weight, b_numel), acc, 1, BLEND,
            0.0, SLOPES, BLOCK, MAX_PROGRAMS,
        )  # fmt: skip

    if is_last(counter_ptr):
        loss = mean_of_partials(partial_ptr + MAX_PROGRAMS, a_numel, MAX_PROGRAMS)
        if CRITIC:
            loss += mean_of_partials(partial_ptr + 3 * MAX_PROGRAMS, b_numel, MAX_PROGRAMS)
            mean_a = mean_of_partials(partial_ptr, a_numel, MAX_PROGRAMS)
            mean_b = mean_of_partials(partial_ptr + 2 * MAX_PROGRAMS, b_numel, MAX_PROGRAMS)
            tl.store(stats_ptr + 0, mean_a)
            tl.store(stats_ptr + 1, mean_b)
            tl.store(stats_ptr + 2, mean_a - mean_b)
            tl.store(stats_ptr + 3, loss)
        else:
            tl.store(stats_ptr, loss)
        tl.store(loss_ptr, loss)


def objective(
    a: torch.Tensor, b: torch.Tensor | None, blend: float, drift: float, weight: float = 1.0,
    scale: torch.Tensor | None = None, slopes: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Launch once; return (loss [], statistics [4] or [1], weight * scale * d loss / d score in dtype ``slopes``).

    ``b`` is None for the generator's form. The slopes are [a_numel + b_numel], empty where ``slopes`` is None.
    """
    with torch.cuda.device_of(a):
        a = a.resolve_neg().contiguous()
        critic, b = b is not None, a if b is None else b.resolve_neg().contiguous()
        b_numel = b.numel() if critic else 0
        acc, shapes = accumulator(a.dtype), ((), 4 if critic else 1, (4, MAX_PROGRAMS))
        loss, stats, partial = (torch.empty(shape, dtype=acc, device=a.device) for shape in shapes)
        out = torch.empty(0 if slopes is None else a.numel() + b_numel, dtype=slopes or a.dtype, device=a.device)
        programs = min(triton.cdiv(max(a.numel(), b_numel), BLOCK), MAX_PROGRAMS)
        _objective_kernel[(programs,)](
            a, b, out if slopes is not None else a, loss, stats, partial,
            stats if scale is None else scale, zero(a.device), a.numel(), b_numel,
            CRITIC=critic, BLEND=blend, DRIFT=drift, WEIGHT=weight, SCALED=scale is not None,
            SLOPES=slopes is not None, BLOCK=BLOCK, MAX_PROGRAMS=MAX_PROGRAMS,
            num_warps=8 if acc == torch.float64 else 4, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, stats, out
