"""Schedules from a memory budget: the fewest predicted seconds that fit."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import inf, isqrt
from typing import NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from metagradient.errors import ScheduleError
from metagradient.replay.budget import Costs, LeafKind, Memory, format_bytes
from metagradient.replay.hierarchy import Level, Problem, reversal, seconds
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
)
from metagradient.step.segment import Segment

# Operations of one table of the planner, about a nanosecond each: longer segments, coarser places for slower tiers and
# fewer device slots keep to it. Shares of the budget alone may not change them, or more memory could plan worse.
_OPERATIONS = 6e7
_PLACES = 800
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
    best: dict[tuple[LeafKind, bool], _Candidate] = {}
    for kind, length, used in product(kinds, lengths, {(), levels}):
        for problem in _problems(costs, steps, device, kind, length, used):
            candidate = _Candidate(_seconds(costs, steps, kind, length, problem), kind, length, problem)
            rival = best.get((kind, bool(used)))
            if candidate.seconds < (rival.seconds if rival else inf):
                best[kind, bool(used)] = candidate
    if not best:
        raise ScheduleError(_too_small(costs, steps, device, kinds, lengths[0], levels))
    chosen, *others = sorted(best.values(), key=lambda candidate: candidate.seconds)
    estimate = _estimate(costs, steps, chosen)
    rejected = [_estimate(costs, steps, other) for other in others]
    for schedule in (KeepAll(), TwoLevel()):
        plain = price(schedule, costs, steps, length=chosen.length, keep=chosen.kind)
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
    segments = -(-steps // length)
    leaf, ends = costs.leaves[keep], costs.elides(keep, length)
    stored: dict[int, Tier] = {}
    states, most = dict.fromkeys(TIERS, 0), dict.fromkeys(TIERS, 0)
    advances = elided = walks = kept = room = 0
    transfers = 0.0
    before = None
    for action in schedule.actions(segments):
        match action:
            case Advance(start, stop):
                advances += stop - start
                walks += stop - start
            case Save(at, tier):
                stored[at] = tier
                states[tier] += 1
                most[tier] = max(most[tier], states[tier])
                transfers += costs.save_seconds.get(tier, 0.0)
            case Restore(at):
                transfers += costs.restore_seconds.get(stored[at], 0.0)
            case Drop(at):
                states[stored.pop(at)] -= 1
            case Keep():
                kept += 1
                walks += 1
            case PullBack(segment):
                # The objective asks for the end of the last segment, and a Keep that follows for that of any other.
                elided += ends and isinstance(before, Keep) and segment < segments - 1
                kept -= 1
                walks += 1
        room = max(room, states["device"] * costs.state_bytes + kept * length * leaf.bytes)
        before = action
    slower = any(most[tier] for tier in TIERS[1:])
    used = {tier: most[tier] * costs.state_bytes for tier in TIERS}
    used["device"] = room - costs.room(0, transfers=slower)
    return Estimate(
        name=_name(schedule, most),
        keep=keep,
        length=length,
        forward_steps=advances * length + steps - elided,
        adjoint_steps=steps,
        states=most,
        bytes=used,
        seconds=advances * length * costs.a_step(keep)
        + (steps - elided) * leaf.step_seconds
        + steps * leaf.adjoint_seconds
        + transfers
        + walks * costs.dispatch_seconds,
    )


class _Candidate(NamedTuple):
    seconds: float
    kind: LeafKind
    length: int
    problem: Problem


def _estimate(costs: Costs, steps: int, candidate: _Candidate) -> Estimate:
    schedule = _Solved(candidate.problem)
    return price(schedule, costs, steps, length=candidate.length, keep=candidate.kind)


@dataclass(frozen=True, slots=True)
class _Solved(Schedule):
    problem: Problem

    def actions(self, segments: int) -> Iterator[Action]:
        assert segments == self.problem.segments
        return reversal(self.problem)


def _problems(
    costs: Costs, steps: int, device: int, kind: LeafKind, length: int, levels: tuple[Level, ...]
) -> Iterator[Problem]:
    """What may be solved for one way to compile segments: exactly, or less and faster; nothing where none fits."""
    segments = -(-steps // length)
    room, kept = costs.room(device, transfers=bool(levels)), length * costs.leaves[kind].bytes
    if room < kept:
        return
    advance = length * costs.a_step(kind) + costs.dispatch_seconds
    elided = costs.leaves[kind].step_seconds if costs.elides(kind, length) else 0.0
    grain = -(-segments // _PLACES)
    most = max(1, int(2 * _OPERATIONS * grain**2 / segments**2))
    levels = tuple(replace(level, slots=min(level.slots, most)) for level in levels)
    whole = Problem(segments, advance, elided, room, costs.state_bytes, kept, segments, levels, grain)
    if room >= segments * kept:
        yield replace(whole, levels=())
        return
    slots = int(2 * _OPERATIONS / segments**2)
    # Keeping states is then no cheaper than storing them.
    binomial = kept == costs.state_bytes and elided == advance
    if slots and not binomial:
        yield replace(whole, slots=slots)
    if binomial or slots < whole.device_slots:
        yield replace(whole, closed=True)


def _seconds(costs: Costs, steps: int, kind: LeafKind, length: int, problem: Problem) -> float:
    leaf = costs.leaves[kind]
    always = steps * (leaf.step_seconds + leaf.adjoint_seconds) + 2 * problem.segments * costs.dispatch_seconds
    # The last leaf's end is always asked for.
    return always + problem.elided_seconds + seconds(problem)


def _lengths(steps: int) -> Iterable[int]:
    for power in range(9):
        for length in (2**power, 3 * 2 ** (power - 1)) if power else (1,):
            near = range(max(1, length - length // 5), length + length // 5 + 1)
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


def _name(schedule: Schedule, states: Mapping[Tier, int]) -> str:
    if not isinstance(schedule, _Solved):
        return str(schedule)
    used = [f"{states[tier]} on {tier}" for tier in TIERS if states[tier]]
    return ", ".join(used) or "keep all"


def _table(plan: Plan) -> Table:
    """The plan and what it was chosen from; seconds as hours and minutes where there are many."""
    title = f"{plan.steps} steps within " + ", ".join(
        f"{format_bytes(budget)} on the {tier}" for tier, budget in _budgets(plan.memory).items() if budget
    )
    table = Table(title=title, title_justify="left")
    for name in ("", "states stored", "keeps", "steps a segment", "forward", "adjoint", *TIERS, "seconds"):
        table.add_column(name, justify="left" if name in ("", "states stored", "keeps") else "right", no_wrap=not name)
    for estimate in (plan.estimate, *plan.rejected):
        over = [tier for tier, budget in _budgets(plan.memory).items() if estimate.bytes[tier] > budget]
        table.add_row(
            "chosen" if estimate is plan.estimate else f"{over[0]} full" if over else "slower",
            estimate.name,
            estimate.keep,
            str(estimate.length),
            str(estimate.forward_steps),
            str(estimate.adjoint_steps),
            *(format_bytes(estimate.bytes[tier]) if estimate.bytes[tier] else "" for tier in TIERS),
            _duration(estimate.seconds),
            style="bold" if estimate is plan.estimate else None,
        )
    return table


def _budgets(memory: Memory) -> dict[Tier, int]:
    return {"device": memory.device or 0, "host": memory.host or 0, "disk": memory.disk or 0}


def _duration(seconds: float) -> str:
    if seconds < 1000:
        return f"{seconds:.3g}"
    return f"{seconds:.0f} ({seconds / 3600:.1f} h)" if seconds < 1e6 else f"{seconds:.3g} ({seconds / 86400:.1f} d)"


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
