"""The gradient penalty, and the critic's input gradient that it is of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastwgan import checks, reference
from fastwgan.backend import Backend, Resolved, kernels, resolve, wide
from fastwgan.ops.autograd import OpWithSlopes, apply
from fastwgan.ops.calls import call_module, changed_tensors, empty_buffers, rebind_buffers
from fastwgan.ops.rectifiers import LinearPieces
from fastwgan.ops.samples import interpolate

WRITES = "critic: expected a forward pass that writes to neither its input nor its parameters, got one that does"
NO_DEPENDENCE = "critic: expected scores that depend on its input, got scores that do not"


def packed(x: Tensor, pack: int) -> Tensor:
    """Return samples [N, ...] as packs [N / pack, pack, ...]."""
    return x if pack == 1 else x.reshape(-1, pack, *x.shape[1:])


class _Penalty(OpWithSlopes):
    @staticmethod
    def forward(gradients: Tensor, kind: str, target: float, differentiable: bool) -> tuple[Tensor, Tensor]:
        # Wide, as the gradient that comes in may be large (a loss scale) where the cotangent is small.
        dtype = wide(gradients.dtype) if differentiable else None
        loss, _, cotangent = kernels.penalty.gradient_penalty(gradients, kind, target, 1.0, dtype)
        return loss, cotangent

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        gradients, cotangent = ctx.saved_tensors
        # In PyTorch for a graph, which the kernel's result lacks, and where vmap hid requires_grad from the launch.
        if torch.is_grad_enabled() or not cotangent.numel():
            x, (kind, target, _) = gradients.to(wide(gradients.dtype)), ctx.options
            cotangent = reference.penalty_cotangent(x, kind=kind, target=target)[1]
        return (grad * cotangent).to(gradients.dtype), None, None, None


def penalty(gradients: Tensor, *, kind: str = "two-sided", target: float = 1.0, backend: Backend = "auto") -> Tensor:
    """Return the mean over samples of a function of the gradient's norm n, taken over all of a sample's dimensions.

    It is a 0-d tensor, float32 or wider; its gradient has the dtype of ``gradients``, and is 0 at n = 0.
    Source: WGAN-GP, arXiv 1704.00028, equation 3; WGAN-LP, 1709.08894; R1, 1801.04406; WGAN-div, 1712.01026.

    Args:
        gradients: d critic / d input, [N, ...].
        kind: "two-sided" (n - target)^2, "one-sided" max(n - target, 0)^2, "zero-centered" n^2 or "power" n^6.
        target: the norm wanted, >= 0; used by the first two kinds.
        backend: see :mod:`fastwgan.backend`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    >>> penalty(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor(8.)
    """
    gradients = checks.samples("gradients", gradients)
    kind, target = checks.penalty(kind, target)
    if resolve(backend, gradients.device) == "torch":
        return reference.penalty(gradients, kind=kind, target=target)
    return apply(_Penalty, gradients, kind, target, torch.is_grad_enabled() and gradients.requires_grad)


def penalty_cotangent(
    gradients: Tensor, kind: str, target: float, weight: float, backend: Resolved
) -> tuple[Tensor, Tensor]:
    """Return :func:`fastwgan.reference.penalty_cotangent`'s two without a graph, by one launch. For the trainer."""
    gradients = gradients.detach()
    if backend == "torch":
        rows, dtype = gradients.reshape(gradients.shape[0], -1), wide(gradients.dtype)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)  # without a graph there is no care to be taken at 0
        return reference.penalty_cotangent(gradients, kind=kind, target=target, weight=weight, norms=norms)
    return kernels.penalty.gradient_penalty(gradients, kind, target, weight, gradients.dtype)[1:]


