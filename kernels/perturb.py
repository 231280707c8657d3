"""Gaussian noise on samples: out = x + scale * n, n ~ N(0, 1) drawn inside the kernel.

Arrays are [N, size] with dense samples; sample i takes the numbers of index offset + i, in the order in which its
elements lie in memory. Arithmetic is float32 (float64 for float64 input), but the scale is a float32 in any case. One
launch reads one array and writes one. A program handles one block of one sample.
"""

from ctypes import c_float

import torch
import triton
import triton.language as tl

from .layout import dense_samples
from .philox import normals

BLOCK = 2048


@triton.jit(do_not_specialize=["seed", "offset"])
def _perturb_kernel(
    x_ptr,  # [N, size]
    out_ptr,  # [N, size]
    offset_ptr,  # [1] int64, added to offset where OFFSET_ON_DEVICE
    scale_ptr,  # [1] float32, in place of scale where SCALE_ON_DEVICE
    seed: tl.int64,
    offset: tl.int64,
    scale: tl.float32,
    size,
    blocks,  # per sample
    OFFSET_ON_DEVICE: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    block = program % blocks
    index = sample + offset
    if OFFSET_ON_DEVICE:
        index += tl.load(offset_ptr)

    first = block * BLOCK
    places = (first // 4).to(tl.int32) + tl.arange(0, BLOCK // 4)
    lanes = tl.arange(0, BLOCK)  # 32-bit, which spares registers
    mask = lanes < size - first
    start = sample * size + first
    x = tl.load(x_ptr + start + lanes, mask)
    acc = tl.float64 if x.dtype == tl.float64 else tl.float32
    factor = tl.load(scale_ptr).to(acc) if SCALE_ON_DEVICE else tl.full([], scale, acc)
    noise = normals(seed, index, places, acc)
    tl.store(out_ptr + start + lanes, x.to(acc) + factor * noise, mask)


def perturb(x: torch.Tensor, scale: float | torch.Tensor, seed: int, offset: int | torch.Tensor) -> torch.Tensor:
    """Launch once; return x with noise, laid out like x.

    ``scale`` is a number or a one-element float32 tensor, ``offset`` an int or a one-element int64 tensor.
    """
    with torch.cuda.device_of(x):
        x = dense_samples(x)
        batch, size = x.shape[0], x[0].numel()
        out = torch.empty_like(x)
        offset_on_device, scale_on_device = isinstance(offset, torch.Tensor), isinstance(scale, torch.Tensor)
        block = min(max(triton.next_power_of_2(size), 4), BLOCK)
        blocks = triton.cdiv(size, block)
        _perturb_kernel[(batch * blocks,)](
            x, out, offset if offset_on_device else x, scale if scale_on_device else x, seed,
            0 if offset_on_device else offset, 0.0 if scale_on_device else c_float(scale).value, size, blocks,
            OFFSET_ON_DEVICE=offset_on_device, SCALE_ON_DEVICE=scale_on_device, BLOCK=block,
            num_warps=8 if x.dtype == torch.float64 else 4, enable_fp_fusion=True,
        )  # fmt: skip
    return out
