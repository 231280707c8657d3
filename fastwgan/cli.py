"""The command line: fastwgan train | sample | bench | info."""

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

import fastwgan
from fastwgan import checkpoint, data, files, functional, models
from fastwgan.backend import triton_problem
from fastwgan.baselines import IMPLEMENTATIONS
from fastwgan.bench import PRECISIONS
from fastwgan.constraints import GradientPenalty, WeightClip
from fastwgan.fit import fit
from fastwgan.optim import Adam, RMSprop
from fastwgan.streams import stream_seed
from fastwgan.trainer import Trainer
from fastwgan.workloads import WORKLOADS

DATA = ("digits", *data.TOYS)  # beside files.KINDS, each as KIND:PATH
CONSTRAINTS = ("clip", "penalty")
MOST = 1_000_000  # samples in a batch or a file
AT_ONCE = 500  # samples that one forward pass makes for a file
REPORTED = 10  # unusable files that are named

# What takes a random stream of its own from --seed; the trainer takes 0 and 1.
ORDER, PICTURE, SAMPLES = 2, 3, 4
INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


class _UserError(Exception):
    """Something the user can mend; its one line is all that is shown."""


@contextmanager
def _problems() -> Iterator[None]:
    """Whatever goes wrong while arguments and files are read is the user's to mend; later it would be ours."""
    try:
        yield
    except ImportError as error:
        raise _UserError(f"{error}; pip install 'fastwgan[train]' has what this command needs") from error
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise _UserError(str(error)) from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


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


def _recipe(shape: tuple[int, ...]) -> Recipe:
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


def _known(name: str) -> bool:
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
    """

    data: str
    shape: tuple[int, ...]
    size: int | None
    channels: int | None
    constraint: str
    batch_size: int
    n_critic: int
    seed: int

    @classmethod
    def of(cls, content: dict[str, Any], path: Path) -> "Config":
        """The one that ``fastwgan train`` put into a checkpoint."""
        config = content.get("config")
        if not isinstance(config, dict) or config.keys() != cls.__dataclass_fields__.keys():
            raise ValueError(f"{path} was not written by fastwgan train")
        if not _known(config["data"]) or config["constraint"] not in CONSTRAINTS or len(config["shape"]) not in (1, 3):
            raise ValueError(f"{path} is of a run that this version does not know: {config}")
        return cls(**config)

    def check(self, given: dict[str, Any], out: Path) -> None:
        """Raise ValueError where one of the given options is not this run's."""
        known = asdict(self) | {"size": self.shape[-1], "channels": self.shape[0]}
        for field, value in given.items():
            if known[field] != value:
                option = "--" + field.replace("_", "-")
                raise ValueError(f"{option}: the run in {out} has {known[field]}, got {value}")


def _generator(shape: tuple[int, ...]) -> nn.Sequential:
    recipe = _recipe(shape)
    if not recipe.hidden:
        return models.dcgan_generator(recipe.latent, channels=shape[0], width=recipe.width, size=shape[-1])
    sizes = [recipe.latent, *[recipe.width] * recipe.hidden, math.prod(shape)]
    return models.mlp(sizes) if len(shape) == 1 else models.mlp(sizes, shape=shape, tanh=True)


def _critic(shape: tuple[int, ...], constraint: str) -> nn.Sequential:
    recipe = _recipe(shape)
    if not recipe.hidden:  # a penalty takes each sample's gradient by itself, and BatchNorm mixes them
        norm = constraint == "clip"
        return models.dcgan_critic(channels=shape[0], width=recipe.width, norm=norm, size=shape[-1])
    return models.mlp([math.prod(shape), *[recipe.width] * recipe.hidden, 1], slope=0.2)


def _trainer(config: Config, device: torch.device, backend: Any) -> Trainer:
    recipe = _recipe(config.shape)
    torch.manual_seed(config.seed)
    generator, critic = _generator(config.shape).to(device), _critic(config.shape, config.constraint).to(device)
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
    return Trainer(
        generator, critic, latent=recipe.latent, constraint=constraint, critic_optimizer=optimizers[0],
        generator_optimizer=optimizers[1], n_critic=config.n_critic, seed=config.seed, backend=backend,
    )  # fmt: skip


