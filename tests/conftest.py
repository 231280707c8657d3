"""Without a GPU, kernels run in Triton's interpreter; that is decided when they are defined, so before any import."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine or this run is not for."""
    slow = pytest.mark.skip(reason="slow: run with -m slow")
    gpu = pytest.mark.skip(reason="gpu: no CUDA GPU here")
    interpreted = pytest.mark.skip(reason="the interpreter runs where there is no GPU; here the kernels are compiled")
    for item in items:
        if "slow" in item.keywords and "slow" not in config.getoption("-m"):
            item.add_marker(slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(gpu)
        if "interpreted" in item.keywords and torch.cuda.is_available():
            item.add_marker(interpreted)


@pytest.fixture(
    params=[pytest.param("cpu", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where Triton kernels run: the CPU by the interpreter, or a GPU."""
    return torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
