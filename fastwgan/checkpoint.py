"""Checkpoints: one file, written whole or not at all, read without executing anything."""

import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.serialization import config as serialization

__all__ = ["LAST", "clean", "export_safetensors", "load", "save", "save_newest", "written"]

FORMAT, VERSION, LAST = "fastwgan", 2, "last.pt"


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary file to write, which becomes ``path`` once it is on disk; where the block raises it goes."""
    path = Path(path).resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file)
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


def clean(directory: Path) -> None:
    """Remove the temporary files that a killed run left in ``directory``."""
    for path in directory.iterdir():
        if re.fullmatch(r"\..+\.(pt|csv)\.\d+", path.name):
            path.unlink(missing_ok=True)


def _plain(value: Any, name: str) -> Any:
    """Return ``value`` as types that a safe load accepts, or raise TypeError naming what is none of them."""
    if isinstance(value, (Tensor, np.generic)):  # some of NumPy's numbers are Python's, too
        return value.detach() if isinstance(value, Tensor) else value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {_plain(k, f"key of {name}"): _plain(v, f"{name}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v, f"{name}[{i}]") for i, v in enumerate(value))
    raise TypeError(f"{name}: expected tensors, numbers, strings and containers of them, got {type(value).__name__}")


def save(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write ``content`` (tensors, numbers, strings, and dicts, lists and tuples of them) to ``path``.

    A file that was there stays until the new one is complete and on disk. Raises TypeError for what could not be loaded
    again, and OSError where the file cannot be written.
    """
    plain = _plain({"format": FORMAT, "version": VERSION, **content}, "content")
    checksums = serialization.patch("save.compute_crc32", True)  # type: ignore[attr-defined] # load() looks at them
    with written(path) as temporary, checksums:
        try:
            with temporary.open("wb") as file:
                torch.save(plain, file)
        except RuntimeError as error:  # a full disk shows as one, raised while torch handles the OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def save_newest(directory: Path, content: dict[str, Any], *, step: int, keep: int) -> None:
    """:func:`save` to ``directory``/last.pt and, unless ``keep`` is 1, have the ``keep`` newest there by step.

    Those are named as step-000002000.pt; the newest is the same file as last.pt, which is never older than the newest
    but one. Older ones go only then; those of later steps, of a run resumed from before, stay until overwritten or old.
    """
    newest = directory / (LAST if keep == 1 else f"step-{step:09d}.pt")
    save(newest, content)
    if keep == 1:
        return
    with written(directory / LAST) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(newest, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(newest, temporary)
    steps = [int(m[1]) for p in directory.iterdir() if (m := re.fullmatch(r"step-(\d{9,})\.pt", p.name))]
    for old in sorted(s for s in steps if s <= step)[:-keep]:
        (directory / f"step-{old:09d}.pt").unlink()


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`save` wrote, tensors on ``device``.

    Raises:
        FileNotFoundError, ValueError: there is none; it is none of this library, damaged, or by another version.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"path: no checkpoint at {path}")
    if not Path(path).is_file():
        raise ValueError(f"path: expected a file, got the directory {path}")
    try:
        with zipfile.ZipFile(path) as archive:  # as which torch writes it, but it looks at no checksum
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of its part {damaged} is wrong")
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a foreign or truncated file raises many kinds
        raise ValueError(f"path: {path} is not a readable checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"path: {path} was not written by fastwgan")
    if (version := content.get("version")) != VERSION:
        hint = "; a newer fastwgan wrote it" if isinstance(version, int) and version > VERSION else ""
        raise ValueError(f"path: {path} has format version {version}, expected {VERSION}{hint}")
    return content


def export_safetensors(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a module's weights and buffers to ``path``, by custom ``*.safetensors``, for other programs.

    Tied weights are written once, as ``safetensors.torch.load_model`` takes them; the other names are in the metadata.
    Needs safetensors. Raises TypeError where ``module`` is none or its state has more than tensors, and OSError where
    the file cannot be written; one that was there is untouched then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected an nn.Module, got {type(module).__name__}")
    names: dict[Any, str] = {}
    tensors, tied = {}, {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise TypeError(f"module: expected tensors only in its state, got {type(value).__name__} as {name}")
        same = names.setdefault((value.data_ptr(), value.shape, value.stride(), value.dtype), name)
        if same != name and value.numel():
            tied[name] = same
        else:
            tensors[name] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)  # views made apart
    with written(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=tied)
        except SafetensorError as error:
            raise OSError(str(error)) from error
