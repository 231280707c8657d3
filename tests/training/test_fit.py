"""The loop: batches of every form, the log, pictures, callbacks, checkpoints, and bad input."""

import csv
import functools
import math
import os
import signal
import sys
import time
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from crash_loop import same
from graphed_trainers import Recorded, assert_close_weights, made
from small_trainers import PAIRS
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fastwgan import GradientPenalty, RMSprop, Trainer, WeightClip, checkpoint, data, models
from fastwgan.engine import graphs
from fastwgan.metrics import Metrics, Results, Settled
from fastwgan.training.fit import fit
from fastwgan.training.health import HealthWarning


def read_log(directory):
    return list(csv.DictReader((directory / "metrics.csv").read_text().splitlines()))


def make(**options):
    torch.manual_seed(0)
    constraint = GradientPenalty(every=options.pop("every", 1))
    return Trainer(
        models.mlp([6, 10]), models.mlp([10, 8, 1]), latent=6, constraint=constraint, backend="torch", **options
    )


@pytest.fixture
def trainer():
    return make()


def stream():
    return data.ShuffledBatches(torch.randn(20, 10, generator=torch.Generator().manual_seed(3)), 8, seed=1)


def test_batches_start_again_and_may_be_short(trainer):
    loader = DataLoader(torch.randn(10, 10), batch_size=4)  # 4, 4, 2
    assert trainer.fit(loader, 7) == 7
    assert trainer.critic_iterations == 7
    assert trainer._steps.latents.used == 4 + 4 + 2 + 4 + 4 + 2 + 4


def test_tuples_carry_conditions(trainer):
    seen = []
    trainer.step = lambda *args: seen.append(args) or Trainer.step(trainer, args[0])
    fit(trainer, [(torch.randn(4, 10), torch.arange(4), "extra")], 2)
    assert [len(args) for args in seen] == [3, 3]
    assert seen[0][2] == "extra"


def test_log_and_checkpoints(trainer, tmp_path):
    done = fit(
        trainer, [torch.randn(4, 10)], 7, out=tmp_path / "a" / "b", config={"name": "x"}, log_every=3, save_every=2
    )
    assert done == 7
    rows = read_log(tmp_path / "a" / "b")
    assert [row["step"] for row in rows] == ["3", "6", "7"]
    assert float(rows[-1]["penalty"]) >= 0
    content = checkpoint.load(tmp_path / "a" / "b" / "last.pt")
    assert content["config"] == {"name": "x"}
    assert content["trainer"]["critic_iterations"] == 7


def test_rows_past_the_resumed_step_are_dropped(trainer, tmp_path):
    fit(trainer, [torch.randn(4, 10)], 4, out=tmp_path, log_every=1)
    trainer.critic_iterations = 2  # as after loading a checkpoint older than the log
    fit(trainer, [torch.randn(4, 10)], 2, out=tmp_path, log_every=1)
    assert [row["step"] for row in read_log(tmp_path)] == ["1", "2", "3", "4"]


