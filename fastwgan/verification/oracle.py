"""A critic step and a generator step in plain PyTorch, in any dtype: what :func:`fastwgan.verify` judges by.

The formulas here are on purpose not those of :mod:`fastwgan.reference`, which the torch backend runs; random numbers
alone are its.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from fastwgan import checks, reference
from fastwgan.constraints import GradientPenalty, NormClip, Samples, WeightClip
from fastwgan.engine.terms import StepRecord, Term, halves, split
from fastwgan.verification.observed import Observed, parts

Constraint = WeightClip | NormClip | GradientPenalty
Weights = dict[str, Tensor]
Found = dict[tuple[str, str], tuple[Tensor, float]]  # by op and name, with the size of what a tensor is a sum of, or 0

CANCELLED = 1e-10  # of its summands' size: a sum below it is rounding, in float64 too
KINDS = {"critic": ("real", "fake"), "generator": ("fake",)}  # of the samples that are scored in a network's step


def to_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Return floating tensors in ``dtype``, inside tuples, lists and dicts too; all else as it is."""
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, value)


def _norms(rows: Tensor) -> Tensor:
    """Return the norm of each row; its gradient is 0 where it is."""
    if rows.dtype != torch.float64:
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms
    # The oracle: sum adds up pairwise, where norm adds one after the other and ends tens of roundings off.
    squares = rows.square().sum(1)
    return torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)


