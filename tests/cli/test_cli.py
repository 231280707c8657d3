"""The command line end to end, as a user runs it: in processes of its own, kernels not interpreted."""

import csv
import gzip
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from small_trainers import assert_same_state

from fastwgan import checkpoint, cli, data
from fastwgan.cli import runs

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
@pytest.mark.parametrize("name", runs.DATA)
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


@pytest.fixture
def several(monkeypatch):
    """Up to four threads, of which nothing is said; the times of steps are made up: by number, in seconds."""
    kept, times, now = torch.get_num_threads(), {4: 0.03, 2: 0.02, 1: 0.05}, [0.0]
    step = runs.Trainer.step

    def timed(self, *batch):
        now[0] += times.get(torch.get_num_threads(), 0)
        return step(self, *batch)

    monkeypatch.setattr(runs.Trainer, "step", timed)
    monkeypatch.setattr(runs, "Timer", partial(runs.Timer, timer=lambda: now[0]))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(4)
    yield times
    torch.set_num_threads(kept)


RUN = ("train", "--steps", 6, "--batch-size", 8, "--backend", "torch", "--data", "gaussians8")


def test_a_run_with_the_threads_it_finds_is_the_run_with_as_many(several, tmp_path, monkeypatch):
    """The search leaves no trace in it."""
    in_process(*RUN, "--out", tmp_path / "first")  # what a process imports in its first draws from Python's stream
    states = []
    for name in ("found", "said"):
        if name == "said":
            monkeypatch.setenv("OMP_NUM_THREADS", "2")
        in_process(*RUN, "--out", tmp_path / name)
        assert torch.get_num_threads() == 2
        states.append(checkpoint.load(tmp_path / name / "last.pt"))
    found, said = states
    assert (found["config"]["threads"], said["config"]["threads"]) == (2, None)
    assert_same_state(found["trainer"], said["trainer"])
    assert_same_state(found["data"], said["data"])


def test_a_resumed_run_keeps_the_threads_of_its_first(several, tmp_path):
    in_process(*RUN, "--out", tmp_path)
    several.update({4: 0.01, 2: 1.0})
    torch.set_num_threads(4)
    in_process("train", "--resume", "--steps", 9, "--data", "gaussians8", "--out", tmp_path)
    assert torch.get_num_threads() == 2
    content = checkpoint.load(tmp_path / "last.pt")
    assert content["config"]["threads"] == 2
    del content["config"]["threads"]  # an older run
    checkpoint.save(tmp_path / "last.pt", {k: v for k, v in content.items() if k not in ("format", "version")})
    torch.set_num_threads(4)
    in_process("train", "--resume", "--steps", 12, "--data", "gaussians8", "--out", tmp_path)
    assert torch.get_num_threads() == 4
    assert checkpoint.load(tmp_path / "last.pt")["config"]["threads"] is None


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_threads_that_the_environment_names_are_kept(name, several, tmp_path, monkeypatch):
    in_process(*RUN, "--out", tmp_path)
    monkeypatch.setenv(name, "3")
    torch.set_num_threads(3)
    for steps in ((*RUN, "--out", tmp_path / "new"), ("train", "--resume", "--steps", 9, "--out", tmp_path)):
        in_process(*steps)
        assert torch.get_num_threads() == 3
    assert checkpoint.load(tmp_path / "new" / "last.pt")["config"]["threads"] is None


def test_steps_that_take_long_keep_all_threads(several, tmp_path):
    several.update({4: 0.3, 2: 0.1})
    in_process(*RUN, "--out", tmp_path)
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("constraint", ["clip", "penalty"])
def test_backends_train_to_the_same_weights(constraint, tmp_path):
    common = ("train", "--constraint", constraint, "--steps", 10, "--n-critic", 1, "--batch-size", 16)
    fastwgan(*common, "--backend", "torch", "--out", tmp_path / "torch")
    fastwgan(*common, "--backend", "triton", "--out", tmp_path / "triton", env={"TRITON_INTERPRET": "1"})
    plain, fused = (checkpoint.load(tmp_path / name / "last.pt")["trainer"] for name in ("torch", "triton"))
    for net in ("generator", "critic"):
        a, b = (torch.cat([v.flatten() for v in state[net].values()]) for state in (fused, plain))
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_numbers_that_go_bad_end_the_run_in_a_line(tmp_path):
    np.save(tmp_path / "huge.npy", np.full((300, 2), 3e38, np.float32))
    common = ("train", "--data", f"npy:{tmp_path / 'huge.npy'}", "--backend", "torch", "--steps", 30)
    run = fastwgan(*common, "--out", tmp_path / "raise", code=2)
    (line,) = (line for line in run.stderr.splitlines() if "error" in line)
    assert re.search("critic: step 1 had gradients that are not finite, first in .*there is no checkpoint", line)
    run = fastwgan(*common, "--nonfinite", "skip", "--out", tmp_path / "skip", code=2)
    assert "critic: 20 steps in a row up to 20 had" in run.stderr


