"""Checkpoint schedules: which boundary states to keep, and when to replay, in integers only.

A training run is `N` segments with boundaries `0..N`; the state at boundary `i` is the state before segment `i`. A
schedule yields the actions of one reverse traversal, and `simulate` runs them on sets of integers: it counts what they
cost, and checks every promise that the executor relies on.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise
from math import comb, isqrt
from typing import Literal, TypeAlias, get_args

from metagradient.errors import ScheduleError

Tier: TypeAlias = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = get_args(Tier)


@dataclass(frozen=True, slots=True)
class Advance:
    """Run segments `start..stop-1` from the working state, which moves from boundary `start` to `stop`."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Save:
    """Put the working state, which is at boundary `at`, into a slot of `tier`."""

    at: int
    tier: Tier


@dataclass(frozen=True, slots=True)
class Restore:
    """Make the stored state at boundary `at` the working state; its slot stays."""

    at: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Free the slot of boundary `at`."""

    at: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Run `segment` from the working state, retaining all that its pull-back needs."""

    segment: int


@dataclass(frozen=True, slots=True)
class PullBack:
    """Take the adjoint through `segment` with what was kept, and free that."""

    segment: int


Action: TypeAlias = Advance | Save | Restore | Drop | Keep | PullBack


class Schedule(ABC):
    """How to traverse a run in reverse with few stored states and few replayed segments."""

    @abstractmethod
    def actions(self, segments: int) -> Iterator[Action]:
        """Yield the actions of one reverse traversal, in order.

        The working state starts at boundary 0. `PullBack` happens once for each of `segments - 1, ..., 0`; before the
        first of them the working state is at boundary `segments`, where the objective reads it.

        Args:
            segments: how many segments the run has, at least 1.

        Raises:
            ScheduleError: if `segments` is less than 1; before the first action.
        """


@dataclass(frozen=True, slots=True)
class KeepAll(Schedule):
    """Keep every segment of the first run.

    Cost: no replay and no slots; all `N` segments are kept at once.
    """

    def actions(self, segments: int) -> Iterator[Action]:
        """Yield the actions; see `Schedule.actions`."""
        _require_at_least("segments", segments, 1)
        return _keep_and_pull_back(range(segments))


@dataclass(frozen=True, slots=True)
class TwoLevel(Schedule):
    """Save the start of every chunk in the first run; then, in reverse, keep one chunk at a time.

    Args:
        every: segments a chunk; None takes the square root of the run's length, rounded up.
        tier: where chunk starts are stored.

    Raises:
        ScheduleError: if `every` is less than 1, or `tier` is not one of `TIERS`.

    Cost: less than `N` advances, `ceil(N / every) - 1` slots, and `every` segments kept at once.
    """

    every: int | None = None
    tier: Tier = "device"

    def __post_init__(self) -> None:
        if self.every is not None:
            _require_at_least("every", self.every, 1)
        _require_tier(self.tier)

    def actions(self, segments: int) -> Iterator[Action]:
        """Yield the actions; see `Schedule.actions`."""
        _require_at_least("segments", segments, 1)
        return self._traverse(segments, self.every or isqrt(segments - 1) + 1)

    def _traverse(self, segments: int, every: int) -> Iterator[Action]:
        starts = range(0, segments, every)
        for start, stop in pairwise(starts):
            yield Save(start, self.tier)
            yield Advance(start, stop)
        yield from _keep_and_pull_back(range(starts[-1], segments))
        for start in reversed(starts[:-1]):
            yield Restore(start)
            yield from _keep_and_pull_back(range(start, start + every))
            yield Drop(start)


@dataclass(frozen=True, slots=True)
class KaryTree(Schedule):
    """The lazy k-ary tree: split in `k`, save the children's starts, recurse into the children in reverse.

    A node's children are materialised when the traversal reaches the node, and dropped one by one as they are done.

    Args:
        k: children a node, at least 2.
        tier: where states are stored.

    Raises:
        ScheduleError: if `k` is less than 2, or `tier` is not one of `TIERS`.

    Cost: about `(1 - 1/k) log_k N` advances a segment, and about `(k - 1) log_k N` slots.

    Source: Engstrom et al. 2025, arXiv 2503.13751 (REPLAY).
    """

    k: int
    tier: Tier = "device"

    def __post_init__(self) -> None:
        _require_at_least("k", self.k, 2)
        _require_tier(self.tier)

    def actions(self, segments: int) -> Iterator[Action]:
        """Yield the actions; see `Schedule.actions`."""
        _require_at_least("segments", segments, 1)
        return _traverse_tree(segments, self.tier, lambda node, _: _near_equal_parts(node, self.k))


