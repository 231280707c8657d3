"""The lean steps against the textbook's, launch budgets, backends, state, and what the trainer refuses."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import WORKLOADS
from count_launches import BUDGETS, Live, count_kernels
from small_trainers import CONSTRAINTS, F64, PAIRS, assert_same_state, mlp_pair, quietly, weights
from torch import nn

from benchmarks.implementations import textbook_critic_step
from fastwgan import Adam, GradientPenalty, RMSprop, Trainer, WeightClip, models, reference, warmup_schedule
from fastwgan import metrics as metrics_module
from fastwgan.optim import base


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_critic_step_is_the_textbooks(backend, constraint, pair, device):
    """Same latents, same eps, float64: the same weights, buffers and metrics, step after step."""
    generator, critic, shape, _ = PAIRS[pair]()
    generator, critic = generator.to(device), critic.to(device)
    generator2, critic2 = copy.deepcopy((generator, critic))
    latent = 6 if pair == "mlp" else 5
    zs = iter(torch.randn(4, 8, latent, dtype=F64, device=device))
    kept = []
    trainer = quietly(
        Trainer, generator, critic, constraint=CONSTRAINTS[constraint], seed=3, backend=backend,
        latent=lambda n, d: kept.append(next(zs)) or kept[-1],
    )  # fmt: skip
    if constraint == "clip":
        optimizer = torch.optim.RMSprop(critic2.parameters(), lr=5e-5)
    else:
        optimizer = torch.optim.Adam(critic2.parameters(), lr=1e-4, betas=(0.0, 0.9))
    for step in range(4):
        real = torch.randn(8, *shape, dtype=F64, device=device)
        metrics = trainer.critic_step(real)
        eps = reference.uniform(3, 8 * step, 8, device).double()
        options = {"clip": 0.05} if constraint == "clip" else {"penalty_weight": 10.0, "eps": eps}
        loss = textbook_critic_step(generator2, critic2, optimizer, real, kept[-1], **options)
        torch.testing.assert_close(metrics.critic_loss, loss, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(weights(critic), weights(critic2), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(critic.state_dict(), critic2.state_dict(), rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(generator.state_dict(), generator2.state_dict(), rtol=1e-8, atol=1e-11)
    assert all(p.grad is None for p in generator.parameters())


@pytest.mark.emulated
@pytest.mark.parametrize("pair", ["mlp", "conv"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_backends_agree_over_twenty_iterations(constraint, pair):
    """float32, one seed, 20 generator iterations of n_critic steps: weights agree to 1e-5 relative."""
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        generator, critic, shape, latent = PAIRS[pair](torch.float32)
        trainer = Trainer(
            generator, critic, latent=latent, constraint=CONSTRAINTS[constraint], n_critic=2, backend=backend
        )
        for _ in range(40):
            trainer.step(torch.randn(8, *shape))
        assert trainer.generator_iterations == 20
        results.append((weights(generator), weights(critic)))
    for fused, plain in zip(*results, strict=True):
        assert (fused - plain).norm() <= 1e-5 * plain.norm()


class Constant(nn.Module):
    """A generator that costs nothing, so that the critic's work alone is counted."""

    def __init__(self, samples):
        super().__init__()
        self.samples, self.weight = samples, nn.Parameter(torch.zeros(()))

    def forward(self, z):
        return self.samples


@pytest.mark.emulated
@pytest.mark.parametrize("name", BUDGETS)
def test_lean_budgets(name):
    """Dispatcher calls that reach a device kernel in one critic step, generator excluded: (textbook, ours)."""
    (textbook, budget), workload = BUDGETS[name], WORKLOADS[name]
    shape, constraint = workload.shape, workload.constraint
    critic, samples = workload.critic(8), Constant(torch.randn(4, *shape))
    if isinstance(constraint, WeightClip):
        optimizer, options = torch.optim.RMSprop(critic.parameters(), foreach=False), {"clip": 0.01}
    else:
        optimizer, options = torch.optim.Adam(critic.parameters(), foreach=False), {"penalty_weight": 10.0}
    for _ in range(2):
        with count_kernels() as counts:
            textbook_critic_step(samples, critic, optimizer, torch.randn(4, *shape), None, **options)
    assert sum(counts.values()) - counts["randn"] >= textbook

    trainer = Trainer(
        Constant(torch.randn(4, *shape)), workload.critic(8), latent=1, constraint=constraint, backend="triton"
    )
    real = torch.randn(4, *shape)
    trainer.latent = lambda n, device: None
    trainer.critic_step(real)
    with count_kernels() as counts:
        trainer.critic_step(real)
    assert sum(counts.values()) <= budget, counts
    assert counts["_guard_kernel"] == counts["_update_kernel"] == 1
    assert counts["_penalty_kernel"] == counts["_interpolate_kernel"] == isinstance(constraint, GradientPenalty)


