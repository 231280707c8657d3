"""python -m benchmarks end to end, what it drops and why, and the report that is made of its record."""

import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import pytest
import torch
from cases import tiny
from torch import nn

from benchmarks import __main__ as command
from benchmarks import ops, parallel, report, steps, summary, timing, tune
from benchmarks.implementations import IMPLEMENTATIONS, TEXTBOOKS, Setting, Step, _captured, foreach, textbook
from benchmarks.op_cases import OPS, Case
from benchmarks.record import environment
from benchmarks.run import _step_table, layouts_of
from benchmarks.steps import Schedule
from benchmarks.workloads import WORKLOADS, Workload
from fastwgan import GradientPenalty, WeightClip

CPU = torch.device("cpu")
# One thread: where the machine is busy, several wait for each other.
ENV = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
QUANTILES = ["q05", "q25", "q50", "q75", "q95", "samples"]


@pytest.fixture(autouse=True)
def _tiny_workloads(monkeypatch):
    for name, constraint in (("tiny-clip", WeightClip()), ("tiny-penalty", GradientPenalty())):
        monkeypatch.setitem(WORKLOADS, name, tiny(constraint))


def test_command_end_to_end(tmp_path):
    """As a user runs it, in a process of its own: table, record, and what cannot run here with its reason."""
    path = tmp_path / "cpu.json"
    chosen = ["foreach", "graphed", "fastwgan"]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "steps", "--device", "cpu", "--workload", "mlp-penalty", "mlp-clip",
         "--implementation", *chosen, "--rounds", "6", "--json", str(path)],
        cwd=report.ROOT, env=ENV, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "mlp-penalty, float32, batch 64" in run.stdout
    assert "dropped: graphed: RuntimeError: a CUDA graph needs a GPU" in run.stdout
    assert "mlp-clip, float32, batch 64: fastwgan (" in run.stdout.splitlines()[-1]
    record = json.loads(path.read_text())
    environment = record["environment"]
    assert environment["torch"] == torch.__version__
    assert {"device", "driver", "cuda", "triton", "python", "commit", "date", "tf32", "threads"} <= environment.keys()
    assert record["settings"] == {"rounds": 6, "minutes": 8.0}
    assert record["left_out"] == []
    assert [(r["workload"], r["precision"], r["layout"]) for r in record["critic_step"]] == [
        ("mlp-penalty", "float32", "contiguous"), ("mlp-clip", "float32", "contiguous"),
    ]  # fmt: skip
    for result in record["critic_step"]:
        assert list(result["implementations"]) == ["textbook", "textbook-detached", "foreach", "fastwgan"]
        assert list(result["dropped"]) == ["graphed"]
        for figures in result["implementations"].values():
            step = figures["step_ms"]
            assert list(step) == QUANTILES
            assert step["samples"] == 6
            assert 0 < step["q05"] <= step["q50"] <= step["q95"]
            detached = result["implementations"]["textbook-detached"]["step_ms"]["q50"]
            assert figures["step_ratio"] == pytest.approx(detached / step["q50"], abs=1e-3)
            assert figures["device_ms"] is figures["host_ms"] is figures["kernels"] is figures["peak_mib"] is None


BAD = [
    (["steps", "--workload", "mnist"], "argument --workload: invalid choice: 'mnist'"),
    (["steps", "--implementation", "magic"], "argument --implementation: invalid choice: 'magic'"),
    (["steps", "--precision", "float16"], "argument --precision: invalid choice: 'float16'"),
    (["steps", "--layout", "rows"], "argument --layout: invalid choice: 'rows'"),
    (
        ["steps", "--workload", "mlp-clip", "--layout", "channels_last", "--device", "cpu"],
        "--layout: expected contiguous for mlp-clip, got channels_last",
    ),
    (["steps", "--workload", "mlp-clip", "--networks", "a:b"], "argument --networks: not allowed with argument --work"),
    (["ops", "--workload", "mlp-clip"], "unrecognized arguments: --workload mlp-clip"),
    (["gpu", "kernel"], "argument call: invalid choice: 'kernel'"),
    (["tune", "--out", "x", "--kernels", "sort"], "argument --kernels: invalid choice: 'sort'"),
    (["report", "--pictures"], "unrecognized arguments: --pictures"),
    (["experiment"], "NAME: expected all or one of parallel-lines, "),
    (["bench"], "argument COMMAND: invalid choice: 'bench'"),
    ([], "the following arguments are required: COMMAND"),
    *(
        ([name, *options], problem)
        for name in ("steps", "ops")
        for options, problem in (
            (["--minutes", "0"], "argument --minutes: expected a number above 0, got '0'"),
            (["--rounds", "0"], "argument --rounds: expected an int from 1"),
            (["--json", "no/such/f.json"], "--json: no/such is no directory"),
            (["--device", "tpu"], "--device: tpu cannot be used"),
        )
    ),
]


