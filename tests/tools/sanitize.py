"""Run NVIDIA's compute-sanitizer over the kernels, on a machine with a GPU: python tests/tools/sanitize.py [TOOL ...]

Runs a few tests of every kernel under memcheck, racecheck and synccheck, or the tools named, all at once, with no
memory pool between the tests and the driver, and exits with 1 if any tool or test finds anything. A line of output
begins with its tool, and comes as it is written, so that what was found before an interruption is there.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Every kernel, on sizes to either side of a block and a program, aligned and not, in all dtypes.
TESTS = (
    "kernels/test_memory", "engine/test_guard", "engine/test_max_norm", "engine/test_ema", "ops/test_project",
    "kernels/test_matrix",
)  # fmt: skip
CHOSEN = (
    "not torch- and (stay_inside or are_filled or test_means_of_scores or averages_are_the_recurrence or test_batches "
    "or test_the_share_on_the_bound or number_of_tensors or by_and_by or (test_penalty_cotangent and 16385))"
)
OURS = ("--kernel-name", "regex=_(guard|scores|interpolate|perturb|penalty|project|update)_kernel")
TOOLS = {
    "memcheck": OURS,
    "racecheck": OURS,
    "synccheck": OURS,
    "initcheck": ("--check-api-memory-access", "no"),  # all kernels: others' writes are what initialises our inputs
}
DEFAULT = ("memcheck", "racecheck", "synccheck")  # initcheck takes three times as long as each of these
ROOT = Path(__file__).parents[2]


def pytest_command() -> list[str]:
    files = [f"tests/{name}.py" for name in TESTS]
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", CHOSEN, "-p", "no:cacheprovider", *files]


def run(sanitizer: str, tool: str) -> int:
    """A tool's status; 0 if it and the tests under it found nothing."""
    # Not the API's errors, as PyTorch probes the driver for functions it may lack; nor the compiler's processes.
    quiet = ("--report-api-errors", "no", "--target-processes", "application-only")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *quiet, *TOOLS[tool], *pytest_command()]
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    process = subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{tool}: {line}", end="", flush=True)
    return process.wait()


def main(tools: Sequence[str]) -> int:
    """Run the tools; return the exit status."""
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        print(f"expected tools among {', '.join(TOOLS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(len(tools)) as pool:
        statuses = dict(zip(tools, pool.map(run, [sanitizer] * len(tools), tools), strict=True))
    failed = [tool for tool, status in statuses.items() if status]
    print("compute-sanitizer:", f"errors under {', '.join(failed)}" if failed else "clean")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or DEFAULT))
