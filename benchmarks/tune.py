"""Launch parameters tried on a GPU: python -m benchmarks tune --out DIR [--minutes M] [--kernels NAME ...]

For each kernel, on arrays far larger than the cache, all combinations of its module's block constants and of warps.
Each has first to come to what the present setting comes to, and is then measured against the copy bandwidth of the same
run. DIR/gpu-tune.json has every combination; what is printed is the present setting and the best ones. Nothing is
changed: a better setting is for whoever reads this to put into the kernel's module.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import op_cases, ops, timing
from benchmarks.op_cases import OPS, Case
from benchmarks.record import environment, write
from benchmarks.steps import Schedule, message
from fastwgan.cli.common import Parser
from fastwgan.kernels import guard, interpolate, penalty, perturb, project, scores, update

SAMPLES, REPEATS = 9, 10  # of a setting, and calls to a sample, on a GPU
ON_CPU = 2**13  # elements there, where this only shows that it works
SHOWN = 4


class Sweep(NamedTuple):
    """A kernel in use: the case, its module and the constants of it to be tried, how many warps; samples in a batch."""

    case: Case
    module: Any  # of fastwgan.kernels
    constants: Mapping[str, tuple[int, ...]]
    warps: tuple[int, ...]
    batch: int = op_cases.BATCH


POWERS = tuple(2**i for i in range(9, 15))
SUMS = {"BLOCK": (512, 1024, 2048, 4096), "MAX_PROGRAMS": (256, 512, 1024, 2048)}
SWEEPS = {
    "RMSprop": Sweep(Case("RMSprop", 2**26), update, {"BLOCK": POWERS[1:5]}, (4, 8, 16)),
    "Adam": Sweep(Case("Adam", 2**26), update, {"BLOCK": POWERS[1:5]}, (4, 8, 16)),
    "Adam averaged": Sweep(Case("Adam averaged", 2**26), update, {"BLOCK": POWERS[1:5]}, (4, 8, 16)),
    "interpolate": Sweep(Case("interpolate", 2**26), interpolate, {"BLOCK": POWERS[1:5]}, (2, 4, 8)),
    "penalty": Sweep(Case("penalty", 2**25), penalty, {"MAX_BLOCK": (2048, 16384)}, (4, 8, 16), 4096),
    "penalty of few": Sweep(Case("penalty", 64 * 2**20), penalty, {"LOOP_BLOCK": POWERS[2:]}, (8, 16, 32)),
    "penalty of many": Sweep(Case("penalty", 2048 * 2**15), penalty, {"LOOP_BLOCK": POWERS[3:]}, (8, 16, 32), 2048),
    "guard": Sweep(Case("guard", 2**27), guard, {"LARGE_BLOCK": POWERS[2:]}, (4, 8, 16)),
    "guard, medium": Sweep(Case("guard", 2**26, 16), guard, {"LARGE_BLOCK": POWERS[2:]}, (4, 8)),
    "guard, small": Sweep(Case("guard", 2**19, 6), guard, {"BLOCK": POWERS[1:]}, (4, 8)),
    "perturb": Sweep(Case("perturb", 2**26), perturb, {"BLOCK": POWERS[:4]}, (2, 4, 8)),
    "project": Sweep(Case("project", 2**26), project, {"MIN_BLOCK": (1024, 2048)}, (2, 4, 8)),
    "scores": Sweep(Case("scores", 2**26), scores, SUMS, (4, 8)),
}


class _Launcher:
    """A kernel that is launched with so many warps, or with as many as its launcher says, which it remembers."""

    def __init__(self, kernel: Any, warps: int | None) -> None:
        self._kernel, self.warps = kernel, warps

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self.warps = options["num_warps"] = self.warps or options["num_warps"]
            return self._kernel[grid](*args, **options)

        return launch


@contextmanager
def setting(sweep: Sweep, constants: dict[str, int], warps: int | None) -> Iterator[_Launcher]:
    """The module with other constants, and its kernel with other warps."""
    name = next(name for name in vars(sweep.module) if name.endswith("_kernel"))
    launcher = _Launcher(getattr(sweep.module, name), warps)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(op_cases, "BATCH", sweep.batch))
        for constant, value in {**constants, name: launcher}.items():
            stack.enter_context(mock.patch.object(sweep.module, constant, value))
        yield launcher


def measured(case: Case, expected: list[Tensor] | None, device: torch.device) -> tuple[float, list[Tensor]]:
    """(milliseconds a call, what it comes to); raises ValueError where that is not what is ``expected``."""
    made = OPS[case.op].builders(case, device)["fastwgan"]()
    made.take()
    found = [x.detach().clone() for x in made.result()]
    if expected is not None and not (away := ops.difference(found, expected)) <= ops.TOLERANCE:
        raise ValueError(f"its result is {away:.3g} of the largest value away")
    repeats, samples = (REPEATS, SAMPLES) if device.type == "cuda" else (1, 1)
    call = timing.capture(made.take, repeats=repeats) if device.type == "cuda" else made.take
    return median(timing.time_of(call, device, 1) / repeats for _ in range(samples)), found


def sweep_through(name: str, device: torch.device, bandwidth: float, deadline: float) -> dict[str, Any]:
    """All settings of a kernel, the present one first: those that are measured by the best, and what failed."""
    sweep, case = SWEEPS[name], SWEEPS[name].case
    if device.type == "cpu":
        sweep, case = sweep._replace(batch=op_cases.BATCH), replace(case, elements=ON_CPU)
    present = {constant: getattr(sweep.module, constant) for constant in sweep.constants}
    tried: list[tuple[dict[str, int], int | None]] = [(present, None)]
    for warps, *values in product(sweep.warps, *sweep.constants.values()):
        tried.append((dict(zip(sweep.constants, values, strict=True)), warps))
    rows: list[dict[str, Any]] = []
    failed, expected = {}, None
    for constants, chosen in tried:
        if time.monotonic() > deadline and rows:
            break
        with setting(sweep, constants, chosen) as launcher:
            try:
                ms, found = measured(case, expected, device)
            except Exception as error:  # too many registers, say: the others can still be measured
                failed[f"{constants}, {chosen} warps"] = message(error)
                continue
        expected = expected or found
        share = float(f"{case.bytes / ms / 1e6 / bandwidth:.4g}")
        rows.append(constants | {"warps": launcher.warps, "ms": ms, "share": share, "present": chosen is None})
    left = len(tried) - len(rows) - len(failed)
    rows.sort(key=lambda row: row["ms"])
    return {"kernel": name, "case": str(case), "settings": rows, "failed": failed, "left_out": left}


def show(result: dict[str, Any]) -> None:
    left = f", {result['left_out']} settings left out for time" if result["left_out"] else ""
    print(f"{result['kernel']} ({result['case']}{left})")
    for i, row in enumerate(result["settings"]):
        if i < SHOWN or row["present"]:
            constants = ", ".join(f"{k} {v}" for k, v in row.items() if k.isupper())
            mark = "  <- present" if row["present"] else ""
            print(f"  {row['share']:7.1%} of a copy: {constants}, {row['warps']} warps{mark}")
    for what, why in result["failed"].items():
        print(f"  failed: {what}: {why}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks tune", description="Launch parameters tried on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the record")
    parser.add_argument("--minutes", type=float, default=5.0, help="that all of it may take; default: 5")
    parser.add_argument(
        "--kernels", nargs="+", choices=SWEEPS, default=list(SWEEPS), metavar="NAME", help="default: all"
    )
    args = parser.parse_args(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    schedule = Schedule(args.minutes, len(args.kernels), SAMPLES)
    bandwidth = ops.copy_bandwidth(device)
    record: dict[str, Any] = {"environment": environment(device), "copy_gb_s": bandwidth, "sweeps": []}
    print(f"a large copy moves {bandwidth:.4g} GB/s")
    for name in args.kernels:
        result = sweep_through(name, device, bandwidth, schedule.next_deadline())
        record["sweeps"].append(result)
        show(result)
        write(args.out / "gpu-tune.json", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
