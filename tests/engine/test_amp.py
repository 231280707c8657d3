"""Mixed precision: steps against the float32 textbook and autocast's own, the loss scale, and GradScaler's protocol."""

import copy
import functools
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from graphed_trainers import Recorded, batches, made
from small_trainers import assert_same_state, quietly, until_it_raises, weights
from torch import nn

from fastwgan import Adam, GradientPenalty, RMSprop, Trainer, WeightClip, functional, models, reference
from fastwgan.engine import player

F16, BF16, F64 = torch.float16, torch.bfloat16, torch.float64
CONSTRAINTS = {"clip": WeightClip(1e3), "penalty": GradientPenalty()}  # SGD's step is to tell the gradient
EPS = {F16: 2.0**-11, BF16: 2.0**-8}
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")  # the compiler's own


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    return request.param


def mlp_critic():
    return models.mlp([10, 32, 24, 1], slope=0.2)


def two_layers():
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))


def conv_critic():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 6, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 1)
    )


def patch_critic():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, 1, 1))


CRITICS = {
    "mlp": (mlp_critic, (10,)),
    "two layers": (two_layers, (10,)),
    "conv": (conv_critic, (1, 8, 8)),
    "patch": (patch_critic, (1, 8, 8)),
}


class Given(nn.Module):
    """A generator of given samples."""

    def __init__(self, samples):
        super().__init__()
        self.samples, self.weight = samples, nn.Parameter(torch.zeros((), device=samples.device))

    def forward(self, z):
        return self.samples + 0 * self.weight


def textbook_gradients(critic, real, fake, constraint, dtype, scale=1.0):
    """Weight gradients op by op under autocast in ``dtype``, or as they are; the penalty on unscaled gradients."""
    critic = copy.deepcopy(critic)

    def score(x):
        if dtype in (F16, BF16):
            with torch.autocast(x.device.type, dtype):
                return critic(x)
        return critic.to(dtype)(x.to(dtype))

    loss = score(fake).float().mean() - score(real).float().mean()
    if dtype == F64:
        loss = score(fake).mean() - score(real).mean()
    if constraint == "penalty":
        eps = reference.uniform(0, 0, len(real), real.device).to(real.dtype).view(-1, *[1] * (real.dim() - 1))
        x = (eps * real + (1 - eps) * fake).to(dtype if dtype == F64 else real.dtype).requires_grad_()
        scores = score(x)
        (g,) = torch.autograd.grad(scores, x, torch.full_like(scores, scale / len(x)), create_graph=True)
        g = g.to(F64 if dtype == F64 else torch.float32) * (len(x) / scale)
        loss = loss + 10 * ((g.flatten(1).norm(2, 1) - 1) ** 2).mean()
    (scale * loss).backward()
    return torch.cat([p.grad.flatten().double() / scale for p in critic.parameters() if p.grad is not None])


def step_gradients(critic, real, fake, constraint, amp, backend, scale=64.0, **options):
    """Weight gradients of a critic step, as SGD with a learning rate of a power of two has used them."""
    critic = copy.deepcopy(critic)
    before = [p.detach().double() for p in critic.parameters()]
    optimizer = torch.optim.SGD(critic.parameters(), lr=2.0**-4)
    trainer = Trainer(
        Given(fake), critic, latent=1, constraint=CONSTRAINTS[constraint], critic_optimizer=optimizer, amp=amp,
        backend=backend, **options,
    )  # fmt: skip
    if amp == F16:
        trainer._steps.critic.guard.scale.fill_(scale)
    metrics = trainer.critic_step(real)
    assert metrics.nonfinite == 0
    used = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in critic.parameters()]
    )
    taken = torch.cat(
        [(b - p.detach().double()).flatten() * 16 for b, p in zip(before, critic.parameters(), strict=True)]
    )
    assert (taken - used).abs().max() <= 1e-4 * used.abs().max() + 1e-6  # SGD has rounded to the weights' float32
    return used.double(), metrics


