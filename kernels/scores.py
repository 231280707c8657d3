"""Means over critic scores: the loss and its statistics in one launch.

    form        loss                                        a, b
    critic      mean(b) - mean(a)                           real, fake scores
    generator   -mean(a)                                    fake scores
    labels      mean(a * b)                                 labels, scores
    hinge       mean(relu(1 - a)), mean(relu(1 + b))        real, fake scores

``critic`` also fills the statistics.

Inputs are read once, as flat arrays in any order. Sums run in float32 (float64 for float64 input), and losses and
statistics keep that dtype, as float16 cannot hold every difference of two means. Each program strides over the input
and writes one partial per mean; the last to arrive adds them in index order.
"""

import torch
import triton
import triton.language as tl

from .arrival import blocks_of_program, is_last, mean_of_partials, zero
from .layout import accumulator

BLOCK = 1024
MAX_PROGRAMS = 1024  # twice what other sums have, as measured


@triton.jit
def _sum(x_ptr, y_ptr, numel, programs, acc: tl.constexpr, FORM: tl.constexpr, SIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Return this program's share of the sum of x, of x * y for labels, of relu(1 + SIGN * x) for the hinge form."""
    first, stride, lanes = blocks_of_program(programs, BLOCK)
    padding: tl.constexpr = -1.0 * SIGN if FORM == "hinge" else 0.0  # adds nothing
    total = tl.zeros([BLOCK], acc)
    for start in range(first, numel, stride):
        mask = start + lanes < numel
        x = tl.load(x_ptr + start + lanes, mask, other=padding).to(acc)
        if FORM == "labels":
            x *= tl.load(y_ptr + start + lanes, mask, other=0).to(acc)
        elif FORM == "hinge":
            x = tl.maximum(1 + SIGN * x, 0, propagate_nan=tl.PropagateNan.ALL)
        total += x
    return tl.sum(total, axis=0)


@triton.jit
def store_sums(
    partial_ptr, a_ptr, b_ptr, a_numel, b_numel, programs, FORM: tl.constexpr, BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Store this program's share of the sum over a, and over b where a form has a mean of it, to [2, MAX_PROGRAMS].

    The first ``programs`` of the launch share the sums.
    """
    acc: tl.constexpr = partial_ptr.dtype.element_ty
    program = tl.program_id(0)
    tl.store(partial_ptr + program, _sum(a_ptr, b_ptr, a_numel, programs, acc, FORM, -1, BLOCK))
    if FORM == "critic" or FORM == "hinge":
        b_sum = _sum(b_ptr, a_ptr, b_numel, programs, acc, FORM, 1, BLOCK)
        tl.store(partial_ptr + MAX_PROGRAMS + program, b_sum)


@triton.jit
def store_statistics(stats_ptr, partial_ptr, a_numel, b_numel, MAX_PROGRAMS: tl.constexpr):
    """In the last program: store mean a, mean b, mean a - mean b, mean b - mean a; return the two means."""
    mean_a = mean_of_partials(partial_ptr, a_numel, MAX_PROGRAMS)
    mean_b = mean_of_partials(partial_ptr + MAX_PROGRAMS, b_numel, MAX_PROGRAMS)
    tl.store(stats_ptr + 0, mean_a)
    tl.store(stats_ptr + 1, mean_b)
    tl.store(stats_ptr + 2, mean_a - mean_b)
    tl.store(stats_ptr + 3, mean_b - mean_a)
    return mean_a, mean_b


@triton.jit
def _scores_kernel(
    a_ptr,  # [a_numel] scores or labels
    b_ptr,  # [b_numel] scores
    loss_ptr,  # [], in the accumulator's dtype as all that follows
    second_ptr,  # [], the hinge form's loss on b
    stats_ptr,  # [4] mean a, mean b, mean a - mean b, mean b - mean a
    partial_ptr,  # [2, MAX_PROGRAMS]
    counter_ptr,  # [1] int32
    a_numel,
    b_numel,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr,
):
    store_sums(partial_ptr, a_ptr, b_ptr, a_numel, b_numel, tl.num_programs(0), FORM, BLOCK, MAX_PROGRAMS)
    if is_last(counter_ptr):
        if FORM == "critic" or FORM == "hinge":
            mean_a, mean_b = store_statistics(stats_ptr, partial_ptr, a_numel, b_numel, MAX_PROGRAMS)
        else:
            mean_a = mean_of_partials(partial_ptr, a_numel, MAX_PROGRAMS)
        if FORM == "critic":
            tl.store(loss_ptr, mean_b - mean_a)
        elif FORM == "generator":
            tl.store(loss_ptr, -mean_a)
        else:
            tl.store(loss_ptr, mean_a)
        if FORM == "hinge":
            tl.store(second_ptr, mean_b)


def mean_scores(form: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch once; return (loss [], second loss [], stats [4]), of which a form fills what the table above says."""
    with torch.cuda.device_of(a):
        a, b = a.resolve_neg().contiguous(), b.resolve_neg().contiguous()
        acc, shapes = accumulator(a.dtype), ((), (), 4, (2, MAX_PROGRAMS))
        loss, second, stats, partial = (torch.empty(shape, dtype=acc, device=a.device) for shape in shapes)
        programs = min(triton.cdiv(max(a.numel(), b.numel()), BLOCK), MAX_PROGRAMS)
        warps = min(BLOCK * a.itemsize // 512, 8)  # 16 bytes per thread; more warps than 8 were not measured
        _scores_kernel[(programs,)](
            a, b, loss, second, stats, partial, zero(a.device), a.numel(), b.numel(),
            FORM=form, BLOCK=BLOCK, MAX_PROGRAMS=MAX_PROGRAMS, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, second, stats
