"""The stand-in for CUDA graphs: what it records, what it leaves behind, and what it refuses."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastwgan
from fastwgan.constraints import GradientPenalty
from fastwgan.kernels import arrival, table
from fastwgan.ops.penalty import penalty_cotangent

pytestmark = pytest.mark.emulated


@pytest.fixture
def recording():
    from fake_cuda_graph import Recording

    return Recording


def bits(x):
    return x.detach().clone().contiguous().view(-1).view(torch.uint8)


def assert_same_bits(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(bits(a), bits(e))


def captured(graph, work):
    result = graph.capture(work)
    table.fill_pending()
    return result


def test_ops_run_again_on_the_same_memory_and_python_does_not(recording):
    x, total, factor, calls = torch.ones(3), torch.zeros(3), [2.0], []

    def work():
        calls.append(arrival.capturing(x.device) and table.capturing(x.device))
        y = (x * factor[0]).view(3, 1)
        total.add_(y[:, 0])
        return y

    graph = recording()
    y = graph.capture(work)
    assert total.tolist() == [0, 0, 0]
    assert y.isnan().all(), "a result is garbage until the first replay"
    assert not arrival.capturing(x.device)
    address, factor[0] = y.data_ptr(), 100.0
    for n in (1, 2):
        x.fill_(n)
        graph.replay()
        assert y.tolist() == [[2 * n]] * 3
    assert y.data_ptr() == address
    assert total.tolist() == [6, 6, 6]
    assert calls == [True]


def test_what_an_argument_becomes_later_does_not_matter(recording):
    """A graph knows addresses: neither new data nor a new shape of a tensor reaches it."""
    x = torch.ones(2, 3)
    old = x.data
    graph = recording()
    y = graph.capture(lambda: x.t() + 1)
    x.data = torch.full((5,), 7.0)
    graph.replay()
    assert y.tolist() == (old.t() + 1).tolist()
    versions = old._version
    sums = recording()
    sums.capture(lambda: old.add_(1))
    version = old._version
    sums.replay()
    assert old._version == version > versions, "a replay is no news to autograd"


def test_memory_that_was_freed_is_not_touched(recording):
    graphs = recording(), recording()
    inputs = [torch.ones(3), torch.ones(3)]
    for graph, x in zip(graphs, inputs, strict=True):
        graph.capture(lambda x=x: (x.view(3) * 2).sum())
    del x, inputs[0]
    with pytest.raises(RuntimeError, match="^replay: .* freed"):
        graphs[0].replay()
    graphs[1].replay()


def test_uninitialised_memory_is_garbage_at_every_replay(recording):
    x = torch.ones(3)

    def work():
        a, b, c = torch.empty(3), torch.empty_like(x), x.new_empty(3, dtype=torch.int64)
        a.copy_(x)
        return a, b + 1, c, torch.zeros(2) + 1

    graph = recording()
    a, b, c, d = graph.capture(work)
    for tensor in (a, b, d):
        assert tensor.isnan().all()
    for _ in range(2):
        b.zero_()
        c.zero_()
        graph.replay()
        assert a.tolist() == [1, 1, 1]
        assert b.isnan().all()
        assert c.abs().min() > 2**62
        assert d.tolist() == [1, 1]


def test_kernels_are_launched_at_replays_alone(recording):
    x = torch.randn(5, 300)

    def work():
        return penalty_cotangent(x, "two-sided", 1.0, 10.0, "triton")

    graph = recording()
    out = captured(graph, work)
    assert all(y.isnan().all() for y in out)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert_same_bits(out, work())


@pytest.mark.parametrize("name", ["RMSprop", "Adam"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_replays_of_an_update_are_steps(name, backend, recording):
    """The address tables of the capture's own are filled between: no kernel reads them before."""
    runs = []
    for graphed in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(n)) for n in (1, 700, 5000)]
        grads = [torch.zeros_like(p) for p in params]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        optimizer = getattr(fastwgan, name)(params, lr=1e-2, clip=0.5, backend=backend)
        optimizer.step()
        grads = [torch.zeros_like(p) for p in params]  # elsewhere, as a captured backward pass has them
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        graph = recording()
        if graphed:
            before = [x.clone() for x in (*params, *(x for s in optimizer.state.values() for x in s.values()))]
            graph.capture(optimizer.step)
            assert_same_bits([*params, *(x for s in optimizer.state.values() for x in s.values())], before)
            assert bool(table._pending) == (backend == "triton")
            table.fill_pending()
        for _ in range(4):
            for grad in grads:
                grad.normal_()
            graph.replay() if graphed else optimizer.step()
        runs.append([*params, *(x for s in optimizer.state.values() for x in s.values()), optimizer.saturation])
    assert_same_bits(*runs)


