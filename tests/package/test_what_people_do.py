"""Things that people do with a WGAN, each against the plain loop's numbers in float64."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from plain_loop import F64, Latents, N, Running, assert_as_plain, own_layers, pair, plain_step
from small_trainers import assert_same_state, quietly, weights
from torch import nn

import fastwgan
from fastwgan import GradientPenalty, NormClip, Trainer, WeightClip, functional, models, reference

# Layers that mix samples, or count, or remember


class BatchStatistic(nn.Module):
    """A minibatch standard deviation beside a body whose last layer starts at zero; alpha fades it in."""

    def __init__(self):
        super().__init__()
        self.body, self.last, self.alpha = nn.Sequential(nn.Linear(2, 6), nn.Tanh()), nn.Linear(7, 1), 1.0
        nn.init.zeros_(self.last.weight)

    def forward(self, x):
        h = self.body(x)
        return self.last(torch.cat((h, self.alpha * h.std(0).mean().expand(len(h), 1)), 1))


class Scaled(nn.Module):
    def forward(self, x):
        return (x - x.min()) / (x.max() - x.min())


class Counted(nn.Module):
    """Reads how many passes there have been."""

    count = 0

    def forward(self, x):
        self.count += 1
        return x * (1 + self.count % 3)


class SpectralNorm(nn.Module):
    """As much copied code has it: u and v are parameters, written by .data."""

    def __init__(self, layer):
        super().__init__()
        self.layer, w = layer, layer.weight
        del layer._parameters["weight"]
        layer.weight_u = nn.Parameter(F.normalize(torch.randn(len(w)), dim=0), requires_grad=False)
        layer.weight_v = nn.Parameter(F.normalize(torch.randn(w[0].numel()), dim=0), requires_grad=False)
        layer.weight_bar = nn.Parameter(w.data)

    def forward(self, x):
        m = self.layer
        m.weight_v.data = F.normalize(torch.mv(m.weight_bar.data.t(), m.weight_u.data), dim=0)
        m.weight_u.data = F.normalize(torch.mv(m.weight_bar.data, m.weight_v.data), dim=0)
        m.weight = m.weight_bar / m.weight_u.dot(m.weight_bar.mv(m.weight_v))
        return m(x)


class StochasticDepth(nn.Linear):
    """Its layer is dropped for the whole batch, or not."""

    def forward(self, x):
        return x + super().forward(x) * (torch.rand(()) < 0.5)


CRITICS = {
    "minibatch statistic": BatchStatistic,
    "batch scaled by its extremes": lambda: nn.Sequential(Scaled(), own_layers()),
    "buffers rebound in forward": lambda: own_layers(Running()),
    "passes counted": lambda: own_layers(Counted()),
    "spectral norm by data": lambda: nn.Sequential(SpectralNorm(nn.Linear(2, 8)), nn.Tanh(), nn.Linear(8, 1)),
}


@pytest.mark.parametrize("constraint", [GradientPenalty(), WeightClip(0.3)], ids=["penalty", "clip"])
@pytest.mark.parametrize("name", CRITICS)
def test_critics_of_which_nothing_is_known(name, constraint):
    assert_as_plain(CRITICS[name](), constraint=constraint)


def test_data_of_a_wide_range_through_a_critic_that_scales_its_batch():
    """A fake sample's score depends on the real ones where they share a pass."""
    assert_as_plain(CRITICS["batch scaled by its extremes"](), real=255 * torch.rand(N, 2, dtype=F64) - 127)


def test_stochastic_depth_draws_once_for_each_pass():
    """Each pass draws from a seed of its input, as the trainer's passes and the plain loop's are not taken in turn."""

    def change(critic, i):
        if i == 0:
            critic[1].register_forward_pre_hook(
                lambda m, args: None if torch.manual_seed(int(args[0].sum() * 1e6)) else 0
            )

    assert_as_plain(own_layers(StochasticDepth(4, 4)), change=change)


def test_a_statistic_that_is_faded_in():
    def change(critic, i):
        critic.alpha = float(i >= 2)

    assert_as_plain(BatchStatistic(), change=change, steps=5)


def test_a_hook_that_comes_later():
    def change(critic, i):
        if i == 2:
            critic[1].register_forward_hook(lambda m, args, output: output - output.mean(0))

    assert_as_plain(own_layers(), change=change)


