"""Checkpoints survive kills, full disks and damage, and what is none is refused."""

import copy
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from fastwgan import GradientPenalty, Trainer, checkpoint, models
from fastwgan.checkpoint import export_safetensors, save_newest

ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
KILLS = 50


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# Kills


@pytest.mark.parametrize("keep", [1, 3])
def test_a_run_that_is_killed_time_and_again_ends_as_any_other(keep, tmp_path):
    run = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "tools" / "crash_loop.py", tmp_path, str(keep), str(KILLS)],
        env=ENV, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{KILLS} kills")


# What is kept


def test_the_newest_are_kept_by_step(tmp_path):
    for step in (5, 10, 15, 20):
        save_newest(tmp_path, {"n": step}, step=step, keep=3)
    assert names(tmp_path) == ["last.pt", "step-000000010.pt", "step-000000015.pt", "step-000000020.pt"]
    assert [checkpoint.load(tmp_path / name)["n"] for name in names(tmp_path)] == [20, 10, 15, 20]
    assert (tmp_path / "last.pt").samefile(tmp_path / "step-000000020.pt")  # no room is taken twice


def test_keeping_one_is_last_alone_and_touches_no_other(tmp_path):
    for step in (5, 10):
        save_newest(tmp_path, {"n": step}, step=step, keep=1)
    assert names(tmp_path) == ["last.pt"]
    (tmp_path / "step-000000001.pt").write_text("the user's")
    save_newest(tmp_path, {"n": 15}, step=15, keep=1)
    assert names(tmp_path) == ["last.pt", "step-000000001.pt"]


def test_a_run_taken_up_from_further_back_keeps_its_own(tmp_path):
    for step in (10, 20, 30):
        save_newest(tmp_path, {"n": step}, step=step, keep=2)
    for step in (11, 12, 13):
        save_newest(tmp_path, {"n": -step}, step=step, keep=2)
    assert checkpoint.load(tmp_path / "last.pt")["n"] == -13
    assert {"step-000000012.pt", "step-000000013.pt"} <= set(names(tmp_path))
    assert "step-000000011.pt" not in names(tmp_path)


