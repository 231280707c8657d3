"""The loop round a Trainer: batches in, progress, a log and checkpoints out."""

import csv
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fastwgan import checkpoint
from fastwgan.metrics import Metrics
from fastwgan.trainer import Trainer

__all__ = ["fit"]

COLUMNS = ("step", "generator_step", "seconds", *Metrics.NAMES)


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that the step under way ends first. A second Ctrl-C interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def handle(signum: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches over and over, as a DataLoader's epochs."""
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("batches: expected more batches, but the iterable has ended and cannot be started again")


def _rows(path: Path) -> list[dict[str, str]]:
    """The complete rows of a log; one that a killed process left half-written is no row."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if None not in row.values() and row.get("step", "").isdigit() and row.get("seconds")]


class _Log:
    """DIR/metrics.csv. Rows past the step that a run starts from, left by one that was killed, are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        kept = [row for row in _rows(path) if int(row["step"]) <= start]
        self._seconds = float(kept[-1]["seconds"]) if kept else 0.0
        rewritten = path.with_name(f".{path.name}")
        with rewritten.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        rewritten.replace(path)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS, restval="")
        self._begun = time.perf_counter()

    def write(self, trainer: Trainer, values: dict[str, float]) -> None:
        seconds = round(self._seconds + time.perf_counter() - self._begun, 3)
        row = {"step": trainer.critic_iterations, "generator_step": trainer.generator_iterations, "seconds": seconds}
        self._writer.writerow(row | values)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Progress:
    """A bar with steps per second and the Wasserstein estimate; nothing where ``shown`` is False."""

    def __init__(self, shown: bool, start: int, total: int) -> None:
        self._bar: Any = None
        if shown:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
                TextColumn("W {task.fields[wasserstein]}"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=start, speed="- it/s", wasserstein="-")
            self._last = (start, time.perf_counter())

    def update(self, step: int, values: dict[str, float]) -> None:
        if self._bar is not None:
            before, then = self._last
            self._last = (step, time.perf_counter())
            speed = (step - before) / max(self._last[1] - then, 1e-9)
            estimate = f"{values['wasserstein']:.3f}"
            self._bar.update(self._task, completed=step, speed=f"{speed:.0f} it/s", wasserstein=estimate)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def fit(
    trainer: Trainer,
    batches: Iterable[Any],
    steps: int,
    *,
    out: Path | str | None = None,
    config: dict[str, Any] | None = None,
    log_every: int = 50,
    save_every: int = 2000,
    progress: bool = False,
) -> int:
    """Call ``trainer.step`` on ``steps`` batches.

    Ctrl-C ends the loop after the step under way, with everything written.

    Args:
        trainer: the trainer; it goes on from where it is.
        batches: an iterable of samples [N, ...], or of tuples (samples, *conditions), moved to the trainer's device.
            It is started again when it ends. If it has ``state_dict``, as :mod:`fastwgan.data`'s have, its position
            is saved.
        steps: how many critic steps to take.
        out: a directory for ``metrics.csv`` and the checkpoint ``last.pt``; None writes nothing.
        config: numbers and strings to keep in the checkpoint.
        log_every: steps between rows of the log, each of which waits for the device once.
        save_every: steps between checkpoints; the last step always writes one.
        progress: show a progress bar (needs rich).

    Returns:
        The steps taken: fewer than ``steps`` after Ctrl-C.

    Raises:
        TypeError, ValueError: a number is out of range, ``out`` holds a run and the trainer is new, or the batches end
            for good.
    """
    for name, value, minimum in (("steps", steps, 0), ("log_every", log_every, 1), ("save_every", save_every, 1)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < minimum:
            raise ValueError(f"{name}: expected an int >= {minimum}, got {value}")
    start = trainer.critic_iterations
    directory = None if out is None else Path(out)
    if directory is not None:
        if start == 0 and (directory / "last.pt").exists():
            raise ValueError(f"out: {directory} holds a run, which a new one would overwrite")
        directory.mkdir(parents=True, exist_ok=True)
    log = None if directory is None else _Log(directory / "metrics.csv", start)
    bar = _Progress(progress, start, start + steps)

    def save() -> None:
        if directory is not None:
            data = batches.state_dict() if hasattr(batches, "state_dict") else None
            content = {"trainer": trainer.state_dict(), "data": data, "config": config}
            checkpoint.save(directory / "last.pt", content)

    done = 0
    generator_loss: Tensor | None = None
    try:
        with _interruptible() as stop:
            stream = _endless(batches)
            while done < steps and not stop.is_set():
                try:
                    batch = next(stream)
                except BaseException:
                    if done:
                        save()  # the batches failed, not the trainer
                    raise
                parts = batch if isinstance(batch, (tuple, list)) else (batch,)
                metrics = trainer.step(
                    *(x.to(trainer.device, non_blocking=True) if isinstance(x, Tensor) else x for x in parts)
                )
                done += 1
                generator_loss = metrics.generator_loss if metrics.generator_loss is not None else generator_loss
                if trainer.critic_iterations % log_every == 0 or done == steps or stop.is_set():
                    metrics.generator_loss = generator_loss
                    values = metrics.as_dict()
                    bar.update(start + done, values)
                    if log is not None:
                        log.write(trainer, values)
                if trainer.critic_iterations % save_every == 0 and done < steps:
                    save()
            save()
    finally:
        bar.close()
        if log is not None:
            log.close()
    return done
