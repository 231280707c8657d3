"""RMSprop and Adam whose step, with the weight clamp, is one launch for all parameters of a device and dtype.

Defaults, formulas and ``state_dict`` keys are ``torch.optim``'s, so a checkpoint of one loads into the other. New is
``clip``: after the update each weight is clamped to [-clip, clip] in the same launch; None leaves it alone. It can
be given per parameter group. A ``torch.amp.GradScaler`` may call the step: gradients are then unscaled in the launch,
and a step that it wants left out is left out without the host's waiting for its verdict.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastwgan import checks, reference
from fastwgan.backend import Backend, kernels, resolve
from fastwgan.ops.layout import is_dense, same_layout
from fastwgan.ops.weights import combine_shares

__all__ = ["Adam", "RMSprop"]

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


LONG_AFTER = torch.tensor(1e30, device="cpu")  # a step count t at which 1 - beta^t is 1 for every beta < 1


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


_Key = tuple[torch.device, torch.dtype, bool, bool, bool]  # has momentum, centered, averaged: one launch's parameters
_Member = tuple[Tensor, dict[str, Any], float | None]  # a parameter, its group, and the bound of that


class _Optimizer(Optimizer):
    """What the two share: checks, state, grouping into launches. A subclass names its state and its numbers."""

    _algorithm: str
    _states: tuple[str, ...]  # every state tensor the algorithm can have, in the kernel's order
    _required: tuple[str, ...]  # options that tell a state of this algorithm from another's
    _step_supports_amp_scaling = True  # so a GradScaler sets found_inf and grad_scale, and leaves the rest to the step
    gate: Tensor | None = None  # [2] float32: 1 to leave the step out, else 0; a factor of gradients. For the trainer
    averages: dict[Tensor, Tensor]  # running averages of weights, which the step keeps. For the trainer
    decay: float  # of these
    clamp: tuple[float, set[int]] | None = None  # a bound, and the ids of parameters that have it. For the trainer

    def __init__(self, params: Params, defaults: dict[str, Any], backend: Backend) -> None:
        if backend not in ("auto", "triton", "torch"):
            raise ValueError(f"backend: expected 'auto', 'triton' or 'torch', got {backend!r}")
        if not isinstance(params, Iterable):
            raise TypeError(f"params: expected tensors or groups of them, got {type(params).__name__}")
        self.backend: Backend = backend
        self._updates: dict[_Key, Any] = {}
        self._apart: dict[_Key, list[int]] = {}  # where parameters lie that are known not to overlap
        self.averages, self.decay = {}, 0.0
        self.shares: list[tuple[Tensor, int]] = []  # of the last step: (share of weights on their bound, of how many)
        super().__init__(params, {**defaults, "differentiable": False})  # an option that torch's base class looks for

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "eps", "weight_decay"):
            checks.number(name, group[name], minimum=0)
        if group.get("clip") is not None:
            checks.number("clip", group["clip"], minimum=0, exclusive=True)
        for variant in ("amsgrad", "decoupled_weight_decay"):
            if group.get(variant, False):
                raise ValueError(f"{variant}: expected False, which {type(self).__name__} computes, got True")

    def _bound(self, group: dict[str, Any]) -> float | None:
        """Return the bound of a group's weights: the trainer's, where all of them have it, or the group's own.

        A group that was added to a torch optimizer, whose groups are ours, has none of its own.
        """
        if self.clamp is None:
            return group.get("clip")
        bound, bounded = self.clamp
        return bound if bounded.issuperset(map(id, group["params"])) else None

    @staticmethod
    def _variant(group: dict[str, Any]) -> tuple[bool, bool]:
        """What makes another kernel of the algorithm: (has momentum, centered)."""
        return group.get("momentum", 0) > 0, bool(group.get("centered", False))

    def _used_states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        """The names of the state tensors that ``group`` uses, None where one is not used."""
        return self._states

    def _hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
        """The kernel's numbers but the last three, which are not the algorithm's."""
        raise NotImplementedError

    def _step_reference(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options it does not name take the optimizer's defaults.

        Raises:
            TypeError, ValueError: an option or a parameter cannot be used. Nothing is changed then.
        """
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group: expected a dict with params, got {param_group!r}")
        self._check_group({**self.defaults, **param_group})
        params = param_group["params"]
        if not isinstance(params, set):  # torch refuses sets, whose order changes
            params = param_group["params"] = [params] if isinstance(params, Tensor) else list(params)
            seen = set()
            for i, entry in enumerate(params):
                p = entry[1] if isinstance(entry, tuple) else entry
                checks.parameter(f"params[{i}]", p)
                if id(p) in seen:
                    raise ValueError(f"params[{i}]: expected each parameter once, got one that stands before it")
                seen.add(id(p))
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("decay", 0.0)
        for name in ("_updates", "_apart", "averages"):  # kept by load_state_dict: a graph may read the tables
            self.__dict__.setdefault(name, {})
        self.shares = []
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "defaults": self.defaults,
            "state": self.state,
            "param_groups": self.param_groups,
            "backend": self.backend,
        }

    @property
    def saturation(self) -> Tensor | None:
        """The share of clamped weights that lay on their bound after the last step, 0-d; None if none are clamped.

        Of the last call of :meth:`step`, that is: a CUDA graph's replays make no call.
        """
        combined = combine_shares(self.shares)
        return None if combined is None else combined[0]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    # A compiled training loop calls it as it is: a graph cannot hold addresses.
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and clamp it.

        Args:
            closure: computes and returns the loss, with gradients, before the update.

        Returns:
            The closure's loss, or None.

        Raises:
            TypeError, ValueError: a gradient or an option cannot be used. Nothing is changed then.
            RuntimeError: ``backend="triton"`` cannot be met.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        buckets: dict[_Key, list[_Member]] = {}
        for group in self.param_groups:
            self._check_group(group)
            variant, bound = self._variant(group), self._bound(group)
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    self._check_member(p, bound)
                    buckets.setdefault((p.device, p.dtype, *variant, p in self.averages), []).append((p, group, bound))
        gate = self._gate() if buckets else None
        backends = {key: resolve(self.backend, key[0]) for key in buckets}
        self.shares = []
        with torch.no_grad():
            for key, members in buckets.items():
                if backends[key] == "torch":
                    self._step_torch(members, gate)
                else:
                    self._step_triton(key, members, gate)
        return loss

    def _gate(self) -> Tensor | None:
        """The trainer's, or what a GradScaler has set for this step, in one tensor."""
        found: Tensor | None = getattr(self, "found_inf", None)
        if found is None:
            return self.gate
        scale: Tensor | None = getattr(self, "grad_scale", None)  # None once gradients have been unscaled
        factor = torch.ones_like(found) if scale is None else 1 / scale
        return torch.stack((found.reshape(()), factor.reshape(()))).float()

    def _check_member(self, p: Tensor, bound: float | None) -> None:
        """Raise unless a kernel given addresses alone would read and write the right memory."""
        grad = p.grad
        assert grad is not None
        if (grad.shape, grad.dtype, grad.device, grad.layout) != (p.shape, p.dtype, p.device, torch.strided):
            expected, got = (f"{tuple(x.shape)} {x.dtype} {x.layout} on {x.device}" for x in (p, grad))
            raise TypeError(f"grad: expected {expected}, got {got}")
        state = self.state.get(p, {})
        for name in self._states:
            if name in state and state[name].shape != p.shape:
                raise ValueError(f"state: {name}: expected shape {tuple(p.shape)}, got {tuple(state[name].shape)}")
        if bound is not None:
            checks.bound("clip", bound, p.dtype)

    def _ensure_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """p's state: made where it is missing, and following p to another dtype or device."""
        state: dict[str, Any] = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        elif state["step"].device != p.device or state["step"].dtype != torch.float32:
            state["step"] = state["step"].to(p.device, torch.float32)
        for name in self._used_states(group):
            if name is None:
                continue
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            elif state[name].dtype != p.dtype or state[name].device != p.device:
                state[name] = state[name].to(p.device, p.dtype)
        return state

    def _step_torch(self, members: list[_Member], gate: Tensor | None) -> None:
        skip, factor = (0.0, 1.0) if gate is None else gate.tolist()  # on a GPU this waits, as PyTorch's optimizers do
        if skip:
            clamped = sum(p.numel() for p, _, bound in members if bound is not None)
            if clamped:
                unknown = members[0][0].new_tensor(math.nan, dtype=torch.float32)
                self.shares.append((unknown, clamped))
            return
        if factor != 1:  # not in place, as two gradients may share memory
            grads = torch._foreach_mul([p.grad for p, *_ in members if p.grad is not None], factor)
            for (p, *_), grad in zip(members, grads, strict=True):
                p.grad = grad
        groups: dict[int, tuple[dict[str, Any], float | None, list[Tensor]]] = {}
        for p, group, bound in members:
            groups.setdefault(id(group), (group, bound, []))[2].append(p)
        for group, _, params in groups.values():
            self._step_group(params, [self._ensure_state(p, group) for p in params], group)
        for _, bound, params in groups.values():  # after all updates, of which two may be of one memory
            if bound is not None:
                reference.clip_weights_(params, bound)
                on_bound, total = reference.saturation(params, bound)
                self.shares.append((on_bound / total, total))
        if self.averages:
            kept = [p for p, *_ in members if p in self.averages]
            reference.average_([self.averages[p] for p in kept], kept, self.decay)

    def _step_group(self, params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
        for p, state in zip(params, states, strict=True):
            assert p.grad is not None
            self._step_reference(p, p.grad, state, group)

    def _step_triton(self, key: _Key, members: list[_Member], gate: Tensor | None) -> None:
        device, dtype, momentum, centered, averaged = key
        places = [p.data_ptr() for p, *_ in members]
        if places != self._apart.get(key):
            checks.refuse_overlap([p for p, *_ in members])
            self._apart[key] = places
        params, grads, states, steps, copies = [], [], [], [], []
        groups = self._groups_of(key)
        hyper_rows, clamped = [], 0
        row_of_group = {id(group): row for row, group in enumerate(groups)}
        for p, group, bound in members:
            if kernels.arrival.capturing(device) and not self.state[p]:
                raise RuntimeError(kernels.table.NOT_WARM)  # a replay would make the state anew
            state = self._ensure_state(p, group)
            work = p if is_dense(p) else p.detach().contiguous()
            if work is not p:
                copies.append((p, work))
            assert p.grad is not None
            grad = p.grad.resolve_neg()
            if not same_layout(grad, work):
                grad = torch.empty_like(work).copy_(grad)
            names = self._used_states(group)
            for name in names:
                if name is not None and not same_layout(state[name], work):
                    state[name] = torch.empty_like(work).copy_(state[name])
            if averaged and not same_layout(self.averages[p], work):
                self.averages[p] = torch.empty_like(work, dtype=self.averages[p].dtype).copy_(self.averages[p])
            params.append(work)
            grads.append(grad)
            states.append([None if name is None else state[name] for name in names])
            steps.append(state["step"])
            hyper_rows.append(row_of_group[id(group)])
            clamped += 0 if bound is None else p.numel()
        if key not in self._updates:
            self._updates[key] = kernels.update.Update(device, dtype)
        if gate is not None:  # a GradScaler has one, on one of the devices
            gate = gate.to(device, non_blocking=True)
        share = self._updates[key].launch(
            self._algorithm, params, grads, states, steps, self._hyper_rows(key), hyper_rows, gate=gate,
            averages=[self.averages[p] for p, *_ in members] if averaged else None,
            momentum=momentum, centered=centered,
        )  # fmt: skip
        torch.autograd.graph.increment_version([p for p, *_ in members])
        for p, work in copies:
            p.copy_(work)
        if share is not None:
            self.shares.append((share, clamped))

    def _groups_of(self, key: _Key) -> list[dict[str, Any]]:
        """The groups that a launch may be of, one row of numbers each, whether or not their parameters have gradients:
        so a row stays a group's, in a graph too."""
        return [group for group in self.param_groups if self._variant(group) == key[2:4]]

    def _hyper_rows(self, key: _Key) -> tuple[tuple[float, ...], ...]:
        rows = []
        for group in self._groups_of(key):
            # The bound as this dtype holds it, so that weights on it are counted.
            bound = self._bound(group)
            none = bound is None or bound > torch.finfo(key[1]).max
            limit = math.inf if none else checks.bound("clip", bound, key[1])
            rows.append((*self._hyper(group), self.decay, 1 - self.decay, limit))
        return tuple(rows)

    def refresh(self) -> None:
        """Have launches that a CUDA graph replays use the groups' present numbers, as a replay runs no Python.

        Not only ``lr`` but every number counts, as long as the same algorithm and the same parameters are meant.

        Raises:
            TypeError, ValueError: an option cannot be used. Nothing is changed then.
        """
        for group in self.param_groups:
            self._check_group(group)
        for key, update in self._updates.items():
            update.set_hyper(self._hyper_rows(key))

    def state_dict(self) -> dict[str, Any]:
        """The state as ``torch.optim``'s optimizer of the same name has it: a copy that later steps do not change."""
        result = super().state_dict()
        result["state"] = {
            i: {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            for i, state in result["state"].items()
        }
        for state in result["state"].values():
            if "step" in state:
                state["step"] = state["step"].cpu()
        return result

    def _check_state(self, i: int, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if not state:
            return
        for name in ("step", *filter(None, self._used_states(group))):
            if name not in state:
                raise ValueError(f"state_dict: parameter {i}: expected {name}, got {', '.join(map(str, state))}")
            shape = () if name == "step" else p.shape
            value = torch.as_tensor(state[name])
            if value.shape != shape:
                got = tuple(value.shape)
                raise ValueError(f"state_dict: {name} of parameter {i}: expected shape {tuple(shape)}, got {got}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a state from :meth:`state_dict`, or from ``torch.optim``'s optimizer of the same name.

        A torch state has no ``clip``; the groups keep theirs.

        Raises:
            ValueError: the state belongs to other parameters, or to a variant this optimizer does not compute
                (``amsgrad``, ``decoupled_weight_decay``). Nothing is changed then.
        """
        if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
            came = ", ".join(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ValueError(f"state_dict: expected a dict of state and param_groups, got {came}")
        state_dict = copy.deepcopy(state_dict)
        groups = state_dict["param_groups"]
        if len(groups) != len(self.param_groups):
            raise ValueError(f"state_dict: expected {len(self.param_groups)} parameter groups, got {len(groups)}")
        for group, own in zip(groups, self.param_groups, strict=True):
            missing = [name for name in self._required if name not in group]
            if missing:
                raise ValueError(f"state_dict: expected a state of {type(self).__name__}, missing {', '.join(missing)}")
            group.setdefault("clip", own.get("clip"))
            for name, default in self.defaults.items():
                group.setdefault(name, default)  # an older torch did not save them all
            try:
                self._check_group(group)
            except (TypeError, ValueError) as error:
                raise type(error)(f"state_dict: {error}") from error
            if len(group["params"]) != len(own["params"]):
                expected, got = len(own["params"]), len(group["params"])
                raise ValueError(f"state_dict: expected {expected} parameters in a group, got {got}")
            for i, p in zip(group["params"], own["params"], strict=True):
                self._check_state(i, p, group, state_dict["state"].get(i, {}))
        # The group dicts stay the same objects: a scheduler, or the torch optimizer they were taken from, holds them.
        own_groups, own_state = self.param_groups, self.state
        super().load_state_dict(state_dict)
        for own, loaded in zip(own_groups, self.param_groups, strict=True):
            own.clear()
            own.update(loaded)
        own_state.clear()
        own_state.update(self.state)
        self.param_groups, self.state = own_groups, own_state
        for p, state in self.state.items():
            if state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(p.device).clone()


def _fusible(*tensors: Tensor) -> bool:
    """Whether PyTorch's fused Adam step can take them: on a CPU, and contiguous, as it takes every array to be."""
    return all(
        x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous() and not x.is_neg()
        for x in tensors
    )


def _fused_step(
    params: list[Tensor], grads: list[Tensor], means: list[Tensor], squares: list[Tensor], steps: list[Tensor],
    group: dict[str, Any], beta1: float, beta2: float,
) -> None:  # fmt: skip
    """PyTorch's fused Adam step on a CPU, which reads and writes each array once, as our kernel does on a GPU."""
    torch._fused_adam_(
        params, grads, means, squares, [], steps, lr=float(group["lr"]), beta1=beta1, beta2=beta2,
        weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=group["maximize"],
    )  # fmt: skip
    torch.autograd.graph.increment_version(params)  # the fused step leaves it to its caller


class RMSprop(_Optimizer):
    r"""RMSprop and the weight clamp, in place, in one launch per device and dtype.

    .. code-block:: text

        g = grad + weight_decay * p                           (-grad with maximize)
        s = alpha * s + (1 - alpha) * g^2
        a = sqrt(s) + eps                                     sqrt(s - m^2) + eps with centered, m the mean of g
        p = p - lr * g / a                                    b = momentum * b + g / a;  p = p - lr * b with momentum
        p = min(max(p, -clip), clip)

    Args:
        params: tensors or dicts of groups, as ``torch.optim`` takes them.
        lr, alpha, eps, weight_decay, momentum, centered, maximize: as in ``torch.optim.RMSprop``.
        clip: bound > 0 of the weights after the step, or None; also per group.
        backend: see :mod:`fastwgan.backend`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: WGAN, arXiv 1701.07875, Algorithm 1, lines 6 and 7; formula and defaults of torch.optim.RMSprop.

    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> w.grad = torch.ones(2)
    >>> RMSprop([w], lr=5e-5, clip=0.01).step()
    >>> w.data
    tensor([0.0100, 0.0100])
    """

    _algorithm = "rmsprop"
    _states = ("square_avg", "grad_avg", "momentum_buffer")
    _required = ("lr", "alpha", "eps")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        *,
        clip: float | None = None,
        maximize: bool = False,
        backend: Backend = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "alpha": alpha,
            "eps": eps,
            "centered": centered,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "clip": clip,
        }
        super().__init__(params, defaults, backend)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        checks.number("alpha", group["alpha"], minimum=0)
        checks.number("momentum", group["momentum"], minimum=0)

    def _used_states(self, group: dict[str, Any]) -> tuple[str | None, ...]:
        return (
            "square_avg",
            "grad_avg" if group["centered"] else None,
            "momentum_buffer" if group["momentum"] > 0 else None,
        )

    def _hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
        alpha, sign = group["alpha"], -1.0 if group["maximize"] else 1.0
        return (group["lr"], 0.0, 1.0, -math.inf, alpha, 1 - alpha, 0.0, group["eps"], group["weight_decay"],
                group["momentum"], sign)  # fmt: skip

    def _step_reference(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        options = {k: group[k] for k in ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")}
        _, grad_avg, buffer = (None if name is None else state[name] for name in self._used_states(group))
        reference.rmsprop_step_(p, grad, state["square_avg"], grad_avg=grad_avg, momentum_buffer=buffer, **options)
        state["step"] += 1

    def _step_group(self, params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        squares = [state["square_avg"] for state in states]
        if group["momentum"] or group["centered"] or group["alpha"] >= 1 or not _fusible(*params, *grads, *squares):
            super()._step_group(params, states, group)
            return
        # Adam without memory of the gradient (beta1 = 0), long after its first steps, where its bias corrections are 1:
        # that is RMSprop. The step writes the gradient to its mean. That is what p.grad holds, so p.grad can be the
        # mean, which spares an array; but not where the step changes the gradient first, nor where one may be infinite,
        # as inf - inf would be written. The trainer, which sets a gate, has looked.
        kept = self.gate is not None and not group["maximize"] and group["weight_decay"] == 0
        means = grads if kept else [grad.clone() for grad in grads]
        _fused_step(params, grads, means, squares, [LONG_AFTER] * len(params), group, 0.0, group["alpha"])
        torch._foreach_add_([state["step"] for state in states], 1)


class Adam(_Optimizer):
    r"""Adam and the weight clamp, in place, in one launch per device and dtype.

    .. code-block:: text

        g = grad + weight_decay * p                           (-grad with maximize)
        t = t + 1
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
        p = min(max(p, -clip), clip)

    Args:
        params: tensors or dicts of groups, as ``torch.optim`` takes them.
        lr, betas, eps, weight_decay, maximize: as in ``torch.optim.Adam``; no amsgrad.
        clip: bound > 0 of the weights after the step, or None; also per group.
        backend: see :mod:`fastwgan.backend`.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: Kingma and Ba, arXiv 1412.6980, Algorithm 1; formula and defaults of torch.optim.Adam.

    >>> w = torch.nn.Parameter(torch.ones(2))
    >>> w.grad = torch.ones(2)
    >>> Adam([w], lr=1e-4, betas=(0.0, 0.9)).step()
    >>> w.data
    tensor([0.9999, 0.9999])
    """

    _algorithm = "adam"
    _states = ("exp_avg_sq", "exp_avg")
    _required = ("lr", "betas", "eps")

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        clip: float | None = None,
        maximize: bool = False,
        backend: Backend = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "clip": clip,
        }
        super().__init__(params, defaults, backend)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas: expected two numbers, got {betas!r}")
        for i, beta in enumerate(betas):
            if checks.number(f"betas[{i}]", beta, minimum=0) >= 1:
                raise ValueError(f"betas[{i}]: expected a number in [0, 1), got {beta}")

    def _hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
        (beta1, beta2), sign = group["betas"], -1.0 if group["maximize"] else 1.0
        return (group["lr"], beta1, 1 - beta1, _log(beta1), beta2, 1 - beta2, _log(beta2), group["eps"],
                group["weight_decay"], 0.0, sign)  # fmt: skip

    def _step_reference(self, p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        options = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay", "maximize")}
        reference.adam_step_(p, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], **options)

    def _step_group(self, params: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]) -> None:
        grads = [p.grad.resolve_neg() for p in params if p.grad is not None]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        if not _fusible(*params, *grads, *means, *squares):
            super()._step_group(params, states, group)
            return
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        _fused_step(params, grads, means, squares, steps, group, *group["betas"])
