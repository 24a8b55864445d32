"""`check`: is this run's metagradient right? Determinism, derivatives and precision, of the program that will run."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from metagradient._differences import Direction
from metagradient._twin import NoTwinError, trained, twin
from metagradient.errors import ImpureStepError, NonFiniteError, ReplayMismatch
from metagradient.metagrad import value_and_metagrad
from metagradient.metaparameters import canonical
from metagradient.replay.budget import Memory
from metagradient.replay.schedule import Schedule
from metagradient.run import Run, full_precision
from metagradient.shown import Shown
from metagradient.step.segment import Segment
from metagradient.training import Training
from metagradient.trees import PyTree, paths, same_bits
from metagradient.versions import untested

_PRECISE = 0.99
_ROUNDING = 1e-6
# What a leaf of z may move the objective by, as a share of its value, and be nothing: in float64, and in float32.
_NOTHING, _NOTHING_IN_SINGLE = 1e-10, 1e-5


@dataclass(frozen=True, repr=False)
class CheckReport(Shown):
    """What `check` found; printable, and plain data through `to_dict`.

    Arguments:
        replays: whether the final state came out the same, bit for bit, in the metagradient and in plain training.
        error: the error that the run, its replay or its float64 twin raised, or None.
        finite: whether value and metagradient are finite.
        directions: the metagradient beside forward mode and finite differences.
        precision: for every leaf of z, cosine and relative difference of the metagradient in the run's own precision
            against float64; and what the leaf moves, in both, as a share of the objective's value.
        tolerance: relative error up to which finite differences agree, beside their own bound.
        microbatches: relative difference of the first step's gradient to that without micro-batches; None where there
            are none, or where a model state makes them differ by design.
        stops: where the run stops gradients, to an effect.
        rules: where it holds derivative rules of its own.
        single: where its float64 twin computes in float32, as a dtype is fixed there.
        untested: a sentence that names a JAX which wasn't tested, or None.
    """

    replays: bool
    error: str | None
    finite: bool
    directions: list[Direction]
    precision: dict[str, dict[str, float]]
    tolerance: float
    microbatches: float | None = None
    stops: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    single: list[str] = field(default_factory=list)
    untested: str | None = None

    @property
    def differences_agree(self) -> bool:
        """Whether finite differences confirm the metagradient in every direction."""
        return bool(self.directions) and all(d.agrees(self.tolerance) for d in self.directions)

    @property
    def forward_agrees(self) -> bool:
        """Whether forward mode, where a step allows it, gives the metagradient in every direction."""
        return all(d.forward_agrees for d in self.directions)

    @property
    def microbatches_agree(self) -> bool:
        """Whether micro-batches give the gradient of the whole batch."""
        return self.microbatches is None or self.microbatches <= _ROUNDING

    @property
    def precise(self) -> bool:
        """Whether the run's own precision gives the float64 metagradient, leaf by leaf, to a cosine of 0.99."""
        return all(_precise(p) for p in self.precision.values())

    @property
    def ok(self) -> bool:
        """Whether every part passed."""
        agrees = self.forward_agrees and self.differences_agree and self.microbatches_agree
        return self.replays and self.finite and agrees and self.precise

    @property
    def notes(self) -> list[str]:
        """What else should be known."""
        notes = [self.untested] if self.untested else []
        if self.stops:
            notes.append(
                "gradients are stopped at "
                + "; ".join(self.stops)
                + ": the metagradient is what jax.grad gives of the whole "
                "loop, and not the derivative of the run's value. Differences are compared with the latter"
            )
        if self.rules and not self.differences_agree:
            notes.append(
                "a derivative is given by a rule at "
                + "; ".join(self.rules)
                + ": the metagradient is what jax.grad gives of "
                "the whole loop, and not the derivative of the run's value where the rule isn't that"
            )
        if self.single:
            notes.append(
                "the float64 twin computes in float32 at "
                + "; ".join(self.single)
                + ", where a dtype is fixed, so that "
                "derivatives are compared to less precision"
            )
        return notes

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        names = ("differences_agree", "forward_agrees", "microbatches_agree", "precise", "ok", "notes")
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
                detail = f"metagradient {d.metagradient:.8g}, forwards {d.forward:.8g} ({d.forward_error:.1e} apart)"
                if not d.forward_agrees:
                    detail += "; the metagradient is in doubt"
                rows.append((f"forward mode, direction {i}", d.forward_agrees, detail))
            rows.append((f"finite differences, direction {i}", d.agrees(self.tolerance), self._said(d)))
        if not self.directions:
            rows.append(("finite differences", False, (self.error or "not run") if self.finite else "not run"))
        if self.microbatches is not None:
            detail = f"the first gradient is {self.microbatches:.1e} from that of the whole batch"
            if not self.microbatches_agree:
                detail += ": the loss isn't a mean over examples, or examples= should name the leaves that hold them"
            rows.append(("micro-batches", self.microbatches_agree, detail))
        for leaf, p in self.precision.items():
            detail = f"cosine {p['cosine']:.6f}, relative difference {p['relative_difference']:.1e}"
            if p["cosine"] < _PRECISE and _precise(p):
                detail = "no effect to speak of"
            rows.append((f"float64 agrees on z{leaf}", _precise(p), detail))
        return rows

    def _said(self, d: Direction) -> str:
        """The numbers; and where they don't agree, which of them is in doubt."""
        name = "metagradient" if d.through is None else "through the stops"
        errors = f"{d.relative_error:.1e} apart; differences are good to {d.bound / d.size:.0e}"
        text = f"{name} {d.derivative:.8g}, differences {d.extrapolated:.8g} ({errors})"
        if d.agrees(self.tolerance):
            return text
        if d.kinked:
            doubt = (
                f"the differences are in doubt: one-sided ones are {d.kink:.0%} apart, by a kink or tie in the run, "
                "not in the engine"
            )
        elif d.vague:
            remedy = "larger" if self.single else "smaller"
            doubt = f"the differences are in doubt: they don't settle; give a {remedy} step="
        elif self.rules:
            doubt = "the derivative is in doubt: of the run, by a rule that isn't one, or of the engine"
            if d.forward is not None and d.forward_agrees:
                doubt = "the metagradient is that of a rule which isn't the derivative of its value"
        elif d.forward is not None and d.forward_agrees:
            doubt = (
                "the differences are in doubt, as forward mode confirms the metagradient: the run jumps (rounding, "
                "sorting, comparing), turns within the steps of differences (give a smaller step=), or holds an "
                "operation whose derivative in JAX isn't that of its value"
            )
        else:
            doubt = "the metagradient is in doubt"
        return f"{text}; {doubt}"


