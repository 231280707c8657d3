"""Time one critic step by several implementations, checked against each other, in one run.

Each implementation has first to come to the textbook's weights; then rounds go through all of them in turn. Whatever
fails is left out and its error is part of the result.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.implementations import BASE, TEXTBOOKS, Given, Setting, Step, compiles, implementation
from benchmarks.networks import find
from benchmarks.workloads import Workload
from fastwgan import reference

__all__ = [
    "LAYOUTS", "PRECISIONS", "Job", "Schedule", "check", "critic_step", "distance_allowed", "message", "setting",
    "weights_after",
]  # fmt: skip

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Job = tuple[str, str, str]  # workload, precision, layout
CHECKED_STEPS = 8  # enough that a trainer has captured its graph and replayed it
BACK_TO_BACK, LONG = 10, 20.0  # steps to a sample on a GPU, fewer where they take so many milliseconds

# How far an implementation may be from the float64 textbook, over how far the weights moved. It rounds as it likes, and
# where a gradient is all but zero the papers' optimizers turn the sign of its rounding into a step of full
# length: so the measure is what the same costs the float32 textbook. The floor is for the few weights whose gradient is
# zero, which the textbook may hit and another order of summation miss.
TIMES_TEXTBOOK, FLOOR = 2.0, 0.01


class Schedule:
    """Minutes that are to do for several jobs: each gets an equal share of what those before it have left.

    Attributes:
        rounds: samples of each figure, at most.
        at: the implementation that is being set up, or "".
    """

    def __init__(self, minutes: float, jobs: int, rounds: int) -> None:
        self.rounds, self.at = rounds, ""
        self._end, self._jobs = time.monotonic() + 60 * minutes, jobs

    @contextmanager
    def setting_up(self, implementation: str) -> Iterator[None]:
        """While an implementation is."""
        self.at = implementation
        try:
            yield
        finally:
            self.at = ""

    @property
    def over(self) -> bool:
        return time.monotonic() > self._end

    def next_deadline(self) -> float:
        """When the job that now begins should have taken its samples, in ``time.monotonic()``."""
        now, jobs = time.monotonic(), max(1, self._jobs)
        self._jobs -= 1
        return now + max(0.0, self._end - now) / jobs


def message(error: BaseException) -> str:
    """An error in one line: its type and the beginning of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


# Equal results


def setting(
    workload: Workload, device: torch.device, dtype: torch.dtype, *, steps: int = 0, layout: str = "contiguous"
) -> Setting:
    """New networks and data, the same at each call; with latents and eps for so many ``steps``, or fresh ones for 0.

    With them given, dropout is off, as its masks are drawn in an order that is each implementation's own.
    """
    torch.manual_seed(0)
    generator, critic, real = workload.made()
    given = None
    if steps:
        latents = torch.randn(steps, workload.batch, workload.latent)
        eps = reference.uniform(0, 0, steps * workload.batch).view(steps, workload.batch)  # as a Trainer draws them
        given = Given(latents.to(device, dtype), eps.to(device, dtype))
        for module in critic.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
    options: Any = {"device": device, "dtype": dtype, "memory_format": LAYOUTS[layout]}
    real = real.to(device, dtype).contiguous(memory_format=LAYOUTS[layout])
    return Setting(workload, generator.to(**options), critic.to(**options), real, given, layout)


def _weights(made: Setting) -> Tensor:
    return torch.cat([p.detach().reshape(-1).double() for p in made.critic.parameters()])  # in one order in any layout


@contextmanager
def _no_tf32() -> Iterator[None]:
    """float32 products in float32 throughout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of PyTorch would have other names for these
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        try:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def _products_in(precision: str) -> Iterator[None]:
    """Let float32 products round as a precision has it; any but TF32 leaves PyTorch's setting as it is."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else before)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def weights_after(
    name: str, workload: Workload, device: torch.device, dtype: torch.dtype, layout: str = "contiguous"
) -> tuple[Tensor, float]:
    """Return the critic's weights in float64 after the steps of a check, and the seconds that all of it took."""
    made = setting(workload, device, dtype, steps=CHECKED_STEPS, layout=layout)
    begun = time.perf_counter()
    with _no_tf32():
        step = implementation(name)(made)
        for _ in range(CHECKED_STEPS):
            step.take()
        timing.wait(device)
    return _weights(made), time.perf_counter() - begun


