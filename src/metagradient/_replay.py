"""`Replay` and `Pass`: one run walked forwards, and once backwards, by a checkpoint schedule."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any, Literal

import jax
import jax.numpy as jnp

from metagradient._jax import Compiling, compile_seconds
from metagradient._plan import planned_once
from metagradient.errors import DerivativeError, NonFiniteError, StructureError
from metagradient.metaparameters import like
from metagradient.progress import Progress
from metagradient.replay.budget import Memory
from metagradient.replay.execute import Ending, Traversal
from metagradient.replay.host import free_host_bytes, give_back
from metagradient.replay.plan import Plan, affordable
from metagradient.replay.schedule import Schedule, simulate
from metagradient.replay.store import Stores
from metagradient.replay.watch import NotFinite, Watch
from metagradient.run import Run, full_precision
from metagradient.shown import Shown
from metagradient.step.rule import Cotangent
from metagradient.step.segment import Segment, check_segment
from metagradient.trees import PyTree, floating, floating_paths, nbytes, paths, zeros

_SHARE_FOR_BATCHES = 16
# Less is soon taken again, and a look through the heap takes some milliseconds.
_WORTH_GIVING_BACK = 2**28
# In matrix products: a plain step is 3 forward passes, its adjoint a gradient (3) and the gradient's tangent (6).
_ADJOINT_IN_STEPS = 3


@dataclass(frozen=True, repr=False)
class Stats(Shown):
    """What one metagradient took.

    Arguments:
        forward_steps: steps taken, replays included.
        adjoint_steps: steps pulled back.
        peak_states: most boundary states held at once, by tier.
        peak_bytes: most bytes held at once, by tier: of boundary states and, on the device, of what segments were kept
            for their pull-back; the two or so working states are not counted.
        seconds: wall time, compilation included; without what the caller did between a forward pass and its backward.
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


@dataclass(frozen=True, kw_only=True, repr=False)
class Replay(Shown):
    """How a run is differentiated: the `adjoint=` of `train`, and the options of `value_and_metagrad`.

    Arguments:
        memory: budgets for states on device, host and disk (`Memory`, or "4GB" of the device); `plan` then finds the
            cheapest schedule, segment and leaf.
        schedule: which states to keep and when to replay; see `metagradient.schedule`, or a plan. With neither, as
            much is kept as fits in half of the free memory.
        segment: steps between two boundaries of the schedule, and how they are compiled; None measures and chooses.
            Results are bit-equal across schedules for one segment.
        window: differentiate the last `window` steps only: a truncated metagradient, without the term through the
            initial state.
        verify: "boundaries" compares the fingerprint of every replayed state, and of every batch that is read again,
            with the first run's, runs the first segment twice, and traces the step anew; "off" trusts the run.
        progress: show a progress bar.
        stats: called with the run's `Stats` when its backward pass ends.

    Errors: `StructureError` for an option of another kind.
    """

    memory: Memory | str | int | None = None
    schedule: Schedule | None = None
    segment: Segment | int | None = None
    window: int | None = None
    verify: Literal["boundaries", "off"] = "boundaries"
    progress: bool = False
    stats: Callable[[Stats], object] | None = None

    def __post_init__(self) -> None:
        if self.verify not in ("boundaries", "off"):
            raise StructureError(f'verify is "boundaries" or "off", not {self.verify!r}')
        if self.memory is not None:
            object.__setattr__(self, "memory", Memory.of(self.memory))
        if self.memory is not None and self.schedule is not None:
            raise StructureError("give either memory= or schedule=: a budget makes its own schedule")
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise StructureError(
                f"schedule is {self.schedule!r}: give one of mg.schedule, such as mg.schedule.TwoLevel(), or a plan"
            )
        check_segment(self.segment)
        if self.stats is not None and not callable(self.stats):
            raise StructureError(f"stats is a function that is called with the run's Stats, not {self.stats!r:.80}")

    def shown(self) -> dict[str, Any]:
        """The options that were given."""
        default = Replay()
        return {name: x for name, x in super().shown().items() if x != getattr(default, name)}

    def chosen(self, run: Run) -> tuple[Segment, Schedule | None]:
        """How to compile a run's steps, and the schedule where a budget or the user decides it."""
        assert self.memory is None or isinstance(self.memory, Memory)
        schedule = self.schedule or (planned_once(run, self.memory, self.segment) if self.memory else None)
        if isinstance(self.segment, Segment) or not isinstance(schedule, Plan):
            return run.chosen(self.segment), schedule
        return schedule.segment, schedule


