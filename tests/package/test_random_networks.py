"""Random networks under random options of a Trainer, each beside a loop written out in plain PyTorch, in float64.

A seed is one case: the message of a failure has it with all that was drawn, and ``check(seed)`` runs it again.
"""

import copy
import random
import types
from collections import deque

import pytest
import torch
import torch.nn.functional as F
from small_trainers import quietly
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from fastwgan import Adam, GradientPenalty, NormClip, RMSprop, Trainer, WeightClip, functional, models, reference

F64 = torch.float64
C, V = 6, 6  # channels inside the networks; the width of latents, and of a matrix that is a condition
ROLES = "critic", "generator"
# PyTorch's own, of a scheduler that is copied before its first step.
pytestmark = pytest.mark.filterwarnings("ignore:Seems like `optimizer.step..` has been overridden")


class Own(nn.Module):
    """A layer of somebody's own, which leaves some of its parameters, buffers and attributes unused."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls, self.alpha = function, 0, 0.0
        self.a, self.b = (nn.Parameter(torch.randn(C, C) / 3) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(C))
        for name, value in (("center", torch.zeros(())), ("mean", torch.zeros(C)), ("var", torch.ones(C))):
            self.register_buffer(name, value)

    def forward(self, x):
        return self.function(self, x)


def counted(m, x):
    m.calls += 1
    return x * (1 + 0.5 * (m.calls % 3))


def centered(m, x):
    m.center = 0.9 * m.center + 0.1 * x.detach().mean()  # not in place
    return x - m.center


def summed(m, x):
    """Use a weight that is a sum of two, whose gradients share memory."""
    weight = (m.a.view(-1) + m.b.view(-1)).view(C, C)
    return F.linear(x.movedim(1, -1), weight).movedim(-1, 1).contiguous()


def attention(m, x):
    tokens = x.reshape(len(x), -1, 3)
    return F.scaled_dot_product_attention(tokens @ m.a[:3, :3], tokens @ m.b[:3, :3], tokens).reshape(x.shape)


APART = {"summed": summed, "attention": attention, "fade": lambda m, x: m.alpha * x.tanh() + (1 - m.alpha) * x}
MIXING = {
    "own BatchNorm": lambda m, x: F.batch_norm(x, m.mean, m.var, m.scale, training=True, momentum=0.3),
    "counted": counted,
    "centered": centered,
    "batch scale": lambda m, x: (x - x.min()) / (x.max() - x.min() + 1),
    "batch deviation": lambda m, x: x + (x.var(0, unbiased=False) + 1e-4).sqrt().mean(),
}


def mix(inputs, outputs, size):
    """Make the layer that mixes channels of samples [N, channels, *size]."""
    kind = (nn.Linear, nn.Conv1d, nn.Conv2d)[len(size)]
    return kind(inputs, outputs, **({"kernel_size": 3, "padding": 1} if size else {}))


def tied(size):
    first, second = mix(C, C, size), mix(C, C, size)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def menus(size):
    """Return what makes layers from [N, C, *size] to the same, by name: those that keep samples apart; the others."""
    rank, norms, old = 2 + len(size), parametrizations, nn.utils
    own, norm = lambda: mix(C, C, size), nn.BatchNorm2d if len(size) == 2 else nn.BatchNorm1d
    apart = {
        "mix": own, "ReLU": lambda: nn.Sequential(own(), nn.ReLU()), "SiLU": nn.SiLU, "Softplus": nn.Softplus,
        "LeakyReLU": lambda: nn.Sequential(own(), nn.LeakyReLU(0.2, inplace=True)), "PReLU": lambda: nn.PReLU(C),
        "GLU": lambda: nn.Sequential(mix(C, 2 * C, size), nn.GLU(1)), "softmax(1)": lambda: nn.Softmax(1),
        "log softmax": lambda: nn.LogSoftmax(-1), "GroupNorm": lambda: nn.GroupNorm(2, C), "tied": lambda: tied(size),
        "LayerNorm": lambda: nn.LayerNorm((C, *size)), "Dropout": lambda: nn.Dropout().eval(),
        "BatchNorm, eval": lambda: norm(C).eval(), "weight norm": lambda: norms.weight_norm(own()),
        "old weight norm": lambda: quietly(old.weight_norm, own()),
        "unflatten": lambda: nn.Sequential(nn.Unflatten(1, (2, -1)), nn.Tanh(), nn.Flatten(1, 2)),
        "flatten all": lambda: nn.Sequential(nn.Flatten(0), nn.Softsign(), nn.Unflatten(0, (-1, C, *size))),
    } | {name: lambda f=f: Own(f) for name, f in APART.items()}  # fmt: skip
    mixing = {
        "BatchNorm": lambda: norm(C), "BatchNorm of the batch": lambda: norm(C, track_running_stats=False).eval(),
        "softmax(0)": lambda: nn.Softmax(0), "softmin(-rank)": lambda: nn.Softmin(-rank),
        "softmax over samples": lambda: nn.Sequential(nn.Unflatten(0, (1, -1)), nn.Softmax(1), nn.Flatten(0, 1)),
        "spectral norm": lambda: norms.spectral_norm(own()),
        "old spectral norm": lambda: quietly(old.spectral_norm, own()),
    } | {name: lambda f=f: Own(f) for name, f in MIXING.items()}  # fmt: skip
    if rank < 4:
        apart["MaxPool1d"] = lambda: nn.MaxPool1d(3, 1, 1)  # over the channels of samples [N, C]
    if rank == 3:
        apart["InstanceNorm"] = lambda: nn.InstanceNorm1d(C)
        mixing["InstanceNorm, tracking"] = lambda: nn.InstanceNorm1d(C, track_running_stats=True)
        mixing["Softmax2d"] = nn.Softmax2d
    if rank == 4:
        apart |= {"InstanceNorm": lambda: nn.InstanceNorm2d(C, affine=True), "AvgPool": lambda: nn.AvgPool2d(3, 1, 1)}
        apart |= {"Softmax2d": nn.Softmax2d, "Residual": lambda: models.Residual(C, C, 1, norm=False)}
        apart["shuffle"] = lambda: nn.Sequential(nn.LocalResponseNorm(3), nn.ChannelShuffle(2))
    return apart, mixing


class Wrapped(nn.Module):
    """A class of somebody's, which may take a number, or a label for each sample, or a matrix for all samples."""

    def __init__(self, net, width):
        super().__init__()
        self.net, self.embed = net, nn.Embedding(4, width)

    def forward(self, x, cond=1.0):
        if isinstance(cond, float):
            return self.net(x * cond)
        if cond.dim() == 1:
            return self.net(x + self.embed(cond).view_as(x))
        flat = x.flatten(1)
        return self.net(torch.cat((flat[:, :V] @ cond, flat[:, V:]), 1).view_as(x))


