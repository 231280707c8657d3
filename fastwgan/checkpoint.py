"""Checkpoints: one file, written whole or not at all, read without executing anything."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = "fastwgan"
VERSION = 1

__all__ = ["load", "save"]


def _plain(value: Any, name: str) -> Any:
    """``value`` as the types that a safe load accepts, or an error naming what is none of them."""
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, np.generic)):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {_plain(k, f"key of {name}"): _plain(v, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v, f"{name}[{i}]") for i, v in enumerate(value))
    raise TypeError(f"{name}: expected tensors, numbers, strings and containers of them, got {type(value).__name__}")


def save(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, strings, and dicts, lists and tuples of them) to ``path``.

    The file appears under its name only once it is complete and on disk; what was there before stays until then.

    Raises:
        TypeError: something in ``content`` could not be loaded again.
        OSError: the file cannot be written. A file that was there before is untouched.
    """
    path = Path(path).resolve()
    plain = _plain({"format": FORMAT, "version": VERSION, **content}, "content")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name, too, is to be on disk
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


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
        raise ValueError(f"path: {path} is not a readable checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"path: {path} was not written by fastwgan")
    if content.get("version") != VERSION:
        raise ValueError(f"path: {path} has format version {content.get('version')}, expected {VERSION}")
    return content
