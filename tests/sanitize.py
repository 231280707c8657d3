"""NVIDIA's compute-sanitizer over the kernels, on a machine with a GPU: python tests/sanitize.py

Runs tests of every kernel under memcheck, racecheck, synccheck and initcheck, with no memory pool between the tests and
the driver, and exits with 1 if any tool or test finds anything. Minutes each.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = ("tests/test_memory.py", "tests/test_matrix.py", "tests/test_project.py")
CHOSEN = "stay_inside or are_filled or test_sizes or test_batches or number_of_tensors"
OURS = ("--kernel-name", "regex=_(guard|scores|objective|interpolate|perturb|penalty|project|update)_kernel")
TOOLS = {
    "memcheck": OURS,
    "racecheck": OURS,
    "synccheck": OURS,
    "initcheck": ("--check-api-memory-access", "no"),  # all kernels: others' writes are what initialises our inputs
}


def main() -> int:
    """Run every tool; return the exit status."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit", file=sys.stderr)
        return 1
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pytest = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", CHOSEN, "-p", "no:cacheprovider", *TESTS)
    failed = []
    for tool, options in TOOLS.items():
        # Not the API's errors, as PyTorch probes the driver for functions it may lack; nor the compiler's processes.
        quiet = ("--report-api-errors", "no", "--target-processes", "application-only")
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *quiet, *options, *pytest]
        print(f"== {tool}", flush=True)
        if subprocess.run(command, env=env, cwd=Path(__file__).parent.parent, check=False).returncode:
            failed.append(tool)
    print("compute-sanitizer:", f"errors under {', '.join(failed)}" if failed else "clean")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
