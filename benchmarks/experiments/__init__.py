"""The papers' claims, trained again: each experiment runs a few seeds, checks what has to hold, and draws it.

An experiment is a module, or an object in one, with the names of :class:`benchmarks.experiments.common.Experiment`.
"""

import json
import math
import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import torch

import fastwgan
from benchmarks.experiments.common import Check, Experiment

__all__ = ["EXPERIMENTS", "load", "run"]

EXPERIMENTS = {  # name: module, or module:object
    "parallel-lines": "parallel_lines",
    "vanishing": "vanishing",
    "clipping": "clipping",
    "gaussians8": "toys:GAUSSIANS8",
    "gaussians25": "toys:GAUSSIANS25",
    "swissroll": "toys:SWISSROLL",
    "momentum": "momentum",
    "critic-iterations": "critic_iterations",
    "digits": "digits",
}


def load(name: str) -> Experiment:
    """The experiment of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"name: expected one of {', '.join(EXPERIMENTS)}, got {name!r}")
    experiment: Experiment = resolve_name(f"{__name__}.{EXPERIMENTS[name]}")
    return experiment


def _rounded(value: Any) -> Any:
    """The same with floats to 6 significant digits, and those that JSON has no number for as "inf", "-inf" or "nan"."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def _one(name: str, seed: int, scale: float) -> dict[str, Any]:
    """One seed, on one thread, so that sums are taken in the same order on any machine."""
    torch.set_num_threads(1)
    return {"seed": seed, **_rounded(load(name).run(seed, scale))}


def _print(title: str, checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what has to hold", title=title, title_justify="left")
    for column in ("measured", "bound"):
        table.add_column(column, justify="right")
    table.add_column("")
    for check in checks:
        verdict = "[green]passed[/]" if check.passed else "[red]failed[/]"
        table.add_row(check.name, f"{check.value:.4g}", check.bound, verdict)
    Console().print(table)


def run(name: str, *, seeds: Sequence[int] = (0, 1, 2), out: Path, scale: float = 1.0) -> bool:
    """Run an experiment; write its results to out/NAME.json and its picture to out/NAME.png; print its checks.

    Args:
        name: a key of :data:`EXPERIMENTS`.
        seeds: one run each, in processes side by side.
        out: directory, made if need be.
        scale: multiplies the number of training steps. The checks' bounds are meant for 1.

    Returns:
        Whether all checks passed.

    Raises:
        ValueError: there is no such experiment, no seed, or ``scale`` is not above zero.
    """
    experiment = load(name)
    if not seeds:
        raise ValueError("seeds: expected at least one, got none")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: expected a number above 0, got {scale}")
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    workers = min(len(seeds), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        results = list(pool.map(_one, repeat(name), seeds, repeat(scale)))
    seconds = time.perf_counter() - start
    checks = experiment.judge(results)
    record = {
        "experiment": name,
        "title": experiment.TITLE,
        "versions": {
            "fastwgan": fastwgan.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "seconds": round(seconds, 1),
        "results": results,
        "checks": _rounded([asdict(check) for check in checks]),
    }
    (out / f"{name}.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    experiment.draw(results, out / f"{name}.png")
    _print(experiment.TITLE, checks)
    print(f"{out / name}.json, {name}.png: {len(seeds)} seeds, {seconds:.0f} s")
    return all(check.passed for check in checks)
