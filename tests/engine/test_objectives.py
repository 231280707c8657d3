"""The trainer's other objectives (blend, drift, instance noise, penalties at other points) against plain loops in
float64, whose losses are written out and differentiated by autograd; and what they launch.
"""

import copy
import functools
import math

import pytest
import torch
from count_launches import count_kernels, ours
from small_trainers import PAIRS, quietly, weights
from torch import nn

from fastwgan import GradientPenalty, Trainer, WeightClip, functional, reference
from fastwgan.ops.scores import objective

F64 = torch.float64
CLIP, PENALTY = WeightClip(0.05), GradientPenalty()
OPTIONS = {
    "blend": {"constraint": CLIP, "blend": 0.3},
    "the GAN": {"constraint": PENALTY, "blend": 1.0},
    "drift": {"constraint": PENALTY, "drift": 0.05},
    "drift beside a clip": {"constraint": CLIP, "drift": 0.05},
    "all": {"constraint": PENALTY, "blend": 0.3, "drift": 0.05},
    "lazy": {"constraint": GradientPenalty(every=2)},
    "DRAGAN": {"constraint": GradientPenalty(at="perturbed", noise=0.25)},
    "lazy DRAGAN with drift": {"constraint": GradientPenalty(at="perturbed", every=2), "drift": 0.05},
    "WGAN-LP": {"constraint": GradientPenalty(kind="one-sided", target=0.1)},
    "R1": {"constraint": GradientPenalty(5.0, kind="zero-centered", at="real")},
    "R2": {"constraint": GradientPenalty(5.0, kind="zero-centered", at="fake")},
    "WGAN-div": {"constraint": GradientPenalty(2.0, kind="power")},
}
STEPS, BATCH, N_CRITIC, SEED = 5, 8, 2, 3