@dataclass(frozen=True)
class Step:
    """The inputs of a step, and the formulas of its constraint and options."""

    real: Tensor
    cond: tuple[Any, ...]
    constraint: Constraint
    pack: int
    seed: int
    terms: dict[str, Any]  # further ones of the losses, or None, by their keywords
    name: str = "critic"  # of the network that takes it, or "generator"
    z: Any = None  # latents, once they are drawn

    def to(self, dtype: torch.dtype) -> "Step":
        return replace(self, **to_dtype({"real": self.real, "cond": self.cond, "z": self.z}, dtype))

    @property
    def penalty(self) -> GradientPenalty | None:
        return self.constraint if self.name == "critic" and isinstance(self.constraint, GradientPenalty) else None

    @property
    def weight(self) -> float:  # of the penalty in a first step
        return self.penalty.weight * self.penalty.every if self.penalty else 0.0

    def points(self, real: Tensor, fake: Tensor, like: Tensor) -> Tensor:
        """Return where the penalty is taken. Noise has the order in which ``like`` has its elements in memory."""
        assert self.penalty is not None
        if self.penalty.at == "perturbed":
            n, size, wide = len(real), real[0].numel(), torch.promote_types(real.dtype, torch.float32)
            noise = reference.normals(self.seed, 0, n, size, stream=1, dtype=wide, device=real.device).to(real.dtype)
            channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(real.dim())
            if channels_last and not like.is_contiguous() and like.is_contiguous(memory_format=channels_last):
                noise = noise.view(n, *real.shape[2:], real.shape[1]).movedim(-1, 1)
            scale = torch.tensor(self.penalty.noise, dtype=torch.float32)  # in every dtype, as kernels get it
            return real + scale.item() * noise.view(real.shape)
        if self.penalty.at == "interpolates":
            eps = reference.uniform(self.seed, 0, len(real) // self.pack, real.device).repeat_interleave(self.pack)
            eps = eps.to(real.dtype).view(-1, *[1] * (real.dim() - 1))
            return eps * real + (1 - eps) * fake
        return real if self.penalty.at == "real" else fake

    @property
    def term(self) -> Term | None:
        return self.terms.get(f"{self.name}_term")

    def means(self, scores: Sequence[Tensor]) -> tuple[list[Tensor], float]:
        """Return the means that a loss on scores of each kind is a sum of, and the size of what they are means of."""
        terms = [-scores[0], *scores[1:]]
        return [x.mean() for x in terms], sum(x.detach().double().abs().mean().item() for x in terms)

    def norms(self, gradients: Tensor) -> Tensor:
        """Return the norm of each pack, [N / pack]."""
        return _norms(gradients.reshape(len(gradients) // self.pack, -1))

    def penalties(self, gradients: Tensor, sign: int = 1) -> Tensor:
        """Return the mean penalty, without its weight; with ``sign=-1`` of the sums that it has differences of."""
        assert self.penalty is not None
        norms = self.norms(gradients)
        excess = norms - sign * self.penalty.target
        each = {
            "two-sided": excess**2, "one-sided": excess.clamp(min=0) ** 2, "zero-centered": norms**2, "power": norms**6
        }  # fmt: skip
        return each[self.penalty.kind].mean()

    def cotangent(self, gradients: Tensor, sign: int = 1) -> Tensor:
        """Return d (weight * mean penalty) / d gradients."""
        leaf = gradients.detach().requires_grad_()
        return torch.autograd.grad(self.weight * self.penalties(leaf, sign), leaf)[0]

    def sizes(self, w: Tensor) -> Tensor:
        """Return what the bound is of: each magnitude in a weight, or the norm of each row of it, or of all of it."""
        if isinstance(self.constraint, NormClip):
            return _norms(w.reshape(len(w) if self.constraint.per == "row" and w.dim() else 1, -1))
        return w.abs().flatten()

    def bounded(self, w: Tensor, bound: float) -> Tensor:
        if isinstance(self.constraint, WeightClip):
            return w.clamp(-bound, bound)
        factors = (bound / self.sizes(w)).clamp(max=1)
        return (w.reshape(len(factors), -1) * factors[:, None]).view(w.shape)


def gradients(terms: Iterable[Tensor], at: Sequence[Tensor]) -> list[tuple[Tensor, float]]:
    """Return at each tensor the gradient of the sum of ``terms``, and the norms of the terms' gradients added up."""
    found = [(torch.zeros_like(x), 0.0) for x in at]
    for term in terms:
        if term.requires_grad:
            parts = torch.autograd.grad(term, at, retain_graph=True, allow_unused=True, materialize_grads=True)
            sizes = [part.double().norm().item() for part in parts]
            found = [(x + part, size + n) for (x, size), part, n in zip(found, parts, sizes, strict=True)]
    return found


@contextmanager
def _bent(critic: nn.Module, above: list[Tensor]) -> Iterator[None]:
    """Give a critic's rectifiers the slopes of those whose outputs were ``above`` zero, if there are as many."""
    own = [m for m in critic.modules() if isinstance(m, (nn.ReLU, nn.LeakyReLU)) and not m.inplace]
    hooks = []
    for m, at in zip(own, above, strict=True) if len(own) == len(above) else ():
        bent: Any = lambda m, x, _, at=at: torch.where(at, x[0], getattr(m, "negative_slope", 0.0) * x[0])  # noqa: E731
        hooks.append(m.register_forward_hook(bent))
    yield
    for hook in hooks:
        hook.remove()


def _seeded(values: Iterable[Tensor], seeds: Iterable[Tensor | None]) -> list[Tensor]:
    """Return sums whose gradients are ``seeds`` at ``values``."""
    return [(x * seed).sum() for x, seed in zip(values, seeds, strict=True) if seed is not None]


def passes(networks: nn.ModuleDict, step: Step, seen: Observed, *, beside: bool = False) -> Found:
    """Return the results of a step's passes: run apart, or ``beside`` those seen, on their samples and gradients."""
    generator, critic = networks.values()
    module, kinds = networks[step.name], KINDS[step.name]
    given = beside and module is critic  # fake samples, those that were seen
    with torch.set_grad_enabled(module is generator):
        output = seen.fake if given and step.term is None else generator(step.z, *step.cond)
    own, generated = split(output)
    made: Any = seen.fake if given else own
    found: Found = {} if beside else {("generate", "fake samples"): (made.detach(), 0.0)}
    samples = (step.real, made.to(step.real.dtype))[-len(kinds) :]
    rows = len(kinds) * len(step.real)
    if beside and len(seen.scores) == 1 < len(kinds):
        cond = (torch.cat([c] * len(kinds)) if checks.is_batched(c, len(step.real)) else c for c in step.cond)
        with _bent(critic, [x[:rows] for x in seen.bent]):
            both, rest = split(critic(torch.cat(samples), *cond))
        scored = [*zip(both.tensor_split(len(kinds)), halves(rest, len(both)), strict=True)]
    else:
        scored = [split(critic(x, *step.cond)) for x in samples]
    scores = [x for x, _ in scored]
    found |= {("forward", f"{kind} scores"): (x.detach(), 0.0) for kind, x in zip(kinds, scores, strict=True)}
    terms, summands = step.means(scores)
    if step.term is not None:
        all_samples = Samples(step.real, samples[-1], step.cond, step.cond, outputs=generated)
        real = scored[0] if module is critic else None
        terms.append(step.term(StepRecord(all_samples, lambda x, *cond: split(critic(x, *cond)), real, scored[-1])))
        found["term", f"{step.name} term"] = terms[-1].detach().to(step.real.dtype), 0.0
        summands += terms[-1].abs().item()
    roots = _seeded(scores, parts(seen.seeds, len(kinds))) if beside and step.term is None else [*terms]
    if beside and roots:
        roots = [torch.stack(roots).sum()]  # in one backward pass, whose sums over the batch may cancel
    if step.penalty:
        x = seen.x if beside else None
        if x is None:
            x = step.points(samples[0], samples[1], step.real if seen.x is None else seen.x)
        x = x.detach().clone().requires_grad_()
        # The other attention kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH), _bent(critic, [each[rows:] for each in seen.bent] if beside else []):
            at_x = split(critic(x, *step.cond))[0]
        (gradient,) = torch.autograd.grad(at_x, x, torch.ones_like(at_x), create_graph=True)
        terms.append(step.weight * step.penalties(gradient))
        roots += _seeded((gradient,), (seen.cotangent,)) if beside else terms[-1:]
        summands += step.weight * step.penalties(gradient.detach(), sign=-1).item()
        # It still wants a gradient if it depends on the critic's parameters.
        found["input gradient", "at the points"] = gradient.detach().requires_grad_(gradient.requires_grad), 0.0
    found["loss", f"{step.name} loss"] = torch.stack(terms).sum().detach().to(step.real.dtype), summands
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    by_parameter = gradients(roots, [*trained.values()])
    largest = max(g.norm().item() for g, _ in by_parameter)
    for name, (g, size) in zip(trained, by_parameter, strict=True):
        void = g.norm().item() <= CANCELLED * largest  # as of a bias before BatchNorm: what is left of it is rounding
        found["backward", name] = g, max(size, largest) if void else size
    return found


def updated(kind: Any, weights: Weights, grads: Weights, **options: Any) -> Weights:
    """Return weights, and the state behind a colon, after the first step of a kind of optimizer."""
    parameters = {name: nn.Parameter(w.clone()) for name, w in weights.items()}
    for name, p in parameters.items():
        p.grad = grads[name].clone()
    optimizer = kind(parameters.values(), **options)
    optimizer.step()
    return with_state(parameters, optimizer)


def with_state(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Weights:
    """Return parameters by name, and an optimizer's state of each behind a colon."""
    return {
        f"{name}: {key}" if key else name: x
        for name, p in parameters.items()
        for key, x in {"": p.detach(), **optimizer.state.get(p, {})}.items()
    }
