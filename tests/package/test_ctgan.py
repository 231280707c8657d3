"""CTGAN (arXiv 1907.00503) by a Trainer: packs of rows, other conditions for fake rows than for real ones, and the
generator's cross entropy on the column that its condition names.

Beside a plain loop, and beside the ctgan package's own training where that is installed.
"""

# ruff: noqa: NPY002 - the package draws from NumPy's global generator

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_trainers import quietly, weights
from torch import nn

from fastwgan import GradientPenalty, Trainer, reference

PACK, BATCH, LATENT, SEED = 5, 20, 6, 3
# Of a row: a continuous column (its value and its mode) and two discrete ones, which conditions name.
SPANS = (("tanh", 1), ("softmax", 3), ("softmax", 4), ("softmax", 2))
DISCRETE = SPANS[2:]


class Residual(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, out), nn.BatchNorm1d(out), nn.ReLU())

    def forward(self, x):
        return torch.cat((self.layers(x), x), 1)


class Rows(nn.Module):
    """A generator of rows; returns them, and the logits that its conditional loss is of."""

    def __init__(self, network, activate):
        super().__init__()
        self.network, self.activate = network, activate

    def forward(self, z, c, mask=None):
        logits = self.network(torch.cat((z, c), 1))
        return self.activate(logits), logits


class PackedCritic(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, rows, c, mask=None):
        return self.network(torch.cat((rows, c), 1))


def activate(logits):
    parts = logits.split([n for _, n in SPANS], 1)
    return torch.cat(
        [
            x.tanh() if kind == "tanh" else F.gumbel_softmax(x, tau=0.2)
            for (kind, _), x in zip(SPANS, parts, strict=True)
        ],
        1,
    )


def conditional_loss(logits, c):
    """The mean over the rows of the cross entropy of the column that a row's condition names."""
    parts = logits.split([n for _, n in SPANS], 1)[2:]
    wanted = c.split([n for _, n in DISCRETE], 1)
    each = [F.cross_entropy(x, w.argmax(1), reduction="none") * w.sum(1) for x, w in zip(parts, wanted, strict=True)]
    return torch.stack(each, 1).sum(1).mean()


def networks():
    width, rows = sum(n for _, n in DISCRETE), sum(n for _, n in SPANS)
    generator = nn.Sequential(
        Residual(LATENT + width, 8), Residual(LATENT + width + 8, 8), nn.Linear(LATENT + width + 16, rows)
    )
    hidden = (
        nn.Linear(PACK * (rows + width), 16),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.5),
        nn.Linear(16, 16),
        nn.LeakyReLU(0.2),
    )
    critic = nn.Sequential(nn.Unflatten(0, (-1, PACK)), nn.Flatten(), *hidden, nn.Dropout(0.5), nn.Linear(16, 1))
    return Rows(generator, activate).double(), PackedCritic(critic).double()


def conditions(n):
    """Return one-hot conditions, each of which names a column and a value of it."""
    column = torch.randint(len(DISCRETE), (n,))
    value = torch.stack([torch.randint(width, (n,)) for _, width in DISCRETE])[column, torch.arange(n)]
    start = torch.tensor([0, DISCRETE[0][1]])[column]
    return F.one_hot(start + value, sum(width for _, width in DISCRETE)).double()


def data(iterations):
    """Return for each iteration (real rows, their conditions, those of the fake rows, those of the generator step)."""

    def part():
        fake = conditions(BATCH)
        real = torch.cat(
            [torch.rand(BATCH, 1) * 2 - 1, *[F.one_hot(torch.randint(n, (BATCH,)), n) for _, n in SPANS[1:]]], 1
        )
        return real.double(), fake[torch.randperm(BATCH)], fake, conditions(BATCH)

    return [part() for _ in range(iterations)]


def optimizers(generator, critic):
    return [torch.optim.Adam(m.parameters(), lr=2e-3, betas=(0.5, 0.9), weight_decay=1e-6) for m in (critic, generator)]


