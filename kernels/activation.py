"""A layer's bias, rectifier and dropout, in place, in one launch.

    h = f * rectify(z + bias),  rectify(z) = z if z > 0 else slope * z
    delta = seeds top^T * s,    s = f * (1 if z + bias > 0 else slope)

f are dropout's factors: 0, and 1 / kept where it keeps an element. ``delta``, where it is asked for, is the gradient at
z of scores h top^T whose gradients are ``seeds``: what a last layer with one output sends back, without a product.

Arrays are [rows, columns], contiguous. Arithmetic is float32 (float64 for float64). Each array is read and written
once: 8 bytes a float32 element for h, and 4 for f and for delta.
"""

import torch
import triton
import triton.language as tl

from .layout import accumulator, triton_dtype

BLOCK = 1024


@triton.jit
def _activation_kernel(
    z_ptr,  # [rows, columns], where h is written
    bias_ptr,  # [columns], where BIAS
    factors_ptr,  # [rows, columns], where DROPS
    seeds_ptr,  # [rows], where SEEDED, as what follows
    top_ptr,  # [columns]
    delta_ptr,  # [rows, columns]
    rows, columns,
    SLOPE: tl.constexpr, BIAS: tl.constexpr, DROPS: tl.constexpr, SEEDED: tl.constexpr, acc: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program, across = tl.program_id(0), tl.cdiv(columns, COLUMNS)
    row = ((program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (program % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    at, inside = row * columns + column, (row < rows) & (column < columns)
    h = tl.load(z_ptr + at, inside, other=0).to(acc)
    if BIAS:
        h += tl.load(bias_ptr + column, column < columns, other=0).to(acc)
    s = tl.full(h.shape, 1, acc)
    if SLOPE == 0:
        s = tl.where(h <= 0, 0, s)  # 1 at NaN, as PyTorch has it
        h = tl.maximum(h, 0, propagate_nan=tl.PropagateNan.ALL)  # not 0 * h, which is NaN for an infinity
    elif SLOPE != 1:
        s = tl.where(h > 0, s, SLOPE * s)
        h = tl.where(h > 0, h, SLOPE * h)
    if DROPS:
        f = tl.load(factors_ptr + at, inside, other=0).to(acc)
        s, h = s * f, h * f
    if SEEDED:
        seeds = tl.load(seeds_ptr + row, row < rows, other=0).to(acc)
        top = tl.load(top_ptr + column, column < columns, other=0).to(acc)
        tl.store(delta_ptr + at, seeds * top * s, inside)
    tl.store(z_ptr + at, h, inside)


def activate_(
    z: torch.Tensor, bias: torch.Tensor | None, factors: torch.Tensor | None, slope: float,
    seeds: torch.Tensor | None = None, top: torch.Tensor | None = None,
) -> torch.Tensor | None:  # fmt: skip
    """Launch once on contiguous z, [rows, columns]; return delta where there are ``seeds`` [rows, 1], else None."""
    rows, columns = z.shape
    across = min(triton.next_power_of_2(columns), BLOCK)
    down = BLOCK // across
    delta = None if seeds is None else torch.empty_like(z)
    arrays = [z if x is None else x.contiguous() for x in (z, bias, factors, seeds, top, delta)]
    with torch.cuda.device_of(z):
        _activation_kernel[(triton.cdiv(rows, down) * triton.cdiv(columns, across),)](
            *arrays, rows, columns, SLOPE=slope, BIAS=bias is not None, DROPS=factors is not None,
            SEEDED=seeds is not None, acc=triton_dtype(accumulator(z.dtype)), ROWS=down, COLUMNS=across, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return delta
