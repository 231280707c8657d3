"""The base of differentiable launches, and what their backward passes ask."""

from typing import Any

import torch
from torch import Tensor


class Op(torch.autograd.Function):
    """A differentiable launch. Under torch.func.vmap it launches once for each element of the batch."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        launch: Any = cls.apply  # which PyTorch leaves untyped
        elements = [
            launch(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(elements[0], tuple):
            return tuple(map(torch.stack, zip(*elements, strict=True))), (0,) * len(elements[0])
        return torch.stack(elements), 0


class OpWithSlopes(Op):
    """A differentiable launch whose second output is there for the backward pass, and has no gradient of its own."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.options = [x for x in inputs if not isinstance(x, Tensor)]
        ctx.save_for_backward(*[x for x in inputs if isinstance(x, Tensor)], output[1])


def apply(op: type[Op], *args: Any) -> Tensor:
    """Return an op's output, the first if it has several."""
    output = op.apply(*args)  # type: ignore[no-untyped-call]
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]
