"""pytest benchmarks: whole critic steps, by pytest-benchmark. The same steps as fastwgan bench."""

import pytest
import torch

from fastwgan import bench, bench_run, timing
from fastwgan.baselines import IMPLEMENTATIONS
from fastwgan.workloads import WORKLOADS

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.mark.filterwarnings("default")  # a compiler's are not about what is timed
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("workload", bench_run.default_workloads(DEVICE))
def test_critic_step(workload, implementation, benchmark):
    torch.compiler.reset()
    try:
        step = IMPLEMENTATIONS[implementation](bench.setting(WORKLOADS[workload], DEVICE, torch.float32))
    except (NotImplementedError, RuntimeError, ValueError) as error:
        pytest.skip(f"{implementation}: {error}")
    for _ in range(bench.CHECKED_STEPS):
        step.take()
    benchmark.group = workload

    def take():
        step.take()
        timing.wait(DEVICE)

    benchmark(take)
