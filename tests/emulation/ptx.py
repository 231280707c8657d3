"""The kernels as Triton compiles them for an NVIDIA GPU, run on a CPU.

``Program`` turns the PTX of a kernel into C, one function that a thread runs up to its next barrier, and launches it
thread by thread in ptx_machine.c, which keeps the rules of a GPU's memory more strictly than a GPU does. ``install``
has Triton launch kernels so, on CPU tensors: its own front end specialises and compiles them, and what runs is what it
has compiled, with each access as wide as it is on the device. It knows the instructions that Triton's code for these
kernels has, and no others.
"""

import ctypes
import hashlib
import platform
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import poisoned_interpreter
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastwgan import kernels

TARGET = GPUTarget("cuda", 90, 32)
WARP = 32
OPTIONS = ["-w", "-shared", "-fPIC", "-fwrapv", "-fno-strict-aliasing", "-ffp-contract=off"]
OPTIONS += ["-O0"]  # most programs run for less time than it takes to compile them
MACHINE = Path(__file__).with_name("ptx_machine.c")
REGISTERS = {"p": "unsigned char", "rs": "u16", "r": "u32", "rd": "u64", "f": "u32", "fd": "u64"}
SPECIAL = {"%tid.x": "tid", "%ctaid.x": "m->program", "%nctaid.x": "m->programs", "%tid.y": "0", "%tid.z": "0"}
FLOATS = ("f16", "bf16", "f32", "f64")
PACK = {"i32": "<i", "i64": "<q", "fp32": "<f"}  # by Triton's names; a pointer is "<Q"

ARITHMETIC = {"add": "a + b", "sub": "a - b", "mul": "a * b", "mul.lo": "a * b", "div": "a / b", "mad.lo": "a * b + c"}
ARITHMETIC |= {"and": "a & b", "or": "a | b", "xor": "a ^ b", "not": "~a", "neg": "-a", "rem": "a % b"}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

# All that there is a meaning for here, each to the last modifier: one more can be another instruction.
_INTEGER, _RELATION, _MATRIX = "[us](16|32|64)", "(eq|ne|lt|le|gt|ge)", "sync.aligned.m8n8.x[124]"
_PATTERNS = (
    "ret|bra(.uni)?|bar.sync",
    "(and|or|not|mov).pred|(mov|selp).([bus]16|[busf](32|64))",
    f"(add|sub|mul.lo|mad.lo|div|rem|min|max).{_INTEGER}|neg.s(16|32|64)|(mul|mad).wide.[us]32|mul.hi.[us]32",
    "(and|or|xor|not|shl).b(16|32|64)|shr.[bus](16|32|64)|bfe.[us]32|popc.b(32|64)|prmt.b32",
    "((add|sub|mul)(.rn)?|(fma|div|sqrt).rn|neg|abs|min|max)((.ftz)?.f32|.f64)",
    "mul.b?f16(x2)?|(min|max)(.ftz)?.NaN.f32|abs.b?f16(x2)?|ex2.approx(.ftz)?.f32|rcp.approx.ftz.f64",
    f"setp.{_RELATION}.{_INTEGER}|setp.(eq|ne).b(16|32|64)|setp.({_RELATION}u?|nan|num).(b?f16(x2)?|f32|f64)",
    f"cvt.{_INTEGER}.{_INTEGER}|cvt.rn.f(32|64).{_INTEGER}|cvt.rzi.s32.f(32|64)",
    "cvt.f(32|64).b?f16|cvt.f64.f32|cvt.rn.f32.f64|cvt.rn.b?f16(x2)?.f32",
    f"ld.param.[bus](32|64)|ld(.volatile)?.global(.cg)?(.v2|.v4)?.(b8|b16|b32|b64|{_INTEGER})",
    f"(st.global|ld.shared|st.shared)(.v2|.v4)?.(b16|b32|b64|{_INTEGER})",
    "(atom|red).global.gpu.(relaxed|acq_rel).(add.u(32|64)|max.[us](32|64)|exch.b(32|64))",
    f"shfl.sync.(bfly|idx).b32|redux.sync.add.s32|(ldmatrix.{_MATRIX}(.trans)?|stmatrix.{_MATRIX}).shared.b16",
)
KNOWN = re.compile("|".join(_PATTERNS).replace(".", r"\."))


