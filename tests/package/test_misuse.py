"""What the public names make of misuse: an error that names the argument, says what was expected and what came, and
leaves everything as it was.

A refused step may have used up random numbers of the process, where a network (dropout) or a callable for latents draws
some, and may have moved BatchNorm's averages; the networks here do neither. Everything else is compared: weights,
optimizers, counters and the trainer's own random streams.
"""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fastwgan.backend
from fastwgan import Adam, GradientPenalty, NormClip, RMSprop, Trainer, WeightClip, functional

REAL = torch.linspace(-1, 1, 24).view(8, 3)
ROW = torch.linspace(0, 2, 8).view(8, 1)
NETWORKS = ("generator", "critic", "generator_optimizer", "critic_optimizer")
CLIP, PENALTY = WeightClip(0.05), GradientPenalty()


def case(name, *rest):
    return pytest.param(*rest, id=name)


def same(a, b):
    """Bit for bit, all the way down."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Network(nn.Module):
    """Layers that ``spoil``, where it is set, takes over: spoil(layers, x, *cond)."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.spoil = None

    def forward(self, x, *cond):
        return self.layers(x) if self.spoil is None else self.spoil(self.layers, x, *cond)


def generator():
    return Network(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def critic():
    return Network(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def normed():
    """A critic that takes real and fake samples apart."""
    return Network(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 1))


def embedding():
    return Network(nn.Embedding(5, 2, sparse=True))


def trainer_of(generator=generator, critic=critic, **options):
    return Trainer(generator(), critic(), **({"latent": 4, "n_critic": 3, "backend": "torch"} | options))


def seeded():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - NumPy's global stream is part of a trainer's state
    random.seed(0)


def flags(trainer):
    """What a step could leave behind beside the state."""
    networks = (trainer.generator, trainer.critic)
    return [[p.requires_grad for p in m.parameters()] + [x.training for x in m.modules()] for m in networks]


# Steps


def after(change):
    """A network that spoils its output."""
    return lambda layers, x, *cond: change(layers(x))


def in_place(layers, x, *cond):
    return layers(x.mul_(2))


def raising(*_):
    raise KeyError("the user's own")


def no_graph(layers, x, *cond):
    with torch.no_grad():
        return layers(x)


def of_critic(t):
    return t.critic_step(REAL)


def of_generator(t):
    return t.generator_step(8)


def of_step(t):
    return t.step(REAL)


def of_real(s):
    return s.real_scores.mean() - s.fake_scores.mean()


def conditional(layers, x, *cond):
    return layers(x) + sum(c if isinstance(c, float) else c.float().mean(1, keepdim=True) for c in cond)


def exhausted(t):
    batches = iter([REAL] * 3)
    list(batches)
    return t.iteration(batches)


def closed(t):
    batches = (REAL for _ in range(3))
    batches.close()
    return t.iteration(batches)


def left(t):
    """How many critic steps are left to the iteration."""
    return 3 - t.critic_iterations % 3


class Loader:
    """More batches than one wants to see read."""

    def __iter__(self):
        for _ in range(10):
            yield REAL
        raise AssertionError("read to its end")


STEPS = [
    # real samples
    case("real-numpy", lambda t: t.critic_step(REAL.numpy()), {}, TypeError, "real: expected a tensor, got ndarray"),
    case("real-list", lambda t: t.step([[1.0] * 3]), {}, TypeError, "real: expected a tensor, got list"),
    case("real-none", lambda t: t.step(None), {}, TypeError, "real: expected a tensor, got NoneType"),
    case("real-int", lambda t: t.step(REAL.int()), {}, TypeError, "real: expected float16.*got torch.int32"),
    case("real-bool", lambda t: t.step(REAL > 0), {}, TypeError, "real: expected float16.*got torch.bool"),
    case("real-complex", lambda t: t.step(REAL.cfloat()), {}, TypeError, "real: expected float16.*got torch.complex64"),
    case("real-sparse", lambda t: t.step(REAL.to_sparse()), {}, TypeError, "real: expected a dense tensor.*sparse_coo"),
    case("real-0-d", lambda t: t.step(REAL[0, 0]), {}, ValueError, r"real: expected shape \[N, ...\], got a 0-d"),
    case("real-empty", lambda t: t.step(REAL[:0]), {}, ValueError, r"real: expected at least one.*got shape \(0, 3\)"),
    case("real-meta", lambda t: t.step(REAL.to("meta")), {},
         ValueError, "real: expected a tensor on cpu, got one on meta"),
    case("real-wide", lambda t: t.step(torch.ones(8, 4)), {},
         ValueError, r"generator: its output: expected real's shape"),
    case("real-double", lambda t: t.step(REAL.double()), {}, TypeError, "generator: its output: expected real's dtype"),
    # conditions are the networks' to judge
    case("conditions-of-other-count", lambda t: t.step(REAL, torch.ones(5, 1)),
         {"c": lambda layers, x, c: layers(x * c), "options": {"constraint": PENALTY}}, RuntimeError, "The size of"),
    case("conditions-meta", lambda t: t.step(REAL, torch.ones(8, 3, device="meta")),
         {"g": lambda layers, z, c: layers(z) + c}, RuntimeError, ""),
    # the generator's output
    *(
        case(f"fake-{name}-{kind}", call, {"g": spoil}, error, f"generator: its output: {message}")
        for kind, call in (("critic", of_critic), ("step", of_step))
        for name, spoil, error, message in (
            ("none", after(lambda y: None), TypeError, "expected a tensor, got NoneType"),
            ("list", after(lambda y: [y]), TypeError, "expected a tensor, got list"),
            ("empty-tuple", after(lambda y: ()), TypeError, "expected a tensor, got tuple"),
            ("tuple-of-none", after(lambda y: (None, y)), TypeError, "expected a tensor, got NoneType"),
            ("int", after(torch.Tensor.int), TypeError, "expected float16.*got torch.int32"),
            ("0-d", after(torch.Tensor.sum), ValueError, r"expected shape \[N, ...\], got a 0-d tensor"),
            ("empty", after(lambda y: y[:0]), ValueError, r"expected at least one element, got shape \(0, 3\)"),
            ("wide", after(lambda y: y.repeat(1, 2)), ValueError, r"expected real's shape \(8, 3\), got \(8, 6\)"),
            ("many", after(lambda y: y.repeat(2, 1)), ValueError, r"expected .*, got \(16, 3\)"),
            ("meta", after(lambda y: y.to("meta")), ValueError, "expected a tensor on cpu, got one on meta"),
            ("sparse", after(torch.Tensor.to_sparse), TypeError, "expected a dense tensor, got layout .*sparse_coo"),
        )
    ),
    case("fake-raises", of_critic, {"g": raising}, KeyError, "the user's own"),
    case("generated-none", of_generator, {"g": after(lambda y: None)},
         TypeError, "generator: its output: expected a tensor"),
    case("generated-meta", of_generator, {"g": after(lambda y: y.to("meta"))},
         ValueError, "generator: its output: expected a tensor on cpu, got one on meta"),
    case("generated-many", of_generator, {"g": after(lambda y: y.repeat(2, 1))},
         ValueError, r"generator: its output: expected shape \[8, ...\], got \(16, 3\)"),
    case("generated-raises", of_generator, {"g": raising}, KeyError, "the user's own"),
    case("generated-detached", of_generator, {"g": after(torch.Tensor.detach)},
         ValueError, "generator: its output: expected to depend on its parameters"),
    case("generated-from-latents-alone", of_generator, {"g": lambda layers, z: z[:, :3]},
         ValueError, "generator: its output: expected to depend on its parameters, got one without a graph"),
    case("generated-without-grad", of_generator, {"g": no_graph},
         ValueError, "generator: its output: expected to depend"),
    case("generator-frozen", lambda t: t.generator.requires_grad_(False) and t.generator_step(8), {},
         ValueError, "generator: expected trainable parameters, got none"),
    # the critic's
    *(
        case(f"scores-{name}-{kind}", of_critic, {"c": after(change), "options": {"constraint": constraint}},
             error, message)
        for kind, constraint in (("clip", CLIP), ("penalty", PENALTY))
        for name, change, error, message in (
            ("none", lambda y: None, TypeError, "critic: its output: expected a tensor, got NoneType"),
            ("list", lambda y: [y, y], TypeError, "critic: its output: expected a tensor, got list"),
            ("empty-tuple", lambda y: (), TypeError, "critic: its output: expected a tensor, got tuple"),
            ("tuple-of-none", lambda y: (None, y), TypeError, "critic: its output: expected a tensor, got NoneType"),
            ("int", lambda y: y.int(), TypeError, "critic: its output: expected float16.*got torch.int32"),
            ("float", lambda y: y.sum().item(), TypeError, "critic: its output: expected a tensor, got float"),
            ("complex", lambda y: y.cfloat(), TypeError, "critic: its output: expected float16.*got torch.complex64"),
            ("0-d", lambda y: y.mean(), ValueError, r"critic: its output: expected shape \["),
            ("empty", lambda y: y[:, :0], ValueError, "critic: its output: expected at least one element"),
            ("one-more", lambda y: torch.cat((y, y[:1])), ValueError, r"critic: its output: expected shape \[.*got \("),
            ("meta", lambda y: y.to("meta"), ValueError, "critic: its output: expected a tensor on cpu.*meta"),
            ("sparse", torch.Tensor.to_sparse, TypeError, "critic: its output: expected a dense tensor"),
            ("detached", torch.Tensor.detach, ValueError, "critic: its output: expected to depend on its parameters"),
        )
    ),
    case("scores-raise", of_critic, {"c": raising}, KeyError, "the user's own"),
    case("scores-without-grad", of_critic, {"c": no_graph},
         ValueError, "critic: its output: expected to depend on its parameters"),
    case(
        "scores-of-no-input", of_critic,
        {"c": lambda layers, x: layers(torch.ones_like(x)), "options": {"constraint": PENALTY}},
        ValueError, "critic: expected scores that depend on its input, got scores that do not",
    ),
    case("scores-of-no-parameter", of_critic, {"c": lambda layers, x: x.sum(1)},
         ValueError, "critic: its output: expected to depend on its parameters, got one without a graph"),
    case(
        "scores-of-another-count-for-fake", of_critic,
        {
            "c": lambda layers, x: layers(x) if torch.equal(x, REAL) else layers(x)[:4],
            "options": {"critic": normed},
        },
        ValueError, r"critic: its output: expected shape \[8, \.\.\.\], got \(4, 1\)",
    ),
    case("penalty-written-to", of_critic, {"c": in_place, "options": {"constraint": PENALTY}},
         ValueError, "critic: expected a forward pass that writes to neither its input nor its parameters, got one"),
    case(
        "real-written-to", of_critic,
        {
            "c": lambda layers, x: layers(x.mul_(1)),
            "options": {"critic": normed},
        },
        ValueError, "critic: expected a forward pass that writes to neither its input nor its parameters, got one",
    ),
    case("critic-frozen", lambda t: t.critic.requires_grad_(False) and t.critic_step(REAL), {},
         ValueError, "critic: expected trainable parameters, got none"),
    case("generator-step-scores-none", of_generator, {"c": after(lambda y: None)},
         TypeError, "critic: its output: expected a tensor, got NoneType"),
    case("generator-step-scores-few", of_generator, {"c": after(lambda y: y[:3])},
         ValueError, r"critic: its output: expected shape \[8, ...\], got \(3, 1\)"),
    case("generator-step-scores-detached", of_generator, {"c": after(torch.Tensor.detach)},
         ValueError, "critic: expected scores that depend on its input, got scores that do not"),
    case(
        "sparse-gradients", of_critic,
        {
            "c": lambda layers, x: layers[0](x.abs().long().clamp(0, 4)).sum((1, 2)),
            "options": {"critic": embedding},
            "warm": False,
        },
        TypeError, "critic: expected dense gradients, got torch.sparse_coo for layers.0.weight",
    ),
    # terms; a trainer that has them takes no step
    *(
        case(f"{name}-term-{kind}", call, {"options": {f"{name}_term": term}, "warm": False}, error, message and
             f"{name}_term: its result: {message}")
        for name, call in (("critic", of_critic), ("generator", of_generator))
        for kind, term, error, message in (
            ("float", lambda s: 0.5, TypeError, "expected a tensor, got float"),
            ("none", lambda s: None, TypeError, "expected a tensor, got NoneType"),
            ("int", lambda s: torch.ones(()).int(), TypeError, "expected float16.*got torch.int32"),
            ("of-samples", lambda s: s.fake_scores, ValueError,
             r"expected a 0-d tensor, such as a mean, got shape \(8, 1\)"),
            ("empty", lambda s: s.fake_scores[:0], ValueError, "expected at least one element"),
            ("detached", lambda s: s.fake_scores.mean().detach(), ValueError,
             "expected to depend on the (critic|generator), got one without a graph"),
            ("meta", lambda s: s.fake_scores.mean().to("meta"), ValueError,
             "expected a tensor on cpu, got one on meta"),
            ("raises", raising, KeyError, ""),
        )
    ),
    case("critic-term-of-no-such-thing", of_critic, {"options": {"critic_term": lambda s: s.scores}, "warm": False},
         AttributeError, ".*StepRecord.* has no attribute 'scores'"),
    case("generator-term-without-real", of_generator, {"options": {"generator_term": of_real}, "warm": False},
         ValueError, "generator_term: expected real samples, got none: give generator_step real="),
    *(
        case(f"generator-step-real-{kind}", lambda t, real=real: t.generator_step(8, real=real), {}, error, message)
        for kind, real, error, message in (
            ("list", [1.0], TypeError, "real: expected a tensor, got list"),
            ("few", REAL[:4], ValueError, "real: expected batch_size=8 samples, got 4"),
            ("meta", REAL.to("meta"), ValueError, "real: expected a tensor on cpu, got one on meta"),
        )
    ),
    *(
        case(
            f"outputs-of-both-{kind}", of_critic,
            {
                "c": lambda layers, x, further=further: (layers(x), further(x)),
                "options": {"independent_samples": True},
            },
            ValueError,
            f"critic: its output: expected further outputs with a row for each sample .*, got {got}: leave independent",
        )
        for kind, further, got in (
            ("mean", lambda x: x.mean(), r"shape \(\)"),
            ("weights", lambda x: torch.ones(3, 2), r"shape \(3, 2\)"),
            ("object", lambda x: [torch.Size((1,)), object()], "object"),
        )
    ),
    # conditions of fake samples
    *(
        case(f"fake-cond-{kind}-{name}", lambda t, call=call, cond=cond, fake=fake: call(t, *cond, fake_cond=fake),
             {"g": conditional, "c": conditional, "options": {"constraint": PENALTY}}, error, f"fake_cond: {message}")
        for name, call in (
            ("critic", lambda t, *cond, **own: t.critic_step(REAL, *cond, **own)),
            ("step", lambda t, *cond, **own: t.step(REAL, *cond, **own)),
        )
        for kind, cond, fake, error, message in (
            ("tensor", (ROW,), ROW, TypeError, "expected a tuple of conditions, got Tensor"),
            ("none", (ROW,), (), ValueError, "expected 1 conditions, as real samples have, got 0"),
            ("many", (), (ROW,), ValueError, "expected 0 conditions, as real samples have, got 1"),
            ("labels", (ROW,), (ROW.long(),), ValueError,
             r"expected conditions between which the penalty can interpolate, .* got torch.float32 \(8, 1\) and "
             r"torch.int64 \(8, 1\): give labels as one-hot floats"),
            ("wide", (ROW,), (ROW.repeat(1, 2),), ValueError, r"expected .*, got .* \(8, 1\) and .* \(8, 2\): give"),
            ("number", (1.0,), (2.0,), ValueError, "expected .*, got float and float: give labels"),
        )
    ),
    case("fake-cond-generator", lambda t: t.generator_step(8, ROW, fake_cond=(ROW, ROW)), {"g": conditional},
         ValueError, "fake_cond: expected 1 conditions, as real samples have, got 2"),
    # packs
    case("pack-real", lambda t: t.step(REAL[:7]), {"options": {"pack": 2}, "warm": False},
         ValueError, "real: expected a multiple of pack=2 samples, got 7"),
    case("pack-generated", lambda t: t.generator_step(7), {"options": {"pack": 2}, "warm": False},
         ValueError, "batch_size: expected a multiple of pack=2, got 7"),
    case("pack-critic", of_step, {"options": {"pack": 2}, "warm": False},
         ValueError, r"critic: its output: expected shape \[.*for 8 samples in packs of 2, got \(8, 1\)"),
    # latents and n_critic
    *(
        case(f"latent-{name}-{kind}", call, {"latent": latent}, error, message)
        for kind, call in (("critic", of_critic), ("generator", of_generator), ("sample", lambda t: t.sample(3)))
        for name, latent, error, message in (
            ("none", lambda n, device: None, TypeError, "linear"),  # a generator may want none: it is its to judge
            ("meta", lambda n, device: torch.ones(n, 4, device="meta"), ValueError,
             "latent: its result: expected a tensor on cpu, got one on meta"),
            ("raises", raising, KeyError, "the user's own"),
        )
    ),
    case("latent-count-critic", of_critic, {"latent": lambda n, device: torch.ones(n - 1, 4)},
         ValueError, r"generator: its output: expected real's shape \(8, 3\), got \(7, 3\)"),
    case("latent-count-generator", of_generator, {"latent": lambda n, device: torch.ones(n - 1, 4)},
         ValueError, r"generator: its output: expected shape \[8, ...\], got \(7, 3\)"),
    case("n_critic-zero", of_step, {"n_critic": lambda i: 0},
         ValueError, "n_critic: its result: expected an int >= 1, got 0"),
    case("n_critic-float", of_step, {"n_critic": lambda i: 2.0},
         TypeError, "n_critic: its result: expected an int, got fl"),
    case("n_critic-none", of_step, {"n_critic": lambda i: None},
         TypeError, "n_critic: its result: expected an int, got No"),
    case("n_critic-raises", of_step, {"n_critic": raising}, KeyError, "the user's own"),
    # iteration
    case("iteration-exhausted", exhausted, {}, ValueError, "batches: expected [23], one for each critic step.*got 0"),
    case("iteration-closed", closed, {}, ValueError, "batches: expected [23], one for each critic step.*got 0"),
    case("iteration-few", lambda t: t.iteration([REAL] * (left(t) - 1)), {},
         ValueError, "batches: expected [23], one for"),
    case("iteration-many", lambda t: t.iteration([REAL] * 4), {},
         ValueError, "batches: expected [23],.* got [34] or more"),
    case("iteration-loader", lambda t: t.iteration(Loader()), {},
         ValueError, "batches: expected [23],.* got [34] or more"),
    case("iteration-number", lambda t: t.iteration(3), {}, TypeError, "batches: expected an iterable, got int"),
    case("iteration-none", lambda t: t.iteration(None), {}, TypeError, "batches: expected an iterable, got NoneType"),
    case("iteration-empty-tuple", lambda t: t.iteration([()] * left(t)), {},
         ValueError, "batches: expected real samples"),
    case("iteration-numpy", lambda t: t.iteration([REAL] * (left(t) - 1) + [REAL.numpy()]), {},
         TypeError, "real: expected"),
    case("iteration-empty-last", lambda t: t.iteration([REAL] * (left(t) - 1) + [REAL[:0]]), {},
         ValueError, "real: expect"),
    case("iteration-raises", lambda t: t.iteration(map(raising, [1])), {}, KeyError, "the user's own"),
    # numbers
    *(
        case(f"{name}-{value}", lambda t, call=call, value=value: call(t, value), {}, error, f"{name}: expected an int")
        for name, call in (("batch_size", Trainer.generator_step), ("n", Trainer.sample))
        for value, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError), (None, TypeError))
    ),
    case("sample-ema", lambda t: t.sample(3, ema=True), {},
         ValueError, "ema: expected a trainer that was made with ema="),
    case("sample-raises", lambda t: t.sample(3), {"g": raising}, KeyError, "the user's own"),
    # modes
    *(
        case(f"inference-mode-{name}", torch.inference_mode()(call), {}, RuntimeError, "torch.inference_mode: expected")
        for name, call in (
            ("critic", of_critic), ("generator", of_generator), ("step", of_step),
            ("iteration", lambda t: t.iteration([REAL] * left(t))),
            ("load", lambda t: t.load_state_dict(t.state_dict())),
        )
    ),
]  # fmt: skip


