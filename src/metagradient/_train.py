"""Plain training: one run, or many of the same shapes at once."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import jax
import jax.numpy as jnp

from metagradient._jax import Tracer
from metagradient._replay import Pass, Replay
from metagradient.errors import DerivativeError, StructureError
from metagradient.metaparameters import canonical
from metagradient.progress import Progress
from metagradient.run import Run, full_precision
from metagradient.step.segment import SINGLE_STEPS, Segment
from metagradient.training import Training, check_training
from metagradient.trees import PyTree, mismatch


def train(
    training: Training,
    z: PyTree,
    *,
    adjoint: Replay | None = None,
    segment: Segment | int | None = None,
    progress: bool = False,
) -> PyTree:
    """Run a training, and return its final state: the bits that `value_and_metagrad` passes through.

    With `adjoint=Replay(...)`, `jax.grad`, `jax.value_and_grad` and `jax.vjp` through it run REPLAY: the same traversal
    as `value_and_metagrad`, with the same promises. z may be made of anything, several runs may enter one objective,
    and the objective is JAX's as you wrote it (put `jax.jit` around its parts where it is large).

    Arguments:
        training: the run.
        z: metaparameters.
        adjoint: how to differentiate it; its options say how the run is walked, too. None: differentiating is an error.
        segment: as in `Replay`. None takes what is chosen once for this training and shapes of z, in this process, for
            training and metagradients alike; to have the same bits in another process, pass the `segment` of a
            metagradient's `Stats`.
        progress: show a progress bar.

    Errors: those of `value_and_metagrad` that concern a run. `DerivativeError` where z, args, init or a batch is
        traced, but for the one `jax.grad` that `adjoint` serves: under `jax.jit`, `jax.vmap`, `jax.checkpoint`, in a
        gradient of a gradient, in `jax.jacrev` (take `value_and_metagrad(..., vector=True)`), or at a second backward
        pass of one run. Forward mode (`jax.jvp`, `jax.linearize`) is JAX's own error about a custom_vjp.

    Cost: T steps, and the memory of two states. Where steps are so small that a compiled loop may pay, and `segment`
        leaves it open, the first call also measures a few steps and their adjoints. Differentiated, that of
        `value_and_metagrad`: states are kept from the forward pass on, and released at the end of the backward one, or
        with the last reference to what `jax.vjp` returned.

    >>> import jax, jax.numpy as jnp, metagradient as mg
    >>> training = mg.Training(jnp.ones(()), lambda state, batch, z: state * z, [{}] * 3)
    >>> float(mg.train(training, jnp.asarray(0.5)))
    0.125
    >>> float(jax.grad(lambda z: mg.train(training, z, adjoint=mg.Replay()))(0.5))
    0.75
    """
    check_training(training)
    if adjoint is None:
        return _walked(training, z, Replay(segment=segment, progress=progress))
    if not isinstance(adjoint, Replay):
        raise StructureError(f"adjoint is {adjoint!r:.80}: give mg.Replay(...)")
    if segment is not None or progress:
        raise StructureError("segment and progress are options of adjoint: mg.Replay(segment=, progress=)")
    run = jax.custom_vjp(lambda z: _walked(training, z, adjoint))
    run.defvjp(lambda z: _forward(training, z, adjoint), _back)
    return run(canonical(z, traced=True))


def _walked(training: Training, z: PyTree, options: Replay) -> PyTree:
    ((_, state),) = _advanced(training, z, options, every=None)
    return state


def _forward(training: Training, z: PyTree, adjoint: Replay) -> tuple[PyTree, "_Opaque"]:
    z = canonical(z)
    with full_precision(training.allow_low_precision):
        run = Run.prepared(training, z, adjoint.window, retrace=False)
    passed = Pass(run, z, adjoint)
    return passed.forward(), _Opaque(passed)


def _back(kept: "_Opaque", cotangent: PyTree) -> tuple[PyTree]:
    values = tuple(x for x in jax.tree.leaves(cotangent) if x.dtype != jax.dtypes.float0)
    for x in values:
        if isinstance(x, Tracer):
            raise DerivativeError(
                f"the cotangent of the final state is traced ({type(x).__name__}): a run goes back once, in Python. "
                "For several objectives at once (jax.jacrev, jax.vmap of a pull-back) take "
                "mg.value_and_metagrad(..., vector=True); not inside jax.jit"
            )
    return (kept.held.back(values),)


@jax.tree_util.register_pytree_node_class
class _Opaque:
    """A pytree without leaves, around what JAX carries from the forward to the backward pass."""

    def __init__(self, held: Pass):
        self.held = held

    def tree_flatten(self) -> tuple[tuple[()], Pass]:
        """Nothing, and what is held."""
        return (), self.held

    @classmethod
    def tree_unflatten(cls, held: Pass, _: tuple[()]) -> "_Opaque":
        """Inverse of `tree_flatten`."""
        return cls(held)


def states(
    training: Training, z: PyTree, *, every: int, segment: Segment | int | None = None, progress: bool = False
) -> Iterator[tuple[int, PyTree]]:
    """Run a training, and yield its state on the way.

    Arguments:
        training, z, segment, progress: as in `train`.
        every: steps between two states, at least 1.

    Returns: an iterator of pairs of steps taken, `every, 2 every, ...` and always T, and the state after them. They are
        the bits of `train` on its way: by the same program, whatever `every`.

    Errors: those of `train`, before the first step; `StructureError` for an `every` that isn't a whole number from 1.

    Cost: that of `train`, as far as it is read. Where segments are compiled loops and a state within one is wanted, the
        states of all steps of that segment.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> training = mg.Training(jnp.ones(()), lambda state, batch, z: state * z, [{}] * 3)
    >>> [(t, float(state)) for t, state in mg.states(training, jnp.asarray(0.5), every=2)]
    [(2, 0.25), (3, 0.125)]
    """
    check_training(training)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise StructureError(f"every is {every!r}: give the steps between two states, a whole number from 1")
    options = Replay(segment=segment, progress=progress)
    return _advanced(training, canonical(z), options, every)


def _advanced(training: Training, z: PyTree, options: Replay, every: int | None) -> Iterator[tuple[int, PyTree]]:
    z = canonical(z)
    precise = partial(full_precision, training.allow_low_precision)
    with precise():
        run = Run.prepared(training, z, options.window)
        runner, state = run.runner(options.chosen(run)[0]), run.state
    steps, bar = len(run.feed), Progress(options.progress)
    bar.expect("forward", steps)
    for i in range(-runner.before, len(runner)):
        wanted = [t for t in runner.steps(i)[1:] if every and t % every == 0]
        # Nothing of the caller's context is changed while it has a state.
        with precise(), bar:
            within, state = runner.pass_through(i, state, wanted)
            bar.tick("forward", len(runner.steps(i)))
        yield from within
        stop = runner.steps(i).stop
        if stop == steps or (every and stop % every == 0):
            yield stop, state


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
    check_training(training)
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
        prepared = ([Run.prepared(training, z, retrace=z is zs[0]) for z in group] for group in groups)
        return [state for runs in prepared for state in _together(runs, len(training.batches))]


def fastest_company(training: Training, zs: Sequence[PyTree]) -> int:
    """How many of these trainings to run in one vmapped program: one or all, whichever makes the first steps faster.

    Arguments:
        training, zs: as in `train_many`.

    Cost: three steps of one training and of all of them together, and their compilation.
    """
    with full_precision(training.allow_low_precision):
        runs = [Run.prepared(training, canonical(z), retrace=False) for z in zs]
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
    zs = jax.tree.map(lambda *x: jnp.stack(x), *[run.given.z for run in runs])
    given = replace(runs[0].given, z=None)
    for t in range(min(steps, len(feed))):
        states = form.advance_company(states, zs, given, jnp.int32(t), feed[t])
    leaves, treedef = jax.tree.flatten(states)
    return [jax.tree.unflatten(treedef, one) for one in zip(*map(jnp.unstack, leaves), strict=True)]
