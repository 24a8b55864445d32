"""`Runner`: walks a training segment by segment."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from metagradient.errors import CompilerError
from metagradient.given import Given
from metagradient.step.feed import Feed
from metagradient.step.programs import Form, Programs
from metagradient.step.rule import Cotangent
from metagradient.step.segment import Kept, Pulled, Segment, Stamp
from metagradient.trees import PyTree, nbytes

# Two right programs differ by rounding; the faults of compilers that were seen are of tens of percents.
_ROUNDING = 0.01
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Reached:
    """The end of a segment: the state there, and its fingerprint."""

    state: PyTree
    stamp: Stamp


@dataclass(eq=False)
class Runner:
    """Walks a training segment by segment, always through the same programs.

    Arguments:
        programs: those of the step.
        segment: how steps are compiled.
        feed: the batches.
        given: what every step is given.
        queries: whether cotangents have a leading axis of queries.
        begin: first step that is differentiated; segments are numbered from there, those before it negatively.
        hold_bytes: host memory for batches that were read, so that replays needn't read them again.
        on_read: told of the batches of a segment that were read: its number, its first step, the batches, and whether
            they are held.
    """

    programs: Programs
    segment: Segment
    feed: Feed
    given: Given
    queries: bool = False
    begin: int = 0
    hold_bytes: int = 0
    on_read: Callable[[int, int, Any, bool], None] | None = None
    forward_steps: int = field(default=0, init=False)
    adjoint_steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.form: Form = self.programs.form(self.segment)
        self._last: tuple[int, Any] | None = None
        self._held: dict[int, Any] = {}
        self._held_bytes = 0

    def __len__(self) -> int:
        """Number of differentiated segments."""
        return -(-(len(self.feed) - self.begin) // self.segment.length)

    @property
    def before(self) -> int:
        """Number of segments that are only advanced through."""
        return -(-self.begin // self.segment.length)

    def steps(self, i: int) -> range:
        """Steps of segment i; the last of the run, and the last before `begin`, may be short."""
        if i < 0:
            start = (i + self.before) * self.segment.length
            return range(start, min(start + self.segment.length, self.begin))
        start = self.begin + i * self.segment.length
        return range(start, min(start + self.segment.length, len(self.feed)))

    def batches(self, i: int) -> Any:
        """Batches of segment i: stacked for a compiled loop, a list for single steps."""
        if i in self._held:
            return self._held[i]
        if self._last is None or self._last[0] != i:
            steps = self.steps(i)
            single = self.segment.loop == "steps"
            read = [self.feed[t] for t in steps] if single else self.feed.segment(steps.start, len(steps))
            self._last = i, read
            size = nbytes(read)
            if self._held_bytes + size <= self.hold_bytes:
                self._held[i] = read
                self._held_bytes += size
            if self.on_read:
                self.on_read(i, steps.start, read, i in self._held)
        return self._last[1]

    def forget(self) -> None:
        """Drop all batches, so that their next use reads them again."""
        self._last = None
        self._held.clear()
        self._held_bytes = 0

    def advance(self, i: int, state: PyTree) -> Reached:
        """What is reached at the end of segment i from the state at its start."""
        batches = self.batches(i)
        self.forward_steps += len(self.steps(i))
        if self.segment.loop != "steps":
            end, _, _, stamp = self._many(i, state, batches)
            return Reached(end, stamp)
        stamp: Any = None
        for t, batch in zip(self.steps(i), batches, strict=True):
            state, _, stamp = self.form.advance_one(state, self.given, np.int32(t), batch)
        return Reached(state, stamp)

    def pass_through(self, i: int, state: PyTree, at: Sequence[int]) -> tuple[list[tuple[int, PyTree]], PyTree]:
        """`advance`, and the states before some of the segment's steps: (pairs of steps and states, the last)."""
        if not at:
            return [], self.advance(i, state).state
        kept, end = self.keep(i, state)
        start = self.steps(i).start
        if self.segment.loop == "steps":
            return [(t, kept.states[t - start]) for t in at], end().state
        return [(t, jax.tree.map(lambda x, t=t: x[t - start], kept.states)) for t in at], end().state

    def keep(self, i: int, state: PyTree) -> tuple[Kept, Callable[[], Reached]]:
        """What the pull-back of segment i needs, and how to get to its end.

        Where a step keeps nothing but its state, the last step is only taken if that end is asked for.
        """
        steps, batches = self.steps(i), self.batches(i)
        if self.segment.loop != "steps":
            self.forward_steps += len(steps)
            end, states, beside, stamp = self._many(i, state, batches)
            return Kept(states, beside, batches), lambda: Reached(end, stamp)
        states, beside = [], []
        for t, batch in zip(steps[:-1], batches[:-1], strict=True):
            states.append(state)
            state, left, _ = self.form.advance_one(state, self.given, np.int32(t), batch)
            beside.append(left)
        self.forward_steps += len(steps) - 1
        states.append(state)

        def last() -> tuple[PyTree, PyTree, Stamp]:
            self.forward_steps += 1
            return self.form.advance_one(states[-1], self.given, np.int32(steps[-1]), batches[-1])

        def reached() -> Reached:
            end, _, stamp = last()
            return Reached(end, stamp)

        if self.form.rule.keep == "state":
            return Kept(states, [*beside, ()], batches), reached
        end, left, stamp = last()
        return Kept(states, [*beside, left], batches), lambda: Reached(end, stamp)

    def pull(self, i: int, kept: Kept, cotangent: Cotangent, total: PyTree) -> Pulled:
        """Pull a cotangent back through segment i, adding to the z cotangents, which are used up."""
        self.adjoint_steps += len(self.steps(i))
        return self._pull(i, kept, cotangent, total, self.queries)

    def compare_a_query(self, i: int, kept: Kept, cotangent: Cotangent, total: PyTree) -> Pulled:
        """`pull`, with the last of all queries pulled back once more by itself.

        Errors: `CompilerError` where the two differ by more than rounding: a compiler's fault, of which one is known.

        Cost: the compilation of the scalar pull-back, and a call.
        """
        last = jax.tree.map(lambda x: x[-1], (cotangent, total))
        pulled = self.pull(i, kept, cotangent, total)
        alone = self._pull(i, kept, *last, queries=False)
        together = jax.tree.map(lambda x: x[-1], (pulled.cotangent, pulled.total))
        pairs = [
            (path, np.asarray(a, np.float64), np.asarray(b, np.float64))
            for (path, a), b in zip(
                jax.tree.leaves_with_path(together), jax.tree.leaves((alone.cotangent, alone.total)), strict=True
            )
        ]
        largest = max(float(np.linalg.norm(b)) for _, _, b in pairs)
        for path, a, b in pairs:
            apart, size = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
            if apart > _ROUNDING * size + _NEGLIGIBLE * largest:
                raise CompilerError(
                    f"the adjoint of many queries at once isn't that of one at step {self.steps(i).stop - 1}: leaf "
                    f"{jax.tree_util.keystr(path)} differs by {apart / (size or 1):.0%}. This is a fault of the "
                    "compiler: take another jaxlib, or one metagradient for each query"
                )
        return pulled

    def _pull(self, i: int, kept: Kept, cotangent: Cotangent, total: PyTree, queries: bool) -> Pulled:
        steps = self.steps(i)
        if self.segment.loop != "steps":
            return self.form.pull_many(self._unroll, queries, total, cotangent, self.given, np.int32(steps.start), kept)
        pulled, asymmetries = None, []
        for t, *of in zip(
            reversed(steps), reversed(kept.states), reversed(kept.beside), reversed(kept.batches), strict=True
        ):
            pulled = self.form.pull_one(queries, total, cotangent, self.given, np.int32(t), *of)
            cotangent, total = pulled.cotangent, pulled.total
            asymmetries.append(pulled.asymmetry)
        assert pulled is not None
        return replace(pulled, asymmetry=asymmetries)

    @property
    def _unroll(self) -> bool:
        return self.segment.loop == "unroll"

    def _many(self, i: int, state: PyTree, batches: Any) -> tuple[PyTree, Any, Any, Stamp]:
        steps = self.steps(i)
        return self.form.advance_many(self._unroll, len(steps), state, self.given, np.int32(steps.start), batches)