def distance_allowed(workload: Workload, device: torch.device) -> tuple[Tensor, float]:
    """(the weights that the textbook comes to in float64, how far from them another may end in float32)."""
    exact, _ = weights_after("textbook", workload, device, torch.float64)
    rounded, _ = weights_after("textbook", workload, device, torch.float32)
    before = setting(workload, device, torch.float64)
    with torch.no_grad():
        before.clamp_()  # else the first clamp, which is the same for all, would pass for most of the way
    moved = (exact - _weights(before)).norm()
    return exact, float(TIMES_TEXTBOOK * (rounded - exact).norm() + FLOOR * moved)


def check(
    name: str, implementations: Sequence[str], device: torch.device, schedule: Schedule, layout: str = "contiguous"
) -> dict[str, float | str]:
    """Return whether each implementation comes to the textbook's weights, in float32 without TF32.

    Args:
        name: of a workload, see :func:`benchmarks.networks.find`.
        implementations: names, see :func:`benchmarks.implementations.implementation`; the textbooks are always there.
        device: a CPU or a CUDA device.
        schedule: the textbooks alone are looked at when its time is over.
        layout: of :data:`LAYOUTS`.

    Returns:
        By implementation, the seconds that it took to make and to take the first steps, or why it is left out.
    """
    workload = find(name)
    found: dict[str, float | str] = {}
    torch.compiler.reset()  # it allows a function only so many forms
    exact, allowed = distance_allowed(workload, device)
    others = (i for i in dict.fromkeys(implementations) if i not in TEXTBOOKS)
    for which in [*TEXTBOOKS, *sorted(others, key=compiles)]:
        if schedule.over and which not in TEXTBOOKS:
            found[which] = "left out for time"
            continue
        try:
            with schedule.setting_up(which):
                weights, seconds = weights_after(which, workload, device, torch.float32, layout)
        except Exception as error:  # whatever it is, the others can still be measured
            found[which] = message(error)
            continue
        distance = float((weights - exact).norm())
        found[which] = seconds
        if not distance <= allowed:
            found[which] = (
                f"its weights after {CHECKED_STEPS} steps are {distance:.3g} from the float64 textbook's, "
                f"where {allowed:.3g} is allowed"
            )
    return found


# Times


def _time(steps: dict[str, Step], device: torch.device, rounds: int, deadline: float) -> dict[str, dict[str, Any]]:
    """Samples of each step, quantile by quantile; on a GPU also of its device work alone and of its host's."""
    samplers: dict[tuple[str, str], Any] = {}
    notes: dict[str, str] = {}
    for name, step in steps.items():
        repeats = 1
        if device.type == "cuda":
            repeats = max(1, min(BACK_TO_BACK, round(LONG / timing.time_of(step.take, device, 2))))
        samplers[name, "step_ms"] = lambda take=step.take, n=repeats: timing.time_of(take, device, n)
        if device.type != "cuda":
            continue
        samplers[name, "host_ms"] = lambda take=step.take: timing.host_time(take, device)
        if step.is_graph:
            notes[name] = "replays its own graph"
            continue
        try:
            replay = timing.capture(step.take, step.random)
        except Exception as error:  # whatever it is: then there is no time of the device alone
            notes[name] = f"not captured: {message(error)}"
            continue
        samplers[name, "device_ms"] = lambda replay=replay, n=repeats: timing.time_of(replay, device, n)
        notes[name] = "replayed"
    samples = timing.interleaved(samplers, rounds, deadline)
    results: dict[str, dict[str, Any]] = {name: {"host_ms": None, "device_ms": None} for name in steps}
    for (name, figure), values in samples.items():
        results[name][figure] = timing.quantiles(values)
    for name, result in results.items():
        result["device"] = notes.get(name)
        if device.type == "cuda" and result["device_ms"] is None:
            result["device_ms"] = result["step_ms"]  # the best there is; the note says so
    return results


