"""The float64 twin of a run: the same training on the same random numbers, and its derivatives by other means."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagradient._jax import (
    Program,
    compiled,
    doubles_beside_single_draws,
    draws,
    in_single,
    own_rules,
    stopped_gradients,
    through_stops,
    trace,
)
from metagradient.errors import MetagradientError
from metagradient.metagrad import Evaluation, value_and_metagrad
from metagradient.metaparameters import needs_index, slices, wrapped
from metagradient.objectives import MeanOver, programs_of
from metagradient.run import Run, full_precision
from metagradient.step.choose import first_step
from metagradient.step.from_loss import LossStep
from metagradient.step.segment import Segment
from metagradient.training import Training
from metagradient.trees import PyTree, floating, is_floating, is_key, paths

Objective = Callable[[PyTree, PyTree], jax.Array]

_LEVELS = 12
_KINK = 0.1
# Differences that are known no better than this decide nothing.
_VAGUE = 0.01
# Where two ways through the same program differ by no more, they agree.
_ROUNDING = 1e-6
_ROUNDING_IN_SINGLE = 1e-3
# A share of the objective's value that a change of z by its whole size must move, to be told from none.
_NEGLIGIBLE = 1e-10
# By how much steps of differences are larger where the twin computes in float32.
_IN_SINGLE = 16


class NoTwinError(Exception):
    """The run can't be had in float64."""


@dataclass(frozen=True)
class Direction:
    """The metagradient in one direction, beside other ways to the same number, in float64.

    Arguments:
        metagradient: its derivative in this direction.
        forward: the same by forward mode, a step at a time, from the first to the last; None where a step refuses that.
            Both are derivatives by JAX's rules.
        through: by forward mode too, with gradients going through where the run stops them; None where that makes no
            difference. It is the derivative of the run's value.
        steps: step sizes h of central differences, largest first.
        differences: central differences of the run's value at those steps.
        extrapolated: of them, by Richardson (Ridders' choice of the best).
        bound: how far the extrapolation may be off, by its own estimate and rounding.
        kink: by how much one-sided differences stay apart as h shrinks, as a share of the derivative. Zero where the
            run is differentiable; ties in a max pooling, or a relu at zero, keep it up.
        negligible: what can't be told from zero.
        rounding: relative error up to which two ways through the same program agree.
    """

    metagradient: float
    forward: float | None
    through: float | None
    steps: list[float]
    differences: list[float]
    extrapolated: float
    bound: float
    kink: float
    negligible: float
    rounding: float

    @property
    def derivative(self) -> float:
        """What differences should be."""
        return self.metagradient if self.through is None else self.through

    @property
    def size(self) -> float:
        """What the errors of differences are relative to."""
        return max(abs(self.derivative), abs(self.extrapolated), self.negligible) or 1.0

    @property
    def relative_error(self) -> float:
        """Derivative and differences, apart."""
        return abs(self.extrapolated - self.derivative) / self.size

    @property
    def forward_error(self) -> float | None:
        """Metagradient and forward mode, apart."""
        if self.forward is None:
            return None
        return apart(self.metagradient, self.forward, self.negligible)

    @property
    def forward_agrees(self) -> bool:
        """Whether forward mode, where there is one, gives the metagradient."""
        return self.forward_error is None or self.forward_error <= self.rounding

    def agrees(self, tolerance: float) -> bool:
        """Whether differences confirm the derivative."""
        return not self.vague and self.relative_error <= tolerance + 4 * self.bound / self.size

    @property
    def kinked(self) -> bool:
        """Whether the run isn't differentiable here."""
        return self.kink > _KINK

    @property
    def vague(self) -> bool:
        """Whether the differences are too rough to decide anything."""
        return self.bound > _VAGUE * self.size or self.kinked


def apart(a: float, b: float, negligible: float) -> float:
    """Relative difference of two numbers, of which both may be nothing."""
    return abs(a - b) / (max(abs(a), abs(b), negligible) or 1.0)


@dataclass(frozen=True)
class Held:
    """What the programs of a run hold that its derivatives may hang on.

    Arguments:
        stops: where gradients are stopped.
        rules: where there are derivative rules of somebody's own.
        draws: whether random numbers are drawn.
        single: where float64 values are taken to float32, if they are float64.
    """

    stops: list[str]
    rules: list[str]
    draws: bool
    single: list[str]

    @classmethod
    def of(cls, run: Run, objective: Objective, z: PyTree) -> "Held":
        """Read off the traced step, objective and, where that depends on z, initial state."""
        programs: list[Program] = [trace(run.programs.rule.advance, *first_step(run.feed, run.z, run.state))[0]]
        function, terms = _terms(objective)
        programs.append(trace(function, run.state, z, *terms[0][1])[0])
        if run.training.starts_from_z:
            programs.append(trace(run.training.initial, z)[0])

        def places(of: Callable[[Program], list[str]]) -> list[str]:
            return list(dict.fromkeys(place for program in programs for place in of(program)))

        return cls(places(stopped_gradients), places(own_rules), any(map(draws, programs)), places(in_single))


