"""Triton's interpreter, made stricter than hardware: what a mask turns off reads poison, a stray access raises."""

import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest

FILES = (
    "ops/test_functional", "engine/test_guard", "optim/test_optim", "kernels/test_kernels", "kernels/test_determinism",
    "kernels/test_memory",
)  # fmt: skip


@pytest.mark.emulated
@pytest.mark.skipif(conftest.KERNELS == "in Triton's interpreter", reason="all tests are run there")
def test_the_kernels_pass_there():
    """In a process of its own, as kernels are compiled or interpreted for as long as one lives."""
    files = [Path(conftest.__file__).parent / f"{name}.py" for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short", *files]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"FASTWGAN_KERNELS": "interpreter"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
