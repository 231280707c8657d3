"""The launches of layers: bias, rectifier and dropout in one; BatchNorm with its rectifier in one."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES
from tolerance import assert_close
from torch import nn

from fastwgan import models, reference
from fastwgan.backend import kernels
from fastwgan.engine.fused import _Norm, fused

SHAPES = [(1, 1), (3, 5), (192, 256), (7, 1025), (2049, 2)]
NAN, INF = torch.nan, torch.inf


def drawn(shape, dtype, device, kept=1.0):
    """Return (z, bias, factors, seeds, top)."""
    torch.manual_seed(sum(shape))
    z = torch.randn(shape, device=device).to(dtype)
    bias, top = (torch.randn(shape[1], device=device).to(dtype) for _ in range(2))
    factors = torch.empty_like(z).bernoulli_(kept).div_(kept or 1.0) if kept < 1 else None
    return z, bias, factors, torch.randn(shape[0], 1, device=device).to(dtype), top[None]


def by_reference(z, bias, factors, slope, seeds, top):
    """Return h and delta."""
    h = z + bias
    reference.activate_(h, factors, slope)
    return h, reference.slopes(seeds @ top, h, factors, slope)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("slope", "kept"), [(0.0, 1.0), (0.2, 1.0), (1.0, 0.5), (0.2, 0.7), (0.0, 0.0)])
def test_bias_rectifier_and_dropout(slope, kept, shape, dtype, device):
    z, bias, factors, seeds, top = drawn(shape, dtype, device, kept)
    h = z.clone()
    found = h, kernels.activation.activate_(h, bias, factors, slope, seeds, top)
    plain = by_reference(z, bias, factors, slope, seeds, top)
    z, bias, seeds, top = (x.cpu().double() for x in (z, bias, seeds, top))
    exact = by_reference(z, bias, None if factors is None else factors.cpu().double(), slope, seeds, top)
    sure = (z + bias).abs() > 4 * torch.finfo(dtype).eps * (z.abs() + bias.abs())  # a rounding decides others' slopes
    for name, *each in zip(("h", "delta"), found, plain, exact, strict=True):
        assert_close(f"{name} {shape} {dtype}", *(torch.where(sure.to(x.device), x, 0) for x in each))


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_infinities_and_nan_go_as_in_pytorch(slope, device):
    z = torch.tensor([[-INF, INF, NAN, -1.0, 0.0, 2.0]], device=device)
    x, ones = z.clone().requires_grad_(), torch.ones_like(z)
    y = F.relu(x) if slope == 0 else F.leaky_relu(x, slope)
    (expected,) = torch.autograd.grad(y, x, ones)
    h = z.clone()
    delta = kernels.activation.activate_(h, None, None, slope, ones[:, :1], ones)
    for given in (delta, reference.slopes(ones, h, None, slope)):
        torch.testing.assert_close(given, expected)
    torch.testing.assert_close(h, y.detach(), equal_nan=True)


def test_a_bias_and_a_last_layer_may_be_parts_of_others(device):
    z, bias, _, seeds, top = drawn((5, 70), torch.float32, device)
    expected = by_reference(z, bias, None, 0.2, seeds, top)
    bias, top = (torch.stack((x, x + 1), -1)[..., 0] for x in (bias, top))
    delta = kernels.activation.activate_(z, bias, None, 0.2, seeds, top)
    for a, b in zip((z, delta), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_without_seeds_there_is_no_delta(device):
    z, bias, *_ = drawn((5, 70), torch.float32, device)
    h = z.clone()
    assert kernels.activation.activate_(h, bias, None, 0.2) is None
    torch.testing.assert_close(h, F.leaky_relu(z + bias, 0.2))


def test_slopes_may_be_written_over_either_array():
    z, _, factors, *_ = drawn((5, 70), torch.float32, "cpu", 0.5)
    d = torch.randn_like(z)
    reference.activate_(z, factors, 0.2)
    expected = reference.slopes(d, z, factors, 0.2)
    for place in (0, 1):
        arrays = d.clone(), z.clone()
        assert reference.slopes(*arrays, factors, 0.2, arrays[place]) is arrays[place]
        assert torch.equal(arrays[place], expected)


# BatchNorm


FORMS = {  # options of BatchNorm1d, and whether it trains
    "training": ({}, True),
    "evaluation": ({}, False),
    "cumulative averages": ({"momentum": None}, True),
    "not affine": ({"affine": False}, True),
    "not affine, evaluation": ({"affine": False}, False),
    "no averages": ({"track_running_stats": False}, True),
    "no averages, evaluation": ({"track_running_stats": False}, False),
    "another momentum and eps": ({"momentum": 0.37, "eps": 0.01}, True),
}


def normed(form, columns, dtype, device="cpu"):
    """Return a BatchNorm whose numbers are none of those that it begins with."""
    options, training = FORMS[form]
    torch.manual_seed(0)
    m = nn.BatchNorm1d(columns, **options).to(device, dtype)
    for x in (*m.parameters(), *(b for b in m.buffers() if b.dim())):
        x.data.uniform_(0.5, 2.0)
    if m.num_batches_tracked is not None:
        m.num_batches_tracked.fill_(4)
    return m.train(training)


def of_norm(m, slope, x, dy):
    """Return what comes out of a BatchNorm and its rectifier: output, gradients, buffers."""
    x = x.detach().clone().requires_grad_()
    y = m(x) if slope is None else F.relu(m(x)) if slope == 0 else F.leaky_relu(m(x), slope)
    gradients = torch.autograd.grad(y, [x, *m.parameters()], dy)
    return y, *gradients, *[b for b in m.buffers() if b.dim()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(3, 5), (64, 33), (500, 16), (1025, 3)])
def test_batchnorm_with_its_rectifier(shape, form, slope, dtype, device):
    module = normed(form, shape[1], dtype, device)
    x = (2 * torch.randn(shape, device=device) + 3).to(dtype)
    dy = torch.randn(shape, device=device).to(dtype)
    found = []
    for m, at in ((module, None), (copy.deepcopy(module), slope), (copy.deepcopy(module).cpu().double(), slope)):
        where = next(iter((*m.parameters(), *m.buffers())), x)
        own = [a.to(where.device, torch.float64 if m is not module and len(found) == 2 else dtype) for a in (x, dy)]
        call = _Norm(m, slope) if at is None else m
        results = of_norm(_as_module(call, m), at, *own)
        found.append(results)
    sums = shape[0] ** 0.5 * 4.0
    for i, (a, b, c) in enumerate(zip(*found, strict=True)):
        assert_close(f"{form} {shape} {i}", a, b, c, length=shape[0], summand=sums)
    if module.num_batches_tracked is not None:
        assert module.num_batches_tracked.item() == 4 + module.training


def _as_module(call, m):
    """Return a call that has a module's parameters and buffers."""

    class Same(nn.Module):
        parameters, buffers = m.parameters, m.buffers

        def forward(self, x):
            return call(x)

    same = Same()
    same.parameters, same.buffers = m.parameters, m.buffers
    return same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batchnorm_in_half_precision(dtype, device):
    for weights in (dtype, torch.float32):
        module = normed("training", 33, weights, device)
        twin = copy.deepcopy(module).cpu().double()
        x, dy = (torch.randn(70, 33, device=device).to(dtype) for _ in range(2))
        results = of_norm(_as_module(_Norm(module, 0.2), module), None, x, dy)
        exact = of_norm(twin, 0.2, x.cpu().double(), dy.cpu().double())
        for a, c in zip(results, exact, strict=True):
            assert a.dtype == (dtype if a.shape == x.shape else weights)
            scale = torch.finfo(a.dtype).eps * c.abs().max().item() if a.shape == x.shape else 0.02
            assert (a.cpu().double() - c).abs().max() <= 4 * scale + 1e-3


