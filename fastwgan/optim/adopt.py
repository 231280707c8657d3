"""Ours in place of a torch RMSprop or Adam that a user has made, and goes on to use."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastwgan.backend import Backend
from fastwgan.optim.algorithms import Adam, RMSprop

OURS: dict[type[Optimizer], type[Adam] | type[RMSprop]] = {kind.adopts: kind for kind in (Adam, RMSprop)}


def adopt(optimizer: Optimizer, backend: Backend) -> Optimizer:
    """Return ours in place of a plain torch RMSprop or Adam, sharing its groups and state; any other as it is.

    Sharing keeps the caller's object alive: a scheduler made for it steers ours, and its hooks are called.
    """
    if type(optimizer) not in OURS:
        return optimizer
    for group in optimizer.param_groups:
        numbers = (group["lr"], *group.get("betas", ()))
        if any(isinstance(x, Tensor) for x in numbers) or group.get("amsgrad") or group.get("decoupled_weight_decay"):
            return optimizer
    params = [p for group in optimizer.param_groups for p in group["params"]]
    adopted = OURS[type(optimizer)](params, backend=backend)
    adopted.param_groups, adopted.state = optimizer.param_groups, optimizer.state
    adopted.defaults.update({k: v for k, v in optimizer.defaults.items() if k in adopted.defaults})  # of groups to come
    for group in adopted.param_groups:
        group["clip"] = None  # not the bound of another trainer, which had it before
    for p, state in adopted.state.items():
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(p.device)
    adopted._optimizer_step_pre_hooks = optimizer._optimizer_step_pre_hooks
    adopted._optimizer_step_post_hooks = optimizer._optimizer_step_post_hooks
    adopted.register_step_post_hook(MarksStepTaken(optimizer))
    follow_loads(optimizer, adopted)
    return adopted


def follow_loads(optimizer: Optimizer, adopted: Optimizer) -> None:
    """Load into ours what the caller loads into their object, which gets new groups and state by that; share ours."""

    def follow(loaded: Optimizer) -> None:
        state = loaded.state_dict()
        for group in state["param_groups"]:
            group.pop("clip", None)  # the constraint is the trainer's, not the state's
        adopted.load_state_dict(state)
        loaded.param_groups, loaded.state = adopted.param_groups, adopted.state

    optimizer.register_load_state_dict_post_hook(follow)


def has_hooks(optimizer: Optimizer) -> bool:
    """Return whether an optimizer has step hooks beside :func:`adopt`'s."""
    hooks = (*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values())
    return any(not isinstance(hook, MarksStepTaken) for hook in hooks)


class MarksStepTaken:
    """A step hook that tells torch's schedulers, which warn otherwise, that the optimizer they know takes steps."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def __call__(self, *_: Any) -> None:
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
