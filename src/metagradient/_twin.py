"""The float64 twin of a run: the same training on the same random numbers, and its derivatives by other means."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagradient._differences import Direction, Rivals, compared, differ
from metagradient._jax import (
    Program,
    compiled,
    doubles_beside_single_draws,
    drawn_bits,
    in_single,
    own_rules,
    stopped_gradients,
    through_stops,
    trace,
)
from metagradient.errors import MetagradientError, NonFiniteError, ReplayMismatch
from metagradient.given import Given
from metagradient.metagrad import Evaluation, value_and_metagrad
from metagradient.metaparameters import bare, wrapped
from metagradient.objectives import MeanOver, sets_taken
from metagradient.run import Run, full_precision
from metagradient.step.from_loss import LossStep
from metagradient.step.segment import Segment
from metagradient.training import Training
from metagradient.trees import PyTree, floating, is_floating, is_key, paths

Objective = Callable[[PyTree, PyTree], jax.Array]


class NoTwinError(Exception):
    """The run can't be had in float64."""


@dataclass(frozen=True)
class Held:
    """What the programs of a run hold that its derivatives may hang on.

    Arguments:
        stops: where gradients are stopped.
        rules: where there are derivative rules of somebody's own.
        bits: how many bits random numbers are made of.
        single: where float64 values are taken to float32, if they are float64.
    """

    stops: list[str]
    rules: list[str]
    bits: set[int]
    single: list[str]

    @classmethod
    def of(cls, run: Run, objective: Objective, z: PyTree) -> "Held":
        """Read off the traced step, objective and, where that depends on z, initial state."""
        programs: list[Program] = [run.contract.program]
        function, terms = _terms(objective)
        programs.append(trace(function, run.state, bare(z), *terms[0][1])[0])
        if run.training.starts_from_z:
            programs.append(trace(run.training.initial, z)[0])

        def places(of: Callable[[Program], list[str]]) -> list[str]:
            return list(dict.fromkeys(place for program in programs for place in of(program)))

        bits = set().union(*map(drawn_bits, programs))
        return cls(places(stopped_gradients), places(own_rules), bits, places(in_single))


def _terms(objective: Objective) -> tuple[Callable[..., jax.Array], list[tuple[float, tuple]]]:
    """An objective as a sum over terms: a function `(state, z, *data)`, z bare, and every term's share and data."""
    if isinstance(objective, MeanOver):
        mean = objective
        terms = [(share, (batch, mean.args)) for share, batch in mean.shares()]
        return lambda state, z, batch, args: mean.programs.function(state, batch, args), terms

    def whole(state: PyTree, z: PyTree) -> jax.Array:
        with sets_taken(whole=True):
            return objective(state, z)

    return whole, [(1.0, ())]


class _Forwards:
    """Forward mode through a run, a step at a time.

    Arguments:
        places: where gradients go through that the run stops; None for all.
    """

    def __init__(self, run: Run, objective: Objective, places: frozenset[str] | None):
        rule, (function, self._terms) = run.programs.rule, _terms(objective)

        def opened(function: Callable[..., Any]) -> Callable[..., Any]:
            return function if places == frozenset() else through_stops(function, places)

        new_state = opened(lambda args, *arguments: rule.bound(args).advance(*arguments)[0])
        value = opened(lambda *arguments: function(*arguments))

        def step(state: PyTree, moving: tuple, t: Any, batch: PyTree, given: Given, v: PyTree) -> tuple[PyTree, tuple]:
            values, rebuild = floating(state)

            def advance(values: tuple, z: PyTree) -> tuple[tuple, PyTree]:
                new = new_state(given.args, rebuild(values), batch, replace(given, z=z).seen(t, batch))
                return floating(new)[0], new

            _, moved, new = jax.jvp(advance, (values, given.z), (moving, v), has_aux=True)
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
            state, moving = self._step(state, moving, np.int32(t), run.feed[t], run.given, seen)
        return float(sum(share * self._end(state, moving, bare(z), bare(v), *data) for share, data in self._terms))


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
        return float(sum(share * self._objective(state, bare(z), *data) for share, data in _terms(self.objective)[1]))

    def microbatches(self) -> float | None:
        """Relative difference of the first gradient to that of the whole batch at once."""
        rule, run = self.run.programs.rule, self.run
        if not isinstance(rule, LossStep) or rule.microbatches == 1 or rule.has_model_state:
            return None

        def gradient(rule: LossStep) -> np.ndarray:
            def first(state: PyTree, batch: PyTree, given: Given) -> PyTree:
                step = replace(rule.bound(given.args), keep="gradient")
                return step.advance(state, batch, given.seen(jnp.int32(0), batch))[1][0]

            leaves = jax.tree.leaves(compiled(first)(run.state, run.feed.first, run.given))
            return np.concatenate([np.ravel(x) for x in leaves])

        cut, whole = gradient(rule), gradient(replace(rule, microbatches=1))
        return float(np.linalg.norm(cut - whole) / (np.linalg.norm(whole) or 1))

    def direction(self, rng: np.random.Generator, step: float, tolerance: float) -> Direction:
        """The metagradient and its rivals in a random direction."""

        def draw(x: jax.Array) -> jax.Array:
            v = rng.standard_normal(x.shape)
            scale = float(jnp.linalg.norm(x)) or 1.0
            return jax.device_put(jnp.asarray(v / (np.linalg.norm(v) or 1.0) * scale, x.dtype), x.sharding)

        v = jax.tree.map(draw, self.z)
        pairs = zip(jax.tree.leaves(self.gradient), jax.tree.leaves(v), strict=True)
        slope = float(sum(np.vdot(g, d) for g, d in pairs))
        through = self._through(self.run, self.z, v) if self.held.stops else None
        if through is not None and not differ(slope, through):
            # The stops are to no effect, as in a softmax's: one program less to compile.
            rivals = Rivals(slope, through, None)
        else:
            rivals = Rivals(slope, self._forward(self.run, self.z, v), through)

        def value(at: float) -> float:
            return self.value(jax.tree.map(lambda x, d: x + at * d, self.z, v))

        return compared(rivals, value, step, tolerance, single=bool(self.held.single))

    def telling_stops(self, rng: np.random.Generator) -> list[str]:
        """Those places where gradients are stopped that make a difference to the derivative in a random direction."""
        v = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), self.z)
        stopped, found = self._forward(self.run, self.z, v), []
        for place in self.held.stops:
            without = _Forwards(self.run, self.objective, frozenset({place}))(self.run, self.z, v)
            if stopped is None or without is None or differ(stopped, without):
                found.append(place)
        return found


