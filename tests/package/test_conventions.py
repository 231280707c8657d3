"""README's tables of losses, signs, labels and penalties: what other code computes, and what it is here.

Each row's own code is run beside what its other cell says, in float64: to the same weights after twenty steps, or to
the same gradients. Cells that are code (``GradientPenalty(...)``) are evaluated as they stand in README.
"""

import re

import pytest
import torch
from migration_loops import (
    ADAM,
    RMSPROP,
    SECTION,
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
)
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, relu, softplus

from fastwgan import GradientPenalty, Trainer, functional, reference


def table(heading):
    """{left cell: right cell} of the table whose header begins so."""
    (rows,) = re.findall(rf"^\| {re.escape(heading)}.*\n\|---\|---\|\n((?:\|.*\n)+)", SECTION, re.MULTILINE)
    cells = [row.strip("| ").split(" | ") for row in rows.splitlines()]
    assert len(dict(cells)) == len(cells)
    return dict(cells)


SIGNS, PENALTIES = table("losses, signs and labels in your code"), table("penalty in your code")
COVERED = set()
LAMBDA, GAMMA, TARGET, K, ALPHA, SIGMA = 7.0, 3.0, 2.5, 3, 0.3, 0.25
SEED = 7
SGD = torch.optim.SGD, {"lr": 1e-3}
ONES = torch.ones(N, 1, dtype=torch.float64)


def covers(*rows):
    """Marks the test of these rows, which must be in README."""

    def mark(test):
        for row in rows:
            assert row in SIGNS | PENALTIES, row
            COVERED.add(row)
        return test

    return mark


# Signs and labels. Somebody's critic and generator loss, of the scores, by the row that they are in.


def k_mean(y_true, y_pred):
    return (y_true * y_pred).mean()


def gan_loss(scores, target_is_real):
    return -scores.mean() if target_is_real else scores.mean()


AS_HERE = {
    "`D(fake).mean() - D(real).mean()`, `-D(G(z)).mean()`": (
        lambda real, fake: fake.mean() - real.mean(),
        lambda fake: -fake.mean(),
    ),
    "`-(D(real) - D(fake)).mean()`, `-D(G(z)).mean()`": (
        lambda real, fake: -(real - fake).mean(),
        lambda fake: -fake.mean(),
    ),
    "`wasserstein_loss(y_true, y_pred)`, real -1, fake +1": (
        lambda real, fake: k_mean(-ONES, real) + k_mean(ONES, fake),
        lambda fake: k_mean(-ONES, fake),
    ),
    "`-mean(y_true * y_pred)`, real +1, fake -1": (
        lambda real, fake: -k_mean(ONES, real) - k_mean(-ONES, fake),
        lambda fake: -k_mean(ONES, fake),
    ),
    "`-D(x).mean() if target_is_real else D(x).mean()`": (
        lambda real, fake: gan_loss(real, True) + gan_loss(fake, False),
        lambda fake: gan_loss(fake, True),
    ),
}
NEGATED = {
    "`D(real).mean() - D(fake).mean()`, `D(G(z)).mean()`": (
        lambda real, fake: real.mean() - fake.mean(),
        lambda fake: fake.mean(),
    ),
    "the same, minimised": (lambda real, fake: real.mean() - fake.mean(), lambda fake: fake.mean()),
    "the same, real +1, fake -1": (
        lambda real, fake: k_mean(ONES, real) + k_mean(-ONES, fake),
        lambda fake: k_mean(ONES, fake),
    ),
    "the same, real -1, fake +1": (
        lambda real, fake: -k_mean(-ONES, real) - k_mean(ONES, fake),
        lambda fake: -k_mean(-ONES, fake),
    ),
}


def train(critic_loss, generator_loss, *, optimizer=RMSPROP, steps=20, maximize=False):
    """A loop by these losses of scores, ten lines as people write them; (generator, critic) at its end."""
    generator, critic = networks()
    kind, options = optimizer
    generator_optimizer, critic_optimizer = optimizers(generator, critic, (kind, options | {"maximize": maximize}))
    torch.manual_seed(3)
    for i, real in enumerate(data(steps)):
        critic_optimizer.zero_grad()
        critic_loss(critic(real), critic(generator(noise(N)).detach())).backward()
        critic_optimizer.step()
        clamp(critic)
        if i % 5 == 4:
            generator_optimizer.zero_grad()
            generator_loss(critic(generator(noise(N)))).backward()
            generator_optimizer.step()
    return generator, critic


