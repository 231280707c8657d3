"""The networks that the command line, the benchmarks and the tests train. Any ``nn.Module`` works as well."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

__all__ = ["dcgan_critic", "dcgan_generator", "mlp"]


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
            if norm and i > 0:
                layers.append(nn.BatchNorm1d(fan_out))
            layers.append(nn.LeakyReLU(slope) if slope else nn.ReLU())
    if tanh:
        layers.append(nn.Tanh())
    if shape:
        layers.append(nn.Unflatten(1, tuple(shape)))
    return nn.Sequential(*layers)


def _init_dcgan(module: nn.Module) -> None:
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
        if norm:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.LeakyReLU(0.2))
    layers += [nn.Conv2d(width, 1, 4, 1, 0, bias=False), nn.Flatten()]
    return nn.Sequential(*layers).apply(_init_dcgan)


class _AsImage(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z[:, :, None, None]


def dcgan_generator(latent: int = 100, *, channels: int = 3, width: int = 64, size: int = 64) -> nn.Sequential:
    """DCGAN's generator for size x size images (a power of two, 8 or more) in [-1, 1], from z [N, latent]."""
    deepest = width * size // 8
    layers: list[nn.Module] = [_AsImage(), nn.ConvTranspose2d(latent, deepest, 4, 1, 0, bias=False)]
    while size > 8:
        layers += [nn.BatchNorm2d(deepest), nn.ReLU()]
        layers.append(nn.ConvTranspose2d(deepest, deepest // 2, 4, 2, 1, bias=False))
        deepest, size = deepest // 2, size // 2
    layers += [
        nn.BatchNorm2d(deepest),
        nn.ReLU(),
        nn.ConvTranspose2d(deepest, channels, 4, 2, 1, bias=False),
        nn.Tanh(),
    ]
    return nn.Sequential(*layers).apply(_init_dcgan)
