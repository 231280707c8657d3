"""Rows of any number of tensors projected onto a ball, in place, in one launch.

    n = ||w||_2,  w = w * min(1, bound / n)

A row is a slice along a tensor's first dimension, or the whole tensor. Arithmetic is float32 (float64 for float64
tensors); where squares leave its range, a row is scaled by a power of two first. A row within the bound, and one with
NaN or an infinity, which has no projection, is left bit for bit. The gate says whether to do nothing at all.

Each row is read once from memory, a second time from cache where it lies outside, and only then written: 4 to 8 bytes
per float32 parameter. One program handles one row; of rows of one element, as vectors have them, a block. The last
program to arrive writes the share of rows that lay on their bound or outside.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import table
from .arithmetic import divide, sqrt
from .arrival import is_last, store_share, zero
from .layout import accumulator, triton_dtype
from .table import Tables

MIN_BLOCK = 1024
MAX_BLOCK = 8192  # longer rows are read in blocks of so many: 16 elements per thread with 16 warps


@triton.jit
def _project_elements(
    entry_ptr, start, numel, BOUND: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Project a block of rows of one element; return how many lay on their bound or outside."""
    lanes = tl.arange(0, BLOCK)
    mask = lanes < numel - start
    w_ptr = table.pointers(entry_ptr, table.PARAM, start, lanes, DTYPE, False)
    w = tl.load(w_ptr, mask).to(ACC)
    norms = tl.abs(w)
    finite = norms < float("inf")
    bound = tl.full([BLOCK], BOUND, ACC)
    tl.store(w_ptr, tl.where(w < 0, -bound, bound).to(DTYPE), mask & finite & (norms > bound))
    return tl.sum((mask & finite & (norms >= bound)).to(tl.int32), axis=0)


@triton.jit
def _square(w_ptr, lanes, size, scale, BLOCK: tl.constexpr):
    """The squared norm of scale * w."""
    squares = tl.zeros([BLOCK], scale.dtype)
    for column in range(0, size, BLOCK):
        left = tl.minimum(size - column, BLOCK).to(tl.int32)  # 32-bit, as the lanes are, which spares registers
        w = scale * tl.load(w_ptr + column, lanes < left, other=0).to(scale.dtype)
        squares += w * w
    return tl.sum(squares, axis=0)


@triton.jit
def _project_row(
    entry_ptr, row, size, BOUND: tl.constexpr, DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Project one row of a tensor; return 1 if it lay on its bound or outside, else 0.

    ALIGNED: every row begins and ends at a multiple of 16 bytes, for 128-bit accesses.
    """
    least: tl.constexpr = 2.0**-800 if ACC.primitive_bitwidth == 64 else 2.0**-100  # below, squares have lost digits
    shift: tl.constexpr = 2.0**600 if ACC.primitive_bitwidth == 64 else 2.0**90
    if ALIGNED:
        width: tl.constexpr = 128 // DTYPE.primitive_bitwidth
        size = size // width * width  # the same number, in a form that shows the compiler its factor
    lanes = tl.arange(0, BLOCK)
    w_ptr = table.pointers(entry_ptr, table.PARAM, row * size, lanes, DTYPE, ALIGNED)
    scale = tl.full([], 1, ACC)
    square = _square(w_ptr, lanes, size, scale, BLOCK)
    if (square == float("inf")) | (square < least):
        scale = tl.where(square < least, tl.full([], shift, ACC), tl.full([], 1 / shift, ACC))
        square = _square(w_ptr, lanes, size, scale, BLOCK)
    root = sqrt(square)
    norm = divide(root, scale)
    finite = root < float("inf")
    bound = tl.full([], BOUND, ACC)  # in a comparison the constant would be a float32
    if finite & (norm > bound):
        inverse = divide(tl.full([], 1, ACC), root)
        for column in range(0, size, BLOCK):
            left = tl.minimum(size - column, BLOCK).to(tl.int32)
            w = scale * tl.load(w_ptr + column, lanes < left, other=0).to(ACC)
            tl.store(w_ptr + column, (w * inverse * bound).to(DTYPE), lanes < left)
    return (finite & (norm >= bound)).to(tl.int32)


@triton.jit(do_not_specialize=["rows"])
def _project_kernel(
    table_ptr,  # [tensors, table.COLUMNS] int64: HYPER_ROW is the size of a tensor's rows
    owner_ptr,  # [chunks] int32, the tensor each program works on
    gate_ptr,  # [2] float64
    count_ptr,  # [1] int64, zero between launches
    share_ptr,  # [1] float32
    counter_ptr,  # [1] int32
    rows: tl.int64,  # of all tensors
    BOUND: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,  # what norms are computed in
    BLOCK: tl.constexpr,
):
    skip = tl.load(gate_ptr) != 0
    program = tl.program_id(0).to(tl.int64)
    entry_ptr = table_ptr + tl.load(owner_ptr + program).to(tl.int64) * table.COLUMNS
    chunk = program - tl.load(entry_ptr + table.FIRST_CHUNK)
    size = tl.where(skip, 0, tl.load(entry_ptr + table.HYPER_ROW))
    whole = size % (128 // DTYPE.primitive_bitwidth) == 0
    part: tl.constexpr = BLOCK // 4  # where each element has a pointer of its own, which takes registers
    if size == 1:
        numel = tl.load(entry_ptr + table.NUMEL)
        on_bound = _project_elements(entry_ptr, chunk * part, numel, BOUND, DTYPE, ACC, part)
    elif (tl.load(entry_ptr + table.ALIGNED) != 0) & whole:
        on_bound = _project_row(entry_ptr, chunk, size, BOUND, DTYPE, ACC, BLOCK, True)
    else:
        on_bound = _project_row(entry_ptr, chunk, size, BOUND, DTYPE, ACC, part, False)
    tl.atomic_add(count_ptr, on_bound.to(tl.int64), sem="relaxed")  # an integer, so the order cannot matter

    if is_last(counter_ptr):
        store_share(share_ptr, count_ptr, rows, skip)


class Project:
    """The launcher for one (device, dtype) group of tensors on one stream, with the device tables it reuses."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype, self._acc = triton_dtype(dtype), triton_dtype(accumulator(dtype))
        self._tables = Tables()
        self._open = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)

    def launch(
        self, params: Sequence[torch.Tensor], sizes: Sequence[int], bound: float, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Launch once, in place; return the share of rows on their bound (0-d float32; NaN if nothing was done).

        No tensor is empty; each has dense rows of its ``sizes`` elements, in order. ``gate`` is guard.py's; None is 0.
        """
        with torch.cuda.device_of(params[0]):
            block = min(max(triton.next_power_of_2(max(sizes)), MIN_BLOCK), MAX_BLOCK)
            chunks = [block // 4 if size == 1 else size for size in sizes]
            entries, owners = self._tables.addresses(params, chunks, sizes)
            rows = sum(p.numel() // size for p, size in zip(params, sizes, strict=True))
            share = torch.empty((), dtype=torch.float32, device=params[0].device)
            _project_kernel[(owners.shape[0],)](
                entries, owners, self._open if gate is None else gate, zero(params[0].device, torch.int64), share,
                zero(params[0].device), rows, BOUND=bound, DTYPE=self._dtype, ACC=self._acc, BLOCK=block,
                num_warps=min(max(block * self._acc.primitive_bitwidth // 16384, 4), 16),  # 64 bytes of it per thread
                enable_fp_fusion=True,
            )  # fmt: skip
        return share
