"""Exact gradients through whole training runs, in bounded memory, on JAX."""

from metagradient import errors, schedule
from metagradient.metagrad import Metagradient, Stats, train, value_and_metagrad
from metagradient.metaparameters import PerExample, PerStep, Shared
from metagradient.objectives import mean_over
from metagradient.step.segment import Segment
from metagradient.training import Training, TrainState

__all__ = [
    "Metagradient",
    "PerExample",
    "PerStep",
    "Segment",
    "Shared",
    "Stats",
    "TrainState",
    "Training",
    "errors",
    "mean_over",
    "schedule",
    "train",
    "value_and_metagrad",
]
