"""fastwgan verify: judge a step on built-in or the user's networks."""

import argparse
from pathlib import Path
from typing import Any

from fastwgan.cli.common import BACKEND, SEED, Options, device, problems
from fastwgan.verification import command

NAMES: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
WEIGHT: dict[str, Any] = {"type": float, "default": 0.0, "metavar": "NUMBER"}
OPTIONS: Options = {
    "--networks": {
        "metavar": "MODULE:FACTORY",
        "help": "yours: a function without arguments that returns (generator, critic, real), or a dict of the "
        "arguments of fastwgan.verify; default: built-in ones",
    },
    "--workload": NAMES | {"choices": command.BUILT_IN, "help": f"{', '.join(command.BUILT_IN)}; default: all"},
    "--constraint": NAMES | {"choices": command.CONSTRAINTS, "help": f"{', '.join(command.CONSTRAINTS)}; default: all"},
    "--blend": WEIGHT | {"help": "share of the GAN's loss in WGAN's; default: 0"},
    "--drift": WEIGHT | {"help": "weight of mean(D(real)^2) in the critic's loss; default: 0"},
    "--device": {"help": "such as cpu or cuda:0; default: where --networks are, else the first GPU, else the CPU"},
    "--backend": BACKEND,
    "--seed": {"type": SEED, "default": 0},
    "--json": {"type": Path, "help": "file for all rows"},
}


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
    return 0 if passed else 1
