"""All that wants a GPU, in one command: python -m benchmarks.gpu --out DIR [--minutes 9] [--parts NAME ...]

First the tests that need one, as no figure of a wrong kernel is worth having; then compute-sanitizer; then the
benchmarks and the sweep of launch parameters, whose records are written as they go. Each part has its share of the
time that is left, and is asked to end when that is over; its output goes to a file in DIR as well. Where the minutes do
not do for all of it, ``--parts`` makes several calls of it.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
TAIL = 40  # lines of a part's output that are shown at its end
GRACE = 15  # seconds that a part gets to say what it has found so far
WORKERS = 12  # test processes at most, each with a context of its own on the GPU
WEIGHTS = {"tests": 5, "sanitizer": 3, "ops": 4, "steps": 8, "tune": 4}  # of the parts, in order
FIRST = ("test_gpu", "test_memory", "test_functional", "test_derivatives", "test_determinism", "test_graphs")


def run(name: str, command: list[str], seconds: float, out: Path) -> int:
    """The command's status; 124 if it had to be ended when its time was over."""
    seconds = max(1.0, seconds)
    print(f"== {name}: {' '.join(command[1:])[:300]} ({seconds:.0f} s at most)", flush=True)
    begun = time.monotonic()
    log = out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            status = process.wait(timeout=max(0.8 * seconds, seconds - GRACE))
        except subprocess.TimeoutExpired:
            status = 124
            process.send_signal(signal.SIGINT)  # upon which pytest, say, tells of the failures up to here
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(0.2 * seconds, GRACE))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it may have processes of its own
            process.wait()
    print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]))
    ended = "stopped, its time was over" if status == 124 else f"status {status}"
    print(f"== {name}: {ended}, {time.monotonic() - begun:.0f} s", flush=True)
    return status


def tests() -> list[str]:
    """pytest's arguments: what only a GPU can show first; a process to a core, as compiling takes most of the time."""
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: ((*FIRST, path.stem).index(path.stem), path))
    cores = min(WORKERS, os.cpu_count() or 1)
    parallel = importlib.util.find_spec("xdist") is not None and cores > 1
    processes = ["-n", str(cores), "--maxschedchunk", "4"] if parallel else []  # few, as some of the first compile long
    return [
        "pytest", "-q", "-m", "gpu", "--tb=short", "--durations=10", "--continue-on-collection-errors", *processes,
        *(str(path.relative_to(ROOT)) for path in files),
    ]  # fmt: skip


def command(part: str, seconds: float, out: Path) -> list[str]:
    """What does a part, given the time it may take."""
    python, minutes = [sys.executable, "-m"], f"{max(0.1, 0.9 * (seconds - GRACE) / 60):.2f}"
    bench = [*python, "fastwgan", "bench", "--device", "cuda", "--minutes", minutes]
    return {
        "tests": [*python, *tests()],
        "sanitizer": [sys.executable, "tests/sanitize.py"],
        "ops": [*bench, "--ops", "--json", str(out / "gpu-ops.json")],
        "steps": [*bench, "--json", str(out / "gpu-steps.json")],
        "tune": [*python, "benchmarks.tune", "--out", str(out), "--minutes", minutes],
    }[part]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Tests and benchmarks on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the records and logs")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all of it may take; default: 9")
    parser.add_argument("--parts", nargs="+", choices=WEIGHTS, default=list(WEIGHTS), help="default: all")
    args = parser.parse_args(argv)
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    chosen = [part for part in WEIGHTS if part in args.parts]
    states = {}
    for i, part in enumerate(chosen):
        share = WEIGHTS[part] / sum(WEIGHTS[later] for later in chosen[i:])
        seconds = share * (end - time.monotonic())
        states[part] = run(part, command(part, seconds, out), seconds, out)
    print(", ".join(f"{name}: {'cut short' if status == 124 else status}" for name, status in states.items()))
    return int(any(status not in (0, 124) for status in states.values()))


if __name__ == "__main__":
    sys.exit(main())
