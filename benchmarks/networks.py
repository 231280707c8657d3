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
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import report
from benchmarks.implementations import IMPLEMENTATIONS, SETTINGS
from benchmarks.workloads import WORKLOADS, Networks, Workload
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


def find(name: str) -> Workload:
    """Return a workload by its name, or that of a user's module:function."""
    return load(name) if ":" in name else WORKLOADS[name]


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise UserError(f"--networks: {text}")


def _tried(what: str, call: Callable[[], Any]) -> Any:
    """Return what a call of the user's code returns; whatever it raises is the user's to mend."""
    try:
        return call()
    except Exception as error:
        raise UserError(f"--networks: {what} failed: {type(error).__name__}: {error}") from error


def _called(name: str) -> dict[str, Any]:
    """Return what a user's function gives, once it is seen to be what is documented."""
    module, _, function = name.partition(":")
    _require(bool(module and function), f"expected module:function, got {name!r}")
    found = getattr(_tried(f"import {module}", lambda: import_module(module)), function, None)
    _require(callable(found), f"expected a function {function} in {module}, got {type(found).__name__}")
    torch.manual_seed(0)
    given = _tried(f"{name}()", found)  # type: ignore[arg-type]
    keys = given.keys() if isinstance(given, dict) else set()
    got = f"one with {', '.join(map(str, keys))}" if keys else type(given).__name__
    expected = f"a dict with {', '.join(KEYS)}, and perhaps constraint"
    _require(set(KEYS) <= keys <= {*KEYS, "constraint"}, f"{name}(): expected {expected}, got {got}")
    generator, critic, latent, real = (given[key] for key in KEYS)
    constraint = given.get("constraint", GradientPenalty())
    for key, network in (("generator", generator), ("critic", critic)):
        _require(isinstance(network, nn.Module), f"{key}: expected an nn.Module, got {type(network).__name__}")
        _require(any(p.requires_grad for p in network.parameters()), f"{key}: expected weights to train, got none")
    _require(type(latent) is int and latent > 0, f"latent: expected an int above 0, got {latent!r}")
    got = f"{real.dtype} {tuple(real.shape)}" if isinstance(real, Tensor) else type(real).__name__
    samples = isinstance(real, Tensor) and real.is_floating_point() and real.dim() > 1 and real.numel() > 0
    _require(samples, f"real: expected a floating tensor of samples [N, ...], got {got}")
    plain = WeightClip(getattr(constraint, "bound", 1)), GradientPenalty(getattr(constraint, "weight", 1))
    _require(constraint in plain, f"constraint: expected WeightClip(c) or GradientPenalty(weight), got {constraint!r}")
    return {**given, "real": real.detach().float(), "constraint": constraint}


def _tensors(given: dict[str, Any]) -> dict[str, Tensor]:
    named = {f"{key}.{k}": x for key in KEYS[:2] for k, x in given[key].state_dict().items()}
    return named | {"real": given["real"]}


@lru_cache
def load(name: str) -> Workload:
    """Return the workload that a user's module:function makes.

    Raises:
        UserError: it cannot be had, or is not as documented above.
    """
    first, second = _called(name), _called(name)
    for key in KEYS[:2]:
        both = {*first[key].parameters()} & {*second[key].parameters()}
        _require(not both, f"{key}: expected a new one at each call, got weights of the last")
    a, b = _tensors(first), _tensors(second)
    other = [k for k in dict.fromkeys([*a, *b]) if not (k in a and k in b and torch.equal(a[k], b[k]))]
    _require(
        not other, f"{', '.join(other[:1])}: expected the same at each call after torch.manual_seed(0), got others"
    )
    real, z = first["real"], torch.randn(len(first["real"]), first["latent"], device=first["real"].device)
    with torch.no_grad():
        fake = _tried("generator: its forward pass", lambda: first["generator"](z))
        scores = _tried("critic: its forward pass", lambda: first["critic"](real))
    for key, x, dims in (("generator", fake, real.dim()), ("critic", scores, 1)):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        fits = isinstance(x, Tensor) and x.shape[:dims] == real.shape[:dims]
        shape = ", ".join([*map(str, real.shape[:dims]), *["..."] * (key == "critic")])
        _require(fits, f"{key}: its output: expected shape [{shape}], got {got}")

    def networks() -> Networks:
        given = _called(name)
        return given["generator"], given["critic"], given["real"]

    return Workload(
        generator=lambda width: networks()[0], critic=lambda width: networks()[1], latent=first["latent"],
        shape=tuple(real.shape[1:]), constraint=first["constraint"], batch=len(real), networks=networks,
    )  # fmt: skip


def implementations(name: str, *, gpu: bool) -> list[str]:
    """Return what a user's networks are timed by: plain PyTorch's, and ours with the options that may matter.

    Those are CUDA graphs on a GPU alone, and ``independent_samples`` where that is not known of the critic.
    """
    _, critic, real = load(name).made()
    known = structure.layers(critic, real.dim()) is not None
    left_out = {option for option, out in (("independent_samples", known), ("cuda_graph", not gpu)) if out}
    peers = [peer for peer in IMPLEMENTATIONS if not peer.startswith("fastwgan")]
    return peers + [which for which, options in SETTINGS.items() if not left_out & options.keys()]


def _ours(record: report.Record, precision: str) -> list[tuple[float, dict[str, Any]]]:
    """Return the milliseconds of ours in a precision with the options that they have; the ones to advise first."""
    found = []
    for result in record["critic_step"]:
        layout = {} if result["layout"] == "contiguous" else {"memory_format": "torch.channels_last"}
        for which, figures in result["implementations"].items():
            if which in SETTINGS and result["precision"] == precision:
                found.append((figures["step_ms"]["q50"], SETTINGS[which] | layout))
    least = min((ms for ms, _ in found), default=0.0)
    return sorted(found, key=lambda one: (one[0] > CLOSE * least, len(one[1]), one[0]))


def _call(ms: float, options: dict[str, Any]) -> str:
    return f"Trainer({', '.join(['...', *(f'{name}={value}' for name, value in options.items())])}): {ms:.3g} ms a step"


def advice(record: report.Record) -> list[str]:
    """Return lines on a record of a user's networks; the last says which options the Trainer should be given."""
    precisions = list(dict.fromkeys(result["precision"] for result in record["critic_step"]))
    base, *others = sorted(precisions, key=lambda precision: precision != "float32") or [""]
    found = _ours(record, base)
    if not found:
        return ["no advice: there are no figures of the Trainer's; what was dropped or left out says why"]
    (ms, options), *_ = found
    lines = [
        f"other numbers in {other}, {ROUNDING[other]}: {_call(*best)}, {ms / best[0]:.2f} times as fast as in {base}"
        for other in others for best in _ours(record, other)[:1]
    ]  # fmt: skip
    ratios = []
    peer = report.fastest(next(of for of in report.faster_layouts(record) if of["precision"] == base), of_ours=False)
    if peer is not None:
        ratios.append(f"{peer[0] / ms:.2f} times as fast as the best plain PyTorch ({peer[1]}, {peer[0]:.3g} ms)")
    if options:
        ratios += [f"{default / ms:.2f} times as fast as Trainer's defaults" for default, given in found if not given]
    words = [f"; {name}=True is your word that {word}" for name, word in WORDS.items() if options.get(name) is True]
    said = _call(ms, options) + ("" if base == "float32" else f" in {base}") + ("" if options else " by default")
    return [*lines, ", ".join(filter(None, [said, " and ".join(ratios)])) + "".join(words)]
