"""The machine that the compiled kernels run on without a GPU: what it computes, and what it does not let pass."""

import shutil
from typing import Any

import conftest
import numpy as np
import ptx
import pytest
import torch

from benchmarks.op_cases import OPS, Case

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="PTX is run by way of C: no C compiler here")

THREADS = 64
SHARED = 4096


def _program(body: str) -> ptx.Program:
    """Of 64 threads, with two pointers. %r1 is the thread, %r2 the program, %rd1 and %rd2 each thread's 16 bytes."""
    names = ("kernel_param_0", "kernel_param_1")
    params = ",\n".join(f"\t.param .u64 .ptr .global .align 1 {name}" for name in names)
    registers = "\n".join(
        f"\t.reg .{t} %{r}<40>;" for t, r in (("pred", "p"), ("b16", "rs"), ("b32", "r"), ("b64", "rd"))
    )
    start = """
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    ld.param.b64 %rd3, [kernel_param_0];
    ld.param.b64 %rd4, [kernel_param_1];
    mad.wide.u32 %rd1, %r1, 16, %rd3;
    mad.wide.u32 %rd2, %r1, 16, %rd4;
    """
    text = f".visible .entry kernel(\n{params}\n)\n.reqntid {THREADS}\n{{\n{registers}\n{start}\n{body}\n\tret;\n}}\n"
    return ptx.Program(text, SHARED)


def _run(body: str, *arrays: np.ndarray, programs: int = 1, **options: Any) -> None:
    spans = sorted((x.ctypes.data, x.ctypes.data + x.nbytes) for x in arrays)
    _program(body)(range(programs), [("*u8", x.ctypes.data) for x in arrays], spans, **options)


def _memory() -> np.ndarray:
    """16 bytes for each thread, aligned to as many."""
    memory = np.zeros((THREADS, 2))
    assert memory.ctypes.data % 16 == 0
    return memory


def _bits(*values: Any) -> np.ndarray:
    """A row of 16 bytes for each thread: its values, in turn."""
    memory = _memory()
    for i, value in enumerate(values):
        memory.view(value.dtype)[:, i] = np.resize(value, THREADS)
    return memory


