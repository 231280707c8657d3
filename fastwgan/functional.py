"""The public ops: each checks its arguments, picks a backend, launches once and differentiates.

Every op takes ``backend="auto" | "triton" | "torch"`` (see :mod:`fastwgan.backend`); the torch backend is
:mod:`fastwgan.reference`. First derivatives come out of the launch or cost one elementwise op; asked for a graph
(``create_graph=True``), a backward pass is made of differentiable PyTorch ops, so derivatives of any order are right.
They compose with ``torch.func`` (``grad``, ``vjp``, ``jacrev``, ``vmap``), except that the Triton backend has no
forward mode: PyTorch raises NotImplementedError then. Inside ``torch.compile``, with ``fullgraph=True`` too, they are
their plain PyTorch form, which the compiler fuses with what stands round them. Under autocast, where a network gives
another dtype than it gets, two samples or scores of different dtypes are promoted as PyTorch's own ops promote them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastwgan import reference
from fastwgan.backend import DTYPES, Backend, kernels, resolve
from fastwgan.rectifiers import LinearPieces

PENALTY_KINDS = ("two-sided", "one-sided", "zero-centered", "power")
WRITES = "critic: expected a forward pass that writes to neither its input nor its parameters, got one that does"
NO_DEPENDENCE = "critic: expected scores that depend on its input, got scores that do not"

__all__ = [
    "clip_norms_",
    "clip_weights_",
    "critic_loss",
    "generator_loss",
    "gradient_penalty",
    "hinge_critic_loss",
    "interpolate",
    "penalty",
    "perturb",
    "wasserstein_loss",
]


# Checks


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")
    if x.numel() == 0:
        raise ValueError(f"{name}: expected at least one element, got shape {tuple(x.shape)}")


def check_samples(name: str, x: object, device: torch.device) -> None:
    """Raise unless ``x`` is a floating tensor [N, ...] on ``device``."""
    _check_tensor(name, x)
    assert isinstance(x, Tensor)
    if x.dim() == 0:
        raise ValueError(f"{name}: expected shape [N, ...], got a 0-d tensor")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor, *, shape: bool) -> None:
    """Raise unless ``x`` has the other's dtype and device, and its shape where ``shape``."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other_name}'s dtype {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name}: expected {other_name}'s device {other.device}, got {x.device}")
    if shape and x.shape != other.shape:
        raise ValueError(f"{name}: expected {other_name}'s shape {tuple(other.shape)}, got {tuple(x.shape)}")


def _promoted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one dtype under autocast, where networks give another than they get, as PyTorch's ops have it."""
    if a.dtype != b.dtype and torch.is_autocast_enabled(a.device.type):
        dtype = torch.promote_types(a.dtype, b.dtype)
        return a.to(dtype), b.to(dtype)
    return a, b


def _checked_scores(real_scores: object, fake_scores: object) -> tuple[Tensor, Tensor]:
    _check_tensor("real_scores", real_scores)
    _check_tensor("fake_scores", fake_scores)
    assert isinstance(real_scores, Tensor)
    assert isinstance(fake_scores, Tensor)
    real_scores, fake_scores = _promoted(real_scores, fake_scores)
    check_like("fake_scores", fake_scores, "real_scores", real_scores, shape=False)
    return real_scores, fake_scores


def check_number(name: str, value: object, *, minimum: float, exclusive: bool = False) -> float:
    """``value`` as a finite float not below ``minimum`` (above it where ``exclusive``), or an error naming it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not minimum <= value < math.inf or (exclusive and value == minimum):
        raise ValueError(f"{name}: expected a finite number {'>' if exclusive else '>='} {minimum:g}, got {value}")
    return float(value)


def check_penalty(kind: object, target: object) -> None:
    """Raise unless ``kind`` is one of PENALTY_KINDS and ``target`` a finite number >= 0."""
    if kind not in PENALTY_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, PENALTY_KINDS))}, got {kind!r}")
    check_number("target", target, minimum=0)


def check_seed(name: str, seed: object) -> None:
    """Raise unless ``seed`` is an int in [0, 2^63)."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name}: expected an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name}: expected an int in [0, 2**63), got {seed}")


def _check_offset(offset: object, device: torch.device) -> int | Tensor:
    """``offset`` as an int or a 0-d tensor, or an error naming it."""
    if not isinstance(offset, Tensor):
        check_seed("offset", offset)
        return offset  # type: ignore[return-value]
    if offset.dtype != torch.int64 or offset.numel() != 1 or offset.device != device:
        got = f"{offset.dtype} {tuple(offset.shape)} on {offset.device}"
        raise ValueError(f"offset: expected one int64 element on {device}, got {got}")
    return offset.reshape(())


def _apply(function: Any, *args: Any) -> Any:
    """``function.apply(*args)``, which PyTorch leaves untyped."""
    return function.apply(*args)


