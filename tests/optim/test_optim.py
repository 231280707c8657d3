"""RMSprop and Adam against torch.optim: formulas, options, groups, state, layouts, bad input."""

import copy
import inspect
import math

import pytest
import torch
from count_launches import count_kernels, ours
from tolerance import check_optimizer
from torch import nn

import fastwgan
from fastwgan import Adam, RMSprop
from fastwgan.ops.weights import read
from fastwgan.optim.base import Together

PAIRS = {"rmsprop": (RMSprop, torch.optim.RMSprop), "adam": (Adam, torch.optim.Adam)}
SHAPES = ((1,), (17,), (2047,), (2048,), (33, 65), (4, 3, 5, 5), (0,), ())


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    return request.param


def _params(dtype, device, shapes=SHAPES):
    return [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]


def _set_grads(*groups, step):
    random = torch.Generator().manual_seed(step)
    for same in zip(*groups, strict=True):
        g = torch.randn(same[0].shape, generator=random)
        for p in same:
            p.grad = g.to(p.device, p.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_pytorchs_own_cases(name, dtype, backend, device):
    """The inputs that PyTorch tests its optimizer on, as far as our options cover them, by the tolerance rule."""
    pytest.importorskip("expecttest")  # which that imports
    from torch.testing._internal.common_optimizers import optim_db  # here, as it sets flags for the process

    ours_, theirs = PAIRS[name]
    (info,) = (info for info in optim_db if info.optim_cls is theirs)
    covered = set(inspect.signature(ours_).parameters)
    cases = [
        case
        for case in info.optim_inputs_func(device=device.type)
        if case.kwargs.keys() <= covered and not any(isinstance(value, torch.Tensor) for value in case.kwargs.values())
    ]
    assert len(cases) >= 4
    for case in cases:
        shapes = ((10, 5), (10,), (2, 10), (2,))  # of the model that PyTorch optimizes
        params = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        steps = [[torch.randn_like(p) for p in params] for _ in range(6)]
        check_optimizer(f"{name} {case.desc}", theirs.__name__, case.kwargs, params, steps, backend=backend)


@pytest.mark.parametrize("name", PAIRS)
def test_state_goes_over_to_torch_and_back(name, backend, device):
    """Load one's state into the other, go on with both: same weights; and back again."""
    ours_, theirs = PAIRS[name]
    options = {"momentum": 0.5, "centered": True} if name == "rmsprop" else {"betas": (0.5, 0.9)}
    a, b = _params(torch.float64, device), _params(torch.float64, device)
    mine, other = ours_(a, lr=0.003, backend=backend, **options), theirs(b, lr=0.1)
    for step in range(3):
        _set_grads(a, step=step)
        mine.step()
    other.load_state_dict(mine.state_dict())
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p.data)
    assert other.state_dict()["state"].keys() == mine.state_dict()["state"].keys()
    assert other.param_groups[0]["lr"] == 0.003
    for step in range(3, 6):
        _set_grads(a, b, step=step)
        mine.step()
        other.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)

    again = ours_(a, lr=1.0, clip=0.25, backend=backend)
    state = other.state_dict()
    del state["param_groups"][0]["clip"]  # as in a state that was torch's from the start
    again.load_state_dict(state)
    assert again.param_groups[0]["clip"] == 0.25
    for step in range(6, 9):
        _set_grads(a, b, step=step)
        again.step()
        other.step()
        for q in b:
            q.data.clamp_(-0.25, 0.25)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", PAIRS)
def test_state_keys_are_torchs(name, backend, device):
    ours_, theirs = PAIRS[name]
    options = {"momentum": 0.5, "centered": True} if name == "rmsprop" else {}
    a, b = _params(torch.float32, device, [(3,)]), _params(torch.float32, device, [(3,)])
    mine, other = ours_(a, backend=backend, **options), theirs(b, **options)
    _set_grads(a, b, step=0)
    mine.step()
    other.step()
    assert mine.state_dict()["state"][0].keys() == other.state_dict()["state"][0].keys()
    assert mine.state_dict()["param_groups"][0].keys() - {"clip"} <= other.state_dict()["param_groups"][0].keys()