def test_a_half_written_row_is_no_row(trainer, tmp_path):
    fit(trainer, [torch.randn(4, 10)], 3, out=tmp_path, log_every=1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("3,0")
    fit(trainer, [torch.randn(4, 10)], 1, out=tmp_path, log_every=1)
    assert [row["step"] for row in read_log(tmp_path)] == ["1", "2", "3", "4"]


def test_a_run_is_not_overwritten(trainer, tmp_path):
    fit(trainer, [torch.randn(4, 10)], 1, out=tmp_path)
    trainer.critic_iterations = 0
    with pytest.raises(ValueError, match="^out:"):
        fit(trainer, [torch.randn(4, 10)], 1, out=tmp_path)


def test_failing_batches_leave_a_checkpoint(trainer, tmp_path):
    with pytest.raises(ValueError, match="^batches:"):
        fit(trainer, iter([torch.randn(4, 10)]), 5, out=tmp_path)
    assert checkpoint.load(tmp_path / "last.pt")["trainer"]["critic_iterations"] == 1


# Batches


class Numbers(IterableDataset):
    """Nine samples."""

    def __iter__(self):
        return iter(torch.arange(90.0).view(9, 10))


class Sequence:
    """One batch, by the old protocol."""

    def __getitem__(self, i):
        return [torch.ones(4, 10)][i]


BATCHES = {
    "loader with workers": lambda: DataLoader(TensorDataset(torch.randn(9, 10)), batch_size=4, num_workers=2),
    "iterable dataset in a loader": lambda: DataLoader(Numbers(), batch_size=4),
    "generator": lambda: (torch.randn(4, 10) for _ in range(7)),
    "endless iterator": stream,
    "list": lambda: [torch.randn(4, 10), torch.randn(1, 10)],
    "arrays": lambda: [np.random.default_rng(0).standard_normal((4, 10), np.float32)],
    "read-only arrays": lambda: [np.broadcast_to(np.float32(1), (4, 10))],
    "arrays and labels": lambda: [(np.zeros((4, 10), np.float32), "label")],
    "sequence without __iter__": Sequence,
}


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # Python 3.12 on, of forked workers
@pytest.mark.parametrize("kind", BATCHES)
def test_whatever_can_be_iterated_trains(kind, trainer):
    if "labels" in kind:
        step = trainer.step
        trainer.step = lambda real, label: step(real)
    assert trainer.fit(BATCHES[kind](), 7) == 7
    assert trainer.critic_iterations == 7


def test_arrays_arrive_as_tensors(trainer):
    seen = []
    trainer.step = lambda *args: seen.extend(args) or Trainer.step(trainer, args[0])
    fit(trainer, [(np.ones((4, 10), np.float32), np.arange(4), "text", 5)], 1)
    assert seen[0].dtype == torch.float32
    assert seen[1].tolist() == [0, 1, 2, 3]
    assert seen[2:] == ["text", 5]


def closed():
    batches = (torch.randn(4, 10) for _ in range(7))
    batches.close()
    return batches


@pytest.mark.parametrize(
    ("batches", "kind", "words"),
    [
        (TensorDataset(torch.randn(9, 10)), TypeError, "the dataset TensorDataset, .*DataLoader"),
        (torch.randn(9, 10), TypeError, "got Tensor"),
        (np.zeros((9, 10)), TypeError, "got ndarray"),
        (5, TypeError, "got int"),
        (None, TypeError, "got NoneType"),
        ([], ValueError, "is empty"),
        (closed(), ValueError, "been closed"),
        ([()], ValueError, "got an empty one"),
        ([np.array(["a", None])], TypeError, "dtype object"),
        ([np.array(["a", "b"])], TypeError, "dtype <U1"),
    ],
)
def test_what_are_no_batches_is_refused(batches, kind, words, trainer, tmp_path):
    with pytest.raises(kind, match=f"^batches: .*{words}"):
        fit(trainer, batches, 3, out=tmp_path / "run")
    assert trainer.critic_iterations == 0
    assert not (tmp_path / "run" / "last.pt").exists()


def test_an_error_in_the_batches_leaves_a_checkpoint(trainer, tmp_path):
    def broken():
        yield torch.randn(4, 10)
        yield torch.randn(4, 10)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(trainer, broken(), 5, out=tmp_path)
    assert checkpoint.load(tmp_path / "last.pt")["trainer"]["critic_iterations"] == 2


def test_a_batch_that_cannot_be_used_leaves_a_checkpoint(trainer, tmp_path):
    with pytest.raises(ValueError, match="^real:"):
        fit(trainer, [torch.randn(4, 10), torch.randn(0, 10)], 5, out=tmp_path)
    assert checkpoint.load(tmp_path / "last.pt")["trainer"]["critic_iterations"] == 1


# The log


def test_rows_are_averages_over_their_steps(tmp_path):
    trainer, twin = make(every=4, n_critic=5), make(every=4, n_critic=5)
    fit(trainer, stream(), 25, out=tmp_path, log_every=10)
    batches = stream()
    steps = [twin.step(next(batches)).as_dict() for _ in range(25)]
    rows = read_log(tmp_path)
    assert [row["step"] for row in rows] == ["10", "20", "25"]
    for row, part in zip(rows, (steps[:10], steps[10:20], steps[20:]), strict=True):
        for name in ("wasserstein", "critic_loss", "penalty", "gradient_norm", "generator_loss"):
            values = [step[name] for step in part if name in step]
            assert len(values) < 10 or name in ("wasserstein", "critic_loss")
            assert float(row[name]) == pytest.approx(sum(values) / len(values), rel=1e-12)
        assert float(row["gradient_norm_min"]) == min(step.get("gradient_norm_min", math.inf) for step in part)
        assert float(row["gradient_norm_max"]) == max(step.get("gradient_norm_max", 0) for step in part)
        assert row["skipped"] == "0"


def test_rows_have_terms_in_them(tmp_path):
    terms = {
        "critic_term": lambda s: s.real_scores.square().mean(),
        "generator_term": lambda s: (s.fake - s.real).abs().mean(),
    }
    trainer, twin, batches = make(n_critic=2, **terms), make(n_critic=2, **terms), stream()
    fit(trainer, stream(), 4, out=tmp_path, log_every=4)
    steps = [twin.step(next(batches)).as_dict() for _ in range(4)]
    (row,) = read_log(tmp_path)
    for name in ("critic_term", "generator_term", "critic_loss", "generator_loss"):
        values = [step[name] for step in steps if name in step]
        assert len(values) == (2 if name.startswith("generator") else 4)
        assert float(row[name]) == pytest.approx(sum(values) / len(values), rel=1e-12)


def test_no_step_waits_for_the_device(trainer, monkeypatch):
    """Whatever reads a tensor would; the trainer's own steps are tested elsewhere."""
    reads = []
    for name in ("item", "tolist", "numpy", "cpu", "__float__", "__int__", "__bool__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda x, *a, name=name, method=method: reads.append(name) or method(x))

    def step(*_):
        trainer.critic_iterations += 1
        return Metrics((Results(Settled(torch.ones(4))), 0))

    trainer.step = step
    fit(trainer, [torch.randn(4, 10)], 240, log_every=1000)
    assert reads == ["tolist"] * (3 + 2)  # every hundred steps and at the end; and at the end the two guards


def test_skipped_steps_are_counted(trainer, tmp_path):
    numbers = iter([0.0, 3.0, 0.0, 1.0, 2.0])

    def step(*_):
        trainer.critic_iterations += 1
        nonfinite = torch.tensor(next(numbers))
        return Metrics((Results(Settled(torch.full((4,), math.nan if nonfinite else 2.0), nonfinite=nonfinite)), 0))

    trainer.step = step
    fit(trainer, [torch.randn(4, 10)], 5, out=tmp_path, log_every=3)
    first, second = read_log(tmp_path)
    assert (first["skipped"], first["wasserstein"]) == ("1", "2.0")
    assert (second["skipped"], second["wasserstein"]) == ("2", "")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_is_written_where_it_is_asked_for(trainer, tmp_path):
    fit(trainer, [torch.randn(4, 10)], 4, out=tmp_path / "without")
    fit(trainer, [torch.randn(4, 10)], 4, out=tmp_path / "with", log_every=2, tensorboard=True)
    assert not list((tmp_path / "without").glob("events.*"))
    (file,) = (tmp_path / "with").glob("events.*")
    assert file.stat().st_size > 500


@pytest.mark.parametrize(("option", "package"), [("tensorboard", "tensorboard"), ("progress", "rich")])
def test_a_missing_package_shows_before_anything_is_written(option, package, trainer, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package or name == "torch.utils.tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=package):
        fit(trainer, [torch.randn(4, 10)], 4, out=tmp_path / "run", **{option: True})
    assert not (tmp_path / "run").exists()


def test_advice_is_a_warning(trainer, tmp_path):
    def step(*_):
        trainer.critic_iterations += 1
        return Metrics((Results(Settled(torch.full((4,), math.nan))), 0))

    trainer.step = step
    with pytest.warns(HealthWarning, match="^step 50: 10 of 10 steps") as caught:
        fit(trainer, [torch.randn(4, 10)], 300)
    assert len(caught) == 1
    assert caught[0].filename == __file__


# Pictures


def test_pictures_are_of_the_same_latents_and_disturb_nothing(tmp_path):
    drawn = []

    def draw(samples, path):
        drawn.append((path, samples))
        path.write_text("picture")

    plain, watched = make(), make()
    fit(plain, stream(), 7, out=tmp_path / "plain")
    fit(watched, stream(), 7, out=tmp_path / "run", sample_every=3, draw=draw, sample_count=5)
    names = [f"step-{step:08d}.png" for step in (3, 6, 7)]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == names
    assert [path.name for path, _ in drawn] == names
    assert all(samples.shape == (5, 10) for _, samples in drawn)
    assert not torch.equal(drawn[0][1], drawn[1][1])  # the generator has learnt
    assert torch.equal(plain.sample(2), watched.sample(2))
    fit(watched, stream(), 0, out=tmp_path / "run", sample_every=3, draw=draw, sample_count=5)
    assert torch.equal(drawn[-1][1], drawn[-2][1])  # and has not
    assert same(plain.state_dict(), watched.state_dict())


def test_a_picture_that_fails_leaves_a_checkpoint(trainer, tmp_path):
    def draw(samples, path):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(trainer, [torch.randn(4, 10)], 7, out=tmp_path, sample_every=3, draw=draw)
    assert checkpoint.load(tmp_path / "last.pt")["trainer"]["critic_iterations"] == 3


# Callbacks


def test_callbacks_see_the_averages_of_each_row(trainer, tmp_path):
    seen = []
    first = lambda trainer, values: values.clear() or "no reason to stop"  # noqa: E731 - and not the next one's
    second = lambda trainer, values: seen.append((trainer.critic_iterations, values["wasserstein"]))  # noqa: E731
    assert fit(trainer, [torch.randn(4, 10)], 7, out=tmp_path, log_every=3, callbacks=[first, second]) == 7
    assert [(str(step), str(value)) for step, value in seen] == [
        (row["step"], row["wasserstein"]) for row in read_log(tmp_path)
    ]


@pytest.mark.parametrize("answer", [True, np.True_])
def test_a_callback_ends_the_training_with_everything_written(answer, trainer, tmp_path):
    pictures, others = [], []

    def end(trainer, values):
        return answer if trainer.critic_iterations == 6 else None

    done = fit(
        trainer, [torch.randn(4, 10)], 100, out=tmp_path, log_every=3, sample_every=50,
        draw=lambda samples, path: pictures.append(path.name),
        callbacks=[end, lambda trainer, values: others.append(values)],
    )  # fmt: skip
    assert done == trainer.critic_iterations == 6
    assert len(others) == 2
    assert [row["step"] for row in read_log(tmp_path)] == ["3", "6"]
    assert checkpoint.load(tmp_path / "last.pt")["trainer"]["critic_iterations"] == 6
    assert pictures == ["step-00000006.png"]


def test_a_callback_that_fails_leaves_a_checkpoint(trainer, tmp_path):
    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(trainer, [torch.randn(4, 10)], 100, out=tmp_path, log_every=3, callbacks=[fail])
    assert checkpoint.load(tmp_path / "last.pt")["trainer"]["critic_iterations"] == 3
    assert [row["step"] for row in read_log(tmp_path)] == ["3"]


# Checkpoints


def test_the_newest_checkpoints_are_kept_and_what_a_kill_left_is_not(trainer, tmp_path):
    fit(trainer, [torch.randn(4, 10)], 7, out=tmp_path, save_every=2, keep=3)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "last.pt", "step-000000004.pt", "step-000000006.pt", "step-000000007.pt",
    ]  # fmt: skip
    (tmp_path / ".last.pt.123").write_text("half")
    fit(trainer, [torch.randn(4, 10)], 1, out=tmp_path)
    assert not (tmp_path / ".last.pt.123").exists()
    assert checkpoint.load(tmp_path / "last.pt")["trainer"]["critic_iterations"] == 8


def test_a_full_disk_is_an_error_that_keeps_the_checkpoint_before(trainer, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    fit(trainer, [torch.randn(4, 10)], 2, out=tmp_path)
    monkeypatch.setattr("torch.save", full)
    with pytest.raises(OSError, match="disk full"):
        fit(trainer, [torch.randn(4, 10)], 4, out=tmp_path, save_every=1)
    assert trainer.critic_iterations == 3
    assert checkpoint.load(tmp_path / "last.pt")["trainer"]["critic_iterations"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "metrics.csv"]


def test_bad_input_is_named(trainer):
    with pytest.raises(ValueError, match="^steps:"):
        fit(trainer, [], -1)
    with pytest.raises(TypeError, match="^log_every:"):
        fit(trainer, [], 1, log_every=1.5)
    with pytest.raises(ValueError, match="^batches:"):
        fit(trainer, [], 1)
    with pytest.raises(ValueError, match="^batches:"):
        fit(trainer, iter([torch.randn(4, 10)]), 2)
    with pytest.raises(ValueError, match="^keep:"):
        fit(trainer, [], 1, keep=0)
    with pytest.raises(TypeError, match="^sample_every:"):
        fit(trainer, [], 1, sample_every=2.0, draw=print)
    with pytest.raises(ValueError, match="^sample_count:"):
        fit(trainer, [], 1, sample_count=0)
    with pytest.raises(ValueError, match="^draw:"):
        fit(trainer, [], 1, sample_every=5, out="nowhere")
    for options in ({"tensorboard": True}, {"sample_every": 1, "draw": print}):
        with pytest.raises(ValueError, match="^out:"):
            fit(trainer, [], 1, **options)


# Iterations as graphs


@pytest.fixture
def works(graphed, monkeypatch):
    """The works that graphs were asked for, an iteration's among them, in order."""
    asked, run = [], graphs.Graphs.run

    def counted(self, work, *args):
        asked.append((work.__name__.strip("_"), len(args[0]) if "iteration" in work.__name__ else 1))
        return run(self, work, *args)

    monkeypatch.setattr(graphs.Graphs, "run", counted)
    return asked


def graphed_trainer(device, cuda_graph=True, **options):
    trainer, _ = made(device, cuda_graph, **{"constraint": GradientPenalty(), "n_critic": 3, "ema": 0.9} | options)
    return trainer


def stepwise(trainer):
    """The same trainer, whose own step the loop has to call."""
    step = trainer.step
    trainer.step = functools.partial(step)
    return trainer


def contents(directory):
    """All that a run leaves but the time: its log, its checkpoints by name, and the names of its pictures."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(directory)]
    checkpoints = {p.name: checkpoint.load(p) for p in sorted(directory.glob("*.pt"))}
    return rows, checkpoints, sorted(p.name for p in directory.glob("samples/*"))


def drawn(samples, path):
    np.save(path.with_suffix(".npy"), samples.cpu().numpy())


WRITTEN = {"log_every": 10, "save_every": 11, "keep": 9, "sample_every": 13, "draw": drawn, "sample_count": 3}


@pytest.mark.parametrize("constraint", [GradientPenalty(), WeightClip(0.05), GradientPenalty(every=4)])
def test_whole_iterations_come_to_what_steps_do(constraint, graphed, works, tmp_path):
    """The same rows, pictures, callbacks and checkpoints; a few iterations go step by step, where one is due within."""
    seen = {}
    for name, cuda_graph, wrap in (("whole", True, None), ("steps", True, stepwise), ("eager", False, None)):
        works.clear()
        trainer = graphed_trainer(graphed, cuda_graph, constraint=constraint)
        called = []
        watch = lambda trainer, row, called=called: called.append((trainer.critic_iterations, row))  # noqa: E731
        options = WRITTEN | {"out": tmp_path / name, "callbacks": [watch]}
        assert (wrap or (lambda x: x))(trainer).fit(stream(), 40, **options) == 40
        seen[name] = called, contents(tmp_path / name), works.copy(), trainer
    whole, steps, eager = seen.values()
    assert steps[2].count(("critic_step", 1)) == 40
    assert not eager[2]
    assert same(whole[0], steps[0])
    assert same(whole[1], steps[1])
    assert_close_weights(whole[3], eager[3], 1e-6)
    assert [row["step"] for row in whole[1][0]] == [row["step"] for row in eager[1][0]] == ["10", "20", "30", "40"]
    assert whole[1][1].keys() == eager[1][1].keys()
    assert whole[1][2] == [f"step-{step:08d}.npy" for step in (13, 26, 39, 40)]
    if constraint == GradientPenalty(every=4):  # whose steps are elsewhere in each iteration
        assert ("iteration", 3) not in whole[2]
    else:
        # Not those with steps 10 and 11, 13, 20, 22, 26, 40, nor the first one, of a form that is not known yet.
        assert whole[2].count(("iteration", 3)) == 7
        assert sum(n for work, n in whole[2] if work != "generator_step") == 40


def test_a_log_that_fits_leaves_whole_iterations_alone(graphed, works):
    trainer = graphed_trainer(graphed)
    trainer.fit(stream(), 61, log_every=15)
    assert works[:4] == [("critic_step", 1)] * 3 + [("generator_step", 1)]
    assert set(works[4:-1]) == {("iteration", 3)}
    assert works[-1] == ("critic_step", 1), "not past the last step"
    assert Recorded.made == 1


@pytest.mark.parametrize("step", [13, 14, 15])
def test_a_resumed_run_is_bit_identical_from_any_step(step, graphed, works, tmp_path):
    straight, first, second = (graphed_trainer(graphed) for _ in range(3))
    straight.fit(stream(), 30, out=tmp_path / "straight")
    first.fit(stream(), step, out=tmp_path / "halves")
    content = checkpoint.load(tmp_path / "halves" / "last.pt")
    batches = stream()
    batches.load_state_dict(content["data"])
    second.load_state_dict(content["trainer"])
    second.fit(batches, 30 - step, out=tmp_path / "halves")
    a, b = (checkpoint.load(tmp_path / name / "last.pt") for name in ("straight", "halves"))
    assert same(a, b)
    assert works.count(("iteration", 3)) >= 16


class Watched:
    """A stream that can be saved, and does something when a batch is asked for."""

    def __init__(self, at):
        self._stream, self._at, self._asked = stream(), at, 0

    def __iter__(self):
        return self

    def __next__(self):
        self._asked += 1
        return self._at.get(self._asked, lambda batch: batch)(next(self._stream))

    def state_dict(self):
        return self._stream.state_dict()


def interrupted(batch):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
    return batch


def twice(batch):
    interrupted(batch)
    return interrupted(batch)


def failed(batch):
    raise ZeroDivisionError


ENDS = {
    "Ctrl-C": (interrupted, nullcontext(), [11, 12, 13]),
    "Ctrl-C twice": (twice, pytest.raises(KeyboardInterrupt), [10, 11, 12]),
    "an error": (failed, pytest.raises(ZeroDivisionError), [10, 11, 12]),
    "integers": (lambda batch: batch.int(), pytest.raises(TypeError, match="^real:"), [10, 11, 12]),
    "none": (lambda batch: batch[:0], pytest.raises(ValueError, match="^real:"), [10, 11, 12]),
    "doubles": (lambda batch: batch.double(), pytest.raises(TypeError, match="^generator:"), [10, 11, 12]),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", ENDS)
def test_an_end_within_an_iteration_is_that_of_steps(kind, place, graphed, works, tmp_path):
    """Steps taken, log and checkpoint, with the position of the batches: none of those read ahead is lost."""
    end, raising, steps = ENDS[kind]
    seen = []
    for name, wrap in (("whole", lambda x: x), ("steps", stepwise)):
        trainer = wrap(graphed_trainer(graphed))
        with raising:
            trainer.fit(Watched({11 + place: end}), 30, out=tmp_path / name)
        seen.append(contents(tmp_path / name))
        assert trainer.critic_iterations == steps[place]
        assert checkpoint.load(tmp_path / name / "last.pt")["trainer"]["critic_iterations"] == steps[place]
    assert same(*seen)
    assert works.count(("iteration", 3)) >= 2


def test_batches_of_other_sizes_go_step_by_step(graphed, works):
    loader = DataLoader(torch.randn(8 * 7 + 4, 10), batch_size=8)  # the eighth has 4 samples
    runs = [graphed_trainer(graphed), stepwise(graphed_trainer(graphed))]
    for trainer in runs:
        trainer.fit(loader, 24)
    assert same(*(trainer.state_dict() for trainer in runs))
    assert works.count(("iteration", 3)) == 4, "4 to 6, 10 to 12, 13 to 15, 19 to 21"


def test_advice_names_the_step_within_an_iteration(graphed, works):
    """A metric that goes bad at step 41, and advice at the tenth such step, read with the row at step 60."""

    def messages(trainer):
        done = trainer._critic_step_done

        def spoiled(found, weight):
            results, step = found
            settled = Settled(*(results.read(step, name) for name in Settled._fields))
            if trainer.critic_iterations >= 40:
                settled = settled._replace(scores=torch.full_like(settled.scores, math.nan))
            return done((Results(settled), 0), weight)

        trainer._critic_step_done = spoiled
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(stream(), 120, log_every=120)
        return [(str(w.message), w.filename) for w in caught if w.category is HealthWarning]

    (told,) = messages(graphed_trainer(graphed))
    assert told[0].startswith("step 100: 10 of 50 steps")
    assert [told] == messages(stepwise(graphed_trainer(graphed)))
    assert ("iteration", 3) in works


def scheduled(graphed):
    _, critic, _, _ = PAIRS["mlp"](torch.float32)
    critic = critic.to(graphed)
    optimizer = RMSprop(critic.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    generator = PAIRS["mlp"](torch.float32)[0].to(graphed)
    return Trainer(
        generator, critic, latent=6, n_critic=3, critic_optimizer=optimizer, critic_scheduler=scheduler,
        constraint=GradientPenalty(), backend="triton", cuda_graph=True,
    )  # fmt: skip


class Own(Trainer):
    def generator_step(self, batch_size, *cond):
        return super().generator_step(batch_size, *cond)


def of_own_class(graphed):
    trainer = graphed_trainer(graphed)
    trainer.__class__ = Own
    return trainer


def hooked(graphed):
    trainer = graphed_trainer(graphed)
    trainer.critic_optimizer.register_step_post_hook(lambda *_: None)
    return trainer


STEPWISE = {
    "a callable's latents": lambda d: graphed_trainer(d, latent=lambda n, device: torch.randn(n, 6, device=device)),
    "a scheduler of the critic": scheduled,
    "too many": lambda d: graphed_trainer(d, n_critic=9),
    "one": lambda d: graphed_trainer(d, n_critic=1),
    "no graphs": lambda d: graphed_trainer(d, cuda_graph=False),
    "a step hook": hooked,
    "a class of its own": of_own_class,
}


@pytest.mark.parametrize("kind", STEPWISE)
def test_what_no_iteration_can_take_goes_step_by_step(kind, graphed, works):
    trainer = STEPWISE[kind](graphed)
    trainer.fit(stream(), 20)
    assert trainer.batches_at_once() == 1
    assert {work for work, _ in works} <= {"critic_step", "generator_step"}
    assert trainer.critic_iterations == 20


@pytest.mark.parametrize("kind", ["instance", "class"])
def test_a_patched_step_is_called(kind, graphed, works, monkeypatch):
    trainer, called, step = graphed_trainer(graphed), [], Trainer.step
    assert trainer.batches_at_once() == 3
    if kind == "instance":
        trainer.step = lambda real: called.append(len(real)) or step(trainer, real)
    else:
        monkeypatch.setattr(Trainer, "step", lambda self, real: called.append(len(real)) or step(self, real))
    trainer.fit(stream(), 9)
    assert called == [8] * 9


def test_a_network_that_no_step_can_take_is_refused_as_by_a_step(graphed, works, tmp_path):
    """A layer of the generator that its optimizer lacks, added at a row: the steps up to its own are taken."""
    states = []
    for name, wrap in (("whole", lambda x: x), ("steps", stepwise)):
        trainer, _ = made(graphed, True, n_critic=3, generator_optimizer=None)
        trainer._steps.generator._default = False  # as if it had been given
        trainer = wrap(trainer)

        def grow(trainer, row):
            if trainer.critic_iterations == 9:
                trainer.generator.append(torch.nn.Linear(10, 10).to(graphed))

        torch.manual_seed(5)
        with pytest.raises(ValueError, match="^generator_optimizer: "):
            trainer.fit(stream(), 30, out=tmp_path / name, log_every=9, callbacks=[grow])
        states.append(contents(tmp_path / name))
        assert trainer.critic_iterations == 11
    assert same(*states)
