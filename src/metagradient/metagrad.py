"""`value_and_metagrad`: the gradient of an objective of a whole training run, by REPLAY."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Any, Literal

import jax
import jax.numpy as jnp

from metagradient.errors import NonFiniteError, StructureError
from metagradient.metaparameters import canonical, like, wrapped
from metagradient.objectives import check_objective, value_and_pull_back
from metagradient.planning import plan_run
from metagradient.progress import Progress
from metagradient.replay.budget import Memory
from metagradient.replay.execute import Traversal
from metagradient.replay.fingerprint import NotFinite, Watch
from metagradient.replay.plan import Plan, affordable, free_host_bytes
from metagradient.replay.schedule import Schedule, simulate
from metagradient.replay.store import Stores
from metagradient.run import Run, full_precision
from metagradient.step.compilation import compile_seconds
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


@dataclass(frozen=True, eq=False)
class Metagradient:
    """A function `z -> (value, gradient)`; made by `value_and_metagrad`."""

    training: Training
    objective: Callable[[PyTree, PyTree], jax.Array]
    schedule: Schedule | None
    memory: Memory | None
    segment: Segment | int | None
    window: int | None
    vector: bool
    verify: bool
    progress: bool
    _chosen: list[tuple[Segment, Schedule | None]] = field(default_factory=list, repr=False)

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
            first = not self._chosen
            run = Run.prepared(self.training, z, self.window, first=first)
            if first:
                check_objective(self.objective, self.vector, run.state, z)
                self._chosen.append(self._choose(run))
            try:
                found = self._traverse(run, z, first=first)
            except NotFinite:
                self._traverse(run, z, careful=True)
                raise NonFiniteError("a non-finite value appeared, but not again in a careful second run") from None
            if compiling.seconds:
                # Programs were traced on the way: of the step that was checked, or of one altered meanwhile?
                run.contract.still_holds()
        stats = replace(found.stats, seconds=perf_counter() - start, compile_seconds=compiling.seconds)
        return replace(found, stats=stats)

    def _choose(self, run: Run) -> tuple[Segment, Schedule | None]:
        """How to compile steps, and the schedule where a budget or the user decides it."""
        schedule = self.schedule or (plan_run(run, self.memory, self.segment) if self.memory else None)
        made_for = schedule.segment if isinstance(schedule, Plan) else None
        return run.chosen(self.segment if isinstance(self.segment, Segment) else made_for or self.segment), schedule

    def _traverse(self, run: Run, z: PyTree, *, first: bool = False, careful: bool = False) -> Evaluation:
        segment, schedule = self._chosen[0]
        # A budget is kept to; without one, batches may take a share of what the host has free.
        hold_bytes = 0 if isinstance(schedule, Plan) else free_host_bytes() // _SHARE_FOR_BATCHES
        runner = run.runner(segment, queries=self.vector, hold_bytes=hold_bytes)
        schedule = schedule or affordable(len(runner), segment, nbytes(run.state))
        folder = schedule.memory.path if isinstance(schedule, Plan) else None
        final: list[PyTree] = []

        def begin(state: PyTree) -> tuple[jax.Array, Cotangent, PyTree]:
            final.append(state)
            if first or self.verify:
                # The adjoint is traced now, with the last batches read: it must be the adjoint of the same step. The
                # device is still busy with the run.
                run.contract.still_holds()
            traversal.watch.settle()
            value, cotangent, total = value_and_pull_back(self.objective, self.vector, state, z)
            if not bool(jnp.isfinite(value).all()):
                raise NonFiniteError(f"the objective's value is {value}, at a final state that is finite")
            bad = [p for p, x in zip(floating_paths(state), cotangent, strict=True) if not bool(jnp.isfinite(x).all())]
            if bad:
                raise NonFiniteError(
                    f"the objective is finite, but its derivative in {bad[0]} of the final state is not: look for a "
                    "root, norm, log or division at zero in it"
                )
            return value, cotangent, wrapped(total)

        with Progress(self.progress) as progress, Stores(folder) as stores:
            cost = simulate(schedule, len(runner))
            progress.expect("forward", (runner.before + cost.advances + cost.keeps) * segment.length)
            progress.expect("adjoint", len(runner) * segment.length)
            replays = cost.advances > 0
            traversal = Traversal(runner, begin, Watch(self.verify), progress.tick, stores, replays, careful)
            if self.verify:
                traversal.rehearse(run.state)
            state = traversal.first_run(run.state)
            value, cotangent, total = traversal.run(schedule.actions(len(runner)), state)
        grad = like(z, total)
        if self.training.starts_from_z and not runner.begin:
            _, vjp = jax.vjp(lambda z: floating(self.training.initial(z))[0], z)
            (start,) = jax.vmap(vjp)(cotangent) if self.vector else vjp(cotangent)
            grad = jax.tree.map(jnp.add, grad, start)
        _check_finite(grad)
        return Evaluation(value, grad, _stats(traversal, segment, schedule), final[0])


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
        `BatchError` (batches empty, uneven, changing, or with a bad index), `PrecisionError`, `ImpureStepError`. Later:
        `ReplayMismatch` (a replay differs from the first run), `NonFiniteError` (with step and leaf).

    Cost: T steps and T adjoints (about two to three plain steps each), and the schedule's replays: none for `KeepAll`,
        one run for `TwoLevel`, about log_k T for `KaryTree(k)`. Without `memory=`, batches that were read are held in
        host memory, up to a sixteenth of what is free, so that replays needn't read them again.

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
    verified = verify == "boundaries"
    return Metagradient(training, objective, schedule, memory, segment, window, vector, verified, progress)


def _check_finite(grad: PyTree) -> None:
    for path, leaf in paths(grad):
        if not bool(jnp.isfinite(leaf).all()):
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
