"""Samples with random numbers that are drawn inside the launch: noise, and interpolates."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastwgan import checks, reference
from fastwgan.backend import Backend, Resolved, kernels, resolve
from fastwgan.ops.autograd import Op, OpWithSlopes, apply


class _Perturb(Op):
    @staticmethod
    def forward(x: Tensor, scale: float | Tensor, seed: int, offset: int | Tensor) -> Any:
        return kernels.perturb.perturb(x, scale, seed, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


def perturb(
    x: Tensor, *, scale: float | Tensor, seed: int, offset: int | Tensor = 0, backend: Backend = "auto"
) -> Tensor:
    """Return x + scale * n with normal numbers n, drawn inside the launch: instance noise, or DRAGAN's points.

    The result is shaped and typed like ``x``, differentiable in it, and laid out like it where that is contiguous or
    channels_last. The noise goes by the place of an element in memory, so for channels_last it is another than for
    contiguous samples; all other layouts have that of contiguous ones.
    Source: DRAGAN, arXiv 1705.07215, equation 3; instance noise: arXiv 1701.04862.

    Args:
        x: samples [N, ...].
        scale: standard deviation of the noise, >= 0, in the samples' units; a number or a one-element float32 tensor.
        seed, offset: sample i has the noise of (seed, offset + i); ints in [0, 2^63). ``offset`` may be a one-element
            int64 tensor on the samples' device, which a CUDA graph reads anew at each replay.
        backend: see :mod:`fastwgan.backend`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    >>> perturb(torch.zeros(2, 3), scale=0.1, seed=0).shape
    torch.Size([2, 3])
    """
    checks.samples("x", x)
    checks.seed("seed", seed)
    offset = checks.offset(offset, x.device)
    if isinstance(scale, Tensor):
        if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != x.device:
            got = f"{scale.dtype} of shape {tuple(scale.shape)} on {scale.device}"
            raise ValueError(f"scale: expected one float32 element on {x.device}, got {got}")
        scale = scale.detach().reshape(())
    else:
        checks.number("scale", scale, minimum=0)
    if resolve(backend, x.device) == "torch":
        return reference.perturb(x, scale=scale, seed=seed, offset=offset)
    return apply(_Perturb, x, scale, seed, offset)


AT_ONCE = 1024  # numbers of a stream that are made together on a CPU, where a call on few takes longer than they do


@lru_cache(4)
def _uniform(seed: int, block: int) -> Tensor:
    """Return :func:`fastwgan.reference.uniform`'s numbers of a block of AT_ONCE, by NumPy."""
    index = np.arange(block * AT_ONCE, (block + 1) * AT_ONCE, dtype=np.int64)
    return torch.from_numpy(reference.words(seed, index, 0, reference.STREAM)[0] >> 8).float() * 2.0**-24


class _Interpolate(OpWithSlopes):
    @staticmethod
    def forward(real: Tensor, fake: Tensor, seed: int, offset: int | Tensor) -> tuple[Tensor, Tensor]:
        return kernels.interpolate.interpolate(real, fake, seed, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        OpWithSlopes.setup_context(ctx, (), output)  # a backward pass needs no samples

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return None, None, None, None
        eps = ctx.saved_tensors[0].view(-1, *[1] * (grad.dim() - 1))
        real_grad = (grad * eps).to(grad.dtype) if ctx.needs_input_grad[0] else None
        fake_grad = (grad * (1 - eps)).to(grad.dtype) if ctx.needs_input_grad[1] else None
        return real_grad, fake_grad, None, None


def interpolate(
    real: Tensor, fake: Tensor, *, seed: int, offset: int | Tensor = 0, backend: Backend = "auto"
) -> Tensor:
    """Return fake + eps * (real - fake), differentiable in both, with one eps in [0, 1) per sample.

    ``real`` and ``fake`` are samples [N, ...] of one shape, dtype and device, which the result has, too. Sample i has
    the eps of (``seed``, ``offset`` + i), as :func:`perturb` has it, drawn inside the launch; it is bit-identical in
    both backends. Source: WGAN-GP, arXiv 1704.00028, Algorithm 1, line 6.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, is empty, or does not match.

    >>> interpolate(torch.ones(2, 1), torch.zeros(2, 1), seed=0).shape
    torch.Size([2, 1])
    """
    real, fake = checks.pair("real", real, "fake", fake)
    checks.samples("fake", fake)
    checks.seed("seed", seed)
    offset = checks.offset(offset, fake.device)
    if resolve(backend, fake.device) == "torch":
        return interpolates(real, fake, seed, offset, "torch")
    return apply(_Interpolate, real, fake, seed, offset)


def interpolates(
    real: Tensor, fake: Tensor, seed: int, offset: int | Tensor, backend: Resolved, out: Tensor | None = None
) -> Tensor:
    """Return :func:`interpolate` of samples that match, with no graph from a launch. For the trainer."""
    if backend == "triton":
        return kernels.interpolate.interpolate(real, fake, seed, offset, out)[0]
    eps, n = None, len(fake)
    on_cpu = fake.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and n <= AT_ONCE and not isinstance(offset, Tensor) and offset < 2**62:
        first, start = divmod(offset, AT_ONCE)
        blocks = [_uniform(seed, first + i) for i in range(1 + (start + n > AT_ONCE))]
        eps = (torch.cat(blocks) if len(blocks) > 1 else blocks[0])[start : start + n]
    x = reference.interpolate(real, fake, seed=seed, offset=offset, eps=eps)
    return x if out is None else out.copy_(x)
