"""Fingerprints: any change of any bit shows, however the array is spread over devices."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from problems import assert_same, mlp, with_optimiser
from quick import quickly

import metagradient as mg
from metagradient.fingerprint import fingerprint
from metagradient.schedule import KaryTree

pytestmark = pytest.mark.core

NUMBERS = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8, np.uint16, np.int32, np.int64]
SHAPES = [(), (5,), (3, 4)]

numbers = st.sampled_from(NUMBERS)
seeds = st.integers(0, 2**32 - 1)
positions = st.integers(0, 10**6)
light = settings(deadline=None, max_examples=60)


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


def arbitrary_bits(dtype, shape, seed):
    """Any bits, those of NaNs and of subnormal numbers too."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


def of(*leaves):
    return np.asarray(fingerprint([jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in leaves])[0])


def differ(a, b):
    return np.any(a != b, axis=1).tolist()


@light
@given(numbers, st.sampled_from(SHAPES), seeds, positions)
def test_a_flipped_bit(dtype, shape, seed, position):
    x = arbitrary_bits(dtype, shape, seed)
    flipped = x.copy().reshape(-1)
    flipped.view(np.uint8)[position // 8 % x.nbytes] ^= np.uint8(1 << position % 8)
    assert differ(of(x), of(flipped.reshape(shape))) == [True]
    assert differ(of(x), of(x.copy())) == [False]


@light
@given(numbers, seeds, st.permutations(range(12)))
def test_a_permutation(dtype, seed, order):
    x = arbitrary_bits(dtype, (3, 4), seed)
    moved = x.reshape(-1)[np.array(order)].reshape(3, 4)
    assume(moved.tobytes() != x.tobytes())
    assert differ(of(x), of(moved)) == [True]


@light
@given(
    st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31)]), st.sampled_from([2, 3, 2**16, 2**30]), st.permutations(range(12))
)
def test_a_swap_of_two_values_in_an_array_of_few(value, other, order):
    """Values that differ in one high bit are where sums of products with odd numbers are weakest."""
    x = np.full(12, value, np.int32)
    x[order[0]] = other
    moved = np.full(12, value, np.int32)
    moved[order[1]] = other
    assert differ(of(x.reshape(3, 4)), of(moved.reshape(3, 4))) == [True]


@pytest.mark.parametrize("where", range(6))
def test_booleans(where):
    x = np.array([True, False, True, True, False, False])
    flipped = x.copy()
    flipped[where] ^= True
    assert differ(of(x), of(flipped)) == [True]


@light
@given(seeds, st.integers(0, 127))
def test_keys(seed, position):
    data = arbitrary_bits(np.uint32, (2, 2), seed)
    flipped = data.copy()
    flipped.reshape(-1)[position // 32] ^= np.uint32(1 << position % 32)
    a, b = (of(jax.random.wrap_key_data(jnp.asarray(d))) for d in (data, flipped))
    assert differ(a, b) == [True]


def test_zero_has_two_signs():
    assert differ(of(np.zeros(3)), of(np.array([0.0, -0.0, 0.0]))) == [True]


def test_the_leaf_that_differs_is_told():
    leaves = [arbitrary_bits(np.float32, (5,), seed) for seed in range(3)]
    other = arbitrary_bits(np.float32, (5,), 9)
    assert differ(of(*leaves), of(leaves[0], other, leaves[2])) == [False, True, False]
    assert differ(of(*leaves), of(leaves[1], leaves[0], leaves[2])) == [True, True, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_leaf_that_is_not_finite_is_told(bad):
    finite = fingerprint([jnp.ones(3), jnp.asarray([1.0, bad]), jnp.arange(3), jax.random.key(0)])[1]
    assert finite.tolist() == [True, False, True, True]


def on_four_devices():
    """Called in a process of its own, which has four devices."""
    with quickly():
        _on_four_devices()


def _on_four_devices():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert mesh.size == 4

    def spread(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    for dtype in NUMBERS:
        x = arbitrary_bits(dtype, (8, 12), 0)
        for axes in ((), ("data",), (None, "data")):
            assert differ(of(spread(x, *axes)), of(x)) == [False], (dtype, axes)
    keys = jax.random.split(jax.random.key(0), 4)
    assert differ(of(spread(keys, "data")), of(keys)) == [False]

    problem = with_optimiser("driven")
    alone = mg.value_and_metagrad(problem.training(), problem.objective, segment=mg.Segment(1, "steps", "state"))(
        problem.z
    )
    batches = [{k: spread(v, "data") for k, v in batch.items()} for batch in problem.batches]
    divided = {**mlp(), "w1": spread(mlp()["w1"], "data")}
    for init, segment in ((problem.init, mg.Segment(4)), (divided, mg.Segment(1, "steps", "state"))):
        training = replace(problem, batches=batches, init=init).training()
        together = mg.value_and_metagrad(training, problem.objective, schedule=KaryTree(2, "host"), segment=segment)
        found = together.evaluate(problem.z)
        assert_same((found.value, found.grad), alone)
        assert found.state.params["w1"].sharding.num_devices == 4
        assert together.with_stats(problem.z)[2].compile_seconds == 0


def test_on_several_devices():
    code = "import jax; jax.config.update('jax_enable_x64', True); import test_fingerprint as t; t.on_four_devices()"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=Path(__file__).parent,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
