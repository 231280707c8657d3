"""Run what wants a GPU, in two calls of six minutes: python -m benchmarks gpu kernels|steps --out DIR [--minutes 6]

``kernels`` runs the tests that need a GPU and beside them compute-sanitizer, as no figure of a wrong kernel is worth
having, and then times the ops. ``steps`` times critic steps without compilers, profiles them, and times them with
compilers, each of which may take minutes. A part that has to end because its time is over leaves what it has measured
by then. Records and logs lie in DIR; what matters of them is printed at the end.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from benchmarks import summary
from fastwgan.cli.common import Parser

ROOT = Path(__file__).parent.parent
TIME_OVER = 124  # the status of a part that had to be ended
GRACE = 15  # seconds that a part gets to say what it has found so far
SAID = 100  # characters of what a part that did not start said last
WORKERS = 11  # test processes, each with a context of its own on the GPU; the sanitizers have the other cores
# The parts of each call that run at the same time, in order, and how they share the minutes that are left.
CALLS: dict[str, dict[tuple[str, ...], int]] = {
    "kernels": {("tests", "sanitizer"): 5, ("ops",): 3},
    "steps": {("steps",): 3, ("profile",): 2, ("compiled",): 7},
}
FIRST = ("test_gpu", "test_memory", "test_functional", "test_derivatives", "test_determinism", "test_graphs")
PLAIN = ("textbook", "foreach", "graphed", "fastwgan", "fastwgan-graphed")  # implementations without a compiler
COMPILED = ("mlp-clip", "mlp-penalty", "dcgan-clip", "dcgan-penalty")  # workloads that are timed with them


def tests() -> list[str]:
    """Return pytest's arguments: what only a GPU can show first; several processes, as compiling takes most time."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda p: ((*FIRST, p.stem).index(p.stem), p.stem))
    workers = min(WORKERS, os.cpu_count() or 1)
    parallel = find_spec("xdist") is not None and workers > 1
    # Few tests to a process at a time, as the first ones compile long.
    processes = ["-n", str(workers), "--maxschedchunk", "4"] if parallel else []
    return [
        "pytest", "-q", "-m", "gpu", "--tb=short", "--durations=10", "--continue-on-collection-errors", *processes,
        *(str(path.relative_to(ROOT)) for path in files),
    ]  # fmt: skip


def command(part: str, seconds: float, out: Path) -> list[str]:
    """Return the command that runs a part, told the time it has."""
    python, minutes = [sys.executable, "-m"], f"{max(0.1, 0.9 * (seconds - GRACE) / 60):.2f}"
    bench = [*python, "benchmarks"]
    options = ["--device", "cuda", "--minutes", minutes, "--json", str(record(part, out))]
    return {
        "tests": [*python, *tests()],
        "sanitizer": [sys.executable, "tests/tools/sanitize.py"],
        "ops": [*bench, "ops", *options],
        "steps": [*bench, "steps", *options, "--precision", "float32", "--implementation", *PLAIN],
        "compiled": [*bench, "steps", *options, "--precision", "float32", "--workload", *COMPILED],
        "profile": [*python, "benchmarks.profiling", "--out", str(out)],
    }[part]


def record(part: str, out: Path) -> Path:
    """Return where a part's record lies, or its log if that is all there is of it."""
    names = {"tests": "tests.log", "sanitizer": "sanitizer.log", "compiled": "gpu-steps-compiled.json"}
    return out / names.get(part, f"gpu-{part}.json")


def run(part: str, command: list[str], seconds: float, out: Path) -> int:
    """Return the command's status, or TIME_OVER."""
    seconds, begun = max(1.0, seconds), time.monotonic()
    print(f"== {part}: {' '.join(command[1:])[:200]} ({seconds:.0f} s at most)", flush=True)
    with (out / f"{part}.log").open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            status = process.wait(timeout=max(0.8 * seconds, seconds - GRACE))
        except subprocess.TimeoutExpired:
            status = TIME_OVER
            os.killpg(process.pid, signal.SIGINT)  # upon which pytest, say, tells of the failures up to here
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(0.2 * seconds, GRACE))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it may have processes of its own
            process.wait()
    print(f"== {part}: ended after {time.monotonic() - begun:.0f} s", flush=True)
    return status


def outcome(part: str, status: int, out: Path) -> str:
    """Return how a part ended, in a word or two; of one that failed without any result, that it has not started."""
    path, log = record(part, out), out / f"{part}.log"
    text, said = (p.read_text(errors="replace") if p.exists() else "" for p in (path, log))
    if path == log:
        result = bool(re.search(r"\d+ (passed|failed)", text))
    else:
        result = bool(text) and any(json.loads(text).get(kind) for kind in ("ops", "critic_step", "workloads"))
    if status == TIME_OVER:
        failed = path == log and re.search(r"\d+ failed", text)
        return "cut short, with failures" if failed else "cut short" if result else "cut short, no result"
    if not result:
        last = said.strip().splitlines()[-1:] or ["no output"]
        return f"DID NOT START (status {status}): {last[0][:SAID]}" if status else "no result"
    return "ok" if status == 0 else f"status {status}"


def run_together(parts: Sequence[str], seconds: float, out: Path) -> dict[str, str]:
    """Run parts at the same time; return how each ended."""
    for part in parts:  # so that nothing of an earlier call passes for this one's
        record(part, out).unlink(missing_ok=True)
    with ThreadPoolExecutor(len(parts)) as pool:
        statuses = pool.map(lambda part: run(part, command(part, seconds, out), seconds, out), parts)
        return {part: outcome(part, status, out) for part, status in zip(parts, statuses, strict=True)}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks gpu", description="Tests and benchmarks on a GPU.")
    parser.add_argument("call", choices=CALLS, help="tests, sanitizer and ops; or critic steps")
    parser.add_argument("--out", type=Path, required=True, help="directory of the records and logs")
    parser.add_argument("--minutes", type=float, default=6.0, help="that all of it may take; default: 6")
    parts = [part for stages in CALLS.values() for together in stages for part in together]
    parser.add_argument("--parts", nargs="+", choices=parts, metavar="NAME", help="of the call; default: all")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    stages = {
        chosen: weight for parts, weight in CALLS[args.call].items()
        if (chosen := tuple(part for part in parts if part in (args.parts or parts)))
    }  # fmt: skip
    if not stages:
        parser.error(f"--parts: expected parts of {args.call}, got {', '.join(args.parts)}")
    ended: dict[str, str] = {}
    while stages:
        share = next(iter(stages.values())) / sum(stages.values())
        together, seconds = next(iter(stages)), share * (end - time.monotonic())
        del stages[together]
        ended |= run_together(together, seconds, out)
    print("\n".join(summary.lines({part: record(part, out) for part in ended})))
    print("; ".join(f"{part}: {how}" for part, how in ended.items()))
    return int(not set(ended.values()) <= {"ok", "cut short"})


if __name__ == "__main__":
    sys.exit(main())
