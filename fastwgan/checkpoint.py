"""Checkpoints: one file, written whole or not at all, read without executing anything."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

FORMAT = "fastwgan"
VERSION = 1

__all__ = ["load", "save"]


def save(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, strings and containers of them) to ``path``.

    The file appears under its name only once it is complete and on disk; what was there before stays until then.

    Raises:
        OSError: the file cannot be written. A file that was there before is untouched.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`save` wrote, tensors on ``device``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint of this library, is damaged, or was written by a newer version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: no checkpoint at {path}")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises many kinds on a foreign or truncated file
        raise ValueError(f"path: {path} is not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"path: {path} was not written by fastwgan")
    if content["version"] != VERSION:
        raise ValueError(f"path: {path} has format version {content['version']}, expected {VERSION}")
    return content
