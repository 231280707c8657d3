"""pytest benchmarks: whole critic steps, by pytest-benchmark. The same steps as python -m benchmarks steps."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import steps, timing
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.run import default_workloads
from benchmarks.workloads import WORKLOADS

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.mark.filterwarnings("default")  # a compiler's are not about what is timed
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("workload", default_workloads(DEVICE))
def test_critic_step(workload: str, implementation: str, benchmark: BenchmarkFixture) -> None:
    torch.compiler.reset()
    try:
        step = IMPLEMENTATIONS[implementation](steps.setting(WORKLOADS[workload], DEVICE, torch.float32))
    except (NotImplementedError, RuntimeError, ValueError) as error:
        pytest.skip(f"{implementation}: {error}")
    for _ in range(steps.CHECKED_STEPS):
        step.take()
    benchmark.group = workload

    def take() -> None:
        step.take()
        timing.wait(DEVICE)

    benchmark(take)
