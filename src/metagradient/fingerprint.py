"""Fingerprints of trees: hashes of bits, by which a replay is compared with the first run."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metagradient.trees import PyTree, is_floating, is_key


def _bits(x: jax.Array) -> jax.Array:
    if is_key(x) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    size = x.dtype.itemsize
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
        size //= 2
    if size < 4:
        return lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}[size]).astype(jnp.uint32)
    return lax.bitcast_convert_type(x, jnp.uint32)


def _hash(x: jax.Array) -> jax.Array:
    bits = _bits(x)
    position = jnp.zeros((), jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        # Positions from one iota an axis, not from a flattened copy: a sharded leaf stays where it is.
        position = position + lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    odd = (position * np.uint32(0x9E3779B1) + np.uint32(0x85EBCA77)) | np.uint32(1)
    mixed = (bits ^ (bits >> 15)) * np.uint32(0x2C1B3C6D) + odd
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0x297A2D39)
    return jnp.stack([jnp.sum(bits * odd, dtype=jnp.uint32), jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)])


def fingerprint(tree: PyTree) -> tuple[jax.Array, jax.Array]:
    """Hash of every leaf, uint32[leaves, 2], and whether it is finite, bool[leaves].

    Cost: one pass over the tree on its device. Sums of integers: the same on any number of devices.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros((0, 2), jnp.uint32), jnp.ones(0, bool)
    return jnp.stack([_hash(x) for x in leaves]), finite(tree)


def finite(tree: PyTree) -> jax.Array:
    """Which leaves are finite, bool[leaves]."""
    found = [jnp.isfinite(x).all() if is_floating(x) else jnp.ones((), bool) for x in jax.tree.leaves(tree)]
    return jnp.stack(found) if found else jnp.ones(0, bool)
