"""Exact gradients through whole training runs, in bounded memory, on JAX."""

from metagradient import errors, schedule, smoothness, updates
from metagradient.descent.loop import Best, Descent, MetaStep, descend, fresh_seed
from metagradient.metagrad import Evaluation, Metagradient, Stats, value_and_metagrad
from metagradient.metaparameters import PerExample, PerStep, Shared
from metagradient.objectives import mean_over
from metagradient.planning import plan
from metagradient.replay.budget import Memory
from metagradient.replay.plan import Plan
from metagradient.run import train, train_many
from metagradient.smoothness import Smoothness, metasmoothness
from metagradient.step.segment import Segment
from metagradient.surrogate import CountSurrogate, probe_at
from metagradient.training import Training, TrainState
from metagradient.verify import CheckReport, check

__all__ = [
    "Best",
    "CheckReport",
    "CountSurrogate",
    "Descent",
    "Evaluation",
    "Memory",
    "MetaStep",
    "Metagradient",
    "PerExample",
    "PerStep",
    "Plan",
    "Segment",
    "Shared",
    "Smoothness",
    "Stats",
    "TrainState",
    "Training",
    "check",
    "descend",
    "errors",
    "fresh_seed",
    "mean_over",
    "metasmoothness",
    "plan",
    "probe_at",
    "schedule",
    "smoothness",
    "train",
    "train_many",
    "updates",
    "value_and_metagrad",
]