@pytest.mark.parametrize("name", BUDGETS)
def test_no_more_memory_than_the_textbooks(name):
    """At the peak of a critic step, generator included, in tensors that are alive."""
    workload = WORKLOADS[name]
    options = {"clip": 0.01} if isinstance(workload.constraint, WeightClip) else {"penalty_weight": 10.0}
    real = torch.rand(16, *workload.shape)
    generator, critic = workload.generator(16), workload.critic(16)
    optimizer = torch.optim.RMSprop(critic.parameters(), foreach=False)

    def textbook():
        textbook_critic_step(generator, critic, optimizer, real, torch.randn(16, 100), **options)

    def peak(step):
        for _ in range(2):
            step()
        for p in critic.parameters():
            p.grad = None
        with Live() as live:
            step()
        return live.peak

    allowed = peak(textbook)
    trainer = Trainer(generator, critic, latent=100, constraint=workload.constraint, backend="torch")
    assert peak(lambda: trainer.critic_step(real)) <= allowed + 2**10  # statistics


@pytest.mark.emulated
def test_generator_step_computes_no_critic_weight_gradient():
    critic = models.mlp([10, 16, 1])
    trainer = Trainer(models.mlp([6, 10]), critic, latent=6, backend="triton")
    with count_kernels() as counts:
        trainer.generator_step(8)
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    assert counts["_guard_kernel"] == counts["_update_kernel"] == 1
    # G: forward addmm, weight and bias gradients. D: two layers forward, two input gradients, no more.
    assert counts["addmm"] == 3
    assert counts["mm"] == 3
    assert counts["sum"] == 1


def test_generator_step_is_the_textbooks(device):
    generator, critic, _, latent = mlp_pair()
    generator, critic = generator.to(device), critic.to(device)
    twin, critic2 = copy.deepcopy((generator, critic))
    z = torch.randn(8, latent, dtype=F64, device=device)
    trainer = Trainer(generator, critic, latent=lambda n, d: z)
    optimizer = torch.optim.RMSprop(twin.parameters(), lr=5e-5)
    for _ in range(3):
        metrics = trainer.generator_step(8)
        optimizer.zero_grad()
        loss = -critic2(twin(z)).mean()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(metrics.generator_loss, loss.detach())
        torch.testing.assert_close(weights(generator), weights(twin))


def test_each_critic_step_draws_its_own_latents(device):
    """So that steps alone, whole iterations and graphs see the same numbers, whatever the batch."""
    generator, passes = nn.Sequential(nn.Linear(6, 10)).to(device), []
    generator.register_forward_hook(lambda m, args, output: passes.append(args[0].clone()))
    trainer = Trainer(generator, models.mlp([10, 8, 1]).to(device), latent=6, n_critic=3, cuda_graph=False)
    random = torch.Generator(device)
    random.set_state(trainer._steps.latents.stream.get_state())
    for batch in (4, 4, 8, 5):
        passes.clear()
        trainer.step(torch.randn(batch, 10, device=device))
        expected = [torch.randn(batch, 6, generator=random, device=device) for _ in passes]
        assert len(passes) == 1 + (batch == 8)  # the third step's generator step
        for z, e in zip(passes, expected, strict=True):
            assert torch.equal(z, e)


def test_a_generator_of_more_samples_than_latents_is_refused():
    class Doubles(nn.Linear):
        def forward(self, z):
            return super().forward(torch.cat((z, z)))

    trainer = Trainer(Doubles(6, 10), models.mlp([10, 1]), latent=6)
    before = weights(trainer.critic)
    with pytest.raises(ValueError, match="^generator: its output: expected"):
        trainer.step(torch.randn(4, 10))
    assert torch.equal(weights(trainer.critic), before)


def test_resuming_amid_an_iteration_goes_on_with_its_latents(tmp_path):
    def made():
        torch.manual_seed(0)
        return Trainer(models.mlp([6, 10]), models.mlp([10, 8, 1]), latent=6, n_critic=4)

    batches = torch.randn(8, 5, 10)
    whole, first, second = made(), made(), made()
    for real in batches:
        whole.step(real)
    for real in batches[:2]:
        first.step(real)
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    for real in batches[2:]:
        second.step(real)
    assert_same_state(second.state_dict(), whole.state_dict())


