"""Code for GPUs that are not here: what compile_kernels.py makes of every specialisation a launcher can ask for."""

import json

import pytest
import triton
from compile_kernels import DTYPES, SNAPSHOT, TARGETS, summary

KERNELS = (
    "_guard_kernel", "_scores_kernel", "_interpolate_kernel", "_perturb_kernel", "_penalty_kernel", "_project_kernel",
    "_update_kernel", "_activation_kernel", "_batchnorm_kernel", "_batchnorm_backward_kernel",
)  # fmt: skip
# No program has a share of a reduction, so nothing arrives.
APART = (
    "_interpolate_kernel", "_perturb_kernel", "_activation_kernel", "_batchnorm_backward_kernel",
)  # fmt: skip
ARRAYS = {  # read and written, by case; each 16 bytes at a time
    "scores critic": (2, 0),
    "guard of a large network": (1, 0),
    "interpolate 3072": (2, 1),
    "perturb 3072": (1, 1),
    "penalty one read": (1, 1),
    "penalty two reads": (2, 1),
    "project 4608": (3, 1),  # the norm, the norm of what is scaled, and the projection
    "update rmsprop": (3, 2),
    "update rmsprop momentum centered": (5, 4),
    "update adam": (4, 3),
    "update clamp": (1, 1),
    "activation 0.2": (1, 1),
    "activation 0.2 seeded": (1, 2),
    "batchnorm training (500, 256)": (2, 1),  # the last reading, and one for each sum
}
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@pytest.fixture(scope="module")
def rows(compiled_kernels):
    """One row for each program, from a process without the interpreter; it has been at work since the run began."""
    return [json.loads(line) for line in compiled_kernels.splitlines()]


@pytest.fixture
def snapshot():
    """compiled_kernels.md, with the Triton that wrote it; another's compiler allots registers otherwise."""
    text = SNAPSHOT.read_text()
    if f"Triton {triton.__version__} " not in text:
        pytest.skip(f"{SNAPSHOT.name} is not of Triton {triton.__version__}")
    return text


def nvidia(rows, *, double=False):
    """The PTX rows, of float64 kernels or of the others."""
    return [row for row in rows if row["target"].startswith("sm_") and (row["dtype"] == "float64") == double]


def test_every_kernel_compiles_in_every_dtype_for_every_target(rows):
    found = {(row["kernel"], row["dtype"], row["target"]) for row in rows}
    assert found == {(k, str(d)[6:], t) for k in KERNELS for d in DTYPES for t in TARGETS}


def test_no_program_has_more_threads_than_a_gpu_allows(rows):
    assert max(row["threads"] for row in rows if row["target"] == "gfx942") == 1024
    assert max(row["threads"] for row in rows) == 1024


@pytest.mark.usefixtures("snapshot")
def test_next_to_nothing_lies_in_local_memory(rows):
    """Nothing in float32. Elsewhere a few words of a launch's last program, or of a double's temporaries."""
    assert [row for row in rows if row["local"] > (0 if row["dtype"] == "float32" else 24)] == []


def test_hot_paths_move_16_bytes_at_a_time(rows):
    """Every element of every array that the hot path reads or writes, on NVIDIA; the kernels are not tuned for AMD."""
    hot = [row for row in nvidia(rows) + nvidia(rows, double=True) if row["case"] in ARRAYS]
    assert {(row["case"], row["dtype"], row["target"]) for row in hot} == {
        (case, dtype, target) for case in ARRAYS for dtype in BYTES for target in TARGETS if target.startswith("sm_")
    }
    for row in hot:
        per_array = row["elements"] * BYTES[row["dtype"]] / 16
        for found, arrays in zip(row["wide"], ARRAYS[row["case"]], strict=True):
            assert found >= arrays * per_array, row


def test_no_float64_in_other_kernels(rows):
    """But for the gate, which they read and write, and the guard's factor in it: a norm's, or a loss scale's."""
    gate = {"cvt.f64.f32", "cvt.rn.f32.f64", "selp.f64", "v_cmp_neq_f64_e64"}
    gate |= {f"v_cvt_{kinds}_e32" for kinds in ("f32_f64", "f64_f32", "f64_u32")}
    for row in rows:
        factor = row["kernel"] == "_guard_kernel" and row["case"].endswith(("clipped", "scaled"))
        if row["dtype"] != "float64" and not factor:
            assert {op for op in row["opcodes"] if "f64" in op} <= gate, row


def test_division_and_root_round_correctly(rows):
    """Nothing approximate but the exponential of Adam's bias correction; no denormal number flushed, but for
    libdevice's in its logarithm, where a sum has an integer exponent in it.
    """
    allowed = {"_perturb_kernel": {"fma.rn.ftz.f32"}}
    for row in nvidia(rows):
        inexact = {op for op in row["opcodes"] if "approx" in op or ".full" in op or ".ftz" in op}
        assert inexact <= ({"ex2.approx.f32"} if "adam" in row["case"] else allowed.get(row["kernel"], set())), row
        if row["case"].startswith(("update rmsprop", "update adam", "penalty one read two-sided")):
            assert {"div.rn.f32", "sqrt.rn.f32"} <= set(row["opcodes"]), row
        if row["case"].endswith("clipped"):
            assert {"div.rn.f64", "sqrt.rn.f64"} <= set(row["opcodes"]), row


def test_minima_and_maxima_keep_nan(rows):
    for row in nvidia(rows):
        extrema = {op for op in row["opcodes"] if op.startswith(("min.", "max.")) and op.endswith(("f32", "f16"))}
        # The penalty's are of norms, whose mean brings NaN back; the guard's of a loss scale, which is finite.
        plain = {"min.f32", "max.f32"} if row["kernel"] in ("_penalty_kernel", "_guard_kernel") else set()
        assert extrema <= {"min.NaN.f32", "max.NaN.f32"} | plain, row


def test_partial_results_are_published_before_the_arrival(rows):
    """No store between the barrier and the acquire-release increment that says a program has arrived."""

    def arrives(row):
        return row["kernel"] not in APART and (row["kernel"] != "_batchnorm_kernel" or "training" in row["case"])

    for row in nvidia(rows) + nvidia(rows, double=True):
        assert row["arrives"] == arrives(row), row
    for row in rows:
        if row["target"] == "gfx942" and arrives(row):
            assert {"buffer_wbl2", "buffer_inv"} <= set(row["opcodes"]), row  # release and acquire


def test_denormal_numbers_are_kept_on_amd(rows):
    assert all(row["denormals"] for row in rows if row["target"] == "gfx942")


def test_generated_code_is_the_committed(rows, snapshot):
    assert summary(rows) == snapshot, (
        "if that is meant: python tests/tools/compile_kernels.py --table > tests/tools/" + SNAPSHOT.name
    )