def test_without_hard_links_they_are_copied(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("not supported")

    monkeypatch.setattr("os.link", refuse)
    for step in (1, 2, 3):
        save_newest(tmp_path, {"n": step}, step=step, keep=2)
    assert names(tmp_path) == ["last.pt", "step-000000002.pt", "step-000000003.pt"]
    assert checkpoint.load(tmp_path / "last.pt")["n"] == 3


def test_only_what_a_killed_run_left_is_cleaned(tmp_path):
    ours = [".last.pt.123", ".step-000000010.pt.4", ".metrics.csv.77"]
    others = ["last.pt", ".last.pt", ".last.pt.old", "last.pt.5", ".notes.txt.6"]
    for name in ours + others:
        (tmp_path / name).write_text("")
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == sorted(others)


# Disks that are full


@contextmanager
def limited(most):
    """Files of at most so many bytes; a write beyond is the OSError that a full disk gives. Not around pytest's own."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("most", [0, 700, 100_000, 400_500])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk_leaves_the_old_file(most, keep, tmp_path):
    save_newest(tmp_path, {"n": 1}, step=1, keep=keep)
    before = names(tmp_path)
    with pytest.raises(OSError, match="File too large"), limited(most):
        save_newest(tmp_path, {"w": torch.zeros(100_000)}, step=2, keep=keep)
    assert names(tmp_path) == before
    assert checkpoint.load(tmp_path / "last.pt")["n"] == 1


def test_a_full_disk_leaves_the_old_export(tmp_path):
    path = tmp_path / "critic.safetensors"
    path.write_text("old")
    with pytest.raises(OSError, match="(?i)file too large"), limited(1000):
        export_safetensors(nn.Linear(100, 100), path)
    assert path.read_text() == "old"
    assert names(tmp_path) == [path.name]


# Files that are none


@pytest.fixture
def trainer():
    return Trainer(models.mlp([6, 10]), models.mlp([10, 8, 1]), latent=6, constraint=GradientPenalty(), backend="torch")


def assert_refused(trainer, path, words, kind=ValueError):
    before = copy.deepcopy([*trainer.generator.parameters(), *trainer.critic.parameters()])
    with pytest.raises(kind, match=f"^path: .*{words}"):
        trainer.load(path)
    after = [*trainer.generator.parameters(), *trainer.critic.parameters()]
    assert all(map(torch.equal, before, after))
    assert trainer.critic_iterations == 0


def test_truncated_files_are_refused(trainer, tmp_path):
    trainer.save(tmp_path / "whole.pt")
    data = (tmp_path / "whole.pt").read_bytes()
    for length in (0, 1, 4, 100, len(data) // 2, len(data) - 200, len(data) - 22, len(data) - 1):
        (tmp_path / "cut.pt").write_bytes(data[:length])
        assert_refused(trainer, tmp_path / "cut.pt", "not a readable checkpoint")


def test_a_flipped_bit_is_noticed_or_harmless(tmp_path):
    """torch.load looks at no checksum: of 400 flips in such a file, it let 282 change the weights."""
    weights = torch.randn(300)
    checkpoint.save(tmp_path / "whole.pt", {"w": weights, "n": 3})
    data = (tmp_path / "whole.pt").read_bytes()
    noticed = 0
    for i in range(len(data)):
        flipped = bytearray(data)
        flipped[i] ^= 1 << i % 8
        (tmp_path / "flipped.pt").write_bytes(flipped)
        try:
            content = checkpoint.load(tmp_path / "flipped.pt")
        except ValueError:
            noticed += 1
        else:
            assert torch.equal(content["w"], weights)
            assert content["n"] == 3
    assert noticed > len(data) / 2


def test_checksums_are_written_even_if_torch_is_told_not_to(tmp_path):
    from torch.utils.serialization import config

    with config.patch("save.compute_crc32", False):
        checkpoint.save(tmp_path / "whole.pt", {"n": 3})
        assert config.save.compute_crc32 is False
    assert checkpoint.load(tmp_path / "whole.pt")["n"] == 3


class Trap:
    """Pickled, it creates a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_does_not_run(trainer, tmp_path):
    trap = Trap(tmp_path / "sprung")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(trap))
    torch.save({"format": "fastwgan", "version": 2, "trainer": trap}, tmp_path / "zipped.pt")
    torch.save(trap, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("plain.pt", "zipped.pt", "old.pt"):
        assert_refused(trainer, tmp_path / name, "not a readable checkpoint")
        assert not (tmp_path / "sprung").exists()


def test_foreign_files_are_refused(trainer, tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    assert_refused(trainer, tmp_path / "other.pt", "not written by fastwgan")
    torch.save([1, 2], tmp_path / "list.pt")
    assert_refused(trainer, tmp_path / "list.pt", "not written by fastwgan")
    torch.save({"format": "fastwgan", "version": 3, "trainer": {}}, tmp_path / "newer.pt")
    assert_refused(trainer, tmp_path / "newer.pt", "version 3, expected 2; a newer fastwgan wrote it")
    torch.save({"format": "fastwgan"}, tmp_path / "unnumbered.pt")
    assert_refused(trainer, tmp_path / "unnumbered.pt", "version None, expected 2")
    checkpoint.save(tmp_path / "empty.pt", {})
    assert_refused(trainer, tmp_path / "empty.pt", "holds no trainer")
    assert_refused(trainer, tmp_path, "got the directory")
    assert_refused(trainer, tmp_path / "none.pt", "no checkpoint", FileNotFoundError)


# Weights for other programs


class Tied(nn.Module):
    """A tied layer, views of one storage, an expanded buffer and two without elements."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        flat = torch.randn(6)
        self.left, self.right = nn.Parameter(flat[:4].view(2, 2)), nn.Parameter(flat[2:])
        self.register_buffer("spread", torch.ones(1).expand(3))
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("nought", torch.empty(0))


def test_tied_weights_are_written_once(tmp_path):
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    export_safetensors(module, tmp_path / "m.safetensors")
    assert len(load_file(tmp_path / "m.safetensors")) == len(module.state_dict()) - 1
    other = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    other[2].weight = other[0].weight
    load_model(other, tmp_path / "m.safetensors")
    for name, value in module.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_weights_that_share_memory_are_written_apart(tmp_path):
    module = Tied()
    export_safetensors(module, tmp_path / "m.safetensors")
    loaded = load_file(tmp_path / "m.safetensors")
    state = module.state_dict()
    assert set(state) - set(loaded) == {"second.weight"}
    assert all(torch.equal(loaded[name], state[name]) for name in loaded)


def test_layouts_and_types_survive_an_export(tmp_path):
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last).to(torch.bfloat16)
    export_safetensors(conv, tmp_path / "m.safetensors")
    loaded = load_file(tmp_path / "m.safetensors")
    assert torch.equal(loaded["weight"], conv.weight)
    assert loaded["weight"].dtype == torch.bfloat16


def test_what_cannot_be_exported_is_named(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(TypeError, match="^module: .*got dict as _extra_state"):
        export_safetensors(Extra(2, 2), tmp_path / "m.safetensors")
    with pytest.raises(TypeError, match="^module: .*got dict"):
        export_safetensors({}, tmp_path / "m.safetensors")
    assert names(tmp_path) == []


# Memory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_flat_over_a_long_run(tmp_path):
    """FASTWGAN_MEMORY_MINUTES of `fastwgan train`, 30 by default; the first fifth is warm-up."""
    seconds = 60 * float(os.environ.get("FASTWGAN_MEMORY_MINUTES", "30"))
    page = os.sysconf("SC_PAGESIZE") / 2**20
    with subprocess.Popen(
        [sys.executable, "-m", "fastwgan", "train", "--steps", str(10**12), "--out", str(tmp_path / "run")],
        env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - ignored in the background
    ) as run:  # fmt: skip
        begun, sizes = time.monotonic(), []
        while (now := time.monotonic() - begun) < seconds:
            assert run.poll() is None, run.stderr.read()
            sizes.append((now, int(Path(f"/proc/{run.pid}/statm").read_text().split()[1]) * page))
            time.sleep(0.5)
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
    early = max(size for now, size in sizes if now < seconds / 5)
    late = max(size for now, size in sizes if now > seconds / 2)
    print(f"{early:.1f} MiB at most in the first fifth of {seconds / 60:g} minutes, {late:.1f} in the second half")
    assert late - early < 16, f"from {early:.0f} to {late:.0f} MiB"