def _precise(p: dict[str, float]) -> bool:
    nothing = p["effect"] <= _NOTHING and p["effect_in_run"] <= _NOTHING_IN_SINGLE
    return nothing or p["cosine"] >= _PRECISE


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
    value, which know nothing of derivatives, and carry their own error bound.

    Where gradients are stopped (`lax.stop_gradient`, detached targets, flax nnx's running statistics), the metagradient
    is what `jax.grad` gives of the whole loop, and not the derivative of the run's value: differences then are compared
    with forward mode through the stops. Where the run holds a rule that isn't the derivative of its value
    (`jax.custom_vjp`), nothing can be: the report says so, and isn't ok.

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

    Cost: two metagradients, and 7 to 25 runs a direction in float64, besides one or two in forward mode. Take a short
        run to check a recipe.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> training = mg.Training(jnp.ones(3), lambda s, b, z: s * (1 - z["rate"]), [{}] * 5)
    >>> report = mg.check(training, lambda s, z: (s**2).sum(), {"rate": mg.PerStep(jnp.full(5, 0.1))})
    >>> report.ok
    True
    """
    z = canonical(z)
    report = partial(CheckReport, directions=[], precision={}, tolerance=tolerance, untested=untested())
    try:
        metagradient = value_and_metagrad(
            training, objective, memory=memory, schedule=schedule, segment=segment, window=window
        )
        found = metagradient.evaluate(z)
        with full_precision(training.allow_low_precision):
            run = Run.prepared(training, z, window, retrace=False)
            again = trained(run, z, found.stats.segment)
            replays = same_bits(found.state, again)
    except NonFiniteError as problem:
        return report(True, str(problem), False)
    except (ImpureStepError, ReplayMismatch) as problem:
        return report(False, str(problem), False)
    rng = np.random.default_rng(seed)
    try:
        with twin(run, objective, z, found, window) as double:
            report = partial(report, rules=double.held.rules, single=double.held.single)
            report = partial(report, microbatches=double.microbatches())
            moved = [double.direction(rng, step, tolerance) for _ in range(directions)]
            stops = double.telling_stops(rng) if any(d.through is not None for d in moved) else []
            report = partial(report, directions=moved, stops=stops)
            exact = double.gradient
    except NoTwinError as problem:
        return report(replays, str(problem), True)
    leaves = zip(paths(found.grad), paths(exact), paths(z), strict=True)
    precision = {path: _compare(*map(_double, (a, b, x, found.value))) for (path, a), (_, b), (_, x) in leaves}
    return report(replays, None, True, precision=precision)


def _double(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def _compare(a: np.ndarray, b: np.ndarray, x: np.ndarray, value: np.ndarray) -> dict[str, float]:
    """A gradient in the run's precision beside that in float64, in a leaf x of z."""
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = float(np.vdot(a, b) / norms) if norms else float(np.array_equal(a, b))
    share = float((np.linalg.norm(x) or 1) / (abs(value) or 1))
    return {
        "cosine": cosine,
        "relative_difference": float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)),
        "effect": float(np.linalg.norm(b)) * share,
        "effect_in_run": float(np.linalg.norm(a)) * share,
    }
