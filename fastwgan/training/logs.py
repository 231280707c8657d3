"""Tells of a run while it goes on: averages over intervals of steps, in a CSV file, TensorBoard and a bar."""

import csv
import io
import math
import operator
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastwgan import metrics
from fastwgan.checkpoint import written
from fastwgan.metrics import Metrics

COLUMNS = ("step", "generator_step", "seconds", *Metrics.NAMES, "skipped")
EXTREMES: dict[str, Callable[[float, float], float]] = {"gradient_norm_min": min, "gradient_norm_max": max}


class Interval:
    """Averages the finite values of the steps since the last row; holds a bounded number of Metrics on the device."""

    HELD = 100  # reading waits for the device, which is nothing once in so many steps

    def __init__(self) -> None:
        self._held: list[Metrics] = []
        self._totals: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def __bool__(self) -> bool:
        """Return whether there have been steps since the last end."""
        return bool(self._held or self._counts)

    def add(self, step: Metrics, *, last: bool) -> list[dict[str, float]]:
        """Take up a step; return what was read: all that is held after the ``last``, mostly nothing before."""
        self._held.append(step)
        return self.read() if last or len(self._held) == self.HELD else []

    def read(self) -> list[dict[str, float]]:
        """Return the values of the steps that have not been read yet, oldest first. Waits for the device."""
        steps = metrics.read(self._held)
        self._held.clear()
        for step in steps:
            self.include(step)
        return steps

    def include(self, step: Mapping[str, float]) -> None:
        self._counts["skipped"] += step.get("nonfinite", 0) > 0
        for name, value in step.items():
            if math.isfinite(value):
                self._counts[name] += 1
                join: Callable[[float, float], float] = EXTREMES.get(name, operator.add)
                self._totals[name] = join(self._totals[name], value) if name in self._totals else value

    def end(self) -> dict[str, float]:
        """Return each value's mean or extreme since the last end; ``skipped`` counts steps of non-finite gradients."""
        averages = {name: x if name in EXTREMES else x / self._counts[name] for name, x in self._totals.items()}
        averages["skipped"] = self._counts["skipped"]
        self._totals.clear()
        self._counts.clear()
        return averages


class CSVLog:
    """A row of averages for each interval, in a file that a resumed run goes on with.

    Rows past ``start``, left by a run that was killed, are dropped; columns from another version stay.
    """

    def __init__(self, path: Path, start: int) -> None:
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # what a killed process left without a line's end is no row
        reader, kept = csv.DictReader(io.StringIO(whole, newline="")), []
        for row in reader:
            with suppress(KeyError, TypeError, ValueError):  # it is no row of a log
                step, _ = int(row["step"]), float(row["seconds"])
                if step <= start and None not in (*row, *row.values()):  # as for cells too many or too few
                    kept.append(row)
        columns = [*dict.fromkeys((*COLUMNS, *(reader.fieldnames or ())))]
        self._begun = time.perf_counter() - (float(kept[-1]["seconds"]) if kept else 0.0)
        with written(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        self.close = self._file.close

    def write(self, step: int, generator_step: int, values: Mapping[str, float]) -> None:
        seconds = round(time.perf_counter() - self._begun, 3)
        self._writer.writerow({"step": step, "generator_step": generator_step, "seconds": seconds, **values})
        self._file.flush()


class TensorBoardLog:
    """The same values as scalars of TensorBoard, by critic step. Those of an earlier run past ``start`` are hidden."""

    def __init__(self, directory: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory), purge_step=start + 1 if start else None)
        self.close = self._writer.close

    def write(self, step: int, generator_step: int, values: Mapping[str, float]) -> None:
        for name, value in {"generator_step": generator_step, **values}.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


class Progress:
    """A bar shows steps per second, Wasserstein estimate and constraint; without a terminal, only its last state."""

    def __init__(self, start: int, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        values = TextColumn("{task.fields[values]}")
        self._bar = Bar(TextColumn("training"), BarColumn(), MofNCompleteColumn(), values, TimeRemainingColumn())
        self._task = self._bar.add_task("", total=total, completed=start, values="")
        self._bar.start()
        self.close = self._bar.stop
        self._last = (start, time.perf_counter())

    def write(self, step: int, generator_step: int, values: Mapping[str, float]) -> None:
        (before, then), self._last = self._last, (step, time.perf_counter())
        rate = f"{(step - before) / max(self._last[1] - then, 1e-9):.1f} it/s"
        names = {"wasserstein": "W", "penalty": "penalty", "saturation": "saturation"}
        told = [rate, *(f"{label} {values[name]:.4g}" for name, label in names.items() if name in values)]
        self._bar.update(self._task, completed=step, values="  ".join(told))
