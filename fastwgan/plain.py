"""A critic step's and a generator step's passes in plain PyTorch, in any dtype: what :func:`fastwgan.verify` judges by.

The formulas here are on purpose not those of :mod:`fastwgan.reference`, which the torch backend runs; random numbers
alone are its.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastwgan import reference
from fastwgan.constraints import GradientPenalty, NormClip, WeightClip
from fastwgan.observed import Observed
from fastwgan.passes import scores_of_both

__all__ = ["ADAM", "RMSPROP", "Constraint", "Pass", "Step", "critic_pass", "generator_pass", "means", "to_dtype"]

Constraint = WeightClip | NormClip | GradientPenalty

# The papers' optimizers, which the trainer takes where it is given none.
RMSPROP: dict[str, Any] = {"lr": 5e-5}
ADAM: dict[str, Any] = {"lr": 1e-4, "betas": (0.0, 0.9)}


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in ``dtype``, inside tuples, lists and dicts too; all else as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: to_dtype(each, dtype) for key, each in value.items()}
    return type(value)(to_dtype(each, dtype) for each in value) if type(value) in (tuple, list) else value


def _norms(rows: Tensor) -> Tensor:
    """Of each row; its gradient is 0 where it is."""
    if rows.dtype != torch.float64:
        norms: Tensor = rows.norm(dim=1)
        return norms
    # The oracle: sum adds up pairwise, where norm adds one after the other and ends tens of roundings off.
    squares = rows.square().sum(1)
    positive = squares > 0
    return torch.where(positive, squares, 1).sqrt() * positive


@dataclass(frozen=True)
class Step:
    """What a step is taken on, and what its constraint and options ask for there.

    Attributes:
        noise: the standard deviation of instance noise.
    """

    real: Tensor
    cond: tuple[Any, ...]
    constraint: Constraint
    pack: int
    seed: int
    blend: float
    drift: float
    noise: float

    def to(self, dtype: torch.dtype) -> "Step":
        return replace(self, real=self.real.to(dtype), cond=to_dtype(self.cond, dtype))

    def noisy(self, x: Tensor, like: Tensor, *, stream: int, offset: int = 0, scale: float | None = None) -> Tensor:
        """x with noise, by default the instance noise, in the order in which ``like`` has its elements in memory."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        size = x[0].numel()
        n = reference.normals(self.seed, offset, len(x), size, stream=stream, dtype=dtype, device=x.device).to(x.dtype)
        channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        if channels_last and not like.is_contiguous() and like.is_contiguous(memory_format=channels_last):
            n = n.view(len(x), *x.shape[2:], x.shape[1]).movedim(-1, 1)
        # A float32 in every dtype, as kernels get it.
        return x + torch.tensor(self.noise if scale is None else scale, dtype=torch.float32).item() * n.view(x.shape)

    def points(self, real: Tensor, fake: Tensor, like: Tensor) -> Tensor:
        """Where the penalty is taken, of samples as the critic is shown them; ``like`` as for :meth:`noisy`."""
        assert isinstance(self.constraint, GradientPenalty)
        if self.constraint.at == "perturbed":
            return self.noisy(real, like, stream=1, scale=self.constraint.noise)
        if self.constraint.at == "interpolates":
            eps = reference.uniform(self.seed, 0, len(real) // self.pack, real.device).repeat_interleave(self.pack)
            eps = eps.to(real.dtype).view(-1, *[1] * (real.dim() - 1))
            return eps * real + (1 - eps) * fake
        return real if self.constraint.at == "real" else fake

    def terms(self, scores: Tensor, sign: int, drift: float = 0.0) -> list[Tensor]:
        """A loss on scores is the sum of the means of these. It wants them higher where ``sign`` is -1, else lower."""
        terms = []
        if self.blend < 1:
            terms.append((1 - self.blend) * sign * scores)
        if self.blend > 0:
            terms.append(self.blend * torch.logaddexp(sign * scores, scores.new_zeros(())))
        if drift > 0:
            terms.append(drift * scores**2)
        return terms

    def seed_at(self, scores: Tensor, sign: int, drift: float = 0.0) -> tuple[Tensor, float]:
        """The gradient of such a loss at the scores, and the size of what it is a sum of."""
        leaf = scores.detach().requires_grad_()
        parts = [torch.autograd.grad(x.mean(), leaf)[0] for x in self.terms(leaf, sign, drift)]
        return torch.stack(parts).sum(0), sum(part.double().norm().item() for part in parts)

    def norms(self, gradients: Tensor) -> Tensor:
        """Of each pack, [N / pack]."""
        return _norms(gradients.reshape(len(gradients) // self.pack, -1))

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

    def bounded(self, w: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight, in any dtype, kept within the bound of weights in ``dtype``."""
        if isinstance(self.constraint, WeightClip):
            bound = self.bound(dtype)
            return w.clamp(-bound, bound)
        factors = (self.bound(dtype) / self.row_norms(w)).clamp(max=1)
        return (w.reshape(len(factors), -1) * factors[:, None]).view(w.shape)

    def row_norms(self, w: Tensor) -> Tensor:
        """Of each row of a weight, or of all of it, whichever has a bound."""
        assert isinstance(self.constraint, NormClip)
        return _norms(w.reshape(len(w) if self.constraint.per == "row" and w.dim() else 1, -1))

    def bound(self, dtype: torch.dtype) -> float:
        """Of weights as their dtype holds it, of norms as it is."""
        assert isinstance(self.constraint, (WeightClip, NormClip))
        bound = self.constraint.bound
        return bound if isinstance(self.constraint, NormClip) else torch.tensor(bound, dtype=dtype).item()

    @property
    def weight(self) -> float:
        """Of the penalty in a first step."""
        return self.constraint.weight * self.constraint.every if isinstance(self.constraint, GradientPenalty) else 0.0


def means(terms: Iterable[Tensor]) -> tuple[list[Tensor], float]:
    """Of each of a loss's :meth:`Step.terms`, and the size of what they are a sum of."""
    terms = list(terms)
    return [x.mean() for x in terms], sum(x.detach().double().abs().mean().item() for x in terms)


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


def _seeded(values: Iterable[Tensor], seeds: Iterable[Tensor | None]) -> list[Tensor]:
    """Sums whose gradients are ``seeds`` at ``values``."""
    return [(x * seed).sum() for x, seed in zip(values, seeds, strict=False) if seed is not None]


def critic_pass(networks: nn.ModuleList, step: Step, z: Any, seen: Observed, *, beside: bool = False) -> Pass:
    """A critic step's passes, apart from those seen, or ``beside`` them: on their samples, points and batches, and
    backward from where they began.
    """
    generator, critic = networks
    with torch.no_grad():
        made: Any = seen.fake if beside else generator(z, *step.cond)
    real, fake = step.real, made.to(step.real.dtype)
    if step.noise:
        shown = seen.halves(seen.samples)
        if beside and shown[0] is not None and shown[1] is not None:
            real, fake = shown[0], shown[1]
        else:
            real, fake = (step.noisy(x, seen.samples[0], stream=i) for x, i in ((real, 2), (fake, 3)))
    together = beside and seen.together
    if together:
        both = scores_of_both(critic, torch.cat((real, fake)), step.cond, step.pack)
        real_scores, fake_scores = both.tensor_split(2)
    else:
        real_scores, fake_scores = critic(real, *step.cond), critic(fake, *step.cond)
    terms, summands = means((*step.terms(real_scores, -1, step.drift), *step.terms(fake_scores, 1)))
    roots = _seeded((real_scores, fake_scores), seen.halves(seen.seeds)) if beside else list(terms)
    if together and roots:
        roots = [torch.stack(roots).sum()]  # in one backward pass, whose sums over the batch may cancel
    gradient, depends = None, False
    if isinstance(step.constraint, GradientPenalty):
        x = seen.x if beside else None
        if x is None:
            x = step.points(real, fake, real if seen.x is None else seen.x)
        x = x.detach().clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # the other attention kernels have no second derivative
            at_x = critic(x, *step.cond)
        (gradient,) = torch.autograd.grad(at_x, x, torch.ones_like(at_x), create_graph=True)
        depends = gradient.requires_grad
        terms.append(step.weight * step.penalty(gradient))
        roots += _seeded((gradient,), (seen.cotangent,)) if beside else terms[-1:]
        gradient = gradient.detach()
        summands += step.weight * step.penalty(gradient, sign=-1).item()
    gradients, sizes = _gradients(critic, roots)
    loss = torch.stack([term.detach() for term in terms]).sum()
    scores = (real_scores.detach(), fake_scores.detach())
    return Pass(made.detach(), scores, gradient, depends, loss, summands, gradients, sizes)


def generator_pass(networks: nn.ModuleList, step: Step, z: Any, seen: Observed, *, beside: bool = False) -> Pass:
    """A generator step's passes, apart from those seen, or ``beside`` them: with their noise, and backward from where
    they began.
    """
    generator, critic = networks
    made = generator(z, *step.cond)
    fake = made.to(step.real.dtype)
    if step.noise and beside and seen.fake is not None:
        fake = fake + (seen.samples[0] - seen.fake.to(fake.dtype))
    elif step.noise:  # the indices before are the critic step's
        fake = step.noisy(fake, seen.samples[0], stream=1, offset=len(fake))
    scores = critic(fake, *step.cond)
    terms, summands = means(step.terms(scores, -1))
    gradients, sizes = _gradients(generator, _seeded((scores,), seen.seeds) if beside else terms)
    loss = torch.stack(terms).sum().detach()
    return Pass(made.detach(), (scores.detach(),), None, False, loss, summands, gradients, sizes)