def trained(run: Run, z: PyTree, segment: Segment) -> PyTree:
    """The final state of a run at other metaparameters, which it sees from its window on."""
    given = replace(run.given, z=wrapped(z))
    moved = replace(run, given=given, state=run.state if run.begin else run.training.initial(z))
    state, before, after = moved.state, run.runner(segment), moved.runner(segment)
    for i in range(-before.before, 0):
        state = before.advance(i, state).state
    for i in range(len(after)):
        state = after.advance(i, state).state
    return state


@contextmanager
def twin(run: Run, objective: Objective, z: PyTree, found: Evaluation, window: int | None) -> Iterator[Twin]:
    """The twin of a run, in whose precision the context is.

    Arguments:
        run, objective, z, window: the run at z, and as in `check`.
        found: the run's own metagradient, whose segment and schedule the twin takes.

    Errors: `NoTwinError` where a function of the run insists on float32.
    """
    held, problem = Held.of(run, objective, z), None
    for x64 in (True, False):
        with doubles_beside_single_draws(x64=x64):
            try:
                made = _doubled(run.training, objective, z, found, window)
                if not made.held.bits <= held.bits:
                    raise TypeError("random numbers are drawn past the functions of jax.random, in other bits")
            except (TypeError, ValueError, MetagradientError) as error:
                problem = problem or error
                continue
            with full_precision(run.training.allow_low_precision):
                yield made
            return
    text = f"the run has no float64 twin, so nothing was compared: {str(problem).rstrip('.')}"
    if not isinstance(problem, (NonFiniteError, ReplayMismatch)):
        text += ". Its functions must follow the dtypes of their arguments: x.dtype, not jnp.float32"
    raise NoTwinError(text) from problem


def _doubled(training: Training, objective: Objective, z: PyTree, found: Evaluation, window: int | None) -> Twin:
    training, z, stats = _double(training), _to_float64(z), found.stats
    options: dict[str, Any] = {"schedule": stats.schedule, "segment": stats.segment, "window": window}
    gradient = value_and_metagrad(training, objective, **options)(z)[1]
    for path, leaf in paths(gradient):
        if leaf.dtype != jnp.float64:
            raise TypeError(f"the gradient of z{path} came out in {leaf.dtype}")
    run = Run.prepared(training, z, window, retrace=False)
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
    step = training.step
    step = replace(step, loss=_fresh(step.loss)) if isinstance(step, LossStep) else _fresh(step)
    args = _to_float64(training.args)
    return replace(training, init=init, step=step, batches=_DoubleBatches(training.batches), args=args)


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """Another function that does the same, so that its programs aren't shared, and go with it."""

    @wraps(function)
    def called(*arguments: Any) -> Any:
        return function(*arguments)

    return called
