"""How a step of the trainer is judged, row by row: beside plain PyTorch in the same dtype, against float64.

The rule: a relative error ||ours - float64|| / ||float64|| is at most twice that of plain PyTorch in the same dtype,
and a floor of roundings to the dtype: 4 for one op, 8 for what has gone through a network. Of a value that is a
difference of larger ones, these are roundings of the larger ones. For networks in float64, which is no oracle for
itself, the floor is eight times as much.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastwgan.backend import Backend
from fastwgan.constraints import Clip, GradientPenalty, WeightClip
from fastwgan.metrics import Metrics
from fastwgan.optim import RMSprop
from fastwgan.verification import oracle
from fastwgan.verification.observed import Observed, parts
from fastwgan.verification.oracle import Found, Step, Weights, to_dtype
from fastwgan.verification.report import Row

THROUGH_NETWORKS = ("generate", "forward", "input gradient", "term", "loss", "backward", "buffers")
Formula = Callable[..., Tensor]


def difference(x: Tensor | None, exact: Tensor, size: float) -> float:
    """Return ||x - exact|| / size; NaN where there is no x to compare."""
    if x is None or x.shape != exact.shape:
        return math.nan
    return float((x.detach().double() - exact).norm() / size)


def _magnitude(*scores: Tensor) -> Tensor:
    return torch.stack([x.abs().mean() for x in scores]).sum()


@dataclass
class Judge:
    """Writes the rows of one step."""

    step: Step
    module: nn.Module  # the network that took the step, after it
    optimizer: torch.optim.Optimizer
    backend: Backend
    before: Weights
    seen: Observed
    metrics: Metrics
    eagers: Sequence[Found]  # what plain PyTorch's two passes come to in the networks' dtype
    exact: Found  # and the one in float64
    rows: list[Row]

    def judge(self) -> None:
        """Write the rows of all stages but the buffers, in the order of the step."""
        step, seen, metrics = self.step, self.seen, self.metrics
        kinds = oracle.KINDS[step.name]
        scores = parts(seen.scores, len(kinds))
        self._through("generate", {"fake samples": seen.fake})
        if step.penalty:
            self._points(step.penalty)
        self._through("forward", {f"{kind} scores": x for kind, x in zip(kinds, scores, strict=True)})
        if all(x is not None for x in scores):
            self._scores(scores)
        if step.penalty:
            self._through("input gradient", {"at the points": seen.gradient})
            self._penalty(self.exact["input gradient", "at the points"][0])
        if step.term is not None:
            self._through("term", {f"{step.name} term": getattr(metrics, f"{step.name}_term")})
        self._through("loss", {f"{step.name} loss": getattr(metrics, f"{step.name}_loss")})
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._through("backward", {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()})
        self._guard()
        self._update()

    def row(
        self, op: str, name: str, ours: Tensor | None, eagers: Sequence[Tensor], exact: Tensor, summands: float = 0.0
    ) -> None:
        """Compare one tensor; ``summands`` is the size of what ``exact`` is a sum of, where that may cancel."""
        exact = exact.detach().double()
        norm = exact.norm().item()
        size = norm if norm > oracle.CANCELLED * summands else summands or 1.0
        errors = [difference(each, exact, size) for each in eagers]
        eager = torch.tensor(errors, dtype=torch.float64).max().item()  # NaN if there is one
        floor = 0.0
        if ours is not None and ours.is_floating_point():
            through = op in THROUGH_NETWORKS
            info = torch.finfo(eagers[0].dtype if through else ours.dtype)
            roundings = (8 if through else 4) * (8 if info.dtype == "float64" else 1)
            floor = roundings * info.eps * (max(norm, summands) + info.tiny * exact.numel() ** 0.5) / size
        # Where plain PyTorch overflows in the dtype, it is no measure.
        tolerance = floor + (2 * eager if math.isfinite(eager) else 0.0)
        self.rows.append(Row(self.step.name, op, name, difference(ours, exact, size), eager, tolerance))

    def _through(self, op: str, ours: Mapping[str, Tensor | None]) -> None:
        for name, x in ours.items():
            eagers = [each[op, name][0] for each in self.eagers if (op, name) in each]
            self.row(op, name, x, eagers, *self.exact[op, name])

    def _stage(
        self, op: str, name: str, ours: Tensor | None, given: Sequence[Tensor], formula: Formula,
        size: Formula | None = None,
    ) -> None:  # fmt: skip
        """Compare what a stage made of what it was given with a formula; ``size`` is that of its summands."""
        wide = to_dtype(given, torch.float64)
        self.row(op, name, ours, [formula(*given)], formula(*wide), size(*wide).item() if size else 0.0)

    def _points(self, penalty: GradientPenalty) -> None:
        seen, step, perturbed = self.seen, self.step, penalty.at == "perturbed"
        assert seen.fake is not None
        points = partial(step.points, like=step.real if seen.x is None else seen.x)
        size = lambda real, fake: real.norm() + (points(real, fake) - real if perturbed else fake).norm()  # noqa: E731
        *given, x = seen.between or (step.real, seen.fake.to(step.real.dtype), seen.x)
        self._stage("perturb" if perturbed else "interpolate", "points", x, given, points, size)

    def _scores(self, scores: Sequence[Tensor]) -> None:
        """Judge the means of scores, and the gradients that the backward pass began with there."""
        step, metrics, critic = self.step, self.metrics, self.step.name == "critic"
        if critic:
            self._stage("scores", "mean of real", metrics.real_score, scores[:1], torch.mean, _magnitude)
            self._stage("scores", "mean of fake", metrics.fake_score, scores[1:], torch.mean, _magnitude)
            difference = metrics.wasserstein
            self._stage("scores", "wasserstein", difference, scores, lambda a, b: a.mean() - b.mean(), _magnitude)
        elif step.term is None:
            self._stage("scores", "-mean of fake", metrics.generator_loss, scores, lambda a: -a.mean(), _magnitude)
        if step.term is not None:  # a part of the gradient there
            return
        leaves = [[x.detach().requires_grad_() for x in each] for each in (scores, to_dtype(scores, torch.float64))]
        kinds, seeds = oracle.KINDS[step.name], parts(self.seen.seeds, len(scores))
        slopes = (oracle.gradients(step.means(at)[0], at) for at in leaves)
        for kind, seed, (slope, _), (wide, summands) in zip(kinds, seeds, *slopes, strict=True):
            self.row("scores", f"seed at {kind} scores", seed, [slope], wide, summands)

    def _penalty(self, exact: Tensor) -> None:
        """Judge what is made of the critic's gradient; the ``exact`` one wants a gradient if ours should."""
        seen, step, metrics = self.seen, self.step, self.metrics
        g = [torch.full_like(exact, math.nan) if seen.gradient is None else seen.gradient]
        self._stage("penalty", "mean penalty", metrics.penalty, g, step.penalties, partial(step.penalties, sign=-1))
        self._stage("penalty", "mean norm", metrics.gradient_norm, g, lambda g: step.norms(g).mean())
        self._stage("penalty", "least norm", metrics.gradient_norm_min, g, lambda g: step.norms(g).amin())
        self._stage("penalty", "greatest norm", metrics.gradient_norm_max, g, lambda g: step.norms(g).amax())
        if exact.requires_grad:
            size = lambda g: step.cotangent(g, sign=-1).norm()  # noqa: E731
            self._stage("penalty", "its gradient", seen.cotangent, g, step.cotangent, size)

    def _guard(self) -> None:
        """Judge how many gradients are not finite, and whether the step was taken: only if there are none."""
        found = [(~p.grad.isfinite()).sum() for p in self.module.parameters() if p.grad is not None]
        count, nonfinite = torch.stack(found).sum(), self.metrics.nonfinite
        self.row("guard", "non-finite", None if nonfinite is None else nonfinite.long(), [count], count)
        changed = [x.any() for state in self.optimizer.state.values() for x in state.values()]
        changed += [(p != self.before[name]).any() for name, p in self.module.named_parameters()]
        taken, right = torch.stack([x.to(count.device) for x in changed]).any().int(), (count == 0).int()
        self.row("guard", "steps taken", taken, [right], right)

    def _update(self) -> None:
        """Judge weights and optimizer state, all from the trainer's own gradients."""
        clip = self.step.constraint if isinstance(self.step.constraint, Clip) else None
        kind = torch.optim.RMSprop if clip else torch.optim.Adam
        options: dict[str, Any] = {"lr": 5e-5} if clip else {"lr": 1e-4, "betas": (0.0, 0.9)}  # a Trainer's own
        named = dict(self.module.named_parameters())
        grads = {name: p.grad for name, p in named.items() if p.grad is not None}
        old = {name: self.before[name] for name in grads}
        eager = oracle.updated(kind, old, grads, foreach=False, **options)
        exact = oracle.updated(kind, *to_dtype((old, grads), torch.float64), foreach=False, **options)
        ours = oracle.with_state(named, self.optimizer)
        if clip and self.step.name == "critic":  # where those in it are not what the optimizer has left
            new = oracle.updated(RMSprop, old, grads, backend=self.backend, **options)
            ours |= {name: new[name] for name in grads}
        for name, x in exact.items():
            self.row("update", name, ours.get(name), [eager[name]], x)
        if clip and self.step.name == "critic":
            self._bound(clip, ours, self.before | eager, self.before | exact)

    def _bound(self, clip: Clip, new: Weights, eager: Weights, exact: Weights) -> None:
        """Judge the critic's weights, from what they are without the bound, and how many of them lie on it."""
        step, clamped = self.step, isinstance(clip, WeightClip)
        op = "clamp" if clamped else "project"
        members = set(self.module.parameters()) - clip.excluded(self.module)
        on_bound, nearly = [], []  # to a rounding of a norm
        for name, p in self.module.named_parameters():
            plain, wide = eager[name], exact[name].double()
            if p in members:
                bound = torch.tensor(clip.bound, dtype=p.dtype).item() if clamped else clip.bound
                plain, wide = step.bounded(plain, bound), step.bounded(wide, bound)
                sizes = step.sizes(p.detach() if clamped else new[name].double())
                margin = 0.0 if clamped else 8 * torch.finfo(p.dtype).eps
                on_bound.append(sizes >= bound * (1 + margin))
                nearly.append(sizes >= bound * (1 - margin))
            self.row(op, name, p.detach(), [plain], wide)
        if members:
            least, most = (torch.cat(each).double().mean() for each in (on_bound, nearly))
            ours = self.metrics.saturation
            share = least if ours is None else ours.double().clamp(least, most)
            self.row(op, "saturation", ours, [share.float()], share)
