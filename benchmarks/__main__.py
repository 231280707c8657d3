"""The command ``python -m benchmarks experiment NAME``: the papers' claims, trained again."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import experiments


def _count(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an int >= 1, got {text!r}")
    return value


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) > 2**62:
        raise argparse.ArgumentTypeError(f"expected an int from 0 to 2**62, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, or 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    experiment = commands.add_parser("experiment", help="train what the papers show, and check that it comes out")
    names = ", ".join(experiments.EXPERIMENTS)
    experiment.add_argument(
        "name", nargs="?", choices=(*experiments.EXPERIMENTS, "all"), metavar="NAME",
        help=f"{names}, or all; the exit status is 1 if a check fails",
    )  # fmt: skip
    experiment.add_argument("--list", action="store_true", help="say what each of them shows")
    experiment.add_argument("--seeds", type=_count, default=3, help="how many; default: 3")
    experiment.add_argument("--seed", type=_seed, default=0, help="the first of them; default: 0")
    experiment.add_argument(
        "--out", type=Path, default=Path("runs") / "experiments", help="directory; default: runs/experiments"
    )
    args = parser.parse_args(argv)
    if args.list:
        for name in experiments.EXPERIMENTS:
            print(f"{name:<18} {experiments.load(name).TITLE}")
        return 0
    if args.name is None:
        parser.error(f"NAME: expected all or one of {names}, got none")
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401 - both are for the end, which is minutes away
    except ImportError as error:
        parser.error(f"{error}; pip install 'fastwgan[train]' has what this command needs")
    chosen = list(experiments.EXPERIMENTS) if args.name == "all" else [args.name]
    seeds = range(args.seed, args.seed + args.seeds)
    passed = [experiments.run(name, seeds=seeds, out=args.out) for name in chosen]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
