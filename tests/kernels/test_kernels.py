"""What the public ops do not show: the pointer table and its uploads, the bias correction, and the launchers' types."""

import ast
import weakref
from pathlib import Path

import pytest
import torch

from fastwgan import Adam, kernels
from fastwgan.kernels import arrival, table

CPU = torch.device("cpu")


def _uploads(monkeypatch):
    calls = []
    upload = table.upload
    monkeypatch.setattr(table, "upload", lambda host, out, **how: calls.append(host.shape) or upload(host, out, **how))
    return calls


def test_tables_upload_once_per_content(monkeypatch):
    calls = _uploads(monkeypatch)
    tables = table.Tables()
    params, grads = [torch.ones(5000), torch.ones(3)], [torch.ones(5000), torch.ones(3)]
    args = (params, 2048, [0, 0], grads)
    rows, owners = tables.addresses(*args)
    assert len(calls) == 2
    assert owners.tolist() == [0, 0, 0, 1]
    assert rows[1, table.FIRST_CHUNK.value] == 3
    assert tables.addresses(*args)[0] is rows
    assert len(calls) == 2
    moved = [torch.ones(5000), torch.ones(3)]
    assert tables.addresses(params, 2048, [0, 0], moved)[0] is not rows
    assert len(calls) == 3  # the addresses, not the chunks
    assert tables.addresses(*args)[0] is rows
    assert len(calls) == 3


def test_one_unaligned_tensor_makes_a_row_unaligned():
    """128-bit accesses fault on a GPU at other addresses."""

    def aligned(*offsets):
        p, g, s = (torch.ones(40)[offset:][:33] for offset in offsets)
        return table.Tables().addresses([p], 8, [0], [g], [[s]])[0][0, table.ALIGNED.value].item()

    assert torch.ones(40).data_ptr() % 16 == 0
    assert aligned(0, 0, 0) == aligned(4, 0, 4) == 1
    assert aligned(1, 0, 0) == aligned(0, 2, 0) == aligned(0, 0, 3) == 0


def test_tables_forget_the_least_recently_used():
    tables = table.Tables()
    p = [torch.ones(3)]
    for _ in range(3 * table.CACHED):
        tables.addresses(p, 8, [0], [torch.ones(3)])
    assert len(tables._cache) <= table.CACHED


def test_mirror_keeps_its_address_and_uploads_changes_only(monkeypatch):
    calls = _uploads(monkeypatch)
    mirror = table.Mirror(torch.float32, CPU)
    first = mirror.set(((1.0, 2.0),))
    address = first.data_ptr()
    assert mirror.set(((1.0, 2.0),)).data_ptr() == address
    assert len(calls) == 1
    second = mirror.set(((3.0, 2.0),))
    assert second.data_ptr() == address
    assert second.tolist() == [[3.0, 2.0]]


@pytest.mark.gpu
def test_uploads_wait_for_the_end_of_a_capture():
    device = torch.device("cuda", 0)
    out = torch.zeros(3, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table.upload(torch.tensor([1.0, 2.0, 3.0]), out)
        doubled = out * 2
    table.fill_pending()
    graph.replay()
    assert doubled.tolist() == [2.0, 4.0, 6.0]


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999999])
def test_bias_correction_is_exact_to_rounding(beta, device):
    """Adam with lr so that the update is exactly 1 / (1 - beta^t), where 1 - 0.999 in float32 has lost four digits."""
    for step in (0.0, 1.0, 10.0, 1000.0, 100_000.0):
        p = torch.nn.Parameter(torch.zeros(4, device=device))
        opt = Adam([p], lr=1.0, betas=(beta, 0.0), eps=1e-30, backend="triton")
        p.grad = torch.ones_like(p)
        opt.step()
        opt.state[p]["step"].fill_(step)
        opt.state[p]["exp_avg"].fill_(1.0)
        with torch.no_grad():
            p.zero_()
        opt.step()
        expected = -1 / (1 - beta ** (step + 1))
        assert p[0].item() == pytest.approx(expected, rel=4e-7)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_captured_launches_have_counters_of_their_own_that_were_zeroed_before(dtype, monkeypatch):
    eager = arrival.zero(CPU, dtype)
    assert arrival.zero(CPU, dtype) is eager
    monkeypatch.setattr(arrival, "capturing", lambda device: True)
    monkeypatch.setattr(torch, "zeros", None)
    captured = [arrival.zero(CPU, dtype) for _ in range(arrival.SPARES)]
    assert len({eager.data_ptr(), *(counter.data_ptr() for counter in captured)}) == 1 + len(captured)
    for counter in captured:
        assert counter.tolist() == [0]
        assert counter.data_ptr() % 16 == 0  # else a launch would be of another kernel, which a capture cannot load
    monkeypatch.undo()
    monkeypatch.setattr(arrival, "capturing", lambda device: True)
    more = [arrival.zero(CPU, dtype) for _ in range(2 * arrival.SPARES)]
    assert len({counter.data_ptr() for counter in (eager, *captured, *more)}) == 1 + len(captured) + len(more)
    (late,) = [weakref.ref(counter) for counter in [arrival.zero(CPU, dtype)]]
    assert late() is None  # it is memory of the graph's, which nothing else may keep