def test_batchnorm_of_a_large_mean_keeps_its_variance(device):
    module = nn.BatchNorm1d(2).to(device)
    x = torch.tensor([[1e4, 1.0], [1e4 + 1, 2.0], [1e4 + 2, 3.0]], device=device)
    y = _Norm(module)(x)
    torch.testing.assert_close(y[:, 0], y[:, 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_batchnorm_takes_infinities_and_nan_to_its_rectifier_as_in_pytorch(slope, device):
    module = nn.BatchNorm1d(6, affine=False).to(device).eval()
    x = torch.tensor([[-INF, INF, NAN, -1.0, 0.0, 2.0]], device=device)
    expected = of_norm(module, slope, x, torch.ones_like(x))
    found = of_norm(_as_module(_Norm(module, slope), module), None, x, torch.ones_like(x))
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
def test_batchnorm_differentiates_to_any_order(form, device):
    module = normed(form, 3, torch.float64, device)
    if module.training:  # so that each call of it is the same
        module.running_mean = module.running_var = module.num_batches_tracked = None
    x = torch.randn(4, 3, dtype=torch.float64, device=device, requires_grad=True)
    call = partial(_Norm(module, 0.2))
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)
    for p in module.parameters():
        assert torch.autograd.gradgradcheck(lambda *_: call(x.detach().clone().requires_grad_()), p)


# Generators


class Own(nn.Module):
    """A network around a Sequential, whose layers are not to be taken out of it."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return 2 * self.layers(x)


def patched():
    net = generator()
    net[1].forward = lambda x: 2 * x
    return net


def hooked():
    net = generator()
    net[1].register_forward_hook(lambda m, args, y: 2 * y)
    return net


def generator(*behind):
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), *(behind or [nn.ReLU()]), nn.Linear(6, 3))


NETWORKS = {  # with how many BatchNorms a launch has
    "relu": (generator, 1),
    "leaky": (lambda: generator(nn.LeakyReLU(0.2)), 1),
    "in place": (lambda: generator(nn.ReLU(inplace=True)), 1),
    "tanh": (lambda: generator(nn.Tanh()), 1),
    "leaky of slope 0": (lambda: generator(nn.LeakyReLU(0.0)), 1),
    "two rectifiers": (lambda: generator(nn.LeakyReLU(0.2), nn.ReLU()), 1),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), nn.ReLU(), nn.Linear(6, 3)), 1),
    "mlp": (lambda: models.mlp([4, 6, 7, 8, 3], slope=0.2, norm=True, tanh=True), 2),
    "ctgan": (lambda: models.ctgan_generator(2, 3, width=6, pack=2), 2),
    "of sequences": (lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.BatchNorm1d(2), nn.ReLU(), nn.Flatten()), 0),
    "own class": (lambda: nn.Sequential(Own(nn.Linear(4, 6), nn.BatchNorm1d(6))), 0),
    "patched": (patched, 0),
    "hooked": (hooked, 0),
    "none": (lambda: models.mlp([4, 6, 3]), 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_does_the_same_with_fewer_launches(name, device, monkeypatch):
    make, launches = NETWORKS[name]
    torch.manual_seed(0)
    net = make().to(device).double()
    twin, z = copy.deepcopy(net), torch.randn(6, 4, dtype=torch.float64, device=device)
    launch, seen = kernels.batchnorm.batch_norm, []
    monkeypatch.setattr(kernels.batchnorm, "batch_norm", lambda *args: seen.append(args) or launch(*args))
    for _ in range(2):
        torch.testing.assert_close(fused(net)(z), twin(z), rtol=1e-10, atol=1e-12)
    assert len(seen) == 2 * launches
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_one_sample_is_refused_as_by_pytorch(device):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fused(generator().to(device))(torch.randn(1, 4, device=device))
    assert fused(generator().to(device).eval())(torch.randn(1, 4, device=device)).shape == (1, 3)


def test_batchnorm_whose_numbers_are_parts_of_others(device):
    net, x = generator().to(device), torch.randn(5, 4, device=device)
    whole = torch.rand(6, 2, device=device)
    net[1].weight, net[1].running_mean = nn.Parameter(whole[:, 0]), whole[:, 1]
    twin = copy.deepcopy(net)
    torch.testing.assert_close(fused(net)(x), twin(x))
    torch.testing.assert_close(net[1].running_mean, twin[1].running_mean)


def test_averages_of_a_step_that_saved_them_are_another_version(device):
    net = generator().to(device)
    before = net[1].running_mean._version
    fused(net)(torch.randn(4, 4, device=device))
    assert net[1].running_mean._version > before
