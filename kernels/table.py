"""Tensors as a device table of addresses, so that one launch can update any number of them.

A kernel argument names one tensor; a table row names a parameter, its gradient and its optimizer state by address.
Tables are cached by their contents, so they can never be stale: a tensor that moved makes a new table. A gradient
usually comes back to an address it had before, so a training loop soon uploads nothing.

Uploads go through pinned memory and never wait for the device. While a CUDA graph is being captured an upload would
become part of the graph; it is kept back instead, and ``fill_pending`` does it once the capture has ended. Nor may a
table be allocated then: it could get memory that the captured work has used before, and writes to at each replay. So
tables for captures are set aside beforehand.
"""

from collections.abc import Hashable, Sequence

import torch
import triton
import triton.language as tl

from .arrival import capturing

# The columns of an address row (int64). STEP is 0 where an algorithm counts no steps, STATE* and AVERAGE where unused.
PARAM, GRAD, STATE0, STATE1, STATE2, AVERAGE, STEP, NUMEL, FIRST_CHUNK, HYPER_ROW, ALIGNED = map(
    tl.constexpr, range(11)
)
COLUMNS = tl.constexpr(11)
# The columns of a hyper-parameter row. Decays (RMSProp's alpha is BETA2) come with their complement and logarithm,
# computed in double precision on the host: 1 - 0.999 has lost four digits once 0.999 is a float32. SIGN is -1 to
# maximise, BOUND inf not to clamp. KEPT is the decay of the weights' running average.
LR, BETA1, BETA1_C, BETA1_LOG, BETA2, BETA2_C, BETA2_LOG, EPS, DECAY, MOMENTUM, SIGN, KEPT, KEPT_C, BOUND = map(
    tl.constexpr, range(14)
)
HYPER_COLUMNS = tl.constexpr(14)
CACHED = 16  # tables kept per cache; a loop that sees more address patterns than this uploads again
SPARES = 16  # tables of a shape set aside for captures: the most launches of one launcher in a capture


@triton.jit
def pointers(row_ptr, COLUMN: tl.constexpr, start, lanes, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where elements start + lanes of a row's tensor lie. The start is 64-bit, the lanes 32, which spares registers."""
    pointer = tl.load(row_ptr + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)  # must be said of the pointer: a hint on the integer is lost in the cast
    return pointer + start + lanes


_pending: list[tuple[torch.Tensor, torch.Tensor]] = []


def upload(host: torch.Tensor, out: torch.Tensor, *, capture: bool | None = None) -> bool:
    """Copy ``host`` (CPU) to ``out`` in stream order, without waiting; return False in a capture, which delays it."""
    if capturing(out.device) if capture is None else capture:
        _pending.append((out, host))
        return False
    out.copy_(host.pin_memory() if out.device.type == "cuda" else host, non_blocking=True)
    return True


def fill_pending() -> None:
    """Do the uploads kept back during a graph capture, in order. Call after the capture, before the first replay."""
    pending = _pending.copy()
    _pending.clear()
    for out, host in pending:
        with torch.cuda.device_of(out):
            upload(host, out)


NOT_WARM = "a launch on tensors like these has to run once before it is captured in a CUDA graph"


class Mirror:
    """A small host table mirrored on the device at a fixed address, so that a graph replays its newest values."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._rows: Hashable = None
        self._tensors: list[torch.Tensor] = []  # the last is in use; a graph may still read an earlier one

    def set(self, rows: tuple[tuple[float, ...], ...]) -> torch.Tensor:
        """The device tensor holding ``rows``; uploads only when they changed."""
        if rows != self._rows:
            host = torch.tensor(rows, dtype=self._dtype, device="cpu")
            if not self._tensors or self._tensors[-1].shape != host.shape:
                if capturing(self._device):
                    raise RuntimeError(NOT_WARM)
                self._tensors.append(torch.empty_like(host, device=self._device))
            self._rows = rows if upload(host, self._tensors[-1]) else None
        return self._tensors[-1]


class Tables:
    """Device tables of one launcher, cached by content."""

    def __init__(self) -> None:
        self._cache: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        self._owners: dict[tuple[int, ...], torch.Tensor] = {}
        self._spares: dict[torch.Size, list[torch.Tensor]] = {}
        self._captured: list[torch.Tensor] = []  # a graph reads them for as long as it lives

    def _table(self, host: torch.Tensor, device: torch.device, *, capture: bool) -> torch.Tensor:
        spares = self._spares.get(host.shape)
        if capture and not spares:
            raise RuntimeError(NOT_WARM)
        table = spares.pop() if capture and spares else torch.empty_like(host, device=device)
        upload(host, table, capture=capture)
        return table

    def addresses(
        self, params: Sequence[torch.Tensor], blocks: int | Sequence[int], hyper_rows: Sequence[int],
        grads: Sequence[torch.Tensor] = (), states: Sequence[Sequence[torch.Tensor]] = (),
        steps: Sequence[torch.Tensor] = (), averages: Sequence[torch.Tensor] = (), *, capture: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Return (rows [tensors, COLUMNS] int64, chunk owners [chunks] int32): which tensor each block is in.

        ``blocks`` are the elements of a block, of all tensors or of each; ``states`` are up to three lists. Optional
        lists are empty or have one to a tensor. ``capture``: whether the launch is captured, None to find out.
        """
        device, pointer = params[0].device, torch.Tensor.data_ptr
        capture = capturing(device) if capture is None else capture
        arrays = (params, grads, *(*states, (), (), ())[:3], averages)  # as the columns
        addresses, counts = [tuple(map(pointer, x)) for x in arrays], tuple(map(pointer, steps))
        numels = tuple(map(torch.Tensor.numel, params))
        sizes = [blocks] * len(numels) if isinstance(blocks, int) else blocks
        chunks = tuple([-(-numel // block) for numel, block in zip(numels, sizes, strict=True)])
        key = (*addresses, counts, numels, chunks, *hyper_rows)
        found = self._cache.get(key) if capture else self._cache.pop(key, None)
        if found is None:
            none, rows, first = (0,) * len(numels), [], 0
            for i, pointers in enumerate(zip(*(column or none for column in addresses), strict=True)):
                aligned = all(pointer % 16 == 0 for pointer in pointers)
                rows.append((*pointers, (counts or none)[i], numels[i], first, hyper_rows[i], int(aligned)))
                first += chunks[i]
            if (owners := self._owners.get(chunks)) is None:
                numbers = torch.arange(len(chunks), dtype=torch.int32, device="cpu")
                host = numbers.repeat_interleave(torch.tensor(chunks, device="cpu"))
                owners = self._table(host, device, capture=capture)
            found = self._table(torch.tensor(rows, dtype=torch.int64, device="cpu"), device, capture=capture), owners
        if capture:
            self._captured += found
            return found
        self._owners.pop(chunks, None)
        self._cache[key], self._owners[chunks] = found, found[1]  # the most recently used are the last
        for kept in (self._cache, self._owners):
            if len(kept) > CACHED:
                del kept[next(iter(kept))]
        spares = self._spares.setdefault(found[0].shape, [])
        if len(spares) < SPARES:
            # Each by itself, so that it is aligned as a table is: a kernel is compiled for that, and none in a capture.
            spares.extend(torch.empty_like(found[0]) for _ in range(SPARES))
        return found
