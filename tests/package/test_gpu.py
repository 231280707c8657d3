"""What only a GPU can show: launches as the profiler counts them, and steps that never wait for the device."""

import math
import warnings
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from cases import OPS, WORKLOADS
from torch import nn

import fastwgan
from benchmarks.implementations import textbook_critic_step
from fastwgan import Trainer, functional
from fastwgan.engine import structure
from fastwgan.engine.graphs import WARM_UP
from fastwgan.ops.penalty import penalty_cotangent
from fastwgan.ops.scores import score_statistics

pytestmark = pytest.mark.gpu
DEVICE, BACKEND = torch.device("cuda", 0), "nccl"
LEAST_BLOCK, SEGMENT = 512, 2**21  # bytes: of the smallest tensor, and of what small ones are taken from


def kernels_of(call):
    """The names of the device kernels that a call launches, copies among them."""
    call()  # compiles, and makes counters and tables
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:  # or PyTorch 2.11 warns
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("op", OPS)
def test_each_op_is_one_launch(op):
    inputs = [torch.randn(300, 7, device=DEVICE) for _ in range(OPS[op].tensors)]
    names = kernels_of(lambda: OPS[op].fused(*inputs))
    kernel = op.split()[0]
    assert names == [f"_{'scores' if kernel.endswith('_loss') else kernel}_kernel"]


def test_each_launch_of_a_critic_step_is_one():
    """As the trainer makes them, and the penalty where its cotangent is wanted."""
    x = torch.randn(300, 7, device=DEVICE)
    leaf = x.clone().requires_grad_()
    for kernel, call in (
        ("penalty", lambda: functional.penalty(leaf, backend="triton")),
        ("penalty", lambda: penalty_cotangent(x, "two-sided", 1.0, 10.0, "triton")),
        ("scores", lambda: score_statistics(x, x, "triton")),
    ):
        assert kernels_of(call) == [f"_{kernel}_kernel"]


@pytest.mark.parametrize("name", ["RMSprop", "Adam", "clip_weights_", "clip_norms_"])
def test_each_update_is_one_launch(name):
    params = [nn.Parameter(torch.randn(1 + 50 * i, device=DEVICE)) for i in range(100)]
    for p in params:
        p.grad = torch.randn_like(p)
    if name.startswith("clip"):
        names = kernels_of(lambda: getattr(functional, name)(params, 0.1, backend="triton"))
    else:
        names = kernels_of(getattr(fastwgan, name)(params, clip=0.1, backend="triton").step)
    assert names == ["_project_kernel" if name == "clip_norms_" else "_update_kernel"]


@contextmanager
def no_synchronisation():
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Synchronization debug mode")  # that it is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["eager", "graphed"])
@pytest.mark.parametrize("max_norm", [None, 0.01], ids=["", "clipped"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_steps_do_not_wait_for_the_device(name, max_norm, cuda_graph):
    workload = WORKLOADS[name]
    generator, critic = workload.generator(8).to(DEVICE), workload.critic(8).to(DEVICE)
    trainer = Trainer(
        generator, critic, latent=workload.latent, constraint=workload.constraint, n_critic=2, cuda_graph=cuda_graph,
        max_norm=max_norm,
    )  # fmt: skip
    real = torch.randn(8, *workload.shape, device=DEVICE)
    for _ in range(2 * (WARM_UP + 2)):  # what compiles or captures may wait
        trainer.step(real)
    torch.cuda.synchronize()
    with no_synchronisation():
        trainer.critic_step(real)
        trainer.generator_step(8)
        for _ in range(4):
            metrics = trainer.step(real)
    assert all(map(math.isfinite, metrics.as_dict().values()))


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["eager", "graphed"])
@pytest.mark.parametrize("name", ["mlp-clip", "mlp-penalty"])
def test_steps_take_no_more_memory_as_they_go_on(name, cuda_graph):
    workload = WORKLOADS[name]
    networks = workload.generator(8).to(DEVICE), workload.critic(8).to(DEVICE)
    trainer = Trainer(*networks, latent=100, constraint=workload.constraint, n_critic=2, cuda_graph=cuda_graph)
    real = torch.randn(8, *workload.shape, device=DEVICE)
    for _ in range(4 * (WARM_UP + 2)):
        trainer.step(real)
    used, reserved, steps = torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), 200
    for _ in range(steps):
        trainer.step(real)
    # A table for gradients at new addresses now and then, of which there are a few at most; never something each step.
    assert torch.cuda.memory_allocated() - used < LEAST_BLOCK * steps / 2
    assert torch.cuda.memory_reserved() - reserved <= SEGMENT


def test_training_goes_on_after_a_capture_that_fails(monkeypatch):
    """The call is one that a capture forbids and that waits for nothing, so that the warm-up does not notice it."""

    class Asks(nn.Linear):
        def forward(self, x):
            torch.cuda.current_stream().query()
            return super().forward(x)

    monkeypatch.setattr(structure, "foreign", lambda module: None)  # which says that nobody knows what Asks does
    runs = []
    for cuda_graph in (False, "auto"):
        torch.manual_seed(0)
        networks = nn.Linear(4, 10).to(DEVICE), nn.Sequential(nn.Linear(10, 8), nn.Dropout(), Asks(8, 1)).to(DEVICE)
        trainer = Trainer(*networks, latent=4, n_critic=1000, cuda_graph=cuda_graph)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for i in range(10):
                torch.manual_seed(i)
                trainer.step(torch.randn(8, 10, device=DEVICE))
        runs.append(nn.utils.parameters_to_vector(trainer.critic.parameters()).detach())
        assert [1 for w in caught if "its capture failed" in str(w.message)] == ([1] if cuda_graph else [])
        torch.cuda.empty_cache()  # raises where the allocator takes the capture for going on
    torch.testing.assert_close(*runs)


