"""Updates of metaparameters, and projections: each against its formula."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import metagradient as mg
from metagradient.descent.updates import unit_rms
from metagradient.errors import ConfigError, StructureError

pytestmark = pytest.mark.core

u = mg.updates


def moved(update: optax.GradientTransformation, z: Any, *grads: Any) -> Any:
    """z after a meta-step for each metagradient."""
    memory = update.init(z)
    for grad in grads:
        changes, memory = update.update(grad, memory, z)
        z = optax.apply_updates(z, changes)
    return z


def array(*values: float) -> jax.Array:
    return jnp.asarray(values, jnp.float32)


def test_normalised_update_is_its_formula():
    update = u.normalised(0.5, momentum=0.8)
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


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_normalising_neither_overflows_nor_underflows(size: float):
    change: Any
    change, _ = u.normalise().update(array(3 * size, -4 * size, 0, 0), optax.EmptyState())
    np.testing.assert_allclose(change, [1.2, -1.6, 0, 0], rtol=1e-6)


def test_normalising_an_empty_leaf_is_harmless():
    assert unit_rms(jnp.zeros((0, 3))).shape == (0, 3)


def test_sign_moves_every_entry_as_far():
    assert moved(u.sign(0.25), array(1, 1, 1), array(3, -0.1, 0)).tolist() == [0.75, 1.25, 1]


def test_an_optax_optimiser_is_an_update():
    z = {"a": mg.PerStep(jnp.ones(3)), "b": jnp.ones(())}
    ones = jax.tree.map(jnp.ones_like, z)
    after = moved(optax.adam(0.1), z, ones)
    np.testing.assert_allclose(after["a"].value, 0.9, rtol=1e-5)


def test_block_coordinate_moves_whole_blocks_with_probability_p():
    update = u.block_coordinate(0.3, seed=1)
    z: Any = {
        "pixels": mg.PerExample(jnp.zeros((2000, 2, 3)), rows=np.arange(2000)[::-1]),
        "rates": mg.PerStep(jnp.zeros((2000, 2))),
        "shared": jnp.zeros((50, 40)),
    }
    ones = jax.tree.map(jnp.ones_like, z)
    memory = update.init(z)
    first: Any
    second: Any
    first, memory = update.update(ones, memory, z)
    second, _ = update.update(ones, memory, z)
    for change in (first, second):
        assert jax.tree.structure(change) == jax.tree.structure(z)
        for name in ("pixels", "rates"):
            blocks = np.asarray(change[name].value).reshape(2000, -1)
            assert (blocks == blocks[:, :1]).all()
        for leaf in jax.tree.leaves(change):
            assert set(np.unique(leaf)) == {0, 1}
            assert 0.25 < float(leaf.mean()) < 0.35
        assert (change["pixels"].value[:, 0, 0] != change["rates"].value[:, 0]).any()
    assert (first["shared"] != second["shared"]).any()


def test_block_coordinate_draws_the_same_for_a_seed_and_others_for_another():
    z = jnp.zeros(100)
    one, again, other = (moved(u.block_coordinate(0.5, seed), z, jnp.ones(100)) for seed in (0, 0, 1))
    assert (one == again).all()
    assert (one != other).any()


def test_counts_are_algorithm_1():
    c = mg.PerExample(array(0, 1, 2, 3, 0))
    g = mg.PerExample(array(0.5, 0.1, -7, 0, -1e-9))
    assert moved(u.counts(1.0), c, g).value.tolist() == [0, 0, 3, 3, 1]


def test_counts_change_only_where_the_mask_is_one():
    c, g = jnp.ones(4000), jnp.where(jnp.arange(4000) % 2 == 0, 1.0, -1.0)
    after = np.asarray(moved(u.counts(0.2, seed=3), c, g))
    assert set(np.unique(after[::2])) == {0, 1}
    assert set(np.unique(after[1::2])) == {1, 2}
    assert 0.17 < np.mean(after != 1) < 0.23


@given(
    c=hnp.arrays(np.float32, 8, elements=st.integers(0, 3).map(float)),
    g=hnp.arrays(np.float32, 8, elements=st.integers(-3, 3).map(float)),
    n=st.sampled_from([1, 3, 10]),
)
@settings(max_examples=30, deadline=None)
def test_exchange_keeps_the_total_and_never_makes_the_selection_worse(c: np.ndarray, g: np.ndarray, n: int):
    after = np.asarray(moved(u.exchange(n), jnp.asarray(c), jnp.asarray(g)))
    assert after.sum() == c.sum()
    assert after.min() >= 0
    assert np.abs(after - c).max() <= 1
    assert (after == np.round(after)).all()
    assert (after > c).sum() <= n
    gained, lost = g[after > c], g[after < c]
    if len(gained):
        assert gained.max() < lost.min()
        # First choices: nobody left out was lower than one who gained, or higher than one who lost.
        assert gained.max() <= np.sort(g)[: len(gained)].max()
        assert lost.min() >= np.sort(g[c > 0])[::-1][: len(lost)].min()


def test_exchange_breaks_ties_by_number_and_moves_nothing_without_a_reason():
    assert moved(u.exchange(1), array(1, 1, 1, 1), array(0, 0, 1, 1)).tolist() == [2, 1, 0, 1]
    assert moved(u.exchange(2), array(1, 1, 1), array(5, 5, 5)).tolist() == [1, 1, 1]
    assert moved(u.exchange(1), array(0, 0), array(-1, 1)).tolist() == [0, 0]


def test_exchange_works_leaf_by_leaf():
    z = {"a": mg.PerExample(array(1, 1)), "b": array(0, 2)}
    after = moved(u.exchange(1), z, {"a": mg.PerExample(array(3, -3)), "b": array(-9, 9)})
    assert after["a"].value.tolist() == [0, 2]
    assert after["b"].tolist() == [1, 1]


@pytest.mark.parametrize("update", [u.counts(0.5), u.exchange(1)])
@pytest.mark.parametrize("bad", [(0.5, 1.0), (-1.0, 1.0)])
def test_counts_must_be_counts(update: optax.GradientTransformation, bad: tuple[float, float]):
    with pytest.raises(StructureError, match="z\\['c'\\] must hold counts"):
        update.init({"c": array(*bad)})


def test_pixel_ascent_climbs_inside_the_ball_and_the_box():
    originals = mg.PerExample(array(0.5, 0.5, 0.02, 0.97))
    update = u.pixel_ascent(0.1, originals, radius=0.15)
    grad = mg.PerExample(array(1, 0, -1, 1))
    once, twice = moved(update, originals, grad), moved(update, originals, grad, grad)
    np.testing.assert_allclose(once.value, [0.6, 0.5, 0, 1], atol=1e-7)
    np.testing.assert_allclose(twice.value, [0.65, 0.5, 0, 1], atol=1e-7)


def test_projections_are_exact_and_leave_what_is_inside():
    z = {"a": mg.PerExample(array(-1, 0.2, 2)), "b": array(0.5)}
    boxed = u.box(0, 1)(z)
    assert boxed["a"].value.tolist() == array(0, 0.2, 1).tolist()
    assert boxed["b"].tolist() == [0.5]
    bounds = {"a": mg.PerExample(array(0, 0.3, 0)), "b": array(0)}
    assert u.box(bounds, 1)(z)["a"].value.tolist() == array(0, 0.3, 1).tolist()
    near = u.ball({"a": mg.PerExample(array(0, 0, 1.9)), "b": array(0.4)}, 0.1, low=0, high=2)(z)
    np.testing.assert_array_equal(near["a"].value, array(0, 0.1, 2))
    assert u.ball(z, low=0, high=1)(z)["a"].value.tolist() == array(0, 0.2, 1).tolist()


def test_simplex_is_the_nearest_point_leaf_by_leaf():
    z = {"a": array(0.8, 0.6, -1), "b": mg.PerExample(array(5, 5))}
    after = u.simplex(2.0)(z)
    np.testing.assert_allclose(after["a"], [1.1, 0.9, 0], rtol=1e-6)
    np.testing.assert_allclose(after["b"].value, [1, 1], rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: u.counts(0.0),
        lambda: u.block_coordinate(1.5),
        lambda: u.exchange(0),
        lambda: u.ball(jnp.zeros(2), -1.0),
        lambda: u.simplex(0.0),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ConfigError):
        make()
