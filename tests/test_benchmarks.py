"""The commands in benchmarks/ that want a GPU, as far as a CPU can show them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import gpu

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
    assert asked[0][1] < 600 * 4 / 23 + 1
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
    assert set(files[: len(gpu.FIRST)]) == set(gpu.FIRST)
