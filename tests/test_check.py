"""`check` passes what is right, and says what is wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagradient as mg

pytestmark = pytest.mark.core

T = 6
Z = {"rate": mg.PerStep(jnp.full(T, 0.3)), "pull": jnp.asarray(0.2)}
X = np.random.default_rng(0).normal(size=(T, 5)).astype(np.float32)
BATCHES = [{"x": x} for x in X]


def step(state: jax.Array, batch: dict, z: dict) -> jax.Array:
    return state - z["rate"] * jnp.tanh(state - batch["x"] + z["pull"])


def objective(state: jax.Array, z: dict) -> jax.Array:
    return jnp.mean(state**2)


def test_a_good_run_passes_and_the_report_is_readable_and_plain_data():
    report = mg.check(mg.Training(jnp.ones(5), step, BATCHES), objective, Z)
    assert report.ok
    assert all(d.relative_error < 1e-8 for d in report.directions)
    assert "FAIL" not in str(report)
    assert "z['rate']" in str(report)
    assert json.loads(report.to_json())["ok"] is True


def test_a_wrong_derivative_is_found():
    @jax.custom_jvp
    def wrong(x: jax.Array) -> jax.Array:
        return jnp.tanh(x)

    wrong.defjvp(lambda x, t: (jnp.tanh(x[0]), 1.01 * t[0] / jnp.cosh(x[0]) ** 2))

    def tampered(state: jax.Array, batch: dict, z: dict) -> jax.Array:
        return state - z["rate"] * wrong(state - batch["x"] + z["pull"])

    report = mg.check(mg.Training(jnp.ones(5), tampered, BATCHES), objective, Z)
    assert not report.ok
    assert not report.differences_agree
    assert "FAIL" in str(report)


def test_a_step_with_fresh_randomness_is_reported():
    def noisy(state: jax.Array, batch: dict, z: dict) -> jax.Array:
        return step(state, batch, z) + np.random.default_rng().normal()

    report = mg.check(mg.Training(jnp.ones(5), noisy, BATCHES), objective, Z)
    assert not report.replays
    assert not report.ok
    assert report.error


def test_a_kink_is_blamed_on_the_run():
    def tied(state: jax.Array, batch: dict, z: dict) -> jax.Array:
        # Two equal entries: the maximum has no derivative in a direction that parts them.
        return state + jnp.max(z["a"]) * jnp.ones_like(state)

    report = mg.check(mg.Training(jnp.ones(2), tied, BATCHES), objective, {"a": jnp.ones(2)})
    assert not report.differences_agree
    assert "kink or tie" in " ".join(str(report).split())


def test_bad_input_is_an_error_not_a_report():
    with pytest.raises(mg.errors.StructureError):
        mg.check(mg.Training(jnp.ones(5), step, BATCHES), objective, {**Z, "rate": mg.PerStep(jnp.ones(T + 1))})