def test_state_dict_is_a_copy_and_pickles(backend, device):
    (p,) = _params(torch.float32, device, [(5,)])
    optimizer = Adam([p], backend=backend)
    _set_grads([p], step=0)
    optimizer.step()
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    optimizer.step()
    torch.testing.assert_close(state, before)
    clone = copy.deepcopy(optimizer)
    clone.param_groups[0]["params"][0].grad = torch.ones(5, device=device)
    clone.step()
    assert clone.state_dict()["state"][0]["step"] == 3


@pytest.mark.parametrize("name", PAIRS)
def test_groups_have_their_own_numbers(name, backend, device):
    ours_, theirs = PAIRS[name]
    sets = [_params(torch.float64, device, [(30,), (2049,)]) for _ in range(2)]
    sets[1] = [nn.Parameter(p.detach().clone()) for p in sets[0]]
    mine = ours_(
        [{"params": sets[0][:1], "lr": 0.5, "clip": 0.1}, {"params": sets[0][1:], "weight_decay": 0.3}], backend=backend
    )
    other = theirs([{"params": sets[1][:1], "lr": 0.5}, {"params": sets[1][1:], "weight_decay": 0.3}])
    for step in range(3):
        _set_grads(*sets, step=step)
        mine.step()
        other.step()
        sets[1][0].data.clamp_(-0.1, 0.1)
        mine.param_groups[0]["lr"] *= 0.5
        other.param_groups[0]["lr"] *= 0.5
    for p, q in zip(*sets, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
    assert mine.saturation.item() == pytest.approx(((sets[1][0].abs() == 0.1).sum() / 30).item())


@pytest.mark.emulated
@pytest.mark.parametrize("name", PAIRS)
def test_options_of_other_optimizers_in_a_group_change_nothing(name, backend, device):
    """As in groups that a user shares between optimizers: each has the other's options, too."""
    foreign = {"rmsprop": {"betas": (0.0, 0.5)}, "adam": {"alpha": 0.5, "momentum": 0.9}}[name]
    ours_, theirs = PAIRS[name]
    mine = _params(torch.float64, device, ((3,),))
    plain = [nn.Parameter(p.detach().clone()) for p in mine]
    optimizers = ours_([{"params": mine, **foreign}], lr=0.1, backend=backend), theirs(plain, lr=0.1)
    for step in range(3):
        _set_grads(mine, plain, step=step)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(mine[0], plain[0], rtol=1e-12, atol=1e-12)


def test_one_launch_for_any_number_of_tensors_and_groups():
    params = _params(torch.float32, "cpu", [(n,) for n in range(1, 101)])
    optimizer = RMSprop([{"params": params[:50], "lr": 0.1}, {"params": params[50:]}], clip=0.01, backend="triton")
    _set_grads(params, step=0)
    optimizer.step()
    with count_kernels() as counts:
        optimizer.step()
    assert dict(counts) == {"_update_kernel": 1}
    doubles = _params(torch.float64, "cpu", [(5,)])
    optimizer.add_param_group({"params": doubles})
    _set_grads(doubles, step=0)
    with count_kernels() as counts:
        optimizer.step()
    assert ours(counts) == {"_update_kernel": 2}


def test_steps_are_counted_per_parameter(backend, device):
    a, b = _params(torch.float32, device, [(3,), (4,)])
    optimizer = Adam([a, b], backend=backend)
    for i in range(3):
        a.grad = torch.ones_like(a)
        b.grad = torch.ones_like(b) if i == 2 else None
        optimizer.step()
    state = optimizer.state_dict()["state"]
    assert (state[0]["step"], state[1]["step"]) == (3, 1)


def test_centered_never_roots_a_negative(backend, device):
    """With a constant gradient s - m^2 tends to zero and rounds below it."""
    p = nn.Parameter(torch.zeros(2000, device=device))
    optimizer = RMSprop([p], alpha=0.5, centered=True, backend=backend)
    for _ in range(60):
        p.grad = torch.linspace(0.1, 3.0, 2000, device=device)
        optimizer.step()
    assert p.isfinite().all()


def test_clamp_keeps_nan_and_counts_the_bound(backend, device):
    p = nn.Parameter(torch.tensor([5.0, -5.0, 0.0, float("nan")], device=device))
    p.grad = torch.zeros_like(p)
    optimizer = RMSprop([p], clip=0.03, backend=backend)
    optimizer.step()
    torch.testing.assert_close(p.data.cpu(), torch.tensor([0.03, -0.03, 0.0, float("nan")]), equal_nan=True)
    assert optimizer.saturation == 0.5


def test_the_share_on_the_bound_is_of_all_weights_small_and_large(backend, device):
    params = [nn.Parameter(torch.zeros(numel, device=device)) for numel in (3, 2**14 - 1, 2**14, 40_000)]
    for i, p in enumerate(params):
        p.data[: 2**i] = 1.0  # 1, 2, 4 and 8 weights outside
        p.grad = torch.zeros_like(p)
    optimizer = RMSprop(params, clip=0.03, backend=backend)
    optimizer.step()
    total = sum(p.numel() for p in params)
    assert round(optimizer.saturation.item() * total, 3) == 1 + 2 + 4 + 8


def test_infinite_weight_without_decay_stays(backend, device):
    p = nn.Parameter(torch.tensor([math.inf], device=device))
    p.grad = torch.ones_like(p)
    RMSprop([p], backend=backend).step()
    assert p.isinf().all()


@pytest.mark.parametrize("which", ["parameter", "gradient", "state"])
@pytest.mark.parametrize("name", PAIRS)
def test_one_tensor_that_is_not_aligned(name, which, backend, device):
    """Of more elements than a program has, so that its neighbours are loaded and stored 16 bytes at a time."""
    n = 2 * 2048 + 5

    def make(unaligned):
        return torch.randn(n + 1, device=device)[1:] if unaligned else torch.randn(n, device=device)

    p = nn.Parameter(make(which == "parameter"))
    q = nn.Parameter(p.detach().clone())
    mine, other = PAIRS[name][0]([p], lr=0.01, backend=backend), PAIRS[name][1]([q], lr=0.01)
    for _ in range(3):
        p.grad = make(which == "gradient")
        q.grad = p.grad.clone()
        mine.step()
        other.step()
        if which == "state":
            state = mine.state[p]
            key = "square_avg" if name == "rmsprop" else "exp_avg_sq"
            state[key] = make(True).copy_(state[key])
    torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_steps_count_as_changes_to_autograd(name, backend, device):
    """A backward pass over weights that a step has changed meanwhile must fail, not go wrong."""
    p = nn.Parameter(torch.full((4,), 2.0, device=device))
    p.grad = torch.ones_like(p)
    y = (p**3).sum()
    PAIRS[name][0]([p], backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("how", ["called", "by a trainer", "with an infinite one"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"maximize": True}, {"clip": 0.01}])
@pytest.mark.parametrize("name", PAIRS)
def test_gradients_stay_as_they_are(name, options, how, backend, device):
    params = _params(torch.float32, device)
    _set_grads(params, step=0)
    params[1].grad *= 1e-41  # subnormal
    if how == "with an infinite one":
        params[2].grad[5] = math.inf
    before = [p.grad.clone() for p in params]
    optimizer = PAIRS[name][0](params, backend=backend, **options)
    if how == "by a trainer":
        optimizer.step_gated(Together(gate=torch.tensor([0.0, 1.0], device=device)))
    else:
        optimizer.step()
    for p, grad in zip(params, before, strict=True):
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("name", PAIRS)
def test_a_trainers_step_is_its_own(name, backend, device):
    """It takes gate, averages and bound from the call alone, and calls what users have put round a step."""
    calls = []

    class Own(PAIRS[name][0]):
        def step(self, closure=None):
            calls.append("own")
            return super().step(closure)

    params = _params(torch.float32, device, [(30,), (5, 5), (7,), (3,)])
    _set_grads(params, step=0)
    params[1].grad = None
    optimizer = Own([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], lr=0.5, clip=9.0, backend=backend)
    optimizer.register_step_pre_hook(lambda *_: calls.append("hook"))
    averages = {p: p.detach().clone() for p in params[:3]}
    kept = [x.clone() for x in averages.values()]
    bounded = {id(p) for p in params[:3]}
    together = Together(torch.tensor([0.0, 1.0], device=device), averages, 0.5, 0.25, bounded)
    shares, clamped = optimizer.step_gated(together)
    assert calls.count("own") == 1
    assert "hook" in calls
    assert clamped == {id(params[0])}, "of the second group one has no bound, and another had no gradient"
    assert sum(n for _, n in shares) == 30
    assert params[0].abs().max() == 0.25
    assert read(shares[0][0]) == (params[0].abs() == 0.25).float().mean() == optimizer.saturation
    assert params[2].abs().max() > 0.25, "only whole groups are clamped with the step"
    torch.testing.assert_close(averages[params[0]], (kept[0] + params[0].detach()) / 2)
    assert torch.equal(averages[params[1]], kept[1])

    before = [x.clone() for x in (*params, *averages.values())]
    shut = together._replace(gate=torch.tensor([1.0, 1.0], device=device))
    assert optimizer.step_gated(shut)[0][0][0].isnan()
    assert all(map(torch.equal, before, (*params, *averages.values())))
    params[0].grad = torch.zeros(30, device=device).to_sparse()
    with pytest.raises(TypeError, match="^grad:"):
        optimizer.step_gated(together)
    _set_grads(params, step=1)
    optimizer.step()
    assert params[0].abs().max() > 0.25, "what was together with the last step is forgotten"
    assert all(map(torch.equal, before[4:], averages.values()))


def test_state_follows_its_parameter(backend, device):
    module, eager = nn.Linear(3, 2).to(device), nn.Linear(3, 2).to(device)
    eager.load_state_dict(module.state_dict())
    optimizer, other = Adam(module.parameters(), backend=backend), torch.optim.Adam(eager.parameters(), foreach=False)
    for dtype in (torch.float32, torch.float64):
        module.to(dtype)
        eager.to(dtype)
        _set_grads(list(module.parameters()), list(eager.parameters()), step=0)
        optimizer.step()
        for state in other.state.values():
            state.update({k: v.to(dtype) for k, v in state.items() if k != "step"})
        other.step()
    torch.testing.assert_close(module.state_dict(), eager.state_dict())
    module.weight.data = torch.ones(5, 5, dtype=torch.float64, device=device)
    before = module.bias.detach().clone()
    with pytest.raises((TypeError, ValueError), match="^(grad|state):"):
        optimizer.step()
    assert torch.equal(module.bias, before)


def test_a_foreign_default_device_changes_nothing(backend, device):
    p = nn.Parameter(torch.ones(3, device=device))
    p.grad = torch.ones_like(p)
    optimizer = RMSprop([p], clip=0.5, backend=backend)
    torch.set_default_device("meta")
    try:
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert optimizer.saturation == 1
    assert p.abs().max() == 0.5


def test_schedulers_and_closures(backend, device):
    (p,) = _params(torch.float32, device, [(3,)])
    optimizer = RMSprop([p], lr=1.0, backend=backend)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    before = p.square().sum().item()
    assert optimizer.step(closure) == before
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


P = nn.Parameter(torch.ones(3))
BAD = [
    ({"lr": -1}, ValueError, "lr"),
    ({"lr": "x"}, TypeError, "lr"),
    ({"lr": torch.tensor(0.1)}, TypeError, "lr"),
    ({"eps": float("nan")}, ValueError, "eps"),
    ({"weight_decay": -1}, ValueError, "weight_decay"),
    ({"clip": 0}, ValueError, "clip"),
    ({"clip": float("inf")}, ValueError, "clip"),
    ({"backend": "cuda"}, ValueError, "backend"),
]


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("options", "error", "argument"), BAD)
def test_bad_options_name_the_argument(name, options, error, argument):
    with pytest.raises(error, match=f"^{argument}:"):
        PAIRS[name][0]([P], **options)