class Twice(nn.Sequential):
    def forward(self, x):
        return super().forward(x) - 0.5 * super().forward(0.5 * x)


def halved(module, args, output):
    return 0.5 * output


def formed(form, layers):
    net = (Twice if form == "subclass" else nn.Sequential)(*layers)
    if form == "forward set":
        net.forward = types.MethodType(lambda self, x: 2 * nn.Sequential.forward(self, x), net)
    elif form == "hook":
        net.register_forward_hook(halved)
    return net


def core(network):
    """Return the outermost Sequential of a network."""
    return next(m for m in network.modules() if isinstance(m, nn.Sequential))


def clamp_gradients(network, bound):
    for p in network.parameters():
        trained = p.requires_grad  # a frozen one may be unfrozen later
        p.requires_grad_(True).register_hook(lambda g: g.clamp(-bound, bound))
        p.requires_grad_(trained)


class Case:
    """All that a seed draws, and what is made of it for the trainer and for the loop."""

    def __init__(self, seed):
        self.seed, self.random, self.drawn, self.grown = seed, random.Random(seed), {}, False
        draw = self.draw
        self.shape, self.pack = draw("samples", (6,), (6,), (3, 8), (2, 6, 6)), draw("pack", 1, 1, 1, 2)
        self.steps, self.cond = draw("steps", 6, 8, 10), draw("condition", *[None] * 3, "labels", "matrix", "number")
        apart, mixing = menus(self.shape[1:])
        keeps_apart, every = draw("critic keeps samples apart", True, False), sorted({**apart, **mixing})
        lists = [self.random.sample(sorted(apart) if keeps_apart else every, n) for n in (1, 2, 3, 4)]
        self.layers = {"critic": draw("critic", *lists)}
        self.layers["generator"] = draw("generator", *[self.random.sample(every, n) for n in (0, 1, 2, 3)])
        forms = *["sequential"] * 3, "class", "subclass", "forward set", "hook"
        self.form = {role: draw(f"{role} form", *forms) for role in ROLES}
        self.head = draw("head", "[N]", "[N, 1]", "[N, 1, *size]")
        self.frozen = {role: draw(f"{role} frozen", False, False, True) for role in ROLES}
        self.clamped = {role: draw(f"{role} gradients clamped", None, None, None, 1e-2, 1e-3) for role in ROLES}
        self.change = draw("change", None, None, "layer", "unfreeze", "hook", "gradient hook")
        self.changed, self.changed_at = draw("changed", *ROLES), draw("changed at", 2, 3, 4)
        self.moved, self.moved_at = draw("moved", None, "state_dict", "deepcopy"), draw("moved at", 1, 3, 5)
        self.constraint = self.draw_constraint()
        self.optimizer = {role: self.draw_optimizer(role) for role in ROLES}
        self.backend = draw("backend", "torch", "torch", "torch", "auto")
        self.options = {
            "backend": self.backend, "constraint": self.constraint, "pack": self.pack,
            "ema": draw("ema", None, 0.0, 0.9), "n_critic": draw("n_critic", 1, 2, 3, lambda i: 1 + i % 3),
            **self.draw_terms(),
            "independent_samples": keeps_apart and self.cond != "matrix" and draw("independent_samples", False, True),
            "max_norm": draw("max_norm", None, None, 0.1, {"critic": 0.1}, {"critic": 0.3, "generator": 0.03}),
        }  # fmt: skip

    def draw(self, name, *options):
        self.drawn[name] = drawn = self.random.choice(options)
        return drawn

    def draw_constraint(self):
        draw = self.draw
        if draw("constraint", "penalty", "clip") == "penalty":
            kind = draw("kind", "two-sided", "one-sided", "zero-centered", "power")
            weight = draw("weight", *((1e-3,) if kind == "power" else (0.1, 10.0)))
            at = draw("at", "interpolates", "real", "fake", "perturbed")
            return GradientPenalty(weight, kind, draw("target", 1.0, 0.0, 0.3), at, draw("every", 1, 1, 2))
        exclude = draw("exclude", (), (), ("*bias",), (type(mix(C, C, self.shape[1:])),))
        if draw("clip", "weights", "weights", "norms") == "weights":
            return WeightClip(draw("bound", 0.05, 0.3), exclude)
        return NormClip(draw("bound", 0.3, 1.0), draw("per", "row", "tensor"), exclude)

    def draw_terms(self):
        """Return the terms that make the losses those of :class:`Loop`, where they are others than WGAN's."""
        self.drift, self.blend = self.draw("drift", 0.0, 0.0, 0.01), self.draw("blend", 0.0, 0.0, 0.5, 1.0)
        # By numbers of its own, so that a seed's other draws are what they were before there were pairs.
        self.drawn["pairs"] = self.pairs = random.Random(-self.seed - 1).choice((0.0, 0.0, 0.3))

        def critic_term(s):
            gan = F.softplus(-s.real_scores).mean() + F.softplus(s.fake_scores).mean()
            blended = self.blend * (gan - functional.critic_loss(s.real_scores, s.fake_scores))
            pairs = self.pairs * F.softplus(s.fake_scores - s.real_scores).mean()
            return blended + self.drift * s.real_scores.square().mean() + pairs

        def generator_term(s):
            blended = self.blend * (F.softplus(-s.fake_scores).mean() - functional.generator_loss(s.fake_scores))
            if not self.pairs:
                return blended  # with no pass of real samples
            return blended + self.pairs * F.softplus(s.real_scores - s.fake_scores).mean()

        terms = {"critic_term": critic_term} if self.drift or self.blend or self.pairs else {}
        return terms | ({"generator_term": generator_term} if self.blend or self.pairs else {})

    def draw_optimizer(self, role):
        """(its name, or None for the default; its options; whether it has groups; the name of its schedule)."""
        names = "RMSprop", "Adam", "SGD", "AdamW", "fastwgan.RMSprop", "fastwgan.Adam"
        name = self.draw(f"{role} optimizer", None, *names)
        if name is None:
            return None, {}, False, None
        extra = {"weight_decay": 0.01} | ({"maximize": True} if role == "generator" else {})
        if "Adam" in name:
            extra |= {"betas": (0.5, 0.9)} | ({} if "." in name else {"amsgrad": True})
        else:
            extra |= {"momentum": 0.5} | ({} if name == "SGD" else {"centered": True, "alpha": 0.9})
        options = {"lr": 1e-4} if name == "SGD" else {"lr": 1e-3, "eps": 1e-3}
        options |= {key: value for key, value in extra.items() if self.random.random() < 0.25}
        self.drawn[f"{role} options"] = options
        lambdas = ["LambdaLR"] if self.change != "layer" else []  # which has one for each group there is at first
        schedule = self.draw(f"{role} schedule", None, "StepLR", "ExponentialLR", *lambdas)
        return name, options, self.draw(f"{role} groups", False, True), schedule

    def networks(self):
        """Return the generator and the critic, the same at each call."""
        torch.manual_seed(self.seed)
        (channels, *size), (apart, mixing) = self.shape, menus(self.shape[1:])
        count = torch.Size(size).numel()
        layers = {role: [{**apart, **mixing}[name]() for name in names] for role, names in self.layers.items()}
        first = {"generator": nn.Linear(V, C * count), "critic": mix(channels * self.pack, C, size)}
        packs = [nn.Unflatten(0, (-1, self.pack)), nn.Flatten(1, 2)] if self.pack > 1 else []
        layers["generator"] = [first["generator"], nn.Unflatten(1, (C, *size)), *layers["generator"]]
        layers["generator"].append(mix(C, channels, size))
        head = [mix(C, 1, size)] if self.head == "[N, 1, *size]" else [nn.Flatten(), nn.Linear(C * count, 1)]
        layers["critic"] = [*packs, first["critic"], *layers["critic"], *head]
        layers["critic"] += [nn.Flatten(0)] if self.head == "[N]" else []
        networks = []
        for role, width in (("generator", V), ("critic", channels * count)):
            net = formed(self.form[role], layers[role])
            networks.append((Wrapped(net, width) if self.cond or self.form[role] == "class" else net).to(F64))
            first[role].requires_grad_(not self.frozen[role])
            if self.clamped[role]:
                clamp_gradients(networks[-1], self.clamped[role])
        return networks

    def equip(self, role, network, *, ours):
        """Return the optimizer and the scheduler of a network, for the trainer or for the loop."""
        name, options, groups, schedule = self.optimizer[role]
        if name is None and ours:
            return None, None
        if name is None:
            penalised = isinstance(self.constraint, GradientPenalty)
            name, options = ("Adam", {"lr": 1e-4, "betas": (0.0, 0.9)}) if penalised else ("RMSprop", {"lr": 5e-5})
        kind = getattr(torch.optim, name.rpartition(".")[2])
        if ours and "." in name:
            kind, options = {"Adam": Adam, "RMSprop": RMSprop}[kind.__name__], options | {"backend": self.backend}
        late = list(core(network)[0].parameters()) if self.grown and role == self.changed else []
        params = [p for p in network.parameters() if p not in set(late)]
        if groups:
            params = [{"params": params[::2], "lr": options["lr"] / 3}, {"params": params[1::2]}]
        optimizer = kind(params, **options)
        settings = {"StepLR": (2, 0.5), "ExponentialLR": (0.8,), "LambdaLR": (lambda i: 1 / (1 + i),)}
        scheduler = schedule and getattr(torch.optim.lr_scheduler, schedule)(optimizer, *settings[schedule])
        if late:
            optimizer.add_param_group({"params": late})
        return optimizer, scheduler

    def trainer(self, generator, critic, latent, seed):
        made = {}
        for role, network in (("generator", generator), ("critic", critic)):
            made[f"{role}_optimizer"], made[f"{role}_scheduler"] = self.equip(role, network, ours=True)
        return quietly(Trainer, generator, critic, latent=latent, seed=seed, **made, **self.options)

    def alter(self, x):
        """Change a network of a trainer or a loop amid training, as people do."""
        network, optimizer = getattr(x, self.changed), getattr(x, f"{self.changed}_optimizer")
        if self.change == "layer":
            torch.manual_seed(self.seed + 1)
            channels, *size = self.shape if self.changed == "critic" else (V,)
            layer, self.grown = mix(channels, channels, size).to(F64), True
            core(network).insert(0, layer)
            if self.clamped[self.changed]:
                clamp_gradients(layer, self.clamped[self.changed])
            if self.optimizer[self.changed][0] or isinstance(x, Loop):  # a trainer's default optimizer follows
                optimizer.add_param_group({"params": list(layer.parameters())})
        elif self.change == "unfreeze":
            network.requires_grad_(True)
        elif self.change == "hook":
            core(network)[-1].register_forward_hook(halved)
        else:
            self.clamped[self.changed] = 1e-4  # below what it was
            clamp_gradients(network, 1e-4)

    def move(self, trainer, latent):
        """Return another trainer to go on with: a copy, or one of fresh networks that has loaded the state."""
        networks = nn.ModuleList((trainer.generator, trainer.critic))
        for m in networks.modules():  # what the old norms compute anew in each pass cannot be copied
            if {"weight_g", "weight_orig"} & m._parameters.keys():
                m.__dict__.pop("weight", None)
        if self.moved == "deepcopy":
            other = copy.deepcopy(trainer)
        else:
            networks = copy.deepcopy(networks)
            for x in (*networks.parameters(), *networks.buffers()):
                x.data.add_(1)
            other = self.trainer(*networks, latent, self.seed + 1)
            other.load_state_dict(trainer.state_dict())
            for role in filter(self.clamped.get, ROLES):  # networks that are copied by themselves lose these hooks
                clamp_gradients(getattr(other, role), self.clamped[role])
        return other

    def batch(self):
        n = self.random.choice((4, 6, 8)) * self.pack
        real, matrix = torch.randn(n, *self.shape, dtype=F64), torch.randn(V, V, dtype=F64)
        conds = {"labels": torch.arange(n) % 4, "matrix": matrix, "number": self.random.random()}
        return (real, conds[self.cond]) if self.cond else (real,)


