"""Which networks are known to keep their samples apart, by experiment on every layer, and what a Trainer does then."""

import copy
import re
from itertools import product
from random import Random

import pytest
import torch
from small_trainers import assert_same_state, quietly
from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrizations

from benchmarks.workloads import patch_critic
from fastwgan import GradientPenalty, Trainer, models
from fastwgan.engine import eager, structure

N, F64, BOTH, DIMS = 4, torch.float64, (False, True), range(-6, 6)
MODES = ("linear", "bilinear", "trilinear", "bicubic", "area", "nearest-exact")
# Of the last m dimensions, or of the last but m alone: the batch's may be among them.
PADDINGS = (1, *((1, -1) * m for m in range(1, 6)), *((0, 0) * m + (-1, 1) for m in range(5)))

# Layers for samples whose dimensions are all of size 4, by their kinds' names; other kinds need no arguments.
FORMS = {
    "Threshold": lambda kind: [kind(0.1, 2.0), kind(0.1, 2.0, inplace=True)],
    "(Leaky)?ReLU": lambda kind: [kind(), kind(inplace=True)],
    "Linear": lambda kind: [kind(4, 3), kind(4, 4, bias=False)],
    "PReLU": lambda kind: [kind(), kind(4)],
    "GroupNorm": lambda kind: [kind(groups, 4, affine=groups == 2) for groups in (1, 2, 4)],
    "LocalResponseNorm": lambda kind: [kind(2), kind(5, alpha=1.0)],
    "Softmax|Softmin|LogSoftmax|GLU": lambda kind: [kind(d) for d in DIMS],
    "LayerNorm|RMSNorm": lambda kind: [kind((4,) * m, elementwise_affine=m != 2) for m in range(1, 6)],
    "ChannelShuffle|Pixel(Uns|S)huffle": lambda kind: [kind(2)],
    "Upsample": lambda kind: [kind(3), kind(scale_factor=2), *(kind(6, mode=mode) for mode in MODES)],
    "Upsampling.*": lambda kind: [kind(scale_factor=2), kind((3, 5))],
    "Flatten": lambda kind: [kind(start, end) for start in DIMS for end in DIMS],
    "Unflatten": lambda kind: [kind(d, size) for d in DIMS for size in ((2, 2), (4,), (-1, 1, 2), torch.Size([4]))],
    "Unfold": lambda kind: [kind(2), kind(3, padding=1, stride=2)],
    "Fold": lambda kind: [kind(4, 2, stride=2), kind((5, 1), (2, 1))],
    "Conv.d": lambda kind: [
        kind(4, 4, 2), kind(4, 4, 2, groups=2, stride=2, bias=False), kind(4, 4, 3, padding="same"),
        *(kind(4, 4, 3, padding=1, padding_mode=mode) for mode in ("circular", "reflect", "replicate")),
    ],
    "ConvTranspose.d": lambda kind: [kind(4, 4, 2), kind(4, 4, 3, groups=2, stride=2, dilation=2)],
    "(Reflection|Replication|Zero)Pad.d": lambda kind: [kind(p) for p in PADDINGS],
    "CircularPad.d": lambda kind: [kind((1, 1) * m) for m in range(1, 6)],  # of more than is there it gives any numbers
    "ConstantPad.d": lambda kind: [kind(p, 0.5) for p in PADDINGS],
    "MaxPool.d": lambda kind: [kind(2), kind(3, stride=1, ceil_mode=True), kind(2, return_indices=True)],
    "AvgPool.d": lambda kind: [kind(2), kind(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False)],
    "LPPool.d": lambda kind: [kind(p, 2, stride=stride) for p in (1, 2, 4) for stride in (1, 2)],
    "AdaptiveMaxPool.d": lambda kind: [kind(1), kind(3), kind(2, return_indices=True)],
    "AdaptiveAvgPool.d": lambda kind: [kind(1), kind(3)],
    "(Instance|Batch)Norm.d": lambda kind: [kind(4, affine=a, track_running_stats=t) for a in BOTH for t in BOTH],
    "Residual": lambda kind: [
        kind(4, width, scale, norm=norm, first=first)
        for width, scale, norm, first in product((4, 6), (0.5, 1, 2), BOTH, BOTH)
    ],
}  # fmt: skip
RANDOM = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.RReLU)