class _Op(torch.autograd.Function):
    """A differentiable launch. Under torch.func.vmap it launches once for each element of the batch."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        elements = [
            _apply(cls, *(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(elements[0], tuple):
            return tuple(map(torch.stack, zip(*elements, strict=True))), (0,) * len(elements[0])
        return torch.stack(elements), 0


# Scores


class _LinearLoss(_Op):
    """Take mean(b) - mean(a), the critic's loss on real and fake scores; of a alone -mean(a), the generator's."""

    @staticmethod
    def forward(a: Tensor, b: Tensor | None) -> Any:
        return kernels.scores.mean_scores("generator" if b is None else "critic", a, a if b is None else b)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
        ctx.shapes, ctx.dtype = [x.shape for x in inputs if x is not None], inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        signs = zip((-1, 1), ctx.shapes, strict=False)
        a, *b = ((grad / (sign * shape.numel())).to(ctx.dtype).expand(shape) for sign, shape in signs)
        return a, b[0] if b else None


class _BlendedLoss(_Op):
    """The loss on scores ``a`` and, for the critic, ``b``: shapes of both, flat in the kernel."""

    @staticmethod
    def forward(a: Tensor, b: Tensor | None, blend: float, drift: float, differentiable: bool) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        loss, _, slopes = kernels.objective.objective(a, b, blend, drift, slopes=wide if differentiable else None)
        return loss, slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        a, b, ctx.blend, ctx.drift, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, b, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        a, b, slopes = ctx.saved_tensors
        # A graph is asked for, and the kernel's slopes have none; or it has made none, as vmap hides requires_grad.
        if torch.is_grad_enabled() or slopes.numel() == 0:
            parts = [reference.score_slopes(a, -1, blend=ctx.blend, drift=ctx.drift, weight=1.0)]
            if b is not None:
                parts.append(reference.score_slopes(b, 1, blend=ctx.blend, drift=0.0, weight=1.0))
        else:
            parts = list(torch.split(slopes, [a.numel(), slopes.numel() - a.numel()]))
        grads = [
            (grad * part.view(x.shape)).to(x.dtype) for x, part in zip((a, b), parts, strict=False) if x is not None
        ]
        return grads[0], grads[1] if b is not None else None, None, None, None


class _WassersteinLoss(_Op):
    @staticmethod
    def forward(y_true: Tensor, y_pred: Tensor) -> Any:
        return kernels.scores.mean_scores("labels", y_true, y_pred)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y_true, y_pred = ctx.saved_tensors
        grad = grad / y_pred.numel()  # float32 or wider, as 1 / N may be too small for float16
        needs_true, needs_pred = ctx.needs_input_grad
        of_true = (grad * y_pred.to(grad.dtype)).to(y_true.dtype) if needs_true else None
        return of_true, (grad * y_true.to(grad.dtype)).to(y_pred.dtype) if needs_pred else None


class _HingeCriticLoss(_Op):
    @staticmethod
    def forward(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        on_real, on_fake, _ = kernels.scores.mean_scores("hinge", real, fake)
        return on_real, on_fake

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, real_grad: Tensor, fake_grad: Tensor) -> tuple[Tensor, Tensor]:
        real, fake = ctx.saved_tensors
        # Not "real < 1": a NaN score has a slope, so that it shows in the gradients as in the loss.
        real_grad, fake_grad = (real_grad / -real.numel()).to(real.dtype), (fake_grad / fake.numel()).to(fake.dtype)
        return ~(real >= 1) * real_grad, ~(fake <= -1) * fake_grad


def check_blend(blend: object, drift: object = 0.0) -> None:
    """Raise unless ``blend`` is a number in [0, 1] and ``drift`` a finite one >= 0."""
    if check_number("blend", blend, minimum=0) > 1:
        raise ValueError(f"blend: expected a number in [0, 1], got {blend}")
    check_number("drift", drift, minimum=0)


def critic_loss(
    real_scores: Tensor, fake_scores: Tensor, *, blend: float = 0.0, drift: float = 0.0, backend: Backend = "auto"
) -> Tensor:
    """The critic's loss, mean(fake_scores) - mean(real_scores): minus the Wasserstein estimate.

    Args:
        real_scores: D(real), any shape, e.g. [N], [N, 1] or [N, 1, H, W].
        fake_scores: D(fake), any shape; dtype and device as ``real_scores``.
        blend: alpha in [0, 1], the share of the GAN's loss, mean(softplus(fake)) + mean(softplus(-real)), in it.
        drift: what mean(real_scores^2) is added with, which keeps scores near zero; >= 0, in 1 / score.
        backend: see :mod:`fastwgan.backend`.

    Returns:
        0-d tensor, float32 or wider; its gradients have the scores' dtype.

    Raises:
        TypeError, ValueError: an argument is not a floating tensor, is empty, or they do not match.

    Source: WGAN, arXiv 1701.07875, Algorithm 1, line 5 (which ascends; this is to be descended). The GAN's loss:
    arXiv 1406.2661; the drift term: arXiv 1710.10196, appendix A.1.

    >>> critic_loss(torch.tensor([3.0, 1.0]), torch.tensor([0.5]))
    tensor(-1.5000)
    >>> critic_loss(torch.tensor([3.0, 1.0]), torch.tensor([0.5]), drift=0.1)
    tensor(-1.)
    """
    real_scores, fake_scores = _checked_scores(real_scores, fake_scores)
    check_blend(blend, drift)
    if resolve(backend, real_scores.device) == "torch":
        return reference.critic_loss(real_scores, fake_scores, blend=blend, drift=drift)
    loss: Tensor
    if blend or drift:
        loss, _ = _apply(
            _BlendedLoss, real_scores, fake_scores, blend, drift, _differentiable(real_scores, fake_scores)
        )
    else:
        loss = _apply(_LinearLoss, real_scores, fake_scores)
    return loss


def _differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def generator_loss(fake_scores: Tensor, *, blend: float = 0.0, backend: Backend = "auto") -> Tensor:
    """The generator's loss, -mean(fake_scores).

    Args:
        fake_scores: D(G(z)), any shape.
        blend: alpha in [0, 1], the share of the GAN's non-saturating loss, mean(softplus(-fake)), in it.
        backend: see :mod:`fastwgan.backend`.

    Returns:
        0-d tensor, float32 or wider; its gradients have the scores' dtype.

    Raises:
        TypeError, ValueError: ``fake_scores`` is not a floating tensor or is empty.

    Source: WGAN, arXiv 1701.07875, Algorithm 1, line 10; the GAN's, arXiv 1406.2661, section 3.

    >>> generator_loss(torch.tensor([3.0, 1.0]))
    tensor(-2.)
    """
    _check_tensor("fake_scores", fake_scores)
    check_blend(blend)
    if resolve(backend, fake_scores.device) == "torch":
        return reference.generator_loss(fake_scores, blend=blend)
    loss: Tensor
    if blend:
        loss, _ = _apply(_BlendedLoss, fake_scores, None, blend, 0.0, _differentiable(fake_scores))
    else:
        loss = _apply(_LinearLoss, fake_scores, None)
    return loss


def wasserstein_loss(y_true: Tensor, y_pred: Tensor, *, backend: Backend = "auto") -> Tensor:
    """mean(y_true * y_pred), the label form that Keras code uses.

    With labels -1 for real and +1 for fake, and as many of each, twice this is :func:`critic_loss`.

    Args:
        y_true: labels, usually +1 and -1, shape as ``y_pred``: [N] against [N, 1] is an error, not a broadcast.
        y_pred: scores, any shape; dtype and device as ``y_true``.
        backend: see :mod:`fastwgan.backend`.

    Returns:
        0-d tensor, float32 or wider; its gradients have the scores' dtype.

    Raises:
        TypeError, ValueError: an argument is not a floating tensor, is empty, or they do not match.

    Source: WGAN, arXiv 1701.07875, Algorithm 1, lines 5 and 10, with the sign moved into a label.

    >>> wasserstein_loss(torch.tensor([-1.0, 1.0]), torch.tensor([3.0, 1.0]))
    tensor(-1.)
    """
    _check_tensor("y_pred", y_pred)
    _check_tensor("y_true", y_true)
    y_true, y_pred = _promoted(y_true, y_pred)
    check_like("y_true", y_true, "y_pred", y_pred, shape=True)
    if resolve(backend, y_pred.device) == "torch":
        return reference.wasserstein_loss(y_true, y_pred)
    loss: Tensor = _apply(_WassersteinLoss, y_true, y_pred)
    return loss


def hinge_critic_loss(real_scores: Tensor, fake_scores: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """The hinge form's two halves, (mean(relu(1 - real_scores)), mean(relu(1 + fake_scores))).

    Args:
        real_scores: D(real), any shape.
        fake_scores: D(fake), any shape; dtype and device as ``real_scores``.
        backend: see :mod:`fastwgan.backend`.

    Returns:
        Two 0-d tensors, float32 or wider; their gradients have the scores' dtype. The critic minimises their sum.

    Raises:
        TypeError, ValueError: an argument is not a floating tensor, is empty, or they do not match.

    Source: Lim and Ye, Geometric GAN, arXiv 1705.02894.

    >>> hinge_critic_loss(torch.tensor([3.0, 0.0]), torch.tensor([-0.5]))
    (tensor(0.5000), tensor(0.5000))
    """
    real_scores, fake_scores = _checked_scores(real_scores, fake_scores)
    if resolve(backend, real_scores.device) == "torch":
        return reference.hinge_critic_loss(real_scores, fake_scores)
    real, fake = _apply(_HingeCriticLoss, real_scores, fake_scores)
    return real, fake


def score_statistics(real_scores: Tensor, fake_scores: Tensor, backend: Backend) -> Tensor:
    """One launch, no graph: [mean real, mean fake, Wasserstein estimate, its negative]. For the trainer."""
    real_scores, fake_scores = real_scores.detach(), fake_scores.detach()
    if resolve(backend, real_scores.device) == "torch":
        return reference.score_statistics(real_scores, fake_scores)
    *_, statistics = kernels.scores.mean_scores("critic", real_scores, fake_scores)
    return statistics  # type: ignore[no-any-return]


def objective(
    real_scores: Tensor | None, fake_scores: Tensor, *, blend: float, drift: float, weight: float,
    scale: Tensor | None, backend: Backend,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One launch, no graph: (:func:`score_statistics`' four, or [the generator's loss]; weight * scale * d loss / d
    scores, flat, of real scores first, in the scores' dtype). For the trainer.
    """
    scores = [x.detach() for x in (real_scores, fake_scores) if x is not None]
    if resolve(backend, fake_scores.device) == "triton":
        a, b = (*scores, None)[:2]
        _, statistics, slopes = kernels.objective.objective(a, b, blend, drift, weight, scale, fake_scores.dtype)
        return statistics, slopes
    if real_scores is None:
        statistics = reference.generator_loss(fake_scores.detach(), blend=blend).reshape(1)
    else:
        statistics = reference.score_statistics(*scores, blend=blend, drift=drift)
    factor = weight if scale is None else weight * scale
    signs, drifts = (-1, 1), (drift, 0.0)
    slopes = [
        reference.score_slopes(x, sign, blend=blend, drift=own, weight=factor).reshape(-1)
        for x, sign, own in zip(scores, signs, drifts, strict=False)
    ]
    return statistics, torch.cat(slopes).to(fake_scores.dtype)


