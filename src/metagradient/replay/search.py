"""The search behind a plan: which leaf, segment length and places for slower tiers give the fewest seconds."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple, TypeAlias

from metagradient.replay.budget import Costs, LeafKind
from metagradient.replay.hierarchy import Level, Problem, outline, seconds
from metagradient.replay.price import Estimate, walked

Levels: TypeAlias = tuple[Level, ...]


class _Effort(NamedTuple):
    """How long to look: operations a table, about a nanosecond each, and places a slower tier.

    Neither depends on the budget: more memory must not plan worse.
    """

    operations: float
    places: int

    def slots(self, slots: int, places: int) -> int:
        """As many slots as there are operations for; all, where there is one for every place."""
        return slots if slots >= places else max(1, min(slots, int(2 * self.operations / max(1, places) ** 2)))


_QUICK = _Effort(3e6, 250)
_THOROUGH = (_Effort(4e7, 400), _Effort(4e7, 1200))
_PROMISING = 2
_LONGEST = 8
_FINER = 8


@dataclass(frozen=True, slots=True)
class Way:
    """How segments are compiled, and which slower tiers are used."""

    keep: LeafKind
    length: int
    levels: Levels


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way, the problem that it poses, and the seconds that its solution takes at most: all of them, by its tables."""

    way: Way
    problem: Problem
    seconds: float

    @property
    def rank(self) -> tuple[float, int, int]:
        """Fewest seconds first, as far as single-precision tables tell; then short segments, and few tiers."""
        return float(f"{self.seconds:.5e}"), self.way.length, len(self.problem.levels)


@dataclass(frozen=True, slots=True)
class Search:
    """One run to plan for.

    Arguments:
        costs: what its parts cost.
        steps: its length.
        device: the device's budget, in bytes.
    """

    costs: Costs
    steps: int
    device: int

    def best(
        self, keeps: Sequence[LeafKind], lengths: Sequence[int], levels: Levels
    ) -> list[tuple[Candidate, Estimate]]:
        """The best candidate of every leaf, with and without slower tiers, the fastest first; none if nothing fits."""
        tiers = dict.fromkeys([(), levels])
        ways = [Way(keep, length, used) for keep in keeps for length in lengths for used in tiers]
        found = [c for way in ways for c in self._candidates(way, _QUICK)]
        if not found:
            # Only states at every segment of a slower tier might do.
            found = [c for way in ways for c in self._candidates(way, _Effort(0, self.steps))]
        found.sort(key=lambda c: c.rank)
        for way in dict.fromkeys(c.way for c in found[:_PROMISING]):
            found += [c for effort in _THOROUGH for c in self._candidates(way, effort)]
        found.sort(key=lambda c: c.rank)
        first: dict[tuple[LeafKind, bool], Candidate] = {}
        for candidate in found:
            first.setdefault((candidate.way.keep, bool(candidate.problem.levels)), candidate)
        # Where places lie apart, a walk takes less than its table says.
        walks = [(candidate, self._estimate(candidate)) for candidate in first.values()]
        return sorted(walks, key=lambda walk: replace(walk[0], seconds=walk[1].seconds).rank)

    def _estimate(self, candidate: Candidate) -> Estimate:
        """All figures of a candidate."""
        way = candidate.way
        estimate = walked(outline(candidate.problem), self.costs, self.steps, way.length, way.keep, "")
        used = [f"{states} {tier}" for tier, states in estimate.states.items() if states]
        return replace(estimate, name=" + ".join(used) or "keep all")

    def _candidates(self, way: Way, effort: _Effort) -> Iterator[Candidate]:
        leaf = self.costs.leaves[way.keep]
        segments = -(-self.steps // way.length)
        always = self.steps * (leaf.step_seconds + leaf.adjoint_seconds) + 2 * segments * self.costs.a_walk(
            way.keep, way.length
        )
        for problem in self._problems(way, effort):
            # The last leaf's end is always asked for.
            total = always + problem.elided_seconds + seconds(problem)
            if total < inf:
                yield Candidate(way, problem, total)

    def _problems(self, way: Way, effort: _Effort) -> Iterator[Problem]:
        """What one way may pose: all of it, or less that is solved faster; nothing where it doesn't fit."""
        costs, leaf = self.costs, self.costs.leaves[way.keep]
        segments = -(-self.steps // way.length)
        room, kept = costs.room(self.device, transfers=bool(way.levels)), way.length * leaf.bytes
        if room < kept:
            return
        advance = way.length * costs.a_step(way.keep) + costs.a_walk(way.keep, way.length)
        elided = leaf.step_seconds if costs.elides(way.keep, way.length) else 0.0
        whole = Problem(segments, advance, elided, room, costs.state_bytes, kept)
        if room >= segments * kept:
            yield whole
            return
        # Keeping states is then no cheaper than storing them.
        binomial = kept == costs.state_bytes and elided == advance
        for levels, reach in _placed(segments, way.levels, effort):
            slots = int(2 * effort.operations / reach**2)
            if slots and not binomial:
                yield replace(whole, levels=levels, reach=reach, slots=slots)
            if binomial or slots < whole.device_slots:
                yield replace(whole, levels=levels, closed=True)


def default_lengths(steps: int) -> Iterable[int]:
    """Powers of two up to 256, or divisors of the run where they are close."""
    for length in (2**power for power in range(_LONGEST + 1)):
        near = range(length - length // 4, length + length // 4 + 1)
        yield min((n for n in near if steps % n == 0), key=lambda n: abs(n - length), default=length)


def _placed(segments: int, levels: Levels, effort: _Effort) -> Iterator[tuple[Levels, int]]:
    """Levels with places, and how many segments the device may be given at once.

    The last level walks the run. Faster ones walk parts of it, and have places closer together for that.
    """
    if not levels:
        yield (), segments
        return
    coarse = -(-segments // effort.places)
    stacks = [levels]
    if coarse > 1 and len(levels) == 1 and levels[0].slots > 1:
        # One tier does both.
        few = replace(levels[0], slots=levels[0].slots // 2)
        stacks.append((few, replace(few, slots=levels[0].slots - few.slots)))
    for stack in stacks:
        for fine in sorted({1, -(-coarse // _FINER), coarse}):
            reach = min(segments, fine * effort.places)
            spans = [(fine, reach)] * (len(stack) - 1) + [(fine * -(-coarse // fine), segments)]
            placed = [
                replace(level, slots=effort.slots(level.slots, span // grain), grain=grain, reach=span)
                for level, (grain, span) in zip(stack, spans, strict=True)
            ]
            yield tuple(placed), reach