TIMES = [
    case(f"{c.id}-{when}", *c.values, steps)
    for c in STEPS
    for when, steps in (("at-first", 0), ("under-way", 4))
    if not steps or c.values[1].get("warm", True)  # else its networks allow no step
]


@pytest.mark.parametrize(("call", "spoilt", "error", "message", "steps"), TIMES)
def test_refused_steps_change_nothing(call, spoilt, error, message, steps):
    """A trainer that refuses something is then as it was, and as one that was never asked."""
    ends = []
    for asked in (True, False):
        seeded()
        t = trainer_of(**spoilt.get("options", {}))
        for _ in range(steps):
            t.step(REAL)
        good = t.latent, t.n_critic
        if asked:
            t.latent, t.n_critic = spoilt.get("latent", t.latent), spoilt.get("n_critic", t.n_critic)
            t.generator.spoil, t.critic.spoil = spoilt.get("g"), spoilt.get("c")
            before, real, was = t.state_dict(), REAL.clone(), flags(t)
            with pytest.raises(error, match=f"^['\"]?{message}"):
                call(t)
            t.generator.requires_grad_(True)
            t.critic.requires_grad_(True)
            assert same(t.state_dict(), before)
            assert flags(t) == was
            assert torch.equal(REAL, real)
            t.latent, t.n_critic = good
            t.generator.spoil = t.critic.spoil = None
        if spoilt.get("warm", True):
            t.generator_step(8)
            t.step(REAL)
        ends.append(t.state_dict())
    assert same(*ends)


