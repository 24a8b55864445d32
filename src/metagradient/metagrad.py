"""`value_and_metagrad`: the gradient of an objective of a whole training run, by REPLAY."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter
from typing import Any, Literal

import jax
import jax.numpy as jnp

from metagradient.errors import NonFiniteError, PrecisionError, StructureError
from metagradient.metaparameters import canonical, like, wrapped
from metagradient.objectives import check_objective, value_and_pull_back
from metagradient.progress import Progress
from metagradient.replay.execute import Traversal, check_repeats
from metagradient.replay.fingerprint import NotFinite, Watch
from metagradient.replay.plan import affordable
from metagradient.replay.schedule import Schedule, simulate
from metagradient.step.choose import choose
from metagradient.step.contract import Contract, check_steps
from metagradient.step.feed import Feed
from metagradient.step.rule import Cotangent
from metagradient.step.segment import Runner, Segment
from metagradient.training import Training
from metagradient.trees import PyTree, floating, nbytes, paths

_COMPILE = "/jax/core/compile/backend_compile_duration"
_PRECISE = ("highest", "float32")


@dataclass(frozen=True)
class Stats:
    """What one metagradient took.

    Arguments:
        forward_steps: steps taken, replays included.
        adjoint_steps: steps pulled back.
        peak_states: most boundary states held at once, by tier.
        peak_bytes: their bytes, by tier; under "segment", those kept for the segments at work.
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

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, strings and dictionaries."""
        return {**asdict(replace(self)), "schedule": repr(self.schedule)}


@dataclass(frozen=True, eq=False)
class Metagradient:
    """A function `z -> (value, gradient)`; made by `value_and_metagrad`."""

    training: Training
    objective: Callable[[PyTree, PyTree], jax.Array]
    schedule: Schedule | None
    segment: Segment | int | None
    window: int | None
    vector: bool
    verify: bool
    progress: bool
    _chosen: dict[str, Segment] = field(default_factory=dict, repr=False)

    def __call__(self, z: PyTree) -> tuple[jax.Array, PyTree]:
        """Value of the objective, and its gradient in the structure of z."""
        return self.with_stats(z)[:2]

    def with_stats(self, z: PyTree) -> tuple[jax.Array, PyTree, Stats]:
        """Value, gradient, and what they took."""
        with _full_precision(self.training.allow_low_precision), _compile_seconds() as compiling:
            start = perf_counter()
            z = canonical(z)
            run = _Prepared.of(self.training, z, self._chosen.get("segment", self.segment), self.window)
            check_objective(self.objective, self.vector, run.state, z)
            self._chosen["segment"] = run.segment
            try:
                value, grad, traversal, schedule = self._traverse(run, z, careful=False)
            except NotFinite:
                self._traverse(run, z, careful=True)
                raise NonFiniteError(
                    "a non-finite value appeared once, and not again in a careful second run"
                ) from None
            run.contract.still_holds()
            stats = Stats(
                traversal.runner.forward_steps,
                traversal.runner.adjoint_steps,
                traversal.stores.peak_states,
                {**traversal.stores.peak_bytes, "segment": traversal.peak_kept_bytes},
                perf_counter() - start,
                compiling.seconds,
                run.segment,
                schedule,
            )
        return value, grad, stats

    def _traverse(self, run: "_Prepared", z: PyTree, *, careful: bool) -> tuple[Any, PyTree, Traversal, Schedule]:
        runner = run.runner(self.vector)
        schedule = self.schedule or affordable(len(runner), run.segment, nbytes(run.state))
        if self.verify:
            check_repeats(run.runner(), run.state, Watch(True))
        with Progress(self.progress) as progress:
            cost = simulate(schedule, len(runner))
            length = run.segment.length
            progress.expect("forward", (runner.before + cost.advances + cost.keeps) * length)
            progress.expect("adjoint", len(runner) * length)

            def begin(state: PyTree) -> tuple[jax.Array, Cotangent, PyTree]:
                value, cotangent, total = value_and_pull_back(self.objective, self.vector, state, z)
                _check_finite_value(value)
                return value, cotangent, wrapped(total)

            traversal = Traversal(runner, begin, Watch(self.verify), progress.tick, careful)
            state = traversal.first_run(run.state)
            value, cotangent, total = traversal.run(schedule.actions(len(runner)), state)
        grad = like(z, total)
        if self.training.starts_from_z and not runner.begin:
            _, vjp = jax.vjp(lambda z: floating(self.training.initial(z))[0], z)
            (start,) = jax.vmap(vjp)(cotangent) if self.vector else vjp(cotangent)
            grad = jax.tree.map(jnp.add, grad, start)
        for path, leaf in paths(grad):
            if not bool(jnp.isfinite(leaf).all()):
                raise NonFiniteError(
                    f"the gradient of z{path} is not finite, though every state's cotangent was: look at how the step "
                    "uses it (a root, log or division at zero)"
                )
        return value, grad, traversal, schedule


def value_and_metagrad(
    training: Training,
    objective: Callable[[PyTree, PyTree], jax.Array],
    *,
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
        schedule: which states to keep and when to replay; see `metagradient.schedule`. None keeps as much as fits in
            half of the free memory.
        segment: steps between two boundaries of the schedule, and how they are compiled; None measures and chooses.
            Results are bit-equal across schedules for one segment.
        window: differentiate the last `window` steps only: a truncated metagradient, without the term through the
            initial state.
        vector: the objective returns a vector `[q]`; then every leaf of the gradient gains a leading axis q, and one
            traversal serves all queries.
        verify: "boundaries" compares the fingerprint of every replayed state and batch with the first run's, runs
            the first segment twice, and traces the step anew; "off" trusts the run.
        progress: show a progress bar.

    Returns: a function `z -> (value, gradient)`, with the gradient in the structure and types of z. Its `with_stats`
        also tells what it took.

    Errors, before compute wherever they can be known: `StructureError` (z, state or objective of the wrong kind),
        `BatchError` (batches empty, uneven, changing, or with a bad index), `PrecisionError`, `ImpureStepError`. Later:
        `ReplayMismatch` (a replay differs from the first run), `NonFiniteError` (with step and leaf).

    Cost: T steps and T adjoints (about two to three plain steps each), and the schedule's replays: none for `KeepAll`,
        one run for `TwoLevel`, about log_k T for `KaryTree(k)`.

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
    return Metagradient(training, objective, schedule, segment, window, vector, verify == "boundaries", progress)


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
    with _full_precision(training.allow_low_precision):
        z = canonical(z)
        run = _Prepared.of(training, z, segment or Segment(1, "steps", "state"), None)
        runner, state = run.runner(), run.state
        with Progress(progress) as bar:
            bar.expect("forward", len(training.batches))
            for i in range(len(runner)):
                state = runner.advance(i, state)
                bar.tick("forward", len(runner.steps(i)))
    return state


@dataclass(frozen=True)
class _Prepared:
    """A run that has passed every check that costs no training."""

    training: Training
    feed: Feed
    state: PyTree
    contract: Contract
    segment: Segment
    begin: int

    @classmethod
    def of(cls, training: Training, z: PyTree, segment: Segment | int | None, window: int | None) -> "_Prepared":
        steps = len(training.batches)
        if window is not None and not 1 <= window <= max(1, steps):
            raise StructureError(f"window must be between 1 and T = {steps}, got {window}")
        kinds = wrapped(z)
        feed = Feed(training.batches, kinds)
        feed.check()
        check_steps(kinds, steps)
        state = training.initial(z)
        contract = Contract(training.rule, state, feed.first, kinds, allow_low_precision=training.allow_low_precision)
        begin = 0 if window is None else steps - window
        return cls(training, feed, state, contract, choose(training.rule, segment, feed, kinds, state, begin), begin)

    def runner(self, queries: bool = False) -> Runner:
        return Runner(self.training.rule, self.segment, self.feed, self.feed.z, queries, self.begin)


def _check_finite_value(value: jax.Array) -> None:
    if not bool(jnp.isfinite(value).all()):
        raise NonFiniteError(f"the objective's value is {value}, at a final state that is finite")


@contextmanager
def _full_precision(allow_low_precision: bool) -> Iterator[None]:
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


class _Compiling:
    seconds = 0.0


@contextmanager
def _compile_seconds() -> Iterator[_Compiling]:
    spent = _Compiling()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE:
            spent.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield spent
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
