"""The experiments, each at a few steps; the judges, on results that are wrong; and the committed results."""

import json
import math
import re
import types
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import experiments
from benchmarks.experiments.common import Check, at_least, at_most

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "experiments"
SMALL = {  # scales at which a run takes a second or so
    "parallel-lines": 0.01,
    "vanishing": 0.01,
    "clipping": 0.004,
    "gaussians8": 0.003,
    "gaussians25": 0.003,
    "swissroll": 0.003,
    "momentum": 0.005,
    "critic-iterations": 0.015,
    "digits": 0.01,
}


@pytest.fixture(scope="module")
def pool():
    """A process like those that runs start, kernels not interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            yield pool


def committed(name):
    return json.loads((COMMITTED / f"{name}.json").read_text())


def failed(name, results):
    return [check.name for check in experiments.load(name).judge(results) if not check.passed]


def assert_png(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert 10_000 < path.stat().st_size < 200_000


@pytest.mark.parametrize("name", SMALL)
def test_a_short_run_depends_on_its_seed_alone_and_can_be_judged_and_drawn(name, pool, tmp_path):
    first, again, other = pool.map(experiments._one, [name] * 3, (0, 0, 1), [SMALL[name]] * 3)
    assert first == again
    assert first.keys() == other.keys()
    assert first | {"seed": 1} != other
    assert first["seed"] == 0
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    experiment = experiments.load(name)
    checks = experiment.judge([first, other])
    assert all(isinstance(check, Check) for check in checks)
    assert not all(check.passed for check in checks)  # so few steps show nothing
    experiment.draw([first, other], tmp_path / "picture.png")
    assert_png(tmp_path / "picture.png")


@pytest.mark.parametrize("name", SMALL)
def test_what_is_committed_passes_todays_checks(name):
    record, experiment = committed(name), experiments.load(name)
    checks = experiment.judge(record["results"])
    assert all(check.passed for check in checks)
    assert record["checks"] == experiments._rounded([asdict(check) for check in checks])
    assert record["title"] == experiment.TITLE
    assert record["experiment"] == name
    assert [result["seed"] for result in record["results"]] == [0, 1, 2]
    assert (COMMITTED / f"{name}.json").stat().st_size < 100_000
    assert_png(COMMITTED / f"{name}.png")


def test_readme_has_the_committed_figures():
    """Of each experiment the worst seed's, with its bound."""
    readme = (COMMITTED.parents[2] / "README.md").read_text()
    rows = re.findall(
        r"^\| \[`([\w-]+)`\]\(benchmarks/results/experiments/([\w-]+)\.png\) \|.*\| (.+) \|$", readme, re.M
    )
    assert [name for name, _, _ in rows] == [picture for _, picture, _ in rows] == list(SMALL)
    for name, _, measured in rows:
        values = {}
        for check in committed(name)["checks"]:
            key = re.sub(r"^seed \d: | \(clipped .*\)$", "", check["name"])
            values.setdefault((key, check["bound"]), []).append(check["value"])
        worst = {(f"{(min if bound[0] == '>' else max)(x):.3g}", bound) for (_, bound), x in values.items()}
        figures = re.findall(r"(\S+) \(([≥≤]) ([\d.]+)\)", measured)
        assert len(figures) >= 2
        for value, sign, bound in figures:
            assert (value, f"{'>=' if sign == '≥' else '<='} {bound}") in worst, (name, value)


@pytest.mark.parametrize(
    ("name", "keys", "value", "failing"),
    [
        ("parallel-lines", ("w", 2), 0.79, "exact W"),
        ("parallel-lines", ("js", 0), 0.7, "JS off zero"),
        ("parallel-lines", ("kl", 20), 30.0, "KL off zero"),
        ("parallel-lines", ("penalty", 12), 0.211, "penalised critic"),
        ("parallel-lines", ("penalty", 0), -1.0, "penalised critic"),
        ("parallel-lines", ("clip", 0), -0.64, "clipped critic"),
        ("parallel-lines", ("clip", 18), math.nan, "clipped critic"),
        ("vanishing", ("penalty", "least"), -1.0, "penalised critic"),
        ("vanishing", ("clip", "least"), -1.5, "clipped critic"),
        ("vanishing", ("clip", "largest"), 100.0, "clipped critic"),
        ("vanishing", ("gan", "mean"), -2e-3, "discriminator"),
        ("vanishing", ("penalty", "mean"), 1e-4, "the same over"),
        ("clipping", ("0.1", "growth"), 0.05, "c = 0.1: log10"),
        ("clipping", ("0.01", "growth"), -0.1, "c = 0.01: log10"),
        ("clipping", ("0.001", "growth"), -1.2, "c = 0.001: the same"),
        ("clipping", ("penalty", "growth"), 0.2, "penalty: the same"),
        ("clipping", ("penalty", "growth"), -0.2, "penalty: the same"),
        ("clipping", ("0.001", "saturation"), 0.5, "Metrics.saturation"),
        ("clipping", ("penalty", "near_largest"), 0.3, "penalty: share"),
        ("clipping", ("penalty", "kurtosis"), 1.8, "penalty: kurtosis"),
        ("gaussians8", ("penalty", "ratio"), 2.01, "seed {seed}: W1 over"),
        ("gaussians8", ("penalty", "covered"), 7, "seed {seed}: parts covered"),
        ("gaussians25", ("penalty", "near"), 0.4, "seed {seed}: share within"),
        ("swissroll", ("penalty", "ratio"), math.nan, "seed {seed}: W1 over"),
        ("momentum", ("rmsprop", "exact"), 5.0, "seed {seed}: exact W1 over RMSProp's, Adam with"),
        ("momentum", ("rmsprop-momentum", "exact"), 0.1, "seed {seed}: exact W1 over RMSProp's, RMSProp with"),
        ("momentum", ("adam", "exact"), 5.0, "seed {seed}: exact W1 over RMSProp's, Adam without"),
        ("critic-iterations", ("10", "spearman"), 0.79, "seed {seed}: Spearman's rho, 10"),
        ("critic-iterations", ("1", "spearman"), 0.9, "seed {seed}: Spearman's rho, 1 "),
        ("digits", ("penalty", "spearman"), 0.79, "seed {seed}: Spearman"),
        ("digits", ("penalty", "seen", -1, "exact"), 4.1, "seed {seed}: exact W1 at the end"),
    ],
)
@pytest.mark.parametrize("seed", [0, 2])
def test_a_judge_sees_what_is_wrong_in_any_seed(name, keys, value, failing, seed):
    results = deepcopy(committed(name)["results"])
    parent = results[seed]
    for key in keys[:-1]:
        parent = parent[key]
    parent[keys[-1]] = value
    failing = failing.format(seed=seed)
    assert any(each.startswith(failing) for each in failed(name, results)), failed(name, results)


