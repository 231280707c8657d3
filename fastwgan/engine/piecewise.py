"""The gradients of a piecewise linear critic, without a second backward pass.

Such a critic's gradient g at a point is linear in each weight. The penalty's cotangent v of g moves a weight's gradient
as v . g does, which is the derivative of the scores at the points in the direction v. So v goes forward through the
layers, which are linear there: u_0 = v, u_l = s_l * (W_l u_(l-1)), with the slopes s_l that the rectifiers have at the
points. With delta_l, the gradients of the scores at the layers' outputs, one product a layer gives all of

    dW_l = delta_l^T [h_(l-1) of real samples; h_(l-1) of fake ones; u_(l-1)],

as u takes the place of the points' activations. There is no graph, and the rows of real samples, fake ones and points
go through each layer at once. The specification is :func:`fastwgan.reference.piecewise_gradients`.

Source: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6, 1994.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fastwgan import reference
from fastwgan.backend import Resolved, kernels

_RESHAPES = nn.Identity, nn.Flatten, nn.Unflatten
_POOLS = tuple(getattr(nn, f"{name}AvgPool{n}d") for name in ("", "Adaptive") for n in (1, 2, 3))
_of_convolution: Any = torch.ops.aten.convolution_backward


class Block(NamedTuple):
    """A linear layer, perhaps with a bias, and the rectifiers and dropout that follow it."""

    layer: Any
    slope: float = 1.0  # of the rectifiers below zero
    kept: float = 1.0  # the probability that dropout keeps an element
    weighted: bool = False  # whether the layer has parameters
    bends: bool = False  # whether there are rectifiers or dropout


def blocks(layers: Sequence[Any], ndim: int, dtype: torch.dtype) -> tuple[Block, ...] | str:
    """Return the blocks that a critic's layers make up, or why they cannot, for samples of ``ndim`` dimensions."""
    found: list[Block] = []
    for m in layers:
        kind, weighted, slope, kept = type(m), _is_affine(m, dtype), 1.0, 1.0
        if (kind is nn.Flatten and ndim == 2 and not found) or (kind is nn.Dropout and not (m.training and m.p)):
            continue  # it does nothing
        if weighted or kind in _RESHAPES or kind in _POOLS:
            found.append(Block(m, weighted=weighted))
            continue
        if kind is nn.Dropout:
            kept = 1.0 - m.p
        elif kind is nn.ReLU or (kind is nn.LeakyReLU and m.negative_slope > 0):
            slope = getattr(m, "negative_slope", 0.0)
        else:
            return f"{kind.__name__} is not among the layers known to be piecewise linear"
        last = found.pop() if found and (kept == 1 or found[-1].kept == 1) else Block(nn.Identity())
        found.append(last._replace(slope=last.slope * slope, kept=last.kept * kept, bends=True))
    return tuple(found) if any(block.weighted for block in found) else "it has no weights"


def _is_affine(m: nn.Module, dtype: torch.dtype) -> bool:
    """Return whether a layer is a product with a plain parameter of ``dtype``, perhaps with a bias."""
    own = {name: p for name in ("weight", "bias") if (p := m._parameters.get(name)) is not None}
    plain = all(type(p) is nn.Parameter and (p.layout, p.dtype) == (torch.strided, dtype) for p in own.values())
    padded = isinstance(m, _ConvNd) and (m.padding_mode != "zeros" or isinstance(m.padding, str))
    affine = isinstance(m, (nn.Linear, _ConvNd)) and "weight" in own
    return affine and plain and not padded and {"weight", "bias"}.isdisjoint(vars(m))


# Each function is of one layer m: x is its input, d the gradient at its output.


def _sizes(m: Any) -> tuple[Any, ...]:
    return m.stride, m.padding, m.dilation, m.transposed, m.output_padding, m.groups


