"""The mutation check takes an hour (mutate.py); here, that its faults still apply and its table is theirs."""

import ast
import re

import pytest
from mutate import FAULTS, ROOT, TABLE, plant, source


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.what}")
def test_faults_can_be_planted(fault, tmp_path):
    (tmp_path / "kernels").mkdir()
    plant(fault, tmp_path)
    text = (tmp_path / source(fault)).read_text()
    ast.parse(text)
    assert text != (ROOT / source(fault)).read_text()


def test_the_table_has_every_fault_caught():
    rows = re.findall(r"^\| \d+ \| (\w+) \| (.+?) \| `(\w+/test_\S.*?)` \|$", TABLE.read_text(), re.MULTILINE)
    assert [(file, what) for file, what, _ in rows] == [(fault.file, fault.what) for fault in FAULTS]
    assert {fault.file for fault in FAULTS} >= {path.stem for path in (ROOT / "kernels").glob("[a-z]*.py")}
