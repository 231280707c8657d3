"""A critic step's and a generator step's passes in plain PyTorch, in any dtype: what :func:`fastwgan.verify` judges by.

The formulas here are on purpose not those of :mod:`fastwgan.reference`, which the torch backend runs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastwgan import reference
from fastwgan.constraints import GradientPenalty, WeightClip
from fastwgan.passes import scores_of_both

__all__ = ["Constraint", "Pass", "Step", "critic_pass", "generator_pass", "to_dtype"]

Constraint = WeightClip | GradientPenalty


class Observed(Protocol):
    """What of another step a pass may be taken on: its fake samples, points of the penalty, and batches."""

    fake: Tensor | None
    x: Tensor | None

    @property
    def together(self) -> bool: ...


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in ``dtype``, inside tuples, lists and dicts too; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: to_dtype(each, dtype) for key, each in value.items()}
    return type(value)(to_dtype(each, dtype) for each in value) if type(value) in (tuple, list) else value


@dataclass(frozen=True)
class Step:
    """What a step is taken on, and what its constraint asks for there."""

    real: Tensor
    cond: tuple[Any, ...]
    constraint: Constraint
    pack: int
    seed: int

    def to(self, dtype: torch.dtype) -> "Step":
        return replace(self, real=self.real.to(dtype), cond=to_dtype(self.cond, dtype))

    def points(self, fake: Tensor) -> Tensor | None:
        """Where the penalty is taken, in the fake samples' dtype; None where there is none."""
        if isinstance(self.constraint, WeightClip):
            return None
        real = self.real.to(fake.dtype)
        if self.constraint.at == "interpolates":
            eps = reference.uniform(self.seed, 0, len(real) // self.pack, real.device).repeat_interleave(self.pack)
            eps = eps.to(real.dtype).view(-1, *[1] * (real.dim() - 1))
            return eps * real + (1 - eps) * fake
        return real if self.constraint.at == "real" else fake

    def norms(self, gradients: Tensor) -> Tensor:
        """Of each pack, [N / pack]."""
        norms: Tensor = gradients.reshape(len(gradients) // self.pack, -1).norm(dim=1)
        return norms

    def penalty(self, gradients: Tensor, sign: int = 1) -> Tensor:
        """The mean, without its weight; with ``sign=-1`` of the sums that it has differences of."""
        assert isinstance(self.constraint, GradientPenalty)
        norms, target = self.norms(gradients), sign * self.constraint.target
        each = {
            "two-sided": lambda: (norms - target) ** 2,
            "one-sided": lambda: (norms - target).clamp(min=0) ** 2,
            "zero-centered": lambda: norms**2,
            "power": lambda: norms**6,
        }[self.constraint.kind]()
        return each.mean()

    def cotangent(self, gradients: Tensor, sign: int = 1) -> Tensor:
        """d (weight * penalty) / d gradients."""
        leaf = gradients.detach().requires_grad_()
        return torch.autograd.grad(self.weight * self.penalty(leaf, sign), leaf)[0]

    def bound(self, dtype: torch.dtype) -> float:
        """Of clamped weights, as their dtype holds it."""
        assert isinstance(self.constraint, WeightClip)
        return torch.tensor(self.constraint.bound, dtype=dtype).item()

    @property
    def weight(self) -> float:
        """Of the penalty in a first step."""
        return self.constraint.weight * self.constraint.every if isinstance(self.constraint, GradientPenalty) else 0.0


@dataclass
class Pass:
    """What plain PyTorch has come to.

    Attributes:
        fake, scores, gradient: the generator's samples, the critic's scores of real and fake ones, its gradient at the
            penalty's points.
        depends: whether that gradient depends on the critic's parameters.
        loss, summands: and the size of what it is a sum of.
        gradients: by parameter; zeros where the loss does not depend on it.
        sizes: of each gradient, the norms of the loss's terms' added up.
    """

    fake: Tensor
    scores: tuple[Tensor, ...]
    gradient: Tensor | None
    depends: bool
    loss: Tensor
    summands: float
    gradients: dict[str, Tensor]
    sizes: dict[str, float]


def _gradients(module: nn.Module, terms: list[Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Of the sum of ``terms`` by parameter, and for each the size of its summands."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    sizes = dict.fromkeys(trained, 0.0)
    for term in terms:
        parts: Iterable[Tensor | None] = [None] * len(trained)
        if term.requires_grad:
            parts = torch.autograd.grad(term, list(trained.values()), retain_graph=True, allow_unused=True)
        for name, part in zip(trained, parts, strict=True):
            if part is not None:
                total[name] = total[name] + part
                sizes[name] += part.double().norm().item()
    return total, sizes


def critic_pass(networks: nn.ModuleList, step: Step, z: Any, seen: Observed | None = None) -> Pass:
    """A critic step's passes; of ``seen``, where given, the fake samples, the points and the batches are taken."""
    generator, critic = networks
    with torch.no_grad():
        fake: Any = generator(z, *step.cond) if seen is None else seen.fake
    fake = fake.to(step.real.dtype)
    if seen is not None and seen.together:
        both = scores_of_both(critic, torch.cat((step.real, fake)), step.cond, step.pack)
        real_scores, fake_scores = both.tensor_split(2)
    else:
        real_scores, fake_scores = critic(step.real, *step.cond), critic(fake, *step.cond)
    terms = [-real_scores.mean(), fake_scores.mean()]
    if seen is not None and seen.together:
        terms = [terms[1] + terms[0]]  # in one backward pass, whose sums over the batch may cancel
    summands = sum(x.detach().double().abs().mean().item() for x in (real_scores, fake_scores))
    gradient, depends = None, False
    x = step.points(fake) if seen is None else seen.x
    if x is not None:
        x = x.detach().clone().requires_grad_()
        at_x = critic(x, *step.cond)
        (gradient,) = torch.autograd.grad(at_x, x, torch.ones_like(at_x), create_graph=True)
        depends = gradient.requires_grad
        terms.append(step.weight * step.penalty(gradient))
        gradient = gradient.detach()
        summands += step.weight * step.penalty(gradient, sign=-1).item()
    gradients, sizes = _gradients(critic, terms)
    loss = torch.stack([term.detach() for term in terms]).sum()
    scores = (real_scores.detach(), fake_scores.detach())
    return Pass(fake, scores, gradient, depends, loss, summands, gradients, sizes)


def generator_pass(networks: nn.ModuleList, step: Step, z: Any) -> Pass:
    generator, critic = networks
    fake = generator(z, *step.cond)
    scores = critic(fake.to(step.real.dtype), *step.cond)
    loss = -scores.mean()
    gradients, sizes = _gradients(generator, [loss])
    summands = scores.detach().double().abs().mean().item()
    return Pass(fake.detach(), (scores.detach(),), None, False, loss.detach(), summands, gradients, sizes)
