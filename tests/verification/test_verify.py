"""fastwgan.verify: passes on sound steps, names the op of each planted fault, and leaves the caller's things alone."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_trainers import assert_same_state
from torch import nn

import fastwgan
from fastwgan import GradientPenalty, NormClip, WeightClip, cli, functional, models, reference
from fastwgan.backend import kernels
from fastwgan.cli import verify as command
from fastwgan.engine import eager, structure
from fastwgan.metrics import Metrics
from fastwgan.streams import process_streams
from fastwgan.verification.report import Report, Row

CLIP, PENALTY = WeightClip(), GradientPenalty()
CONSTRAINTS = {"clip": CLIP, "penalty": PENALTY}
DRIFT = {"critic_term": lambda s: 0.1 * s.real_scores.square().mean()}


def blend(alpha, drift=0.0):
    """The terms that make the losses those of a blend with the GAN's."""

    def critic_term(s):
        gan = F.softplus(-s.real_scores).mean() + F.softplus(s.fake_scores).mean()
        drifted = drift * s.real_scores.square().mean()
        return alpha * (gan - functional.critic_loss(s.real_scores, s.fake_scores)) + drifted

    def generator_term(s):
        return alpha * (F.softplus(-s.fake_scores).mean() - functional.generator_loss(s.fake_scores))

    return {"critic_term": critic_term, "generator_term": generator_term}


ALL = blend(0.3, drift=0.1)
RELATIVISTIC = {
    "critic_term": lambda s: F.softplus(s.fake_scores - s.real_scores).mean(),
    "generator_term": lambda s: F.softplus(s.real_scores - s.fake_scores).mean(),
}
FORMS = {
    "norm clip": {"constraint": NormClip(0.1)},
    "norm clip of tensors": {"constraint": NormClip(0.5, per="tensor", exclude="*.bias")},
    "DRAGAN": {"constraint": GradientPenalty(at="perturbed", noise=0.1)},
    "blend": {"constraint": CLIP, **blend(0.3)},
    "the GAN": {"constraint": PENALTY, **blend(1.0)},
    "drift": {"constraint": PENALTY, **DRIFT},
    "relativistic": {"constraint": PENALTY, **RELATIVISTIC},
    "to a target": {"constraint": CLIP, "generator_term": lambda s: (s.fake - s.real).abs().mean()},
    "all under a norm clip": {"constraint": NormClip(0.1), **ALL},
    "all under a penalty": {"constraint": PENALTY, **ALL},
    "all of DRAGAN": {"constraint": GradientPenalty(at="perturbed"), **ALL},
}
KERNELS = Path(kernels.__file__).parent


def mlps():
    return models.mlp([6, 16, 12, 10], norm=True), models.mlp([10, 24, 16, 1], slope=0.2)


def check(generator, critic, real, *, expected=True, **options):
    report = fastwgan.verify(generator, critic, real, **options)
    if report.passed is not expected:
        pytest.fail(str(report))
    return report


def small(constraint=PENALTY, *, device="cpu", seed=0, backend="auto", **options):
    """A report on two MLPs."""
    torch.manual_seed(seed)
    generator, critic = (m.to(device) for m in mlps())
    real = torch.randn(16, 10, device=device)
    return fastwgan.verify(generator, critic, real, constraint=constraint, seed=seed, backend=backend, **options)


# What is sound passes


@pytest.mark.parametrize(
    ("name", "backend", "constraint"),
    [
        *((name, "triton", constraint) for name in command.BUILT_IN for constraint in CONSTRAINTS),
        *((name, "torch", constraint) for name in command.BUILT_IN for constraint in CONSTRAINTS),
        ("dcgan", "triton", "norm-clip"),
        ("resnet", "torch", "dragan"),
    ],
)
def test_built_in_networks_pass(name, backend, constraint, device):
    jobs = command._jobs([name], None, [constraint], device, seed=0)
    ((_, arguments),) = jobs
    report = check(**{"backend": backend, **arguments})
    assert report.backend == backend
    ops = {(row.step, row.op) for row in report.rows}
    points = "perturb" if constraint == "dragan" else "interpolate"
    of_penalty = {("critic", op) for op in (points, "input gradient", "penalty")}
    of_all = {(step, op) for step in ("critic", "generator") for op in OPS}
    assert ops - {(step, "buffers") for step in ("critic", "generator")} == of_all | (
        {("critic", {"clip": "clamp", "norm-clip": "project"}[constraint])} if "clip" in constraint else of_penalty
    )


OPS = ("generate", "forward", "scores", "loss", "backward", "guard", "update")