def critic_step(
    name: str, precision: str, checked: Mapping[str, float | str], device: torch.device, schedule: Schedule,
    ready: Callable[[], float] | None = None, *, layout: str = "contiguous",
) -> dict[str, Any]:  # fmt: skip
    """Time one workload.

    Args:
        name: of a workload, see :func:`benchmarks.networks.find`.
        precision: "float32" or "bfloat16", of networks and data wholly; or "tf32", which is float32 with products
            after ``torch.set_float32_matmul_precision("high")``.
        checked: what :func:`check` found of the workload.
        device: a CPU or a CUDA device.
        schedule: how long it may take.
        ready: called when all is set up and before the times; returns when they have to be taken.
        layout: of :data:`LAYOUTS`, of networks and data.

    Returns:
        ``{"workload", "precision", "layout", "batch", "implementations": {name: figures}, "dropped": {name: error}}``.
    """
    with _products_in(precision):
        figures, dropped = _figures(find(name), precision, checked, device, schedule, ready, layout)
    _compare(figures)
    return {
        "workload": name, "precision": precision, "layout": layout, "batch": find(name).batch,
        "implementations": figures, "dropped": dropped,
    }  # fmt: skip


def _figures(
    workload: Workload, precision: str, checked: Mapping[str, float | str], device: torch.device, schedule: Schedule,
    ready: Callable[[], float] | None, layout: str,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:  # fmt: skip
    """Return the figures of each implementation, and why others have none."""
    deadline = schedule.next_deadline()
    dropped = {which: found for which, found in checked.items() if isinstance(found, str)}
    steps: dict[str, Step] = {}
    figures: dict[str, dict[str, Any]] = {}
    torch.compiler.reset()  # it allows a function only so many forms
    for which, found in checked.items():
        if isinstance(found, str):
            continue
        if schedule.over and compiles(which):
            dropped[which] = "left out for time"
            continue
        try:
            gc.collect()
            peak = timing.Peak(device)
            begun = time.perf_counter()
            with schedule.setting_up(which):
                step = implementation(which)(setting(workload, device, PRECISIONS[precision], layout=layout))
                for _ in range(CHECKED_STEPS):
                    step.take()
                timing.wait(device)
            seconds = time.perf_counter() - begun
            figures[which] = {
                "kernels": timing.kernels(step.take, device),
                "peak_mib": peak.mebibytes(),
                # The compilers remember what they made for the check, which was in float32.
                "setup_s": found if precision == "float32" else seconds,
            }
            steps[which] = step
        except Exception as error:  # whatever it is, the others can still be measured
            dropped[which] = message(error)
    if ready is not None:
        deadline = ready()
    for which, step in steps.items():  # now that the GPU is this process's alone
        network: float | None = None
        try:
            network = None if step.is_graph else timing.network_time(step.take, device)
        except Exception as error:  # the profiler's: the times do not need it
            figures[which]["network"] = message(error)
        figures[which]["network_ms"] = network
    for which, times in _time(steps, device, schedule.rounds, deadline).items():
        figures[which] = times | figures[which]
    return figures, dropped


def _compare(figures: dict[str, dict[str, Any]]) -> None:
    """Add ratios to the detached textbook, above 1 where it is slower; and take the steps out of the set-up."""
    for result in figures.values():
        ordinary = CHECKED_STEPS * result["step_ms"]["q50"] / 1e3
        result["setup_s"] = round(max(0.0, result["setup_s"] - ordinary), 2)
        for figure in ("step_ms", "device_ms"):
            base = figures.get(BASE, {}).get(figure)
            ratio = round(base["q50"] / result[figure]["q50"], 3) if base else None
            result[figure.replace("_ms", "_ratio")] = ratio
