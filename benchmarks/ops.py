"""Time each op by itself, against eager and compiled PyTorch, and against the copy bandwidth.

An op that is bound by memory cannot be faster than a copy that moves as many bytes; so its figure is the bytes that it
has to move, each input read once and each output written once, over its time and over the bandwidth of a large copy in
the same run. Arrays that fit into a cache are measured in it, and can do better than that.
"""

import gc
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.op_cases import BATCH, OPS, Case
from benchmarks.steps import Schedule, message

__all__ = ["cases", "copy_bandwidth", "fits", "measure"]

LARGEST_ON_CPU = 2**20
TOLERANCE = 1e-5  # of the largest value: all are float32, summed in orders of their own
REPEATS = 10  # calls to a sample on a GPU, as one graph: the shortest are over before the host has asked for the next


def cases(device: torch.device) -> list[Case]:
    """All of them, on a CPU up to a million elements; last those of many tensors, which take long to compile."""
    sizes = ((2**10, 1), (2**20, 1), (2**26, 1), (2**28, 1), *((2**n, m) for n in (20, 26) for m in (20, 300)))
    found = [
        *(Case(op, n, m) for op in ("RMSprop", "Adam") for n, m in sizes),
        *(Case(op, BATCH * n) for op in ("interpolate", "perturb", "penalty") for n in (784, 12_288, 196_608, 2**21)),
        *(Case("scores", n) for n in (64, 2**12, 2**18, 2**20, 2**24, 2**26)),
        *(Case(op, n, 16) for op in ("Adam averaged", "guard", "project") for n in (2**20, 2**26)),
    ]  # fmt: skip
    found = [case for case in found if device.type == "cuda" or case.elements <= LARGEST_ON_CPU]
    return sorted(found, key=lambda case: case.tensors)


def difference(result: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, over the largest value, of all tensors."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(result, expected, strict=True))


def copy_bandwidth(device: torch.device) -> float:
    """Gigabytes (1e9) a second that a large copy moves, read ones and written ones."""
    elements = 2**28 if device.type == "cuda" else 2**26
    source, target = torch.rand(elements, device=device), torch.zeros(elements, device=device)
    samples = [timing.time_of(lambda: target.copy_(source), device, REPEATS) for _ in range(10)]
    return 2 * source.nbytes / median(samples[2:]) / 1e6


def fits(case: Case, device: torch.device) -> bool:
    """Whether a GPU has the memory for all implementations at once, with an eager one's temporaries."""
    return device.type != "cuda" or 6 * case.bytes < torch.cuda.mem_get_info(device)[0]


def _sampler(take: Callable[[], object], device: torch.device) -> tuple[Callable[[], float], dict[str, Any]]:
    """(what takes a sample of milliseconds a call, how it does)."""
    if device.type != "cuda":
        return lambda: timing.time_of(take, device, 1), {"how": "calls"}
    try:
        replay = timing.capture(take, repeats=REPEATS)
    except Exception as error:  # whatever it is: then the host's time is in the figure
        return lambda: timing.time_of(take, device, REPEATS), {"how": f"not captured: {message(error)}"}
    return lambda: timing.time_of(replay, device, 1) / REPEATS, {"how": "replayed"}


def measure(case: Case, device: torch.device, bandwidth: float, schedule: Schedule) -> dict[str, Any]:
    """Check and time one case.

    Args:
        case: of :func:`cases`.
        device: a CPU or a CUDA device.
        bandwidth: of :func:`copy_bandwidth`, in the same run.
        schedule: how long it may take.

    Returns:
        ``{"op", "elements", "tensors", "bytes", "implementations": {name: figures}, "dropped": {name: error}}``.
    """
    deadline = schedule.next_deadline()
    figures: dict[str, Any] = {}
    dropped: dict[str, str] = {}
    result = {
        "op": case.op, "elements": case.elements, "tensors": case.tensors, "bytes": case.bytes,
        "implementations": figures, "dropped": dropped,
    }  # fmt: skip
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if not fits(case, device):
        dropped["all"] = "does not fit the GPU's memory"
        return result
    torch.compiler.reset()  # it allows a function only so many forms
    samplers: dict[str, Callable[[], float]] = {}
    expected: list[Tensor] | None = None
    for name, build in OPS[case.op].builders(case, device).items():
        try:
            made = build()
            made.take()
            values = [x.detach().clone() for x in made.result()]
            if expected is None:
                expected = values
            elif not difference(values, expected) <= TOLERANCE:
                dropped[name] = f"its result is {difference(values, expected):.3g} of the largest value away"
                continue
            made.take()
            samplers[name], figures[name] = _sampler(made.take, device)
        except Exception as error:  # whatever it is, the others can still be measured
            dropped[name] = message(error)
    for name, samples in timing.interleaved(samplers, schedule.rounds, deadline).items():
        figures[name]["ms"] = timing.quantiles(samples)
        rate = case.bytes / figures[name]["ms"]["q50"] / 1e6
        figures[name]["gb_s"], figures[name]["share"] = float(f"{rate:.4g}"), float(f"{rate / bandwidth:.4g}")
    return result
