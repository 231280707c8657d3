"""Random streams: seeds for those that are a trainer's own, and the state of those that a process has."""

import random
from enum import IntEnum
from typing import Any

import numpy as np
import torch


class Stream(IntEnum):
    """The random streams that come from one seed. Checkpoints rest on the numbers."""

    LATENT = 0  # the trainer's, of its steps
    SAMPLE = 1  # the trainer's, of Trainer.sample
    ORDER = 2  # the command line's, of the batches
    PICTURE = 3  # the command line's, of the real points in a picture
    DRAW = 4  # the command line's, of fastwgan sample's latents
    GRID = 5  # the loop's, of the latents of its pictures
    PROCESS = 6  # the command line's, of what networks and data draw in rank 0; those of other ranks are 7, 8, ...


def stream_seed(seed: int, stream: int) -> int:
    """Return a seed for one of the streams, each of which is independent of the others."""
    return int(np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def process_streams(device: torch.device) -> dict[str, Any]:
    """Return where PyTorch's streams on the CPU and ``device``, NumPy's and Python's stand, as tensors and numbers."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - what networks and data may use
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "python": random.getstate(),
    }


def set_process_streams(state: dict[str, Any], device: torch.device) -> None:
    """Put them back to where they stood."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
