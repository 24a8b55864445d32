"""Schedules from a memory budget."""

import os
from math import isqrt

import jax

from metagradient.replay.schedule import Binomial, KeepAll, Schedule, TwoLevel
from metagradient.step.segment import Segment


def free_bytes() -> int:
    """Free memory of the device that computes: of the host, where that is the device."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def affordable(segments: int, segment: Segment, state_bytes: int) -> Schedule:
    """The schedule with the fewest replays whose states fit in half of the free memory.

    Arguments:
        segments: number of segments.
        segment: how they are compiled.
        state_bytes: bytes of one state.
    """
    budget = free_bytes() // 2
    kept = segment.length * state_bytes * (2 if segment.keep == "gradient" else 1)
    if segments * kept <= budget:
        return KeepAll()
    every = isqrt(segments - 1) + 1
    if every * (kept + state_bytes) <= budget:
        return TwoLevel()
    return Binomial(max(1, (budget - kept) // state_bytes))
