"""Conditions that real and fake samples have each of their own, and further outputs of the networks."""

import copy

import pytest
import torch
from graphed_trainers import Recorded
from small_trainers import assert_same_state, quietly, weights
from torch import nn

from fastwgan import GradientPenalty, StepRecord, Trainer, WeightClip, functional, reference

F64 = torch.float64
N, WIDTH, SEED, STEPS = 8, 3, 5, 4
CONSTRAINTS = {
    "clip": WeightClip(0.1), "interpolates": GradientPenalty(),
    "one-sided": GradientPenalty(kind="one-sided", target=0.1),
    **{at: GradientPenalty(5.0, at=at) for at in ("real", "fake", "perturbed")},
}  # fmt: skip


class Conditional(nn.Module):
    """A network of its input and one condition, or some, as one row."""

    def __init__(self, *layers, pack=1):
        super().__init__()
        self.layers, self.pack = nn.Sequential(*layers), pack

    def forward(self, x, *cond):
        rows = torch.cat((x, *[c.flatten(1).to(x.dtype) for c in cond if isinstance(c, torch.Tensor)]), 1)
        return self.layers(rows.view(len(x) // self.pack, -1))


def networks(width=2, pack=1):
    torch.manual_seed(0)
    generator = Conditional(nn.Linear(4 + width, 8), nn.Tanh(), nn.Linear(8, WIDTH))
    critic = Conditional(nn.Linear(pack * (WIDTH + width), 8), nn.LeakyReLU(0.2), nn.Linear(8, 1), pack=pack)
    return generator.double(), critic.double()


def plain_penalty(critic, constraint, real, fake, cond, fake_cond, step, pack):
    """The penalty of samples with their conditions, where these differ and lie between two."""
    if constraint.at == "interpolates":
        eps = reference.uniform(SEED, step * N // pack, N // pack).double().repeat_interleave(pack)[:, None]
        x = [eps * a + (1 - eps) * b for a, b in zip((real, *cond), (fake, *fake_cond), strict=True)]
        x = [each.detach().requires_grad_() for each in x]
        inputs = x
    else:
        noise = reference.normals(SEED, step * N, N, WIDTH, stream=1, dtype=F64, device=real.device)
        points = {"real": real, "fake": fake, "perturbed": real + constraint.noise * noise}[constraint.at]
        x = [points.detach().requires_grad_()]
        inputs = [*x, *(fake_cond if constraint.at == "fake" else cond)]
    gradients = torch.autograd.grad(critic(*inputs).sum(), x, create_graph=True)
    norms = torch.cat(gradients, 1).view(N // pack, -1).norm(dim=1)
    excess = norms - constraint.target
    return constraint.weight * ((excess.relu() if constraint.kind == "one-sided" else excess) ** 2).mean()


def compare(constraint, pack=1, **options):
    """Train by a Trainer and by a plain loop, in which fake samples have conditions of their own."""
    generator, critic = networks(pack=pack)
    theirs = copy.deepcopy((generator, critic))
    zs = torch.randn(2 * STEPS, N, 4, dtype=F64)
    latents, plain = iter(zs), iter(zs)
    ours = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (generator, critic)]
    trainer = quietly(
        Trainer, generator, critic, latent=lambda n, device: next(latents), constraint=constraint, n_critic=1,
        pack=pack, seed=SEED, generator_optimizer=ours[0], critic_optimizer=ours[1], **options,
    )  # fmt: skip
    of_generator, of_critic = (torch.optim.SGD(m.parameters(), lr=0.05) for m in theirs)
    generator_, critic_ = theirs
    for step in range(STEPS):
        real, cond, fake_cond = torch.randn(N, WIDTH, dtype=F64), *torch.randn(2, N, 2, dtype=F64)
        metrics = trainer.step(real, cond, fake_cond=(fake_cond,))
        fake = generator_(next(plain), fake_cond).detach()
        loss = critic_(fake, fake_cond).mean() - critic_(real, cond).mean()
        if isinstance(constraint, GradientPenalty):
            loss = loss + plain_penalty(critic_, constraint, real, fake, (cond,), (fake_cond,), step, pack)
        of_critic.zero_grad()
        loss.backward()
        of_critic.step()
        if isinstance(constraint, WeightClip):
            for p in critic_.parameters():
                p.data.clamp_(-constraint.bound, constraint.bound)
        generator_loss = -critic_(generator_(next(plain), fake_cond), fake_cond).mean()
        of_generator.zero_grad()
        generator_loss.backward()
        of_generator.step()
        torch.testing.assert_close(metrics.critic_loss, loss.detach(), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(metrics.generator_loss, generator_loss.detach(), rtol=1e-9, atol=1e-11)
        for a, b in ((generator, generator_), (critic, critic_)):
            torch.testing.assert_close(weights(a), weights(b), rtol=1e-9, atol=1e-11)
    return trainer


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", ["clip", "interpolates", "one-sided", "fake"])
def test_fake_packs_have_their_own_conditions(name, backend):
    compare(CONSTRAINTS[name], 2, backend=backend)


def made(constraint=CONSTRAINTS["interpolates"], width=2, **options):
    generator, critic = networks(width)
    return quietly(Trainer, generator, critic, latent=4, constraint=constraint, seed=SEED, **options)


@pytest.mark.parametrize("name", ["interpolates", "fake"])
def test_the_same_conditions_for_both_change_nothing(name):
    one, other = made(CONSTRAINTS[name]), made(CONSTRAINTS[name])
    for i in range(6):
        real, cond = torch.randn(N, WIDTH, dtype=F64), torch.randn(N, 2, dtype=F64)
        given = {"fake_cond": [cond, 3 if i % 2 else "a"]}
        a, b = one.step(real, cond, given["fake_cond"][1], **given), other.step(real, cond, given["fake_cond"][1])
        assert a.as_dict() == b.as_dict()
    assert_same_state(one.state_dict(), other.state_dict())


def labels():
    return [torch.randint(3, (N, 2)) for _ in range(2)]


@pytest.mark.parametrize("name", ["clip", "real", "fake", "perturbed"])
def test_labels_may_differ_where_nothing_lies_between_them(name):
    trainer, (cond, fake_cond) = made(CONSTRAINTS[name]), labels()
    trainer.step(torch.randn(N, WIDTH, dtype=F64), cond, fake_cond=(fake_cond,))
    assert trainer.critic_iterations == 1


def test_labels_as_floats_may_differ_under_any_penalty():
    trainer, (cond, fake_cond) = made(), [x.float() for x in labels()]
    trainer.step(torch.randn(N, WIDTH, dtype=F64), cond, fake_cond=(fake_cond,))
    assert trainer.critic_iterations == 1


REFUSED = {
    "labels": (labels, "conditions between which .* got torch.int64 .8, 2. and torch.int64 .8, 2.: give labels"),
    "not of each sample": (lambda: [torch.randn(1, 2), torch.randn(1, 2)], "got torch.float32 .1, 2. and"),
    "of other shapes": (lambda: [torch.randn(N, 2), torch.randn(N, 2, 1)], "one shape .* got torch.float32 .8, 2. and"),
    "a constant": (lambda: [torch.randn(N, 2), 3.0], "got torch.float32 .8, 2. and float"),
    "other constants": (lambda: ["a", "b"], "got str and str"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_nothing_between_is_refused_before_anything_is_changed(name):
    """The latents' place and BatchNorm's averages included."""
    generator, critic = networks()
    generator.layers.insert(1, nn.BatchNorm1d(8).double())
    trainer = quietly(Trainer, generator, critic, latent=4, constraint=GradientPenalty())
    make, message = REFUSED[name]
    real, (cond, fake_cond) = torch.randn(N, WIDTH, dtype=F64), make()
    before = trainer.state_dict()
    with pytest.raises(ValueError, match=f"^fake_cond: .*{message}"):
        trainer.step(real, cond, fake_cond=(fake_cond,))
    assert_same_state(trainer.state_dict(), before)


@pytest.mark.parametrize(
    ("fake_cond", "error", "message"),
    [
        (torch.zeros(N, 2), TypeError, "fake_cond: expected a tuple of conditions, got Tensor"),
        ((), ValueError, "fake_cond: expected 1 conditions, as real samples have, got 0"),
        ((1, 2), ValueError, "fake_cond: expected 1 conditions, as real samples have, got 2"),
    ],
)
def test_bad_conditions(fake_cond, error, message):
    trainer = made(CONSTRAINTS["clip"])
    real, cond = torch.randn(N, WIDTH, dtype=F64), torch.randn(N, 2, dtype=F64)
    for call in (trainer.step, trainer.critic_step):
        with pytest.raises(error, match=message):
            call(real, cond, fake_cond=fake_cond)
    with pytest.raises(error, match=message):
        trainer.generator_step(N, cond, fake_cond=fake_cond)
    assert (trainer.critic_iterations, trainer.generator_iterations) == (0, 0)


def test_constants_that_differ_have_a_pass_each():
    seen = []
    trainer = made(CONSTRAINTS["clip"], independent_samples=True)
    trainer.critic.register_forward_pre_hook(lambda m, args: seen.append((len(args[0]), args[2])))
    real, cond = torch.randn(N, WIDTH, dtype=F64), torch.randn(N, 2, dtype=F64)
    trainer.critic_step(real, cond, 1, fake_cond=(cond, 2))
    trainer.critic_step(real, cond, 1, fake_cond=(cond, 1))
    assert seen == [(N, 1), (N, 2), (2 * N, 1)]


@pytest.mark.emulated
@pytest.mark.parametrize("name", ["clip", "interpolates"])
def test_graphed_steps(name, graphed):
    """Other conditions at each replay, and steps without any of their own between."""
    found = []
    for cuda_graph in (True, False):
        torch.manual_seed(0)
        trainer = made(CONSTRAINTS[name], n_critic=2, backend="triton", cuda_graph=cuda_graph)
        random = torch.Generator().manual_seed(3)
        for i in range(16):
            real, cond, other = (torch.randn(N, n, dtype=F64, generator=random) for n in (WIDTH, 2, 2))
            trainer.step(real, cond, fake_cond=None if i % 4 > 1 else (other,))
        found.append(trainer)
        Recorded.made, made_here = 0, Recorded.made
        assert made_here == (3 if cuda_graph else 0)  # the critic's with and without, and the generator's
    for part in ("generator", "critic"):
        torch.testing.assert_close(weights(getattr(found[0], part)), weights(getattr(found[1], part)))


def test_fit_by_a_step_of_ones_own():
    """As README has it."""

    class Own(Trainer):
        def step(self, real, c, other):
            return super().step(real, c, fake_cond=(other,))

    random = torch.Generator().manual_seed(3)
    data = [tuple(torch.randn(N, n, dtype=F64, generator=random) for n in (WIDTH, 2, 2)) for _ in range(4)]
    found = []
    for kind in (Own, Trainer):
        generator, critic = networks()
        trainer = kind(generator, critic, latent=4, constraint=GradientPenalty(), n_critic=2, seed=SEED)
        if kind is Own:
            trainer.fit(data, 4)
        else:
            for real, c, other in data:
                trainer.step(real, c, fake_cond=[other])
        found.append(trainer.state_dict())
    for name in ("critic", "generator", "critic_optimizer"):
        assert_same_state(found[0][name], found[1][name])


# Further outputs


class Several(nn.Module):
    """A critic that returns what it has in many forms."""

    def __init__(self, pack=1):
        super().__init__()
        self.first, self.last, self.pack = nn.Linear(WIDTH, 8), nn.Linear(8 * pack, 1), pack

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(h.view(len(x) // self.pack, -1)), h, {"list": [x + 1, None]}, "name", 2


class Doubled(nn.Module):
    """A generator that returns its samples, and twice as much."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, WIDTH)

    def forward(self, z):
        x = self.linear(z)
        return x, 2 * x


def with_records(critic, **options):
    records = []

    def term(record):
        records.append(record)
        return 0.5 * record.fake_scores.square().mean()

    torch.manual_seed(0)
    trainer = quietly(
        Trainer, Doubled(), critic, latent=4, critic_term=term, generator_term=term, n_critic=1, **options,
    )  # fmt: skip
    return trainer, records


@pytest.mark.parametrize("shared", [False, True], ids=["two passes", "one pass"])
@pytest.mark.parametrize("pack", [1, 2])
def test_outputs_are_of_each_kind_of_samples(shared, pack):
    trainer, records = with_records(Several(pack), pack=pack, independent_samples=shared, constraint=GradientPenalty())
    real = torch.randn(N, WIDTH)
    passes = []
    trainer.critic.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    trainer.step(real)
    critics, generators = records
    assert trainer._steps.sharing.together is shared
    assert len(passes) == (3 if shared else 4)  # the penalty's and the generator's step's have one each
    for record in records:
        assert isinstance(record, StepRecord)
        assert record.real is real
        assert record.cond == record.fake_cond == ()
        assert torch.equal(record.outputs.generator[0], 2 * record.fake)
        assert record.fake_scores.shape == (N // pack, 1)
        for samples, (h, nested, name, number) in ((real, record.outputs.real), (record.fake, record.outputs.fake)):
            assert h.shape == (N, 8)
            assert h.requires_grad
            assert torch.equal(nested["list"][0], samples + 1)
            assert (nested["list"][1], name, number) == (None, "name", 2)
    assert len(passes) == (4 if shared else 5)  # the real samples' in the generator's step, once, as it was asked for
    assert torch.equal(generators.real_scores, trainer.critic(real)[0])
    assert not critics.fake.requires_grad
    assert generators.fake.requires_grad


def test_a_pass_on_real_samples_in_a_generators_step_leaves_them_as_they_are():
    torch.manual_seed(0)
    critic, real = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, 1)), torch.randn(N, WIDTH)
    before = real.clone()
    term = lambda s: s.real_scores.mean() + 0 * s.fake.sum()  # noqa: E731
    trainer = Trainer(Doubled(), critic, latent=4, n_critic=1, generator_term=term)
    metrics = trainer.step(real)
    assert torch.equal(real, before)
    torch.testing.assert_close(metrics.generator_term, critic(before).mean().detach())


class Batchwise(Several):
    def forward(self, x):
        scores, h, *_ = super().forward(x)
        return scores, h.mean()


@pytest.mark.parametrize("kind", [Batchwise, "an object"])
def test_a_shared_pass_refuses_outputs_that_it_cannot_tell_apart(kind):
    class Odd(Several):
        def forward(self, x):
            return super().forward(x)[0], object()

    critic = Batchwise() if kind is Batchwise else Odd()
    trainer, _ = with_records(critic, independent_samples=True)
    before = weights(critic)
    got = "shape \\(\\)" if kind is Batchwise else "object"
    with pytest.raises(
        ValueError, match=f"critic: its output: expected further outputs with a row .* got {got}: leave ind"
    ):
        trainer.step(torch.randn(N, WIDTH))
    assert torch.equal(weights(critic), before)
    trainer, records = with_records(critic)
    trainer.step(torch.randn(N, WIDTH))
    assert len(records) == 2


def test_samples_are_a_generators_first_output():
    trainer, _ = with_records(Several(), ema=0.5)
    trainer.step(torch.randn(N, WIDTH))
    assert trainer.sample(5).shape == trainer.sample(5, ema=True).shape == (5, WIDTH)


def test_no_output_at_all():
    class Nothing(Several):
        def forward(self, x):
            return ()

    trainer, _ = with_records(Nothing())
    with pytest.raises(TypeError, match="critic: its output: expected a tensor, got tuple"):
        trainer.step(torch.randn(N, WIDTH))


# What is wrong with a term


@pytest.mark.parametrize(
    ("term", "error", "message"),
    [
        (lambda s: 0.0, TypeError, "expected a tensor, got float"),
        (lambda s: s.fake_scores, ValueError, r"expected a 0-d tensor, such as a mean, got shape \(8, 1\)"),
        (
            lambda s: s.fake_scores.sum().long(),
            TypeError,
            "expected float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (lambda s: s.fake_scores.detach().mean(), ValueError, "expected to depend on the .*, got one without a graph"),
    ],
)
@pytest.mark.parametrize("name", ["critic_term", "generator_term"])
def test_a_term_that_cannot_be_used(name, term, error, message):
    torch.manual_seed(0)
    trainer = Trainer(Doubled(), Several(), latent=4, n_critic=1, **{name: term})
    before = weights(getattr(trainer, name.removesuffix("_term")))
    with pytest.raises(error, match=f"^{name}: its result: {message}"):
        trainer.step(torch.randn(N, WIDTH))
    assert torch.equal(weights(getattr(trainer, name.removesuffix("_term"))), before)
    with pytest.raises(TypeError, match=f"^{name}: expected a function of the step's record, got int"):
        Trainer(Doubled(), Several(), latent=4, **{name: 3})


def test_real_samples_that_a_generators_step_was_not_given():
    torch.manual_seed(0)
    trainer = Trainer(Doubled(), Several(), latent=4, generator_term=lambda s: s.real_scores.mean() + s.fake.mean())
    with pytest.raises(ValueError, match="generator_term: expected real samples, got none: give gen"):
        trainer.generator_step(N)
    with pytest.raises(ValueError, match="real: expected batch_size=8 samples, got 4"):
        trainer.generator_step(N, real=torch.randn(4, WIDTH))
    assert trainer.generator_iterations == 0
    trainer.generator_step(N, real=torch.randn(N, WIDTH))
    assert trainer.generator_iterations == 1


# The functional form


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("kind", ["two-sided", "one-sided"])
def test_the_gradient_penalty_of_packs(kind, backend):
    """As CTGAN has it: one random number and one norm to a pack; and of the first of several outputs."""
    pack, critic = 4, Several(4).double()
    real, fake = torch.randn(2, N, WIDTH, dtype=F64)
    eps = reference.uniform(7, 0, N // pack).double().repeat_interleave(pack)[:, None]
    x = (eps * real + (1 - eps) * fake).requires_grad_()
    (g,) = torch.autograd.grad(critic(x)[0].sum(), x, create_graph=True)
    excess = g.view(N // pack, -1).norm(dim=1) - 0.1
    expected = 3 * ((excess.relu() if kind == "one-sided" else excess) ** 2).mean()
    options = {"weight": 3.0, "kind": kind, "target": 0.1, "seed": 7, "backend": backend}
    penalty = functional.gradient_penalty(critic, real, fake, pack=pack, **options)
    torch.testing.assert_close(penalty, expected, rtol=1e-10, atol=1e-12)
    parameters = [critic.first.weight, critic.first.bias, critic.last.weight]
    for ours, theirs in zip(
        torch.autograd.grad(penalty, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("pack", "error", "message"),
    [(3, ValueError, "real: expected a multiple of pack=3 samples, got 8"),
     (0, ValueError, "pack: expected an int >= 1"),
     (2.0, TypeError, "pack: expected an int, got float"),
     (2, ValueError, r"critic: its output: expected shape \[4, ...\] for 8 samples in packs of 2, got \(8, 1\)")],
)  # fmt: skip
def test_packs_that_do_not_fit(pack, error, message):
    with pytest.raises(error, match=message):
        functional.gradient_penalty(nn.Linear(WIDTH, 1), *torch.randn(2, N, WIDTH), pack=pack)


def test_the_gradient_penalty_of_packs_in_a_compiled_function():
    torch._dynamo.reset()
    critic, real, fake = Several(2).double(), *torch.randn(2, N, WIDTH, dtype=F64)

    def penalty(real, fake):
        return functional.gradient_penalty(critic, real, fake, pack=2, seed=7)

    found = torch.compile(penalty, fullgraph=True, backend="aot_eager")(real, fake)
    torch.testing.assert_close(found, penalty(real, fake), rtol=1e-10, atol=1e-12)
