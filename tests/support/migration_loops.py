"""Somebody's training loop and ours, from the same weights on the same samples, and README's section about them."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from fastwgan import Trainer, WeightClip

README = (Path(__file__).parents[2] / "README.md").read_text()
SECTION = re.search(r"## Coming from another WGAN\n(.*?)\n## ", README, re.DOTALL)[1]
N, LATENT, WIDTH = 8, 3, 4
BOUND = 0.05
RMSPROP, ADAM = (torch.optim.RMSprop, {"lr": 1e-3}), (torch.optim.Adam, {"lr": 1e-3, "betas": (0.0, 0.9)})
ONE = torch.tensor(1.0, dtype=torch.float64)
MONE = -ONE


@pytest.fixture(autouse=True)
def _float64():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # networks this small only wait for more
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


def networks():
    torch.manual_seed(1)
    generator = nn.Sequential(nn.Linear(LATENT, 8), nn.Tanh(), nn.Linear(8, WIDTH))
    return generator, nn.Sequential(nn.Linear(WIDTH, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def data(steps):
    random = torch.Generator().manual_seed(2)
    return [torch.randn(N, WIDTH, generator=random) + 1 for _ in range(steps)]


def noise(n, device=None):
    return torch.randn(n, LATENT, device=device)


def optimizers(generator, critic, choice):
    kind, options = choice
    return kind(generator.parameters(), **options), kind(critic.parameters(), **options)


def clamp(critic, bound=BOUND):
    for p in critic.parameters():
        p.data.clamp_(-bound, bound)


def subtract(critic, real, fake):
    """The critic's backward pass as most code has it."""
    (critic(fake).mean() - critic(real).mean()).backward()


def loop(
    steps, critic_backward=subtract, generator_sign=-1, *, optimizer=RMSPROP, due=lambda i: i % 5 == 4,
    before=lambda critic: None, after=clamp, before_generator=lambda critic: None,
):  # fmt: skip
    """Somebody's loop, with its own backward passes, clamps and counting; (generator, critic) at its end."""
    generator, critic = networks()
    generator_optimizer, critic_optimizer = optimizers(generator, critic, optimizer)
    torch.manual_seed(3)
    for i, real in enumerate(data(steps)):
        before(critic)
        critic_optimizer.zero_grad()
        critic_backward(critic, real, generator(noise(N)).detach())
        critic_optimizer.step()
        after(critic)
        if due(i):
            before_generator(critic)
            generator_optimizer.zero_grad()
            (generator_sign * critic(generator(noise(N))).mean()).backward()
            generator_optimizer.step()
    return generator, critic


def ours(steps, *, optimizer=RMSPROP, prepare=lambda critic: None, **options):
    """The same by a trainer, from the same weights, on the same samples and latents."""
    generator, critic = networks()
    prepare(critic)
    generator_optimizer, critic_optimizer = optimizers(generator, critic, optimizer)
    trainer = Trainer(
        generator, critic, latent=noise, backend="torch", critic_optimizer=critic_optimizer,
        generator_optimizer=generator_optimizer, **{"constraint": WeightClip(BOUND)} | options,
    )  # fmt: skip
    torch.manual_seed(3)
    for real in data(steps):
        trainer.step(real)
    return generator, critic


def same(actual, expected, rtol=1e-9):
    a, e = (torch.cat([p.detach().flatten() for p in module.parameters()]) for module in (actual, expected))
    return torch.allclose(a, e, rtol=rtol, atol=1e-3 * rtol)


def negate_last(critic):
    with torch.no_grad():
        for p in critic[-1].parameters():
            p.neg_()


def negated(critic):
    critic = copy.deepcopy(critic)
    negate_last(critic)
    return critic


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, materialize_grads=True)


def assert_alike(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-14)
