"""The command line: python -m benchmarks steps | ops | gpu | tune | report | experiment."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import experiments, networks
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.run import default_workloads, layouts_of, run_ops, run_steps
from benchmarks.steps import LAYOUTS, PRECISIONS
from benchmarks.workloads import WORKLOADS
from fastwgan.cli.common import Parser, UserError, device, integer, number, problems, run

MOST = 1_000_000  # samples of a figure
OTHERS = {  # modules that read their arguments themselves
    "gpu": "run what wants a GPU, in two calls of six minutes",
    "tune": "try launch parameters on a GPU",
    "report": "make README's tables and pictures of records",
}


def _device(args: argparse.Namespace) -> torch.device:
    """Return the device, once it is clear that tables can be printed and the record written."""
    with problems():
        import rich  # noqa: F401

        if args.json is not None and not args.json.absolute().parent.is_dir():
            raise ValueError(f"--json: {args.json.parent} is no directory")
        return device(args.device)


def _steps(args: argparse.Namespace) -> int:
    chosen = _device(args)
    gpu = chosen.type == "cuda"
    workloads, implementations = args.workload or default_workloads(chosen), args.implementation or [*IMPLEMENTATIONS]
    if args.networks is not None:
        timed = networks.implementations(args.networks, gpu=gpu)
        kept = [name for name in timed if name not in IMPLEMENTATIONS or name in implementations]
        workloads, implementations = [args.networks], kept
    precisions = args.precision or (list(PRECISIONS) if gpu else ["float32"])
    layouts = {name: layouts_of(name, args.layout, chosen) for name in workloads}
    jobs = [(name, precision, layout) for name in workloads for precision in precisions for layout in layouts[name]]
    if not jobs:
        raise UserError(f"--layout: expected contiguous for {', '.join(workloads)}, got channels_last")
    record = run_steps(jobs, implementations, chosen, rounds=args.rounds, minutes=args.minutes, path=args.json)
    if args.networks is not None:
        print("\n".join(networks.advice(record)))
    return 0


def _ops(args: argparse.Namespace) -> int:
    run_ops(_device(args), rounds=args.rounds, minutes=args.minutes, path=args.json)
    return 0


def _other(args: argparse.Namespace) -> int:
    status: int = import_module(f"benchmarks.{args.name}").main(args.rest)  # not at the top, as tune needs Triton
    return status


def _experiment(args: argparse.Namespace) -> int:
    if args.list:
        for name in experiments.EXPERIMENTS:
            print(f"{name:<18} {experiments.load(name).TITLE}")
        return 0
    if args.name is None:
        raise UserError(f"NAME: expected all or one of {', '.join(experiments.EXPERIMENTS)}, got none")
    with problems():
        import matplotlib  # noqa: F401
        import rich  # noqa: F401 - both are for the end, which is minutes away
    chosen = list(experiments.EXPERIMENTS) if args.name == "all" else [args.name]
    seeds = range(args.seed, args.seed + args.seeds)
    passed = [experiments.run(name, seeds=seeds, out=args.out) for name in chosen]
    return 0 if all(passed) else 1


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m benchmarks", description="FastWGAN's benchmarks and experiments.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    steps = commands.add_parser("steps", help="time a critic step against PyTorch's")
    steps.set_defaults(run=_steps)
    which = steps.add_mutually_exclusive_group()
    for group, option, choices, default in (
        (which, "--workload", WORKLOADS, "default: all, on a CPU the mlp and tabular ones"),
        (steps, "--implementation", IMPLEMENTATIONS, "beside the two textbooks; default: all"),
        (steps, "--precision", PRECISIONS, "default: float32, on a GPU all"),
        (
            steps,
            "--layout",
            LAYOUTS,
            "in memory, of convolutional networks and data; default: contiguous, on a GPU both",
        ),
    ):
        names = ", ".join(choices)
        group.add_argument(option, nargs="+", choices=choices, metavar="NAME", help=f"{names}; {default}")
    which.add_argument(
        "--networks", metavar="MODULE:FUNCTION",
        help="networks of yours, and which options the Trainer should be given; benchmarks/networks.py says how",
    )  # fmt: skip
    ops = commands.add_parser("ops", help="time each op by itself against PyTorch's, and against a copy")
    ops.set_defaults(run=_ops)
    for command in (steps, ops):
        command.add_argument("--device", help="such as cpu or cuda:0; default: the first GPU, else the CPU")
        command.add_argument(
            "--rounds", type=integer(1, MOST), default=200, help="samples of each figure; default: 200"
        )
        command.add_argument(
            "--minutes",
            type=number(float, 1e-9, 10**6, "a number above 0"),
            default=8.0,
            help="that it should take; default: 8",
        )
        command.add_argument("--json", type=Path, help="file for all figures")

    for name, meaning in OTHERS.items():
        commands.add_parser(name, help=meaning).set_defaults(run=_other, name=name)

    experiment = commands.add_parser("experiment", help="train what the papers show, and check that it comes out")
    experiment.set_defaults(run=_experiment)
    names = ", ".join(experiments.EXPERIMENTS)
    experiment.add_argument(
        "name", nargs="?", choices=(*experiments.EXPERIMENTS, "all"), metavar="NAME",
        help=f"{names}, or all; the exit status is 1 if a check fails",
    )  # fmt: skip
    experiment.add_argument("--list", action="store_true", help="say what each of them shows")
    experiment.add_argument("--seeds", type=integer(1, 10**6), default=3, help="how many; default: 3")
    experiment.add_argument("--seed", type=integer(0, 2**62), default=0, help="the first of them; default: 0")
    experiment.add_argument(
        "--out", type=Path, default=Path("runs") / "experiments", help="directory; default: runs/experiments"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1 if something failed, 2 on a bad argument, 130 after Ctrl-C."""
    parser = _parser()
    given = sys.argv[1:] if argv is None else [*argv]
    own = given[:1] if given and given[0] in OTHERS else given
    return run(parser, parser.parse_args(own, argparse.Namespace(rest=given[1:])))


if __name__ == "__main__":
    sys.exit(main())
