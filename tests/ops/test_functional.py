"""Every public op: values, derivatives, oracles, bad input; on Triton, against the reference and closed forms."""

from functools import partial

import pytest
import torch
from cases import DTYPES, KINDS
from count_launches import count_kernels, ours
from tolerance import tensors
from torch import nn

from fastwgan import functional, reference
from fastwgan.backend import kernels
from fastwgan.ops.penalty import penalty_cotangent
from fastwgan.ops.weights import saturation

SCORE_OPS = {
    "critic_loss": (functional.critic_loss, reference.critic_loss),
    "hinge_critic_loss": (functional.hinge_critic_loss, reference.hinge_critic_loss),
    "wasserstein_loss": (functional.wasserstein_loss, reference.wasserstein_loss),
}


def test_scores_keep_nan(device):
    nan = torch.tensor([1.0, float("nan")], device=device)
    one = torch.ones(2, device=device)
    for op, _ in SCORE_OPS.values():
        assert all(y.isnan() for y in tensors(op(nan, nan, backend="triton")))
    assert functional.critic_loss(one, one, backend="triton") == 0  # the counter and partials carry nothing over


def test_labels_are_the_critic_loss_up_to_sign(device):
    real, fake = torch.randn(32, 1, device=device), torch.randn(32, 1, device=device)
    critic = functional.critic_loss(real, fake)
    ones = torch.ones_like(real)
    by_labels = functional.wasserstein_loss(-ones, real) + functional.wasserstein_loss(ones, fake)
    torch.testing.assert_close(by_labels, critic)
    other_way = functional.wasserstein_loss(ones, real) + functional.wasserstein_loss(-ones, fake)
    torch.testing.assert_close(other_way, -critic)
    torch.testing.assert_close(functional.wasserstein_loss(-ones, fake), functional.generator_loss(fake))


def test_hinge_is_its_definition(device):
    real, fake = torch.tensor([3.0, 0.0, -1.0], device=device), torch.tensor([-2.0, 0.5], device=device)
    on_real, on_fake = functional.hinge_critic_loss(real, fake)
    assert on_real.item() == pytest.approx((0 + 1 + 2) / 3)
    assert on_fake.item() == pytest.approx((0 + 1.5) / 2)


def test_scores_of_different_counts_and_layouts(device):
    real = torch.randn(8, 6, device=device).t()[::2]
    fake = torch.randn(1, device=device).expand(5000)
    loss = functional.critic_loss(real, fake, backend="triton")
    torch.testing.assert_close(loss, fake.mean() - real.mean())


@pytest.mark.parametrize("kind", KINDS)
def test_penalty_is_the_same_with_a_cotangent_and_without(kind, device):
    g = torch.randn(3, 17, device=device)
    op = partial(functional.penalty, kind=kind, backend="triton")
    assert op(g) == op(g.clone().requires_grad_())


# The first four numbers, times 2^24, of a seed and an offset.
EPS = {
    (0, 0): (5153432, 4627910, 14621121, 8692622),
    (7, 2**31 - 2): (3233498, 6980331, 5863170, 10003382),
    (2**63 - 1, 2**40): (2380482, 15602824, 14562401, 13712292),
}


@pytest.mark.parametrize(("seed", "offset"), EPS)
def test_eps_is_the_same_everywhere(seed, offset, device):
    """In the reference, in the interpreter and on a GPU, bit for bit: a run can be repeated on other hardware."""
    expected = torch.tensor(EPS[seed, offset], dtype=torch.float32) / 2**24
    ones = torch.ones(4, 3, device=device)
    eps = functional.interpolate(ones, torch.zeros_like(ones), seed=seed, offset=offset, backend="triton")
    assert torch.equal(eps.cpu(), expected.view(4, 1).expand(4, 3))
    assert torch.equal(reference.uniform(seed, offset, 4, device).cpu(), expected)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**63 - 1])
@pytest.mark.parametrize("offset", [0, 5, 2**31 - 2, 2**40])
def test_eps_is_bit_identical_to_the_reference(seed, offset, device):
    """With real = 1 and fake = 0 the interpolate is eps itself, for whatever block size the sample has."""
    expected = reference.uniform(seed, offset, 9)
    for size in (1, 100, 5000):
        ones = torch.ones(9, size, device=device)
        eps = functional.interpolate(ones, torch.zeros_like(ones), seed=seed, offset=offset, backend="triton")
        assert torch.equal(eps.cpu(), expected.view(-1, 1).expand(9, size))
    on_device = torch.tensor([offset], device=device)
    eps = functional.interpolate(ones, torch.zeros_like(ones), seed=seed, offset=on_device, backend="triton")
    assert torch.equal(eps[:, 0].cpu(), expected)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
