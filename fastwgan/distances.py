"""Exact distances between distributions, to measure a generator by and to check a critic's estimate against.

All is computed in float64 on the inputs' device, but :func:`wasserstein` matches points on the CPU. Logarithms are
natural. Arguments that are empty, not finite, of wrong type or shape, or on two devices raise TypeError or ValueError.
"""

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fastwgan import checks

__all__ = [
    "EarthMove", "earth_movers", "gaussian_js", "gaussian_kl", "gaussian_wasserstein", "js_divergence", "kl_divergence",
    "sliced_wasserstein", "wasserstein", "wasserstein_1d",
]  # fmt: skip

Numbers = Tensor | float | Sequence[float] | Sequence[Sequence[float]]

# Clouds of different sizes are matched after copying points up to so many of each: 4096^2 distances are 128 MiB.
COPIES = 4096


def _numbers(name: str, x: Numbers, device: torch.device | None = None) -> Tensor:
    """Return finite real numbers as a float64 tensor, on ``device`` where that is given, or raise."""
    if isinstance(x, Tensor) and x.is_complex():
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
    try:
        wide = x.double() if isinstance(x, Tensor) else torch.as_tensor(x, dtype=torch.float64, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected numbers, got {type(x).__name__}: {error}") from error
    if not checks.tensor(name, wide, device=device).isfinite().all():
        raise ValueError(f"{name}: expected finite values, got some that are infinite or NaN")
    return wide


def _floating(name: str, x: object, device: torch.device | None = None) -> Tensor:
    """Return a finite floating tensor [N, ...] (on ``device``, where given) as float64, or raise."""
    return _numbers(name, checks.samples(name, x), device)


def _clouds(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return two clouds of samples [n, ...], [m, ...] as float64 points [n, d], [m, d]."""
    a, b = _floating("x", x), _floating("y", y, x.device)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"y: expected samples of x's shape {tuple(a.shape[1:])}, got {tuple(b.shape[1:])}")
    return a.reshape(len(a), -1), b.reshape(len(b), -1)


def _coupling(x_cdf: Tensor, y_cdf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the [n + m] masses that sorted samples [n], [m] exchange, and between which; cdfs end in exactly 1."""
    levels = torch.cat((x_cdf, y_cdf)).sort().values
    masses = levels.diff(prepend=levels.new_zeros(1))
    return masses, torch.searchsorted(x_cdf, levels), torch.searchsorted(y_cdf, levels)


def _uniform_cdf(n: int, device: torch.device) -> Tensor:
    return torch.arange(1, n + 1, dtype=torch.float64, device=device) / n  # rounded once: 1/2 is 2/4


def _weighted_cdf(name: str, weights: object, order: Tensor) -> Tensor:
    w = _floating(name, weights, order.device)
    if w.shape != order.shape:
        raise ValueError(f"{name}: expected a weight for each sample, shape {tuple(order.shape)}, got {tuple(w.shape)}")
    if (w < 0).any() or not (w > 0).any():
        raise ValueError(f"{name}: expected weights >= 0, not all of them 0, got a sum of {w.sum().item():g}")
    # A parallel sum may fall back by a rounding, and what is searched must not.
    sums = (w / w.max())[order].cumsum(0).cummax(0).values
    return sums / sums[-1]


def wasserstein_1d(
    x: Tensor, y: Tensor, x_weights: Tensor | None = None, y_weights: Tensor | None = None, *, p: float = 1
) -> Tensor:
    """Return W_p between weighted samples on a line: (integral over u of abs(F^-1(u) - G^-1(u))^p)^(1/p), exactly.

    ``x`` [n] and ``y`` [m] are samples of any floating dtype, their weights [n] and [m] >= 0 and of any positive sum,
    None for equal ones; ``p`` >= 1 is the cost's order. The result, 0-d float64 in the samples' unit, is differentiable
    in ``x`` and ``y``. Source: Peyre and Cuturi, Computational Optimal Transport, arXiv 1803.00567, section 2.6.

    >>> wasserstein_1d(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 6.0, 7.0]))
    tensor(5.5000, dtype=torch.float64)
    """
    a, b = _floating("x", x), _floating("y", y, x.device)
    for name, values in (("x", a), ("y", b)):
        if values.dim() != 1:
            raise ValueError(f"{name}: expected shape [n], got {tuple(values.shape)}")
    checks.number("p", p, minimum=1)
    (a, a_order), (b, b_order) = a.sort(), b.sort()
    a_cdf = _uniform_cdf(len(a), a.device) if x_weights is None else _weighted_cdf("x_weights", x_weights, a_order)
    b_cdf = _uniform_cdf(len(b), b.device) if y_weights is None else _weighted_cdf("y_weights", y_weights, b_order)
    masses, i, j = _coupling(a_cdf, b_cdf)
    return (masses * (a[i] - b[j]).abs().pow(p)).sum().pow(1 / p)


class EarthMove(NamedTuple):
    """How one row of piles is made into another with the least work.

    ``total`` is 0-d, the work: amount times distance, summed. ``delta`` [n + 1] is what has to be carried over each
    boundary, from before the first pile to behind the last, where it is 0; negative is from right to left. ``plan``
    [n, n] is how much of pile i ends in pile j: rows add up to the source, columns to the target.
    """

    total: Tensor
    delta: Tensor
    plan: Tensor

    @property
    def flow(self) -> Tensor:
        """[n - 1], how much goes from each pile to the next; negative is back from the next one."""
        return self.delta[1:-1]


def earth_movers(source: Numbers, target: Numbers) -> EarthMove:
    """Return the earth mover's distance of rows of piles one unit apart, delta_{i+1} = delta_i + source_i - target_i.

    ``source`` and ``target`` are amounts [n] >= 0, tensors of any real dtype or sequences of numbers, as much in one as
    in the other. EarthMove has float64 tensors.
    Source: Rubner, Tomasi and Guibas, The Earth Mover's Distance as a Metric for Image Retrieval, IJCV 40, 2000.

    >>> move = earth_movers([3, 2, 1, 4], [1, 2, 4, 3])
    >>> move.total.item(), move.delta.tolist()
    (5.0, [0.0, 2.0, 2.0, -1.0, 0.0])
    """
    a = _numbers("source", source)
    b = _numbers("target", target, a.device)
    if a.dim() != 1:
        raise ValueError(f"source: expected shape [n], got {tuple(a.shape)}")
    checks.like("target", b, "source", a, shape=True)
    for name, piles in (("source", a), ("target", b)):
        if (piles < 0).any():
            raise ValueError(f"{name}: expected amounts >= 0, got {piles.min().item():g}")
    if not torch.isclose(a.sum(), b.sum(), rtol=1e-8, atol=0):
        raise ValueError(f"target: expected as much as in source, {a.sum().item():g}, got {b.sum().item():g}")
    delta = pad((a - b).cumsum(0)[:-1], (1, 1))
    left, right = (pad(piles.cumsum(0), (1, 0)) for piles in (a, b))
    # Kept in order, pile i fills (left[i], left[i + 1]] of all the earth, and so does it after the move.
    plan = torch.minimum(left[1:, None], right[None, 1:]) - torch.maximum(left[:-1, None], right[None, :-1])
    return EarthMove(delta.abs().sum(), delta, plan.clamp(min=0))


def wasserstein(x: Tensor, y: Tensor) -> Tensor:
    """Return W_1 with Euclidean cost between clouds of equally weighted points, exactly: the cost of the best matching.

    ``x`` and ``y`` are points [n, d] and [m, d], or samples [n, ...] and [m, ...] which are flattened, of any floating
    dtype; the result is a 0-d float64 tensor on their device, without a graph. Takes seconds for 2000 points against
    2000, and memory and time for n times m distances.
    Source: Villani, Optimal Transport, Old and New, 2009, definition 6.1; for equal weights the optimum is a matching
    by Birkhoff's theorem, Peyre and Cuturi, arXiv 1803.00567, proposition 2.1.

    Raises:
        ImportError: SciPy is not installed; or POT is not, and n and m differ with a common multiple above both and
            above 4096, so that points cannot be copied until they match one to one.

    >>> wasserstein(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[1.0, 2.0], [0.0, 2.0]]))
    tensor(2., dtype=torch.float64)
    """
    a, b = (cloud.detach() for cloud in _clouds(x, y))
    common = math.lcm(len(a), len(b))
    if common <= max(len(a), len(b), COPIES):
        a, b = (cloud.repeat_interleave(common // len(cloud), 0) for cloud in (a, b))
    # By differences: through a matrix product near points would lose their distance.
    cost = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").cpu().numpy()
    total = _matching_cost(cost) if len(a) == len(b) else _transport_cost(cost)
    return torch.tensor(total, dtype=torch.float64, device=x.device)


def _solver(module: str, use: str) -> Any:
    """Return a module that may not be installed, or raise ImportError with what to do then."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{use} with it; pip install 'fastwgan[distances]'") from error


def _matching_cost(cost: np.ndarray) -> float:
    """Return the least mean cost of matching rows with columns one to one."""
    assigned = _solver("scipy.optimize", "scipy: wasserstein matches points").linear_sum_assignment(cost)
    return float(cost[assigned].mean())


def _transport_cost(cost: np.ndarray) -> float:
    """Return the least mean cost of carrying equally weighted rows to equally weighted columns."""
    n, m = cost.shape
    ot = _solver("ot", f"ot: wasserstein matches {n} with {m} points")
    total, log = ot.emd2([], [], cost, numItermax=10**9, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"ot: no optimum was found for {n} and {m} points: {log['warning']}")
    return float(total)


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int = 128, seed: int = 0, p: float = 1) -> Tensor:
    """Return (mean over directions, drawn from the sphere, of W_p(x's projection, y's projection)^p)^(1/p).

    Each projection's distance is exact; their mean, at most W_p, estimates the one over all directions. ``x`` and
    ``y`` are as of :func:`wasserstein`; ``seed`` in [0, 2^63) draws ``projections`` directions, alike on any device;
    ``p`` >= 1 is the cost's order. The result, 0-d float64 in the points' unit, is differentiable in ``x`` and ``y``.
    Source: Bonneel, Rabin, Peyre and Pfister, Sliced and Radon Wasserstein Barycenters of Measures, JMIV 51, 2015.

    >>> sliced_wasserstein(torch.zeros(3, 1), torch.ones(5, 1))  # on a line there are no other directions
    tensor(1., dtype=torch.float64)
    """
    a, b = _clouds(x, y)
    checks.count("projections", projections)
    checks.seed("seed", seed)
    checks.number("p", p, minimum=1)
    random = torch.Generator().manual_seed(seed)
    directions = torch.randn(projections, a.shape[1], generator=random, dtype=torch.float64)
    directions = (directions / directions.norm(dim=1, keepdim=True)).to(a.device)
    a, b = ((directions @ cloud.T).sort(1).values for cloud in (a, b))
    masses, i, j = _coupling(_uniform_cdf(a.shape[1], a.device), _uniform_cdf(b.shape[1], a.device))
    return torch.mv((a[:, i] - b[:, j]).abs().pow(p), masses).mean().pow(1 / p)


def _distributions(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities [..., n] of both, made to add up to 1 in float64 as they do in their dtype."""
    a, b = _floating("p", p), _floating("q", q, p.device)
    for name, x, dtype in (("p", a, p.dtype), ("q", b, q.dtype)):
        if (x < 0).any():
            raise ValueError(f"{name}: expected probabilities >= 0, got {x.min().item():g}")
        off = (x.sum(-1) - 1).abs()
        # A float64 copy of narrower numbers adds up no better than they do.
        if (off > max(1e-5, torch.finfo(dtype).eps ** 0.5)).any():
            got = x.sum(-1).flatten()[off.argmax()].item()
            raise ValueError(f"{name}: expected probabilities that add up to 1 along the last dimension, got {got:.7g}")
    checks.like("q", b, "p", a, shape=True)
    return a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q) = sum of p * log(p / q), with 0 log 0 = 0; infinite where p has mass and q has none.

    ``p`` and ``q`` are probabilities [..., n] of any floating dtype; the result is [...] float64, in nats, >= 0. They
    add up to 1 along the last dimension, to 1e-5 or the root of the dtype's rounding error (else ValueError), and are
    divided by their sum. Source: Kullback and Leibler, On Information and Sufficiency, Ann. Math. Statist. 22, 1951.

    >>> kl_divergence(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.75, 0.0]))
    tensor(0.1438, dtype=torch.float64)
    """
    a, b = _distributions(p, q)
    return (torch.xlogy(a, a) - torch.xlogy(a, b)).sum(-1).clamp(min=0)


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return JS(p, q) = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2: log 2 for disjoint supports, never more.

    Arguments and result are as of :func:`kl_divergence`. (SciPy's ``jensenshannon`` is its square root.)
    Source: Lin, Divergence Measures Based on the Shannon Entropy, IEEE Trans. Inf. Theory 37, 1991.

    >>> js_divergence(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor(0.6931, dtype=torch.float64)
    """
    a, b = _distributions(p, q)
    total = (a + b).where(a + b > 0, 1)  # not its half: that of the least float64 is 0
    twice = (torch.xlogy(a, 2 * (a / total)) + torch.xlogy(b, 2 * (b / total))).sum(-1)
    return (twice / 2).clamp(0, math.log(2))


def _gaussians(mean_p: Numbers, cov_p: Numbers, mean_q: Numbers, cov_q: Numbers) -> list[Tensor]:
    """Return means [d] and covariances [d, d] of both, from numbers or tensors."""
    first = _numbers("mean_p", mean_p)
    if first.dim() > 1:
        raise ValueError(f"mean_p: expected shape [d], got {tuple(first.shape)}")
    d = first.numel()
    parts = [first.reshape(d)]
    for name, x, shape in (("cov_p", cov_p, (d, d)), ("mean_q", mean_q, (d,)), ("cov_q", cov_q, (d, d))):
        part = _numbers(name, x, first.device)
        if part.shape != (shape if first.dim() else ()):
            expected = f"shape {shape}, as mean_p has {d} elements" if first.dim() else "a number, as mean_p is"
            raise ValueError(f"{name}: expected {expected}, got shape {tuple(part.shape)}")
        parts.append(part.reshape(shape))
        if len(shape) > 1 and (parts[-1] - parts[-1].T).abs().max() > 1e-6 * part.abs().max():
            raise ValueError(f"{name}: expected a symmetric matrix, got one that is not")
    return parts


def _cholesky(name: str, cov: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(cov)
    if failed:
        raise ValueError(f"{name}: expected a positive definite covariance, got one that is not")
    return factor


def gaussian_kl(mean_p: Numbers, cov_p: Numbers, mean_q: Numbers, cov_q: Numbers) -> Tensor:
    """Return KL(P || Q) of Gaussians, (tr(C_q^-1 C_p) + u' C_q^-1 u - d + log(det C_q / det C_p)) / 2, u = m_q - m_p.

    Means are [d] and covariances (variances, not standard deviations) [d, d] and positive definite; or all are numbers.
    The result is a 0-d float64 tensor, in nats.
    Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, equation A.23.

    >>> gaussian_kl(0.0, 1.0, 1.0, 1.0)
    tensor(0.5000, dtype=torch.float64)
    """
    m_p, c_p, m_q, c_q = _gaussians(mean_p, cov_p, mean_q, cov_q)
    l_p, l_q = _cholesky("cov_p", c_p), _cholesky("cov_q", c_q)
    whitened: Tensor = torch.linalg.solve_triangular(l_q, torch.cat((l_p, (m_q - m_p)[:, None]), 1), upper=False)
    log_determinants = 2 * (l_q.diagonal().log() - l_p.diagonal().log()).sum()
    return (whitened.square().sum() - len(m_p) + log_determinants).clamp(min=0) / 2


def gaussian_js(mean_p: Numbers, cov_p: Numbers, mean_q: Numbers, cov_q: Numbers) -> Tensor:
    """Return JS(P, Q) of one-dimensional Gaussians, by quadrature: it has no closed form.

    The error is below 1e-12: Gauss-Legendre, 16 nodes to each standard deviation of both, 12 to either side. Means are
    numbers or [1], variances > 0 numbers or [1, 1]; the result is a 0-d float64 tensor, in nats, in [0, log 2].
    Source: Lin, Divergence Measures Based on the Shannon Entropy, IEEE Trans. Inf. Theory 37, 1991.

    >>> gaussian_js(0.0, 1.0, 1.0, 1.0)
    tensor(0.1114, dtype=torch.float64)
    """
    m_p, c_p, m_q, c_q = _gaussians(mean_p, cov_p, mean_q, cov_q)
    if len(m_p) > 1:
        raise ValueError(f"mean_p: expected one dimension, got {len(m_p)}")
    s_p, s_q = _cholesky("cov_p", c_p)[0], _cholesky("cov_q", c_q)[0]
    steps = torch.linspace(-12, 12, 25, dtype=torch.float64, device=m_p.device)
    edges = torch.cat((m_p + s_p * steps, m_q + s_q * steps)).sort().values
    nodes, weights = (torch.as_tensor(a, device=m_p.device) for a in np.polynomial.legendre.leggauss(16))
    half = edges.diff()[:, None] / 2
    x = edges[:-1, None] + half * (1 + nodes)
    log_p, log_q = (-(((x - m) / s) ** 2 + math.log(2 * math.pi)) / 2 - s.log() for m, s in ((m_p, s_p), (m_q, s_q)))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    density = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
    return ((density * weights * half).sum() / 2).clamp(0, math.log(2))


def gaussian_wasserstein(mean_p: Numbers, cov_p: Numbers, mean_q: Numbers, cov_q: Numbers) -> Tensor:
    """Return W_2 of Gaussians, whose square is |m_p - m_q|^2 + tr(C_p + C_q - 2 (C_p^1/2 C_q C_p^1/2)^1/2).

    Arguments are as of :func:`gaussian_kl`, but covariances may be semidefinite; the result is a 0-d float64 tensor, in
    the samples' unit. Its square, of features, is the Frechet distance that FID is.
    Source: Dowson and Landau, The Frechet Distance between Multivariate Normal Distributions, JMVA 12, 1982.

    >>> gaussian_wasserstein([0.0, 0.0], [[1.0, 0.0], [0.0, 4.0]], [3.0, 4.0], [[1.0, 0.0], [0.0, 4.0]])
    tensor(5., dtype=torch.float64)
    """
    m_p, c_p, m_q, c_q = _gaussians(mean_p, cov_p, mean_q, cov_q)
    root_p, root_q = _root("cov_p", c_p), _root("cov_q", c_q)
    # The trace is min |C_p^1/2 - C_q^1/2 U|^2 over rotations U: in this form nearly equal matrices do not cancel.
    u, _, vh = torch.linalg.svd(root_q @ root_p)
    distance: Tensor = torch.cat((m_p - m_q, (root_p - root_q @ (u @ vh)).flatten())).norm()
    return distance


def _root(name: str, cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    if values[0] < -1e-6 * values[-1].abs():
        raise ValueError(f"{name}: expected a positive semidefinite covariance, got eigenvalue {values[0].item():g}")
    return torch.mm(vectors * values.clamp(min=0).sqrt(), vectors.T)
