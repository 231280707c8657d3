"""RMSProp, Adam and the weight clamp over any number of tensors, in place, in one launch.

    rmsprop   s = alpha s + (1 - alpha) g^2
              a = sqrt(s) + eps,  or with centered: m = m + (1 - alpha) (g - m),  a = sqrt(s - m^2) + eps
              p = p - lr g / a,   or with momentum: b = momentum b + g / a,  p = p - lr b
    adam      m = m + (1 - beta1) (g - m),  s = beta2 s + (1 - beta2) g^2,  t = t + 1
              p = p - lr / (1 - beta1^t) * m / (sqrt(s) / sqrt(1 - beta2^t) + eps)
    clamp     no gradient; p as it is
    then      p = min(max(p, -bound), bound), NaN kept
              e = kept e + (1 - kept) p, where weights have a running average

with g = sign * factor * gradient + weight_decay * p; bound is inf where nothing is to be clamped. The gate says whether
to do nothing at all, and the factor. Arithmetic is float32 (float64 for float64 tensors), in which averages are stored;
other values are rounded once, when stored. Each tensor is read once and written once: 20 bytes per float32 parameter
for RMSProp, 28 for Adam, 8 more with an average. One program handles one chunk of one tensor. The last program to
arrive counts every step on and writes the share of clamped weights that lie on their bound.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import arrival, table
from .arithmetic import divide, one_minus_power, sqrt, toward
from .arrival import is_last, store_share, zero
from .layout import accumulator, triton_dtype
from .table import Mirror, Tables

BLOCK = 2048
STEPS_BLOCK = tl.constexpr(512)  # no fewer than a program has threads, so that none loads what another stores


@triton.jit
def _update_chunk(
    row_ptr, hyper_ptr, bias1, bias2, factor, start, numel, DTYPE: tl.constexpr, ALGORITHM: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr, CENTERED: tl.constexpr, AVERAGED: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Update one chunk by its tensor's rows of the two tables; return how many of its weights lie on their bound.

    bias1, bias2: Adam's 1 - beta1^t and 1 - beta2^t. FULL: every element is in range and every address a multiple of
    16, for unmasked 128-bit accesses.
    """
    acc = hyper_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    mask = None if FULL else lanes < numel - start
    p_ptr = table.pointers(row_ptr, table.PARAM, start, lanes, DTYPE, FULL)
    p = tl.load(p_ptr, mask).to(acc)

    if ALGORITHM != "clamp":
        lr, eps = tl.load(hyper_ptr + table.LR), tl.load(hyper_ptr + table.EPS)
        sign, decay = tl.load(hyper_ptr + table.SIGN), tl.load(hyper_ptr + table.DECAY)
        beta2, beta2_c = tl.load(hyper_ptr + table.BETA2), tl.load(hyper_ptr + table.BETA2_C)
        g = sign * factor * tl.load(table.pointers(row_ptr, table.GRAD, start, lanes, DTYPE, FULL), mask).to(acc)
        if decay != 0:  # not g + 0 * p, which an infinite weight would turn into NaN
            g += decay * p
        s_ptr = table.pointers(row_ptr, table.STATE0, start, lanes, DTYPE, FULL)
        s = beta2 * tl.load(s_ptr, mask).to(acc) + beta2_c * g * g
        tl.store(s_ptr, s.to(DTYPE), mask)
        if ALGORITHM == "adam" or CENTERED:
            m_ptr = table.pointers(row_ptr, table.STATE1, start, lanes, DTYPE, FULL)
            beta, beta_c = beta2, beta2_c
            if ALGORITHM == "adam":
                beta, beta_c = tl.load(hyper_ptr + table.BETA1), tl.load(hyper_ptr + table.BETA1_C)
            m = toward(tl.load(m_ptr, mask).to(acc), g, beta, beta_c)
            tl.store(m_ptr, m.to(DTYPE), mask)
        if ALGORITHM == "adam":
            p -= divide(lr, bias1) * divide(m, divide(sqrt(s), sqrt(bias2)) + eps)
        else:
            variance = s
            if CENTERED:  # rounding can leave this difference just below zero, where the root would be NaN
                variance = tl.maximum(s - m * m, 0, propagate_nan=tl.PropagateNan.ALL)
            change = divide(g, sqrt(variance) + eps)
            if HAS_MOMENTUM:
                b_ptr = table.pointers(row_ptr, table.STATE2, start, lanes, DTYPE, FULL)
                change += tl.load(hyper_ptr + table.MOMENTUM) * tl.load(b_ptr, mask).to(acc)
                tl.store(b_ptr, change.to(DTYPE), mask)
            p -= lr * change

    bound = tl.load(hyper_ptr + table.BOUND)
    p = tl.maximum(p, -bound, propagate_nan=tl.PropagateNan.ALL)
    p = tl.minimum(p, bound, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)
    tl.store(p_ptr, p, mask)
    if AVERAGED:
        e_ptr = table.pointers(row_ptr, table.AVERAGE, start, lanes, acc, FULL)
        e = toward(tl.load(e_ptr, mask), p.to(acc), tl.load(hyper_ptr + table.KEPT), tl.load(hyper_ptr + table.KEPT_C))
        tl.store(e_ptr, e, mask)
    on_bound = tl.abs(p.to(acc)) >= bound
    if not FULL:
        on_bound &= mask
    return tl.where(bound < float("inf"), tl.sum(on_bound.to(tl.int32), axis=0), 0)