def test_conditions_that_are_no_row_per_sample_take_two_forwards():
    class Critic(nn.Linear):
        def forward(self, x, cond):
            scale = cond["scale"] if isinstance(cond, dict) else 1.0 if cond is None else cond.mean()
            return super().forward(x) * scale

    generator = models.mlp([6, 10])
    generator.forward = lambda z, cond: nn.Sequential.forward(generator, z)
    for cond in ({"scale": torch.ones(8, 1)}, torch.ones(2, 8, 3), None, torch.ones(8)):
        trainer = Trainer(generator, Critic(10, 1), latent=6)
        assert trainer.critic_step(torch.randn(8, 10), cond).wasserstein.isfinite()


def test_a_batch_that_is_refused_asks_nobody_else():
    """Nor does step call the public critic_step, which a user may have wrapped."""
    calls = []
    trainer = Trainer(models.mlp([6, 10]), models.mlp([10, 1]), latent=6, n_critic=lambda i: calls.append(i) or 2)
    with pytest.raises(TypeError, match="^real: expected a tensor, got str"):
        trainer.step("samples")
    assert not calls
    trainer.critic_step = lambda *_: calls.append("critic_step")
    trainer.step(torch.randn(4, 10))
    assert calls == [0]


def test_metrics_are_read_without_a_launch_beside_the_transfer():
    trainer = Trainer(models.mlp([6, 10]), models.mlp([10, 1]), latent=6, n_critic=1)
    metrics = [trainer.step(torch.randn(4, 10)) for _ in range(3)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        values = metrics_module.read(metrics)
    assert all("nonfinite" in each and "generator_loss" in each for each in values)
    assert not [event for event in profile.key_averages() if event.key in ("aten::add", "aten::sub", "aten::mul")]


def test_step_counts_critic_steps_to_a_generator_step():
    trainer = Trainer(models.mlp([6, 10]), models.mlp([10, 1]), latent=6, n_critic=lambda i: 3 if i < 2 else 1)
    due = [trainer.step(torch.randn(4, 10)).generator_loss is not None for _ in range(8)]
    assert due == [False, False, True, False, False, True, True, True]
    assert (trainer.critic_iterations, trainer.generator_iterations) == (8, 4)
    assert [warmup_schedule(i) for i in (0, 24, 25, 499, 500, 501, 1000)] == [100, 100, 5, 5, 100, 5, 100]


class Conditional(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.embed, self.net = nn.Embedding(10, 4), models.mlp([inputs + 4, 16, outputs])

    def forward(self, x, labels):
        return self.net(torch.cat((x, self.embed(labels)), 1))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_conditions_reach_both_networks(constraint, device):
    generator, critic = Conditional(6, 10).to(device, F64), Conditional(10, 1).to(device, F64)
    twin, critic2 = copy.deepcopy((generator, critic))
    z = torch.randn(8, 6, dtype=F64, device=device)
    trainer = Trainer(generator, critic, latent=lambda n, d: z[:n], constraint=CONSTRAINTS[constraint], n_critic=1)
    real, labels = torch.randn(8, 10, dtype=F64, device=device), torch.arange(8, device=device)
    options = (
        {"clip": 0.05}
        if constraint == "clip"
        else {"penalty_weight": 10.0, "eps": reference.uniform(0, 0, 8, device).double()}
    )
    kind = torch.optim.RMSprop if constraint == "clip" else torch.optim.Adam
    numbers = {"lr": 5e-5} if constraint == "clip" else {"lr": 1e-4, "betas": (0.0, 0.9)}
    textbook_critic_step(
        twin, critic2, kind(critic2.parameters(), **numbers), real, z, cond=(labels,), **options
    )  # fmt: skip
    trainer.step(real, labels)
    torch.testing.assert_close(weights(critic), weights(critic2))
    assert generator.embed.weight.grad is not None
    assert trainer.sample(3, labels[:3]).shape == (3, 10)


def test_lazy_penalty_skips_and_scales(device):
    generator, critic, _, latent = mlp_pair()
    trainer = Trainer(
        generator.to(device), critic.to(device), latent=latent, constraint=GradientPenalty(2.0, every=3),
        critic_optimizer=torch.optim.SGD(critic.parameters(), lr=0.0),
    )  # fmt: skip
    metrics = [trainer.critic_step(torch.randn(8, 10, dtype=F64, device=device)) for _ in range(4)]
    assert [m.penalty is not None for m in metrics] == [True, False, False, True]
    m = metrics[0]
    torch.testing.assert_close(m.critic_loss, -m.wasserstein + 6 * m.penalty)
    assert metrics[1].critic_loss == -metrics[1].wasserstein
    assert "penalty" not in metrics[1].as_dict()


@pytest.mark.parametrize("at", ["real", "fake"])
def test_zero_centered_penalty_at_real_or_fake(at, device):
    generator, critic, _, latent = mlp_pair()
    generator, critic = generator.to(device).eval(), critic.to(device)
    z, real = torch.randn(8, latent, dtype=F64, device=device), torch.randn(8, 10, dtype=F64, device=device)
    trainer = Trainer(
        generator, critic, latent=lambda n, d: z, constraint=GradientPenalty(3.0, kind="zero-centered", at=at),
        critic_optimizer=torch.optim.SGD(critic.parameters(), lr=0.1),
    )  # fmt: skip
    x = (real if at == "real" else generator(z)).detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    loss = critic(generator(z)).mean() - critic(real).mean() + 3 * g.square().sum(1).mean()
    expected = [
        p - 0.1 * (0 if d is None else d)
        for p, d in zip(critic.parameters(), torch.autograd.grad(loss, list(critic.parameters())), strict=True)
    ]
    metrics = trainer.critic_step(real)
    torch.testing.assert_close(metrics.critic_loss, loss.detach())
    for p, e in zip(critic.parameters(), expected, strict=True):
        torch.testing.assert_close(p, e)


def test_metrics_are_device_tensors_of_their_own_step(device):
    generator, critic, _, latent = mlp_pair(torch.float32)
    trainer = Trainer(generator.to(device), critic.to(device), latent=latent, n_critic=2)
    first = trainer.step(torch.randn(8, 10, device=device))
    before = first.as_dict()
    second = trainer.step(torch.randn(8, 10, device=device))
    assert first.as_dict() == before
    assert set(before) == {"critic_loss", "wasserstein", "real_score", "fake_score", "saturation", "nonfinite"}
    assert set(second.as_dict()) == set(before) | {"generator_loss"}
    for value in (second.wasserstein, second.saturation, second.generator_loss):
        assert value.dim() == 0
        assert value.device == device
    assert before["critic_loss"] == -before["wasserstein"]
    assert before["wasserstein"] == pytest.approx(before["real_score"] - before["fake_score"], abs=1e-6)
    assert "wasserstein=" in repr(second)


def test_statistics_that_nobody_reads_are_not_computed(monkeypatch):
    """Those that are read later are their own step's: the weights on the bound are counted before they change."""
    counted, means = [], []
    saturation, statistics = base.saturation, reference.score_statistics
    monkeypatch.setattr(base, "saturation", lambda *args: counted.append(1) or saturation(*args))
    monkeypatch.setattr(reference, "score_statistics", lambda *args: means.append(1) or statistics(*args))
    torch.manual_seed(0)
    trainer = Trainer(nn.Linear(4, 2), nn.Linear(2, 1), latent=4, constraint=WeightClip(0.02), backend="torch")
    state = trainer.state_dict()
    for _ in range(3):
        trainer.critic_step(torch.randn(8, 2))
    assert (counted, means) == ([], [])
    shares, held = [], []
    for _ in range(6):
        held.append(trainer.critic_step(torch.randn(8, 2)))
        shares.append((weights(trainer.critic).abs() >= 0.02).float().mean())
    trainer.load_state_dict(state)
    assert len(counted) == 6
    assert means == []
    assert [metrics.saturation for metrics in held] == shares
    assert len({float(share) for share in shares}) > 1
    assert len(counted) == 6
    assert all(metrics.wasserstein is not None for metrics in held)


def test_saturation_is_the_share_on_the_bound(device):
    generator, critic, _, latent = mlp_pair(torch.float32)
    trainer = Trainer(generator.to(device), critic.to(device), latent=latent)
    metrics = trainer.critic_step(torch.randn(8, 10, device=device))
    on_bound = sum(int((p.abs() == torch.tensor(0.01)).sum()) for p in critic.parameters())
    assert float(metrics.saturation) == pytest.approx(on_bound / weights(critic).numel())
    assert weights(critic).abs().max() <= 0.01


# Optimizers


def test_excluded_parameters_are_not_clamped(device):
    for exclude in ("4.*", nn.BatchNorm1d, ("4.*", nn.BatchNorm1d)):
        critic = nn.Sequential(
            nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        ).to(device)
        with torch.no_grad():
            critic[0].weight[:4] *= 0.01  # within the bound, also after a step
        trainer = Trainer(
            models.mlp([6, 10]).to(device), critic, latent=6, constraint=WeightClip(0.01, exclude=exclude)
        )
        metrics = trainer.critic_step(torch.randn(8, 10, device=device))
        excluded = exclude if isinstance(exclude, tuple) else (exclude,)
        assert (critic[4].weight.abs().max() > 0.02) == ("4.*" in excluded)
        assert (critic[5].weight.abs().max() > 0.02) == (nn.BatchNorm1d in excluded)
        assert critic[0].weight.abs().max() <= 0.01
        out = {4: "4.*" in excluded, 5: nn.BatchNorm1d in excluded}
        clamped = torch.cat([weights(m) for i, m in enumerate(critic) if list(m.parameters()) and not out.get(i)])
        on_bound = (clamped.abs() == torch.tensor(0.01)).float().mean().item()
        assert float(metrics.saturation) == pytest.approx(on_bound)
        assert 0 < on_bound < 1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, RMSprop])
