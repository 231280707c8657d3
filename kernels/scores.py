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

from .arrival import is_last, mean_of_partials, zero

BLOCK = 1024
MAX_PROGRAMS = 1024  # several per multiprocessor on any current GPU; also the width of the final sum


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
    acc = stats_ptr.dtype.element_ty
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK
    tl.static_assert(first.dtype == tl.int64)  # and so is what counts from it, past 2^31 elements
    stride = tl.num_programs(0) * BLOCK
    lanes = tl.arange(0, BLOCK).to(tl.int64)

    a_sum = tl.zeros([BLOCK], acc)
    for start in range(first, a_numel, stride):
        mask = start + lanes < a_numel
        a = tl.load(a_ptr + start + lanes, mask, other=0).to(acc)
        if FORM == "labels":
            a *= tl.load(b_ptr + start + lanes, mask, other=0).to(acc)
        elif FORM == "hinge":
            a = tl.where(mask, tl.maximum(1 - a, 0, propagate_nan=tl.PropagateNan.ALL), 0)
        a_sum += a
    tl.store(partial_ptr + program, tl.sum(a_sum, axis=0))

    if FORM == "critic" or FORM == "hinge":
        b_sum = tl.zeros([BLOCK], acc)
        for start in range(first, b_numel, stride):
            mask = start + lanes < b_numel
            b = tl.load(b_ptr + start + lanes, mask, other=0).to(acc)
            if FORM == "hinge":
                b = tl.where(mask, tl.maximum(1 + b, 0, propagate_nan=tl.PropagateNan.ALL), 0)
            b_sum += b
        tl.store(partial_ptr + MAX_PROGRAMS + program, tl.sum(b_sum, axis=0))

    if is_last(counter_ptr):
        mean_a = mean_of_partials(partial_ptr, a_numel, MAX_PROGRAMS)
        if FORM == "critic" or FORM == "hinge":
            mean_b = mean_of_partials(partial_ptr + MAX_PROGRAMS, b_numel, MAX_PROGRAMS)
            tl.store(stats_ptr + 0, mean_a)
            tl.store(stats_ptr + 1, mean_b)
            tl.store(stats_ptr + 2, mean_a - mean_b)
            tl.store(stats_ptr + 3, mean_b - mean_a)
        if FORM == "critic":
            tl.store(loss_ptr, mean_b - mean_a)
        elif FORM == "generator":
            tl.store(loss_ptr, -mean_a)
        elif FORM == "labels":
            tl.store(loss_ptr, mean_a)
        else:
            tl.store(loss_ptr, mean_a)
            tl.store(second_ptr, mean_b)


def mean_scores(form: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch once; return (loss [], second loss [], stats [4]), of which a form fills what the table above says."""
    with torch.cuda.device_of(a):
        a, b = a.resolve_neg().contiguous(), b.resolve_neg().contiguous()
        acc = torch.float64 if a.dtype == torch.float64 else torch.float32
        loss, second = (torch.empty((), dtype=acc, device=a.device) for _ in range(2))
        stats = torch.empty(4, dtype=acc, device=a.device)
        partial = torch.empty(2, MAX_PROGRAMS, dtype=acc, device=a.device)
        programs = min(triton.cdiv(max(a.numel(), b.numel()), BLOCK), MAX_PROGRAMS)
        warps = min(BLOCK * a.itemsize // 512, 8)  # 16 bytes per thread; more warps than 8 were not measured
        _scores_kernel[(programs,)](
            a, b, loss, second, stats, partial, zero(a.device), a.numel(), b.numel(),
            FORM=form, BLOCK=BLOCK, MAX_PROGRAMS=MAX_PROGRAMS, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, second, stats