class PlainLoop:
    """What a trainer with these options does, as one would write it down."""

    def __init__(self, generator, critic, zs, *, constraint, blend=0.0, drift=0.0):
        self.generator, self.critic, self.zs, self.constraint = generator, critic, zs, constraint
        self.blend, self.drift = blend, drift
        self.iteration = self.offset = 0
        if isinstance(constraint, WeightClip):
            kind = functools.partial(torch.optim.RMSprop, lr=5e-5)
        else:
            kind = functools.partial(torch.optim.Adam, lr=1e-4, betas=(0.0, 0.9))
        self.optimizers = {m: kind(m.parameters()) for m in (generator, critic)}

    def add_noise(self, x, stream, scale):
        return x + scale * reference.normals(
            SEED, self.offset, len(x), x[0].numel(), stream=stream, dtype=F64, device=x.device
        ).view(x.shape)  # fmt: skip

    def gan(self, x):
        return (1 + x.exp()).log()

    def penalty(self, real, fake):
        at, c = self.constraint.at, self.constraint
        if at == "interpolates":
            eps = reference.uniform(SEED, self.offset, len(real), real.device).double()
            x = reference._per_sample(eps, real) * (real - fake) + fake
        else:
            x = {"real": real, "fake": fake}.get(at)
            x = self.add_noise(real, 1, c.noise) if x is None else x
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.critic(x).sum(), x, create_graph=True)
        norm = g.flatten(1).norm(dim=1)
        value = {
            "two-sided": (norm - c.target) ** 2, "one-sided": (norm - c.target).clamp(min=0) ** 2,
            "zero-centered": norm**2, "power": norm**6,
        }[c.kind]  # fmt: skip
        return value.mean()

    def step(self, real):
        z = next(self.zs)
        with torch.no_grad():
            fake = self.generator(z)
        on_real, on_fake = self.critic(real), self.critic(fake)
        wgan, gan = on_fake.mean() - on_real.mean(), self.gan(on_fake).mean() + self.gan(-on_real).mean()
        loss = self.blend * gan + (1 - self.blend) * wgan + self.drift * (on_real**2).mean()
        penalised = isinstance(self.constraint, GradientPenalty) and self.iteration % self.constraint.every == 0
        if penalised:
            loss = loss + self.constraint.weight * self.constraint.every * self.penalty(real, fake)
        self.update(self.critic, loss)
        if isinstance(self.constraint, WeightClip):
            for p in self.critic.parameters():
                p.data.clamp_(-self.constraint.bound, self.constraint.bound)
        uses = penalised and self.constraint.at in ("interpolates", "perturbed")
        self.offset += len(real) if uses else 0
        self.iteration += 1
        return loss, self.generator_step() if self.iteration % N_CRITIC == 0 else None

    def generator_step(self):
        fake = self.generator(next(self.zs))
        scores = self.critic(fake)
        loss = self.blend * self.gan(-scores).mean() - (1 - self.blend) * scores.mean()
        self.update(self.generator, loss)
        return loss

    def update(self, module, loss):
        parameters = list(module.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        self.optimizers[module].step()


def compare(pair, options, *, rtol=1e-8, **settings):
    torch.manual_seed(0)
    generator, critic, shape, latent = PAIRS[pair]()
    zs = torch.randn(2 * STEPS, BATCH, latent, dtype=F64)
    ours = iter(zs)
    loop = PlainLoop(*copy.deepcopy((generator, critic)), iter(zs), **options)
    trainer = quietly(
        Trainer, generator, critic, latent=lambda n, d: next(ours), n_critic=N_CRITIC, seed=SEED, **options, **settings
    )
    for _ in range(STEPS):
        real = torch.randn(BATCH, *shape, dtype=F64)
        metrics, (critic_loss, generator_loss) = trainer.step(real), loop.step(real)
        torch.testing.assert_close(metrics.critic_loss, critic_loss.detach(), rtol=1e-8, atol=1e-10)
        if generator_loss is not None:
            torch.testing.assert_close(metrics.generator_loss, generator_loss.detach(), rtol=1e-8, atol=1e-10)
        for a, b in ((critic, loop.critic), (generator, loop.generator)):
            torch.testing.assert_close(weights(a), weights(b), rtol=rtol, atol=1e-10)
    assert trainer.state_dict()["eps_offset"] == loop.offset


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_the_plain_loops(name, backend):
    compare("mlp", OPTIONS[name], backend=backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("name", "pair"), [("all", "conv"), ("blend", "batchnorm"), ("drift", "batchnorm")])
def test_steps_of_convolutions_and_separate_passes(name, pair, backend):
    compare(pair, OPTIONS[name], backend=backend)


@pytest.mark.parametrize("name", ["blend", "all", "lazy", "lazy DRAGAN with drift"])
def test_compiled_steps(name, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with torch._dynamo.config.patch(error_on_recompile=True):  # another scale or offset is no other program
        compare("mlp", OPTIONS[name], backend="torch", compile=True)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("name", "launches"),
    [
        ("blend", {"_objective_kernel", "_guard_kernel", "_update_kernel"}),
        ("drift", {"_objective_kernel", "_interpolate_kernel", "_penalty_kernel", "_guard_kernel", "_update_kernel"}),
        ("DRAGAN", {"_perturb_kernel", "_penalty_kernel", "_guard_kernel", "_update_kernel"}),
    ],
)
def test_each_part_is_one_launch(name, launches):
    generator, critic, shape, latent = PAIRS["mlp"]()
    trainer = Trainer(generator, critic, latent=latent, backend="triton", **OPTIONS[name])
    trainer.critic_step(torch.randn(4, *shape, dtype=F64))
    with count_kernels() as counts:
        trainer.critic_step(torch.randn(4, *shape, dtype=F64))
    assert ours(counts) == dict.fromkeys(launches, 1)


def test_scores_with_one_shape_for_several_patches():
    """A mean over all scores of a sample map, as of a patch critic."""
    real, fake = torch.randn(3, 1, 4, 5, dtype=F64), torch.randn(3, 1, 4, 5, dtype=F64)
    for backend in ("triton", "torch"):
        statistics, slopes = objective(
            real, fake, blend=0.3, drift=0.1, weight=0.5, scale=None, backend=backend
        )  # fmt: skip
        leaves = [x.clone().requires_grad_() for x in (real, fake)]
        loss = functional.critic_loss(*leaves, blend=0.3, drift=0.1, backend=backend)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(0.5 * loss, leaves)])
        torch.testing.assert_close(slopes, expected)
        torch.testing.assert_close(statistics, torch.stack((real.mean(), fake.mean(), real.mean() - fake.mean(), loss)))


