"""A trainer's critic steps beside the plain loop's, in float64."""

import copy

import pytest
import torch
from small_trainers import weights
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastwgan import GradientPenalty, Trainer, WeightClip, reference

F64 = torch.float64
N = 8


class Latents:
    """A latent callable that remembers what it drew, so that a plain loop can have the same."""

    def __init__(self, width=3):
        self.width, self.drawn, self.random = width, [], torch.Generator().manual_seed(0)

    def __call__(self, n, device):
        self.drawn.append(torch.randn(n, self.width, dtype=F64, generator=self.random))
        return self.drawn[-1]


def pair(critic=None):
    torch.manual_seed(0)
    own = critic or nn.Sequential(nn.Linear(2, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
    return nn.Linear(3, 2).double(), own.double()


def plain_step(generator, critic, optimizer, real, z, *cond, step=0, weight=10.0, clip=None):
    """Take the textbook's critic step by one backward call; return the Wasserstein estimate and the gradient norm."""
    with torch.no_grad():
        fake = generator(z, *cond)
    optimizer.zero_grad()
    real_score, fake_score = critic(real, *cond).mean(), critic(fake, *cond).mean()
    loss, norm = fake_score - real_score, None
    if weight:
        eps = reference.uniform(0, len(real) * step, len(real)).double().view(-1, *[1] * (real.dim() - 1))
        x = (eps * real + (1 - eps) * fake).requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            (g,) = torch.autograd.grad(critic(x, *cond).sum(), x, create_graph=True)
        norm = g.flatten(1).norm(dim=1)
        loss = loss + weight * ((norm - 1) ** 2).mean()
    loss.backward()
    optimizer.step()
    if clip:
        with torch.no_grad():
            for p in critic.parameters():
                p.clamp_(-clip, clip)
    return (real_score - fake_score).item(), None if norm is None else norm.mean().item()


def assert_as_plain(critic, *, constraint=None, steps=4, lr=0.05, cond=(), change=None, real=None, **options):
    """Train by a Trainer and by the plain loop, SGD in both; ``change(critic, i)`` happens before step i in both."""
    constraint = constraint or GradientPenalty()
    generator, critic = pair(critic)
    twin, latents = copy.deepcopy(critic), Latents()
    trainer = Trainer(
        generator, critic, latent=latents, constraint=constraint, n_critic=1000,
        critic_optimizer=torch.optim.SGD([p for p in critic.parameters() if p.requires_grad], lr=lr), **options,
    )  # fmt: skip
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=lr)
    settings = {"weight": 0.0, "clip": constraint.bound} if isinstance(constraint, WeightClip) else {}
    for i in range(steps):
        for network in (critic, twin) if change else ():
            change(network, i)
        batch = torch.randn(N, 2, dtype=F64) if real is None else real
        metrics = trainer.critic_step(batch, *cond)
        w, norm = plain_step(generator, twin, optimizer, batch, latents.drawn[i], *cond, step=i, **settings)
        assert metrics.wasserstein.item() == pytest.approx(w, rel=1e-10, abs=1e-12)
        if norm is not None:
            assert metrics.gradient_norm.item() == pytest.approx(norm, rel=1e-10)
        torch.testing.assert_close(weights(critic), weights(twin), rtol=1e-9, atol=1e-12)
    for a, e in zip(critic.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, e)
    return trainer


class Running(nn.Module):
    """Keeps a mean and a count in buffers that it rebinds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.calls = self.calls + 1
        return x - x.mean(1, keepdim=True)


def own_layers(*layers):
    return nn.Sequential(nn.Linear(2, 4), *layers, nn.Tanh(), nn.Linear(4, 1))