def test_any_optimizer_is_clamped(kind, device):
    generator, critic, _, latent = mlp_pair(torch.float32)
    critic = critic.to(device)
    optimizer = kind(critic.parameters(), lr=0.01)
    trainer = quietly(Trainer, generator.to(device), critic, latent=latent, critic_optimizer=optimizer)
    metrics = trainer.critic_step(torch.randn(8, 10, device=device))
    assert weights(critic).abs().max() <= 0.01
    assert metrics.saturation > 0.5


def test_parameters_without_gradient_are_clamped_as_the_textbook_does(device):
    critic = models.mlp([10, 8, 1]).to(device)
    critic.register_parameter("unused", nn.Parameter(torch.ones(3, device=device)))
    critic[1].weight.requires_grad_(False)
    trainer = Trainer(models.mlp([6, 10]).to(device), critic, latent=6)
    trainer.critic_step(torch.randn(8, 10, device=device))
    assert weights(critic).abs().max() <= 0.01


@pytest.mark.parametrize("kind", [RMSprop, torch.optim.SGD])
def test_parameters_outside_the_optimizer_are_clamped_too(kind, device):
    critic = models.mlp([10, 8, 1]).to(device)
    trainer = Trainer(
        models.mlp([6, 10]).to(device), critic, latent=6, critic_optimizer=kind(critic[-1].parameters(), lr=0.1)
    )
    trainer.critic_step(torch.randn(8, 10, device=device))
    assert weights(critic).abs().max() <= 0.01


