"""Time networks of your own, and say which of the Trainer's options help: python -m benchmarks steps --networks M:F

``M:F`` names a module and a function in it without arguments, which returns a dict: ``generator`` and ``critic``,
``torch.nn.Module``s in float32; ``latent``, the width of z [N, latent]; ``real``, a batch of samples [N, ...] as large
as in training; and, if it is not ``GradientPenalty()``, ``constraint``: a ``WeightClip(bound)`` or a
``GradientPenalty(weight)``. It is called anew for each implementation, after ``torch.manual_seed(0)``, and has to make
new networks with the same weights each time.

    def networks():
        return {"generator": Generator(), "critic": Critic(), "latent": 128, "real": torch.randn(64, 3, 32, 32)}
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.implementations import IMPLEMENTATIONS, SETTINGS
from benchmarks.workloads import WORKLOADS, Workload
from fastwgan.cli.common import UserError
from fastwgan.constraints import GradientPenalty, WeightClip
from fastwgan.engine import structure

__all__ = ["advice", "find", "implementations", "load"]

KEYS = ("generator", "critic", "latent", "real")
CLOSE = 1.02  # settings within it of the fastest count as equal: the one with the fewest options is advised
ROUNDING = {
    "tf32": 'after torch.set_float32_matmul_precision("high")', "bfloat16": "with networks and data in bfloat16",
}  # fmt: skip
WORDS = {
    "independent_samples": "no score depends on another sample of its batch",
    "cuda_graph": "the networks read nothing that changes but tensors",
}

Networks = tuple[nn.Module, nn.Module, Tensor]


@dataclass(frozen=True)
class _Own(Workload):
    """A user's networks, made by a function of theirs."""

    function: Callable[[], Networks] = lambda: ()  # type: ignore[assignment, return-value]

    def made(self) -> Networks:
        return self.function()


def find(name: str) -> Workload:
    """Return a workload by its name, or that of a user's module:function."""
    return load(name) if ":" in name else WORKLOADS[name]


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise UserError(f"--networks: {text}")


def _function(name: str) -> Callable[[], Any]:
    module, _, function = name.partition(":")
    _require(bool(module and function), f"expected module:function, got {name!r}")
    try:
        found = getattr(import_module(module), function, None)
    except Exception as error:  # whatever it is, it is the user's to mend
        raise UserError(f"--networks: {module} cannot be imported: {type(error).__name__}: {error}") from error
    _require(callable(found), f"expected a function {function} in {module}, got {type(found).__name__}")
    return found  # type: ignore[return-value]


def _called(name: str, function: Callable[[], Any]) -> dict[str, Any]:
    """Return what a user's function gives, once it is seen to be what is documented."""
    torch.manual_seed(0)
    try:
        given = function()
    except Exception as error:  # as above
        raise UserError(f"--networks: {name}() failed: {type(error).__name__}: {error}") from error
    expected = f"{name}(): expected a dict with {', '.join(KEYS)} and perhaps constraint"
    _require(isinstance(given, dict), f"{expected}, got {type(given).__name__}")
    fits = set(KEYS) <= given.keys() <= {*KEYS, "constraint"}
    _require(fits, f"{expected}, got one with {', '.join(map(str, given)) or 'nothing'}")
    given = {"constraint": GradientPenalty()} | given
    for key in ("generator", "critic"):
        network = given[key]
        _require(isinstance(network, nn.Module), f"{key}: expected an nn.Module, got {type(network).__name__}")
        _require(any(p.requires_grad for p in network.parameters()), f"{key}: expected weights to train, got none")
    latent, real, constraint = given["latent"], given["real"], given["constraint"]
    _require(type(latent) is int and latent > 0, f"latent: expected an int above 0, got {latent!r}")
    got = f"{real.dtype} {tuple(real.shape)}" if isinstance(real, Tensor) else type(real).__name__
    samples = isinstance(real, Tensor) and real.is_floating_point() and real.dim() > 1 and real.numel() > 0
    _require(samples, f"real: expected a floating tensor of samples [N, ...], got {got}")
    plain = any(constraint == kind(*list(vars(constraint).values())[:1]) for kind in (WeightClip, GradientPenalty)
                if type(constraint) is kind)  # fmt: skip
    _require(plain, f"constraint: expected WeightClip(bound) or GradientPenalty(weight), got {constraint!r}")
    return {**given, "real": real.detach().float()}


