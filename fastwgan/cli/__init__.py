"""The command line: fastwgan train | sample | verify | info."""

import os
import sys
from collections.abc import Sequence

import torch.distributed as dist

from fastwgan.cli import info, sample, train, verify
from fastwgan.cli.common import INTERRUPTED, Parser, run
from fastwgan.version import __version__

__all__ = ["INTERRUPTED", "main"]

COMMANDS = {
    "train": (train, "train on a data set; Ctrl-C saves and ends it"),
    "sample": (sample, "draw samples from a trained generator"),
    "verify": (verify, "judge a step on your networks and device, op by op, against float64"),
    "info": (info, "versions, devices, and which backend each op uses there and why"),
}
MOVED = {"bench": "python -m benchmarks steps (or ops)", "experiment": "python -m benchmarks experiment"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1 if a verification failed, 2 on a bad argument, 130 after Ctrl-C."""
    parser = Parser(prog="fastwgan", description="Wasserstein GANs on fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"fastwgan {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, meaning) in COMMANDS.items():
        command = commands.add_parser(name, help=meaning)
        command.set_defaults(run=module.run)
        for option, details in module.OPTIONS.items():
            command.add_argument(option, **details)
    for name, now in MOVED.items():
        commands.add_parser(name, help=f"has left the package: {now}")
    given = sys.argv[1:] if argv is None else argv
    for name in set(given[:1]) & MOVED.keys():
        parser.error(f"{name} has left the package: run {MOVED[name]} in a checkout of the source")
    status = run(parser, parser.parse_args(given))
    if argv is None and dist.is_torchelastic_launched():
        sys.stderr.flush()
        os._exit(status)  # PyTorch's threads now and then abort an interpreter that shuts down round them
    return status