@covers(*AS_HERE)
@pytest.mark.parametrize("row", AS_HERE)
def test_signs_as_here(row):
    assert SIGNS[row].startswith(("the trainer's", "real plus fake is `critic_loss`"))
    for mine, theirs in zip(ours(20), train(*AS_HERE[row]), strict=True):
        assert same(mine, theirs)


@covers(*NEGATED)
@pytest.mark.parametrize("row", NEGATED)
def test_opposite_signs(row):
    assert SIGNS[row] in ("*-D*", "`metrics.critic_loss`, of *-D*")
    theirs = train(*NEGATED[row])
    generator, critic = ours(20, prepare=negate_last)
    assert same(generator, theirs[0])
    assert same(critic, negated(theirs[1]))
    assert not same(generator, ours(20)[0])


@covers("`D(real).mean().backward(mone)`, fake with `one`", "`D(real).mean().backward(one)`, fake with `mone`")
def test_seeds_of_the_backward_pass():
    def backward(seed):
        def critic_backward(critic, real, fake):
            critic(real).mean().backward(torch.tensor(seed))
            critic(fake).mean().backward(torch.tensor(-seed))

        return critic_backward

    for mine, theirs in zip(ours(20), loop(20, backward(-1.0)), strict=True):
        assert same(mine, theirs)
    generator, critic = ours(20, prepare=negate_last)
    theirs = loop(20, backward(1.0), generator_sign=1)
    assert same(generator, theirs[0])
    assert same(critic, negated(theirs[1]))


@covers("both ascended (`maximize=True`, `(-loss).backward()`)")
def test_ascent():
    real_minus_fake, scores = NEGATED["`D(real).mean() - D(fake).mean()`, `D(G(z)).mean()`"]
    ascended = train(real_minus_fake, scores, maximize=True)
    backward = train(lambda real, fake: -real_minus_fake(real, fake), lambda fake: -scores(fake))
    for mine, *theirs in zip(ours(20), ascended, backward, strict=True):
        assert all(same(mine, each) for each in theirs)
    maximizing = RMSPROP[0], RMSPROP[1] | {"maximize": True}
    assert not same(ours(20, optimizer=maximizing)[1], ascended[1])  # "that descend" is meant


@covers("`D(real).mean() - D(fake).mean()`, `-D(G(z)).mean()`")
def test_the_mistake_leads_the_generator_away():
    mistaken = train(lambda real, fake: real.mean() - fake.mean(), lambda fake: -fake.mean(), optimizer=SGD, steps=5)
    right = train(lambda real, fake: real.mean() - fake.mean(), lambda fake: fake.mean(), optimizer=SGD, steps=5)
    assert same(mistaken[1], right[1])
    for p, mine, theirs in zip(
        networks()[0].parameters(), right[0].parameters(), mistaken[0].parameters(), strict=True
    ):
        torch.testing.assert_close(theirs - p, p - mine, rtol=1e-9, atol=1e-12)  # its first step, the other way
    assert not same(mistaken[0], networks()[0])


@covers("`D(real).backward(-ones)`, N scores and no mean", "`0.5 * (d_loss_real + d_loss_fake)`, minimised")
@pytest.mark.parametrize(
    ("factor", "reduce"),
    [(N, lambda real, fake: fake.sum() - real.sum()), (0.5, lambda real, fake: 0.5 * (-real.mean() + fake.mean()))],
    ids=["ones", "half"],
)
def test_a_factor_of_the_loss_is_one_of_the_learning_rate_to_SGD_only(factor, reduce):  # noqa: N802
    def generator_loss(fake):
        return -fake.mean()

    (kind, options), steps = SGD, 4  # no generator step, whose learning rate stays
    theirs = train(reduce, generator_loss, optimizer=SGD, steps=steps)[1]
    scaled = kind, options | {"lr": factor * options["lr"]}
    assert same(ours(steps, optimizer=scaled)[1], theirs)
    assert not same(ours(steps, optimizer=SGD)[1], theirs)
    for kind, options in (RMSPROP, ADAM):
        optimizer = kind, options | {"eps": 1e-13}  # which is all that tells them apart
        theirs = train(reduce, generator_loss, optimizer=optimizer)
        for mine, expected in zip(ours(20, optimizer=optimizer), theirs, strict=True):
            assert same(mine, expected, rtol=1e-6)


