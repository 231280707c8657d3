"""The command line: fastwgan train | sample | verify | info."""

import argparse
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import fastwgan
from fastwgan import checkpoint, data, files, functional, runs, verify_run
from fastwgan.backend import triton_problem
from fastwgan.command import INTERRUPTED, Parser, UserError, device_named, ints, problems, run
from fastwgan.fit import fit
from fastwgan.streams import stream_seed
from fastwgan.trainer import Trainer

MOST = 1_000_000  # samples in a batch or a file
AT_ONCE = 500  # samples that one forward pass makes for a file
FAILED = 1  # exit status of a verification
MOVED = {  # once commands of this one: where they are now
    "bench": "python -m benchmarks steps (or ops)",
    "experiment": "python -m benchmarks experiment",
}


@contextmanager
def _processes(name: str | None) -> Iterator[torch.device]:
    """This process's device, and the process group if torchrun has started several."""
    if not dist.is_torchelastic_launched():
        with problems():
            device = device_named(name)
        yield device
        return
    with problems():
        if name is None and torch.cuda.is_available():
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        device = device_named(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield device
    dist.barrier()  # not after an error, when the others may wait for this one
    dist.destroy_process_group()


def _prepare(
    args: argparse.Namespace, device: torch.device
) -> tuple[runs.Config, Path, Trainer, data.Samples | None, Any]:
    """The run that the arguments name, new or resumed: (what it is, its directory, trainer, samples, batches)."""
    options = runs.Config.__dataclass_fields__.keys() - {"shape"}
    given = {field: getattr(args, field) for field in options if getattr(args, field) is not None}
    out = args.out or Path("runs") / f"{_short(args.data or 'digits')}-{args.constraint or 'penalty'}"
    last = out / "last.pt"
    content = None
    if args.resume:
        content = checkpoint.load(last)
        config = runs.Config.of(content, last)
        config.check(given, out)
        samples, shape = runs.read_samples(config.data, config.size, config.channels, args.workers)
        if shape != config.shape:
            raise ValueError(f"--data: the run in {out} has samples of shape {config.shape}, {config.data} now {shape}")
    elif last.exists():
        raise ValueError(f"--out: {out} holds a run; go on with it by --resume, or name another directory")
    else:
        name = args.data or "digits"
        samples, shape = runs.read_samples(name, args.size, args.channels, args.workers)
        recipe = runs.recipe_for(shape)
        default = runs.Config(name, shape, None, None, "penalty", recipe.batch_size, recipe.n_critic, seed=0)
        config = replace(default, **given)
    trainer = runs.make_trainer(config, device, args.backend)
    batches = runs.make_batches(config, samples, trainer, args.workers)
    if content is not None:
        trainer.load_state_dict(content["trainer"])
        batches.load_state_dict(content["data"])
    out.mkdir(parents=True, exist_ok=True)
    return config, out, trainer, samples, batches


def _train(args: argparse.Namespace) -> int:
    with _processes(args.device) as device:
        return _train_on(device, args)


def _train_on(device: torch.device, args: argparse.Namespace) -> int:
    with problems():
        import rich  # noqa: F401 - what is needed at the end had better be there at the start

        from fastwgan import pictures

        if args.tensorboard:
            from torch.utils import tensorboard  # noqa: F401

        config, out, trainer, samples, batches = _prepare(args, device)
    steps = max(0, (args.steps or runs.recipe_for(config.shape).steps) - trainer.critic_iterations)
    count = 2000 if len(config.shape) == 1 else 100

    def draw(generated: torch.Tensor, path: Path) -> None:
        runs.draw(config, generated, path, config.seed, samples)

    done = fit(
        trainer, batches, steps, out=out, config=asdict(config), save_every=args.save_every, keep=args.keep,
        sample_every=args.sample_every, draw=draw if args.sample_every else None, sample_count=count,
        tensorboard=args.tensorboard, progress=True,
    )  # fmt: skip
    if trainer.rank:
        return INTERRUPTED if done < steps else 0
    draw(trainer.sample(count, ema=trainer.ema is not None), out / "samples.png")
    pictures.curves(out / "metrics.csv", out / "curves.png")
    state = f"step {trainer.critic_iterations} ({trainer.generator_iterations} generator steps)"
    if done < steps:
        print(f"interrupted at {state}; saved in {out}, --resume goes on")
        return INTERRUPTED
    print(f"{state}: {out}/samples.png, curves.png, metrics.csv, last.pt")
    return 0


def _sample(args: argparse.Namespace) -> int:
    with problems():
        if args.out.suffix not in (".npy", ".png"):
            raise ValueError(f"--out: expected a name ending in .npy or .png, got {args.out}")
        content = checkpoint.load(args.checkpoint)
        config = runs.Config.of(content, args.checkpoint)
        generator = runs.make_generator(config.shape)
        generator.load_state_dict(content["trainer"]["generator"])
        if args.ema and config.ema is None:
            raise ValueError(f"--ema: {args.checkpoint} is of a run without")
        if args.ema:
            generator.load_state_dict(content["trainer"]["ema"], strict=False)  # buffers stay the generator's
    generator.eval()
    random = torch.Generator().manual_seed(stream_seed(args.seed, runs.SAMPLES))
    latents = torch.randn(args.count, runs.recipe_for(config.shape).latent, generator=random)
    with torch.no_grad():
        samples = torch.cat([generator(z) for z in torch.split(latents, AT_ONCE)])
    if args.out.suffix == ".npy":
        np.save(args.out, samples.numpy())
    else:
        with problems():
            runs.draw(config, samples, args.out, args.seed)
    print(f"{args.count} samples of shape {tuple(samples.shape[1:])}: {args.out}")
    return 0


def _moved(args: argparse.Namespace) -> int:
    raise UserError(f"{args.name} has left the package: run {args.command} in a checkout of the source")


def _verify(args: argparse.Namespace) -> int:
    with problems():
        if args.networks is not None and args.workload:
            raise ValueError("--workload: names built-in networks, and --networks others")
        if args.json is not None and not args.json.absolute().parent.is_dir():
            raise ValueError(f"--json: {args.json.parent} is no directory")
        device = None if args.networks is not None and args.device is None else device_named(args.device)
        passed = verify_run.run(
            args.workload or list(verify_run.BUILT_IN), args.networks, args.constraint or list(verify_run.CONSTRAINTS),
            device, backend=args.backend, seed=args.seed, path=args.json, blend=args.blend, drift=args.drift,
            instance_noise=args.instance_noise,
        )  # fmt: skip
    return 0 if passed else FAILED


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
    print("\nreal and fake samples in a critic step")
    print("  share one pass of a critic whose layers are known to keep samples apart, as those of fastwgan train do")
    print("  have a pass each of any other, such as a class of your own, or one with BatchNorm or conditions;")
    print("  repr(trainer) says which, and Trainer(independent_samples=True) is your word that they may share one:")
    print("  on a CPU 1.05 times as fast under weight clipping, no faster under the penalty; on a GPU not measured")
    return 0


def _data(text: str) -> str:
    """An argument type: the name of a data set, or KIND:PATH."""
    if not runs.is_known(text):
        names = ", ".join((*runs.DATA, *(f"{kind}:PATH" for kind in files.KINDS)))
        raise argparse.ArgumentTypeError(f"expected one of {names}, got {text!r}")
    return text


def _short(name: str) -> str:
    """A name for a directory from one of --data: of a file its stem."""
    kind, _, path = name.partition(":")
    return Path(path).expanduser().resolve().stem or kind if path else kind


def _decay(text: str) -> float:
    """An argument type: a number from 0 to 1, 1 excluded."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, such as 0.999, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastwgan", description="Wasserstein GANs on fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"fastwgan {fastwgan.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train on a data set; Ctrl-C saves and ends it")
    train.set_defaults(run=_train)
    train.add_argument(
        "--data", type=_data, metavar="DATA",
        help=f"{', '.join(runs.DATA)}; folder:PATH, all images under a directory; npy:PATH, points as floats [N, D], "
        "or images of three or four dimensions, uint8 or floats in [-1, 1]; idx:PATH, MNIST's format, gzipped or not, "
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
        "--workers", type=ints(0, 64), default=2, help="threads that read files, which changes no number; default: 2"
    )
    train.add_argument("--constraint", choices=runs.CONSTRAINTS, help="WGAN or WGAN-GP; default: penalty")
    train.add_argument("--steps", type=ints(1, 10**15), help="critic steps in all, resumed ones included")
    train.add_argument("--batch-size", type=ints(1, MOST), help="real samples in a critic step")
    train.add_argument("--n-critic", type=ints(1, 10**15), help="critic steps to a generator step")
    train.add_argument("--amp", choices=runs.PRECISIONS, help="mixed precision; default: none")
    train.add_argument("--ema", type=_decay, metavar="DECAY", help="keep a running average of the generator's weights")
    train.add_argument(
        "--nonfinite", choices=("raise", "skip"),
        help="at gradients that are infinite or NaN end the run, or go on unless they keep coming; default: raise",
    )  # fmt: skip
    train.add_argument("--seed", type=ints(0, 2**63 - 1), help="of weights, data order, latents and eps; default: 0")
    train.add_argument("--device", help="such as cpu or cuda:0; default: the first GPU, else the CPU")
    train.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")
    train.add_argument("--out", type=Path, help="directory; default: runs/DATA-CONSTRAINT")
    train.add_argument("--save-every", type=ints(1, 10**15), default=2000, help="steps; default: 2000")
    train.add_argument("--keep", type=ints(1, 10**6), default=1, help="checkpoints, the newest ones; default: 1")
    train.add_argument("--sample-every", type=ints(1, 10**15), help="steps between pictures in samples/; default: none")
    train.add_argument("--tensorboard", action="store_true", help="write the log for TensorBoard, too")
    train.add_argument("--resume", action="store_true", help="go on from the directory's last.pt")

    sample = commands.add_parser("sample", help="draw samples from a trained generator")
    sample.set_defaults(run=_sample)
    sample.add_argument("--checkpoint", type=Path, required=True, help="a last.pt of fastwgan train")
    sample.add_argument("--ema", action="store_true", help="by the running average of the generator's weights")
    sample.add_argument("--count", type=ints(1, MOST), default=100)
    sample.add_argument("--seed", type=ints(0, 2**63 - 1), default=0)
    sample.add_argument("--out", type=Path, required=True, help="F.npy for the numbers, F.png for a picture")

    for name, command in MOVED.items():
        moved = commands.add_parser(name, help=f"{command}, in a checkout of the source")
        moved.set_defaults(run=_moved, name=name, command=command)

    verify = commands.add_parser("verify", help="judge a step on your networks and device, op by op, against float64")
    verify.set_defaults(run=_verify)
    verify.add_argument(
        "--networks", metavar="MODULE:FACTORY",
        help="yours: a function without arguments that returns (generator, critic, real), or a dict of the arguments "
        "of fastwgan.verify; default: built-in ones",
    )  # fmt: skip
    for option, known in (("--workload", [*verify_run.BUILT_IN]), ("--constraint", [*verify_run.CONSTRAINTS])):
        verify.add_argument(option, nargs="+", choices=known, metavar="NAME", help=f"{', '.join(known)}; default: all")
    for option, meaning in (
        ("--blend", "share of the GAN's loss in WGAN's"),
        ("--drift", "what the critic's loss has mean(D(real)^2) added with"),
        ("--instance-noise", "standard deviation of noise on what the critic is shown"),
    ):
        verify.add_argument(option, type=float, default=0.0, metavar="NUMBER", help=f"{meaning}; default: 0")
    verify.add_argument("--device", help="such as cpu or cuda:0; default: where --networks are, else as in train")
    verify.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")
    verify.add_argument("--seed", type=ints(0, 2**63 - 1), default=0)
    verify.add_argument("--json", type=Path, help="file for all rows")

    info = commands.add_parser("info", help="versions, devices, and which backend each op uses there and why")
    info.set_defaults(run=_info)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1 if a verification failed, 2 on a bad argument, 130 after Ctrl-C."""
    parser = _parser()
    given = sys.argv[1:] if argv is None else [*argv]
    # What follows one of these is for the other command.
    args = parser.parse_args(given[:1] if given and given[0] in MOVED else given)
    status = run(parser, args)
    if argv is None and dist.is_torchelastic_launched():
        sys.stderr.flush()
        os._exit(status)  # PyTorch's threads now and then abort an interpreter that shuts down round them
    return status
