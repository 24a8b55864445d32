"""`check`: is this run's metagradient right? Determinism, finite differences and precision, on the run itself."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from metagradient._train import train
from metagradient.errors import ImpureStepError, NonFiniteError, ReplayMismatch
from metagradient.fingerprint import fingerprint
from metagradient.metagrad import value_and_metagrad
from metagradient.schedule import TwoLevel
from metagradient.step.segment import Segment
from metagradient.training import Training
from metagradient.trees import PyTree, is_floating, paths


@dataclass(frozen=True)
class Direction:
    """One finite-difference comparison, in float64.

    Arguments:
        steps: step sizes h, largest first.
        differences: central differences at those steps.
        extrapolated: Richardson's extrapolation of the two smallest.
        metagradient: the metagradient's derivative in this direction.
        relative_error: difference of the last two, relative to the metagradient.
        kink: one-sided differences at the smallest step, apart as a share of the derivative. Near zero where the run
            is differentiable; ties in a max pooling, or a relu at zero, keep it up.
    """

    steps: list[float]
    differences: list[float]
    extrapolated: float
    metagradient: float
    relative_error: float
    kink: float


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; printable, and plain data through `to_dict`.

    Arguments:
        replays: whether the final state came out the same, bit for bit, twice, and through a schedule with replay.
        error: the error that the run or its replay raised, or None.
        finite: whether value and metagradient are finite.
        directions: finite-difference comparisons.
        precision: for every leaf of z, cosine and relative difference of the metagradient in the run's own precision
            against float64.
        tolerance: relative error up to which finite differences agree.
    """

    replays: bool
    error: str | None
    finite: bool
    directions: list[Direction]
    precision: dict[str, dict[str, float]]
    tolerance: float

    @property
    def differences_agree(self) -> bool:
        """Whether finite differences confirm the metagradient in every direction."""
        return bool(self.directions) and all(d.relative_error <= self.tolerance for d in self.directions)

    @property
    def precise(self) -> bool:
        """Whether the run's own precision gives the float64 metagradient to a cosine of 0.99, leaf by leaf."""
        return all(p["cosine"] >= 0.99 for p in self.precision.values())

    @property
    def ok(self) -> bool:
        """Whether every part passed."""
        return self.replays and self.finite and self.differences_agree and self.precise

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            **asdict(self),
            "differences_agree": self.differences_agree,
            "precise": self.precise,
            "ok": self.ok,
        }

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
        return capture.get().rstrip()

    def _rows(self) -> list[tuple[str, bool, str]]:
        rows = [
            ("replays bit for bit", self.replays, "" if self.replays else self.error or "final states differ"),
            ("value and gradient finite", self.finite, (self.error or "not reached") if not self.finite else ""),
        ]
        for i, d in enumerate(self.directions):
            detail = (
                f"metagradient {d.metagradient:.8g}, differences {d.extrapolated:.8g} ({d.relative_error:.1e} apart)"
            )
            if d.relative_error > self.tolerance and d.kink > 0.1:
                detail += f"; one-sided differences are {d.kink:.0%} apart: a kink or tie in the run, not in the engine"
            rows.append((f"finite differences, direction {i}", d.relative_error <= self.tolerance, detail))
        if not self.directions:
            rows.append(("finite differences", False, "not run"))
        for leaf, p in self.precision.items():
            detail = f"cosine {p['cosine']:.6f}, relative difference {p['relative_difference']:.1e}"
            rows.append((f"float64 agrees on z{leaf}", p["cosine"] >= 0.99, detail))
        return rows


def check(
    training: Training,
    objective: Callable[[PyTree, PyTree], jax.Array],
    z: PyTree,
    *,
    directions: int = 2,
    step: float = 1e-3,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> CheckReport:
    """Check a metagradient on the very run that it is wanted for.

    Arguments:
        training: the run.
        objective: `(final state, z) -> scalar`.
        z: metaparameters at which to check.
        directions: random directions for finite differences.
        step: largest finite-difference step, relative to the norm of each leaf of z (absolute for a leaf of zeros);
            halved twice.
        tolerance: relative error at which finite differences agree.
        seed: seed of the directions.

    Returns: a `CheckReport`. Runs that don't replay end up in the report, not as an error.

    Errors: those of `value_and_metagrad` for input of the wrong kind. `TypeError` from the user's functions where
        they insist on float32 (the float64 comparison needs them to follow the dtypes of their arguments).

    Cost: two metagradients, and 3 + 7 runs a direction, most in float64. Take a short run to check a recipe.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> training = mg.Training(jnp.ones(3), lambda s, b, z: s * (1 - z["rate"]), [{}] * 5)
    >>> report = mg.check(training, lambda s, z: (s**2).sum(), {"rate": mg.PerStep(jnp.full(5, 0.1))})
    >>> report.ok
    True
    """
    segment = Segment(1, "steps", "state")
    evaluate = value_and_metagrad(training, objective, schedule=TwoLevel(), segment=segment)
    try:
        grad = evaluate(z)[1]
        first, second = (fingerprint(train(training, z, segment=segment))[0] for _ in range(2))
    except NonFiniteError as problem:
        return CheckReport(True, str(problem), False, [], {}, tolerance)
    except (ImpureStepError, ReplayMismatch) as problem:
        return CheckReport(False, str(problem), False, [], {}, tolerance)
    replays = np.array_equal(first, second)
    with jax.enable_x64(True):
        double, exact_z = _double(training), _to_float64(z)
        exact = value_and_metagrad(double, objective, schedule=TwoLevel(), segment=segment)(exact_z)[1]
        rng = np.random.default_rng(seed)

        def run(z: PyTree) -> float:
            return float(objective(train(double, z, segment=segment), z))

        found = [_direction(run, exact_z, exact, rng, step) for _ in range(directions)]
    precision = {
        path: _compare(np.asarray(a, np.float64), np.asarray(b))
        for (path, a), (_, b) in zip(paths(grad), paths(exact), strict=True)
    }
    return CheckReport(replays, None, True, found, precision, tolerance)


def _compare(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = float(np.vdot(a, b) / norms) if norms else float(np.array_equal(a, b))
    return {"cosine": cosine, "relative_difference": float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1))}


def _direction(
    run: Callable[[PyTree], float], z: PyTree, grad: PyTree, rng: np.random.Generator, step: float
) -> Direction:
    def draw(x: jax.Array) -> jax.Array:
        v = rng.standard_normal(x.shape)
        scale = float(jnp.linalg.norm(x)) or 1.0
        return jnp.asarray(v / (np.linalg.norm(v) or 1.0) * scale)

    v = jax.tree.map(draw, z)
    slope = float(sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(grad), jax.tree.leaves(v), strict=True)))
    steps = [step, step / 2, step / 4]
    ends = [[run(jax.tree.map(lambda x, d, h=h: x + h * d, z, v)) for h in (-s, s)] for s in steps]
    middle = run(z)
    central = [(up - down) / (2 * s) for s, (down, up) in zip(steps, ends, strict=True)]
    # Central differences err by c h^2: (4 D(h/2) - D(h)) / 3 is free of it.
    extrapolated = (4 * central[2] - central[1]) / 3
    size = max(abs(slope), abs(extrapolated)) or 1.0
    down, up = ends[2]
    kink = abs((up - middle) - (middle - down)) / steps[2] / size
    return Direction(steps, central, extrapolated, slope, abs(extrapolated - slope) / size, kink)


def _to_float64(tree: PyTree) -> PyTree:
    def cast(x: Any) -> Any:
        x = x if hasattr(x, "dtype") else np.asarray(x)
        return x.astype(np.float64) if is_floating(x) else x

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