def test_clipping_wants_weights_on_the_bound():
    results = deepcopy(committed("clipping")["results"])
    results[1]["0.1"] |= {"on_bound": 0.05, "saturation": 0.05}
    assert failed("clipping", results) == ["c = 0.1: share of weights on the bound"]


def test_checks():
    assert at_least("x", 1.0, 1) == Check("x", 1.0, ">= 1", True)
    assert at_most("x", 1.0, 1) == Check("x", 1.0, "<= 1", True)
    assert not at_least("x", 0.999, 1).passed
    assert not at_most("x", 1.001, 1).passed
    assert at_least("x", [3.0, 2.0], 1).value == 2
    assert at_most("x", [-3.0, -2.0], 1).value == -2
    for values in (math.nan, [math.nan, 1.0], [1.0, math.nan]):
        assert not at_least("x", values, 1).passed
        assert not at_most("x", values, 1).passed


def test_a_record_is_rounded_and_strict_json():
    raw = {"a": [1.23456789, math.inf, 3], "b": ("x", True, -math.inf, 1e-300)}
    assert experiments._rounded(raw) == {"a": [1.23457, "inf", 3], "b": ["x", True, "-inf", 1e-300]}


@pytest.mark.parametrize("passed", [True, False])
def test_a_run_writes_prints_and_says_whether_all_passed(passed, tmp_path, monkeypatch, capsys, pool):
    seen = []
    checks = [Check("first", 0.5, "<= 1", True), Check("second", 2.0, ">= 1", passed)]
    stand_in = types.SimpleNamespace(
        TITLE="A title", judge=lambda results: checks,
        draw=lambda results, path: (seen.append(results), path.write_bytes(b"picture")),
    )  # fmt: skip
    monkeypatch.setattr(experiments, "load", lambda name: stand_in)  # not in the processes that are started
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out = tmp_path / "new" / "directory"
    assert experiments.run("clipping", seeds=(5,), out=out, scale=0.002) is passed
    record = json.loads((out / "clipping.json").read_text())
    assert record.keys() == {"experiment", "title", "versions", "seconds", "results", "checks"}
    assert record["results"] == seen[0] == [pool.submit(experiments._one, "clipping", 5, 0.002).result()]
    assert record["checks"][1] == {"name": "second", "value": 2.0, "bound": ">= 1", "passed": passed}
    assert (out / "clipping.png").read_bytes() == b"picture"
    printed = capsys.readouterr().out
    assert "A title" in printed
    assert ("failed" in printed) is not passed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "clippings"}, "^name: expected one of parallel-lines, .*, got 'clippings'"),
        ({"seeds": ()}, "^seeds: expected at least one, got none"),
        ({"scale": 0.0}, "^scale: expected a number above 0, got 0.0"),
        ({"scale": math.nan}, "^scale: expected a number above 0, got nan"),
        ({"scale": math.inf}, "^scale: expected a number above 0, got inf"),
    ],
)
def test_a_run_that_cannot_be_writes_nothing(change, message, tmp_path):
    arguments = {"name": "clipping", "seeds": (0,), "scale": 1.0} | change
    with pytest.raises(ValueError, match=message):
        experiments.run(out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_the_command_runs_one_or_all_and_its_status_is_the_verdict(tmp_path, monkeypatch):
    calls = []

    def run(name, *, seeds, out):
        calls.append((name, list(seeds), out))
        return name != "momentum"

    monkeypatch.setattr(experiments, "run", run)
    assert command.main(["experiment", "clipping", "--seeds", "2", "--seed", "7", "--out", str(tmp_path)]) == 0
    assert command.main(["experiment", "momentum"]) == 1
    default = ([0, 1, 2], Path("runs") / "experiments")
    assert calls == [("clipping", [7, 8], tmp_path), ("momentum", *default)]
    assert command.main(["experiment", "all"]) == 1
    assert [call[0] for call in calls[2:]] == list(experiments.EXPERIMENTS)


@pytest.mark.parametrize("arguments", [[], ["clippings"], ["clipping", "--seeds", "0"]])
def test_the_command_refuses_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["experiment", *arguments])
    assert exit.value.code == 2
    assert "expected" in (error := capsys.readouterr().err) or "invalid choice" in error


def test_the_command_lists_them(monkeypatch, capsys):
    monkeypatch.setattr(experiments, "EXPERIMENTS", {name: experiments.EXPERIMENTS[name] for name in SMALL})
    assert command.main(["experiment", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SMALL)
    assert all(line.endswith(experiments.load(name).TITLE) for name, line in zip(SMALL, lines, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_full_run_passes(name, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert experiments.run(name, out=tmp_path)