@pytest.mark.parametrize("constraint", [CLIP, PENALTY], ids=["clip", "penalty"])
def test_no_grad_and_what_was_made_in_inference_mode_do_no_harm(constraint):
    """Steps set the mode that they need, and copy what no graph could keep: a critic with BatchNorm keeps real."""
    ends = []
    with torch.inference_mode():
        theirs = REAL.clone()
    for real, mode in ((REAL, torch.enable_grad()), (REAL, torch.no_grad()), (theirs, torch.enable_grad())):
        for critics in (critic, normed):
            seeded()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "GradientPenalty with a critic that has BatchNorm")
                t = trainer_of(critic=critics, constraint=constraint)
            with mode:
                for _ in range(4):
                    t.step(real)
            ends.append(t.state_dict())
    assert all(same(end, ends[i % 2]) for i, end in enumerate(ends))


def test_a_step_of_nans_is_left_out():
    """It counts as one, but nothing else has changed; the error names the network and its first parameter."""
    t = trainer_of()
    t.step(REAL)
    before = t.state_dict()
    t.critic.spoil = after(lambda y: y * float("nan"))
    with pytest.raises(FloatingPointError, match="^critic: step 2 had gradients that are not finite, first in layers"):
        t.critic_step(REAL)
    left_out = t.state_dict()
    assert same([left_out[k] for k in NETWORKS], [before[k] for k in NETWORKS])
    assert (t.critic_iterations, t.generator_iterations) == (2, 0)


