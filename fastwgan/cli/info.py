"""fastwgan info: versions, devices, and which backend each op uses there and why."""

import argparse
import platform
from importlib.util import find_spec

import torch

from fastwgan import functional
from fastwgan.backend import triton_problem
from fastwgan.cli.common import Options
from fastwgan.version import __version__

OPTIONS: Options = {}
SHARED_PASSES = """
real and fake samples in a critic step
  share one pass of a critic whose layers are known to keep samples apart, as those of fastwgan train do
  have a pass each of any other, such as a class of your own, or one with BatchNorm or conditions;
  repr(trainer) says which, and Trainer(independent_samples=True) is your word that they may share one

the critic's gradients
  take no second backward pass, with a penalty or without, where its layers are known to be piecewise linear:
  Linear, convolutions, ReLU and leaky ReLU, average pooling, Flatten, Dropout;
  take one for the penalty of any other critic, in mixed precision, for packs, and with compile=True;
  repr(trainer) says which, and why"""


def run(args: argparse.Namespace) -> int:
    print(f"fastwgan {__version__}\npython   {platform.python_version()} on {platform.platform()}")
    for module in ("torch", "triton", "numpy"):
        print(f"{module:<8} {__import__(module).__version__ if find_spec(module) else 'not installed'}")
    ops = [name for name in functional.__all__ if not name.startswith("gradient")]
    for device in (torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))):
        on_cpu, problem = device.type == "cpu", triton_problem(device)
        backend, why = ("torch", problem) if problem else ("triton", "it can run here" + ", interpreted" * on_cpu)
        print(f"\n{device}: {f'{torch.get_num_threads()} threads' if on_cpu else torch.cuda.get_device_name(device)}")
        for op in (*ops, "gradient_penalty", "RMSprop.step", "Adam.step"):
            print(f"  {op:<20} {backend}")
        print(f"  {backend}, because {why}")
    print(SHARED_PASSES)
    return 0
