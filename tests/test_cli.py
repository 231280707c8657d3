"""The command line end to end, as a user runs it: in processes of its own, kernels not interpreted."""

import csv
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from fastwgan import checkpoint, cli, data

ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def fastwgan(*args, code=0, env=None):
    run = subprocess.run(
        [sys.executable, "-m", "fastwgan", *map(str, args)],
        env=ENV | (env or {}), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == code, run.stderr + run.stdout
    return run


def in_process(*args):
    """The same without a new interpreter, where seconds matter more than isolation."""
    assert cli.main([str(arg) for arg in args]) == 0


def read_log(out):
    return list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))


def assert_png(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size > 2000


def exact_distance(a, b):
    """Earth mover's distance between equally many points: the mean cost of the best matching."""
    costs = cdist(np.reshape(a, (len(a), -1)), np.reshape(b, (len(b), -1)))
    return costs[linear_sum_assignment(costs)].mean()


def test_digits_with_defaults_come_close_to_held_out_ones(tmp_path):
    """`fastwgan train` as it stands: generated to held-out within 1.12 times real to held-out."""
    out = tmp_path / "run"
    run = fastwgan("train", "--out", out)
    assert "W " in run.stdout
    assert "it/s" in run.stdout
    for name in ("samples.png", "curves.png"):
        assert_png(out / name)
    fastwgan("sample", "--checkpoint", out / "last.pt", "--count", 500, "--out", tmp_path / "digits.npy")
    train, held_out = data.digits()
    real = exact_distance(train[:500].numpy(), held_out.numpy())
    generated = exact_distance(np.load(tmp_path / "digits.npy"), held_out.numpy())
    assert 2.65 < real < 2.75
    assert generated <= 1.12 * real


@pytest.mark.parametrize("constraint", ["clip", "penalty"])
@pytest.mark.parametrize("name", cli.DATA)
def test_every_data_set_trains_and_samples(name, constraint, tmp_path):
    out = tmp_path / "run"
    options = ("--steps", 60, "--batch-size", 32, "--backend", "torch", "--out", out)
    in_process("train", "--data", name, "--constraint", constraint, *options)
    for picture in ("samples.png", "curves.png"):
        assert_png(out / picture)
    rows = read_log(out)
    assert [int(row["step"]) for row in rows] == [50, 60]
    assert all(row["wasserstein"] and row["generator_loss"] for row in rows)
    assert bool(rows[0]["penalty"]) == (constraint == "penalty")
    for suffix in ("npy", "png"):
        in_process(
            "sample", "--checkpoint", out / "last.pt", "--count", 7, "--seed", 3, "--out", tmp_path / f"x.{suffix}"
        )
    assert_png(tmp_path / "x.png")
    samples = np.load(tmp_path / "x.npy")
    assert samples.shape == ((7, 1, 8, 8) if name == "digits" else (7, 2))
    in_process("sample", "--checkpoint", out / "last.pt", "--count", 7, "--seed", 3, "--out", tmp_path / "again.npy")
    assert np.array_equal(samples, np.load(tmp_path / "again.npy"))


@pytest.mark.parametrize("constraint", ["clip", "penalty"])
def test_resume_is_bit_identical(constraint, tmp_path):
    """30 steps against 15, a new process, and 15 more."""
    common = ("train", "--constraint", constraint, "--seed", 5, "--n-critic", 4)
    fastwgan(*common, "--steps", 30, "--out", tmp_path / "straight")
    fastwgan(*common, "--steps", 15, "--out", tmp_path / "halves")
    fastwgan("train", "--resume", "--steps", 30, "--out", tmp_path / "halves", "--constraint", constraint)
    straight, halves = (checkpoint.load(tmp_path / name / "last.pt") for name in ("straight", "halves"))
    for net in ("generator", "critic"):
        for name, value in straight["trainer"][net].items():
            assert torch.equal(value, halves["trainer"][net][name])
    assert torch.equal(straight["trainer"]["random"]["latent"], halves["trainer"]["random"]["latent"])
    assert straight["trainer"]["eps_offset"] == halves["trainer"]["eps_offset"]
    assert torch.equal(straight["data"]["order"], halves["data"]["order"])


@pytest.mark.parametrize("constraint", ["clip", "penalty"])
def test_backends_train_to_the_same_weights(constraint, tmp_path):
    common = ("train", "--constraint", constraint, "--steps", 10, "--n-critic", 1, "--batch-size", 16)
    fastwgan(*common, "--backend", "torch", "--out", tmp_path / "torch")
    fastwgan(*common, "--backend", "triton", "--out", tmp_path / "triton", env={"TRITON_INTERPRET": "1"})
    plain, fused = (checkpoint.load(tmp_path / name / "last.pt")["trainer"] for name in ("torch", "triton"))
    for net in ("generator", "critic"):
        a, b = (torch.cat([v.flatten() for v in state[net].values()]) for state in (fused, plain))
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_ctrl_c_saves_and_exits(tmp_path):
    out = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-m", "fastwgan", "train", "--out", str(out)],
        env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - ignored in the background
    ) as run:  # fmt: skip
        deadline = time.monotonic() + 120
        while not (out / "metrics.csv").exists() or len((out / "metrics.csv").read_text().splitlines()) < 2:
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == cli.INTERRUPTED
    assert stderr == ""
    step = int(re.findall(r"interrupted at step (\d+)", stdout)[0])
    assert checkpoint.load(out / "last.pt")["trainer"]["critic_iterations"] == step
    assert_png(out / "samples.png")
    fastwgan("train", "--resume", "--steps", step + 10, "--out", out)
    assert checkpoint.load(out / "last.pt")["trainer"]["critic_iterations"] == step + 10
    steps = [int(row["step"]) for row in read_log(out)]
    assert steps == sorted(set(steps))