def plain_loop(generator, critic, batches):
    of_critic, of_generator = optimizers(generator, critic)
    for i, (real, c_real, c_fake, c_generator) in enumerate(batches):
        fake, _ = generator(torch.randn(BATCH, LATENT).double(), c_fake)
        real_rows, fake_rows = torch.cat((real, c_real), 1), torch.cat((fake.detach(), c_fake), 1)
        loss = -(critic.network(real_rows).mean() - critic.network(fake_rows).mean())
        eps = reference.uniform(SEED, i * BATCH // PACK, BATCH // PACK).double().repeat_interleave(PACK)[:, None]
        x = (eps * real_rows + (1 - eps) * fake_rows).requires_grad_()
        scores = critic.network(x)
        (gradient,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)
        norms = gradient.view(BATCH // PACK, -1).norm(dim=1)
        of_critic.zero_grad()
        (loss + 10 * ((norms - 1) ** 2).mean()).backward()
        of_critic.step()
        fake, logits = generator(torch.randn(BATCH, LATENT).double(), c_generator)
        loss = conditional_loss(logits, c_generator) - critic(fake, c_generator).mean()
        of_generator.zero_grad()
        loss.backward()
        of_generator.step()
    return loss.detach()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shared", [False, True], ids=["two passes", "one pass"])
def test_a_whole_loop_is_the_plain_one(backend, shared):
    torch.manual_seed(0)
    generator, critic = networks()
    if shared:  # one pass draws one mask for all samples, which is another one than two passes draw
        for m in critic.modules():
            m.p = 0.0 if isinstance(m, nn.Dropout) else None
    plain, batches = copy.deepcopy((generator, critic)), data(6)
    given = dict(zip(("critic_optimizer", "generator_optimizer"), optimizers(generator, critic), strict=True))
    trainer = quietly(
        Trainer, generator, critic, latent=lambda n, device: torch.randn(n, LATENT).double(), seed=SEED, pack=PACK,
        constraint=GradientPenalty(10.0), backend=backend, independent_samples=shared, **given,
        generator_term=lambda s: conditional_loss(s.outputs.generator[0], *s.fake_cond),
    )  # fmt: skip
    torch.manual_seed(1)
    for real, c_real, c_fake, c_generator in batches:
        trainer.critic_step(real, c_real, fake_cond=(c_fake,))
        metrics = trainer.generator_step(BATCH, c_generator)
    torch.manual_seed(1)
    loss = plain_loop(*plain, batches)
    torch.testing.assert_close(metrics.generator_loss, loss, rtol=1e-9, atol=1e-10)
    for ours, theirs in zip((generator, critic), plain, strict=True):
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-8, atol=1e-9)


def test_a_whole_loop_is_the_ctgan_packages_own(monkeypatch):
    """Its networks, condition vectors, activations and conditional loss. No dropout, as it scores fake rows first."""
    package = pytest.importorskip("ctgan.synthesizers.ctgan")
    pandas = pytest.importorskip("pandas")
    monkeypatch.setattr(package, "Dropout", lambda p: nn.Dropout(0.0))
    offsets = iter(range(0, 10**6, BATCH // PACK))

    def eps(*size, device):
        return reference.uniform(SEED, next(offsets), size[0], device).view(size)

    np.random.seed(0)
    columns = {
        "x": np.random.randn(200),
        "colour": np.random.choice([*"rgb"], 200),
        "kind": np.random.choice([*"ab"], 200),
    }
    frame, discrete = pandas.DataFrame(columns), ["colour", "kind"]
    options = {"embedding_dim": LATENT, "generator_dim": (16, 16), "discriminator_dim": (16, 16), "pac": PACK}
    model = package.CTGAN(**options, batch_size=BATCH, epochs=2, log_frequency=True, enable_gpu=False)
    np.random.seed(1), torch.manual_seed(1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", eps)
        model.fit(frame, discrete)

    np.random.seed(1), torch.manual_seed(1)
    transformer = package.DataTransformer()
    transformer.fit(frame, discrete)
    table = transformer.transform(frame)
    sampler = package.DataSampler(table, transformer.output_info_list, True)
    width = sampler.dim_cond_vec()
    generator = package.Generator(LATENT + width, (16, 16), transformer.output_dimensions)
    critic = package.Discriminator(transformer.output_dimensions + width, (16, 16), pac=PACK)
    adams = [
        torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.9), weight_decay=1e-6) for m in (critic, generator)
    ]
    trainer = quietly(
        Trainer, Rows(generator, model._apply_activate), PackedCritic(critic), pack=PACK, seed=SEED,
        latent=lambda n, device: torch.randn(n, LATENT), constraint=GradientPenalty(10.0), critic_optimizer=adams[0],
        generator_optimizer=adams[1], generator_term=lambda s: model._cond_loss(s.outputs.generator[0], *s.fake_cond),
    )  # fmt: skip
    for _ in range(2 * len(table) // BATCH):
        c, mask, column, value = sampler.sample_condvec(BATCH)
        order = np.random.permutation(np.arange(BATCH))
        real = torch.from_numpy(sampler.sample_data(table, BATCH, column[order], value[order]).astype("float32"))
        c, mask = torch.from_numpy(c), torch.from_numpy(mask)
        metrics = trainer.critic_step(real, c[order], mask[order], fake_cond=(c, mask))
        metrics.include(trainer.generator_step(BATCH, *map(torch.from_numpy, sampler.sample_condvec(BATCH)[:2])))
    theirs = model.loss_values.iloc[-1]
    torch.testing.assert_close(metrics.generator_loss.item(), theirs["Generator Loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(-metrics.wasserstein.item(), theirs["Discriminator Loss"], rtol=1e-4, atol=1e-5)
    for (name, ours), weight in zip(generator.named_parameters(), model._generator.parameters(), strict=True):
        if not name.endswith("fc.bias"):  # BatchNorm takes it away, so its gradient is rounding, which Adam enlarges
            torch.testing.assert_close(ours, weight, rtol=1e-4, atol=1e-5)