@dataclass(frozen=True, slots=True)
class Binomial(Schedule):
    """The fewest advances that any schedule needs with so many stored states, and among those the fewest saves.

    Args:
        slots: stored states, at least 1; the initial state takes one, the working state none.
        tier: where states are stored.

    Raises:
        ScheduleError: if `slots` is less than 1, or `tier` is not one of `TIERS`.

    Cost: `binomial_advances(N, slots)` advances, and at most `slots` slots.

    Source: Griewank & Walther 2000, "Algorithm 799: Revolve", ACM Transactions on Mathematical Software 26(1).
    """

    slots: int
    tier: Tier = "device"

    def __post_init__(self) -> None:
        _require_at_least("slots", self.slots, 1)
        _require_tier(self.tier)

    def actions(self, segments: int) -> Iterator[Action]:
        """Yield the actions; see `Schedule.actions`."""
        _require_at_least("segments", segments, 1)
        return _traverse_tree(segments, self.tier, lambda node, stored: _binomial_parts(node, self.slots - stored))


def binomial_advances(segments: int, slots: int) -> int:
    """Count the segments that `Binomial(slots)` runs by `Advance`, in closed form.

    Args:
        segments: the run's length, at least 1.
        slots: stored states, at least 1, the initial state included.

    Returns:
        `r N - C(slots + r, slots + 1)`, with the least `r` such that `C(slots + r, slots) >= N`.

    Raises:
        ScheduleError: if either argument is less than 1.

    Source: Griewank & Walther 2000, equation (2).
    """
    _require_at_least("segments", segments, 1)
    _require_at_least("slots", slots, 1)
    repeats = _repeats(segments, slots)
    return repeats * segments - comb(slots + repeats, slots + 1)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one reverse traversal costs.

    Attributes:
        segments: the run's length.
        advances: segments run by `Advance`, first run included.
        keeps: segments run by `Keep`.
        restores: how often a stored state was read.
        peak_slots: most states stored at once in each tier, the working state not counted.
        peak_kept: most segments kept at once.
    """

    segments: int
    advances: int
    keeps: int
    restores: int
    peak_slots: Mapping[Tier, int]
    peak_kept: int


def simulate(schedule: Schedule, segments: int) -> Cost:
    """Run a schedule on sets of integers, checking every promise.

    Args:
        schedule: any schedule.
        segments: the run's length, at least 1.

    Returns:
        What the traversal costs.

    Raises:
        ScheduleError: if `segments` is less than 1, or an action breaks a promise; it names the action and its number.

    Cost: time linear in the number of actions, memory linear in the states and segments held.

    >>> cost = simulate(KaryTree(2), 1000)
    >>> cost.advances, cost.peak_slots["device"], cost.peak_kept
    (5044, 9, 1)
    >>> simulate(Binomial(9), 1000).advances
    3999
    """
    return audit(schedule.actions(segments), segments)


def audit(actions: Iterable[Action], segments: int) -> Cost:
    """Run actions on sets of integers, checking every promise; see `simulate`.

    Args:
        actions: the actions of one reverse traversal, in order.
        segments: the run's length, at least 1.

    Returns:
        What the traversal costs.

    Raises:
        ScheduleError: if `segments` is less than 1, or an action breaks a promise; it names the action and its number.

    >>> audit([Keep(0), Keep(1), PullBack(0)], 2)
    Traceback (most recent call last):
        ...
    metagradient.errors.ScheduleError: action 2, PullBack(segment=0): the next segment to pull back is 1
    """
    _require_at_least("segments", segments, 1)
    run = _Run(segments, owed=segments)
    advances = keeps = restores = peak_kept = 0
    peak_slots = dict.fromkeys(TIERS, 0)
    for number, action in enumerate(actions):
        if broken := _broken_promise(run, action):
            raise ScheduleError(f"action {number}, {action}: {broken}")
        match action:
            case Advance(start, stop):
                run.working = stop
                advances += stop - start
            case Save(at, tier):
                run.stored[at] = tier
                run.slots[tier] += 1
                peak_slots[tier] = max(peak_slots[tier], run.slots[tier])
            case Restore(at):
                run.working = at
                restores += 1
            case Drop(at):
                run.slots[run.stored.pop(at)] -= 1
            case Keep(segment):
                run.kept.add(segment)
                run.working = segment + 1
                keeps += 1
                peak_kept = max(peak_kept, len(run.kept))
            case PullBack(segment):
                run.kept.remove(segment)
                run.owed = segment
    if run.owed:
        raise ScheduleError(f"the actions end before segment {run.owed - 1} is pulled back")
    if run.stored:
        raise ScheduleError(f"the actions end with boundaries {sorted(run.stored)} still stored")
    return Cost(segments, advances, keeps, restores, peak_slots, peak_kept)


@dataclass(slots=True)
class _Run:
    """What exists at one moment of a simulated traversal; the segments from `owed` on are pulled back."""

    segments: int
    owed: int
    working: int = 0
    stored: dict[int, Tier] = field(default_factory=dict)
    slots: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))
    kept: set[int] = field(default_factory=set)


def _broken_promise(run: _Run, action: Action) -> str | None:
    """Say which promise `action` would break, if any."""
    match action:
        case Advance(at, _) | Save(at, _) | Keep(at) if at != run.working:
            return f"the working state is at boundary {run.working}"
        case Advance(start, stop) if stop <= start:
            return "an advance must run at least one segment"
        case Advance(_, stop) if stop > run.owed:
            return f"only segments below {run.owed} are still to be pulled back"
        case Keep(segment) if segment >= run.owed:
            return f"only segments below {run.owed} are still to be pulled back"
        case Keep(segment) if segment in run.kept:
            return "the segment is kept already"
        case Save(_, tier) if tier not in TIERS:
            return f"the tier must be one of {', '.join(TIERS)}"
        case Save(at, _) if at in run.stored:
            return "the boundary is stored already"
        case Restore(at) | Drop(at) if at not in run.stored:
            return "the boundary is not stored"
        case PullBack(segment) if segment != run.owed - 1:
            return f"the next segment to pull back is {run.owed - 1}" if run.owed else "every segment is pulled back"
        case PullBack(segment) if segment not in run.kept:
            return "the segment is not kept"
        case PullBack(segment) if segment == run.segments - 1 and run.working != run.segments:
            return f"the objective needs the working state at boundary {run.segments}, but it is at {run.working}"
    return None


def _require_at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ScheduleError(f"{name} must be an integer of at least {least}, but is {value!r}")


def _require_tier(tier: Tier) -> None:
    if tier not in TIERS:
        raise ScheduleError(f"tier must be one of {', '.join(TIERS)}, but is {tier!r}")


def _keep_and_pull_back(segments: range) -> Iterator[Action]:
    return chain(map(Keep, segments), map(PullBack, reversed(segments)))


def _traverse_tree(segments: int, tier: Tier, split: Callable[[range, int], list[range]]) -> Iterator[Action]:
    """Traverse a tree over the segments, depth first and in reverse.

    `split(node, stored)` gives the children of a node of at least two segments; `stored` counts the states that are
    stored when the traversal reaches the node, its own not included. The stack holds one node a stored state.
    """
    working = 0
    stack = [range(segments)]
    while stack:
        node = stack.pop()
        # A root or last child is reached by advancing, not yet stored; any other node was saved on the way past it.
        reached = working == node.start
        if not reached:
            yield Restore(node.start)
            working = node.start
        if len(node) > 1:
            children = split(node, len(stack))
            for child in children[:-1]:
                if reached:
                    yield Save(working, tier)
                yield Advance(working, child.stop)
                working, reached = child.stop, True
            stack += children
        else:
            yield Keep(node.start)
            yield PullBack(node.start)
            working = node.stop
            # Only now: a crash before this pull-back is over resumes from this slot.
            if not reached:
                yield Drop(node.start)


def _near_equal_parts(node: range, k: int) -> list[range]:
    """Cut into at most `k` parts, the longer ones first."""
    size, longer = divmod(len(node), k)
    cuts = [node.start + i * size + min(i, longer) for i in range(min(k, len(node)) + 1)]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def _binomial_parts(node: range, slots: int) -> list[range]:
    """Cut where both parts stay optimal, the left one with `slots` and the right one with one less."""
    repeats = _repeats(len(node), slots)
    # Griewank & Walther 2000, page 34: of all optimal cuts, the one that leads to the fewest saves.
    fewest_saves = len(node) - _reach(slots - 1, repeats - 1) - _reach(slots - 2, repeats - 1)
    size = min(max(fewest_saves, _reach(slots, repeats - 2), 1), _reach(slots, repeats - 1))
    cut = node.start + size
    return [range(node.start, cut), range(cut, node.stop)]


def _reach(slots: int, repeats: int) -> int:
    """Longest run that can be reversed with `slots` if no segment is advanced through more than `repeats` times."""
    return comb(slots + repeats, slots) if min(slots, repeats) >= 0 else 0


def _repeats(segments: int, slots: int) -> int:
    """Least `repeats` whose `_reach` is at least `segments`."""
    enough = -(-(segments - 1) // slots)  # as C(s + r, s) >= 1 + s r
    return bisect_left(range(enough), segments, key=lambda repeats: _reach(slots, repeats))
