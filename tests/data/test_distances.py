"""Distances against SciPy, closed forms, brute force, and what makes a distance one."""

import itertools
import math
import sys
import time

import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.spatial.distance
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastwgan import distances
from fastwgan.distances import (
    earth_movers,
    gaussian_js,
    gaussian_kl,
    gaussian_wasserstein,
    js_divergence,
    kl_divergence,
    sliced_wasserstein,
    wasserstein,
    wasserstein_1d,
)

LOG2 = math.log(2)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def assert_close(actual, expected, rtol=1e-12, atol=1e-14):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert isinstance(actual, Tensor)
    torch.testing.assert_close(actual.cpu(), expected, rtol=rtol, atol=atol)


def cloud(n, d, seed, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, 1, (n, d)))


def simplex(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).dirichlet(np.full(shape[-1], 0.7), shape[:-1]))


def covariance(d, seed):
    root = cloud(d, d, seed)
    return root @ root.T + 0.1 * torch.eye(d)


def brute_force(x, y):
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    rows = range(len(x))
    return min(sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(rows)) / len(x)


# On a line


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (5, 5), (12, 18), (7, 4), (300, 1001)])
@pytest.mark.parametrize("weighted", ["neither", "x", "both"])
@pytest.mark.parametrize("values", ["normal", "ties"])
def test_on_a_line_as_scipy(n, m, weighted, values):
    random = np.random.default_rng(n * m)
    x, y = (
        random.normal(s, 2, k) if values == "normal" else random.integers(-2, 3, k) * 1.0 for k, s in ((n, 0), (m, 1))
    )
    wx, wy = (random.random(k) * (random.random(k) > 0.3) + (np.arange(k) == k // 2) for k in (n, m))
    wx, wy = (wx if weighted != "neither" else None), (wy if weighted == "both" else None)
    tensors = (None if a is None else torch.from_numpy(a) for a in (x, y, wx, wy))
    assert_close(wasserstein_1d(*tensors), scipy.stats.wasserstein_distance(x, y, wx, wy))


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_order_p_is_that_of_quantiles(p):
    x, y = cloud(6, 1, 0)[:, 0], cloud(4, 1, 1, 1.0)[:, 0]
    a, b = (v.sort().values.repeat_interleave(12 // len(v)) for v in (x, y))  # quantiles at multiples of 1/12
    assert_close(wasserstein_1d(x, y, p=p), ((a - b).abs() ** p).mean() ** (1 / p))
    assert_close(wasserstein_1d(x, x + 3, p=p), 3)


def test_weights_are_repetitions_and_any_multiple_of_them_does():
    x, y = cloud(4, 1, 0)[:, 0], cloud(5, 1, 1)[:, 0]
    counts = torch.tensor([1, 0, 3, 2])
    expected = wasserstein_1d(x.repeat_interleave(counts), y)
    for factor in (1, 1e-300, 5e307):
        assert_close(wasserstein_1d(x, y, counts.double() * factor), expected)
        assert_close(wasserstein_1d(y, x, None, counts.double() * factor), expected)


def test_gaussian_quantiles_on_a_line():
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    z = torch.special.ndtri(u)
    for p in (1, 2):
        assert_close(wasserstein_1d(2 + z, 5 + z, p=p), 3, rtol=1e-9)
    assert_close(wasserstein_1d(z, 3 * z, p=2), gaussian_wasserstein(0.0, 1.0, 0.0, 9.0), rtol=1e-3)
    assert_close(wasserstein_1d(z, 3 * z), 2 * math.sqrt(2 / math.pi), rtol=1e-3)


def test_gradient_on_a_line():
    x, y = (cloud(n, 1, n)[:, 0].requires_grad_() for n in (5, 3))
    assert torch.autograd.gradcheck(wasserstein_1d, (x, y))
    assert torch.autograd.gradcheck(lambda x, y: wasserstein_1d(x, y, p=2), (x, y))


# Piles


def test_the_example():
    move = earth_movers([3, 2, 1, 4], [1, 2, 4, 3])
    assert move.total.item() == 5
    assert move.delta.tolist() == [0, 2, 2, -1, 0]
    assert move.flow.tolist() == [2, 2, -1]
    assert move.plan.tolist() == [[1, 2, 0, 0], [0, 0, 2, 0], [0, 0, 1, 0], [0, 0, 1, 3]]


@pytest.mark.parametrize("n", [1, 2, 9, 100])
def test_piles_are_weights_at_unit_distances(n):
    source, target = (13 * simplex(n, seed=s) for s in (1, 2))
    move = earth_movers(source, target)
    at = torch.arange(n, dtype=torch.float64)
    assert_close(move.total, 13 * wasserstein_1d(at, at, source, target), atol=1e-12)
    assert (move.plan >= 0).all()
    assert_close(move.plan.sum(1), source, atol=1e-12)
    assert_close(move.plan.sum(0), target, atol=1e-12)
    assert_close((move.plan * (at[:, None] - at).abs()).sum(), move.total, atol=1e-12)
    assert move.delta[0] == move.delta[-1] == 0
    assert (move.delta.shape, move.flow.shape, move.plan.shape) == ((n + 1,), (n - 1,), (n, n))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_piles_of_any_dtype(dtype, device):
    source, target = (torch.tensor(x, dtype=dtype, device=device) for x in ([3, 2, 1, 4], [1, 2, 4, 3]))
    move = earth_movers(source, target)
    assert move.total.item() == earth_movers(target, source).total.item() == 5
    assert {(x.dtype, x.device) for x in move} == {(torch.float64, source.device)}


# Clouds


@pytest.mark.parametrize("n", [1, 2, 3, 6])
@pytest.mark.parametrize("d", [1, 2, 5])
def test_clouds_as_by_trying_all_matchings(n, d):
    x, y = cloud(n, d, n), cloud(n, d, d, 0.5)
    assert_close(wasserstein(x, y), brute_force(x, y))


@pytest.mark.parametrize(("n", "m"), [(1, 6), (2, 3), (3, 6)])
def test_clouds_of_different_sizes_as_by_trying_all_matchings_of_copies(n, m):
    x, y = cloud(n, 2, n), cloud(m, 2, m)
    assert_close(wasserstein(x, y), brute_force(x.repeat(6 // n, 1), y.repeat(6 // m, 1)))
    assert_close(wasserstein(y, x), wasserstein(x, y))


def test_clouds_on_a_line():
    for n, m in ((40, 40), (40, 60)):
        x, y = cloud(n, 1, 0), cloud(m, 1, 1, 1.0)
        assert_close(wasserstein(x, y), wasserstein_1d(x[:, 0], y[:, 0]))


@pytest.mark.parametrize("shape", [(50, 3), (20, 1, 4, 4)])
def test_a_translated_cloud_is_as_far_as_the_shift(shape):
    x, shift = torch.randn(2, *shape, dtype=torch.float64)
    permuted = (x + shift[0])[torch.randperm(len(x))]
    assert_close(wasserstein(x, permuted), shift[0].norm())


def test_near_points_keep_their_distance():
    x = 1e4 + cloud(100, 3, 0)
    assert_close(wasserstein(x, x + torch.tensor([1e-6, 0, 0])), 1e-6, rtol=1e-4)


def test_a_large_matching_takes_seconds():
    x, y = cloud(2000, 2, 0), cloud(2000, 2, 1)
    start = time.process_time()
    total = wasserstein(x, y)
    assert time.process_time() - start < 60
    cheapest = torch.cdist(x, y).min(1).values.mean()
    in_order = (x - y).norm(dim=1).mean()
    assert cheapest < total < in_order / 3


def transport(x, y):
    """The optimum of Kantorovich's dual, which is a linear program without any matching in it."""
    cost = scipy.spatial.distance.cdist(x, y)
    n, m = cost.shape
    rows = np.zeros((n * m, n + m))
    rows[np.arange(n * m), np.repeat(np.arange(n), m)] = 1
    rows[np.arange(n * m), n + np.tile(np.arange(m), n)] = 1
    return -scipy.optimize.linprog(
        -np.r_[np.full(n, 1 / n), np.full(m, 1 / m)], A_ub=rows, b_ub=cost.ravel(), bounds=(None, None)
    ).fun


def test_clouds_of_different_sizes_satisfy_duality():
    x, y = cloud(12, 3, 0), cloud(20, 3, 1, 0.3)
    assert_close(wasserstein(x, y), transport(x, y), rtol=1e-7)


def test_sizes_without_a_small_multiple_take_pot(monkeypatch):
    x, y = cloud(65, 2, 0), cloud(64, 2, 1)
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"^ot: .* 65 with 64 points .*pip install .fastwgan\[distances\]"):
        wasserstein(x, y)
    monkeypatch.setattr(distances, "COPIES", 0)
    assert_close(wasserstein(x[:32], y), wasserstein(y, x[:32]))  # no need of it: 64 of each
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ot", None)
    wasserstein(x[:60], y)  # 960 copies are few enough


def test_pot_gives_what_matching_gives(monkeypatch):
    pytest.importorskip("ot", reason="POT is not installed")
    x, y = cloud(30, 2, 0), cloud(45, 2, 1)
    expected = wasserstein(x, y)
    monkeypatch.setattr(distances, "COPIES", 0)
    monkeypatch.setattr(distances, "_matching_cost", None)
    assert_close(wasserstein(x, y), expected)


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"^scipy: .*pip install .fastwgan\[distances\]"):
        wasserstein(torch.zeros(2, 1), torch.zeros(2, 1))


# Slices


@pytest.mark.parametrize(("n", "m"), [(9, 9), (9, 6), (5, 7)])
@pytest.mark.parametrize("p", [1, 2])
def test_slices_of_a_line_are_exact(n, m, p):
    x, y = cloud(n, 1, n), cloud(m, 1, m, 1.0)
    assert_close(sliced_wasserstein(x, y, projections=3, p=p), wasserstein_1d(x[:, 0], y[:, 0], p=p))


@pytest.mark.parametrize("d", [2, 3, 10])
def test_slices_of_a_translated_cloud(d):
    """W_p of a slice is abs(direction . shift): E = Gamma(d/2) / (sqrt(pi) Gamma((d + 1)/2)), E of squares = 1/d."""
    x = cloud(30, d, d)
    shift = torch.full((d,), 2 / math.sqrt(d), dtype=torch.float64)
    mean = 2 * math.gamma(d / 2) / (math.sqrt(math.pi) * math.gamma((d + 1) / 2))
    assert_close(sliced_wasserstein(x, x + shift, projections=40_000), mean, rtol=0.02)
    assert_close(sliced_wasserstein(x, x + shift, projections=40_000, p=2), 2 / math.sqrt(d), rtol=0.02)


def test_slices_are_no_further_than_the_clouds():
    x, y = cloud(40, 5, 0), cloud(60, 5, 1, 0.5)
    assert 0 < sliced_wasserstein(x, y) < wasserstein(x, y)
    assert sliced_wasserstein(x, x[torch.randperm(40)]) < 1e-14


def test_the_seed_is_what_slices_depend_on():
    x, y = cloud(10, 3, 0), cloud(10, 3, 1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sliced_wasserstein(x, y, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert sliced_wasserstein(x, y, seed=4) == first != sliced_wasserstein(x, y, seed=5)
    images = (v.view(10, 1, 3) for v in (x, y))
    assert sliced_wasserstein(*images, seed=4) == first


def test_gradient_of_slices():
    x, y = (cloud(n, 2, n).requires_grad_() for n in (5, 3))
    assert torch.autograd.gradcheck(lambda x, y: sliced_wasserstein(x, y, projections=4), (x, y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_narrow_samples_are_measured_as_their_values_are(dtype, device):
    x, y = (cloud(n, 2, n).to(dtype) for n in (8, 12))
    for distance in (wasserstein, sliced_wasserstein, lambda x, y: wasserstein_1d(x[:, 0], y[:, 1])):
        value = distance(x.to(device), y.to(device))
        assert (value.dtype, value.device.type, value.shape) == (torch.float64, device, ())
        assert_close(value, distance(x.double(), y.double()))


# What makes them distances

POINTS = st.lists(st.tuples(*[st.floats(-50, 50)] * 2), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None)
@given(POINTS, POINTS, POINTS)
@pytest.mark.parametrize(
    "distance",
    [
        wasserstein,
        lambda x, y: sliced_wasserstein(x, y, projections=8),
        lambda x, y: wasserstein_1d(x[:, 0], y[:, 0], p=2),
    ],
    ids=["wasserstein", "sliced", "line"],
)
def test_metric_axioms(distance, a, b, c):
    x, y, z = (torch.tensor(points, dtype=torch.float64) for points in (a, b, c))
    xy = distance(x, y)
    assert xy >= 0
    assert distance(x, x) == 0
    assert_close(distance(y, x), xy, atol=1e-10)
    assert distance(x, z) <= xy + distance(y, z) + 1e-10
    assert_close(distance(2 * x + 1, 2 * y + 1), 2 * xy, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_divergences_of_any_distributions(p, q):
    n = min(len(p), len(q))
    p, q = (torch.tensor([*v[:n], 1e-300], dtype=torch.float64) for v in (p, q))
    p, q = p / p.sum(), q / q.sum()
    js = js_divergence(p, q)
    assert kl_divergence(p, p) == 0
    assert js_divergence(p, p) == 0
    assert 0 <= js <= LOG2
    assert_close(js_divergence(q, p), js)
    total_variation = (p - q).abs().sum() / 2
    assert kl_divergence(p, q) >= 2 * total_variation**2 - 1e-12  # Pinsker's inequality
    assert js <= total_variation * LOG2 + 1e-12


# Discrete divergences


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4)])
def test_discrete_divergences_as_scipy(shape):
    p, q = simplex(*shape, seed=1), simplex(*shape, seed=2)
    assert_close(kl_divergence(p, q), scipy.stats.entropy(p, q, axis=-1))
    assert_close(js_divergence(p, q), scipy.spatial.distance.jensenshannon(p, q, axis=-1) ** 2)


def test_conventions_at_zero():
    p, q, r = (torch.tensor(x) for x in ([0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.25, 0.75, 0.0]))
    assert kl_divergence(p, q) == math.inf
    assert_close(kl_divergence(p, r), 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert_close(js_divergence(p, q), LOG2 / 2)
    one, other = torch.eye(2)
    assert kl_divergence(one, other) == math.inf
    assert js_divergence(one, other) == LOG2
    assert kl_divergence(one, one) == js_divergence(one, one) == 0
    assert kl_divergence(torch.stack((p, p)), torch.stack((q, r))).isinf().tolist() == [True, False]
    least = torch.tensor([5e-324, 1.0], dtype=torch.float64)
    assert js_divergence(least, torch.tensor([0.0, 1.0], dtype=torch.float64)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_divergences_of_narrow_probabilities(dtype, device):
    p, q = (torch.randn(4, 50, device=device).softmax(1).to(dtype) for _ in range(2))
    for divergence in (kl_divergence, js_divergence):
        value = divergence(p, q)
        assert (value.dtype, value.device.type, value.shape) == (torch.float64, device, (4,))
        wide = (v.double().cpu() / v.double().cpu().sum(1, keepdim=True) for v in (p, q))
        assert_close(value, divergence(*wide))
        assert (divergence(p, p) == 0).all()


# Gaussians


def test_gaussian_kl_on_a_line():
    for m_p, v_p, m_q, v_q in ((0.0, 1.0, 0.0, 1.0), (1.0, 4.0, -2.0, 0.25), (0.0, 1e-8, 3.0, 1e8)):
        expected = (math.log(v_q / v_p) + (v_p + (m_p - m_q) ** 2) / v_q - 1) / 2
        assert_close(gaussian_kl(m_p, v_p, m_q, v_q), expected)
        assert_close(gaussian_kl([m_p], [[v_p]], [m_q], [[v_q]]), expected)


@pytest.mark.parametrize("d", [1, 2, 6])
def test_gaussian_kl_as_torch_has_it(d):
    parts = cloud(1, d, 0)[0], covariance(d, 1), cloud(1, d, 2)[0], covariance(d, 3)
    p, q = (torch.distributions.MultivariateNormal(parts[i], parts[i + 1]) for i in (0, 2))
    assert_close(gaussian_kl(*parts), torch.distributions.kl_divergence(p, q), rtol=1e-10)


@pytest.mark.parametrize(
    ("m", "s"), [(0.0, 1.0), (1.0, 1.0), (0.0, 3.0), (2.0, 0.1), (0.5, 1e-4), (30.0, 2.0), (1e-3, 1.0), (0.0, 1e6)]
)
def test_gaussian_js_as_by_adaptive_quadrature(m, s):
    def part(m_p, s_p, m_q, s_q):
        """E_p log(2 p / (p + q)), over pieces that are short where either density is."""

        def density(x):
            log_p, log_q = (-(((x - m) / s) ** 2) / 2 - math.log(s) for m, s in ((m_p, s_p), (m_q, s_q)))
            return math.exp(log_p) / math.sqrt(2 * math.pi) * (log_p + LOG2 - np.logaddexp(log_p, log_q))

        edges = sorted({m + s * k for m, s in ((m_p, s_p), (m_q, s_q)) for k in range(-15, 16)})
        return sum(scipy.integrate.quad(density, a, b, epsabs=1e-15)[0] for a, b in itertools.pairwise(edges))

    expected = (part(0, 1, m, s) + part(m, s, 0, 1)) / 2
    js = gaussian_js(0.0, 1.0, m, s**2)
    assert_close(js, expected, rtol=0, atol=1e-12)
    assert_close(gaussian_js(m, s**2, 0.0, 1.0), js)
    assert_close(gaussian_js([7 + 5 * m], [[25 * s**2]], [7.0], [[25.0]]), js, atol=1e-12)  # whatever the unit
    assert 0 <= js <= LOG2


def test_gaussian_js_at_its_ends():
    assert gaussian_js(3.0, 2.0, 3.0, 2.0) < 1e-15
    assert_close(gaussian_js(0.0, 1.0, 1e6, 1.0), LOG2)
    # To second order in the distance e the JS divergence is e^2 / 8.
    assert_close(gaussian_js(0.0, 1.0, 1e-3, 1.0), 1e-6 / 8, rtol=1e-6)


def test_gaussian_wasserstein_closed_forms():
    assert_close(gaussian_wasserstein(1.0, 4.0, 5.0, 25.0), 5)  # sqrt(4^2 + (5 - 2)^2)
    a, b = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 1.0, 4.0])  # commuting, one of them singular
    expected = (3 + ((a.sqrt() - b.sqrt()) ** 2).sum()).sqrt()
    assert_close(gaussian_wasserstein([0, 0, 0], a.diag(), [1, 1, 1], b.diag()), expected, rtol=1e-6)
    m_p, c_p, m_q, c_q = cloud(1, 5, 0)[0], covariance(5, 1), cloud(1, 5, 2)[0], covariance(5, 3)
    cross = scipy.linalg.sqrtm((c_p @ c_q).numpy()).real
    squared = (m_p - m_q).square().sum() + c_p.trace() + c_q.trace() - 2 * np.trace(cross)
    assert_close(gaussian_wasserstein(m_p, c_p, m_q, c_q), squared.sqrt(), rtol=1e-10)
    assert gaussian_wasserstein(m_p, c_p, m_p, c_p) < 1e-13
    assert_close(gaussian_wasserstein(m_p, c_p, m_p, c_p * (1 + 1e-9) ** 2), 1e-9 * c_p.trace().sqrt(), rtol=1e-4)


def test_samples_stay_on_their_device_whatever_the_default_one_is():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    expected = distances.kl_divergence(p, q), distances.wasserstein_1d(p, q)
    with torch.device("meta"):
        found = distances.kl_divergence(p, q), distances.wasserstein_1d(p, q)
    assert found == expected
    assert found[0].device.type == "cpu"


@pytest.mark.parametrize("device", DEVICES)
def test_gaussians_of_tensors_and_numbers(device):
    parts = torch.zeros(2, device=device), torch.eye(2), torch.ones(2), 2 * torch.eye(2)
    parts = [x.to(device) for x in parts]
    for function in (gaussian_kl, gaussian_wasserstein):
        value = function(*parts)
        assert (value.dtype, value.device.type, value.shape) == (torch.float64, device, ())
        assert_close(value, function(*(x.tolist() for x in parts)))


# Misuse

NAN, INF = float("nan"), float("inf")
LINE, PLANE, HALVES = torch.zeros(3), torch.zeros(3, 2), torch.tensor([0.5, 0.5])
EYE = torch.eye(2)
MISUSE = [
    (wasserstein_1d, ([1.0], LINE), TypeError, "x: expected a tensor, got list"),
    (wasserstein_1d, (LINE.int(), LINE), TypeError, "x: expected float16"),
    (wasserstein_1d, (LINE, PLANE), ValueError, "y: expected shape [n], got (3, 2)"),
    (wasserstein_1d, (LINE, torch.zeros(0)), ValueError, "y: expected at least one element"),
    (wasserstein_1d, (LINE, LINE, torch.ones(2)), ValueError, "x_weights: expected a weight for each sample"),
    (wasserstein_1d, (LINE, LINE, None, -torch.ones(3)), ValueError, "y_weights: expected weights >= 0"),
    (wasserstein_1d, (LINE, LINE, LINE), ValueError, "x_weights: expected weights >= 0, not all of them 0"),
    (wasserstein_1d, (LINE, LINE, LINE + NAN), ValueError, "x_weights: expected finite values"),
    (wasserstein_1d, (LINE, LINE + NAN), ValueError, "y: expected finite values"),
    (wasserstein_1d, (LINE - INF, LINE), ValueError, "x: expected finite values"),
    (lambda: wasserstein_1d(LINE, LINE, p=0.5), (), ValueError, "p: expected a finite number >= 1"),
    (lambda: sliced_wasserstein(PLANE, PLANE, p="1"), (), TypeError, "p: expected a number"),
    (lambda: sliced_wasserstein(PLANE, PLANE, projections=0), (), ValueError, "projections: expected an int >= 1"),
    (lambda: sliced_wasserstein(PLANE, PLANE, projections=2.0), (), TypeError, "projections: expected an int"),
    (lambda: sliced_wasserstein(PLANE, PLANE, seed=-1), (), ValueError, "seed: expected an int in"),
    *[
        (distance, arguments, ValueError, message)
        for distance in (wasserstein, sliced_wasserstein)
        for arguments, message in [
            ((PLANE, LINE), "y: expected samples of x's shape (2,), got ()"),
            ((PLANE * NAN, PLANE), "x: expected finite values"),
            ((PLANE, PLANE + INF), "y: expected finite values"),
            ((torch.tensor(1.0), PLANE), "x: expected shape [N, ...], got a 0-d tensor"),
            ((torch.zeros(0, 2), PLANE), "x: expected at least one element, got shape (0, 2)"),
        ]
    ],
    (earth_movers, ("ab", [1]), TypeError, "source: expected numbers, got str"),
    (earth_movers, ([1j], [1]), TypeError, "source: expected"),
    (earth_movers, (torch.tensor([1j]), [1]), TypeError, "source: expected real numbers"),
    (earth_movers, ([[1]], [[1]]), ValueError, "source: expected shape [n], got (1, 1)"),
    (earth_movers, ([1, 2], [3]), ValueError, "target: expected source's shape (2,), got (1,)"),
    (earth_movers, ([2, -1], [1, 0]), ValueError, "source: expected amounts >= 0, got -1"),
    (earth_movers, ([1, 2], [1, 3]), ValueError, "target: expected as much as in source, 3, got 4"),
    (earth_movers, ([1, NAN], [1, 2]), ValueError, "source: expected finite values"),
    *[
        (divergence, arguments, ValueError, message)
        for divergence in (kl_divergence, js_divergence)
        for arguments, message in [
            ((HALVES, 2 * HALVES), "q: expected probabilities that add up to 1 along the last dimension, got 2"),
            ((torch.tensor([1.5, -0.5]), HALVES), "p: expected probabilities >= 0, got -0.5"),
            ((HALVES, HALVES * NAN), "q: expected finite values"),
            ((HALVES, torch.stack((HALVES, HALVES))), "q: expected p's shape (2,), got (2, 2)"),
            ((HALVES.double() + 1e-4, HALVES), "p: expected probabilities that add up to 1"),
        ]
    ],
    *[
        (function, arguments, error, message)
        for function in (gaussian_kl, gaussian_js, gaussian_wasserstein)
        for arguments, error, message in [
            ((0.0, -1.0, 0.0, 1.0), ValueError, "cov_p: expected a positive"),
            ((0.0, 1.0, 0.0, EYE), ValueError, "cov_q: expected a number, as mean_p is, got shape (2, 2)"),
            (([0.0], [[1.0]], [0.0, 1.0], EYE), ValueError, "mean_q: expected shape (1,), as mean_p has 1 elements"),
            ((EYE, EYE, EYE, EYE), ValueError, "mean_p: expected shape [d], got (2, 2)"),
            (([0.0, 0.0], [[1, 0.5], [0, 1]], [0.0, 0.0], EYE), ValueError, "cov_p: expected a symmetric matrix"),
            ((0.0, 1.0, NAN, 1.0), ValueError, "mean_q: expected finite values"),
            ((0.0, "1", 0.0, 1.0), TypeError, "cov_p: expected numbers, got str"),
        ]
    ],
    (gaussian_kl, ([0, 0], EYE, [0, 0], [[1, 1], [1, 1]]), ValueError, "cov_q: expected a positive definite"),
    (gaussian_js, ([0, 0], EYE, [0, 0], EYE), ValueError, "mean_p: expected one dimension, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "error", "message"), MISUSE)
def test_misuse_is_named(function, arguments, error, message):
    with pytest.raises(error) as raised:
        function(*arguments)
    assert str(raised.value).startswith(message)


def test_every_distance_here_is_named_above():
    names = set(distances.__all__) - {"EarthMove"}
    assert names <= set(globals())