@triton.jit(do_not_specialize=["tensors", "clamped"])
def _update_kernel(
    table_ptr,  # [tensors, table.COLUMNS] int64
    owner_ptr,  # [chunks] int32, the tensor each program works on
    hyper_ptr,  # [rows, table.HYPER_COLUMNS] in the accumulator's dtype
    gate_ptr,  # [2] float64
    count_ptr,  # [1] int64, zero between launches
    share_ptr,  # [1] float32
    counter_ptr,  # [1] int32
    tensors: tl.int32,
    clamped: tl.int64,  # number of weights that have a bound
    DTYPE: tl.constexpr, ALGORITHM: tl.constexpr, HAS_MOMENTUM: tl.constexpr, CENTERED: tl.constexpr,
    AVERAGED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    skip = tl.load(gate_ptr) != 0
    factor = tl.load(gate_ptr + 1).to(hyper_ptr.dtype.element_ty)
    program = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(owner_ptr + program).to(tl.int64) * table.COLUMNS
    numel = tl.where(skip, 0, tl.load(row_ptr + table.NUMEL))
    start = (program - tl.load(row_ptr + table.FIRST_CHUNK)) * BLOCK
    row_hyper_ptr = hyper_ptr + tl.load(row_ptr + table.HYPER_ROW) * table.HYPER_COLUMNS
    bias1, bias2 = 1.0, 1.0
    if ALGORITHM == "adam":  # of the step to come
        step = tl.load(tl.load(row_ptr + table.STEP).to(tl.pointer_type(tl.float32))).to(factor.dtype) + 1
        bias1 = one_minus_power(tl.load(row_hyper_ptr + table.BETA1_LOG), step)
        bias2 = one_minus_power(tl.load(row_hyper_ptr + table.BETA2_LOG), step)
    if (tl.load(row_ptr + table.ALIGNED) != 0) & (start + BLOCK <= numel):
        on_bound = _update_chunk(
            row_ptr, row_hyper_ptr, bias1, bias2, factor, start, numel, DTYPE, ALGORITHM, HAS_MOMENTUM, CENTERED,
            AVERAGED, BLOCK, True,
        )  # fmt: skip
    else:
        on_bound = 0
        for part in range(start, tl.minimum(start + BLOCK, numel), BLOCK // 4):  # in parts, which spares registers
            on_bound += _update_chunk(
                row_ptr, row_hyper_ptr, bias1, bias2, factor, part, numel, DTYPE, ALGORITHM, HAS_MOMENTUM, CENTERED,
                AVERAGED, BLOCK // 4, False,
            )  # fmt: skip
    if clamped > 0:
        tl.atomic_add(count_ptr, on_bound.to(tl.int64), sem="relaxed")  # an integer, so the order cannot matter

    if is_last(counter_ptr):
        if clamped > 0:
            store_share(share_ptr, count_ptr, clamped, skip)
        if ALGORITHM != "clamp":
            for first in range(0, tl.where(skip, 0, tensors), STEPS_BLOCK):
                slots = first + tl.arange(0, STEPS_BLOCK)
                mask = slots < tensors
                address = tl.load(table_ptr + slots * table.COLUMNS + table.STEP, mask, other=0)
                step_ptr = address.to(tl.pointer_type(tl.float32))
                tl.store(step_ptr, tl.load(step_ptr, mask, other=0) + 1, mask)


class Update:
    """The launcher for one (device, dtype) group of tensors on one stream, with the device tables it reuses."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._dtype = triton_dtype(dtype)
        self.hyper = Mirror(accumulator(dtype), device)  # to be set to other numbers for launches that a graph replays
        self._tables = Tables()
        self._open = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)

    def launch(
        self, algorithm: str, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor],
        states: Sequence[Sequence[torch.Tensor]], steps: Sequence[torch.Tensor],
        hyper: tuple[tuple[float, ...], ...], hyper_rows: Sequence[int], *,
        averages: Sequence[torch.Tensor] | None = None, gate: torch.Tensor | None = None,
        momentum: bool = False, centered: bool = False,
    ) -> torch.Tensor | None:  # fmt: skip
        """Launch once, in place.

        No tensor is empty; all are dense and laid out like their parameter. ``states`` are lists: all square_avg,
        grad_avg or none, momentum_buffer or none for rmsprop, all exp_avg_sq and exp_avg for adam. ``hyper_rows`` names
        each tensor's row of ``hyper``, whose columns table.py lists. ``averages`` are float32, or float64 for float64.
        ``gate`` is guard.py's; None is 0 and 1. Returns the share of clamped weights on their bound (0-d float32; NaN
        if nothing was done), or None if no row has a bound.
        """
        device, others = params[0].device, (grads, states, steps, averages or ())
        capture = arrival.capturing(device)
        with torch.cuda.device_of(params[0]):
            rows, owners = self._tables.addresses(params, BLOCK, hyper_rows, *others, capture=capture)
            clamped = sum([p.numel() for p, i in zip(params, hyper_rows, strict=True) if hyper[i][-1] != float("inf")])
            share = torch.empty((), dtype=torch.float32, device=device)
            _update_kernel[(owners.shape[0],)](
                rows, owners, self.hyper.set(hyper), self._open if gate is None else gate,
                zero(device, torch.int64, capture=capture), share, zero(device, capture=capture), len(params), clamped,
                DTYPE=self._dtype, ALGORITHM=algorithm, HAS_MOMENTUM=momentum, CENTERED=centered,
                AVERAGED=averages is not None, BLOCK=BLOCK, num_warps=16 if self._dtype == tl.float64 else 8,
                enable_fp_fusion=True,
            )  # fmt: skip
        return share if clamped else None

    def clamp(self, params: Sequence[torch.Tensor], bound: float, gate: torch.Tensor | None = None) -> torch.Tensor:
        """Launch once: clamp weights to a finite bound, in place; return their share on it. See ``launch``."""
        hyper = ((*[0.0] * (table.HYPER_COLUMNS.value - 1), bound),)
        share = self.launch("clamp", params, (), (), (), hyper, [0] * len(params), gate=gate)
        assert share is not None
        return share