def step(constraint, critic=None, **options):
    """A trainer's first critic step, SGD at a learning rate of 1: (minus the update, metrics, real, fake, eps)."""
    generator, fresh = networks()
    critic = critic or fresh
    before = [p.detach().clone() for p in critic.parameters()]
    trainer = Trainer(
        generator, critic, latent=noise, constraint=constraint, backend="torch", seed=SEED,
        critic_optimizer=torch.optim.SGD(critic.parameters(), lr=1.0), **options,
    )  # fmt: skip
    (real,) = data(1)
    torch.manual_seed(3)
    metrics = trainer.critic_step(real)
    taken = [b - p.detach() for b, p in zip(before, critic.parameters(), strict=True)]
    torch.manual_seed(3)
    with torch.no_grad():
        fake = generator(noise(N))
    return taken, metrics, real, fake, reference.uniform(SEED, 0, N).double()[:, None]


def input_norms(critic, x, reduce=torch.sum):
    """Somebody's norms [N] of the critic's input gradient."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(reduce(critic(x)), x, create_graph=True)
    return g.flatten(1).norm(2, dim=1)


def textbook(critic, real, fake, eps):
    return ((input_norms(critic, eps * real + (1 - eps) * fake) - 1) ** 2).mean()


@covers(
    "`D_cost = D_fake - D_real + gp`, printed",
    "`-D_cost`, plotted as the distance",
    "`Wasserstein_D = D_real - D_fake`, printed",
    "`errD = errD_real - errD_fake`, printed only",
    "`0.5 * np.add(d_loss_real, d_loss_fake)`, printed",
)
def test_what_is_printed():
    _, metrics, real, fake, eps = step(GradientPenalty(10))
    critic = networks()[1]  # as it was
    d_real, d_fake, gp = critic(real).mean(), critic(fake).mean(), 10 * textbook(critic, real, fake, eps)
    for row, theirs in (
        ("`D_cost = D_fake - D_real + gp`, printed", d_fake - d_real + gp),
        ("`Wasserstein_D = D_real - D_fake`, printed", d_real - d_fake),
        ("`errD = errD_real - errD_fake`, printed only", d_real - d_fake),
    ):
        (name,) = re.findall(r"`metrics\.(\w+)`", SIGNS[row])
        assert_alike(getattr(metrics, name), theirs.detach())
    plotted = float(metrics.wasserstein - 10 * metrics.penalty)
    assert plotted == pytest.approx(-(d_fake - d_real + gp).item(), rel=1e-12)
    d_loss_real, d_loss_fake = k_mean(-ONES, critic(real)), k_mean(ONES, critic(fake))
    printed = 0.5 * (d_loss_real + d_loss_fake)
    assert_alike(printed, functional.critic_loss(critic(real), critic(fake), backend="torch") / 2)
    assert_alike((1 - printed).detach(), 1 + metrics.wasserstein / 2)


@covers("the label of `G(z)` when the generator is trained")
def test_the_label_of_what_is_generated():
    """In each of the four label forms, the loss of real samples is to generated ones the generator's."""
    _, critic = networks()
    scores = critic(data(1)[0])
    for sign, real_label, negates in ((1, -1, False), (1, 1, True), (-1, 1, False), (-1, -1, True)):
        theirs = sign * k_mean(real_label * ONES, scores)
        assert_alike(theirs, functional.generator_loss(-scores if negates else scores, backend="torch"))


@covers("`train_on_batch` on real, then on fake")
def test_two_updates():
    def keras(critic, real, fake):
        critic(real).mean().neg().backward()
        torch.optim.SGD(critic.parameters(), lr=SGD[1]["lr"]).step()
        critic.zero_grad()
        critic(fake).mean().backward()

    mine, theirs = ours(1, optimizer=SGD)[1], loop(1, keras, optimizer=SGD)[1]
    assert not same(mine, theirs)
    assert same(mine, theirs, rtol=1e-3)  # to first order in the learning rate


