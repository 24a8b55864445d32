r"""The cheapest reversal of a run over tiers of stored states: binomial on the device, dynamic across tiers.

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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
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
        grain: segments between two places where it may store; a multiple of that of a faster tier.
        reach: segments that it may be given to reverse at once; None leaves no limit.
    """

    tier: Tier
    slots: int
    save_seconds: float
    restore_seconds: float
    grain: int = 1
    reach: int | None = None


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
        slots: states stored on the device at once, at most; None takes as many as `room` has place for.
        levels: slower tiers, the fastest first. The last one's reach is the run.
        reach: segments that the device may be given to reverse at once; None leaves no limit.
        closed: take the closed form on the device: binomial, with one segment a leaf. Else tabulate it.
    """

    segments: int
    advance_seconds: float
    elided_seconds: float
    room: int
    state_bytes: int
    kept_bytes: int
    slots: int | None = None
    levels: tuple[Level, ...] = ()
    reach: int | None = None
    closed: bool = False

    @property
    def device_slots(self) -> int:
        """States that the device stores at most."""
        fit = max(0, min(self.segments - 1, (self.room - self.kept_bytes) // self.state_bytes))
        return fit if self.slots is None else min(fit, self.slots)

    def leaf(self, free: int) -> int:
        """Segments that can be kept at once while `free` device slots are."""
        stored = self.device_slots - free
        return (self.room - stored * self.state_bytes) // self.kept_bytes


class Block(NamedTuple):
    """Segments that `Binomial(slots)` reverses on the device, from the working state at their start."""

    segments: range
    slots: int


class _Table(NamedTuple):
    """Seconds by free slots (rows) and places (columns): `W` and `S` above, and the seconds without this tier.

    Unless `bounded`, there are slots for every place, and one row.
    """

    fresh: np.ndarray
    stored: np.ndarray
    without: np.ndarray
    advance: float
    save: float
    grain: int
    bounded: bool

    def cut(self, segments: int, free: int, stored: bool) -> int:
        """Segments to advance before the next state is stored in this tier; 0 to store no more in it.

        Arguments:
            segments: to reverse.
            free: slots, without that of the start if it is `stored`.
        """
        others = free - (not stored)
        n = -(-segments // self.grain)
        if others < 0 or n < 2:
            return 0
        row, own = (others, others + 1) if self.bounded else (0, 0)
        terms = self.advance * np.arange(1, n) + self.stored[row, 1:n] + self.fresh[row, n - 1 : 0 : -1]
        best = int(terms.argmin())
        alone = self.without[own, n] <= terms[best] + (0.0 if stored else self.save)
        return 0 if alone else self.grain * (best + 1)


class _Solution(NamedTuple):
    """The device's table, where it isn't needed None, and one for each slower tier; and the seconds of it all."""

    device: _Table | None
    slower: tuple[_Table, ...]
    seconds: float


@lru_cache(maxsize=16)
def _solve(problem: Problem) -> _Solution:
    """Tabulate a problem.

    Cost: for every tier `N^2 / 2` operations a slot, or once where it has slots for all, with N its places.
    """
    length = problem.segments
    device = None
    if not problem.closed and problem.leaf(problem.device_slots) < length:
        device = _device(replace(problem, levels=()))

    def on_device(segments: np.ndarray) -> np.ndarray:
        if device:
            return _at(device, segments)
        if problem.closed:
            return np.array([_binomial_seconds(problem, n) for n in segments.tolist()], np.float32)
        return np.full(segments.shape, -problem.elided_seconds, np.float32)

    faster: Callable[[np.ndarray], np.ndarray] = on_device
    slower: list[_Table] = []
    for level in problem.levels:
        places = -(-min(length, level.reach or length) // level.grain)
        seconds = faster(np.minimum(level.grain * np.arange(places + 1), length))
        bounded = level.slots < places - 1
        without = np.broadcast_to(seconds, (level.slots + 1 if bounded else 1, places + 1))
        table = _tabulate(problem, without, level.save_seconds, level.restore_seconds, level.grain, bounded)
        slower.append(table)
        faster = partial(_at, table)
    return _Solution(device, tuple(slower), float(faster(np.array([length]))[0]))


def _at(table: _Table, segments: np.ndarray) -> np.ndarray:
    """Seconds with all slots, for runs of so many segments; infinite beyond the table's reach."""
    column = -(-segments // table.grain)
    known = table.fresh[-1]
    return np.where(column < len(known), known[np.minimum(column, len(known) - 1)], np.float32(np.inf))


@lru_cache(maxsize=4)
def _device(problem: Problem) -> _Table:
    most = np.array([problem.leaf(free) for free in range(problem.device_slots + 1)])
    fits = np.arange(min(problem.segments, problem.reach or problem.segments) + 1) <= most[:, None]
    leaves = np.where(fits, np.float32(-problem.elided_seconds), np.float32(np.inf))
    return _tabulate(problem, leaves, 0.0, 0.0, 1, bounded=True)


def _binomial_seconds(problem: Problem, segments: int) -> float:
    if segments > 1 and not problem.device_slots:
        return np.inf
    advances = binomial_advances(segments, problem.device_slots) if segments > 1 else 0
    return advances * problem.advance_seconds - segments * problem.elided_seconds


def _tabulate(problem: Problem, without: np.ndarray, save: float, restore: float, grain: int, bounded: bool) -> _Table:
    advance = grain * problem.advance_seconds
    fresh = without.copy()
    # The rows with a slot less, and those with the slot of a start that is stored.
    less, own, alone = (fresh[:-1], fresh[1:], without[1:]) if bounded else (fresh, fresh, without)
    stored = np.full(own.shape, np.inf, np.float32)
    # X's terms in j, gathered as they become known.
    left = np.full_like(stored, np.inf)
    sums = np.empty_like(stored)
    for n in range(1, fresh.shape[1] if len(own) else 0):
        split = np.add(left[:, 1:n], less[:, n - 1 : 0 : -1], out=sums[:, : n - 1]).min(axis=1, initial=np.inf)
        own[:, n] = np.minimum(alone[:, n], save + split)
        stored[:, n] = restore + np.minimum(alone[:, n], split)
        left[:, n] = advance * n + stored[:, n]
    return _Table(fresh, stored, without, advance, save, grain, bounded)


def seconds(problem: Problem) -> float:
    """Seconds of the cheapest reversal beyond what every reversal takes (keeping and pulling back each segment once).

    Returns: advances, saves and restores, less what leaves elide; infinite where the problem has no solution.

    >>> seconds(Problem(segments=10, advance_seconds=1.0, elided_seconds=0.0, room=4, state_bytes=1, kept_bytes=1))
    9.0
    """
    return _solve(problem).seconds


def reversal(problem: Problem) -> Iterator[Action]:
    """The actions of the cheapest reversal."""
    for action in outline(problem):
        if isinstance(action, Block):
            yield from _shifted(Binomial(action.slots).actions(len(action.segments)), action.segments.start)
        else:
            yield action


class _Node(NamedTuple):
    """Segments to reverse with `free` slots of a level (0 is the device); their start may be `stored` there."""

    segments: range
    level: int
    free: int
    stored: bool


def outline(problem: Problem) -> Iterator[Action | Block]:
    """The actions of the cheapest reversal, binomial parts in one piece.

    Where a leaf doesn't need the slot of its start, that is dropped after the pull-back, so that a crash resumes there.
    """
    solution = _solve(problem)
    tables = (solution.device, *solution.slower)
    slots = (problem.device_slots, *(level.slots for level in problem.levels))
    top = len(problem.levels)
    stack = [_Node(range(problem.segments), top, slots[top], stored=False)]
    while stack:
        segments, level, free, stored = stack.pop()
        start, table = segments.start, tables[level]
        if stored:
            yield Restore(start)
        if table and (cut := table.cut(len(segments), free, stored)):
            if not stored:
                yield Save(start, problem.levels[level - 1].tier if level else "device")
                free -= 1
            yield Advance(start, start + cut)
            stack.append(_Node(range(start, start + cut), level, free, stored=True))
            stack.append(_Node(range(start + cut, segments.stop), level, free, stored=False))
            continue
        # Without slots of faster tiers, which are all free, the start needn't leave this one.
        leaf = len(segments) <= (1 if problem.closed else problem.leaf(slots[0])) and not any(
            table.cut(len(segments), n, stored=False) for table, n in zip(tables, slots[:level], strict=False) if table
        )
        if level and not leaf:
            if stored:
                yield Drop(start)
            stack.append(_Node(segments, level - 1, slots[level - 1], stored=False))
        elif problem.closed and not leaf:
            yield Block(segments, problem.device_slots)
        else:
            # The device's slot of the start may be what the last kept segment needs.
            early = stored and not level and len(segments) > problem.leaf(free)
            if early:
                yield Drop(start)
            yield from map(Keep, segments)
            yield from map(PullBack, reversed(segments))
            if stored and not early:
                yield Drop(start)


def _shifted(actions: Iterator[Action], by: int) -> Iterator[Action]:
    """The actions of a part of a run that starts at segment `by`."""
    for action in actions:
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
