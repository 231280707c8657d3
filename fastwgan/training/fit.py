"""The loop round a Trainer: batches in, progress, logs, pictures and checkpoints out."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fastwgan import checkpoint, checks
from fastwgan.streams import stream_seed
from fastwgan.training.health import Health, HealthWarning
from fastwgan.training.logs import CSVLog, Interval, Progress, TensorBoardLog

__all__ = ["fit"]

GRID = 5  # the random stream of the sample grids' latents; the trainer and the command line take those before

Callback = Callable[[Any, dict[str, float]], object]


@contextmanager
def _interruptible(*, alone: bool) -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that the step under way ends first. A second Ctrl-C interrupts at once, but not
    among several processes, to which their launcher sends a second signal of its own.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return

    def handle(signum: int, frame: Any) -> None:
        stop.set()
        if alone:
            signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL  # None is a handler that Python knows nothing of
    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _check_batches(batches: object) -> None:
    """Refuse what would be iterated sample by sample, which a network may well take for batches."""
    if isinstance(batches, (Tensor, np.ndarray)):
        raise TypeError(
            f"batches: expected an iterable of batches, got {type(batches).__name__}; put a single batch into a list, "
            "or make batches of samples by torch.utils.data.DataLoader"
        )
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise TypeError(
            f"batches: expected an iterable of batches, got the dataset {type(batches).__name__}, whose items are "
            "single samples; torch.utils.data.DataLoader makes batches of them"
        )
    if not hasattr(batches, "__iter__") and not hasattr(batches, "__getitem__"):
        raise TypeError(f"batches: expected an iterable of batches, got {type(batches).__name__}")


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches over and over, as a DataLoader's epochs."""
    for epoch in count():
        sampler = getattr(batches, "sampler", None)
        if sampler is not None and hasattr(
            sampler, "set_epoch"
        ):  # a DistributedSampler would have the same order again
            sampler.set_epoch(epoch)
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "batches: expected more batches, but the iterable is empty, or has ended or been closed and cannot be "
                "started again"
            )


def _parts(batch: Any, device: torch.device) -> list[Any]:
    """The samples and conditions of a batch, tensors and arrays as tensors on ``device``."""
    parts = list(batch) if isinstance(batch, (tuple, list)) else [batch]
    if not parts:
        raise ValueError("batches: expected samples in each batch, got an empty one")
    for i, part in enumerate(parts):
        if isinstance(part, np.ndarray):
            try:
                parts[i] = torch.tensor(part).to(device, non_blocking=True)
            except TypeError as error:
                raise TypeError(f"batches: expected arrays of numbers, got one of dtype {part.dtype}") from error
        elif isinstance(part, Tensor):
            parts[i] = part.to(device, non_blocking=True)
    return parts


def _whole_packs(parts: list[Any], pack: int) -> list[Any] | None:
    """The batch without the samples at its end that fill no pack, as a short last batch has; None if none do."""
    n = len(parts[0]) if pack > 1 and isinstance(parts[0], Tensor) and parts[0].dim() else 0
    if n % pack == 0:
        return parts
    return [x[: n - n % pack] if checks.is_batched(x, n) else x for x in parts] if n > pack else None


