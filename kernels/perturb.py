"""Gaussian noise on samples: out = x + scale * n, n ~ N(0, 1) drawn inside the kernel.

One array, or two one after the other: real and fake samples come out as the one batch that the critic scores. Arrays
are [N, size] with dense samples; sample i takes the numbers of index offset + i, in the order in which its elements lie
in memory. One array, the first of two, and the second have streams of their own. Arithmetic is float32 (float64 for
float64 input), but the scale is a float32 in any case. One launch reads each array once and writes as much. A program
handles one block of one sample.
"""

from ctypes import c_float

import torch
import triton
import triton.language as tl

from .layout import dense_samples
from .philox import STREAM, normals

BLOCK = 2048


@triton.jit(do_not_specialize=["seed", "offset", "batch"])
def _perturb_kernel(
    x_ptr,  # [N, size]
    y_ptr,  # [N, size], where there is a second array
    out_ptr,  # [N, size] or [2 N, size]
    offset_ptr,  # [1] int64, added to offset where OFFSET_ON_DEVICE
    scale_ptr,  # [1] float32, in place of scale where SCALE_ON_DEVICE
    seed: tl.int64,
    offset: tl.int64,
    scale: tl.float32,
    batch: tl.int64,  # N
    size,
    blocks,  # per sample
    STREAM: tl.constexpr,
    OFFSET_ON_DEVICE: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    block = program % blocks
    second = row >= batch
    sample = tl.where(second, row - batch, row)
    index = sample + offset
    if OFFSET_ON_DEVICE:
        index += tl.load(offset_ptr)

    first = block * BLOCK
    places = (first // 4).to(tl.int32) + tl.arange(0, BLOCK // 4)
    lanes = tl.arange(0, BLOCK)  # 32-bit, which spares registers
    mask = lanes < size - first
    in_ptr = tl.where(second, y_ptr, x_ptr) + sample * size + first
    x = tl.load(in_ptr + lanes, mask)
    acc = tl.float64 if x.dtype == tl.float64 else tl.float32
    factor = tl.load(scale_ptr).to(acc) if SCALE_ON_DEVICE else tl.full([], scale, acc)
    noise = normals(seed, index, places, STREAM + second.to(tl.int32), acc)
    tl.store(out_ptr + row * size + first + lanes, x.to(acc) + factor * noise, mask)


def perturb(
    x: torch.Tensor, y: torch.Tensor | None, scale: float | torch.Tensor, seed: int, offset: int | torch.Tensor
) -> torch.Tensor:
    """Launch once; return x with noise [N, ...], or x and y with it [2 N, ...], laid out as x.

    ``scale`` is a number or a one-element float32 tensor, ``offset`` an int or a one-element int64 tensor.
    """
    with torch.cuda.device_of(x):
        x = dense_samples(x)
        if y is not None:
            y = dense_samples(y)
            if x.stride() != y.stride():
                x, y = x.contiguous(), y.contiguous()
        batch, size = x.shape[0], x[0].numel()
        rows = batch if y is None else 2 * batch
        last = not x.is_contiguous()
        out = torch.empty(
            (rows, *x.shape[1:]), dtype=x.dtype, device=x.device,
            memory_format=(torch.channels_last if x.dim() == 4 else torch.channels_last_3d) if last
            else torch.contiguous_format,
        )  # fmt: skip
        offset_on_device, scale_on_device = isinstance(offset, torch.Tensor), isinstance(scale, torch.Tensor)
        block = min(max(triton.next_power_of_2(size), 4), BLOCK)
        blocks = triton.cdiv(size, block)
        _perturb_kernel[(rows * blocks,)](
            x, x if y is None else y, out, offset if offset_on_device else x, scale if scale_on_device else x, seed,
            0 if offset_on_device else offset, 0.0 if scale_on_device else c_float(scale).value, batch, size, blocks,
            STREAM=STREAM + (1 if y is None else 2), OFFSET_ON_DEVICE=offset_on_device, SCALE_ON_DEVICE=scale_on_device,
            BLOCK=block, num_warps=8 if x.dtype == torch.float64 else 4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
