"""README's "Coming from another WGAN": both loops end alike, and each row of the table says what is so."""

import copy
import re

import pytest
import torch
from migration_loops import (
    ADAM,
    BOUND,
    LATENT,
    MONE,
    ONE,
    RMSPROP,
    SECTION,
    WIDTH,
    N,
    _float64,  # noqa: F401 - a fixture
    assert_alike,
    clamp,
    data,
    gradients,
    loop,
    negate_last,
    negated,
    networks,
    noise,
    optimizers,
    ours,
    same,
    subtract,
)
from torch import nn
from torch.nn.functional import relu

from fastwgan import GradientPenalty, Trainer, WeightClip, functional, reference, warmup_schedule
from fastwgan.backend import kernels

# The two loops


def run(code, dtype, capsys):
    torch.set_default_dtype(dtype)
    names = {}
    exec(code, names)
    return names, capsys.readouterr().out


def two_loops():
    before, after = re.findall(r"```py(?:thon)?\n(.*?)```", SECTION, re.DOTALL)
    return before, after


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_both_loops_run_as_printed_and_end_alike(dtype, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "INTERPRETED", False)  # as for a reader, whose CPU has no interpreted kernels
    (theirs, printed), (mine, printed_by_ours) = (run(code, dtype, capsys) for code in two_loops())
    assert len(printed.splitlines()) == len(printed_by_ours.splitlines()) == 6
    assert all(p.dtype == dtype for name in ("G", "D") for p in mine[name].parameters())
    if dtype == torch.float64:
        assert printed_by_ours == printed
        assert mine["trainer"].generator_iterations == 60
        assert mine["opt_D"].param_groups[0]["lr"] == pytest.approx(5e-4 * 0.9**3)
        assert same(mine["G"], theirs["G"])
        assert same(mine["D"], theirs["D"])


