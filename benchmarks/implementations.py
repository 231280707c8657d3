"""The ways to take one critic step that the benchmark compares: the textbook's, the strongest unfused ones, and ours.

Each makes, from a :class:`Setting`, a function that takes one whole critic step: latents, the generator's forward
pass, the critic's gradient, the optimizer, the clamp. All must come to the same weights; the benchmark sees to it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.adam import adam
from torch.optim.rmsprop import rmsprop

from benchmarks.workloads import Workload
from fastwgan.constraints import GradientPenalty, WeightClip
from fastwgan.trainer import Trainer

__all__ = [
    "BASE", "IMPLEMENTATIONS", "SETTINGS", "TEXTBOOKS", "Given", "Implementation", "Setting", "Step", "compiles",
    "implementation", "textbook_critic_step",
]  # fmt: skip

# What the Trainer takes where it is given no optimizers: the papers' numbers.
RMSPROP: dict[str, Any] = {"lr": 5e-5}
ADAM: dict[str, Any] = {"lr": 1e-4, "betas": (0.0, 0.9)}

WARM_UP = 3  # steps on a side stream before a capture, which may allocate and load


class Given:
    """Latents and eps made beforehand, a set for each step, so that all implementations get the same.

    The count of steps lies on the device: then a captured graph, too, goes on to the next set at each replay.
    """

    def __init__(self, latents: Tensor, eps: Tensor) -> None:
        self._latents, self._eps = latents, eps
        self._taken = [torch.zeros(1, dtype=torch.int64, device=latents.device) for _ in range(2)]

    def _next(self, sets: Tensor, which: int) -> Tensor:
        result = sets.index_select(0, self._taken[which]).squeeze(0)
        self._taken[which] += 1
        return result

    def latents(self) -> Tensor:
        return self._next(self._latents, 0)

    def eps(self) -> Tensor:
        return self._next(self._eps, 1)


@dataclass
class Setting:
    """What a step is made for: networks that it may change, a real batch, and where its random numbers come from."""

    workload: Workload
    generator: nn.Module
    critic: nn.Module
    real: Tensor
    given: Given | None = None  # None: fresh ones, as in training
    layout: str = "contiguous"  # or "channels_last": of networks and data

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.critic.parameters())

    @property
    def on_gpu(self) -> bool:
        return self.real.is_cuda

    @property
    def clip(self) -> float | None:
        constraint = self.workload.constraint
        return constraint.bound if isinstance(constraint, WeightClip) else None

    @property
    def penalty_weight(self) -> float | None:
        constraint = self.workload.constraint
        return constraint.weight if isinstance(constraint, GradientPenalty) else None

    def latents(self) -> Tensor:
        if self.given is not None:
            return self.given.latents()
        return torch.randn(len(self.real), self.workload.latent, device=self.real.device, dtype=self.real.dtype)

    def eps(self) -> Tensor:
        """One number per sample, [N]."""
        if self.given is not None:
            return self.given.eps()
        return torch.rand(len(self.real), device=self.real.device, dtype=self.real.dtype)

    def eps_like_samples(self) -> Tensor:
        return self.eps().view(-1, *[1] * (self.real.dim() - 1))

    def fakes(self) -> Tensor:
        """Return fakes by a generator that builds no graph, which the textbooks alone leave out."""
        with torch.no_grad():
            fake: Tensor = self.generator(self.latents())
        return fake

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        """Return the paper's optimizer, as torch.optim has it."""
        if self.clip is not None:
            return torch.optim.RMSprop(self.parameters, **RMSPROP, **options)
        return torch.optim.Adam(self.parameters, **ADAM, **options)

    def fastest_optimizer(self, *, capturable: bool = False) -> torch.optim.Optimizer:
        """Return torch.optim's fastest: its Adam is fused, its RMSprop at best a few launches over all parameters."""
        return self.optimizer(**{"fused" if self.clip is None else "foreach": True}, capturable=capturable)

    def clamp_(self) -> None:
        if self.clip is not None:
            parameters: Any = self.parameters
            torch._foreach_clamp_min_(parameters, -self.clip)
            torch._foreach_clamp_max_(parameters, self.clip)

    def loss(self, fake: Tensor) -> Tensor:
        """The critic's, with the ordinary double backward of a penalty: what ``torch.compile`` alone does not take."""
        loss: Tensor = self.critic(fake).mean() - self.critic(self.real).mean()
        if self.penalty_weight is not None:
            x = torch.lerp(fake, self.real, self.eps_like_samples()).requires_grad_()
            scores = self.critic(x)
            (g,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)
            loss = loss + self.penalty_weight * ((g.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
        return loss


class Step(NamedTuple):
    """A critic step, ready to be taken again and again.

    Attributes:
        take: takes one.
        random: its own random generators, which whoever captures it has to register.
        is_graph: it replays a CUDA graph of its own and cannot be captured once more.
    """

    take: Callable[[], object]
    random: tuple[torch.Generator, ...] = ()
    is_graph: bool = False


Implementation = Callable[[Setting], Step]


def textbook_critic_step(
    generator: nn.Module, critic: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, z: Tensor, *,
    cond: tuple[Any, ...] = (), clip: float | None = None, penalty_weight: float | None = None,
    eps: Tensor | None = None, detach: bool = True,
) -> Tensor:  # fmt: skip
    """Take a critic step as Algorithm 1 of either paper reads, op by op, the unfused baseline; return the loss.

    ``clip`` is WGAN's clamp after the update; ``penalty_weight`` is WGAN-GP's lambda, with ``eps`` [N] or one drawn by
    torch.rand. ``detach=False`` leaves the generator's graph on the fakes, as popular code does, for the same weights.
    """
    optimizer.zero_grad()
    fake = generator(z, *cond)
    fake = fake.detach() if detach else fake
    real_scores, fake_scores = critic(real, *cond), critic(fake, *cond)
    loss: Tensor = fake_scores.mean() - real_scores.mean()
    if penalty_weight is not None:
        if eps is None:
            eps = torch.rand(len(real), device=real.device, dtype=real.dtype)
        eps = eps.view(-1, *[1] * (real.dim() - 1))
        x = (eps * real + (1 - eps) * fake.detach()).requires_grad_()
        scores = critic(x, *cond)
        (g,) = torch.autograd.grad(scores, x, torch.ones_like(scores), create_graph=True)
        loss = loss + penalty_weight * ((g.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    if clip is not None:
        for p in critic.parameters():
            p.data.clamp_(-clip, clip)
    return loss.detach()


def textbook(setting: Setting, *, detach: bool = False) -> Step:
    """Take Algorithm 1 op by op, with loops over parameters.

    By default fakes have a graph through the generator, as in the authors' code; with ``detach`` not, as in much other.
    """
    optimizer = setting.optimizer(foreach=False)

    def take() -> None:
        eps = None if setting.given is None or setting.penalty_weight is None else setting.eps()
        textbook_critic_step(
            setting.generator, setting.critic, optimizer, setting.real, setting.latents(),
            clip=setting.clip, penalty_weight=setting.penalty_weight, eps=eps, detach=detach,
        )  # fmt: skip

    return Step(take)


def foreach(setting: Setting) -> Step:
    """What eager PyTorch has for it: list operations or the fused Adam, and no graph through the generator."""
    optimizer = setting.fastest_optimizer()

    def take() -> None:
        optimizer.zero_grad()
        setting.loss(setting.fakes()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            setting.clamp_()

    return Step(take)


def _traceable_loss(
    setting: Setting, critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, eps: Tensor | None
) -> Tensor:
    """Return the critic's loss with an input gradient by torch.func, which Dynamo of every version traces."""
    loss = critic(fake).mean() - critic(real).mean()
    if eps is not None:
        g = torch.func.grad(lambda x: critic(x).sum())(torch.lerp(fake, real, eps))
        loss = loss + setting.penalty_weight * ((g.flatten(1).norm(2, dim=1) - 1) ** 2).mean()
    return loss


def compiled(setting: Setting) -> Step:
    """torch.compile of the generator, of the loss, and of update and clamp, with an eager backward between."""
    named: dict[str, Tensor] = dict(setting.critic.named_parameters())
    # Compiled, a foreach update is one loop over each weight. On a GPU its count of steps has to lie there too.
    optimizer = setting.optimizer(foreach=True, capturable=setting.on_gpu)

    @torch.compile(fullgraph=True)
    def loss(parameters: dict[str, Tensor], real: Tensor, fake: Tensor, eps: Tensor | None) -> Tensor:
        def critic(x: Tensor) -> Tensor:
            scores: Tensor = functional_call(setting.critic, parameters, (x,))
            return scores

        return _traceable_loss(setting, critic, real, fake, eps)

    @torch.compile
    def update() -> None:
        optimizer.step()
        setting.clamp_()

    generate = torch.compile(setting.generator)

    def take() -> None:
        with torch.no_grad():
            fake = generate(setting.latents())
        eps = None if setting.penalty_weight is None else setting.eps_like_samples()
        optimizer.zero_grad()
        loss(named, setting.real, fake, eps).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            update()

    return Step(take)


def _whole_step(setting: Setting, **options: Any) -> Callable[[], None]:
    """Return torch.compile's whole step as one graph, by an option of Dynamo's that lets autograd's calls in.

    The gradients stay values of that graph: put into ``.grad`` there, they would be lost without an error.
    """
    from torch._dynamo import config, mark_static_address  # takes a second to import, which only this needs

    parameters: list[Any] = setting.parameters
    squares, means = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    steps = [torch.zeros((), device=p.device if setting.on_gpu else "cpu") for p in parameters]
    for x in (*parameters, *squares, *means, *steps, setting.real):
        mark_static_address(x)  # else a mode with CUDA graphs would copy them at each step, or do without graphs

    def update(gradients: list[Tensor]) -> None:
        if setting.clip is not None:
            rmsprop(
                parameters, gradients, squares, [], [], steps, foreach=True, capturable=setting.on_gpu,
                **RMSPROP, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False, maximize=False,
            )  # fmt: skip
        else:
            beta1, beta2 = ADAM["betas"]
            adam(
                parameters, gradients, means, squares, [], steps, foreach=True, capturable=True, amsgrad=False,
                beta1=beta1, beta2=beta2, lr=ADAM["lr"], weight_decay=0.0, eps=1e-8, maximize=False,
            )  # fmt: skip
        setting.clamp_()

    def step() -> None:
        eps = None if setting.penalty_weight is None else setting.eps_like_samples()
        loss = _traceable_loss(setting, setting.critic, setting.real, setting.fakes(), eps)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():  # a last bias gets no gradient from a penalty, but one from the scores
            update([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)])

    whole = torch.compile(step, fullgraph=True, **options)
    taken = 0

    def take() -> None:
        nonlocal taken
        taken += 1
        with config.patch(trace_autograd_ops=True) if taken <= WARM_UP + 1 else nullcontext():  # it takes microseconds
            whole()

    return take


def compiled_step(setting: Setting) -> Step:
    """Take torch.compile's whole step."""
    return Step(_whole_step(setting))


def _refuse_cpu(setting: Setting) -> None:
    if not setting.on_gpu:
        raise RuntimeError("a CUDA graph needs a GPU")


def _captured(step: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> Step:
    """Return a step that is taken on a side stream a few times, then captured in a CUDA graph, and replayed.

    ``prepare`` is called before each of those that are not replayed, outside of the capture.
    """
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    taken = 0

    def take() -> None:
        nonlocal taken
        taken += 1
        if taken > WARM_UP + 1:
            graph.replay()
            return
        prepare()
        if taken <= WARM_UP:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
        else:
            with torch.cuda.graph(graph, stream=stream):
                step()
            graph.replay()  # the capture itself runs nothing

    return Step(take, is_graph=True)


def graphed(setting: Setting) -> Step:
    """Capture the foreach step in a CUDA graph: what a careful user of plain PyTorch can have."""
    _refuse_cpu(setting)
    optimizer = setting.fastest_optimizer(capturable=True)

    def step() -> None:
        setting.loss(setting.fakes()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            setting.clamp_()

    # Gradients are None before: a captured backward pass writes them then, instead of adding to them.
    return _captured(step, optimizer.zero_grad)


def compiled_graphed(setting: Setting) -> Step:
    """Capture torch.compile's whole step in a CUDA graph by hand."""
    _refuse_cpu(setting)
    return _captured(_whole_step(setting))


def compiled_reduce_overhead(setting: Setting) -> Step:
    """Take the whole step by the mode of torch.compile that makes CUDA graphs by itself."""
    _refuse_cpu(setting)
    return Step(_whole_step(setting, mode="reduce-overhead"), is_graph=True)


class _Own(nn.Module):
    """A critic in a class of the user's, of which nothing is known."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.network(x)
        return scores


def _trainer(setting: Setting, *, own_class: bool = False, **options: Any) -> Step:
    given = setting.given
    critic = _Own(setting.critic) if own_class else setting.critic
    if setting.layout == "channels_last":
        options["memory_format"] = torch.channels_last
    trainer = Trainer(
        setting.generator, critic, constraint=setting.workload.constraint, **options,
        latent=setting.workload.latent if given is None else lambda batch, device: given.latents(),
    )  # fmt: skip
    return Step(
        lambda: trainer.critic_step(setting.real),
        random=(trainer._steps.latents.stream,),
        is_graph=options.get("cuda_graph", "auto") is not False and setting.on_gpu,
    )


TEXTBOOKS = ("textbook", "textbook-detached")  # which no run leaves out
BASE = "textbook-detached"  # what ratios are to
IMPLEMENTATIONS: dict[str, Implementation] = {
    "textbook": textbook,
    "textbook-detached": partial(textbook, detach=True),
    "foreach": foreach,
    "compiled": compiled,
    "compiled-step": compiled_step,
    "graphed": graphed,
    "compiled-graphed": compiled_graphed,
    "compiled-reduce-overhead": compiled_reduce_overhead,
    "fastwgan": partial(_trainer, cuda_graph=False),
    "fastwgan-two-passes": partial(_trainer, cuda_graph=False, own_class=True),
    "fastwgan-graphed": partial(_trainer, cuda_graph=True),
    "fastwgan-compiled": lambda setting: _trainer(setting, cuda_graph=setting.on_gpu, compile=True),
}


def _settings() -> dict[str, dict[str, Any]]:
    """Return the Trainer's options that a user may choose among for speed, by the name that figures of them have."""
    choices = {"cuda_graph": ("auto", True, False), "compile": (False, True), "independent_samples": (False, True)}
    found = {}
    for values in product(*choices.values()):
        of = zip(choices.items(), values, strict=True)
        options = {name: value for (name, (default, *_)), value in of if value != default}
        found[f"fastwgan({', '.join(f'{name}={value}' for name, value in options.items())})"] = options
    return found


SETTINGS = _settings()


def implementation(name: str) -> Implementation:
    """Return an implementation by its name, or ours with the options of SETTINGS."""
    return partial(_trainer, **SETTINGS[name]) if name in SETTINGS else IMPLEMENTATIONS[name]


def compiles(name: str) -> bool:
    """Return whether an implementation of this name compiles, which may take minutes."""
    return "compile" in name
