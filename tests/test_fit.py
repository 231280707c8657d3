"""The loop: batches of every form, the log, checkpoints, and bad input."""

import csv

import pytest
import torch

from fastwgan import GradientPenalty, Trainer, checkpoint, models
from fastwgan.fit import fit


def read_log(directory):
    return list(csv.DictReader((directory / "metrics.csv").read_text().splitlines()))


@pytest.fixture
def trainer():
    return Trainer(models.mlp([6, 10]), models.mlp([10, 8, 1]), latent=6, constraint=GradientPenalty(), backend="torch")


def test_batches_start_again_and_may_be_short(trainer):
    loader = torch.utils.data.DataLoader(torch.randn(10, 10), batch_size=4)  # 4, 4, 2
    assert trainer.fit(loader, 7) == 7
    assert trainer.critic_iterations == 7
    assert trainer._eps_offset == 4 + 4 + 2 + 4 + 4 + 2 + 4


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


def test_bad_input_is_named(trainer):
    with pytest.raises(ValueError, match="^steps:"):
        fit(trainer, [], -1)
    with pytest.raises(TypeError, match="^log_every:"):
        fit(trainer, [], 1, log_every=1.5)
    with pytest.raises(ValueError, match="^batches:"):
        fit(trainer, [], 1)
    with pytest.raises(ValueError, match="^batches:"):
        fit(trainer, iter([torch.randn(4, 10)]), 2)
