"""Put what matters of the records of a GPU's run into lines for a terminal."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from typing import Any

from benchmarks import report

LINES = 58  # at most, so that a terminal shows them all
FAILED = 12  # tests that are named
SLOWEST = 4  # kernels of a step
WIDTH = 170

Record = dict[str, Any]


def lines(records: dict[str, Path]) -> list[str]:
    """Return the summary of records and logs by the name of their part; of what is not there, nothing."""
    of_part: dict[str, Callable[[str], list[str]]] = {"tests": tests, "sanitizer": sanitizer}
    of_part |= {part: lambda text: steps(json.loads(text)) for part in ("steps", "compiled")}
    of_part |= {"ops": lambda text: ops(json.loads(text)), "profile": lambda text: profile(json.loads(text))}
    texts = {part: path.read_text(errors="replace") for part, path in records.items() if path.exists()}
    found = [line[:WIDTH] for part, text in texts.items() for line in of_part[part](text)]
    return found if len(found) <= LINES else [*found[: LINES - 1], f"... {len(found) - LINES + 1} more lines"]


def tests(log: str) -> list[str]:
    """Return pytest's counts and the tests that failed."""
    counts = [line.strip(" =") for line in log.splitlines() if re.search(r"\d+ (passed|failed).* in \d", line)]
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
    more = [f"  and {len(failed) - FAILED} more"] if len(failed) > FAILED else []
    return [f"tests: {line}" for line in counts[-1:]] + [f"  failed: {name}" for name in failed[:FAILED]] + more


def sanitizer(log: str) -> list[str]:
    """Return what each of compute-sanitizer's tools has counted, and the tests that failed under it."""
    said = re.findall(r"^(\w+): (?:=+ (.*SUMMARY: .*)|=* ?(\d+ (?:passed|failed).*? in .*?)=*)$", log, re.MULTILINE)
    return [f"sanitizer: {tool}: {(verdict or counts).strip()}" for tool, verdict, counts in sorted(said)]


def ops(record: Record) -> list[str]:
    """Return the share of a copy's bandwidth that each of our ops reaches at each size, and then the best peer's."""
    cells: dict[str, list[str]] = {}
    for result in record["ops"]:
        shares = {name: figures["share"] for name, figures in result["implementations"].items()}
        peer = max((share for name, share in shares.items() if name != "fastwgan"), default=None)
        number = _number(result["elements"]) + (f"/{result['tensors']}" if result["tensors"] > 1 else "")
        both = ["-" if share is None else f"{share:.0%}" for share in (shares.get("fastwgan"), peer)]
        cells.setdefault(result["op"], []).append(f"{number}:{both[0]}({both[1]})")
    head = f"ops: share of a copy's {record['copy_gb_s']} GB/s by elements/tensors, (best peer's)"
    left = [f"  left out: {why}" for why in record["left_out"][:3]]
    rows = [f"  {op}: {some}" for op, row in cells.items() for some in wrap(" ".join(row), WIDTH - 20)]
    return [head, *rows, *left]


def _number(n: int) -> str:
    return str(n) if n < 1e3 else f"{n / 1e3:.3g}k" if n < 1e6 else f"{n / 1e6:.3g}M"


def steps(record: Record) -> list[str]:
    """Return README's table of a record, in columns."""
    rows = report.gpu_rows(record)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    dropped = {f"  {name}: {why}" for result in record["critic_step"] for name, why in result["dropped"].items()}
    return [
        *table,
        *report.marked(rows),
        *sorted(dropped)[:3],
        *(f"  left out: {why}" for why in record["left_out"][:3]),
    ]


def profile(record: Record) -> list[str]:
    """Return the host's share of each workload's steps, the longest kernels, and the generator's products by way."""
    found = []
    for result in record["workloads"]:
        form = "graph" if "graph" in result else "eager"
        figures = result[form]
        host = {
            "step": figures["step_ms"], "host": figures["host_ms"], "replay": figures.get("replay_ms"),
            "iteration": figures["iteration_ms"], "its steps one by one": figures["steps_ms"],
        }  # fmt: skip
        times = ", ".join(f"{name} {ms}" for name, ms in host.items() if ms is not None)
        found.append(f"{result['workload']}, {form}: {figures['python_calls']} Python calls; ms: {times}")
        kernels = figures["kernels"]
        total = sum(row["count"] * row["us"] for row in kernels)
        found.append(f"  {sum(row['count'] for row in kernels):.0f} kernels, {total:.0f} us in all:")
        found += [f"  {row['count']:4g} x {row['us']:g} us {row['kernel']}" for row in kernels[:SLOWEST]]
    for row in record.get("network_products", []):
        found.append(f"{row['layer']}, us: " + "; ".join(f"{way} {us:g}" for way, us in row["us"].items()))
    return found + [f"  left out: {why}" for why in record["left_out"]]
