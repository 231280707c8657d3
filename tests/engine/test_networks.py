"""Networks and optimizers as people have them: each against a loop written out in float64."""

import copy
import warnings

import pytest
import torch
from graphed_trainers import batches
from small_trainers import assert_same_state, quietly, weights
from torch import nn

from fastwgan import Adam, GradientPenalty, RMSprop, Trainer, WeightClip, models, reference

F32, F64 = torch.float32, torch.float64
CONSTRAINTS = {"clip": WeightClip(0.05), "penalty": GradientPenalty()}
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")  # the compiler's own


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    return request.param


def textbook_loss(critic, real, fake, constraint, offset=0, cond=(), pack=1):
    """Three forward passes, op by op; PacGAN's penalty is of packs, each with one eps."""
    real_score, fake_score = critic(real, *cond).mean(), critic(fake, *cond).mean()
    loss = fake_score - real_score
    if constraint == "penalty":
        eps = reference.uniform(0, offset, len(real) // pack, real.device).to(real.dtype).repeat_interleave(pack)
        eps = eps.view(-1, *[1] * (real.dim() - 1))
        x = (eps * real + (1 - eps) * fake).requires_grad_()
        scores = critic(x, *cond)
        (g,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)
        loss = loss + 10 * ((g.reshape(len(real) // pack, -1).norm(2, 1) - 1) ** 2).mean()
    return loss


def copied(module):
    """A copy; a weight that a hook computes, which cannot be copied, is computed anew at the next call."""
    for m in module.modules():
        if "weight_g" in m._parameters:
            m.__dict__.pop("weight", None)
    return copy.deepcopy(module)


def assert_textbooks(
    generator, critic, shape, constraint, backend, device, *, cond=(), pack=1, steps=2, batch=8, optimizer=None
):  # fmt: skip
    """Critic and generator steps, turn by turn, against the loop; weights, buffers and metrics."""
    generator, critic = generator.to(device, F64), critic.to(device, F64)
    twin, critic2 = copied(generator), copied(critic)
    make = optimizer or (lambda p: torch.optim.RMSprop(p, lr=1e-3, eps=1e-4))
    kept = []
    trainer = quietly(
        Trainer, generator, critic, constraint=CONSTRAINTS[constraint], backend=backend, pack=pack,
        latent=lambda n, d: kept.append(torch.randn(n, 6, dtype=F64, device=d)) or kept[-1],
        critic_optimizer=make(critic.parameters()), generator_optimizer=make(generator.parameters()),
    )  # fmt: skip
    optimizers = make(critic2.parameters()), make(twin.parameters())
    for step in range(steps):
        real = torch.randn(batch, *shape, dtype=F64, device=device)
        metrics = trainer.critic_step(real, *cond)
        for o in optimizers:
            o.zero_grad()
        with torch.no_grad():
            fake = twin(kept[-1], *cond)
        loss = textbook_loss(critic2, real, fake, constraint, step * batch // pack, cond, pack)
        loss.backward()
        optimizers[0].step()
        if constraint == "clip":
            for p in critic2.parameters():
                p.data.clamp_(-0.05, 0.05)
        torch.testing.assert_close(metrics.critic_loss, loss.detach(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(weights(critic), weights(critic2), rtol=1e-8, atol=1e-10)

        metrics = trainer.generator_step(batch, *cond)
        optimizers[1].zero_grad()
        loss = -critic2(twin(kept[-1], *cond), *cond).mean()
        loss.backward()
        optimizers[1].step()
        torch.testing.assert_close(metrics.generator_loss, loss.detach(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(weights(generator), weights(twin), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(critic.state_dict(), critic2.state_dict(), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(generator.state_dict(), twin.state_dict(), rtol=1e-7, atol=1e-9)
    return trainer


def mlp_generator():
    return models.mlp([6, 12, 10])


TAILS = {
    "(N,)": lambda: nn.Sequential(nn.Linear(12, 1), nn.Flatten(0)),
    "(N, 1)": lambda: nn.Linear(12, 1),
    "(N, 1, H, W)": lambda: nn.Sequential(nn.Linear(12, 6), nn.Unflatten(1, (1, 2, 3))),
}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("tail", TAILS)
def test_shapes_of_scores(tail, constraint, backend, device):
    critic = nn.Sequential(nn.Linear(10, 12), nn.LeakyReLU(0.2), TAILS[tail]())
    assert_textbooks(mlp_generator(), critic, (10,), constraint, backend, device, steps=2)


# Packs


class Packed(nn.Module):
    """As PacGAN's and CTGAN's: the samples of a pack side by side are one input."""

    def __init__(self, pack, width=10):
        super().__init__()
        self.pack, self.width = pack, width
        self.net = nn.Sequential(nn.Linear(pack * width, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def forward(self, x):
        return self.net(x.reshape(-1, self.pack * self.width))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("pack", [2, 4])
def test_packs(pack, constraint, backend, device):
    trainer = assert_textbooks(mlp_generator(), Packed(pack), (10,), constraint, backend, device, pack=pack)
    assert trainer.state_dict()["eps_offset"] == (2 * 8 // pack if constraint == "penalty" else 0)


def test_packs_of_images(backend, device):
    """Side by side as channels; real samples in channels_last."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(36, 1))

        def forward(self, x):
            return self.net(x.reshape(-1, 4, *x.shape[2:]))

    class Generator(nn.Linear):
        def forward(self, z):
            return super().forward(z).view(-1, 2, 6, 6).contiguous(memory_format=torch.channels_last)

    assert_textbooks(Generator(6, 72), Critic(), (2, 6, 6), "penalty", backend, device, pack=2, steps=2)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_packs_in_step_share_a_forward(constraint, backend):
    """Where the user says so; no pack has samples of both kinds."""
    critic, calls = Packed(2), []
    critic.register_forward_hook(lambda m, i, o: calls.append(len(o)))
    trainer = Trainer(
        mlp_generator(), critic, latent=6, constraint=CONSTRAINTS[constraint], pack=2, backend=backend,
        independent_samples=True,
    )  # fmt: skip
    trainer.critic_step(torch.randn(8, 10))
    assert calls == [8] + [4] * (constraint == "penalty")


def test_packs_in_graphs(graphed):
    """Steps and whole iterations: each draws its eps where the one before has left off."""
    runs = []
    for cuda_graph, whole in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        trainer = Trainer(
            nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10)).to(graphed), Packed(2).to(graphed), latent=6, pack=2,
            constraint=GradientPenalty(), n_critic=2, backend="triton", cuda_graph=cuda_graph,
        )  # fmt: skip
        data = batches(graphed, (10,), 12)
        metrics = []
        for i in range(0, 12, 2):
            pair = data[i : i + 2]
            metrics += trainer.iteration(pair) if whole else [trainer.step(real) for real in pair]
        assert trainer.state_dict()["eps_offset"] == 12 * 4
        runs.append((trainer, [m.penalty.item() for m in metrics]))
    for trainer, penalties in runs[1:]:
        assert penalties == pytest.approx(runs[0][1], rel=1e-4)
        torch.testing.assert_close(weights(trainer.critic), weights(runs[0][0].critic), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_packs_and_another_dtype_compiled(constraint, dtype):
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(
            Deep().to(dtype), Packed(2), latent=6, pack=2, constraint=CONSTRAINTS[constraint], n_critic=1,
            backend="torch", compile=compiled,
        )  # fmt: skip
        metrics = trainer.step(torch.randn(8, 10, generator=torch.Generator().manual_seed(1)))
        parameters = [*trainer.critic.parameters(), *trainer.generator.parameters()]
        runs.append((metrics.as_dict(), [p.grad.float() for p in parameters]))
    (expected, gradients), (actual, found) = runs
    assert actual == pytest.approx(expected, rel=1e-3, abs=1e-5)
    for a, e in zip(found, gradients, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-2 if dtype != F32 else 1e-4, atol=1e-5)


def test_batches_that_are_no_whole_packs_are_refused():
    trainer = Trainer(mlp_generator(), Packed(4), latent=6, pack=4)
    real, before = torch.randn(10, 10), trainer.state_dict()
    for step in (trainer.critic_step, trainer.step, lambda real: trainer.iteration([real] * 5)):
        with pytest.raises(ValueError, match="^real: expected a multiple of pack=4 samples, got 10"):
            step(real)
    with pytest.raises(ValueError, match="^batch_size: expected a multiple of pack=4, got 6"):
        trainer.generator_step(6)
    assert_same_state(trainer.state_dict(), before)
    with pytest.raises(ValueError, match=r"^critic: its output: expected shape \[4, ...\] for 8 samples in packs of 2"):
        Trainer(mlp_generator(), Packed(4), latent=6, pack=2, constraint=GradientPenalty()).generator_step(8)
    for bad, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="^pack:"):
            Trainer(mlp_generator(), Packed(4), latent=6, pack=bad)


# Weights that are shared, computed, frozen or unused


class Tied(nn.Module):
    def __init__(self, width=10):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.last = nn.Linear(width, 1)

    def forward(self, x):
        return self.last(self.second(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_tied_weights(constraint, backend, device):
    critic = Tied()
    trainer = assert_textbooks(mlp_generator(), critic, (10,), constraint, backend, device)
    assert trainer.critic.second.weight is trainer.critic.first.weight


def old_style(norm):
    def make(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return norm(layer)

    return make


NORMS = {
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm by a hook": old_style(nn.utils.spectral_norm),
    "weight_norm by a hook": old_style(nn.utils.weight_norm),
}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("name", NORMS)
def test_normalised_weights(name, constraint, backend, device):
    """The raw weights are what is updated and clamped; buffers go on as by three forward passes."""
    norm = NORMS[name]
    critic = nn.Sequential(norm(nn.Linear(10, 12)), nn.LeakyReLU(0.2), norm(nn.Linear(12, 1)))
    trainer = assert_textbooks(Deep(), critic, (10,), constraint, backend, device)
    if constraint == "clip":
        assert all(p.abs().max() <= 0.05 for p in trainer.critic.parameters())


class Deep(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10))


@pytest.mark.parametrize("name", ["weight_norm", "weight_norm by a hook", "spectral_norm"])
def test_normalised_generators(name, backend, device):
    norm = NORMS[name]
    generator = nn.Sequential(norm(nn.Linear(6, 12)), nn.ReLU(), norm(nn.Linear(12, 10)))
    assert_textbooks(generator, models.mlp([10, 12, 1], slope=0.2), (10,), "penalty", backend, device)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_frozen_and_unused_parameters(constraint, backend, device):
    """Clamped, as all the critic's are, and otherwise left alone; layers that are skipped have no gradient."""

    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.used, self.unused = nn.Linear(10, 12), nn.Linear(12, 1), nn.Linear(3, 3)
            self.frozen.weight.requires_grad_(False)

        def forward(self, x):
            return self.used(self.frozen(x).tanh())

    generator = Deep()
    generator[0].weight.requires_grad_(False)
    critic = Partly()
    before = critic.unused.weight.detach().to(device, F64, copy=True), generator[0].weight.to(device, F64, copy=True)
    trainer = assert_textbooks(generator, critic, (10,), constraint, backend, device)
    if constraint == "penalty":
        assert torch.equal(trainer.critic.unused.weight, before[0])
    assert torch.equal(trainer.generator[0].weight, before[1])


# Samples of another dtype


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F64])
def test_a_generator_of_another_dtype(dtype, constraint, backend, device):
    """Its samples are cast to the real ones' for the critic, and its gradients come back through that."""
    torch.manual_seed(0)
    generator, critic = Deep().to(device, dtype), models.mlp([10, 12, 1], slope=0.2).to(device)
    twin, critic2 = copy.deepcopy((generator, critic))
    z = torch.randn(8, 6, device=device, dtype=dtype)
    trainer = Trainer(
        generator, critic, latent=lambda n, d: z, constraint=CONSTRAINTS[constraint], backend=backend,
        critic_optimizer=torch.optim.SGD(critic.parameters(), lr=0.1),
        generator_optimizer=torch.optim.SGD(generator.parameters(), lr=0.1),
    )  # fmt: skip
    real = torch.randn(8, 10, device=device)
    metrics = trainer.critic_step(real)
    loss = textbook_loss(critic2, real, twin(z).float().detach(), constraint)
    loss.backward()
    torch.testing.assert_close(metrics.critic_loss, loss.detach(), rtol=1e-5, atol=1e-5)
    for p, q in zip(critic.parameters(), critic2.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    critic2.load_state_dict(critic.state_dict())
    trainer.generator_step(8)
    (-critic2(twin(z).float()).mean()).backward()
    for p, q in zip(generator.parameters(), twin.parameters(), strict=True):
        assert p.grad.dtype == dtype
        torch.testing.assert_close(p.grad, q.grad, rtol=2e-2, atol=1e-4)
    assert trainer.sample(2).dtype == dtype


def test_a_generator_step_may_be_the_first_whatever_the_dtype(backend):
    """Before any real sample has been seen."""
    trainer = Trainer(Deep().bfloat16(), models.mlp([10, 12, 1]), latent=6, backend=backend)
    assert trainer.generator_step(8).generator_loss.isfinite()


def test_real_samples_that_do_not_fit_are_named():
    trainer = Trainer(Deep(), models.mlp([10, 12, 1]), latent=6)
    with pytest.raises(TypeError, match="^generator: its output: expected real's dtype"):
        trainer.critic_step(torch.randn(8, 10, dtype=F64))


# Conditions


class Labelled(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.embed, self.net = nn.Embedding(5, 4), models.mlp([inputs + 4, 12, outputs])

    def forward(self, x, labels):
        return self.net(torch.cat((x, self.embed(labels)), 1))


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_labels(constraint, backend, device):
    labels = torch.arange(8, device=device) % 5
    assert_textbooks(Labelled(6, 10), Labelled(10, 1), (10,), constraint, backend, device, cond=(labels,))


class PairCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, 1, 1))

    def forward(self, x, source):
        return self.net(torch.cat((x, source), 1))


class PairGenerator(nn.Module):
    """pix2pix: an image from an image and noise."""

    def __init__(self):
        super().__init__()
        self.noise, self.net = nn.Linear(6, 36), nn.Conv2d(3, 1, 3, 1, 1)

    def forward(self, z, source):
        return self.net(torch.cat((self.noise(z).view(-1, 1, 6, 6), source), 1)).tanh()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_pairs_of_images(constraint, backend, device):
    source = torch.randn(8, 2, 6, 6, dtype=F64, device=device)
    trainer = assert_textbooks(PairGenerator(), PairCritic(), (1, 6, 6), constraint, backend, device, cond=(source,))
    trainer.latent = lambda n, d: torch.randn(n, 6, dtype=F64, device=d)
    assert trainer.sample(3, source[:3]).shape == (3, 1, 6, 6)


def test_latents_that_are_the_source_images(backend, device):
    """Or the latent is the image: a callable hands out the batch's."""

    class Translate(nn.Conv2d):
        def forward(self, image, source):
            return super().forward(image)

    generator, critic = Translate(2, 1, 3, 1, 1).to(device), PairCritic().to(device)
    batch = torch.randn(8, 2, 6, 6, device=device)
    trainer = Trainer(
        generator, critic, latent=lambda n, d: batch[:n], constraint=GradientPenalty(), n_critic=1, backend=backend
    )
    critic2, fake = copy.deepcopy(critic), generator(batch, batch).detach()
    real = torch.randn(8, 1, 6, 6, device=device)
    metrics = trainer.step(real, batch)
    loss = textbook_loss(critic2, real, fake, "penalty", cond=(batch,))
    torch.testing.assert_close(metrics.critic_loss, loss.detach(), rtol=1e-5, atol=1e-5)
    assert trainer.sample(2, batch[:2]).shape == (2, 1, 6, 6)


# Optimizers and schedules


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adam, torch.optim.SGD, RMSprop, Adam])
def test_groups_with_their_own_learning_rates(kind, backend, device):
    def make(parameters):
        parameters = list(parameters)
        return kind([{"params": parameters[:2], "lr": 1e-2}, {"params": parameters[2:], "lr": 1e-4}])

    assert_textbooks(Deep(), models.mlp([10, 12, 1]), (10,), "clip", backend, device, optimizer=make, steps=2)


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)


SCHEDULES = {
    "StepLR": halving,
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 20, cycle_momentum=False),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 0.9**i),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o, 0.1, 3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: torch.optim.lr_scheduler.ChainedScheduler([halving(o)]),
}


def scheduled(schedule, kind):
    torch.manual_seed(0)
    generator, critic = Deep(), models.mlp([10, 12, 1])
    optimizers = [kind(m.parameters(), lr=0.01) for m in (critic, generator)]
    return quietly(
        Trainer, generator, critic, latent=6, n_critic=2, backend="torch",
        critic_optimizer=optimizers[0], critic_scheduler=SCHEDULES[schedule](optimizers[0]),
        generator_optimizer=optimizers[1], generator_scheduler=SCHEDULES[schedule](optimizers[1]),
    )  # fmt: skip


def rates(trainer):
    return [o.param_groups[0]["lr"] for o in (trainer.critic_optimizer, trainer.generator_optimizer)]


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, Adam, torch.optim.SGD])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_follow_their_own_networks_steps_and_are_resumed(schedule, kind, tmp_path):
    alone = kind([nn.Parameter(torch.ones(()))], lr=0.01)
    scheduler, expected = quietly(SCHEDULES[schedule], alone), []
    for _ in range(9):
        expected.append(alone.param_groups[0]["lr"])
        alone.step()
        quietly(scheduler.step)
    with warnings.catch_warnings():
        if schedule == "SequentialLR":
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step")  # its own making
        whole, first, second = (scheduled(schedule, kind) for _ in range(3))
        data = torch.randn(8, 8, 10)
        for i, real in enumerate(data):
            assert rates(whole) == [expected[i], expected[i // 2]]
            whole.step(real)
        for real in data[:3]:
            first.step(real)
        first.save(tmp_path / "state.pt")
        second.load(tmp_path / "state.pt")
        for real in data[3:]:
            second.step(real)
    assert rates(second) == rates(whole) == [expected[8], expected[4]]
    assert_same_state(second.state_dict(), whole.state_dict())


def test_schedulers_that_cannot_be_used_are_refused():
    generator, critic = Deep(), models.mlp([10, 12, 1])
    optimizer, other = (torch.optim.RMSprop(critic.parameters()) for _ in range(2))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    for scheduler, error in ((plateau, TypeError), ("cosine", TypeError), (halving(other), ValueError)):
        with pytest.raises(error, match="^critic_scheduler: expected a"):
            Trainer(generator, critic, latent=6, critic_optimizer=optimizer, critic_scheduler=scheduler)
    with pytest.raises(ValueError, match="^critic_scheduler: expected a scheduler of critic_optimizer"):
        Trainer(generator, critic, latent=6, critic_scheduler=halving(optimizer))
    with pytest.raises(ValueError, match="^generator_scheduler: expected a scheduler of generator_optimizer"):
        Trainer(
            generator, critic, latent=6, critic_optimizer=optimizer, generator_scheduler=halving(optimizer),
            generator_optimizer=torch.optim.Adam(generator.parameters()),
        )  # fmt: skip


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adam])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_loading_into_the_callers_optimizer_afterwards_takes_effect(constraint, kind, backend, device):
    """Learning rate, moments and step counts; schedulers and hooks keep their hold; the constraint is the trainer's."""

    def start(lr, kept):
        torch.manual_seed(0)
        generator, critic = Deep().to(device, F64), models.mlp([10, 12, 1]).to(device, F64)
        optimizer = kind(critic.parameters(), lr=lr)
        z = torch.ones(8, 6, dtype=F64, device=device)
        trainer = quietly(
            Trainer, generator, critic, latent=lambda n, d: z, constraint=kept, critic_optimizer=optimizer,
            backend=backend,
        )  # fmt: skip
        return trainer, optimizer

    real = torch.randn(8, 10, dtype=F64, device=device)
    first, optimizer = start(0.003, CONSTRAINTS[constraint])
    for _ in range(3):
        first.critic_step(real)
    saved = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(first.critic.state_dict())
    first.critic_step(real)

    other = WeightClip(0.02) if constraint == "clip" else CONSTRAINTS[constraint]
    second, optimizer = start(0.5, other)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    second.critic.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[0])
    assert second.critic_optimizer.param_groups[0]["lr"] == 0.003
    second._steps.latents.used = 24 if constraint == "penalty" else 0
    second.critic_step(real)
    if constraint == "clip":
        assert weights(second.critic).abs().max() <= 0.02
        expected = weights(first.critic).clamp(-0.02, 0.02)
    else:
        expected = weights(first.critic)
    torch.testing.assert_close(weights(second.critic), expected, rtol=1e-10, atol=1e-12)
    quietly(scheduler.step)
    assert second.critic_optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.003
    state = optimizer.state_dict()["state"]
    assert state[0]["step"] == 4  # what the trainer does can be saved by the caller


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adam])
def test_a_taken_over_optimizer_saves_and_loads_as_torchs(kind, backend):
    """The caller's own checkpoints go on to work, in a loop without a trainer too."""
    generator, critic = Deep(), models.mlp([10, 12, 1])
    optimizer = kind(critic.parameters(), lr=0.01)
    trainer = quietly(Trainer, generator, critic, latent=6, critic_optimizer=optimizer, backend=backend)
    trainer.critic_step(torch.randn(8, 10))
    twin = copy.deepcopy(critic)
    plain = kind(twin.parameters(), lr=1.0)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert plain.param_groups[0]["lr"] == 0.01
    for p, q in zip(critic.parameters(), twin.parameters(), strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(p)
    plain.step()
    trainer.critic_optimizer.step()
    torch.testing.assert_close(weights(critic), weights(twin), rtol=1e-5, atol=1e-6)
