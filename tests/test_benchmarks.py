"""The commands in benchmarks/ that want a GPU, as far as a CPU can show them."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from fastwgan import bench_ops

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import gpu, tune

CPU = torch.device("cpu")

SLOW = """
import time
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("found so far")
"""


def test_a_part_whose_time_is_over_says_what_it_has_found(tmp_path, capsys):
    assert gpu.run("slow", [sys.executable, "-c", SLOW], 5.0, tmp_path) == 124
    assert (tmp_path / "slow.log").read_text() == "begun\nfound so far\n"
    assert "found so far\n== slow: stopped, its time was over" in capsys.readouterr().out
    assert gpu.run("failing", [sys.executable, "-c", "raise SystemExit(3)"], 5.0, tmp_path) == 3


def test_parts_share_the_minutes_in_order(tmp_path, monkeypatch, capsys):
    asked = []

    def run(name, command, seconds, out):
        asked.append((name, seconds, command))
        return {"tests": 1, "ops": 124}.get(name, 0)

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main(["--out", str(tmp_path / "out"), "--minutes", "10"]) == 1
    assert [name for name, *_ in asked] == ["tests", "sanitizer", "ops", "steps", "tune"]
    assert asked[0][1] < 600 * 5 / 24 + 1
    assert "tests: 1, sanitizer: 0, ops: cut short" in capsys.readouterr().out
    asked.clear()
    assert gpu.main(["--out", str(tmp_path), "--minutes", "2", "--parts", "steps", "ops"]) == 0
    (first, early, _), (second, late, command) = asked
    assert (first, second) == ("ops", "steps")
    assert early < 45
    assert 110 < late < 121
    minutes = float(command[command.index("--minutes") + 1])
    assert 60 * minutes < late - gpu.GRACE


def test_every_test_file_is_run_those_first_that_only_a_gpu_can_pass():
    files = [Path(argument).stem for argument in gpu.tests() if argument.endswith(".py")]
    assert sorted(files) == sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    assert files == [*gpu.FIRST, *sorted(set(files) - set(gpu.FIRST))]


# The sweep of launch parameters, in the interpreter


@pytest.mark.emulated
@pytest.mark.parametrize("name", tune.SWEEPS)
def test_every_kernel_can_be_swept(name, monkeypatch):
    """The present setting and one other of each, which comes to the same."""
    sweep = tune.SWEEPS[name]
    present = {constant: getattr(sweep.module, constant) for constant in sweep.constants}
    last = {constant: values[-1:] for constant, values in sweep.constants.items()}
    monkeypatch.setitem(tune.SWEEPS, name, sweep._replace(constants=last, warps=sweep.warps[-1:]))
    result = tune.sweep_through(name, CPU, 10.0, time.monotonic() + 60)
    assert result["failed"] == {}
    assert result["left_out"] == 0
    (now,), (other,) = ([row for row in result["settings"] if row["present"] == is_now] for is_now in (True, False))
    assert now["warps"] in (4, 8, 16)
    assert other["warps"] == sweep.warps[-1]
    assert {constant: now[constant] for constant in present} == present
    assert {constant: (other[constant],) for constant in last} == last
    assert {constant: getattr(sweep.module, constant) for constant in present} == present
    assert sweep.case.bytes >= 2**28 or "small" in name  # several times a cache
    assert all(value >= 128 for values in sweep.constants.values() for value in values)


@pytest.mark.emulated
def test_the_sweeps_command(tmp_path, monkeypatch, capsys):
    """What cannot be compiled, or comes to something else, is left out and said."""
    sweep = tune.SWEEPS["scores"]._replace(constants={"BLOCK": (1024, 1000)}, warps=(4,))
    monkeypatch.setitem(tune.SWEEPS, "scores", sweep)
    monkeypatch.setattr(bench_ops, "copy_bandwidth", lambda device: 10.0)
    assert tune.main(["--out", str(tmp_path), "--kernels", "scores"]) == 0
    out = capsys.readouterr().out
    assert "BLOCK 1024, 8 warps  <- present" in out
    assert "failed: {'BLOCK': 1000}, 4 warps: " in out
    (result,) = json.loads((tmp_path / "gpu-tune.json").read_text())["sweeps"]
    assert len(result["settings"]) == 2
    with pytest.raises(ValueError, match="of the largest value away"):
        tune.measured(bench_ops.Case("scores", 100), [torch.ones(())] * 4, CPU)
    assert tune.sweep_through("scores", CPU, 10.0, 0.0)["left_out"] == 2
