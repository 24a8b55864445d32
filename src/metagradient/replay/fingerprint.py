"""Fingerprints of states and batches: that a replay is the first run again, bit for bit, is checked, not hoped for."""

from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metagradient.errors import ReplayMismatch
from metagradient.trees import PyTree, is_floating, is_key, paths

_PENDING = 4


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


@jax.jit
def fingerprint(tree: PyTree) -> tuple[jax.Array, jax.Array]:
    """Hash of every leaf, uint32[leaves, 2], and whether it is finite, bool[leaves].

    Cost: one pass over the tree on its device. Sums of integers: the same on any number of devices.
    """
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros((0, 2), jnp.uint32), jnp.ones(0, bool)
    finite = [jnp.isfinite(x).all() if is_floating(x) else jnp.ones((), bool) for x in leaves]
    return jnp.stack([_hash(x) for x in leaves]), jnp.stack(finite)


class NotFinite(Exception):
    """Inside the engine only: something not finite went by; a careful pass finds out where."""


class Watch:
    """Remembers what the first run passed through, and compares every replay with it.

    Comparisons lag a few programs behind, so that the device never waits for them.

    Arguments:
        on: whether to compare; non-finite values are looked for in any case.
    """

    def __init__(self, on: bool):
        self.on = on
        self._first: dict[tuple[str, int], jax.Array] = {}
        self._pending: deque[tuple[Any, ...]] = deque()

    def state(self, step: int, state: PyTree, *, wait: bool = True) -> None:
        """The state before `step` was reached, for the first time or again.

        Arguments:
            wait: let the device run only a few states ahead; not needed where they are all kept.
        """
        self._see("state", step, state)
        if wait:
            self._settle(_PENDING)

    def batches(self, step: int, batches: PyTree) -> None:
        """The batches of a segment that starts at `step` were read."""
        if self.on:
            self._see("batch", step, batches)
            self._settle(_PENDING)

    def cotangent(self, step: int, finite: jax.Array) -> None:
        """The cotangent of the state before `step` was found."""
        self._pending.append(("cotangent", step, None, None, None, finite))
        self._settle(_PENDING)

    def settle(self) -> None:
        """Make all comparisons that are still open."""
        self._settle(0)

    def _see(self, what: str, step: int, tree: PyTree) -> None:
        found, finite = fingerprint(tree)
        expected = self._first.setdefault((what, step), found) if self.on else found
        # The structure alone, for names: the state itself must not be held back.
        structure = jax.tree.structure(tree) if expected is not found else None
        self._pending.append((what, step, structure, expected, found, finite))

    def _settle(self, most: int) -> None:
        while len(self._pending) > most:
            what, step, structure, expected, found, finite = self._pending.popleft()
            if structure is not None and not np.array_equal(expected, found):
                which = np.flatnonzero(np.any(np.asarray(expected) != np.asarray(found), axis=1))
                leaf = paths(jax.tree.unflatten(structure, range(structure.num_leaves)))[which[0]][0]
                raise ReplayMismatch(_explain(what, step, leaf))
            if what != "batch" and not np.all(finite):
                raise NotFinite


def _explain(what: str, step: int, leaf: str) -> str:
    if what == "batch":
        return (
            f"the batches from step {step} on changed between two reads (leaf {leaf}): batches[t] must be the same at "
            "every call"
        )
    return (
        f"replay reached another state before step {step} than the first run (leaf {leaf} differs). The step or its "
        "batches draw on something outside (state, batch, z_t): fresh randomness, a callback, a changed global; on a "
        "GPU, also nondeterministic kernels (set XLA_FLAGS=--xla_gpu_deterministic_ops=true)"
    )
