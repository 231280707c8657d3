"""Two Gaussians that hardly overlap, and what a GAN's discriminator and a WGAN's critics tell the generator there.

Real samples are N(-2, 0.5^2), generated ones N(2, 0.5^2), eight standard deviations apart. All networks are trained
until they change no more. The generator follows the gradient of log(1 - D(x)), or of the critic's score, at its own
samples. The better the discriminator, the less of it is left there, while the critics come close to straight lines.

Source: arXiv 1701.07875, figure 2.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastwgan import Adam, GradientPenalty, RMSprop, Trainer, WeightClip, models
from fastwgan.experiments.common import COLORS, Check, Fixed, at_least, at_most, new_figure, scaled

TITLE = "Two distant Gaussians: the discriminator's gradient vanishes, the critics' do not (WGAN, figure 2)"

MEAN, DEVIATION = 2.0, 0.5  # of the generated samples; of the real ones the mean is the negative
SIZES = (1, 64, 64, 1)
BATCH = 256
WEIGHT = 10.0
BOUND = 0.1


def _gaussian(mean: float, n: int, random: torch.Generator) -> Tensor:
    return mean + DEVIATION * torch.randn(n, 1, generator=random)


def _discriminator(random: torch.Generator, steps: int) -> nn.Module:
    """Logits of D, trained by the GAN loss."""
    network = models.mlp(SIZES)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, betas=(0.5, 0.999))
    schedule = CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        real, fake = _gaussian(-MEAN, BATCH, random), _gaussian(MEAN, BATCH, random)
        loss = softplus(-network(real)).mean() + softplus(network(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def _critic(constraint: WeightClip | GradientPenalty, random: torch.Generator, steps: int, seed: int) -> nn.Module:
    network = models.mlp(SIZES)
    optimizer: torch.optim.Optimizer
    if isinstance(constraint, WeightClip):
        optimizer = RMSprop(network.parameters(), lr=2e-3)
    else:
        optimizer = Adam(network.parameters(), lr=2e-3, betas=(0.0, 0.9))
    trainer = Trainer(
        Fixed(),
        network,
        latent=lambda n, _: _gaussian(MEAN, n, random),
        constraint=constraint,
        critic_optimizer=optimizer,
        critic_scheduler=CosineAnnealingLR(optimizer, steps),
        seed=seed,
    )
    for _ in range(steps):
        trainer.critic_step(_gaussian(-MEAN, BATCH, random))
    return network


def _gradient(values: Tensor, x: Tensor) -> Tensor:
    """|d values / dx| [N] at x [N, 1]."""
    (gradient,) = torch.autograd.grad(values.sum(), x)
    return gradient.abs().flatten()


def run(seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Each network's values and gradients on the line, and its gradients on generated samples."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    networks = {
        "gan": _discriminator(random, scaled(1500, scale)),
        "penalty": _critic(GradientPenalty(WEIGHT), random, scaled(800, scale), seed),
        "clip": _critic(WeightClip(BOUND), random, scaled(800, scale), seed),
    }
    line = torch.linspace(-4, 4, 121)[:, None].requires_grad_()
    fakes = _gaussian(MEAN, 4096, random).requires_grad_()
    result: dict[str, Any] = {"x": line.flatten().tolist()}
    for name, network in networks.items():
        # The loss's form that neither rounds D to 1 nor its logarithm to 0.
        seen = (lambda x, f=network: logsigmoid(-f(x))) if name == "gan" else network
        values, on_line, on_fakes = network(line), _gradient(seen(line), line), _gradient(seen(fakes), fakes)
        result[name] = {
            "value": (values.sigmoid() if name == "gan" else values - values.mean()).flatten().tolist(),
            "gradient": on_line.tolist(),
            "least": on_fakes.min().item(),
            "mean": on_fakes.mean().item(),
            "largest": max(on_line.max().item(), on_fakes.max().item()),
        }
    return result


if __name__ == "__main__":
    import time
    torch.set_num_threads(1)
    for seed in range(3):
        t=time.process_time()
        r = run(seed)
        for n in ("gan","penalty","clip"):
            print(seed, n, {k: v for k,v in r[n].items() if k not in ("value","gradient")})
        print(time.process_time()-t)