NAN, INF = float("nan"), float("inf")
FLOATS = np.array([0.0, -0.0, 1.5, -3.25, 1e-40, -2e-45, 3e38, INF, -INF, NAN, 0.1, 65519.0, 65520.0, 1e-8], np.float32)
WORDS = np.array([0, 1, -1, 2**31 - 1, -(2**31), 0x12345678, -0x12345678, 97], np.int64).astype(np.int32)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.f32 %r5, %r3, %r4;", lambda a, b: a + b),
        ("mul.f32 %r5, %r3, %r4;", lambda a, b: a * b),
        ("div.rn.f32 %r5, %r3, %r4;", lambda a, b: a / b),
        ("sqrt.rn.f32 %r5, %r3;", lambda a, b: np.sqrt(a)),
        ("neg.f32 %r5, %r3;", lambda a, b: -a),
        ("abs.f32 %r5, %r3;", lambda a, b: np.abs(a)),
        ("fma.rn.f32 %r5, %r3, %r3, %r4;", lambda a, b: (a.astype(np.longdouble) ** 2 + b).astype(np.float32)),
        ("fma.rn.ftz.f32 %r5, %r3, 0f3F800000, 0f00000000;", lambda a, b: np.where(np.abs(a) < 2.0**-126, 0 * a, a)),
        ("max.f32 %r5, %r3, %r4;", np.fmax),
        ("max.NaN.f32 %r5, %r3, %r4;", np.maximum),
        ("min.f32 %r5, %r3, %r4;", np.fmin),
        ("setp.lt.f32 %p1, %r3, %r4;\nselp.f32 %r5, %r3, %r4, %p1;", lambda a, b: np.where(a < b, a, b)),
        ("setp.geu.f32 %p1, %r3, %r4;\nselp.f32 %r5, %r3, %r4, %p1;", lambda a, b: np.where(~(a < b), a, b)),
        ("setp.ne.f32 %p1, %r3, %r4;\n@!%p1 mov.b32 %r5, %r4;\n@%p1 mov.b32 %r5, %r3;",
         lambda a, b: np.where((a < b) | (a > b), a, b)),
        ("cvt.rn.bf16x2.f32 %r5, %r4, %r3;\nmov.b32 {%rs1, _}, %r5;\ncvt.f32.bf16 %r5, %rs1;",
         lambda a, b: torch.from_numpy(a).bfloat16().float().numpy()),
        ("cvt.rn.f16.f32 %rs1, %r3;\ncvt.f32.f16 %r5, %rs1;", lambda a, b: torch.from_numpy(a).half().float().numpy()),
        ("cvt.rn.f16.f32 %rs1, %r3;\ncvt.f64.f16 %rd5, %rs1;\ncvt.rn.f32.f64 %r5, %rd5;",
         lambda a, b: torch.from_numpy(a).half().float().numpy()),
        ("cvt.rn.f16x2.f32 %r5, %r3, %r4;\nmov.b32 {_, %rs1}, %r5;\ncvt.f32.f16 %r5, %rs1;",
         lambda a, b: torch.from_numpy(a).half().float().numpy()),
        ("cvt.rn.bf16x2.f32 %r5, %r3, %r4;\nmov.b32 %r6, 0;\nsetp.gt.bf16x2 %p1|%p2, %r5, %r6;\n"
         "selp.f32 %r5, %r3, %r4, %p2;", lambda a, b: np.where(a > 0, a, b)),
        ("cvt.rn.f16x2.f32 %r5, %r3, %r4;\nmov.b32 %r6, 0;\nsetp.gt.f16x2 %p1|%p2, %r5, %r6;\n"
         "selp.f32 %r5, %r3, %r4, %p1;", lambda a, b: np.where(torch.from_numpy(b).half().numpy() > 0, a, b)),
        ("cvt.rn.bf16.f32 %rs1, %r3;\ncvt.rn.bf16.f32 %rs2, %r4;\nmul.bf16 %rs1, %rs1, %rs2;\ncvt.f32.bf16 %r5, %rs1;",
         lambda a, b: (torch.from_numpy(a).bfloat16() * torch.from_numpy(b).bfloat16()).float().numpy()),
        ("cvt.rn.f16x2.f32 %r5, %r3, %r4;\nmul.f16x2 %r5, %r5, %r5;\nmov.b32 {_, %rs1}, %r5;\ncvt.f32.f16 %r5, %rs1;",
         lambda a, b: (torch.from_numpy(a).half() ** 2).float().numpy()),
        ("ex2.approx.f32 %r5, 0f00000000;", lambda a, b: 0 * b.view(np.int32) + 1),
        ("cvt.rzi.s32.f32 %r6, %r3;\ncvt.rn.f32.s32 %r5, %r6;",
         lambda a, b: np.trunc(np.clip(np.nan_to_num(a, nan=0.0, posinf=3e9, neginf=-3e9), -(2.0**31), 2.0**31)) + 0.0),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)  # fmt: skip
