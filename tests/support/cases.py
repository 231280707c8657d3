"""The cases: what the kernels are tested on, and what the benchmarks time. Data alone; nothing runs on import."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workloads import WORKLOADS, Workload  # noqa: F401 - whole steps, which the benchmarks time too
from fastwgan import GradientPenalty, WeightClip, functional, models, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
KINDS = tuple(reference.PENALTY_KINDS)

# Elements per sample, or scores: one, odd, and one to either side of where a kernel begins another block or program.
SIZES = (1, 17, 1023, 1025, 2047, 2049, 8193, 16384, 16385)
BATCHES = (1, 2, 1025)
SHAPES = {1: (6,), 2: (6, 5), 3: (4, 3, 5), 4: (4, 3, 2, 6), 5: (2, 3, 2, 4, 3)}  # by rank


@dataclass(frozen=True)
class Op:
    """A public op, its reference, and how many tensors of one shape it takes."""

    fused: Callable[..., Any]
    eager: Callable[..., Any]
    tensors: int
    per_sample: bool


def _op(name: str, tensors: int, *, per_sample: bool, **options: Any) -> Op:
    fused, eager = getattr(functional, name), getattr(reference, name)
    return Op(partial(fused, backend="triton", **options), partial(eager, **options), tensors, per_sample)


OPS = {
    "critic_loss": _op("critic_loss", 2, per_sample=False),
    "generator_loss": _op("generator_loss", 1, per_sample=False),
    "wasserstein_loss": _op("wasserstein_loss", 2, per_sample=False),
    "hinge_critic_loss": _op("hinge_critic_loss", 2, per_sample=False),
    "perturb": _op("perturb", 1, per_sample=True, scale=0.3, seed=11, offset=2**35),
    "interpolate": _op("interpolate", 2, per_sample=True, seed=11, offset=2**35),
    **{f"penalty {kind}": _op("penalty", 1, per_sample=True, kind=kind, target=0.7) for kind in KINDS},
}


def tiny(constraint: WeightClip | GradientPenalty) -> Workload:
    """Return a workload that takes no time."""
    return Workload(
        generator=lambda width: models.mlp([8, width, 6], norm=True),
        critic=lambda width: nn.Sequential(models.mlp([6, width, width, 1], slope=0.2), nn.Dropout(0.0)),
        latent=8, shape=(6,), constraint=constraint, batch=8, width=32,
    )  # fmt: skip


# Layouts: each takes a contiguous tensor and gives one of the same shape that lies otherwise in memory.


def _sliced(x: Tensor) -> Tensor:
    wide = x.new_full([2 * n for n in x.shape], 7.0)
    inside = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return inside.copy_(x)


def _unaligned(x: Tensor) -> Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1) if x.dim() > 2 else x,
    "sliced": _sliced,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand(x.shape),
    "expanded inside": lambda x: x[..., :1].expand(x.shape),
    "unaligned": _unaligned,
    "negated": lambda x: torch._neg_view(-x),  # lazily: the memory holds -x
}
OWNED = tuple(name for name in LAYOUTS if not name.startswith(("expanded", "negated")))  # what a parameter can have


# Values: each takes a shape, dtype and device.


def _fill(low: float, high: float) -> Callable[..., Tensor]:
    """Magnitudes between the two, in random order and of random sign."""

    def make(shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        x = torch.empty(shape, dtype=torch.float64, device=device).uniform_(low, high)
        return (x * torch.randint(0, 2, x.shape, device=device).mul_(2).sub_(1)).to(dtype)

    return make


def _with(special: tuple[float, ...]) -> Callable[..., Tensor]:
    def make(shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        x = torch.randn(shape, device=device).to(dtype)
        flat = x.view(-1)
        for i, value in enumerate(special):
            flat[(7 * i + 3) % flat.numel()] = value
        return x

    return make


def _scaled(scale: Callable[[torch.finfo], float]) -> Callable[..., Tensor]:
    return lambda shape, dtype, device: _fill(0.25, 1.0)(shape, torch.float64, device).mul_(
        scale(torch.finfo(dtype))
    ).to(dtype)  # fmt: skip


VALUES: dict[str, Callable[..., Tensor]] = {
    "normal": lambda shape, dtype, device: torch.randn(shape, device=device).to(dtype),
    "zeros": lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device),
    "denormal": _scaled(lambda info: info.tiny),
    "small": _scaled(lambda info: info.tiny**0.5),
    "large": _scaled(lambda info: info.max**0.5),
    "largest": _scaled(lambda info: info.max),
    "inf": _with((float("inf"),)),
    "both infinities": _with((float("inf"), float("-inf"))),
    "nan": _with((float("nan"),)),
}


# Optimizers: ours and torch.optim's take the same options.

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("RMSprop", {}),
    ("RMSprop", {"lr": 5e-5, "alpha": 0.9, "eps": 1e-3}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True}),
    ("RMSprop", {"centered": True, "momentum": 0.3, "weight_decay": 0.1, "maximize": True}),
    ("Adam", {}),
    ("Adam", {"lr": 1e-4, "betas": (0.0, 0.9)}),
    ("RMSprop", {"lr": 0.5}),  # steps that a half-precision weight cannot miss
    ("Adam", {"lr": 0.5, "betas": (0.5, 0.9)}),
    ("Adam", {"weight_decay": 0.1, "maximize": True, "eps": 1e-3}),
]
PARAMETERS: dict[str, tuple[tuple[int, ...], ...]] = {
    "one element": ((1,),),
    "edges": ((1,), (17,), (511,), (513,), (2047,), (2048,), (2049,), (4097,), (0,), ()),
    "ranks": ((3,), (33, 65), (5, 4, 3), (4, 3, 5, 5), (2, 3, 2, 4, 3)),
    "600 tensors": tuple((1 + i % 7,) for i in range(600)),  # more than STEPS_BLOCK
}
