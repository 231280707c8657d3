"""Every op and optimizer over the case matrix: dtypes, sizes, ranks, layouts, values, and drawn at random."""

from functools import partial

import pytest
import torch
from cases import BATCHES, DTYPES, KINDS, LAYOUTS, OPS, OPTIMIZERS, OWNED, PARAMETERS, SHAPES, SIZES, VALUES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import assert_close, check_op, check_optimizer, tensors

from fastwgan import reference
from fastwgan.kernels import scores
from fastwgan.ops.penalty import penalty_cotangent
from fastwgan.ops.scores import score_statistics

HALF = (torch.bfloat16, torch.float16)
PROPERTY = settings(
    max_examples=80, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


def draw(op, shape, dtype, device, values="normal"):
    return [VALUES[values](shape, dtype, device) for _ in range(OPS[op].tensors)]


def check(op, inputs, layout="contiguous"):
    x = inputs[0]
    length = 1 if op == "interpolate" else x.numel()  # of the longest sum
    summand = 0.0 if OPS[op].per_sample else x.double().nan_to_num(0, 0, 0).abs().max().item()
    check_op(
        f"{op} {tuple(x.shape)} {x.dtype} {layout}", OPS[op].fused, OPS[op].eager, *inputs,
        length=length, summand=summand, layout=LAYOUTS[layout],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_sizes(op, size, dtype, device):
    inputs = draw(op, (2, size) if OPS[op].per_sample else (size,), dtype, device)
    check(op, [x / size**0.5 for x in inputs] if "penalty" in op else inputs)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("op", [op for op in OPS if OPS[op].per_sample])
def test_batches(op, batch, device):
    check(op, draw(op, (batch, 2), torch.float32, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_layouts(op, layout, rank, dtype, device):
    check(op, draw(op, SHAPES[rank], dtype, device), layout)


@pytest.mark.parametrize("layouts", [("channels_last", "contiguous"), ("contiguous", "sliced"), ("expanded", "sliced")])
@pytest.mark.parametrize("op", [op for op in OPS if OPS[op].tensors == 2])
def test_two_inputs_of_different_layouts(op, layouts, device):
    a, b = draw(op, SHAPES[4], torch.float32, device)
    for left, right in (layouts, layouts[::-1]):
        actual = OPS[op].fused(LAYOUTS[left](a), LAYOUTS[right](b))
        torch.testing.assert_close(actual, OPS[op].eager(LAYOUTS[left](a), LAYOUTS[right](b)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("op", OPS)
def test_values(op, values, dtype, device):
    if dtype == torch.float64 and (values == "largest" or (op, values) == ("penalty two-sided", "denormal")):
        pytest.skip("squares and sums leave the range of float64, so there is no oracle")
    check(op, draw(op, (5, 37), dtype, device, values))


@pytest.mark.parametrize("op", [op for op in OPS if not OPS[op].per_sample])
def test_scores_of_more_blocks_than_programs(op, device):
    check(op, draw(op, (scores.BLOCK * scores.MAX_PROGRAMS + 1,), torch.float32, device))


def check_launch(label, fused, eager, *inputs, length):
    """A launch that the trainer makes, with no graph: all that comes out of it."""
    exact = eager(*(x.cpu().double() for x in inputs))
    for i, values in enumerate(zip(tensors(fused(*inputs)), tensors(eager(*inputs)), tensors(exact), strict=True)):
        summand = inputs[0].double().abs().max().item() if len(inputs) == 2 else 0.0
        assert_close(f"{label}, output {i}", *values, length, summand)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_score_statistics(size, dtype, device):
    inputs = draw("critic_loss", (size,), dtype, device)
    fused = partial(score_statistics, backend="triton")
    check_launch(f"score_statistics {size} {dtype}", fused, reference.score_statistics, *inputs, length=size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "size"), [("two-sided", size) for size in SIZES] + [(kind, 1025) for kind in KINDS[1:]]
)
def test_penalty_cotangent(kind, size, dtype, device):
    g = VALUES["normal"]((3, size), dtype, device) / size**0.5
    check_launch(
        f"penalty_cotangent {kind} {size} {dtype}",
        lambda x: penalty_cotangent(x, kind, 0.7, 10.0, "triton"),
        lambda x: reference.penalty_cotangent(x, kind=kind, target=0.7, weight=10.0),
        g, length=g.numel(),
    )  # fmt: skip


@PROPERTY
@given(data=st.data())
def test_ops_at_random(data, device):
    op, dtype = data.draw(st.sampled_from(list(OPS))), data.draw(st.sampled_from(DTYPES))
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3), label="shape"))
    layout, values = data.draw(st.sampled_from(list(LAYOUTS))), data.draw(st.sampled_from(["normal", "small", "zeros"]))
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    check(op, draw(op, shape, dtype, device, values), layout)


# Optimizers


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    return request.param


def gradients(params, steps, values="normal"):
    return [[VALUES[values](p.shape, p.dtype, p.device) if p.numel() else p for p in params] for _ in range(steps)]


def unstable(options, dtype):
    """torch's centered RMSprop rounds s - m^2 below zero in half precision and gives NaN."""
    return options.get("centered") and dtype in HALF


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(OPTIMIZERS)), ids=str)
def test_optimizers(case, dtype, clip, backend, device):
    name, options = OPTIMIZERS[case]
    if unstable(options, dtype):
        pytest.skip("torch's own result is NaN")
    params = [VALUES["normal"](shape, dtype, device) for shape in PARAMETERS["edges"]]
    label = f"{name} {options} {dtype} clip={clip} {backend}"
    check_optimizer(label, name, options, params, gradients(params, 3), clip=clip, backend=backend)


