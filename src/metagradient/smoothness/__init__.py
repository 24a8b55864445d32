"""How smooth a training is in its metaparameters, and which recipes are smoother: `mg.smoothness`."""

from metagradient.smoothness.directions import random_directions
from metagradient.smoothness.probe import Smoothness, metasmoothness
from metagradient.smoothness.sweep import Candidate, Outcome, Sweep, jointly, one_at_a_time, read_sweep, sweep

__all__ = [
    "Candidate",
    "Outcome",
    "Smoothness",
    "Sweep",
    "jointly",
    "metasmoothness",
    "one_at_a_time",
    "random_directions",
    "read_sweep",
    "sweep",
]
