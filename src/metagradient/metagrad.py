"""`value_and_metagrad`: the gradient of an objective of a whole training run, by REPLAY."""

from collections.abc import Callable, Generator, Hashable
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from metagradient._jax import compile_seconds
from metagradient._plan import planned_once
from metagradient.errors import NonFiniteError, StructureError
from metagradient.metaparameters import canonical, like, wrapped
from metagradient.objectives import check_objective, programs_of, value_and_pull_back
from metagradient.progress import Progress
from metagradient.replay.budget import Memory
from metagradient.replay.execute import Ending, Traversal
from metagradient.replay.plan import Plan, affordable, free_host_bytes
from metagradient.replay.schedule import Schedule, simulate
from metagradient.replay.store import Stores
from metagradient.replay.watch import NotFinite, Watch
from metagradient.run import Run, full_precision
from metagradient.step.programs import Programs, signature
from metagradient.step.rule import Cotangent
from metagradient.step.segment import Segment
from metagradient.training import Training
from metagradient.trees import PyTree, floating, floating_paths, nbytes, paths

_SHARE_FOR_BATCHES = 16
# In matrix products: a plain step is 3 forward passes, its adjoint a gradient (3) and the gradient's tangent (6).
_ADJOINT_IN_STEPS = 3


@dataclass(frozen=True)
class Stats:
    """What one metagradient took.

    Arguments:
        forward_steps: steps taken, replays included.
        adjoint_steps: steps pulled back.
        peak_states: most boundary states held at once, by tier.
        peak_bytes: most bytes held at once, by tier: of boundary states and, on the device, of what segments were kept
            for their pull-back; the two or so working states are not counted.
        seconds: wall time, compilation included.
        compile_seconds: the part of it that XLA spent compiling.
        segment: how steps were compiled; pass it back as `segment=` to have the same bits.
        schedule: the checkpoint schedule.
    """

    forward_steps: int
    adjoint_steps: int
    peak_states: dict[str, int]
    peak_bytes: dict[str, int]
    seconds: float
    compile_seconds: float
    segment: Segment
    schedule: Schedule

    @property
    def in_steps(self) -> int:
        """Compute in plain training steps, counted in matrix products: an adjoint step is three."""
        return self.forward_steps + _ADJOINT_IN_STEPS * self.adjoint_steps

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, strings and dictionaries."""
        return {**asdict(self), "schedule": repr(self.schedule)}


@dataclass(frozen=True)
class Evaluation:
    """One metagradient.

    Arguments:
        value: the objective's value.
        grad: its gradient, in the structure and types of z.
        stats: what it took.
        state: the final state, which the objective read.
    """

    value: jax.Array
    grad: PyTree
    stats: Stats
    state: PyTree


class Metagradient:
    """A function `z -> (value, gradient)`; made by `value_and_metagrad`, whose arguments are described there.

    Attributes:
        training, objective: what it is the metagradient of.
        programs: those of the objective.
    """

    def __init__(
        self,
        training: Training,
        objective: Callable[[PyTree, PyTree], jax.Array],
        *,
        schedule: Schedule | None = None,
        memory: Memory | None = None,
        segment: Segment | int | None = None,
        window: int | None = None,
        vector: bool = False,
        verify: bool = True,
        progress: bool = False,
    ):
        self.training = training
        self.objective = objective
        self._schedule = schedule
        self._memory = memory
        self._segment = segment
        self._window = window
        self._vector = vector
        self._verify = verify
        self._progress = progress
        self.programs = programs_of(objective)
        self._checked: set[Hashable] = set()

    def __call__(self, z: PyTree) -> tuple[jax.Array, PyTree]:
        """Value of the objective, and its gradient in the structure of z."""
        found = self.evaluate(z)
        return found.value, found.grad

    def with_stats(self, z: PyTree) -> tuple[jax.Array, PyTree, Stats]:
        """Value, gradient, and what they took."""
        found = self.evaluate(z)
        return found.value, found.grad, found.stats

    def evaluate(self, z: PyTree) -> Evaluation:
        """Value, gradient, what they took, and the final state."""
        start = perf_counter()
        with full_precision(self.training.allow_low_precision), compile_seconds() as compiling:
            z = canonical(z)
            # The first time at these shapes, everything is checked before compute is spent; later, beside it.
            first = signature(z) not in self._checked
            run = Run.prepared(self.training, z, self._window, first=first)
            if first:
                check_objective(self.objective, self._vector, run.state, z, self.programs)
                run.check_derivatives(z)
            segment, schedule = self._choose(run)
            self._checked.add(signature(z))
            try:
                found = self._traverse(run, z, segment, schedule, first=first)
            except NotFinite:
                self._traverse(run, z, segment, schedule, careful=True)
                raise NonFiniteError("a non-finite value appeared, but not again in a careful second run") from None
            if compiling.seconds:
                # Programs were traced on the way: of the step that was checked, or of one altered meanwhile?
                run.contract.recheck()
        stats = replace(found.stats, seconds=perf_counter() - start, compile_seconds=compiling.seconds)
        return replace(found, stats=stats)

    def _choose(self, run: Run) -> tuple[Segment, Schedule | None]:
        """How to compile steps, and the schedule where a budget or the user decides it."""
        schedule = self._schedule or (planned_once(run, self._memory, self._segment) if self._memory else None)
        if isinstance(self._segment, Segment) or not isinstance(schedule, Plan):
            return run.chosen(self._segment), schedule
        return schedule.segment, schedule

    def _traverse(
        self, run: Run, z: PyTree, segment: Segment, schedule: Schedule | None, *, first: bool = False,
        careful: bool = False,
    ) -> Evaluation:  # fmt: skip
        # A budget is kept to; without one, batches may take a share of what the host has free.
        hold_bytes = 0 if isinstance(schedule, Plan) else free_host_bytes() // _SHARE_FOR_BATCHES
        runner = run.runner(segment, queries=self._vector, hold_bytes=hold_bytes)
        schedule = schedule or affordable(len(runner), segment, nbytes(run.state))
        folder = schedule.memory.path if isinstance(schedule, Plan) else None
        with Progress(self._progress) as progress, Stores(folder) as stores:
            cost = simulate(schedule, len(runner))
            progress.expect("forward", (runner.before + cost.advances + cost.keeps) * segment.length)
            progress.expect("adjoint", len(runner) * segment.length)
            watch = Watch(run.programs.fingerprint, self._verify)
            traversal = Traversal(runner, watch, progress.tick, stores, cost.advances > 0, careful)
            if self._verify:
                traversal.rehearse(run.state)
            walk = traversal.walk(schedule.actions(len(runner)), run.state)
            state = next(walk)
            if first or self._verify:
                # The adjoint is traced now, with the last batches read: it must be the adjoint of the same step.
                run.contract.recheck()
            value, *ending = self._ending(state, z)
            cotangent, total = _sent(walk, tuple(ending))
        grad = like(z, total)
        if self.training.starts_from_z and not runner.begin:
            _, vjp = jax.vjp(lambda z: floating(self.training.initial(z))[0], z)
            if self._vector:
                # Not as a compiled loop, which every call would compile anew.
                starts = [vjp(jax.tree.map(lambda x, i=i: x[i], cotangent))[0] for i in range(len(value))]
                start = jax.tree.map(lambda *x: jnp.stack(x), *starts)
            else:
                (start,) = vjp(cotangent)
            grad = jax.tree.map(jnp.add, grad, start)
        _check_finite(grad, run.programs, careful)
        return Evaluation(value, grad, _stats(traversal, segment, schedule), state)

    def _ending(self, state: PyTree, z: PyTree) -> tuple[jax.Array, Cotangent, PyTree]:
        """The objective's value, the cotangent of the final state, and those of z by the objective alone, wrapped."""
        value, cotangent, total = value_and_pull_back(self.programs, self.objective, self._vector, state, z)
        if not np.isfinite(value).all():
            raise NonFiniteError(f"the objective's value is {value}, at a final state that is finite")
        good = self.training.programs.finite(cotangent).tolist()
        bad = [path for path, finite in zip(floating_paths(state), good, strict=True) if not finite]
        if bad:
            raise NonFiniteError(
                f"the objective is finite, but its derivative in {bad[0]} of the final state is not: look for a "
                "root, norm, log or division at zero in it"
            )
        return value, cotangent, wrapped(total)