@covers(
    "the same plus `10 * gp`",
    "`gradient_penalty.backward()` after the scores'",
    "Keras' `loss_weights=[1, 1, 10]`, labels -1, +1 and a dummy",
)
def test_losses_with_a_penalty():
    critic = networks()[1]
    taken, _, real, fake, eps = step(constraint("the same plus `10 * gp`"))
    gp = textbook(critic, real, fake, eps)
    half = 0.5 * (-critic(real).mean() + critic(fake).mean()) + 10 * gp
    assert_alike([g / 2 for g in taken], list(gradients(half, critic)))
    losses = k_mean(-ONES, critic(real)), k_mean(ONES, critic(fake)), gp
    critic.zero_grad()
    for loss in (*losses[:2], 10 * gp):
        loss.backward(retain_graph=True)
    assert_alike(step(GradientPenalty(10))[0], [p.grad for p in critic.parameters()])
    weighted = sum(weight * loss for weight, loss in zip((1, 1, 10), losses, strict=True))
    keras = "Keras' `loss_weights=[1, 1, 10]`, labels -1, +1 and a dummy"
    assert_alike(step(constraint(keras))[0], list(gradients(weighted, critic)))


@covers(
    "`relu(1 - D(real)).mean() + relu(1 + D(fake)).mean()`",
    "`-mean(min(0, D(real) - 1)) - mean(min(0, -D(fake) - 1))`",
    "the generator's `-D(G(z)).mean()` with either",
)
def test_hinge():
    _, critic = networks()
    real, fake = (5 * critic(x) for x in data(2))  # some past the hinge
    assert 0 < (real > 1).sum() + (fake < -1).sum() < 2 * N
    mine = sum(functional.hinge_critic_loss(real, fake, backend="torch"))
    zero = torch.zeros(())
    relus = relu(1 - real).mean() + relu(1 + fake).mean()
    minima = -torch.minimum(zero, real - 1).mean() - torch.minimum(zero, -fake - 1).mean()
    for theirs in (relus, minima):
        assert_alike([mine, *gradients(mine, critic)], [theirs, *gradients(theirs, critic)])
    assert_alike(functional.generator_loss(fake, backend="torch"), -fake.mean())


def logistic(real, fake):
    return softplus(-real).mean() + softplus(fake).mean()


def bce(real, fake):
    return binary_cross_entropy_with_logits(real, ONES) + binary_cross_entropy_with_logits(fake, 0 * ONES)


BLENDED = {
    "`softplus(-D(real)).mean() + softplus(D(fake)).mean()`, `softplus(-D(G(z))).mean()`": (
        logistic,
        lambda fake: softplus(-fake).mean(),
    ),
    "`BCEWithLogitsLoss`, real 1, fake 0, and 1 for `G(z)`": (
        bce,
        lambda fake: binary_cross_entropy_with_logits(fake, ONES),
    ),
    "`alpha * gan + (1 - alpha) * wgan` of both networks": (
        lambda real, fake: ALPHA * bce(real, fake) + (1 - ALPHA) * (fake.mean() - real.mean()),
        lambda fake: ALPHA * softplus(-fake).mean() - (1 - ALPHA) * fake.mean(),
    ),
}


def terms(cell):
    """The terms that README's cell has, by their keywords."""
    names = {"F": nn.functional, "functional": functional, "alpha": ALPHA}
    return {name: eval(code, dict(names)) for name, code in re.findall(r"`(\w+_term)=(lambda s: .+?)`", cell)}


@covers(*BLENDED)
@pytest.mark.parametrize("row", BLENDED)
def test_logistic_losses(row):
    cell = SIGNS[row] if SIGNS[row] != "the same" else SIGNS[next(iter(BLENDED))]
    own = terms(cell)
    assert list(own) == ["critic_term", "generator_term"]
    theirs = train(*BLENDED[row])
    for mine, expected in zip(ours(20, **own), theirs, strict=True):
        assert same(mine, expected)
    assert not same(ours(20)[1], theirs[1])


# Penalties. Somebody's, of (critic, real, fake, eps); README's cell is the constraint.


def at_interpolates(of_norms, reduce=torch.sum):
    return lambda critic, real, fake, eps: of_norms(input_norms(critic, eps * real + (1 - eps) * fake, reduce))