def test_info_says_which_backend_and_why():
    text = fastwgan("info").stdout
    assert f"torch    {torch.__version__}" in text
    assert "gradient_penalty" in text
    assert "because Triton needs a GPU tensor" in text or "cuda:0" in text
    assert "interpreted" in fastwgan("info", env={"TRITON_INTERPRET": "1"}).stdout


BAD = [
    ("train", "--data", "mnist"),
    ("train", "--steps", "0"),
    ("train", "--steps", "many"),
    ("train", "--batch-size", "-3"),
    ("train", "--seed", "-1"),
    ("train", "--device", "tpu7"),
    ("train", "--device", "cuda:99"),
    ("train", "--constraint", "both"),
    ("train", "--resume", "--out", "nowhere"),
    ("sample", "--checkpoint", "nowhere.pt", "--out", "x.npy"),
    ("sample", "--checkpoint", "nowhere.pt", "--out", "x.jpg"),
    ("sample", "--out", "x.npy"),
    ("sample", "--checkpoint", "nowhere.pt", "--out", "x.npy", "--count", "1000000000000000000000000"),
    ("train", "--batch-size", "1000000000000"),
    ("train", "--steps", "0\n"),
    ("train", "--device", "meta"),
    ("train", "--out", "x" * 300),
    ("evaluate",),
    (),
]


@pytest.mark.parametrize("args", BAD, ids=" ".join)
def test_bad_arguments_exit_with_one_line(args, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        sys.exit(cli.main(args))
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("fastwgan")
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_not_overwritten_or_mixed_up(tmp_path):
    out = tmp_path / "run"
    fastwgan("train", "--steps", 5, "--out", out)
    before = (out / "last.pt").read_bytes()
    assert "holds a run" in fastwgan("train", "--steps", 5, "--out", out, code=2).stderr
    message = fastwgan("train", "--steps", 9, "--out", out, "--resume", "--batch-size", 3, code=2).stderr
    assert "--batch-size: the run" in message
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert (
        "not a readable checkpoint"
        in fastwgan("sample", "--checkpoint", tmp_path / "text.pt", "--out", "x.npy", code=2).stderr
    )
    assert (out / "last.pt").read_bytes() == before


def test_files_in_the_way_and_foreign_checkpoints(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "x.npy").mkdir()
    checkpoint.save(tmp_path / "foreign.pt", {"config": {"name": "x"}})
    fastwgan("train", "--steps", 5, "--out", tmp_path / "run")
    for args in (
        ("train", "--steps", "5", "--out", tmp_path / "file"),
        ("sample", "--checkpoint", tmp_path / "foreign.pt", "--out", tmp_path / "y.npy"),
        ("sample", "--checkpoint", tmp_path / "run" / "last.pt", "--out", tmp_path / "x.npy"),
    ):
        with pytest.raises(SystemExit) as error:
            cli.main([str(arg) for arg in args])
        assert error.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_explicit_triton_without_a_gpu_is_refused(tmp_path):
    message = fastwgan("train", "--backend", "triton", "--device", "cpu", "--out", tmp_path / "run", code=2).stderr
    assert "Triton needs a GPU tensor" in message
    assert message.count("\n") == 1