def _sent(walk: Generator[PyTree, Ending, Ending], ending: Any) -> Ending:
    """What a walk returns once it was sent the cotangents at its end."""
    try:
        walk.send(ending)
    except StopIteration as done:
        return done.value
    raise AssertionError("a walk yields once")


def value_and_metagrad(
    training: Training,
    objective: Callable[[PyTree, PyTree], jax.Array],
    *,
    memory: Memory | None = None,
    schedule: Schedule | None = None,
    segment: Segment | int | None = None,
    window: int | None = None,
    vector: bool = False,
    verify: Literal["boundaries", "off"] = "boundaries",
    progress: bool = False,
) -> Metagradient:
    r"""The exact gradient of an objective of a training run in its metaparameters, by REPLAY.

    With $s_{t+1} = h_t(s_t, z)$ and an objective $\phi(s_T, z)$, returns $\phi$ and

    $$\nabla_z = \sum_t \bar s_{t+1} \partial_z h_t + \bar s_0 \partial_z s_0 + \partial_z \phi, \qquad
      \bar s_t = \bar s_{t+1} \partial_s h_t, \quad \bar s_T = \partial_s \phi.$$

    Exact is what `jax.grad` gives of the whole loop, to rounding. Where a loss stops gradients (`lax.stop_gradient`,
    detached targets), or a rule in it isn't the derivative of its value, that isn't the derivative of the run: `check`
    tells the two apart.

    Arguments:
        training: the run.
        objective: `(final state, z) -> scalar`, z as it was given; `mean_over` builds one from a validation set.
        memory: budgets for states on device, host and disk; `plan` then finds the cheapest schedule, segment and leaf.
        schedule: which states to keep and when to replay; see `metagradient.schedule`, or a plan. With neither, as
            much is kept as fits in half of the free memory.
        segment: steps between two boundaries of the schedule, and how they are compiled; None measures and chooses.
            Results are bit-equal across schedules for one segment.
        window: differentiate the last `window` steps only: a truncated metagradient, without the term through the
            initial state.
        vector: the objective returns a vector `[q]`; then every leaf of the gradient gains a leading axis q, and one
            traversal serves all queries.
        verify: "boundaries" compares the fingerprint of every replayed state, and of every batch that is read again,
            with the first run's, runs the first segment twice, and traces the step anew; "off" trusts the run.
        progress: show a progress bar.

    Returns: a function `z -> (value, gradient)`, with the gradient in the structure and types of z. Its `with_stats`
        also tells what it took.

    Errors, before compute wherever they can be known: `StructureError` (z, state or objective of the wrong kind),
        `BatchError` (batches empty, uneven, changing, or with a bad index), `PrecisionError`, `ImpureStepError`,
        `DerivativeError` (a loss, step or objective that JAX can't differentiate). Later:
        `ReplayMismatch` (a replay differs from the first run), `NonFiniteError` (with step and leaf).

    Cost: T steps and T adjoints (about two to three plain steps each), and the schedule's replays: none for `KeepAll`,
        one run for `TwoLevel`, about log_k T for `KaryTree(k)`. Without `memory=`, batches that were read are held in
        host memory, up to a sixteenth of what is free, so that replays needn't read them again.

    Many devices of one process: spread batches, the initial state and z over a mesh, and states stay spread as they
    are. With explicit axes (what `jax.make_mesh` makes) everything is called within `jax.set_mesh(mesh)`, the gradient
    is spread as z is, and a micro-batch must be divisible as its batch was.

    Source: Engstrom et al. 2025, "Optimizing ML Training with Metagradient Descent", arXiv 2503.13751.

    >>> import jax.numpy as jnp, optax, metagradient as mg
    >>> batches = [{"x": jnp.arange(4.0) + t, "index": jnp.arange(4)} for t in range(20)]
    >>> def loss(params, batch, z):
    ...     return jnp.mean(z["weights"] * (params["w"] * batch["x"] - 1) ** 2)
    >>> training = mg.Training.from_loss(loss, optax.sgd(1e-3), {"w": jnp.zeros(())}, batches)
    >>> gradient = mg.value_and_metagrad(training, lambda state, z: (state.params["w"] - 0.5) ** 2)
    >>> value, grad = gradient({"weights": mg.PerExample(jnp.ones(4))})
    >>> grad["weights"].value.shape
    (4,)
    """
    if verify not in ("boundaries", "off"):
        raise StructureError(f'verify is "boundaries" or "off", not {verify!r}')
    if memory is not None and schedule is not None:
        raise StructureError("give either memory= or schedule=: a budget makes its own schedule")
    return Metagradient(
        training,
        objective,
        schedule=schedule,
        memory=memory,
        segment=segment,
        window=window,
        vector=vector,
        verify=verify == "boundaries",
        progress=progress,
    )


def _check_finite(grad: PyTree, programs: Programs, careful: bool) -> None:
    for (path, _), good in zip(paths(grad), programs.finite(grad).tolist(), strict=True):
        if not good:
            if not careful:
                raise NotFinite
            raise NonFiniteError(
                f"the gradient of z{path} is not finite, though every state's cotangent was: look at how the step uses "
                "it (a root, log or division at zero)"
            )


def _stats(traversal: Traversal, segment: Segment, schedule: Schedule) -> Stats:
    return Stats(
        forward_steps=traversal.runner.forward_steps,
        adjoint_steps=traversal.runner.adjoint_steps,
        peak_states=traversal.stores.peak_states,
        peak_bytes=traversal.stores.peak_bytes,
        seconds=0.0,
        compile_seconds=0.0,
        segment=segment,
        schedule=schedule,
    )
