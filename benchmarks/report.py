"""Make README's tables and pictures of the benchmarks' records: python -m benchmarks report [F.json ...] [--out DIR]

Without names the committed records are read, a GPU's first. Records of critic steps give the tables between README's
markers and a picture of their ratios; records of ops give a picture of their share of the copy bandwidth. Whatever was
slower than a peer, or left out, is shown as it is.
What a GPU's record falls short of is printed: kernels below SHARE of a copy's bandwidth, and steps below TARGETS.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.implementations import BASE, IMPLEMENTATIONS, TEXTBOOKS
from fastwgan.cli.common import Parser

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
RECORDS = ("gpu-steps", "gpu-steps-compiled", "cpu-steps", "cpu-ops")  # that README and the pictures are made from
CAPTURED = (  # on a GPU: a replayed graph to a step
    "graphed", "compiled-graphed", "compiled-reduce-overhead", "fastwgan-graphed", "fastwgan-compiled",
)  # fmt: skip
MARK, MARKED = "†", "†: networks and data channels last, which was faster than contiguous."
REASON = 80  # characters of one that something was left out for
COLUMNS = 5  # of a picture
SHARE = 0.9  # of the copy bandwidth, wanted of our kernels on arrays several times as large as the cache
TARGETS = {"mlp": (8.0, 1.2), "dcgan": (3.0, 1.1)}  # our step over the textbook's, and over the best of the others

Record = dict[str, Any]


def read(path: Path) -> Record:
    """Return a record of the benchmarks.

    Raises:
        ValueError: it is none.
    """
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(record, dict) or "environment" not in record or not {"critic_step", "ops"} & record.keys():
        raise ValueError(f"{path}: not written by python -m benchmarks")
    return record


def described(environment: Record) -> str:
    """What the figures were measured on, in a line."""
    e = environment
    parts = [e["device"]]
    if e["type"] == "cuda":
        allowed = [name for name, on in e["tf32"].items() if on]
        parts += [
            f"driver {e['driver']}",
            f"CUDA {e['cuda']}",
            f"TF32 {'in ' + ', '.join(allowed) if allowed else 'off'}",
        ]
        parts += [f"{clock:.0f} MHz" for clock in [(e.get("clocks") or {}).get("clocks.sm")] if clock]
    else:
        parts.append(f"{e['threads']} threads")
    parts += [f"torch {e['torch']}", f"triton {e['triton']}", f"Python {e['python']}"]
    parts.append(f"commit {e['commit']}" if e["commit"] else f"fastwgan {e['fastwgan']}")
    return ", ".join([*parts, e["date"]])


def title(result: Record) -> str:
    """Return what was measured, in a few words."""
    return f"{result['workload']}, {result['precision']}, batch {result['batch']}"


def place(*names: str) -> str:
    """Return a workload, a precision and a layout in a line, which names a layout that is not the usual one."""
    return " ".join(name for name in names if name != "contiguous")


def faster_layouts(record: Record) -> list[Record]:
    """Return a result to each workload and precision, with each implementation's figures in its faster layout."""
    found: dict[tuple[str, str], Record] = {}
    for result in record["critic_step"]:
        key = (result["workload"], result["precision"])
        done = found.setdefault(key, result | {"implementations": {}})["implementations"]
        for name, figures in result["implementations"].items():
            if name not in done or figures["step_ms"]["q50"] < done[name]["step_ms"]["q50"]:
                done[name] = figures | {"layout": result.get("layout", "contiguous")}
    return list(found.values())


def _names(record: Record) -> list[str]:
    """The implementations that have figures, in the order they are run in."""
    names = dict.fromkeys(name for result in record["critic_step"] for name in result["implementations"])
    return sorted(names, key=[*IMPLEMENTATIONS, *names].index)


def base(record: Record) -> str:
    """Return what a record's ratios are to: the detached textbook, or the only one that older records have."""
    return BASE if BASE in _names(record) else "textbook"


def _ratio(done: Record, to: str, name: str) -> float | None:
    """Return how many times as fast an implementation is as another, if both have figures."""
    if not {to, name} <= done.keys():
        return None
    ratio: float = done[to]["step_ms"]["q50"] / done[name]["step_ms"]["q50"]
    return round(ratio, 3)  # as in a record


def table(record: Record) -> str:
    """Return a record's steps as Markdown, with what they were measured on above and what was left out below."""
    rows = gpu_rows(record) if record["environment"]["type"] == "cuda" else cpu_rows(record)
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    lines = [f"{described(record['environment'])}:", "", head, "|---" * len(rows[0]) + "|", *body]
    lines += [line for mark in marked(rows) for line in ("", mark)]
    where: dict[tuple[str, str], list[str]] = {}
    for result in record["critic_step"]:
        for name, why in result["dropped"].items():
            short = why if len(why) <= REASON else f"{why[:REASON].rsplit(' ', 1)[0]} ..."
            where.setdefault((name, short), []).append(
                place(result["workload"], result["precision"], result.get("layout", "contiguous"))
            )
    names: dict[tuple[str, str], list[str]] = {}
    for (name, why), places in where.items():
        everywhere = len(places) == len(record["critic_step"])
        names.setdefault(("" if everywhere else f" ({', '.join(places)})", why), []).append(name)
    lines += [line for (of, why), left in names.items() for line in ("", f"Left out{of}: {', '.join(left)}: {why}")]
    lines += [line for left in record["left_out"] for line in ("", f"Left out: {left}")]
    return "\n".join(lines)