@pytest.mark.parametrize(("options", "problem"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_arguments(options, problem, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(options)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("python -m benchmarks")
    assert problem in message
    assert message.count("\n") == 1


def test_ctrl_c_ends_it_with_a_word(monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_ops", interrupted)
    assert command.main(["ops", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# The check


def step(name, precision="float32", rounds=5, minutes=1.0, implementations=("foreach",), layout="contiguous"):
    schedule = Schedule(minutes, 1, rounds)
    checked = steps.check(name, implementations, CPU, schedule, layout)
    return steps.critic_step(name, precision, checked, CPU, schedule, layout=layout)


class _OneEps(Setting):
    def eps(self):
        return super().eps()[:1].expand(len(self.real))


class _StaleLatents(Setting):
    def latents(self):
        if not hasattr(self, "kept"):
            self.kept = super().latents()
        return self.kept


class _Unclamped(Setting):
    def clamp_(self):
        pass


class _HalfLoss(Setting):
    def loss(self, fake):
        return 0.9 * self.critic(fake).mean() - self.critic(self.real).mean()


def faulty(kind, setting):
    return foreach(kind(**vars(setting)))


def test_all_that_is_right_is_kept():
    for name in ("tiny-clip", "tiny-penalty"):
        result = step(name, implementations=("foreach", "fastwgan"))
        assert result["dropped"] == {}
        assert list(result["implementations"]) == [*TEXTBOOKS, "foreach", "fastwgan"]


@pytest.mark.parametrize(
    ("workload", "fault"),
    [
        ("tiny-penalty", _OneEps),
        ("tiny-penalty", _StaleLatents),
        ("tiny-clip", _StaleLatents),
        ("tiny-clip", _Unclamped),
        ("tiny-clip", _HalfLoss),
    ],
)
def test_planted_faults_are_dropped_with_their_error(workload, fault, monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "foreach", partial(faulty, fault))
    result = step(workload)
    assert list(result["implementations"]) == [*TEXTBOOKS]
    assert "from the float64 textbook's" in result["dropped"]["foreach"]


@pytest.mark.parametrize("weight", [9.0, 5.0])
def test_another_penalty_weight_is_dropped(weight, monkeypatch):
    def other(setting):
        setting.workload = tiny(GradientPenalty(weight))
        return foreach(setting)

    monkeypatch.setitem(IMPLEMENTATIONS, "foreach", other)
    assert "where" in step("tiny-penalty")["dropped"]["foreach"]


def test_nan_is_dropped(monkeypatch):
    def nan(setting):
        return Step(lambda: [p.data.fill_(float("nan")) for p in setting.critic.parameters()])

    monkeypatch.setitem(IMPLEMENTATIONS, "foreach", nan)
    assert "are nan from" in step("tiny-clip")["dropped"]["foreach"]


def test_bfloat16_is_timed_and_checked_in_float32():
    result = step("tiny-penalty", "bfloat16")
    assert list(result["implementations"]) == [*TEXTBOOKS, "foreach"]


def test_tf32_is_a_precision_of_its_own_and_is_put_back(monkeypatch):
    seen = []

    def watched(setting):
        seen.append((torch.get_float32_matmul_precision(), setting.real.dtype))
        return foreach(setting)

    monkeypatch.setitem(IMPLEMENTATIONS, "foreach", watched)
    for precision in ("tf32", "float32"):
        result = step("tiny-penalty", precision)
        assert result["precision"] == precision
        assert result["dropped"] == {}
    assert seen == [(how, torch.float32) for how in ("highest", "high", "highest", "highest")], "a check, then times"
    assert torch.get_float32_matmul_precision() == "highest"


def test_textbooks_differ_in_the_generators_graph_alone():
    """Generator weights get gradients from the authors' form; both come to the same critic, bit for bit."""
    critics = []
    for name, has_graph in (("textbook", True), ("textbook-detached", False)):
        made = steps.setting(WORKLOADS["tiny-penalty"], CPU, torch.float32, steps=3)
        taken = IMPLEMENTATIONS[name](made)
        for _ in range(3):
            taken.take()
        assert any(p.grad is not None for p in made.generator.parameters()) == has_graph
        critics.append(steps._weights(made))
    assert torch.equal(*critics)


def images(constraint):
    """Return a workload of convolutions that takes no time."""
    return Workload(
        generator=lambda width: nn.Sequential(
            nn.Linear(8, 16 * width), nn.Unflatten(1, (width, 4, 4)), nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh()
        ),
        critic=lambda width: nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, 1, 4), nn.Flatten(0)
        ),
        latent=8, shape=(3, 8, 8), constraint=constraint, batch=6, width=16,
    )  # fmt: skip


@pytest.mark.parametrize("constraint", [WeightClip(), GradientPenalty()], ids=["clip", "penalty"])
def test_both_layouts_come_to_the_same(constraint, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "tiny-images", images(constraint))
    result = step("tiny-images", implementations=("foreach", "fastwgan"), layout="channels_last")
    assert result["dropped"] == {}
    assert result["layout"] == "channels_last"
    made = steps.setting(WORKLOADS["tiny-images"], CPU, torch.float32, layout="channels_last")
    assert made.real.is_contiguous(memory_format=torch.channels_last)
    assert made.fakes().is_contiguous(memory_format=torch.channels_last)
    assert made.critic[0].weight.is_contiguous(memory_format=torch.channels_last)
    contiguous = steps.setting(WORKLOADS["tiny-images"], CPU, torch.float32)
    assert contiguous.real.is_contiguous()
    assert torch.equal(made.real, contiguous.real)


def test_ours_is_told_of_channels_last_alone(monkeypatch):
    options = []

    def trainer(*args, **given):
        options.append(given.get("memory_format", "not given"))
        raise RuntimeError("that will do")

    monkeypatch.setattr("benchmarks.implementations.Trainer", trainer)
    monkeypatch.setitem(WORKLOADS, "tiny-images", images(WeightClip()))
    for layout in steps.LAYOUTS:
        assert "that will do" in step("tiny-images", implementations=["fastwgan"], layout=layout)["dropped"]["fastwgan"]
    assert options == ["not given", torch.channels_last]


def test_layouts_by_default():
    gpu = torch.device("cuda")
    assert layouts_of("dcgan-clip", None, CPU) == ["contiguous"]
    assert layouts_of("dcgan-clip", None, gpu) == ["contiguous", "channels_last"]
    assert layouts_of("mlp-clip", None, gpu) == layouts_of("mlp-clip", [*steps.LAYOUTS], gpu) == ["contiguous"]
    assert layouts_of("dcgan-clip", ["channels_last"], CPU) == ["channels_last"]


@pytest.mark.parametrize("name", ["graphed", "compiled-graphed", "compiled-reduce-overhead"])
def test_a_cpu_has_no_cuda_graphs(name):
    with pytest.raises(RuntimeError, match="^a CUDA graph needs a GPU$"):
        IMPLEMENTATIONS[name](steps.setting(WORKLOADS["tiny-clip"], CPU, torch.float32))


def test_a_step_is_warmed_up_captured_and_replayed(monkeypatch):
    """Stand-ins for a GPU tell what is called when, and on which stream."""
    calls, capture = [], []

    @contextmanager
    def capturing(graph, stream):
        capture.append(graph)
        calls.append("begin")
        yield
        calls.append("end")

    side = mock.MagicMock()
    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: mock.MagicMock())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: calls.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    taken = _captured(lambda: calls.append("step"), lambda: calls.append("prepare"))
    assert taken.is_graph
    for _ in range(6):
        taken.take()
    assert calls == [*3 * ["prepare", "step"], "prepare", "begin", "step", "end", "replay", "replay", "replay"]
    assert side.wait_stream.call_count == 3
    assert len(capture) == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("layout", steps.LAYOUTS)
@pytest.mark.parametrize("constraint", [WeightClip(), GradientPenalty()], ids=["clip", "penalty"])
def test_peers_that_replay_graphs_take_the_same_step(constraint, layout, monkeypatch):
    monkeypatch.setitem(WORKLOADS, "tiny-images", images(constraint))
    names = ["graphed", "compiled-graphed", "compiled-reduce-overhead"]
    checked = steps.check("tiny-images", names, torch.device("cuda", 0), Schedule(10.0, 1, 5), layout)
    assert {name: why for name, why in checked.items() if isinstance(why, str)} == {}


def test_time_that_is_over_is_said():
    result = step("tiny-clip", rounds=100, minutes=1e-9)
    assert result["dropped"] == {"foreach": "left out for time"}
    assert result["implementations"]["textbook"]["step_ms"]["samples"] == 5


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["mlp-clip", "mlp-penalty", "tabular-penalty", "dcgan-clip", "resnet-penalty"])
def test_compiled_peers_take_the_same_step(name, monkeypatch):
    """At a tenth of the width: what compiles and comes out the same does not depend on it."""
    whole = WORKLOADS[name]
    narrow = Workload(**(vars(whole) | {"width": 8, "batch": min(whole.batch, 10)}))
    monkeypatch.setitem(WORKLOADS, name, narrow)
    result = step(name, minutes=60.0, implementations=("compiled", "compiled-step"))
    assert result["dropped"] == {}
    assert list(result["implementations"]) == [*TEXTBOOKS, "compiled", "compiled-step"]


@pytest.mark.parametrize("name", [name for name in WORKLOADS if not name.startswith("tiny")])
def test_every_workload_fits_together(name):
    """Generator, critic and the shape of a sample; and the textbook can take a step."""
    workload = WORKLOADS[name]
    narrow = Workload(**(vars(workload) | {"width": 8, "batch": 2}))
    made = steps.setting(narrow, CPU, torch.float32)
    assert made.fakes().shape == made.real.shape
    before = [p.clone() for p in made.critic.parameters()]
    textbook(made).take()
    assert any(not torch.equal(p, q) for p, q in zip(made.critic.parameters(), before, strict=True))


def test_figures_of_a_gpu(monkeypatch):
    """By stand-ins for what needs one: which step is captured, what stands for one that is not, and the table."""

    def capture(call, random):
        if random:
            raise RuntimeError("it waits")
        return call

    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(timing, "time_of", lambda call, *_: 1.0)
    monkeypatch.setattr(timing, "host_time", lambda call, *_: 0.5)
    gpu = SimpleNamespace(type="cuda")
    made = {
        "textbook-detached": Step(lambda: None),
        "fastwgan": Step(lambda: 1, random=(torch.Generator(),)),
        "graphed": Step(lambda: 2, is_graph=True),
    }
    figures = steps._time(made, gpu, 5, 0.0)
    for result in figures.values():
        result.update(kernels=9, network_ms=0.4, peak_mib=1.0, setup_s=2.0)
    steps._compare(figures)
    assert figures["textbook-detached"]["device"] == "replayed"
    assert figures["fastwgan"]["device"] == "not captured: RuntimeError: it waits"
    assert figures["fastwgan"]["device_ms"] == figures["fastwgan"]["step_ms"]
    assert figures["graphed"]["device"] == "replays its own graph"
    assert all(result["host_ms"]["q50"] == 0.5 for result in figures.values())
    result = {"workload": "w", "precision": "float32", "layout": "channels_last", "batch": 1}
    result |= {"implementations": figures, "dropped": {}}
    table = _step_table(result, gpu=True)
    assert table.row_count == 3
    assert table.title == "w, float32, batch 1, channels_last"
    assert [column.header for column in table.columns].count("textbook-detached's / it") == 2
    del figures["textbook-detached"]
    steps._compare(figures)
    assert figures["fastwgan"]["step_ratio"] is figures["fastwgan"]["device_ratio"] is None
    assert _step_table(result, gpu=True).row_count == 2


def test_a_compilation_is_ended_when_the_time_for_set_up_is_over(monkeypatch):
    """And the others are measured all the same."""
    schedule = Schedule(1.0, 1, 5)

    def compiles(setting):
        schedule._end = 0.0
        signal.raise_signal(signal.SIGALRM)

    monkeypatch.setitem(IMPLEMENTATIONS, "compiled", compiles)
    before = signal.getsignal(signal.SIGALRM)
    parallel.end_compilation(schedule)
    try:
        signal.raise_signal(signal.SIGALRM)  # nothing is being compiled
        checked = steps.check("tiny-clip", ["compiled", "compiled-step", "foreach"], CPU, schedule)
        result = steps.critic_step("tiny-clip", "float32", checked, CPU, schedule, lambda: 0.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert result["dropped"] == {
        "compiled": "TimeoutError: the time for set-up was over", "compiled-step": "left out for time",
    }  # fmt: skip
    assert list(result["implementations"]) == [*TEXTBOOKS, "foreach"]


def test_set_up_at_once_and_timed_one_by_one(monkeypatch):
    """As on a GPU: a process to each job, the second precision by the first one's check, and one that does not come."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET")
    jobs = [(*job, "contiguous") for job in (("mlp-clip", "float32"), ("mlp-clip", "bfloat16"), ("none", "float32"))]
    with parallel.Together(jobs, ["foreach", "graphed"], CPU, rounds=5, minutes=1.0) as together:
        results = [together.measure(job) for job in jobs[:2]]
        with pytest.raises(RuntimeError, match="^KeyError: 'none'"):
            together.measure(jobs[2])
    for result, job in zip(results, jobs[:2], strict=True):
        assert (result["workload"], result["precision"], result["layout"]) == job
        assert list(result["implementations"]) == [*TEXTBOOKS, "foreach"]
        assert result["dropped"] == {"graphed": "RuntimeError: a CUDA graph needs a GPU"}
        assert result["implementations"]["foreach"]["step_ms"]["samples"] >= 5
    assert not any(process.is_alive() for process in together._processes)


def test_who_is_not_ready_in_time_is_left_out():
    job = ("mlp-clip", "float32", "contiguous")
    together = parallel.Together([job], ["foreach"], CPU, rounds=5, minutes=0.001)
    with together, pytest.raises(RuntimeError, match="^not set up in time"):
        together.measure(job)
    assert not together._processes[0].is_alive()


def test_what_a_profiler_and_a_driver_say():
    """Rows and lines as they give them; what is asked of them needs a GPU."""
    rows = [("aten::addmm", 3000.0), ("aten::mm", 1500.0), ("aten::add", 9000.0), ("_update_kernel", 1.0)]
    rows = [SimpleNamespace(key=key, self_device_time_total=total) for key, total in rows]
    assert timing.network_share(rows, 3) == 1.5
    assert timing.network_share(rows[2:], 3) is None
    assert timing.clocks_of("1980, 3201, [N/A], 41") == {
        "clocks.sm": 1980.0, "clocks.mem": 3201.0, "temperature.gpu": 41.0,
    }  # fmt: skip
    assert timing.clocks(CPU) is None
    assert hasattr(torch.autograd.profiler_util.FunctionEventAvg(), "self_device_time_total")


def test_a_copy_without_history_takes_its_commit_from_the_environment(monkeypatch):
    monkeypatch.setattr(timing, "output", lambda *command: None)
    assert environment(CPU)["commit"] is None
    monkeypatch.setenv("FASTWGAN_COMMIT", "abc1234")
    assert environment(CPU)["commit"] == "abc1234"


# Captures, by stand-ins for a GPU

GPU = SimpleNamespace(type="cuda")


def memory_behind(call):
    """Return weak references to the memory of all tensors that a call holds, also by way of other objects."""
    found, seen, todo = [], set(), [call]
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, (type, ModuleType)):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found.append(weakref.ref(x.untyped_storage()))
        todo += [y for y in gc.get_referents(x) if y is not getattr(x, "__globals__", None)]
    return found


@pytest.fixture
def sampled(monkeypatch):
    """Stand in for a GPU, see that no tensor behind a call is freed before it is timed, and count them each time."""
    counts, behind = [], []

    def watched(build):
        def make(*args):
            made = build(*args)
            made.take()
            refs = memory_behind(made.take)
            made.take()
            gc.collect()
            behind.append([ref for ref in refs if ref() is not None])  # not what each call makes anew
            return made

        return make

    def time_of(call, *_):
        if not counts or len(counts[-1]) < len(behind):
            gc.collect()
        assert all(ref() is not None for refs in behind for ref in refs), "memory that a graph reads has been freed"
        counts.append([len(refs) for refs in behind])
        return 1.0

    @contextmanager
    def capturing(*_):
        yield SimpleNamespace(replay=lambda: None)  # which holds no tensors, as a CUDA graph

    def on_cpu(builders, case, device):
        return {name: watched(build) for name, build in builders(case, CPU).items()}

    def setting(workload, device, dtype, *, steps=0, layout="contiguous"):
        return make_setting(workload, CPU, dtype, steps=steps, layout=layout)

    make_setting = steps.setting
    stand_ins = {
        timing: {"time_of": time_of, "host_time": time_of, "capturing": capturing, "wait": lambda device: None,
                 "network_time": time_of, "kernels": lambda *_: 9, "Peak": lambda _: mock.Mock(mebibytes=float)},
        torch.cuda: dict.fromkeys(("Stream", "stream", "current_stream", "graph_pool_handle"), mock.MagicMock()),
        torch: {"compile": lambda function: function},
        steps: {"setting": setting},
        ops: {"fits": lambda *_: True},
    }  # fmt: skip
    for owner, names in stand_ins.items():
        for name, value in names.items():
            monkeypatch.setattr(owner, name, value)
    for name, op in OPS.items():
        monkeypatch.setitem(OPS, name, op._replace(builders=partial(on_cpu, op.builders)))
    for name in ("foreach", "fastwgan"):
        monkeypatch.setitem(IMPLEMENTATIONS, name, watched(IMPLEMENTATIONS[name]))
    return counts


@pytest.mark.parametrize("op", OPS)
def test_what_is_timed_is_not_freed_before(op, sampled):
    """An op's graph reads parameters and states that nothing else may hold by then."""
    result = ops.measure(Case(op, 64 * 20, 20), GPU, 10.0, Schedule(1.0, 1, 5))
    assert result["dropped"] == {}
    assert {figures["how"] for figures in result["implementations"].values()} == {"replayed"}
    assert len(sampled) >= 5 * len(result["implementations"])
    assert len(sampled[-1]) == len(result["implementations"])
    assert min(sampled[-1]) > 0


@pytest.mark.parametrize("workload", ["tiny-clip", "tiny-penalty"])
def test_steps_that_are_timed_are_not_freed_before(workload, sampled):
    checked = {"foreach": 1.0, "fastwgan": 1.0}
    result = steps.critic_step(workload, "float32", checked, GPU, Schedule(1.0, 1, 5))
    assert {figures["device"] for figures in result["implementations"].values()} == {"replayed"}
    assert len(sampled[-1]) == 2
    assert min(sampled[-1]) > 5


@pytest.mark.emulated
def test_settings_that_are_timed_are_not_freed_before(sampled):
    tune.measured(Case("RMSprop", 64, 2), None, GPU)
    assert len(sampled) == tune.SAMPLES
    assert sampled[-1][0] > 2


@pytest.mark.parametrize("name", timing.CAPTURE_CHECKS)
def test_an_optimizers_refusal_of_a_capture_is_lifted_under_either_name(name, monkeypatch):
    def refuse(self):
        raise RuntimeError("capturable is False")

    for other in timing.CAPTURE_CHECKS:
        monkeypatch.delattr(torch.optim.Optimizer, other, raising=False)
    monkeypatch.setattr(torch.optim.Optimizer, name, refuse, raising=False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    with timing.unchecked():
        getattr(optimizer, name)()
    with pytest.raises(RuntimeError, match="capturable is False"):
        getattr(optimizer, name)()


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adam])
def test_the_installed_optimizers_can_be_captured(kind, monkeypatch):
    """A CPU passes for a GPU in a capture."""
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = kind([p], foreach=False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: GPU)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: mock.Mock(is_capturing=lambda: True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capturable is False"):
        optimizer.step()
    with timing.unchecked():
        optimizer.step()
    assert (p < 1).all()


# Ops


@pytest.mark.parametrize("op", OPS)
def test_ops(op, monkeypatch):
    """Each implementation's result is checked; here compiled ones without their compiler."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    case = Case(op, 64 * 20, 20)
    assert list(OPS[op].builders(case, CPU)) == list(OPS[op].names)
    result = ops.measure(case, CPU, 10.0, Schedule(1.0, 1, 5))
    assert result["dropped"] == {}
    assert list(result["implementations"]) == list(OPS[op].names)
    for figures in result["implementations"].values():
        assert figures["share"] == pytest.approx(result["bytes"] / figures["ms"]["q50"] / 1e6 / 10, rel=1e-3)


def test_a_wrong_op_is_dropped(monkeypatch):
    monkeypatch.setattr("fastwgan.functional.interpolate", lambda real, fake, seed: torch.lerp(real, fake, 0.5))
    result = ops.measure(Case("interpolate", 640), CPU, 10.0, Schedule(1.0, 1, 5))
    assert list(result["implementations"]) == ["lerp"]
    assert "of the largest value away" in result["dropped"]["fastwgan"]


def test_cases_of_a_gpu_and_of_a_cpu():
    gpu = ops.cases(torch.device("cuda"))
    assert {c.elements for c in gpu if c.op == "RMSprop"} == {2**10, 2**20, 2**26, 2**28}
    assert {c.tensors for c in gpu if c.op == "Adam"} == {1, 20, 300}
    assert max(c.elements for c in ops.cases(CPU)) == ops.LARGEST_ON_CPU
    assert str(Case("Adam", 1024, 20)) == "Adam 1024 in 20"


# The report

ENVIRONMENT = {
    "device": "A CPU", "type": "cpu", "driver": None, "cuda": None, "torch": "2", "triton": "3", "python": "3.11",
    "fastwgan": "0.1.0", "commit": "abc1234", "date": "2026-01-01", "tf32": None, "threads": 2,
}  # fmt: skip


def figures(ms, ratio, gpu=False):
    result = {"step_ms": {"q50": ms}, "step_ratio": ratio}
    return result | ({"device_ms": {"q50": ms / 2}, "device_ratio": ratio + 1, "network_ms": ms / 4} if gpu else {})


def steps_record(gpu=False):
    environment = ENVIRONMENT
    if gpu:
        environment = ENVIRONMENT | {
            "type": "cuda", "driver": "580", "cuda": "13.0", "tf32": {"matmul": False, "cudnn": True},
            "clocks": {"clocks.sm": 1980.0}, "chip": {"l2_mib": 50.0},
        }  # fmt: skip
    done = {
        "textbook": figures(6.5, 1.0, gpu), "foreach": figures(4.0, 1.625, gpu), "fastwgan": figures(8.0, 0.8125, gpu),
    }  # fmt: skip
    result = {
        "workload": "mlp-clip", "precision": "float32", "batch": 64, "implementations": done,
        "dropped": {"graphed": "RuntimeError: a CUDA graph needs a GPU"},
    }  # fmt: skip
    return {"environment": environment, "left_out": ["dcgan-clip float32: time"], "critic_step": [result]}


def ops_record():
    def case(elements, tensors, op="RMSprop"):
        shares = {"foreach": 0.4, "fastwgan": 0.9}
        done = {name: {"ms": {"q50": 1.0}, "gb_s": 9.0, "share": share} for name, share in shares.items()}
        return {"op": op, "elements": elements, "tensors": tensors, "implementations": done, "dropped": {}}

    cases = [case(elements, tensors) for elements in (1024, 2048) for tensors in (1, 20, 300)]
    cases.append(case(1024, 1, "objective"))  # which there was in an older version
    return {"environment": ENVIRONMENT, "left_out": [], "copy_gb_s": 10.0, "ops": cases}


def test_report(tmp_path):
    """README's table with a loss in it, the same from a second run, and pictures."""
    readme, out = tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    records = [("cpu.json", steps_record()), ("gpu.json", steps_record(gpu=True)), ("ops.json", ops_record())]
    for name, record in records:
        (tmp_path / name).write_text(json.dumps(record))
    arguments = [str(tmp_path / name) for name, _ in records]
    texts = []
    for _ in range(2):
        assert report.main([*arguments, "--out", str(out), "--readme", str(readme)]) == 0
        texts.append(readme.read_text())
    assert texts[0] == texts[1]
    assert texts[0].startswith(f"before\n{report.BEGIN}\n")
    assert texts[0].endswith(f"{report.END}\nafter\n")
    assert "old" not in texts[0]
    assert "| critic step | textbook, ms | foreach | fastwgan |\n" in texts[0]
    assert "| mlp-clip, float32, batch 64 | 6.5 | 1.62 | 0.81 |" in texts[0]
    assert "| critic step, ms | textbook | foreach | fastwgan | peer / ours | peer / ours |\n|---|---|" in texts[0]
    assert "| mlp-clip, float32, batch 64 | 6.5 | 4 | 8 | 0.50 | - |" in texts[0]
    assert "Left out: graphed: RuntimeError: a CUDA graph needs a GPU" in texts[0]
    assert "Left out: dcgan-clip float32: time" in texts[0]
    assert "TF32 in cudnn" in texts[0]
    for name in ("cpu-ratios.png", "gpu-ratios.png", "ops-bandwidth.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_falls_short_is_said():
    record = steps_record(gpu=True)
    assert report.shortfalls(record) == [
        "mlp-clip float32: fastwgan is 0.81 times as fast as textbook, wanted 8; 4.00 times its networks' time",
        "mlp-clip float32: fastwgan is 0.50 times as fast as foreach, wanted 1.2; 4.00 times its networks' time",
    ]
    done = record["critic_step"][0]["implementations"]
    done["fastwgan-graphed"] = figures(0.5, 13.0, gpu=True)
    assert report.shortfalls(record) == []
    for name in ("fastwgan", "fastwgan-graphed"):
        del done[name]
    assert "no figures of ours" in report.shortfalls(record)[0]
    ops = ops_record() | {"environment": record["environment"]}
    for share, elements, told in ((0.8, 2**26, 1), (0.95, 2**26, 0), (0.8, 2**10, 0)):
        ops["ops"] = ops["ops"][:1]
        ops["ops"][0].update(elements=elements, bytes=20 * elements)
        ops["ops"][0]["implementations"]["fastwgan"]["share"] = share
        assert len(report.shortfalls(ops)) == told
    ops["ops"][0]["implementations"].pop("fastwgan")
    assert len(report.shortfalls(ops)) == 1
    assert report.shortfalls(steps_record()) == []


def test_report_of_no_record(tmp_path, capsys):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "x.json")])
    assert "not written by python -m benchmarks" in capsys.readouterr().err
    with pytest.raises(ValueError, match="README.md: expected <!-- benchmarks -->"):
        report.into("no markers", [])


def test_both_forms_of_a_gpus_steps_are_compared_each_with_its_own():
    record = steps_record(gpu=True)
    done = record["critic_step"][0]["implementations"]
    done |= {"graphed": figures(2.0, 3.25, gpu=True), "fastwgan-graphed": figures(4.0, 1.6, gpu=True)}
    head, row = report.gpu_rows(record)
    assert head == [
        "critic step, ms", "textbook", "foreach", "fastwgan", "peer / ours", "graphed", "fastwgan-graphed",
        "peer / ours",
    ]  # fmt: skip
    assert row == ["mlp-clip, float32, batch 64", "6.5", "4", "8", "0.50", "2", "4", "0.50"]
    done["fastwgan-compiled"] = figures(1.0, 6.5, gpu=True)
    assert report.gpu_rows(record)[1][-2:] == ["1", "2.00"]


def test_ratios_are_to_the_detached_textbook_where_a_record_has_it():
    record = steps_record()
    done = record["critic_step"][0]["implementations"]
    assert report.base(record) == "textbook"
    done["textbook-detached"] = figures(5.0, 1.0)
    assert report.base(record) == "textbook-detached"
    head, row = report.cpu_rows(record)
    assert head == ["critic step", "textbook-detached, ms", "textbook", "foreach", "fastwgan"]
    assert row == ["mlp-clip, float32, batch 64", "5", "0.77", "1.25", "0.62"]
    record = steps_record(gpu=True)
    record["critic_step"][0]["implementations"]["textbook-detached"] = figures(5.0, 1.0, gpu=True)
    assert report.shortfalls(record)[0].startswith("mlp-clip float32: fastwgan is 0.62 times as fast as textbook-det")


def test_each_implementation_is_quoted_in_its_faster_layout():
    record = steps_record(gpu=True)
    contiguous = record["critic_step"][0]
    done = {"foreach": figures(3.0, 1.0, gpu=True), "fastwgan": figures(9.0, 1.0, gpu=True)}
    channels_last = contiguous | {"layout": "channels_last", "implementations": done, "dropped": {"compiled": "time"}}
    record["critic_step"] = [contiguous | {"layout": "contiguous", "dropped": {}}, channels_last]
    assert report.gpu_rows(record)[1] == ["mlp-clip, float32, batch 64", "6.5", "3†", "8", "0.38", "-"]
    assert report.quotes(record) == [
        "mlp-clip, float32, batch 64: fastwgan (8 ms) is 0.38 times as fast as the best plain PyTorch, "
        "foreach channels_last (3 ms)"
    ]
    text = report.table(record)
    assert "\n\n†: networks and data channels last" in text
    assert "Left out (mlp-clip float32 channels_last): compiled: time" in text
    assert report.MARKED in summary.steps(record)
    assert "†" not in report.table(steps_record(gpu=True))


def test_reasons_are_told_once_for_all_that_they_hold_for():
    record = steps_record()
    record["critic_step"].append(record["critic_step"][0] | {"workload": "mlp-penalty"})
    record["critic_step"][0]["dropped"] = {"compiled": "time", "compiled-step": "time", "graphed": "x " * 100}
    record["critic_step"][1]["dropped"] = {"compiled": "time", "compiled-step": "time", "foreach": "no"}
    left = [line for line in report.table(record).splitlines() if line.startswith("Left out")]
    assert left == [
        "Left out: compiled, compiled-step: time",
        f"Left out (mlp-clip float32): graphed: {'x ' * 39}x ...",
        "Left out (mlp-penalty float32): foreach: no",
        "Left out: dcgan-clip float32: time",
    ]


def test_readme_holds_the_committed_records():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    records = [report.read(report.RESULTS / f"{name}.json") for name in report.RECORDS]
    tables = [report.table(record) for record in records if "critic_step" in record]
    assert report.into(readme, tables) == readme, "python -m benchmarks.report"
    types = [record["environment"]["type"] for record in records]
    assert types == sorted(types, key=lambda of: of != "cuda"), "a GPU's come first"
