"""The search behind a plan: which leaf, segment length and places for slower tiers give the fewest seconds."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import inf
from typing import NamedTuple

from metagradient.replay.budget import Costs, LeafKind
from metagradient.replay.hierarchy import Level, Problem, outline, seconds
from metagradient.replay.price import Estimate, walked


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


