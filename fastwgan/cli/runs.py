"""A run of the command line: its data, its networks, and the numbers that go with them."""

import math
import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastwgan import data, models
from fastwgan.constraints import GradientPenalty, WeightClip
from fastwgan.data import files
from fastwgan.engine.ranks import Ranks
from fastwgan.optim import Adam, RMSprop
from fastwgan.streams import stream_seed
from fastwgan.trainer import Trainer

__all__ = [
    "CONSTRAINTS", "DATA", "PRECISIONS", "REPORTED", "SAMPLES", "Config", "draw", "is_known", "make_batches",
    "make_generator", "make_trainer", "read_samples", "recipe_for",
]  # fmt: skip

DATA = ("digits", *data.TOYS)  # beside files.KINDS, each as KIND:PATH
CONSTRAINTS = ("clip", "penalty")
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}
REPORTED = 10  # unusable files that are named

# What takes a random stream of its own from the seed; the trainer takes 0 and 1, the loop 5, each process one from 6.
ORDER, PICTURE, SAMPLES, PROCESS = 2, 3, 4, 6


@dataclass(frozen=True)
class Recipe:
    """Networks and numbers that work for samples of a kind, on a CPU."""

    latent: int
    width: int
    penalty_weight: float
    penalty_lr: float
    betas: tuple[float, float]
    clip_bound: float
    clip_lr: float
    batch_size: int
    n_critic: int
    steps: int
    hidden: int = 0  # layers of an MLP; 0 is a DCGAN


SMALL_IMAGES = Recipe(
    latent=64, width=256, hidden=2, penalty_weight=10.0, penalty_lr=1e-3, betas=(0.0, 0.9),
    clip_bound=0.05, clip_lr=2e-4, batch_size=64, n_critic=3, steps=20_000,
)  # fmt: skip
IMAGES = Recipe(
    latent=100, width=32, penalty_weight=10.0, penalty_lr=2e-4, betas=(0.0, 0.9),
    clip_bound=0.01, clip_lr=5e-5, batch_size=64, n_critic=5, steps=20_000,
)  # fmt: skip
POINTS = Recipe(
    latent=2, width=256, hidden=3, penalty_weight=0.1, penalty_lr=5e-4, betas=(0.5, 0.9),
    clip_bound=0.1, clip_lr=2e-4, batch_size=256, n_critic=5, steps=6_000,
)  # fmt: skip


def recipe_for(shape: tuple[int, ...]) -> Recipe:
    """The recipe for samples of a shape.

    Raises:
        ValueError: they are images that no recipe makes.
    """
    if len(shape) == 1:
        return replace(POINTS, latent=min(max(POINTS.latent, shape[0]), SMALL_IMAGES.latent))
    _, height, width = shape
    if max(height, width) <= files.AS_THEY_ARE:
        return SMALL_IMAGES
    if height != width or height not in files.SIZES:
        sides = f"{files.AS_THEY_ARE}x{files.AS_THEY_ARE} at most, or square with a side of {files.SIZES[2:]}"
        raise ValueError(f"--data: expected images of {sides}, got {height}x{width}; --size brings them there")
    return IMAGES


def is_known(name: str) -> bool:
    """Whether ``name`` is one of :data:`DATA`, or KIND:PATH with one of :data:`fastwgan.files.KINDS`."""
    kind, _, path = name.partition(":")
    return name in DATA or (kind in files.KINDS and bool(path))


@dataclass(frozen=True)
class Config:
    """What a run is, kept in its checkpoint; a resumed run has to be the same one.

    Attributes:
        data: what ``--data`` named.
        shape: of a sample, which decides the networks; the data need not be there to rebuild them.
        size, channels: what was asked of the files.
        batch_size: of all processes together.
    """

    data: str
    shape: tuple[int, ...]
    size: int | None
    channels: int | None
    constraint: str
    batch_size: int
    n_critic: int
    seed: int
    amp: str | None = None
    ema: float | None = None
    nonfinite: str = "raise"

    @classmethod
    def of(cls, content: dict[str, Any], path: Path) -> "Config":
        """The one that ``fastwgan train`` put into a checkpoint."""
        config = content.get("config")
        if not isinstance(config, dict) or config.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(f"{path} was not written by fastwgan train")
        if (
            not is_known(config["data"])
            or config["constraint"] not in CONSTRAINTS
            or len(config["shape"]) not in (1, 3)
        ):
            raise ValueError(f"{path} is of a run that this version does not know: {config}")
        return cls(**config)

    def check(self, given: dict[str, Any], out: Path) -> None:
        """Raise ValueError where one of the given options is not this run's."""
        known = asdict(self) | {"size": self.shape[-1], "channels": self.shape[0]}
        for field, value in given.items():
            if known[field] != value:
                option = "--" + field.replace("_", "-")
                raise ValueError(f"{option}: the run in {out} has {known[field]}, got {value}")


