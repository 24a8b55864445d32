"""`check`: is this run's metagradient right? Determinism, derivatives and precision, of the very program that will run."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from metagradient._jax import (
    compiled,
    doubles_beside_single_draws,
    draws,
    own_rules,
    stopped_gradients,
    trace,
)
from metagradient.errors import ImpureStepError, MetagradientError, NonFiniteError, ReplayMismatch
from metagradient.metagrad import Evaluation, value_and_metagrad
from metagradient.metaparameters import canonical, needs_index, slices, wrapped
from metagradient.replay.budget import Memory
from metagradient.replay.schedule import Schedule
from metagradient.run import Run, full_precision
from metagradient.step.choose import first_step
from metagradient.step.from_loss import LossStep
from metagradient.step.segment import Segment
from metagradient.training import Training
from metagradient.trees import PyTree, floating, is_floating, is_key, paths, zeros
from metagradient.versions import untested

_LEVELS = 12
# Differences that are known no better than this decide nothing.
_VAGUE = 0.01
_KINK = 0.1
_ROUNDING = 1e-6
_PRECISE = 0.99


@dataclass(frozen=True)
class Direction:
    """The metagradient in one direction, beside two other ways to the same number, in float64.

    Arguments:
        metagradient: its derivative in this direction.
        forward: the same by forward mode, a step at a time, from the first to the last; None where a step refuses that.
            Both are derivatives by JAX's rules.
        steps: step sizes h of central differences, largest first.
        differences: central differences of the run's value at those steps.
        extrapolated: of them, by Richardson (Ridders' choice of the best).
        bound: how far the extrapolation may be off, by its own estimate and rounding.
        kink: one-sided differences at the smallest step, apart as a share of the derivative. Near zero where the run
            is differentiable; ties in a max pooling, or a relu at zero, keep it up.
    """

    metagradient: float
    forward: float | None
    steps: list[float]
    differences: list[float]
    extrapolated: float
    bound: float
    kink: float

    @property
    def size(self) -> float:
        """What errors are relative to."""
        return max(abs(self.metagradient), abs(self.extrapolated)) or 1.0

    @property
    def relative_error(self) -> float:
        """Metagradient and differences, apart."""
        return abs(self.extrapolated - self.metagradient) / self.size

    @property
    def forward_error(self) -> float | None:
        """Metagradient and forward mode, apart."""
        return None if self.forward is None else abs(self.forward - self.metagradient) / self.size

    def agrees(self, tolerance: float) -> bool:
        """Whether differences confirm the metagradient."""
        return not self.vague and self.relative_error <= tolerance + 4 * self.bound / self.size

    @property
    def vague(self) -> bool:
        """Whether the differences are too rough to decide anything."""
        return self.bound > _VAGUE * self.size or self.kink > _KINK


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; printable, and plain data through `to_dict`.

    Arguments:
        replays: whether the final state came out the same, bit for bit, in the metagradient and in plain training.
        error: the error that the run, its replay or its float64 twin raised, or None.
        finite: whether value and metagradient are finite.
        directions: the metagradient beside forward mode and finite differences.
        precision: for every leaf of z, cosine and relative difference of the metagradient in the run's own precision
            against float64.
        tolerance: relative error up to which finite differences agree, beside their own bound.
        microbatches: relative difference of the first step's gradient to that without micro-batches; None where there
            are none, or where a model state makes them differ by design.
        stopped: where the step stops gradients, or holds derivative rules of its own.
        notes: what else should be known.
    """

    replays: bool
    error: str | None
    finite: bool
    directions: list[Direction]
    precision: dict[str, dict[str, float]]
    tolerance: float
    microbatches: float | None = None
    stopped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def differences_agree(self) -> bool:
        """Whether finite differences confirm the metagradient in every direction."""
        return bool(self.directions) and all(d.agrees(self.tolerance) for d in self.directions)

    @property
    def forward_agrees(self) -> bool:
        """Whether forward mode, where a step allows it, gives the metagradient in every direction."""
        return all(d.forward_error is None or d.forward_error <= _ROUNDING for d in self.directions)

    @property
    def microbatches_agree(self) -> bool:
        """Whether micro-batches give the gradient of the whole batch."""
        return self.microbatches is None or self.microbatches <= _ROUNDING

    @property
    def precise(self) -> bool:
        """Whether the run's own precision gives the float64 metagradient to a cosine of 0.99, leaf by leaf."""
        return all(p["cosine"] >= _PRECISE for p in self.precision.values())

    @property
    def ok(self) -> bool:
        """Whether every part passed."""
        agrees = self.forward_agrees and self.differences_agree and self.microbatches_agree
        return self.replays and self.finite and agrees and self.precise

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        names = ("differences_agree", "forward_agrees", "microbatches_agree", "precise", "ok")
        found = asdict(self) | {name: getattr(self, name) for name in names}
        for row, direction in zip(found["directions"], self.directions, strict=True):
            row.update(relative_error=direction.relative_error, forward_error=direction.forward_error)
        return found

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        console = Console(width=100, no_color=True)
        table = Table("check", "result", "detail", title="metagradient check")
        for name, passed, detail in self._rows():
            table.add_row(name, "pass" if passed else "FAIL", detail)
        with console.capture() as capture:
            console.print(table)
            for note in self.notes:
                console.print(f"note: {note}", markup=False, highlight=False)
        return capture.get().rstrip()

    def _rows(self) -> list[tuple[str, bool, str]]:
        rows = [
            ("replays bit for bit", self.replays, "" if self.replays else self.error or "final states differ"),
            ("value and gradient finite", self.finite, (self.error or "not reached") if not self.finite else ""),
        ]
        for i, d in enumerate(self.directions):
            if d.forward is not None:
                assert d.forward_error is not None
                detail = f"metagradient {d.metagradient:.8g}, forwards {d.forward:.8g} ({d.forward_error:.1e} apart)"
                rows.append((f"forward mode, direction {i}", d.forward_error <= _ROUNDING, detail))
            agrees = d.agrees(self.tolerance)
            rows.append((f"finite differences, direction {i}", agrees, self._said(d, agrees)))
        if not self.directions:
            rows.append(("finite differences", False, (self.error or "not run") if self.finite else "not run"))
        if self.microbatches is not None:
            detail = f"the first gradient is {self.microbatches:.1e} from that of the whole batch"
            if not self.microbatches_agree:
                detail += ": the loss isn't a mean over examples, or examples= should name the leaves that hold them"
            rows.append(("micro-batches", self.microbatches_agree, detail))
        for leaf, p in self.precision.items():
            detail = f"cosine {p['cosine']:.6f}, relative difference {p['relative_difference']:.1e}"
            rows.append((f"float64 agrees on z{leaf}", p["cosine"] >= _PRECISE, detail))
        return rows

    def _said(self, d: Direction, agrees: bool) -> str:
        apart = f"{d.relative_error:.1e} apart; differences are good to {d.bound / d.size:.0e}"
        text = f"metagradient {d.metagradient:.8g}, differences {d.extrapolated:.8g} ({apart})"
        if agrees:
            return text
        if d.kink > _KINK:
            return (
                f"{text}; the differences are in doubt: one-sided ones are {d.kink:.0%} apart, by a kink or tie in the "
                "run, not in the engine"
            )
        if d.vague:
            return f"{text}; the differences are in doubt: give a smaller step="
        if self.stopped and d.forward_error is not None and d.forward_error <= _ROUNDING:
            return (
                f"{text}; the metagradient is what jax.grad gives of the whole loop, and that is not the derivative of "
                f"the run's value, as gradients are stopped, or given by a rule, at {'; '.join(self.stopped[:3])}"
            )
        return f"{text}; the metagradient is in doubt"


def check(
    training: Training,
    objective: Callable[[PyTree, PyTree], jax.Array],
    z: PyTree,
    *,
    directions: int = 2,
    step: float = 1e-3,
    tolerance: float = 1e-5,
    seed: int = 0,
    memory: Memory | None = None,
    schedule: Schedule | None = None,
    segment: Segment | int | None = None,
    window: int | None = None,
) -> CheckReport:
    """Check a metagradient on the very run that it is wanted for, and by the program that will run.

    The run's own metagradient is compared with that of its float64 twin, which trains on the same random numbers. The
    twin's is compared with forward mode, which goes through the run from its start, and with finite differences of its
    value, which know nothing of derivatives, and carry their own error bound. Where gradients are stopped
    (`lax.stop_gradient`, a rule that isn't the derivative), the metagradient is what `jax.grad` gives of the loop, and
    differences can't confirm it: the report says so.

    Arguments:
        training: the run.
        objective: `(final state, z) -> scalar`.
        z: metaparameters at which to check.
        directions: random directions for derivatives.
        step: largest finite-difference step, relative to the norm of each leaf of z (absolute for a leaf of zeros);
            halved until differences settle.
        tolerance: relative error at which finite differences agree, beside their own bound.
        seed: seed of the directions.
        memory, schedule, segment, window: as in `value_and_metagrad`; what it would choose is what is checked. With
            `window`, derivatives are those of the last steps.

    Returns: a `CheckReport`. Runs that don't replay, or that have no float64 twin, end up in the report, not as an
        error.

    Errors: those of `value_and_metagrad` for input of the wrong kind.

    Cost: two metagradients, and 2 + 7 to 25 runs a direction, most in float64. Take a short run to check a recipe.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> training = mg.Training(jnp.ones(3), lambda s, b, z: s * (1 - z["rate"]), [{}] * 5)
    >>> report = mg.check(training, lambda s, z: (s**2).sum(), {"rate": mg.PerStep(jnp.full(5, 0.1))})
    >>> report.ok
    True
    """
    notes = [note for note in (untested(),) if note]
    z = canonical(z)
    report = partial(CheckReport, directions=[], precision={}, tolerance=tolerance, notes=notes)
    try:
        metagradient = value_and_metagrad(
            training, objective, memory=memory, schedule=schedule, segment=segment, window=window
        )
        found = metagradient.evaluate(z)
        again = _trained(training, z, z, found.stats.segment, window)
        stamp = training.programs.fingerprint
        replays = np.array_equal(stamp(found.state)[0], stamp(again)[0])
    except NonFiniteError as problem:
        return report(True, str(problem), False)
    except (ImpureStepError, ReplayMismatch) as problem:
        return report(False, str(problem), False)
    with full_precision(training.allow_low_precision):
        run = Run.prepared(training, z, window, first=False)
        program = trace(training.rule.advance, *first_step(run.feed, run.z, run.state))[0]
        report = partial(report, stopped=stopped_gradients(program) + own_rules(program))
    twin, problem = None, None
    # Under x64 jax.random draws other numbers, so that serves only where none are drawn.
    for context in (doubles_beside_single_draws, *([] if draws(program) else [lambda: jax.enable_x64(True)])):
        try:
            twin = _Twin.of(training, objective, z, found, window, context)
            break
        except (TypeError, MetagradientError) as error:
            problem = problem or error
    if twin is None:
        return report(
            replays,
            f"the run can't be traced in float64, so nothing was compared: {problem}. Its functions must follow the "
            "dtypes of their arguments (jnp.zeros(shape, x.dtype), not jnp.zeros(shape))",
            True,
        )
    with twin.context(), full_precision(training.allow_low_precision):
        rng = np.random.default_rng(seed)
        report = partial(report, microbatches=twin.microbatches())
        report = partial(report, directions=[twin.direction(rng, step, tolerance) for _ in range(directions)])
        exact = twin.gradient
    precision = {
        path: _compare(np.asarray(a, np.float64), np.asarray(b))
        for (path, a), (_, b) in zip(paths(found.grad), paths(exact), strict=True)
    }
    return report(replays, None, True, precision=precision)


def _compare(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = float(np.vdot(a, b) / norms) if norms else float(np.array_equal(a, b))
    return {"cosine": cosine, "relative_difference": float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1))}


