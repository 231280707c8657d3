"""The command line."""

from fastwgan.cli.main import main

__all__ = ["main"]