@pytest.mark.parametrize("counts", [(5, 3), (3, 2000)])
def test_real_and_fake_scores_of_different_numbers(counts):
    """Each mean is over its own."""
    leaves = [torch.randn(n, 1, dtype=F64, requires_grad=True) for n in counts]
    real, fake = leaves
    bce = nn.functional.binary_cross_entropy_with_logits
    gan = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
    expected = 0.3 * gan + 0.7 * (fake.mean() - real.mean()) + 0.1 * (real**2).mean()
    for backend in ("triton", "torch"):
        loss = functional.critic_loss(real, fake, blend=0.3, drift=0.1, backend=backend)
        torch.testing.assert_close(loss, expected)
        for a, b in zip(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_blend_one_is_binary_cross_entropy():
    real, fake = 5 * torch.randn(2, 64, 1, dtype=F64)
    bce = functools.partial(nn.functional.binary_cross_entropy_with_logits)
    expected = bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))
    for backend in ("triton", "torch"):
        torch.testing.assert_close(functional.critic_loss(real, fake, blend=1.0, backend=backend), expected)
        torch.testing.assert_close(
            functional.generator_loss(fake, blend=1.0, backend=backend), bce(fake, torch.ones_like(fake))
        )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_loss_of_scores_that_are_told_apart_keeps_its_digits(dtype):
    """softplus of -40 is 4e-18, which 1 + exp(-40) rounds off."""
    x = torch.tensor([-5.0, -15.0, -40.0], dtype=dtype)
    exact = torch.log1p(x.double().exp())
    for backend in ("triton", "torch"):
        for one, expected in zip(x, exact, strict=True):
            loss = functional.generator_loss(-one[None], blend=1.0, backend=backend)
            torch.testing.assert_close(loss.double(), expected, rtol=20 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("blend", "drift", "real", "fake", "expected"),
    [
        (1.0, 0.0, math.inf, 0.0, math.log(2)),  # told apart for certain: nothing to lose
        (1.0, 0.0, 0.0, -math.inf, math.log(2)),
        (1.0, 0.0, 0.0, math.inf, math.inf),
        (0.0, 0.1, 0.0, math.inf, math.inf),
        (0.0, 0.1, -math.inf, 0.0, math.inf),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_infinite_scores_lose_what_the_limit_says(blend, drift, real, fake, expected, backend):
    loss = functional.critic_loss(
        torch.tensor([real]), torch.tensor([fake]), blend=blend, drift=drift, backend=backend
    )  # fmt: skip
    torch.testing.assert_close(loss, torch.tensor(expected))


# Noise


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_noise_is_normal_and_independent(backend):
    """Moments and tails, between neighbours and samples."""
    n, size = 8, 20_003
    x = functional.perturb(torch.zeros(n, size), scale=1.0, seed=5, backend=backend)
    count = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(count)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / count)
    share = (x.abs() > 3).double().mean()
    assert abs(share - 0.0026998) < 4 * math.sqrt(0.0027 / count)
    correlation = torch.corrcoef(x) - torch.eye(n)
    assert correlation.abs().max() < 5 / math.sqrt(size)
    for lag in (1, 2, 3, 4):
        assert abs((x[:, lag:] * x[:, :-lag]).mean()) < 4 / math.sqrt(count)
        assert abs((x[:, lag:] ** 2 * x[:, :-lag] ** 2).mean() - 1) < 8 / math.sqrt(count)


@pytest.mark.emulated
def test_noise_goes_by_index_alone():
    """So it is the same for any batch, rank and block; on both backends to rounding."""
    x = torch.zeros(6, 2500)
    whole = functional.perturb(x, scale=0.5, seed=2**62, offset=2**33, backend="triton")
    for i in range(6):
        offset = torch.tensor(2**33 + i)
        part = functional.perturb(x[i : i + 1], scale=torch.tensor(0.5), seed=2**62, offset=offset, backend="triton")
        assert torch.equal(part[0], whole[i])
    assert torch.equal(
        functional.perturb(x[:, :7], scale=0.5, seed=2**62, offset=2**33, backend="triton"), whole[:, :7]
    )
    plain = functional.perturb(x, scale=0.5, seed=2**62, offset=2**33, backend="torch")
    torch.testing.assert_close(plain, whole, rtol=1e-5, atol=1e-6)
    assert not torch.equal(functional.perturb(x, scale=0.5, seed=2**61, offset=2**33, backend="triton"), whole)


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_noise_in_each_layout(dtype):
    for shape in ((3, 17), (2, 2049), (2, 3, 4, 5)):
        for layout in (torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])):
            x = torch.randn(shape).to(dtype).to(memory_format=layout)
            results = [
                functional.perturb(x, scale=0.3, seed=1, offset=4, backend=backend) for backend in ("triton", "torch")
            ]
            assert all(noisy.is_contiguous(memory_format=layout) for noisy in results)
            tolerance = {F64: 1e-12, torch.bfloat16: 0.02}[dtype]
            torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_noise_has_a_derivative_by_the_samples_alone(backend):
    x, scale = torch.randn(2, 3, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    functional.perturb(x, scale=scale, seed=1, backend=backend).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert scale.grad is None


def test_noise_in_a_compiled_function():
    """With another number as its scale, too, which the compiler then takes for a variable."""
    torch._dynamo.reset()
    x = torch.randn(2, 3)

    def perturb(scale):
        return functional.perturb(x, scale=scale, seed=1, offset=2)

    compiled = torch.compile(perturb, fullgraph=True, backend="aot_eager")
    for scale in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(scale), perturb(scale))
