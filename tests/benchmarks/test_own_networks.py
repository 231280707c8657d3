"""python -m benchmarks steps --networks: networks of a user's, what is wrong with them, and the advice at the end."""

import json

import pytest

from benchmarks import __main__ as command
from benchmarks import networks
from benchmarks.implementations import SETTINGS, TEXTBOOKS
from benchmarks.networks import advice, find, implementations, load
from benchmarks.run import layouts_of
from fastwgan import GradientPenalty, WeightClip
from fastwgan.cli.common import UserError

HEAD = """
import torch
from torch import nn
from fastwgan import GradientPenalty, NormClip, WeightClip

class Own(nn.Sequential):
    pass

def given(**other):
    generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 6))
    critic = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))
    return {"generator": generator, "critic": critic, "latent": 4, "real": torch.randn(10, 6)} | other

def own():
    return given(critic=Own(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1)), constraint=WeightClip(0.02))

def images():
    critic = nn.Sequential(nn.Conv2d(3, 1, 4), nn.Flatten(0))
    generator = nn.Sequential(nn.Linear(4, 48), nn.Unflatten(1, (3, 4, 4)))
    return given(generator=generator, critic=critic, real=torch.randn(10, 3, 4, 4))

once, count = given(), 0
"""
DICT = "f(): expected a dict with generator, critic, latent, real, and perhaps constraint"


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Return what makes a module of a user's, and its name."""

    def make(body):
        name = f"networks_{abs(hash((request.node.name, body)))}"
        (tmp_path / f"{name}.py").write_text(HEAD + body)
        return name

    monkeypatch.syspath_prepend(tmp_path)
    return make