def _terms(objective: Objective) -> tuple[Callable[..., jax.Array], list[tuple[float, tuple]]]:
    """An objective as a sum over terms: a function `(state, z, *data)`, and every term's share and data."""
    terms = [(s, (batch,)) for s, batch in objective.shares()] if isinstance(objective, MeanOver) else [(1.0, ())]
    return programs_of(objective).function, terms


class _Forwards:
    """Forward mode through a run, a step at a time.

    Arguments:
        places: where gradients go through that the run stops; None for all.
    """

    def __init__(self, run: Run, objective: Objective, places: frozenset[str] | None):
        rule, (function, self._terms) = run.programs.rule, _terms(objective)

        def opened(function: Callable[..., Any]) -> Callable[..., Any]:
            return function if places == frozenset() else through_stops(function, places)

        new_state = opened(lambda *arguments: rule.advance(*arguments)[0])
        value = opened(lambda *arguments: function(*arguments))

        def step(state: PyTree, moving: tuple, t: Any, batch: PyTree, z: PyTree, v: PyTree) -> tuple[PyTree, tuple]:
            values, rebuild = floating(state)

            def advance(values: tuple, z: PyTree) -> tuple[tuple, PyTree]:
                new = new_state(rebuild(values), batch, slices(z, t, batch["index"] if needs_index(z) else None))
                return floating(new)[0], new

            _, moved, new = jax.jvp(advance, (values, z), (moving, v), has_aux=True)
            return new, moved

        def end(state: PyTree, moving: tuple, z: PyTree, v: PyTree, *data: PyTree) -> jax.Array:
            values, rebuild = floating(state)
            return jax.jvp(lambda x, z: value(rebuild(x), z, *data), (values, z), (moving, v))[1]

        self._step, self._end, self._initial = compiled(step), compiled(end), opened(run.training.initial)

    def __call__(self, run: Run, z: PyTree, v: PyTree) -> float | None:
        """The derivative of the objective in direction v; None where the step or the objective has no forward mode."""
        try:
            return self._pushed(run, z, v)
        except TypeError as error:
            if "custom_vjp" not in str(error):
                raise
            return None

    def _pushed(self, run: Run, z: PyTree, v: PyTree) -> float:
        state, tangents, moving = run.state, wrapped(v), run.programs.zeros(floating(run.state)[0])
        if run.training.starts_from_z and not run.begin:
            moving = jax.jvp(lambda z: floating(self._initial(z))[0], (z,), (v,))[1]
        still = run.programs.zeros(tangents)
        for t in range(len(run.feed)):
            seen = still if t < run.begin else tangents
            state, moving = self._step(state, moving, np.int32(t), run.feed[t], run.z, seen)
        return float(sum(share * self._end(state, moving, z, v, *data) for share, data in self._terms))