# Making a trainer


def on_meta():
    return critic().to("meta")


def half():
    return critic().half()


def complex_critic():
    return Network(nn.Linear(3, 1, dtype=torch.complex64))


def in_inference_mode(make):
    """What it makes there."""
    return torch.inference_mode()(make)


def shared():
    layers = nn.Linear(4, 3)
    return {"generator": lambda: layers, "critic": lambda: nn.Sequential(layers, nn.Linear(3, 1))}


def optimizer(kind=torch.optim.SGD, name="critic", of="critic", **options):
    """Options with an optimizer for the ``name``, over parameters of ``of``."""
    networks = {"generator": generator(), "critic": critic()}
    made = kind(networks[of].parameters(), **options)
    return {n: (lambda m=m: m) for n, m in networks.items()} | {f"{name}_optimizer": made}


def scheduler(kind=torch.optim.lr_scheduler.ExponentialLR, name="critic", keep=True, **options):
    """Options with a scheduler, and its optimizer if that is kept."""
    made = optimizer(torch.optim.RMSprop, name, name)
    of = made[f"{name}_optimizer"] if keep else made.pop(f"{name}_optimizer")
    return made | {f"{name}_scheduler": kind(of, **options)}


def others_scheduler():
    of = torch.optim.RMSprop(critic().parameters())
    return optimizer(torch.optim.RMSprop) | {"critic_scheduler": torch.optim.lr_scheduler.ExponentialLR(of, 0.9)}


MAKING = [
    case("generator-none", lambda: {"generator": lambda: None},
         TypeError, "generator: expected an nn.Module, got NoneType"),
    case("critic-function", lambda: {"critic": lambda: torch.sin},
         TypeError, "critic: expected an nn.Module, got builtin"),
    case("critic-class", lambda: {"critic": lambda: nn.Linear}, TypeError, "critic: expected an nn.Module, got type"),
    case("generator-empty", lambda: {"generator": nn.Flatten},
         ValueError, "generator: expected trainable parameters, got"),
    case("critic-empty", lambda: {"critic": nn.Flatten}, ValueError, "critic: expected trainable parameters, got none"),
    case("critic-frozen", lambda: {"critic": lambda: critic().requires_grad_(False)},
         ValueError, "critic: expected train"),
    case("critic-meta", lambda: {"critic": on_meta},
         ValueError, "critic: expected all parameters of both networks on one"),
    case("shared", shared, ValueError, "critic: expected parameters of its own, got some that are the generator's too"),
    case("critic-complex", lambda: {"critic": complex_critic},
         TypeError, "critic: expected .*float32.*got torch.complex64"),
    case(
        "critic-complex-penalty", lambda: {"critic": complex_critic, "constraint": PENALTY},
        TypeError, "critic: expected parameters of float16.*got torch.complex64 in layers.0.weight",
    ),
    case("critic-inference", lambda: {"critic": in_inference_mode(critic)},
         ValueError, "critic: expected .*inference mode"),
    # latent, n_critic, seed, pack
    *(
        case(f"{name}-{value}", lambda name=name, value=value: {name: value}, error, f"{name}: expected {what}.* got ")
        for name, what, values in (
            ("latent", "an int", ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError))),
            ("latent", "an int or a callable", ((None, TypeError), (torch.ones(8, 4), TypeError))),
            ("n_critic", "an int", ((0, ValueError), (-5, ValueError), (2.5, TypeError), ("5", TypeError))),
            ("seed", "an int", ((-1, ValueError), (2**63, ValueError), (1.5, TypeError), (True, TypeError))),
            ("pack", "an int", ((0, ValueError), (1.5, TypeError), (None, TypeError))),
            ("nonfinite", "'raise' or 'skip'", (("ignore", ValueError), (None, ValueError), (True, ValueError))),
            ("memory_format", "None or torch.channels_last", (("channels_last", ValueError), (True, ValueError))),
            ("backend", "'auto', 'triton' or 'torch'", (("cuda", ValueError), (None, ValueError), (0, ValueError))),
            ("amp", "None, torch.bfloat16", (("bf16", ValueError), (True, ValueError), (torch.float64, ValueError))),
            (
                "ema", "a (finite )?number",
                ((1.0, ValueError), (-0.1, ValueError), (float("nan"), ValueError), ("0.9", TypeError)),
            ),
            ("critic_term", "a function of the step's record", ((0.1, TypeError), (torch.ones(()), TypeError))),
            ("generator_term", "a function of the step's record", ((True, TypeError), ("drift", TypeError))),
            (
                "max_norm", "a (finite )?number",
                (
                    (0, ValueError), (-1.0, ValueError), (float("inf"), ValueError), (float("nan"), ValueError),
                    (True, TypeError), ("1", TypeError), ([1.0], TypeError), ({"critic": 0.0}, ValueError),
                    ({"critic": 1.0, "generator": None}, TypeError), ({"generator": "1"}, TypeError),
                ),
            ),
            (
                "max_norm", "the keys 'critic', 'generator' or both",
                (({}, ValueError), ({"discriminator": 1.0}, ValueError), ({"critic": 1.0, 0: 1.0}, ValueError)),
            ),
            ("compile", "a bool", (("yes", TypeError), (1, TypeError), (None, TypeError))),
            ("cuda_graph", "'auto', True or False", (("yes", ValueError), (1, ValueError), (None, ValueError))),
            (
                "constraint", "WeightClip, NormClip or GradientPenalty",
                (("clip", TypeError), (WeightClip, TypeError), (None, TypeError), (0.01, TypeError)),
            ),
        )
        for value, error in values
    ),
    *(
        case(f"{name}-removed", lambda name=name: {name: 0.1},
             TypeError, f"{name}: was removed; write critic_term=lambda s: {name}")
        for name in ("blend", "drift")
    ),
    case("cuda_graph-cpu", lambda: {"cuda_graph": True},
         RuntimeError, "cuda_graph: True was asked for, but the networks are"),
    case("amp-half", lambda: {"amp": torch.float16, "critic": half},
         ValueError, "amp: expected .*float32, got .*float16"),
    case("amp-constraint", lambda: {"amp": torch.bfloat16, "constraint": "penalty"},
         TypeError, "constraint: expected Weigh"),
    case("exclude-nothing", lambda: {"constraint": WeightClip(exclude="norm.*")},
         ValueError, "exclude: 'norm.\\*' matches no parameter of the critic"),
    case("exclude-no-module", lambda: {"constraint": WeightClip(exclude=(nn.Conv2d,))},
         ValueError, "exclude: .*Conv2d.* matches no parameter of the critic"),
    case("bound-too-large", lambda: {"critic": half, "constraint": WeightClip(1e6)},
         ValueError, "bound: expected a number that"),
    case("norm-too-large", lambda: {"critic": half, "constraint": NormClip(1e6)},
         ValueError, "bound: expected a number that"),
    case("norm-exclude-nothing", lambda: {"constraint": NormClip(exclude="norm.*")},
         ValueError, "exclude: 'norm.\\*' matches no parameter of the critic"),
    # optimizers and schedulers
    case("optimizer-class", lambda: {"critic_optimizer": torch.optim.Adam},
         TypeError, "critic_optimizer: expected .*got type"),
    case("optimizer-string", lambda: {"generator_optimizer": "adam"},
         TypeError, "generator_optimizer: expected .*got str"),
    case("optimizer-lbfgs", lambda: optimizer(torch.optim.LBFGS), TypeError, "critic_optimizer: expected .*got LBFGS"),
    case("optimizer-of-other-parameters", lambda: optimizer() | {"critic": critic},
         ValueError, "critic_optimizer: expected parameters of its own network only, got others"),
    case("optimizer-of-the-generators", lambda: optimizer(torch.optim.RMSprop, of="generator"),
         ValueError, "critic_optimizer: expected parameters of its own network only, got others"),
    case("optimizer-of-the-critics", lambda: optimizer(torch.optim.Adam, "generator", "critic"),
         ValueError, "generator_optimizer: expected parameters of its own network only, got others"),
    case("optimizer-contradicts-clip", lambda: optimizer(RMSprop, clip=0.5),
         ValueError, "critic_optimizer: its clip 0.5 contradicts the constraint's 0.01"),
    case("scheduler-of-another", others_scheduler,
         ValueError, "critic_scheduler: expected a scheduler of critic_optimizer"),
    case("scheduler-alone", lambda: scheduler(name="generator", keep=False, gamma=0.9),
         ValueError, "generator_scheduler: expected a scheduler of generator_optimizer"),
    case("scheduler-of-a-metric", lambda: scheduler(torch.optim.lr_scheduler.ReduceLROnPlateau),
         TypeError, "critic_scheduler: expected .*takes steps without a metric, got ReduceLROnPlateau"),
    case("scheduler-class", lambda: optimizer() | {"critic_scheduler": torch.optim.lr_scheduler.StepLR},
         TypeError, "critic_scheduler: expected .*, got type"),
    # what is refused late, after what is to be taken over
    case("taken-over-then-cuda_graph", lambda: optimizer(torch.optim.RMSprop) | {"cuda_graph": True},
         RuntimeError, "cuda_graph: True was asked for"),
    case(
        "taken-over-then-exclude", lambda: optimizer(torch.optim.Adam) | {"constraint": WeightClip(exclude="norm.*")},
        ValueError, "exclude: ",
    ),
    case("taken-over-then-scheduler", lambda: others_scheduler() | {"constraint": PENALTY},
         ValueError, "critic_scheduler: "),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), MAKING)
