"""Further terms of the losses, each a line or two, against plain loops in float64 whose losses are written out and
differentiated by autograd; conditions of fake samples; and what to write for the keywords that are gone.
"""

import copy
import functools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from count_launches import count_kernels, ours
from small_trainers import PAIRS, weights
from torch import nn
from whole_loop import assert_as_plain, wgan, wgan_of_generator

import fastwgan
from fastwgan import GradientPenalty, Trainer, WeightClip, functional

F64 = torch.float64
BACKENDS = ("triton", "torch")
CLIP, PENALTY = WeightClip(0.05), GradientPenalty()
CLASSES, SAMPLES = 3, 8


# Networks: of conditions, and with further outputs


def numbers(cond, like):
    """Conditions as rows of numbers: labels are one-hot."""
    return [(c if c.is_floating_point() else F.one_hot(c, CLASSES)).to(like.dtype) for c in cond]


class Conditional(nn.Module):
    """A network of its input and conditions side by side."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, *cond):
        return self.network(torch.cat((x, *numbers(cond, x)), 1))


class TwoHeads(nn.Module):
    """A critic that returns scores, and behind them what a second head makes of the same features; or these."""

    def __init__(self, classes=0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 16), nn.LeakyReLU(0.2), nn.Linear(16, 12), nn.Tanh())
        self.scores, self.logits = nn.Linear(12, 1), nn.Linear(12, classes) if classes else None

    def forward(self, x, *cond):
        h = self.body(x)
        return self.scores(h), h if self.logits is None else self.logits(h)


class Embedder(nn.Module):
    """A generator that returns its hidden features behind its samples."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 10)

    def forward(self, z):
        h = self.inner(z)
        return self.outer(h), h


def plain():
    return PAIRS["mlp"]()


def conditional():
    generator, critic = nn.Sequential(nn.Linear(6 + CLASSES, 12), nn.Tanh(), nn.Linear(12, 10)), nn.Sequential(
        nn.Linear(10 + CLASSES, 16), nn.LeakyReLU(0.2), nn.Linear(16, 12), nn.Softplus(), nn.Linear(12, 1)
    )  # fmt: skip
    return Conditional(generator).double(), Conditional(critic).double(), (10,), 6


def classifying():
    return conditional()[0], TwoHeads(CLASSES).double(), (10,), 6


def featured():
    return plain()[0], TwoHeads().double(), (10,), 6


def embedding():
    return Embedder().double(), plain()[1], (10,), 6


class Pairs(nn.Module):
    """Two samples side by side."""

    def forward(self, x):
        return x.reshape(-1, 20)


def packing():
    critic = nn.Sequential(
        Pairs(), nn.Linear(20, 16), nn.LeakyReLU(0.2), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 1)
    )
    return plain()[0], critic.double(), (10,), 6


def labels(random):
    """Those of real samples and of fake ones, in tuples."""
    return tuple((torch.randint(CLASSES, (SAMPLES,), generator=random),) for _ in range(2))


def one_hot(random):
    return tuple((F.one_hot(label, CLASSES).double(),) for (label,) in labels(random))


def shared(random):
    """Numbers that real and fake samples have in common."""
    return (torch.randn(SAMPLES, CLASSES, dtype=F64, generator=random),), None


# The terms, and the losses that they come to