def make_generator(shape: tuple[int, ...]) -> nn.Sequential:
    recipe = recipe_for(shape)
    if not recipe.hidden:
        return models.dcgan_generator(recipe.latent, channels=shape[0], width=recipe.width, size=shape[-1])
    sizes = [recipe.latent, *[recipe.width] * recipe.hidden, math.prod(shape)]
    return models.mlp(sizes) if len(shape) == 1 else models.mlp(sizes, shape=shape, tanh=True)


def make_critic(shape: tuple[int, ...], constraint: str) -> nn.Sequential:
    recipe = recipe_for(shape)
    if not recipe.hidden:  # a penalty takes each sample's gradient by itself, and BatchNorm mixes them
        norm = constraint == "clip"
        return models.dcgan_critic(channels=shape[0], width=recipe.width, norm=norm, size=shape[-1])
    return models.mlp([math.prod(shape), *[recipe.width] * recipe.hidden, 1], slope=0.2)


def make_trainer(config: Config, device: torch.device, backend: Any) -> Trainer:
    recipe = recipe_for(config.shape)
    torch.manual_seed(config.seed)
    generator, critic = make_generator(config.shape).to(device), make_critic(config.shape, config.constraint).to(device)
    constraint: WeightClip | GradientPenalty
    optimizers: list[torch.optim.Optimizer]
    if config.constraint == "clip":
        constraint = WeightClip(recipe.clip_bound)
        optimizers = [RMSprop(m.parameters(), lr=recipe.clip_lr, backend=backend) for m in (critic, generator)]
    else:
        constraint = GradientPenalty(recipe.penalty_weight)
        optimizers = [
            Adam(m.parameters(), lr=recipe.penalty_lr, betas=recipe.betas, backend=backend) for m in (critic, generator)
        ]
    trainer = Trainer(
        generator, critic, latent=recipe.latent, constraint=constraint, critic_optimizer=optimizers[0],
        generator_optimizer=optimizers[1], n_critic=config.n_critic, seed=config.seed, backend=backend,
        amp=PRECISIONS[config.amp] if config.amp else None, ema=config.ema, nonfinite=config.nonfinite,
    )  # fmt: skip
    streams = stream_seed(config.seed, PROCESS + trainer.rank)  # another in each process
    random.seed(streams)
    np.random.seed(streams % 2**32)  # noqa: NPY002
    if trainer.rank:
        torch.manual_seed(streams)
    return trainer


def read_samples(
    name: str, size: int | None, channels: int | None, workers: int
) -> tuple[data.Samples | None, tuple[int, ...]]:
    """(the samples of a data set, None if they are drawn afresh; the shape of one)."""
    kind, _, path = name.partition(":")
    if path:
        found = files.read(kind, Path(path).expanduser(), size=size, channels=channels, workers=workers)
        if isinstance(found, files.ImageFolder):
            _report(found)
        return found, found.shape
    for option, value in (("--size", size), ("--channels", channels)):
        if value is not None:
            raise ValueError(f"{option}: is for images in files, got {value} for {name}")
    if name in data.TOYS:
        return None, (2,)
    images, _ = data.digits()
    return images, tuple(images.shape[1:])


def _report(folder: files.ImageFolder) -> None:
    """Name what was left out, on stderr; one process does."""
    if Ranks().rank:
        return
    for path, reason in folder.unusable[:REPORTED]:
        print(f"fastwgan: skipped {path}: {' '.join(reason.split())}", file=sys.stderr)
    if len(folder.unusable) > REPORTED:
        print(f"fastwgan: skipped {len(folder.unusable) - REPORTED} more files", file=sys.stderr)


def make_batches(
    config: Config, samples: data.Samples | None, trainer: Trainer, workers: int
) -> data.ShuffledBatches | data.SampledBatches:
    """The batches of a run, of which each process gets its part."""
    seed, device, part = stream_seed(config.seed, ORDER), trainer.device, {"rank": trainer.rank, "world": trainer.world}
    if samples is None:
        return data.SampledBatches(data.TOYS[config.data], config.batch_size, seed, device, **part)
    if isinstance(samples, torch.Tensor):
        return data.ShuffledBatches(samples.to(device), config.batch_size, seed, **part)
    return data.ShuffledBatches(samples, config.batch_size, seed, workers=workers, **part)


def draw(config: Config, generated: torch.Tensor, path: Path, seed: int, samples: data.Samples | None = None) -> None:
    """A picture of generated samples; points lie over as many real ones, where there are any."""
    from fastwgan.cli import pictures

    if len(config.shape) == 3:
        pictures.image_grid(generated, path)
        return
    real = None
    if config.data in data.TOYS:
        random = torch.Generator().manual_seed(stream_seed(seed, PICTURE))
        real = data.TOYS[config.data](len(generated), random)
    elif samples is not None:
        real = samples[torch.linspace(0, len(samples) - 1, min(len(samples), len(generated))).long()]
    pictures.points(generated, real, path)