@pytest.mark.parametrize(
    ("old", "new"),
    [("WeightClip(0.05)", "WeightClip(0.06)"), ("n_critic=5", "n_critic=4"), ("    decay_D.step()", ""),
     ("randn(n, 64,", "rand(n, 64,")],
)  # fmt: skip
def test_the_loops_would_not_end_alike_otherwise(old, new, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    before, after = (code.replace("6400", "640").replace("3200", "320") for code in two_loops())
    assert after.count(old) == 1
    (theirs, _), (mine, _) = (run(code, torch.float64, capsys) for code in (before, after.replace(old, new)))
    assert not same(mine["G"], theirs["G"], rtol=1e-6)
    assert not same(mine["D"], theirs["D"], rtol=1e-6)


def test_a_textbook_penalty_loop_ends_alike():
    generator, critic = networks()
    generator_optimizer, critic_optimizer = optimizers(generator, critic, ADAM)
    torch.manual_seed(3)
    for i, real in enumerate(data(20)):
        fake = generator(noise(N)).detach()
        eps = reference.uniform(7, i * N, N).double()[:, None]
        x = (eps * real + (1 - eps) * fake).requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        loss = critic(fake).mean() - critic(real).mean() + 10 * ((g.norm(2, dim=1) - 1) ** 2).mean()
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        if i % 5 == 4:
            generator_optimizer.zero_grad()
            (-critic(generator(noise(N))).mean()).backward()
            generator_optimizer.step()
    penalty = GradientPenalty(weight=10.0)
    for mine, theirs in zip(ours(20, optimizer=ADAM, constraint=penalty, seed=7), (generator, critic), strict=True):
        assert same(mine, theirs)
    for mine, theirs in zip(ours(20, optimizer=ADAM, constraint=penalty, seed=8), (generator, critic), strict=True):
        assert not same(mine, theirs, rtol=1e-4)


# The table: clamps and when steps are due


def test_clamp_after_the_step():
    for mine, theirs in zip(ours(20), loop(20), strict=True):
        assert same(mine, theirs)


def test_clamp_before_the_step():
    def nothing(critic):
        pass

    # The critic's steps are the same, once ours begins clamped; theirs is left with its last update's overshoot.
    (_, mine), (_, theirs) = ours(4, prepare=clamp), loop(4, before=clamp, after=nothing)
    assert not same(mine, theirs)
    clamp(theirs)
    assert same(mine, theirs)
    assert not same(ours(4)[1], theirs)

    # The generator's are not, for that overshoot, unless theirs clamps before them too.
    assert not same(ours(20, prepare=clamp)[0], loop(20, before=clamp, after=nothing)[0])
    clamped = loop(20, before=clamp, after=nothing, before_generator=clamp)
    clamp(clamped[1])
    for a, b in zip(ours(20, prepare=clamp), clamped, strict=True):
        assert same(a, b)


def test_generator_step_after_the_first_of_five():
    theirs = loop(18, due=lambda i: i % 5 == 0)
    for mine, expected in zip(ours(18, n_critic=lambda iteration: 5 if iteration else 1), theirs, strict=True):
        assert same(mine, expected)
    assert not same(ours(18)[0], theirs[0])


def test_a_count_that_starts_again_in_each_epoch():
    """Of 7 batches: the generator's steps are 5 and 2 critic steps apart, which no number for ``n_critic`` says."""
    row = re.search(r"\| the same, where `i` starts again in each epoch \| `(.+)`, and in your `if` `(.+)` \|", SECTION)
    theirs = loop(21, due=lambda i: i % 7 % 5 == 0)
    generator, critic = networks()
    of_generator, of_critic = optimizers(generator, critic, RMSPROP)
    given = {"generator_optimizer": of_generator, "critic_optimizer": of_critic, "constraint": WeightClip(BOUND)}
    names = {"trainer": Trainer(generator, critic, latent=noise, backend="torch", **given)}
    torch.manual_seed(3)
    for i, names["real"] in enumerate(data(21)):
        eval(row[1], names)
        if i % 7 % 5 == 0:
            eval(row[2], names)
    for mine, expected in zip((generator, critic), theirs, strict=True):
        assert same(mine, expected)
    assert not same(ours(21, n_critic=lambda iteration: 5 if iteration else 1)[0], theirs[0])


def test_warmup():
    diters = [100 if i < 25 or i % 500 == 0 else 5 for i in range(1002)]
    assert [warmup_schedule(i) for i in range(1002)] == diters


# The table: gradients clipped by norm


@pytest.mark.parametrize("optimizer", [RMSPROP, ADAM, (torch.optim.SGD, {"lr": 1e-2})], ids=["RMSprop", "Adam", "SGD"])
def test_clipped_gradients(optimizer):
    (cell,) = re.findall(r"^\| `nn.utils.clip_grad_norm_\(D.*\(\), c\)` \| `max_norm=(.+)` \|$", SECTION, re.MULTILINE)

    def clipped(critic, real, fake):
        subtract(critic, real, fake)
        norms.append(nn.utils.clip_grad_norm_(critic.parameters(), 0.02))

    norms, options = [], {"optimizer": optimizer}
    theirs, mine = loop(20, clipped, **options), ours(20, max_norm=eval(cell, {"c": 0.02}), **options)
    assert min(norms) > 0.02
    for network, expected in zip(mine, theirs, strict=True):
        assert same(network, expected)
    for other in (ours(20, **options), ours(20, max_norm={"critic": 0.03}, **options)):
        assert not same(other[1], theirs[1])


# The table: signs


def minus_one_is_real(critic, real, fake):
    critic(real).mean().backward(MONE)
    critic(fake).mean().backward(ONE)


def one_is_real(critic, real, fake):
    critic(real).mean().backward(ONE)
    critic(fake).mean().backward(MONE)


def difference(critic, real, fake):
    real_error, fake_error = critic(real).mean(), critic(fake).mean()
    (real_error - fake_error).backward()


def labelled(real_label):
    def backward(critic, real, fake):
        for samples, label in ((real, real_label), (fake, -real_label)):
            scores = critic(samples)
            functional.wasserstein_loss(torch.full_like(scores, label), scores, backend="torch").backward()

    return backward


@pytest.mark.parametrize("backward", [minus_one_is_real, labelled(-1.0)], ids=["one and mone", "labels"])
def test_signs_as_here(backward):
    for mine, theirs in zip(ours(20), loop(20, backward), strict=True):
        assert same(mine, theirs)


@pytest.mark.parametrize(
    "backward", [one_is_real, difference, labelled(1.0)], ids=["one and mone", "errD", "labels"]
)  # fmt: skip
def test_opposite_signs_are_a_critic_with_its_last_layer_negated(backward):
    theirs = loop(20, backward, generator_sign=1)
    generator, critic = ours(20, prepare=negate_last)
    assert same(generator, theirs[0])
    assert same(critic, negated(theirs[1]))
    assert not same(generator, ours(20)[0])  # without that negation
    assert not same(critic, theirs[1])


def test_a_sum_instead_of_a_mean():
    def summed(critic, real, fake):
        critic(real).backward(-torch.ones(N, 1))
        critic(fake).backward(torch.ones(N, 1))

    def sgd(lr):
        return torch.optim.SGD, {"lr": lr}

    def never(i):
        return False

    theirs = loop(20, summed, optimizer=sgd(1e-4), due=never)[1]
    assert same(ours(20, optimizer=sgd(N * 1e-4), n_critic=99)[1], theirs)
    assert not same(ours(20, optimizer=sgd(1e-4), n_critic=99)[1], theirs)
    for kind, options in (RMSPROP, ADAM):  # which undo the factor, all but eps
        optimizer = kind, options | {"eps": 1e-12}
        theirs = loop(20, summed, optimizer=optimizer, due=never)[1]
        assert same(ours(20, optimizer=optimizer, n_critic=99)[1], theirs, rtol=1e-5)


def test_signs_of_metrics():
    generator, critic = networks()
    real = data(1)[0]
    torch.manual_seed(3)
    fake = generator(noise(N)).detach()
    printed = (critic(real).mean() - critic(fake).mean()).item()  # errD where it is printed only
    minimised = (negated(critic)(real).mean() - negated(critic)(fake).mean()).item()  # errD where it is the loss
    torch.manual_seed(3)
    metrics = Trainer(generator, critic, latent=noise, backend="torch").critic_step(real)
    assert float(metrics.wasserstein) == pytest.approx(printed, rel=1e-12)
    assert float(metrics.critic_loss) == pytest.approx(minimised, rel=1e-12)
    assert printed != 0


def test_label_form_on_one_batch_and_on_two():
    _, critic = networks()
    real, fake = data(2)
    loss = functional.critic_loss(critic(real), critic(fake), backend="torch")
    labels = torch.cat((-torch.ones(N, 1), torch.ones(N, 1)))
    mixed = functional.wasserstein_loss(labels, critic(torch.cat((real, fake))), backend="torch")
    apart = [
        functional.wasserstein_loss(torch.full((N, 1), label), critic(x), backend="torch")
        for label, x in ((-1.0, real), (1.0, fake))
    ]
    assert_alike([loss, *gradients(loss, critic)], [2 * mixed, *gradients(2 * mixed, critic)])
    assert_alike([loss, *gradients(loss, critic)], [sum(apart), *gradients(sum(apart), critic)])


def test_train_on_batch_of_real_and_then_of_fake_is_two_updates():
    def keras(critic, real, fake):
        (-critic(real).mean()).backward()
        torch.optim.SGD(critic.parameters(), lr=1e-3).step()
        critic.zero_grad()
        critic(fake).mean().backward()  # the loop's own optimizer makes the second update

    sgd = torch.optim.SGD, {"lr": 1e-3}
    mine = ours(5, optimizer=sgd)[1]
    assert same(mine, loop(5, optimizer=sgd)[1])
    assert not same(mine, loop(5, keras, optimizer=sgd)[1])


# The table: penalty and hinge


def calc_gradient_penalty(critic, real, fake, eps, norm):
    eps = eps.view(-1, *[1] * (real.dim() - 1)).expand(real.size())
    interpolates = (eps * real + (1 - eps) * fake).requires_grad_()
    scores = critic(interpolates)
    (g,) = torch.autograd.grad(scores, interpolates, torch.ones_like(scores), create_graph=True)
    return ((norm(g) - 1) ** 2).mean() * 10


def test_textbook_penalty():
    _, critic = networks()
    real, fake = data(2)
    eps = reference.uniform(5, 0, N).double()
    theirs = calc_gradient_penalty(critic, real, fake, eps, lambda g: g.norm(2, dim=1))
    mine = functional.gradient_penalty(critic, real, fake, weight=10.0, seed=5, backend="torch")
    assert_alike([mine, *gradients(mine, critic)], [theirs, *gradients(theirs, critic)])


def test_textbook_penalty_on_images():
    critic = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 3 * 3, 1))
    real, fake = torch.randn(2, N, 3, 5, 5)
    eps = reference.uniform(5, 0, N).double()
    per_pixel = calc_gradient_penalty(critic, real, fake, eps, lambda g: g.norm(2, dim=1))
    per_sample = calc_gradient_penalty(critic, real, fake, eps, lambda g: g.flatten(1).norm(2, dim=1))
    mine = functional.gradient_penalty(critic, real, fake, weight=10.0, seed=5, backend="torch")
    assert_alike([mine, *gradients(mine, critic)], [per_sample, *gradients(per_sample, critic)])
    assert abs(mine - per_pixel) > 0.1 * mine


