"""fastwgan train: train on a data set, in one process or several."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fastwgan import checkpoint
from fastwgan.cli import common, runs
from fastwgan.cli.common import EVER, INTERRUPTED, MOST, SEED, integer, number, problems
from fastwgan.cli.runs import Config
from fastwgan.data import Samples, files
from fastwgan.trainer import Trainer
from fastwgan.training.fit import fit


def _data(text: str) -> str:
    """Return the name of a data set, or KIND:PATH."""
    if not runs.is_known(text):
        names = ", ".join((*runs.DATA, *(f"{kind}:PATH" for kind in files.KINDS)))
        raise argparse.ArgumentTypeError(f"expected one of {names}, got {text!r}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data", type=_data, metavar="DATA",
        help=f"{', '.join(runs.DATA)}; folder:PATH, all images under a directory; npy:PATH, points as floats [N, D], "
        "or images of three or four dimensions, uint8 or floats in [-1, 1]; idx:PATH, MNIST's format, gzipped or not, "
        "28x28 padded to 32x32; default: digits",
    )  # fmt: skip
    add(
        "--size", type=int, choices=files.SIZES,
        help=f"scale images in files to so many pixels square; default: a folder's to {files.FOLDER_SIZE}",
    )  # fmt: skip
    add("--channels", type=int, choices=(1, 3), help="of a folder's images, gray or RGB; default: as the first is")
    add(
        "--workers", type=integer(0, 64), default=2, help="threads that read files, which changes no number; default: 2"
    )
    add("--constraint", choices=runs.CONSTRAINTS, help="WGAN or WGAN-GP; default: penalty")
    add("--steps", type=integer(1, EVER), help="critic steps in all, resumed ones included")
    add("--batch-size", type=integer(1, MOST), help="real samples in a critic step")
    add("--n-critic", type=integer(1, EVER), help="critic steps to a generator step")
    add("--amp", choices=runs.PRECISIONS, help="mixed precision; default: none")
    decay = number(float, 0, 1, "a number from 0 to 1, such as 0.999")
    add("--ema", type=decay, metavar="DECAY", help="keep a running average of the generator's weights")
    add(
        "--nonfinite", choices=("raise", "skip"),
        help="at gradients that are infinite or NaN end the run, or go on unless they keep coming; default: raise",
    )  # fmt: skip
    add("--seed", type=SEED, help="of weights, data order, latents and eps; default: 0")
    add("--device", help="such as cpu or cuda:0; default: the first GPU, else the CPU")
    add("--backend", choices=("auto", "triton", "torch"), default="auto")
    add("--out", type=Path, help="directory; default: runs/DATA-CONSTRAINT")
    add("--save-every", type=integer(1, EVER), default=2000, help="steps; default: 2000")
    add("--keep", type=integer(1, 10**6), default=1, help="checkpoints, the newest ones; default: 1")
    add("--sample-every", type=integer(1, EVER), help="steps between pictures in samples/; default: none")
    add("--tensorboard", action="store_true", help="write the log for TensorBoard, too")
    add("--resume", action="store_true", help="go on from the directory's last.pt")


@contextmanager
def _process(name: str | None) -> Iterator[torch.device]:
    """This process's device, and the process group if torchrun has started several."""
    several = dist.is_torchelastic_launched()
    with problems():
        if several and name is None and torch.cuda.is_available():
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        device = common.device(name)
        if several and device.type == "cuda":
            torch.cuda.set_device(device)
        if several:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield device
    if several:
        dist.barrier()  # not after an error, when the others may wait for this one
        dist.destroy_process_group()


def _directory(data: str, constraint: str) -> Path:
    """Return where a run goes by default. Files go by their stems."""
    kind, _, path = data.partition(":")
    return Path("runs") / f"{(path and Path(path).expanduser().resolve().stem) or kind}-{constraint}"


def _prepare(
    args: argparse.Namespace, device: torch.device
) -> tuple[Config, Path, Trainer, Samples | None, runs.Batches]:
    """Return the run that the arguments name, new or resumed: what it is, its directory, trainer, samples, batches."""
    fields = Config.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    data = args.data or "digits"
    out = args.out or _directory(data, args.constraint or Config.constraint)
    last = out / checkpoint.LAST
    content = None
    if args.resume:
        content = checkpoint.load(last)
        config = Config.of(content, last)
        config.check(given, out)
        samples, shape = runs.read_samples(config.data, config.size, config.channels, args.workers)
        if shape != config.shape:
            raise ValueError(f"--data: the run in {out} has samples of shape {config.shape}, {config.data} now {shape}")
    elif last.exists():
        raise ValueError(f"--out: {out} holds a run; go on with it by --resume, or name another directory")
    else:
        samples, shape = runs.read_samples(data, args.size, args.channels, args.workers)
        recipe = runs.recipe_for(shape)
        config = replace(Config(data, shape, recipe.batch_size, recipe.n_critic), **given)
    trainer = config.make_trainer(device, args.backend)
    batches = config.make_batches(samples, trainer, args.workers)
    if content is not None:
        trainer.load_state_dict(content["trainer"])
        batches.load_state_dict(content["data"])
    out.mkdir(parents=True, exist_ok=True)
    return config, out, trainer, samples, batches


def run(args: argparse.Namespace) -> int:
    with _process(args.device) as device:
        return _train(args, device)


def _train(args: argparse.Namespace, device: torch.device) -> int:
    with problems():
        import rich  # noqa: F401 - what is needed at the end had better be there at the start

        from fastwgan.cli import pictures

        if args.tensorboard:
            from torch.utils import tensorboard  # noqa: F401

        config, out, trainer, samples, batches = _prepare(args, device)
    steps = max(0, (args.steps or config.recipe.steps) - trainer.critic_iterations)
    count = 2000 if len(config.shape) == 1 else 100

    def draw(generated: Tensor, path: Path) -> None:
        config.draw(generated, path, samples)

    done = fit(
        trainer, batches, steps, out=out, config=asdict(config), save_every=args.save_every, keep=args.keep,
        sample_every=args.sample_every, draw=draw if args.sample_every else None, sample_count=count,
        tensorboard=args.tensorboard, progress=True,
    )  # fmt: skip
    status = INTERRUPTED if done < steps else 0
    if trainer.rank:
        return status
    draw(trainer.sample(count, ema=trainer.ema is not None), out / "samples.png")
    pictures.curves(out / "metrics.csv", out / "curves.png")
    state = f"step {trainer.critic_iterations} ({trainer.generator_iterations} generator steps)"
    if status:
        print(f"interrupted at {state}; saved in {out}, --resume goes on")
    else:
        print(f"{state}: {out}/samples.png, curves.png, metrics.csv, last.pt")
    return status
