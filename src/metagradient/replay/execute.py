"""The reverse traversal: a schedule's integers turned into programs, states and cotangents."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from metagradient.errors import NonFiniteError
from metagradient.replay.fingerprint import Watch
from metagradient.replay.schedule import Action, Advance, Drop, Keep, PullBack, Restore, Save
from metagradient.replay.store import Stores
from metagradient.step.rule import Cotangent
from metagradient.step.segment import Kept, Runner, advance_one, pull_one
from metagradient.trees import PyTree, floating_paths, nbytes, paths

_LOOK_AHEAD = 8

Begin: TypeAlias = Callable[[PyTree], tuple[jax.Array, Cotangent, PyTree]]
"""`final state -> (value, cotangent of the state, cotangents of z so far)`.

It settles the watch before the objective: what that makes of a state that is not finite would hide the step that made
it.
"""

Ticker: TypeAlias = Callable[[str, int], None]
"""Told of every segment walked: which way, and how many steps."""


@dataclass
class Traversal:
    """One reverse traversal of a run.

    Arguments:
        runner: walks segments.
        begin: the objective and its pull-back.
        watch: compares replays with the first run.
        ticker: progress.
        stores: where boundary states go.
        replays: whether any segment is walked twice, so that its batches are read again.
        careful: look for non-finite values after every segment, and say where they first appeared.
    """

    runner: Runner
    begin: Begin
    watch: Watch
    ticker: Ticker
    stores: Stores
    replays: bool = True
    careful: bool = False
    _sizes: dict[int, int] = field(default_factory=dict)

    def rehearse(self, state: PyTree) -> None:
        """Walk the first segment once more than needed, so that the run proper is compared with it.

        A schedule that keeps every state never replays, and would not notice a step that draws on something outside
        its arguments.
        """
        first = -self.runner.before
        self._read(first)
        self.watch.state(self.runner.steps(first).stop, self.runner.advance(first, state))
        self.runner.forget()

    def first_run(self, state: PyTree) -> PyTree:
        """Advance through the segments before those that are differentiated."""
        if self.careful and (bad := _bad(state)):
            raise NonFiniteError(f"the initial state is not finite: {_names(bad)}")
        self.watch.state(0, state)
        for i in range(-self.runner.before, 0):
            state = self._advance(i, state)
        return state

    def run(self, actions: Iterable[Action], state: PyTree) -> tuple[jax.Array, Cotangent, PyTree]:
        """Follow a schedule from the state at its first boundary.

        Returns: the objective's value, the cotangent of that state, and the cotangents of z.
        """
        kept: dict[int, Kept] = {}
        result: tuple[Any, Cotangent, PyTree] | None = None
        # After Keep the state at the segment's end is only computed where something reads it.
        working: Callable[[], PyTree] = _constant(state)
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
                    if result is None:
                        state = working()
                        value, cotangent, total = self.begin(state)
                        result = value, cotangent, total
                        working = _nothing
                    value, cotangent, total = result
                    self.stores.kept(-self._size(kept[segment], segment))
                    cotangent, total = self._pull(segment, kept.pop(segment), cotangent, total)
                    result = value, cotangent, total
        assert result is not None
        self.watch.settle()
        return result

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
        self._read(i)
        end = self.runner.advance(i, state)
        self._arrived(i, state, end)
        return end

    def _keep(self, i: int, state: PyTree) -> tuple[Kept, Callable[[], PyTree]]:
        self._read(i)
        kept, finish = self.runner.keep(i, state)

        def end() -> PyTree:
            reached = finish()
            self._arrived(i, state, reached, wait=False)
            return reached

        return kept, end

    def _pull(self, i: int, kept: Kept, cotangent: Cotangent, total: PyTree) -> tuple[Cotangent, PyTree]:
        self._read(i)
        before = cotangent
        cotangent, total, finite = self.runner.pull(i, kept, cotangent, total)
        steps = self.runner.steps(i)
        self.ticker("adjoint", len(steps))
        if self.careful and not np.all(finite):
            raise NonFiniteError(locate_in_adjoint(self.runner, i, kept, before))
        self.watch.cotangent(steps.start, finite)
        return cotangent, total

    def _read(self, i: int) -> None:
        if not self.runner.holds(i):
            batches = self.runner.batches(i)
            # The first and the last segment always, so that every schedule compiles the same programs.
            reread = self.replays and self.runner.rereads(i)
            if reread or i in (-self.runner.before, len(self.runner) - 1):
                self.watch.batches(self.runner.steps(i).start, batches)

    def _size(self, kept: Kept, i: int) -> int:
        """Bytes of a kept segment: the same for all of one length."""
        steps = len(self.runner.steps(i))
        if steps not in self._sizes:
            self._sizes[steps] = nbytes(kept)
        return self._sizes[steps]

    def _arrived(self, i: int, start: PyTree, end: PyTree, *, wait: bool = True) -> None:
        steps = self.runner.steps(i)
        self.ticker("forward", len(steps))
        if self.careful and _bad(end):
            raise NonFiniteError(locate_in_segment(self.runner, i, start))
        self.watch.state(steps.stop, end, wait=wait)


def locate_in_segment(runner: Runner, i: int, state: PyTree) -> str:
    """Step through segment i, and say where a state first holds something not finite."""
    for t, batch in _single_steps(runner, i):
        new = advance_one(runner.rule, state, runner.z, jnp.int32(t), batch)[0]
        bad = _bad(new)
        if bad:
            return (
                f"step {t} made {_names(bad)} of the state non-finite (the state before it was finite). Lower the "
                "learning rate, clip gradients, or look for a log, root or division at zero in the loss"
            )
        state = new
    return f"the state became non-finite between steps {runner.steps(i).start} and {runner.steps(i).stop}"


def locate_in_adjoint(runner: Runner, i: int, kept: Kept, cotangent: Cotangent) -> str:
    """Step backwards through segment i, and say where a cotangent first holds something not finite."""
    loop = runner.segment.loop != "steps"
    queries = cotangent[0].shape[:1] if runner.queries else ()
    for t, batch in reversed(list(_single_steps(runner, i))):
        at = t - runner.steps(i).start
        take = (lambda tree, at=at: jax.tree.map(lambda x: x[at], tree)) if loop else (lambda seq, at=at: seq[at])
        state, beside = take(kept.states), take(kept.beside)
        total = jax.tree.map(lambda x: jnp.zeros((*queries, *x.shape), x.dtype), runner.z)
        cotangent, _, finite = pull_one(
            runner.rule, runner.queries, state, beside, runner.z, jnp.int32(t), batch, cotangent, total
        )
        if not np.all(finite):
            names = floating_paths(state)
            bad = [names[j] for j in np.flatnonzero(~np.asarray(finite))]
            after = advance_one(runner.rule, state, runner.z, jnp.int32(t), batch)[0]
            return f"the adjoint of step {t} made the cotangent of {_names(bad)} non-finite. {_remedy(after)}"
    return f"a cotangent became non-finite between steps {runner.steps(i).start} and {runner.steps(i).stop}"


def _remedy(after: PyTree) -> str:
    roots = [
        p for p, x in paths(after) if ".nu" in p and jnp.issubdtype(x.dtype, jnp.floating) and bool((x == 0).any())
    ]
    if roots:
        return (
            f"The optimiser's second moment {roots[0]} holds zeros, and eps_root=0 makes the derivative of its root "
            "infinite there: give Adam an eps_root (1e-8 or more; larger is smoother)"
        )
    return (
        "The step is finite but its derivative isn't: look for a root, norm, log or division at zero in the loss or "
        "the optimiser; Adam needs eps_root > 0"
    )


def _single_steps(runner: Runner, i: int) -> Iterable[tuple[int, PyTree]]:
    return ((t, runner.feed[t]) for t in runner.steps(i))


def _bad(tree: PyTree) -> list[str]:
    return [
        path for path, x in paths(tree) if jnp.issubdtype(x.dtype, jnp.floating) and not bool(jnp.isfinite(x).all())
    ]


def _names(leaves: list[str]) -> str:
    return ", ".join(leaves[:3]) + (f" and {len(leaves) - 3} more" if len(leaves) > 3 else "")


def _constant(state: PyTree) -> Callable[[], PyTree]:
    return lambda: state


def _nothing() -> PyTree:
    raise AssertionError("the schedule reads a working state that the pull-back has used")