def test_a_layer_frozen_during_training_stays_put():
    generator, critic, _, latent = mlp_pair(torch.float32)
    trainer = Trainer(generator, critic, latent=latent, constraint=GradientPenalty(), n_critic=1)
    trainer.step(torch.randn(8, 10))
    for layer in (generator[1], critic[1]):
        layer.weight.requires_grad_(False)
    before = generator[1].weight.clone(), critic[1].weight.clone()
    trainer.step(torch.randn(8, 10))
    assert torch.equal(generator[1].weight, before[0])
    assert torch.equal(critic[1].weight, before[1])


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adam])
def test_hooks_of_a_taken_over_optimizer_are_called(kind):
    generator, critic, _, latent = mlp_pair(torch.float32)
    optimizer, calls = kind(critic.parameters(), lr=0.01), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    trainer = quietly(Trainer, generator, critic, latent=latent, critic_optimizer=optimizer)
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    trainer.critic_step(torch.randn(8, 10))
    assert calls == ["before", "after"]


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adam])
def test_torch_optimizers_are_taken_over_with_state_and_scheduler(kind, device):
    generator, critic, _, latent = mlp_pair()
    generator, critic = generator.to(device), critic.to(device)
    critic2 = copy.deepcopy(critic)
    optimizers = [kind(c.parameters(), lr=0.01) for c in (critic, critic2)]
    for c, o in zip((critic, critic2), optimizers, strict=True):
        c(torch.ones(3, 10, dtype=F64, device=device)).sum().backward()
        o.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], 1, 0.5)
    scheduler2 = torch.optim.lr_scheduler.StepLR(optimizers[1], 1, 0.5)
    z = torch.randn(8, latent, dtype=F64, device=device)
    trainer = quietly(Trainer, generator, critic, latent=lambda n, d: z, critic_optimizer=optimizers[0])
    assert isinstance(trainer.critic_optimizer, (RMSprop, Adam))
    for _ in range(3):
        real = torch.randn(8, 10, dtype=F64, device=device)
        textbook_critic_step(generator, critic2, optimizers[1], real, z, clip=0.01)
        trainer.critic_step(real)
        scheduler.step()
        scheduler2.step()
        torch.testing.assert_close(weights(critic), weights(critic2))
    assert trainer.critic_optimizer.param_groups[0]["lr"] == optimizers[1].param_groups[0]["lr"] == 0.01 / 8
    trainer.load_state_dict(trainer.state_dict())
    scheduler.step()
    assert trainer.critic_optimizer.param_groups[0]["lr"] == 0.01 / 16


