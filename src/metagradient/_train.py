"""Plain training: one run, or many of the same shapes at once."""

from collections.abc import Sequence
from time import perf_counter

import jax
import jax.numpy as jnp

from metagradient.errors import StructureError
from metagradient.metaparameters import canonical
from metagradient.progress import Progress
from metagradient.run import Run, full_precision
from metagradient.step.segment import SINGLE_STEPS, Segment
from metagradient.training import Training
from metagradient.trees import PyTree, mismatch


def train(training: Training, z: PyTree, *, segment: Segment | int | None = None, progress: bool = False) -> PyTree:
    """Run a training, and return its final state: the bits that `value_and_metagrad` passes through.

    Arguments:
        training: the run.
        z: metaparameters.
        segment: as in `value_and_metagrad`. None takes what is chosen once for this training and shapes of z, in this
            process, for training and metagradients alike; to have the same bits in another process, pass the
            `segment` of a metagradient's `Stats`.
        progress: show a progress bar.

    Errors: those of `value_and_metagrad` that concern a run.

    Cost: T steps, and the memory of two states. Where steps are so small that a compiled loop may pay, and `segment`
        leaves it open, the first call also measures a few steps and their adjoints.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> training = mg.Training(jnp.ones(()), lambda state, batch, z: state * z, [{}] * 3)
    >>> float(mg.train(training, jnp.asarray(0.5)))
    0.125
    """
    with full_precision(training.allow_low_precision):
        z = canonical(z)
        run = Run.prepared(training, z)
        runner, state = run.runner(run.chosen(segment)), run.state
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
    form, feed = runs[0].programs.form(SINGLE_STEPS), runs[0].feed
    states = jax.tree.map(lambda *x: jnp.stack(x), *[run.state for run in runs])
    zs = jax.tree.map(lambda *x: jnp.stack(x), *[run.z for run in runs])
    for t in range(min(steps, len(feed))):
        states = form.advance_company(states, zs, jnp.int32(t), feed[t])
    return [jax.tree.map(lambda x, i=i: x[i], states) for i in range(len(runs))]
