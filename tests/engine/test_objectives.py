"""The trainer's penalties of other kinds, at other points and in some steps only, against plain loops in float64, whose
losses are written out and differentiated by autograd; their noise; and what they launch.
"""

import math

import pytest
import torch
from count_launches import count_kernels, ours
from small_trainers import PAIRS
from whole_loop import assert_as_plain

from fastwgan import GradientPenalty, Trainer, functional

F64 = torch.float64
PENALTIES = {
    "lazy": GradientPenalty(every=2),
    "DRAGAN": GradientPenalty(at="perturbed", noise=0.25),
    "lazy DRAGAN": GradientPenalty(at="perturbed", every=2),
    "WGAN-LP": GradientPenalty(kind="one-sided", target=0.1),
    "R1": GradientPenalty(5.0, kind="zero-centered", at="real"),
    "R2": GradientPenalty(5.0, kind="zero-centered", at="fake"),
    "WGAN-div": GradientPenalty(2.0, kind="power"),
}


def compare(pair, constraint, **settings):
    torch.manual_seed(0)
    assert_as_plain(PAIRS[pair](), constraint, **settings)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", PENALTIES)
def test_steps_are_the_plain_loops(name, backend):
    compare("mlp", PENALTIES[name], backend=backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("name", "pair"), [("DRAGAN", "conv"), ("R1", "batchnorm"), ("lazy", "batchnorm")])
def test_steps_of_convolutions_and_separate_passes(name, pair, backend):
    compare(pair, PENALTIES[name], backend=backend)


@pytest.mark.parametrize("name", ["lazy", "lazy DRAGAN", "R2", "WGAN-div"])
def test_compiled_steps(name, traced_only):
    with torch._dynamo.config.patch(error_on_recompile=True):  # another scale or offset is no other program
        compare("mlp", PENALTIES[name], backend="torch", compile=True)


@pytest.mark.emulated
def test_each_part_is_one_launch():
    generator, critic, shape, latent = PAIRS["mlp"]()
    trainer = Trainer(generator, critic, latent=latent, backend="triton", constraint=PENALTIES["DRAGAN"])
    trainer.critic_step(torch.randn(4, *shape, dtype=F64))
    with count_kernels() as counts:
        trainer.critic_step(torch.randn(4, *shape, dtype=F64))
    parts = dict.fromkeys(("_perturb_kernel", "_penalty_kernel", "_guard_kernel", "_update_kernel"), 1)
    assert ours(counts) == {**parts, "_activation_kernel": 2}


# Noise


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_noise_is_normal_and_independent(backend):
    """Moments and tails, between neighbours and samples."""
    n, size = 8, 20_003
    x = functional.perturb(torch.zeros(n, size), scale=1.0, seed=5, backend=backend)
    count = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(count)
    assert abs(x.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs((x**3).mean()) < 4 * math.sqrt(15 / count)
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96 / count)
    share = (x.abs() > 3).double().mean()
    assert abs(share - 0.0026998) < 4 * math.sqrt(0.0027 / count)
    correlation = torch.corrcoef(x) - torch.eye(n)
    assert correlation.abs().max() < 5 / math.sqrt(size)
    for lag in (1, 2, 3, 4):
        assert abs((x[:, lag:] * x[:, :-lag]).mean()) < 4 / math.sqrt(count)
        assert abs((x[:, lag:] ** 2 * x[:, :-lag] ** 2).mean() - 1) < 8 / math.sqrt(count)


@pytest.mark.emulated
def test_noise_goes_by_index_alone():
    """So it is the same for any batch, rank and block; on both backends to rounding."""
    x = torch.zeros(6, 2500)
    whole = functional.perturb(x, scale=0.5, seed=2**62, offset=2**33, backend="triton")
    for i in range(6):
        offset = torch.tensor(2**33 + i)
        part = functional.perturb(x[i : i + 1], scale=torch.tensor(0.5), seed=2**62, offset=offset, backend="triton")
        assert torch.equal(part[0], whole[i])
    assert torch.equal(
        functional.perturb(x[:, :7], scale=0.5, seed=2**62, offset=2**33, backend="triton"), whole[:, :7]
    )
    plain = functional.perturb(x, scale=0.5, seed=2**62, offset=2**33, backend="torch")
    torch.testing.assert_close(plain, whole, rtol=1e-5, atol=1e-6)
    assert not torch.equal(functional.perturb(x, scale=0.5, seed=2**61, offset=2**33, backend="triton"), whole)


@pytest.mark.emulated
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_noise_in_each_layout(dtype):
    for shape in ((3, 17), (2, 2049), (2, 3, 4, 5)):
        for layout in (torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])):
            x = torch.randn(shape).to(dtype).to(memory_format=layout)
            results = [
                functional.perturb(x, scale=0.3, seed=1, offset=4, backend=backend) for backend in ("triton", "torch")
            ]
            assert all(noisy.is_contiguous(memory_format=layout) for noisy in results)
            tolerance = {F64: 1e-12, torch.bfloat16: 0.02}[dtype]
            torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_noise_has_a_derivative_by_the_samples_alone(backend):
    x, scale = torch.randn(2, 3, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    functional.perturb(x, scale=scale, seed=1, backend=backend).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert scale.grad is None


def test_noise_in_a_compiled_function():
    """With another number as its scale, too, which the compiler then takes for a variable."""
    torch._dynamo.reset()
    x = torch.randn(2, 3)

    def perturb(scale):
        return functional.perturb(x, scale=scale, seed=1, offset=2)

    compiled = torch.compile(perturb, fullgraph=True, backend="aot_eager")
    for scale in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(scale), perturb(scale))
