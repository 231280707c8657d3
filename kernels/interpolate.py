"""WGAN-GP's interpolates: out[i] = fake[i] + eps[i] * (real[i] - fake[i]), eps[i] = uniform(seed, offset + i).

Arrays are [N, size] with dense samples. Arithmetic is float32 (float64 for float64 input). One launch reads two arrays
and writes one, and eps [N] for the backward pass. A program handles one block of one sample and draws one number.
"""

import torch
import triton
import triton.language as tl

from .layout import dense_samples
from .philox import uniform

BLOCK = 2048


@triton.jit(do_not_specialize=["seed", "offset"])
def _interpolate_kernel(
    real_ptr,  # [N, size]
    fake_ptr,  # [N, size]
    out_ptr,  # [N, size]
    eps_ptr,  # [N] float32
    offset_ptr,  # [1] int64, added to offset where OFFSET_ON_DEVICE
    seed: tl.int64,
    offset: tl.int64,
    size,
    blocks,  # per sample
    OFFSET_ON_DEVICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    block = program % blocks
    index = sample + offset
    if OFFSET_ON_DEVICE:
        index += tl.load(offset_ptr)
    eps = uniform(seed, index)
    if block == 0:
        tl.store(eps_ptr + sample, eps)

    first = block * BLOCK
    lanes = tl.arange(0, BLOCK)  # 32-bit, which spares registers
    mask = lanes < size - first
    start = sample * size + first
    real = tl.load(real_ptr + start + lanes, mask)
    fake = tl.load(fake_ptr + start + lanes, mask)
    acc = tl.float64 if real.dtype == tl.float64 else tl.float32
    real, fake = real.to(acc), fake.to(acc)
    tl.store(out_ptr + start + lanes, fake + eps.to(acc) * (real - fake), mask)


def interpolate(
    real: torch.Tensor, fake: torch.Tensor, seed: int, offset: int | torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch once; return (out like fake, eps [N] float32). ``offset`` is an int or a one-element int64 tensor.

    ``out`` may be given, contiguous, for samples that are.
    """
    with torch.cuda.device_of(fake):
        real, fake = dense_samples(real), dense_samples(fake)
        if real.stride() != fake.stride():
            real, fake = real.contiguous(), fake.contiguous()
        batch, size = fake.shape[0], fake[0].numel()
        out = torch.empty_like(fake) if out is None else out
        eps = torch.empty(batch, dtype=torch.float32, device=fake.device)
        on_device = isinstance(offset, torch.Tensor)
        block = min(triton.next_power_of_2(size), BLOCK)
        blocks = triton.cdiv(size, block)
        _interpolate_kernel[(batch * blocks,)](
            real, fake, out, eps, offset if on_device else eps, seed, 0 if on_device else offset, size, blocks,
            OFFSET_ON_DEVICE=on_device, BLOCK=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, eps
