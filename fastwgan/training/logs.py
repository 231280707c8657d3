"""What is told of a run while it goes on: averages over intervals of steps, in a CSV file, TensorBoard and a bar."""

import csv
import io
import math
import operator
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastwgan import metrics
from fastwgan.checkpoint import written
from fastwgan.metrics import Metrics

__all__ = ["Averages", "CSVLog", "Interval", "Progress", "TensorBoardLog"]

COLUMNS = ("step", "generator_step", "seconds", *Metrics.NAMES, "skipped")
Join = Callable[[float, float], float]
EXTREMES: dict[str, Join] = {"gradient_norm_min": min, "gradient_norm_max": max}


class Averages:
    """The mean of each value over the steps in which it is there and finite.

    ``gradient_norm_min`` is the least, ``gradient_norm_max`` the greatest. ``skipped`` counts the steps whose update
    was skipped, as a gradient was not finite.
    """

    def __init__(self) -> None:
        self._totals: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def add(self, step: Mapping[str, float]) -> None:
        """Take up one step's values."""
        self._counts["skipped"] += step.get("nonfinite", 0) > 0
        for name, value in step.items():
            if math.isfinite(value):
                self._counts[name] += 1
                join: Join = EXTREMES.get(name, operator.add)
                self._totals[name] = join(self._totals[name], value) if name in self._totals else value

    def values(self) -> dict[str, float]:
        """The averages that there are, and ``skipped``."""
        averages = {name: x if name in EXTREMES else x / self._counts[name] for name, x in self._totals.items()}
        return averages | {"skipped": self._counts["skipped"]}


class Interval:
    """The steps since the last row of the log. Their Metrics stay on the device, a bounded number of them."""

    HELD = 100  # reading waits for the device, which is nothing once in so many steps

    def __init__(self) -> None:
        self._held: list[Metrics] = []
        self._averages = Averages()
        self._empty = True

    def __bool__(self) -> bool:
        """Whether there have been steps since the last end."""
        return not self._empty

    def add(self, step: Metrics, *, last: bool) -> list[dict[str, float]]:
        """Take up a step; return what was read: all that is held after the ``last``, mostly nothing before."""
        self._held.append(step)
        self._empty = False
        return self.read() if last or len(self._held) == self.HELD else []

    def read(self) -> list[dict[str, float]]:
        """The values of the steps that have not been read yet, oldest first. Waits for the device."""
        steps = metrics.read(self._held)
        self._held.clear()
        for step in steps:
            self._averages.add(step)
        return steps

    def end(self) -> dict[str, float]:
        """The averages of all steps read since the last end."""
        values = self._averages.values()
        self._averages, self._empty = Averages(), True
        return values


def _rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and complete rows of a log; what a killed process left without a line's end is no row."""

    def complete(row: Mapping[str | None, Any]) -> bool:
        try:
            int(row["step"]), float(row["seconds"])
        except (KeyError, TypeError, ValueError):
            return False
        return None not in row and None not in row.values()  # which stand for cells too many and too few

    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))
    rows = [row for row in reader if complete(row)]
    return list(reader.fieldnames or ()), rows


class CSVLog:
    """A row of averages for each interval, in a file that a resumed run goes on with.

    Args:
        path: the file. Its rows past ``start``, left by a run that was killed, are dropped; columns of its own that it
            has from another version stay.
        start: the step that the run starts from.
    """

    def __init__(self, path: Path, start: int) -> None:
        columns, rows = _rows(path)
        kept = [row for row in rows if int(row["step"]) <= start]
        columns = [*COLUMNS, *(name for name in columns if name not in COLUMNS)]
        self._seconds = float(kept[-1]["seconds"]) if kept else 0.0
        with written(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(kept)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns, restval="")
        self._begun = time.perf_counter()

    def write(self, step: int, generator_step: int, values: Mapping[str, float]) -> None:
        seconds = round(self._seconds + time.perf_counter() - self._begun, 3)
        self._writer.writerow({"step": step, "generator_step": generator_step, "seconds": seconds, **values})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardLog:
    """The same values as scalars of TensorBoard, by critic step. Needs tensorboard.

    Args:
        directory: where its event files go; steps past ``start`` in those of an earlier run are hidden.
        start: the step that the run starts from.
    """

    def __init__(self, directory: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory), purge_step=start + 1 if start else None)

    def write(self, step: int, generator_step: int, values: Mapping[str, float]) -> None:
        for name, value in {"generator_step": generator_step, **values}.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Progress:
    """A bar with steps per second, the Wasserstein estimate and how the critic's constraint fares. Needs rich.

    Where the output is no terminal, only its last state is printed.
    """

    def __init__(self, start: int, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[values]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total, completed=start, values="")
        self._bar.start()
        self._last = (start, time.perf_counter())

    def write(self, step: int, generator_step: int, values: Mapping[str, float]) -> None:
        before, then = self._last
        self._last = (step, time.perf_counter())
        told = [f"{(step - before) / max(self._last[1] - then, 1e-9):.1f} it/s"]
        for name, label in (("wasserstein", "W"), ("penalty", "penalty"), ("saturation", "saturation")):
            if name in values:
                told.append(f"{label} {values[name]:.4g}")
        self._bar.update(self._task, completed=step, values="  ".join(told))

    def close(self) -> None:
        self._bar.stop()