# Noise


class _Perturb(_Op):
    @staticmethod
    def forward(x: Tensor, scale: float | Tensor, seed: int, offset: int | Tensor) -> Any:
        return kernels.perturb.perturb(x, None, scale, seed, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


def perturb(
    x: Tensor, *, scale: float | Tensor, seed: int, offset: int | Tensor = 0, backend: Backend = "auto"
) -> Tensor:
    """x + scale * n with normal numbers n, drawn inside the launch: instance noise, or DRAGAN's points.

    Args:
        x: samples [N, ...].
        scale: standard deviation of the noise, >= 0, in the samples' units; a number or a one-element float32 tensor.
        seed, offset: sample i has the noise of (seed, offset + i); ints in [0, 2^63). ``offset`` may be a one-element
            int64 tensor on the samples' device, which a CUDA graph reads anew at each replay.
        backend: see :mod:`fastwgan.backend`.

    Returns:
        Samples shaped and typed like ``x``, differentiable in it, and laid out like it where that is contiguous or
        channels_last. The noise goes by the place of an element in memory, so for channels_last it is another than for
        contiguous samples; all other layouts have that of contiguous ones.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: DRAGAN, arXiv 1705.07215, equation 3; instance noise: arXiv 1701.04862.

    >>> perturb(torch.zeros(2, 3), scale=0.1, seed=0).shape
    torch.Size([2, 3])
    """
    _check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected shape [N, ...], got a 0-d tensor")
    check_seed("seed", seed)
    offset = _check_offset(offset, x.device)
    if isinstance(scale, Tensor):
        if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != x.device:
            got = f"{scale.dtype} of shape {tuple(scale.shape)} on {scale.device}"
            raise ValueError(f"scale: expected one float32 element on {x.device}, got {got}")
        scale = scale.detach().reshape(())
    else:
        check_number("scale", scale, minimum=0)
    if resolve(backend, x.device) == "torch":
        return reference.perturb(x, scale=scale, seed=seed, offset=offset)
    out: Tensor = _apply(_Perturb, x, scale, seed, offset)
    return out


def perturb_both(
    real: Tensor, fake: Tensor, *, scale: float | Tensor, seed: int, offset: int | Tensor, backend: Backend
) -> Tensor:
    """One launch, no graph: real and fake samples with noise, one batch [2 N, ...]. For the trainer."""
    if not same_layout(real, fake):  # the noise goes by the place in memory, and one batch has one layout
        real, fake = real.contiguous(), fake.contiguous()
    if resolve(backend, real.device) == "torch":
        if real.stride() != fake.stride():  # one order of elements for both, as the kernel has it
            real, fake = real.contiguous(), fake.contiguous()
        both = ((real, 2), (fake, 3))
        return torch.cat(
            [reference.perturb(x, scale=scale, seed=seed, offset=offset, stream=stream) for x, stream in both]
        )
    return kernels.perturb.perturb(real.detach(), fake.detach(), scale, seed, offset)  # type: ignore[no-any-return]


# Penalty


class _Interpolate(_Op):
    @staticmethod
    def forward(real: Tensor, fake: Tensor, seed: int, offset: int | Tensor) -> tuple[Tensor, Tensor]:
        out, eps = kernels.interpolate.interpolate(real, fake, seed, offset)
        return out, eps

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, eps = output
        ctx.mark_non_differentiable(eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return None, None, None, None
        (eps,) = ctx.saved_tensors
        eps = eps.view(-1, *[1] * (grad.dim() - 1))
        real_grad = (grad * eps).to(grad.dtype) if ctx.needs_input_grad[0] else None
        fake_grad = (grad * (1 - eps)).to(grad.dtype) if ctx.needs_input_grad[1] else None
        return real_grad, fake_grad, None, None


def interpolate(
    real: Tensor, fake: Tensor, *, seed: int, offset: int | Tensor = 0, backend: Backend = "auto"
) -> Tensor:
    """fake + eps * (real - fake), with one eps in [0, 1) per sample, drawn inside the launch.

    Args:
        real: samples [N, ...].
        fake: samples; shape, dtype and device as ``real``.
        seed: int in [0, 2^63), the key of the random stream.
        offset: sample i takes number ``offset + i`` of the stream. An int, or a one-element int64 tensor on the
            samples' device, which a CUDA graph reads anew at each replay.
        backend: see :mod:`fastwgan.backend`. eps is bit-identical in both.

    Returns:
        Interpolates, shape and dtype of ``fake``. Differentiable in ``real`` and ``fake``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, is empty, or does not match.

    Source: WGAN-GP, arXiv 1704.00028, Algorithm 1, line 6.

    >>> interpolate(torch.ones(2, 1), torch.zeros(2, 1), seed=0).shape
    torch.Size([2, 1])
    """
    _check_tensor("fake", fake)
    _check_tensor("real", real)
    real, fake = _promoted(real, fake)
    check_like("real", real, "fake", fake, shape=True)
    if fake.dim() == 0:
        raise ValueError("fake: expected shape [N, ...], got a 0-d tensor")
    check_seed("seed", seed)
    offset = _check_offset(offset, fake.device)
    if resolve(backend, fake.device) == "torch":
        return reference.interpolate(real, fake, seed=seed, offset=offset)
    out, _ = _apply(_Interpolate, real, fake, seed, offset)
    return out  # type: ignore[no-any-return]


class _Penalty(_Op):
    @staticmethod
    def forward(gradients: Tensor, kind: str, target: float, differentiable: bool) -> tuple[Tensor, Tensor]:
        # Wide, as the gradient that comes in may be large (a loss scale) where the cotangent is small.
        wide = torch.float64 if gradients.dtype == torch.float64 else torch.float32
        loss, _, cotangent = kernels.penalty.gradient_penalty(
            gradients, kind, target, 1.0, wide if differentiable else None
        )
        return loss, cotangent

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        gradients, ctx.kind, ctx.target, _ = inputs
        _, cotangent = output
        ctx.mark_non_differentiable(cotangent)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradients, cotangent)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None, None]:
        if grad is None:
            return None, None, None, None
        gradients, cotangent = ctx.saved_tensors
        # A graph is asked for, and the kernel's cotangent has none; or it has made none, as vmap hides requires_grad.
        if torch.is_grad_enabled() or cotangent.numel() == 0:
            wide = torch.float64 if gradients.dtype == torch.float64 else torch.float32
            cotangent = reference.penalty_cotangent(gradients.to(wide), kind=ctx.kind, target=ctx.target)[1]
        return (grad * cotangent).to(gradients.dtype), None, None, None


