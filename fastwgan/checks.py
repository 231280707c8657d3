"""Checks of arguments. Each returns the argument as what it is, or raises an error that names it."""

import math
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from fastwgan.backend import DTYPES, wide
from fastwgan.reference import PENALTY_KINDS


def tensor(
    name: str, x: object, *, may_be_empty: bool = False, batched: bool = False, device: torch.device | None = None
) -> Tensor:
    """Return ``x``, a floating tensor, [N, ...] if ``batched``, on ``device``, not empty unless it may be; or raise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")
    if x.numel() == 0 and not may_be_empty:
        raise ValueError(f"{name}: expected at least one element, got shape {tuple(x.shape)}")
    if batched and x.dim() == 0:
        raise ValueError(f"{name}: expected shape [N, ...], got a 0-d tensor")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")
    return x


samples = partial(tensor, batched=True)


def is_batched(x: object, batch: int) -> bool:
    """Return whether ``x`` is a tensor with a row for each of ``batch`` samples."""
    return isinstance(x, Tensor) and x.dim() > 0 and len(x) == batch


def like(name: str, x: Tensor, other_name: str, other: Tensor, *, shape: bool) -> None:
    """Raise unless ``x`` has the other's dtype and device, and its shape where ``shape``."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: expected {other_name}'s dtype {other.dtype}, got {x.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name}: expected {other_name}'s device {other.device}, got {x.device}")
    if shape and x.shape != other.shape:
        raise ValueError(f"{name}: expected {other_name}'s shape {tuple(other.shape)}, got {tuple(x.shape)}")


def pair(name: str, x: object, other_name: str, other: object, *, shape: bool = True) -> tuple[Tensor, Tensor]:
    """Return two floating tensors that match, or raise; under autocast they come in one dtype, as PyTorch has it."""
    a, b = tensor(name, x), tensor(other_name, other)
    if a.dtype != b.dtype and torch.is_autocast_enabled(a.device.type):
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    like(name, a, other_name, b, shape=shape)
    return a, b


def number(name: str, value: object, *, minimum: float, exclusive: bool = False) -> float:
    """Return ``value`` as a finite float not below ``minimum`` (above it where ``exclusive``), or raise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not minimum <= value < math.inf or (exclusive and value == minimum):
        raise ValueError(f"{name}: expected a finite number {'>' if exclusive else '>='} {minimum:g}, got {value}")
    return float(value)


def count(name: str, value: object, minimum: int = 1, *, bits: int | None = None) -> int:
    """Return ``value`` as an int not below ``minimum``, and below 2^bits where that is given, or raise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum or (bits is not None and value >= 2**bits):
        expected = f">= {minimum}" if bits is None else f"in [{minimum}, 2**{bits})"
        raise ValueError(f"{name}: expected an int {expected}, got {value}")
    return value


def removed(given: dict[str, object], remedies: dict[str, str]) -> None:
    """Raise TypeError for keywords that a function does not take; of removed ones say what to write instead."""
    for name in given:
        unexpected = f"got an unexpected keyword argument {name!r}"
        raise TypeError(f"{name}: was removed; {remedies[name]}" if name in remedies else unexpected)


def refuse_inference_mode() -> None:
    """Raise inside torch.inference_mode, where nothing gets a gradient and what is made can never be written to."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode: expected a call outside of it (no_grad is fine), got one inside")


def penalty(kind: object, target: object) -> tuple[str, float]:
    """Return ``kind`` and ``target`` if they are one of PENALTY_KINDS and a finite number >= 0, or raise."""
    if not isinstance(kind, str) or kind not in PENALTY_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, PENALTY_KINDS))}, got {kind!r}")
    return kind, number("target", target, minimum=0)


def seed(name: str, seed: object) -> int:
    """Return ``seed`` if it is an int in [0, 2^63), or raise."""
    return count(name, seed, 0, bits=63)


def offset(offset: object, device: torch.device) -> int | Tensor:
    """Return ``offset`` as an int or a 0-d tensor, or raise."""
    if not isinstance(offset, Tensor):
        return seed("offset", offset)
    if offset.dtype != torch.int64 or offset.numel() != 1 or offset.device != device:
        got = f"{offset.dtype} {tuple(offset.shape)} on {offset.device}"
        raise ValueError(f"offset: expected one int64 element on {device}, got {got}")
    return offset.reshape(())


def scores(name: str, scores: object, batch: int, pack: int = 1, device: torch.device | None = None) -> Tensor:
    """Return scores, alone or first in a tuple, if they are a floating tensor [N / pack, ...], or raise."""
    scores = scores[0] if isinstance(scores, tuple) and scores else scores
    scores = tensor(f"{name}: its output", scores, device=device)
    if scores.dim() == 0 or scores.shape[0] * pack != batch:
        packs = f" for {batch} samples in packs of {pack}" if pack > 1 else ""
        raise ValueError(f"{name}: its output: expected shape [{batch // pack}, ...]{packs}, got {tuple(scores.shape)}")
    return scores


def parameter(name: str, p: object) -> Tensor:
    """Return ``p`` if a kernel can update it in place, or raise: dense or sliced, floating, not expanded."""
    p = tensor(name, p, may_be_empty=True)
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(f"{name}: expected each element to have its own memory, got an expanded tensor")
    if p.is_neg():
        raise ValueError(f"{name}: expected a tensor that is stored as it is, got a lazily negated view")
    return p


def refuse_overlap(parameters: Sequence[Tensor]) -> None:
    """Raise unless each parameter has memory of its own, as a launch writes to all of them in any order."""
    by_storage: dict[int, list[tuple[int, Tensor]]] = {}
    for i, p in enumerate(parameters):
        by_storage.setdefault(p.untyped_storage().data_ptr(), []).append((i, p))
    for members in by_storage.values():
        _, first = members[0]
        if len(members) == 1 or first.device.type == "meta":
            continue
        taken = torch.zeros(first.untyped_storage().nbytes() // first.element_size(), dtype=torch.bool, device="cpu")
        for i, p in members:
            places = taken.as_strided(p.shape, p.stride(), p.storage_offset())
            if places.any():
                got = f"number {i}, of shape {tuple(p.shape)}, over that of another"
                raise ValueError(f"params: expected each in memory of its own, got {got}: make them one parameter")
            places.fill_(True)


@lru_cache
def bound(name: str, bound: object, dtype: torch.dtype) -> float:
    """Return ``bound``, a number > 0, as ``dtype`` holds it, or raise where that cannot be."""
    value = number(name, bound, minimum=0, exclusive=True)
    if value > torch.finfo(dtype).max:
        raise ValueError(f"{name}: expected a number that {dtype} can hold, got {bound}")
    return torch.tensor(value, dtype=dtype, device="cpu").item()


def term(name: str, value: object, device: torch.device) -> Tensor:
    """Return a copy of a term of a loss, in float32 or wider, if it is a floating 0-d tensor, or raise."""
    value = tensor(f"{name}: its result", value, device=device)
    if value.dim():
        raise ValueError(f"{name}: its result: expected a 0-d tensor, such as a mean, got shape {tuple(value.shape)}")
    return value.to(wide(value.dtype), copy=True)  # as it may be a parameter, which the step changes


def per(per: object) -> str:
    """Return ``per`` if it is "row" or "tensor", or raise."""
    if per not in ("row", "tensor"):
        raise ValueError(f"per: expected 'row' or 'tensor', got {per!r}")
    return per