@dataclass(frozen=True, eq=False)
class Twin:
    """A run in float64, and other ways to its derivatives.

    Arguments:
        run: it, at z.
        objective, z: as in `check`.
        gradient: its metagradient.
        segment: how steps are compiled.
        held: what its programs hold.
    """

    run: Run
    objective: Objective
    z: PyTree
    gradient: PyTree
    segment: Segment
    held: Held

    @cached_property
    def _forward(self) -> _Forwards:
        return _Forwards(self.run, self.objective, frozenset())

    @cached_property
    def _through(self) -> _Forwards:
        return _Forwards(self.run, self.objective, None)

    @cached_property
    def _objective(self) -> Callable[..., jax.Array]:
        function = _terms(self.objective)[0]
        return compiled(lambda *arguments: function(*arguments))

    def value(self, z: PyTree) -> float:
        """The objective of the run at other metaparameters, from the window on."""
        state = trained(self.run, z, self.segment)
        return float(sum(share * self._objective(state, z, *data) for share, data in _terms(self.objective)[1]))

    def microbatches(self) -> float | None:
        """Relative difference of the first gradient to that of the whole batch at once."""
        rule, run = self.run.programs.rule, self.run
        if not isinstance(rule, LossStep) or rule.microbatches == 1 or rule.has_model_state:
            return None

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
            return jnp.asarray(v / (np.linalg.norm(v) or 1.0) * scale, x.dtype)

        v = jax.tree.map(draw, self.z)
        pairs = zip(jax.tree.leaves(self.gradient), jax.tree.leaves(v), strict=True)
        slope = float(sum(np.vdot(g, d) for g, d in pairs))
        middle = self.value(self.z)
        negligible, rounding = _NEGLIGIBLE * abs(middle), _ROUNDING_IN_SINGLE if self.held.single else _ROUNDING
        forward, through = self._forward(self.run, self.z, v), None
        if forward is not None and self.held.stops:
            through = self._through(self.run, self.z, v)
            if through is not None and apart(through, forward, negligible) <= rounding:
                through = None
        expected = slope if through is None else through
        # A power of two: Python numbers are taken in float32, where they stand beside float64 arrays.
        h, steps, central, gap, jump, kink = 2.0 ** round(np.log2(step)), [], [], 0.0, 0.0, 0.0
        h, precision = (_IN_SINGLE * h, np.finfo(np.float32)) if self.held.single else (h, np.finfo(np.float64))
        best, bound, row = 0.0, np.inf, []

        def settled() -> bool:
            error = tolerance * max(abs(best), abs(expected))
            return bound <= 0.1 * error and abs(best - expected) <= error + 4 * bound

        while len(steps) < _LEVELS and (len(steps) < 3 or not settled()):
            down, up = (self.value(jax.tree.map(lambda x, d, at=at: x + at * d, self.z, v)) for at in (-h, h))
            steps.append(h)
            central.append((up - down) / (2 * h))
            noise = float(precision.eps) * max(abs(up), abs(down)) / h
            # One-sided differences of a smooth run close in as h does; what stays, the same at every h, is a kink.
            gap, wider = ((up - middle) - (middle - down)) / h, gap
            jump, last = 2 * gap - wider, jump
            size = max(abs(expected), abs(central[-1]), negligible) or 1.0
            stays = abs(jump - last) < 0.25 * abs(jump)
            kink = max(abs(jump) - 8 * noise, 0.0) / size if stays else 0.0
            # Central differences err by powers of h squared; every column takes one more away (Ridders 1982).
            row, before = [central[-1]], row
            found, error = 0.0, np.inf
            for j, above in enumerate(before):
                row.append(row[j] + (row[j] - above) / (4 ** (j + 1) - 1))
                this = max(abs(row[-1] - row[j]), abs(row[-1] - above)) + noise
                found, error = (row[-1], this) if this < error else (found, error)
            # What larger steps agreed on must hold at smaller ones.
            if error < bound or abs(found - best) > 4 * (error + bound):
                best, bound = found, error
            h /= 2
        return Direction(slope, forward, through, steps, central, best, float(bound), kink, negligible, rounding)

    def telling_stops(self, rng: np.random.Generator) -> list[str]:
        """Those places where gradients are stopped that make a difference to the derivative in a random direction."""
        v = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), self.z)
        stopped, found = self._forward(self.run, self.z, v), []
        for place in self.held.stops:
            without = _Forwards(self.run, self.objective, frozenset({place}))(self.run, self.z, v)
            if stopped is None or without is None or apart(stopped, without, 0.0) > _ROUNDING:
                found.append(place)
        return found


def trained(run: Run, z: PyTree, segment: Segment) -> PyTree:
    """The final state of a run at other metaparameters, which it sees from its window on."""
    moved = replace(run, z=wrapped(z), state=run.state if run.begin else run.training.initial(z))
    state, before, after = moved.state, run.runner(segment), moved.runner(segment)
    for i in range(-before.before, 0):
        state = before.advance(i, state)
    for i in range(len(after)):
        state = after.advance(i, state)
    return state


@contextmanager
def twin(run: Run, objective: Objective, z: PyTree, found: Evaluation, window: int | None) -> Iterator[Twin]:
    """The twin of a run, in whose precision the context is.

    Arguments:
        run, objective, z, window: the run at z, and as in `check`.
        found: the run's own metagradient, whose segment and schedule the twin takes.

    Errors: `NoTwinError` where a function of the run insists on float32.
    """
    drawn = Held.of(run, objective, z).draws
    # Under x64 jax.random draws other numbers, so that serves only where none are drawn.
    contexts: list[Callable[[], AbstractContextManager[None]]] = [doubles_beside_single_draws]
    contexts += [] if drawn else [partial(jax.enable_x64, True)]
    problem: Exception | None = None
    for context in contexts:
        with context():
            try:
                made = _doubled(run.training, objective, z, found, window)
            except (TypeError, ValueError, MetagradientError) as error:
                problem = problem or error
                continue
            with full_precision(run.training.allow_low_precision):
                yield made
            return
    raise NoTwinError(
        f"the run can't be traced in float64, so nothing was compared: {str(problem).rstrip('.')}. Its functions must "
        "follow the dtypes of their arguments (jnp.zeros(shape, x.dtype), not jnp.zeros(shape))"
        + (", as it draws random numbers, which are others under jax_enable_x64" if drawn else "")
    ) from problem


def _doubled(training: Training, objective: Objective, z: PyTree, found: Evaluation, window: int | None) -> Twin:
    training, z, stats = _double(training), _to_float64(z), found.stats
    gradient = value_and_metagrad(
        training, objective, schedule=stats.schedule, segment=stats.segment, window=window
    )(z)[1]  # fmt: skip
    for path, leaf in paths(gradient):
        if leaf.dtype != jnp.float64:
            raise TypeError(f"the gradient of z{path} came out in {leaf.dtype}")
    run = Run.prepared(training, z, window, first=False)
    return Twin(run, objective, z, gradient, stats.segment, Held.of(run, objective, z))


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
