"""README's example runs as printed, and its table says what the tests enforce."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from count_launches import BUDGETS

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_example_runs_as_printed():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("import")]) <= 10
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = "import torch; torch.manual_seed(0)\n" + code
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert re.search(r"wasserstein=.* penalty=.* gradient_norm=", run.stdout)
    assert run.stderr == ""
    mean = [float(x) for x in re.search(r"tensor\(\[(.*?), (.*?)\]\)", run.stdout).groups()]
    assert mean == pytest.approx([3, 3], abs=0.3), "the data's"


def test_the_two_commands_are_there():
    assert "    pip install -e '.[train]' && fastwgan train\n" in README
    assert "    pip install -e '.[test]' && pytest -n logical\n" in README


def test_launch_table_is_the_enforced_one():
    rows = re.findall(r"^\| (?:MLP|DCGAN).*\| (\d+) \| (\d+) \|$", README, re.MULTILINE)
    assert [(int(textbook), int(lean)) for textbook, lean in rows] == list(BUDGETS.values())
