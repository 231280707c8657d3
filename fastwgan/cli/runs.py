"""A run of the command line: its data, its networks, and the numbers that go with them."""

import copy
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from fastwgan import models
from fastwgan.backend import Backend
from fastwgan.constraints import GradientPenalty, WeightClip
from fastwgan.data import TOYS, SampledBatches, Samples, ShuffledBatches, digits, files
from fastwgan.engine.ranks import Ranks
from fastwgan.optim import Adam, RMSprop
from fastwgan.streams import Stream, process_streams, set_process_streams, stream_seed
from fastwgan.trainer import Trainer

DATA = ("digits", *TOYS)  # beside files.KINDS, each as KIND:PATH
CONSTRAINTS = ("clip", "penalty")
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
REPORTED = 10  # unusable files that are named

Shape = tuple[int, ...]
Batches = ShuffledBatches | SampledBatches
Optimizer = Callable[..., torch.optim.Optimizer]


class Recipe(NamedTuple):
    """Networks and numbers that work for samples of a kind, on a CPU."""

    latent: int
    width: int
    hidden: int  # layers of an MLP; 0 is a DCGAN
    batch_size: int
    n_critic: int
    steps: int
    clip: tuple[WeightClip, Optimizer]
    penalty: tuple[GradientPenalty, Optimizer]


SMALL_IMAGES = Recipe(
    latent=64, width=256, hidden=2, batch_size=64, clip=(WeightClip(0.05), partial(RMSprop, lr=2e-4)),
    n_critic=3, steps=20_000, penalty=(GradientPenalty(10.0), partial(Adam, lr=1e-3, betas=(0.0, 0.9))),
)  # fmt: skip
IMAGES = Recipe(
    latent=100, width=32, hidden=0, batch_size=64, clip=(WeightClip(0.01), partial(RMSprop, lr=5e-5)),
    n_critic=5, steps=20_000, penalty=(GradientPenalty(10.0), partial(Adam, lr=2e-4, betas=(0.0, 0.9))),
)  # fmt: skip
POINTS = Recipe(
    latent=2, width=256, hidden=3, batch_size=256, clip=(WeightClip(0.1), partial(RMSprop, lr=2e-4)),
    n_critic=5, steps=6_000, penalty=(GradientPenalty(0.1), partial(Adam, lr=5e-4, betas=(0.5, 0.9))),
)  # fmt: skip


def recipe_for(shape: Shape) -> Recipe:
    """Return the recipe for samples of a shape, or raise ValueError for images that no recipe makes."""
    if len(shape) == 1:
        return POINTS._replace(latent=min(max(POINTS.latent, shape[0]), SMALL_IMAGES.latent))
    _, height, width = shape
    if max(height, width) <= files.AS_THEY_ARE:
        return SMALL_IMAGES
    if height != width or height not in files.SIZES:
        sides = f"{files.AS_THEY_ARE}x{files.AS_THEY_ARE} at most, or square with a side of {files.SIZES[2:]}"
        raise ValueError(f"--data: expected images of {sides}, got {height}x{width}; --size brings them there")
    return IMAGES


def is_known(name: str) -> bool:
    """Return whether ``name`` is one of DATA, or KIND:PATH with one of files.KINDS."""
    kind, _, path = name.partition(":")
    return name in DATA or (kind in files.KINDS and bool(path))


