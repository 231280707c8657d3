"""Random streams: seeds for those that are a trainer's own, and the state of those that a process has."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["process_streams", "random_kept", "set_process_streams", "stream_seed"]


def stream_seed(seed: int, stream: int) -> int:
    """A seed for one of several random streams that are to be independent though they come from one ``seed``."""
    return int(np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def process_streams(device: torch.device) -> dict[str, Any]:
    """Where PyTorch's streams on the CPU and ``device``, NumPy's and Python's stand, as tensors and plain numbers."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - what networks and data may use
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(gauss)),
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


@contextmanager
def random_kept(device: torch.device) -> Iterator[None]:
    """Put PyTorch's global random state back to what it was after the block."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
