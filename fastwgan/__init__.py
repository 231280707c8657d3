"""FastWGAN: Wasserstein GANs whose critic step is a few Triton kernels. See README.md."""

from fastwgan import distances, functional, reference
from fastwgan.constraints import GradientPenalty, NormClip, WeightClip
from fastwgan.metrics import Metrics
from fastwgan.optim import Adam, RMSprop
from fastwgan.trainer import StepRecord, Trainer, warmup_schedule
from fastwgan.verification.verify import verify
from fastwgan.version import __version__

__all__ = [
    "Adam", "GradientPenalty", "Metrics", "NormClip", "RMSprop", "StepRecord", "Trainer", "WeightClip", "__version__",
    "distances", "functional", "reference", "verify", "warmup_schedule",
]  # fmt: skip