@pytest.mark.parametrize("amp", [BF16, F16])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("name", CRITICS)
def test_a_critic_steps_gradients(name, constraint, amp, backend, device):
    """At most twice as far from float64 as the textbook's under autocast, and a floor of a few roundings."""
    make, shape = CRITICS[name]
    critic = make().to(device)
    real, fake = torch.randn(2, 12, *shape, device=device)
    exact = textbook_gradients(critic, real, fake, constraint, F64)
    eager = textbook_gradients(critic, real, fake, constraint, amp, 64.0 if amp == F16 else 1.0)
    fused, metrics = step_gradients(critic, real, fake, constraint, amp, backend)
    assert (fused - exact).norm() <= 2 * (eager - exact).norm() + 4 * EPS[amp] * exact.norm()
    if name == "two layers":  # a rectifier may be at its other piece in another precision, and that in the textbook too
        assert (fused - exact).norm() <= 10 * EPS[amp] * exact.norm()
    kept = [metrics.wasserstein, metrics.critic_loss, metrics.real_score]
    kept += [metrics.penalty, metrics.gradient_norm] if constraint == "penalty" else []
    assert all(x.dtype == torch.float32 for x in kept)
    if name != "two layers":
        return
    plain = step_gradients(critic, real, fake, constraint, None, backend)[1].as_dict()
    for key, value in metrics.as_dict().items():
        assert value == pytest.approx(plain[key], rel=40 * EPS[amp], abs=20 * EPS[amp]), key


@pytest.mark.parametrize("amp", [BF16, F16])
@pytest.mark.parametrize("kind", ["one-sided", "zero-centered", "power"])
def test_other_penalties(kind, amp, backend, monkeypatch):
    monkeypatch.setitem(CONSTRAINTS, "kind", GradientPenalty(kind=kind, target=0.1))
    critic, (real, fake) = two_layers(), torch.randn(2, 12, 10)
    plain, _ = step_gradients(critic, real, fake, "kind", None, backend)
    mixed, _ = step_gradients(critic, real, fake, "kind", amp, backend)
    assert (mixed - plain).norm() <= 10 * EPS[amp] * plain.norm()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_scale_leaves_the_gradients_alone(constraint, backend):
    """A power of two moves the exponent alone, where nothing underflows: the penalty is of unscaled gradients."""
    critic, (real, fake) = mlp_critic(), torch.randn(2, 16, 10)
    one, a = step_gradients(critic, real, fake, constraint, F16, backend, 2.0**6)
    other, b = step_gradients(critic, real, fake, constraint, F16, backend, 2.0**11)
    assert (one - other).norm() <= 2 * EPS[F16] * one.norm()
    smallest, c = step_gradients(critic, real, fake, constraint, F16, backend, 1.0)
    assert (one - smallest).norm() <= 20 * EPS[F16] * one.norm()  # now much underflows
    for key, value in a.as_dict().items():
        assert b.as_dict()[key] == pytest.approx(value, rel=1e-3, abs=1e-6)
        assert c.as_dict()[key] == pytest.approx(value, rel=2e-2, abs=1e-6)


def tiny_critic():
    """Whose input gradients are smaller than any float16 number."""
    critic = two_layers()
    with torch.no_grad():
        critic[0].weight.mul_(2e-3)
        critic[2].weight.mul_(2e-5)
    return critic


def test_input_gradients_that_underflow_unscaled(backend):
    """With the scale their norm, and so the penalty's gradient, is right."""
    critic, (real, fake) = tiny_critic(), torch.randn(2, 8, 10)
    exact = textbook_gradients(critic, real, fake, "penalty", F64)
    fused, metrics = step_gradients(critic, real, fake, "penalty", F16, backend, 65536.0)
    plain = step_gradients(critic, real, fake, "penalty", None, backend)[1]
    assert 0 < plain.gradient_norm < 6e-8
    assert metrics.gradient_norm.item() == pytest.approx(plain.gradient_norm.item(), rel=2e-2)
    assert (fused - exact).norm() <= 2e-2 * exact.norm()
    unscaled = step_gradients(critic, real, fake, "penalty", F16, backend, 1.0)[1]
    assert unscaled.gradient_norm == 0


