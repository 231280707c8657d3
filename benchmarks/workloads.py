"""The GANs that benchmarks time and tests count launches of: two networks, a constraint, and the sizes that go with
them. Each comes in a clipped and a penalised form. Data alone; nothing runs on import.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastwgan import models
from fastwgan.constraints import GradientPenalty, WeightClip

__all__ = ["WORKLOADS", "Networks", "Workload", "patch_critic"]

Networks = tuple[nn.Module, nn.Module, Tensor]  # generator, critic, a real batch


@dataclass(frozen=True)
class Workload:
    """A GAN whose critic step is measured.

    Attributes:
        generator, critic: make the network, of a width.
        latent: width of a standard normal z [batch, latent].
        shape: of one sample.
        constraint: on the critic.
        batch: real samples in a critic step.
        width: the paper's; a test that wants less passes its own to ``generator`` and ``critic``.
        networks: makes both and a real batch in one call, as a user's function does.
    """

    generator: Callable[[int], nn.Module]
    critic: Callable[[int], nn.Module]
    latent: int
    shape: tuple[int, ...]
    constraint: WeightClip | GradientPenalty
    batch: int = 64
    width: int = 64
    networks: Callable[[], Networks] | None = None

    def made(self) -> Networks:
        """Return the generator, the critic and a real batch, all of torch's random numbers."""
        if self.networks is not None:
            return self.networks()
        generator, critic = self.generator(self.width), self.critic(self.width)
        # Drawn in float32, so that a wider dtype gets the same numbers.
        return generator, critic, torch.rand(self.batch, *self.shape) * 2 - 1

    @property
    def convolutional(self) -> bool:
        """Return whether it has images, and convolutions of them: whether it may lie in memory channels last."""
        if len(self.shape) != 3:
            return False
        networks = self.made()[:2]
        return any(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for network in networks for m in network.modules())


def _mlp(constraint: WeightClip | GradientPenalty) -> Workload:
    return Workload(
        generator=lambda width: models.mlp([100, 128, 256, 512, 1024, 784], slope=0.2, norm=True, tanh=True),
        critic=lambda width: models.mlp([784, 512, 256, 1], slope=0.2),
        latent=100, shape=(784,), constraint=constraint,
    )  # fmt: skip


COLUMNS, PACK = 128, 10  # of a table once it is encoded; rows that are scored together


def _tabular(constraint: WeightClip | GradientPenalty) -> Workload:
    """CTGAN's batch of 500 rows. Ten to a score, they are 50 samples of ten rows, each with one eps and one norm."""
    return Workload(
        generator=lambda width: models.ctgan_generator(128, COLUMNS, width=width, pack=PACK),
        critic=lambda width: models.ctgan_critic(COLUMNS, width=width, pack=PACK),
        latent=128 * PACK, shape=(COLUMNS * PACK,), constraint=constraint, batch=50, width=256,
    )  # fmt: skip


# Below, BatchNorm goes with the clip alone: a penalty takes each sample's gradient by itself, and BatchNorm mixes them.


def _dcgan(constraint: WeightClip | GradientPenalty) -> Workload:
    return Workload(
        generator=lambda width: models.dcgan_generator(100, width=width),
        critic=lambda width: models.dcgan_critic(width=width, norm=isinstance(constraint, WeightClip)),
        latent=100, shape=(3, 64, 64), constraint=constraint,
    )  # fmt: skip


def _resnet(constraint: WeightClip | GradientPenalty) -> Workload:
    return Workload(
        generator=lambda width: models.resnet_generator(128, width=width),
        critic=lambda width: models.resnet_critic(width=width, norm=isinstance(constraint, WeightClip)),
        latent=128, shape=(3, 32, 32), constraint=constraint, width=128,
    )  # fmt: skip


def patch_critic(*, channels: int = 3, width: int = 64, norm: str = "instance") -> nn.Sequential:
    """Return pix2pix's 70x70 discriminator: a score for each patch, [N, 1, 30, 30] for 256x256 images.

    Args:
        channels: of the images.
        width: of the first layer.
        norm: "batch", or "instance", which takes each image by itself as a gradient penalty has to. pix2pix, at one
            image to a batch, does not tell them apart.

    Source: arXiv 1611.07004, section 6.1.2.
    """
    if norm not in ("batch", "instance"):
        raise ValueError(f"norm: expected 'batch' or 'instance', got {norm!r}")
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for stride in (2, 2, 1):
        layers.append(nn.Conv2d(width, 2 * width, 4, stride, 1, bias=False))  # void before a norm
        width *= 2
        layers += [nn.BatchNorm2d(width) if norm == "batch" else nn.InstanceNorm2d(width), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1)).apply(models.init_dcgan)


def _patchgan(constraint: WeightClip | GradientPenalty) -> Workload:
    """The critic is what is measured: the generator is a narrow DCGAN's, far lighter than pix2pix's U-Net."""
    norm = "batch" if isinstance(constraint, WeightClip) else "instance"
    return Workload(
        generator=lambda width: models.dcgan_generator(100, width=width // 4, size=256),
        critic=lambda width: patch_critic(width=width, norm=norm),
        latent=100, shape=(3, 256, 256), constraint=constraint, batch=4,
    )  # fmt: skip


WORKLOADS = {
    "mlp-clip": _mlp(WeightClip()),
    "mlp-penalty": _mlp(GradientPenalty()),
    "dcgan-clip": _dcgan(WeightClip()),
    "dcgan-penalty": _dcgan(GradientPenalty()),
    "tabular-clip": _tabular(WeightClip()),
    "tabular-penalty": _tabular(GradientPenalty()),
    "resnet-clip": _resnet(WeightClip()),
    "resnet-penalty": _resnet(GradientPenalty()),
    "patchgan-clip": _patchgan(WeightClip()),
    "patchgan-penalty": _patchgan(GradientPenalty()),
}
