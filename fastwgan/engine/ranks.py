"""Several processes that train one pair of networks, each on its part of the batch, by ``torch.distributed``.

After a backward pass the gradients of all ranks are added up in one all-reduce, which carries what the ranks measured
as well. Nothing is hooked into autograd, so penalties, several forward passes before a backward one, and parameters
without gradients need no care. Each rank's part of latents and eps is its part of what one process would have drawn.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def _place() -> tuple[int, int]:  # this process's rank, and how many there are
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class Ranks:
    """The process group that PyTorch has been initialised with, or a single process: ``rank`` of ``world``."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.rank, self.world = _place()
        self._device = device  # by way of which nccl carries all things

    def backend(self, device: torch.device) -> str:
        """Return the carrier of a device's tensors: "nccl", "gloo" or another; "none" for a single process."""
        if self.world == 1:
            return "none"
        backends = dist.BackendConfig(dist.Backend(dist.get_backend_config())).get_device_backend_map()
        return str(backends.get(device.type, "none"))

    def check_current(self) -> None:
        """Raise RuntimeError if there is another process group now, or one at last."""
        rank, world = _place()
        if (rank, world) != (self.rank, self.world):
            raise RuntimeError(
                f"Trainer: was made as rank {self.rank} of {self.world}, and this is rank {rank} of {world} now: "
                "make it after torch.distributed.init_process_group"
            )

    def agree(self, settings: dict[str, object]) -> None:
        """Raise ValueError, on all ranks, naming a setting that they do not have in common."""
        own = {name: "a callable" if callable(value) else str(value) for name, value in settings.items()}
        for rank, others in enumerate(self.gather(own)):
            for name in own | others:
                if (mine := own.get(name, "none")) != (other := others.get(name, "none")):
                    got = f"{mine} on rank {self.rank} and {other} on rank {rank}"
                    raise ValueError(f"{name}: expected the same on all ranks, got {got}")

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Give all ranks the tensors of rank 0, in place."""
        if self.world > 1:
            for x in tensors:
                whole = x.detach().clone(memory_format=torch.contiguous_format)  # gloo overruns tensors with gaps
                dist.broadcast(whole, 0)
                x.detach().copy_(whole)

    def gather(self, content: Any) -> list[Any]:
        """Return what each rank has, which has to be picklable, on all ranks."""
        if self.world == 1:
            return [content]
        contents: list[Any] = [None] * self.world
        on_gpu = self._device is not None and self._device.type == "cuda"
        with torch.cuda.device(self._device) if on_gpu else nullcontext():
            dist.all_gather_object(contents, content)
        return contents

    def once(self, write: Callable[[], None]) -> None:
        """Have rank 0 call ``write``; if it raises, all ranks raise the same."""
        failure: Exception | None = None
        try:
            if self.rank == 0:
                write()
        except Exception as error:  # the other ranks are to hear of it first
            failure = error
        for rank_0s in filter(None, self.gather(failure)):
            raise failure or rank_0s

    def sum_(self, gradients: Sequence[Tensor], measured: Tensor) -> Tensor:
        """Add up all ranks' gradients, alike in shape, in place; return what each measured, [K], as [world, K]."""
        table = measured.new_zeros(self.world, len(measured))
        table[self.rank] = measured
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for x in (*gradients, table):
            by_dtype.setdefault(x.dtype, []).append(x)
        for tensors in by_dtype.values():
            flat = torch.cat([x.reshape(-1) for x in tensors])
            dist.all_reduce(flat)
            parts = torch.split(flat, [x.numel() for x in tensors])
            torch._foreach_copy_(tensors, [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)])
        return table


def refuse_uneven(name: str, sizes: Tensor, gradients: Sequence[Tensor]) -> None:
    """Raise ValueError unless the ranks' batches, of ``sizes`` [world], are of one size, as their average has to be.

    On a GPU, where looking at the sizes would wait, a gradient is made NaN instead, for the guard to find.
    """
    uneven = sizes.amin() != sizes.amax()
    if sizes.device.type != "cpu":
        gradients[0].masked_fill_(uneven, torch.nan)
    elif uneven:
        found = [int(size) for size in sizes]
        raise ValueError(f"{name}: expected batches of one size on all ranks, got scores of {found}")


def unwrapped(name: str, module: object) -> nn.Module:
    """Return a network that can be trained, out of DistributedDataParallel, whose work the trainer does; or raise."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{name}: expected an nn.Module, got {type(module).__name__}")
    network: nn.Module = module.module if isinstance(module, DistributedDataParallel) else module
    if any(isinstance(m, DistributedDataParallel) for m in network.modules()):
        raise ValueError(f"{name}: expected a plain network, got one with DistributedDataParallel inside: pass its own")
    if not any(p.requires_grad for p in network.parameters()):
        raise ValueError(f"{name}: expected trainable parameters, got none")
    return network


def shapes(name: str, module: nn.Module) -> dict[str, object]:
    """Return the shapes of a module's parameters and buffers, with their dtypes and whether they are trained."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {f"{name}.{key}": (tuple(x.shape), x.dtype, x.requires_grad) for key, x in tensors}