ALPHA = alpha = 0.3
BLEND = {
    "critic_term": lambda s: alpha * (F.softplus(-s.real_scores).mean() + F.softplus(s.fake_scores).mean()
                                      - functional.critic_loss(s.real_scores, s.fake_scores)),
    "generator_term": lambda s: alpha * (F.softplus(-s.fake_scores).mean() - functional.generator_loss(s.fake_scores)),
}  # fmt: skip
GAN = {
    "critic_term": lambda s: (F.softplus(-s.real_scores).mean() + F.softplus(s.fake_scores).mean()
                              - functional.critic_loss(s.real_scores, s.fake_scores)),
    "generator_term": lambda s: F.softplus(-s.fake_scores).mean() - functional.generator_loss(s.fake_scores),
}  # fmt: skip
DRIFT = {"critic_term": lambda s: 0.001 * s.real_scores.square().mean()}
HINGE = {
    "critic_term": lambda s: (sum(functional.hinge_critic_loss(s.real_scores, s.fake_scores))
                              - functional.critic_loss(s.real_scores, s.fake_scores)),
}  # fmt: skip
RELATIVISTIC = {  # RSGAN, arXiv 1807.00734
    "critic_term": lambda s: (F.softplus(s.fake_scores - s.real_scores).mean()
                              - functional.critic_loss(s.real_scores, s.fake_scores)),
    "generator_term": lambda s: (F.softplus(s.real_scores - s.fake_scores).mean()
                                 - functional.generator_loss(s.fake_scores)),
}  # fmt: skip
L1 = {"generator_term": lambda s: 100 * (s.fake - s.real).abs().mean()}  # pix2pix, arXiv 1611.07004
AC = {  # arXiv 1610.09585; so is it with labels as rows of numbers
    "critic_term": lambda s: (F.cross_entropy(s.outputs.real[0], s.cond[0])
                              + F.cross_entropy(s.outputs.fake[0], s.fake_cond[0])),
    "generator_term": lambda s: F.cross_entropy(s.outputs.fake[0], s.fake_cond[0]),
}  # fmt: skip
FEATURES = {"generator_term": lambda s: (s.outputs.real[0].mean(0) - s.outputs.fake[0].mean(0)).square().sum()}
SQUARE = {
    "critic_term": lambda s: 0.5 * (s.real_scores.mean() - s.fake_scores.mean()).square(),
    "generator_term": lambda s: 0.5 * (s.real_scores.mean() - s.fake_scores.mean()).square(),
}
HIDDEN = {
    "critic_term": lambda s: (s.real_scores * s.outputs.generator[0].square().mean()).mean(),
    "generator_term": lambda s: 0.1 * s.outputs.generator[0].square().mean(),
}


def gan(s):
    """By logarithms of sigmoids, as its paper has it."""
    return -s.real_scores.sigmoid().log().mean() - (1 - s.fake_scores.sigmoid()).log().mean()


def gan_of_generator(s):
    return -s.fake_scores.sigmoid().log().mean()


def blended(share, loss, other):
    return lambda s: (1 - share) * loss(s) + share * other(s)


def with_drift(s):
    return wgan(s) + 0.001 * (s.real_scores**2).mean()


def hinge(s):
    return (1 - s.real_scores).clamp(min=0).mean() + (1 + s.fake_scores).clamp(min=0).mean()


def relativistic(s):
    return -(s.real_scores - s.fake_scores).sigmoid().log().mean()


def relativistic_of_generator(s):
    return -(s.fake_scores - s.real_scores).sigmoid().log().mean()


def to_target(s):
    return wgan_of_generator(s) + 100 * (s.fake - s.real).abs().sum() / s.real.numel()


def classified(logits, cond):
    """Minus the mean logarithm of the probability of a sample's class."""
    return -(numbers(cond, logits)[0] * (logits - logits.logsumexp(1, keepdim=True))).sum(1).mean()


def classifying_loss(s):
    return wgan(s) + classified(s.of_real[0], s.cond) + classified(s.of_fake[0], s.fake_cond)


def classifying_loss_of_generator(s):
    return wgan_of_generator(s) + classified(s.of_fake[0], s.fake_cond)


def matching(s):
    difference = s.of_real[0].sum(0) / SAMPLES - s.of_fake[0].sum(0) / SAMPLES
    return wgan_of_generator(s) + (difference**2).sum()


def square(base):
    return lambda s: base(s) + (s.real_scores.mean() - s.fake_scores.mean()) ** 2 / 2


def both(critic_loss=wgan, generator_loss=wgan_of_generator):
    return {"critic_loss": critic_loss, "generator_loss": generator_loss}


