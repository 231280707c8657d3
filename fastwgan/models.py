"""The networks that the command line, the benchmarks and the tests train. Any ``nn.Module`` works as well."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, relu

from fastwgan import checks

__all__ = [
    "InstanceNoise", "ctgan_critic", "ctgan_generator", "dcgan_critic", "dcgan_generator", "mlp", "resnet_critic",
    "resnet_generator",
]  # fmt: skip


class InstanceNoise(nn.Module):
    """A critic that is shown samples [N, ...] with Gaussian noise while it trains, and as they are in evaluation.

    The noise's standard deviation, ``scale`` >= 0 in the samples' units, is kept in a buffer, for noise that decays:
    ``critic.scale.fill_(0.1)``. Conditions go to the critic as they are. Source: arXiv 1701.04862, section 3.

    >>> InstanceNoise(mlp([2, 8, 1]), 0.1)(torch.zeros(4, 2)).shape
    torch.Size([4, 1])
    """

    scale: Tensor

    def __init__(self, critic: nn.Module, scale: float) -> None:
        super().__init__()
        self.critic, device = critic, next((p.device for p in critic.parameters()), None)
        self.register_buffer("scale", torch.full((), checks.number("scale", scale, minimum=0), device=device))

    def forward(self, x: Tensor, *cond: Any) -> Tensor:
        if self.training:
            x = x + self.scale * torch.randn_like(x)
        scores: Tensor = self.critic(x, *cond)
        return scores


def mlp(
    sizes: Sequence[int], *, slope: float = 0.0, norm: bool = False, shape: Sequence[int] = (), tanh: bool = False
) -> nn.Sequential:
    """Linear layers of the given sizes with leaky ReLUs between them, on flattened input.

    Args:
        sizes: widths, from input to output.
        slope: of the ReLU below zero.
        norm: put BatchNorm before each ReLU but the first, as the MLP generator in common GAN code has it.
        shape: of one output sample; empty leaves [N, sizes[-1]].
        tanh: squash the output to [-1, 1].
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(fan_in, fan_out))
        if i < len(sizes) - 2:
            layers += [nn.BatchNorm1d(fan_out)] if norm and i > 0 else []
            layers.append(nn.LeakyReLU(slope) if slope else nn.ReLU())
    layers += [nn.Tanh()] if tanh else []
    layers += [nn.Unflatten(1, tuple(shape))] if shape else []
    return nn.Sequential(*layers)


def init_dcgan(module: nn.Module) -> None:
    """N(0, 0.02) weights and N(1, 0.02) BatchNorm scales. DCGAN, arXiv 1511.06434, section 4."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def dcgan_critic(*, channels: int = 3, width: int = 64, norm: bool = True, size: int = 64) -> nn.Sequential:
    """DCGAN's discriminator without its sigmoid, for size x size images (a power of two, 8 or more): scores [N, 1]."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
    while size > 8:
        layers.append(nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False))
        width, size = 2 * width, size // 2
        layers += [nn.BatchNorm2d(width), nn.LeakyReLU(0.2)] if norm else [nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 0, bias=False), nn.Flatten()).apply(init_dcgan)


def dcgan_generator(latent: int = 100, *, channels: int = 3, width: int = 64, size: int = 64) -> nn.Sequential:
    """DCGAN's generator for size x size images (a power of two, 8 or more) in [-1, 1], from z [N, latent]."""
    deep = width * size // 8
    layers: list[nn.Module] = [nn.Unflatten(1, (latent, 1, 1)), nn.ConvTranspose2d(latent, deep, 4, 1, 0, bias=False)]
    while deep >= width:
        after = deep // 2 if deep > width else channels
        layers += [nn.BatchNorm2d(deep), nn.ReLU(), nn.ConvTranspose2d(deep, after, 4, 2, 1, bias=False)]
        deep //= 2
    return nn.Sequential(*layers, nn.Tanh()).apply(init_dcgan)


def ctgan_critic(columns: int, *, width: int = 256, pack: int = 10) -> nn.Sequential:
    """CTGAN's discriminator: scores [N, 1] of ``pack`` rows each, given side by side as [N, pack * columns].

    Source: arXiv 1907.00503, section 4.4; dropout and slope from its authors' code.
    """
    layers: list[nn.Module] = []
    for fan_in in (pack * columns, width):
        layers += [nn.Linear(fan_in, width), nn.LeakyReLU(0.2), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.Linear(width, 1))


class Concatenated(nn.Module):
    """A residual layer that hands its input on beside its output, where others add the two."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        # The shift of the BatchNorm behind it makes a bias void.
        self.layers = nn.Sequential(nn.Linear(fan_in, fan_out, bias=False), nn.BatchNorm1d(fan_out), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.layers(x), x), dim=1)


def ctgan_generator(latent: int, columns: int, *, width: int = 256, pack: int = 10) -> nn.Sequential:
    """CTGAN's generator, of packs [N, pack * columns] from z [N, pack * latent]; each row comes from its own latents.

    Without the activations that CTGAN puts on each column (tanh, Gumbel softmax), which are the table's.
    Source: arXiv 1907.00503, section 4.4.
    """
    hidden = Concatenated(latent, width), Concatenated(latent + width, width)
    apart = nn.Sequential(nn.Unflatten(1, (-1, latent)), nn.Flatten(0, 1))
    together = nn.Sequential(nn.Unflatten(0, (-1, pack)), nn.Flatten())
    return nn.Sequential(apart, *hidden, nn.Linear(latent + 2 * width, columns), together)


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut, each after a ReLU; at the input's scale, half of it or twice it.

    ``first`` is the form of a critic's first block, which gets an image: no ReLU before the convolutions.
    """

    def __init__(self, channels: int, width: int, scale: float, *, norm: bool, first: bool = False) -> None:
        super().__init__()
        self.scale, self.first = scale, first
        self.norm1 = nn.BatchNorm2d(channels) if norm and not first else nn.Identity()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=not norm)  # void before a BatchNorm
        self.norm2 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, width, 1) if scale != 1 or channels != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.first else relu(self.norm1(x))
        if self.scale == 2:
            x, y = interpolate(x, scale_factor=2.0), interpolate(y, scale_factor=2.0)
        y = self.conv2(relu(self.norm2(self.conv1(y))))
        if self.scale == 0.5:  # a mean and a 1x1 convolution can change places; this order is a quarter of the work
            x, y = avg_pool2d(x, 2), avg_pool2d(y, 2)
        return torch.add(y, self.shortcut(x))


def resnet_critic(*, channels: int = 3, width: int = 128, norm: bool = False) -> nn.Sequential:
    """WGAN-GP's residual critic for 32x32 images: scores [N, 1]. ``norm`` adds BatchNorm, which a penalty rules out.

    Source: arXiv 1704.00028, appendix, the CIFAR-10 ResNet; the first block as in its authors' code.
    """
    blocks = [Residual(channels, width, 0.5, norm=norm, first=True)]
    blocks += [Residual(width, width, scale, norm=norm) for scale in (0.5, 1, 1)]
    return nn.Sequential(*blocks, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))


def resnet_generator(latent: int = 128, *, channels: int = 3, width: int = 128) -> nn.Sequential:
    """WGAN-GP's residual generator of 32x32 images in [-1, 1], from z [N, latent].

    Source: arXiv 1704.00028, appendix, the CIFAR-10 ResNet.
    """
    small = nn.Linear(latent, 16 * width), nn.Unflatten(1, (width, 4, 4))
    blocks = [Residual(width, width, 2, norm=True) for _ in range(3)]
    image = nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1), nn.Tanh()
    return nn.Sequential(*small, *blocks, *image)