@pytest.mark.usefixtures("traced_only")
def test_input_gradients_that_underflow_unscaled_in_a_compiled_step():
    critic, (real, fake) = tiny_critic(), torch.randn(2, 8, 10)
    exact = textbook_gradients(critic, real, fake, "penalty", F64)
    fused, metrics = step_gradients(critic, real, fake, "penalty", F16, "torch", 65536.0, compile=True)
    plain = step_gradients(critic, real, fake, "penalty", None, "torch")[1]
    assert metrics.gradient_norm.item() == pytest.approx(plain.gradient_norm.item(), rel=2e-2)
    assert (fused - exact).norm() <= 2e-2 * exact.norm()


def test_very_many_scores_do_not_lose_their_share(backend):
    """1 / N of a patch critic's scores is among float16's denormal numbers, and with the scale is not."""
    critic = nn.Conv2d(1, 1, 1)
    real, fake = torch.randn(2, 90, 1, 64, 64) + torch.tensor([1.0, 0.0]).view(2, 1, 1, 1, 1)
    exact = textbook_gradients(critic, real, fake, "clip", F64)
    fused, _ = step_gradients(critic, real, fake, "clip", F16, backend, 2.0**14)
    assert (fused - exact)[:1].abs() <= 4 * EPS[F16] * exact.abs().max()


@pytest.mark.parametrize("amp", [BF16, F16])
def test_scores_that_the_critic_gives_in_float32(amp, backend):
    """A last layer in full precision, as many have."""

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = nn.Sequential(nn.Linear(10, 16), nn.Tanh()), nn.Linear(16, 1)

        def forward(self, x):
            x = self.net(x)
            with torch.autocast("cpu", enabled=False):
                return self.last(x.float())

    critic, (real, fake) = Wide(), torch.randn(2, 12, 10)
    plain, _ = step_gradients(critic, real, fake, "penalty", None, backend)
    mixed, _ = step_gradients(critic, real, fake, "penalty", amp, backend)
    assert (mixed - plain).norm() <= 10 * EPS[amp] * plain.norm()


@pytest.mark.parametrize("amp", [BF16, F16])
def test_a_generator_steps_gradients(amp, backend, device):
    torch.manual_seed(0)
    generator, critic = models.mlp([6, 32, 10]).to(device), mlp_critic().to(device)
    z = torch.randn(16, 6, device=device)

    def gradients(dtype):
        twins = copy.deepcopy((generator, critic))
        if dtype in (amp,):
            with torch.autocast(device.type, dtype):
                scores = twins[1](twins[0](z))
        else:
            scores = twins[1].to(dtype)(twins[0].to(dtype)(z.to(dtype)))
        factor = 1024.0 if dtype == F16 else 1.0
        (-factor * scores.to(F64).mean()).backward()
        return torch.cat([p.grad.flatten().double() / factor for p in twins[0].parameters()])

    exact, eager = gradients(F64), gradients(amp)
    trainer = Trainer(
        generator, critic, latent=lambda n, d: z, amp=amp, backend=backend,
        generator_optimizer=torch.optim.SGD(generator.parameters(), lr=0.5),
    )  # fmt: skip
    loss = trainer.generator_step(16).generator_loss
    fused = torch.cat([p.grad.flatten().double() for p in generator.parameters()])
    assert (fused - exact).norm() <= 2 * (eager - exact).norm() + 4 * EPS[amp] * exact.norm()
    assert loss.dtype == torch.float32
    assert trainer.sample(3).dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in (*generator.parameters(), *critic.parameters()))


# The loss scale


