"""Models of flax, equinox and haiku, with batch norm and dropout, as their users write them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from problems import EXAMPLES, Problem, assert_same, batches, cross_entropy, reference, rows
from quick import slow_but

import metagradient as mg
from metagradient import _jax
from metagradient.step.segment import Segment

pytestmark = pytest.mark.core

STEPS, RATE = 6, 0.2
SEGMENT = Segment(1, "steps")


def problem(scores: Callable[..., Any], params: Any, model_state: Any) -> Problem:
    """Digits by a model.

    Arguments:
        scores: `(params, model_state, x, train) -> (scores, model_state)`.
    """

    def loss(params: Any, model_state: Any, batch: dict, z: dict) -> tuple[jax.Array, Any]:
        found, model_state = scores(params, model_state, batch["x"], True)
        return jnp.mean(z["weights"] * cross_entropy(found, batch["y"])), model_state

    def objective(state: Any, z: Any) -> jax.Array:
        del z
        data = rows(100, 120, np.float32)
        return jnp.mean(cross_entropy(scores(state.params, state.model_state, data["x"], False)[0], data["y"]))

    z = {
        "weights": mg.PerExample(np.ones(EXAMPLES, np.float32)),
        "lr": mg.PerStep(np.linspace(0.3, 0.1, STEPS, dtype=np.float32)),
    }
    return Problem(
        loss,
        lambda z: optax.sgd(z["lr"], momentum=0.9),
        (params, model_state),
        batches(STEPS, np.float32),
        z,
        objective,
        has_model_state=True,
    )


def flax_nnx() -> Problem:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.first, self.last = nnx.Linear(64, 8, rngs=rngs), nnx.Linear(8, 10, rngs=rngs)
            self.norm, self.dropout = nnx.BatchNorm(8, momentum=0.8, rngs=rngs), nnx.Dropout(RATE, rngs=rngs)

        def __call__(self, x: Any) -> jax.Array:
            return self.last(self.dropout(nnx.tanh(self.norm(self.first(x)))))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def scores(params: Any, rest: Any, x: Any, train: bool) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, rest, copy=True)
        model.train() if train else model.eval()
        found = model(x)
        return found, nnx.state(model, nnx.Not(nnx.Param))

    return problem(scores, params, rest)


def flax_linen() -> Problem:
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: Any, train: bool) -> jax.Array:
            x = linen.tanh(linen.BatchNorm(not train, momentum=0.8)(linen.Dense(8)(x)))
            return linen.Dense(10)(linen.Dropout(RATE, deterministic=not train)(x))

    net = Net()
    variables = net.init(jax.random.key(0), rows(0, 8, np.float32)["x"], False)

    def scores(params: Any, model_state: Any, x: Any, train: bool) -> tuple[jax.Array, Any]:
        statistics, key = model_state
        key, here = jax.random.split(key)
        found, updated = net.apply(
            {"params": params, "batch_stats": statistics}, x, train, rngs={"dropout": here}, mutable=["batch_stats"]
        )
        return found, (updated["batch_stats"], key)

    return problem(scores, variables["params"], (variables["batch_stats"], jax.random.key(3)))


def equinox() -> Problem:
    class Net(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        dropout: eqx.nn.Dropout
        last: eqx.nn.Linear

        def __init__(self, key: jax.Array):
            a, b = jax.random.split(key)
            self.first, self.last = eqx.nn.Linear(64, 8, key=a), eqx.nn.Linear(8, 10, key=b)
            self.norm, self.dropout = eqx.nn.BatchNorm(8, "batch", mode="batch", momentum=0.8), eqx.nn.Dropout(RATE)

        def __call__(self, x: Any, state: Any, key: Any) -> Any:
            x, state = self.norm(self.first(x), state)
            return self.last(self.dropout(jnp.tanh(x), key=key)), state

    model, state = eqx.nn.make_with_state(Net)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def scores(params: Any, model_state: Any, x: Any, train: bool) -> tuple[jax.Array, Any]:
        state, key = model_state
        key, here = jax.random.split(key)
        model = eqx.nn.inference_mode(eqx.combine(params, static), not train)
        keys = jax.random.split(here, len(x))
        found, state = jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(x, state, keys)
        return found, (state, key)

    return problem(scores, params, (state, jax.random.key(3)))


def haiku() -> Problem:
    def forward(x: Any, train: bool) -> jax.Array:
        x = jnp.tanh(hk.BatchNorm(True, True, decay_rate=0.8)(hk.Linear(8)(x), train))
        return hk.Linear(10)(hk.dropout(hk.next_rng_key(), RATE, x) if train else x)

    net = hk.transform_with_state(forward)
    params, state = net.init(jax.random.PRNGKey(0), rows(0, 8, np.float32)["x"], True)

    def scores(params: Any, model_state: Any, x: Any, train: bool) -> tuple[jax.Array, Any]:
        state, key = model_state
        key, here = jax.random.split(key)
        found, state = net.apply(params, state, here, x, train)
        return found, (state, key)

    return problem(scores, params, (state, jax.random.PRNGKey(3)))


FRAMEWORKS = {f.__name__: f for f in (flax_nnx, flax_linen, equinox, haiku)}


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    options = _jax._compiler_options(jax.default_backend()) or {}
    monkeypatch.setattr(_jax, "_compiler_options", lambda backend: {**options, "xla_backend_optimization_level": 0})


# What each does in a run is told by the other tests of it: all reports are slow to make.
@pytest.mark.parametrize("framework", slow_but(["equinox"], FRAMEWORKS))
def test_check_passes(framework):
    made = FRAMEWORKS[framework]()
    report = mg.check(made.training(), made.objective, made.z, segment=SEGMENT, directions=1)
    assert report.ok, str(report)
    assert report.directions[0].relative_error < 1e-8
    assert all(p["relative_difference"] < 1e-4 for p in report.precision.values())
    # nnx stops the gradients of batch norm's running statistics, which the objective reads: check says so.
    assert ["nnx/nn/normalization.py" in stop for stop in report.stops] == [True] * 2 * (framework == "flax_nnx")


def test_the_metagradient_is_that_of_the_plain_loop():
    with jax.enable_x64(True):
        made = in_float64(flax_nnx())
        value, grad = mg.value_and_metagrad(made.training(), made.objective, segment=SEGMENT)(made.z)
        expected_value, expected = reference(made)
        assert_same(value, expected_value)
        assert_same(grad, expected)


def in_float64(made: Problem) -> Problem:
    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    return replace(made, init=cast(made.init), batches=cast(made.batches), z=cast(made.z))