def penalty(gradients: Tensor, *, kind: str = "two-sided", target: float = 1.0, backend: Backend = "auto") -> Tensor:
    """The mean over samples of a function of the gradient's norm n, taken over all of a sample's dimensions.

    Args:
        gradients: d critic / d input, [N, ...].
        kind: "two-sided" (n - target)^2, "one-sided" max(n - target, 0)^2, "zero-centered" n^2 or "power" n^6.
        target: the norm wanted, >= 0; used by the first two kinds.
        backend: see :mod:`fastwgan.backend`.

    Returns:
        0-d tensor, float32 or wider; its gradient has the dtype of ``gradients``, and is 0 at n = 0.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: WGAN-GP, arXiv 1704.00028, equation 3; WGAN-LP, 1709.08894; R1, 1801.04406; WGAN-div, 1712.01026.

    >>> penalty(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    tensor(8.)
    """
    _check_tensor("gradients", gradients)
    if gradients.dim() == 0:
        raise ValueError("gradients: expected shape [N, ...], got a 0-d tensor")
    check_penalty(kind, target)
    if resolve(backend, gradients.device) == "torch":
        return reference.penalty(gradients, kind=kind, target=target)
    differentiable = gradients.requires_grad and torch.is_grad_enabled()
    loss, _ = _apply(_Penalty, gradients, kind, float(target), differentiable)
    return loss  # type: ignore[no-any-return]


