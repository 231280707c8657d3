"""The loop round a trainer: batches in, progress, logs, pictures and checkpoints out."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastwgan import checkpoint, checks
from fastwgan.data.batches import endless, refuse_samples
from fastwgan.metrics import Metrics
from fastwgan.streams import Stream, stream_seed
from fastwgan.training.health import Health, HealthWarning
from fastwgan.training.logs import CSVLog, Interval, Progress, TensorBoardLog

Trainer = Any  # fastwgan.Trainer, whose module imports this one
Log = CSVLog | TensorBoardLog | Progress
Draw = Callable[[Tensor, Path], None]


def fit(
    trainer: Trainer, batches: Iterable[Any], steps: int, *, out: Path | str | None = None,
    config: dict[str, Any] | None = None, log_every: int = 50, tensorboard: bool = False,
    sample_every: int | None = None, draw: Draw | None = None, sample_count: int = 64, save_every: int = 2000,
    keep: int = 1, callbacks: Sequence[Callable[[Any, dict[str, float]], object]] = (), progress: bool = False,
) -> int:  # fmt: skip
    """Call ``trainer.step`` on ``steps`` batches; return how many: fewer after Ctrl-C, or if a callback returns True.

    Either ends the loop after the step or iteration under way, with everything written. If batches, a callback or
    ``draw`` raise, a checkpoint is left behind. A :class:`fastwgan.training.HealthWarning` tells, once for each known
    kind of failure, of numbers that look like it. Where ``trainer.iteration`` takes batches alike as one CUDA graph and
    no row, picture or checkpoint is due among them, it does, to the same end; all are read before its first step then.

    Several ranks all call this, with ``out``, and batches of their own; rank 0 writes, draws, calls back and tells of
    progress. They agree on an early end at the rows of the log. If one raises, the last checkpoint is the one before.

    Args:
        trainer: goes on from where it is.
        batches: an iterable of samples [N, ...] or of tuples (samples, *conditions), whose tensors and arrays go to the
            trainer's device. It is started again when it ends. Samples at the end of a short batch that fill no pack
            are left out. If it has ``state_dict``, as :mod:`fastwgan.data`'s have, its position is saved, for
            ``batches.load_state_dict(fastwgan.checkpoint.load(path)["data"])``. A DataLoader has none, and starts anew;
            its sampler's ``set_epoch``, where there is one, is called with each epoch.
        steps: critic steps to take.
        out: directory for ``metrics.csv``, the checkpoint ``last.pt``, and what else is asked for; None writes nothing.
        config: numbers and strings to keep in the checkpoint.
        log_every: steps between rows of the log, their averages; reading, at least once in 100, waits for the device.
        tensorboard, progress: log to TensorBoard (needs tensorboard) and show a bar (needs rich) as well.
        sample_every: steps between pictures ``samples/step-00002000.png`` of the same latents; the last step has one.
        draw: (samples [sample_count, ...], path) -> None, writes such a picture. The generator takes no conditions.
        sample_count: samples in a picture.
        save_every: steps between checkpoints; the last step always writes one.
        keep: checkpoints to keep. With more than 1, the newest are there as ``step-000002000.pt``, too.
        callbacks: each is called as callback(trainer, averages) with every row of the log.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, ``out`` holds a run and the trainer is
            new, or the batches end for good.
        ImportError, OSError: a package is missing; a file cannot be written. The last checkpoint is as it was.
    """
    checks.count("steps", steps, 0)
    counts = {"log_every": log_every, "save_every": save_every, "keep": keep, "sample_count": sample_count}
    for name, value in (counts | ({} if sample_every is None else {"sample_every": sample_every})).items():
        checks.count(name, value)
    if (sample_every is None) != (draw is None):
        raise ValueError("draw: expected together with sample_every, got one of them")
    if out is None and (tensorboard or draw is not None):
        raise ValueError("out: expected a directory for what tensorboard and draw write, got None")
    refuse_samples(batches)
    for wanted, package in ((progress, "rich"), (tensorboard, "torch.utils.tensorboard")):
        if wanted:
            import_module(package)  # a missing one shows before anything is written
    directory, start, ranks = None if out is None else Path(out), trainer.critic_iterations, trainer.ranks
    first, alone = ranks.rank == 0, ranks.world == 1
    stop, interval, health, logs = threading.Event(), Interval(), Health(trainer.constraint), list[Log]()
    if directory is not None and not start and (directory / checkpoint.LAST).exists():
        raise ValueError(f"out: {directory} holds a run, which a new one would overwrite")
    run = _Run(trainer, batches, steps, stop, directory, config, keep, draw if first else None, sample_count)
    marks = [every for every in (log_every, sample_every, save_every) if every is not None]

    def due(every: int | None) -> bool:
        return every is not None and trainer.critic_iterations % every == 0

    def ended() -> bool:
        """Return whether to end early, which several ranks agree on at the rows of the log."""
        return (alone or due(log_every)) and any(ranks.gather(stop.is_set()))

    def advise(values: list[dict[str, float]], step: int) -> None:
        for advice in health.watch(values) if first else ():
            warnings.warn(f"step {step}: {advice}", HealthWarning, stacklevel=3)  # fit's caller

    def report() -> None:
        """Write a row of the log and call back; a callback that returns True ends the training."""
        values = interval.end()
        for log in logs:
            log.write(trainer.critic_iterations, trainer.generator_iterations, values)
        for callback in callbacks if first else ():
            answer = callback(trainer, dict(values))
            if isinstance(answer, (bool, np.bool_)) and answer:
                stop.set()

    with ExitStack() as stack:
        if first and directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(directory)
            logs.append(stack.enter_context(closing(CSVLog(directory / "metrics.csv", start))))
            if tensorboard:
                logs.append(stack.enter_context(closing(TensorBoardLog(directory, start))))
        if first and progress:
            logs.append(stack.enter_context(closing(Progress(start, start + steps))))
        if threading.current_thread() is threading.main_thread():  # no other may handle signals
            stack.enter_context(_interruptible(stop, alone=alone))
        for found in run.taken(ended, marks):
            with run.saved_on(BaseException):
                row = due(log_every)
                for i, metrics in enumerate(found, 1 - len(found)):
                    advise(interval.add(metrics, last=row and not i), trainer.critic_iterations + i)
                if row:
                    report()
                if due(sample_every):
                    run.picture()
            if due(save_every) and run.done < steps and not (alone and stop.is_set()):
                run.save()
        with run.saved_on(BaseException):
            if interval:
                advise(interval.read(), trainer.critic_iterations)
                report()
            if not due(sample_every):
                run.picture()
        trainer.check_finite()
        run.save()
    return run.done


@dataclass
class _Run:
    """The checkpoints and pictures of a run, in its directory, where it has one."""

    trainer: Trainer
    batches: Iterable[Any]
    steps: int
    stop: threading.Event
    directory: Path | None
    config: dict[str, Any] | None
    keep: int
    draw: Draw | None
    sample_count: int
    done: int = 0  # steps

    @contextmanager
    def saved_on(self, *errors: type[BaseException]) -> Iterator[None]:
        """Save on what may fail while the trainer is between steps."""
        try:
            yield
        except errors:
            if self.done and self.trainer.ranks.world == 1:  # others would have to help
                self.save()
            raise

    def taken(self, ended: Callable[[], bool], marks: Sequence[int]) -> Iterator[list[Metrics]]:
        """Take all steps, unless it ended; yield each one's Metrics, or an iteration's, with nothing due within it.

        Every so many steps as ``marks`` has, something is due. Where the next batch raises or is of another form, maybe
        unusable, or Ctrl-C has come, those read go step by step, so that a checkpoint has batches where the trainer is.
        """
        trainer, alone, form = self.trainer, self.trainer.ranks.world == 1, None  # the last batch's
        stream = endless(self.batches, trainer.device, trainer.pack)
        while self.done < self.steps and not ended():
            group, failure, step, n = list[Any](), None, trainer.critic_iterations, trainer.batches_at_once()
            if n > self.steps - self.done or any(step % every + n > every for every in marks):
                n = 1
            try:
                while len(group) < n and not (group and alone and self.stop.is_set()):
                    parts = next(parts for parts in stream if parts is not None or (alone and self.stop.is_set()))
                    if parts is None:  # it fills no pack, and Ctrl-C has come
                        break
                    group.append(parts)
                    before, form = form, [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in parts]
                    if n > 1 and form != before:
                        n = 0
            except BaseException as error:
                failure = error
            if len(group) == n > 1:
                found = trainer.iteration(group)
                self.done, group = self.done + n, []
                yield found
            for parts in group:
                with self.saved_on(TypeError, ValueError):  # the batch cannot be used; no weight has changed
                    found = [trainer.step(*parts)]
                self.done += 1
                yield found
            if failure is not None:
                with self.saved_on(BaseException):
                    raise failure

    def save(self) -> None:
        if self.directory is None:
            return
        trainer, batches = self.trainer, self.batches
        data = batches.state_dict() if hasattr(batches, "state_dict") else None
        content = {"trainer": trainer.full_state_dict(), "data": data, "config": self.config}
        write = partial(checkpoint.save_newest, self.directory, content, step=trainer.critic_iterations, keep=self.keep)
        trainer.ranks.once(write)
        trainer.last_checkpoint = str(self.directory / checkpoint.LAST)

    def picture(self) -> None:
        if self.directory is None or self.draw is None:
            return
        path = self.directory / "samples" / f"step-{self.trainer.critic_iterations:08d}.png"
        path.parent.mkdir(exist_ok=True)
        ema, seed = self.trainer.ema is not None, stream_seed(self.trainer.seed, Stream.GRID)
        self.draw(self.trainer.sample(self.sample_count, ema=ema, seed=seed), path)


@contextmanager
def _interruptible(stop: threading.Event, *, alone: bool) -> Iterator[None]:
    """Have Ctrl-C set ``stop``, so that the step under way ends first; ``alone``, a second one interrupts at once."""

    def handle(signum: int, frame: Any) -> None:
        stop.set()
        if alone:  # the launcher of several processes sends a second signal of its own
            signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL  # None is a handler that Python knows nothing of
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
