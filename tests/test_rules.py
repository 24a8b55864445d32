"""Losses that hold derivative rules of somebody's own: exact wherever the rule sits, whatever it says."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from equinox.internal import while_loop
from problems import (
    EXAMPLES,
    OPTIMISERS,
    STEPS,
    Problem,
    assert_same,
    batches,
    cross_entropy,
    every_kind,
    held_out,
    logits,
    mlp,
    reference,
    ridge,
    rows,
)
from quick import crossed, slow_but

import metagradient as mg
from metagradient.errors import DerivativeError
from metagradient.given import slices
from metagradient.metaparameters import canonical, wrapped
from metagradient.models.losses import chunked_cross_entropy
from metagradient.step import from_loss
from metagradient.step.segment import Segment
from metagradient.trees import floating

pytestmark = pytest.mark.core
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


# Rules that aren't the derivative of their value: the identity on the way forward, something else on the way back.


@jax.custom_vjp
def reversal(x):
    return x


reversal.defvjp(lambda x: (x, None), lambda _, g: (-0.7 * g,))


@jax.custom_vjp
def clipped(x):
    """JAX's own example of a rule: the cotangent is clipped, which bites in some steps only."""
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -3e-3, 3e-3),))


@jax.custom_vjp
def by_value(x):
    """A rule that reads the value."""
    return jnp.tanh(x)


by_value.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g * jnp.exp(-(x**2)),))


@jax.custom_jvp
def stretched(x):
    return jnp.tanh(x)


stretched.defjvp(lambda x, t: (jnp.tanh(x[0]), t[0] * jnp.sqrt(1 + x[0] ** 2)))


@jax.custom_jvp
def twisted(x):
    """Its tangent is no function's: an entry's derivative depends on its neighbour."""
    return jnp.tanh(x)


twisted.defjvp(lambda x, t: (jnp.tanh(x[0]), t[0] * jnp.sqrt(1 + jnp.roll(x[0], 1, -1) ** 2)))


def half_transposed(x):
    """Linear, with a transpose that isn't its own."""
    return jax.custom_derivatives.linear_call(lambda _, x: 0.9 * x, lambda _, g: 0.45 * g, (), x)


def scaled(x):
    return optax.scale_gradient(x, 0.3)


RULES: dict[str, Any] = {
    "reversal": reversal, "clipped": clipped, "by_value": by_value, "stretched": stretched, "twisted": twisted,
    "half_transposed": half_transposed, "scaled": scaled,
}  # fmt: skip


def in_scan(rule):
    return lambda x: jax.lax.scan(lambda c, _: (rule(c), None), x, None, length=2)[0]


def in_cond(rule):
    return lambda x: jax.lax.cond(jnp.sum(x) > -1e9, rule, lambda x: x, x)


PLACES: dict[str, Any] = {
    "plain": lambda rule: rule,
    "scan": in_scan,
    "cond": in_cond,
    "checkpoint": jax.checkpoint,
    "jit": jax.jit,
    "vmap": jax.vmap,
    "scan of checkpoint of jit": lambda rule: in_scan(jax.checkpoint(jax.jit(rule))),
}


def with_rule(rule, **changes: Any) -> Problem:
    """Digits, with the rule on the hidden layer: on the way from the loss to w1, not to w2."""

    def losses(params, batch, z):
        hidden = rule(jnp.tanh(batch["x"] @ params["w1"]))
        scores = (hidden @ params["w2"] + params["b2"]) * z["temperature"]
        return cross_entropy(scores, batch["y"]) * z["weights"] + z["ridge"] * ridge(params)

    def loss(params, batch, z):
        return jnp.mean(losses(params, batch, z))

    return Problem(**{"loss": loss, "optimizer": OPTIMISERS["momentum"], **changes})


def assert_exact(problem: Problem, **options: Any) -> None:
    value, grad = mg.value_and_metagrad(problem.training(), problem.objective, **options)(problem.z)
    expected_value, expected = reference(problem)
    assert_same(value, expected_value)
    assert_same(grad, expected)


@pytest.mark.parametrize(("rule", "place"), crossed(list(RULES), list(PLACES)))
def test_the_adjoint_of_a_step_is_exact_wherever_a_rule_sits(rule, place):
    if (rule, place) == ("half_transposed", "vmap"):
        pytest.skip("JAX has no batching rule for linear_call")
    problem = with_rule(PLACES[place](RULES[rule]))
    training = problem.training()
    state, batch = training.initial(problem.z), problem.batches[0]
    z_t = slices(wrapped(canonical(problem.z)), jnp.int32(3), batch["index"])
    values, rebuild = floating(state)

    def advanced(values, z):
        return floating(training.rule.advance(rebuild(values), batch, z)[0])[0]

    rng = np.random.default_rng(0)
    cotangent = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in values)
    expected = jit(lambda v, z, c: jax.vjp(advanced, v, z)[1](c))(values, z_t, cotangent)
    found = jit(lambda s, z, c: training.rule.pull_back(s, (), batch, z)(c)[:2])(state, z_t, cotangent)
    assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_with_a_rule_is_exact(rule):
    assert_exact(with_rule(RULES[rule], batches=batches(5), z=short()), segment=1)