def scaled_trainer(backend, constraint="penalty", device="cpu", **options):
    torch.manual_seed(0)
    networks = models.mlp([6, 16, 10]).to(device), mlp_critic().to(device)
    return Trainer(
        *networks, latent=6, constraint={"clip": WeightClip(), "penalty": GradientPenalty()}[constraint], amp=F16,
        backend=backend, n_critic=2, **options,
    )  # fmt: skip


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_an_overflow_halves_the_scale_and_leaves_the_step_out(constraint, backend, device):
    trainer, real = scaled_trainer(backend, constraint, device), torch.randn(8, 10, device=device)
    trainer._steps.critic.guard.scale.fill_(64.0)
    assert trainer.critic_step(real).nonfinite == 0
    trainer._steps.critic.guard.scale.fill_(2.0**24)
    before, skipped = trainer.state_dict(), 0
    while trainer.critic_step(real).nonfinite:
        skipped += 1
        after = trainer.state_dict()
        assert trainer._steps.critic.guard.scale == 2.0 ** (24 - skipped)
        assert_same_state(after["critic"], before["critic"])
        assert_same_state(after["critic_optimizer"], before["critic_optimizer"])
        assert after["critic_iterations"] == 1 + skipped
        assert after["eps_offset"] == 8 * (1 + skipped) * (constraint == "penalty")
    assert 4 < skipped < 15
    assert not torch.equal(weights(trainer.critic), torch.cat([x.flatten() for x in before["critic"].values()]))
    assert trainer._steps.generator.guard.scale == 65536


