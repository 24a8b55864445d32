"""Fingerprints of trees: hashes of bits, by which a replay is compared with the first run."""

import hashlib

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


@jax.jit
def _hash(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hash of a leaf, uint32[2], and whether it is finite.

    A function of its own in every program that hashes: traced once for a shape.
    """
    finite = jnp.isfinite(x) if is_floating(x) else None
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
    parts = [bits * odd, mixed ^ (mixed >> 16)]
    if finite is not None:
        # Wide numbers have two words of bits, or more.
        words = finite.reshape(*finite.shape, *[1] * (bits.ndim - finite.ndim))
        parts.append(jnp.broadcast_to(words, bits.shape).astype(jnp.uint32))
    # One reduction of all: XLA walks the leaf once. Three would store what they share, and take nine times as long on a
    # CPU.
    first, second, *whole = lax.reduce(
        parts,
        [np.uint32(0), np.uint32(0), np.uint32(1)][: len(parts)],
        lambda a, b: [a[0] + b[0], a[1] + b[1], *(x & y for x, y in zip(a[2:], b[2:], strict=True))],
        tuple(range(bits.ndim)),
    )
    return jnp.stack([first, second]), whole[0].astype(bool) if whole else jnp.ones((), bool)


def fingerprint(tree: PyTree) -> tuple[jax.Array, jax.Array]:
    """Hash of every leaf, uint32[leaves, 2], and whether it is finite, bool[leaves].

    Cost: one pass over the tree on its device. Sums of integers: the same on any number of devices.
    """
    found = [_hash(x) for x in jax.tree.leaves(tree)]
    if not found:
        return jnp.zeros((0, 2), jnp.uint32), jnp.ones(0, bool)
    hashes, finite = zip(*found, strict=True)
    return jnp.stack(hashes), jnp.stack(finite)


def host_fingerprint(tree: PyTree) -> np.ndarray:
    """Hash of every leaf of a tree of NumPy arrays, uint32[leaves, 2], by BLAKE2b: no program, and off the device."""

    def one(x: np.ndarray) -> np.ndarray:
        # As bytes without a copy, whatever the dtype.
        raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        return np.frombuffer(hashlib.blake2b(raw.data, digest_size=8).digest(), np.uint32)

    return np.array([one(x) for x in jax.tree.leaves(tree)], np.uint32).reshape(-1, 2)


def finite(tree: PyTree) -> jax.Array:
    """Which leaves are finite, bool[leaves]."""
    found = [jnp.isfinite(x).all() if is_floating(x) else jnp.ones((), bool) for x in jax.tree.leaves(tree)]
    return jnp.stack(found) if found else jnp.ones(0, bool)


def finite_on_host(x: jax.Array | np.ndarray) -> bool:
    """Whether one leaf is finite, by NumPy."""
    return not is_floating(x) or bool(np.isfinite(np.asarray(x)).all())
