"""The critic's gradients without a second backward pass: against autograd, which takes one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from count_launches import count_kernels, ours
from torch import nn

from fastwgan import GradientPenalty, Trainer, WeightClip, models, reference
from fastwgan.engine import piecewise

F64, N = torch.float64, 6
CLIP, PENALTY = WeightClip(), GradientPenalty()
LEAKY = nn.LeakyReLU(0.2)


def tied():
    first = nn.Linear(5, 5)
    second = nn.Linear(5, 5)
    second.weight = first.weight
    return nn.Sequential(first, LEAKY, second, nn.ReLU(), nn.Linear(5, 1))


def frozen():
    critic = models.mlp([5, 8, 7, 1], slope=0.2)
    critic[1].weight.requires_grad_(False)
    critic[3].bias.requires_grad_(False)
    return critic


CRITICS = {  # with the shape of a sample
    "mlp": (lambda: models.mlp([5, 8, 7, 1], slope=0.2), 5),
    "relu": (lambda: models.mlp([5, 8, 7, 1]), 5),
    "in place": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 1)), 5),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 1)), 5),
    "images to rows": (lambda: models.mlp([12, 8, 1], slope=0.2), 3, 2, 2),
    "no biases": (lambda: nn.Sequential(nn.Linear(5, 8, bias=False), LEAKY, nn.Linear(8, 1, bias=False)), 5),
    "several scores": (lambda: models.mlp([5, 8, 3], slope=0.2), 5),
    "rectified scores": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1), LEAKY), 5),
    "rectified samples": (lambda: nn.Sequential(LEAKY, nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1)), 5),
    "two rectifiers": (lambda: nn.Sequential(nn.Linear(5, 8), LEAKY, LEAKY, nn.Linear(8, 1)), 5),
    "tied weights": (tied, 5),
    "frozen weights": (frozen, 5),
    "rows of rows": (lambda: nn.Sequential(nn.Linear(3, 8), LEAKY, nn.Linear(8, 4), nn.ReLU(), nn.Flatten(),
                                           nn.Linear(8, 1)), 2, 3),
    "dcgan": (lambda: models.dcgan_critic(channels=1, width=2, size=16, norm=False), 1, 16, 16),
    "convolutions": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, dilation=2), LEAKY, nn.AvgPool2d(2),
                                           nn.Conv2d(4, 6, 2, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                                           nn.Flatten(), nn.ReLU(), nn.Linear(6, 1)), 3, 12, 12),
    "sequences": (lambda: nn.Sequential(nn.ConvTranspose1d(2, 3, 4, 2, 1), LEAKY, nn.Flatten(), nn.Unflatten(1, (3, 8)),
                                        nn.ReLU(), nn.AvgPool1d(2), nn.Conv1d(3, 1, 4)), 2, 4),
    "volumes": (lambda: nn.Sequential(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.AvgPool3d(2), nn.Flatten(), nn.Identity(),
                                      nn.Linear(2, 1)), 1, 3, 3, 3),
    "patches": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), LEAKY, nn.Conv2d(4, 1, 3)), 1, 7, 7),
    "evaluated dropout": (lambda: models.ctgan_critic(1, width=7, pack=5).eval(), 5),
}  # fmt: skip
PENALTIES = {
    **{kind: GradientPenalty(kind=kind, target=0.3) for kind in reference.PENALTY_KINDS},
    **{at: GradientPenalty(at=at) for at in ("real", "fake", "perturbed")},
    "lazy": GradientPenalty(every=2),
}


class Samples(nn.Module):
    """A generator whose samples are always the same."""

    def __init__(self, x):
        super().__init__()
        self.x = nn.Parameter(x)

    def forward(self, z):
        return self.x * 1


def setting(name, constraint, *, dtype=F64, backend="torch", n=N, **options):
    """Return (a trainer, its critic as it is, real and fake samples)."""
    torch.manual_seed(len(name))
    make, *shape = CRITICS[name]
    critic, real, fake = make().to(dtype), torch.randn(n, *shape, dtype=dtype), torch.randn(n, *shape, dtype=dtype)
    options = {"constraint": constraint, "backend": backend, "n_critic": 1000, **options}
    trainer = Trainer(Samples(fake), critic, latent=lambda n, device: None, **options)
    return trainer, copy.deepcopy(critic), real, fake


def points(constraint, real, fake):
    if constraint.at == "perturbed":
        return reference.perturb(real, scale=constraint.noise, seed=0)
    return {"real": real, "fake": fake}.get(constraint.at, reference.interpolate(real, fake, seed=0))


def expected(critic, constraint, real, fake, term=None):
    """Return the gradients of a loop that differentiates twice, and the loss."""
    scores = critic(real), critic(fake)
    loss = scores[1].mean() - scores[0].mean()
    if term is not None:
        loss = loss + term(*scores)
    if constraint is not CLIP:
        x = points(constraint, real, fake).requires_grad_()
        at_x = critic(x)
        (g,) = torch.autograd.grad(at_x, x, torch.ones_like(at_x), create_graph=True)
        weight = constraint.penalty_weight(0)
        loss = loss + weight * reference.penalty(g, kind=constraint.kind, target=constraint.target)
    trained = [p for p in critic.parameters() if p.requires_grad]
    found = dict(
        zip(trained, torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True), strict=True)
    )
    return [found.get(p) for p in critic.parameters()], loss


def assert_gradients(trainer, wanted, rtol=1e-12):
    assert not isinstance(trainer._steps.blocks, str), trainer  # or the other passes were taken
    for p, g in zip(trainer.critic.parameters(), wanted, strict=True):
        assert (p.grad is None) is (g is None)
        if g is not None:
            scale = max(w.abs().max().item() for w in wanted if w is not None)
            torch.testing.assert_close(p.grad, g, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("constraint", [CLIP, PENALTY], ids=["clip", "penalty"])
@pytest.mark.parametrize("name", CRITICS)
def test_gradients_are_those_of_autograd(name, constraint, backend):
    trainer, twin, real, fake = setting(name, constraint, backend=backend)
    metrics = trainer.critic_step(real)
    wanted, loss = expected(twin, constraint, real, fake)
    assert_gradients(trainer, wanted)
    torch.testing.assert_close(metrics.critic_loss.double(), loss.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("kind", PENALTIES)
@pytest.mark.parametrize("name", ["mlp", "convolutions"])
def test_each_penalty(name, kind, backend):
    trainer, twin, real, fake = setting(name, PENALTIES[kind], backend=backend)
    trainer.critic_step(real)
    assert_gradients(trainer, expected(twin, PENALTIES[kind], real, fake)[0])
    if kind == "lazy":
        twin = copy.deepcopy(trainer.critic)
        trainer.critic_step(real)
        assert_gradients(trainer, expected(twin, CLIP, real, fake)[0])


@pytest.mark.parametrize("name", CRITICS)
def test_the_specification_is_autograd(name):
    _, critic, real, fake = setting(name, PENALTY)
    x, weights = reference.interpolate(real, fake, seed=0), [p for p in critic.parameters() if p.requires_grad]
    like = torch.cat((real, fake, x))
    seeds = torch.ones_like(critic(like))
    value = seeds[:N].numel()
    seeds[:N], seeds[N : 2 * N] = -1 / value, 1 / value

    def cotangent(g):
        return reference.penalty_cotangent(g, kind="two-sided", target=1.0, weight=10.0)[1]

    layers = [nn.ReLU() if isinstance(m, nn.ReLU) else m for m in critic]  # none in place
    for at, rows, constraint in ((like, seeds, PENALTY), (like[: 2 * N], seeds[: 2 * N], CLIP)):
        given = cotangent if constraint is PENALTY else None
        found = reference.piecewise_gradients(layers, at, rows, given, weights)
        wanted = [g for g in expected(critic, constraint, real, fake)[0] if g is not None]
        scale = max(g.abs().max().item() for g in wanted)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * scale)


def test_a_gradient_of_norm_zero_moves_nothing():
    trainer, twin, real, fake = setting("mlp", PENALTY)
    for critic in (trainer.critic, twin):
        nn.init.zeros_(critic[1].weight)
    trainer.critic_step(real)
    wanted, _ = expected(twin, PENALTY, real, fake)
    assert_gradients(trainer, wanted)
    assert all(p.grad.isfinite().all() for p in trainer.critic.parameters())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_gradients_are_those_of_the_loss_by_differences(backend):
    """By gradcheck, of a function whose backward pass hands on the gradients of a step."""
    trainer, twin, real, fake = setting("relu", PENALTY, backend=backend, n=3)

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *weights):
            with torch.no_grad():
                for critic in (trainer.critic, twin):
                    for p, w in zip(critic.parameters(), weights, strict=True):
                        p.copy_(w)
            trainer._steps.latents.used = 0  # the same eps each time
            trainer.critic_step(real)
            ctx.save_for_backward(*[p.grad for p in trainer.critic.parameters()])
            with torch.enable_grad():
                return expected(twin, PENALTY, real, fake)[1].detach()

        @staticmethod
        def backward(ctx, grad):
            return tuple(grad * g for g in ctx.saved_tensors)

    weights = [p.detach().clone().requires_grad_() for p in twin.parameters()]
    assert torch.autograd.gradcheck(Loss.apply, weights)


def bent_as(run, critic, x, rows):
    """Return the scores of a critic whose rectifiers and dropout are those of another pass at its rows."""
    i = -1  # the block
    for m in critic:
        if isinstance(m, nn.Linear):
            i, x = i + 1, m(x)
        elif isinstance(m, nn.Dropout):
            x = x * run._factors[i][rows].to(x.dtype) if m.p else x
        else:
            x = x * torch.where(run.above[i + 1][rows], 1.0, getattr(m, "negative_slope", 0.0)).to(x.dtype)
    return x


class Kept(piecewise.Pass):
    """A pass that keeps where its states are above zero."""

    def backward(self, seeds):
        self.above = [x > 0 for x in self.states]
        Kept.run = self
        return super().backward(seeds)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("constraint", [CLIP, PENALTY], ids=["clip", "penalty"])
@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_float32_on_the_same_masks(dropout, constraint, backend):
    """On the same rectifiers and dropout, errors are at most twice those of autograd in float32."""
    torch.manual_seed(0)
    layers = [nn.Linear(24, 40), LEAKY, nn.Dropout(dropout), nn.Linear(40, 16), nn.ReLU(), nn.Dropout(dropout)]
    critic = nn.Sequential(*layers, nn.Linear(16, 1))
    real, fake = torch.randn(32, 24), torch.randn(32, 24)
    options = {"latent": lambda n, device: None, "constraint": constraint, "backend": backend}
    trainer, twin = Trainer(Samples(fake), critic, **options), copy.deepcopy(critic)
    trainer._steps.passes.way = Kept
    trainer.critic_step(real)
    found = []
    for dtype in (torch.float32, F64):
        net, a, b = copy.deepcopy(twin).to(dtype), real.to(dtype), fake.to(dtype)
        scores = [bent_as(Kept.run, net, x, slice(i * 32, i * 32 + 32)) for i, x in enumerate((a, b))]
        loss = scores[1].mean() - scores[0].mean()
        if constraint is PENALTY:
            x = reference.interpolate(a, b, seed=0).requires_grad_()
            (g,) = torch.autograd.grad(bent_as(Kept.run, net, x, slice(64, 96)).sum(), x, create_graph=True)
            loss = loss + 10 * reference.penalty(g)
        weights = [*net.parameters()]
        found.append(torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True))
    for p, eager, exact in zip(critic.parameters(), *found, strict=True):
        error, of_eager = ((g.double() - exact).norm() for g in (p.grad, eager))
        assert error <= 2 * of_eager + 8 * 2.0**-23 * (exact.norm() + 1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("of_weights", [False, True])
@pytest.mark.parametrize("name", ["mlp", "several scores", "tied weights"])
def test_a_term_may_be_of_scores_and_of_weights(name, of_weights, backend):
    def term(real, fake, critic):
        own = sum(p.square().sum() for p in critic.parameters()) if of_weights else 0.0
        return real.square().mean() + F.softplus(fake).mean() + own

    trainer, twin, real, fake = setting(
        name, PENALTY, backend=backend, critic_term=lambda s: term(s.real_scores, s.fake_scores, trainer.critic)
    )
    trainer.critic_step(real)
    wanted, _ = expected(twin, PENALTY, real, fake, lambda *scores: term(*scores, twin))
    assert_gradients(trainer, wanted)


def test_a_term_that_differentiates_the_scores_itself_says_that_it_cannot():
    def term(s):
        (g,) = torch.autograd.grad(s.real_scores.sum(), trainer.critic[1].weight, create_graph=True)
        return g.square().sum()

    trainer, _, real, _ = setting("mlp", PENALTY, critic_term=term)
    before = copy.deepcopy(trainer.critic.state_dict())
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        trainer.critic_step(real)
    assert all(torch.equal(x, before[name]) for name, x in trainer.critic.state_dict().items())


def test_hooks_of_parameters_get_whole_gradients_once():
    trainer, twin, real, fake = setting("tied weights", PENALTY)
    seen = []
    trainer.critic[0].weight.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    trainer.critic_step(real)
    wanted, _ = expected(twin, PENALTY, real, fake)
    (whole,) = seen
    torch.testing.assert_close(whole, wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trainer.critic[0].weight.grad, 2 * wanted[0], rtol=1e-12, atol=1e-12)


@pytest.mark.emulated
def test_device_operations_and_products_of_a_penalised_mlp():
    trainer, _, real, _ = setting("mlp", PENALTY, dtype=torch.float32, backend="triton")
    trainer.critic_step(real)
    with count_kernels() as counts:
        trainer.critic_step(real)
    assert sum(counts.values()) - counts["mul"] <= 26  # without the generator's
    assert counts["mm"] + counts["addmm"] <= 11
    once = {"_interpolate_kernel", "_penalty_kernel", "_guard_kernel", "_update_kernel"}
    assert ours(counts) == {**dict.fromkeys(once, 1), "_activation_kernel": 2}


UNFIT = {  # what has a second backward pass: (critic, options, why)
    "tanh": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)), {}, "Tanh is not among the layers"),
    "negative slope": (lambda: nn.Sequential(nn.Linear(5, 8), nn.LeakyReLU(-0.1), nn.Linear(8, 1)), {},
                       "LeakyReLU is not among"),
    "alpha dropout": (lambda: nn.Sequential(nn.Linear(5, 8), nn.AlphaDropout(), nn.Linear(8, 1)), {}, "AlphaDropout"),
    "reflections": (lambda: nn.Sequential(nn.Unflatten(1, (1, 5)),
                                          nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect"),
                                          nn.Flatten(), nn.Linear(5, 1)), {}, "Conv1d is not among"),
    "same padding": (lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 1, 3, padding="same"), nn.Flatten(),
                                           nn.Linear(5, 1)), {}, "Conv1d is not among"),
    "instance noise": (lambda: models.InstanceNoise(models.mlp([5, 8, 1]), 0.1), {}, "InstanceNoise is not among"),
    "own class": (lambda: nn.ModuleList([models.mlp([5, 8, 1])]), {}, "its layers are not known to keep samples apart"),
    "mixed precision": (lambda: models.mlp([5, 8, 1]), {"amp": torch.bfloat16}, "mixed precision is on"),
    "compile": (lambda: models.mlp([5, 8, 1]), {"compile": True}, "compile=True has passes of its own"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_takes_the_other_passes_and_says_why(name, traced_only):
    make, options, why = UNFIT[name]
    critic = make()
    if isinstance(critic, nn.ModuleList):
        critic.forward = critic[0].forward
    trainer = Trainer(nn.Linear(3, 5), critic, latent=3, constraint=PENALTY, **options)
    assert "backward pass" not in repr(trainer)
    trainer.critic_step(torch.randn(N, 5))
    assert f"a penalty takes a second backward pass, as {why}" in repr(trainer)


def test_a_step_says_that_it_takes_no_second_backward_pass():
    trainer, _, real, _ = setting("mlp", PENALTY)
    trainer.critic_step(real)
    assert "there is no second backward pass, as its layers are piecewise linear" in repr(trainer)


def test_a_layer_that_changes_counts_from_the_next_step():
    trainer, twin, real, fake = setting("mlp", PENALTY)
    trainer.critic_step(real)
    for slope in (0.5, 0.1):
        trainer.critic[2].negative_slope = slope
        trainer._steps.latents.used = 0
        twin = copy.deepcopy(trainer.critic)
        trainer.critic_step(real)
        assert_gradients(trainer, expected(twin, PENALTY, real, fake)[0])
    trainer.critic[2] = nn.Tanh()
    trainer.critic_step(real)
    assert "as Tanh is not among" in repr(trainer)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("constraint", [CLIP, PENALTY], ids=["clip", "penalty"])
def test_fifty_steps_are_those_of_the_other_passes(constraint, backend):
    found = []
    for why in (None, "the test says so"):
        torch.manual_seed(0)
        generator = models.mlp([4, 8, 8, 5], slope=0.2, norm=True).double()
        critic = models.mlp([5, 16, 16, 1], slope=0.2).double()
        trainer = Trainer(generator, critic, latent=4, constraint=constraint, backend=backend, n_critic=2, ema=0.9)
        if why:
            trainer._steps.passes.doubt = lambda why=why: why
        data = torch.Generator().manual_seed(1)
        metrics = [trainer.step(torch.randn(16, 5, dtype=F64, generator=data)).as_dict() for _ in range(50)]
        assert (why in repr(trainer)) if why else ("no second backward pass" in repr(trainer))
        found.append((trainer.state_dict(), metrics))
    (one, of_one), (two, of_two) = found
    for network in ("generator", "critic", "ema"):
        for name, x in one[network].items():
            torch.testing.assert_close(x, two[network][name], rtol=1e-8, atol=1e-10)
    for a, b in zip(of_one, of_two, strict=True):
        assert a == pytest.approx(b, rel=1e-8, abs=1e-10)
