"""Schedules from a memory budget: the fewest predicted seconds that fit."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import inf, isqrt
from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from metagradient.errors import ScheduleError
from metagradient.replay.budget import Costs, LeafKind, Memory, format_bytes
from metagradient.replay.hierarchy import Block, Level, Problem, outline, reversal, seconds
from metagradient.replay.schedule import (
    TIERS,
    Action,
    Advance,
    Binomial,
    Drop,
    Keep,
    KeepAll,
    PullBack,
    Restore,
    Save,
    Schedule,
    Tier,
    TwoLevel,
    binomial_advances,
)
from metagradient.step.segment import Segment

_WIDTH = 118


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a metagradient is predicted to cost under one schedule.

    Arguments:
        name: the schedule, in words.
        keep: what a step leaves to its adjoint.
        length: steps a segment.
        forward_steps: steps taken, replays included, as `Runner` counts them.
        adjoint_steps: steps pulled back.
        states: most boundary states stored at once, by tier.
        bytes: most bytes held at once, by tier; on the device with kept segments and states at work.
        seconds: predicted, without compilation and the objective.
    """

    name: str
    keep: LeafKind
    length: int
    forward_steps: int
    adjoint_steps: int
    states: dict[Tier, int] = field(hash=False)
    bytes: dict[Tier, int] = field(hash=False)
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan(Schedule):
    """A schedule made for one run and one budget; printable.

    Arguments:
        steps: the run's length.
        estimate: what it is predicted to cost.
        memory: the budget, with the device's as it was taken.
        rejected: alternatives, the fastest first; some do not fit.
        problem: what was solved.

    It goes with segments of `length` steps that keep `keep`: `Segment(plan.length, loop, plan.keep)`.
    """

    steps: int
    estimate: Estimate
    memory: Memory
    rejected: tuple[Estimate, ...] = field(repr=False)
    problem: Problem = field(repr=False)

    @property
    def length(self) -> int:
        """Steps a segment."""
        return self.estimate.length

    @property
    def keep(self) -> LeafKind:
        """What a step leaves to its adjoint."""
        return self.estimate.keep

    @property
    def seconds(self) -> float:
        """Predicted seconds."""
        return self.estimate.seconds

    def actions(self, segments: int) -> Iterator[Action]:
        """Yield the actions; see `Schedule.actions`.

        Errors: `ScheduleError` if the run has another number of segments than was planned for.
        """
        if segments != self.problem.segments:
            raise ScheduleError(
                f"this plan is for {self.problem.segments} segments of {self.length} steps, not for {segments}: plan "
                "anew, or compile segments with the plan's length"
            )
        return reversal(self.problem)

    def __str__(self) -> str:
        console = Console(width=_WIDTH, no_color=True)
        with console.capture() as capture:
            console.print(_table(self))
        return capture.get().rstrip()


def plan(
    costs: Costs,
    steps: int,
    memory: Memory | None = None,
    *,
    lengths: Sequence[int] | None = None,
    keeps: Sequence[LeafKind] | None = None,
) -> Plan:
    """The schedule, segment length and leaf with the fewest predicted seconds that fit a budget.

    Arguments:
        costs: what the parts of this run cost.
        steps: steps to differentiate, T.
        memory: budgets; None, and a device's budget of None, take half of the free memory.
        lengths: steps a segment to choose from; None tries 1 to 256, divisors of T where they are close.
        keeps: leaves to choose from; None tries all that `costs` prices.

    Returns: a `Plan`: a schedule to pass on, and what it is predicted to cost.

    Errors: `ScheduleError` for a budget in which nothing fits, with the smallest in which something does; and for
        tiers with a budget and no price.

    Cost: seconds at most, without touching a device. The plan is the cheapest of all schedules that never store a state
        in a faster tier than a state later in the run, where its segments are few enough to tabulate; on long runs, of
        those that use a few hundred places for slower tiers, or not all of the device's slots.

    Source: Griewank & Walther 2000 (binomial); Herrmann & Pallez 2020, "H-Revolve" (tiers).

    >>> costs = Costs.on_paper("1GB", 0.1, host_bandwidth="20GB")
    >>> planned = plan(costs, 1000, Memory(device="12GB", host="32GB"))
    >>> planned.length, planned.keep, planned.estimate.states["host"]
    (1, 'state', 32)
    """
    memory = memory or Memory()
    device = free_bytes() // 2 if memory.device is None else memory.device
    memory = Memory(device, memory.host, memory.disk, memory.path)
    if not isinstance(steps, int) or steps < 1:
        raise ScheduleError(f"steps must be an integer of at least 1, but is {steps!r}")
    kinds = list(keeps or costs.leaves)
    if set(kinds) - set(costs.leaves):
        raise ScheduleError(f"keeps: the costs price {', '.join(costs.leaves)}, not all of {kinds}")
    lengths = sorted({min(length, steps) for length in lengths or _lengths(steps)})
    if lengths[0] < 1:
        raise ScheduleError(f"lengths must be at least 1, but are {lengths}")
    levels = tuple(
        Level(tier, slots, costs.save_seconds[tier], costs.restore_seconds[tier])
        for tier in TIERS[1:]
        if (slots := costs.slots(tier, memory))
    )
    search = _Search(costs, steps, device)
    ways = [_Way(*way) for way in product(kinds, lengths, {(), levels})]
    found = sorted(c for way in ways for c in search.candidates(way, _QUICK))
    if not found:
        raise ScheduleError(_too_small(costs, steps, device, kinds, lengths[0], levels))
    promising = dict.fromkeys(candidate.way for candidate in found[:_PROMISING])
    found += [c for way in promising for effort in _THOROUGH for c in search.candidates(way, effort)]
    # The cheapest of its kind, each: by leaf, and with or without slower tiers.
    best = {(c.way.keep, bool(c.problem.levels)): c for c in sorted(found, reverse=True)}
    chosen, *others = sorted(best.values())
    estimate = search.estimate(chosen)
    rejected = [search.estimate(other) for other in others]
    for schedule in (KeepAll(), TwoLevel()):
        plain = price(schedule, costs, steps, length=chosen.way.length, keep=chosen.way.keep)
        if (plain.states, plain.bytes) != (estimate.states, estimate.bytes):
            rejected.append(plain)
    return Plan(steps, estimate, memory, tuple(sorted(rejected, key=lambda e: e.seconds)), chosen.problem)


