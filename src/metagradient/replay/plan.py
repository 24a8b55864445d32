"""Schedules from a memory budget: the fewest predicted seconds that fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isqrt

from rich.console import Console
from rich.table import Table

from metagradient.errors import ScheduleError
from metagradient.replay.budget import Costs, LeafKind, Memory, format_bytes
from metagradient.replay.hierarchy import Level, Problem, reversal
from metagradient.replay.host import free_bytes
from metagradient.replay.price import Estimate, price
from metagradient.replay.schedule import TIERS, Action, Binomial, KeepAll, Schedule, Tier, TwoLevel
from metagradient.replay.search import Search, default_lengths
from metagradient.shown import Shown
from metagradient.step.segment import Loop, Segment

_WIDTH = 118


@dataclass(frozen=True, slots=True, repr=False)
class Plan(Schedule, Shown):
    """A schedule made for one run and one budget; printable.

    Arguments:
        steps: the run's length.
        estimate: what it is predicted to cost.
        memory: the budget, with the device's as it was taken.
        rejected: alternatives, the fastest first; some do not fit.
        problem: what was solved.
        loop: how segments are compiled.
        call_seconds: what a call takes before its first step: checks, and the rehearsal of a segment.
    """

    steps: int
    estimate: Estimate
    memory: Memory
    rejected: tuple[Estimate, ...] = field(repr=False)
    problem: Problem = field(repr=False)
    loop: Loop = "steps"
    call_seconds: float = 0.0

    @property
    def segment(self) -> Segment:
        """The segments that it was made for."""
        return Segment(self.length, self.loop, self.keep)

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
        """Predicted seconds of a call, without compilation and the objective."""
        return self.estimate.seconds + self.call_seconds

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
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


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

    Cost: a second or two, without touching a device. Where a run has few enough segments to tabulate, the plan is the
        cheapest of all schedules that never store a state in a faster tier than another later in the run, and keep
        adjacent segments. On longer runs it is the cheapest of those with a few hundred places for slower tiers.

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
    lengths = sorted({min(length, steps) for length in lengths or default_lengths(steps)})
    if lengths[0] < 1:
        raise ScheduleError(f"lengths must be at least 1, but are {lengths}")
    levels = tuple(
        Level(tier, slots, costs.save_seconds[tier], costs.restore_seconds[tier])
        for tier in TIERS[1:]
        if (slots := costs.slots(tier, memory))
    )
    search = Search(costs, steps, device)
    found = search.best(kinds, lengths, levels)
    if not found:
        raise ScheduleError(_too_small(costs, steps, device, kinds, lengths[0], levels))
    (chosen, estimate), *others = found
    rejected = [other for _, other in others]
    for schedule in (KeepAll(), TwoLevel()):
        plain = price(schedule, costs, steps, length=chosen.way.length, keep=chosen.way.keep)
        if (plain.states, plain.bytes) != (estimate.states, estimate.bytes):
            rejected.append(plain)
    return Plan(steps, estimate, memory, tuple(sorted(rejected, key=lambda e: e.seconds)), chosen.problem)


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
            duration(estimate.seconds),
            style="bold" if chosen else None,
        )
    return table


def duration(seconds: float) -> str:
    """Seconds for people: "2.5 h"."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


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
