"""Prepare a run of the benchmarks, and keep its record in JSON: what it was measured on, and what it has found."""

import json
import logging
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import fastwgan
from benchmarks import timing

__all__ = ["environment", "prepared", "write"]


def _commit() -> str | None:
    """Of the checkout that this file belongs to; of a copy without its history what FASTWGAN_COMMIT says, else None."""
    here = Path(__file__)
    if timing.output("git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name) is None:
        return os.environ.get("FASTWGAN_COMMIT")
    commit = timing.output("git", "-C", str(here.parent), "rev-parse", "--short", "HEAD")
    changed = timing.output("git", "-C", str(here.parent), "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if changed else commit


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """All that a figure depends on and that one would need to measure it again."""
    gpu = device.type == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf32 = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    driver = timing.output(
        "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(device.index or 0)
    )
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        "type": device.type,
        "driver": driver if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "fastwgan": fastwgan.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "tf32": tf32 if gpu else None,
        "threads": torch.get_num_threads(),
        "clocks": timing.clocks(device),
        "chip": _chip(device) if gpu else None,
    }


def _chip(device: torch.device) -> dict[str, Any]:
    chip = torch.cuda.get_device_properties(device)
    return {
        "multiprocessors": chip.multi_processor_count,
        "l2_mib": round(chip.L2_cache_size / 2**20, 1),
        "memory_gib": round(chip.total_memory / 2**30, 1),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """The record so far, whole or not at all, so that a run that is killed leaves what it has measured."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(new, path)


@contextmanager
def cold_compilers() -> Iterator[None]:
    """An empty cache for Inductor and Triton, so that a compilation's time does not depend on earlier runs."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        caches = {name: str(Path(folder) / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        with mock.patch.dict(os.environ, caches):
            yield


@contextmanager
def prepared(device: torch.device, *, compiles: bool) -> Iterator[None]:
    """The device made current, compilers with cold caches and without Dynamo's remarks on what it ignores.

    What the compiler sets up once for all, if it is wanted at all, is not to be in the first one's time.
    """
    logger = logging.getLogger("torch._dynamo")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), cold_compilers():
            if compiles:
                with suppress(Exception):  # then each implementation that compiles fails as well, and says so
                    torch.compile(torch.neg)(torch.ones(2, device=device))
            yield
    finally:
        logger.setLevel(before)
