"""Several processes that train one pair of networks, each on its part of the batch, by ``torch.distributed``.

After a backward pass the gradients of all ranks are added up in one all-reduce, which carries what the ranks measured
as well. Nothing is hooked into autograd, so penalties, several forward passes before a backward one, and parameters
without gradients need no care. Each rank's part of latents and eps is its part of what one process would have drawn.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["Ranks", "unwrapped"]


class Ranks:
    """The process group that PyTorch has been initialised with, or a single process.

    Attributes:
        rank: of this process, 0 being the one that writes files.
        world: number of processes.
    """

    def __init__(self) -> None:
        there = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if there else 0
        self.world = dist.get_world_size() if there else 1
        self.backend = dist.get_backend() if there else "none"

    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Give all ranks the tensors of rank 0, in place."""
        if self.world > 1:
            for x in tensors:
                whole = x.detach().clone(memory_format=torch.contiguous_format)  # gloo overruns tensors with gaps
                dist.broadcast(whole, 0)
                x.detach().copy_(whole)

    def same(self, number: int, device: torch.device) -> int:
        """Rank 0's number."""
        if self.world == 1:
            return number
        value = torch.tensor(number, device=device)
        dist.broadcast(value, 0)
        return int(value)

    def all(self, condition: bool, device: torch.device) -> bool:
        """Whether a condition holds on all ranks."""
        if self.world == 1:
            return condition
        value = torch.tensor(int(condition), device=device)
        dist.all_reduce(value, dist.ReduceOp.MIN)
        return bool(value)

    def any(self, condition: bool, device: torch.device) -> bool:
        """Whether a condition holds on some rank."""
        return not self.all(not condition, device)

    def gather(self, content: Any) -> list[Any]:
        """What each rank has, which has to be picklable, on all ranks."""
        if self.world == 1:
            return [content]
        contents: list[Any] = [None] * self.world
        dist.all_gather_object(contents, content)
        return contents

    def sum_(self, gradients: Sequence[Tensor], measured: Tensor) -> Tensor:
        """Add up the gradients of all ranks, in place; return what each rank measured.

        Args:
            gradients: of any shapes and dtypes, as many and of the same shapes on all ranks.
            measured: [K], of any floating dtype.

        Returns:
            [world, K] in measured's dtype.
        """
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


def unwrapped(name: str, module: nn.Module) -> nn.Module:
    """The network itself, if it comes in DistributedDataParallel, whose work the trainer does.

    Raises:
        ValueError: it has one further inside.
    """
    if isinstance(module, DistributedDataParallel):
        module = module.module
    if any(isinstance(m, DistributedDataParallel) for m in module.modules()):
        raise ValueError(f"{name}: expected a plain network, got one with DistributedDataParallel inside: pass its own")
    return module