class UnknownError(Exception):
    """An instruction or operand that is not among those known here."""


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts]


def _bits(kind: str) -> int:
    return int(re.sub(r"\D", "", kind.removesuffix("x2"))) * (2 if kind.endswith("x2") else 1)


class _Translation:
    """The C of one kernel."""

    def __init__(self, ptx: str) -> None:
        found = re.search(r"\.visible \.entry (\w+)\((.*?)\)\s*\.reqntid (\d+).*?\n\{\n(.*?)\n\}", ptx, re.DOTALL)
        if found is None:
            raise UnknownError("no kernel")
        self.name, params, threads, body = found.groups()
        self.threads = int(threads)
        self.params: list[tuple[str, int, int]] = []  # name, offset, bytes
        self.param_size = 0
        for kind, name in re.findall(r"\.param \.(\w+)[^,]*? (\w+)(?:,|$)", " ".join(params.split())):
            size = _bits(kind) // 8
            self.param_size = -(-self.param_size // size) * size
            self.params.append((name, self.param_size, size))
            self.param_size += size
        self.offsets = {name: offset for name, offset, _ in self.params}
        self.stops = 0
        self.registers = re.findall(r"\.reg \.\w+\s+%(\w+)<(\d+)>;", body)
        self.code = [self.line(number, line) for number, line in enumerate(body.split("\n"), 1)]

    def source(self) -> str:
        registers = "".join(f"{REGISTERS[name]} {name}[{count}]; " for name, count in self.registers)
        code = "\n".join(filter(None, self.code))
        return MACHINE.read_text().replace("// REGISTERS", registers).replace("// CODE", code)

    def value(self, operand: str, kind: str) -> str:
        """An operand read as a type."""
        bits = _bits(kind)
        if operand in SPECIAL:
            text = SPECIAL[operand]
        elif register := re.fullmatch(r"%(p|rs|r|rd|f|fd)(\d+)", operand):
            text = f"t->{register[1]}[{register[2]}]"
        elif re.fullmatch(r"0[fd][0-9A-F]+", operand):
            text = f"0x{operand[2:]}ull"
        elif re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+U?", operand):
            text = f"(s64){operand.rstrip('U')}ll"
        elif operand == "global_smem":
            text = "0"
        elif operand in self.offsets:
            text = str(self.offsets[operand])
        else:
            raise UnknownError(operand)
        if kind in FLOATS:
            return f"{kind}_of((u{bits}){text})"
        return f"({'s' if kind[0] == 's' else 'u'}{bits})({text})"

    def store(self, operand: str, kind: str, value: str) -> str:
        """A register set to a value of a type; of a narrower type with its sign, if it has one."""
        if operand == "_":
            return ""
        register = re.fullmatch(r"%(rs|r|rd|f|fd)(\d+)", operand)
        if register is None:
            raise UnknownError(operand)
        value = f"of_{kind}({value})" if kind in FLOATS else f"({'s' if kind[0] == 's' else 'u'}{_bits(kind)})({value})"
        return f"t->{register[1]}[{register[2]}] = {value};"

    def address(self, operand: str, kind: str) -> str:
        base, _, offset = operand.strip("[] ").partition("+")
        return f"{self.value(base.strip(), kind)} + {offset.strip() or 0}"

    def predicate(self, operand: str) -> str:
        if not re.fullmatch(r"!?%p\d+", operand):
            raise UnknownError(operand)
        negated = operand.startswith("!")
        return f"{'!' if negated else ''}t->p[{operand.lstrip('!')[2:]}]"

    def line(self, number: int, line: str) -> str:
        line = line.partition("//")[0].strip()
        if label := re.fullmatch(r"(\$L_\w+):", line):
            return f"    {label[1].replace('$', '')}:;"
        if not line or re.match(r"\.(reg|loc|pragma)\b|\$L_\w+:$", line):
            return ""
        if block := re.fullmatch(r"\{ \.reg \.b32 tmp; (.*) \}", line):
            line = block[1].replace("tmp", "_")
        found = re.fullmatch(r"(?:@(!?%p\d+) )?([\w.:]+)\s*(.*?);", line)
        if found is None:
            raise UnknownError(line)
        guard, operation, operands = found.groups()
        operation = operation.replace("shared::cta", "shared")  # another name of the same
        try:
            if not KNOWN.fullmatch(operation):
                raise UnknownError(operation)
            statement = self.instruction(operation, _split(operands), number)
        except (UnknownError, ValueError, KeyError, IndexError) as error:
            raise UnknownError(f"{line} ({error!r})") from error
        if guard:
            if "return AT_" in statement:
                raise UnknownError(f"a barrier that some threads may not reach: {line}")
            statement = f"if ({self.predicate(guard)}) {{ {statement} }}"
        return f"        {statement}"

    def stop(self, why: str) -> str:
        self.stops += 1
        return f"t->at = {self.stops}; return {why}; case {self.stops}:;"

    def collective(self, values: Sequence[str], then: str) -> str:
        """Each thread of a warp shows its values; when all have, each goes on and can see the others'."""
        mine = "m->exchange[tid / WARP][m->collectives[tid] & 1][tid % WARP]"
        show = " ".join(f"{mine}[{i}] = {v};" for i, v in enumerate(values))
        return f"{show} {self.stop('AT_WARP')} m->collectives[tid]++; {{ {then} }}"

    def instruction(self, operation: str, operands: list[str], number: int) -> str:
        name, *modifiers = operation.split(".")
        kind = modifiers[-1] if modifiers else ""
        value, store = self.value, self.store
        if name == "ret":
            return "return EXIT;"
        if name == "bra":
            return f"goto {operands[0].replace('$', '')};"
        if operation == "bar.sync":
            if operands != ["0"]:
                raise UnknownError("another barrier than 0")
            return self.stop("AT_BARRIER")
        if name in ("ld", "st"):
            return self.memory(name, modifiers, operands, number)
        if name in ("atom", "red"):  # with the old value, and without
            return self.atomic(modifiers, operands if name == "atom" else ["_", *operands], number)
        if name in ("shfl", "redux", "ldmatrix", "stmatrix"):
            return self.of_warp(operation, operands, number)
        if kind == "pred":
            a, *b = (self.predicate(o) if "%p" in o else str(int(int(o) != 0)) for o in operands[1:])
            logic = {"and": f"{a} & {b[0]}", "or": f"{a} | {b[0]}"} if b else {"not": f"!{a}", "mov": a}
            return f"{self.predicate(operands[0])} = {logic[name]};"
        if name == "setp" and kind.endswith("x2"):  # the predicate of the lower halves comes first
            words, kind = [value(o, "u32") for o in operands[1:]], kind.removesuffix("x2")
            halves = ([f"{kind}_of((u16)({word} >> {shift}))" for word in words] for shift in (0, 16))
            places = map(self.predicate, operands[0].split("|"))
            found = (self.comparison(modifiers[0], kind, *half) for half in halves)
            return " ".join(f"{place} = {result};" for place, result in zip(places, found, strict=True))
        if name == "setp":
            result = self.comparison(modifiers[0], kind, *(value(o, kind) for o in operands[1:]))
            return f"{self.predicate(operands[0])} = {result};"
        if name == "selp":
            kind = kind.replace("f", "b")
            a, b = (value(o, kind) for o in operands[1:3])
            return store(operands[0], kind, f"{self.predicate(operands[3])} ? {a} : {b}")
        if name == "mov":
            return self.move(kind, operands)
        if name == "cvt":
            return self.conversion(modifiers, operands)
        if name == "abs" and kind in ("f16", "bf16", "f16x2", "bf16x2"):
            mask, bits = (0x7FFF7FFF, "b32") if kind.endswith("x2") else (0x7FFF, "b16")
            return store(operands[0], bits, f"{value(operands[1], bits)} & {mask}")
        if name == "mul" and kind.endswith("f16x2"):
            words, kind = [value(o, "u32") for o in operands[1:]], kind.removesuffix("x2")
            low, high = (" * ".join(f"{kind}_of((u16)({word} >> {n}))" for word in words) for n in (0, 16))
            return store(operands[0], "u32", f"(u32)of_{kind}({high}) << 16 | of_{kind}({low})")
        divisor = name in ("div", "rem") and kind not in FLOATS and value(operands[2], kind)
        checked = f'if (!{divisor}) FAIL("line {number}: a division by zero"); ' if divisor else ""
        return checked + self.arithmetic(operation, operands)

    def arithmetic(self, operation: str, operands: list[str]) -> str:
        parts = operation.split(".")
        kind = parts[-1]
        known = {p for p in parts[:-1] if p in ("ftz", "rn", "NaN", "approx")}
        name = ".".join(p for p in parts[:-1] if p not in known)
        flush = "ftz" if "ftz" in known and kind == "f32" else ""
        a, b, c = ([f"{flush}({self.value(o, kind)})" for o in operands[1:4]] + ["", ""])[:3]
        out = kind
        if kind in FLOATS:
            suffix = "" if kind == "f64" else "f"
            nan = "nan_" if "NaN" in known else ""
            expression = {
                "add": f"{a} + {b}", "sub": f"{a} - {b}", "mul": f"{a} * {b}", "div": f"{a} / {b}", "neg": f"-{a}",
                "abs": f"fabs{suffix}({a})", "fma": f"fma{suffix}({a}, {b}, {c})", "sqrt": f"sqrt{suffix}({a})",
                "min": f"min_{nan}{kind}({a}, {b})", "max": f"max_{nan}{kind}({a}, {b})",
                "ex2": f"approximately(exp2f({a}), of_f32({a}))", "rcp": f"coarse_reciprocal({a})",
            }[name]  # fmt: skip
            expression = f"{flush}({expression})"
        elif name in ARITHMETIC:
            # Signed overflow wraps on a GPU, so all but division is of unsigned numbers.
            if name not in ("div", "rem"):
                a, b, c = (self.value(o, f"u{_bits(kind)}") if o else "" for o in [*operands[1:], "", ""][:3])
            expression = re.sub(r"\b[abc]\b", lambda m: {"a": a, "b": b, "c": c}[m[0]], ARITHMETIC[name])
        elif name in ("mul.wide", "mad.wide"):
            out = f"{kind[0]}64"
            plus = f" + {self.value(operands[3], 'u64')}" if name == "mad.wide" else ""
            expression = f"(u64)(({out}){a} * ({out}){b}){plus}"
        elif operation in ("mul.hi.u32", "mul.hi.s32"):
            expression = f"({kind[0]}64){a} * {b} >> 32"
        elif name in ("min", "max"):
            expression = f"{a} {'<' if name == 'min' else '>'} {b} ? {a} : {b}"
        elif name in ("shl", "shr"):
            bits, b = _bits(kind), self.value(operands[2], "u32")
            beyond = f"{a} < 0 ? -1 : 0" if name == "shr" and kind[0] == "s" else "0"
            if name == "shl":
                a = self.value(operands[1], f"u{bits}")
            expression = f"{b} >= {bits} ? {beyond} : {a} {'<<' if name == 'shl' else '>>'} {b}"
        elif name == "bfe":  # of bits known here
            first, count = int(operands[2]), int(operands[3])
            if not 0 <= first < first + count <= 32:
                raise UnknownError("bits beyond the word")
            expression = f"({kind})({self.value(operands[1], 'u32')} << {32 - first - count}) >> {32 - count}"
        elif name == "popc":
            out, expression = "b32", f"__builtin_popcountll({a})"
        elif operation == "prmt.b32":
            expression = f"permute_bytes({a}, {b}, {c})"
        else:
            raise UnknownError(operation)
        return self.store(operands[0], out, expression)

    def comparison(self, relation: str, kind: str, a: str, b: str) -> str:
        unordered = f"({a} != {a} || {b} != {b})"
        if relation in ("nan", "num"):
            return unordered if relation == "nan" else f"!{unordered}"
        if kind in FLOATS and relation.endswith("u"):
            return f"{unordered} || {a} {COMPARE[relation[:-1]]} {b}"
        plain = f"{a} {COMPARE[relation]} {b}"
        return f"!{unordered} && {plain}" if kind in FLOATS and relation == "ne" else plain

    def move(self, kind: str, operands: list[str]) -> str:
        bits = _bits(kind)
        to, source = operands
        if to.startswith("{"):  # the low part first
            parts = _split(to.strip("{} "))
            width = bits // len(parts)
            return " ".join(
                self.store(part, f"u{width}", f"{self.value(source, f'u{bits}')} >> {i * width}")
                for i, part in enumerate(parts)
            )
        if source.startswith("{"):
            parts = _split(source.strip("{} "))
            width = bits // len(parts)
            value = " | ".join(f"(u{bits}){self.value(p, f'u{width}')} << {i * width}" for i, p in enumerate(parts))
            return self.store(to, f"u{bits}", value)
        return self.store(to, f"u{bits}", self.value(source, f"u{bits}"))

    def conversion(self, modifiers: list[str], operands: list[str]) -> str:
        to, source = modifiers[-2:]
        a = self.value(operands[1], source)
        if to in ("f16x2", "bf16x2"):  # the first goes into the upper half
            low = self.value(operands[2], source)
            return self.store(operands[0], "u32", f"(u32)of_{to[:-2]}({a}) << 16 | of_{to[:-2]}({low})")
        if source in FLOATS and to not in FLOATS:
            return self.store(operands[0], to, f"s32_of_float({a}, {'INT32_MIN' if source == 'f64' else 0})")
        if to in FLOATS:
            return self.store(operands[0], to, f"({'double' if to == 'f64' else 'float'}){a}")
        return self.store(operands[0], to, a)

    def memory(self, name: str, modifiers: list[str], operands: list[str], number: int) -> str:
        (space,) = {"global", "shared", "param"}.intersection(modifiers)
        kind = modifiers[-1]
        ckind = kind.replace("b", "u")
        place, data = operands if name == "st" else operands[::-1]
        values = _split(data.strip("{} "))
        if space == "param":
            return self.store(values[0], kind, f"*({ckind} *)(m->params + {self.address(place, 'u64')})")
        size = len(values) * _bits(kind) // 8
        place = self.address(place, "u64" if space == "global" else "u32")
        atomic = ", 0" if space == "global" else ""
        if name == "st":
            data = ", ".join(self.value(v, ckind) for v in values)
            where = f"{space}(m, {place}, {size}, data{atomic}, {number})"
            return f"{{ const {ckind} data[] = {{{data}}}; memcpy({where}, data, {size}); }}"
        moves = " ".join(self.store(v, kind, f"at[{i}]") for i, v in enumerate(values))
        return f"{{ const {ckind} *at = {space}(m, {place}, {size}, 0{atomic}, {number}); {moves} }}"

    def atomic(self, modifiers: list[str], operands: list[str], number: int) -> str:
        *_, order, what, kind = modifiers
        place, ckind = self.address(operands[1], "u64"), kind.replace("b", "u")
        meet = f"release_and_acquire(m, {place}, {number}); " if order == "acq_rel" else ""
        atomic = {"add": "ADD", "max": "MAX", "exch": "EXCHANGE"}[what]
        at = f"*({ckind} *)global(m, {place}, {_bits(kind) // 8}"
        new = {"add": "old + by", "max": "old > by ? old : by", "exch": "by"}[what]
        return (
            f"{{ const {ckind} old = {at}, 0, {atomic}, {number}), by = {self.value(operands[2], ckind)}, new = {new}; "
            f"{at}, &new, {atomic}, {number}) = new; {meet}{self.store(operands[0], kind, 'old')} }}"
        )

    def of_warp(self, operation: str, operands: list[str], number: int) -> str:
        seen = "m->exchange[tid / WARP][(m->collectives[tid] & 1) ^ 1]"
        if operation in ("shfl.sync.bfly.b32", "shfl.sync.idx.b32"):
            if operands[3:] != ["31", "-1"]:
                raise UnknownError("a shuffle of part of a warp")
            lane = {"bfly": "tid % WARP ^ ", "idx": ""}[operation.split(".")[2]] + self.value(operands[2], "u32")
            return self.collective(
                [self.value(operands[1], "u32")], self.store(operands[0], "u32", f"{seen}[({lane}) & 31][0]")
            )
        if operation == "redux.sync.add.s32":
            total = f"u32 sum = 0; for (int i = 0; i < WARP; i++) sum += {seen}[i][0];"
            part = f'if (~{self.value(operands[2], "u32")}) FAIL("line {number}: a sum over part of a warp");'
            both = self.collective([self.value(operands[1], "u32")], f"{total} {self.store(operands[0], 'u32', 'sum')}")
            return f"{part} {both}"
        at = f"shared(m, {seen}[8 * %d + %s][0] + %s, %d, %s, {number})"
        form = re.fullmatch(r"(st|ld)matrix.sync.aligned.m8n8.x([124])(.trans)?.shared.b16", operation)
        if form and form[1] == "st":
            values = _split(operands[1].strip("{} "))
            place = self.address(operands[0], "u32")
            then = " ".join(
                f"{{ const u32 data = {self.value(v, 'u32')};"
                f" memcpy({at % (i, 'tid % WARP / 4', '4 * (tid % 4)', 4, '&data')}, &data, 4); }}"
                for i, v in enumerate(values)
            )
        elif form:
            values = _split(operands[0].strip("{} "))
            place = self.address(operands[1], "u32")
            row, column = "tid % WARP / 4", "2 * (tid % 4)"

            def element(matrix: int, second: int) -> str:
                if form[3]:
                    return at % (matrix, f"{column} + {second}", f"2 * ({row})", 2, "0")
                return at % (matrix, row, f"2 * ({column} + {second})", 2, "0")

            then = " ".join(
                self.store(v, "u32", f"*(u16 *){element(i, 0)} | (u32)*(u16 *){element(i, 1)} << 16")
                for i, v in enumerate(values)
            )
        else:
            raise UnknownError(operation)
        if len(values) != int(form[2]):
            raise UnknownError(f"{len(values)} registers")
        # Of so many matrices, threads give the places of eight rows each; the others' are of no account.
        fault = f'FAIL("line {number}: a matrix row that is not aligned to 16 bytes");'
        aligned = f"if (tid % WARP < {8 * len(values)} && ({place}) % 16) {fault}"
        return f"{aligned} {self.collective([place], then)}"


class FaultError(RuntimeError):
    """What a kernel must not do."""


class Program:
    """A kernel's PTX as a function on the CPU."""

    def __init__(self, ptx: str, shared: int) -> None:
        self._translation = _Translation(ptx)
        self._ptx, self._shared = ptx, shared
        source = self._translation.source()
        directory = Path(triton.knobs.cache.dir) / "ptx"
        directory.mkdir(parents=True, exist_ok=True)
        key = "\n".join((source, platform.platform(), *OPTIONS))  # machines may share a home
        library = directory / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                c, so = Path(scratch) / "kernel.c", Path(scratch) / "kernel.so"
                c.write_text(source)
                subprocess.run(["cc", *OPTIONS, "-o", so, c, "-lm"], check=True)
                so.rename(library)  # at once, as other processes look for it
        self._launch = ctypes.CDLL(str(library)).launch

    def __call__(
        self, order: Sequence[int], arguments: Sequence[tuple[str, Any]], spans: Sequence[tuple[int, int]],
        *, backwards: bool = False,
    ) -> tuple[int, int]:  # fmt: skip
        """Launch; return how many bytes of global memory were loaded and stored, counting each once for a program.

        Args:
            order: in which the programs run, one after the other.
            arguments: (type, value), types by Triton's names.
            spans: the memory that it may touch, (first, end), in ascending order and apart.
            backwards: of a program's threads the last runs first.
        """
        t = self._translation
        params = bytearray(t.param_size)
        for (kind, value), (_, offset, size) in zip(arguments, t.params, strict=False):  # there are more, for Triton
            code = "<Q" if kind.startswith("*") else PACK[kind]
            assert struct.calcsize(code) == size, (kind, size)
            struct.pack_into(code, params, offset, value)
        flat = [n for span in spans for n in span]
        message, moved = ctypes.create_string_buffer(1000), (ctypes.c_int64 * 2)()
        status = self._launch(
            message, ctypes.c_int64(len(message)), ctypes.c_int64(len(order)), (ctypes.c_int32 * len(order))(*order),
            ctypes.c_int32(t.threads),
            (ctypes.c_ubyte * len(params)).from_buffer(params), ctypes.c_uint64(self._shared),
            (ctypes.c_uint64 * len(flat))(*flat), ctypes.c_int64(len(spans)), ctypes.c_int32(backwards), moved,
        )  # fmt: skip
        if status:
            text = message.value.decode()
            line = re.match(r"line (\d+)", text)
            body = self._ptx.split("\n{\n", 1)[1].split("\n")
            raise FaultError(f"{t.name}: {text}" + (f"\n{body[int(line[1]) - 1].strip()}" if line else ""))
        loaded, stored = moved
        return loaded, stored


def _spans(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """The memory of tensors, which may share it, in ascending order."""
    spans: list[tuple[int, int]] = []
    for first, end in sorted(
        (x.data_ptr(), x.data_ptr() + poisoned_interpreter._extent(x)) for x in tensors if x.numel()
    ):
        if spans and first < spans[-1][1]:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((first, end))
    return spans


class Launch:
    """``kernel[grid]``, as Triton has it, on CPU tensors; also on those that a launch knows by address alone."""

    _binders: ClassVar[dict[JITFunction[Any], Callable[..., Any]]] = {}
    _programs: ClassVar[dict[Hashable, tuple[Program, dict[str, str]]]] = {}
    _backend = make_backend(TARGET)
    moved: ClassVar[dict[str, tuple[int, int]]] = {}  # bytes loaded and stored, by the last launch of each kernel

    def __init__(self, fn: JITFunction[Any], grid: tuple[int, ...]) -> None:
        self.fn, self.grid = fn, grid

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self.fn not in self._binders:
            self._binders[self.fn] = create_function_from_signature(self.fn.signature, self.fn.params, self._backend)
        bound, specialization, options = self._binders[self.fn](*args, **kwargs, debug=False)
        key = self.fn, str(specialization), str(options)
        if key not in self._programs:
            options, signature, constexprs, attrs = self.fn._pack_args(
                self._backend, kwargs, bound, specialization, options
            )
            source = ASTSource(self.fn, signature, constexprs, attrs)
            compiled = triton.compile(source, target=TARGET, options=options.__dict__)
            self._programs[key] = Program(compiled.asm["ptx"], compiled.metadata.shared), signature
        program, signature = self._programs[key]
        tensors = [x for x in (*bound.values(), *poisoned_interpreter._state.by_address) if isinstance(x, torch.Tensor)]
        (programs,), order = self.grid, poisoned_interpreter._state.order
        self.moved[self.fn.__name__] = program(
            [order(i, programs) if order else i for i in range(programs)],
            [
                (kind, bound[name].data_ptr() if kind[0] == "*" else bound[name])
                for name, kind in signature.items() if kind != "constexpr"
            ],
            _spans(tensors),
            backwards=order is not None,
        )  # fmt: skip


def install() -> None:
    """Have Triton launch kernels so, for the process."""
    JITFunction.__getitem__ = lambda self, grid: Launch(self, grid)  # noqa: PLW0108 - a class would not be bound
    kernels.INTERPRETED = True  # so that CPU tensors are welcome
    poisoned_interpreter.Executor = Launch
