"""The commands in benchmarks/ that want a GPU, as far as a CPU can show them."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import tiny
from graphed_trainers import Recorded
from torch import nn

from benchmarks import __main__ as command_line
from benchmarks import gpu, ops, profiling, report, summary, tune
from benchmarks.op_cases import Case
from benchmarks.steps import setting
from fastwgan import GradientPenalty, Trainer
from fastwgan.engine import graphs
from fastwgan.engine.settings import Settings

CPU = torch.device("cpu")

SLOW = """
import time
print("begun", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("found so far")
"""


def test_a_part_whose_time_is_over_leaves_what_it_has_found(tmp_path, capsys):
    assert gpu.run("slow", [sys.executable, "-c", SLOW], 5.0, tmp_path) == 124
    assert (tmp_path / "slow.log").read_text() == "begun\nfound so far\n"
    assert "== slow: ended after" in capsys.readouterr().out
    assert gpu.run("failing", [sys.executable, "-c", "raise SystemExit(3)"], 5.0, tmp_path) == 3


def test_parts_share_the_minutes_in_order(tmp_path, monkeypatch, capsys):
    """Each says how it ended; one that failed and has left no result has not started."""
    asked = []

    def run(part, command, seconds, out):
        asked.append((part, seconds, command))
        if part == "tests":
            gpu.record(part, out).write_text("usage\nno such option\n")
        if part == "ops":
            gpu.record(part, out).write_text(json.dumps({"ops": [], "left_out": ["all"], "copy_gb_s": 1.0}))
        elif part == "steps":
            gpu.record(part, out).write_text((report.RESULTS / "gpu-steps.json").read_text())
        elif part == "sanitizer":
            gpu.record(part, out).write_text("memcheck: == 3 passed in 1.00s ==\n")
        return {"tests": 4, "steps": 124}.get(part, 0)

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.main(["kernels", "--out", str(tmp_path)]) == 1
    assert sorted(part for part, *_ in asked[:2]) == ["sanitizer", "tests"]
    assert asked[2][0] == "ops"
    assert asked[0][1] == asked[1][1] == pytest.approx(360 * 5 / 8, abs=1)
    assert asked[2][1] == pytest.approx(360, abs=5), "what the others have left"
    out = capsys.readouterr().out
    assert "tests: DID NOT START (status 4): no such option; sanitizer: ok; ops: no result" in out
    asked.clear()
    assert gpu.main(["steps", "--out", str(tmp_path), "--minutes", "2", "--parts", "steps", "compiled"]) == 1
    (first, early, _), (second, late, command) = asked
    assert (first, second) == ("steps", "compiled")
    assert early == pytest.approx(120 * 3 / 10, abs=1)
    assert late == pytest.approx(120, abs=5)
    minutes = float(command[command.index("--minutes") + 1])
    assert 60 * minutes < late - gpu.GRACE
    assert "steps: cut short; compiled: no result" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["steps", "--out", str(tmp_path), "--parts", "ops"])


@pytest.mark.parametrize("part", ["ops", "steps", "compiled"])
def test_the_benchmarks_commands_are_understood(part, tmp_path):
    command = gpu.command(part, 90.0, tmp_path)
    assert command[1:4] == ["-m", "benchmarks", "ops" if part == "ops" else "steps"]
    args = command_line._parser().parse_args(command[3:])
    assert args.minutes == pytest.approx(0.9 * 75 / 60, abs=0.01)
    assert args.json == gpu.record(part, tmp_path)
    assert args.run == (command_line._ops if part == "ops" else command_line._steps)
    if part == "steps":
        assert not [name for name in args.implementation if "compiled" in name]


def test_every_test_file_is_run_those_first_that_only_a_gpu_can_pass():
    files = [Path(argument).stem for argument in gpu.tests() if argument.endswith(".py")]
    assert sorted(files) == sorted(path.stem for path in (gpu.ROOT / "tests").rglob("test_*.py"))
    assert files == [*gpu.FIRST, *sorted(set(files) - set(gpu.FIRST))]


def test_the_tests_start_in_several_processes(monkeypatch):
    """They are called as on a GPU, which here is none. Where pytest-benchmark warns, warnings are errors."""
    monkeypatch.setattr(gpu, "WORKERS", 2)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 2)
    command = [x for x in gpu.tests() if not x.endswith(".py") or x == "tests/package/test_gpu.py"]
    assert "-n" in command
    run = subprocess.run([sys.executable, "-m", *command], cwd=gpu.ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert "gpu: no CUDA GPU here" in run.stdout


# The summary


TESTS_LOG = f"""
{"".join(f"FAILED tests/engine/test_a.py::test_{i} - AssertionError{chr(10)}" for i in range(20))}
==== 20 failed, 5592 passed, 44 skipped, 5 warnings in 117.84s (0:01:57) ====
"""
SANITIZER_LOG = """
memcheck: ====== 206 passed, 9384 deselected in 87.99s (0:01:27) ======
memcheck: ========= ERROR SUMMARY: 0 errors
racecheck: 1 failed, 205 passed, 9384 deselected in 87.26s (0:01:27)
racecheck: ========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""


def profile_record(workloads=4):
    figures = {
        "step_ms": 0.28, "host_ms": 0.25, "replay_ms": 0.21, "iteration_ms": 1.4, "steps_ms": 1.5, "python_calls": 456,
        "kernels": [{"kernel": f"_kernel_{i}", "count": 2.0, "us": 9.5} for i in range(30)],
    }  # fmt: skip
    ways = dict.fromkeys([f"{name}{way}" for name in ("addmm", "mm+bias") for way in profiling.WAYS], 15.6)
    return {
        "workloads": [{"workload": f"w{i}", "eager": figures, "graph": figures} for i in range(workloads)],
        "network_products": [{"layer": f"generator.{i}", "shape": [64, 9, 9], "us": ways} for i in range(5)],
        "left_out": ["x: y"],
    }  # fmt: skip


def test_what_matters_fits_on_a_screen(tmp_path):
    texts = {
        "tests": TESTS_LOG, "sanitizer": SANITIZER_LOG, "ops": (report.RESULTS / "cpu-ops.json").read_text(),
        "steps": (report.RESULTS / "gpu-steps.json").read_text(), "profile": json.dumps(profile_record()),
        "compiled": (report.RESULTS / "gpu-steps-compiled.json").read_text(),
    }  # fmt: skip
    for part, text in texts.items():
        (tmp_path / part).write_text(text)
    told = {}
    for call, stages in gpu.CALLS.items():
        parts = [part for together in stages for part in together]
        told[call] = summary.lines({part: tmp_path / part for part in parts})
        assert len(told[call]) < 60
        assert not any("more lines" in line for line in told[call])
        assert max(map(len, told[call])) <= summary.WIDTH
    kernels, steps = ("\n".join(lines) for lines in told.values())
    assert "tests: 20 failed, 5592 passed, 44 skipped, 5 warnings in 117.84s" in kernels
    assert kernels.count("  failed: tests/engine/test_a.py::test_") == summary.FAILED
    assert "  and 8 more" in kernels
    assert "sanitizer: racecheck: RACECHECK SUMMARY: 0 hazards" in kernels
    assert "sanitizer: memcheck: 206 passed" in kernels
    assert "  RMSprop: 1.02k:" in kernels
    assert re.search(r"^resnet-clip.* 24.5 +14.8 +19.7 +0.75 +4.75 +4.84 +0.98$", steps, re.MULTILINE)
    assert "w0, graph: 456 Python calls; ms: step 0.28, host 0.25, replay 0.21, iteration 1.4" in steps
    assert "60 kernels, 570 us in all" in steps
    assert "generator.0, us: addmm 15.6; addmm TF32 15.6" in steps
    assert summary.lines({"ops": tmp_path / "none"}) == []
    (tmp_path / "long").write_text(json.dumps(profile_record(20)))
    assert summary.lines({"profile": tmp_path / "long"})[-1].startswith("... ")


# The profile


def test_products_are_told_by_layer():
    """The count of each layer is right, those of the penalty's second backward pass included."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(6, 16), nn.LeakyReLU(0.2), nn.Linear(16, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    generator = nn.Linear(3, 6)
    trainer = Trainer(
        generator, critic, latent=3, constraint=GradientPenalty(), backend="torch", independent_samples=True
    )
    real = torch.randn(16, 6)  # a batch as large as layers are wide
    for _ in range(3):
        trainer.critic_step(real)
    forward = nn.Linear.forward
    rows = profiling.products(lambda: trainer.critic_step(real), {"G": generator, "D": critic}, CPU)
    assert nn.Linear.forward is forward
    counts = Counter()
    for row in rows:
        counts[row["layer"]] += row["count"]
    # Scores: forward, to the weight, to the input (not of the first layer). Penalty: forward, to the input, and from
    # there to the weight and to the incoming gradient (which is constant for the last layer).
    assert counts == {"G.": 1, "D.0": 6, "D.2": 7, "D.4": 6}
    assert all(row["us"] > 0 for row in rows)


def test_a_workloads_profile(monkeypatch):
    monkeypatch.setattr("fastwgan.kernels.INTERPRETED", False)  # plain PyTorch then, as on a machine without a GPU
    for name, value in (("WARM_UP", 2), ("CALLS", 2), ("HOST_CALLS", 3), ("SAMPLES", 1)):
        monkeypatch.setattr(profiling, name, value)
    result = profiling.workload("tabular-penalty", CPU)
    assert result["workload"] == "tabular-penalty"
    figures = result["eager"]
    assert figures["python_calls"] > 100
    assert any(row["function"].startswith("fastwgan/") for row in figures["functions"])
    assert not any(row["function"].startswith("/") for row in figures["functions"])
    assert "aten::addmm" in [row["kernel"] for row in figures["kernels"]]
    assert min(figures[name] for name in ("step_ms", "host_ms", "steps_ms", "iteration_ms")) > 0
    assert {row["layer"].split(".")[0] for row in figures["products"]} == {"generator", "critic"}


@pytest.mark.emulated
def test_a_graphs_figures(monkeypatch):
    """Stand-ins for a GPU tell what is timed: steps and iterations, and then the graphs that these have captured."""
    from fake_cuda_graph import Recording

    timed = []

    def time_of(call, *_):
        timed.append(call)
        call()
        return 1.0

    monkeypatch.setattr(graphs, "Capture", Recorded)
    monkeypatch.setattr(Settings, "graph_problem", lambda settings, device: None)
    monkeypatch.setitem(profiling.WORKLOADS, "tiny", tiny(GradientPenalty()))
    monkeypatch.setattr(profiling, "setting", lambda workload, _, dtype: setting(workload, CPU, dtype))
    for name, value in (("CALLS", 1), ("HOST_CALLS", 1), ("SAMPLES", 1), ("_events", lambda *_: [])):
        monkeypatch.setattr(profiling, name, value)
    for name, value in (("time_of", time_of), ("host_time", time_of), ("wait", lambda _: None)):
        monkeypatch.setattr(profiling.timing, name, value)
    result = profiling.workload("tiny", SimpleNamespace(type="cuda"))
    replays = {"replay_ms", "replay_host_ms", "iteration_replay_ms", "iteration_replay_host_ms"}
    assert replays <= result["graph"].keys()
    assert not replays & result["eager"].keys()
    of_step, also_of_step, of_iteration, also_of_iteration = (call.__self__ for call in timed[-4:])
    assert of_step is also_of_step is not of_iteration is also_of_iteration
    assert isinstance(of_step, Recording)
    assert isinstance(of_iteration, Recording)
    assert len(of_iteration._tape) > 4 * len(of_step._tape)


def test_a_step_that_was_not_captured_is_no_figure():
    trainer = SimpleNamespace(
        _steps=SimpleNamespace(graphs=SimpleNamespace(_graphs={}), _critic_step=gpu.main, _iteration=gpu.main)
    )
    with pytest.raises(RuntimeError, match="^main: expected a graph"):
        profiling.replayed(trainer, CPU)


def test_each_way_of_a_networks_products_is_timed_and_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr(profiling, "SAMPLES", 1)
    record = profiling.run((), CPU, tmp_path / "profile.json")
    assert record == json.loads((tmp_path / "profile.json").read_text())
    assert record["left_out"] == []
    assert [row["shape"] for row in record["network_products"]] == [
        [64, 100, 128], [64, 128, 256], [64, 256, 512], [64, 512, 1024], [64, 1024, 784],
        [192, 784, 512], [192, 512, 256], [192, 256, 1],
    ]  # fmt: skip
    assert all(len(row["us"]) == 8 for row in record["network_products"])
    before = torch.backends.cuda.matmul.allow_tf32
    with profiling.products_by(tf32=not before):
        assert torch.backends.cuda.matmul.allow_tf32 != before
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize(
    ("log", "status", "expected"),
    [
        ("== 5 passed in 1.00s ==", 0, "ok"),
        ("== 2 failed, 5 passed in 1.00s ==", 1, "status 1"),
        ("== 2 failed, 5 passed in 1.00s ==", 124, "cut short, with failures"),
        ("== 5 passed in 1.00s ==", 124, "cut short"),
        ("racecheck: ......... [ 20%]", 124, "cut short, no result"),
        ("ERROR: no such option", 4, "DID NOT START (status 4): ERROR: no such option"),
        ("", 1, "DID NOT START (status 1): no output"),
    ],
)
def test_how_a_part_ended(log, status, expected, tmp_path):
    (tmp_path / "tests.log").write_text(log)
    assert gpu.outcome("tests", status, tmp_path) == expected


def test_what_fails_in_a_profile_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profiling, "workload", lambda *_: 1 / 0)
    monkeypatch.setattr(profiling, "network_products", lambda *_: [])
    assert profiling.main(["--out", str(tmp_path), "--workloads", "mlp-clip"]) == 1
    assert "left out: mlp-clip: ZeroDivisionError" in capsys.readouterr().out
    assert gpu.outcome("profile", 0, tmp_path) == "no result"
    assert gpu.outcome("profile", 1, tmp_path).startswith("DID NOT START")


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
    monkeypatch.setattr(ops, "copy_bandwidth", lambda device: 10.0)
    assert tune.main(["--out", str(tmp_path), "--kernels", "scores"]) == 0
    out = capsys.readouterr().out
    assert "BLOCK 1024, 8 warps  <- present" in out
    assert "failed: {'BLOCK': 1000}, 4 warps: " in out
    (result,) = json.loads((tmp_path / "gpu-tune.json").read_text())["sweeps"]
    assert len(result["settings"]) == 2
    with pytest.raises(ValueError, match="of the largest value away"):
        tune.measured(Case("scores", 100), [torch.ones(())] * 4, CPU)
    assert tune.sweep_through("scores", CPU, 10.0, 0.0)["left_out"] == 2