def test_refused_trainers_change_nothing(make, error, message):
    """Networks and optimizers are the caller's as they were."""
    options = make()
    networks = [options.get(name, own)() for name, own in (("generator", generator), ("critic", critic))]
    options |= {"generator": lambda: networks[0], "critic": lambda: networks[1]}
    optimizers = [x for x in options.values() if isinstance(x, torch.optim.Optimizer)]

    def now():
        modules = [m for m in networks if isinstance(m, nn.Module)]
        return (
            [[p for p in m.parameters() if p.device.type == "cpu"] for m in modules],
            [[p.requires_grad for p in m.parameters()] for m in modules],
            [(o.state_dict(), len(o._optimizer_load_state_dict_post_hooks)) for o in optimizers],
        )

    before = copy.deepcopy(now())
    with pytest.raises(error, match=f"^{message}"):
        trainer_of(**options)
    assert same(now(), before)


def test_triton_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr(fastwgan.backend.kernels, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="^backend: 'triton' was asked for, but Triton needs a GPU tensor"):
        trainer_of(backend="triton")


def test_trainers_are_not_made_in_inference_mode():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="^torch.inference_mode: expected"):
        trainer_of()


# Saving and loading


def without(*keys):
    return lambda s: {k: v for k, v in s.items() if k not in keys}


def with_(**parts):
    return lambda s: s | parts


def state_of(**options):
    """A state of another trainer, two steps old."""

    def state(_):
        other = trainer_of(**options)
        for _ in range(2):
            other.step(REAL)
        return other.state_dict()

    return state


WIDE = {"critic": lambda: Network(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 1))}
DEEP = {"critic": lambda: Network(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))}
COUNTERS = ("critic_iterations", "generator_iterations", "critic_steps_due", "eps_offset", "seed")
STATES = [
    case("none", lambda s: None, TypeError, "state_dict: expected a dict, got NoneType"),
    case("path", lambda s: "last.pt", TypeError, "state_dict: expected a dict, got str"),
    case("empty", lambda s: {}, ValueError, "state_dict: expected the state of a Trainer, missing critic, "),
    case("networks", lambda s: s["critic"],
         (TypeError, ValueError), "state_dict: expected the state of a Trainer, missing"),
    case("foreign", lambda s: {"epoch": 3, "model": s["critic"]},
         ValueError, "state_dict: expected the state of a Trainer,"),
    case("wrapped", lambda s: {"trainer": s}, ValueError, "state_dict: expected the state of a Trainer, missing"),
    *(case(f"no-{key}", without(key), ValueError, f"state_dict: .*missing {key}$")
      for key in (*NETWORKS, "random", "ema")),
    *(case(f"none-{key}", with_(**{key: None}), (TypeError, ValueError), "state_dict: ") for key in
      (*COUNTERS, "optimizers", "schedulers", "guards", "random", "ranks")),
    *(case(f"negative-{key}", with_(**{key: -1}), ValueError, rf"state_dict: {key}: expected an int in \[0")
      for key in COUNTERS),
    *(case(f"empty-{key}", with_(**{key: {}}), (ValueError, RuntimeError), "(state_dict: |Error.* loading state_dict)")
      for key in (*NETWORKS, "random", "guards")),
    *(case(f"short-{key}", with_(**{key: []}), ValueError, "state_dict: expected") for key in ("guards", "schedulers")),
    case("wider", state_of(**WIDE),
         RuntimeError, "Error.* in loading state_dict for Network:\\s+size mismatch for layers.0"),
    case("deeper", state_of(**DEEP), RuntimeError, "Error.* in loading state_dict for Network:\\s+Unexpected key"),
    case("other-optimizers", state_of(constraint=PENALTY),
         ValueError, "state_dict: expected the optimizers.*RMSprop.*Adam"),
    case("averages", state_of(ema=0.9),
         ValueError, "state_dict: has running averages.*expected a trainer made with ema="),
    case("late", lambda s: s | state_of()(s) | {"ranks": {0: {}}},
         ValueError, "state_dict: expected a Trainer's state, got a damaged one: KeyError"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), STATES)
