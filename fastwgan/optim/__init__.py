"""RMSprop and Adam whose step, with the weight clamp, is one launch for all parameters of a device and dtype.

Defaults, formulas and ``state_dict`` keys are ``torch.optim``'s, so a checkpoint of one loads into the other. New is
``clip``: after the update each weight is clamped to [-clip, clip] in the same launch; None leaves it alone. It can
be given per parameter group. A ``torch.amp.GradScaler`` may call the step: gradients are then unscaled in the launch,
and a step that it wants left out is left out without the host's waiting for its verdict.
"""

from fastwgan.optim.algorithms import Adam, RMSprop
from fastwgan.optim.base import Gated

__all__ = ["Adam", "Gated", "RMSprop"]
