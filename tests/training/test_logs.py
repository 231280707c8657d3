"""Averages of steps, and the log, TensorBoard and bar that they go to."""

import csv
import math

import pytest
import torch

from fastwgan import metrics
from fastwgan.metrics import Metrics, Results, Settled
from fastwgan.training.logs import COLUMNS, CSVLog, Interval, Progress, TensorBoardLog


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def log(path, start, *steps):
    """Rows of a log whose Wasserstein estimate is a tenth of the step."""
    file = CSVLog(path, start)
    for step in steps:
        file.write(step, step // 5, {"wasserstein": step / 10, "skipped": 0})
    file.close()


# Averages


def test_values_are_averaged_over_the_steps_that_have_them():
    interval = Interval()
    for step in (
        {"wasserstein": 1.0, "penalty": 4.0, "gradient_norm_min": 0.5, "gradient_norm_max": 2.0, "nonfinite": 0.0},
        {"wasserstein": 2.0, "generator_loss": 7.0, "nonfinite": 3.0},
        {"wasserstein": math.nan, "penalty": math.inf, "gradient_norm_min": 0.25, "gradient_norm_max": math.inf},
        {"wasserstein": 6.0, "penalty": 6.0, "gradient_norm_min": 0.75, "gradient_norm_max": 1.5, "nonfinite": 1.0},
    ):
        interval.include(step)
    assert interval.end() == {
        "wasserstein": 3.0, "penalty": 5.0, "generator_loss": 7.0, "gradient_norm_min": 0.25, "gradient_norm_max": 2.0,
        "nonfinite": 4 / 3, "skipped": 2,
    }  # fmt: skip
    assert Interval().end() == {"skipped": 0}


def test_an_interval_reads_seldom_and_holds_little(monkeypatch):
    reads = []
    read = metrics.read
    monkeypatch.setattr("fastwgan.metrics.read", lambda held: reads.append(len(held)) or read(held))
    interval = Interval()
    assert not interval
    told = []
    for i in range(250):
        told += interval.add(Metrics((Results(Settled(torch.full((4,), float(i)))), 0)), last=i == 249)
    assert reads == [100, 100, 50]
    assert [step["wasserstein"] for step in told] == list(range(250))
    assert interval
    assert interval.end()["wasserstein"] == 249 / 2
    assert not interval
    interval.add(Metrics((Results(Settled(torch.ones(4))), 0)), last=True)
    assert interval.end()["wasserstein"] == 1  # none of the interval before


# The file


def test_a_log_goes_on_where_the_run_does(tmp_path):
    path = tmp_path / "metrics.csv"
    log(path, 0, 50, 100, 150, 200)
    before = rows(path)
    log(path, 120, 150, 170)
    after = rows(path)
    assert [row["step"] for row in after] == ["50", "100", "150", "170"]
    assert after[:2] == before[:2]
    assert float(after[2]["seconds"]) >= float(before[1]["seconds"])
    log(path, 0, 50)
    assert [row["step"] for row in rows(path)] == ["50"]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("damage", range(1, 40))
def test_a_row_without_its_end_is_no_row(damage, tmp_path):
    """A file cut anywhere: a number may look whole with digits missing."""
    path = tmp_path / "metrics.csv"
    log(path, 0, 50, 100)
    whole = path.read_bytes()
    path.write_bytes(whole[:-damage])
    log(path, 100, 150)
    size = len(whole.splitlines(keepends=True)[-1])
    assert [row["step"] for row in rows(path)] == (["50", "150"] if damage <= size else ["150"])


@pytest.mark.parametrize(
    "text", ["", "\n", "nothing of ours\n1,2,3\n", "step\n", "step,seconds\nx,1\n5\n5,1,2\n5,abc\n²,1\n", "\0\xff\n"]
)
def test_a_file_of_something_else_is_begun_anew(text, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    log(path, 100, 150)
    assert [row["step"] for row in rows(path)] == ["150"]


def test_a_log_of_another_version_keeps_its_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,seconds,wasserstein,old\n10,1.5,0.25,abc\n20,2.5,0.5,def\n")
    log(path, 20, 30)
    first, second, third = rows(path)
    assert set(first) == {*COLUMNS, "old"}
    assert (first["step"], first["wasserstein"], first["old"], first["penalty"]) == ("10", "0.25", "abc", "")
    assert (second["seconds"], second["old"]) == ("2.5", "def")
    assert (third["wasserstein"], third["old"], third["skipped"]) == ("3.0", "", "0")
    assert float(third["seconds"]) >= 2.5


def test_missing_values_are_blank(tmp_path):
    file = CSVLog(tmp_path / "metrics.csv", 0)
    file.write(5, 1, {"skipped": 5})
    file.close()
    (row,) = rows(tmp_path / "metrics.csv")
    assert {name for name, value in row.items() if value} == {"step", "generator_step", "seconds", "skipped"}


# TensorBoard


def scalars(directory, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_has_the_same_values_and_goes_on(tmp_path):
    for start, steps in ((0, (50, 100, 150)), (100, (150, 200))):
        board = TensorBoardLog(tmp_path, start)
        for step in steps:
            board.write(step, step // 5, {"wasserstein": step + start, "skipped": 2})
        board.close()
    assert scalars(tmp_path, "wasserstein") == [(50, 50), (100, 100), (150, 250), (200, 300)]
    assert scalars(tmp_path, "generator_step")[-1] == (200, 40)
    assert scalars(tmp_path, "skipped")[-1] == (200, 2)


# The bar


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"wasserstein": 0.25, "penalty": 0.125}, "it/s W 0.25 penalty 0.125"),
        ({"wasserstein": 0.25, "saturation": 0.5}, "it/s W 0.25 saturation 0.5"),
        ({"skipped": 7}, "it/s"),
    ],
)
def test_the_bar_is_one_line_where_there_is_no_terminal(values, words, capsys):
    bar = Progress(10, 30)
    bar.write(20, 4, values)
    bar.write(30, 6, values)
    assert capsys.readouterr().out == ""
    bar.close()
    text = " ".join(capsys.readouterr().out.split())
    assert "30/30" in text
    assert words in text