@lru_cache
def load(name: str) -> Workload:
    """Return the workload that a user's module:function makes.

    Raises:
        UserError: it cannot be had, or is not as documented above.
    """
    function = _function(name)
    first, second = _called(name, function), _called(name, function)
    for key in ("generator", "critic"):
        a, b = first[key], second[key]
        _require(not {*a.parameters()} & {*b.parameters()}, f"{key}: expected a new one at each call, got the same")
        weights, others = a.state_dict(), b.state_dict()
        same = weights.keys() == others.keys() and all(torch.equal(x, others[k]) for k, x in weights.items())
        _require(same, f"{key}: expected equal weights at each call after torch.manual_seed(0), got others")
    real = first["real"]
    same = torch.equal(real, second["real"])
    _require(same, "real: expected equal samples at each call after torch.manual_seed(0), got others")
    place = "generator"
    try:
        with torch.no_grad():
            fake = first["generator"](torch.randn(len(real), first["latent"], device=real.device))
            fits = isinstance(fake, Tensor) and fake.shape == real.shape
            got = str(tuple(fake.shape)) if isinstance(fake, Tensor) else type(fake).__name__
            _require(fits, f"generator: expected samples as real, {tuple(real.shape)}, got {got}")
            place = "critic"
            scores = first["critic"](real)
            _require(isinstance(scores, Tensor) and len(scores) == len(real), "critic: expected a tensor of scores [N]")
    except UserError:
        raise
    except Exception as error:  # as above
        raise UserError(f"--networks: {place}: its forward pass failed: {type(error).__name__}: {error}") from error

    def made() -> Networks:
        given = _called(name, function)
        return given["generator"], given["critic"], given["real"]

    return _Own(
        generator=lambda width: made()[0], critic=lambda width: made()[1], latent=first["latent"],
        shape=tuple(real.shape[1:]), constraint=first["constraint"], batch=len(real), function=made,
    )  # fmt: skip


def implementations(name: str, *, gpu: bool) -> list[str]:
    """Return what a user's networks are timed by: plain PyTorch's, and ours with the options that may matter.

    Those are CUDA graphs on a GPU alone, and ``independent_samples`` where that is not known of the critic.
    """
    _, critic, real = find(name).made()
    known = structure.layers(critic, real.dim()) is not None
    left_out = {name for name, out in (("independent_samples", known), ("cuda_graph", not gpu)) if out}
    peers = [peer for peer in IMPLEMENTATIONS if not peer.startswith("fastwgan")]
    return peers + [which for which, options in SETTINGS.items() if not left_out & options.keys()]


def _fastest(record: report.Record, precision: str) -> tuple[dict[str, Any], float, float | None] | None:
    """Return our best options in a precision, the milliseconds with them, and those with the defaults."""
    found = [
        (SETTINGS[which] | ({} if layout == "contiguous" else {"memory_format": "torch.channels_last"}), ms)
        for result in record["critic_step"] if result["precision"] == precision
        for layout in [result["layout"]] for which, figures in result["implementations"].items()
        if which in SETTINGS for ms in [figures["step_ms"]["q50"]]
    ]  # fmt: skip
    if not found:
        return None
    least = min(ms for _, ms in found)
    close = [one for one in found if one[1] <= CLOSE * least]
    options, ms = min(close, key=lambda one: (len(one[0]), one[1]))
    return options, ms, next((ms for given, ms in found if not given), None)


def advice(record: report.Record) -> list[str]:
    """Return lines on a record of a user's networks; the last says which options the Trainer should be given."""
    precisions = list(dict.fromkeys(result["precision"] for result in record["critic_step"]))
    base = next(iter(sorted(precisions, key=lambda precision: precision != "float32")), "")
    best = _fastest(record, base)
    if best is None:
        return ["no advice: there are no figures of the Trainer's; what was dropped or left out says why"]
    options, ms, default = best
    lines = []
    for precision in precisions:
        other = None if precision == base else _fastest(record, precision)
        if other is not None:
            how = f"{precision}, {ROUNDING[precision]}: {_call(other[0])}: {other[1]:.3g} ms a step"
            lines.append(f"other numbers in {how}, {ms / other[1]:.2f} times as fast as the best in {base}")
    said = f"{_call(options)}: {ms:.3g} ms a step"
    said += "" if base == "float32" else f" in {base}"
    ratios = []
    peer = report.fastest(next(of for of in report.faster_layouts(record) if of["precision"] == base), of_ours=False)
    if peer is not None:
        ratios.append(f"{peer[0] / ms:.2f} times as fast as the best plain PyTorch ({peer[1]}, {peer[0]:.3g} ms)")
    if options and default is not None:
        ratios.append(f"{default / ms:.2f} times as fast as Trainer's defaults")
    words = [f"; {name} is your word that {word}" for name, word in WORDS.items() if options.get(name) is True]
    return [*lines, ", ".join(filter(None, [said, " and ".join(ratios)])) + "".join(words)]


def _call(options: dict[str, Any]) -> str:
    return f"Trainer({', '.join(['...', *(f'{name}={value}' for name, value in options.items())])})"