BLENDED = both(blended(ALPHA, wgan, gan), blended(ALPHA, wgan_of_generator, gan_of_generator))
CLASSIFIED = both(classifying_loss, classifying_loss_of_generator)
CASES = {  # networks, constraint, terms, the losses they come to, other options
    "drift": (plain, PENALTY, DRIFT, both(with_drift), {}),
    "drift beside a clip": (plain, CLIP, DRIFT, both(with_drift), {}),
    "drift of packs": (packing, PENALTY, DRIFT, both(with_drift), {"pack": 2}),
    "blend": (plain, CLIP, BLEND, BLENDED, {}),
    "blend under a lazy penalty": (plain, GradientPenalty(every=2), BLEND, BLENDED, {}),
    "blend of convolutions": (PAIRS["conv"], PENALTY, BLEND, BLENDED, {}),
    "blend in separate passes": (PAIRS["batchnorm"], CLIP, BLEND, BLENDED, {}),
    "the GAN": (plain, PENALTY, GAN, both(gan, gan_of_generator), {}),
    "hinge": (plain, CLIP, HINGE, both(hinge), {}),
    "hinge under DRAGAN": (plain, GradientPenalty(at="perturbed"), HINGE, both(hinge), {}),
    "relativistic": (plain, PENALTY, RELATIVISTIC, both(relativistic, relativistic_of_generator), {}),
    "relativistic in separate passes": (
        PAIRS["batchnorm"], CLIP, RELATIVISTIC, both(relativistic, relativistic_of_generator), {}
    ),
    "pix2pix": (conditional, CLIP, L1, both(wgan, to_target), {"conditions": shared}),
    "AC-GAN": (classifying, CLIP, AC, CLASSIFIED, {"conditions": labels}),
    "AC-GAN in one pass": (classifying, CLIP, AC, CLASSIFIED, {"conditions": labels, "independent_samples": True}),
    "AC-GAN under a penalty": (classifying, PENALTY, AC, CLASSIFIED, {"conditions": one_hot}),
    "AC-GAN under R1": (
        classifying, GradientPenalty(5.0, kind="zero-centered", at="real"), AC, CLASSIFIED, {"conditions": labels}
    ),
    "feature matching": (featured, CLIP, FEATURES, both(wgan, matching), {}),
    "feature matching in one pass": (
        featured, PENALTY, FEATURES, both(wgan, matching), {"independent_samples": True}
    ),
    "a square of both means": (plain, CLIP, SQUARE, both(square(wgan), square(wgan_of_generator)), {}),
    "the generator's outputs": (
        embedding, CLIP, HIDDEN,
        both(
            lambda s: wgan(s) + s.real_scores.mean() * (s.generated[0] ** 2).mean(),
            lambda s: wgan_of_generator(s) + (s.generated[0] ** 2).mean() / 10,
        ),
        {},
    ),
}  # fmt: skip


def compare(name, **settings):
    torch.manual_seed(0)
    networks, constraint, terms, losses, options = CASES[name]
    return assert_as_plain(networks(), constraint, terms=terms, losses=losses, **options, **settings)


SHARING = {name for name, (networks, *_) in CASES.items() if networks in (plain, embedding, PAIRS["conv"])}
SHARING |= {name for name in CASES if name.endswith("in one pass")}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_steps_are_the_plain_loops_with_the_loss_written_out(name, backend):
    trainer = compare(name, backend=backend)
    assert trainer._steps.sharing.together is (name in SHARING)


@pytest.mark.parametrize(
    "name",
    [
        "drift of packs", "blend under a lazy penalty", "hinge", "relativistic", "pix2pix", "AC-GAN in one pass",
        "AC-GAN under a penalty", "feature matching", "the generator's outputs",
    ],
)  # fmt: skip
def test_compiled_steps(name, traced_only):
    with torch._dynamo.config.patch(error_on_recompile=True):
        compare(name, backend="torch", compile=True)


def decay(module):
    return lambda s: 0.1 * sum(p.square().sum() for p in module.parameters())


def decayed(loss, of):
    return lambda s: loss(s) + sum((p**2).sum() for p in getattr(s, of).parameters()) / 10


def of_weights(generator, critic):
    losses = both(decayed(wgan, "critic"), decayed(wgan_of_generator, "generator"))
    return {"critic_term": decay(critic), "generator_term": decay(generator)}, losses


def of_passes(generator, critic):
    """Consistency under a change of the samples, which takes passes of the critic."""
    terms = {
        "critic_term": lambda s: 10 * (critic(0.9 * s.real) - s.real_scores).square().mean(),
        "generator_term": lambda s: critic(0.9 * s.fake).square().mean(),
    }
    losses = both(
        lambda s: wgan(s) + 10 * ((s.critic(0.9 * s.real) - s.real_scores) ** 2).mean(),
        lambda s: wgan_of_generator(s) + (s.critic(0.9 * s.fake) ** 2).mean(),
    )
    return terms, losses


