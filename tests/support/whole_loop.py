"""A trainer's steps of both networks beside a plain loop's in float64, whose losses are written out and differentiated
by autograd.
"""

import copy
import functools
from types import SimpleNamespace

import torch
from small_trainers import quietly, weights

from fastwgan import GradientPenalty, Trainer, WeightClip, reference

F64 = torch.float64
STEPS, BATCH, N_CRITIC, SEED = 5, 8, 2, 3


def wgan(s):
    return s.fake_scores.mean() - s.real_scores.mean()


def wgan_of_generator(s):
    return -s.fake_scores.mean()


def apart(output):
    """What a network returned: its samples or scores, and the rest."""
    return (output[0], output[1:]) if isinstance(output, tuple) else (output, ())


def per_sample(eps, x):
    return eps.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class WholeLoop:
    """What a trainer does, as one would write it down; the losses are functions of all that there is in a step."""

    def __init__(
        self, generator, critic, zs, *, constraint, critic_loss=wgan, generator_loss=wgan_of_generator, pack=1
    ):
        self.generator, self.critic, self.zs, self.constraint, self.pack = generator, critic, zs, constraint, pack
        self.losses = {critic: critic_loss, generator: generator_loss}
        self.iteration = self.offset = 0
        if isinstance(constraint, GradientPenalty):
            kind = functools.partial(torch.optim.Adam, lr=1e-4, betas=(0.0, 0.9))
        else:
            kind = functools.partial(torch.optim.RMSprop, lr=5e-5)
        self.optimizers = {m: kind(m.parameters()) for m in (generator, critic)}

    def step(self, real, cond=(), fake_cond=None):
        """Return what a trainer's metrics have to say, by their names."""
        fake_cond, z = cond if fake_cond is None else fake_cond, next(self.zs)
        with torch.no_grad():
            made = self.generator(z, *fake_cond)
        seen = self.seen(real, made, cond, fake_cond)
        loss = self.losses[self.critic](seen)
        found = {"critic_term": loss - wgan(seen)}
        if isinstance(self.constraint, GradientPenalty) and self.iteration % self.constraint.every == 0:
            penalty = self.penalty(real, seen.fake, cond, fake_cond)
            loss = loss + self.constraint.weight * self.constraint.every * penalty
        self.update(self.critic, loss)
        if isinstance(self.constraint, WeightClip):
            for p in self.critic.parameters():
                p.data.clamp_(-self.constraint.bound, self.constraint.bound)
        self.iteration += 1
        found["critic_loss"] = loss
        if self.iteration % N_CRITIC == 0:
            found |= self.generator_step(real, cond, fake_cond)
        return {name: x.detach() for name, x in found.items()}

    def generator_step(self, real, cond, fake_cond):
        seen = self.seen(real, self.generator(next(self.zs), *fake_cond), cond, fake_cond)
        loss = self.losses[self.generator](seen)
        self.update(self.generator, loss)
        return {"generator_loss": loss, "generator_term": loss - wgan_of_generator(seen)}

    def seen(self, real, made, cond, fake_cond):
        """Return all that a loss may be of."""
        fake, generated = apart(made)
        real_scores, of_real = apart(self.critic(real, *cond))
        fake_scores, of_fake = apart(self.critic(fake, *fake_cond))
        return SimpleNamespace(
            real=real, fake=fake, cond=cond, fake_cond=fake_cond, real_scores=real_scores, fake_scores=fake_scores,
            of_real=of_real, of_fake=of_fake, generated=generated, generator=self.generator, critic=self.critic,
        )  # fmt: skip

    def penalty(self, real, fake, cond, fake_cond):
        """Return the mean penalty: of the gradient at samples, and at those conditions that the points lie between."""
        at, c, between = self.constraint.at, self.constraint, ()
        if at == "interpolates":
            eps = reference.uniform(SEED, self.offset, len(real) // self.pack).repeat_interleave(self.pack)
            x = per_sample(eps, real) * (real - fake) + fake
            between = [i for i, pair in enumerate(zip(cond, fake_cond, strict=True)) if pair[0] is not pair[1]]
            cond = [
                (per_sample(eps, own) * (own - other) + other).requires_grad_() if i in between else own
                for i, (own, other) in enumerate(zip(cond, fake_cond, strict=True))
            ]
            self.offset += len(real) // self.pack
        elif at == "perturbed":
            noise = reference.normals(
                SEED, self.offset, len(real), real[0].numel(), stream=1, dtype=F64, device=real.device
            )
            x = real + c.noise * noise.view(real.shape)
            self.offset += len(real)
        else:
            x, cond = (real, cond) if at == "real" else (fake, fake_cond)
        x = x.detach().requires_grad_()
        inputs = [x, *(cond[i] for i in between)]
        scores, _ = apart(self.critic(x, *cond))
        gradients = torch.autograd.grad(scores.sum(), inputs, create_graph=True, allow_unused=True)
        rows = [g.reshape(len(real) // self.pack, -1) for g in gradients if g is not None]
        norm = torch.cat(rows, 1).norm(dim=1)
        value = {
            "two-sided": (norm - c.target) ** 2, "one-sided": (norm - c.target).clamp(min=0) ** 2,
            "zero-centered": norm**2, "power": norm**6,
        }[c.kind]  # fmt: skip
        return value.mean()

    def update(self, module, loss):
        parameters = list(module.parameters())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        self.optimizers[module].step()


def assert_as_plain(made, constraint, *, terms=None, losses=None, pack=1, conditions=None, rtol=1e-8, **settings):
    """Train networks, (generator, critic, a sample's shape, latents' width), by a Trainer and by the plain loop.

    ``terms`` are the trainer's, by their keywords, and ``losses`` what the networks minimise then, by the loop's.
    ``conditions`` makes those of real and of fake samples in each step.
    """
    terms = terms or {}
    generator, critic, shape, latent = made
    random = torch.Generator().manual_seed(0)
    zs = torch.randn(2 * STEPS, BATCH, latent, dtype=F64, generator=random)
    ours, twins = iter(zs), copy.deepcopy((generator, critic))
    loop = WholeLoop(*twins, iter(zs), constraint=constraint, pack=pack, **(losses or {}))
    trainer = quietly(
        Trainer, generator, critic, latent=lambda n, device: next(ours), n_critic=N_CRITIC, seed=SEED,
        constraint=constraint, pack=pack, **terms, **settings,
    )  # fmt: skip
    before = [weights(m) for m in (generator, critic)]
    for _ in range(STEPS):
        real = torch.randn(BATCH, *shape, dtype=F64, generator=random)
        cond, fake_cond = conditions(random) if conditions else ((), None)
        metrics, expected = trainer.step(real, *cond, fake_cond=fake_cond), loop.step(real, cond, fake_cond)
        values = metrics.as_dict()
        for name in ("critic_loss", "generator_loss", "critic_term", "generator_term"):
            if name not in expected or (name.endswith("_term") and name not in terms):
                assert getattr(metrics, name) is None
                assert name not in values
                continue
            torch.testing.assert_close(getattr(metrics, name), expected[name], rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(values[name], expected[name].item(), rtol=1e-8, atol=1e-10)
        for a, b in ((critic, loop.critic), (generator, loop.generator)):
            torch.testing.assert_close(weights(a), weights(b), rtol=rtol, atol=1e-10)
    assert all((weights(m) - old).norm() > 1e-4 for m, old in zip((generator, critic), before, strict=True))
    assert trainer.state_dict()["eps_offset"] == loop.offset
    return trainer
