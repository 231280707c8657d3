"""fastwgan train: train on a data set, in one process or several."""

import os
from argparse import ArgumentTypeError, Namespace
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist

from fastwgan import checkpoint
from fastwgan.cli import common, runs
from fastwgan.cli.common import BACKEND, EVER, INTERRUPTED, MOST, SEED, Options, integer, number, problems
from fastwgan.cli.runs import Batches, Config, recipe_for
from fastwgan.data import Samples, files
from fastwgan.trainer import Trainer
from fastwgan.training.fit import fit


def _data(text: str) -> str:
    if not runs.is_known(text):
        names = ", ".join((*runs.DATA, *(f"{kind}:PATH" for kind in files.KINDS)))
        raise ArgumentTypeError(f"expected one of {names}, got {text!r}")
    return text


DATA = (
    f"{', '.join(runs.DATA)}; folder:PATH, all images under a directory; npy:PATH, points as floats [N, D], or images "
    "of three or four dimensions, uint8 or floats in [-1, 1]; idx:PATH, MNIST's format, gzipped or not, 28x28 padded "
    "to 32x32; default: digits"
)
SIZE = f"scale images in files to so many pixels square; default: a folder's to {files.FOLDER_SIZE}"
DECAY = number(float, 0, 1, "a number from 0 to 1, such as 0.999")
OPTIONS: Options = {
    "--data": {"type": _data, "metavar": "DATA", "help": DATA},
    "--size": {"type": int, "choices": files.SIZES, "help": SIZE},
    "--channels": {"type": int, "choices": (1, 3), "help": "of a folder's images; default: as the first is"},
    "--workers": {"type": integer(0, 64), "default": 2, "help": "threads that read files; default: 2"},
    "--constraint": {"choices": runs.CONSTRAINTS, "help": "WGAN or WGAN-GP; default: penalty"},
    "--steps": {"type": integer(1, EVER), "help": "critic steps in all, resumed ones included"},
    "--batch-size": {"type": integer(1, MOST), "help": "real samples in a critic step"},
    "--n-critic": {"type": integer(1, EVER), "help": "critic steps to a generator step"},
    "--amp": {"choices": runs.PRECISIONS, "help": "mixed precision; default: none"},
    "--ema": {"type": DECAY, "metavar": "DECAY", "help": "keep a running average of the generator's weights"},
    "--nonfinite": {"choices": ("raise", "skip"), "help": "end at infinite or NaN gradients, or go on; default: raise"},
    "--seed": {"type": SEED, "help": "of weights, data order, latents and eps; default: 0"},
    "--device": {"help": "such as cpu or cuda:0; default: the first GPU, else the CPU"},
    "--backend": BACKEND,
    "--out": {"type": Path, "help": "directory; default: runs/DATA-CONSTRAINT"},
    "--save-every": {"type": integer(1, EVER), "default": 2000, "help": "steps; default: 2000"},
    "--keep": {"type": integer(1, 10**6), "default": 1, "help": "checkpoints, the newest ones; default: 1"},
    "--sample-every": {"type": integer(1, EVER), "help": "steps between pictures in samples/; default: none"},
    "--tensorboard": {"action": "store_true", "help": "write the log for TensorBoard, too"},
    "--resume": {"action": "store_true", "help": "go on from the directory's last.pt"},
}


def _prepare(args: Namespace, device: torch.device) -> tuple[Config, Path, Trainer, Samples | None, Batches]:
    """Return the run that the arguments name, new or resumed: what it is, its directory, trainer, samples, batches."""
    fields = Config.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    data, content = args.data or "digits", None
    kind, _, path = data.partition(":")
    stem = (path and Path(path).expanduser().resolve().stem) or kind
    out = args.out or Path("runs") / f"{stem}-{args.constraint or Config.constraint}"
    last = out / checkpoint.LAST
    if args.resume:
        content = checkpoint.load(last)
        config = Config.of(content, last)
        known = asdict(config) | {"size": config.shape[-1], "channels": config.shape[0]}
        for name, value in given.items():
            if known[name] != value:
                raise ValueError(f"--{name.replace('_', '-')}: the run in {out} has {known[name]}, got {value}")
        samples, shape = runs.read_samples(config.data, config.size, config.channels, args.workers)
        if shape != config.shape:
            raise ValueError(f"--data: the run in {out} has samples of shape {config.shape}, {config.data} now {shape}")
    elif last.exists():
        raise ValueError(f"--out: {out} holds a run; go on with it by --resume, or name another directory")
    else:
        samples, shape = runs.read_samples(data, args.size, args.channels, args.workers)
        recipe = recipe_for(shape)
        config = replace(Config(data, shape, recipe.batch_size, recipe.n_critic), **given)
    trainer = config.make_trainer(device, args.backend)
    batches = config.make_batches(samples, trainer, args.workers)
    if device.type == "cpu" and trainer.world == 1 and not os.environ.keys() & {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}:
        if content is None:
            config = replace(config, threads=config.fastest_threads(trainer))
        torch.set_num_threads(config.threads or torch.get_num_threads())
    if content is not None:
        trainer.load_state_dict(content["trainer"])
        batches.load_state_dict(content["data"])
    out.mkdir(parents=True, exist_ok=True)
    return config, out, trainer, samples, batches


def run(args: Namespace) -> int:
    several, name = dist.is_torchelastic_launched(), args.device
    with problems():
        if several and name is None and torch.cuda.is_available():
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        device = common.device(name)
        if several and device.type == "cuda":
            torch.cuda.set_device(device)
        if several:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        from fastwgan.cli import pictures

        for needed in ("rich", "torch.utils.tensorboard")[: 1 + args.tensorboard]:
            import_module(needed)  # at the start, as the end may be hours away
        config, out, trainer, samples, batches = _prepare(args, device)
    draw = partial(config.draw, samples=samples)
    steps = max(0, (args.steps or recipe_for(config.shape).steps) - trainer.critic_iterations)
    count = 2000 if len(config.shape) == 1 else 100
    done = fit(
        trainer, batches, steps, out=out, config=asdict(config), save_every=args.save_every, keep=args.keep,
        sample_every=args.sample_every, draw=draw if args.sample_every else None, sample_count=count,
        tensorboard=args.tensorboard, progress=True,
    )  # fmt: skip
    if not trainer.rank:
        draw(trainer.sample(count, ema=trainer.ema is not None), out / "samples.png")
        pictures.curves(out / "metrics.csv", out / "curves.png")
        state = f"step {trainer.critic_iterations} ({trainer.generator_iterations} generator steps)"
        interrupted = f"interrupted at {state}; saved in {out}, --resume goes on"
        print(interrupted if done < steps else f"{state}: {out}/samples.png, curves.png, metrics.csv, last.pt")
    if several:
        dist.barrier()  # not after an error, when the others may wait for this one
        dist.destroy_process_group()
    return INTERRUPTED if done < steps else 0
