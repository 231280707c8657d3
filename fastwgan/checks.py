"""Checks of arguments. Each raises an error that names the argument, or returns the argument as what it is."""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastwgan.backend import DTYPES

PENALTY_KINDS = ("two-sided", "one-sided", "zero-centered", "power")


def tensor(name: str, x: object) -> Tensor:
    """Return ``x`` if it is a floating tensor with elements, or raise."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}")
    if x.numel() == 0:
        raise ValueError(f"{name}: expected at least one element, got shape {tuple(x.shape)}")
    return x


def samples(name: str, x: object, device: torch.device) -> Tensor:
    """Return ``x`` if it is a floating tensor [N, ...] on ``device``, or raise."""
    x = tensor(name, x)
    if x.dim() == 0:
        raise ValueError(f"{name}: expected shape [N, ...], got a 0-d tensor")
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")
    return x


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


def promoted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one dtype under autocast, where networks give another than they get, as PyTorch's ops have it."""
    if a.dtype != b.dtype and torch.is_autocast_enabled(a.device.type):
        dtype = torch.promote_types(a.dtype, b.dtype)
        return a.to(dtype), b.to(dtype)
    return a, b


def number(name: str, value: object, *, minimum: float, exclusive: bool = False) -> float:
    """``value`` as a finite float not below ``minimum`` (above it where ``exclusive``), or an error naming it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not minimum <= value < math.inf or (exclusive and value == minimum):
        raise ValueError(f"{name}: expected a finite number {'>' if exclusive else '>='} {minimum:g}, got {value}")
    return float(value)


def count(name: str, value: object, minimum: int = 1) -> int:
    """Return ``value`` as an int not below ``minimum``, or raise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name}: expected an int >= {minimum}, got {value}")
    return value


def refuse_inference_mode() -> None:
    """Raise inside torch.inference_mode, where nothing gets a gradient and what is made can never be written to."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("torch.inference_mode: expected a call outside of it (no_grad is fine), got one inside")


def penalty(kind: object, target: object) -> None:
    """Raise unless ``kind`` is one of PENALTY_KINDS and ``target`` a finite number >= 0."""
    if kind not in PENALTY_KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, PENALTY_KINDS))}, got {kind!r}")
    number("target", target, minimum=0)


def seed(name: str, seed: object) -> None:
    """Raise unless ``seed`` is an int in [0, 2^63)."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"{name}: expected an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"{name}: expected an int in [0, 2**63), got {seed}")


def offset(offset: object, device: torch.device) -> int | Tensor:
    """``offset`` as an int or a 0-d tensor, or an error naming it."""
    if not isinstance(offset, Tensor):
        seed("offset", offset)
        return offset  # type: ignore[return-value]
    if offset.dtype != torch.int64 or offset.numel() != 1 or offset.device != device:
        got = f"{offset.dtype} {tuple(offset.shape)} on {offset.device}"
        raise ValueError(f"offset: expected one int64 element on {device}, got {got}")
    return offset.reshape(())


def blend(blend: object, drift: object = 0.0) -> None:
    """Raise unless ``blend`` is a number in [0, 1] and ``drift`` a finite one >= 0."""
    if number("blend", blend, minimum=0) > 1:
        raise ValueError(f"blend: expected a number in [0, 1], got {blend}")
    number("drift", drift, minimum=0)


def scores(name: str, scores: object, batch: int, pack: int = 1) -> None:
    """Raise unless ``scores`` is a floating tensor with one entry, along its first dimension, to ``pack`` samples."""
    tensor(f"{name}: its output", scores)
    assert isinstance(scores, Tensor)
    if scores.dim() == 0 or len(scores) * pack != batch:
        packs = f" for {batch} samples in packs of {pack}" if pack > 1 else ""
        raise ValueError(f"{name}: its output: expected shape [{batch // pack}, ...]{packs}, got {tuple(scores.shape)}")


def parameter(name: str, p: object) -> None:
    """Raise unless ``p`` can be updated in place by a kernel: dense layout or sliced, floating, not expanded."""
    if not isinstance(p, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(p).__name__}")
    if p.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {p.dtype}")
    if p.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {p.layout}")
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(f"{name}: expected each element to have its own memory, got an expanded tensor")
    if p.is_neg():
        raise ValueError(f"{name}: expected a tensor that is stored as it is, got a lazily negated view")


def refuse_overlap(parameters: Sequence[Tensor]) -> None:
    """Raise unless each parameter has memory of its own, as a launch writes to all of them in any order."""
    by_storage: dict[int, list[int]] = {}
    for i, p in enumerate(parameters):
        by_storage.setdefault(p.untyped_storage().data_ptr(), []).append(i)
    for members in by_storage.values():
        first = parameters[members[0]]
        if len(members) == 1 or first.device.type == "meta":
            continue
        taken = torch.zeros(first.untyped_storage().nbytes() // first.element_size(), dtype=torch.bool, device="cpu")
        for i in members:
            p = parameters[i]
            places = taken.as_strided(p.shape, p.stride(), p.storage_offset())
            if places.any():
                raise ValueError(
                    f"params: expected each in memory of its own, got number {i}, of shape {tuple(p.shape)}, over that "
                    "of another: make them one parameter"
                )
            places.fill_(True)


@lru_cache
def bound(name: str, bound: object, dtype: torch.dtype) -> float:
    """``bound`` as ``dtype`` holds it, or an error naming it unless it is a number > 0 that ``dtype`` can hold."""
    value = number(name, bound, minimum=0, exclusive=True)
    if value > torch.finfo(dtype).max:
        raise ValueError(f"{name}: expected a number that {dtype} can hold, got {bound}")
    return torch.tensor(value, dtype=dtype, device="cpu").item()


def per(per: object) -> None:
    """Raise unless ``per`` is "row" or "tensor"."""
    if per not in ("row", "tensor"):
        raise ValueError(f"per: expected 'row' or 'tensor', got {per!r}")