def test_hinge():
    _, critic = networks()
    real, fake = data(2)
    scale = 5  # so that some scores are past the hinge
    theirs = relu(1 - scale * critic(real)).mean() + relu(1 + scale * critic(fake)).mean()
    mine = sum(functional.hinge_critic_loss(scale * critic(real), scale * critic(fake), backend="torch"))
    assert (1 - scale * critic(real) < 0).any() or (1 + scale * critic(fake) < 0).any()
    assert_alike([mine, *gradients(mine, critic)], [theirs, *gradients(theirs, critic)])


# The table: what a step touches, conditions, files


def test_neither_step_touches_the_other_networks_gradients():
    generator, critic = networks()
    trainer = Trainer(generator, critic, latent=noise, backend="torch")
    for p in generator.parameters():
        p.grad = torch.full_like(p, 3.0)
    trainer.critic_step(data(1)[0])
    assert all((p.grad == 3).all() for p in generator.parameters())

    trained = []
    critic.register_forward_hook(lambda module, args, scores: trained.append(module[0].weight.requires_grad))
    before = [(p.grad, p.grad.clone()) for p in critic.parameters()]
    trainer.generator_step(N)
    assert trained == [False]
    assert all(p.grad is g and torch.equal(g, kept) for p, (g, kept) in zip(critic.parameters(), before, strict=True))
    assert all(p.requires_grad for p in critic.parameters())


