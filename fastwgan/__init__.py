"""FastWGAN: Wasserstein GANs whose critic step is a few Triton kernels. See README.md."""

from fastwgan import distances, functional, reference
from fastwgan.constraints import GradientPenalty, NormClip, WeightClip
from fastwgan.metrics import Metrics
from fastwgan.optim import Adam, RMSprop
from fastwgan.trainer import Trainer, warmup_schedule
from fastwgan.verification.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Adam",
    "GradientPenalty",
    "Metrics",
    "NormClip",
    "RMSprop",
    "Trainer",
    "WeightClip",
    "distances",
    "functional",
    "reference",
    "verify",
    "warmup_schedule",
]
