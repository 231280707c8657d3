"""Check the arguments of a command line and run its commands: an error is one line, an exit status says how it went."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from fastwgan import files

__all__ = ["INTERRUPTED", "Parser", "UserError", "device_named", "ints", "problems", "run"]

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


class UserError(Exception):
    """Something the user can mend; its one line is all that is shown."""


@contextmanager
def problems() -> Iterator[None]:
    """Take what goes wrong while arguments and files are read for the user's to mend; later it would be ours."""
    try:
        yield
    except ImportError as error:
        extra = "train,tensorboard" if "tensorboard" in str(error) else "train"
        raise UserError(f"{error}; pip install 'fastwgan[{extra}]' has what this command needs") from error
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise UserError(str(error)) from error


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End with one line and status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def device_named(name: str | None) -> torch.device:
    """Return the device of a name; of none the first GPU, or the CPU.

    Raises:
        ValueError: it cannot be used.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.Generator(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {name} cannot be used ({str(error).splitlines()[0]})") from error
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def ints(minimum: int, maximum: int) -> Callable[[str], int]:
    """Return an argument type: an int within bounds, both included."""

    def parse(text: str) -> int:
        value = int(text) if text.strip().removeprefix("-").isdigit() else None
        if value is None or not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"expected an int from {minimum:,} to {maximum:,}, got {text!r}")
        return value

    return parse


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Run ``args.run(args)``; return its exit status, or 130 after Ctrl-C. What the user can mend ends with 2."""
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader has seen enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UserError, files.BadDataError, FloatingPointError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
