"""Every op in plain PyTorch: the specification, the CPU path and the oracle.

WGAN is Arjovsky, Chintala and Bottou, arXiv 1701.07875; WGAN-GP is Gulrajani, Ahmed, Arjovsky, Dumoulin and
Courville, arXiv 1704.00028. Any floating dtype goes in. Half precision is computed in float32: tensors come out in
their own dtype, losses and statistics in float32, as float16 cannot hold them all. Nothing here checks arguments.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastwgan.backend import wide

STREAM = 0x57474150  # Philox's last word for uniform numbers


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return [N] values shaped to broadcast over ``like`` [N, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))


def critic_loss(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Return mean(fake_scores) - mean(real_scores), which the critic minimises. WGAN, Algorithm 1, line 5, negated."""
    return score_statistics(real_scores, fake_scores)[3]


def generator_loss(fake_scores: Tensor) -> Tensor:
    """Return -mean(fake_scores), which the generator minimises. WGAN, Algorithm 1, line 10."""
    return -_wide(fake_scores).mean()


def wasserstein_loss(y_true: Tensor, y_pred: Tensor) -> Tensor:
    """Return mean(y_true * y_pred): the label form of Keras code, with labels of +1 and -1."""
    return (_wide(y_true) * _wide(y_pred)).mean()


def hinge_critic_loss(real_scores: Tensor, fake_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean(relu(1 - real_scores)), mean(relu(1 + fake_scores))). Lim and Ye, arXiv 1705.02894."""
    return (1 - _wide(real_scores)).relu().mean(), (1 + _wide(fake_scores)).relu().mean()


def score_statistics(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Return [mean real, mean fake, mean real - mean fake, the critic's loss], float32 or wider."""
    dtype = wide(real_scores.dtype)
    real, fake = real_scores.mean(dtype=dtype), fake_scores.mean(dtype=dtype)
    wasserstein = real - fake
    return torch.stack((real, fake, wasserstein, -wasserstein))