def kind_name(kind):
    return kind.__name__


def forms_of(kind):
    forms = [forms for name, forms in FORMS.items() if re.fullmatch(name, kind.__name__)]
    return [layer.double() for layer in (forms[0](kind) if forms else [kind()])]


KINDS = {kind: forms_of(kind) for kind in structure._RULES}


def assert_apart(module, rank):
    """Compare a known network's output for two batches with that for one of both; return whether it takes them."""
    x, y = torch.randn(2, N, *(4,) * (rank - 1), dtype=F64)
    try:
        alone = module(x.clone())
    except Exception:  # not of these sizes
        return False
    both = torch.cat((x, y)).requires_grad_()
    output = module(both.clone())
    assert output.dim() == structure._output_rank(module, rank, [])
    assert output.shape == (2 * N, *alone.shape[1:]), f"{module} on input of {rank} dimensions"
    for i in (0, N, 2 * N - 1):
        (gradient,) = torch.autograd.grad(output[i].sum(), both, retain_graph=True)
        gradient[i] = 0
        assert not gradient.nan_to_num().any(), f"{module} on input of {rank} dimensions"
    if any(m.training and isinstance(m, RANDOM) for m in module.modules()):
        output, other = (torch.manual_seed(0) and module(torch.cat((x, part))) for part in (y, -y))
        assert torch.equal(output[:N], other[:N])
    else:
        torch.testing.assert_close(output, torch.cat((alone, module(y.clone()))), rtol=1e-9, atol=1e-12)
    return True


@pytest.mark.parametrize("kind", KINDS, ids=kind_name)
def test_known_layers_keep_samples_apart(kind):
    """Every kind of layer in the table is tried in many forms, in both modes, on input of 1 to 5 dimensions."""
    tried = 0
    for layer, training, rank in product(KINDS[kind], BOTH, range(1, 6)):
        known = structure.layers(layer.train(training), rank)
        assert (structure.doubt(layer, rank) is None) == (known is not None)
        if known is not None:
            assert known == (layer,)
            tried += assert_apart(layer, rank)
    assert tried, "not known in any form"


def test_known_chains_keep_samples_apart():
    """Random chains of layers are known only where each gets input of the rank that the one before really gives."""
    random, grown = Random(0), 0
    layers = [layer for forms in KINDS.values() for layer in random.sample(forms, min(6, len(forms)))]
    layers = [layer for layer in layers if not getattr(layer, "inplace", False)]  # which not every layer stands
    for training, rank, _ in product(BOTH, range(2, 6), range(15)):
        chain = []
        for layer in random.sample(layers, 60):
            module = nn.Sequential(*chain[:2], nn.Sequential(*chain[2:], layer)).train(training)
            known = structure.layers(module, rank)
            if known is not None and len(chain) < 5 and assert_apart(module, rank):
                chain.append(layer)
                assert known == tuple(chain)
        grown += len(chain)
    assert grown > 400


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d], ids=kind_name)
def test_dropout_masks_each_sample_by_itself(kind):
    x = torch.randn(64, *(4,) * (int(kind.__name__[-2]) + 1 if kind is not nn.Dropout else 2), dtype=F64)
    assert structure.layers(kind(), x.dim())
    y = kind()(x)
    assert 0.3 < (y != 0).double().mean() < 0.7
    assert torch.equal(y, 2 * x * (y != 0))


# Networks that mix samples, or may


def centred(x, *_):
    return x - 2 * x.mean(0)


class OwnLinear(nn.Linear):
    pass


class OwnSequential(nn.Sequential):
    def forward(self, x):
        return super().forward(centred(x))


class Deviation(nn.Module):
    """The minibatch's standard deviation beside each sample."""

    def forward(self, x):
        return torch.cat((x, x.std(0).mean().expand(len(x), 1)), 1)