def fit(
    trainer: Any,
    batches: Iterable[Any],
    steps: int,
    *,
    out: Path | str | None = None,
    config: dict[str, Any] | None = None,
    log_every: int = 50,
    tensorboard: bool = False,
    sample_every: int | None = None,
    draw: Callable[[Tensor, Path], None] | None = None,
    sample_count: int = 64,
    save_every: int = 2000,
    keep: int = 1,
    callbacks: Sequence[Callback] = (),
    progress: bool = False,
) -> int:
    """Call ``trainer.step`` on ``steps`` batches.

    Ctrl-C ends the loop after the step under way, with everything written. If the batches, a callback or ``draw``
    raise, a checkpoint is left behind. A :class:`fastwgan.training.HealthWarning` tells when the numbers look like a
    known kind of failure, each kind once.

    With several ranks every one calls this, on batches of its own. Rank 0 writes, draws, calls back and tells of
    progress; the others have to name ``out`` as well. They agree on an early end, at the rows of the log. Where one
    raises, the last checkpoint is the one before.

    Args:
        trainer: the trainer; it goes on from where it is.
        batches: an iterable of samples [N, ...], or of tuples (samples, *conditions), whose tensors and arrays are
            moved to the trainer's device. It is started again when it ends. Samples at the end of a short batch that
            fill no pack are left out. If it has ``state_dict``, as :mod:`fastwgan.data`'s have, its position is saved,
            for ``batches.load_state_dict(fastwgan.checkpoint.load(path)["data"])``. A DataLoader has none, and starts
            anew; its sampler's ``set_epoch``, where there is one, is called with each epoch.
        steps: how many critic steps to take.
        out: a directory for ``metrics.csv``, the checkpoint ``last.pt``, and what else is asked for; None writes
            nothing.
        config: numbers and strings to keep in the checkpoint.
        log_every: steps between rows of the log, which are averages over these steps. Reading them waits for the
            device once, or once in 100 steps.
        tensorboard: log to TensorBoard as well (needs tensorboard).
        sample_every: steps between pictures ``samples/step-00002000.png`` of the same latents; the last step has one.
        draw: (samples [sample_count, ...], path) -> None, writes such a picture. The generator takes no conditions.
        sample_count: samples in a picture.
        save_every: steps between checkpoints; the last step always writes one.
        keep: checkpoints to keep. With more than 1, the newest are there as ``step-000002000.pt``, too.
        callbacks: each is called as callback(trainer, averages) with every row of the log. The training ends, with
            everything written, when one returns True.
        progress: show a progress bar (needs rich).

    Returns:
        The steps taken: fewer than ``steps`` after Ctrl-C or when a callback has ended the training.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, ``out`` holds a run and the trainer is
            new, or the batches end for good.
        ImportError: an optional package is missing.
        OSError: a file cannot be written. The last checkpoint is as it was.
    """
    for name, value, minimum in (
        ("steps", steps, 0), ("log_every", log_every, 1), ("save_every", save_every, 1), ("keep", keep, 1),
        ("sample_count", sample_count, 1),
    ):  # fmt: skip
        checks.count(name, value, minimum)
    if sample_every is not None:
        checks.count("sample_every", sample_every, 1)
    if (sample_every is None) != (draw is None):
        raise ValueError("draw: expected together with sample_every, got one of them")
    if out is None and (tensorboard or draw is not None):
        raise ValueError("out: expected a directory for what tensorboard and draw write, got None")
    _check_batches(batches)
    if progress:
        import rich  # noqa: F401 - a missing package shows before anything is written
    if tensorboard:
        import torch.utils.tensorboard  # noqa: F401

    start = trainer.critic_iterations
    directory = None if out is None else Path(out)
    if directory is not None:
        if start == 0 and (directory / checkpoint.LAST).exists():
            raise ValueError(f"out: {directory} holds a run, which a new one would overwrite")
        if trainer.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(directory)
    interval, health = Interval(), Health(trainer.constraint)
    done = 0

    def save() -> None:
        if directory is None:
            return
        data = batches.state_dict() if hasattr(batches, "state_dict") else None
        content = {"trainer": trainer.full_state_dict(), "data": data, "config": config}
        step = trainer.critic_iterations
        trainer.ranks.once(lambda: checkpoint.save_newest(directory, content, step=step, keep=keep))
        trainer.last_checkpoint = str(directory / checkpoint.LAST)

    @contextmanager
    def saved_on(*errors: type[BaseException]) -> Iterator[None]:
        """For what may fail while the trainer is between steps."""
        try:
            yield
        except errors:
            if done and trainer.world == 1:  # the others would have to help
                save()
            raise

    def picture() -> None:
        if directory is not None and draw is not None and trainer.rank == 0:
            path = directory / "samples" / f"step-{trainer.critic_iterations:08d}.png"
            path.parent.mkdir(exist_ok=True)
            draw(trainer.sample(sample_count, ema=trainer.ema is not None, seed=stream_seed(trainer.seed, GRID)), path)

    def advise(values: list[dict[str, float]]) -> None:
        for advice in health.watch(values) if trainer.rank == 0 else ():
            warnings.warn(f"step {trainer.critic_iterations}: {advice}", HealthWarning, stacklevel=3)

    with ExitStack() as stack:
        logs: list[CSVLog | TensorBoardLog | Progress] = []
        if directory is not None and trainer.rank == 0:
            logs.append(stack.enter_context(closing(CSVLog(directory / "metrics.csv", start))))
            if tensorboard:
                logs.append(stack.enter_context(closing(TensorBoardLog(directory, start))))
        if progress and trainer.rank == 0:
            logs.append(stack.enter_context(closing(Progress(start, start + steps))))
        alone = trainer.world == 1
        stop = stack.enter_context(_interruptible(alone=alone))

        def report() -> None:
            values = interval.end()
            for log in logs:
                log.write(trainer.critic_iterations, trainer.generator_iterations, values)
            for callback in callbacks if trainer.rank == 0 else ():
                answer = callback(trainer, dict(values))
                if isinstance(answer, (bool, np.bool_)) and answer:
                    stop.set()

        def ended() -> bool:
            if trainer.world > 1 and trainer.critic_iterations % log_every:
                return False
            return not trainer.ranks.all(not stop.is_set(), trainer.device)

        stream = _endless(batches)
        while done < steps and not ended():
            with saved_on(BaseException):
                parts = _whole_packs(_parts(next(stream), trainer.device), trainer.pack)
            if parts is None:
                continue
            with saved_on(TypeError, ValueError):  # the batch cannot be used; no weight has changed
                metrics = trainer.step(*parts)
            done += 1
            with saved_on(BaseException):
                row = trainer.critic_iterations % log_every == 0
                advise(interval.add(metrics, last=row))
                if row:
                    report()
                if sample_every is not None and trainer.critic_iterations % sample_every == 0:
                    picture()
            if trainer.critic_iterations % save_every == 0 and done < steps and not (alone and stop.is_set()):
                save()
        with saved_on(BaseException):
            if interval:
                advise(interval.read())
                report()
            if sample_every is not None and trainer.critic_iterations % sample_every:
                picture()
        trainer.check_finite()
        save()
    return done
