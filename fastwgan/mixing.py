"""Whether a network mixes the samples of a batch: if not, batches may share a forward pass and come out the same.

BatchNorm is told by its type. Others mix too: a BatchNorm of someone's own, a batch's standard deviation. So a network
is also tried: the same samples beside two different sets of others must come out the same to the bit.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["has_batchnorm", "random_kept", "same_beside", "versions"]


def has_batchnorm(module: nn.Module, *, training: bool = False) -> bool:
    """Whether a module has a BatchNorm, or with ``training`` one in training mode."""
    return any(isinstance(m, _BatchNorm) and (m.training or not training) for m in module.modules())


def versions(module: nn.Module) -> list[int]:
    """Numbers that change when something is written to the module's tensors."""
    return [t._version for t in (*module.parameters(), *module.buffers())]


@contextmanager
def random_kept(device: torch.device) -> Iterator[None]:
    """Afterwards PyTorch's global random state is what it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@torch.no_grad()
def same_beside(
    module: nn.Module, forward: Callable[[Tensor], Tensor], others: Iterable[Tensor], device: torch.device
) -> bool:
    """Whether ``forward`` gives the same beside each of ``others``, and writes to nothing of the module.

    One that writes in each pass, as spectral normalisation does, would have fewer of them. Random state and buffers are
    left as they were. Waits for the device.
    """
    results = []
    before = versions(module)
    for other in others:
        buffers = [(b, b.clone()) for b in module.buffers()]
        try:
            with random_kept(device):
                results.append(forward(other))
            if versions(module) != before:
                return False
        finally:
            if versions(module) != before:
                for buffer, value in buffers:
                    buffer.copy_(value)
    return all(torch.equal(result, results[0]) for result in results)