def test_warnings_once_each():
    norm = nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match="BatchNorm") as record:
        trainer = Trainer(models.mlp([6, 10]), norm, latent=6, constraint=GradientPenalty())
        for _ in range(2):
            trainer.critic_step(torch.randn(8, 10))
    assert len(record) == 1
    critic = models.mlp([10, 1])
    for optimizer in (RMSprop(critic.parameters(), momentum=0.9), torch.optim.Adam(critic.parameters())):
        with pytest.warns(UserWarning, match="momentum") as record:
            Trainer(models.mlp([6, 10]), critic, latent=6, critic_optimizer=optimizer).critic_step(torch.randn(8, 10))
        assert len(record) == 1


# State

RESUME = """
import json, random, sys
import numpy, torch
from torch import nn
from fastwgan import GradientPenalty, Trainer, WeightClip, models
random.seed(0)
numpy.random.seed(0)
constraint = {"clip": WeightClip(), "penalty": GradientPenalty()}[sys.argv[1]]
torch.manual_seed(0)
critic = nn.Sequential(nn.Linear(10, 16), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(16, 1))
generator = models.mlp([6, 16, 16, 10], norm=True)
trainer = Trainer(generator, critic, latent=6, constraint=constraint, n_critic=4, backend="torch")
data = torch.randn(30, 8, 10, generator=torch.Generator().manual_seed(1))
start, stop, load, save = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
if load != "-":
    trainer.load(load)
for i in range(start, stop):
    random.random(), numpy.random.rand()
    trainer.step(data[i])
    if i % 7 == 0:
        trainer.sample(3)
trainer.save(save)
"""


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_resume_in_a_new_process_is_bit_identical(constraint, tmp_path):
    """Latents, eps, dropout, samples, BatchNorm, both optimizers and the place in the n_critic cycle go on."""

    def run(start, stop, load, save):
        subprocess.run(
            [sys.executable, "-c", RESUME, constraint, str(start), str(stop), str(load), str(tmp_path / save)],
            check=True,
        )
        return tmp_path / save

    straight = torch.load(run(0, 30, "-", "straight.pt"))["trainer"]
    resumed = torch.load(run(15, 30, run(0, 15, "-", "half.pt"), "resumed.pt"))["trainer"]
    assert_same_state(resumed, straight)
    assert (resumed["critic_iterations"], resumed["generator_iterations"]) == (30, 7)