def test_floating_point(instruction: str, expected: Any) -> None:
    a, b = (np.resize(x, THREADS) for x in (np.repeat(FLOATS, 4), np.roll(FLOATS, 3)))
    x, y = _bits(a, b), _memory()
    _run(f"ld.global.v2.b32 {{%r3, %r4}}, [%rd1];\n{instruction}\nst.global.b32 [%rd2], %r5;", x, y)
    with np.errstate(all="ignore"):
        want = expected(a, b).astype(np.float32)
    got = y.view(np.float32)[:, 0]
    np.testing.assert_array_equal(got, want)
    assert (np.signbit(got) == np.signbit(want))[~np.isnan(want) & (want != 0)].all()


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("add.s32 %r5, %r3, %r4;", lambda a, b: a + b),
        ("mul.lo.s32 %r5, %r3, %r4;", lambda a, b: a * b),
        ("mul.hi.u32 %r5, %r3, %r4;", lambda a, b: (a % 2**32) * (b % 2**32) >> 32),
        ("mul.wide.u32 %rd5, %r3, %r4;\nmov.b64 {_, %r5}, %rd5;", lambda a, b: (a % 2**32) * (b % 2**32) >> 32),
        ("mad.wide.s32 %rd5, %r3, %r4, 7;\ncvt.u32.u64 %r5, %rd5;", lambda a, b: a * b + 7),
        ("shl.b32 %r5, %r3, 33;", lambda a, b: 0 * a),
        ("shr.s32 %r5, %r3, 40;", lambda a, b: -1 if a < 0 else 0),
        ("shr.u32 %r5, %r3, 4;", lambda a, b: (a % 2**32) >> 4),
        ("bfe.s32 %r5, %r3, 4, 8;", lambda a, b: ((a >> 4) + 128) % 256 - 128),
        ("bfe.u32 %r5, %r3, 4, 8;", lambda a, b: (a >> 4) % 256),
        ("popc.b32 %r5, %r3;", lambda a, b: bin(a % 2**32).count("1")),
        ("popc.b64 %r5, %rd6;", lambda a, b: bin(a % 2**64).count("1")),
        ("prmt.b32 %r5, %r3, %r4, 0x5410U;", lambda a, b: a % 2**16 + (b % 2**16 << 16)),
        ("min.u32 %r5, %r3, %r4;", lambda a, b: min(a % 2**32, b % 2**32)),
        ("max.s64 %rd5, %rd6, %rd7;\ncvt.u32.u64 %r5, %rd5;", max),
        ("xor.b32 %r5, %r3, %r4;", lambda a, b: a ^ b),
        ("shfl.sync.bfly.b32 %r5, %r3, 5, 31, -1;", lambda a, b, lanes, i: lanes[i ^ 5]),
        ("shfl.sync.idx.b32 %r5, %r3, 9, 31, -1;", lambda a, b, lanes, i: lanes[9]),
        ("redux.sync.add.s32 %r5, %r3, -1;", lambda a, b, lanes, i: sum(lanes)),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)