@pytest.mark.parametrize("shapes", ["one element", "ranks", "600 tensors"])
@pytest.mark.parametrize("name", ["RMSprop", "Adam"])
def test_optimizers_of_any_number_of_tensors(name, shapes, backend, device):
    params = [VALUES["normal"](shape, torch.float32, device) for shape in PARAMETERS[shapes]]
    check_optimizer(f"{name} {shapes}", name, {}, params, gradients(params, 2), clip=0.5, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("name", ["RMSprop", "Adam"])
def test_optimizers_on_extreme_gradients(name, values, dtype, backend, device):
    params = [VALUES["normal"]((37,), dtype, device)]
    label = f"{name} {values} {dtype} {backend}"
    check_optimizer(label, name, {}, params, gradients(params, 2, values), clip=0.5, backend=backend)


@pytest.mark.parametrize("layout", OWNED)
@pytest.mark.parametrize("of_gradient", LAYOUTS)
@pytest.mark.parametrize("name", ["RMSprop", "Adam"])
def test_optimizers_on_layouts(name, layout, of_gradient, backend, device):
    """Parameters and gradients each of their own layout, gradients missing at times and never where they were."""
    params = [LAYOUTS[layout](VALUES["normal"](shape, torch.float32, device)) for shape in SHAPES.values()]
    steps = [[LAYOUTS[of_gradient](g) for g in grads] for grads in gradients(params, 3)]
    steps[1][2] = None
    check_optimizer(f"{name} {layout}, {of_gradient}", name, {}, params, steps, clip=0.5, backend=backend)


@pytest.mark.parametrize("name", ["RMSprop", "Adam"])
def test_one_optimizer_of_many_dtypes_and_devices(name, device):
    """By backend "auto", which steps CPU tensors beside CUDA ones."""
    params = [torch.randn(33, device=d).to(dtype) for dtype in DTYPES for d in {device, torch.device("cpu")}]
    for p in params:  # apart, as eager PyTorch takes them; and together
        torch.manual_seed(1)
        check_optimizer(f"{name} {p.dtype}", name, {}, [p.clone()], gradients([p], 2), clip=0.5, backend="auto")
    check_optimizer(f"{name} mixed", name, {}, params, gradients(params, 2), clip=0.5, backend="auto")


@PROPERTY
@given(data=st.data())
def test_optimizers_at_random(data, device):
    name, options = data.draw(st.sampled_from(OPTIMIZERS))
    dtype = data.draw(st.sampled_from([d for d in DTYPES if not unstable(options, d)]))
    shapes = data.draw(st.lists(st.lists(st.integers(0, 60), max_size=2), min_size=1, max_size=6), label="shapes")
    layout = data.draw(st.sampled_from(OWNED))
    clip = data.draw(st.sampled_from([None, 0.03, 2.0]))
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    make = VALUES["normal"]
    params = [LAYOUTS[layout](x) if x.dim() else x for x in (make(s, dtype, device) for s in shapes)]
    check_optimizer(f"{name} {options} {shapes} {dtype}", name, options, params, gradients(params, 2), clip=clip)