def philox(counter: Iterable[Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Return Philox-4x32-10 of four words below 2^32: int64 arrays, or numbers. Salmon et al., SC 2011."""
    mask = 0xFFFFFFFF
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps past 2^63, which leaves all 64 bits right
        c0, c2 = ((product2 >> 32) ^ c1 ^ k0) & mask, ((product0 >> 32) ^ c3 ^ k1) & mask
        c1, c3 = product2, product0  # whose upper words the mask takes away
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1 & mask, c2, c3 & mask


def uniform(seed: int, offset: int | Tensor, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Return U[0, 1), float32 [n]: element i depends on ``seed`` and ``offset + i`` alone.

    The top 24 bits of Philox's first word with key ``seed`` and counter (index low, index high, 0, 0x57474150);
    the last word sets the stream apart from PyTorch's own.
    """
    word: Tensor = words(seed, torch.arange(n, device=device) + offset, 0, STREAM)[0]
    return (word >> 8).float() * 2.0**-24


def normals(
    seed: int, offset: int | Tensor, n: int, size: int, *, stream: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return N(0, 1), [n, size] in float32 or float64: row i depends on ``seed``, ``stream`` and ``offset + i`` alone.

    Four numbers come from the four words at each counter (index low, index high, place, 0x57474150 + stream), by Box
    and Muller (Annals of Mathematical Statistics 29, 1958) of the first two words and of the others.
    """
    places = torch.arange(-(-size // 4), device=device)
    index = (torch.arange(n, device=device) + offset)[:, None].expand(n, len(places))
    four = torch.stack(words(seed, index.reshape(-1), places.repeat(n), STREAM + stream))
    numbers = (four >> 8).to(dtype) * 2.0**-24
    radius, angle = (-2 * (numbers[::2] + 2.0**-24).log()).sqrt(), 2 * math.pi * numbers[1::2]
    fours = torch.stack((radius * angle.cos(), radius * angle.sin()), -1)  # [2, n * places, 2]
    return fours.movedim(0, 1).reshape(n, -1)[:, :size]


def words(seed: int, index: Any, place: Any, stream: int) -> tuple[Any, Any, Any, Any]:
    """Return Philox's four words of each counter."""
    # A compiler gets a tensor for a key, so that another seed is no other program.
    key = torch.full((), seed, dtype=torch.int64, device=index.device) if torch.compiler.is_compiling() else seed
    counter = (index & 0xFFFFFFFF, (index >> 32) & 0xFFFFFFFF, place, stream)
    return philox(counter, (key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF))


def perturb(x: Tensor, *, scale: float | Tensor, seed: int, offset: int | Tensor = 0, stream: int = 1) -> Tensor:
    """Return x + scale * n, n ~ N(0, 1) in order of memory. DRAGAN, arXiv 1705.07215; instance noise, 1701.04862."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last and not x.is_contiguous() and x.is_contiguous(memory_format=channels_last):
        return perturb(x.movedim(1, -1), scale=scale, seed=seed, offset=offset, stream=stream).movedim(-1, 1)
    dtype = wide(x.dtype)
    noise = normals(seed, offset, len(x), x[0].numel(), stream=stream, dtype=dtype, device=x.device).view(x.shape)
    factor = torch.as_tensor(scale, dtype=torch.float32)  # in any case
    return (x.to(dtype) + factor * noise).to(x.dtype)


def interpolate(
    real: Tensor, fake: Tensor, *, seed: int, offset: int | Tensor = 0, eps: Tensor | None = None
) -> Tensor:
    """Return fake + eps * (real - fake), eps [N] being uniform(seed, offset, N). WGAN-GP, Algorithm 1, line 6."""
    eps = uniform(seed, offset, len(fake), fake.device) if eps is None else eps
    start = _wide(fake)
    return (start + _per_sample(eps, fake).to(start.dtype) * (real - start)).to(fake.dtype)


def _norms(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return each sample's squared norm over all its dimensions and its norm, [N], of wide gradients."""
    squares = gradients.reshape(gradients.shape[0], -1).square().sum(1)
    positive = squares > 0  # at zero the root has subgradient 0, where sqrt gives infinity and then NaN
    return squares, torch.where(positive, torch.where(positive, squares, 1).sqrt(), squares)


PENALTY_KINDS = ("two-sided", "one-sided", "zero-centered", "power")


def _phi(squares: Tensor, norms: Tensor, kind: str, target: float, *, slope: bool = False) -> Tensor:
    """Return phi(n), the penalty of a gradient's norm n; with ``slope`` phi'(n) / n, which is 0 at n = 0."""
    if kind == "zero-centered":  # n^2: R1 and R2 without their factor 1/2, arXiv 1801.04406
        return torch.full_like(squares, 2.0) if slope else squares
    if kind == "power":  # n^6: WGAN-div, arXiv 1712.01026
        return 6 * squares**2 if slope else squares**3
    excess = norms - target  # (n - target)^2: WGAN-GP, equation 3
    if kind == "one-sided":  # max(n - target, 0)^2: WGAN-LP, arXiv 1709.08894
        excess = excess.relu()
    if not slope:
        return excess.square()
    zero = norms == 0
    return torch.where(zero, 0, 2 * excess / torch.where(zero, 1, norms))


def penalty(gradients: Tensor, *, kind: str = "two-sided", target: float = 1.0) -> Tensor:
    """Return the mean over samples of a function of the gradient's norm, by its name in PENALTY_KINDS."""
    return _phi(*_norms(_wide(gradients)), kind, target).mean()


def penalty_cotangent(
    gradients: Tensor, *, kind: str, target: float, weight: float = 1.0, norms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ([mean penalty; mean, least and greatest norm], d(weight * penalty) / d gradients), differentiable.

    Sample i's cotangent is weight / N * phi'(n) / n * g, and 0 at n = 0.
    """
    g = _wide(gradients)
    squares, norms = _norms(g) if norms is None else (norms.square(), norms)
    scale = _phi(squares, norms, kind, target, slope=True) * (weight / len(norms))
    statistics = torch.stack((_phi(squares, norms, kind, target).mean(), norms.mean(), *norms.aminmax()))
    return statistics, (_per_sample(scale, g) * g).to(gradients.dtype)


def activate_(z: Tensor, factors: Tensor | None, slope: float) -> None:
    """Take h = factors * (z if z > 0 else slope * z) in place: a rectifier, then dropout if there are factors."""
    if slope != 1:
        _ = z.relu_() if slope == 0 else F.leaky_relu_(z, slope)
    if factors is not None:
        z.mul_(factors)


def slopes(d: Tensor, h: Tensor, factors: Tensor | None, slope: float, out: Tensor | None = None) -> Tensor:
    """Return d * factors * (1 if h > 0 else slope), for what :func:`activate_` has made h of; ``out`` may be h."""
    out = torch.empty_like(d) if out is None else out
    if slope == 0:
        torch.ops.aten.threshold_backward.grad_input(d, h, 0, grad_input=out)
    else:
        torch.ops.aten.leaky_relu_backward.grad_input(d, h, slope, True, grad_input=out)
    return out if factors is None else out.mul_(factors)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, running: tuple[Tensor, ...], of_batch: bool,
    momentum: float | None, eps: float, slope: float,
) -> Tensor:  # fmt: skip
    """Return rectify(weight * (x - mean) / sqrt(var + eps) + bias), of x [N, C]. Ioffe and Szegedy, arXiv 1502.03167.

    ``running`` has torch.nn.BatchNorm1d's running mean and variance and num_batches_tracked, or nothing: with
    ``of_batch`` they are brought up to date, else x is normalised by them. A momentum of None averages all batches.
    """
    means, variances, tracked = running or (None, None, None)
    if of_batch and tracked is not None:
        tracked.add_(1)
        momentum = 1 / tracked.item() if momentum is None else momentum
    return F.leaky_relu(F.batch_norm(x, means, variances, weight, bias, of_batch, momentum or 0.0, eps), slope)


def piecewise_gradients(
    layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor, seeds: Tensor,
    cotangent: Callable[[Tensor], Tensor] | None, weights: Sequence[Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return the gradients of a piecewise linear critic's loss, its penalty included, with no second backward pass.

    ``x`` has as many rows of real samples and of fake ones, with a penalty also of points. ``seeds`` are the gradients
    at their scores, 1 for points; ``cotangent`` is of the penalty, for the critic's gradient at the points. A layer has
    the same dropout in each call. Source: Pearlmutter, Neural Computation 6, 1994.
    """
    states, pulls, points = [x], list[Any](), slice(2 * len(x) // 3 if cotangent else len(x), None)
    for layer in layers:
        state, pull, *_ = torch.func.vjp(layer, states[-1])
        states, pulls = [*states, state.detach()], [pull, *pulls]
    deltas = [seeds]  # the gradients of all scores behind each layer
    for pull in pulls:
        deltas.insert(0, pull(deltas[0])[0].detach())
    tangent, total = torch.zeros_like(x), x.new_zeros(())
    if cotangent is not None:
        tangent[points] = cotangent(deltas[0][points])
    for layer, state, delta in zip(layers, states[:-1], deltas[1:], strict=True):
        _, push, *_ = torch.func.vjp(lambda d: torch.func.vjp(layer, state)[1](d)[0], delta)  # noqa: B023
        tangent = push(tangent.detach())[0]
        total = total + (delta * layer(state))[: points.start].sum() + (delta * tangent)[points].sum()
    return torch.autograd.grad(total, weights)


@torch.no_grad()
def clip_weights_(parameters: Iterable[Tensor], bound: float) -> None:
    """Take w = min(max(w, -bound), bound) in place; NaN stays NaN. WGAN, Algorithm 1, line 7."""
    for p in parameters:
        p.clamp_(-bound, bound)


def saturation(parameters: Iterable[Tensor], bound: float) -> tuple[Tensor, int]:
    """Return (the share of weights of one dtype that lie on their bound, of how many)."""
    weights = torch.cat([p.detach().reshape(-1) for p in parameters])
    limit = torch.tensor(bound, dtype=weights.dtype, device=weights.device)
    return (weights.abs() >= limit).sum(dtype=wide(weights.dtype)) / len(weights), len(weights)


def _rows(p: Tensor, per: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return p's rows [n, size], each over its largest magnitude; these magnitudes and the rows' norms then, [n, 1].

    The norms of the rows themselves are the products; so no square leaves the range.
    """
    rows = _wide(p.detach()).reshape(len(p) if per == "row" and p.dim() else 1, -1)
    largest = rows.abs().amax(1, keepdim=True)
    rows = rows / torch.where(largest == 0, 1, largest)
    return rows, largest, rows.square().sum(1, keepdim=True).sqrt()


@torch.no_grad()
def clip_norms_(parameters: Iterable[Tensor], bound: float, per: str = "row") -> None:
    """Take w = w * min(1, bound / ||w||) in place, for each row or each whole tensor. Hinton et al., arXiv 1207.0580.

    A row is a slice along the first dimension: of a vector, an element. One with NaN or an infinity stays as it is.
    """
    for p in parameters:
        if p.numel():
            rows, largest, norms = _rows(p, per)
            projected = (rows * (bound / norms)).view(p.shape)
            outside = (largest * norms > bound).expand_as(rows).view(p.shape)
            p.copy_(torch.where(outside, projected.to(p.dtype), p))


def norm_saturation(parameters: Iterable[Tensor], bound: float, per: str = "row") -> tuple[Tensor, int]:
    """Return (the share of rows, or whole tensors, with a norm of their bound or more, of how many)."""
    on_bound = torch.cat([largest * norms >= bound for _, largest, norms in (_rows(p, per) for p in parameters)])
    return on_bound.sum() / on_bound.numel(), on_bound.numel()


@torch.no_grad()
def rmsprop_step_(
    param: Tensor, grad: Tensor, square_avg: Tensor, *, lr: float, alpha: float, eps: float,
    weight_decay: float = 0.0, momentum: float = 0.0, momentum_buffer: Tensor | None = None,
    grad_avg: Tensor | None = None, maximize: bool = False,
) -> None:  # fmt: skip
    """Take one RMSProp step in place. WGAN, Algorithm 1, line 6; the formula is torch.optim's.

    s = alpha s + (1 - alpha) g^2; p = p - lr g / (sqrt(s) + eps). With ``grad_avg`` m (centered), m follows g as
    s follows g^2 and s - m^2 stands under the root. With momentum, b = momentum b + g / (...); p = p - lr b.
    """
    p, g, s = _wide(param), -_wide(grad) if maximize else _wide(grad), _wide(square_avg)
    if weight_decay != 0:
        g = g.add(p, alpha=weight_decay)
    s.mul_(alpha).addcmul_(g, g, value=1 - alpha)
    variance = s
    if grad_avg is not None:
        m = _wide(grad_avg).lerp_(g, 1 - alpha)
        variance = s.addcmul(m, m, value=-1).clamp_(min=0)  # which rounding can leave just below zero
        grad_avg.copy_(m)
    denominator = variance.sqrt().add_(eps)
    if momentum > 0:
        assert momentum_buffer is not None
        b = _wide(momentum_buffer).mul_(momentum).addcdiv_(g, denominator)
        p.sub_(b, alpha=lr)
        momentum_buffer.copy_(b)
    else:
        p.addcdiv_(g, denominator, value=-lr)
    square_avg.copy_(s)
    param.copy_(p)


@torch.no_grad()
def adam_step_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, *, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float = 0.0, maximize: bool = False,
) -> None:  # fmt: skip
    """Take one Adam step in place. WGAN-GP, Algorithm 1, line 9; Kingma and Ba, arXiv 1412.6980.

    t = t + 1; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
    p = p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps). ``step`` holds t, 0-d float32, and is counted on.
    """
    beta1, beta2 = betas
    p, g, m, v = _wide(param), -_wide(grad) if maximize else _wide(grad), _wide(exp_avg), _wide(exp_avg_sq)
    step += 1
    t = step.to(p.dtype)
    bias1, bias2 = (-torch.expm1(t * (math.log(beta) if beta > 0 else -math.inf)) for beta in betas)  # 1 - beta^t
    if weight_decay != 0:
        g = g.add(p, alpha=weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    p.sub_((m / (v.sqrt() / bias2.sqrt()).add_(eps)).mul_(lr / bias1))
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    param.copy_(p)


@torch.no_grad()
def average_(averages: list[Tensor], parameters: list[Tensor], decay: float) -> None:
    """Take e = decay e + (1 - decay) p, in place. Averages are float32 or wider. Karras et al., arXiv 1710.10196."""
    if averages:
        torch._foreach_lerp_(averages, [_wide(p) for p in parameters], 1 - decay)


class Tally(IntEnum):
    """Places in a guard's tally, [9] int64. Behind them are two of the kernel's own, which are zero between steps."""

    NONFINITE = 0  # how many elements of the last step's gradients were infinite or NaN
    FIRST = 1  # the first tensor that had one, as of the last step with any
    IN_A_ROW = 2  # steps left out in a row up to now
    SKIPPED = 3  # steps left out in all
    STEPS = 4  # steps looked at
    LAST = 5  # the last step left out
    LONGEST = 6  # the longest row of steps left out


TALLY = 9  # the length of a tally
GROWTH_INTERVAL, LEAST_SCALE, MOST_SCALE = 2000, 1.0, 2.0**24  # of a loss scale


def norm(gradients: list[Tensor]) -> Tensor:
    """Return the norm of all gradients together, 0-d float64: no square of a wide one overflows."""
    norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients])
    return norms.square().sum().sqrt()


@torch.no_grad()
def guard_(
    gradients: list[Tensor], tally: Tensor, gate: Tensor, scale: Tensor | None = None, max_norm: float | None = None
) -> None:
    """Count what is not finite in a network's gradients, and say in ``gate`` whether to leave the step out.

    ``gradients`` include the loss scale. Written are ``tally``, [TALLY] int64, where :class:`Tally` says; and ``gate``,
    [2] float64: 1 to leave the step out, else 0; what gradients are to be multiplied by: 1 / scale, and unless the step
    is left out min(1, max_norm / (norm + 1e-6)), as in ``torch.nn.utils.clip_grad_norm_``. ``scale``, [2] float32 or
    None, is the loss scale, and how many steps it has served: it is halved after a step left out and doubled after
    GROWTH_INTERVAL in a row that were not, from LEAST_SCALE up to MOST_SCALE. Micikevicius et al., arXiv 1710.03740.
    """
    counts = torch.stack([(~g.isfinite()).sum() for g in gradients])
    skip = counts.any()
    tally[Tally.NONFINITE] = counts.sum()
    tally[Tally.FIRST] = torch.where(skip, (counts > 0).int().argmax(), tally[Tally.FIRST])
    tally[Tally.IN_A_ROW] = torch.where(skip, tally[Tally.IN_A_ROW] + 1, 0)
    tally[Tally.SKIPPED] += skip
    tally[Tally.STEPS] += 1
    tally[Tally.LAST] = torch.where(skip, tally[Tally.STEPS], tally[Tally.LAST])
    tally[Tally.LONGEST] = torch.maximum(tally[Tally.LONGEST], tally[Tally.IN_A_ROW])
    gate[0], gate[1] = skip, 1.0 if scale is None else 1 / scale[0]
    if max_norm is not None:
        gate[1] *= torch.where(skip, 1, (max_norm / (norm(gradients) * gate[1] + 1e-6)).clamp(max=1))
    if scale is not None:
        served = scale[1] + 1
        grown = served >= GROWTH_INTERVAL
        halved, doubled = (0.5 * scale[0]).clamp(min=LEAST_SCALE), (2 * scale[0]).clamp(max=MOST_SCALE)
        scale[0] = torch.where(skip, halved, torch.where(grown, doubled, scale[0]))
        scale[1] = torch.where(skip | grown, 0, served)