class Remembers(nn.Module):
    """A layer that writes a buffer, and works with what the forward passes before have written."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean.lerp_(x.detach().mean(0), 0.5)
        return x - self.mean


class Gate(nn.Module):
    """A layer that mixes samples once it is opened."""

    opened = False

    def forward(self, x):
        return centred(x) if self.opened else x


def mlp(*first):
    return nn.Sequential(*(first or (nn.Linear(6, 6),)), nn.ReLU(), nn.Linear(6, 1))


def conv(*between):
    return nn.Sequential(nn.Conv1d(2, 2, 1), *between, nn.Flatten(), nn.Linear(12, 1))


def changed(critic, change):
    change(critic)
    return critic


def with_row(critic):
    critic[0].weight = nn.Parameter(torch.randn(6))  # takes a dimension away


def with_function(critic):
    del critic[0].norm1
    critic[0].norm1 = centred


def scaled_by_mean(m, x, y):
    return y * y.mean()


def centred_before(m, x):
    return centred(*x)


def block():
    return nn.Sequential(models.Residual(3, 3, 1, norm=False), nn.Flatten(), nn.Linear(48, 1))


UNKNOWN = {  # with the shape of a sample
    "Flatten(0)": (lambda: mlp().append(nn.Flatten(0)), 6),
    "Flatten(0), Unflatten(0)": (lambda: mlp(nn.Flatten(0), nn.Softmax(0), nn.Unflatten(0, (-1, 6))), 6),
    "Unflatten(0)": (lambda: mlp(nn.Unflatten(0, (2, -1)), nn.Softmax(1), nn.Flatten(0, 1)), 6),
    "Softmax(0)": (lambda: mlp(nn.Softmax(0)), 6),
    "Softmax(-2)": (lambda: mlp(nn.Softmax(-2)), 6),
    "Softmax()": (lambda: nn.Sequential(nn.Softmax(), nn.Flatten(), nn.Linear(12, 1)), 2, 6),
    "GLU(0)": (lambda: nn.Sequential(nn.GLU(0), nn.Linear(6, 2), nn.Flatten(0)), 6),
    "LayerNorm of the batch": (lambda: mlp(nn.LayerNorm((N, 6))), 6),
    "Conv1d without a batch": (lambda: mlp(nn.Conv1d(N, N, 1)), 6),
    "ConstantPad1d of the batch": (lambda: conv(nn.ConstantPad1d((0, 0, 0, 0, -1, 1), 0.0)), 2, 6),
    "Linear of one row": (lambda: changed(mlp(nn.Linear(6, 6, bias=False), nn.Softmax(-2)), with_row), 6, 6),
    "forward": (lambda: changed(mlp(), lambda m: setattr(m[1], "forward", centred)), 6),
    "forward of all": (lambda: changed(mlp(), lambda m: setattr(m, "forward", lambda x: m[2](centred(x)))), 6),
    "forward hook": (lambda: changed(mlp(), lambda m: m.register_forward_hook(scaled_by_mean)), 6),
    "forward hook inside": (lambda: changed(mlp(), lambda m: m[1].register_forward_hook(scaled_by_mean)), 6),
    "forward pre-hook": (lambda: changed(mlp(), lambda m: m.register_forward_pre_hook(centred_before)), 6),
    "forward pre-hook inside": (lambda: changed(mlp(), lambda m: m[2].register_forward_pre_hook(centred_before)), 6),
    "backward hook": (lambda: changed(mlp(), lambda m: m[1].register_full_backward_hook(lambda *_: None)), 6),
    "backward pre-hook": (lambda: changed(mlp(), lambda m: m[1].register_full_backward_pre_hook(lambda *_: None)), 6),
    "subclass of Sequential": (lambda: OwnSequential(*mlp()), 6),
    "subclass of Linear": (lambda: mlp(OwnLinear(6, 6)), 6),
    "BatchNorm in training": (lambda: mlp(nn.BatchNorm1d(6)), 6),
    "BatchNorm without averages": (lambda: mlp(nn.BatchNorm1d(6, track_running_stats=False)).eval(), 6),
    "InstanceNorm with averages": (lambda: conv(nn.InstanceNorm1d(2, track_running_stats=True)), 2, 6),
    "spectral_norm": (lambda: mlp(parametrizations.spectral_norm(nn.Linear(6, 6))), 6),
    "spectral_norm, old": (lambda: mlp(nn.utils.spectral_norm(nn.Linear(6, 6))), 6),
    "weight_norm": (lambda: mlp(parametrizations.weight_norm(nn.Linear(6, 6))), 6),
    "weight_norm, old": (lambda: mlp(nn.utils.weight_norm(nn.Linear(6, 6))), 6),
    "_conv_forward": (lambda: changed(conv(), lambda m: setattr(m[0], "_conv_forward", centred)), 2, 6),
    "minibatch deviation": (lambda: mlp(Deviation(), nn.Linear(7, 6)), 6),
    "buffer": (lambda: mlp(Remembers()), 6),
    "block with a function": (lambda: changed(block(), with_function), 3, 4, 4),
}


class HandsOn(nn.Module):
    """A generator whose samples are its latents."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, z, *cond):
        return z * self.factor