def input_gradient(
    critic: Callable[..., Tensor], x: Tensor, args: tuple[Any, ...],
    ones_like: Callable[[Tensor], Tensor] = torch.ones_like, pack: int = 1,
) -> Tensor:  # fmt: skip
    """Return d sum(critic(x, *args)) / dx, [N, ...], with a graph.

    Raise ValueError for a critic that does not give scores for each of the N samples, writes to ``x``, or gives scores
    that do not depend on ``x`` (which is not seen inside torch.compile: the gradient is zero then).
    """
    if torch.compiler.is_compiling():
        if not isinstance(critic, nn.Module):
            return traced_input_gradient(lambda x, _: critic(x, *args), x, {}, pack)
        given, rest, empty = dict(critic.named_buffers()), dict(critic.named_buffers()), empty_buffers(critic)
        gradient = traced_input_gradient(lambda x, own: call_module(critic, {}, own, (x, *args), empty), x, rest, pack)
        rebind_buffers(critic, changed_tensors(given, rest))
        return gradient
    try:
        with LinearPieces(), sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have no second derivative
            scores = checks.scores("critic", critic(x, *args), x.shape[0], pack)
    except RuntimeError as error:
        if "leaf Variable" in str(error):
            raise ValueError(WRITES) from error
        raise
    if scores.requires_grad:
        (g,) = torch.autograd.grad(scores, x, ones_like(scores), create_graph=True, allow_unused=True)
        if g is not None:
            return g
    raise ValueError(NO_DEPENDENCE)


def traced_input_gradient(
    forward: Callable[[Tensor, dict[str, Tensor]], Tensor], x: Tensor, buffers: dict[str, Tensor], pack: int = 1,
    scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return d sum(forward(x, buffers)) / dx, [N, ...], inside torch.compile; it is computed times ``scale``, if any.

    Dynamo traces torch.func.grad, and the compiler then differentiates the result as it does any function. What
    ``forward`` writes to must be an argument of the function that is differentiated: so ``buffers`` are, and updated.
    """

    def total(x: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        buffers = dict(given)
        with LinearPieces(), sdpa_kernel(SDPBackend.MATH):
            scores = forward(x, buffers)
        scores = checks.scores("critic", scores, len(x), pack)
        value = scores.sum() if scale is None else scores.float().sum() * (scale * pack / len(x))
        return value, changed_tensors(given, buffers)

    gradient: Tensor
    gradient, rebound = torch.func.grad(total, has_aux=True)(x, buffers)
    buffers.update(rebound)
    return gradient if scale is None else gradient / (scale * pack / len(x))


def gradient_penalty(
    critic: Callable[..., Tensor], real: Tensor, fake: Tensor, *, weight: float = 10.0, kind: str = "two-sided",
    target: float = 1.0, pack: int = 1, seed: int | None = None, args: tuple[Any, ...] = (), backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Return WGAN-GP's term of the critic's loss: weight * penalty(d critic / dx) at random interpolates x.

    It is 0-d, float32 or wider, with a graph, even in ``no_grad``, to the critic's parameters, not to the samples.
    Source: WGAN-GP, arXiv 1704.00028, Algorithm 1, lines 6 and 7.

    Args:
        critic: maps samples [N, ...] (and ``args``) to scores [N, ...].
        real, fake: samples [N, ...] of one shape, dtype and device.
        weight: lambda, >= 0.
        kind, target: see :func:`penalty`.
        pack: how many consecutive samples get one score, one random number, and one norm together (PacGAN, CTGAN).
        seed: the seed of eps, or None to draw anew from PyTorch's CPU generator; inside torch.compile, which cannot
            read numbers back, from the device's.
        args: further positional arguments of the critic, such as labels.
        backend: see :mod:`fastwgan.backend`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or the critic's scores do not
            depend on its input.

    >>> gradient_penalty(torch.nn.Linear(2, 1), torch.randn(4, 2), torch.randn(4, 2)).shape
    torch.Size([])
    """
    if not callable(critic):
        raise TypeError(f"critic: expected a callable, got {type(critic).__name__}")
    checks.number("weight", weight, minimum=0)
    checks.penalty(kind, target)
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args: expected a tuple of arguments, got {type(args).__name__}")
    real, fake = checks.pair("real", real, "fake", fake)  # before a seed is drawn
    if len(real) % checks.count("pack", pack):
        raise ValueError(f"real: expected a multiple of pack={pack} samples, got {len(real)}")
    offset: int | Tensor = 0
    if seed is None and torch.compiler.is_compiling():
        seed, offset = 0, torch.randint(2**62, (), device=fake.device)  # anywhere in one stream
    elif seed is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    with torch.enable_grad():
        packs = [packed(x.detach(), pack) for x in (real, fake)]
        x = interpolate(*packs, seed=seed, offset=offset, backend=backend).view(real.shape)
        if not torch.compiler.is_compiling():
            x.requires_grad_()
        gradients = packed(input_gradient(critic, x, args, pack=pack), pack)
        return weight * penalty(gradients, kind=kind, target=target, backend=backend)