def cpu_rows(record: Record) -> list[list[str]]:
    """Return the milliseconds of the textbook that ratios are to, and how many times as fast each other one is."""
    to = base(record)
    names = [name for name in _names(record) if name != to]
    rows = [["critic step", f"{to}, ms", *names]]
    for result in faster_layouts(record):
        done = result["implementations"]
        ratios = [(name, _ratio(done, to, name)) for name in names]
        cells = ("-" if ratio is None else f"{ratio:.2f}{_mark(done[name])}" for name, ratio in ratios)
        rows.append([title(result), _ms(done.get(to)), *cells])
    return rows


def gpu_rows(record: Record) -> list[list[str]]:
    """Return each step's milliseconds: of implementations that launch op by op, then of those that replay a CUDA graph.

    The fastest peer's time over ours follows each of the two groups; above 1 ours is faster.
    """
    present = {name for result in record["critic_step"] for name in result["implementations"]}
    forms = [[name for name in IMPLEMENTATIONS if name in present and (name in CAPTURED) == form] for form in (0, 1)]
    rows = [["critic step, ms", *(cell for names in forms for cell in (*names, "peer / ours"))]]
    for result in faster_layouts(record):
        done = result["implementations"]
        row = [title(result)]
        for names in forms:
            ratio = advantage({name: done[name]["step_ms"]["q50"] for name in names if name in done})
            row += [*(_ms(done.get(name)) for name in names), "-" if ratio is None else f"{ratio:.2f}"]
        rows.append(row)
    return rows


def marked(rows: list[list[str]]) -> list[str]:
    """Return the meaning of the mark, if a table has it."""
    return [MARKED] if any(MARK in cell for row in rows for cell in row) else []


def quotes(record: Record) -> list[str]:
    """Return a line for each workload and precision: our best, and plain PyTorch's, each in its faster layout."""
    found = []
    for result in faster_layouts(record):
        ours, peer = (fastest(result, of_ours=of_ours) for of_ours in (True, False))
        if ours is not None and peer is not None:
            ratio = f"{peer[0] / ours[0]:.2f} times as fast as the best plain PyTorch"
            found.append(f"{title(result)}: {told(ours)} is {ratio}, {told(peer)}")
    return found


def fastest(result: Record, *, of_ours: bool) -> tuple[float, str] | None:
    """Return milliseconds and name of the fastest of ours, or of plain PyTorch's; each in its faster layout already."""
    sides = [
        (figures["step_ms"]["q50"], place(name, figures["layout"]))
        for name, figures in result["implementations"].items() if name.startswith("fastwgan") == of_ours
    ]  # fmt: skip
    return min(sides, default=None)


def told(one: tuple[float, str]) -> str:
    """Return milliseconds and a name in words."""
    return f"{one[1]} ({one[0]:.3g} ms)"


def advantage(ms: dict[str, float]) -> float | None:
    """Return the fastest peer's milliseconds over our fastest, or None where one of the two is missing."""
    ours = [value for name, value in ms.items() if name.startswith("fastwgan")]
    peers = [value for name, value in ms.items() if not name.startswith("fastwgan")]
    return min(peers) / min(ours) if ours and peers else None


def _ms(figures: Record | None) -> str:
    return "-" if figures is None else f"{figures['step_ms']['q50']:.3g}{_mark(figures)}"


def _mark(figures: Record) -> str:
    return MARK if figures["layout"] == "channels_last" else ""


