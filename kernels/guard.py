"""Whether a network's gradients are all finite, and the means of its scores, in one launch after the backward pass.

The update's launch reads the verdict from the gate, so a step with a non-finite gradient is left out whole without the
host's knowing of it. A loss scale, where there is one, is kept in the same launch: it is halved when a gradient was not
finite and doubled after GROWTH_INTERVAL steps without one, within bounds. The norm to clip by is taken there, too.

Each gradient is read once: 4 bytes per float32 parameter. One program handles one chunk of one gradient, and a part of
the scores; the last to arrive adds their partial sums in index order and writes the verdict.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import arrival, table
from .arrival import MAX_PROGRAMS, is_last, mean_of_partials, zero
from .layout import accumulator, triton_dtype
from .scores import store_statistics, store_sums
from .table import Tables

BLOCK = 4096  # of a gradient; small networks want many programs
LARGE_BLOCK = 16384  # where a launch has LARGE elements or more
LARGE = 2**25  # beyond an H200's cache, as are the 2^27 that were measured
SCORES_BLOCK = 1024
# The tally (int64), as fastwgan.reference.Tally describes it. Then two numbers that are zero between launches.
NONFINITE, FIRST, IN_A_ROW, SKIPPED, STEPS, LAST, LONGEST, COUNT, REACHED = map(tl.constexpr, range(9))
TALLY = 9
# The gate (float64), which all launches after this one obey: 1 to leave the step out, else 0; the gradients' factor.
# The loss scale (float32): the scale; how many steps in a row it has served.
GROWTH_INTERVAL = tl.constexpr(2000)
LEAST_SCALE, MOST_SCALE = tl.constexpr(1.0), tl.constexpr(2.0**24)  # beyond these it is not the scale that is wrong


@triton.jit(do_not_specialize=["chunks", "before", "tensors"])
def _guard_kernel(
    table_ptr,  # [tensors, table.COLUMNS] int64: PARAM is a gradient's address, HYPER_ROW its number in the network
    owner_ptr,  # [chunks] int32, the tensor each program works on
    tally_ptr,  # [TALLY] int64
    gate_ptr,  # [2] float64
    scale_ptr,  # [2] float32, where SCALED
    a_ptr,  # [a_numel] scores
    b_ptr,  # [b_numel] scores
    stats_ptr,  # [5] mean a, mean b, mean a - mean b, mean b - mean a; [2] -mean a; or [1]; the last is the count
    partial_ptr,  # [2, MAX_PROGRAMS]
    squares_ptr,  # [chunks of all launches of the step] float64, where MAX_NORM is given: no sum of squares overflows
    counter_ptr,  # [1] int32
    chunks: tl.int32,
    before: tl.int32,  # chunks in the launches of the step before this one
    tensors: tl.int64,  # in the network
    a_numel,
    b_numel,
    FORM: tl.constexpr,  # "critic": both means; "generator": -mean a; "none"
    FINAL: tl.constexpr,  # the last launch of the step, as gradients of each dtype have their own
    DTYPE: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, SCORES_BLOCK: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr, MAX_NORM: tl.constexpr,  # None not to clip
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if program < chunks:
        row_ptr = table_ptr + tl.load(owner_ptr + program).to(tl.int64) * table.COLUMNS
        numel = tl.load(row_ptr + table.NUMEL)
        start = (program - tl.load(row_ptr + table.FIRST_CHUNK)) * BLOCK
        lanes = tl.arange(0, BLOCK)
        if (tl.load(row_ptr + table.ALIGNED) != 0) & (start + BLOCK <= numel):
            g = tl.load(table.pointers(row_ptr, table.PARAM, start, lanes, DTYPE, True))
        else:
            mask = lanes < numel - start
            g = tl.load(table.pointers(row_ptr, table.PARAM, start, lanes, DTYPE, False), mask, other=0)
        found = tl.sum(tl.where(tl.abs(g) < float("inf"), 0, 1), axis=0)
        if found > 0:
            tl.atomic_add(tally_ptr + COUNT, found.to(tl.int64), sem="relaxed")
            tl.atomic_max(tally_ptr + REACHED, tensors - tl.load(row_ptr + table.HYPER_ROW), sem="relaxed")
        if MAX_NORM is not None:
            wide = g.to(tl.float64)
            tl.store(squares_ptr + before + program, tl.sum(wide * wide, axis=0))

    if FORM != "none":
        sharing = tl.minimum(tl.num_programs(0), MAX_PROGRAMS)
        if program < MAX_PROGRAMS:
            store_sums(partial_ptr, a_ptr, b_ptr, a_numel, b_numel, sharing, FORM, SCORES_BLOCK, MAX_PROGRAMS)

    if is_last(counter_ptr):
        if FORM == "critic":
            store_statistics(stats_ptr, partial_ptr, a_numel, b_numel, MAX_PROGRAMS)
        elif FORM == "generator":
            tl.store(stats_ptr, -mean_of_partials(partial_ptr, a_numel, MAX_PROGRAMS))
        if FINAL:
            nonfinite = tl.atomic_xchg(tally_ptr + COUNT, 0, sem="relaxed")
            reached = tl.atomic_xchg(tally_ptr + REACHED, 0, sem="relaxed")
            skip = nonfinite > 0
            row = tl.where(skip, tl.load(tally_ptr + IN_A_ROW) + 1, 0)
            skipped = tl.load(tally_ptr + SKIPPED) + skip.to(tl.int64)
            step = tl.load(tally_ptr + STEPS) + 1
            longest = tl.maximum(tl.load(tally_ptr + LONGEST), row)
            scale, factor = tl.full([], 1, tl.float32), tl.full([], 1, tl.float64)
            if SCALED:
                scale = tl.load(scale_ptr)
                served = tl.load(scale_ptr + 1) + 1
            if MAX_NORM is not None:
                sums = tl.zeros([4 * MAX_PROGRAMS], tl.float64)
                for first in range(0, before + chunks, 4 * MAX_PROGRAMS):
                    slots = first + tl.arange(0, 4 * MAX_PROGRAMS)
                    sums += tl.load(squares_ptr + slots, slots < before + chunks, other=0, cache_modifier=".cg")
                norm = tl.sqrt(tl.sum(sums, axis=0)) / scale + tl.full([], 1e-6, tl.float64)
                factor = tl.where(skip, factor, tl.minimum(tl.full([], MAX_NORM, tl.float64) / norm, factor))
            tl.debug_barrier()  # every thread has loaded all of these before one of them stores any
            tl.store(tally_ptr + NONFINITE, nonfinite)
            last: tl.constexpr = 4 if FORM == "critic" else 1 if FORM == "generator" else 0
            tl.store(stats_ptr + last, nonfinite.to(stats_ptr.dtype.element_ty))
            tl.store(tally_ptr + IN_A_ROW, row)
            tl.store(tally_ptr + SKIPPED, skipped)
            tl.store(tally_ptr + STEPS, step)
            tl.store(tally_ptr + LONGEST, longest)
            if skip:
                tl.store(tally_ptr + FIRST, tensors - reached)
                tl.store(tally_ptr + LAST, step)
            tl.store(gate_ptr, skip.to(tl.float32))
            if SCALED or MAX_NORM is not None:
                tl.store(gate_ptr + 1, factor / scale)
            if SCALED:
                grown = served >= GROWTH_INTERVAL
                halved, doubled = tl.maximum(0.5 * scale, LEAST_SCALE), tl.minimum(2 * scale, MOST_SCALE)
                tl.store(scale_ptr, tl.where(skip, halved, tl.where(grown, doubled, scale)))
                tl.store(scale_ptr + 1, tl.where(skip | grown, 0, served))


class Guard:
    """The launcher for one network, with the device tables it reuses."""

    def __init__(self) -> None:
        self._tables = Tables()

    def launch(
        self, gradients: Sequence[torch.Tensor], scores: tuple[torch.Tensor, ...], tally: torch.Tensor,
        gate: torch.Tensor, scale: torch.Tensor | None, max_norm: float | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Look at all gradients: one launch for each dtype among them. No gradient is empty; all are dense.

        ``scores`` are (real, fake), (fake,) or none. Returns [mean real, mean fake, mean real - mean fake, mean fake -
        mean real], [-mean fake] or nothing, with the number of elements that are not finite behind it. With a
        ``max_norm`` the gate's factor clips to it.
        """
        device, capture = tally.device, arrival.capturing(tally.device)
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, g in enumerate(gradients):
            by_dtype.setdefault(g.dtype, []).append(i)
        form = ("none", "generator", "critic")[len(scores)]
        with torch.cuda.device_of(tally):
            a, b = [x.resolve_neg().contiguous() for x in ((*scores, scores[-1])[:2] if scores else (gate, gate))]
            wide = accumulator(a.dtype) if scores else torch.float32
            stats = torch.empty({"critic": 5, "generator": 2, "none": 1}[form], dtype=wide, device=device)
            partial = torch.empty(2, MAX_PROGRAMS, dtype=wide, device=device) if scores else stats
            blocks = min(triton.cdiv(max(a.numel(), b.numel()), SCORES_BLOCK), MAX_PROGRAMS)
            squares, before = stats, 0
            if max_norm is not None:  # a place for each chunk, even of the smaller blocks
                squares = stats.new_empty(sum([triton.cdiv(g.numel(), BLOCK) for g in gradients]), dtype=torch.float64)
            for k, (dtype, members) in enumerate(by_dtype.items(), 1):
                own = [gradients[i] for i in members]
                block = LARGE_BLOCK if sum(map(torch.Tensor.numel, own)) >= LARGE else BLOCK
                rows, owners = self._tables.addresses(own, block, members, capture=capture)
                final = k == len(by_dtype)
                _guard_kernel[(max(owners.shape[0], blocks),)](
                    rows, owners, tally, gate, gate if scale is None else scale, a, b, stats, partial, squares,
                    zero(device, capture=capture), owners.shape[0], before, len(gradients), a.numel(), b.numel(),
                    DTYPE=triton_dtype(dtype), FORM=form if final else "none",
                    SCALED=scale is not None, FINAL=final, BLOCK=block, SCORES_BLOCK=SCORES_BLOCK,
                    MAX_PROGRAMS=MAX_PROGRAMS, MAX_NORM=max_norm, num_warps=8, enable_fp_fusion=True,
                )  # fmt: skip
                before += owners.shape[0]
        return stats
