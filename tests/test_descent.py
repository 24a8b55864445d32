"""Metagradient descent: the loop, its seeds and its updates."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagradient as mg
from metagradient.descent.loop import fresh_seed, inner_seed


def training(seed: int = 0) -> mg.Training:
    start = 1 + np.random.default_rng(seed).random(3, np.float32)
    return mg.Training(jnp.asarray(start), lambda s, b, z: s - z["rate"] * s, [{}] * 4)


def objective(state: jax.Array, z: dict) -> jax.Array:
    return jnp.sum(state**2)


def test_descent_lowers_the_objective_and_reports_what_it_did():
    records = list(
        mg.descend(
            training(),
            objective,
            {"rate": mg.PerStep(jnp.full(4, 0.1))},
            mg.updates.normalised(0.05),
            5,
            held_out=lambda s, z: jnp.abs(s).max(),
        )
    )
    assert [r.step for r in records] == list(range(5))
    assert all(b.value < a.value for a, b in pairwise(records))
    state = mg.train(training(), {"rate": mg.PerStep(jnp.full(4, 0.1))})
    assert records[0].held_out == pytest.approx(float(jnp.abs(state).max()))
    assert records[0].training_runs >= 4


def test_every_meta_step_draws_a_fresh_seed_and_the_descent_is_deterministic():
    def run() -> tuple[list[int], list[float]]:
        seen = []

        def fresh(seed: int) -> mg.Training:
            seen.append(seed)
            return training(seed)

        update = mg.updates.normalised(0.01, momentum=0.5)
        found = [r.value for r in mg.descend(fresh, objective, {"rate": jnp.float32(0.1)}, update, 4, seed=3)]
        return seen, found

    first, again = run(), run()
    assert first == again
    assert len(set(first[0])) == 4


def test_evaluation_seeds_are_never_drawn_inside():
    assert not {inner_seed(0, i) for i in range(2000)} & {fresh_seed(0, i) for i in range(2000)}


def test_projection_keeps_the_metaparameters_in_their_box():
    update, project = mg.updates.normalised(5.0), mg.updates.box(0.0, 0.3)
    records = list(mg.descend(training(), objective, {"rate": jnp.float32(0.1)}, update, 3, project=project))
    assert float(records[-1].z["rate"]) == pytest.approx(0.3)


def test_normalised_update_is_its_formula():
    update = mg.updates.normalised(0.5, momentum=0.8)
    z: Any = {"a": jnp.zeros(4), "b": jnp.zeros(2)}
    memory, m = update.init(z), np.zeros(4)
    rng = np.random.default_rng(0)
    for _ in range(3):
        g = rng.standard_normal(4).astype(np.float32)
        changes: Any
        changes, memory = update.update({"a": jnp.asarray(g), "b": jnp.zeros(2)}, memory, z)
        m = 0.8 * m + g / np.sqrt(np.mean(g**2))
        np.testing.assert_allclose(changes["a"], -0.5 * m / np.sqrt(np.mean(m**2)), rtol=1e-5)
        np.testing.assert_array_equal(changes["b"], 0)
