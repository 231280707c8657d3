"""The same bits every time: over repeated launches, whatever order programs run in, and replayed."""

import itertools
import random

import pytest
import torch
from cases import DTYPES, OPS

import fastwgan
from fastwgan import functional
from fastwgan.backend import kernels
from fastwgan.ops.penalty import penalty_cotangent
from fastwgan.ops.weights import project_and_count_

CPU = torch.device("cpu")


def penalised(x):
    return penalty_cotangent(x, "two-sided", 1.0, 10.0, "triton")


def results(op, shape, dtype, device):
    """A function of no arguments that launches anew and gives all that comes out."""
    inputs = [torch.randn(shape, device=device).to(dtype) for _ in range(OPS[op].tensors)]

    def launch():
        out = OPS[op].fused(*inputs)
        out = (out,) if isinstance(out, torch.Tensor) else tuple(out)
        return (*out, *penalised(inputs[0])) if "penalty" in op else out

    return launch


def updates(name, device, dtype=torch.float32):
    """A function that makes the same parameters anew, steps them, and gives weights, state and saturation."""

    def launch():
        torch.manual_seed(3)
        params = [torch.nn.Parameter(torch.randn(n, device=device).to(dtype)) for n in (1, 700, 5000, 3, 2048)]
        optimizer = getattr(fastwgan, name)(params, clip=0.5, backend="triton")
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        states = [x for p in params for x in optimizer.state[p].values()]
        return (*params, *states, optimizer.saturation)

    return launch


def projection(per, device):
    """A function that makes the same tensors anew, projects them, and gives them and the share on the bound."""

    def launch():
        torch.manual_seed(3)
        params = [torch.randn(shape, device=device) for shape in ((700,), (9, 300), (3, 8200), (5, 7))]
        share, _ = project_and_count_(params, 16.0, per, "triton")
        return (*params, share)

    return launch


def clipping(device):
    """A function that looks at the same gradients, to be clipped, and gives what the gate says and the statistics."""
    torch.manual_seed(3)
    launcher, scores = kernels.guard.Guard(), [torch.randn(700, device=device) for _ in range(2)]
    gradients = [torch.randn(n, device=device) for n in (1, 700, 9000, 3, 2048)]

    def launch():
        tally = torch.zeros(kernels.guard.TALLY, dtype=torch.int64, device=device)
        gate = torch.zeros(2, dtype=torch.float64, device=device)
        return launcher.launch(gradients, tuple(scores), tally, gate, None, 0.5), gate

    return launch


def assert_same_bits(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(
            a.detach().contiguous().view(-1).view(torch.uint8), e.detach().contiguous().view(-1).view(torch.uint8)
        )


LAUNCHES = {
    **{op: lambda device, op=op: results(op, (37, 301), torch.float32, device) for op in OPS},
    "penalty of two reads": lambda device: results("penalty two-sided", (5, 16385), torch.float32, device),
    "scores in bfloat16": lambda device: results("critic_loss", (11_000,), torch.bfloat16, device),
    "projection of rows": lambda device: projection("row", device),
    "projection of tensors": lambda device: projection("tensor", device),
    "norm to clip by": clipping,
    "RMSprop": lambda device: updates("RMSprop", device),
    "Adam": lambda device: updates("Adam", device),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_repeated_launches_give_the_same_bits(name, device):
    launch = LAUNCHES[name](device)
    expected = launch()
    for _ in range(3 if device.type == "cpu" else 50):
        assert_same_bits(launch(), expected)


@pytest.mark.emulated
@pytest.mark.parametrize("name", LAUNCHES)
def test_the_order_of_programs_does_not_matter(name):
    """Backwards, and shuffled: reductions do not depend on who comes last, nor programs on each other."""
    import poisoned_interpreter

    launch = LAUNCHES[name](CPU)
    expected = launch()

    def shuffled(i, n):
        return random.Random(n).sample(range(n), n)[i]

    for order in (lambda i, n: n - 1 - i, shuffled):
        with poisoned_interpreter.program_order(order):
            assert_same_bits(launch(), expected)


@pytest.mark.emulated
@pytest.mark.parametrize("name", LAUNCHES)
def test_counters_are_zero_between_launches(name):
    """So a launch can be replayed: nothing on the host resets them."""
    launch = LAUNCHES[name](CPU)
    for _ in range(2):
        launch()
        assert kernels.arrival._zeros, "no launch has counted"
        assert all(counter.item() == 0 for counter in kernels.arrival._zeros.values() if not counter.is_meta)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n in LAUNCHES if not n.startswith(("RMSprop", "Adam", "projection"))])
def test_graph_replays_give_the_same_bits(name):
    device = torch.device("cuda", 0)
    launch = LAUNCHES[name](device)
    expected = launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch()
    kernels.table.fill_pending()
    for _ in range(10):
        for x in captured:
            x.detach().fill_(float("nan"))
        graph.replay()
        assert_same_bits(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["RMSprop", "Adam"])
def test_graph_replays_of_an_update_are_steps(name):
    """Captured once and replayed: state, step count, clamp and saturation go on as in eager steps."""
    device = torch.device("cuda", 0)
    runs = []
    for graphed in (False, True):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, device=device)) for n in (1, 700, 5000)]
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer = getattr(fastwgan, name)(params, clip=0.5, backend="triton")
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if graphed:
            with torch.cuda.graph(graph):
                optimizer.step()
            kernels.table.fill_pending()
        for _ in range(5):
            for p in params:
                p.grad.normal_()
            graph.replay() if graphed else optimizer.step()
        runs.append([*params, *(x for p in params for x in optimizer.state[p].values()), optimizer.saturation])
    assert_same_bits(*runs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_sizes_do_not_change_eps(dtype, device, monkeypatch):
    """A sample's number depends on seed and index alone; known answers stand in test_functional.py."""
    real = torch.ones(5, 3000, dtype=dtype, device=device)
    eps = []
    for block, offset in itertools.product((256, 2048), (0, 2**40)):
        monkeypatch.setattr(kernels.interpolate, "BLOCK", block)
        eps.append(functional.interpolate(real, torch.zeros_like(real), seed=5, offset=offset, backend="triton"))
    assert torch.equal(eps[0], eps[2])
    assert torch.equal(eps[1], eps[3])
    assert not torch.equal(eps[0], eps[1])
