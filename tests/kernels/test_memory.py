"""What kernels read and write: guard bands, poison, 64-bit addresses, and the checks of the strict interpreter."""

from contextlib import contextmanager

import pytest
import torch
import triton
import triton.language as tl
from cases import DTYPES, OPS, VALUES

import fastwgan
from fastwgan import functional
from fastwgan.backend import kernels
from fastwgan.ops.penalty import penalty_cotangent
from fastwgan.ops.scores import score_statistics
from fastwgan.ops.weights import project_and_count_

BAND = 256  # bytes on either side
GUARD = 0xA5


class Guarded:
    """Memory with a poison pattern on both sides; whatever is allocated in it starts out as NaN."""

    def __init__(self):
        self.buffers = []

    def like(self, x, offset=0):
        """An uninitialised tensor of x's shape, strides and dtype, ``offset`` elements from a 16-byte boundary."""
        span = (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0) * x.itemsize
        start = BAND + offset * x.itemsize
        buffer = x.new_full((2 * start + span,), GUARD, dtype=torch.uint8)
        assert buffer.data_ptr() % 16 == 0, "the allocator aligns"
        inside = buffer[start : start + span]
        self.buffers.append((buffer, start, span))
        inner = inside.view(x.dtype).as_strided(x.shape, x.stride())
        return inner.fill_(float("nan") if x.is_floating_point() else -1)

    def copy(self, x, offset=0):
        return self.like(x, offset).copy_(x)

    def check(self):
        assert self.buffers
        for buffer, start, span in self.buffers:
            assert (buffer[:start] == GUARD).all(), "written before the beginning"
            assert (buffer[start + span :] == GUARD).all(), "written past the end"


@pytest.fixture
def guarded(monkeypatch):
    """Guarded memory, which the launchers' own allocations come from, too."""
    memory = Guarded()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        allocate = getattr(owner, name)

        def guard(*args, _allocate=allocate, **kwargs):
            x = _allocate(*args, **kwargs)
            return memory.like(x) if active and x.device.type == active[-1].type else x

        monkeypatch.setattr(owner, name, guard)
    active = []

    @contextmanager
    def inside(device):
        active.append(device)
        try:
            yield
        finally:
            active.pop()
            memory.check()

    memory.inside = inside
    return memory


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_ops_stay_inside_and_fill_what_they_allocate(op, dtype, offset, guarded, device):
    for shape in ((1, 1), (3, 17), (2, 2049)):
        values = (VALUES["normal"](shape, dtype, device) / shape[1] ** 0.5 for _ in range(2))
        inputs = [guarded.copy(x, offset).requires_grad_() for x in values]
        inputs = inputs[: OPS[op].tensors]
        with guarded.inside(device):
            outputs = OPS[op].fused(*inputs)
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        gradients = torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs])
        assert all(x.isfinite().all() for x in (*outputs, *gradients))


def test_statistics_are_filled(guarded, device):
    x = torch.randn(3, 17, device=device)
    with guarded.inside(device):
        values = (
            score_statistics(x, x + 1, "triton"),
            *penalty_cotangent(x, "two-sided", 1.0, 10.0, "triton"),
        )
    assert all(value.isfinite().all() for value in values)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "options"),
    [("RMSprop", {"momentum": 0.5, "centered": True}), ("RMSprop", {}), ("Adam", {})],
)
def test_updates_stay_inside(name, options, dtype, offset, guarded, device):
    params = [
        torch.nn.Parameter(guarded.copy(torch.randn(n, device=device).to(dtype), offset))
        for n in (1, 17, 513, 2048, 2049)
    ]
    for p in params:
        p.grad = guarded.copy(torch.randn_like(p), offset)
    optimizer = getattr(fastwgan, name)(params, clip=0.5, backend="triton", **options)
    with guarded.inside(device):
        optimizer.step()  # makes the state
    for p in params:
        for key, value in optimizer.state[p].items():
            optimizer.state[p][key] = guarded.copy(value, offset)
    with guarded.inside(device):
        optimizer.step()
        functional.clip_weights_(params, 0.25, backend="triton")
    for p in params:
        assert p.isfinite().all()
        assert p.abs().max() <= 0.25
        assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_projections_stay_inside(per, dtype, offset, guarded, device):
    shapes = ((1,), (17,), (1025,), (1, 1), (3, 17), (3, 16), (2, 8193), (2, 8192), (5, 3, 3, 3))
    params = [guarded.copy(torch.randn(shape, device=device).to(dtype), offset) for shape in shapes]
    with guarded.inside(device):
        share, _ = project_and_count_(params, 0.25, per, "triton")
    assert 0 < share <= 1
    for p in params:
        rows = p.double().view(len(p) if per == "row" else 1, -1)
        assert rows.norm(dim=1).max() <= 0.25 * (1 + 4 * torch.finfo(dtype).eps)