@pytest.mark.parametrize("how", ["triton", "torch", "compiled"])
@pytest.mark.parametrize("constraint", [CLIP, PENALTY], ids=["clip", "penalty"])
@pytest.mark.parametrize("make", [of_weights, of_passes], ids=["weights", "passes"])
def test_a_term_of_the_networks_themselves(make, constraint, how, request):
    if how == "compiled":
        request.getfixturevalue("traced_only")
    torch.manual_seed(0)
    generator, critic, *rest = plain()
    terms, losses = make(generator, critic)
    settings = {"backend": "torch", "compile": True} if how == "compiled" else {"backend": how}
    assert_as_plain((generator, critic, *rest), constraint, terms=terms, losses=losses, **settings)


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_a_terms_value_is_that_of_before_the_update(how, request):
    """Though the term is a parameter itself."""
    if how == "compiled":
        request.getfixturevalue("traced_only")
    generator, critic, shape, latent = plain()
    critic.register_parameter("extra", nn.Parameter(torch.tensor(0.04, dtype=F64)))
    trainer = Trainer(
        generator, critic, latent=latent, constraint=CLIP, compile=how == "compiled", backend="torch",
        critic_term=lambda s: critic.extra,
    )  # fmt: skip
    for _ in range(2):
        before = critic.extra.item()
        metrics = trainer.critic_step(torch.randn(4, *shape, dtype=F64))
        assert critic.extra.item() < before
        assert metrics.critic_term == before


# Conditions of fake samples that are others than the real ones'


def several(random):
    """One that differs, one that both have, one that differs."""
    (a,), (b,) = one_hot(random)
    c, d, e = (torch.randn(SAMPLES, n, dtype=F64, generator=random) for n in (2, 1, 1))
    return (a, c, d), (b, c, e)


def of_several():
    generator = nn.Sequential(nn.Linear(6 + CLASSES + 3, 12), nn.Tanh(), nn.Linear(12, 10))
    critic = nn.Sequential(nn.Linear(10 + CLASSES + 3, 16), nn.Softplus(), nn.Linear(16, 1))
    return Conditional(generator).double(), Conditional(critic).double(), (10,), 6