class Pass:
    """A run walked forwards, and then backwards, once each.

    States, threads and files go with this object, or at the end of the way back. Between the two nothing of the
    caller's context is changed.

    Arguments:
        run: the run, prepared.
        z: its canonical metaparameters.
        options: how it is differentiated.
        queries: whether cotangents have a leading axis of queries.

    Attributes:
        stats: what it took, once it went back.
    """

    def __init__(self, run: Run, z: PyTree, options: Replay, *, queries: bool = False):
        self._run, self._z, self._options, self._queries = run, z, options, queries
        self._progress = Progress(options.progress)
        self._seconds = self._compile_seconds = 0.0
        self._walk: Walk | None = None
        self.stats: Stats | None = None

    def forward(self) -> PyTree:
        """The final state."""
        run, verify = self._run, self._options.verify != "off"
        with self._leg() as compiling:
            run.check_derivatives(self._z)
            self._segment, self._schedule = self._options.chosen(run)

            def recheck() -> None:
                # Where programs were traced, the way back looks once for it and for what it traces itself.
                if verify and not compiling.programs:
                    run.contract.recheck()

            self._walk = self._walked(meanwhile=recheck)
            try:
                state = next(self._walk)
            except NotFinite:
                next(self._walked(careful=True))
                raise _not_again() from None
        self._paths = floating_paths(state)
        return state

    def back(self, cotangent: Cotangent, total: PyTree = None) -> PyTree:
        """The gradient in z, in its structure, from cotangents of the final state's floating leaves.

        Arguments:
            total: cotangents of z by all that came after the run, of as many leaves as z; it is used up. None for none.

        Errors: `DerivativeError` the second time, as the states are gone; `NonFiniteError`.
        """
        walk, self._walk = self._walk, None
        if walk is None:
            raise DerivativeError(
                "the backward pass of this run was already taken, and its states are released: call mg.train again, "
                "or ask for several gradients at once (mg.value_and_metagrad(..., vector=True))"
            )
        run = self._run
        with self._leg():
            self._check_cotangents(cotangent, total)
            begin = run.programs.zeros(run.given.z) if total is None else like(run.given.z, total)
            shapes = jax.eval_shape(lambda x: x, begin)
            try:
                grad, figures = self._sent(walk, (cotangent, begin))
            except NotFinite:
                careful = self._walked(careful=True)
                next(careful)
                self._sent(careful, (cotangent, zeros(shapes)), careful=True)
                raise _not_again() from None
            if self._compile_seconds:
                # Programs were traced on the way: of the step that was checked, or of one altered meanwhile?
                run.contract.recheck()
            if sum(figures.peak_bytes.values()) > _WORTH_GIVING_BACK:
                give_back()
        self.stats = replace(figures, seconds=self._seconds, compile_seconds=self._compile_seconds)
        if self._options.stats:
            self._options.stats(self.stats)
        return grad

    def _check_cotangents(self, cotangent: Cotangent, total: PyTree) -> None:
        for path, good in zip(self._paths, self._run.programs.finite(cotangent), strict=True):
            if not good:
                raise NonFiniteError(
                    f"the objective's derivative in {path} of the final state is not finite, and that state is: look "
                    "for a root, norm, log or division at zero in the objective"
                )
        if total is not None:
            for (path, _), good in zip(paths(self._z), self._run.programs.finite(total), strict=True):
                if not good:
                    raise NonFiniteError(
                        f"the objective's own derivative in z{path} is not finite: look for a root, norm, log or "
                        "division at zero in how it reads z"
                    )

    def _walked(self, *, careful: bool = False, meanwhile: Callable[[], None] = lambda: None) -> "Walk":
        return _walk(
            self._run, self._segment, self._schedule, self._progress, self._queries, self._options.verify != "off",
            careful, meanwhile,
        )  # fmt: skip

    def _sent(self, walk: "Walk", ending: Ending, *, careful: bool = False) -> tuple[PyTree, Stats]:
        try:
            walk.send(ending)
        except StopIteration as done:
            (cotangent, total), stats = done.value
            grad = self._with_start(like(self._z, total), cotangent)
            _check_finite(grad, self._run, careful=careful)
            return grad, stats
        raise AssertionError("a walk yields once")

    def _with_start(self, grad: PyTree, cotangent: Cotangent) -> PyTree:
        """The gradient with the term through the initial state."""
        run = self._run
        if not run.training.starts_from_z or run.begin:
            return grad
        _, vjp = jax.vjp(lambda z: floating(run.training.initial(z))[0], self._z)
        if not self._queries:
            return jax.tree.map(jnp.add, grad, vjp(cotangent)[0])
        # Not as a compiled loop, which every call would compile anew.
        queries = range(cotangent[0].shape[0])
        starts = [vjp(jax.tree.map(lambda x, i=i: x[i], cotangent))[0] for i in queries]
        return jax.tree.map(lambda total, *x: total + jnp.stack(x), grad, *starts)

    @contextmanager
    def _leg(self) -> Iterator[Compiling]:
        start = perf_counter()
        with (
            full_precision(self._run.training.allow_low_precision), compile_seconds() as compiling, self._progress,
        ):  # fmt: skip
            yield compiling
        self._seconds += perf_counter() - start
        self._compile_seconds += compiling.seconds


