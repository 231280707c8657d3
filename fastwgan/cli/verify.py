"""fastwgan verify: judge a step on built-in or the user's networks."""

import argparse
from pathlib import Path

from fastwgan.cli.common import SEED, device, problems
from fastwgan.verification import command

FAILED = 1  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--networks", metavar="MODULE:FACTORY",
        help="yours: a function without arguments that returns (generator, critic, real), or a dict of the arguments "
        "of fastwgan.verify; default: built-in ones",
    )  # fmt: skip
    for option, known in (("--workload", command.BUILT_IN), ("--constraint", command.CONSTRAINTS)):
        add(option, nargs="+", choices=known, metavar="NAME", help=f"{', '.join(known)}; default: all")
    for option, meaning in (
        ("--blend", "share of the GAN's loss in WGAN's"),
        ("--drift", "weight of mean(D(real)^2) in the critic's loss"),
    ):
        add(option, type=float, default=0.0, metavar="NUMBER", help=f"{meaning}; default: 0")
    add("--device", help="such as cpu or cuda:0; default: where --networks are, else the first GPU, else the CPU")
    add("--backend", choices=("auto", "triton", "torch"), default="auto")
    add("--seed", type=SEED, default=0)
    add("--json", type=Path, help="file for all rows")


def run(args: argparse.Namespace) -> int:
    with problems():
        if args.networks is not None and args.workload:
            raise ValueError("--workload: names built-in networks, and --networks others")
        if args.json is not None and not args.json.absolute().parent.is_dir():
            raise ValueError(f"--json: {args.json.parent} is no directory")
        passed = command.run(
            args.workload or [*command.BUILT_IN], args.networks, args.constraint or [*command.CONSTRAINTS],
            None if args.networks is not None and args.device is None else device(args.device),
            backend=args.backend, seed=args.seed, path=args.json, blend=args.blend, drift=args.drift,
        )  # fmt: skip
    return 0 if passed else FAILED
