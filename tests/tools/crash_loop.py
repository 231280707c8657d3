"""Train a tiny network, again and again killed without warning, and look at what it leaves. Run by test_checkpoint.py.

    python tests/tools/crash_loop.py DIRECTORY KEEP KILLS

Each run is a fork of this process, which has imported what takes seconds and trains nothing itself.
"""

import csv
import os
import random
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # an optimizer imports it, which takes most of a second

from fastwgan import GradientPenalty, Trainer, checkpoint, data, models
from fastwgan.training.fit import fit


def train(out, steps, keep, save_every=1):
    """Train up to a step, going on with what is in a directory."""
    torch.manual_seed(0)
    random.seed(0)  # which a fork seeds anew
    networks = models.mlp([4, 8, 3]), models.mlp([3, 8, 1])
    trainer = Trainer(*networks, latent=4, constraint=GradientPenalty(), n_critic=3, backend="torch")
    batches = data.ShuffledBatches(torch.randn(20, 3), 8, seed=1)
    if (out / "last.pt").exists():
        content = checkpoint.load(out / "last.pt")
        trainer.load_state_dict(content["trainer"])
        batches.load_state_dict(content["data"])
    ballast = {"ballast": torch.arange(2**19)}  # 4 MiB, so that many a kill comes while it is written
    left = steps - trainer.critic_iterations
    fit(trainer, batches, left, out=out, config=ballast, log_every=1, save_every=save_every, keep=keep)


def started(*args, **options):
    """The process id of a run."""
    child = os.fork()
    if child:
        return child
    try:
        train(*args, **options)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def step_of(path):
    return checkpoint.load(path)["trainer"]["critic_iterations"]


def look(out, before, keep):
    """Check what a kill left; return the step of last.pt."""
    last = out / "last.pt"
    if not last.exists():
        assert before == 0, "last.pt is gone"
        return 0
    step = step_of(last)
    assert step >= before, f"from step {before} back to {step}"
    kept = {int(m[1]): p for p in out.iterdir() if (m := re.fullmatch(r"step-(\d{9})\.pt", p.name))}
    assert all(step_of(path) == s for s, path in kept.items())
    if keep == 1:
        assert not kept
    else:  # one may be there that last.pt is not yet, and one that is to go
        newest = [s for s in sorted(kept) if s <= step]
        assert newest[-keep:] == list(range(max(1, step - keep + 1), step + 1)), f"{newest} at step {step}"
        assert len(newest) <= keep + 1
        assert set(kept) - set(newest) <= {step + 1}
    return step


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main(directory, keep, kills):
    torch.set_num_threads(1)  # a fork has no other threads
    moment = random.Random(keep)
    out = directory / "killed"
    step, moved, span = 0, 0, 0.2
    for _ in range(kills):
        begun = time.perf_counter()
        child = started(out, 10**6, keep)
        time.sleep(moment.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"the run ended by itself, status {status}"
        before, step = step, look(out, step, keep)
        moved += step > before
        if step == before:  # on a slow machine it takes longer to get anywhere
            span = min(2 * span, 2 * (time.perf_counter() - begun) + 0.2)
    assert moved >= kills // 3, f"only {moved} runs of {kills} got anywhere"

    total = step + 5
    for path, options in ((out, {}), (directory / "straight", {"save_every": 10**6})):
        _, status = os.waitpid(started(path, total, keep, **options), 0)
        assert status == 0
    assert look(out, total, keep) == total
    killed, straight = (checkpoint.load(path / "last.pt") for path in (out, directory / "straight"))
    assert same(killed, straight), "not what an uninterrupted run comes to"
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == list(range(1, total + 1))
    left = [path.name for path in out.iterdir() if path.name.startswith(".")]
    assert left == [], f"temporary files are left: {left}"
    print(f"{kills} kills, {moved} of runs that had got further; {total} steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