def test_bad_decays_parameters_and_gradients():
    with pytest.raises(ValueError, match="^alpha:"):
        RMSprop([P], alpha=-0.1)
    with pytest.raises(ValueError, match="^momentum:"):
        RMSprop([P], momentum=-1)
    with pytest.raises(ValueError, match=r"^betas\[1\]:"):
        Adam([P], betas=(0.5, 1.0))
    with pytest.raises(TypeError, match="^betas:"):
        Adam([P], betas=0.5)
    with pytest.raises(TypeError, match=r"^params\[0\]:"):
        RMSprop([torch.zeros(3, dtype=torch.complex64, requires_grad=True)])
    with pytest.raises(TypeError, match=r"^params\[0\]:"):
        RMSprop([{"params": torch.zeros(3, dtype=torch.complex64, requires_grad=True)}])
    with pytest.raises(ValueError, match=r"^params\[1\]:"):
        RMSprop([P, P])
    half = nn.Parameter(torch.ones(3, dtype=torch.float16))
    half.grad = torch.ones_like(half)
    optimizer = RMSprop([half], clip=1e5)
    with pytest.raises(ValueError, match="^clip:"):
        optimizer.step()
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    q.grad, p.grad = torch.ones(3).to_sparse(), torch.ones(3)
    with pytest.raises(TypeError, match="^grad:"):
        RMSprop([p, q]).step()
    assert torch.equal(p.data, torch.ones(3))