@pytest.fixture
def taken(monkeypatch):
    """The lengths of the batches that the critic is given, in order."""
    score, lengths = eager.Eager.score, []
    monkeypatch.setattr(eager.Eager, "score", lambda self, x, *cond: lengths.append(len(x)) or score(self, x, *cond))

    class Pass(eager.Pass):
        def __init__(self, *args):
            super().__init__(*args)
            lengths.append(len(self.states[0]))

    monkeypatch.setattr(eager, "Pass", Pass)
    return lengths


def trainer_of(critic, *shape, **options):
    z = torch.randn(N, *shape, dtype=F64)
    return quietly(Trainer, HandsOn(), critic.double(), latent=lambda n, device: z, **options)


def assert_step(trainer, taken, *cond, shared, twin=None):
    """Take a critic step, whose scores have to be those of a copy of the critic for real and for fake by themselves."""
    twin = twin or copy.deepcopy(trainer.critic)
    with torch.no_grad():
        fake = trainer.generator(trainer.latent(N, trainer.device), *cond)
        real = torch.randn_like(fake)
        scores = [quietly(twin, x, *cond).mean() for x in (real, fake)]
    taken.clear()
    metrics = quietly(trainer.critic_step, real, *cond)
    assert taken == ([2 * N] if shared else [N, N])
    assert trainer._steps.sharing.together is shared
    torch.testing.assert_close([metrics.real_score, metrics.fake_score], scores, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_networks_take_two_passes(name, taken):
    """Networks that mix samples, or may, get each batch by itself, and so give the numbers that they give for it."""
    make, *shape = UNKNOWN[name]
    critic, twin = [(torch.manual_seed(0), quietly(make).double())[1] for _ in range(2)]
    assert structure.layers(critic, len(shape) + 1) is None
    assert structure.doubt(critic, len(shape) + 1)
    assert_step(trainer_of(critic, *shape), taken, shared=False, twin=twin)


@pytest.mark.parametrize("when", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_all_modules_take_two_passes(when, taken):
    trainer = trainer_of(mlp(), 6)
    hook = {"forward": scaled_by_mean, "forward_pre": centred_before}.get(when, lambda *_: None)
    handle = getattr(hooks, f"register_module_{when}_hook")(hook)
    try:
        assert structure.doubt(trainer.critic, 2) == "there are hooks on all modules"
        assert structure.foreign(trainer.critic) == "hooks on all modules"
        assert_step(trainer, taken, shared=False)
    finally:
        handle.remove()
    assert structure.foreign(trainer.critic) is None
    assert_step(trainer, taken, shared=True)


@pytest.mark.parametrize(("kind", "method"), [(nn.Linear, "forward"), (nn.Conv1d, "_conv_forward")])
def test_patched_classes_take_two_passes(kind, method, taken, monkeypatch):
    trainer = trainer_of(mlp(), 6) if kind is nn.Linear else trainer_of(conv(), 2, 6)
    plain = getattr(kind, method)
    with monkeypatch.context() as patch:
        patch.setattr(kind, method, lambda self, x, *args: plain(self, centred(x), *args))
        assert_step(trainer, taken, shared=False)
    assert_step(trainer, taken, shared=True)


def test_compiled_modules_are_unknown():
    for part in (lambda m: m, lambda m: m[1]):
        critic = mlp()
        quietly(part(critic).compile)
        assert structure.layers(critic, 2) is None
        assert structure.foreign(critic)
    assert structure.layers(quietly(torch.compile, mlp()), 2) is None


def test_foreign_parts_are_named():
    """PyTorch's and this package's own layers are not foreign, known or not; hooks, patches and others' classes are."""
    own = (mlp(), models.resnet_critic(norm=True), nn.LSTM(6, 6), parametrizations.weight_norm(nn.Linear(6, 6)))
    assert [structure.foreign(m) for m in own] == [None] * 4
    for name in ("forward", "forward hook", "forward pre-hook inside", "backward hook", "_conv_forward"):
        assert "hooks or patched" in structure.foreign(UNKNOWN[name][0]())
    for name, kind in (("subclass of Linear", OwnLinear), ("minibatch deviation", Deviation)):
        assert kind.__name__ in structure.foreign(UNKNOWN[name][0]())


def test_functions_and_patched_classes_are_foreign(monkeypatch):
    assert structure.foreign(UNKNOWN["block with a function"][0]())
    monkeypatch.setattr(nn.ReLU, "forward", centred)
    assert structure.foreign(mlp())


def test_changes_count_from_the_next_step(taken):
    """A layer replaced, a hook or a patch takes the shared pass away at once, and gives it back when it goes."""
    critic = mlp()
    trainer, relu = trainer_of(critic, 6), critic[1]
    assert_step(trainer, taken, shared=True)
    critic[1] = Gate()
    assert_step(trainer, taken, shared=False)
    critic[1] = relu
    assert_step(trainer, taken, shared=True)
    for module in (critic, relu):
        handle = module.register_forward_hook(scaled_by_mean)
        assert_step(trainer, taken, shared=False)
        handle.remove()
        assert_step(trainer, taken, shared=True)
    relu.forward = centred
    assert_step(trainer, taken, shared=False)
    del relu.forward
    critic.insert(1, nn.Softmax(-1))
    assert_step(trainer, taken, shared=True)
    critic[1].dim = 0
    assert_step(trainer, taken, shared=False)


def test_modes_and_gates_count_from_the_next_step(taken):
    """BatchNorm shares a pass in evaluation alone; a gate that opens during training never does."""
    trainer, gated = trainer_of(mlp(nn.BatchNorm1d(6)), 6), trainer_of(mlp(Gate()), 6)
    for on in (True, False, True, False):
        trainer.critic.train(on)
        assert_step(trainer, taken, shared=not on)
        gated.critic[0].opened = on
        assert_step(gated, taken, shared=False)


# The user's word, and conditions


class Conditional(nn.Linear):
    """A critic that scales samples by a condition, which each has its own of, or all share."""

    def forward(self, x, cond=1.0):
        cond = cond["scale"] if isinstance(cond, dict) else cond
        return super().forward(x * cond)


class Neighbours(nn.Linear):
    """A critic of a graph's vertices, which an adjacency matrix mixes."""

    def forward(self, x, adjacency):
        return super().forward(adjacency @ x)


def test_the_users_word_shares_one_pass(taken):
    """A class of the user's shares it, without conditions and with some that each sample has or that all share."""
    scale = torch.randn(N, 1, dtype=F64)
    for cond in ((), (scale,), (scale.expand(N, 6),), (scale[0, 0],), (3.0,)):
        assert_step(trainer_of(Conditional(6, 1), 6, independent_samples=True), taken, *cond, shared=True)
        assert_step(trainer_of(Conditional(6, 1), 6), taken, *cond, shared=False)
    assert_step(trainer_of(Conditional(6, 1), 6, independent_samples=True), taken, {"scale": scale}, shared=False)
    adjacency = torch.rand(N, N, dtype=F64)  # no row for each sample, although as long as the batch
    assert_step(trainer_of(Neighbours(6, 1), 6), taken, adjacency, shared=False)


def test_the_word_is_refused_before_anything_changes():
    """Conditions of another length are, whatever the generator would have drawn; so is a word that is no bool."""

    class Dropping(HandsOn):
        def forward(self, z, *cond):
            return nn.functional.dropout(super().forward(z))

    for word in (1, 0, None, "auto"):
        with pytest.raises(TypeError, match="^independent_samples: expected a bool, got"):
            Trainer(HandsOn(), mlp().double(), latent=6, independent_samples=word)
    trainer = quietly(Trainer, Dropping(), Conditional(6, 1).double(), latent=6, independent_samples=True)
    real, before = torch.ones(N, 6, dtype=F64), trainer.state_dict()
    for cond, step in product(((N - 1,), (2 * N, 6), (1, N)), (trainer.step, trainer.critic_step)):
        with pytest.raises(ValueError, match="^independent_samples: expected conditions with a row for each"):
            step(real, torch.ones(cond, dtype=F64))
        assert_same_state(trainer.state_dict(), before)


def test_the_word_is_refused_for_batchnorm_in_training(taken):
    trainer = trainer_of(mlp(OwnLinear(6, 6), nn.BatchNorm1d(6)), 6, independent_samples=True)
    with pytest.raises(ValueError, match="^independent_samples: .* BatchNorm in training mode"):
        trainer.step(torch.ones(N, 6, dtype=F64))
    trainer.critic.eval()
    assert_step(trainer, taken, shared=True)


# This package's critics

KNOWN = {  # with the shape of a sample
    "mlp": (lambda: models.mlp([12, 8, 1], slope=0.2), 3, 4),
    "dcgan": (lambda: models.dcgan_critic(channels=1, width=2, size=16, norm=False), 1, 16, 16),
    "dcgan, evaluating": (lambda: models.dcgan_critic(channels=1, width=2, size=16).eval(), 1, 16, 16),
    "ctgan, evaluating": (lambda: models.ctgan_critic(3, width=8, pack=2).eval(), 6),
    "resnet": (lambda: models.resnet_critic(width=2), 3, 32, 32),
    "resnet, evaluating": (lambda: models.resnet_critic(width=2, norm=True).eval(), 3, 32, 32),
    "patch": (lambda: patch_critic(width=2), 3, 32, 32),
}


@pytest.mark.parametrize("name", KNOWN)
def test_own_critics_share_one_pass(name, taken):
    make, *shape = KNOWN[name]
    assert_step(trainer_of(make(), *shape), taken, shared=True)
    trainer = trainer_of(make(), *shape, constraint=GradientPenalty())
    taken.clear()
    trainer.critic_step(torch.randn(N, *shape, dtype=F64))
    piecewise = name in ("mlp", "dcgan", "ctgan, evaluating")
    assert taken == ([3 * N] if piecewise else [2 * N, N])  # the penalty's points come last


def test_own_critics_with_batchnorm_or_changes_are_unknown():
    normed = (models.dcgan_critic(), models.resnet_critic(norm=True), patch_critic(norm="batch"))
    assert [structure.layers(critic, 4) for critic in normed] == [None] * 3
    assert structure.layers(models.ctgan_critic(3), 2)  # its dropout in training is no reason
    assert structure.layers(models.resnet_critic(), 3) is None
    for change in (
        lambda block: setattr(block, "norm2", Gate()),
        lambda block: setattr(block, "norm2", nn.Softmax(0)),
        lambda block: setattr(block, "norm2", nn.Sequential(nn.Identity(), Gate())),
        lambda block: setattr(block, "forward", centred),
        lambda block: setattr(block.conv1, "_conv_forward", centred),
        lambda block: block.conv2.register_forward_hook(lambda *_: None),
        lambda block: block.register_forward_pre_hook(lambda *_: None),
    ):
        critic = models.resnet_critic(width=2)
        assert structure.layers(critic, 4)
        change(critic[1])
        assert structure.layers(critic, 4) is None
