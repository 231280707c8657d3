"""Build each op's implementations: ours, and the strongest that PyTorch has for it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastwgan
from fastwgan import functional, reference
from fastwgan.backend import resolve
from fastwgan.engine.guard import Guard
from fastwgan.ops.penalty import penalty_cotangent
from fastwgan.ops.scores import score_statistics
from fastwgan.optim.base import Together

__all__ = ["BATCH", "OPS", "Builder", "Case", "Made"]

CLIP, LR, BETAS, WEIGHT, BATCH = 0.01, 5e-5, (0.0, 0.9), 10.0, 64
NOISE, DECAY, ROW = 0.1, 0.999, 1024
MOST_COMPILED = 20  # tensors: an update of hundreds takes a minute to compile


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

    @property
    def names(self) -> tuple[str, ...]:
        """Of its implementations, the first being what the others have to equal."""
        return tuple(n for n in OPS[self.op].names if n != "compiled" or self.tensors <= MOST_COMPILED)

    def __str__(self) -> str:
        return f"{self.op} {self.elements}" + (f" in {self.tensors}" if OPS[self.op].of_tensors else "")


class Made(NamedTuple):
    """An implementation of a case: ``take`` runs it; ``result``, asked for after one run, is what has to be equal."""

    take: Callable[[], object]
    result: Callable[[], list[Tensor]]


Builder = Callable[[], Made]


def _parameters(case: Case, device: torch.device) -> list[nn.Parameter]:
    """With gradients, and weights of which a clamp has half to do."""
    torch.manual_seed(0)
    each, more = divmod(case.elements, case.tensors)
    parameters = []
    for i in range(case.tensors):
        values = torch.empty(each + (i < more), device=device).uniform_(-2 * CLIP, 2 * CLIP)
        parameters.append(nn.Parameter(values))
        parameters[-1].grad = torch.randn_like(values)
    return parameters


def _update(
    case: Case,
    device: torch.device,
    optimizer_of: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    clamp: bool = False,
    compile: bool = False,
) -> Made:
    parameters = _parameters(case, device)
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
        made = {
            "foreach": update(lambda p: torch.optim.RMSprop(p, LR, foreach=True), clamp=True),
            "compiled": update(lambda p: torch.optim.RMSprop(p, LR, **compilable), clamp=True, compile=True),
            "fastwgan": update(lambda p: fastwgan.RMSprop(p, LR, clip=CLIP)),
        }
    else:
        made = {
            "fused": update(lambda p: torch.optim.Adam(p, LR, BETAS, fused=True)),
            "compiled": update(lambda p: torch.optim.Adam(p, LR, BETAS, **compilable), compile=True),
            "fastwgan": update(lambda p: fastwgan.Adam(p, LR, BETAS)),
        }
    return {name: made[name] for name in case.names}


def _averaged_builders(case: Case, device: torch.device) -> dict[str, Builder]:
    """Adam of a generator whose weights have a running average."""

    def fused() -> Made:
        parameters = _parameters(case, device)
        optimizer = torch.optim.Adam(parameters, LR, BETAS, fused=True)
        weights: Any = [p.detach() for p in parameters]
        averages: Any = [p.clone() for p in weights]

        def take() -> None:
            optimizer.step()
            torch._foreach_lerp_(averages, weights, 1 - DECAY)

        return Made(take, lambda: [*weights, *averages])

    def ours() -> Made:
        parameters = _parameters(case, device)
        optimizer = fastwgan.Adam(parameters, LR, BETAS)
        averages: dict[Tensor, Tensor] = {p: p.detach().clone() for p in parameters}
        together = Together(averages=averages, decay=DECAY)
        weights = [p.detach() for p in parameters]
        return Made(lambda: optimizer.step_gated(together), lambda: [*weights, *averages.values()])

    return {"fused": fused, "fastwgan": ours}


def _guard_builders(case: Case, device: torch.device) -> dict[str, Builder]:
    """Whether all gradients are finite, known on the device."""
    parameters = _parameters(case, device)
    gradients: Any = [p.grad for p in parameters]

    def made(call: Callable[[], Tensor]) -> Made:
        """``call`` gives 1 where one is not; asked without and with one."""

        def results() -> list[Tensor]:
            found = [call().clone()]
            kept = gradients[-1][-1].clone()
            gradients[-1][-1] = torch.inf
            found.append(call().clone())
            gradients[-1][-1] = kept
            return [1 + torch.stack(found)]

        return Made(call, results)

    def foreach() -> Tensor:
        return 1 - torch.stack(torch._foreach_norm(gradients, torch.inf)).isfinite().all().float()

    guard = Guard("critic", nn.ParameterList(parameters), resolve("auto", device), limit=0, scaled=False)

    def ours() -> Tensor:
        guard.check(parameters)
        return guard.gate[0]

    return {"foreach": lambda: made(foreach), "fastwgan": lambda: made(ours)}


def _project_builders(case: Case, device: torch.device) -> dict[str, Builder]:
    """Rows brought down to a norm, all of them; copied from elsewhere before, as they are within it afterwards."""
    torch.manual_seed(0)
    each = case.elements // case.tensors
    shape = (max(1, each // ROW), min(each, ROW))
    sources: Any = [torch.randn(shape, device=device) for _ in range(case.tensors)]
    bound = 0.5 * shape[1] ** 0.5

    def made(project: Callable[[list[Tensor]], object]) -> Made:
        weights: Any = [x.clone() for x in sources]

        def take() -> None:
            torch._foreach_copy_(weights, sources)
            project(weights)

        return Made(take, lambda: weights)

    def eager(weights: list[Tensor]) -> None:
        for w in weights:
            w.mul_((bound / torch.linalg.vector_norm(w, dim=1, keepdim=True)).clamp_(max=1))

    return {
        "eager": lambda: made(eager),
        "fastwgan": lambda: made(lambda weights: functional.clip_norms_(weights, bound)),
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


def _perturb_builders(case: Case, device: torch.device) -> dict[str, Builder]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, case.elements // BATCH, device=device)
    ours = partial(functional.perturb, x, scale=NOISE, seed=0)
    return {
        "randn": lambda: Made(
            lambda: torch.add(x, torch.randn_like(x), alpha=NOISE),
            lambda: [reference.perturb(x, scale=NOISE, seed=0)],
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
        statistics, cotangent = penalty_cotangent(g, "two-sided", 1.0, WEIGHT, resolve("auto", device))
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

    ours = partial(score_statistics, real, fake, resolve("auto", device))
    return {"eager": lambda: Made(eager, eager), "fastwgan": lambda: Made(ours, lambda: list(ours()))}


class Op(NamedTuple):
    """An op that is timed.

    Attributes:
        builders: makes inputs, and returns by name what makes each implementation; they share these inputs.
        names: of the implementations, the first being what the others have to equal.
        bytes: to be moved for an element.
        of_tensors: whether the elements may be in any number of tensors.
    """

    builders: Callable[[Case, torch.device], dict[str, Builder]]
    names: tuple[str, ...]
    bytes: int
    of_tensors: bool = False


OPS = {
    "RMSprop": Op(_update_builders, ("foreach", "compiled", "fastwgan"), 20, True),
    "Adam": Op(_update_builders, ("fused", "compiled", "fastwgan"), 28, True),
    "Adam averaged": Op(_averaged_builders, ("fused", "fastwgan"), 36, True),
    "guard": Op(_guard_builders, ("foreach", "fastwgan"), 4, True),
    "project": Op(_project_builders, ("eager", "fastwgan"), 16, True),  # half of them the copy before it
    "interpolate": Op(_interpolate_builders, ("lerp", "fastwgan"), 12),
    "perturb": Op(_perturb_builders, ("randn", "fastwgan"), 8),
    "penalty": Op(_penalty_builders, ("eager", "compiled", "fastwgan"), 8),
    "scores": Op(_scores_builders, ("eager", "fastwgan"), 8),
}
