"""What only a GPU can show: launches as the profiler counts them, and steps that never wait for the device."""

import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from cases import OPS, WORKLOADS
from torch import nn

import fastwgan
from fastwgan import Trainer, functional
from fastwgan.trainer import PROBED_STEPS

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


def kernels_of(call):
    """The names of the device kernels that a call launches, copies among them."""
    call()  # compiles, and makes counters and tables
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("op", OPS)
def test_each_op_is_one_launch(op):
    inputs = [torch.randn(300, 7, device=DEVICE) for _ in range(OPS[op].tensors)]
    names = kernels_of(lambda: OPS[op].fused(*inputs))
    kernel = "penalty" if "penalty" in op else "interpolate" if op == "interpolate" else "scores"
    assert names == [f"_{kernel}_kernel"]


def test_each_launch_of_a_critic_step_is_one():
    """As the trainer makes them, and the penalty where its cotangent is wanted."""
    x = torch.randn(300, 7, device=DEVICE)
    leaf = x.clone().requires_grad_()
    for kernel, call in (
        ("penalty", lambda: functional.penalty(leaf, backend="triton")),
        ("penalty", lambda: functional.penalty_cotangent(x, "two-sided", 1.0, 10.0, "triton")),
        ("scores", lambda: functional.score_statistics(x, x, "triton")),
    ):
        assert kernels_of(call) == [f"_{kernel}_kernel"]


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "clip_weights_"])
def test_each_update_is_one_launch(name):
    params = [nn.Parameter(torch.randn(1 + 50 * i, device=DEVICE)) for i in range(100)]
    for p in params:
        p.grad = torch.randn_like(p)
    if name == "clip_weights_":
        names = kernels_of(lambda: functional.clip_weights_(params, 0.1, backend="triton"))
    else:
        names = kernels_of(getattr(fastwgan, name)(params, clip=0.1, backend="triton").step)
    assert names == ["_update_kernel"]


@contextmanager
def no_synchronisation():
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode")  # that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", WORKLOADS)
def test_steps_do_not_wait_for_the_device(name):
    workload = WORKLOADS[name]
    generator, critic = workload.generator(8).to(DEVICE), workload.critic(8).to(DEVICE)
    trainer = Trainer(generator, critic, latent=workload.latent, constraint=workload.constraint, n_critic=2)
    real = torch.randn(8, *workload.shape, device=DEVICE)
    for _ in range(2 * PROBED_STEPS):
        trainer.step(real)
    torch.cuda.synchronize()
    with no_synchronisation():
        trainer.critic_step(real)
        trainer.generator_step(8)
        for _ in range(4):
            metrics = trainer.step(real)
    assert all(map(math.isfinite, metrics.as_dict().values()))