def test_refused_states_change_nothing(change, error, message):
    seeded()
    t = trainer_of()
    for _ in range(4):
        t.step(REAL)
    state = change(t.state_dict())
    before = t.state_dict()
    with pytest.raises(error, match=f"^{message}"):
        t.load_state_dict(state)
    assert same(t.state_dict(), before)


def truncated(path):
    path.write_bytes(path.read_bytes()[:1000])


def newer(path):
    torch.save(torch.load(path) | {"version": 99}, path)


FILES = [
    case("missing", lambda path: path.unlink(), FileNotFoundError, "path: no checkpoint at "),
    case("directory", lambda path: path.unlink() or path.mkdir(), ValueError, "path: expected a file, got the dir"),
    case("truncated", truncated, ValueError, "path: .* is not a readable checkpoint"),
    case("empty", lambda path: path.write_bytes(b""), ValueError, "path: .* is not a readable checkpoint"),
    case("text", lambda path: path.write_text("epoch 3"), ValueError, "path: .* is not a readable checkpoint"),
    case("foreign", lambda path: torch.save(critic().state_dict(), path),
         ValueError, "path: .* was not written by fastwgan"),
    case("module", lambda path: torch.save(critic(), path), ValueError, "path: .* is not a readable checkpoint"),
    case("newer", newer, ValueError, "path: .* has format version 99, expected 2"),
    case("no-trainer", lambda path: torch.save({"format": "fastwgan", "version": 2, "data": {}}, path),
         ValueError, "path: .* holds no trainer"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "message"), FILES)
def test_refused_files_change_nothing(spoil, error, message, tmp_path):
    t = trainer_of()
    t.step(REAL)
    t.save(tmp_path / "last.pt")
    t.step(REAL)
    spoil(tmp_path / "last.pt")
    before = t.state_dict()
    t.last_checkpoint = "before"
    with pytest.raises(error, match=f"^{message}"):
        t.load(tmp_path / "last.pt")
    assert same(t.state_dict(), before)
    assert t.last_checkpoint == "before"


def test_a_save_into_nowhere_changes_nothing(tmp_path):
    t = trainer_of()
    before = t.state_dict()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        t.save(tmp_path / "nowhere" / "last.pt")
    assert same(t.state_dict(), before)
    assert t.last_checkpoint is None
    assert not list(tmp_path.iterdir())


# Ops, constraints and optimizers by themselves

X = torch.linspace(-1, 1, 12).view(4, 3)
META, NAN = X.to("meta"), float("nan")
LINEAR = nn.Linear(3, 1)
WRONG = (  # for any tensor
    ("numpy", X.numpy(), TypeError, "expected a tensor, got ndarray"),
    ("list", [1.0, 2.0], TypeError, "expected a tensor, got list"),
    ("none", None, TypeError, "expected a tensor, got NoneType"),
    ("int", X.int(), TypeError, "expected float16, bfloat16, float32 or float64, got torch.int32"),
    ("bool", X > 0, TypeError, "expected float16, bfloat16, float32 or float64, got torch.bool"),
    ("complex", X.cfloat(), TypeError, "expected float16, bfloat16, float32 or float64, got torch.complex64"),
    ("sparse", X.to_sparse(), TypeError, "expected a dense tensor, got layout torch.sparse_coo"),
    ("empty", X[:0], ValueError, "expected at least one element, got shape"),
)
OPS = (  # the name of each tensor, and how to call the op with it
    ("critic_loss", "real_scores", lambda x: functional.critic_loss(x, X)),
    ("critic_loss", "fake_scores", lambda x: functional.critic_loss(X, x)),
    ("hinge_critic_loss", "fake_scores", lambda x: functional.hinge_critic_loss(X, x)),
    ("generator_loss", "fake_scores", functional.generator_loss),
    ("wasserstein_loss", "y_true", lambda x: functional.wasserstein_loss(x, X)),
    ("wasserstein_loss", "y_pred", lambda x: functional.wasserstein_loss(X, x)),
    ("interpolate", "real", lambda x: functional.interpolate(x, X, seed=0)),
    ("interpolate", "fake", lambda x: functional.interpolate(X, x, seed=0)),
    ("perturb", "x", lambda x: functional.perturb(x, scale=1.0, seed=0)),
    ("penalty", "gradients", functional.penalty),
    ("gradient_penalty", "real", lambda x: functional.gradient_penalty(LINEAR, x, X)),
    ("gradient_penalty", "fake", lambda x: functional.gradient_penalty(LINEAR, X, x)),
)


def interpolated(**options):
    return lambda: functional.interpolate(X, X, **({"seed": 0} | options))


def penalised(of=lambda x: x.sum(1), real=X, fake=X, **options):
    return lambda: functional.gradient_penalty(of, real, fake, **options)


def perturbed(x=X, **options):
    return lambda: functional.perturb(x, **({"scale": 1.0, "seed": 0} | options))


def scored(of):
    """With a given seed: one that was drawn is spent when the critic is asked."""
    return penalised(of, seed=0)


def clipped(*parameters, bound=0.1):
    return lambda: functional.clip_weights_(parameters, bound)


def parameter(grad=None, **options):
    p = nn.Parameter(torch.ones(4, 3, **options), requires_grad=True)
    p.grad = grad
    return p


