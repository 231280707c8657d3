"""A run of the benchmarks: job after job within the minutes given, its tables, and its record in JSON."""

import json
import logging
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fastwgan
from fastwgan import bench, bench_ops, bench_together, timing
from fastwgan.timing import output
from fastwgan.workloads import WORKLOADS

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["default_workloads", "environment", "prepared", "run_ops", "run_steps"]


def default_workloads(device: torch.device) -> list[str]:
    """All on a GPU; on a CPU those whose steps take milliseconds."""
    return [name for name in WORKLOADS if device.type == "cuda" or name.startswith(("mlp", "tabular"))]


# The record


def _commit() -> str | None:
    """Of the checkout that this file belongs to; of a copy without its history what FASTWGAN_COMMIT says, else None."""
    here = Path(__file__)
    if output("git", "-C", str(here.parent), "ls-files", "--error-unmatch", here.name) is None:
        return os.environ.get("FASTWGAN_COMMIT")
    commit = output("git", "-C", str(here.parent), "rev-parse", "--short", "HEAD")
    changed = output("git", "-C", str(here.parent), "status", "--porcelain", "--untracked-files=no")
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
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", str(device.index or 0))
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
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update({name: str(Path(folder) / name.lower()) for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _record(device: torch.device, rounds: int, minutes: float) -> dict[str, Any]:
    return {"environment": environment(device), "settings": {"rounds": rounds, "minutes": minutes}, "left_out": []}


# Tables


def _ms(quantiles: dict[str, float]) -> str:
    return f"{quantiles['q50']:.4g}"


def _step_table(result: dict[str, Any], *, gpu: bool) -> "Table":
    from rich.table import Table

    title = f"{result['workload']}, {result['precision']}, batch {result['batch']}"
    table = Table("implementation", title=title, title_justify="left")
    columns = ["ms", "5-95 %", "textbook's / it", "set-up s"]
    if gpu:
        columns[3:3] = ["device ms", "textbook's / it", "network ms", "host ms", "kernels", "MiB"]
    for column in columns:
        table.add_column(column, justify="right")
    for name, figures in result["implementations"].items():
        step = figures["step_ms"]
        row = [_ms(step), f"{step['q05']:.4g}-{step['q95']:.4g}", f"{figures['step_ratio']:.2f}"]
        if gpu:
            mark = "" if figures["device"] == "replayed" else "*"
            row += [_ms(figures["device_ms"]) + mark, f"{figures['device_ratio']:.2f}"]
            row += [str(figures["network_ms"] or "-"), _ms(figures["host_ms"])]
            row += [str(figures["kernels"]), f"{figures['peak_mib']:.0f}"]
        table.add_row(name, *row, f"{figures['setup_s']:.1f}")
    return table


def _op_table(result: dict[str, Any], *, title: str) -> "Table":
    from rich.table import Table

    table = Table("implementation", title=title, title_justify="left")
    for column in ("ms", "5-95 %", "GB/s", "of a copy's"):
        table.add_column(column, justify="right")
    for name, figures in result["implementations"].items():
        ms, mark = figures["ms"], "*" if figures["how"].startswith("not captured") else ""
        spread = f"{ms['q05']:.4g}-{ms['q95']:.4g}"
        table.add_row(name, _ms(ms) + mark, spread, f"{figures['gb_s']:.4g}", f"{figures['share']:.0%}")
    return table


# The run


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


def _go_through(
    jobs: Sequence[tuple[str, Callable[[], dict[str, Any]], Callable[[dict[str, Any]], "Table"]]],
    schedule: bench.Schedule,
    record: dict[str, Any],
    results: list[dict[str, Any]],
    path: Path | None,
) -> None:
    """Do each job (label, what measures it, what makes a table of that) while there is time; show and record it."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    for label, measure, table in jobs:
        try:
            if schedule.over:
                raise TimeoutError("the minutes given were over")
            results.append(measure())
            console.print(table(results[-1]))
            for name, why in results[-1]["dropped"].items():
                console.print(f"dropped: {name}: {why}")
        except Exception as error:  # whatever it is, the others can still be measured
            record["left_out"].append(f"{label}: {bench.message(error)}")
            console.print(f"left out: {record['left_out'][-1]}")
        if path is not None:
            write(path, record)


def run_steps(
    workloads: Sequence[str],
    implementations: Sequence[str],
    precisions: Sequence[str],
    device: torch.device,
    *,
    rounds: int,
    minutes: float,
    path: Path | None,
) -> dict[str, Any]:
    """Check and time critic steps, print a table for each workload, and return the record.

    On a GPU all are set up at once, see :mod:`fastwgan.bench_together`.

    Args:
        workloads, implementations, precisions: names, see :mod:`fastwgan.bench`.
        device: a CPU or a CUDA device.
        rounds: samples of each figure, at most.
        minutes: that all of it should take; what is left when they are over is named in the record and not begun.
        path: of the record, written after each workload; None for none.
    """
    gpu = device.type == "cuda"
    names = [(workload, precision) for workload in workloads for precision in precisions]
    schedule = bench.Schedule(minutes, len(names), rounds)
    record = _record(device, rounds, minutes) | {"critic_step": []}
    table = partial(_step_table, gpu=gpu)
    checked: dict[str, dict[str, float | str]] = {}

    def measure(job: tuple[str, str]) -> dict[str, Any]:
        name, precision = job
        if name not in checked:
            checked[name] = bench.check(name, implementations, device, schedule)
        return bench.critic_step(name, precision, checked[name], device, schedule)

    if gpu:
        record["settings"]["set_up_at_once"] = len(names)
        together = bench_together.Together(names, implementations, device, rounds=rounds, minutes=minutes)
        with together:
            jobs = [(" ".join(job), partial(together.measure, job), table) for job in names]
            _go_through(jobs, schedule, record, record["critic_step"], path)
    else:
        jobs = [(" ".join(job), partial(measure, job), table) for job in names]
        with prepared(device, compiles=any("compiled" in name for name in implementations)):
            _go_through(jobs, schedule, record, record["critic_step"], path)
    if gpu:
        print("* not by replaying a graph of it, but by calling it again and again; the record says why")
    return record


def run_ops(device: torch.device, *, rounds: int, minutes: float, path: Path | None) -> dict[str, Any]:
    """Check and time each op at each size; otherwise as :func:`run_steps`."""
    cases = bench_ops.cases(device)
    schedule = bench.Schedule(minutes, len(cases), rounds)
    with prepared(device, compiles=True):
        record = _record(device, rounds, minutes)  # which brings an idle GPU's clocks up
        bandwidth = bench_ops.copy_bandwidth(device)
        print(f"a large copy moves {bandwidth:.4g} GB/s")
        record |= {"copy_gb_s": round(bandwidth, 1), "cache": "not flushed between calls", "ops": []}
        measure = partial(bench_ops.measure, device=device, bandwidth=bandwidth, schedule=schedule)
        jobs = [(str(case), partial(measure, case), partial(_op_table, title=str(case))) for case in cases]
        _go_through(jobs, schedule, record, record["ops"], path)
    return record