def test_a_layer_that_is_replaced_later():
    def change(critic, i):
        if i == 2:
            critic[1] = Scaled()

    assert_as_plain(own_layers(), change=change)


class Adjacent(nn.Module):
    """A critic of graphs that all have one adjacency matrix [V, V]."""

    def __init__(self):
        super().__init__()
        self.node, self.graph = nn.Linear(2, 4), nn.Linear(4, 1)

    def forward(self, x, adjacency):
        return self.graph(F.leaky_relu(adjacency @ self.node(x)[:, None].expand(-1, N, -1), 0.2).sum(1))


def test_a_condition_that_all_samples_share(monkeypatch):
    """Its length happens to be the batch's."""
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x, *_: F.linear(x, self.weight, self.bias))
    assert_as_plain(Adjacent(), cond=((torch.rand(N, N) > 0.5).double(),))


# Gradients


def clamp_gradients(critic, i):
    for p in critic.parameters() if i == 0 else ():
        p.register_hook(lambda g: g.clamp(-0.05, 0.05))


@pytest.mark.parametrize("constraint", [GradientPenalty(), WeightClip(0.3)], ids=["penalty", "clip"])
@pytest.mark.parametrize("kind", ["known", "own"])
def test_a_hook_on_a_parameter_runs_once_on_the_whole_gradient(kind, constraint):
    critic, calls = CRITICS["minibatch statistic"]() if kind == "own" else own_layers(), []
    trainer = assert_as_plain(critic, constraint=constraint, change=clamp_gradients)
    next(trainer.critic.parameters()).register_hook(calls.append)
    next(trainer.critic.parameters()).register_post_accumulate_grad_hook(calls.append)
    trainer.critic_step(torch.randn(N, 2, dtype=F64))
    assert len(calls) == 2


def test_hooks_on_parameters_of_compiled_passes(traced_only):
    assert_as_plain(own_layers(), compile=True, change=clamp_gradients)


class Summed(nn.Module):
    """A weight made of two parameters, whose gradients share memory."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))
        self.out = nn.Linear(4, 1)

    def forward(self, x):
        return self.out(torch.tanh(x @ (self.a.view(-1) + self.b.view(-1)).view(4, 2).t()))


def test_gradients_that_share_memory():
    assert_as_plain(Summed())


@pytest.mark.parametrize(("optimizer", "options"), [(fastwgan.RMSprop, {"backend": "torch"}), (torch.optim.SGD, {})])
def test_gradients_that_share_memory_are_unscaled_once(optimizer, options):
    """With float16's loss scale, on which the gradients must not depend."""
    runs = []
    for amp in (None, torch.float16):
        torch.manual_seed(0)
        generator, critic = nn.Linear(3, 2), Summed()
        trainer = Trainer(
            generator, critic, latent=3, amp=amp, constraint=GradientPenalty(), backend="torch",
            critic_optimizer=optimizer(critic.parameters(), lr=0.01, **options), nonfinite="skip",
        )  # fmt: skip
        if amp:
            trainer._steps.critic.guard._scale[0] = 64.0
        trainer.critic_step(torch.randn(N, 2, generator=torch.Generator().manual_seed(1)))
        runs.append(critic.a.grad)
    torch.testing.assert_close(*runs, rtol=0.02, atol=0.02)


# Attention


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.score = nn.Linear(1, 8), nn.Linear(8, 24), nn.Linear(8, 1)

    def forward(self, x):
        h = self.qkv(self.embed(x[..., None]))
        q, k, v = (t.reshape(*t.shape[:2], 2, 4).transpose(1, 2) for t in h.chunk(3, -1))
        return self.score(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


def transformer():
    layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (1, 2)), layer, nn.Flatten(), nn.Linear(2, 1))


ATTENTIVE = {"function": Attention, "layer": transformer}


@pytest.mark.parametrize("name", ATTENTIVE)
def test_attention_under_a_penalty(name):
    assert_as_plain(ATTENTIVE[name]())


def test_attention_under_a_penalty_compiled(traced_only):
    assert_as_plain(Attention(), compile=True)


def test_attention_under_a_penalty_verified():
    generator, critic = nn.Linear(3, 4), Attention()
    report = fastwgan.verify(generator, critic, torch.randn(N, 4), constraint=GradientPenalty(), latent=3)
    assert report.passed, report


# Numbers that forward passes read from Python


