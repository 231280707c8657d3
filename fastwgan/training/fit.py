"""The loop round a trainer: batches in, progress, logs, pictures and checkpoints out."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastwgan import checkpoint, checks
from fastwgan.metrics import Metrics
from fastwgan.streams import Stream, stream_seed
from fastwgan.training.batches import endless, refuse_samples
from fastwgan.training.health import Health, HealthWarning
from fastwgan.training.logs import CSVLog, Interval, Progress, TensorBoardLog

__all__ = ["TrainerLike", "fit"]

Callback = Callable[[Any, dict[str, float]], object]  # of the trainer and the averages of a row


class Ranks(Protocol):
    """The processes that take part, as the loop sees them."""

    def all(self, condition: bool, device: torch.device) -> bool: ...
    def once(self, write: Callable[[], None]) -> None: ...


class TrainerLike(Protocol):
    """The loop's view of a trainer."""

    device: torch.device
    rank: int
    world: int
    pack: int
    seed: int
    critic_iterations: int
    generator_iterations: int
    last_checkpoint: str | None

    @property
    def constraint(self) -> object: ...
    @property
    def ema(self) -> float | None: ...
    @property
    def ranks(self) -> Ranks: ...
    def step(self, real: Tensor, *cond: Any) -> Metrics: ...
    def sample(self, n: int, *, ema: bool, seed: int) -> Tensor: ...
    def check_finite(self) -> None: ...
    def full_state_dict(self) -> dict[str, Any]: ...