def penalty_cotangent(
    gradients: Tensor, kind: str, target: float, weight: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    """One launch, no graph: ([mean penalty; mean, least and greatest norm], d(weight * penalty) / d gradients).

    For the trainer.
    """
    gradients = gradients.detach()
    if resolve(backend, gradients.device) == "torch":
        return reference.penalty_cotangent(gradients, kind=kind, target=target, weight=weight)
    _, statistics, cotangent = kernels.penalty.gradient_penalty(gradients, kind, target, weight, gradients.dtype)
    return statistics, cotangent


def input_gradient(
    critic: Callable[..., Tensor],
    x: Tensor,
    args: tuple[Any, ...],
    ones_like: Callable[[Tensor], Tensor] = torch.ones_like,
    pack: int = 1,
) -> Tensor:
    """d sum(critic(x, *args)) / dx, [N, ...], with a graph.

    Raises:
        ValueError: the critic does not give scores for each of the N samples, writes to ``x``, or its scores do not
            depend on ``x`` (which is not seen inside torch.compile: the gradient is zero then).
    """
    if torch.compiler.is_compiling():
        given = dict(critic.named_buffers()) if isinstance(critic, nn.Module) else {}
        buffers = dict(given)
        empty = empty_buffers(critic) if isinstance(critic, nn.Module) else []

        def forward(x: Tensor, buffers: dict[str, Tensor]) -> Tensor:
            return call(critic, {}, buffers, (x, *args), empty) if buffers or empty else critic(x, *args)  # type: ignore[arg-type]

        gradient = traced_input_gradient(forward, x, buffers, pack)
        if isinstance(critic, nn.Module):
            rebind(critic, changed(given, buffers))
        return gradient
    try:
        with LinearPieces(), sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have no second derivative
            scores = critic(x, *args)
    except RuntimeError as error:
        if "leaf Variable" in str(error):
            raise ValueError(WRITES) from error
        raise
    check_scores("critic", scores, len(x), pack)
    g = None
    if scores.requires_grad:
        (g,) = torch.autograd.grad(scores, x, ones_like(scores), create_graph=True, allow_unused=True)
    if g is None:
        raise ValueError(NO_DEPENDENCE)
    return g


def traced_input_gradient(
    forward: Callable[[Tensor, dict[str, Tensor]], Tensor],
    x: Tensor,
    buffers: dict[str, Tensor],
    pack: int = 1,
    scale: Tensor | None = None,
) -> Tensor:
    """d sum(forward(x, buffers)) / dx, [N, ...], inside torch.compile; computed times ``scale``, where there is one.

    Dynamo traces torch.func.grad, and the compiler then differentiates the result as it does any function. What
    ``forward`` writes to must be an argument of the function that is differentiated: so the buffers are. Those that it
    rebinds are rebound in ``buffers``.
    """

    def total(x: Tensor, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        buffers = dict(given)
        with LinearPieces(), sdpa_kernel(SDPBackend.MATH):
            scores = forward(x, buffers)
        check_scores("critic", scores, len(x), pack)
        value = scores.sum() if scale is None else scores.float().sum() * (scale * pack / len(x))
        return value, changed(given, buffers)

    gradient: Tensor
    gradient, rebound = torch.func.grad(total, has_aux=True)(x, buffers)
    buffers.update(rebound)
    return gradient if scale is None else gradient / (scale * pack / len(x))


Empty = list[tuple[str, nn.Module, str]]


def empty_buffers(module: nn.Module) -> Empty:
    """Return a module's buffers that are None: (name in it, the module that has it, name there)."""
    return [
        (f"{path}.{name}" if path else name, m, name)
        for path, m in module.named_modules()
        for name, x in m._buffers.items()
        if x is None
    ]


def call(
    module: nn.Module, trained: dict[str, Tensor], rest: dict[str, Tensor], args: tuple[Any, ...], empty: Empty
) -> Tensor:
    """Return ``module(*args)`` with these parameters and buffers; those that it rebinds are rebound in ``rest``.

    ``empty`` are the buffers that were None before, and are so again afterwards.
    """
    state = {**trained, **rest}
    output: Tensor = torch.func.functional_call(module, state, args)
    for name in rest:
        rest[name] = state[name]
    for name, m, own_name in empty:
        x = m._buffers[own_name]
        if x is not None and name not in state:
            rest[name] = x
            m._buffers[own_name] = None
    return output


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those tensors of ``after`` that are others than in ``before``."""
    return {name: x.detach() for name, x in after.items() if x is not before.get(name)}


def rebind(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a module other tensors for its buffers of these names."""
    for name, x in tensors.items():
        owner, _, own_name = name.rpartition(".")
        setattr(module.get_submodule(owner), own_name, x)


def check_scores(name: str, scores: object, batch: int, pack: int = 1) -> None:
    """Raise unless ``scores`` is a floating tensor with one entry, along its first dimension, to ``pack`` samples."""
    _check_tensor(f"{name}: its output", scores)
    assert isinstance(scores, Tensor)
    if scores.dim() == 0 or len(scores) * pack != batch:
        packs = f" for {batch} samples in packs of {pack}" if pack > 1 else ""
        raise ValueError(f"{name}: its output: expected shape [{batch // pack}, ...]{packs}, got {tuple(scores.shape)}")


def gradient_penalty(
    critic: Callable[..., Tensor],
    real: Tensor,
    fake: Tensor,
    *,
    weight: float = 10.0,
    kind: str = "two-sided",
    target: float = 1.0,
    seed: int | None = None,
    args: tuple[Any, ...] = (),
    backend: Backend = "auto",
) -> Tensor:
    """WGAN-GP's term of the critic's loss: weight * penalty(d critic / dx) at random interpolates x.

    The graph reaches the critic's parameters, not ``real`` or ``fake``, and is built even under ``torch.no_grad``.

    Args:
        critic: maps samples [N, ...] (and ``args``) to scores [N, ...].
        real: samples [N, ...].
        fake: samples; shape, dtype and device as ``real``.
        weight: lambda, >= 0.
        kind, target: see :func:`penalty`.
        seed: the seed of eps, or None to draw anew from PyTorch's CPU generator; inside torch.compile, which cannot
            read numbers back, from the device's.
        args: further positional arguments of the critic, such as labels.
        backend: see :mod:`fastwgan.backend`.

    Returns:
        0-d tensor, float32 or wider.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or the critic's scores do not
            depend on its input.

    Source: WGAN-GP, arXiv 1704.00028, Algorithm 1, lines 6 and 7.

    >>> gradient_penalty(torch.nn.Linear(2, 1), torch.randn(4, 2), torch.randn(4, 2)).shape
    torch.Size([])
    """
    if not callable(critic):
        raise TypeError(f"critic: expected a callable, got {type(critic).__name__}")
    check_number("weight", weight, minimum=0)
    check_penalty(kind, target)
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args: expected a tuple of arguments, got {type(args).__name__}")
    _check_tensor("real", real)
    _check_tensor("fake", fake)
    real, fake = _promoted(real, fake)
    check_like("real", real, "fake", fake, shape=True)  # before a seed is drawn
    offset: int | Tensor = 0
    if seed is None and torch.compiler.is_compiling():
        seed, offset = 0, torch.randint(2**62, (), device=fake.device)  # anywhere in one stream
    elif seed is None:
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    with torch.enable_grad():
        x = interpolate(real.detach(), fake.detach(), seed=seed, offset=offset, backend=backend)
        if not torch.compiler.is_compiling():
            x.requires_grad_()
        g = input_gradient(critic, x, args)
        return weight * penalty(g, kind=kind, target=target, backend=backend)


# Update


def is_dense(x: Tensor) -> bool:
    """Whether x's elements fill one stretch of memory, each once, in some order of the dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_layout(x: Tensor, y: Tensor) -> bool:
    """Whether two dense tensors of one shape hold corresponding elements at corresponding places."""
    return x.stride() == y.stride() or (x.is_contiguous() and y.is_contiguous())  # strides of size 1 say nothing


def check_parameter(name: str, p: object) -> None:
    """Raise unless ``p`` can be updated in place by a kernel: dense layout or sliced, floating, not expanded."""
    if not isinstance(p, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(p).__name__}")
    if p.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {p.dtype}")
    if p.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {p.layout}")
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(f"{name}: expected each element to have its own memory, got an expanded tensor")
    if p.is_neg():
        raise ValueError(f"{name}: expected a tensor that is stored as it is, got a lazily negated view")


def refuse_overlap(parameters: Sequence[Tensor]) -> None:
    """Raise unless each parameter has memory of its own, as a launch writes to all of them in any order."""
    by_storage: dict[int, list[int]] = {}
    for i, p in enumerate(parameters):
        by_storage.setdefault(p.untyped_storage().data_ptr(), []).append(i)
    for members in by_storage.values():
        first = parameters[members[0]]
        if len(members) == 1 or first.device.type == "meta":
            continue
        taken = torch.zeros(first.untyped_storage().nbytes() // first.element_size(), dtype=torch.bool, device="cpu")
        for i in members:
            p = parameters[i]
            places = taken.as_strided(p.shape, p.stride(), p.storage_offset())
            if places.any():
                raise ValueError(
                    f"params: expected each in memory of its own, got number {i}, of shape {tuple(p.shape)}, over that "
                    "of another: make them one parameter"
                )
            places.fill_(True)


@cache
def _clipper(device: torch.device, dtype: torch.dtype, stream: int, bound: float) -> Any:  # a graph keeps its bound
    return kernels.update.Update(device, dtype)


@lru_cache
def check_bound(name: str, bound: object, dtype: torch.dtype) -> float:
    """``bound`` as ``dtype`` holds it, or an error naming it unless it is a number > 0 that ``dtype`` can hold."""
    value = check_number(name, bound, minimum=0, exclusive=True)
    if value > torch.finfo(dtype).max:
        raise ValueError(f"{name}: expected a number that {dtype} can hold, got {bound}")
    return torch.tensor(value, dtype=dtype, device="cpu").item()


def _constrain_(
    parameters: Iterable[Tensor],
    bound: float,
    backend: Backend,
    gate: Tensor | None,
    *,
    plain: Callable[[list[Tensor]], Tensor],
    launch: Callable[[list[Tensor], float], Tensor],
    bounded: Callable[[Tensor], int],
    fits: Callable[[Tensor], bool],
) -> tuple[Tensor, int] | None:
    """Keep parameters within a bound, in place: (the share of what lies on its bound, of how many), or None of none.

    ``plain`` and ``launch`` do it to tensors of one device and dtype, and give the share; ``launch`` gets the bound as
    the dtype holds it. ``bounded`` says how many things in a tensor have a bound, ``fits`` whether a kernel can work on
    it as it lies. ``gate`` is [2] float32, or None: 1 to leave the weights alone, else 0; the share is NaN then.
    """
    unique = {id(p): p for p in parameters}
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for i, p in enumerate(unique.values()):
        check_parameter(f"parameters[{i}]", p)
        if p.numel():
            groups.setdefault((p.device, p.dtype), []).append(p)
    check_number("bound", bound, minimum=0, exclusive=True)
    limits = [check_bound("bound", bound, dtype) for _, dtype in groups]
    backends = [resolve(backend, device) for device, _ in groups]
    shares = []
    for params, limit, name in zip(groups.values(), limits, backends, strict=True):
        total = sum(map(bounded, params))
        if name == "torch":
            if gate is not None and gate[0]:  # on a GPU this waits, as PyTorch's optimizers do
                shares.append((gate.new_tensor(math.nan), total))
            else:
                shares.append((plain(params), total))
            continue
        dense = [p.detach() if fits(p) else p.detach().contiguous() for p in params]
        share = launch(dense, limit)
        torch.autograd.graph.increment_version(params)
        for p, work in zip(params, dense, strict=True):
            if work.data_ptr() != p.data_ptr():
                p.detach().copy_(work)
        shares.append((share, total))
    return combine_shares(shares)


def clip_and_count_(
    parameters: Iterable[Tensor], bound: float, backend: Backend, gate: Tensor | None = None
) -> tuple[Tensor, int] | None:
    """:func:`clip_weights_` that also tells (the share of weights on their bound, of how many). For the trainer.

    ``gate`` is [2] float32, or None: 1 to leave the weights alone, else 0; the share is NaN then.
    """

    def plain(params: list[Tensor]) -> Tensor:
        reference.clip_weights_(params, bound)
        on_bound, total = reference.saturation(params, bound)
        return on_bound / total

    def launch(params: list[Tensor], limit: float) -> Tensor:
        device, dtype = params[0].device, params[0].dtype
        hyper = ((*[0.0] * (kernels.table.HYPER_COLUMNS.value - 1), limit),)
        launcher = _clipper(device, dtype, kernels.arrival.stream_of(device), limit)
        share: Tensor = launcher.launch(
            "clamp", params, None, [()] * len(params), None, hyper, [0] * len(params), gate=gate
        )
        return share

    return _constrain_(
        parameters, bound, backend, gate, plain=plain, launch=launch, bounded=Tensor.numel, fits=is_dense
    )


@cache
def _projector(device: torch.device, dtype: torch.dtype, stream: int) -> Any:
    return kernels.project.Project(device, dtype)


def _lies_in_rows(x: Tensor) -> bool:
    """Whether x's slices along its first dimension are dense and lie one after the other."""
    return x.dim() == 0 or (is_dense(x[0]) and (len(x) == 1 or x.stride(0) == x[0].numel()))


def check_per(per: object) -> None:
    """Raise unless ``per`` is "row" or "tensor"."""
    if per not in ("row", "tensor"):
        raise ValueError(f"per: expected 'row' or 'tensor', got {per!r}")


def project_and_count_(
    parameters: Iterable[Tensor], bound: float, per: str, backend: Backend, gate: Tensor | None = None
) -> tuple[Tensor, int] | None:
    """:func:`clip_norms_` that also tells (the share of rows on their bound, of how many). For the trainer.

    On it are those whose norm was the bound or more before. ``gate`` is [2] float32, or None: 1 to leave the weights
    alone, else 0; the share is NaN then.
    """
    check_per(per)

    def rows(p: Tensor) -> int:
        return len(p) if per == "row" and p.dim() else 1

    def plain(params: list[Tensor]) -> Tensor:
        on_bound, total = reference.norm_saturation(params, bound, per)
        reference.clip_norms_(params, bound, per)
        return on_bound / total

    def launch(params: list[Tensor], _: float) -> Tensor:  # a norm is wide, so its bound is not rounded
        device, dtype = params[0].device, params[0].dtype
        launcher = _projector(device, dtype, kernels.arrival.stream_of(device))
        share: Tensor = launcher.launch(params, [p.numel() // rows(p) for p in params], float(bound), gate)
        return share

    fits = _lies_in_rows if per == "row" else is_dense
    return _constrain_(parameters, bound, backend, gate, plain=plain, launch=launch, bounded=rows, fits=fits)


def combine_shares(shares: list[tuple[Tensor, int]]) -> tuple[Tensor, int] | None:
    """Shares of several sets of weights as the share of them all; None of none."""
    if len(shares) <= 1:
        return shares[0] if shares else None
    total = sum(n for _, n in shares)
    parts = [share.double() * (n / total) for share, n in shares]
    return sum((part.to(parts[0].device) for part in parts[1:]), parts[0]), total


def clip_weights_(parameters: Iterable[Tensor], bound: float, *, backend: Backend = "auto") -> None:
    """Clamp every weight to [-bound, bound] in place, in one launch per device and dtype. NaN stays NaN.

    Args:
        parameters: tensors of any shapes and floating dtypes; any layout but expanded.
        bound: c > 0.
        backend: see :mod:`fastwgan.backend`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range. Nothing is changed then.

    Source: WGAN, arXiv 1701.07875, Algorithm 1, line 7.

    >>> w = torch.tensor([-3.0, 0.005, 2.0])
    >>> clip_weights_([w], 0.01)
    >>> w
    tensor([-0.0100,  0.0050,  0.0100])
    """
    clip_and_count_(_listed(parameters), bound, backend)


def clip_norms_(parameters: Iterable[Tensor], bound: float, *, per: str = "row", backend: Backend = "auto") -> None:
    """Scale rows whose L2 norm exceeds the bound down to it, w = w * min(1, bound / ||w||), in place.

    One launch per device and dtype. A row within the bound is left bit for bit, and so is one with NaN or an infinity.

    Args:
        parameters: tensors of any shapes and floating dtypes; any layout but expanded.
        bound: c > 0.
        per: what has a norm: "row", each slice along the first dimension, so the weights of one output of a linear or
            convolutional layer, and each element of a vector, as ``torch.renorm(w, 2, 0, bound)`` has it; or "tensor",
            each tensor as a whole.
        backend: see :mod:`fastwgan.backend`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range. Nothing is changed then.

    Source: Hinton et al., arXiv 1207.0580.

    >>> w = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    >>> clip_norms_([w], 1.0)
    >>> w
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    project_and_count_(_listed(parameters), bound, per, backend)


def _listed(parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    """Tensors, also where it is one."""
    if isinstance(parameters, Tensor):
        return [parameters]
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters: expected tensors, got {type(parameters).__name__}")
    return parameters