def test_uploads_kept_back_during_a_capture_come_in_order_and_stay(monkeypatch):
    """As a graph capture would have it: no table is allocated in it, and what was kept back is not taken for done."""
    mirror, tables, p = table.Mirror(torch.float32, CPU), table.Tables(), [torch.ones(3)]
    args, others = (p, 8, [0], p), (p, 8, [0], [torch.ones(3)])
    cold = table.Mirror(torch.float32, CPU), table.Tables()
    eager, owners = tables.addresses(*args)
    first = mirror.set(((0.0,),))
    monkeypatch.setattr(table, "capturing", lambda device: True)
    monkeypatch.setattr(torch, "empty_like", None)
    assert tables.addresses(*args)[0] is eager  # what is full already is not filled again
    captured, same_owners = tables.addresses(*others)
    assert same_owners is owners
    captured.zero_()
    for call in (lambda: cold[0].set(((1.0,),)), lambda: cold[1].addresses(*args)):
        with pytest.raises(RuntimeError, match="has to run once"):
            call()
    assert mirror.set(((1.0,),)) is first
    mirror.set(((2.0,),))
    first.zero_()
    monkeypatch.setattr(table, "capturing", lambda device: False)
    table.fill_pending()
    assert captured.tolist() == [[p[0].data_ptr(), others[3][0].data_ptr(), *eager[0, 2:].tolist()]]
    assert first.item() == 2
    table.fill_pending()
    assert mirror.set(((2.0,),)) is first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mean_without_memory_is_its_newest_value(dtype, device):
    """WGAN-GP's Adam has beta1 = 0: what the moment was must not leave a rounding behind."""
    p = torch.nn.Parameter(torch.zeros(4, dtype=dtype, device=device))
    opt = Adam([p], betas=(0.0, 0.9), backend="triton")
    for g in (1e12, 1e-3):
        p.grad = torch.full_like(p, g)
        opt.step()
    assert torch.equal(opt.state[p]["exp_avg"], p.grad)


def _signatures(body, path=""):
    """Yield (where, arguments, result) of the functions in a class or module, as text."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from _signatures(node.body, f"{path}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield path + node.name, ast.unparse(node.args), ast.unparse(node.returns) if node.returns else None


def test_the_stub_has_the_sources_signatures():
    """Type checkers read kernels.pyi, in which each module of the kernels is a class."""
    root = Path(__file__).parents[2]
    stub = ast.parse((root / "fastwgan/kernels.pyi").read_text())
    modules = [node for node in stub.body if isinstance(node, ast.ClassDef)]
    assert len(modules) == 11
    for module in modules:
        source = ast.parse((root / f"kernels/{module.name}.py").read_text())
        assert set(_signatures(module.body)) <= set(_signatures(source.body))
        named = {node.target.id for node in module.body if isinstance(node, ast.AnnAssign)}
        assert named <= vars(getattr(kernels, module.name)).keys()
