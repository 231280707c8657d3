"""Without a GPU, kernels run on the CPU: as compiled for one (emulation/ptx.py), or in Triton's interpreter
(emulation/poisoned_interpreter.py).

Which of the two is decided when kernels are defined, so before any import. It is the interpreter where there is no C
compiler, and where FASTWGAN_KERNELS=interpreter asks for it.
"""

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch

if torch.cuda.is_available():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions would have another name for it
        torch.backends.cudnn.allow_tf32 = False  # a convolution's float32 is float32, as elsewhere
    KERNELS = "compiled, on a GPU"
else:
    interpreted = os.environ.get("FASTWGAN_KERNELS") == "interpreter" or shutil.which("cc") is None
    KERNELS = "in Triton's interpreter" if interpreted else "compiled for a GPU, run on the CPU"
    os.environ["TRITON_INTERPRET"] = str(int(interpreted))
    import poisoned_interpreter
    import triton

    poisoned_interpreter.install()
    if not interpreted:
        import ptx

        ptx.install()
    triton.knobs.runtime.interpret = interpreted  # to stay, whereas the processes that tests start have no such machine
    os.environ["TRITON_INTERPRET"] = "1"

pytest.register_assert_rewrite(*(path.stem for path in (Path(__file__).parent / "support").glob("*.py")))
pytest_plugins = ["graphed_trainers"]  # its fixture

COMPILER = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_report_header() -> str:
    return f"kernels: {KERNELS}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print each reason to skip tests with their number, as without a GPU there are thousands."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("skipped tests by reason")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"SKIPPED [{count}] {reason}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine or this run is not for."""
    slow = pytest.mark.skip(reason="slow: run with -m slow")
    gpu = pytest.mark.skip(reason="gpu: no CUDA GPU here")
    emulated = pytest.mark.skip(reason="emulated: here is a GPU")
    interpreted = pytest.mark.skip(reason="interpreted: test_interpreter.py runs it")
    for item in items:
        if "slow" in item.keywords and "slow" not in config.getoption("-m"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(gpu)
        if "emulated" in item.keywords and torch.cuda.is_available():
            item.add_marker(emulated)
        elif "interpreted" in item.keywords and KERNELS != "in Triton's interpreter":
            item.add_marker(interpreted)
    items.sort(key=lambda item: "compiled_kernels" in getattr(item, "fixturenames", ()))  # these wait for a compiler


def _compiled() -> Path:
    """Where a run's compilation of all kernels puts what it finds; all of pytest-xdist's processes see it."""
    return Path(os.environ["FASTWGAN_COMPILED"])


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # one of several processes, which have a core each, as what they start
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # not what the first process has named, from which these inherit
    else:
        # Named, it holds for all runs of the command line, some of which are compared bit for bit.
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
        os.environ["FASTWGAN_COMPILED"] = tempfile.mkdtemp(prefix="fastwgan-kernels-")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the compilation of all kernels, where a test wants it, on what the other tests leave of the machine."""
    first = getattr(session.config, "workerinput", {}).get("workerid", "gw0") == "gw0"
    wanted = any("compiled_kernels" in getattr(item, "fixturenames", ()) for item in session.items)
    if session.config.option.collectonly or not (first and wanted):
        return
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    everything = "--all" if "slow" in session.config.getoption("-m") else ""
    out = _compiled()
    command = 'cd "$1"; nice -n 19 "$2" "$3" $4 > rows 2> errors; echo $? > ended; mv ended status'
    script = Path(__file__).parent / "tools" / "compile_kernels.py"
    session.config.stash[COMPILER] = subprocess.Popen(
        ["sh", "-c", command, "sh", out, sys.executable, script, everything], env=env,
        preexec_fn=os.setpgrp,  # noqa: PLW1509 - a group to kill; in a session of its own nice would mean nothing
    )  # fmt: skip
    (out / "group").write_text(str(session.config.stash[COMPILER].pid))


def pytest_unconfigure(config: pytest.Config) -> None:
    """The last to leave ends the compilation: a worker that has no more to do leaves others that wait for it."""
    if hasattr(config, "workerinput"):
        return
    out = _compiled()
    if (out / "group").exists() and not (out / "status").exists():
        with suppress(ProcessLookupError):
            os.killpg(int((out / "group").read_text()), signal.SIGKILL)  # it has workers
    shutil.rmtree(out, ignore_errors=True)


@pytest.fixture(scope="session")
def compiled_kernels() -> str:
    """What the compilation of all kernels prints, once it is done."""
    out = _compiled()
    end = time.monotonic() + 1800
    while not (out / "status").exists():
        assert time.monotonic() < end, "the kernels are not compiled after half an hour"
        time.sleep(0.2)
    assert (out / "status").read_text() == "0\n", (out / "errors").read_text()
    return (out / "rows").read_text()


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.emulated), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton kernels run: a GPU, or the CPU for want of one."""
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile as it traces and differentiates, without generating code, which takes long."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