def test_the_share_on_the_bound_counts_what_is_there(device):
    """Also in chunks that a tensor fills in part: lanes beyond its end count for nothing."""
    params = [torch.full((n,), 5.0, device=device) for n in (1, 3, 700, 2049)]
    for p in params:
        p[::2] = 0.0
    share, total = project_and_count_(params, 0.5, "weight", "triton")
    assert total == sum(p.numel() for p in params)
    assert share.item() == pytest.approx(sum(p.numel() // 2 for p in params) / total, abs=1e-7)


# Past 2^31 elements. The launch is real, its memory is not: the last program's addresses are looked at.

HUGE = 2**31 + 5


def asked(launch):
    import poisoned_interpreter

    with poisoned_interpreter.last_program() as addresses:
        launch()
    region = poisoned_interpreter.REGION
    return lambda kind, argument, size: sorted(
        int(a - ((argument + 1) << region)) // size
        for some in addresses[kind]
        for a in some
        if a >> region == argument + 1
    )


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [(70_001, 40_001), (2, HUGE)])
def test_interpolate_addresses_past_2_31(shape):
    x = torch.empty(shape, dtype=torch.float16, device="meta")
    at = asked(lambda: kernels.interpolate.interpolate(x, x, 0, 0))
    block = kernels.interpolate.BLOCK
    last = shape[1] - (shape[1] - 1) // block * block
    expected = list(range(x.numel() - last, x.numel()))
    assert x.numel() > 2**31
    for kind, argument in (("load", 0), ("load", 1), ("store", 2)):
        assert at(kind, argument, 2) == expected


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [(70_001, 40_001), (2, HUGE)])
def test_noise_addresses_past_2_31(shape):
    x = torch.empty(shape, dtype=torch.float16, device="meta")
    at = asked(lambda: kernels.perturb.perturb(x, 0.5, 0, 0))
    block = kernels.perturb.BLOCK
    last = shape[1] - (shape[1] - 1) // block * block
    assert x.numel() > 2**31
    for kind, argument in (("load", 0), ("store", 1)):
        assert at(kind, argument, 2) == list(range(x.numel() - last, x.numel()))


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [(700_001, 3072), (6001, 2**19 + 5)], ids=["one read", "two reads"])
def test_penalty_addresses_past_2_31(shape):
    assert shape[0] * shape[1] > 2**31
    x = torch.empty(shape, dtype=torch.float16, device="meta")
    at = asked(lambda: kernels.penalty.gradient_penalty(x, "two-sided", 1.0, 1.0, torch.float16))
    expected = list(range(x.numel() - shape[1], x.numel()))
    assert sorted(set(at("load", 0, 2))) == expected
    assert at("store", 1, 2) == expected


@pytest.mark.interpreted
def test_scores_address_past_2_31():
    block, programs = kernels.scores.BLOCK, kernels.scores.MAX_PROGRAMS
    size = 2**31 + programs * block - 5
    x, small = (torch.empty(n, dtype=torch.float16, device="meta") for n in (size, 4))
    at = asked(lambda: kernels.scores.mean_scores("critic", x, small))
    starts = range((programs - 1) * block, size, programs * block)
    assert starts[-1] > 2**31
    loaded = at("load", 0, 2)
    assert len(loaded) == sum(min(block, size - start) for start in starts)
    assert loaded[-1] == size - 1