EVALUATED = {
    "WGAN-div, `k * mean(norm ** 6)` at interpolates": at_interpolates(lambda norm: K * (norm**6).mean()),
    "`calc_gradient_penalty(D, real, fake)`": at_interpolates(lambda norm: ((norm - 1) ** 2).mean() * LAMBDA),
    "`mean(LAMBDA * (1 - norm) ** 2)`": at_interpolates(lambda norm: (LAMBDA * (1 - norm) ** 2).mean()),
    "`LAMBDA * sum((norm - 1) ** 2)`": at_interpolates(lambda norm: LAMBDA * ((norm - 1) ** 2).sum()),
    "`LAMBDA * mean(relu(norm - 1) ** 2)`": at_interpolates(lambda norm: LAMBDA * (relu(norm - 1) ** 2).mean()),
    "`LAMBDA * mean((norm / target - 1) ** 2)`": at_interpolates(
        lambda norm: LAMBDA * ((norm / TARGET - 1) ** 2).mean()
    ),
    "gradients of `D(x).mean()` and not of its sum": at_interpolates(
        lambda norm: LAMBDA * ((norm - 1) ** 2).mean(), torch.mean
    ),
    "`gamma / 2 * mean(norm ** 2)`, at real samples (R1)": (
        lambda critic, real, fake, eps: GAMMA / 2 * (input_norms(critic, real) ** 2).mean()
    ),
    "the same at fake samples (R2)": (
        lambda critic, real, fake, eps: GAMMA / 2 * (input_norms(critic, fake) ** 2).mean()
    ),
}


def constraint(row):
    """The ``GradientPenalty(...)`` that README's cell has."""
    (code,) = re.findall(r"`(GradientPenalty\(.*?\))`", (SIGNS | PENALTIES)[row])
    names = {"LAMBDA": LAMBDA, "N": N, "gamma": GAMMA, "target": TARGET, "k": K, "sigma": SIGMA}
    return eval(code, {"GradientPenalty": GradientPenalty} | names)


def steep():
    """A critic whose norms are on either side of 1."""
    critic = networks()[1]
    with torch.no_grad():
        critic[-1].weight.mul_(12)
    return critic


@covers(*EVALUATED)
@pytest.mark.parametrize("row", EVALUATED)
def test_penalty_is_the_constraint_beside_it(row):
    critic = steep()
    taken, metrics, real, fake, eps = step(constraint(row), steep())
    norms = input_norms(critic, eps * real + (1 - eps) * fake)
    assert norms.min() < 1 < norms.max()
    loss = critic(fake).mean() - critic(real).mean() + EVALUATED[row](critic, real, fake, eps)
    assert_alike(taken, list(gradients(loss, critic)))
    assert_alike(metrics.critic_loss, loss.detach())
    plain = step(GradientPenalty(10), steep())[0]
    assert not all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(taken, plain, strict=True))


@covers("R1 at every k-th step, times k")
def test_lazy_penalty():
    calls = []

    def backward(critic, real, fake):
        loss = critic(fake).mean() - critic(real).mean()
        if len(calls) % K == 0:
            loss = loss + K * GAMMA / 2 * (input_norms(critic, real) ** 2).mean()
        calls.append(loss)
        loss.backward()

    theirs = loop(10, backward, optimizer=ADAM, after=lambda critic: None)
    lazy = constraint("R1 at every k-th step, times k")
    for mine, expected in zip(ours(10, optimizer=ADAM, constraint=lazy), theirs, strict=True):
        assert same(mine, expected)
    eager = constraint("`gamma / 2 * mean(norm ** 2)`, at real samples (R1)")
    assert not same(ours(10, optimizer=ADAM, constraint=eager)[1], theirs[1])


@covers("`real + alpha * (fake - real)`")
def test_interpolates_from_the_other_end():
    real, fake = data(2)
    eps = reference.uniform(SEED, 0, N).double()[:, None]
    here = functional.interpolate(real, fake, seed=SEED, backend="torch")
    assert_alike(here, eps * real + (1 - eps) * fake)
    assert_alike(here, real + (1 - eps) * (fake - real))
    many = reference.uniform(SEED, 0, 100_000).double().sort().values  # as likely: quantiles of both are alike
    assert (many - (1 - many).flip(0)).abs().max() < 0.01


@covers("`alpha = rand_like(real)`, or one number for the batch")
def test_one_alpha_for_each_sample():
    real, fake = data(2)
    alpha = (functional.interpolate(real, fake, seed=SEED, backend="torch") - fake) / (real - fake)
    torch.testing.assert_close(alpha, alpha[:, :1].expand_as(alpha))  # not one for each element
    assert len(alpha[:, 0].unique()) == N  # nor one for all


@covers("`tf.norm(gradients)`, one number for the batch", "its `gradients.norm(2, dim=1)` on images")
def test_one_norm_for_each_sample():
    critic = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 1))
    real, fake = torch.randn(2, N, 2, 5, 5)
    x = functional.interpolate(real, fake, seed=SEED, backend="torch").requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x)
    mine = functional.gradient_penalty(critic, real, fake, weight=1.0, seed=SEED, backend="torch")
    assert_alike(mine.detach(), ((g.flatten(1).norm(2, dim=1) - 1) ** 2).mean())
    for theirs in (g.norm(2), g.norm(2, dim=1)):
        assert abs(mine - ((theirs - 1) ** 2).mean()) > 0.1 * mine