def short() -> dict[str, Any]:
    z = every_kind()
    return {**z, "temperature": mg.PerStep(z["temperature"].value[:5])}


COMPILED = [
    Segment(4, "scan", "state"),
    Segment(4, "scan", "gradient"),
    Segment(3, "unroll"),
    Segment(2, "steps", "state"),
]


@pytest.mark.parametrize(("segment", "microbatches"), crossed(COMPILED, [1, 2]), ids=str)
def test_a_rule_is_exact_however_steps_are_compiled(segment, microbatches):
    assert_exact(with_rule(clipped, microbatches=microbatches), segment=segment, schedule=mg.schedule.TwoLevel())


def test_a_rule_under_an_optimiser_that_keeps_moments():
    assert_exact(with_rule(clipped, optimizer=OPTIMISERS["adam"]))


def test_a_rule_before_a_model_state():
    def loss(params, seen, batch, z):
        hidden = reversal(jnp.tanh(batch["x"] @ params["w1"]))
        scores = hidden @ params["w2"] + params["b2"]
        return jnp.mean(cross_entropy(scores, batch["y"]) * z["weights"]), 0.9 * seen + jnp.mean(hidden, axis=0)

    def objective(state, z):
        return held_out(state, z) + jnp.sum(state.model_state**2)

    z = {"weights": every_kind()["weights"]}
    init = (mlp(), np.zeros(6))
    assert_exact(Problem(loss, OPTIMISERS["momentum"], init, z=z, objective=objective, has_model_state=True))


def test_many_queries_through_a_rule():
    problem = with_rule(reversal)

    def losses(state, z):
        data = rows(100, 103)
        return cross_entropy(logits(state.params, data["x"]), data["y"])

    grad = mg.value_and_metagrad(problem.training(), losses, vector=True)(problem.z)[1]
    for query in range(3):
        alone = replace(problem, objective=lambda state, z, query=query: losses(state, z)[query])
        assert_same(jax.tree.map(lambda x, query=query: x[query], grad), reference(alone)[1])


def test_two_numbers_by_hand():
    """Loss x R(y), R a reversal by -0.7: two SGD steps at rate 0.1 from (1, 2)."""
    training = mg.Training.from_loss(
        lambda p, batch, z: p[0] * reversal(p[1]), lambda z: optax.sgd(z), jnp.array([1.0, 2.0]), [{}, {}]
    )
    grad = mg.value_and_metagrad(training, lambda state, z: state.params[0])(jnp.asarray(0.1))[1]
    assert float(grad) == pytest.approx(-2 * 2 - 1.4 * 0.1 * 1, abs=1e-12)


def test_a_rule_on_the_parameters_alone_still_reaches_z():
    """sum(z R(p)) has no Hessian in the parameters, and its metagradient is all in z."""
    training = mg.Training.from_loss(
        lambda p, batch, z: jnp.sum(z["scale"] * reversal(p)), optax.sgd(0.1), jnp.array([1.0, 2.0]), [{}] * 3
    )
    z = {"scale": jnp.array([0.5, 0.25])}
    grad = mg.value_and_metagrad(training, lambda state, z: jnp.sum(state.params**2))(z)[1]
    # Every step moves by +0.07 z.
    np.testing.assert_allclose(grad["scale"], 2 * (np.array([1, 2]) + 0.21 * z["scale"]) * 0.21, rtol=1e-12)


# What is symmetric stays two-stage: JAX's own rules, and rules marked as true derivatives.


@pytest.fixture
def never_reversed(monkeypatch):
    def refuse(*_: Any) -> Any:
        raise AssertionError("differentiated in reverse over reverse")

    monkeypatch.setattr(from_loss, "reversed_gradient", refuse)


@jax.custom_vjp
def softplus(x):
    return jnp.logaddexp(x, 0)


softplus.defvjp(lambda x: (jnp.logaddexp(x, 0), x), lambda x, g: (g * jax.nn.sigmoid(x),))


@pytest.mark.parametrize("place", ["plain", "vmap", "scan of checkpoint of jit"])
def test_a_marked_rule_keeps_two_stages(place, never_reversed):
    assert_exact(with_rule(PLACES[place](mg.true_derivative(softplus)), batches=batches(5), z=short()), segment=1)


def test_rules_of_jax_keep_two_stages(never_reversed):
    def rule(x):
        root = jnp.linalg.solve(jnp.eye(6) * 3 + jnp.ones((6, 6)), x.T).T
        return jax.nn.silu(jax.nn.relu(x) + jax.nn.gelu(root) + jax.scipy.special.xlogy(x**2, x**2 + 1))

    assert_exact(with_rule(rule, batches=batches(5), z=short()), segment=1)


