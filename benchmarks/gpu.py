"""All that wants a GPU, in one command: python -m benchmarks.gpu --out DIR [--minutes 9]

First the tests that need one, as no figure of a wrong kernel is worth having; then the benchmarks, whose records are
written as they go; then, with what time is left, compute-sanitizer. Each part's output goes to a file in DIR as well.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TAIL = 25  # lines of a part's output that are shown at its end


def run(name: str, command: list[str], seconds: float, out: Path) -> int:
    """The command's status; 124 if it had to be ended when its time was over."""
    print(f"== {name}: {' '.join(command[1:])} ({seconds:.0f} s at most)", flush=True)
    begun = time.monotonic()
    log = out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # it may have processes of its own
            process.wait()
            status = 124
    print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]))
    ended = "stopped, its time was over" if status == 124 else f"status {status}"
    print(f"== {name}: {ended}, {time.monotonic() - begun:.0f} s", flush=True)
    return status


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Tests and benchmarks on a GPU.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the records and logs")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all of it may take; default: 9")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes

    def left(share: float) -> float:
        """Seconds: a share of those that are left."""
        return share * (end - time.monotonic())

    python = [sys.executable, "-m"]
    states = {"tests": run("tests", [*python, "pytest", "-q", "-m", "gpu"], left(0.35), out)}
    for name, share, options in (("steps", 0.65, []), ("ops", 0.6, ["--ops"])):
        seconds = left(share)
        minutes = f"{max(0.1, 0.85 * seconds / 60):.2f}"  # the last workload may go over its time
        command = [*python, "fastwgan", "bench", *options, "--device", "cuda", "--minutes", minutes]
        states[name] = run(name, [*command, "--json", str(out / f"gpu-{name}.json")], seconds, out)
    states["sanitizer"] = run("sanitizer", [sys.executable, "tests/sanitize.py"], left(1.0), out)
    print(", ".join(f"{name}: {'cut short' if status == 124 else status}" for name, status in states.items()))
    return int(any(status not in (0, 124) for status in states.values()))


if __name__ == "__main__":
    sys.exit(main())