class Fading(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.alpha = nn.Linear(3, 2), 0.0

    def forward(self, z):
        return self.layer(z) * 0 + self.alpha


@pytest.mark.parametrize("compiled", [False, True])
def test_an_alpha_of_the_generators_takes_effect_in_its_step(compiled, traced_only):
    generator, critic = Fading(), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    trainer = Trainer(generator, critic, latent=3, constraint=GradientPenalty(), n_critic=3, compile=compiled)
    for i in range(6):
        generator.alpha = float(i)
        expected = critic(torch.full((1, 2), float(i))).item()
        metrics = trainer.step(torch.randn(N, 2))
        assert metrics.fake_score.item() == pytest.approx(expected, abs=1e-6)


def test_compiled_passes_that_read_too_many_numbers_say_what_to_do(traced_only):
    generator = Fading()
    trainer = Trainer(generator, nn.Linear(2, 1), latent=3, compile=True)

    def steps():
        for i in range(20):
            generator.alpha = float(i)
            trainer.step(torch.randn(N, 2))

    with pytest.raises(RuntimeError, match="^compile: expected forward passes that read few Python numbers"):
        steps()


def test_a_resolution_that_changes_in_the_middle_of_an_iteration():
    class Growing(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.layers, self.depth = nn.ModuleList(layers), 0

        def forward(self, x):
            return self.layers[self.depth](x)

    generator = Growing(*(nn.Sequential(nn.Linear(3, n * n), nn.Unflatten(1, (1, n, n))) for n in (4, 8)))
    critic = Growing(*(nn.Sequential(nn.Flatten(), nn.Linear(n * n, 1)) for n in (4, 8)))
    trainer = Trainer(generator, critic, latent=3, constraint=GradientPenalty(), ema=0.9)
    for _ in range(7):
        trainer.step(torch.randn(N, 1, 4, 4))
    generator.depth = critic.depth = 1
    before = weights(critic.layers[1])
    for _ in range(4):
        trainer.step(torch.randn(N, 1, 8, 8))
    assert not torch.equal(weights(critic.layers[1]), before)
    assert (trainer.critic_iterations, trainer.generator_iterations) == (11, 2)


# Optimizers, exclusions and memory


@pytest.mark.parametrize("given", ["fastwgan's", "trainer's", "torch's"])
def test_an_optimizer_of_another_trainer_obeys_the_new_constraint_alone(given):
    generator, critic = pair()
    optimizer = (torch.optim.RMSprop if given == "torch's" else fastwgan.RMSprop)(critic.parameters(), lr=0.01)
    options = {"latent": Latents(), "critic_optimizer": optimizer}
    first = Trainer(generator, critic, constraint=WeightClip(0.05), **options)
    first.step(torch.randn(N, 2, dtype=F64))
    assert weights(critic).abs().max() <= 0.05
    options["critic_optimizer"] = first.critic_optimizer if given == "trainer's" else optimizer
    second = Trainer(generator, critic, constraint=GradientPenalty(), **options)
    for _ in range(20):
        second.step(torch.randn(N, 2, dtype=F64))
    assert weights(critic).abs().max() > 0.06
    third = Trainer(generator, critic, constraint=WeightClip(0.02), **options)
    third.step(torch.randn(N, 2, dtype=F64))
    assert weights(critic).abs().max() <= 0.02
    second.step(torch.randn(N, 2, dtype=F64))
    assert weights(critic).abs().max() > 0.02


@pytest.mark.parametrize("exclude", ["first.*", "last.*"])
def test_a_tied_weight_is_excluded_by_each_of_its_names(exclude):
    critic = nn.Module()
    critic.first, critic.last = nn.Linear(2, 2), nn.Linear(2, 2)
    critic.last.weight = critic.first.weight
    for constraint in (WeightClip(0.01, exclude=exclude), NormClip(exclude=exclude)):
        assert all(p is not critic.first.weight for p in set(critic.parameters()) - constraint.excluded(critic))


class Overlapping(nn.Module):
    """Two parameters over one storage."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.full((2, 1), 0.1, dtype=F64))
        self.b = nn.Parameter(self.a.detach())

    def forward(self, x):
        return x @ self.a + 0.5 * (x @ self.b)


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adam])
@pytest.mark.emulated
def test_two_parameters_over_one_storage_are_clamped_after_both_updates_or_refused(kind):
    def critic_step(backend):
        critic = Overlapping()
        optimizer = kind(critic.parameters(), lr=0.15)
        trainer = quietly(
            Trainer, nn.Linear(3, 2).double(), critic, latent=Latents(), constraint=WeightClip(0.1), backend=backend,
            critic_optimizer=optimizer,
        )  # fmt: skip
        twin = Overlapping()
        plain = kind(twin.parameters(), lr=0.15)
        real = torch.randn(N, 2, dtype=F64)
        trainer.critic_step(real)
        plain_step(trainer.generator, twin, plain, real, trainer.latent.drawn[0], weight=0.0, clip=0.1)
        torch.testing.assert_close(critic.a, twin.a, rtol=1e-9, atol=1e-12)

    critic_step("torch")
    with pytest.raises(ValueError, match="^params: expected each in memory of its own, got number 1, of shape"):
        critic_step("triton")


@pytest.mark.parametrize("slope", [None, 0.0, 0.2])
def test_metrics_of_a_step_with_nan_in_its_batch_are_the_plain_loops(slope):
    activation = nn.ReLU() if slope is None else nn.LeakyReLU(slope)
    generator, critic = pair(nn.Sequential(nn.Linear(2, 4), activation, nn.Linear(4, 1)))
    real = torch.randn(N, 2, dtype=F64)
    real[0] = torch.nan
    twin, latents = copy.deepcopy(critic), Latents()
    trainer = Trainer(generator, critic, latent=latents, constraint=GradientPenalty(), nonfinite="skip")
    metrics = trainer.critic_step(real)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
    _, norm = plain_step(generator, twin, optimizer, real, latents.drawn[0])
    assert metrics.nonfinite > 0
    assert metrics.gradient_norm.item() == pytest.approx(norm, rel=1e-10, nan_ok=True)


@pytest.mark.emulated
@pytest.mark.parametrize("apart", [False, True])
def test_views_of_one_weight_that_overlap_are_refused(apart):
    """Columns of one matrix, which lie between each other, are not."""
    whole = torch.ones(3, 4)
    views = [nn.Parameter(x) for x in ((whole[:, :2], whole[:, 2:]) if apart else (whole[:, :3], whole[:, 1:]))]
    for p in views:
        p.grad = torch.ones_like(p)
    optimizer = fastwgan.RMSprop(views, lr=0.1, backend="triton")
    if not apart:
        with pytest.raises(ValueError, match="^params: expected each in memory of its own, got number 1"):
            optimizer.step()
        assert torch.equal(whole, torch.ones(3, 4))
        return
    optimizer.step()
    torch.testing.assert_close(whole, torch.zeros(3, 4), rtol=0, atol=1e-5)


@pytest.mark.emulated
def test_norms_of_a_weight_and_its_frozen_alias_are_refused_before_a_step():
    critic = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    critic[1].weight = nn.Parameter(critic[0].weight.data, requires_grad=False)
    before = weights(critic)
    with pytest.raises(ValueError, match="^params: expected each in memory of its own"):
        Trainer(nn.Linear(3, 2), critic, latent=3, constraint=NormClip(0.1), backend="triton")
    critic[1].weight = nn.Parameter(torch.ones(2, 2))
    trainer = Trainer(nn.Linear(3, 2), critic, latent=3, constraint=NormClip(0.1), backend="triton")
    critic[1].weight = nn.Parameter(critic[0].weight.data, requires_grad=False)
    with pytest.raises(ValueError, match="^params: expected each in memory of its own"):
        trainer.step(torch.randn(N, 2))
    assert torch.equal(weights(critic), before)


def test_an_assigned_optimizer_is_checked_and_taken_over():
    generator, critic = nn.Linear(3, 2), nn.Linear(2, 1)
    trainer = Trainer(generator, critic, latent=3)
    with pytest.raises(ValueError, match="^critic_optimizer: expected parameters of its own network"):
        trainer.critic_optimizer = torch.optim.RMSprop(generator.parameters())
    trainer.critic_optimizer = torch.optim.RMSprop(critic.parameters(), lr=0.5)
    trainer.step(torch.randn(N, 2))
    assert type(trainer.critic_optimizer) is fastwgan.RMSprop
    assert weights(critic).abs().max() <= 0.01


# Autocast, copies


def test_functional_ops_under_autocast_promote_as_pytorch_does():
    critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
    real, fake = torch.randn(2, 16, 2)
    half = fake.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        penalty = functional.gradient_penalty(critic, real, half, seed=3)
        eps = reference.uniform(3, 0, 16)[:, None]
        x = (eps * real + (1 - eps) * half).requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        assert penalty.item() == pytest.approx((10 * (g.norm(2, 1) - 1) ** 2).mean().item(), rel=1e-5)
        assert functional.interpolate(real, half, seed=3).dtype == torch.float32
        scores = critic(half)
        assert scores.dtype == torch.bfloat16
        loss = functional.critic_loss(real[:, :1], scores)
        assert loss.item() == pytest.approx((scores.float().mean() - real[:, 0].mean()).item(), abs=1e-6)
        labels = functional.wasserstein_loss(torch.ones(16, 1), scores)
        assert labels.item() == pytest.approx(scores.float().mean().item(), abs=1e-6)
        assert len(functional.hinge_critic_loss(real[:, :1], scores)) == 2
    with pytest.raises(TypeError, match="^real: expected fake's dtype torch.bfloat16, got torch.float32"):
        functional.gradient_penalty(critic, real, half)


def saved_whole(trainer):
    file = io.BytesIO()
    torch.save(trainer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda trainer: pickle.loads(pickle.dumps(trainer)),
    "saved whole": saved_whole,
}


class Clipping:
    """A step hook that clips gradients, as people have it."""

    def __init__(self):
        self.calls = 0

    def __call__(self, optimizer, *_):
        self.calls += 1
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)


@pytest.mark.parametrize("after", [0, 3, 5, 7])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_a_copied_trainer_goes_on_as_the_original(how, after, kind):
    """With its step hooks, schedulers, loss scale and averages, and without the original."""
    torch.manual_seed(0)
    networks = models.mlp([4, 8, 2]), models.mlp([2, 8, 1])
    optimizers = [getattr(torch.optim, kind)(m.parameters(), lr=0.01) for m in networks]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizers[1], 2, 0.5)
    hook = Clipping()
    optimizers[1].register_step_pre_hook(hook)
    trainer = Trainer(
        *networks, latent=4, constraint=GradientPenalty(), ema=0.9, n_critic=3, amp=torch.float16, nonfinite="skip",
        generator_optimizer=optimizers[0], critic_optimizer=optimizers[1], critic_scheduler=scheduler,
    )  # fmt: skip
    batches = torch.randn(after + 6, N, 2)
    for real in batches[:after]:
        trainer.step(real)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Seems like")  # PyTorch's scheduler, of optimizers that were copied
        copied = COPIES[how](trainer)
        first = [copied.step(real).as_dict() for real in batches[after:]]
    calls = hook.calls
    assert calls <= after, "the copy has its own hook"
    second = [trainer.step(real).as_dict() for real in batches[after:]]
    assert first == second
    assert hook.calls > calls
    assert_same_state(copied.state_dict(), trainer.state_dict())
    assert {id(p) for g in copied.critic_optimizer.param_groups for p in g["params"]} == set(
        map(id, copied.critic.parameters())
    )


def test_what_a_trainer_says_of_itself():
    known, own = (
        Trainer(models.mlp([4, 2]), critic, latent=4, constraint=GradientPenalty())
        for critic in (models.mlp([2, 4, 1]), BatchStatistic())
    )
    assert "a first critic step will tell" in repr(known)
    for trainer in (known, own):
        trainer.step(torch.randn(N, 2))
    assert "GradientPenalty(weight=10.0" in repr(known)
    assert "real and fake samples share a pass of the critic, as its layers keep samples apart;" in repr(known)
    assert "there is no second backward pass" in repr(known)
    assert "have a pass of the critic each, as BatchStatistic is not among the layers known" in repr(own)
    assert "independent_samples=True" in repr(own)


def halved(gradient):
    return gradient / 2


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_has_the_hooks_of_parameters_and_of_loads(how):
    generator, critic = nn.Linear(4, 2), models.mlp([2, 8, 1])
    own = torch.optim.Adam(critic.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(own, 1, 0.5)
    trainer = Trainer(
        generator, critic, latent=4, constraint=GradientPenalty(), critic_optimizer=own, critic_scheduler=scheduler
    )
    critic[1].weight.register_hook(halved)
    trainer.step(torch.randn(N, 2))
    copied, state = COPIES[how](trainer), copy.deepcopy(own.state_dict())
    for one in (trainer, copied):
        one.critic_scheduler.optimizer.load_state_dict(state)
        for real in torch.ones(2, N, 2):
            one.step(real)
    assert copied.critic_optimizer.param_groups[0]["lr"] == trainer.critic_optimizer.param_groups[0]["lr"] == 0.0125
    assert_same_state(copied.state_dict(), trainer.state_dict())


def test_what_a_trainer_says_after_its_critic_has_changed():
    critic = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    trainer = Trainer(nn.Linear(3, 2), critic, latent=3)
    trainer.step(torch.randn(N, 2))
    assert "as BatchNorm1d(4, " in repr(trainer)
    critic.eval()
    assert "as its layers mixed samples in the last step" in repr(trainer)
    trainer.step(torch.randn(N, 2))
    assert "share a pass" in repr(trainer)


# Further terms of the losses


def with_target(target, **options):
    torch.manual_seed(0)
    generator, critic = pair()
    return Trainer(
        generator, critic, latent=Latents(), constraint=GradientPenalty(), n_critic=2, ema=0.9,
        generator_term=lambda s: 100 * (s.fake - target).abs().mean(), **options,
    )  # fmt: skip


def test_a_further_term_of_the_generators_loss_goes_through_the_whole_trainer(tmp_path):
    """Its steps in ``fit``, averages, counts, metrics, checkpoints, and a plain loop's weights."""
    target, data = torch.randn(N, 2, dtype=F64), [*torch.randn(8, N, 2, dtype=F64)]
    rows, whole, half = [], with_target(target), with_target(target)
    whole.fit(data, 8, log_every=2, callbacks=[lambda trainer, values: rows.append(values)], out=tmp_path / "a")
    half.fit(data, 4, out=tmp_path / "b")
    resumed = with_target(target)
    resumed.latent.random.set_state(half.latent.random.get_state())
    resumed.load(tmp_path / "b" / "last.pt")
    for batch in data[4:]:
        metrics = resumed.step(batch)
    for name in ("generator", "critic", "ema", "generator_optimizer", "guards"):
        assert_same_state(resumed.state_dict()[name], whole.state_dict()[name])
    assert (whole.critic_iterations, whole.generator_iterations) == (8, 4)
    assert rows[-1]["generator_term"] == pytest.approx(metrics.generator_term.item(), rel=1e-12)
    assert rows[-1]["generator_loss"] == pytest.approx(metrics.generator_loss.item(), rel=1e-12)

    plain, latents = pair(), Latents()
    adams = [torch.optim.Adam(m.parameters(), lr=1e-4, betas=(0.0, 0.9)) for m in plain]
    averaged = torch.optim.swa_utils.AveragedModel(
        plain[0], multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    averaged.update_parameters(plain[0])
    for i, batch in enumerate(data):
        plain_step(*plain, adams[1], batch, latents(N, None), step=i)
        if i % 2:
            fake = plain[0](latents(N, None))
            loss = -plain[1](fake).mean() + 100 * (fake - target).abs().mean()
            adams[0].zero_grad()
            loss.backward()
            adams[0].step()
            averaged.update_parameters(plain[0])
    assert metrics.generator_loss.item() == pytest.approx(loss.item(), rel=1e-10)
    for ours, theirs in zip((whole.generator, whole.critic), plain, strict=True):
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-9, atol=1e-12)
    average = torch.cat([x.flatten() for x in whole.averages().values()])
    torch.testing.assert_close(average, weights(averaged.module), rtol=1e-9, atol=1e-12)


def test_a_step_whose_term_is_not_finite_is_left_out():
    target = torch.full((N, 2), torch.inf, dtype=F64)
    trainer = with_target(target, nonfinite="skip")
    before = weights(trainer.generator)
    for _ in range(2):
        metrics = trainer.step(torch.randn(N, 2, dtype=F64))
    assert metrics.generator_term == torch.inf
    target.zero_()
    metrics = trainer.generator_step(N)
    assert metrics.nonfinite == 0
    assert not torch.equal(weights(trainer.generator), before)


def test_a_copy_has_its_terms_of_its_own_networks():
    """A term is a function of the step's record, which is of the trainer that takes the step."""
    term = nn.Linear(2, 1).double()  # as a perceptual loss has a network of its own
    trainer = with_target(torch.zeros(N, 2), critic_term=lambda s: term(s.real).mean() * s.real_scores.mean())
    copied = copy.deepcopy(trainer)
    real = torch.randn(N, 2, dtype=F64)
    assert trainer.step(real).as_dict() == copied.step(real).as_dict()
    assert all(p.grad is None for p in term.parameters())