def test_an_unmarked_rule_does_not(monkeypatch):
    called = []
    whole = from_loss.reversed_gradient
    monkeypatch.setattr(from_loss, "reversed_gradient", lambda *a: called.append(a) or whole(*a))
    assert_exact(with_rule(softplus, batches=batches(5), z=short()), segment=1)
    assert called


# What can't be differentiated in reverse over reverse, but forward over reverse: equinox's bounded while loop.


def looped(rule):
    def apply(x):
        def body(carry):
            i, x = carry
            return i + 1, rule(x)

        return while_loop(lambda carry: carry[0] < 3, body, (0, x), kind="checkpointed", max_steps=4)[1]

    return apply


def test_a_checkpointed_while_loop():
    problem = with_rule(looped(lambda x: jnp.tanh(x) + 0.3 * x), batches=batches(5), z=short())
    grad = mg.value_and_metagrad(problem.training(), problem.objective, segment=1)(problem.z)[1]
    plain = with_rule(lambda x: _thrice(x), batches=batches(5), z=short())
    assert_same(grad, reference(plain)[1])


def _thrice(x):
    for _ in range(3):
        x = jnp.tanh(x) + 0.3 * x
    return x


def test_a_wrong_rule_within_such_a_loop_is_an_error():
    problem = with_rule(looped(lambda x: x + twisted(x)), batches=batches(5), z=short())
    with pytest.raises(DerivativeError, match="asymmetric"):
        mg.value_and_metagrad(problem.training(), problem.objective, segment=1)(problem.z)


def test_a_gradient_that_cannot_be_differentiated_at_all():
    @jax.custom_vjp
    def callback(x):
        return x

    def backward(_, g):
        return (jax.pure_callback(lambda g: np.asarray(g), jax.ShapeDtypeStruct(g.shape, g.dtype), g),)

    callback.defvjp(lambda x: (x, None), backward)
    problem = with_rule(callback)
    with pytest.raises(DerivativeError, match="can't be differentiated"):
        mg.value_and_metagrad(problem.training(), problem.objective)(problem.z)


def test_linearisations_are_refused_with_a_rule():
    problem = with_rule(reversal)
    with pytest.raises(mg.errors.StructureError, match="rule of its own"):
        mg.value_and_metagrad(problem.training(), problem.objective, segment=Segment(1, "steps", "linearisation"))(
            problem.z
        )


# Stopped gradients give what jax.grad of the loop gives.


def test_stopped_gradients_are_those_of_the_loop():
    assert_exact(with_rule(lambda x: x + 0.5 * jax.lax.stop_gradient(jnp.sin(3 * x))))


# Candidates' losses of a count surrogate.


@pytest.mark.parametrize("rule", slow_but([twisted], [reversal, by_value, twisted]), ids=lambda f: f.__name__)
def test_candidates_losses_with_a_rule(rule):
    data = rows(0, EXAMPLES)

    def losses(params, model_state, batch):
        hidden = rule(jnp.tanh(batch["x"] @ params["w1"]))
        return cross_entropy(hidden @ params["w2"] + params["b2"], batch["y"])

    def loss(params, batch, z):
        return jnp.mean(losses(params, None, batch))

    steps = batches(STEPS)
    training = mg.Training.from_loss(loss, optax.sgd(0.3), mlp(), steps)
    pool = [{**data, "index": np.arange(EXAMPLES)}]
    surrogate = mg.CountSurrogate(lambda counts: training, pool, losses, at=4)
    found = surrogate.evaluate(held_out, {"c": mg.PerExample(np.ones(EXAMPLES))})[0].grad["c"].value

    def unrolled(z):
        params = jax.tree.map(jnp.asarray, mlp())
        for t, batch in enumerate(steps):

            def total(p, t=t, batch=batch):
                extra = jnp.vdot(z, losses(p, None, data)) if t == 4 else 0.0
                return loss(p, batch, None) + extra

            params = jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(total)(params))
        return held_out(mg.TrainState(params, None, None, jnp.int32(0)), None)

    assert_same(found, jax.grad(unrolled)(jnp.zeros(EXAMPLES)))


def test_the_library_s_own_rule_keeps_two_stages(never_reversed):
    def loss(params, batch, z):
        hidden = jnp.tanh(batch["x"] @ params["w1"])
        losses = chunked_cross_entropy(hidden, params["w2"].T, batch["y"], z["weights"], chunk=4)
        return jnp.mean(losses)

    init = {name: x for name, x in mlp().items() if name != "b2"}

    def objective(state, z):
        return held_out(mg.TrainState({**state.params, "b2": 0.0}, None, None, state.step), z)

    z = {"weights": every_kind()["weights"]}
    assert_exact(Problem(loss, init=init, z=z, objective=objective))