def fit(
    trainer: TrainerLike,
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
    loop = _Loop(
        trainer, batches, steps, out=None if out is None else Path(out), config=config, log_every=log_every,
        tensorboard=tensorboard, sample_every=sample_every, draw=draw, sample_count=sample_count,
        save_every=save_every, keep=keep, callbacks=callbacks, progress=progress,
    )  # fmt: skip
    with ExitStack() as stack:
        loop.logs.extend(stack.enter_context(closing(log)) for log in loop.open_logs())
        stack.enter_context(_interruptible(loop.stop, alone=trainer.world == 1))
        return loop.run()


@dataclass
class _Loop:
    """A call of :func:`fit`, which documents the arguments."""

    trainer: TrainerLike
    batches: Iterable[Any]
    steps: int
    _: KW_ONLY
    out: Path | None
    config: dict[str, Any] | None
    log_every: int
    tensorboard: bool
    sample_every: int | None
    draw: Callable[[Tensor, Path], None] | None
    sample_count: int
    save_every: int
    keep: int
    callbacks: Sequence[Callback]
    progress: bool

    def __post_init__(self) -> None:
        """Check the arguments; nothing is written before they are all right."""
        for name, minimum in (("steps", 0), ("log_every", 1), ("save_every", 1), ("keep", 1), ("sample_count", 1)):
            checks.count(name, getattr(self, name), minimum)
        if self.sample_every is not None:
            checks.count("sample_every", self.sample_every)
        if (self.sample_every is None) != (self.draw is None):
            raise ValueError("draw: expected together with sample_every, got one of them")
        if self.out is None and (self.tensorboard or self.draw is not None):
            raise ValueError("out: expected a directory for what tensorboard and draw write, got None")
        refuse_samples(self.batches)
        if self.progress:
            import rich  # noqa: F401 - a missing package shows before anything is written
        if self.tensorboard:
            import torch.utils.tensorboard  # noqa: F401
        if self.out is not None and not self.trainer.critic_iterations and (self.out / checkpoint.LAST).exists():
            raise ValueError(f"out: {self.out} holds a run, which a new one would overwrite")
        self.done = 0
        self.stop = threading.Event()
        self.interval = Interval()
        self.health = Health(self.trainer.constraint)
        self.logs: list[CSVLog | TensorBoardLog | Progress] = []

    def open_logs(self) -> Iterator[CSVLog | TensorBoardLog | Progress]:
        """Yield the logs that are asked for, each opened in its turn, on rank 0."""
        start = self.trainer.critic_iterations
        if self.trainer.rank:
            return
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            checkpoint.clean(self.out)
            yield CSVLog(self.out / "metrics.csv", start)
            if self.tensorboard:
                yield TensorBoardLog(self.out, start)
        if self.progress:
            yield Progress(start, start + self.steps)

    def run(self) -> int:
        """Take the steps; return how many were taken."""
        trainer, alone = self.trainer, self.trainer.world == 1
        stream = endless(self.batches, trainer.device, trainer.pack)
        while self.done < self.steps and not self._ended():
            with self._saved_on(BaseException):
                parts = next(stream)
            with self._saved_on(TypeError, ValueError):  # the batch cannot be used; no weight has changed
                metrics = trainer.step(*parts)
            self.done += 1
            with self._saved_on(BaseException):
                row = self._due(self.log_every)
                self._advise(self.interval.add(metrics, last=row))
                if row:
                    self._report()
                if self._due(self.sample_every):
                    self._picture()
            if self._due(self.save_every) and self.done < self.steps and not (alone and self.stop.is_set()):
                self._save()
        with self._saved_on(BaseException):
            if self.interval:
                self._advise(self.interval.read())
                self._report()
            if not self._due(self.sample_every):
                self._picture()
        trainer.check_finite()
        self._save()
        return self.done

    def _due(self, every: int | None) -> bool:
        return every is not None and self.trainer.critic_iterations % every == 0

    def _ended(self) -> bool:
        """Return whether to end early, which several ranks agree on at the rows of the log."""
        if self.trainer.world > 1 and not self._due(self.log_every):
            return False
        return not self.trainer.ranks.all(not self.stop.is_set(), self.trainer.device)

    @contextmanager
    def _saved_on(self, *errors: type[BaseException]) -> Iterator[None]:
        """Save on what may fail while the trainer is between steps."""
        try:
            yield
        except errors:
            if self.done and self.trainer.world == 1:  # the others would have to help
                self._save()
            raise

    def _save(self) -> None:
        if (out := self.out) is None:
            return
        step = self.trainer.critic_iterations
        data = self.batches.state_dict() if hasattr(self.batches, "state_dict") else None
        content = {"trainer": self.trainer.full_state_dict(), "data": data, "config": self.config}
        self.trainer.ranks.once(lambda: checkpoint.save_newest(out, content, step=step, keep=self.keep))
        self.trainer.last_checkpoint = str(out / checkpoint.LAST)

    def _picture(self) -> None:
        trainer = self.trainer
        if self.out is None or self.draw is None or trainer.rank:
            return
        path = self.out / "samples" / f"step-{trainer.critic_iterations:08d}.png"
        path.parent.mkdir(exist_ok=True)
        latents = stream_seed(trainer.seed, Stream.GRID)
        self.draw(trainer.sample(self.sample_count, ema=trainer.ema is not None, seed=latents), path)

    def _advise(self, values: list[dict[str, float]]) -> None:
        for advice in self.health.watch(values) if self.trainer.rank == 0 else ():
            message = f"step {self.trainer.critic_iterations}: {advice}"
            warnings.warn(message, HealthWarning, stacklevel=4)  # fit's caller, beyond run and fit

    def _report(self) -> None:
        """Write a row of the log and call back; a callback that returns True ends the training."""
        values = self.interval.end()
        for log in self.logs:
            log.write(self.trainer.critic_iterations, self.trainer.generator_iterations, values)
        for callback in self.callbacks if self.trainer.rank == 0 else ():
            answer = callback(self.trainer, dict(values))
            if isinstance(answer, (bool, np.bool_)) and answer:
                self.stop.set()


@contextmanager
def _interruptible(stop: threading.Event, *, alone: bool) -> Iterator[None]:
    """Have Ctrl-C set ``stop``, so that the step under way ends first. A second Ctrl-C interrupts at once, but not
    among several processes, to which their launcher sends a second signal of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def handle(signum: int, frame: Any) -> None:
        stop.set()
        if alone:
            signal.signal(signal.SIGINT, before)

    before = signal.getsignal(signal.SIGINT) or signal.SIG_DFL  # None is a handler that Python knows nothing of
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
