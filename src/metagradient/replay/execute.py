"""The reverse traversal: a schedule's integers turned into programs, states and cotangents."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from metagradient.errors import NonFiniteError
from metagradient.replay.locate import locate_in_adjoint, locate_in_segment, names, not_finite
from metagradient.replay.schedule import Action, Advance, Drop, Keep, PullBack, Restore, Save
from metagradient.replay.store import Stores
from metagradient.replay.watch import Watch
from metagradient.step.rule import Cotangent
from metagradient.step.runner import Reached, Runner
from metagradient.step.segment import Kept
from metagradient.trees import PyTree, nbytes

_LOOK_AHEAD = 8

Ending: TypeAlias = tuple[Cotangent, PyTree]
"""Cotangents of a state, and of z by all that came after it."""

Ticker: TypeAlias = Callable[[str, int], None]
"""Told of every segment walked: which way, and how many steps."""


@dataclass
class Traversal:
    """One reverse traversal of a run.

    Arguments:
        runner: walks segments.
        watch: compares replays with the first run.
        ticker: progress.
        stores: where boundary states go.
        meanwhile: work for the host, done once while the device still runs to the final state.
        replays: whether any segment is walked twice, so that its batches are read again.
        careful: look for non-finite values after every segment, and say where they first appeared.
    """

    runner: Runner
    watch: Watch
    ticker: Ticker
    stores: Stores
    meanwhile: Callable[[], None]
    replays: bool = True
    careful: bool = False
    _sizes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Of plain values: a runner that held this object would hold itself.
        self.runner.on_read = _stamping(self.watch, self.replays, {-self.runner.before, len(self.runner) - 1})

    def rehearse(self, state: PyTree) -> None:
        """Walk the first segment once more than needed, so that the run proper is compared with it.

        A schedule that keeps every state never replays, and would not notice a step that draws on something outside
        its arguments.
        """
        first = -self.runner.before
        reached = self.runner.advance(first, state)
        self.watch.state(self.runner.steps(first).stop, reached)
        self.runner.forget()

    def walk(self, actions: Iterable[Action], state: PyTree) -> Generator[PyTree, Ending, Ending]:
        """Run from the initial state, and back again by a schedule.

        Yields: the final state, once; it is to be sent that state's cotangent, and the cotangents of z so far.

        Returns: the cotangent of the state at the schedule's first boundary, and the cotangents of z.
        """
        state = self._first_run(state)
        kept: dict[int, Kept] = {}
        # After Keep the state at the segment's end is only computed where something reads it.
        working: Callable[[], PyTree] = _constant(state)
        ending: Ending | None = None
        for action in self._prefetching(actions):
            match action:
                case Advance(start, stop):
                    state = working()
                    for i in range(start, stop):
                        state = self._advance(i, state)
                    working = _constant(state)
                case Save(at, tier):
                    working = _constant(working())
                    self.stores.save(at, working(), tier)
                case Restore(at):
                    working = _constant(self.stores.restore(at))
                case Drop(at):
                    self.stores.drop(at)
                case Keep(segment):
                    kept[segment], working = self._keep(segment, working())
                    self.stores.kept(self._size(kept[segment], segment))
                case PullBack(segment):
                    compare = ending is None and self.runner.queries
                    if ending is None:
                        # Before an objective reads it: what that makes of a state that is not finite would hide the
                        # step that made it.
                        state, working = working(), _nothing
                        self.meanwhile()
                        self.watch.settle()
                        ending = yield state
                        del state
                    self.stores.kept(-self._size(kept[segment], segment))
                    ending = self._pull(segment, kept.pop(segment), *ending, compare=compare)
        assert ending is not None
        self.watch.settle()
        return ending

    def _first_run(self, state: PyTree) -> PyTree:
        """Advance through the segments before those that are differentiated."""
        if bad := not_finite(self.runner, state):
            raise NonFiniteError(f"the initial state is not finite: {names(bad)}")
        for i in range(-self.runner.before, 0):
            state = self._advance(i, state)
        return state

    def _prefetching(self, actions: Iterable[Action]) -> Iterator[Action]:
        """The actions, with every restore announced to the stores a few actions ahead."""
        coming: deque[Action] = deque()
        for action in actions:
            if isinstance(action, Restore):
                self.stores.prefetch(action.at)
            coming.append(action)
            if len(coming) > _LOOK_AHEAD:
                yield coming.popleft()
        yield from coming

    def _advance(self, i: int, state: PyTree) -> PyTree:
        reached = self.runner.advance(i, state)
        self._arrived(i, state, reached)
        return reached.state

    def _keep(self, i: int, state: PyTree) -> tuple[Kept, Callable[[], PyTree]]:
        kept, finish = self.runner.keep(i, state)

        def end() -> PyTree:
            reached = finish()
            self._arrived(i, state, reached, wait=False)
            return reached.state

        return kept, end

    def _pull(self, i: int, kept: Kept, cotangent: Cotangent, total: PyTree, *, compare: bool) -> Ending:
        pull = self.runner.compare_a_query if compare else self.runner.pull
        pulled = pull(i, kept, cotangent, total)
        steps = self.runner.steps(i)
        self.ticker("adjoint", len(steps))
        if self.careful and not np.asarray(pulled.finite).all():
            raise NonFiniteError(locate_in_adjoint(self.runner, i, kept, cotangent))
        self.watch.cotangent(steps.start, pulled, last=i == 0)
        return pulled.cotangent, pulled.total

    def _size(self, kept: Kept, i: int) -> int:
        """Bytes of a kept segment: the same for all of one length."""
        steps = len(self.runner.steps(i))
        if steps not in self._sizes:
            self._sizes[steps] = nbytes((kept.states, kept.beside))
        return self._sizes[steps]

    def _arrived(self, i: int, start: PyTree, reached: Reached, *, wait: bool = True) -> None:
        steps = self.runner.steps(i)
        self.ticker("forward", len(steps))
        if self.careful and not np.asarray(reached.stamp[1]).all():
            raise NonFiniteError(locate_in_segment(self.runner, i, start))
        self.watch.state(steps.stop, reached, wait=wait)


def _stamping(watch: Watch, replays: bool, ends: set[int]) -> Callable[[int, int, PyTree, bool], None]:
    """Fingerprints the batches that a replay will read again."""

    def stamp(i: int, step: int, batches: PyTree, held: bool) -> None:
        # The first and the last segment always, so that every schedule compiles the same programs.
        if (replays and not held) or i in ends:
            watch.batches(step, batches)

    return stamp


def _constant(state: PyTree) -> Callable[[], PyTree]:
    return lambda: state


def _nothing() -> PyTree:
    raise AssertionError("the schedule reads a working state that the pull-back has used")
