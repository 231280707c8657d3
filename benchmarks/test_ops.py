"""pytest benchmarks: each op by itself, by pytest-benchmark. The same cases as python -m benchmarks ops.

On a GPU a call is timed until the device is done, host included; python -m benchmarks ops has the device's time alone.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import ops, timing
from benchmarks.op_cases import OPS, Case

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CASES = [pytest.param(case, name, id=f"{case}, {name}") for case in ops.cases(DEVICE) for name in case.names]


@pytest.mark.filterwarnings("default")  # a compiler's are not about what is timed
@pytest.mark.parametrize(("case", "name"), CASES)
def test_op(case: Case, name: str, benchmark: BenchmarkFixture) -> None:
    torch.compiler.reset()
    if not ops.fits(case, DEVICE):
        pytest.skip("does not fit the GPU's memory")
    made = OPS[case.op].builders(case, DEVICE)[name]()
    made.take()
    benchmark.group = str(case)

    def take() -> None:
        made.take()
        timing.wait(DEVICE)

    benchmark(take)
