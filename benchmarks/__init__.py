"""Benchmarks. They time what the tests check: the cases are the same."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
