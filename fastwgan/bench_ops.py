"""fastwgan bench --ops: each op by itself, against eager and compiled PyTorch, and against the copy bandwidth.

An op that is bound by memory cannot be faster than a copy that moves as many bytes; so its figure is the bytes that it
has to move, each input read once and each output written once, over its time and over the bandwidth of a large copy in
the same run. Arrays that fit into a cache are measured in it, and can do better than that.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastwgan
from fastwgan import functional, reference, timing
from fastwgan.bench import Schedule, message

__all__ = ["OPS", "Case", "Made", "builders", "cases", "copy_bandwidth", "fits", "measure"]

CLIP, LR, BETAS, WEIGHT, BATCH = 0.01, 5e-5, (0.0, 0.9), 10.0, 64
LARGEST_ON_CPU = 2**20
TOLERANCE = 1e-5  # of the largest value: all are float32, summed in orders of their own
REPEATS = 10  # calls to a sample on a GPU


@dataclass(frozen=True)
class Case:
    """An op at one size: ``elements`` float32 numbers to an input, in so many ``tensors``."""

    op: str
    elements: int
    tensors: int = 1

    @property
    def bytes(self) -> int:
        """How many have to be moved."""
        return self.elements * OPS[self.op].bytes

    def __str__(self) -> str:
        return f"{self.op} {self.elements}" + (f" in {self.tensors}" if self.op in ("RMSprop", "Adam") else "")


def cases(device: torch.device) -> list[Case]:
    """All of them, on a CPU up to a million elements; last those of many tensors, which take long to compile."""
    found = [
        *(Case(op, n, m) for op in ("RMSprop", "Adam") for n in (2**10, 2**20, 2**26, 2**28) for m in (1, 20, 300)),
        *(Case(op, BATCH * n) for op in ("interpolate", "penalty") for n in (784, 12_288, 196_608, 2_097_152)),
        *(Case("scores", n) for n in (64, 2**12, 2**18, 2**20, 2**24)),
    ]  # fmt: skip
    found = [case for case in found if device.type == "cuda" or case.elements <= LARGEST_ON_CPU]
    return sorted(found, key=lambda case: case.tensors)


class Made(NamedTuple):
    """An implementation of a case: ``take`` runs it; ``result``, asked for after one run, is what has to be equal."""

    take: Callable[[], object]
    result: Callable[[], list[Tensor]]


Builder = Callable[[], Made]


def _update(
    case: Case,
    device: torch.device,
    optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    clamp: bool = False,
    compile: bool = False,
) -> Made:
    torch.manual_seed(0)
    each, more = divmod(case.elements, case.tensors)
    parameters = []
    for i in range(case.tensors):
        values = torch.empty(each + (i < more), device=device).uniform_(-2 * CLIP, 2 * CLIP)
        parameters.append(nn.Parameter(values))
        parameters[-1].grad = torch.randn_like(values)
    optimizer, clamped = optimizer_of(parameters), [p.detach() for p in parameters]

    def take() -> None:
        optimizer.step()
        if clamp:
            torch._foreach_clamp_min_(clamped, -CLIP)
            torch._foreach_clamp_max_(clamped, CLIP)

    return Made(torch.compile(take) if compile else take, lambda: clamped)


def _update_builders(case: Case, device: torch.device) -> dict[str, Builder]:
    update = partial(partial, _update, case, device)
    compilable: dict[str, Any] = {"foreach": True, "capturable": device.type == "cuda"}
    if case.op == "RMSprop":
        return {
            "foreach": update(lambda p: torch.optim.RMSprop(p, LR, foreach=True), clamp=True),
            "compiled": update(lambda p: torch.optim.RMSprop(p, LR, **compilable), clamp=True, compile=True),
            "fastwgan": update(lambda p: fastwgan.RMSprop(p, LR, clip=CLIP)),
        }
    return {
        "fused": update(lambda p: torch.optim.Adam(p, LR, BETAS, fused=True)),
        "compiled": update(lambda p: torch.optim.Adam(p, LR, BETAS, **compilable), compile=True),
        "fastwgan": update(lambda p: fastwgan.Adam(p, LR, BETAS)),
    }


def _interpolate_builders(case: Case, device: torch.device) -> dict[str, Builder]:
    torch.manual_seed(0)
    real, fake = (torch.randn(BATCH, case.elements // BATCH, device=device) for _ in range(2))
    eps = reference.uniform(0, 0, BATCH, device)[:, None]
    ours = partial(functional.interpolate, real, fake, seed=0)
    return {
        "lerp": lambda: Made(
            lambda: torch.lerp(fake, real, torch.rand(BATCH, 1, device=device)),
            lambda: [torch.lerp(fake, real, eps)],
        ),
        "fastwgan": lambda: Made(ours, lambda: [ours()]),
    }


def _penalty_of(g: Tensor) -> Tensor:
    penalty: Tensor = WEIGHT * ((g.norm(2, dim=1) - 1) ** 2).mean()
    return penalty


def _penalty_builders(case: Case, device: torch.device) -> dict[str, Builder]:
    """The penalty and its gradient, as a critic step wants both."""
    torch.manual_seed(0)
    # Of norm 2: near the target of 1 the check would compare what cancellation leaves.
    g = 2 * torch.randn(BATCH, case.elements // BATCH, device=device) / (case.elements // BATCH) ** 0.5
    leaf = g.clone().requires_grad_()

    def eager() -> list[Tensor]:
        penalty = _penalty_of(leaf)
        return [penalty.detach(), *torch.autograd.grad(penalty, leaf)]

    def compiled() -> Made:
        both = torch.compile(torch.func.grad_and_value(_penalty_of))
        return Made(lambda: both(g), lambda: list(reversed(both(g))))

    def ours() -> list[Tensor]:
        statistics, cotangent = functional.penalty_cotangent(g, "two-sided", 1.0, WEIGHT, "auto")
        return [statistics[0], cotangent]

    def ours_for_check() -> list[Tensor]:
        penalty, cotangent = ours()
        return [WEIGHT * penalty, cotangent]

    return {
        "eager": lambda: Made(eager, eager),
        "compiled": compiled,
        "fastwgan": lambda: Made(ours, ours_for_check),
    }


def _scores_builders(case: Case, device: torch.device) -> dict[str, Builder]:
    """All four statistics of the scores: means, their difference, and the loss."""
    torch.manual_seed(0)
    real, fake = torch.randn(case.elements, device=device) + 2, torch.randn(case.elements, device=device) + 1

    def eager() -> list[Tensor]:
        real_mean, fake_mean = real.mean(), fake.mean()
        return [real_mean, fake_mean, real_mean - fake_mean, fake_mean - real_mean]

    ours = partial(functional.score_statistics, real, fake, "auto")
    return {"eager": lambda: Made(eager, eager), "fastwgan": lambda: Made(ours, lambda: list(ours()))}


class Op(NamedTuple):
    """What makes each implementation, their names, and the bytes to be moved for an element.

    The first implementation is the one that the others have to equal.
    """

    builders: Callable[[Case, torch.device], dict[str, Builder]]
    names: tuple[str, ...]
    bytes: int


OPS = {
    "RMSprop": Op(_update_builders, ("foreach", "compiled", "fastwgan"), 20),
    "Adam": Op(_update_builders, ("fused", "compiled", "fastwgan"), 28),
    "interpolate": Op(_interpolate_builders, ("lerp", "fastwgan"), 12),
    "penalty": Op(_penalty_builders, ("eager", "compiled", "fastwgan"), 8),
    "scores": Op(_scores_builders, ("eager", "fastwgan"), 8),
}


def builders(case: Case, device: torch.device) -> dict[str, Builder]:
    """What makes each implementation of a case; they share inputs, which it makes."""
    return OPS[case.op].builders(case, device)


def difference(result: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, over the largest value, of all tensors."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(result, expected, strict=True))


def copy_bandwidth(device: torch.device) -> float:
    """Gigabytes (1e9) a second that a large copy moves, read ones and written ones."""
    elements = 2**28 if device.type == "cuda" else 2**26
    source, target = torch.rand(elements, device=device), torch.zeros(elements, device=device)
    samples = [timing.time_of(lambda: target.copy_(source), device, REPEATS) for _ in range(10)]
    return 2 * source.nbytes / timing.median(samples[2:]) / 1e6


def fits(case: Case, device: torch.device) -> bool:
    """Whether a GPU has the memory for all implementations at once, with an eager one's temporaries."""
    return device.type != "cuda" or 6 * case.bytes < torch.cuda.mem_get_info(device)[0]


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
    for name, build in builders(case, device).items():
        try:
            made = build()
            made.take()
            values = [x.detach().clone() for x in made.result()]
            if expected is None:
                expected = values
            elif not difference(values, expected) <= TOLERANCE:
                dropped[name] = f"its result is {difference(values, expected):.3g} of the largest value away"
                continue
            take, how = made.take, "calls"
            take()
            if device.type == "cuda":
                try:
                    take, how = timing.capture(made.take), "replayed"
                except Exception as error:  # whatever it is: then the host's time is in the figure
                    how = f"not captured: {message(error)}"
            repeats = REPEATS if device.type == "cuda" else 1
            samplers[name] = lambda take=take, repeats=repeats: timing.time_of(take, device, repeats)  # type: ignore[misc]
            figures[name] = {"how": how}
        except Exception as error:  # whatever it is, the others can still be measured
            dropped[name] = message(error)
    for name, samples in timing.interleaved(samplers, schedule.rounds, deadline).items():
        figures[name]["ms"] = timing.quantiles(samples)
        rate = case.bytes / figures[name]["ms"]["q50"] / 1e6
        figures[name]["gb_s"], figures[name]["share"] = float(f"{rate:.4g}"), float(f"{rate / bandwidth:.4g}")
    return result