@dataclass(frozen=True)
class Config:
    """The settings of a run, kept in its checkpoint; a resumed run has to be the same one."""

    data: str
    shape: Shape  # of a sample, which decides the networks; the data need not be there to rebuild them
    batch_size: int  # of all processes together
    n_critic: int
    size: int | None = None  # this and the next: what was asked of the files
    channels: int | None = None
    constraint: str = "penalty"
    seed: int = 0
    amp: str | None = None
    ema: float | None = None
    nonfinite: str = "raise"
    threads: int | None = None  # of PyTorch on a CPU, by which its sums are rounded; older runs have none

    @classmethod
    def of(cls, content: dict[str, Any], path: Path) -> "Config":
        """Return the settings that ``fastwgan train`` put into a checkpoint."""
        config = content.get("config")
        if not isinstance(config, dict) or config.keys() | {"threads"} != cls.__dataclass_fields__.keys():
            raise ValueError(f"{path} was not written by fastwgan train")
        data, constraint, shape = (config[name] for name in ("data", "constraint", "shape"))
        if not is_known(data) or constraint not in CONSTRAINTS or len(shape) not in (1, 3):
            raise ValueError(f"{path} is of a run that this version does not know: {config}")
        return cls(**config)

    def make_networks(self) -> tuple[nn.Module, nn.Module]:  # generator and critic
        recipe, shape, elements = recipe_for(self.shape), self.shape, math.prod(self.shape)
        if not recipe.hidden:  # a penalty takes each sample's gradient by itself, and BatchNorm mixes them
            sizes, norm = {"channels": shape[0], "width": recipe.width, "size": shape[-1]}, self.constraint == "clip"
            return models.dcgan_generator(recipe.latent, **sizes), models.dcgan_critic(norm=norm, **sizes)
        hidden, images = [recipe.width] * recipe.hidden, len(shape) == 3
        generator = models.mlp([recipe.latent, *hidden, elements], shape=shape if images else (), tanh=images)
        return generator, models.mlp([elements, *hidden, 1], slope=0.2)

    def make_trainer(self, device: torch.device, backend: Backend) -> Trainer:
        torch.manual_seed(self.seed)
        recipe, (generator, critic) = recipe_for(self.shape), (network.to(device) for network in self.make_networks())
        constraint, optimizer = recipe.clip if self.constraint == "clip" else recipe.penalty
        trainer = Trainer(
            generator, critic, latent=recipe.latent, constraint=constraint, n_critic=self.n_critic,
            critic_optimizer=optimizer(critic.parameters(), backend=backend),
            generator_optimizer=optimizer(generator.parameters(), backend=backend), seed=self.seed, backend=backend,
            amp=PRECISIONS[self.amp] if self.amp else None, ema=self.ema, nonfinite=self.nonfinite,
            memory_format=None if recipe.hidden or device.type != "cuda" else torch.channels_last,
        )  # fmt: skip
        seed = stream_seed(self.seed, Stream.PROCESS + trainer.rank)  # another in each process
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        if trainer.rank:
            torch.manual_seed(seed)
        return trainer

    def make_batches(self, samples: Samples | None, trainer: Trainer, workers: int) -> Batches:
        seed, part = stream_seed(self.seed, Stream.ORDER), {"rank": trainer.rank, "world": trainer.world}
        if samples is None:
            return SampledBatches(TOYS[self.data], self.batch_size, seed, trainer.device, **part)
        if isinstance(samples, Tensor):
            samples, workers = samples.to(trainer.device), 0
        return ShuffledBatches(samples, self.batch_size, seed, workers=workers, **part)

    def fastest_threads(self, trainer: Trainer) -> int:
        """Return with how many threads a copy of a new trainer is fastest: as many as PyTorch has, half of them, ..."""
        most, streams, medians = torch.get_num_threads(), process_streams(trainer.device), dict[int, float]()
        for threads in (most >> i for i in range(most.bit_length())):
            names = {"trial": copy.deepcopy(trainer), "real": torch.rand(self.batch_size, *self.shape)}
            timer = Timer("trial.step(real)", "trial.step(real)", globals=names, num_threads=threads)
            medians[threads] = timer.blocked_autorange(min_run_time=0.2).median
            if medians[threads] > 0.1:  # with fewer, such long steps would take long to show that they are slower
                break
        set_process_streams(streams, trainer.device)
        return min(medians, key=lambda threads: medians[threads])

    def draw(self, generated: Tensor, path: Path, samples: Samples | None = None, seed: int | None = None) -> None:
        """Draw generated samples; points lie over as many real ones, where there are any."""
        from fastwgan.cli import pictures

        if len(self.shape) == 3:
            pictures.image_grid(generated, path)
            return
        real = None
        if self.data in TOYS:
            random = torch.Generator().manual_seed(stream_seed(self.seed if seed is None else seed, Stream.PICTURE))
            real = TOYS[self.data](len(generated), random)
        elif samples is not None:
            real = samples[torch.linspace(0, len(samples) - 1, min(len(samples), len(generated))).long()]
        pictures.points(generated, real, path)


def read_samples(name: str, size: int | None, channels: int | None, workers: int) -> tuple[Samples | None, Shape]:
    """Return the samples of a data set, None if they are drawn afresh, and one's shape; rank 0 names unusable files."""
    kind, _, path = name.partition(":")
    if path:
        found = files.read(kind, Path(path).expanduser(), size=size, channels=channels, workers=workers)
        unusable = found.unusable if isinstance(found, files.ImageFolder) and not Ranks().rank else []
        for file, reason in unusable[:REPORTED]:
            print(f"fastwgan: skipped {file}: {' '.join(reason.split())}", file=sys.stderr)
        if len(unusable) > REPORTED:
            print(f"fastwgan: skipped {len(unusable) - REPORTED} more files", file=sys.stderr)
        return found, found.shape
    for option, value in (("--size", size), ("--channels", channels)):
        if value is not None:
            raise ValueError(f"{option}: is for images in files, got {value} for {name}")
    if name in TOYS:
        return None, (2,)
    images, _ = digits()
    return images, tuple(images.shape[1:])
