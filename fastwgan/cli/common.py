"""What the commands share: the parser, types of arguments, devices, and errors that are the user's to mend."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch

from fastwgan.data.files import BadDataError

INTERRUPTED = 130  # exit status, which a shell reports for a command that Ctrl-C has ended
MOST = 1_000_000  # samples in a batch or a file
EVER = 10**15  # steps
Options = dict[str, dict[str, Any]]  # of a command: what argparse is told of each


class UserError(Exception):
    """Something the user can mend; its one line is all that is shown."""


@contextmanager
def problems() -> Iterator[None]:
    """Raise UserError for whatever goes wrong while arguments and files are read; later it would be ours to mend."""
    try:
        yield
    except ImportError as error:
        extra = "train,tensorboard" if "tensorboard" in str(error) else "train"
        raise UserError(f"{error}; pip install 'fastwgan[{extra}]' has what this command needs") from error
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise UserError(str(error)) from error


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # in one line
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: Callable[[str], float], least: float, end: float, expected: str) -> Callable[[str], Any]:
    """Return an argument type: a number from ``least`` on and below ``end``."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            if least <= (value := kind(text)) < end:
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def integer(least: int, most: int) -> Callable[[str], Any]:
    """Return an argument type: an int within bounds, both included."""
    return number(int, least, most + 1, f"an int from {least:,} to {most:,}")


SEED = integer(0, 2**63 - 1)
BACKEND = {"choices": ("auto", "triton", "torch"), "default": "auto"}


def device(name: str | None) -> torch.device:
    """Return the device that ``--device`` names; without a name the first GPU, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.Generator(name)
        return torch.empty(0, device=name).device  # with an index
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name} cannot be used ({str(error).splitlines()[0]})") from error


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Return the exit status of ``args.run(args)``, or 130 after Ctrl-C. What the user can mend ends with 2."""
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, BadDataError, FloatingPointError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
