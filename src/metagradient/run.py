"""A run that has passed every check which costs no training, and plain training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from metagradient.errors import ImpureStepError, PrecisionError, StructureError
from metagradient.metaparameters import canonical, wrapped
from metagradient.progress import Progress
from metagradient.replay.fingerprint import fingerprint
from metagradient.step.choose import choose
from metagradient.step.contract import Contract, check_steps
from metagradient.step.feed import Feed
from metagradient.step.rule import Rule
from metagradient.step.segment import Runner, Segment, advance_one
from metagradient.training import Training
from metagradient.trees import PyTree, mismatch

_PRECISE = ("highest", "float32")


@dataclass(frozen=True)
class Run:
    """A training at one z, checked and ready to be walked.

    Arguments:
        training: the training.
        feed: its batches.
        state: its initial state.
        contract: its step, traced.
        begin: first differentiated step.
    """

    training: Training
    feed: Feed
    state: PyTree
    contract: Contract
    begin: int

    @classmethod
    def prepared(cls, training: Training, z: PyTree, window: int | None = None, *, first: bool = True) -> Self:
        """Check everything that can be known before compute is spent.

        Arguments:
            z: canonical metaparameters.
            window: as in `value_and_metagrad`.
            first: whether this training was not checked before. Where it was, its step is left to be traced beside the
                device's work, by `contract.still_holds`.
        """
        steps = len(training.batches)
        kinds = wrapped(z)
        feed = Feed(training.batches, kinds)
        feed.check(whole=first)
        if window is not None and not 1 <= window <= steps:
            raise StructureError(f"window must be between 1 and T = {steps}, got {window}")
        check_steps(kinds, steps)
        state = training.initial(z)
        if training.starts_from_z and not np.array_equal(*(fingerprint(s)[0] for s in (state, training.initial(z)))):
            raise ImpureStepError(
                "init gave another state the second time: it draws on something outside z. Make keys of a fixed seed"
            )
        contract = Contract(training.rule, state, feed.first, kinds, allow_low_precision=training.allow_low_precision)
        if first:
            contract.check()
        return cls(training, feed, state, contract, 0 if window is None else steps - window)

    def chosen(self, segment: Segment | int | None) -> Segment:
        """How to compile its steps, measured where `segment` leaves it open."""
        return choose(self.training.rule, segment, self.feed, self.feed.z, self.state, self.begin)

    def runner(self, segment: Segment, *, queries: bool = False, hold_bytes: int = 0) -> Runner:
        """A walker at the start of the run."""
        return Runner(self.training.rule, segment, self.feed, self.feed.z, queries, self.begin, hold_bytes)


def train(training: Training, z: PyTree, *, segment: Segment | int | None = None, progress: bool = False) -> PyTree:
    """Run a training, and return its final state: the bits that `value_and_metagrad` passes through.

    Arguments:
        training: the run.
        z: metaparameters.
        segment: as in `value_and_metagrad`; None takes single steps, which need no measuring.
        progress: show a progress bar.

    Errors: those of `value_and_metagrad` that concern a run.

    Cost: T steps, and the memory of two states.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> training = mg.Training(jnp.ones(()), lambda state, batch, z: state * z, [{}] * 3)
    >>> float(mg.train(training, jnp.asarray(0.5)))
    0.125
    """
    with full_precision(training.allow_low_precision):
        z = canonical(z)
        run = Run.prepared(training, z)
        runner, state = run.runner(run.chosen(segment or Segment(1, "steps", "state"))), run.state
        with Progress(progress) as bar:
            bar.expect("forward", len(training.batches))
            for i in range(len(runner)):
                state = runner.advance(i, state)
                bar.tick("forward", len(runner.steps(i)))
    return state


def train_many(training: Training, zs: Sequence[PyTree], *, at_once: int | None = None) -> list[PyTree]:
    """Run one training under many metaparameters: a grid of schedules, the trainings of a probe.

    Arguments:
        training: the run.
        zs: metaparameters of one structure, a training each.
        at_once: trainings in one vmapped program; None takes one or all, whichever makes the first steps faster.

    Returns: a final state for each. They are compared well with each other, but their bits are not those of `train`:
        another program rounds differently.

    Errors: those of `train`; `StructureError` for an empty list, or metaparameters of different structures.

    Cost: T steps a training, and the memory of `at_once` states. Small steps gain from company; a convolution on a
        CPU loses by it (1.9 to 2.5 times slower, measured).

    >>> import jax.numpy as jnp, metagradient as mg
    >>> training = mg.Training(jnp.ones(()), lambda state, batch, z: state * z, [{}] * 3)
    >>> [float(x) for x in mg.train_many(training, [jnp.asarray(0.5), jnp.asarray(2.0)])]
    [0.125, 8.0]
    """
    zs = list(zs)
    if not zs or (at_once is not None and at_once < 1):
        raise StructureError("train_many takes at least one z, and at_once is at least 1")
    zs = [canonical(z) for z in zs]
    for number, z in enumerate(zs):
        if problem := mismatch(zs[0], z):
            raise StructureError(f"zs[{number}] is not like zs[0]: {problem}")
    at_once = at_once or fastest_company(training, zs)
    with full_precision(training.allow_low_precision):
        groups = [zs[i : i + at_once] for i in range(0, len(zs), at_once)]
        prepared = ([Run.prepared(training, z, first=z is zs[0]) for z in group] for group in groups)
        return [state for runs in prepared for state in _together(runs, len(training.batches))]


def fastest_company(training: Training, zs: Sequence[PyTree]) -> int:
    """How many of these trainings to run in one vmapped program: one or all, whichever makes the first steps faster.

    Arguments:
        training, zs: as in `train_many`.

    Cost: three steps of one training and of all of them together, and their compilation.
    """
    with full_precision(training.allow_low_precision):
        runs = [Run.prepared(training, canonical(z), first=number == 0) for number, z in enumerate(zs)]
        return min((1, len(runs)), key=lambda size: _seconds(runs[:size]) / size)


def _seconds(runs: list[Run]) -> float:
    """Of two steps together, compilation apart."""
    jax.block_until_ready(_together(runs, 1))
    start = perf_counter()
    jax.block_until_ready(_together(runs, 2))
    return perf_counter() - start


def _together(runs: list[Run], steps: int) -> list[PyTree]:
    rule, feed = runs[0].training.rule, runs[0].feed
    states = jax.tree.map(lambda *x: jnp.stack(x), *[run.state for run in runs])
    zs = jax.tree.map(lambda *x: jnp.stack(x), *[run.feed.z for run in runs])
    for t in range(min(steps, len(feed))):
        states = _step_many(rule, states, zs, jnp.int32(t), feed[t])
    return [jax.tree.map(lambda x, i=i: x[i], states) for i in range(len(runs))]


@partial(jax.jit, static_argnames="rule", donate_argnames="states")
def _step_many(rule: Rule, states: PyTree, zs: PyTree, t: jax.Array, batch: PyTree) -> PyTree:
    return jax.vmap(lambda state, z: advance_one(rule, state, z, t, batch)[0])(states, zs)


@contextmanager
def full_precision(allow_low_precision: bool) -> Iterator[None]:
    """Matrix products in full precision, which on accelerators isn't the default."""
    asked = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if allow_low_precision or asked in _PRECISE:
        yield
    elif asked is not None:
        raise PrecisionError(
            f"jax_default_matmul_precision is {asked!r}: metagradients in lowered precision are often noise. Set it to "
            "'highest', or pass allow_low_precision=True"
        )
    else:
        with jax.default_matmul_precision("highest"):
            yield