@pytest.mark.parametrize("offset", [0, 2**32 - 50, 2**63 - 100, torch.tensor([7])])
def test_eps_on_a_cpu_are_the_references(seed, offset):
    """Bit for bit, though other calls compute them."""
    ones, zeros = torch.ones(100, 2), torch.zeros(100, 2)
    eps = functional.interpolate(ones, zeros, seed=seed, offset=offset, backend="torch")
    assert torch.equal(eps, reference.uniform(seed, offset, 100)[:, None].expand(100, 2))
    assert torch.equal(eps, reference.interpolate(ones, zeros, seed=seed, offset=offset))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_share_on_the_bound_is_the_references(dtype, device):
    params = [torch.randn(n, device=device).to(dtype).clamp_(-0.3, 0.3) for n in (1, 17, 2**14 - 1, 2**14, 40_000)]
    for some in (params, params[:3], params[3:], [params[0].view(())]):
        share, total = saturation(some, 0.3)
        expected, of = reference.saturation(some, 0.3)
        assert share.dtype == expected.dtype
        assert (share, total) == (expected, of)


@pytest.mark.emulated
def test_a_captured_clamp_outlives_a_schedule_of_bounds():
    from fake_cuda_graph import Recording  # here, as there is no such thing on a GPU

    p = torch.full((5,), 3.0)
    functional.clip_weights_([p], 0.5, backend="triton")
    graph = Recording()
    graph.capture(lambda: functional.clip_weights_([p], 0.5, backend="triton"))
    kernels.table.fill_pending()
    for i in range(100):
        functional.clip_weights_([torch.ones(3)], 1 + i / 8, backend="triton")
    p.fill_(3.0)
    graph.replay()
    assert torch.equal(p, torch.full((5,), 0.5))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_penalty_derivatives_at_the_edges(backend, device):
    """A gradient whose square overflows has a cotangent all the same, and n^2 is curved at zero."""
    huge = torch.full((1, 2), 1e20, device=device, requires_grad=True)
    functional.penalty(huge, kind="zero-centered", backend=backend).backward()
    assert torch.equal(huge.grad, 2 * huge.detach())
    zero = torch.zeros(1, 2, dtype=torch.float64, device=device)
    hessian = torch.autograd.functional.hessian(
        partial(functional.penalty, kind="zero-centered", backend=backend), zero
    )
    assert torch.equal(hessian.reshape(2, 2), 2 * torch.eye(2, dtype=torch.float64, device=device))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_small_half_precision_cotangents_survive_a_loss_scale(backend, device):
    g = (torch.randn(256, 4, device=device) * 1e-5).half().requires_grad_()
    (16384 * functional.penalty(g, kind="zero-centered", backend=backend)).backward()
    expected = (16384 * 2 / 256 * g.detach().double()).half()
    torch.testing.assert_close(g.grad, expected, rtol=2e-3, atol=1e-7)