def test_integers_and_warps(instruction: str, expected: Any) -> None:
    a, b = (np.resize(x, THREADS) for x in (np.repeat(WORDS, 8), WORDS))
    x, y = _bits(a, b), _memory()
    body = f"""
    ld.global.v2.b32 {{%r3, %r4}}, [%rd1];
    cvt.s64.s32 %rd6, %r3;
    cvt.s64.s32 %rd7, %r4;
    {instruction}
    st.global.b32 [%rd2], %r5;
    """
    _run(body, x, y)
    got, pairs = y.view(np.int32)[:, 0], list(zip(a.tolist(), b.tolist(), strict=True))
    for i, (one, other) in enumerate(pairs):
        of_warp = ([p[0] for p in pairs[i // 32 * 32 :][:32]], i % 32) if ".sync" in instruction else ()
        assert (int(got[i]) - int(expected(one, other, *of_warp))) % 2**32 == 0, (i, one, other)


def test_matrices_are_transposed() -> None:
    """Each of four 8 x 8 matrices of 16 bits, one behind the other in a warp's shared memory."""
    y = _memory()
    body = """
    shl.b32 %r4, %r1, 4;
    shl.b32 %r5, %r1, 17;
    shl.b32 %r6, %r1, 1;
    add.s32 %r7, %r5, %r6;
    add.s32 %r7, %r7, 65536;
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r4], {%r7, %r7, %r7, %r7};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r8, %r9, %r10, %r11}, [%r4];
    st.global.v4.b32 [%rd2], {%r8, %r9, %r10, %r11};
    """
    _run(body, y, y)
    lanes = np.arange(32)
    for warp in range(2):  # lane l held columns 2 (l % 4) and the next of row l // 4
        matrix = (64 * warp + np.arange(64)).reshape(8, 8)
        want = matrix.T[lanes // 4, 2 * (lanes % 4)] + (matrix.T[lanes // 4, 2 * (lanes % 4) + 1] << 16)
        np.testing.assert_array_equal(y.view(np.int32)[32 * warp : 32 * warp + 32], np.repeat(want[:, None], 4, 1))


def test_atomics_take_turns() -> None:
    x, y = _bits(10 * np.arange(THREADS)), _memory()
    body = """
    cvt.u64.u32 %rd5, %r1;
    atom.global.gpu.relaxed.add.u64 %rd6, [ %rd4 + 0 ], 3;
    red.global.gpu.relaxed.max.s64 [ %rd4 + 8 ], %rd5;
    atom.global.gpu.relaxed.exch.b64 %rd7, [ %rd1 + 0 ], %rd6;
    red.global.gpu.relaxed.add.u64 [ %rd4 + 16 ], %rd7;
    """
    _run(body, x, y)
    assert y.view(np.int64).ravel()[:3].tolist() == [3 * THREADS, THREADS - 1, 10 * sum(range(THREADS))]
    assert sorted(x.view(np.int64)[:, 0]) == [3 * i for i in range(THREADS)]


SUM = """
    @%p1 mov.b32 %r9, 0;
    bar.sync 0;
    setp.eq.b32 %p1, %r1, 0;
    add.s64 %rd8, %rd4, 512;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r6, [ %rd8 + 0 ], 1;
    @%p1 st.shared.b32 [0], %r6;
    bar.sync 0;
    ld.shared.b32 %r7, [0];
    setp.ne.b32 %p2, %r7, 2;
    @%p2 bra $L_end;
    ld.global.b32 %r10, [ %rd3 + 0 ];
    ld.global.b32 %r11, [ %rd3 + 4 ];
    ld.global.b32 %r12, [ %rd3 + 8 ];
    add.s32 %r10, %r10, %r11;
    add.s32 %r10, %r10, %r12;
    @%p1 st.global.b32 [ %rd4 + 0 ], %r10;
$L_end:
"""
STORE_PARTIAL = """
    mad.wide.u32 %rd7, %r2, 4, %rd3;
    add.s32 %r5, %r2, 5;
    setp.eq.b32 %p1, %r1, 33;
    @%p1 st.global.b32 [%rd7], %r5;
"""
# The same, stored when the program has arrived: too late for others to see.
LATE = """
    setp.ne.b32 %p1, %r1, 0;
    @%p1 bra $L_end;
    add.s64 %rd8, %rd4, 512;
    mad.wide.u32 %rd7, %r2, 4, %rd3;
    atom.global.gpu.acq_rel.add.u32 %r6, [%rd8], 1;
    st.global.b32 [%rd7], %r6;
    setp.ne.b32 %p2, %r2, 2;
    @%p2 bra $L_end;
    ld.global.b32 %r10, [%rd3];
$L_end:
"""
READ_BY_ALL = """
    ld.global.b32 %r5, [%rd4];
    bar.sync 0;
    setp.ne.b32 %p1, %r1, 0;
    @%p1 bra $L_end;
    setp.ne.b32 %p1, %r2, 2;
    @%p1 bra $L_end;
"""
COUNT = """
    setp.ne.b32 %p1, %r1, 0;
    @%p1 bra $L_end;
    atom.global.gpu.relaxed.add.u64 %rd8, [%rd4], 1;
    setp.ne.b32 %p1, %r2, 2;
    @%p1 bra $L_end;
"""


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_last_program_to_arrive_sees_what_the_others_stored(order: tuple[int, ...], backwards: bool) -> None:
    x, y = _memory(), _memory()
    program = _program(STORE_PARTIAL + SUM)
    spans = sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for a in (x, y))
    program(order, [("*u8", x.ctypes.data), ("*u8", y.ctypes.data)], spans, backwards=backwards)
    assert y.view(np.int32)[0, 0] == 5 + 6 + 7


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r5, [%rd1 + 2];", "loads 4 bytes at .* no multiple"),
        ("st.global.v4.b32 [%rd2 + 8], {%r1, %r1, %r1, %r1};", "stores 16 bytes at .* no multiple"),
        ("ld.global.b32 %r5, [%rd1 + 4096];", "outside the launch's tensors"),
        ("ld.global.b32 %r5, [%rd1 + -16];", "thread 0 loads .* outside the launch's tensors"),
        ("st.shared.b32 [%r1 + 4094], %r1;", "of 4096 of shared memory"),
        ("ld.shared.b32 %r5, [4096];", "of 4096 of shared memory"),
        ("st.shared.b32 [0], %r1;", "thread 1 stores over what program 0, thread 0 stores, in no order"),
        ("st.global.b32 [%rd4], %r1;", "thread 1 stores over what program 0, thread 0 stores, in no order"),
        ("mov.b32 %r5, 0;\nst.global.b32 [%rd4], %r2;", "program 1, thread 0 stores over what program 0"),
        ("atom.global.gpu.relaxed.add.u64 %rd5, [%rd4], 1;\nld.global.b64 %rd5, [%rd4];", "stores over what .* loads"),
        ("setp.lt.u32 %p1, %r1, 32;\n@%p1 bra $L_end;\nbar.sync 0;\n$L_end:", "stop at different barriers"),
        ("setp.lt.u32 %p1, %r1, 7;\n@%p1 bra $L_end;\nredux.sync.add.s32 %r5, %r1, -1;\n$L_end:", "of a warp stop at"),
        (STORE_PARTIAL + SUM.replace("bar.sync 0;", "", 1), "loads what program 0, thread 33 stores"),
        (STORE_PARTIAL + SUM.replace("acq_rel", "relaxed"), "loads what program 0, thread 33 stores"),
        (LATE, "loads what program 0, thread 0 stores"),
        (READ_BY_ALL + "st.global.b32 [%rd4], 7;\n$L_end:", "program 2, thread 0 stores over what program 1, .* loads"),
        (COUNT + "ld.global.b64 %rd9, [%rd4];\n$L_end:", "program 2, thread 0 loads what program 1, thread 0 stores"),
        (COUNT + "atom.global.gpu.relaxed.exch.b64 %rd9, [%rd4], 0;\n$L_end:", "loads what program 1, thread 0 stores"),
        ("setp.eq.b32 %p1, %r1, 0;\n@%p1 st.shared.b32 [0], 7;\nshfl.sync.idx.b32 %r5, %r1, 0, 31, -1;\n"
         "ld.shared.b32 %r6, [0];", "thread 1 loads what program 0, thread 0 stores"),
        ("ld.global.b32 %r5, [%rd4];\nshfl.sync.idx.b32 %r6, %r1, 0, 31, -1;\nsetp.eq.b32 %p1, %r1, 40;\n"
         "@%p1 st.global.b32 [%rd4], %r1;", "program 0, thread 40 stores over what program 0, thread .* loads"),
        ("redux.sync.add.s32 %r5, %r1, 7;", "part of a warp"),
        ("ld.shared.b32 %r5, [16];", "loads 16 of shared memory, where nothing is"),
        ("div.s32 %r5, %r1, %r2;", "a division by zero"),
        (STORE_PARTIAL + SUM.replace("bar.sync 0;\n    ld.shared", "ld.shared"), "loads what .*, thread 0 stores"),
    ],
)  # fmt: skip
def test_what_a_kernel_must_not_do(body: str, message: str) -> None:
    with pytest.raises(ptx.FaultError, match=message):
        _run(body, _memory(), _memory(), programs=3)


@pytest.mark.parametrize(
    "body",
    [
        "fabulate.f32 %r5, %r3;",
        "sqrt.approx.f32 %r5, %r3;",
        "bar.sync 1;",
        "@%p1 bar.sync 0;",
        "ld.local.b32 %r5, [0];",
        "add.f16x2 %r5, %r3, %r4;",
        "neg.bf16x2 %r5, %r3;",
        "fma.rn.f16 %rs1, %rs2, %rs3, %rs4;",
        "add.sat.s32 %r5, %r3, %r4;",
        "fma.rn.sat.f32 %r5, %r3, %r3, %r4;",
        "setp.lt.ftz.f32 %p1, %r3, %r4;",
        "setp.lt.ftz.f16x2 %p1|%p2, %r3, %r4;",
        "setp.lt.b32 %p1, %r3, %r4;",
        "abs.ftz.f16x2 %r5, %r3;",
        "bfe.u64 %rd5, %rd6, 4, 8;",
        "bfe.u32 %r5, %r3, 30, 8;",
        "rcp.approx.ftz.f32 %r5, %r3;",
        "cvt.rzi.f32.f32 %r5, %r3;",
        "cvt.rn.f16.f64 %rs1, %rd5;",
        "cvt.rn.bf16.s32 %rs1, %r3;",
        "cvt.u8.u32 %rs1, %r3;",
        "ld.param.v2.b32 {%r5, %r6}, [kernel_param_0];",
        "ld.global.nc.b32 %r5, [%rd1];",
        "ld.shared.b8 %rs1, [%r1];",
        "atom.global.sys.relaxed.add.u32 %r5, [%rd1], 1;",
        "shfl.sync.bfly.b32 %r5|%p1, %r3, 5, 31, -1;",
        "shfl.sync.bfly.b32 %r5, %r3, 5, 15, -1;",
    ],
)
def test_instructions_that_are_not_known_are_refused(body: str) -> None:
    with pytest.raises(ptx.UnknownError):
        _program(body)


def test_every_float16_is_rounded_to() -> None:
    """All of them and the numbers half way between two, and next to these."""
    halves = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves[-1] = 65536
    ties = (halves[:-1] + halves[1:]) / 2
    values = np.concatenate([halves, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(INF))])
    values = np.resize(np.concatenate([values, -values]), (-(-2 * len(values) // THREADS), THREADS))
    x, y = values.copy(), np.zeros(values.shape, np.uint32)
    body = """
    mad.lo.s32 %r3, %r2, 64, %r1;
    mad.wide.u32 %rd5, %r3, 4, %rd3;
    mad.wide.u32 %rd6, %r3, 4, %rd4;
    ld.global.b32 %r4, [%rd5];
    cvt.rn.f16.f32 %rs1, %r4;
    cvt.f32.f16 %r5, %rs1;
    st.global.b32 [%rd6], %r5;
    """
    _run(body, x, y, programs=len(values))
    np.testing.assert_array_equal(y, torch.from_numpy(values).half().float().numpy().view(np.uint32))


BYTES = {  # of an element that is loaded, and stored
    "RMSprop": ("_update_kernel", 12, 8),
    "Adam": ("_update_kernel", 16, 12),
    "Adam averaged": ("_update_kernel", 20, 16),
    "guard": ("_guard_kernel", 4, 0),
    "project": ("_project_kernel", 4, 4),
    "interpolate": ("_interpolate_kernel", 8, 4),
    "perturb": ("_perturb_kernel", 4, 4),
    "penalty": ("_penalty_kernel", 4, 4),
    "scores": ("_scores_kernel", 8, 0),
}


@pytest.mark.emulated
@pytest.mark.skipif(conftest.KERNELS != "compiled for a GPU, run on the CPU", reason="the machine counts bytes")
@pytest.mark.parametrize("op", BYTES)
def test_each_kernel_moves_what_it_has_to_and_no_more(op: str) -> None:
    """Every number is read once and written once: what the benchmark takes for the least that has to be moved."""
    name, *expected = BYTES[op]
    case = Case(op, 2**18, 4 if OPS[op].of_tensors else 1)
    assert OPS[op].bytes == sum(expected) + (8 if op == "project" else 0)  # it is given a copy to work on
    OPS[op].builders(case, torch.device("cpu"))["fastwgan"]().take()
    for moved, least in zip(ptx.Launch.moved[name], expected, strict=True):
        assert least * case.elements <= moved <= (1.02 * least + 0.05) * case.elements