POINTS = {
    "clip": CLIP, "interpolates": PENALTY, "real": GradientPenalty(at="real"), "fake": GradientPenalty(at="fake"),
    "perturbed": GradientPenalty(at="perturbed"),
}  # fmt: skip
WAYS = {
    "triton": {"backend": "triton"}, "torch": {"backend": "torch"}, "one pass": {"independent_samples": True},
    "compiled": {"backend": "torch", "compile": True},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("point", POINTS)
def test_conditions_of_fake_samples(point, way, request):
    if way == "compiled":
        request.getfixturevalue("traced_only")
    torch.manual_seed(0)
    trainer = assert_as_plain(of_several(), POINTS[point], conditions=several, **WAYS[way])
    assert trainer._steps.sharing.together is (way == "one pass")


def test_conditions_that_are_the_same_are_no_others():
    """Though they are given twice: real and fake samples then have the penalty at points between samples alone."""
    cond = (torch.randn(SAMPLES, CLASSES + 3, dtype=F64),)
    found = []
    for fake_cond in (None, cond, list(cond)):
        torch.manual_seed(0)
        generator, critic, shape, latent = of_several()
        trainer = Trainer(generator, critic, latent=latent, constraint=PENALTY, n_critic=1)
        for _ in range(3):
            trainer.step(torch.randn(SAMPLES, *shape, dtype=F64), *cond, fake_cond=fake_cond)
        found.append(weights(critic))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# The same in README


ROWS = {
    "drift": DRIFT, "alpha of the non-saturating GAN": BLEND, "hinge": HINGE, "relativistic pairs": RELATIVISTIC,
    "classes, AC-GAN": AC, "L1 to a target": L1, "feature matching": FEATURES,
    "CTGAN's condition": None,  # in test_ctgan.py
}  # fmt: skip
README = (Path(__file__).parents[2] / "README.md").read_text()
(TABLE,) = re.findall(r"^\| term \| of the critic.*\n\|(?:---\|)+\n((?:\|.*\n)+)", README, re.MULTILINE)
CELLS = [[cell.strip() for cell in row.strip("|").split("|")] for row in TABLE.splitlines()]


@pytest.mark.parametrize(("cells", "row"), [*zip(CELLS, ROWS, strict=True)], ids=ROWS)
def test_readme_has_these_lines(cells, row):
    title, *lines = cells
    assert title.startswith(row)
    random = torch.Generator().manual_seed(0)
    real, fake, real_scores, fake_scores, *logits = torch.randn(6, SAMPLES, CLASSES, dtype=F64, generator=random)
    cond, fake_cond = labels(random)
    outputs = SimpleNamespace(real=logits[:1], fake=logits[1:], generator=logits[:1])
    record = SimpleNamespace(
        real=real, fake=fake, real_scores=real_scores, fake_scores=fake_scores, cond=cond, fake_cond=fake_cond,
        outputs=outputs,
    )  # fmt: skip
    terms = ROWS[row] or {"generator_term": lambda s: F.cross_entropy(s.outputs.generator[0], *s.fake_cond)}
    names = {"F": F, "L": functional, "alpha": alpha, "cond_loss": F.cross_entropy}
    for name, line in zip(("critic_term", "generator_term"), lines, strict=True):
        assert bool(line) is (name in terms)
        if line:
            assert torch.equal(eval(f"lambda s: {line.strip('`')}", names)(record), terms[name](record))


# What a term costs


class Counting(nn.Module):
    """A critic that counts its passes."""

    def __init__(self, critic):
        super().__init__()
        self.critic, self.passes = critic, 0

    def forward(self, x):
        self.passes += 1
        return self.critic(x)


def asking(times):
    """A term that asks for the real samples' scores so many times."""
    return lambda s: s.fake_scores.square().mean() + 0.1 * sum(s.real_scores.mean() for _ in range(times))


@pytest.mark.parametrize(("word", "passes"), [(False, 2), (True, 1)])
def test_a_critics_term_takes_no_pass(word, passes):
    generator, critic, shape, latent = plain()
    critic = Counting(critic)
    trainer = Trainer(
        generator, critic, latent=latent, constraint=CLIP, critic_term=asking(3), independent_samples=word
    )
    trainer.critic_step(torch.randn(4, *shape, dtype=F64))
    assert critic.passes == passes


@pytest.mark.parametrize(("times", "passes"), [(0, 1), (1, 2), (3, 2)])
def test_a_generators_term_takes_a_pass_of_real_samples_if_it_asks(times, passes):
    generator, critic, shape, latent = plain()
    critic = Counting(critic)
    trainer = Trainer(generator, critic, latent=latent, constraint=CLIP, generator_term=asking(times))
    trainer.generator_step(4, real=torch.randn(4, *shape, dtype=F64))
    assert critic.passes == passes


@pytest.mark.emulated
@pytest.mark.parametrize("constraint", [CLIP, PENALTY], ids=["clip", "penalty"])
def test_a_term_launches_nothing_of_ours(constraint):
    launched = []
    for terms in ({}, {"critic_term": DRIFT["critic_term"], "generator_term": asking(1)}):
        generator, critic, shape, latent = plain()
        trainer = Trainer(
            generator, critic, latent=latent, backend="triton", constraint=constraint, n_critic=1, **terms
        )
        real = torch.randn(4, *shape, dtype=F64)
        trainer.step(real)
        with count_kernels() as counts:
            trainer.step(real)
        launched.append(ours(counts))
    assert launched[0] == launched[1]


# Further outputs of a pass that real and fake samples share


class Nested(nn.Module):
    """A critic whose further outputs are a dict, in which there is more than tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(10, 4), nn.Linear(4, 1)

    def forward(self, x):
        h = self.first(x).tanh()
        return self.last(h), {"features": [h, 2 * h], "width": 4, "none": None}


@pytest.mark.parametrize("together", [False, True])
def test_further_outputs_may_be_nested(together):
    seen = []

    def term(s):
        seen.append(s)
        (of_real,), (of_fake,) = s.outputs.real, s.outputs.fake
        return (of_real["features"][1] - of_fake["features"][0]).square().mean()

    torch.manual_seed(0)
    generator, _, shape, latent = plain()
    critic = Nested().double()
    real, twin = torch.randn(4, *shape, dtype=F64), copy.deepcopy(critic)
    trainer = Trainer(generator, critic, latent=latent, critic_term=term, independent_samples=together)
    metrics = trainer.critic_step(real)
    assert trainer._steps.sharing.together is together
    ((_, of_real), (_, of_fake)) = twin(real), twin(seen[0].fake)
    for (found,), expected in ((seen[0].outputs.real, of_real), (seen[0].outputs.fake, of_fake)):
        torch.testing.assert_close(found, expected)
    expected = (of_real["features"][1] - of_fake["features"][0]).square().mean().detach()
    torch.testing.assert_close(metrics.critic_term, expected)
    assert seen[0].real is real
    assert seen[0].outputs.generator == ()


@pytest.mark.parametrize("ema", [None, 0.5])
def test_samples_come_without_further_outputs(ema):
    generator, critic, shape, latent = embedding()
    trainer = Trainer(generator, critic, latent=latent, ema=ema)
    trainer.step(torch.randn(4, *shape, dtype=F64))
    found = trainer.sample(3, seed=5, ema=ema is not None)
    assert found.shape == (3, *shape)


# In a step of its own


def test_generator_steps_of_ones_own_take_real_samples():
    """As Trainer.step gives them."""
    found = []
    for own in (False, True):
        torch.manual_seed(0)
        generator, critic, shape, latent = plain()
        trainer = Trainer(generator, critic, latent=latent, constraint=PENALTY, n_critic=1, **RELATIVISTIC)
        for _ in range(3):
            real = torch.randn(SAMPLES, *shape, dtype=F64)
            if own:
                trainer.critic_step(real)
                metrics = trainer.generator_step(SAMPLES, real=real)
                assert metrics.critic_term is None
            else:
                metrics = trainer.step(real)
            assert {"generator_term", "generator_loss"} <= metrics.as_dict().keys()
        found.append(weights(generator))
    assert torch.equal(*found)


def test_a_term_may_ignore_that_there_are_no_real_samples():
    generator, critic, _, latent = plain()
    trainer = Trainer(generator, critic, latent=latent, generator_term=GAN["generator_term"])
    metrics = trainer.generator_step(4)
    assert metrics.generator_term.isfinite()


# Keywords that are gone


REAL, FAKE = (2 * torch.randn(7, 1, dtype=F64, generator=torch.Generator().manual_seed(i)) for i in range(2))
SCORES = SimpleNamespace(real_scores=REAL, fake_scores=FAKE)
NAMES = {"F": F, "fastwgan": fastwgan, "blend": ALPHA, "drift": 0.2}


def advised(call, name, **given):
    """What a removed keyword's error says to write."""
    with pytest.raises(TypeError, match=f"^{name}: was removed; write ") as raised:
        call(**given)
    return str(raised.value).partition("; write ")[2]


def terms_of(advice):
    """The terms of such advice, by their keywords."""
    lines = re.split(r" and (?=generator_term=)", advice.removesuffix(", F being torch.nn.functional"))
    return {name: eval(line, dict(NAMES)) for name, line in (line.split("=", 1) for line in lines)}


@pytest.mark.parametrize(
    ("name", "losses"),
    [("blend", BLENDED), ("drift", both(lambda s: wgan(s) + 0.2 * (s.real_scores**2).mean()))],
)
@pytest.mark.parametrize("of", ["trainer", "verify"])
def test_what_is_to_be_written_for_removed_options(of, name, losses):
    torch.manual_seed(0)
    generator, critic, shape, latent = plain()
    call = {
        "trainer": functools.partial(Trainer, generator, critic, latent=latent),
        "verify": functools.partial(fastwgan.verify, generator, critic, torch.randn(8, *shape, dtype=F64)),
    }[of]
    terms = terms_of(advised(call, name, **{name: NAMES[name]}))
    assert set(terms) == ({"critic_term", "generator_term"} if name == "blend" else {"critic_term"})
    if of == "verify":
        report = call(**terms)
        assert report.passed, report
        assert {row.step for row in report.rows if row.op == "term"} == {key.removesuffix("_term") for key in terms}
    assert_as_plain((generator, critic, shape, latent), CLIP, terms=terms, losses=losses, backend="torch")


def test_what_is_to_be_written_for_removed_options_of_losses():
    critic_loss, generator_loss = functional.critic_loss, functional.generator_loss
    for call, name, expected in (
        (functools.partial(critic_loss, REAL, FAKE), "blend", blended(ALPHA, wgan, gan)(SCORES)),
        (functools.partial(critic_loss, REAL, FAKE), "drift", wgan(SCORES) + 0.2 * (REAL**2).mean()),
        (functools.partial(generator_loss, FAKE), "blend",
         blended(ALPHA, wgan_of_generator, gan_of_generator)(SCORES)),
    ):  # fmt: skip
        line, _, where = advised(call, name, **{name: NAMES[name]}).partition(", F being ")
        assert where in ("", "torch.nn.functional")
        line = line.replace("critic_loss(...)", "critic_loss(real_scores, fake_scores)")
        line = line.replace("generator_loss(...)", "generator_loss(fake_scores)")
        found = eval(line, NAMES | vars(SCORES) | {"critic_loss": critic_loss, "generator_loss": generator_loss})
        torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match="^got an unexpected keyword argument 'drift'$"):
        generator_loss(FAKE, drift=0.1)  # which it never had