def _samples(
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
    """Name what was left out, on stderr."""
    for path, reason in folder.unusable[:REPORTED]:
        print(f"fastwgan: skipped {path}: {' '.join(reason.split())}", file=sys.stderr)
    if len(folder.unusable) > REPORTED:
        print(f"fastwgan: skipped {len(folder.unusable) - REPORTED} more files", file=sys.stderr)


def _batches(
    config: Config, samples: data.Samples | None, device: torch.device, workers: int
) -> data.ShuffledBatches | data.SampledBatches:
    seed = stream_seed(config.seed, ORDER)
    if samples is None:
        return data.SampledBatches(data.TOYS[config.data], config.batch_size, seed, device)
    if isinstance(samples, torch.Tensor):
        return data.ShuffledBatches(samples.to(device), config.batch_size, seed)
    return data.ShuffledBatches(samples, config.batch_size, seed, workers=workers)


def _draw(config: Config, generated: torch.Tensor, path: Path, seed: int, samples: data.Samples | None = None) -> None:
    """A picture of generated samples; points lie over as many real ones, where there are any."""
    from fastwgan import pictures

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


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.Generator(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name} cannot be used ({str(error).splitlines()[0]})") from error
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _prepare(args: argparse.Namespace) -> tuple[Config, Path, Trainer, data.Samples | None, Any]:
    """The run that the arguments name, new or resumed: (what it is, its directory, trainer, samples, batches)."""
    options = Config.__dataclass_fields__.keys() - {"shape"}
    given = {field: getattr(args, field) for field in options if getattr(args, field) is not None}
    out = args.out or Path("runs") / f"{_short(args.data or 'digits')}-{args.constraint or 'penalty'}"
    last = out / "last.pt"
    device = _device(args.device)
    content = None
    if args.resume:
        content = checkpoint.load(last)
        config = Config.of(content, last)
        config.check(given, out)
        samples, shape = _samples(config.data, config.size, config.channels, args.workers)
        if shape != config.shape:
            raise ValueError(f"--data: the run in {out} has samples of shape {config.shape}, {config.data} now {shape}")
    elif last.exists():
        raise ValueError(f"--out: {out} holds a run; go on with it by --resume, or name another directory")
    else:
        name = args.data or "digits"
        samples, shape = _samples(name, args.size, args.channels, args.workers)
        recipe = _recipe(shape)
        default = Config(name, shape, None, None, "penalty", recipe.batch_size, recipe.n_critic, seed=0)
        config = replace(default, **given)
    trainer, batches = _trainer(config, device, args.backend), _batches(config, samples, device, args.workers)
    if content is not None:
        trainer.load_state_dict(content["trainer"])
        batches.load_state_dict(content["data"])
    out.mkdir(parents=True, exist_ok=True)
    return config, out, trainer, samples, batches


def _train(args: argparse.Namespace) -> int:
    with _problems():
        import rich  # noqa: F401 - what is needed at the end had better be there at the start

        from fastwgan import pictures

        config, out, trainer, samples, batches = _prepare(args)
    steps = max(0, (args.steps or _recipe(config.shape).steps) - trainer.critic_iterations)
    done = fit(trainer, batches, steps, out=out, config=asdict(config), progress=True)

    count = 2000 if len(config.shape) == 1 else 100
    _draw(config, trainer.sample(count), out / "samples.png", config.seed, samples)
    pictures.curves(out / "metrics.csv", out / "curves.png")
    state = f"step {trainer.critic_iterations} ({trainer.generator_iterations} generator steps)"
    if done < steps:
        print(f"interrupted at {state}; saved in {out}, --resume goes on")
        return INTERRUPTED
    print(f"{state}: {out}/samples.png, curves.png, metrics.csv, last.pt")
    return 0


def _sample(args: argparse.Namespace) -> int:
    with _problems():
        if args.out.suffix not in (".npy", ".png"):
            raise ValueError(f"--out: expected a name ending in .npy or .png, got {args.out}")
        content = checkpoint.load(args.checkpoint)
        config = Config.of(content, args.checkpoint)
        generator = _generator(config.shape)
        generator.load_state_dict(content["trainer"]["generator"])
    generator.eval()
    random = torch.Generator().manual_seed(stream_seed(args.seed, SAMPLES))
    latents = torch.randn(args.count, _recipe(config.shape).latent, generator=random)
    with torch.no_grad():
        samples = torch.cat([generator(z) for z in torch.split(latents, AT_ONCE)])
    if args.out.suffix == ".npy":
        np.save(args.out, samples.numpy())
    else:
        with _problems():
            _draw(config, samples, args.out, args.seed)
    print(f"{args.count} samples of shape {tuple(samples.shape[1:])}: {args.out}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    with _problems():
        import rich  # noqa: F401 - for the tables

        from fastwgan import bench_run

        device = _device(args.device)
        if args.json is not None and not args.json.absolute().parent.is_dir():
            raise ValueError(f"--json: {args.json.parent} is no directory")
        if args.ops and (args.workload or args.implementation or args.precision):
            raise ValueError("--ops: has workloads, implementations and a precision of its own")
    limits = {"rounds": args.rounds, "minutes": args.minutes, "path": args.json}
    if args.ops:
        bench_run.run_ops(device, **limits)
    else:
        workloads = args.workload or bench_run.default_workloads(device)
        precisions = args.precision or (["float32", "bfloat16"] if device.type == "cuda" else ["float32"])
        bench_run.run_steps(workloads, args.implementation or list(IMPLEMENTATIONS), precisions, device, **limits)
    return 0


def _version(module: str) -> str:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return "not installed"


def _info(args: argparse.Namespace) -> int:
    print(f"fastwgan {fastwgan.__version__}")
    print(f"python   {platform.python_version()} on {platform.platform()}")
    for module in ("torch", "triton", "numpy"):
        print(f"{module:<8} {_version(module)}")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    ops = [name for name in functional.__all__ if not name.startswith("gradient")]
    for device in devices:
        title = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
        problem = triton_problem(device)
        print(f"\n{device}: {title}")
        for op in (*ops, "gradient_penalty", "RMSprop.step", "Adam.step"):
            print(f"  {op:<20} {'triton' if problem is None else 'torch'}")
        if problem is not None:
            print(f"  torch, because {problem}")
        else:
            print("  triton, because it can run here" + (", interpreted" if device.type == "cpu" else ""))
    return 0


def _int(minimum: int, maximum: int) -> Callable[[str], int]:
    """An argument type: an int within bounds, both included."""

    def parse(text: str) -> int:
        value = int(text) if text.strip().removeprefix("-").isdigit() else None
        if value is None or not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"expected an int from {minimum:,} to {maximum:,}, got {text!r}")
        return value

    return parse


def _data(text: str) -> str:
    """An argument type: the name of a data set, or KIND:PATH."""
    if not _known(text):
        names = ", ".join((*DATA, *(f"{kind}:PATH" for kind in files.KINDS)))
        raise argparse.ArgumentTypeError(f"expected one of {names}, got {text!r}")
    return text


def _short(name: str) -> str:
    """A name for a directory from one of --data: of a file its stem."""
    kind, _, path = name.partition(":")
    return Path(path).expanduser().resolve().stem or kind if path else kind


def _minutes(text: str) -> float:
    """An argument type: a number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 10**6:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastwgan", description="Wasserstein GANs on fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"fastwgan {fastwgan.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train on a data set; Ctrl-C saves and ends it")
    train.set_defaults(run=_train)
    train.add_argument(
        "--data", type=_data, metavar="DATA",
        help=f"{', '.join(DATA)}; folder:PATH, all images under a directory; npy:PATH, points as floats [N, D], or "
        "images of three or four dimensions, uint8 or floats in [-1, 1]; idx:PATH, MNIST's format, gzipped or not, "
        "28x28 padded to 32x32; default: digits",
    )  # fmt: skip
    train.add_argument(
        "--size", type=int, choices=files.SIZES,
        help=f"scale images in files to so many pixels square; default: a folder's to {files.FOLDER_SIZE}",
    )  # fmt: skip
    train.add_argument(
        "--channels", type=int, choices=(1, 3), help="of a folder's images, gray or RGB; default: as the first is"
    )
    train.add_argument(
        "--workers", type=_int(0, 64), default=2, help="threads that read files, which changes no number; default: 2"
    )
    train.add_argument("--constraint", choices=CONSTRAINTS, help="WGAN or WGAN-GP; default: penalty")
    train.add_argument("--steps", type=_int(1, 10**15), help="critic steps in all, resumed ones included")
    train.add_argument("--batch-size", type=_int(1, MOST), help="real samples in a critic step")
    train.add_argument("--n-critic", type=_int(1, 10**15), help="critic steps to a generator step")
    train.add_argument("--seed", type=_int(0, 2**63 - 1), help="of weights, data order, latents and eps; default: 0")
    train.add_argument("--device", help="such as cpu or cuda:0; default: the first GPU, else the CPU")
    train.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")
    train.add_argument("--out", type=Path, help="directory; default: runs/DATA-CONSTRAINT")
    train.add_argument("--resume", action="store_true", help="go on from the directory's last.pt")

    sample = commands.add_parser("sample", help="draw samples from a trained generator")
    sample.set_defaults(run=_sample)
    sample.add_argument("--checkpoint", type=Path, required=True, help="a last.pt of fastwgan train")
    sample.add_argument("--count", type=_int(1, MOST), default=100)
    sample.add_argument("--seed", type=_int(0, 2**63 - 1), default=0)
    sample.add_argument("--out", type=Path, required=True, help="F.npy for the numbers, F.png for a picture")

    bench = commands.add_parser("bench", help="time a critic step against PyTorch's, or each op by itself")
    bench.set_defaults(run=_bench)
    for option, choices, default in (
        ("--workload", WORKLOADS, "default: all, on a CPU the mlp and tabular ones"),
        ("--implementation", IMPLEMENTATIONS, "beside the textbook; default: all"),
        ("--precision", PRECISIONS, "default: float32, on a GPU both"),
    ):
        names = ", ".join(choices)
        bench.add_argument(option, nargs="+", choices=choices, metavar="NAME", help=f"{names}; {default}")
    bench.add_argument("--ops", action="store_true", help="time the ops, each by itself, and not critic steps")
    bench.add_argument("--device", help="such as cpu or cuda:0; default: the first GPU, else the CPU")
    bench.add_argument("--rounds", type=_int(1, MOST), default=200, help="samples of each figure; default: 200")
    bench.add_argument("--minutes", type=_minutes, default=8.0, help="that it should take; default: 8")
    bench.add_argument("--json", type=Path, help="file for all figures")

    info = commands.add_parser("info", help="versions, devices, and which backend each op uses there and why")
    info.set_defaults(run=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 2 on a bad argument, 130 after Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (_UserError, files.BadDataError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