@pytest.mark.parametrize(
    "options",
    [{"constraint": CLIP}, {"constraint": PENALTY}, FORMS["all under a norm clip"], FORMS["all of DRAGAN"]],
    ids=["clip", "penalty", "norm clip", "DRAGAN"],
)
def test_passes_whatever_the_seed(options, device):
    for seed in range(3):
        report = small(device=device, seed=seed, **options)
        assert report.passed, f"seed {seed}: {report}"
        assert max(row.error for row in report.rows if row.op == "backward") > 0  # two things were compared


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("networks", ["mlp", "conv"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_passes(form, networks, backend, device):
    options = FORMS[form] | {"backend": backend}
    if networks == "mlp":
        report = small(device=device, **options)
        assert report.passed, report
    else:
        report = check(images().to(device), conv().to(device), torch.randn(6, 3, 16, 16, device=device), **options)
    constraint = options["constraint"]
    rows = {step: [(row.op, row.name) for row in report.rows if row.step == step] for step in ("critic", "generator")}
    noisy = {step: [name for op, name in rows[step] if op == "perturb"] for step in rows}
    points = ["points"] if getattr(constraint, "at", None) == "perturbed" else []
    assert noisy == {"critic": points, "generator": []}
    for step in ("critic", "generator"):
        has_term = f"{step}_term" in options
        assert (("term", f"{step} term") in rows[step]) is has_term
        assert ("loss", f"{step} loss") in rows[step]
        assert (("scores", "seed at fake scores") in rows[step]) is not has_term
    assert (("project", "saturation") in rows["critic"]) is isinstance(constraint, NormClip)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("alone", [False, True])
def test_noise_goes_by_the_place_in_memory(alone, backend, device):
    """Of real samples that are channels_last, with or without a generator that is."""
    generator, critic = images().to(device), conv().to(device)
    real = torch.randn(6, 3, 16, 16, device=device).to(memory_format=torch.channels_last)
    if not alone:
        generator.to(memory_format=torch.channels_last)
    check(generator, critic, real, backend=backend, **FORMS["all of DRAGAN"])


def test_a_backward_pass_that_cancels_is_no_fault():
    """A normalisation of two features leaves next to nothing of what flows back, and all of its rounding."""
    generator = nn.Linear(6, 10).double()
    critic = nn.Sequential(nn.Linear(10, 2), nn.LayerNorm(2), nn.Softplus(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        critic[0].weight *= 100
    check(generator, critic, torch.randn(16, 10).double(), backend="torch", **blend(0.3))


def test_norms_of_many_elements_in_float64():
    """Of float32 numbers, whose squares' sums round to one side if they are added up one after the other."""
    generator, critic = nn.Linear(6, 64).double(), models.mlp([64, 4000, 1]).double()
    critic[1].requires_grad_(False)
    check(generator, critic, torch.randn(4, 64).double(), constraint=NormClip(0.1, per="tensor"), backend="torch")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("form", ["all under a penalty", "all of DRAGAN"])
def test_packs_pass(form, backend, device):
    generator = models.mlp([6, 16, 10]).to(device)
    critic = nn.Sequential(nn.Unflatten(0, (-1, 4)), nn.Flatten(), models.mlp([40, 16, 1], slope=0.2)).to(device)
    check(generator, critic, torch.randn(16, 10, device=device), pack=4, backend=backend, **FORMS[form])


def test_rows_on_their_bound_to_a_rounding():
    """As they are where the critic has been projected before; rows without a gradient then stay on it."""
    torch.manual_seed(0)
    generator, critic = mlps()
    with torch.no_grad():
        critic[1].weight[::2] *= 0.1 / critic[1].weight[::2].norm(dim=1, keepdim=True)
        critic[1].bias[::2] = -100.0
    critic[2] = nn.ReLU()
    check(generator, critic, torch.randn(16, 10), constraint=NormClip(0.1, exclude="*.bias"), backend="torch")


def test_every_parameter_has_its_rows():
    for constraint, states in ((PENALTY, ("exp_avg", "exp_avg_sq", "step")), (CLIP, ("square_avg", "step"))):
        report = small(constraint)
        for step, module in zip(("generator", "critic"), mlps(), strict=True):
            names = [name for name, _ in module.named_parameters()]
            rows = {(row.op, row.name) for row in report.rows if row.step == step}
            assert {("backward", name) for name in names} == {row for row in rows if row[0] == "backward"}
            with_states = {*names, *(f"{name}: {state}" for name in names for state in states)}
            assert {("update", name) for name in with_states} == {row for row in rows if row[0] == "update"}


class Frozen(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self[0].requires_grad_(False)


def conv(norm=None):
    layers = [nn.Conv2d(3, 6, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(6, 6, 3, 2, 1)]
    return nn.Sequential(*layers, *([norm] if norm else []), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(96, 1))


def images(size=16):
    return models.dcgan_generator(5, width=4, size=size)


NETWORKS = {
    "instance-norm": lambda: (images(), conv(nn.InstanceNorm2d(6, affine=True))),
    "layer-norm": lambda: (images(), conv(nn.GroupNorm(1, 6))),
    "several-scores": lambda: (images(), nn.Sequential(*list(conv())[:4])),
    "frozen-layer": lambda: (images(), Frozen(*conv())),
    "spectral-norm": lambda: (images(), conv().append(nn.utils.parametrizations.spectral_norm(nn.Linear(1, 1)))),
    "smooth": lambda: (images(), nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Tanh(), nn.Linear(8, 1))),
    "linear": lambda: (images(), nn.Sequential(nn.Flatten(), nn.Linear(768, 1))),
    "evaluation-mode": lambda: (images().eval(), conv().eval()),
    "dropout": lambda: (images(), conv(nn.Dropout(0.5))),
    "channels-last": lambda: tuple(m.to(memory_format=torch.channels_last) for m in (images(), conv())),
}


@pytest.mark.parametrize(
    ("name", "constraint"),
    [*((name, "penalty") for name in NETWORKS), ("frozen-layer", "clip"), ("channels-last", "clip")],
)
def test_all_sorts_of_networks_pass(name, constraint, device):
    generator, critic = (m.to(device) for m in NETWORKS[name]())
    real = torch.rand(6, 3, 16, 16, device=device) * 2 - 1
    if name == "channels-last":
        real = real.to(memory_format=torch.channels_last)
    report = check(generator, critic, real, constraint=CONSTRAINTS[constraint], backend="triton")
    assert report.notes == (("1 dropout layers in evaluation mode",) if name == "dropout" else ())


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_instance_noise_is_left_out_with_a_note(constraint, device):
    """What is within goes on in training mode."""
    generator, critic = images().to(device), models.InstanceNoise(conv(nn.Dropout(0.0)), 0.2).to(device)
    modes = []
    for m in (critic, critic.critic):  # whose copies have the same hook
        m.register_forward_pre_hook(lambda m, args: modes.append((type(m), m.training)))
    report = check(generator, critic, torch.randn(6, 3, 16, 16, device=device), constraint=CONSTRAINTS[constraint])
    assert set(modes) == {(models.InstanceNoise, False), (nn.Sequential, True)}
    assert report.notes == (
        "1 dropout layers in evaluation mode", "1 instance noise layers in evaluation mode",
    )  # fmt: skip
    assert all(m.training for m in critic.modules())


def test_batchnorm_critic_passes_under_a_clip(device):
    generator, critic = images().to(device), conv(nn.BatchNorm2d(6)).to(device)
    report = check(generator, critic, torch.randn(6, 3, 16, 16, device=device), backend="triton")
    assert {"critic: 3.running_mean", "critic: 3.num_batches_tracked"} <= {row.name for row in report.rows}


def test_batchnorm_critic_passes_under_a_penalty_with_the_trainers_warning():
    with pytest.warns(UserWarning, match="GradientPenalty with a critic that has BatchNorm"):
        check(images(), conv(nn.BatchNorm2d(6)), torch.randn(6, 3, 16, 16), constraint=PENALTY, backend="torch")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("triton", {"constraint": CLIP}),
        *((backend, {"constraint": PENALTY}) for backend in ("triton", "torch")),
        *((backend, FORMS["all under a norm clip"]) for backend in ("triton", "torch")),
        *((backend, FORMS["all of DRAGAN"]) for backend in ("triton", "torch")),
    ],
    ids=["triton-clip", "triton-penalty", "torch-penalty", "triton-norm clip", "torch-norm clip", "triton-DRAGAN",
         "torch-DRAGAN"],
)  # fmt: skip
def test_every_dtype_passes(backend, options, dtype, device):
    generator, critic = (m.to(device, dtype) for m in mlps())
    real = torch.randn(16, 10, device=device).to(dtype)
    report = check(generator, critic, real, backend=backend, **options)
    assert report.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize(
    "constraint",
    [
        *(GradientPenalty(kind=kind, target=0.5) for kind in ("one-sided", "zero-centered", "power")),
        GradientPenalty(weight=1.0, kind="zero-centered", at="real", every=4),
        GradientPenalty(at="fake"),
        WeightClip(0.05, exclude=(nn.LayerNorm, "*.bias")),
        WeightClip(1e-3),
    ],
    ids=str,
)
def test_every_form_of_constraint_passes(constraint, device):
    generator = models.mlp([6, 16, 10]).to(device)
    critic = nn.Sequential(nn.Linear(10, 16), nn.LayerNorm(16), nn.LeakyReLU(0.2), nn.Linear(16, 1)).to(device)
    real = 3 * torch.randn(16, 10, device=device)
    report = check(generator, critic, real, constraint=constraint, backend="triton", seed=2**40)
    assert any(row.op == ("penalty" if isinstance(constraint, GradientPenalty) else "clamp") for row in report.rows)


class Classifying(nn.Module):
    """A critic that returns scores and logits, or a generator that returns its features behind its samples."""

    def __init__(self, fan_in, fan_out, further):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(fan_in, 24), nn.LeakyReLU(0.2), nn.Linear(24, 16), nn.Tanh())
        self.first, self.second = nn.Linear(16, fan_out), nn.Linear(16, further)

    def forward(self, x, labels):
        h = self.body(x)
        return self.first(h), self.second(h)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_terms_of_further_outputs_pass(constraint, backend, device):
    labels = torch.randint(3, (16,), device=device)
    terms = {
        "critic_term": lambda s: (
            F.cross_entropy(s.outputs.real[0], s.cond[0]) + F.cross_entropy(s.outputs.fake[0], s.fake_cond[0])
        ),
        "generator_term": lambda s: (
            F.cross_entropy(s.outputs.fake[0], s.fake_cond[0])
            + (s.outputs.real[0].mean(0) - s.outputs.fake[0].mean(0)).square().sum()
            + 0.1 * s.outputs.generator[0].square().mean()
        ),
    }
    networks = Classifying(6, 10, 2).to(device), Classifying(10, 1, 3).to(device)
    given = {"cond": (labels,), "latent": 6, "constraint": CONSTRAINTS[constraint], "backend": backend, **terms}
    report = check(*networks, torch.randn(16, 10, device=device), **given)
    assert {row.step for row in report.rows if row.op == "term"} == {"critic", "generator"}


def test_a_latent_of_ones_own():
    latents = []

    def latent(batch, device):
        latents.append((batch, device))
        return torch.rand(batch, 6, device=device)

    report = small(latent=latent)
    assert report.passed, report
    assert latents == [(16, torch.device("cpu"))] * 3


def test_without_gradients_on_and_when_called_twice():
    with torch.no_grad():
        first = small()
    assert first.passed
    assert first.rows == small().rows


# What is not sound is named


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """A function that plants a fault in the source of a file of kernels/ and has the package use that."""

    def plant(name, old, new):
        source = (KERNELS / f"{name}.py").read_text()
        assert old in source, old
        path = tmp_path / f"{name}.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(f"fastwgan.kernels.planted_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(getattr(kernels, name), f"_{name}_kernel", getattr(module, f"_{name}_kernel"))

    return plant


IN_KERNELS = {  # a fault: (form, file, old, new, the op to be named)
    "one eps for the batch": ("penalty", "interpolate", "index = sample + offset", "index = 0 * sample + offset",
                              "interpolate"),
    "eps from the wrong end": ("penalty", "interpolate", "fake + eps.to(acc) * (real - fake)",
                               "real + eps.to(acc) * (fake - real)", "interpolate"),
    "cotangent times 1.001": ("penalty", "penalty", "scale = mean(WEIGHT *", "scale = mean(1.001 * WEIGHT *",
                              "penalty"),
    "an eps inside the norm's root": ("penalty", "penalty", "norm = sqrt(tl.sum(g * g, axis=0))",
                                      "norm = sqrt(tl.sum(g * g, axis=0) + 1e-5)", "penalty"),
    "mean of real over a wrong count": ("clip", "guard", "store_statistics(stats_ptr, partial_ptr, a_numel,",
                                        "store_statistics(stats_ptr, partial_ptr, a_numel + 1,", "scores"),
    "the guard refuses": ("clip", "guard", "skip = nonfinite > 0", "skip = nonfinite >= 0", "guard"),
    "RMSProp's eps inside the root": ("clip", "update", "sqrt(variance) + eps", "sqrt(variance + eps)", "update"),
    "RMSProp's decay off": ("clip", "update", "+ beta2_c * g * g", "+ 1.01 * beta2_c * g * g", "update"),
    "bound 1% wide": ("clip", "update", "bound = tl.load(hyper_ptr + table.BOUND)",
                      "bound = 1.01 * tl.load(hyper_ptr + table.BOUND)", "clamp"),
    "bound 1% narrow": ("clip", "update", "bound = tl.load(hyper_ptr + table.BOUND)",
                        "bound = 0.99 * tl.load(hyper_ptr + table.BOUND)", "clamp"),
    "Adam's bias correction missing": ("penalty", "update", "divide(sqrt(s), sqrt(bias2))", "sqrt(s)", "update"),
    "learning rate off by 1%": ("penalty", "update", "p -= divide(lr, bias1)", "p -= 1.01 * divide(lr, bias1)",
                                "update"),
    "one noise for the batch": ("DRAGAN", "perturb", "index = sample + offset", "index = 0 * sample + offset",
                                "perturb"),
    "noise of the wrong sign": ("DRAGAN", "perturb", "x.to(acc) + factor", "x.to(acc) - factor", "perturb"),
    "noise 1% wide": ("DRAGAN", "perturb", "x.to(acc) + factor", "x.to(acc) + 1.01 * factor", "perturb"),
    "norms 1% wide": ("norm clip", "project", "w * inverse * bound", "w * inverse * 1.01 * bound", "project"),
    "norms of tensors 1% narrow": ("norm clip of tensors", "project", "w * inverse * bound",
                                   "w * inverse * 0.99 * BOUND", "project"),
    "only rows far outside": ("norm clip", "project", "finite & (norm > bound)", "finite & (norm > 9 * bound)",
                              "project"),
    "elements without their sign": ("norm clip", "project", "tl.where(w < 0, -bound, bound)",
                                    "tl.where(w < 0, bound, bound)", "project"),
    "rows on the bound miscounted": ("norm clip", "project", "(finite & (norm >= bound))", "(finite & (norm < bound))",
                                     "project"),
}  # fmt: skip


@pytest.mark.parametrize("fault", IN_KERNELS)
def test_a_fault_in_a_kernel_is_named(fault, planted, device):
    """Without it these steps pass, by the tests above."""
    form, file, old, new, op = IN_KERNELS[fault]
    planted(file, old, new)
    report = small(device=device, backend="triton", **(FORMS.get(form) or {"constraint": CONSTRAINTS[form]}))
    assert not report.passed
    assert (report.failed[0].step, report.failed[0].op) == ("critic", op), report


def one_norm(original):
    def penalty(g, *args):
        loss, statistics, cotangent = original(g.reshape(1, -1), *args)
        return loss, statistics, cotangent.view(g.shape)

    return penalty


def one_eps(original):
    return lambda real, fake, **options: fake + reference.uniform(options["seed"], 0, 1) * (real - fake)


def stretched(original):
    def cotangent(*args, **options):
        statistics, v = original(*args, **options)
        return statistics, 1.001 * v

    return cotangent


def tighter(original):
    return lambda parameters, bound, *per: original(parameters, 0.99 * bound, *per)


def whole(original):
    """Tensors as a whole where rows are meant."""
    return lambda project, params, sizes, *rest: original(project, params, [p.numel() for p in params], *rest)


def one_noise(original):
    return lambda x, **options: x + original(torch.zeros_like(x[:1]), **options)


def doubled(original):
    """The term's part of the gradient."""

    def add_term(passes, name, record, roots, seeds, scale):
        value = original(passes, name, record, roots, seeds, scale)
        seeds[-1] = 2 * seeds[-1]
        return value

    return add_term


def forgotten(original):
    """The generator's term's part of the gradient."""

    def add_term(passes, name, record, roots, seeds, scale):
        value = original(passes, name, record, roots, seeds, scale)
        if name == "generator":
            del roots[-1], seeds[-1]
        return value

    return add_term


def heavier(original):
    return lambda passes, name, record: 1.01 * original(passes, name, record)


def shifted(original):
    """In real samples' stead."""
    return lambda samples, *scored: original(samples._replace(real=samples.real + 0.01), *scored)


def without_term(original):
    return property(lambda metrics: metrics._loss)


def negated(original):
    return lambda *args, **options: -original(*args, **options)


def lighter(original):
    return lambda constraint, iteration: 0.999 * original(constraint, iteration)


def slanted(original):
    return lambda d, h, factors, slope, *rest: original(d, h, factors, slope + 0.001, *rest)


def unbiased(original):
    return lambda z, bias, *rest: original(z, bias if bias is None else 0.99 * bias, *rest)


def forgetful(original):
    return lambda x, weight, bias, running, of_batch, _, *rest: original(x, weight, bias, running, of_batch, 0.2, *rest)


def biased(original):
    def generator(passes, *args, **options):
        result = original(passes, *args, **options)
        for p in passes._generator.parameters():
            p.grad *= 1.001
        return result

    return generator


def looking(original):
    """A look at the critic that leaves something behind."""

    def look(critic):
        with torch.no_grad():
            critic(torch.randn(6, 3, 16, 16))
        return original(critic)

    return look


ELSEWHERE = {  # a fault: (form, backend, what holds it, its name, what makes a fault of it, (step, op))
    "one norm for the batch": ("penalty", "triton", kernels.penalty, "gradient_penalty", one_norm,
                               ("critic", "penalty")),
    "seeds of the wrong sign": ("clip", "triton", eager.Eager, "_constant", negated, ("critic", "scores")),
    "penalty's weight off": ("penalty", "triton", GradientPenalty, "penalty_weight", lighter, ("critic", "penalty")),
    "a rectifier's slope off": ("penalty", "triton", reference, "slopes", slanted, ("critic", "input gradient")),
    "a bias off": ("clip", "triton", kernels.activation, "activate_", unbiased, ("critic", "forward")),
    "running averages off": ("clip", "triton", kernels.batchnorm, "batch_norm", forgetful, ("critic", "buffers")),
    "generator's gradient off": ("clip", "triton", eager.Eager, "generator", biased, ("generator", "backward")),
    "torch: one eps for the batch": ("penalty", "torch", reference, "interpolate", one_eps, ("critic", "interpolate")),
    "torch: cotangent times 1.001": ("penalty", "torch", reference, "penalty_cotangent", stretched,
                                     ("critic", "penalty")),
    "norms of tensors for rows'": ("norm clip", "triton", kernels.project.Project, "launch", whole,
                                   ("critic", "project")),
    "torch: norms 1% narrow": ("norm clip", "torch", reference, "clip_norms_", tighter, ("critic", "project")),
    "torch: one noise for the batch": ("DRAGAN", "torch", reference, "perturb", one_noise, ("critic", "perturb")),
    "a term's gradient doubled": ("drift", "triton", eager.Eager, "_add_term", doubled, ("critic", "backward")),
    "a term without a gradient": ("blend", "triton", eager.Eager, "_add_term", forgotten, ("generator", "backward")),
    "torch: a term off by 1%": ("drift", "torch", eager.Eager, "term", heavier, ("critic", "term")),
    "real scores of other samples": ("relativistic", "triton", eager, "StepRecord", shifted, ("generator", "term")),
    "a loss without its term": ("blend", "torch", Metrics, "critic_loss", without_term, ("critic", "loss")),
    "torch: bound 1% narrow": ("clip", "torch", reference, "clip_weights_", tighter, ("critic", "clamp")),
}  # fmt: skip


@pytest.mark.emulated
@pytest.mark.parametrize("fault", ELSEWHERE)
def test_a_fault_elsewhere_is_named(fault, monkeypatch):
    form, backend, holder, name, make, expected = ELSEWHERE[fault]
    fault = make(getattr(holder, name))
    monkeypatch.setattr(holder, name, fault)
    report = small(backend=backend, **(FORMS.get(form) or {"constraint": CONSTRAINTS[form]}))
    assert not report.passed
    first = report.failed[0]
    assert (first.step, first.op) == expected, report
    assert f"first {first.op}" in str(report)


def test_a_pass_too_many_is_named(monkeypatch):
    """Of a critic with BatchNorm, whose averages it shows in."""
    monkeypatch.setattr(structure, "may_write", looking(structure.may_write))
    generator, critic = images(), conv(nn.BatchNorm2d(6))
    report = check(generator, critic, torch.randn(6, 3, 16, 16), expected=False, backend="torch")
    assert {row.op for row in report.failed if row.step == "critic"} == {"buffers"}


def test_nan_fails():
    generator, critic = mlps()
    critic[1].weight.data[0, 0] = torch.nan
    report = check(generator, critic, torch.randn(16, 10), expected=False, backend="torch", latent=6)
    assert report.failed[0].op == "forward"
    json.dumps(report.as_dict(), allow_nan=False)


# The caller's things


def everything(*modules):
    """Weights, gradients, buffers, modes and hooks."""
    return [
        [[n, p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone()] for n, p in parameters]
        + [[n, b.clone()] for n, b in buffers]
        + [[n, each.training, len(each._forward_hooks), len(each._forward_pre_hooks)] for n, each in submodules]
        for parameters, buffers, submodules in (
            (m.named_parameters(), m.named_buffers(), m.named_modules()) for m in modules
        )
    ]


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("failing", [False, True])
def test_the_callers_state_is_untouched(failing, constraint, device):
    generator, critic = (m.to(device) for m in mlps())
    critic[1].eval()
    critic[1].weight.requires_grad_(False)
    real = torch.randn(16, 10, device=device)
    critic(real).sum().backward()
    kept, kept_real, streams = everything(generator, critic), real.clone(), process_streams(device)

    def latent(batch, device):
        np.random.rand()  # noqa: NPY002 - the process's stream is meant
        random.random()
        if failing:
            raise KeyError("the user's own")
        return torch.randn(batch, 6, device=device)

    if failing:
        with pytest.raises(KeyError, match="the user's own"):
            fastwgan.verify(generator, critic, real, constraint=CONSTRAINTS[constraint], latent=latent)
    else:
        check(generator, critic, real, constraint=CONSTRAINTS[constraint], latent=latent)
    assert_same_state(everything(generator, critic), kept)
    assert torch.equal(real, kept_real)
    assert_same_state(process_streams(device), streams)


# The report


def test_report_as_text():
    rows = (
        Row("critic", "backward", "0.weight", 1e-7, 2e-7, 5e-7),
        Row("critic", "backward", "0.bias", 4e-7, 2e-7, 5e-7),
        Row("critic", "update", "0.weight", 0.25, 1e-7, 3e-7),
        Row("generator", "update", "0.weight", float("nan"), 1e-7, 3e-7),
    )
    report = Report(rows, "WeightClip()", "cpu", "torch", "float32", 8, 0, {"torch": "2"}, ("a note",))
    assert not report.passed
    assert report.failed == rows[2:]
    assert str(report).splitlines() == [
        "WeightClip(): torch on cpu, float32, batch 8",
        "note: a note",
        "step       op        rows  worst     error  eager  allowed",
        "critic     backward     2  0.bias    4e-07  2e-07    5e-07  ok",
        "critic     update       1  0.weight   0.25  1e-07    3e-07  FAIL",
        "generator  update       1  0.weight    nan  1e-07    3e-07  FAIL",
        "FAILED: 2 of 4 rows, first update (0.weight) in the critic step",
    ]
    assert str(Report(rows[:2], "", "", "", "", 8, 0, {})).endswith("\npassed: 2 rows")


def test_report_as_json():
    report = small(GradientPenalty(weight=5.0), **blend(0.5))
    result = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert result["passed"] is True
    assert len(result["rows"]) == len(report.rows)
    assert result["rows"][0] == {
        "step": "critic", "op": "generate", "name": "fake samples", "error": report.rows[0].error,
        "eager": report.rows[0].eager, "tolerance": report.rows[0].tolerance, "passed": True,
    }  # fmt: skip
    assert result["constraint"] == "GradientPenalty(weight=5.0)"
    assert result["terms"] == ["critic_term", "generator_term"]
    assert report.title.startswith("GradientPenalty(weight=5.0) with critic_term with generator_term: ")
    assert (result["backend"], result["dtype"], result["batch"]) == (report.backend, "float32", 16)
    assert result["versions"]["torch"] == torch.__version__


# Misuse


class Unlabelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Linear(3, 4), nn.Linear(10, 10)

    def forward(self, z, labels):
        return self.out(torch.cat((z, self.embedding(labels)), 1))


class Noisy(nn.Sequential):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


class Narrow(nn.Sequential):
    def forward(self, x):
        return super().forward(x.float())


class Rounded(nn.Sequential):
    def forward(self, x):
        return super().forward(x).float()


class Subclass(GradientPenalty):
    pass


G, D = mlps()
REAL = torch.randn(16, 10)
MISUSE = {
    "generator": ({"generator": "G"}, TypeError, "generator: expected an nn.Module, got str"),
    "critic": ({"critic": None}, TypeError, "critic: expected an nn.Module, got NoneType"),
    "no parameters": ({"critic": nn.Flatten()}, ValueError, "critic: expected trainable parameters, got none"),
    "real list": ({"real": [1.0]}, TypeError, "real: expected a tensor, got list"),
    "real elsewhere": ({"real": REAL.to("meta")}, ValueError, "real: expected a tensor on cpu, got one on meta"),
    "real dtype": ({"real": REAL.long()}, TypeError, "real: expected float16, bfloat16, float32 or float64"),
    "constraint": ({"constraint": "clip"}, TypeError,
                   "constraint: expected WeightClip, NormClip or GradientPenalty, got str"),
    "unknown constraint": ({"constraint": Subclass()}, TypeError, "constraint: expected .*Penalty, got Subclass"),
    "term": ({"critic_term": 0.1}, TypeError, "critic_term: expected a function of the step's record, got float"),
    "term of a sample": ({"generator_term": lambda s: s.fake_scores}, ValueError,
                         r"generator_term: its result: expected a 0-d tensor, such as a mean, got shape \(16, 1\)"),
    "blend": ({"blend": 0.5}, TypeError, "blend: was removed; write critic_term=lambda s: blend"),
    "drift": ({"drift": 0.1}, TypeError, "drift: was removed; write critic_term=lambda s: drift"),
    "noise": ({"instance_noise": 0.1}, TypeError,
              r"instance_noise: was removed; wrap the critic: fastwgan\.models\.InstanceNoise\(critic, scale\)$"),
    "no such argument": ({"depth": 3}, TypeError, "got an unexpected keyword argument 'depth'$"),
    "cond": ({"cond": REAL}, TypeError, "cond: expected a tuple of conditions, got Tensor"),
    "latent": ({"latent": "6"}, TypeError, "latent: expected an int or a callable, got str"),
    "latent zero": ({"latent": 0}, ValueError, "latent: expected an int >= 1, got 0"),
    "latent unclear": ({"generator": Unlabelled(), "cond": (torch.randn(16, 3),)}, ValueError,
                       "latent: expected a width or a callable, as the generator's first layer does not tell it"),
    "latent nowhere": ({"generator": nn.LayerNorm(10)}, ValueError, "latent: expected a width or a callable"),
    "pack": ({"pack": 0}, ValueError, "pack: expected an int >= 1, got 0"),
    "pack and real": ({"pack": 3}, ValueError, "real: expected a multiple of pack=3 samples, got 16"),
    "seed": ({"seed": -1}, ValueError, "seed: expected an int in"),
    "backend": ({"backend": "cuda"}, ValueError, "backend: expected 'auto', 'triton' or 'torch', got 'cuda'"),
    "random critic": ({"critic": Noisy(*D)}, ValueError, "critic: expected the same output for the same input"),
    "random generator": ({"generator": Noisy(*G)}, ValueError, "generator: expected the same output for the same"),
    "no float64": ({"critic": Narrow(*D)}, ValueError, "critic: expected a network that runs in float64, got "),
    "narrow scores": ({"critic": Rounded(*D)}, ValueError, "critic: expected float64 out of its float64 form, got tor"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSE)
def test_misuse_is_named(name):
    options, error, message = MISUSE[name]
    with pytest.raises(error, match=f"^{message}"):
        fastwgan.verify(**{"generator": G, "critic": D, "real": REAL, **options})


def test_what_cannot_be_copied_is_named():
    generator, critic = mlps()
    critic.kept = 2 * critic[1].weight  # no leaf of a graph
    with pytest.raises(ValueError, match="^generator: expected networks that can be copied, got "):
        fastwgan.verify(generator, critic, REAL)


def test_inside_autocast_and_inference_mode_it_is_refused():
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=r"^torch\.autocast: expected a call"):
        fastwgan.verify(G, D, REAL)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"^torch\.inference_mode: expected a call outside"):
        fastwgan.verify(G, D, REAL)


# The command line

USERS = """
import torch
from fastwgan import WeightClip, models

def pair():
    return models.mlp([6, 16, 10]), models.mlp([10, 16, 1], slope=0.2), torch.randn(16, 10)

def arguments():
    generator, critic, real = pair()
    return {"generator": generator, "critic": critic, "real": real, "latent": 6, "constraint": WeightClip(0.02),
            "critic_term": lambda s: 0.1 * s.real_scores.square().mean()}

def two():
    return pair()[:2]

def unknown():
    return arguments() | {"depth": 3}

def broken():
    raise KeyError("theirs")
"""


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A working directory with a module of the user's."""
    (tmp_path / "theirs.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("theirs", None)


def test_command_on_a_users_networks(users, capsys):
    assert cli.main(["verify", "--networks", "theirs:pair", "--device", "cpu", "--json", "out.json"]) == 0
    text = capsys.readouterr().out
    for expected in ("theirs:pair-clip: WeightClip()", "theirs:pair-norm-clip: NormClip(bound=0.5)", "passed: "):
        assert expected in text
    record = json.loads((users / "out.json").read_text())
    assert record["passed"] is True
    assert list(record["reports"]) == [f"theirs:pair-{name}" for name in ("clip", "norm-clip", "penalty", "dragan")]
    assert all(report["passed"] and report["rows"] for report in record["reports"].values())


def test_command_takes_a_factorys_arguments(users, capsys):
    options = ["--backend", "torch", "--seed", "3"]
    assert cli.main(["verify", "--networks", "theirs:arguments", *options]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("theirs:arguments: WeightClip(bound=0.02) with critic_term: torch on cpu, float32, batch 16")


def test_command_prints_the_report(users, capsys):
    assert cli.main(["verify", "--networks", "theirs:pair", "--constraint", "clip"]) == 0
    (arguments,) = (arguments for _, arguments in command._jobs([], "theirs:pair", ["clip"], None, seed=0))
    assert capsys.readouterr().out == f"theirs:pair-clip: {fastwgan.verify(**arguments)}\n\n"


def test_command_fails_on_a_fault(users, capsys, monkeypatch):
    monkeypatch.setattr(reference, "interpolate", one_eps(None))
    arguments = ["verify", "--networks", "theirs:pair", "--backend", "torch", "--json", "out.json"]
    arguments += ["--constraint", "clip", "penalty"]
    assert cli.main(arguments) == 1
    text = capsys.readouterr().out
    assert "FAILED: " in text
    assert "first interpolate (points) in the critic step" in text
    record = json.loads((users / "out.json").read_text())
    assert record["passed"] is False
    assert [report["passed"] for report in record["reports"].values()] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "theirs"], "--networks: expected MODULE:FACTORY, got 'theirs'"),
        (["--networks", "nowhere:pair"], "--networks: nowhere:pair raised ModuleNotFoundError"),
        (["--networks", "theirs:nothing"], "--networks: theirs:nothing raised AttributeError"),
        (["--networks", "theirs:broken"], "--networks: theirs:broken raised KeyError('theirs')"),
        (["--networks", "theirs:two"], "--networks: expected theirs:two to return (generator, critic, real) or a dict"),
        (["--networks", "theirs:unknown"], "real, latent, constraint, critic_term, depth"),
        (["--networks", "theirs:pair", "--workload", "mlp"], "--workload: names built-in networks, and"),
        (["--workload", "vae"], "invalid choice: 'vae'"),
        (["--networks", "theirs:pair", "--drift", "0.1"], "unrecognized arguments: --drift 0.1"),
        (["--device", "nowhere"], "--device: nowhere cannot be used"),
        (["--json", "no/where.json"], "--json: no is no directory"),
        (["--seed", "-1"], "--seed: expected an int from 0"),
    ],
)
def test_command_names_bad_arguments(arguments, message, users, capsys):
    with pytest.raises(SystemExit) as raised:
        cli.main(["verify", *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_command_as_it_is_called(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastwgan", "verify", "--workload", "conditional", "--constraint", "penalty"]
    run = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "conditional-penalty: GradientPenalty(): " in run.stdout