TERMS = {
    "blend": {
        "critic_term": lambda s: F.softplus(-s.real_scores).mean() + F.softplus(s.fake_scores).mean()
        + 0.1 * s.real_scores.square().mean(),
        "generator_term": lambda s: F.softplus(-s.fake_scores).mean(),
    },
    "relativistic": {
        "critic_term": lambda s: F.softplus(s.fake_scores - s.real_scores).mean(),
        "generator_term": lambda s: F.softplus(s.real_scores - s.fake_scores).mean() + (s.fake - s.real).abs().mean(),
    },
}  # fmt: skip


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_gradients_of_other_objectives_are_scaled_and_no_more(constraint, terms, backend, device):
    """Whatever the scale, the same step to half precision, and the same values."""
    steps, values = [], []
    for scale in (1.0, 1024.0):
        trainer = scaled_trainer(backend, constraint, device, nonfinite="skip", **TERMS[terms])
        start = torch.cat((weights(trainer.critic), weights(trainer.generator)))
        for guard in (trainer._steps.critic.guard, trainer._steps.generator.guard):
            guard.scale.fill_(scale)
        for _ in range(2):
            metrics = trainer.step(torch.linspace(-1, 1, 80, device=device).view(8, 10))
            assert metrics.nonfinite == 0
        assert metrics.critic_term.dtype == metrics.generator_term.dtype == torch.float32
        values.append(torch.stack((metrics.critic_term, metrics.generator_term)))
        states = [*trainer.critic_optimizer.state.values(), *trainer.generator_optimizer.state.values()]
        squares = [state["square_avg" if constraint == "clip" else "exp_avg_sq"] for state in states]
        steps.append(torch.cat([x.flatten() for x in squares]).sqrt())
        assert not torch.equal(torch.cat((weights(trainer.critic), weights(trainer.generator))), start)
    assert (steps[0] - steps[1]).norm() <= 0.02 * steps[1].norm()
    torch.testing.assert_close(*values, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("amp", [F16, BF16])
@pytest.mark.parametrize("network", ["critic", "generator"])
def test_gradients_of_terms_under_autocast(network, amp, backend, device):
    """Within half precision of float64, beside plain PyTorch under autocast, which a term runs under as networks do."""
    torch.manual_seed(0)
    z, real = torch.randn(16, 6, device=device), torch.randn(16, 10, device=device)
    generator, critic = models.mlp([6, 16, 10]).to(device), mlp_critic().to(device)
    twins, ran = copy.deepcopy((generator, critic)), []

    def term(s):
        ran.append(torch.is_autocast_enabled(s.fake.device.type))
        return F.softplus(s.fake_scores - s.real_scores).mean()

    def gradients(dtype):
        networks = copy.deepcopy(twins)
        trained = networks[network == "critic"]
        with torch.autocast(device.type, amp) if dtype == amp else nullcontext():
            made, scored = (m if dtype == amp else m.to(dtype) for m in networks)
            x, own = (y if dtype == amp else y.to(dtype) for y in (z, real))
            fake = made(x)
            fake_scores, real_scores = scored(fake), scored(own)
            value = F.softplus(fake_scores - real_scores).mean()
        base = fake_scores.to(F64).mean() - real_scores.to(F64).mean()
        loss = (base if network == "critic" else -fake_scores.to(F64).mean()) + value
        factor = 1024.0 if amp == F16 and dtype == amp else 1.0
        (factor * loss).backward()
        return torch.cat([p.grad.flatten().double() / factor for p in trained.parameters()])

    exact, eager = gradients(F64), gradients(amp)
    optimizer = torch.optim.SGD((critic if network == "critic" else generator).parameters(), lr=0.5)
    trainer = Trainer(
        generator, critic, latent=lambda n, d: z, amp=amp, backend=backend,
        **{f"{network}_term": term, f"{network}_optimizer": optimizer},
    )  # fmt: skip
    for guard in (trainer._steps.critic.guard, trainer._steps.generator.guard) if amp == F16 else ():
        guard.scale.fill_(1024.0)  # as a mean in float16 has no gradient of 65536
    metrics = trainer.critic_step(real) if network == "critic" else trainer.generator_step(16, real=real)
    assert metrics.nonfinite == 0
    assert ran == [True]
    fused = torch.cat([p.grad.flatten().double() for p in getattr(trainer, network).parameters()])
    assert (fused - exact).norm() <= 2 * (eager - exact).norm() + 4 * EPS[amp] * exact.norm()


def test_a_scale_that_comes_down_for_too_long_raises(backend, device, monkeypatch):
    monkeypatch.setattr(player, "PATIENCE", 5)
    trainer, real = scaled_trainer(backend, device=device), torch.randn(8, 10, device=device)
    trainer._steps.critic.guard.scale.fill_(2.0**60)
    with pytest.raises(FloatingPointError, match="^critic: 5 steps in a row up to 5"):
        until_it_raises(trainer.critic_step, real)


# Without an eps, RMSprop makes steps of one size of gradients that are rounding alone.
OPTIMIZERS = {"ours": (torch.optim.RMSprop, {"lr": 1e-3, "eps": 0.1}), "SGD": (torch.optim.SGD, {"lr": 1e-2})}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_run_is_the_textbooks_with_a_gradscaler(optimizer, backend):
    """Weights within half precision's tolerance, and the same scales, with overflows and growth among the steps."""
    kind, options = OPTIMIZERS[optimizer]
    torch.manual_seed(0)
    generator, critic = models.mlp([6, 16, 10]), mlp_critic()
    functional.clip_weights_(critic.parameters(), 0.01)  # as the textbook will where the first step is left out
    trainer = Trainer(
        generator, critic, latent=6, amp=F16, backend=backend, critic_optimizer=kind(critic.parameters(), **options)
    )
    kept, critic = [], copy.deepcopy(trainer.critic)
    z = iter(torch.randn(12, 8, 6))
    trainer.latent = lambda n, d: kept.append(next(z)) or kept[-1]
    other = kind(critic.parameters(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2000)
    trainer._steps.critic.guard._scale.copy_(torch.tensor([2.0**22, 0]))
    scales = []
    for i in range(12):
        if i == 8:  # shortly before it grows
            scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": 1999})
            trainer._steps.critic.guard._scale[1] = 1999
        real = torch.randn(8, 10)
        trainer.critic_step(real)
        other.zero_grad()
        with torch.autocast("cpu", F16):
            fake = trainer.generator(kept[-1]).detach()
            real_scores, fake_scores = critic(torch.cat((real, fake))).split(8)
        loss = fake_scores.float().mean() - real_scores.float().mean()
        scaler.scale(loss).backward()
        scaler.step(other)
        scaler.update()
        with torch.no_grad():
            for p in critic.parameters():
                p.clamp_(-0.01, 0.01)
        scales.append(scaler.get_scale())
        assert trainer._steps.critic.guard.scale == scales[-1]
        if len(set(scales)) > 1 and scales[-1] == scales[-2]:
            mine, textbook = weights(trainer.critic), weights(critic)
            assert (mine - textbook).norm() <= 2e-3 * textbook.norm()
    assert scales[0] == 2.0**21
    assert scales[8] == 2 * scales[7]


def test_resuming_is_bit_identical(backend, tmp_path):
    """The scale and how long it has served among it."""

    def start():
        trainer = scaled_trainer(backend, ema=0.9)
        trainer._steps.critic.guard._scale.copy_(torch.tensor([2.0**16, 1997]))
        return trainer

    data = torch.randn(6, 8, 10)
    whole, first, second = start(), start(), scaled_trainer(backend, ema=0.9)
    for real in data:
        whole.step(real)
    for real in data[:3]:
        first.step(real)
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    assert_same_state(second.state_dict()["guards"], first.state_dict()["guards"])
    for real in data[3:]:
        second.step(real)
    assert_same_state(second.state_dict(), whole.state_dict())


@pytest.mark.parametrize(("constraint", "amp"), [(WeightClip(0.05), BF16), (GradientPenalty(), F16)])
def test_graphed_steps(constraint, amp, graphed):
    """As without graphs, an overflow and a growing scale in replays among them."""
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(graphed, cuda_graph, constraint=constraint, n_critic=1, amp=amp, ema=0.5)
        scales = []
        if amp == F16:
            trainer._steps.critic.guard.scale.fill_(64.0)
        for i, real in enumerate(batches(graphed, shape, 10)):
            if amp == F16 and i in (7, 8):
                trainer._steps.critic.guard._scale.copy_(torch.tensor([2.0**40, 3] if i == 7 else [64.0, 1999]))
            metrics = trainer.step(real)
            assert (metrics.nonfinite > 0) == (amp == F16 and i == 7)
            scales.append(1.0 if amp == BF16 else trainer._steps.critic.guard.scale.item())
        runs.append((trainer, scales))
    (eager, expected), (trainer, actual) = runs
    assert Recorded.made == 2
    assert actual == expected
    assert amp == BF16 or actual[7:] == [2.0**39, 128.0, 128.0]
    for a, e in ((trainer.critic, eager.critic), (trainer.generator, eager.generator)):
        assert (weights(a) - weights(e)).norm() <= 1e-3 * weights(e).norm()


@pytest.mark.parametrize("amp", [BF16, F16])
@pytest.mark.parametrize("constraint", [WeightClip(0.05), GradientPenalty()])
@pytest.mark.usefixtures("traced_only")
def test_compiled_steps(constraint, amp):
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        networks = models.mlp([6, 16, 10]), mlp_critic()
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in networks]
        trainer = Trainer(
            *networks, latent=6, constraint=constraint, n_critic=1, amp=amp, compile=compiled, backend="torch",
            generator_optimizer=optimizers[0], critic_optimizer=optimizers[1],
        )  # fmt: skip
        if amp == F16:
            trainer._steps.critic.guard.scale.fill_(64.0)
        metrics = trainer.step(torch.randn(8, 10, generator=torch.Generator().manual_seed(1)))
        assert metrics.nonfinite == 0
        runs.append((metrics.as_dict(), [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in networks]))
    (expected, gradients), (actual, found) = runs
    for a, e in zip(found, gradients, strict=True):
        assert (a - e).norm() <= 10 * EPS[amp] * e.norm()
    for key, value in expected.items():
        assert actual[key] == pytest.approx(value, rel=20 * EPS[amp], abs=20 * EPS[amp]), key


@pytest.mark.usefixtures("traced_only")
def test_a_compiled_steps_overflow():
    trainer = scaled_trainer("torch", compile=True)
    trainer._steps.critic.guard.scale.fill_(2.0**32)
    before, real = weights(trainer.critic), torch.randn(8, 10)
    assert trainer.critic_step(real).nonfinite > 0
    assert trainer._steps.critic.guard.scale == 2.0**31
    assert torch.equal(weights(trainer.critic), before)


@pytest.mark.parametrize(
    ("networks", "amp"),
    [
        (lambda: (models.mlp([6, 10]).double(), models.mlp([10, 1])), BF16),
        (lambda: (models.mlp([6, 10]), models.mlp([10, 1]).half()), F16),
        (lambda: (models.mlp([6, 10]), models.mlp([10, 1])), torch.float32),
        (lambda: (models.mlp([6, 10]), models.mlp([10, 1])), "bf16"),
    ],
)
def test_what_cannot_be_mixed_is_refused(networks, amp):
    with pytest.raises(ValueError, match="^amp:"):
        Trainer(*networks(), latent=6, amp=amp)


@pytest.mark.parametrize("amp", [BF16, F16])
def test_real_samples_of_any_dtype(amp, backend):
    results = []
    for dtype in (torch.float32, F64, BF16):
        torch.manual_seed(0)
        trainer = Trainer(
            models.mlp([6, 10]), mlp_critic(), latent=6, constraint=GradientPenalty(), amp=amp, backend=backend
        )
        trainer.step(torch.ones(8, 10).to(dtype))
        results.append(weights(trainer.critic))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# GradScaler's protocol

PAIRS = {"rmsprop": (RMSprop, torch.optim.RMSprop), "adam": (Adam, torch.optim.Adam)}


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_ours_under_the_users_own_gradscaler(name, unscaled, backend, device):
    """As torch.optim's under one: a step left out, a scale that grows, gradients clipped in between."""
    ours, theirs = PAIRS[name]
    options = {"momentum": 0.5} if name == "rmsprop" else {"betas": (0.5, 0.9)}
    results = []
    for make in (functools.partial(ours, backend=backend), functools.partial(theirs, foreach=False)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
        optimizer = make(model.parameters(), lr=0.01, **options)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=3)
        trace = []
        for i in range(8):
            x = torch.randn(8, 10, generator=torch.Generator().manual_seed(i)).to(device)
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            if i in (0, 4):
                model[0].bias.grad[3] = math.inf
            if unscaled:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_value_(model.parameters(), 0.05)
            before = weights(model)
            scaler.step(optimizer)
            scaler.update()
            trace.append((scaler.get_scale(), torch.equal(weights(model), before)))
        assert not hasattr(optimizer, "found_inf")
        results.append((weights(model), trace, optimizer.state_dict()["state"]))
    (a, trace, state), (e, expected, their_state) = results
    assert trace == expected
    assert [same for _, same in trace] == [i in (0, 4) for i in range(8)]
    torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    for mine, other in zip(state.values(), their_state.values(), strict=True):
        for key in other:
            torch.testing.assert_close(mine[key], torch.as_tensor(other[key]), rtol=1e-4, atol=1e-5, check_dtype=False)


def test_a_scale_that_is_no_power_of_two(backend):
    """And an optimizer with parameters of two dtypes, of which one alone has a bad gradient."""
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3, dtype=F64))]
    optimizer = RMSprop(params, lr=0.1, backend=backend)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0)

    def step(bad):
        optimizer.zero_grad()
        scaler.scale(sum((p * p).sum() for p in params).float()).backward()
        if bad:
            params[1].grad[0] = math.nan
        scaler.step(optimizer)
        scaler.update()

    step(bad=True)
    assert all((p == 1).all() for p in params)
    step(bad=False)
    for p in params:  # s = 0.01 * 2^2
        torch.testing.assert_close(p.data, torch.full_like(p, 1 - 0.1 * 2 / 0.2), rtol=1e-5, atol=1e-5)


