"""`metasmoothness`: whether a training answers small changes of its metaparameters smoothly enough."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from metagradient import objectives
from metagradient._train import train_many
from metagradient.errors import NonFiniteError, StructureError
from metagradient.metagrad import value_and_metagrad
from metagradient.metaparameters import bare, canonical
from metagradient.run import full_precision
from metagradient.shown import Shown
from metagradient.smoothness.directions import random_directions
from metagradient.smoothness.measures import bootstrap, noise_scores, second_difference, sign_agreement
from metagradient.training import Training, TrainState
from metagradient.trees import PyTree, floating, mismatch

Grade: TypeAlias = Literal["smooth", "partly smooth", "rough", "no smoother than noise"]
Objective: TypeAlias = Callable[[PyTree, PyTree], jax.Array]

_Point: TypeAlias = tuple[str, int, float]
"""Kind and number of a direction v, and how far along it: z + far v."""

_ORIGIN: _Point = ("", 0, 0.0)
_SMOOTH, _PARTLY = 0.9, 0.6


@dataclass(frozen=True)
class Row:
    """What directions of one kind read at one step size.

    Arguments:
        kind: of the directions.
        step: h.
        scores: Definition 2 in each direction.
        score: their mean.
        interval: 95 % of bootstrap means over the directions; None for one direction. With three, no more than their
            range.
        null: mean score of noise with this run's movements: see `noise_scores`.
        null_high: the 97.5 % quantile of that noise's mean score.
        curvatures: Definition 1 in each direction; None without an objective.
        curvature: their mean.
    """

    kind: str
    step: float
    scores: list[float]
    score: float
    interval: tuple[float, float] | None
    null: float
    null_high: float
    curvatures: list[float] | None
    curvature: float | None

    @property
    def grade(self) -> Grade:
        """In words: smooth from 0.9, partly smooth from 0.6, unless noise reads as much."""
        if self.score <= self.null_high:
            return "no smoother than noise"
        return "smooth" if self.score >= _SMOOTH else "partly smooth" if self.score >= _PARTLY else "rough"


@dataclass(frozen=True, repr=False)
class Smoothness(Shown):
    """What `metasmoothness` found; printable, and plain data through `to_dict`.

    Arguments:
        rows: a row for each kind of direction and step size.
        finite: whether the metagradient at z is finite; None where no objective was given.
        problem: where it became non-finite, or None.
        trainings: trainings run.
    """

    rows: list[Row]
    finite: bool | None
    problem: str | None
    trainings: int

    @property
    def worst(self) -> Row:
        """The row with the lowest score."""
        return min(self.rows, key=lambda row: row.score)

    @property
    def verdict(self) -> str:
        """What to make of it, in a sentence; the lowest score decides."""
        row = self.worst
        found = f"{row.grade}: {row.score:.2f} along {row.kind} directions at h = {row.step:g}, noise {row.null:.2f}"
        if self.finite is False:
            return f"no metagradient: it isn't finite ({self.problem}). Apart from that {found}"
        if row.grade == "smooth":
            return found
        return f"{found}. Try average pooling, norm before GELU, a lower learning rate, a larger batch or eps_root"

    def row(self, kind: str, step: float | None = None) -> Row:
        """The row of a kind, at a step size or the first."""
        return next(r for r in self.rows if r.kind == kind and step in (None, r.step))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        rows = [{**asdict(row), "grade": row.grade} for row in self.rows]
        return {**asdict(self), "rows": rows, "verdict": self.verdict}

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        console = Console(width=100, no_color=True)
        table = Table("directions", "h", "Def. 2", "95 %", "noise", "Def. 1", "grade", title="metasmoothness")
        for row in self.rows:
            table.add_row(
                f"{len(row.scores)} {row.kind}",
                f"{row.step:g}",
                f"{row.score:.3f}",
                "" if row.interval is None else "{:.3f} to {:.3f}".format(*row.interval),
                f"{row.null:.3f}",
                "" if row.curvature is None else f"{row.curvature:.3g}",
                row.grade,
            )
        with console.capture() as capture:
            console.print(table)
            if self.finite is not None:
                console.print(f"metagradient: {'finite' if self.finite else self.problem}", highlight=False)
            console.print(f"verdict: {self.verdict}", highlight=False)
        return capture.get().rstrip()


def parameters(state: PyTree) -> PyTree:
    """What Definition 2 watches unless told otherwise: the parameters of a `TrainState`, or all of another state."""
    return state.params if isinstance(state, TrainState) else state


def metasmoothness(
    training: Training,
    objective: Objective | None,
    z: PyTree,
    *,
    directions: int | Mapping[str, Sequence[PyTree]] = 3,
    step: float | Sequence[float] = 0.1,
    groups: Any = None,
    theta: Callable[[PyTree], PyTree] = parameters,
    at_once: int | None = None,
    seed: int = 0,
) -> Smoothness:
    r"""Probe how smooth a training is in its metaparameters, by trainings alone.

    With $\theta_0, \theta_h, \theta_{2h}$ trained at $z$, $z + hv$ and $z + 2hv$, Definition 2 asks whether parameters
    that moved between the first two go on the same way, weighted by how far they get:

    $$\hat S = \sum_i \mathrm{sign}(\theta_h - \theta_0)_i \frac{d_i}{\|d\|_1} \mathrm{sign}(\theta_{2h} - \theta_h)_i,
      \qquad d = |\theta_{2h} - \theta_0|.$$

    One is smooth. Noise doesn't read zero, so every score stands beside what noise of this run's size would read. With
    an objective f, Definition 1 too, $|f(z + 2hv) - 2 f(z + hv) + f(z)| / h^2$, and whether the metagradient is finite,
    which a high score doesn't promise.

    Arguments:
        training: the run.
        objective: `(final state, z) -> scalar`, or None for Definition 2 alone.
        z: metaparameters at which to probe.
        directions: number of random directions of each kind (see `random_directions`); or directions by kind, each
            like z.
        step: h, in units of z; or several. 0.1 suits data weights.
        groups: int[n], for directions along whole classes or sources.
        theta: picks what Definition 2 watches out of a final state; its floating leaves count.
        at_once: trainings in one vmapped program; None measures whether that pays.
        seed: of directions, noise and bootstrap.

    Returns: a `Smoothness`.

    Errors: before compute, `StructureError` for directions, steps, groups or an objective that don't fit, and those of
        `train`. `NonFiniteError` where a training ends non-finite; `StructureError` where one doesn't move theta.

    Cost: 1 + 2 x directions x kinds trainings a step size (1.5 where each step is twice the last), and a metagradient
        where an objective is given. Final states of all are held at once.

    Source: arXiv 2503.13751, section 4, Definitions 1 and 2.

    >>> import jax.numpy as jnp, optax, metagradient as mg
    >>> batches = [{"x": jnp.eye(16)[t : t + 4], "index": jnp.arange(4)} for t in range(12)]
    >>> def loss(params, batch, z):
    ...     return jnp.mean(z["weights"] * (batch["x"] @ params["w"] - 1) ** 2)
    >>> training = mg.Training.from_loss(loss, optax.sgd(0.1), {"w": jnp.zeros(16)}, batches)
    >>> report = mg.metasmoothness(training, None, {"weights": mg.PerExample(jnp.ones(4))})
    >>> report.row("normal").grade
    'smooth'
    """
    z = canonical(z)
    steps = _checked_steps(step)
    chosen = _checked_directions(z, directions, groups, seed)
    state = jax.eval_shape(training.initial, z)
    if not floating(theta(state))[0]:
        raise StructureError("theta picks no floating leaf of the final state: there is nothing to watch")
    if objective is not None:
        objectives.Objective(objective).check(state, z)
    # A point is shared by all that need it: z by every direction, z + 2hv by the step size 2h.
    points: dict[_Point, PyTree] = {_ORIGIN: z}
    for kind, trees in chosen.items():
        for number, v in enumerate(trees):
            for far in (far for h in steps for far in (h, 2 * h)):
                points[kind, number, far] = jax.tree.map(lambda x, d, far=far: x + far * d, z, v)
    with full_precision(training.allow_low_precision):
        states = train_many(training, list(points.values()), at_once=at_once)
        ends = {key: _end(theta(state), key) for key, state in zip(points, states, strict=True)}
        values = None
        if objective is not None:
            values = {
                key: float(objective(state, bare(at))) for (key, at), state in zip(points.items(), states, strict=True)
            }
    rng = np.random.default_rng((seed, 3))
    rows = [_row(kind, len(trees), h, ends, values, rng) for kind, trees in chosen.items() for h in steps]
    finite, problem = (None, None) if objective is None else _finite(training, objective, z)
    return Smoothness(rows, finite, problem, len(points))


def _checked_steps(step: float | Sequence[float]) -> list[float]:
    steps = [float(h) for h in np.atleast_1d(np.asarray(step, np.float64))]
    if not steps or not all(math.isfinite(h) and h > 0 for h in steps):
        raise StructureError(f"step must be a positive number, or several, got {step}")
    return steps


def _checked_directions(
    z: PyTree, directions: int | Mapping[str, Sequence[PyTree]], groups: Any, seed: int
) -> dict[str, list[PyTree]]:
    if not isinstance(directions, Mapping):
        return random_directions(z, directions, groups=groups, seed=seed)
    if groups is not None:
        raise StructureError("give either groups= or directions by kind, not both")
    chosen = {kind: [canonical(v) for v in trees] for kind, trees in directions.items()}
    if not chosen or not all(chosen.values()):
        raise StructureError("directions must name at least one kind, and hold at least one direction of each")
    for kind, trees in chosen.items():
        for number, v in enumerate(trees):
            if problem := mismatch(z, v):
                raise StructureError(f"direction {number} of kind {kind!r} is not like z: {problem}")
            if not any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(v)):
                raise StructureError(f"direction {number} of kind {kind!r} is zero")
    return chosen


def _end(theta: PyTree, key: _Point) -> list[np.ndarray]:
    """Floating leaves of theta, flat, in float64."""
    leaves = [np.asarray(x, np.float64).ravel() for x in floating(theta)[0]]
    if not all(np.isfinite(x).all() for x in leaves):
        kind, number, far = key
        where = f"z + {far:g} v along {kind} direction {number}" if kind else "z"
        raise NonFiniteError(f"the training at {where} ends with a non-finite parameter: lower its learning rate")
    return leaves


def _row(
    kind: str,
    count: int,
    h: float,
    ends: dict[_Point, list[np.ndarray]],
    values: dict[_Point, float] | None,
    rng: np.random.Generator,
) -> Row:
    scores, nulls, curvatures = [], [], []
    for number in range(count):
        keys = _ORIGIN, (kind, number, h), (kind, number, 2 * h)
        first, second = ([b - a for a, b in zip(ends[i], ends[j], strict=True)] for i, j in pairwise(keys))
        score = sign_agreement(np.concatenate(first), np.concatenate(second))
        if math.isnan(score):
            raise StructureError(
                f"no parameter moves along {kind} direction {number} at h = {h:g}: does the step read z, in every "
                "example that the direction covers, and does theta pick what it changes?"
            )
        scores.append(score)
        nulls.append(noise_scores(first, second, rng))
        if values is not None:
            curvatures.append(second_difference((values[keys[0]], values[keys[1]], values[keys[2]]), h))
    return Row(
        kind,
        h,
        scores,
        float(np.mean(scores)),
        bootstrap(np.array(scores), rng),
        float(np.mean(nulls)),
        float(np.quantile(np.mean(nulls, axis=0), 0.975)),
        curvatures if values is not None else None,
        float(np.mean(curvatures)) if values is not None else None,
    )


def _finite(training: Training, objective: Objective, z: PyTree) -> tuple[bool, str | None]:
    try:
        value_and_metagrad(training, objective)(z)
    except NonFiniteError as problem:
        return False, str(problem)
    return True, None