class Loop:
    """The loop as it is commonly written: separate forward passes, one backward pass and torch.optim to a step."""

    def __init__(self, case):
        self.case, self.constraint, self.options = case, case.constraint, case.options
        self.generator, self.critic = case.networks()
        self.critic_optimizer, self.critic_scheduler = case.equip("critic", self.critic, ours=False)
        self.generator_optimizer, self.generator_scheduler = case.equip("generator", self.generator, ours=False)
        self.ema = {p: p.detach().clone() for p in self.generator.parameters()}
        self.steps = self.rounds = self.taken = self.offset = 0  # critic and generator steps, critic steps since

    def left(self):
        due = self.options["n_critic"]
        return max(1, (due(self.rounds) if callable(due) else due) - self.taken)

    def step(self, latents, real, *cond):
        """Return the metrics of a step."""
        due = self.left() == 1
        metrics = self.critic_step(latents.popleft(), real, cond)
        return metrics | ({"generator_loss": self.generator_step(latents.popleft(), real, cond)} if due else {})

    def update(self, role, loss):
        getattr(self, role).zero_grad()
        loss.backward()
        limits = self.options["max_norm"]
        if limit := limits.get(role) if isinstance(limits, dict) else limits:
            parameters = [p for p in getattr(self, role).parameters() if p.grad is not None]
            for p in parameters:
                p.grad = p.grad.clone()  # of memory of its own: two may share some, which is then scaled twice in place
            nn.utils.clip_grad_norm_(parameters, limit)
        getattr(self, f"{role}_optimizer").step()
        if scheduler := getattr(self, f"{role}_scheduler"):
            scheduler.step()

    def noisy(self, x, scale, stream):
        options = {"stream": stream, "dtype": F64, "device": x.device}
        return x + scale * reference.normals(self.case.seed, self.offset, len(x), x[0].numel(), **options).view(x.shape)

    def blended(self, x):
        blend = self.case.blend
        return (blend * torch.logaddexp(x, torch.zeros_like(x)) + (1 - blend) * x).mean()

    def paired(self, x):
        return self.case.pairs * torch.logaddexp(x, torch.zeros_like(x)).mean()

    def points(self, real, fake):
        """(where the penalty is taken, how many random numbers that takes)."""
        at, packs = self.constraint.at, len(real) // self.case.pack
        if at == "perturbed":
            return self.noisy(real, self.constraint.noise, 1), len(real)
        if at == "interpolates":
            eps = reference.uniform(self.case.seed, self.offset, packs).to(F64).repeat_interleave(self.case.pack)
            eps = eps.view(-1, *[1] * (real.dim() - 1))
            return eps * real + (1 - eps) * fake, packs
        return (real if at == "real" else fake), 0

    def penalty(self, x, cond):
        """(the mean penalty, the mean norm of the input gradient)."""
        with sdpa_kernel(SDPBackend.MATH):
            scores = self.critic(x, *cond)
        (g,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        g, kind, target = g.reshape(len(x) // self.case.pack, -1), self.constraint.kind, self.constraint.target
        norm = g.norm(2, dim=1)
        if kind in ("zero-centered", "power"):
            return (g.square().sum(1) ** (1 if kind == "zero-centered" else 3)).mean(), norm.mean()
        return ((norm - target) if kind == "two-sided" else F.relu(norm - target)).square().mean(), norm.mean()

    def critic_step(self, z, real, cond):
        with torch.no_grad():
            fake = self.generator(z, *cond)
        used = 0
        real_scores, fake_scores = self.critic(real, *cond), self.critic(fake, *cond)
        loss = self.blended(fake_scores) + self.blended(-real_scores)
        loss = loss + self.case.drift * real_scores.square().mean() + self.paired(fake_scores - real_scores)
        metrics = {"wasserstein": real_scores.mean() - fake_scores.mean()}
        if isinstance(self.constraint, GradientPenalty) and self.steps % self.constraint.every == 0:
            x, used = self.points(real, fake)
            metrics["penalty"], metrics["gradient_norm"] = self.penalty(x.detach().requires_grad_(), cond)
            loss = loss + self.constraint.weight * self.constraint.every * metrics["penalty"]
        self.update("critic", loss)
        if not isinstance(self.constraint, GradientPenalty):
            self.clip(self.constraint)
        self.steps, self.taken = self.steps + 1, self.taken + 1
        self.offset += used
        return metrics | {"critic_loss": loss}

    def clip(self, clip):
        kinds = tuple(kind for kind in clip.exclude if isinstance(kind, type))
        exempt = {p for m in self.critic.modules() if isinstance(m, kinds) for p in m.parameters()}
        for name, p in self.critic.named_parameters():
            if p in exempt or ("*bias" in clip.exclude and name.endswith("bias")):
                continue
            if isinstance(clip, WeightClip):
                p.data.clamp_(-clip.bound, clip.bound)
            else:
                rows = p.data.view(len(p) if clip.per == "row" else 1, -1)
                rows.mul_((clip.bound / rows.norm(2, dim=1, keepdim=True)).clamp(max=1))

    def generator_step(self, z, real, cond):
        for p in self.generator.parameters():
            self.ema.setdefault(p, p.detach().clone())
        fake = self.generator(z, *cond)
        scores = self.critic(fake, *cond)
        loss = self.blended(-scores)
        if self.case.pairs:
            loss = loss + self.paired(self.critic(real, *cond) - scores)
        self.update("generator", loss)
        decay = self.options["ema"] or 0.0
        for p, average in self.ema.items():
            average.mul_(decay).add_((1 - decay) * p.detach())
        self.rounds, self.taken = self.rounds + 1, 0
        return loss


def compare(trainer, loop, metrics, expected):
    """Compare metrics, weights, buffers, calls and averages.

    Optimizers magnify what rounding makes of a gradient of 0, such as a bias has before a normalisation, by lr / eps,
    which is 1 here and 10,000 by default.
    """
    atol = 1e-11 if all(name for name, *_ in loop.case.optimizer.values()) else 1e-9

    def close(actual, expected, factor=1):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=factor * atol)

    names = "wasserstein", "critic_loss", "penalty", "gradient_norm", "generator_loss"
    for one, other in zip(metrics, expected, strict=True):
        actual = {name: value for name in names if (value := getattr(one, name)) is not None}
        close(actual, {name: value.detach() for name, value in other.items()})
    for pair in ((trainer.critic, loop.critic), (trainer.generator, loop.generator)):
        for inert, factor in ((False, 1), (True, 1000)):
            ends = "bias", "mean"  # a running mean follows its bias
            close(*({k: v for k, v in m.state_dict().items() if k.endswith(ends) == inert} for m in pair), factor)
        ours, plain = ([m.calls for m in network.modules() if isinstance(m, Own)] for network in pair)
        assert ours == plain
    if trainer.ema is not None and "generator_loss" in expected[-1]:
        close(trainer.averages(), {name: loop.ema[p] for name, p in loop.generator.named_parameters()}, 100)


def train(case):
    latents, source = deque(), torch.Generator().manual_seed(case.seed)

    def latent(n, device):
        latents.append(torch.randn(n, V, generator=source, dtype=F64))
        return latents[-1]

    trainer, loop, altered, left = case.trainer(*case.networks(), latent, case.seed), Loop(case), False, None
    while loop.steps < case.steps:
        if case.change and loop.steps >= case.changed_at and not altered:
            case.alter(trainer)
            case.alter(loop)
            altered = True
        if case.moved and loop.steps >= case.moved_at and left is None:
            left = trainer, copy.deepcopy(trainer.critic.state_dict())
            trainer = case.move(trainer, latent)
        networks = trainer.generator, trainer.critic, loop.generator, loop.critic
        for fading in (m for network in networks for m in network.modules() if isinstance(m, Own)):
            fading.alpha = min(1.0, loop.steps / 6)
        whole = case.random.random() < 0.2
        batches = [case.batch() for _ in range(loop.left() if whole else 1)]
        metrics = trainer.iteration(batches) if whole else [trainer.step(*batches[0])]
        expected = [loop.step(latents, *batch) for batch in batches]
        assert not latents
        compare(trainer, loop, metrics, expected)
    if left is not None:  # and stays as it was
        torch.testing.assert_close(left[0].critic.state_dict(), left[1], rtol=0, atol=0)


def check(seed):
    """Train by one case, and name it where that fails."""
    case = Case(seed)
    try:
        train(case)
    except Exception as error:
        raise AssertionError(f"check({seed}): {error}\n{case.drawn}") from error


@pytest.mark.parametrize("block", range(16))
def test_random_networks_train_as_in_a_plain_loop(block):
    for seed in range(45 * block, 45 * block + 45):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(40))
def test_more_random_networks_train_as_in_a_plain_loop(block):
    for seed in range(1000 + 100 * block, 1100 + 100 * block):
        check(seed)
