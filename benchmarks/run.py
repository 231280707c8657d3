"""Run the benchmarks job after job within the minutes given; print their tables, and write their record."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import ops, parallel, report, steps
from benchmarks.implementations import BASE, compiles
from benchmarks.networks import find
from benchmarks.record import environment, prepared, write
from benchmarks.workloads import WORKLOADS

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["default_workloads", "layouts_of", "run_ops", "run_steps"]


def default_workloads(device: torch.device) -> list[str]:
    """All on a GPU; on a CPU those whose steps take milliseconds."""
    return [name for name in WORKLOADS if device.type == "cuda" or name.startswith(("mlp", "tabular"))]


def layouts_of(name: str, given: Sequence[str] | None, device: torch.device) -> list[str]:
    """Return the layouts that a workload is timed in: of those given, channels_last is for convolutions alone.

    Without any given it is both on a GPU and for a user's networks, else contiguous.
    """
    both = device.type == "cuda" or ":" in name
    chosen = given or (list(steps.LAYOUTS) if both else ["contiguous"])
    return [layout for layout in chosen if layout == "contiguous" or find(name).convolutional]


def _record(device: torch.device, rounds: int, minutes: float) -> dict[str, Any]:
    return {"environment": environment(device), "settings": {"rounds": rounds, "minutes": minutes}, "left_out": []}


# Tables


def _ms(quantiles: dict[str, float]) -> str:
    return f"{quantiles['q50']:.4g}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _step_table(result: dict[str, Any], *, gpu: bool) -> "Table":
    from rich.table import Table

    title = report.title(result) + (", channels_last" if result["layout"] == "channels_last" else "")
    table = Table(title=title, title_justify="left")
    table.add_column("implementation", overflow="fold")  # a name may be long, and all of it matters
    columns = ["ms", "5-95 %", f"{BASE}'s / it", "set-up s"]
    if gpu:
        columns[3:3] = ["device ms", f"{BASE}'s / it", "network ms", "host ms", "kernels", "MiB"]
    for column in columns:
        table.add_column(column, justify="right")
    for name, figures in result["implementations"].items():
        step = figures["step_ms"]
        row = [_ms(step), f"{step['q05']:.4g}-{step['q95']:.4g}", _ratio(figures["step_ratio"])]
        if gpu:
            mark = "" if figures["device"] == "replayed" else "*"
            row += [_ms(figures["device_ms"]) + mark, _ratio(figures["device_ratio"])]
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


def _go_through(
    jobs: Sequence[tuple[str, Callable[[], dict[str, Any]], Callable[[dict[str, Any]], "Table"]]],
    schedule: steps.Schedule,
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
            record["left_out"].append(f"{label}: {steps.message(error)}")
            console.print(f"left out: {record['left_out'][-1]}")
        if path is not None:
            write(path, record)


def run_steps(
    jobs: Sequence[steps.Job],
    implementations: Sequence[str],
    device: torch.device,
    *,
    rounds: int,
    minutes: float,
    path: Path | None,
) -> dict[str, Any]:
    """Check and time critic steps, print a table for each job, and return the record.

    On a GPU all are set up at once, see :mod:`benchmarks.parallel`.

    Args:
        jobs: (workload, precision, layout), see :mod:`benchmarks.steps`.
        implementations: names, see :mod:`benchmarks.implementations`.
        device: a CPU or a CUDA device.
        rounds: samples of each figure, at most.
        minutes: that all of it should take; what is left when they are over is named in the record and not begun.
        path: of the record, written after each workload; None for none.
    """
    gpu = device.type == "cuda"
    schedule = steps.Schedule(minutes, len(jobs), rounds)
    record = _record(device, rounds, minutes) | {"critic_step": []}
    table = partial(_step_table, gpu=gpu)
    checked: dict[tuple[str, str], dict[str, float | str]] = {}

    def measure(job: steps.Job) -> dict[str, Any]:
        name, precision, layout = job
        if (name, layout) not in checked:
            checked[name, layout] = steps.check(name, implementations, device, schedule, layout)
        return steps.critic_step(name, precision, checked[name, layout], device, schedule, layout=layout)

    if gpu:
        record["settings"]["set_up_at_once"] = len(jobs)
        together = parallel.Together(jobs, implementations, device, rounds=rounds, minutes=minutes)
        with together:
            measured = [(report.place(*job), partial(together.measure, job), table) for job in jobs]
            _go_through(measured, schedule, record, record["critic_step"], path)
    else:
        measured = [(report.place(*job), partial(measure, job), table) for job in jobs]
        with prepared(device, compiles=any(map(compiles, implementations))):
            _go_through(measured, schedule, record, record["critic_step"], path)
    if gpu:
        print("* not by replaying a graph of it, but by calling it again and again; the record says why")
    for line in report.quotes(record):
        print(line)
    return record


def run_ops(device: torch.device, *, rounds: int, minutes: float, path: Path | None) -> dict[str, Any]:
    """Check and time each op at each size; otherwise as :func:`run_steps`."""
    cases = ops.cases(device)
    schedule = steps.Schedule(minutes, len(cases), rounds)
    with prepared(device, compiles=True):
        record = _record(device, rounds, minutes)  # which brings an idle GPU's clocks up
        bandwidth = ops.copy_bandwidth(device)
        print(f"a large copy moves {bandwidth:.4g} GB/s")
        record |= {"copy_gb_s": round(bandwidth, 1), "cache": "not flushed between calls", "ops": []}
        measure = partial(ops.measure, device=device, bandwidth=bandwidth, schedule=schedule)
        jobs = [(str(case), partial(measure, case), partial(_op_table, title=str(case))) for case in cases]
        _go_through(jobs, schedule, record, record["ops"], path)
    return record