def test_the_graphs_of_earlier_steps_may_live_on():
    """A network may keep what it has made in its first steps; nodes of another stream would warn of that."""
    runs = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        networks = nn.Linear(4, 10).to(DEVICE), nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1)).to(DEVICE)
        trainer = Trainer(*networks, latent=4, n_critic=1, cuda_graph=cuda_graph)
        kept = []
        for network in networks:
            network.register_forward_hook(lambda m, args, output, kept=kept: kept.append(output))
        for i in range(10):
            torch.manual_seed(i)
            trainer.step(torch.randn(8, 10, device=DEVICE))
        assert any(output.requires_grad for output in kept)
        runs.append(nn.utils.parameters_to_vector(trainer.critic.parameters()).detach())
    torch.testing.assert_close(*runs)


@pytest.mark.filterwarnings("default")  # a compiler's, as of TF32 that is off
@pytest.mark.parametrize("name", [name for name in WORKLOADS if name.startswith(("mlp", "dcgan"))])
def test_compiled_and_graphed_steps_are_the_eager_ones(name):
    workload = WORKLOADS[name]
    runs = []
    for options in ({"cuda_graph": False}, {"cuda_graph": True, "compile": True}):
        torch.manual_seed(0)
        networks = workload.generator(8).to(DEVICE), workload.critic(8).to(DEVICE)
        trainer = Trainer(*networks, latent=workload.latent, constraint=workload.constraint, n_critic=1, **options)
        before = nn.utils.parameters_to_vector(trainer.critic.parameters()).detach()
        for i in range(WARM_UP + 5):
            torch.manual_seed(i)
            trainer.step(torch.rand(8, *workload.shape, device=DEVICE))
        runs.append(nn.utils.parameters_to_vector(trainer.critic.parameters()).detach())
    # An optimizer turns the rounding of a gradient that is all but zero into a step of full length.
    assert (runs[1] - runs[0]).norm() <= 0.05 * (runs[0] - before).norm()


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_more_memory_than_the_textbooks(name):
    """As PyTorch's allocator counts it, at the peak of a critic step."""
    workload = WORKLOADS[name]
    clip = getattr(workload.constraint, "bound", None)
    real = torch.rand(8, *workload.shape, device=DEVICE)

    def peak(step, critic):
        for _ in range(2):
            step()
        for p in critic.parameters():
            p.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    generator, critic = workload.generator(8).to(DEVICE), workload.critic(8).to(DEVICE)
    optimizer = torch.optim.RMSprop(critic.parameters(), foreach=False)
    options = {"penalty_weight": 10.0} if clip is None else {"clip": clip}

    def textbook():
        z = torch.randn(8, workload.latent, device=DEVICE)
        textbook_critic_step(generator, critic, optimizer, real, z, **options)

    allowed = peak(textbook, critic)
    trainer = Trainer(generator, critic, latent=workload.latent, constraint=workload.constraint, cuda_graph=False)
    assert peak(lambda: trainer.critic_step(real), critic) <= allowed + 2**16  # statistics, counters and tables


class Several(int):
    """One process that takes itself for several, and so asks the others, of whom there are none."""

    __hash__ = int.__hash__

    def __eq__(self, other):
        return False

    def __gt__(self, other):
        return True


@pytest.fixture
def nccl(tmp_path):
    options = {"device_id": DEVICE} if DEVICE.type == "cuda" else {}
    dist.init_process_group(BACKEND, init_method=f"file://{tmp_path}/store", rank=0, world_size=1, **options)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("cuda_graph", [False, True], ids=["eager", "graphed"])
@pytest.mark.parametrize("name", ["mlp-clip", "mlp-penalty"])
def test_one_rank_over_nccl(name, cuda_graph, nccl, monkeypatch):
    """Weights, settings and gradients go round, the latter inside a captured step, and come back as they were."""
    workload, runs, place = WORKLOADS[name], [], (0, Several(1))
    for ranks in (False, True):
        if ranks:
            monkeypatch.setattr("fastwgan.engine.ranks._place", lambda: place)
        torch.manual_seed(0)
        networks = workload.generator(8).to(DEVICE), workload.critic(8).to(DEVICE)
        trainer = Trainer(*networks, latent=100, constraint=workload.constraint, n_critic=2, cuda_graph=cuda_graph)
        before = nn.utils.parameters_to_vector(trainer.critic.parameters()).detach()
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            metrics = [trainer.step(torch.rand(8, 784, device=DEVICE)) for _ in range(14)]
        assert all_reduce.called == ranks
        runs.append(nn.utils.parameters_to_vector(trainer.critic.parameters()).detach())
    assert metrics[-1].wasserstein.isfinite()
    assert (runs[1] - runs[0]).norm() <= 1e-5 * (runs[0] - before).norm()
