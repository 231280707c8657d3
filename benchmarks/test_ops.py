"""pytest benchmarks: each op by itself, by pytest-benchmark. The same cases as fastwgan bench --ops.

On a GPU a call is timed until the device is done, host included; fastwgan bench --ops has the device's time alone.
"""

import pytest
import torch

from fastwgan import bench_ops, timing

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
CASES = [pytest.param(case, name, id=f"{case}, {name}") for case in bench_ops.cases(DEVICE) for name in case.names]


@pytest.mark.filterwarnings("default")  # a compiler's are not about what is timed
@pytest.mark.parametrize(("case", "name"), CASES)
def test_op(case, name, benchmark):
    torch.compiler.reset()
    if not bench_ops.fits(case, DEVICE):
        pytest.skip("does not fit the GPU's memory")
    made = bench_ops.builders(case, DEVICE)[name]()
    made.take()
    benchmark.group = str(case)

    def take():
        made.take()
        timing.wait(DEVICE)

    benchmark(take)