def price(schedule: Schedule, costs: Costs, steps: int, *, length: int = 1, keep: LeafKind = "state") -> Estimate:
    """What a schedule is predicted to cost.

    Arguments:
        schedule: any schedule.
        costs: what the parts of the run cost.
        steps: steps to differentiate, T.
        length: steps a segment.
        keep: what a step leaves to its adjoint; `costs` must price it.

    Cost: a walk over its actions.

    >>> price(KeepAll(), Costs.on_paper(8, 1.0), 100).seconds
    341.0
    """
    return _walked(schedule.actions(-(-steps // length)), costs, steps, length, keep, type(schedule).__name__)


def _walked(
    actions: Iterable[Action | Block], costs: Costs, steps: int, length: int, keep: LeafKind, name: str
) -> Estimate:
    leaf, ends = costs.leaves[keep], costs.elides(keep, length)
    last = -(-steps // length) - 1
    stored: dict[int, Tier] = {}
    states, most = dict.fromkeys(TIERS, 0), dict.fromkeys(TIERS, 0)
    advances = elided = kept = room = 0
    transfers = 0.0
    before = None
    for action in actions:
        more_states = more_kept = 0
        match action:
            case Advance(start, stop):
                advances += stop - start
            case Save(at, tier):
                stored[at] = tier
                states[tier] += 1
                transfers += costs.save_seconds.get(tier, 0.0)
            case Restore(at):
                transfers += costs.restore_seconds.get(stored[at], 0.0)
            case Drop(at):
                states[stored.pop(at)] -= 1
            case Keep():
                kept += 1
            case PullBack(segment):
                # The objective asks for the end of the last segment, and a Keep that follows for that of any other.
                elided += ends and isinstance(before, Keep) and segment < last
                kept -= 1
            case Block(segments, slots):
                advances += binomial_advances(len(segments), slots)
                elided += ends * (len(segments) - (segments.stop > last))
                more_states, more_kept = min(slots, len(segments) - 1), 1
        for tier in TIERS:
            most[tier] = max(most[tier], states[tier] + (more_states if tier == "device" else 0))
        device_states, device_kept = states["device"] + more_states, kept + more_kept
        room = max(room, device_states * costs.state_bytes + device_kept * length * leaf.bytes)
        before = action
    used: dict[Tier, int] = {tier: most[tier] * costs.state_bytes for tier in TIERS}
    used["device"] = room - costs.room(0, transfers=any(most[tier] for tier in TIERS[1:]))
    seconds = (
        advances * length * costs.a_step(keep)
        + (steps - elided) * leaf.step_seconds
        + steps * leaf.adjoint_seconds
        + transfers
        + (advances + 2 * (last + 1)) * costs.dispatch_seconds
    )
    return Estimate(name, keep, length, advances * length + steps - elided, steps, most, used, seconds)


class _Effort(NamedTuple):
    """How long to look: operations a table, about a nanosecond each, and places a slower tier.

    Neither depends on the budget: more memory must not plan worse.
    """

    operations: float
    places: int


_QUICK = _Effort(3e6, 250)
_THOROUGH = (_Effort(4e7, 400), _Effort(4e7, 1200))
_PROMISING = 2


def _grained(segments: int, levels: tuple[Level, ...], effort: _Effort) -> Iterator[tuple[tuple[Level, ...], int]]:
    """Levels with places for the effort, and the device's reach: the last level walks the run, faster ones parts."""
    if not levels:
        yield (), segments
        return
    coarse = -(-segments // effort.places)
    for fine in {1, -(-coarse // 8), coarse}:
        reach = min(segments, fine * effort.places)
        last = fine * -(-coarse // fine)
        yield (
            tuple(
                replace(level, slots=_tabled(level.slots, span // grain, effort), grain=grain, reach=span)
                for level, grain, span in zip(
                    levels, [fine] * (len(levels) - 1) + [last], [reach] * (len(levels) - 1) + [segments], strict=True
                )
            ),
            reach,
        )


def _tabled(slots: int, places: int, effort: _Effort) -> int:
    """As many slots as the effort has operations for; all, where there is one for every place."""
    return slots if slots >= places else max(1, min(slots, int(2 * effort.operations / max(1, places) ** 2)))


class _Way(NamedTuple):
    keep: LeafKind
    length: int
    levels: tuple[Level, ...]


class _Candidate(NamedTuple):
    seconds: float
    way: _Way
    problem: Problem

    def __lt__(self, other: object) -> bool:
        return isinstance(other, _Candidate) and self.seconds < other.seconds


@dataclass(frozen=True, slots=True)
class _Search:
    costs: Costs
    steps: int
    device: int

    def candidates(self, way: _Way, effort: _Effort) -> Iterator[_Candidate]:
        """What one way to compile segments and use tiers may come to; nothing where it doesn't fit."""
        leaf = self.costs.leaves[way.keep]
        segments = -(-self.steps // way.length)
        always = self.steps * (leaf.step_seconds + leaf.adjoint_seconds) + 2 * segments * self.costs.dispatch_seconds
        for problem in self._problems(way, effort):
            # The last leaf's end is always asked for.
            total = always + problem.elided_seconds + seconds(problem)
            if total < inf:
                yield _Candidate(total, way, problem)

    def _problems(self, way: _Way, effort: _Effort) -> Iterator[Problem]:
        keep, length, levels = way
        costs, leaf = self.costs, self.costs.leaves[keep]
        segments = -(-self.steps // length)
        room, kept = costs.room(self.device, transfers=bool(levels)), length * leaf.bytes
        if room < kept:
            return
        advance = length * costs.a_step(keep) + costs.dispatch_seconds
        elided = leaf.step_seconds if costs.elides(keep, length) else 0.0
        whole = Problem(segments, advance, elided, room, costs.state_bytes, kept)
        if room >= segments * kept:
            yield whole
            return
        # Keeping states is then no cheaper than storing them.
        binomial = kept == costs.state_bytes and elided == advance
        for grained, reach in _grained(segments, levels, effort):
            slots = int(2 * effort.operations / reach**2)
            if slots and not binomial:
                yield replace(whole, levels=grained, reach=reach, slots=slots)
            if binomial or slots < whole.device_slots:
                yield replace(whole, levels=grained, closed=True)

    def estimate(self, candidate: _Candidate) -> Estimate:
        way = candidate.way
        walked = _walked(outline(candidate.problem), self.costs, self.steps, way.length, way.keep, "")
        used = [f"{states} {tier}" for tier, states in walked.states.items() if states]
        return replace(walked, name=" + ".join(used) or "keep all")


def _lengths(steps: int) -> Iterable[int]:
    for length in (2**power for power in range(9)):
        near = range(length - length // 4, length + length // 4 + 1)
        yield min((n for n in near if steps % n == 0), key=lambda n: abs(n - length), default=length)


def _too_small(
    costs: Costs, steps: int, device: int, kinds: list[LeafKind], length: int, levels: tuple[Level, ...]
) -> str:
    kind = min(kinds, key=lambda kind: costs.leaves[kind].bytes)
    kept = length * costs.leaves[kind].bytes
    stored = costs.state_bytes if steps > length else 0
    ways = [(kept + stored - costs.room(0, transfers=False), "a stored state")]
    if levels and stored:
        ways.append((kept - costs.room(0, transfers=True), f"states under way to the {levels[0].tier}"))
    least, beside = min(ways)
    return (
        f"a device budget of {format_bytes(device)} ({device} bytes) is too small: the smallest feasible is "
        f"{format_bytes(least)} ({least} bytes), for the states at work, one kept segment ({kept} bytes: {length} "
        f"steps that keep their {kind}){f' and {beside}' if stored else ''}. Shorter segments, a smaller model or "
        "micro-batches need less"
    )


def _table(plan: Plan) -> Table:
    """The plan and what it was chosen from."""
    budgets: dict[Tier, int] = {tier: getattr(plan.memory, tier) or 0 for tier in TIERS}
    within = ", ".join(f"{format_bytes(budget)} {tier}" for tier, budget in budgets.items() if budget)
    table = Table(title=f"{plan.steps} steps and adjoint steps within {within}", title_justify="left")
    table.add_column("")
    table.add_column("states stored")
    table.add_column("kept of a step")
    for name in ("segment", "forward steps", *TIERS, "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for estimate in (plan.estimate, *plan.rejected):
        over = [tier for tier, budget in budgets.items() if estimate.bytes[tier] > budget]
        chosen = estimate is plan.estimate
        table.add_row(
            "chosen" if chosen else f"over {over[0]}" if over else "slower",
            estimate.name,
            estimate.keep,
            str(estimate.length),
            str(estimate.forward_steps),
            *(format_bytes(estimate.bytes[tier]) if estimate.bytes[tier] else "" for tier in TIERS),
            _duration(estimate.seconds),
            style="bold" if chosen else None,
        )
    return table


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


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
