"""The loop round a trainer: batches in; logs, pictures, checkpoints and advice out."""

from fastwgan.training.fit import fit
from fastwgan.training.health import HealthWarning

__all__ = ["HealthWarning", "fit"]
