"""Critic steps of several workloads, set up at once and timed one by one.

Compilers take minutes to a workload, and a GPU that waits for them is idle. So each (workload, precision, layout) gets
a process of its own, which checks and compiles; only when all are ready, or the time for that is over, is each timed,
alone on a GPU whose other processes wait. Set-up times are therefore those of a machine that does as much at once.
"""

import os
import signal
import time
from collections.abc import Sequence
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

import torch

from benchmarks import steps
from benchmarks.implementations import TEXTBOOKS, compiles
from benchmarks.record import prepared
from benchmarks.steps import Job

__all__ = ["Together"]

SET_UP = 0.65  # of the minutes; the rest is for timing
END = 0.93  # of the minutes: when all should be timed, as the last ones may go over their time
MARGIN = 0.15  # of the time for set-up, after which whoever is not ready is left out whole


def end_compilation(schedule: steps.Schedule) -> None:
    """Have an alarm, of which there may be several, end the set-up of an implementation that compiles."""

    def over(signum: int, frame: FrameType | None) -> None:
        if compiles(schedule.at):
            raise TimeoutError("the time for set-up was over")

    signal.signal(signal.SIGALRM, over)


def work(
    pipe: Connection, job: Job, implementations: Sequence[str], checks: bool, device: torch.device, rounds: int,
    until: float,
) -> None:  # fmt: skip
    """A process: say "ready" when all is set up, wait for a deadline, measure until then, and send the result.

    At ``until``, a ``time.monotonic()``, a compilation is ended and no other begun.
    """
    torch.set_num_threads(1)
    left = max(0.1, until - time.monotonic())
    schedule = steps.Schedule(left / 60, 1, rounds)
    end_compilation(schedule)
    signal.setitimer(signal.ITIMER_REAL, left, 1.0)  # again and again: what is raised in a destructor is lost

    def ready() -> float:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        pipe.send("ready")
        deadline: float = pipe.recv()
        return deadline

    try:
        with prepared(device, compiles=any(map(compiles, implementations))):
            name, precision, layout = job
            checked: dict[str, float | str] = dict.fromkeys([*TEXTBOOKS, *implementations], 0.0)
            if checks:
                checked = steps.check(name, implementations, device, schedule, layout)
            pipe.send(steps.critic_step(name, precision, checked, device, schedule, ready, layout=layout))
    except Exception as error:  # whatever it is, the others can still be measured
        pipe.send(steps.message(error))


class Together:
    """The processes of all jobs, from entering this to leaving it.

    Args:
        jobs: (workload, precision, layout). Results are checked in the first precision of a workload and layout, for
            all.
        implementations: names, see :func:`benchmarks.implementations.implementation`.
        device: a CPU or a CUDA device.
        rounds: samples of each figure, at most.
        minutes: that all of it should take.
    """

    def __init__(
        self, jobs: Sequence[Job], implementations: Sequence[str], device: torch.device, *, rounds: int, minutes: float
    ) -> None:
        self._begun, self._seconds, self._left = time.monotonic(), 60 * minutes, len(jobs)
        context = get_context("spawn")
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // len(jobs))))
        self._pipes: dict[Job, Connection] = {}
        self._processes = []
        self._failed: dict[Job, str] = {}
        self._dropped: dict[tuple[str, str], dict[str, str]] = {}  # by workload and layout, as its check found
        self._waited = False
        seen: set[tuple[str, str]] = set()
        for job in jobs:
            self._pipes[job], theirs = context.Pipe()
            checks = job[::2] not in seen
            seen.add(job[::2])
            until = self._begun + SET_UP * self._seconds
            args = (theirs, job, list(implementations), checks, device, rounds, until)
            self._processes.append(context.Process(target=work, args=args, daemon=True))
            self._processes[-1].start()
            theirs.close()  # so that the end of the process is the end of the pipe

    def __enter__(self) -> "Together":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def _wait(self) -> None:
        """Until all are ready or have failed; those that take too long are ended, so that the GPU is the others'."""
        self._waited = True
        end = self._begun + SET_UP * self._seconds * (1 + MARGIN)
        pending = dict(self._pipes)
        while pending and (left := end - time.monotonic()) > 0:
            arrived = connection.wait(pending.values(), left)
            for job in [job for job, pipe in pending.items() if pipe in arrived]:
                self._hear(job, "ready")
                del pending[job]
        for (job, _), process in zip(self._pipes.items(), self._processes, strict=True):
            if job in pending:
                process.kill()
                self._failed[job] = "not set up in time"

    def _hear(self, job: Job, expected: str | None = None) -> Any:
        try:
            found = self._pipes[job].recv()
        except EOFError:
            found = "its process ended"
        if isinstance(found, str) and found != expected:
            self._failed[job] = found
        return found

    def measure(self, job: Job) -> dict[str, Any]:
        """The result of :func:`benchmarks.steps.critic_step`.

        Raises:
            RuntimeError: there is none; the message says why.
        """
        if not self._waited:
            self._wait()
        deadline = time.monotonic() + (self._begun + END * self._seconds - time.monotonic()) / self._left
        self._left -= 1
        result: dict[str, Any] = {}
        if job not in self._failed:
            self._pipes[job].send(deadline)
            result = self._hear(job)
        if job in self._failed:
            raise RuntimeError(self._failed[job])
        for name, why in self._dropped.setdefault(job[::2], dict(result["dropped"])).items():
            if result["implementations"].pop(name, None) is not None:
                result["dropped"][name] = why
        return result