def into(readme: str, tables: list[str]) -> str:
    """README with the tables between its markers, in place of what was there.

    Raises:
        ValueError: it does not have both markers, once each and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ValueError(f"README.md: expected {BEGIN} and then {END}, once each")
    return f"{before}{BEGIN}\n\n{chr(10).join([t + chr(10) for t in tables])}\n{END}{after}"


def draw_ratios(record: Record, path: Path) -> None:
    """Bars: the textbook's time over each implementation's, by workload."""
    from matplotlib.figure import Figure

    gpu, to, results = record["environment"]["type"] == "cuda", base(record), faster_layouts(record)
    names = [name for name in _names(record) if name != to]
    figure = Figure(figsize=(10, 1.2 + 0.22 * (len(names) + 1) * len(results)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        places, ratios = [], []
        for j, result in enumerate(results):
            ratio = _ratio(result["implementations"], to, name)
            if ratio is not None:
                places.append(j + i * height)
                ratios.append(ratio)
        axes.bar_label(axes.barh(places, ratios, 0.9 * height, label=name), fmt="%.2f", fontsize=7, padding=2)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([j + 0.4 - height / 2 for j in range(len(results))])
    axes.set_yticklabels([f"{result['workload']}\n{result['precision']}" for result in results])
    axes.invert_yaxis()
    axes.set_xlabel(f"{to}'s time / its time, one critic step{', calls back to back' if gpu else ''}")
    axes.set_title(described(record["environment"]), fontsize=7)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=120)


def draw_bandwidth(record: Record, path: Path) -> None:
    """Lines: each op's share of the copy bandwidth by size; an update's in the fewest tensors and in the most."""
    from matplotlib.figure import Figure

    lines: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
    for result in record["ops"]:
        for name, figures in result["implementations"].items():
            lines.setdefault((result["op"], name, result["tensors"]), []).append((result["elements"], figures["share"]))
    ops = list(dict.fromkeys(op for op, _, _ in lines))
    columns = max(1, min(COLUMNS, len(ops)))
    rows = max(1, -(-len(ops) // columns))
    figure = Figure(figsize=(4 * columns, 3.6 * rows), layout="constrained")
    places = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for _, name, _ in lines))}
    for axes in places[len(ops) :]:
        axes.remove()
    for axes, op in zip(places, ops, strict=False):
        own = {(name, tensors): points for (of, name, tensors), points in lines.items() if of == op}
        several = sorted({tensors for _, tensors in own})
        for name in dict.fromkeys(name for name, _ in own):
            for tensors, style in zip((several[0], several[-1])[: len(several)], ("-", ":"), strict=False):
                points = sorted(own.get((name, tensors), []))
                label = f"{name}, in {tensors}" if len(several) > 1 else name
                if points:
                    axes.plot(*zip(*points, strict=True), style, marker=".", color=colours[name], label=label)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=op)
        axes.legend(fontsize=6)
    figure.supxlabel("elements", fontsize=9)
    figure.supylabel("share of the copy bandwidth", fontsize=9)
    figure.suptitle(f"{described(record['environment'])}; a copy moves {record['copy_gb_s']} GB/s", fontsize=7)
    figure.savefig(path, dpi=120)


def shortfalls(record: Record) -> list[str]:
    """What a GPU's record falls short of, a line each, and with each step how far it is from its networks' own time."""
    if record["environment"]["type"] != "cuda":
        return []
    found = []
    cache = 2**20 * record["environment"]["chip"]["l2_mib"]
    for result in record.get("ops", []):
        ours = result["implementations"].get("fastwgan")
        case = f"{result['op']}, {result['elements']} elements in {result['tensors']}"
        if ours is None:
            found.append(f"{case}: {result['dropped'].get('fastwgan', result['dropped'])}")
        elif result["bytes"] > 4 * cache and ours["share"] < SHARE:
            best = max((f["share"], name) for name, f in result["implementations"].items())
            found.append(f"{case}: {ours['share']:.0%} of a copy; the best is {best[1]}, {best[0]:.0%}")
    for result in faster_layouts(record) if "critic_step" in record else []:
        to = base(record)
        done = {name: figures["step_ms"]["q50"] for name, figures in result["implementations"].items()}
        ours = {name: ms for name, ms in done.items() if name.startswith("fastwgan")}
        peers = {name: ms for name, ms in done.items() if name not in ours and name not in TEXTBOOKS}
        case = f"{result['workload']} {result['precision']}"
        if not ours:
            found.append(f"{case}: no figures of ours: {result['dropped']}")
            continue
        best = min(ours, key=lambda name: ours[name])
        figures = result["implementations"][best]
        network = [f["network_ms"] for f in result["implementations"].values() if f["network_ms"]]
        floor = f"; {figures['device_ms']['q50'] / min(network):.2f} times its networks' time" if network else ""
        targets = next((t for prefix, t in TARGETS.items() if case.startswith(prefix)), (0.0, 1.0))
        for name, target in zip((to, min(peers, key=lambda n: peers[n], default="")), targets, strict=True):
            if name in done and done[name] / ours[best] < target:
                ratio = f"{done[name] / ours[best]:.2f} times as fast as {name}, wanted {target:g}"
                found.append(f"{case}: {best} is {ratio}{floor}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks report", description="README's table and pictures.")
    parser.add_argument(
        "records", type=Path, nargs="*", metavar="F.json", help="of python -m benchmarks; default: committed"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the pictures")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args(argv)
    try:
        records = {path: read(path) for path in args.records or [RESULTS / f"{name}.json" for name in RECORDS]}
        tables = [table(record) for record in records.values() if "critic_step" in record]
        if tables:
            args.readme.write_text(into(args.readme.read_text(), tables))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    for path, record in records.items():
        if "critic_step" in record:
            draw_ratios(record, args.out / f"{path.stem}-ratios.png")
        if "ops" in record:
            draw_bandwidth(record, args.out / f"{path.stem}-bandwidth.png")
        for line in shortfalls(record):
            print(f"{path.stem}: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