ALONE = [
    *(
        case(f"{op}-{name}-{kind}", lambda call=call, x=x: call(x), error, f"{name}: {message}")
        for op, name, call in OPS
        for kind, x, error, message in WRONG
    ),
    case("critic_loss-meta", lambda: functional.critic_loss(X, META),
         ValueError, "fake_scores: expected real_scores's dev"),
    case("critic_loss-double", lambda: functional.critic_loss(X, X.double()),
         TypeError, "fake_scores: expected real_sc.*dty"),
    case("labels-flat", lambda: functional.wasserstein_loss(X[:, 0], X[:, :1]),
         ValueError, r"y_true: .*shape \(4, 1\), got \(4"),
    case("interpolate-meta", lambda: functional.interpolate(META, X, seed=0),
         ValueError, "real: expected fake's device cpu"),
    case("interpolate-fewer", lambda: functional.interpolate(X[:3], X, seed=0),
         ValueError, "real: expected fake's shape"),
    case("interpolate-0-d", lambda: functional.interpolate(X[0, 0], X[0, 0], seed=0),
         ValueError, r"fake: expected shape \[N"),
    case("seed-none", interpolated(seed=None), TypeError, "seed: expected an int, got NoneType"),
    case("seed-negative", interpolated(seed=-1), ValueError, r"seed: expected an int in \[0, 2\*\*63\), got -1"),
    case("seed-true", interpolated(seed=True), TypeError, "seed: expected an int, got bool"),
    case("offset-float", interpolated(offset=torch.zeros(1)),
         ValueError, "offset: expected one int64 element on cpu, got"),
    case("offset-meta", interpolated(offset=META.long()[0, :1]),
         ValueError, "offset: expected one int64 element on cpu, got"),
    case("offset-two", interpolated(offset=torch.zeros(2).long()),
         ValueError, "offset: expected one int64 element on cpu, "),
    case("perturb-0-d", perturbed(X[0, 0]), ValueError, r"x: expected shape \[N, ...\], got a 0-d"),
    case("perturb-seed", perturbed(seed=-1), ValueError, r"seed: expected an int in \[0, 2\*\*63\), got -1"),
    case("perturb-offset", perturbed(offset=torch.zeros(1)), ValueError, "offset: expected one int64 element on cpu, "),
    case("scale-negative", perturbed(scale=-1.0), ValueError, "scale: expected a finite number >= 0, got -1"),
    case("scale-none", perturbed(scale=None), TypeError, "scale: expected a number, got NoneType"),
    case("scale-double", perturbed(scale=torch.ones(1, dtype=torch.float64)),
         ValueError, "scale: expected one float32 element on cpu, got torch.float64"),
    case("scale-two", perturbed(scale=torch.ones(2)),
         ValueError, "scale: expected one float32 element on cpu, got torch.float32 of shape"),
    case("scale-meta", perturbed(scale=META[0, :1]), ValueError, "scale: expected one float32 element on cpu, got"),
    case("blend-removed", lambda: functional.critic_loss(X, X, blend=0.5),
         TypeError, r"blend: was removed; write \(1 - blend\) \* critic_loss\(\.\.\.\) \+ blend \* "),
    case("blend-of-generator-removed", lambda: functional.generator_loss(X, blend=1),
         TypeError, r"blend: was removed; write \(1 - blend\) \* generator_loss\(\.\.\.\) \+ blend \* "),
    case("drift-removed", lambda: functional.critic_loss(X, X, drift=0.1),
         TypeError, r"drift: was removed; write critic_loss\(\.\.\.\) \+ drift \* real_scores"),
    case("unknown-keyword", lambda: functional.critic_loss(X, X, weight=0.1),
         TypeError, "got an unexpected keyword argument 'weight'"),
    case("backend-unknown", interpolated(backend="cuda"),
         ValueError, "backend: expected 'auto', 'triton' or 'torch', got"),
    case("gradients-0-d", lambda: functional.penalty(X[0, 0]),
         ValueError, r"gradients: expected shape \[N, ...\], got a 0-d"),
    case("kind-unknown", lambda: functional.penalty(X, kind="both"),
         ValueError, "kind: expected one of .*, got 'both'"),
    case("kind-none", lambda: functional.penalty(X, kind=None), ValueError, "kind: expected one of .*, got None"),
    case("target-nan", lambda: functional.penalty(X, target=NAN),
         ValueError, "target: expected a finite number >= 0, got nan"),
    case("target-string", lambda: functional.penalty(X, target="1"), TypeError, "target: expected a number, got str"),
    # gradient_penalty
    case("penalty-critic-number", penalised(3), TypeError, "critic: expected a callable, got int"),
    case("penalty-weight-negative", penalised(weight=-1), ValueError, "weight: expected a finite number >= 0, got -1"),
    case("penalty-weight-true", penalised(weight=True), TypeError, "weight: expected a number, got bool"),
    case("penalty-args-tensor", penalised(args=X), TypeError, "args: expected a tuple of arguments, got Tensor"),
    case("penalty-args-string", penalised(args="ab"), TypeError, "args: expected a tuple of arguments, got str"),
    case("penalty-batches", penalised(fake=X[:3]), ValueError, "real: expected fake's shape"),
    case("penalty-scores-none", scored(lambda x: None),
         TypeError, "critic: its output: expected a tensor, got NoneType"),
    case("penalty-scores-sum", scored(lambda x: x.sum()),
         ValueError, r"critic: its output: expected shape \[4, ...\], got"),
    case("penalty-scores-few", scored(lambda x: x[:3]),
         ValueError, r"critic: its output: expected shape \[4, ...\], got"),
    case("penalty-scores-detached", scored(torch.Tensor.detach),
         ValueError, "critic: expected scores that depend on its"),
    case("penalty-scores-constant", scored(lambda x: torch.ones(4)),
         ValueError, "critic: expected scores that depend on"),
    case("penalty-in-place", scored(lambda x: x.mul_(2).sum(1)),
         ValueError, "critic: expected a forward pass that writes"),
    case("penalty-raises", scored(raising), KeyError, "the user's own"),
    # clip_weights_
    case("clip-zero", clipped(X, bound=0), ValueError, "bound: expected a finite number > 0, got 0"),
    case("clip-nan", clipped(X, bound=NAN), ValueError, "bound: expected a finite number > 0, got nan"),
    case("clip-string", clipped(X, bound="0.1"), TypeError, "bound: expected a number, got str"),
    case("clip-tensor", clipped(X, bound=torch.tensor(0.1)), TypeError, "bound: expected a number, got Tensor"),
    case("clip-large", clipped(X, X.half(), bound=1e6),
         ValueError, "bound: expected a number that torch.float16 can hold"),
    case("clip-number", lambda: functional.clip_weights_(3, 0.1), TypeError, "parameters: expected tensors, got int"),
    case("clip-module", lambda: functional.clip_weights_(LINEAR, 0.1),
         TypeError, "parameters: expected tensors, got L"),
    case("clip-numpy", clipped(X, X.numpy()), TypeError, r"parameters\[1\]: expected a tensor, got ndarray"),
    case("clip-int", clipped(X, X.int()), TypeError, r"parameters\[1\]: expected float16, .*got torch.int32"),
    case("clip-complex", clipped(X, X.cfloat()),
         TypeError, r"parameters\[1\]: expected float16, .*got torch.complex64"),
    case("clip-sparse", clipped(X, X.to_sparse()), TypeError, r"parameters\[1\]: expected a dense tensor, got layout"),
    case("clip-expanded", clipped(X, X[:1].expand(4, 3)),
         ValueError, r"parameters\[1\]: expected each element to have its"),
    # clip_norms_
    case("norms-zero", lambda: functional.clip_norms_(X, 0), ValueError, "bound: expected a finite number > 0, got 0"),
    case("norms-per", lambda: functional.clip_norms_(X, 0.1, per="column"),
         ValueError, "per: expected 'row' or 'tensor', got 'column'"),
    case("norms-module", lambda: functional.clip_norms_(LINEAR, 0.1),
         TypeError, "parameters: expected tensors, got L"),
    case("norms-expanded", lambda: functional.clip_norms_((X, X[:1].expand(4, 3)), 0.1),
         ValueError, r"parameters\[1\]: expected each element to have its"),
    # constraints
    *(
        case(f"NormClip-per-{value}", lambda value=value: NormClip(per=value),
             ValueError, "per: expected 'row' or 'tensor', got ")
        for value in ("rows", None, 1)
    ),
    *(
        case(f"{kind.__name__}-bound-{value}", lambda kind=kind, value=value: kind(value), error, "bound: expected a ")
        for kind in (WeightClip, NormClip)
        for value, error in ((0, ValueError), (-0.1, ValueError), (NAN, ValueError), (float("inf"), ValueError),
                             ("0.1", TypeError), (None, TypeError), (True, TypeError))
    ),
    *(
        case(f"{kind.__name__}-exclude-{value}", lambda kind=kind, value=value: kind(exclude=value),
             TypeError, "exclude: expected parameter-name pat")
        for kind in (WeightClip, NormClip)
        for value in (3, None, (3,), int, ("norm.*", nn.Linear(1, 1)))
    ),
    *(
        case(f"{name}-{value}", lambda name=name, value=value: GradientPenalty(**{name: value}),
             error, f"{name}: expected ")
        for name, value, error in (
            ("weight", 0, ValueError), ("weight", NAN, ValueError), ("weight", "10", TypeError),
            ("kind", "both", ValueError), ("kind", None, ValueError), ("target", -1, ValueError),
            ("target", None, TypeError), ("at", "noise", ValueError), ("at", None, ValueError),
            ("every", 0, ValueError), ("every", 1.5, TypeError), ("every", True, TypeError),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ALONE)
def test_refused_calls_change_nothing(call, error, message):
    before, random_state = X.clone(), torch.get_rng_state()
    with pytest.raises(error, match=f"^['\"]?{message}"):
        call()
    assert torch.equal(X, before)
    assert torch.equal(torch.get_rng_state(), random_state)


def stepped(change):
    """A step after something has been done to the optimizer, its first parameter and its second."""

    def step(optimizer, p, q):
        change(optimizer, p, q)
        optimizer.step()

    return step


def set_lr(value):
    return stepped(lambda optimizer, p, q: optimizer.param_groups[0].update(lr=value))


def states(change):
    return lambda optimizer, p, q: optimizer.load_state_dict(change(optimizer.state_dict()))


OPTIMIZING = [
    case("sparse", stepped(lambda o, p, q: setattr(q, "grad", X.to_sparse())),
         TypeError, "grad: expected .*got .*sparse_coo"),
    case("grad-of-another-shape", stepped(lambda o, p, q: setattr(q, "data", torch.ones(5))),
         (TypeError, ValueError), "(grad|state):"),
    case("lr-negative", set_lr(-1), ValueError, "lr: expected a finite number >= 0, got -1"),
    case("lr-nan", set_lr(NAN), ValueError, "lr: expected a finite number >= 0, got nan"),
    case("lr-string", set_lr("0.1"), TypeError, "lr: expected a number, got str"),
    case("closure-raises", lambda o, p, q: o.step(raising), KeyError, "the user's own"),
    case("group-string", lambda o, p, q: o.add_param_group("x"),
         TypeError, "param_group: expected a dict with params, got 'x'"),
    case("group-empty", lambda o, p, q: o.add_param_group({"lr": 1.0}),
         TypeError, "param_group: expected a dict with params"),
    case("group-complex", lambda o, p, q: o.add_param_group({"params": parameter(dtype=torch.complex64)}), TypeError,
         r"params\[0\]: expected float16, .*got torch.complex64"),
    case("group-again", lambda o, p, q: o.add_param_group({"params": [p]}),
         ValueError, "some parameters appear in more than"),
    case("state-none", states(lambda s: None),
         ValueError, "state_dict: expected a dict of state and param_groups, got None"),
    case("state-empty", states(lambda s: {}), ValueError, "state_dict: expected a dict of state and param_groups"),
    case("state-foreign", states(lambda s: {"model": 1}),
         ValueError, "state_dict: expected a dict of state and .*got model"),
    case("state-groups", states(lambda s: s | {"param_groups": []}),
         ValueError, "state_dict: expected 1 parameter groups, got 0"),
    case("state-of-sgd", states(lambda s: torch.optim.SGD([parameter(), parameter()]).state_dict()), ValueError,
         "state_dict: expected a state of (RMSprop|Adam), missing "),
    case("state-of-fewer", states(lambda s: s | {"param_groups": [s["param_groups"][0] | {"params": [0]}]}), ValueError,
         "state_dict: expected 2 parameters in a group, got 1"),
    case("state-of-steps-alone", states(lambda s: s | {"state": {0: {"step": 1.0}}}),
         ValueError, "state_dict: parameter 0: exp"),
    case("state-lr", states(lambda s: s | {"param_groups": [s["param_groups"][0] | {"lr": -1}]}),
         ValueError, "state_dict: lr: expected"),
]  # fmt: skip


@pytest.mark.parametrize("kind", [RMSprop, Adam])
@pytest.mark.parametrize(("call", "error", "message"), OPTIMIZING)
def test_refused_updates_change_nothing(call, error, message, kind):
    p, q = parameter(X.clone()), parameter(X.clone())
    optimizer = kind([p, q], clip=2.0, backend="torch")
    optimizer.step()
    before = copy.deepcopy((p.data, optimizer.state_dict()["state"], len(optimizer.param_groups)))
    with pytest.raises(error, match=f"^['\"]?{message}"):
        call(optimizer, p, q)
    assert same((p.data, optimizer.state_dict()["state"], len(optimizer.param_groups)), before)


OPTIMIZERS = [
    case("params-number", 3, {}, TypeError, "params: expected tensors or groups of them, got int"),
    case("params-module", critic(), {}, TypeError, "params: expected tensors or groups of them, got Network"),
    case("params-tensor", parameter(), {}, TypeError, "params argument given to the optimizer should be an iterable"),
    case("params-none-in", [None], {}, TypeError, r"params\[0\]: expected a tensor, got NoneType"),
    case("params-numpy", [X.numpy()], {}, TypeError, r"params\[0\]: expected a tensor, got ndarray"),
    case("params-empty", [], {}, ValueError, "optimizer got an empty parameter list"),
    case("params-int", [X.int()], {}, TypeError, r"params\[0\]: expected float16, .*got torch.int32"),
    case("params-complex", [parameter(dtype=torch.complex64)], {},
         TypeError, r"params\[0\]: expected float16, .*complex64"),
    case("params-sparse", [X.to_sparse()], {}, TypeError, r"params\[0\]: expected a dense tensor, got layout"),
    case("params-no-leaf", [parameter() * 2], {}, ValueError, "can't optimize a non-leaf Tensor"),
    case("params-twice", [P := parameter(), P], {}, ValueError, r"params\[1\]: expected each parameter once"),
    *(
        case(f"{name}-{value}", [parameter()], {name: value}, error, rf"{name}: expected ")
        for name, value, error in (
            ("lr", -1, ValueError), ("lr", NAN, ValueError), ("lr", "0.1", TypeError),
            ("lr", torch.tensor(0.1), TypeError), ("eps", -1, ValueError), ("weight_decay", NAN, ValueError),
            ("clip", 0, ValueError), ("clip", NAN, ValueError), ("clip", "0.1", TypeError), ("clip", True, TypeError),
            ("backend", "cuda", ValueError), ("backend", None, ValueError),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("kind", [RMSprop, Adam])
@pytest.mark.parametrize(("params", "options", "error", "message"), OPTIMIZERS)
def test_refused_optimizers(params, options, error, message, kind):
    with pytest.raises(error, match=f"^{message}"):
        kind(params, **options)