def _trained(training: Training, base: PyTree, z: PyTree, segment: Segment, window: int | None) -> PyTree:
    """The final state of a run whose steps before the window see `base`."""
    with full_precision(training.allow_low_precision):
        before = Run.prepared(training, base, window, first=False)
        state, runner = before.state, before.runner(segment)
        for i in range(-runner.before, 0):
            state = runner.advance(i, state)
        after = Run.prepared(training, z, window, first=False)
        state, runner = state if runner.before else after.state, after.runner(segment)
        for i in range(len(runner)):
            state = runner.advance(i, state)
    return state


@dataclass(frozen=True)
class _Twin:
    """A run in float64.

    Arguments:
        training, z: it, and the metaparameters.
        objective: as in `check`.
        gradient: its metagradient.
        segment, window: those of the run.
        context: in which it is traced.
    """

    training: Training
    objective: Callable[[PyTree, PyTree], jax.Array]
    z: PyTree
    gradient: PyTree
    segment: Segment
    window: int | None
    context: Callable[[], AbstractContextManager[None]]

    @classmethod
    def of(
        cls,
        training: Training,
        objective: Callable[[PyTree, PyTree], jax.Array],
        z: PyTree,
        found: Evaluation,
        window: int | None,
        context: Callable[[], AbstractContextManager[None]],
    ) -> "_Twin":
        """The twin of a run; `TypeError` where its functions insist on float32."""
        stats = found.stats
        with context():
            double, z = _double(training), _to_float64(z)
            gradient = value_and_metagrad(
                double, objective, schedule=stats.schedule, segment=stats.segment, window=window
            )(z)[1]
        for path, leaf in paths(gradient):
            if leaf.dtype != jnp.float64:
                raise TypeError(f"the gradient of z{path} came out in {leaf.dtype}")
        return cls(double, objective, z, gradient, stats.segment, window, context)

    def value(self, z: PyTree) -> float:
        """The objective of the run at other metaparameters, from the window on."""
        state = _trained(self.training, self.z, z, self.segment, self.window)
        return float(self.objective(state, z))

    def microbatches(self) -> float | None:
        """Relative difference of the first gradient to that of the whole batch at once."""
        rule = self.training.rule
        if not isinstance(rule, LossStep) or rule.microbatches == 1 or rule.has_model_state:
            return None
        run = Run.prepared(self.training, self.z, self.window, first=False)

        def gradient(rule: LossStep) -> np.ndarray:
            def first(state: PyTree, batch: PyTree, z: PyTree) -> PyTree:
                index = batch["index"] if needs_index(z) else None
                return replace(rule, keep="gradient").advance(state, batch, slices(z, jnp.int32(0), index))[1][0]

            leaves = jax.tree.leaves(compiled(first)(run.state, run.feed.first, run.z))
            return np.concatenate([np.ravel(x) for x in leaves])

        cut, whole = gradient(rule), gradient(replace(rule, microbatches=1))
        return float(np.linalg.norm(cut - whole) / (np.linalg.norm(whole) or 1))

    def direction(self, rng: np.random.Generator, step: float, tolerance: float) -> Direction:
        """The metagradient and its rivals in a random direction."""

        def draw(x: jax.Array) -> jax.Array:
            v = rng.standard_normal(x.shape)
            scale = float(jnp.linalg.norm(x)) or 1.0
            return jnp.asarray(v / (np.linalg.norm(v) or 1.0) * scale, jnp.float64)

        v = jax.tree.map(draw, self.z)
        pairs = zip(jax.tree.leaves(self.gradient), jax.tree.leaves(v), strict=True)
        slope = float(sum(np.vdot(g, d) for g, d in pairs))
        middle, h, steps, central, kink = self.value(self.z), step, [], [], 0.0
        best, bound, row = 0.0, np.inf, []
        while len(steps) < _LEVELS and (len(steps) < 3 or bound > 0.1 * tolerance * max(abs(best), abs(slope))):
            down, up = (self.value(jax.tree.map(lambda x, d, at=at: x + at * d, self.z, v)) for at in (-h, h))
            steps.append(h)
            central.append((up - down) / (2 * h))
            size = max(abs(slope), abs(central[-1])) or 1.0
            kink = abs((up - middle) - (middle - down)) / h / size
            rounding = np.finfo(np.float64).eps * max(abs(up), abs(down)) / h
            # Central differences err by powers of h squared; every column takes one more away (Ridders 1982).
            row, before = [central[-1]], row
            for j, above in enumerate(before):
                row.append(row[j] + (row[j] - above) / (4 ** (j + 1) - 1))
                apart = max(abs(row[-1] - row[j]), abs(row[-1] - above)) + rounding
                if apart < bound:
                    best, bound = row[-1], apart
            h /= 2
        return Direction(slope, self._forwards(v), steps, central, best, float(bound), kink)

    def _forwards(self, v: PyTree) -> float | None:
        """The derivative in a direction by forward mode; None where the step or the objective refuses it."""
        run = Run.prepared(self.training, self.z, self.window, first=False)
        rule, tangents = run.programs.rule, wrapped(v)
        values, rebuild = floating(run.state)

        def step(
            values: tuple, moving: tuple, state: PyTree, t: Any, batch: PyTree, z: PyTree, v: PyTree
        ) -> tuple[PyTree, tuple]:
            rebuild = floating(state)[1]

            def advance(values: tuple, z: PyTree) -> tuple[tuple, PyTree]:
                index = batch["index"] if needs_index(z) else None
                new = rule.advance(rebuild(values), batch, slices(z, t, index))[0]
                return floating(new)[0], new

            _, moved, new = jax.jvp(advance, (values, z), (moving, v), has_aux=True)
            return new, moved

        program, moving = compiled(step), zeros(values)
        try:
            if self.training.starts_from_z and not run.begin:
                moving = jax.jvp(lambda z: floating(self.training.initial(z))[0], (self.z,), (v,))[1]
            state = run.state
            for t in range(len(run.feed)):
                still = zeros(tangents) if t < run.begin else tangents
                state, moving = program(
                    floating(state)[0], moving, state, np.int32(t), run.feed[t], run.z, still
                )
            values, rebuild = floating(state)
            end = jax.jvp(lambda x, z: self.objective(rebuild(x), z), (values, self.z), (moving, v))[1]
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            return None
        return float(end)


def _to_float64(tree: PyTree) -> PyTree:
    def cast(x: Any) -> Any:
        x = x if hasattr(x, "dtype") else np.asarray(x)
        if is_key(x) or not is_floating(x):
            return x
        return x.astype(jnp.float64) if isinstance(x, jax.Array) else jnp.asarray(x, jnp.float64)

    return jax.tree.map(cast, tree)


@dataclass(frozen=True)
class _DoubleBatches:
    batches: Any

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, t: int) -> PyTree:
        return _to_float64(self.batches[t])


def _double(training: Training) -> Training:
    """The same training with its floating leaves in float64."""
    init = training.init
    if training.starts_from_z:
        start = init

        def init(z: PyTree) -> PyTree:
            return _to_float64(start(z))
    else:
        init = _to_float64(init)
    return replace(training, init=init, batches=_DoubleBatches(training.batches))