def test_losses_can_be_added_to_in_place(device):
    """``loss += weight * penalty`` is how most WGAN-GP loops go on."""
    a, b = (torch.randn(4, 3, device=device, requires_grad=True) for _ in range(2))
    losses = (
        functional.critic_loss(a, b),
        functional.generator_loss(a),
        functional.wasserstein_loss(a, b),
        *functional.hinge_critic_loss(a, b),
        functional.penalty(a),
    )
    for loss in losses:
        loss.add_(1)
        loss.backward(retain_graph=True)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_penalty_of_large_half_precision_gradients_is_finite(backend, device):
    g = torch.full((2, 784), 60.0, dtype=torch.float16, device=device)  # a norm of 1680; squared, past 65504
    loss = functional.penalty(g, backend=backend, target=1679.0)
    assert abs(loss.float() - (1680 - 1679) ** 2) < 0.01


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_float32(dtype, backend, device):
    """They are beyond what float16 can hold, and their gradients have the inputs' dtype."""
    low, high = (torch.full((8, 1), value, dtype=dtype, device=device, requires_grad=True) for value in (-49152, 49152))
    g = torch.full((2, 4096), 8.0, dtype=dtype, device=device, requires_grad=True)  # a norm of 512
    double = torch.full_like(high, 2.0)
    for loss, expected in (
        (functional.critic_loss(low, high, backend=backend), 98304),
        (functional.generator_loss(low, backend=backend), 49152),
        (functional.wasserstein_loss(double, high, backend=backend), 98304),
        (sum(functional.hinge_critic_loss(low, high, backend=backend)), 98306),
        (functional.penalty(g, backend=backend), 511**2),
        (functional.penalty(g, kind="power", backend=backend), 512.0**6),
    ):
        assert loss.dtype == torch.float32
        assert loss.item() == expected
        grads = torch.autograd.grad(loss, (low, high, g), allow_unused=True)
        assert {grad.dtype for grad in grads if grad is not None} == {dtype}


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_gradient_penalty_of_half_precision_is_float32(backend, device):
    critic = nn.Linear(4096, 1, bias=False).to(device, torch.float16)
    with torch.no_grad():
        critic.weight.fill_(8.0)
    x = torch.zeros(2, 4096, dtype=torch.float16, device=device)
    loss = functional.gradient_penalty(critic, x, x, weight=1.0, backend=backend)
    assert loss.dtype == torch.float32
    assert loss.item() == 511**2
    (0.001 * loss).backward()
    assert critic.weight.grad.dtype == torch.float16
    torch.testing.assert_close(
        critic.weight.grad.double(),
        torch.full((1, 4096), 0.002 * 511 * 8 / 512, dtype=torch.float64, device=device),
        rtol=1e-3,
        atol=0,
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_gradient_has_finite_penalty_and_zero_derivatives(kind, backend, device):
    g = torch.zeros(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    loss = functional.penalty(g, kind=kind, backend=backend)
    assert loss == (1.0 if kind == "two-sided" else 0.0)
    (first,) = torch.autograd.grad(loss, g, create_graph=True)
    assert torch.equal(first, torch.zeros_like(g))
    (second,) = torch.autograd.grad(first.sum(), g)
    assert second.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_linear_critic_has_the_closed_form(backend, device):
    critic = nn.Linear(5, 1).to(device, torch.float64)
    real, fake = (torch.randn(4, 5, dtype=torch.float64, device=device) for _ in range(2))
    loss = functional.gradient_penalty(critic, real, fake, weight=1.0, backend=backend)
    torch.testing.assert_close(loss, (critic.weight.norm() - 1) ** 2)


def test_gradient_penalty_leaves_inputs_and_modes_alone(device):
    critic = nn.Linear(5, 1).to(device)
    real, fake = torch.randn(4, 5, device=device), torch.randn(4, 5, device=device, requires_grad=True)
    with torch.no_grad():
        loss = functional.gradient_penalty(critic, real, fake, seed=0)
    loss.backward()
    assert fake.grad is None
    assert critic.weight.grad is not None
    assert critic.bias.grad is None


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_weights(dtype, backend, device):
    params = [torch.randn(shape, device=device).to(dtype) for shape in ((1,), (5000,), (3, 4, 5, 6), (0,))]
    params.append(torch.randn(40, 30, device=device).to(dtype)[::2, ::3])
    params.append(torch.randn(3, 4, 5, 6, device=device).to(dtype).to(memory_format=torch.channels_last))
    params.append(torch.randn(1001, device=device).to(dtype)[1:])  # not 16-byte aligned
    params[1][7] = float("nan")
    expected = [p.clone().clamp_(-0.03, 0.03) for p in params]
    versions = [p._version for p in params]
    assert functional.clip_weights_(params, 0.03, backend=backend) is None
    for p, e, version in zip(params, expected, versions, strict=True):
        torch.testing.assert_close(p, e, rtol=0, atol=0, equal_nan=True)
        assert p._version > version or p.numel() == 0
    assert params[1].isnan().sum() == 1


@pytest.mark.emulated
def test_each_forward_is_one_launch():
    x, y = torch.randn(300, 7), torch.randn(300, 7)
    cases = {
        "_scores_kernel": [
            lambda: functional.critic_loss(x, y),
            lambda: functional.generator_loss(x),
            lambda: functional.wasserstein_loss(x, y),
            lambda: functional.hinge_critic_loss(x, y),
        ],
        "_interpolate_kernel": [lambda: functional.interpolate(x, y, seed=0)],
        "_penalty_kernel": [lambda: functional.penalty(x), lambda: functional.penalty(x.clone().requires_grad_())],
        "_update_kernel": [lambda: functional.clip_weights_([x.clone() for _ in range(30)], 0.1)],
        "_project_kernel": [lambda: functional.clip_norms_([x[:9].clone() for _ in range(30)], 0.1)],
        "_perturb_kernel": [lambda: functional.perturb(x[:9], scale=1.0, seed=0)],
    }
    for kernel, calls in cases.items():
        for call in calls:
            with count_kernels() as counts:
                call()
            assert ours(counts) == {kernel: 1}


X = torch.zeros(4, 3)
BAD = [
    (functional.critic_loss, (X.long(), X), {}, TypeError, "real_scores"),
    (functional.critic_loss, (X, [1.0]), {}, TypeError, "fake_scores"),
    (functional.critic_loss, (X, X.double()), {}, TypeError, "fake_scores"),
    (functional.critic_loss, (X[:0], X), {}, ValueError, "real_scores"),
    (functional.critic_loss, (X.to(torch.complex64), X), {}, TypeError, "real_scores"),
    (functional.critic_loss, (X, X), {"backend": "cuda"}, ValueError, "backend"),
    (functional.generator_loss, (3.0,), {}, TypeError, "fake_scores"),
    (functional.wasserstein_loss, (X[:, :1], X[:, 0]), {}, ValueError, "y_true"),
    (functional.hinge_critic_loss, (X, X[:0]), {}, ValueError, "fake_scores"),
    (functional.interpolate, (X, X[:2]), {"seed": 0}, ValueError, "real"),
    (functional.interpolate, (X, X), {"seed": -1}, ValueError, "seed"),
    (functional.interpolate, (X, X), {"seed": 1.5}, TypeError, "seed"),
    (functional.interpolate, (X, X), {"seed": 0, "offset": torch.zeros(2)}, ValueError, "offset"),
    (functional.interpolate, (X[0, 0], X[0, 0]), {"seed": 0}, ValueError, "fake"),
    (functional.penalty, (X,), {"kind": "both"}, ValueError, "kind"),
    (functional.penalty, (X,), {"target": float("nan")}, ValueError, "target"),
    (functional.penalty, (X.to_sparse(),), {}, TypeError, "gradients"),
    (functional.gradient_penalty, (3, X, X), {}, TypeError, "critic"),
    (functional.gradient_penalty, (nn.Linear(3, 1), X, X), {"weight": -1}, ValueError, "weight"),
    (functional.gradient_penalty, (lambda x: torch.ones(4, requires_grad=True), X, X), {}, ValueError, "critic"),
    (functional.gradient_penalty, (lambda x: x.sum(), X, X), {}, ValueError, "critic"),
    (functional.clip_weights_, ([X], 0), {}, ValueError, "bound"),
    (functional.clip_weights_, ([X], float("nan")), {}, ValueError, "bound"),
    (functional.clip_weights_, ([X, X.half()], 1e5), {}, ValueError, "bound"),
    (functional.clip_weights_, ([X, X.long()], 0.1), {}, TypeError, r"parameters\[1\]"),
    (functional.clip_weights_, ([X[:1].expand(4, 3)], 0.1), {}, ValueError, r"parameters\[0\]"),
    (functional.clip_weights_, ([torch._neg_view(X)], 0.1), {}, ValueError, r"parameters\[0\]"),
]


@pytest.mark.parametrize(("op", "args", "options", "error", "name"), BAD)
def test_bad_input_names_the_argument(op, args, options, error, name):
    with pytest.raises(error, match=f"^{name}:"):
        op(*args, **options)
    assert torch.equal(X, torch.zeros(4, 3))


def test_a_nan_shows_in_all_statistics_of_norms(device):
    """A maximum by itself would pass over it."""
    x = torch.randn(5, 3, device=device)
    x[2, 1] = torch.nan
    for backend in ("triton", "torch"):
        statistics, _ = penalty_cotangent(x, "two-sided", 1.0, 10.0, backend)
        assert statistics.isnan().all()
    norms = x[:2].norm(dim=1)
    statistics, _ = penalty_cotangent(x[:2], "two-sided", 1.0, 10.0, "triton")
    torch.testing.assert_close(statistics[1:], torch.stack((norms.mean(), norms.min(), norms.max())))