def test_load_refuses_what_does_not_fit_and_changes_nothing(tmp_path):
    def make(width):
        return Trainer(models.mlp([6, 10]), models.mlp([10, width, 1]), latent=6, constraint=GradientPenalty())

    trainer, other = make(8), make(9)
    for t in (trainer, other):
        t.critic_step(torch.randn(4, 10))
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch"):
        trainer.load_state_dict(other.state_dict())
    assert_same_state(trainer.state_dict(), before)
    with pytest.raises(ValueError, match="^state_dict: .*missing critic"):
        trainer.load_state_dict({"generator": {}})
    with pytest.raises(FileNotFoundError, match="^path:"):
        trainer.load(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="^path:"):
        trainer.load(tmp_path / "text.pt")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="^path:"):
        trainer.load(tmp_path / "foreign.pt")
    trainer.save(tmp_path / "own.pt")
    data = (tmp_path / "own.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="^path:"):
        trainer.load(tmp_path / "cut.pt")
    assert_same_state(trainer.state_dict(), before)


def test_the_constraint_is_the_trainers_not_the_checkpoints():
    def make(constraint):
        generator, critic = models.mlp([6, 10]), models.mlp([10, 8, 1])
        optimizers = [RMSprop(m.parameters(), lr=0.1) for m in (critic, generator)]
        return Trainer(
            generator, critic, latent=6, constraint=constraint,
            critic_optimizer=optimizers[0], generator_optimizer=optimizers[1],
        )  # fmt: skip

    for saved in (GradientPenalty(), WeightClip(0.5)):
        for loaded, bound in ((WeightClip(0.01), 0.01), (GradientPenalty(), None)):
            before, after = make(saved), make(loaded)
            before.critic_step(torch.randn(8, 10))
            state = before.state_dict()
            state["critic_optimizer"]["param_groups"][0]["clip"] = 0.5  # where an older version kept the constraint's
            after.load_state_dict(state)
            after.critic_step(torch.randn(8, 10))
            assert (weights(after.critic).abs().max() <= 0.01) == (bound == 0.01)


@pytest.mark.parametrize(("key", "value"), [("seed", -1), ("eps_offset", -5), ("critic_iterations", 1.5)])
def test_load_checks_numbers(key, value):
    trainer = Trainer(models.mlp([6, 10]), models.mlp([10, 1]), latent=6)
    with pytest.raises((TypeError, ValueError), match=f"^state_dict: {key}:"):
        trainer.load_state_dict(trainer.state_dict() | {key: value})


def test_a_state_of_another_device_loads_with_a_warning():
    trainer, other = (
        Trainer(models.mlp([6, 10]), models.mlp([10, 1]), latent=6, constraint=GradientPenalty()) for _ in range(2)
    )
    trainer.critic_step(torch.randn(8, 10))
    state = trainer.state_dict()
    state["random"] |= {"device": "cuda", "latent": torch.zeros(16, dtype=torch.uint8)}
    with pytest.warns(UserWarning, match="fresh random streams"):
        other.load_state_dict(state)
    assert torch.equal(weights(other.critic), weights(trainer.critic))
    assert other.critic_iterations == 1


def test_load_checks_optimizers():
    trainer, other = (
        Trainer(models.mlp([6, 10]), models.mlp([10, 1]), latent=6, constraint=c)
        for c in (WeightClip(), GradientPenalty())
    )
    with pytest.raises(ValueError, match="^state_dict: expected the optimizers"):
        trainer.load_state_dict(other.state_dict())


def test_what_is_saved_can_be_loaded(tmp_path):
    """A scheduler that computes in NumPy makes the learning rate one of its scalars."""
    trainer = Trainer(models.mlp([6, 10]), models.mlp([10, 1]), latent=6)
    trainer.critic_optimizer.param_groups[0]["lr"] = np.float64(0.25)
    trainer.save(tmp_path / "last.pt")
    assert (tmp_path / "last.pt").stat().st_mode & 0o044  # as readable as any file one writes
    trainer.load(tmp_path / "last.pt")
    assert trainer.critic_optimizer.param_groups[0]["lr"] == 0.25
    trainer.critic_optimizer.param_groups[0]["note"] = {1, 2}
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(TypeError, match="^content"):
        trainer.save(tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    trainer = Trainer(models.mlp([6, 10]), models.mlp([10, 1]), latent=6)
    trainer.save(tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        trainer.save(tmp_path / "last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("latent", [6, lambda n, device: torch.randn(n, 6)], ids=["own", "callable"])
def test_sampling_does_not_disturb_training(latent):
    results = []
    for sampling in (False, True):
        torch.manual_seed(0)
        generator = models.mlp([6, 16, 16, 10], norm=True)
        trainer = Trainer(generator, models.mlp([10, 1]), latent=latent)
        for _ in range(4):
            trainer.step(torch.ones(8, 10))
            if sampling:
                assert not torch.equal(trainer.sample(5), trainer.sample(5))
                assert all(m.training for m in generator.modules())
        results.append(weights(trainer.critic))
    assert torch.equal(*results)


# Bad input

G, D = models.mlp([6, 10]), models.mlp([10, 1])
BAD_ARGUMENTS = [
    ({"generator": 3}, TypeError, "generator"),
    ({"critic": nn.Flatten()}, ValueError, "critic"),
    ({"latent": 0}, ValueError, "latent"),
    ({"latent": "normal"}, TypeError, "latent"),
    ({"constraint": "clip"}, TypeError, "constraint"),
    ({"n_critic": 0}, ValueError, "n_critic"),
    ({"n_critic": 2.5}, TypeError, "n_critic"),
    ({"seed": -1}, ValueError, "seed"),
    ({"backend": "cuda"}, ValueError, "backend"),
    ({"critic_optimizer": "adam"}, TypeError, "critic_optimizer"),
    ({"critic_optimizer": torch.optim.LBFGS(D.parameters())}, TypeError, "critic_optimizer"),
    ({"critic": nn.Sequential(G, nn.Linear(10, 1))}, ValueError, "critic"),
    ({"critic_optimizer": torch.optim.SGD(G.parameters(), lr=1)}, ValueError, "critic_optimizer"),
    ({"critic_optimizer": RMSprop(D.parameters(), clip=0.5)}, ValueError, "critic_optimizer"),
    ({"constraint": WeightClip(exclude="nothing.*")}, ValueError, "exclude"),
    ({"amp": torch.float64}, ValueError, "amp"),
    ({"cuda_graph": "yes"}, ValueError, "cuda_graph"),
    ({"cuda_graph": True}, RuntimeError, "cuda_graph"),
    ({"compile": 1}, TypeError, "compile"),
    ({"ema": 1.0}, ValueError, "ema"),
]


@pytest.mark.parametrize(("options", "error", "name"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(options, error, name):
    with pytest.raises(error, match=f"^{name}:"):
        Trainer(**({"generator": G, "critic": D, "latent": 6} | options))


BAD_STEPS = [
    (lambda t: t.critic_step("x"), TypeError, "real"),
    (lambda t: t.critic_step(torch.ones(4, 10).long()), TypeError, "real"),
    (lambda t: t.critic_step(torch.ones(0, 10)), ValueError, "real"),
    (lambda t: t.critic_step(torch.ones(4, 11)), ValueError, "generator: its output"),
    (lambda t: t.critic_step(torch.ones(4, 10).double()), TypeError, "generator: its output"),
    (lambda t: t.generator_step(0), ValueError, "batch_size"),
    (lambda t: setattr(t, "n_critic", lambda i: 0) or t.step(torch.ones(4, 10)), ValueError, "n_critic: its result"),
    (lambda t: t.sample(0), ValueError, "n"),
    (lambda t: t.sample(1.5), TypeError, "n"),
]


@pytest.mark.parametrize(("step", "error", "name"), BAD_STEPS)
def test_bad_steps_are_named_and_change_no_weight(step, error, name):
    trainer = Trainer(G, D, latent=6)
    before = weights(G), weights(D)
    with pytest.raises(error, match=f"^{name}:"):
        step(trainer)
    assert torch.equal(before[0], weights(G))
    assert torch.equal(before[1], weights(D))
    assert trainer.critic_iterations == trainer.generator_iterations == 0


def test_critics_that_give_no_scores_per_sample_are_refused():
    mean_of_batch = nn.Sequential(D, nn.Flatten(0), nn.Unflatten(0, (1, -1)))  # [1, N] for N samples
    with pytest.raises(ValueError, match="^critic: its output:"):
        Trainer(G, mean_of_batch, latent=6).critic_step(torch.ones(4, 10))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_score_shapes(constraint):
    """[N], [N, 1] and a patch critic's [N, 1, H, W]: the mean is over all of them."""
    real = torch.randn(4, 10)
    for tail in (
        nn.Sequential(nn.Linear(10, 1), nn.Flatten(0)),
        nn.Linear(10, 1),
        nn.Sequential(nn.Linear(10, 6), nn.Unflatten(1, (1, 2, 3))),
    ):
        trainer = Trainer(G, tail, latent=6, constraint=CONSTRAINTS[constraint])
        expected = tail(real).mean().item()
        assert trainer.critic_step(real).as_dict()["real_score"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: WeightClip(0), ValueError, "bound"),
        (lambda: WeightClip(float("nan")), ValueError, "bound"),
        (lambda: WeightClip(exclude=(3,)), TypeError, "exclude"),
        (lambda: GradientPenalty(0), ValueError, "weight"),
        (lambda: GradientPenalty(kind="three-sided"), ValueError, "kind"),
        (lambda: GradientPenalty(target=-1), ValueError, "target"),
        (lambda: GradientPenalty(at="noise"), ValueError, "at"),
        (lambda: GradientPenalty(at="perturbed", noise=0), ValueError, "noise"),
        (lambda: GradientPenalty(at="perturbed", noise="0.5"), TypeError, "noise"),
        (lambda: GradientPenalty(every=0), ValueError, "every"),
        (lambda: GradientPenalty(every=1.0), TypeError, "every"),
    ],
)
def test_bad_constraints_are_named(make, error, name):
    with pytest.raises(error, match=f"^{name}:"):
        make()
