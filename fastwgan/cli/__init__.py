"""The command line: fastwgan train | sample | verify | info."""

import os
import sys
from collections.abc import Sequence

import torch.distributed as dist

import fastwgan
from fastwgan.cli import info, sample, train, verify
from fastwgan.cli.common import INTERRUPTED, Parser, UserError
from fastwgan.data.files import BadDataError

__all__ = ["INTERRUPTED", "main"]

COMMANDS = {
    "train": (train, "train on a data set; Ctrl-C saves and ends it"),
    "sample": (sample, "draw samples from a trained generator"),
    "verify": (verify, "judge a step on your networks and device, op by op, against float64"),
    "info": (info, "versions, devices, and which backend each op uses there and why"),
}
BENCHMARKS = {"bench": "steps", "experiment": "experiment"}  # of the source tree, by what they were called here


def _parser() -> Parser:
    parser = Parser(prog="fastwgan", description="Wasserstein GANs on fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"fastwgan {fastwgan.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, meaning) in COMMANDS.items():
        command = commands.add_parser(name, help=meaning)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1 if a verification failed, 2 on a bad argument, 130 after Ctrl-C."""
    parser = _parser()
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] in BENCHMARKS:
        name = BENCHMARKS[given[0]]
        parser.error(f"{given[0]}: expected in the source tree, whose python -m benchmarks {name} has it")
    args = parser.parse_args(given)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        if argv is None and dist.is_torchelastic_launched():
            sys.stderr.flush()
            os._exit(status)  # PyTorch's threads now and then abort an interpreter that shuts down round them
        return status
    except BrokenPipeError:  # the reader has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, BadDataError, FloatingPointError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
