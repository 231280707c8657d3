"""Without a GPU, kernels run in Triton's interpreter; that is decided when they are defined, so before any import."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

if torch.cuda.is_available():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions would have another name for it
        torch.backends.cudnn.allow_tf32 = False  # a convolution's float32 is float32, as elsewhere
else:
    os.environ["TRITON_INTERPRET"] = "1"
    import strict

    strict.install()

COMPILER = pytest.StashKey[subprocess.Popen[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine or this run is not for."""
    slow = pytest.mark.skip(reason="slow: run with -m slow")
    gpu = pytest.mark.skip(reason="gpu: no CUDA GPU here")
    interpreted = pytest.mark.skip(reason="the interpreter runs where there is no GPU; here the kernels are compiled")
    for item in items:
        if "slow" in item.keywords and "slow" not in config.getoption("-m"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(gpu)
        if "interpreted" in item.keywords and torch.cuda.is_available():
            item.add_marker(interpreted)
    items.sort(key=lambda item: "compiled_kernels" in getattr(item, "fixturenames", ()))  # these wait for a compiler


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the compilation of all kernels, where a test wants it, on what the other tests leave of the machine."""
    if not session.config.option.collectonly and any(
        "compiled_kernels" in getattr(item, "fixturenames", ()) for item in session.items
    ):
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        script = [str(Path(__file__).with_name("compile_kernels.py"))]
        if "slow" in session.config.getoption("-m"):
            script.append("--all")
        session.config.stash[COMPILER] = subprocess.Popen(
            ["nice", "-n", "19", sys.executable, *script], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=os.setpgrp,  # noqa: PLW1509 - a group to kill; in a session of its own nice would mean nothing
        )  # fmt: skip


def pytest_unconfigure(config: pytest.Config) -> None:
    if COMPILER in config.stash and config.stash[COMPILER].poll() is None:
        os.killpg(config.stash[COMPILER].pid, signal.SIGKILL)  # it has workers


@pytest.fixture(scope="session")
def compiled_kernels(pytestconfig: pytest.Config) -> subprocess.Popen[str]:
    """The process that compiles all kernels."""
    return pytestconfig.stash[COMPILER]


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton kernels run: the CPU by the interpreter, or a GPU."""
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
