"""fastwgan info: versions, devices, and which backend each op uses there and why."""

import argparse
import platform

import torch

from fastwgan import functional
from fastwgan.backend import triton_problem
from fastwgan.version import __version__

SHARED_PASSES = """
real and fake samples in a critic step
  share one pass of a critic whose layers are known to keep samples apart, as those of fastwgan train do
  have a pass each of any other, such as a class of your own, or one with BatchNorm or conditions;
  repr(trainer) says which, and Trainer(independent_samples=True) is your word that they may share one:
  on a CPU 1.05 times as fast under weight clipping, no faster under the penalty; on a GPU not measured"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add none."""


def _version(module: str) -> str:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return "not installed"


def run(args: argparse.Namespace) -> int:
    print(f"fastwgan {__version__}")
    print(f"python   {platform.python_version()} on {platform.platform()}")
    for module in ("torch", "triton", "numpy"):
        print(f"{module:<8} {_version(module)}")
    ops = [name for name in functional.__all__ if not name.startswith("gradient")]
    for device in (torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))):
        title = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
        problem = triton_problem(device)
        backend, why = "triton", "it can run here" + (", interpreted" if device.type == "cpu" else "")
        if problem is not None:
            backend, why = "torch", problem
        print(f"\n{device}: {title}")
        for op in (*ops, "gradient_penalty", "RMSprop.step", "Adam.step"):
            print(f"  {op:<20} {backend}")
        print(f"  {backend}, because {why}")
    print(SHARED_PASSES)
    return 0