def test_double_backward_replays_on_new_data(recording):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    static = torch.randn(6, 4)

    def work():
        net.zero_grad()
        x = static.clone().requires_grad_()
        scores = net(x)
        (gradient,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        (scores.mean() + gradient.square().sum(1).mean()).backward()
        return (scores, gradient, *(p.grad for p in net.parameters()))

    graph = recording()
    out = graph.capture(work)
    assert all(y.isnan().all() for y in out)
    for _ in range(3):
        static.copy_(torch.randn(6, 4))
        graph.replay()
        replayed = [y.detach().clone() for y in out]
        assert_same_bits(replayed, work())


def test_random_numbers_go_on_as_without_a_graph(recording):
    own, x = torch.Generator().manual_seed(1), torch.ones(40)

    def work():
        return F.dropout(x, 0.5), torch.randn(3, generator=own), torch.empty(3).normal_(generator=own)

    expected = [work() for _ in range(3)]
    own.manual_seed(1)
    torch.manual_seed(0)
    graph = recording([own])
    out = graph.capture(work)
    for numbers in expected:
        graph.replay()
        assert_same_bits(out, numbers)
    with pytest.raises(RuntimeError, match="^randn: .* generator that is not registered"):
        recording().capture(work)


def test_batch_norm_counts_and_averages_at_replays(recording):
    """Its op changes running averages though its schema does not say so."""
    runs = []
    for graphed in (False, True):
        torch.manual_seed(0)
        net, x = nn.BatchNorm1d(3), torch.zeros(8, 3)
        graph = recording()
        if graphed:
            graph.capture(partial(net, x))
        assert net.running_var.tolist() == [1, 1, 1]
        for _ in range(3):
            x.normal_()
            graph.replay() if graphed else net(x)
        runs.append(list(net.buffers()))
    assert_same_bits(*runs)


REFUSED = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "equal": lambda x: torch.equal(x, x),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "repr": lambda x: f"{x}",
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "setting by a mask": lambda x: x.__setitem__(x > 0, x + 1),
    "numbers to the device": lambda x: torch.tensor([1.0], device=x.device),
    "a host tensor": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_do_raises_and_leaves_all_as_it_was(name, recording):
    x, own = torch.ones(3), torch.Generator()
    states = own.get_state(), torch.get_rng_state()

    def work():
        x.add_(torch.rand(3, generator=own) + torch.rand(3))
        REFUSED[name](x)

    graph = recording([own])
    with pytest.raises(RuntimeError, match="a capture cannot"):
        graph.capture(work)
    assert x.tolist() == [1, 1, 1]
    assert_same_bits((own.get_state(), torch.get_rng_state()), states)
    assert not arrival.capturing(x.device)
    assert not table.capturing(x.device)
    with pytest.raises(RuntimeError, match="^replay:"):
        graph.replay()
    with pytest.raises(RuntimeError, match="^capture:"):
        graph.capture(work)


def test_the_hosts_numbers_can_be_read_and_are_frozen(recording):
    x, labels, numbers = torch.ones(3), torch.tensor([0, 2]), []

    def work():
        number = torch.tensor(2.0)
        numbers.append(number)
        assert number.item() == torch.arange(3, device="cpu").tolist()[2] == 2
        y = x.clone()
        y[x < 0] = 5.0
        y[1:] = 4.0
        return y * number, x[labels]

    graph = recording()
    y, indexed = graph.capture(work)
    numbers[0].fill_(100)
    graph.replay()
    assert y.tolist() == [2, 8, 8]
    assert indexed.tolist() == [1, 1]


def test_a_critic_step_replays(recording):
    """One whose numbers are all on the device. The place in the stream of eps is not: Python counts it."""
    runs = []
    for graphed in (False, True):
        torch.manual_seed(0)
        trainer = fastwgan.Trainer(
            nn.Linear(2, 3),
            nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)),
            latent=2,
            constraint=GradientPenalty(at="real"),
            backend="triton",
        )
        trainer._steps.critic.guard.watch = lambda *_: None  # which looks at no tally while a GPU captures
        real = torch.randn(4, 3)
        for _ in range(3):
            trainer.critic_step(real)
        graph = recording([trainer._steps.latents.stream])
        if graphed:
            metrics = captured(graph, partial(trainer.critic_step, real))
        for _ in range(3):
            real.normal_()
            if graphed:
                graph.replay()
            else:
                metrics = trainer.critic_step(real)
        runs.append([*trainer.critic.parameters(), metrics.critic_loss, metrics.gradient_norm])
    assert_same_bits(*runs)