def test_bad_states_change_nothing():
    p = nn.Parameter(torch.ones(3))
    optimizer = Adam([p], lr=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    other = nn.Parameter(torch.ones(4))
    other.grad = torch.ones(4)
    states = []
    for kind, options in (
        (torch.optim.Adam, {}),  # another shape
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {}),
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adamax, {}),
    ):
        theirs = kind([other], **options)
        theirs.step()
        states.append(theirs.state_dict())
    two = copy.deepcopy(before)
    two["param_groups"] *= 2
    stepless = copy.deepcopy(before)
    del stepless["state"][0]["step"]
    for state in (*states, two, stepless):
        with pytest.raises(ValueError, match="^state_dict:"):
            optimizer.load_state_dict(state)
        torch.testing.assert_close(optimizer.state_dict(), before)


def test_sparse_histories_load():
    """States of an older torch, without every option, and of parameters that have never had a gradient."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = Adam([p, q])
    p.grad = torch.ones(3)
    optimizer.step()
    assert not optimizer.state[q]
    state = optimizer.state_dict()
    del state["param_groups"][0]["maximize"]
    optimizer.load_state_dict(state)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_triton_that_cannot_be_had_says_why(monkeypatch):
    monkeypatch.setattr(fastwgan.backend.kernels, "INTERPRETED", False)
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="^backend: 'triton' was asked for, but Triton needs a GPU tensor"):
        RMSprop([p], backend="triton").step()
    RMSprop([p], backend="auto").step()


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.emulated)])
@pytest.mark.parametrize("name", ["RMSprop", "Adam"])
def test_what_a_nan_leaves_behind_is_in_the_state_alone(name, backend):
    """Weights and state put right again, the next step is: there is no memory that a state_dict does not have."""
    p = torch.nn.Parameter(torch.zeros(5))
    optimizer = getattr(fastwgan, name)([p], lr=0.1, backend=backend)
    p.grad = torch.full((5,), math.nan)
    optimizer.step()
    with torch.no_grad():
        for x in (p, *(x for x in optimizer.state[p].values())):
            x.zero_()
    p.grad = torch.ones(5)
    optimizer.step()
    assert p.isfinite().all()
    assert (p < 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_decays_given_as_lists_are_kept_as_tuples(backend, device):
    """A plan of the step serves as long as its numbers are the same, and a list may change and be the same."""
    runs = []
    for kind in (list, tuple):
        p = nn.Parameter(torch.ones(3, device=device))
        optimizer = Adam([p], lr=0.1, betas=kind((0.0, 0.9)), backend=backend)
        for beta in (0.0, 0.0, 0.5, 0.5):
            optimizer.param_groups[0]["betas"] = kind((beta, 0.9))
            p.grad = torch.full_like(p, 1.0 + beta)
            optimizer.step()
            assert optimizer.param_groups[0]["betas"] == (beta, 0.9)
        runs.append(p.detach().clone())
    assert torch.equal(*runs)