def _forward(m: Any, x: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return the layer's output, with ``bias`` in place of its own. ``out`` is for linear layers only."""
    if isinstance(m, _ConvNd):
        return torch.convolution(x, m.weight, bias, *_sizes(m))
    if not isinstance(m, nn.Linear):
        return m(x)  # type: ignore[no-any-return]
    if out is None:
        return F.linear(x, m.weight, bias)
    x, flat = x.flatten(0, -2), out.flatten(0, -2)
    return torch.mm(x, m.weight.t(), out=flat) if bias is None else torch.addmm(bias, x, m.weight.t(), out=flat)


def _backward(m: Any, x: Tensor, d: Tensor) -> Tensor:
    """Return the gradient at x."""
    if isinstance(m, nn.Linear):
        return d @ m.weight
    if isinstance(m, _ConvNd):
        return _of_convolution(d, x, m.weight, None, *_sizes(m), [True, False, False])[0]  # type: ignore[no-any-return]
    if isinstance(m, _RESHAPES):
        return d.reshape(x.shape)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(m(x), x, d)[0].contiguous()


def _of_weight(m: Any, x: Tensor, d: Tensor) -> Tensor:
    """Return the gradient of the layer's weight."""
    if isinstance(m, nn.Linear):
        return d.flatten(0, -2).t() @ x.flatten(0, -2)
    return _of_convolution(d, x, m.weight, None, *_sizes(m), [False, True, False])[1]  # type: ignore[no-any-return]


class Pass:
    """A pass of real samples, fake ones and the penalty's points through a critic, as one batch, and its way back.

    ``points`` returns the points of two tensors, in ``out`` if that is given; it is None for a step without a penalty.
    If it ``commutes``, a linear layer's outputs at the points are the points of its outputs, so that the first needs no
    product for them. ``seeds`` gives the gradients at scores, where these are known before the scores; or it is None.
    """

    def __init__(
        self, blocks: Sequence[Block], backend: Resolved, real: Tensor, fake: Tensor,
        points: Callable[..., Tensor] | None, commutes: bool, seeds: Callable[[Tensor], Tensor] | None,
    ) -> None:  # fmt: skip
        self._blocks, self._penalised = blocks, points is not None
        self._rows = rows = 2 * len(real)  # of samples, behind which come the points
        first, *_ = weighted = [i for i, block in enumerate(blocks) if block.weighted]
        self._first, self._last = first, weighted[-1]
        straight = isinstance(blocks[first].layer, nn.Linear) and not any(block.bends for block in blocks[:first])
        early = points if commutes and straight else None
        one_score = getattr(blocks[-1].layer, "out_features", 0) == 1 and not blocks[-1].bends
        third = [] if points is None else [real if early else points(real, fake)]
        self.states = [torch.cat((real, fake, *third))]  # what goes into each block; the last are the scores
        self._factors: list[Tensor | None] = []  # of dropout
        # The seeds and the gradient behind the last block but one, if the launch of that block has made them.
        self.seeds: Tensor | None = None
        self._delta: Tensor | None = None
        for i, (m, slope, kept, _, bends) in enumerate(blocks):
            x, bias, factors, top = self.states[-1], getattr(m, "bias", None), None, None
            fused = bends and backend == "triton" and isinstance(m, nn.Linear) and x.dim() == 2
            own = None if fused else bias
            if early and i == first:
                z = x.new_empty((*x.shape[:-1], m.out_features))
                _forward(m, x[:rows], own, z[:rows])
                early(*z[:rows].tensor_split(2), out=z[rows:])
            else:
                z = _forward(m, x, own)
            z = z.clone() if bends and isinstance(m, _RESHAPES) else z
            if kept < 1:
                factors = torch.empty_like(z).bernoulli_(kept).div_(kept or 1.0)
            if fused:
                if seeds and i == len(blocks) - 2 and one_score:
                    self.seeds, top = seeds(z.new_empty(len(z), 1)), blocks[-1].layer.weight
                self._delta = kernels.activation.activate_(z, bias, factors, slope, self.seeds, top)
            elif bends:
                reference.activate_(z, factors, slope)
            self._factors.append(factors)
            self.states.append(z)

    def backward(self, seeds: Tensor) -> Tensor | None:
        """Return the gradient at the points, or None without a penalty; keep the gradients at layers with weights."""
        self._deltas, d, part, top = dict[int, Tensor](), seeds, slice(None), len(self._blocks) - 1
        for i in range(top, -1, -1):
            m, slope, _, weighted, bends = self._blocks[i]
            if i == top - 1 and self._delta is not None:
                d = self._delta
            elif bends:
                f = self._factors[i]
                out = d if i < self._last else None  # the seeds may be a constant, which is kept
                d = reference.slopes(d, self.states[i + 1][part], f if f is None else f[part], slope, out)
            if weighted:
                self._deltas[i] = d
            if i == self._first:
                if not self._penalised:
                    return None
                part = slice(self._rows, None)  # below, only the points' gradient is needed
                d = d[part]
            if i < top or self._delta is None:
                d = _backward(m, self.states[i][part], d)
        return d

    def gradients(self, wanted: Collection[nn.Parameter]) -> list[tuple[nn.Parameter, Tensor]]:
        """Return each wanted parameter, as often as it is used, and its gradient there.

        The points' rows of the first state hold the penalty's cotangent by now.
        """
        found, points = list[tuple[nn.Parameter, Tensor]](), slice(self._rows, None)
        for i, (m, slope, _, weighted, bends) in enumerate(self._blocks[: self._last + 1]):
            x, f = self.states[i], self._factors[i]
            if weighted:
                d = self._deltas.pop(i)
                if m.weight in wanted:
                    found.append((m.weight, _of_weight(m, x, d)))
                if m.bias in wanted:  # which the penalty does not depend on
                    channel = d.dim() - 1 if isinstance(m, nn.Linear) else 1
                    found.append((m.bias, d[: self._rows].sum([k for k in range(d.dim()) if k != channel])))
            if self._penalised and i < self._last:
                u, place = _forward(m, x[points], None), self.states[i + 1][points]
                if bends:
                    reference.slopes(u, place, f if f is None else f[points], slope, place)
                elif u.data_ptr() != place.data_ptr():  # a view of the state before it has u already
                    place.copy_(u)
        return found