def torchrun(*args):
    """Two processes of `fastwgan` under PyTorch's launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastwgan"]
    env = ENV | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, *map(str, args)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - ignored in the background
    )  # fmt: skip


def test_two_processes_train_as_one_does(tmp_path):
    """And go on from a checkpoint. One writes, and tells of it."""
    common = ("train", "--data", "gaussians8", "--constraint", "clip", "--ema", "0.9", "--keep", 2, "--save-every", 3)
    for steps, resume in ((6, []), (10, ["--resume"])):
        run = torchrun(*common, "--steps", steps, "--out", tmp_path / "two", *resume)
        output, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
        assert output.count(f"step {steps} (") == 1
        fastwgan(*common, "--steps", steps, "--out", tmp_path / "one", *resume)
    assert sorted(path.name for path in (tmp_path / "two").glob("step-*.pt")) == [
        "step-000000009.pt",
        "step-000000010.pt",
    ]
    one, two = (checkpoint.load(tmp_path / name / "last.pt")["trainer"] for name in ("one", "two"))
    # RMSprop makes a full step of a gradient that is rounding alone, so this is loose; test_ranks.py has float64.
    for name in ("generator", "critic", "ema"):
        weights = [torch.cat([x.flatten() for x in state[name].values()]) for state in (one, two)]
        assert (weights[1] - weights[0]).norm() <= 0.05 * weights[0].norm()
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    assert [row["step"] for row in logs[1]] == ["6", "10"]
    for rows in zip(*logs, strict=True):
        assert float(rows[1]["wasserstein"]) == pytest.approx(float(rows[0]["wasserstein"]), rel=0.01)


def test_a_process_that_dies_ends_the_run(tmp_path):
    """With an error, and a checkpoint that is whole."""
    out = tmp_path / "run"
    run = torchrun("train", "--data", "gaussians8", "--steps", 10**9, "--save-every", 1, "--out", out)
    while not (out / "last.pt").exists():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors
    assert checkpoint.load(out / "last.pt")["trainer"]["critic_iterations"] >= 1


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
    ("train", "--data", "folder"),
    ("train", "--data", "npy:"),
    ("train", "--data", "zip:x.zip"),
    ("train", "--data", "folder:nowhere"),
    ("train", "--data", "npy:nowhere.npy"),
    ("train", "--data", "idx:nowhere"),
    ("train", "--data", "digits", "--size", "32"),
    ("train", "--data", "swissroll", "--channels", "1"),
    ("train", "--data", "folder:nowhere", "--size", "48"),
    ("train", "--data", "folder:nowhere", "--channels", "4"),
    ("train", "--workers", "-1"),
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
    ("bench", "--ops"),
    ("experiment", "digits", "--json", "x.json"),
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


@pytest.mark.parametrize(
    ("args", "command"),
    [
        (("bench",), "python -m benchmarks steps (or ops)"),
        (("bench", "--ops", "--help"), "python -m benchmarks steps (or ops)"),
        (("experiment", "--list"), "python -m benchmarks experiment"),
        (("experiment", "digits", "--seeds", "2"), "python -m benchmarks experiment"),
    ],
)
def test_what_has_left_the_package_says_where_it_is(args, command, capsys):
    where = f"run {command} in a checkout of the source"
    assert refused(capsys, *args) == f"fastwgan: error: {args[0]} has left the package: {where}\n"
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert command in capsys.readouterr().out


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
    content = checkpoint.load(tmp_path / "run" / "last.pt")
    checkpoint.save(tmp_path / "later.pt", content | {"config": content["config"] | {"data": "zip:x.zip"}})
    for args in (
        ("train", "--steps", "5", "--out", tmp_path / "file"),
        ("sample", "--checkpoint", tmp_path / "later.pt", "--out", tmp_path / "y.npy"),
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


# Data in files. 60 real digits in each, and a few steps on them.


def digit_pixels(side):
    """uint8 [60, side, side]."""
    images = data.digits()[0][:60, 0].add(1).mul(127.5).byte().numpy()
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side))) for image in images])


def write_folder(path):
    path.mkdir()
    for i, image in enumerate(digit_pixels(12)):
        Image.fromarray(image).convert("RGB").save(path / f"{i:02}.{'jpg' if i % 2 else 'png'}")


def write_idx(path):
    images = digit_pixels(28)
    path.write_bytes(gzip.compress(struct.pack(">4I", 0x803, *images.shape) + images.tobytes()))


def write_points(path):
    np.save(path, digit_pixels(8).reshape(60, 64)[:, :20] / 127.5 - 1)


def write_line(path):
    np.save(path, np.linspace(-1, 1, 60)[:, None])


def write_array(path):
    np.save(path, np.stack([digit_pixels(8)] * 3, axis=-1))


def write_floats(path):
    np.save(path, digit_pixels(20).astype(np.float32) / 127.5 - 1)


FILES = {  # how to write, where, options, the shape of a sample
    "folder": (write_folder, "folder:pictures", (), (3, 32, 32)),
    "gray-folder": (write_folder, "folder:pictures", ("--size", 16, "--channels", 1), (1, 16, 16)),
    "idx": (write_idx, "idx:digits.gz", (), (1, 32, 32)),
    "points": (write_points, "npy:points.npy", (), (20,)),
    "line": (write_line, "npy:line.npy", (), (1,)),
    "array": (write_array, "npy:digits.npy", (), (3, 8, 8)),
    "floats": (write_floats, "npy:digits.npy", ("--size", 32), (1, 32, 32)),
}


def write(name):
    """Write the files in the current directory; the options that train on them, their place and the shape."""
    writer, where, options, shape = FILES[name]
    place = where.partition(":")[2]
    writer(Path(place))
    common = ("train", "--data", where, "--batch-size", 6, "--backend", "torch", *options)
    return common, Path(place), shape


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize("constraint", ["clip", "penalty"])
@pytest.mark.parametrize("name", FILES)
def test_files_train_and_sample_without_them(name, constraint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common, place, shape = write(name)
    in_process(*common, "--constraint", constraint, "--steps", 8)
    out = tmp_path / "runs" / f"{place.stem}-{constraint}"
    assert capsys.readouterr().err == ""
    for picture in ("samples.png", "curves.png"):
        assert_png(out / picture)
    remove(place)
    for i, suffix in enumerate(("png", "npy", "npy")):
        sample = ("sample", "--checkpoint", out / "last.pt", "--count", 7, "--out")
        in_process(*sample, f"{i}.{suffix}")
    assert_png(tmp_path / "0.png")
    samples = np.load("1.npy")
    assert samples.shape == (7, *shape)
    assert np.isfinite(samples).all()
    assert samples.std(0).max() > 0
    assert np.array_equal(samples, np.load("2.npy"))


def assert_same_run(a, b):
    a, b = (checkpoint.load(path / "last.pt") for path in (a, b))
    for net in ("generator", "critic"):
        assert a["trainer"][net].keys() == b["trainer"][net].keys()
        for name, value in a["trainer"][net].items():
            assert torch.equal(value, b["trainer"][net][name]), name
    assert a["config"] == b["config"]


@pytest.mark.parametrize("name", ["folder", "idx", "points", "array"])
def test_resume_on_files_is_bit_identical_for_any_number_of_workers(name, tmp_path, monkeypatch):
    """14 steps, past an epoch of 10, against 9 and 5 more."""
    monkeypatch.chdir(tmp_path)
    common, *_ = write(name)
    in_process(*common, "--steps", 14, "--workers", 0, "--out", "straight")
    in_process(*common, "--steps", 9, "--workers", 3, "--out", "halves")
    in_process("train", "--resume", "--steps", 14, "--workers", 1, "--out", "halves", "--backend", "torch")
    assert_same_run(tmp_path / "straight", tmp_path / "halves")


def refused(capsys, *args):
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as error:
        cli.main([str(arg) for arg in args])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    return message


def test_a_run_goes_on_with_its_own_samples_only(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common, place, _ = write("gray-folder")
    in_process(*common, "--steps", 3, "--out", "run")
    resume = ("train", "--resume", "--out", "run", "--steps", 4)
    assert "--size: the run in run has 16, got 32" in refused(capsys, *resume, "--size", 32)
    assert "--channels: the run in run has 1, got 3" in refused(capsys, *resume, "--channels", 3)
    assert "--data: the run in run has folder:pictures, got digits" in refused(capsys, *resume, "--data", "digits")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    (place / "00.png").unlink()
    assert "expected one of 59 samples, got 60" in refused(capsys, *resume)
    remove(place)
    assert "expected a directory of images" in refused(capsys, *resume)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    write_folder(place)
    in_process(*resume, "--size", 16, "--channels", 1)


def test_an_array_of_another_shape_does_not_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common, place, _ = write("points")
    in_process(*common, "--steps", 3, "--out", "run")
    np.save(place, np.zeros((60, 5)))
    assert "samples of shape (20,), npy:points.npy now (5,)" in refused(
        capsys, "train", "--resume", "--out", "run", "--steps", 4
    )


def test_unusable_images_are_reported_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    common, place, _ = write("gray-folder")
    (place / "00.png").write_bytes((place / "00.png").read_bytes()[:-30])
    (place / "01.jpg").write_text("text")
    in_process(*common, "--steps", 2, "--out", "few")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [f"skipped {place / name}" for name in ("00.png", "01.jpg")]
    for i in range(11):
        (place / f"x{i}.png").write_text("text")
    in_process(*common, "--steps", 2, "--out", "many")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == runs.REPORTED + 1
    assert lines[-1] == "fastwgan: skipped 3 more files"
    assert_same_run(tmp_path / "few", tmp_path / "many")


def test_bad_files_end_it_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "x.png").write_text("text")
    write_idx(tmp_path / "whole.gz")
    (tmp_path / "cut.gz").write_bytes((tmp_path / "whole.gz").read_bytes()[:-50])
    (tmp_path / "labels").write_bytes(struct.pack(">2I", 0x801, 60) + bytes(60))
    np.save("objects.npy", np.array([[1, "a"]], dtype=object), allow_pickle=True)
    np.save("large.npy", np.zeros((9, 20, 20), np.uint8))
    np.save("points.npy", np.zeros((9, 2)))
    np.save("nan.npy", np.full((9, 2), np.nan))
    np.save("range.npy", np.full((9, 8, 8), 255.0))
    there = sorted(tmp_path.iterdir())
    for where, message in {
        "folder:empty": "expected images in empty",
        "folder:text": "x.png: cannot identify image file",
        "folder:labels": "expected a directory",
        "idx:cut.gz": "is damaged",
        "idx:labels": "got 0x00000801",
        "idx:empty": "no train-images-idx3-ubyte",
        "npy:objects.npy": "no usable npy file",
        "npy:labels": "no usable npy file",
        "npy:large.npy": "got 20x20; --size brings them there",
        "npy:points.npy --size 32": "holds points",
        "idx:whole.gz --channels 3": "is for a folder",
    }.items():
        assert message in refused(capsys, "train", "--data", *where.split(), "--steps", 2)
    assert sorted(tmp_path.iterdir()) == there
    for where, message in {"npy:nan.npy": "are not finite", "npy:range.npy": "got 255 to 255"}.items():
        assert message in refused(capsys, "train", "--data", where, "--steps", 2)


def test_values_that_spoil_a_run_leave_it_saved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    array = np.random.default_rng(0).normal(size=(60, 2))
    array[30] = np.nan
    np.save("x.npy", array)
    common = ("train", "--batch-size", 1, "--backend", "torch", "--out", "run")
    message = refused(capsys, *common, "--data", "npy:x.npy", "--steps", 60)
    assert "sample 30 of x.npy has values that are not finite" in message
    reached = checkpoint.load("run/last.pt")["trainer"]["critic_iterations"]
    assert 0 < reached < 60
    array[30] = 0
    np.save("x.npy", array)
    in_process(*common, "--resume", "--steps", 60)
    in_process(*common[:-1], "straight", "--data", "npy:x.npy", "--steps", 60)
    assert_same_run(tmp_path / "run", tmp_path / "straight")
