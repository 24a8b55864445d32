r"""The cheapest reversal of a run over tiers of stored states: binomial on the device, dynamic programming across tiers.

All of it is numbers: seconds and bytes a segment, and segments. With $a$ the seconds of an advance, $w_k, r_k$ those of
a save to and a restore from tier $k$, and $c$ free slots of it,

$$ W_k(n, c) = \min\{W_{k-1}(n), \; w_k + X_k(n, c-1)\}, \qquad S_k(n, c) = r_k + \min\{W_{k-1}(n), \; X_k(n, c)\}, $$
$$ X_k(n, c) = \min_{0 < j < n} \; a j + W_k(n - j, c) + S_k(j, c) $$

are the fewest seconds that reverse $n$ segments, from a start that is the working state ($W$) or stored in tier $k$
($S$). $W_{k-1}(n)$ has all slots of the faster tiers. At $k = 0$ it is a leaf: as many segments kept at once as fit
beside what the device stores.

Source: Herrmann & Pallez 2020, "H-Revolve: A Framework for Adjoint Computation on Synchronous Hierarchical Platforms",
ACM Transactions on Mathematical Software 46(2); leaves of several segments, sharing the device's bytes, are ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from metagradient.replay.schedule import (
    Action,
    Advance,
    Binomial,
    Drop,
    Keep,
    PullBack,
    Restore,
    Save,
    Tier,
    binomial_advances,
)


@dataclass(frozen=True, slots=True)
class Level:
    """A slower tier.

    Arguments:
        tier: its name.
        slots: states it may hold, at least 1.
        save_seconds: of one state.
        restore_seconds: of one state.
    """

    tier: Tier
    slots: int
    save_seconds: float
    restore_seconds: float


@dataclass(frozen=True, slots=True)
class Problem:
    """A run to reverse.

    Arguments:
        segments: its length.
        advance_seconds: of one segment.
        elided_seconds: what a leaf saves by not reaching its end.
        room: device bytes for stored states and kept segments; at least one kept segment.
        state_bytes: of a stored state.
        kept_bytes: of a kept segment.
        slots: states stored on the device at once, at most. With `room` for fewer, fewer.
        levels: slower tiers, the fastest first.
        grain: segments between two places where a slower tier may store.
        closed: take the closed form on the device: binomial, with one segment a leaf. Else tabulate it.
    """

    segments: int
    advance_seconds: float
    elided_seconds: float
    room: int
    state_bytes: int
    kept_bytes: int
    slots: int
    levels: tuple[Level, ...] = ()
    grain: int = 1
    closed: bool = False

    @property
    def device_slots(self) -> int:
        """States that the device stores at most."""
        return max(0, min(self.slots, self.segments - 1, (self.room - self.kept_bytes) // self.state_bytes))

    def leaf(self, free: int) -> int:
        """Segments that can be kept at once while `free` device slots are."""
        stored = self.device_slots - free
        return (self.room - stored * self.state_bytes) // self.kept_bytes


class _Table(NamedTuple):
    """Seconds by free slots (rows) and segments (columns): `W` and `S` above, and the seconds without this tier."""

    fresh: np.ndarray
    stored: np.ndarray
    without: np.ndarray


@lru_cache(maxsize=16)
def _tables(problem: Problem) -> tuple[_Table | None, tuple[_Table, ...]]:
    """The device's table, None where it isn't needed, and one for each slower tier.

    Cost: `N^2 / 2` operations a slot, with N the segments for the device, and `segments / grain` for slower tiers.
    """
    device = None
    columns = -(-problem.segments // problem.grain)
    ends = np.minimum(problem.grain * np.arange(columns + 1), problem.segments)
    if problem.closed:
        slots = problem.device_slots
        # Grain by grain, as only those are asked for.
        seconds = np.array([_binomial_seconds(problem, n, slots) for n in ends.tolist()])
    elif problem.leaf(problem.device_slots) >= problem.segments:
        seconds = np.full(columns + 1, -problem.elided_seconds)
    else:
        free = np.arange(problem.device_slots + 1)
        most = np.array([problem.leaf(m) for m in free.tolist()])
        fits = np.arange(problem.segments + 1) <= most[:, None]
        leaves = np.where(fits, -problem.elided_seconds, np.inf)
        device = _table(leaves, problem.advance_seconds, 0.0, 0.0)
        seconds = device.fresh[-1, ends]
    slower = []
    for level in problem.levels:
        slots = min(level.slots, columns - 1)
        without = np.broadcast_to(seconds, (slots + 1, columns + 1))
        advance = problem.grain * problem.advance_seconds
        slower.append(_table(without, advance, level.save_seconds, level.restore_seconds))
        seconds = slower[-1].fresh[-1]
    return device, tuple(slower)


def _binomial_seconds(problem: Problem, segments: int, slots: int) -> float:
    if segments <= 1:
        return -problem.elided_seconds
    if not slots:
        return np.inf
    return binomial_advances(segments, slots) * problem.advance_seconds - segments * problem.elided_seconds


def _table(without: np.ndarray, advance: float, save: float, restore: float) -> _Table:
    rows, columns = without.shape
    fresh = without.copy()
    stored = np.full((rows - 1, columns), np.inf)
    # X's terms in j, gathered as they become known.
    left = np.full((rows - 1, columns), np.inf)
    sums = np.empty((rows - 1, columns))
    for n in range(1, columns if rows > 1 else 0):
        split = np.add(left[:, 1:n], fresh[:-1, n - 1 : 0 : -1], out=sums[:, : n - 1]).min(axis=1, initial=np.inf)
        fresh[1:, n] = np.minimum(without[1:, n], save + split)
        stored[:, n] = restore + np.minimum(without[1:, n], split)
        left[:, n] = advance * n + stored[:, n]
    return _Table(fresh, stored, without)


def seconds(problem: Problem) -> float:
    """Seconds of the cheapest reversal beyond what every reversal takes (keeping and pulling back each segment once).

    Returns: advances, saves and restores, less what leaves elide; infinite where the problem has no solution.
    """
    device, slower = _tables(problem)
    if slower:
        return float(slower[-1].fresh[-1, -1])
    if device:
        return float(device.fresh[-1, -1])
    if problem.closed:
        return _binomial_seconds(problem, problem.segments, problem.device_slots)
    return -problem.elided_seconds


class _Node(NamedTuple):
    """Segments to reverse with `free` slots of a level (0 is the device); their start may be `stored` there."""

    segments: range
    level: int
    free: int
    stored: bool


def reversal(problem: Problem) -> Iterator[Action]:
    """The actions of the cheapest reversal.

    Where a leaf doesn't need the slot of its start, that is dropped after the pull-back, so that a crash resumes there.
    """
    solution = _tables(problem)
    top = len(problem.levels)
    stack = [_Node(range(problem.segments), top, _all_slots(problem, top), stored=False)]
    while stack:
        node = stack.pop()
        segments, level, free, stored = node
        start = segments.start
        if stored:
            yield Restore(start)
        if not level and problem.closed:
            yield from _shifted(Binomial(max(1, problem.device_slots)), segments)
        elif cut := _cut(problem, solution, node):
            if not stored:
                yield Save(start, problem.levels[level - 1].tier if level else "device")
                free -= 1
            yield Advance(start, start + cut)
            stack.append(_Node(range(start, start + cut), level, free, stored=True))
            stack.append(_Node(range(start + cut, segments.stop), level, free, stored=False))
        elif level and not _is_leaf(problem, solution, segments, level):
            if stored:
                yield Drop(start)
            stack.append(_Node(segments, level - 1, _all_slots(problem, level - 1), stored=False))
        else:
            # A device slot counts towards what can be kept; that of its own start only if it is free.
            early = stored and not level and len(segments) > problem.leaf(free)
            if early:
                yield Drop(start)
            yield from map(Keep, segments)
            yield from map(PullBack, reversed(segments))
            if stored and not early:
                yield Drop(start)


def _all_slots(problem: Problem, level: int) -> int:
    if level:
        return min(problem.levels[level - 1].slots, -(-problem.segments // problem.grain) - 1)
    return problem.device_slots


def _cut(problem: Problem, solution: tuple[_Table | None, tuple[_Table, ...]], node: _Node) -> int:
    """Segments to advance before the next state is stored in this level; 0 to store none in it."""
    device, slower = solution
    level = node.level
    table, grain = (slower[level - 1], problem.grain) if level else (device, 1)
    free = node.free - (not node.stored)
    n = -(-len(node.segments) // grain)
    if table is None or free < 0 or n < 2:
        return 0
    save = problem.levels[level - 1].save_seconds if level and not node.stored else 0.0
    j = np.arange(1, n)
    terms = problem.advance_seconds * grain * j + table.stored[free, 1:n] + table.fresh[free, n - 1 : 0 : -1]
    best = int(terms.argmin())
    return 0 if table.without[free + 1, n] <= save + terms[best] else grain * (best + 1)


def _is_leaf(
    problem: Problem, solution: tuple[_Table | None, tuple[_Table, ...]], segments: range, level: int
) -> bool:
    """Whether segments whose start no level up to this one stores are kept at once."""
    below = [_Node(segments, k, _all_slots(problem, k), stored=False) for k in range(level)]
    fits = len(segments) == 1 if problem.closed else len(segments) <= problem.leaf(problem.device_slots)
    return fits and not any(_cut(problem, solution, node) for node in below)


def _shifted(schedule: Binomial, segments: range) -> Iterator[Action]:
    """The actions of a schedule for part of a run."""
    by = segments.start
    for action in schedule.actions(len(segments)):
        match action:
            case Advance(start, stop):
                yield Advance(start + by, stop + by)
            case Save(at, tier):
                yield Save(at + by, tier)
            case Restore(at):
                yield Restore(at + by)
            case Drop(at):
                yield Drop(at + by)
            case Keep(segment):
                yield Keep(segment + by)
            case PullBack(segment):
                yield PullBack(segment + by)