def test_a_run_ends_with_advice(module, tmp_path, monkeypatch, capsys):
    """Its last line names the Trainer's options; what needs a compiler is left out here, as it takes long."""
    for name in [name for name in SETTINGS if "compile" in name]:
        monkeypatch.delitem(SETTINGS, name)
    name, path = module(""), tmp_path / "record.json"
    monkeypatch.setattr("fastwgan.kernels.INTERPRETED", False)
    chosen = ["--networks", f"{name}:own", "--implementation", "foreach", "graphed", "--device", "cpu"]
    assert command.main(["steps", *chosen, "--rounds", "5", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "dropped: graphed: RuntimeError: a CUDA graph needs a GPU" in out
    (result,) = json.loads(path.read_text())["critic_step"]
    assert result["workload"] == f"{name}:own"
    assert list(result["implementations"]) == [
        *TEXTBOOKS, "foreach", "fastwgan()", "fastwgan(independent_samples=True)",
    ]  # fmt: skip
    last = out.splitlines()[-1]
    assert last.startswith("Trainer(...")
    assert " ms a step" in last
    assert "times as fast as the best plain PyTorch (" in last


def test_what_a_users_function_gives_is_what_is_timed(module):
    name = module("")
    first = load(f"{name}:own")
    assert (first.latent, first.shape, first.batch, first.constraint) == (4, (6,), 10, WeightClip(0.02))
    assert load(f"{name}:given").constraint == GradientPenalty()
    (a, b, x), (c, d, y) = (find(f"{name}:own").made() for _ in range(2))
    assert a is not c
    assert b is not d
    assert x.equal(y)
    assert b[0].weight.equal(d[0].weight)


def test_what_is_tried_with_a_users_networks(module):
    """A word of the user's is asked for only where nothing is known of the critic, and layouts of convolutions."""
    name = module("")
    known, unknown = ({*implementations(f"{name}:{of}", gpu=False)} for of in ("given", "own"))
    assert {"fastwgan()", "fastwgan(compile=True)", "textbook-detached", "compiled-graphed"} <= known
    assert unknown - known == {"fastwgan(independent_samples=True)", "fastwgan(compile=True, independent_samples=True)"}
    gpu = {*implementations(f"{name}:given", gpu=True)} - known
    assert gpu == {
        f"fastwgan(cuda_graph={on}{compiled})" for on in (True, False) for compiled in ("", ", compile=True")
    }
    assert layouts_of(f"{name}:images", None, command.torch.device("cpu")) == ["contiguous", "channels_last"]
    assert layouts_of(f"{name}:given", None, command.torch.device("cpu")) == ["contiguous"]


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("return 3", f"{DICT}, got int"),
        ("return {'critic': 1}", f"{DICT}, got one with critic"),
        ("return given(other=1)", "got one with generator, critic, latent, real, other"),
        ("raise OSError('no file')", "f() failed: OSError: no file"),
        ("return given(critic=len)", "critic: expected an nn.Module, got builtin_function_or_method"),
        ("return given(critic=nn.ReLU())", "critic: expected weights to train, got none"),
        ("return given(latent=4.0)", "latent: expected an int above 0, got 4.0"),
        ("return given(real=[1.0])", "real: expected a floating tensor of samples [N, ...], got list"),
        ("return given(real=torch.ones(3, 6).int())", "real: expected a floating tensor of samples [N, ...], got tor"),
        ("return given(constraint=NormClip())", "constraint: expected WeightClip(c) or GradientPenalty(weight), got N"),
        ("return given(constraint=GradientPenalty(target=0.0))", "constraint: expected WeightClip(c) or GradientPen"),
        ("return once", "generator: expected a new one at each call, got weights of the last"),
        ("global count; count += 1; own = given(); own['critic'][0].bias.data.fill_(count); return own",
         "critic.0.bias: expected the same at each call after torch.manual_seed(0), got others"),
        ("global count; count += 1; return given(real=torch.full((10, 6), float(count)))",
         "real: expected the same at each call after torch.manual_seed(0), got others"),
        ("return given(latent=5)", "generator: its forward pass failed: RuntimeError: mat1 and mat2"),
        ("return given(generator=nn.Linear(4, 5))", "generator: its output: expected shape [10, 6], got (10, 5)"),
        ("return given(critic=nn.Sequential(nn.Linear(6, 1), nn.Flatten(0), nn.Unflatten(0, (2, 5))))",
         "critic: its output: expected shape [10, ...], got (2, 5)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_networks_is_told(function, problem, module):
    name = module(f"def f():\n    {function}\n")
    with pytest.raises(UserError) as error:
        load(f"{name}:f")
    assert str(error.value).startswith("--networks: ")
    assert problem in str(error.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mine", "--networks: expected module:function, got 'mine'"),
        (":f", "--networks: expected module:function, got ':f'"),
        ("no_such_module:f", "--networks: import no_such_module failed: ModuleNotFoundError: No module named"),
        ("math:f", "--networks: expected a function f in math, got NoneType"),
    ],
)
def test_a_bad_name_is_told_in_a_line(name, problem, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["steps", "--device", "cpu", "--networks", name])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert problem in message
    assert message.count("\n") == 1


# The advice


def result(precision="float32", layout="contiguous", **ms):
    names = {name.replace("_", "-"): value for name, value in ms.items()}
    done = {name: {"step_ms": {"q50": value}} for name, value in names.items()}
    return {
        "workload": "m:f", "precision": precision, "layout": layout, "batch": 4, "implementations": done, "dropped": {},
    }  # fmt: skip


def ours(of, **ms):
    of["implementations"] |= {f"fastwgan({options})": {"step_ms": {"q50": value}} for options, value in ms.items()}
    return of


def test_advice_names_options_and_gains():
    contiguous = ours(result(foreach=2.41, graphed=3.0), **{"": 2.06, "compile=True": 2.0})
    last = ours(result(layout="channels_last", foreach=2.5), **{"": 2.1, "compile=True": 1.84})
    other = ours(result("tf32", foreach=2.0), **{"": 1.6, "compile=True": 1.5})
    assert advice({"critic_step": [contiguous, last, other]}) == [
        'other numbers in tf32, after torch.set_float32_matmul_precision("high"): Trainer(..., compile=True): 1.5 ms '
        "a step, 1.23 times as fast as in float32",
        "Trainer(..., compile=True, memory_format=torch.channels_last): 1.84 ms a step, 1.31 times as fast as the best "
        "plain PyTorch (foreach, 2.41 ms) and 1.12 times as fast as Trainer's defaults",
    ]


def test_options_that_hardly_help_are_not_advised():
    record = {"critic_step": [ours(result(foreach=1.0), **{"": 1.01, "compile=True": 1.0})]}
    assert advice(record) == [
        "Trainer(...): 1.01 ms a step by default, 0.99 times as fast as the best plain PyTorch (foreach, 1 ms)"
    ]


def test_advice_says_what_is_the_users_word():
    given = {"": 2.0, "cuda_graph=True, independent_samples=True": 1.0}
    (line,) = advice({"critic_step": [ours(result("bfloat16", layout="channels_last"), **given)]})
    assert line.startswith(
        "Trainer(..., cuda_graph=True, independent_samples=True, memory_format=torch.channels_last): 1 ms a step in bf"
    )
    for option in ("independent_samples", "cuda_graph"):
        assert f"; {option}=True is your word that {networks.WORDS[option]}" in line


def test_no_advice_without_figures():
    for results in ([], [result(foreach=1.0)]):
        (line,) = advice({"critic_step": results})
        assert line.startswith("no advice: ")