@covers("`sqrt(sum(g ** 2) + 1e-12)`, `(g + 1e-16).norm()`")
def test_no_epsilon_in_the_norm():
    g = torch.randn(N, 5)
    mine = functional.penalty(g, backend="torch")
    for norm in ((g.square().sum(1) + 1e-12).sqrt(), (g + 1e-16).norm(2, dim=1)):
        torch.testing.assert_close(mine, ((norm - 1) ** 2).mean(), rtol=1e-11, atol=0)
    flat = torch.zeros(N, 5, requires_grad=True)
    (at_zero,) = torch.autograd.grad(functional.penalty(flat, backend="torch"), flat)
    assert torch.equal(at_zero, torch.zeros(N, 5))
    (without,) = torch.autograd.grad(((flat.square().sum(1).sqrt() - 1) ** 2).mean(), flat)
    assert without.isnan().all()


def in_your_loop(row, **names):
    """The ``gradient_penalty(...)`` that README's cell has, evaluated."""
    (code,) = re.findall(r"in your loop `(gradient_penalty\(.*\))`", PENALTIES[row])
    return eval(code, {"gradient_penalty": functional.gradient_penalty, "LAMBDA": LAMBDA, "k": K} | names)


@covers("the same, `k / 2` of it at real and `k / 2` at fake samples")
def test_wgan_div_at_both():
    critic = steep()
    real, fake = data(2)
    theirs = K / 2 * (input_norms(critic, real) ** 6 + input_norms(critic, fake) ** 6).mean()
    row = "the same, `k / 2` of it at real and `k / 2` at fake samples"
    mine = sum(in_your_loop(row, D=critic, x=x) for x in (real, fake))
    assert_alike([mine, *gradients(mine, critic)], [theirs, *gradients(theirs, critic)])


@covers("DRAGAN, from `real` to `noisy`, real + 0.5 std u")
def test_dragan():
    critic = steep()
    (real,) = data(1)
    noisy = real + 0.5 * real.std() * torch.rand_like(real)
    torch.manual_seed(5)
    mine = in_your_loop("DRAGAN, from `real` to `noisy`, real + 0.5 std u", D=critic, real=real, noisy=noisy)
    torch.manual_seed(5)
    alpha = 1 - reference.uniform(int(torch.randint(2**63 - 1, ())), 0, N).double()[:, None]
    theirs = LAMBDA * ((input_norms(critic, real + alpha * (noisy - real)) - 1) ** 2).mean()
    assert_alike([mine, *gradients(mine, critic)], [theirs, *gradients(theirs, critic)])


@covers("the same at `real + sigma * randn_like(real)`, as in its paper")
def test_dragan_of_the_paper():
    row = "the same at `real + sigma * randn_like(real)`, as in its paper"
    critic = steep()
    taken, metrics, real, fake, _ = step(constraint(row), steep())
    normal = reference.normals(SEED, 0, N, real[0].numel(), stream=1, dtype=real.dtype, device=real.device)
    at = real + SIGMA * normal
    loss = critic(fake).mean() - critic(real).mean() + LAMBDA * ((input_norms(critic, at) - 1) ** 2).mean()
    assert_alike(taken, list(gradients(loss, critic)))
    assert_alike(metrics.critic_loss, loss.detach())


@covers("drift, `0.001 * mean(D(real) ** 2)`")
def test_drift():
    own, critic = terms(PENALTIES["drift, `0.001 * mean(D(real) ** 2)`"]), steep()
    assert list(own) == ["critic_term"]
    taken, metrics, real, fake, eps = step(GradientPenalty(10), steep(), **own)
    loss = critic(fake).mean() - critic(real).mean() + 10 * textbook(critic, real, fake, eps)
    loss = loss + 0.001 * (critic(real) ** 2).mean()
    assert_alike(taken, list(gradients(loss, critic)))
    assert_alike(metrics.critic_loss, loss.detach())


def test_every_row_is_covered():
    assert (SIGNS | PENALTIES).keys() == COVERED
    assert len(SIGNS) + len(PENALTIES) == len(COVERED)  # no row is in both
