"""Checkpoint schedules, and the simulator that proves their promises: `mg.schedule`."""

from metagradient.replay.schedule import Binomial, Cost, KaryTree, KeepAll, Schedule, TwoLevel, simulate

__all__ = ["Binomial", "Cost", "KaryTree", "KeepAll", "Schedule", "TwoLevel", "simulate"]