def test_noise_of_another_shape_and_no_graph_through_the_generator():
    generator, critic = networks()
    generator.insert(0, nn.Flatten())
    seen = []
    generator.register_forward_hook(lambda module, args, fake: seen.append((args[0].shape, fake.requires_grad)))
    trainer = Trainer(generator, critic, latent=lambda n, device: noise(n)[:, :, None, None], backend="torch")
    trainer.critic_step(data(1)[0])
    trainer.generator_step(N)
    assert seen == [((N, LATENT, 1, 1), False), ((N, LATENT, 1, 1), True)]


class Conditional(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.embed, self.body = nn.Embedding(3, 2), nn.Sequential(nn.Linear(inputs + 2, 8), nn.Tanh())
        self.last = nn.Linear(8, outputs)

    def forward(self, x, labels):
        return self.last(self.body(torch.cat((x, self.embed(labels)), 1)))


def test_conditions():
    torch.manual_seed(1)
    theirs = Conditional(LATENT, WIDTH), Conditional(WIDTH, 1)
    mine = copy.deepcopy(theirs)
    labels = [torch.arange(N).add(i).remainder(3) for i in range(10)]
    generator_optimizer, critic_optimizer = optimizers(*theirs, RMSPROP)
    generator, critic = theirs
    torch.manual_seed(3)
    for i, (real, y) in enumerate(zip(data(10), labels, strict=True)):
        critic_optimizer.zero_grad()
        (critic(generator(noise(N), y).detach(), y).mean() - critic(real, y).mean()).backward()
        critic_optimizer.step()
        clamp(critic)
        if i % 5 == 4:
            generator_optimizer.zero_grad()
            (-critic(generator(noise(N), y), y).mean()).backward()
            generator_optimizer.step()

    generator_optimizer, critic_optimizer = optimizers(*mine, RMSPROP)
    trainer = Trainer(
        *mine, latent=noise, constraint=WeightClip(BOUND), backend="torch",
        critic_optimizer=critic_optimizer, generator_optimizer=generator_optimizer,
    )  # fmt: skip
    torch.manual_seed(3)
    for real, y in zip(data(10), labels, strict=True):
        trainer.step(real, y)
    assert same(mine[0], theirs[0])
    assert same(mine[1], theirs[1])


@pytest.mark.parametrize("choice", [RMSPROP, ADAM], ids=["RMSprop", "Adam"])
def test_old_files_loaded_before_the_trainer_is_made(choice, tmp_path):
    """Ten steps of a loop, its files, and ten more by a trainer are the loop's twenty."""

    def go(generator, critic, generator_optimizer, critic_optimizer, batches):
        for i, real in enumerate(batches):
            critic_optimizer.zero_grad()
            subtract(critic, real, generator(noise(N)).detach())
            critic_optimizer.step()
            clamp(critic)
            if i % 5 == 4:
                generator_optimizer.zero_grad()
                (-critic(generator(noise(N))).mean()).backward()
                generator_optimizer.step()

    theirs = networks()
    theirs += optimizers(*theirs, choice)
    torch.manual_seed(3)
    go(*theirs, data(20)[:10])
    for i, part in enumerate(theirs):
        torch.save(part.state_dict(), tmp_path / f"{i}.pt")
    random = torch.get_rng_state()
    go(*theirs, data(20)[10:])

    mine = networks()
    mine += optimizers(*mine, choice)
    for i, part in enumerate(mine):
        part.load_state_dict(torch.load(tmp_path / f"{i}.pt"))
    generator, critic, generator_optimizer, critic_optimizer = mine
    trainer = Trainer(
        generator, critic, latent=noise, constraint=WeightClip(BOUND), backend="torch",
        critic_optimizer=critic_optimizer, generator_optimizer=generator_optimizer,
    )  # fmt: skip
    torch.set_rng_state(random)
    for real in data(20)[10:]:
        trainer.step(real)
    assert same(generator, theirs[0])
    assert same(critic, theirs[1])


def test_clipping_clamps_the_tensors_under_a_parametrization():
    generator, _ = networks()
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, 8))
    critic = nn.Sequential(layer, nn.Tanh(), nn.Linear(8, 1))
    Trainer(generator, critic, latent=noise, constraint=WeightClip(0.01), backend="torch").critic_step(data(1)[0])
    assert layer.parametrizations.weight.original.abs().max() <= 0.01
    assert layer.weight.abs().max() > 0.05