Walk = Generator[PyTree, Ending, tuple[Ending, Stats]]


def _walk(
    run: Run,
    segment: Segment,
    schedule: Schedule | None,
    progress: Progress,
    queries: bool,
    verify: bool,
    careful: bool,
    meanwhile: Callable[[], None],
) -> Walk:
    """`Traversal.walk` with all that it needs, which goes with it.

    Not a method: an object that held its own walk would be held by it.
    """
    # A budget is kept to; without one, batches may take a share of what the host has free.
    hold_bytes = 0 if isinstance(schedule, Plan) else free_host_bytes() // _SHARE_FOR_BATCHES
    runner = run.runner(segment, queries=queries, hold_bytes=hold_bytes)
    schedule = schedule or affordable(len(runner), segment, nbytes(run.state))
    folder = schedule.memory.path if isinstance(schedule, Plan) else None
    cost = simulate(schedule, len(runner))
    progress.expect("forward", (runner.before + cost.advances + cost.keeps) * segment.length)
    progress.expect("adjoint", len(runner) * segment.length)
    with Stores(folder) as stores:
        watch = Watch(run.programs.stamp, verify)
        traversal = Traversal(runner, watch, progress.tick, stores, meanwhile, cost.advances > 0, careful)
        if verify:
            traversal.rehearse(run.state)
        ending = yield from traversal.walk(schedule.actions(len(runner)), run.state)
    return ending, Stats(
        forward_steps=runner.forward_steps,
        adjoint_steps=runner.adjoint_steps,
        peak_states=stores.peak_states,
        peak_bytes=stores.peak_bytes,
        seconds=0.0,
        compile_seconds=0.0,
        segment=segment,
        schedule=schedule,
    )


def _check_finite(grad: PyTree, run: Run, *, careful: bool) -> None:
    for (path, _), good in zip(paths(grad), run.programs.finite(grad), strict=True):
        if not good:
            if not careful:
                raise NotFinite
            raise NonFiniteError(
                f"the gradient of z{path} is not finite, though every state's cotangent was: look at how the step uses "
                "it (a root, log or division at zero)"
            )


def _not_again() -> NonFiniteError:
    return NonFiniteError("a non-finite value appeared, but not again in a careful second run")