def test_an_optimizer_without_gradients_steps_under_a_scaler(backend):
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    idle, busy = RMSprop([p], backend=backend), torch.optim.SGD([q], lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(q.sum()).backward()
    scaler.step(busy)
    scaler.step(idle)
    assert (p == 1).all()
    assert (q == 0).all()


def test_clip_and_saturation_under_a_scaler(backend):
    p = nn.Parameter(torch.full((4,), 0.5))
    optimizer, scaler = RMSprop([p], lr=1.0, clip=0.25, backend=backend), torch.amp.GradScaler("cpu", init_scale=8.0)
    for bad, expected in ((True, 0.5), (False, -0.25)):
        p.grad = torch.full((4,), math.inf if bad else 8.0)
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update()
        assert (p == expected).all()
        assert optimizer.saturation.isnan() if bad else optimizer.saturation == 1


def test_packs_and_lazy_penalties_in_float16(backend):
    critic = nn.Sequential(nn.Unflatten(0, (-1, 2)), nn.Flatten(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 1))
    real, fake = torch.randn(2, 12, 10)
    plain, _ = step_gradients(critic, real, fake, "penalty", None, backend, pack=2)
    mixed, _ = step_gradients(critic, real, fake, "penalty", F16, backend, pack=2)
    assert (mixed - plain).norm() <= 10 * EPS[F16] * plain.norm()
    trainer = quietly(
        Trainer, models.mlp([6, 10]), mlp_critic(), latent=6, constraint=GradientPenalty(every=2), amp=F16,
        backend=backend,
    )  # fmt: skip
    seen = [trainer.critic_step(real).penalty is not None for _ in range(4)]
    assert seen == [True, False, True, False]


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_context_of_the_callers_round_many_steps_does_no_harm(amp):
    """autocast keeps its copies of the weights until the outermost context ends, through any number of updates."""
    runs = []
    for outer in (False, True):
        torch.manual_seed(0)
        networks = models.mlp([6, 16, 10]), models.mlp([10, 16, 1])
        trainer = Trainer(*networks, latent=6, constraint=GradientPenalty(), n_critic=2, backend="torch", amp=amp)
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            scores = [trainer.step(torch.randn(8, 10) + 1).as_dict()["real_score"] for _ in range(6)]
        runs.append(torch.tensor(scores))
    torch.testing.assert_close(*runs, rtol=0, atol=0.0 if amp else 0.02)
    assert (runs[1].diff() != 0).all()


@pytest.mark.parametrize("amp", [BF16, F16])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_terms_get_scores_that_no_square_takes_out_of_range(how, amp, request):
    """Scores of 1000, whose squares float16 does not hold."""
    if how == "compiled":
        request.getfixturevalue("traced_only")
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    nn.init.constant_(critic[2].bias, 1000.0)
    dtypes = set()

    def term(s):
        dtypes.update((s.real_scores.dtype, s.fake_scores.dtype))
        return 0.0005 * (s.real_scores.square().mean() + s.fake_scores.square().mean())

    trainer = Trainer(
        nn.Linear(3, 4), critic, latent=3, amp=amp, backend="torch", n_critic=1, compile=how == "compiled",
        critic_term=term, generator_term=term, constraint=GradientPenalty(),
    )  # fmt: skip
    for _ in range(8):  # the first may be left out to find the loss scale
        metrics = trainer.step(torch.randn(8, 4))
    assert metrics.nonfinite == 0
    assert dtypes == {torch.float32}
    for value in (metrics.critic_term, metrics.generator_term):
        torch.testing.assert_close(value, torch.tensor(1000.0), rtol=0.02, atol=0)
