"""When advice is given, when it is not, and that it is given once."""

import math
import warnings

import pytest
import torch

from fastwgan import Adam, GradientPenalty, Trainer, WeightClip, data, models
from fastwgan.training.health import WINDOW, Health, HealthWarning

PENALISED = {"wasserstein": 0.5, "gradient_norm": 1.0, "gradient_norm_max": 1.5, "nonfinite": 0.0}
CLIPPED = {"wasserstein": 0.5, "saturation": 0.3}


def advice(constraint, *steps, count=4 * WINDOW, chunk=50):
    """All advice on ``count`` steps, which have the given values in turn."""
    health = Health(constraint)
    values = [steps[i % len(steps)] for i in range(count)]
    return [text for i in range(0, count, chunk) for text in health.watch(values[i : i + chunk])]


@pytest.mark.parametrize(
    ("constraint", "step"),
    [
        (GradientPenalty(), PENALISED),
        (GradientPenalty(), {"generator_loss": 1.0}),  # values may be missing
        (GradientPenalty(target=100.0), PENALISED | {"gradient_norm": 90.0, "gradient_norm_max": 1000.0}),
        (GradientPenalty(target=0.0), PENALISED),
        (GradientPenalty(kind="one-sided"), PENALISED | {"gradient_norm": 0.01}),
        (GradientPenalty(kind="zero-centered"), PENALISED | {"gradient_norm": 40.0, "gradient_norm_max": 900.0}),
        (GradientPenalty(kind="power"), PENALISED | {"gradient_norm": 1e-3}),
        (WeightClip(), CLIPPED),
        (WeightClip(), CLIPPED | {"saturation": 0.0}),
    ],
)
def test_healthy_training_is_left_alone(constraint, step):
    assert advice(constraint, step) == []


@pytest.mark.parametrize(
    ("constraint", "step", "words"),
    [
        (GradientPenalty(), PENALISED | {"wasserstein": -0.1}, "negative in 100%"),
        (WeightClip(), CLIPPED | {"wasserstein": -0.1}, "negative in 100%"),
        (GradientPenalty(), PENALISED | {"gradient_norm": 30.0}, "raise the penalty's weight"),
        (GradientPenalty(), PENALISED | {"gradient_norm_max": 1e4}, "raise the penalty's weight"),
        (GradientPenalty(), PENALISED | {"gradient_norm": 0.02}, "layers that died"),
        (GradientPenalty(kind="zero-centered"), PENALISED | {"gradient_norm": 0.0}, "layers that died"),
        (WeightClip(), CLIPPED | {"saturation": 0.99}, "99% of the clipped weights"),
        (GradientPenalty(), PENALISED | {"nonfinite": 7.0}, "infinite or NaN"),
        (WeightClip(), CLIPPED | {"wasserstein": math.nan}, "infinite or NaN"),
        (WeightClip(), CLIPPED | {"wasserstein": math.inf}, "infinite or NaN"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 70, 4 * WINDOW])
def test_each_failure_has_its_advice_once(constraint, step, words, chunk):
    (text,) = advice(constraint, step, chunk=chunk)
    assert words in text
    assert "\n" not in text


def test_a_critic_that_swings_is_told_of():
    up, down = CLIPPED | {"wasserstein": 0.5}, CLIPPED | {"wasserstein": -0.5}
    (text,) = advice(WeightClip(), up, down, up)  # negative in a third only
    assert "changed its sign in 67%" in text


def test_the_first_steps_are_no_sign_of_anything():
    health = Health(GradientPenalty())
    assert health.watch([PENALISED | {"wasserstein": -9.0, "gradient_norm": 500.0}] * WINDOW) == []
    assert health.watch([PENALISED] * 3 * WINDOW) == []


def test_one_bad_window_of_scores_is_no_sign_either():
    health = Health(GradientPenalty())
    for value in (0.5, 0.5, -0.5, 0.5, -0.5, 0.5):
        assert health.watch([PENALISED | {"wasserstein": value}] * WINDOW) == []


def test_a_few_steps_that_overflow_are_normal():
    bad = PENALISED | {"nonfinite": 1.0}
    health = Health(GradientPenalty())
    assert health.watch([bad] * 9) == []
    assert health.watch([PENALISED] * (WINDOW - 9)) == []
    assert health.watch([bad] * 9) == []
    assert len(health.watch([bad])) == 1  # at once, not at the window's end


def test_a_lazy_penalty_is_judged_by_the_steps_that_have_it():
    without = {"wasserstein": 0.5}
    assert advice(GradientPenalty(every=4), PENALISED, without, without, without) == []
    steep = PENALISED | {"gradient_norm": 30.0}
    assert len(advice(GradientPenalty(every=4), steep, without, without, without)) == 1


def trained(critic_lr, steps=2 * WINDOW):
    torch.manual_seed(0)
    generator, critic = models.mlp([2, 32, 32, 2]), models.mlp([2, 32, 32, 1], slope=0.2)
    optimizers = [
        Adam(m.parameters(), lr=lr, betas=(0.5, 0.9), backend="torch")
        for m, lr in ((critic, critic_lr), (generator, 5e-4))
    ]
    trainer = Trainer(
        generator, critic, latent=2, constraint=GradientPenalty(0.1), critic_optimizer=optimizers[0],
        generator_optimizer=optimizers[1], backend="torch",
    )  # fmt: skip
    trainer.fit(data.SampledBatches(data.gaussians8, 32, 0, torch.device("cpu")), steps)


@pytest.fixture
def _one_thread():
    """Networks this small only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
def test_real_training_with_and_without_a_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("error", HealthWarning)
        trained(2e-3)
    with pytest.warns(HealthWarning, match="^step 1000: the critic's gradient norm"):
        trained(1.0)