class Huge(torch.Tensor):
    """A tensor of so many elements at an address of its own, as a pointer table sees one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.numel:
            return args[0].elements
        if func is torch.Tensor.data_ptr:
            import poisoned_interpreter

            return args[0].argument + 1 << poisoned_interpreter.REGION
        return super().__torch_function__(func, types, args, kwargs)


def huge(argument, elements=HUGE):
    x = torch.empty(1, dtype=torch.float16).as_subclass(Huge)
    x.argument, x.elements = argument, elements
    return x


@pytest.mark.interpreted
@pytest.mark.parametrize("algorithm", ["clamp", "rmsprop", "adam"])
def test_update_addresses_past_2_31(algorithm):
    p, g, s, m = map(huge, range(4))
    step, hyper = torch.ones(()), ((0.5,) * kernels.table.HYPER_COLUMNS.value,)
    launcher = kernels.update.Update(torch.device("cpu"), torch.float16)
    at = asked(lambda: launcher.launch(algorithm, [p], [g], [[s], [m]], [step], hyper, [0]))
    start = HUGE // kernels.update.BLOCK * kernels.update.BLOCK
    touched = {"clamp": (0,), "rmsprop": (0, 2), "adam": (0, 2, 3)}[algorithm]
    for argument in (*touched, *((1,) if algorithm != "clamp" else ())):
        assert at("load", argument, 2) == list(range(start, HUGE))
    for argument in touched:
        assert at("store", argument, 2) == list(range(start, HUGE))


@pytest.mark.interpreted
@pytest.mark.parametrize("size", [1, 2**17, 2**17 + 5])
def test_projection_addresses_past_2_31(size):
    """The last row, or block of rows of one element; 16-byte accesses and others."""
    rows = HUGE if size == 1 else 16_387
    assert rows * size > 2**31
    p = huge(0, rows * size)
    launcher = kernels.project.Project(torch.device("cpu"), torch.float16)
    at = asked(lambda: launcher.launch([p], [size], 1.0))
    part = kernels.project.MIN_BLOCK // 4
    start = rows // part * part if size == 1 else (rows - 1) * size
    assert sorted(set(at("load", 0, 2))) == list(range(start, rows * size))
    if size == 1:  # elsewhere what is not there reads as zero, which lies within
        assert at("store", 0, 2) == list(range(start, rows * size))


@pytest.mark.gpu
def test_more_than_2_31_elements_on_a_gpu():
    device = torch.device("cuda", 0)
    if torch.cuda.mem_get_info(device)[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.zeros(2, 2**30 + 3, dtype=torch.float16, device=device)
    x[1, -1] = 2.0
    assert functional.penalty(x, kind="zero-centered", backend="triton") == 2.0
    assert functional.generator_loss(x * 1024, backend="triton") != 0
    out = functional.interpolate(x, torch.zeros_like(x), seed=0, backend="triton")
    assert out[1, -1] > 0
    functional.clip_weights_([x], 0.5, backend="triton")
    assert x[1, -1] == 0.5


# The strict interpreter itself: what it is there to catch, planted.


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, EXTRA: tl.constexpr, OVERLAP: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * (BLOCK - OVERLAP) + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes, lanes < n)
    tl.store(y_ptr + lanes, x, lanes < n + EXTRA)


@triton.jit
def _maximum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK)).to(tl.float32)
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.maximum(x, 0))


@pytest.mark.interpreted
def test_the_interpreter_is_strict():
    x, room = torch.ones(20), torch.zeros(64)
    with pytest.raises(Exception, match="store: 1 of 21 lanes outside"):
        _copy_kernel[(1,)](x, room[:20], 20, EXTRA=1, OVERLAP=0, BLOCK=32)
    with pytest.raises(IndexError, match="two stores to one address"):
        _copy_kernel[(2,)](x, room, 20, EXTRA=0, OVERLAP=1, BLOCK=16)
    _copy_kernel[(2,)](x, room, 20, EXTRA=0, OVERLAP=0, BLOCK=16)
    assert room.sum() == 20
    _copy_kernel[(1,)](x, room, 20, EXTRA=1, OVERLAP=0, BLOCK=32)
    assert room[20] == 97  # what a lane that was masked off has read

    half = torch.tensor([1 + 2**-8 + 2**-9, -1e-40, float("nan"), float("inf")])
    rounded = torch.empty(4, dtype=torch.bfloat16)
    _copy_kernel[(1,)](half, rounded, 4, EXTRA=0, OVERLAP=0, BLOCK=4)
    torch.testing.assert_close(rounded, half.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(4)
    _copy_kernel[(1,)](rounded, back, 4, EXTRA=0, OVERLAP=0, BLOCK=4)
    torch.testing.assert_close(back, rounded.float(), rtol=0, atol=0, equal_nan=True)
    _maximum_kernel[(1,)](half, back, BLOCK=4)
    assert not back.isnan().any()


@pytest.mark.emulated
def test_two_programs_in_any_order():
    import poisoned_interpreter

    seen = []

    def order(i, n):
        seen.append((i, n))
        return n - 1 - i

    with poisoned_interpreter.program_order(order):
        _copy_kernel[(2,)](torch.ones(20), torch.zeros(32), 20, EXTRA=0, OVERLAP=0, BLOCK=16)
    assert seen == [(0, 2), (1, 2)]
