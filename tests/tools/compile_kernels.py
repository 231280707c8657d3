"""Compile every kernel for GPUs that are not here, from the launchers' own arguments; one JSON row per program.

Run without TRITON_INTERPRET. A launch is replaced by the compilation of what it would have launched, and tensors are
on PyTorch's meta device, so sizes past 2^31 cost nothing. ``main`` cases are what the hot paths look like in use and
have a line in compiled_kernels.md; the others go through what else a launcher can specialise a kernel to.

    python tests/tools/compile_kernels.py            print the rows: all cases for one target, the main ones for others
    python tests/tools/compile_kernels.py --all      all cases for all targets, as ``pytest -m slow`` has it
    python tests/tools/compile_kernels.py --table    print compiled_kernels.md
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastwgan.kernels import activation, batchnorm, guard, interpolate, penalty, perturb, project, scores, table, update

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
THOROUGH = ("sm_90",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SNAPSHOT = Path(__file__).with_name("compiled_kernels.md")
HUGE = 2**31 + 16  # makes an argument int64
KINDS = ("two-sided", "one-sided", "zero-centered", "power")
FORMS = ("critic", "generator", "labels", "hinge")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

Case = tuple[str, bool, Callable[[], Any]]  # name, main, launch


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.numel() + 1)[1:].view(x.shape)


def _update(
    tensors: int, numel: int, algorithm: str, momentum: bool, centered: bool, bound: float, dtype: Any,
    averaged: bool = False,
) -> None:  # fmt: skip
    params = [torch.empty(numel, dtype=dtype, device="meta")] * tensors
    steps = [torch.empty((), device="meta")] * tensors
    hyper = ((*[0.5] * (table.HYPER_COLUMNS.value - 1), bound),)
    averages = [p.to(torch.float64 if dtype == torch.float64 else torch.float32) for p in params] if averaged else None
    launcher = update.Update(torch.device("meta"), dtype)
    if algorithm == "clamp":
        launcher.launch(algorithm, params, (), (), (), hyper, [0] * tensors)  # of no bound, too
        return
    launcher.launch(
        algorithm, params, params, [params] * 3, steps, hyper, [0] * tensors,
        averages=averages, momentum=momentum, centered=centered,
    )  # fmt: skip


def _guard(
    dtype: torch.dtype, numel: int, scores: tuple[torch.Tensor, ...], scaled: bool, max_norm: float | None = None,
    others: tuple[torch.dtype, ...] = (),
) -> None:  # fmt: skip
    gradients = [torch.empty(numel, dtype=dtype, device="meta")] * 6
    gradients += [torch.empty(numel, dtype=other, device="meta") for other in others]
    tally = torch.empty(guard.TALLY, dtype=torch.int64, device="meta")
    gate, scale = torch.empty(2, dtype=torch.float64, device="meta"), torch.empty(2, device="meta")
    guard.Guard().launch(gradients, scores, tally, gate, scale if scaled else None, max_norm)


def _project(shape: tuple[int, ...], size: int, dtype: torch.dtype) -> None:
    params = [torch.empty(shape, dtype=dtype, device="meta")] * 6
    project.Project(torch.device("meta"), dtype).launch(params, [size] * 6, 1.0)


def _activate(x: torch.Tensor, slope: float, dropout: bool, bias: bool, seeded: bool) -> None:
    row, seeds = x.new_empty(x.shape[1]), (x.new_empty(len(x), 1), x.new_empty(1, x.shape[1])) if seeded else ()
    activation.activate_(x, row if bias else None, x if dropout else None, slope, *seeds)


def _batchnorm(x: torch.Tensor, affine: bool, kept: bool, training: bool, momentum: float | None, slope: float) -> None:
    """Forward and backward."""
    row, tracked = x.new_empty(x.shape[1]), torch.empty((), dtype=torch.int64, device="meta")
    weights, running = (row, row) if affine else (None, None), (row, row, tracked) if kept else ()
    y, stats = batchnorm.batch_norm(x, *weights, running, training or not kept, momentum, 1e-5, slope)
    batchnorm.batch_norm_backward(x, x, y, weights[0], stats, training or not kept, slope)


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """Every specialisation: each form and option, each block size, arguments that are 1, odd, 16-fold and past 2^31."""

    def new(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for form in FORMS:
        yield f"scores {form}", form == "critic", partial(scores.mean_scores, form, new(2**20), new(2**20))
        counts = (1, 17, 4096, HUGE, HUGE + 1)
        for n, m in product(counts, repeat=2) if form in ("critic", "hinge") else zip(counts, counts, strict=True):
            yield f"scores {form} {n}, {m}", False, partial(scores.mean_scores, form, new(n), new(m))
        for a, b in ((_unaligned(new(17)), new(17)), (new(4096), _unaligned(new(4096)))):
            yield f"scores {form} unaligned", False, partial(scores.mean_scores, form, a, b)

    on_device = torch.empty((), dtype=torch.int64, device="meta")
    draw = interpolate.interpolate
    for size in (3072, 784, 2**18, HUGE, HUGE + 1, *(2**k - (k > 1) * (k % 2) for k in range(12)), 2049, 32767, 32769):
        x = new(64, size)
        yield f"interpolate {size}", size == 3072, partial(draw, x, x, 2**62, 0)
        if size in (784, 31):
            yield f"interpolate {size} offset on device", False, partial(draw, x, x, 7, on_device)
            yield f"interpolate {size} unaligned", False, partial(draw, _unaligned(x), x, 7, 2**40)
            yield f"interpolate {size} unaligned fake", False, partial(draw, x, _unaligned(x), 7, _unaligned(on_device))

    noise = perturb.perturb
    scale = torch.empty((), device="meta")
    for size in (3072, 784, 1, 3, 17, 2**18, 2049, HUGE):
        x = new(64, size)
        yield f"perturb {size}", size == 3072, partial(noise, x, 0.1, 2**62, 0)
        if size in (784, 17):
            yield f"perturb {size} on device", False, partial(noise, x, scale, 7, on_device)
            yield f"perturb {size} unaligned", False, partial(noise, _unaligned(x), 0.1, 7, 2**40)

    for slope, dropout, seeded in product((0.2, 0.0, 1.0), (False, True), (True, False)):
        name = f"activation {slope}" + " dropout" * dropout + " seeded" * seeded
        yield name, slope == 0.2, partial(_activate, new(192, 512), slope, dropout, True, seeded)
    for shape in ((1, 1), (3, 17), (7, 2049), (2, HUGE), (HUGE, 2), (12, 40)):
        yield f"activation {shape}", False, partial(_activate, new(*shape), 0.2, True, shape != (3, 17), True)

    for affine, training, slope in product((True, False), (True, False), (0.2, 0.0, 1.0)):
        name = "batchnorm" + " affine" * affine + " training" * training + f" {slope}"
        main = affine and training and slope == 0.2
        yield name, main, partial(_batchnorm, new(64, 512), affine, True, training, 0.1, slope)
    yield "batchnorm training cumulative", False, partial(_batchnorm, new(64, 512), True, True, True, None, 0.2)
    yield "batchnorm without averages", False, partial(_batchnorm, new(64, 512), True, False, True, 0.1, 0.2)
    for shape in ((500, 256), (2, 1), (129, 17), (1025, 40), (HUGE, 3), (3, HUGE)):
        name, main = f"batchnorm training {shape}", shape == (500, 256)
        yield name, main, partial(_batchnorm, new(*shape), True, True, True, 0.1, 0.2)

    run = penalty.gradient_penalty
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for size in (3072, 3 * 256 * 256):
        reads = "one read" if size <= penalty.MAX_BLOCK else "two reads"
        yield f"penalty {reads}", True, partial(run, new(64, size), "two-sided", 1.0, 10.0, dtype)
        for kind, cotangent in product(KINDS, {dtype, wide, None}):
            yield f"penalty {reads} {kind} {cotangent}", False, partial(run, new(64, size), kind, 0.0, 1.0, cotangent)
    for k in range(15):
        size = 2**k - (k > 1) * (k % 2)
        yield f"penalty {size}", False, partial(run, new(1 + k, size), KINDS[k % 3], 1.0, 1.0, wide)
    for x in (new(1, 784), _unaligned(new(3, 784)), new(3, 16385), new(1, HUGE), new(1, HUGE + 1), new(HUGE, 1)):
        yield f"penalty {tuple(x.shape)}", False, partial(run, x, "one-sided", 1.0, 1.0, wide)

    inf = float("inf")
    for momentum, centered in product((False, True), repeat=2):
        name = "update rmsprop" + " momentum" * momentum + " centered" * centered
        yield name, momentum == centered, partial(_update, 6, 5000, "rmsprop", momentum, centered, 0.01, dtype)
    for algorithm in ("adam", "clamp"):
        yield f"update {algorithm}", True, partial(_update, 6, 5000, algorithm, False, False, 0.01, dtype)
    for algorithm, (tensors, numel, bound) in product(("rmsprop", "adam", "clamp"), ((1, 1, inf), (16, HUGE, 0.01))):
        name = f"update {algorithm} {tensors} x {numel}, bound {bound}"
        yield name, False, partial(_update, tensors, numel, algorithm, False, False, bound, dtype)
    for algorithm in ("rmsprop", "adam"):
        name = f"update {algorithm} averaged"
        yield name, algorithm == "adam", partial(_update, 6, 5000, algorithm, False, False, 0.01, dtype, True)
    for count, scaled, max_norm in product(range(3), (False, True), (None, 0.1)):
        name = f"guard {count} scores" + " scaled" * scaled + " clipped" * (max_norm is not None)
        yield name, (count, scaled) == (2, False), partial(_guard, dtype, 5000, (new(64),) * count, scaled, max_norm)
    for name, max_norm in (("guard of a large network", None), ("guard of a large network clipped", 0.1)):
        yield name, True, partial(_guard, dtype, 2**25, (new(64), new(64)), False, max_norm)
    if dtype == torch.float64:  # in which the squares of others are added then
        yield "guard of all dtypes clipped", False, partial(_guard, dtype, 5000, (new(64),) * 2, False, 0.1, DTYPES)
    for n in (1, 17, HUGE):
        yield f"guard {n}", False, partial(_guard, dtype, n, (new(n), new(17)), False)
    for size in (4608, 1, 1025, 2049):  # each block size
        yield f"project {size}", size == 4608, partial(_project, (2, size), size, dtype)


def _nvidia(compiled: Any, main: bool) -> dict[str, Any]:
    """What the PTX says, and what cuobjdump reads out of the machine code that ptxas made of it."""
    ptx = compiled.asm["ptx"]
    before_arrival = ptx.split("atom.global.gpu.acq_rel")[0]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        arguments = ("-res-usage", "-sass") if main else ("-res-usage",)
        report = subprocess.run([CUOBJDUMP, *arguments, file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report)
    assert usage is not None, report
    registers, stack, shared, local = map(int, usage.groups())
    return {
        "opcodes": sorted(set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\w*\.[\w.:]+)", ptx, re.MULTILINE))),
        "arrives": before_arrival != ptx and before_arrival.rfind("bar.sync") > before_arrival.rfind("st.global"),
        "wide": [len(re.findall(rf"{op}\.global\S*\.v(?:4\.b32|2\.b64)", ptx)) for op in ("ld", "st")],
        "registers": registers,
        "shared": shared,
        "local": stack + local,  # bytes a thread keeps in memory: spills, and arrays that are indexed at run time
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?!NOP)", report)),
    }


def _amd(compiled: Any) -> dict[str, Any]:
    asm = compiled.asm["amdgcn"]
    code = asm.split(".amdhsa_kernel")[0]
    count = {name: int(n) for name, n in re.findall(r"^\s*\.(\w+):\s+(\d+)$", asm, re.MULTILINE)}
    instructions = re.findall(r"^\t([a-z]\w+)", code, re.MULTILINE)
    return {
        "opcodes": sorted(set(instructions)),
        "denormals": ".amdhsa_float_denorm_mode_32 3" in asm,
        "wide": [len(re.findall(rf"\t(?:global|buffer)_{op}_dwordx4", code)) for op in ("load", "store")],
        "registers": count["vgpr_count"],
        "shared": count["group_segment_fixed_size"],
        "local": count["private_segment_fixed_size"] + count["vgpr_spill_count"] + count["sgpr_spill_count"],
        "instructions": len(instructions),
    }


def compile_all(target_name: str, dtype: torch.dtype, main_only: bool) -> list[dict[str, Any]]:
    """One row for each distinct program that the cases, or the main ones among them, ask for."""
    target = TARGETS[target_name]
    rows: dict[str, dict[str, Any]] = {}
    case = next(cases(dtype))

    def compile_one(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        backend = make_backend(target)
        binder = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **kwargs, debug=False)
        options, signature, constexprs, attrs = self._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(self, signature, constexprs, attrs)
        compiled = triton.compile(source, target=target, options=options.__dict__)
        if compiled.hash in rows:
            return
        name, main, _ = case
        row = {"kernel": self.__name__, "case": name, "main": main, "target": target_name, "dtype": str(dtype)[6:]}
        row["threads"] = kwargs["num_warps"] * target.warp_size
        block = kwargs["BLOCK"] if "BLOCK" in kwargs else kwargs["ROWS"] * kwargs["COLUMNS"]
        row["elements"] = block / row["threads"]  # of a block, per thread
        rows[compiled.hash] = row | (_nvidia(compiled, main) if target.backend == "cuda" else _amd(compiled))

    JITFunction.run = compile_one
    penalty.MOST_WARPS = 1024 // target.warp_size  # as on a machine with that GPU
    for case in cases(dtype):
        if case[1] or not main_only:
            case[2]()
    return list(rows.values())


def summary(rows: list[dict[str, Any]]) -> str:
    """compiled_kernels.md: the main cases, a line for each kernel and dtype, the targets side by side."""
    found = {(row["case"], row["dtype"], row["target"]): row for row in rows if row["main"]}
    lines = [
        f"The kernels as Triton {triton.__version__} compiles them. `tests/tools/compile_kernels.py --table` writes",
        "this, and a test compares it, so that a change in generated code shows in review. Each cell: registers per",
        "thread / bytes of shared memory / widest access in bits / machine instructions, of the whole program, per",
        "element that one thread handles of a block. The update's program holds a second, masked path for tensor ends,",
        "and counts it.",
        "In float32 nothing spills: a test sees to it, for these and other specialisations.",
        "",
        "| kernel | dtype | " + " | ".join(TARGETS) + " |",
        "|---" * (2 + len(TARGETS)) + "|",
    ]
    for case, dtype in dict.fromkeys((case, dtype) for case, dtype, _ in found):
        cells = [case, dtype]
        for target in TARGETS:
            row = found[case, dtype, target]
            width = 128 if row["wide"][0] else "< 128"
            per_element = row["instructions"] / row["elements"]
            cells.append(f"{row['registers']} / {row['shared']} / {width} / {per_element:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    everywhere = "--all" in sys.argv
    jobs = [
        (target, dtype, "--table" in sys.argv or not (everywhere or target in THOROUGH))
        for target, dtype in product(TARGETS, DTYPES)
    ]
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        all_rows = [row for rows in pool.map(compile_all, *zip(*jobs, strict=True)) for row in rows]
    if "--table" in sys.argv:
        print(summary(all_rows), end="")
    else:
        for row in all_rows:
            print(json.dumps(row))
