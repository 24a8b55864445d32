"""Stores for boundary states, one a tier."""

from typing import Any, Protocol

import jax
import numpy as np

from metagradient.trees import PyTree, is_key, nbytes


class Store(Protocol):
    """Where states of one tier are kept, by boundary number."""

    def save(self, at: int, state: PyTree) -> None:
        """Keep `state` for boundary `at`."""
        ...

    def restore(self, at: int) -> PyTree:
        """The state of boundary `at`, on its devices."""
        ...

    def drop(self, at: int) -> None:
        """Free boundary `at`."""
        ...


class DeviceStore:
    """States stay where they are: a save holds a reference, and costs nothing but the memory."""

    def __init__(self) -> None:
        self._states: dict[int, PyTree] = {}

    def save(self, at: int, state: PyTree) -> None:
        """Keep `state` for boundary `at`."""
        self._states[at] = state

    def restore(self, at: int) -> PyTree:
        """The state of boundary `at`."""
        return self._states[at]

    def drop(self, at: int) -> None:
        """Let go of boundary `at`."""
        del self._states[at]


class HostStore:
    """States are copied to host memory, and back onto the devices and sharding that they came from."""

    def __init__(self) -> None:
        self._states: dict[int, PyTree] = {}

    def save(self, at: int, state: PyTree) -> None:
        """Copy `state` to the host for boundary `at`."""
        self._states[at] = jax.tree.map(_down, state)

    def restore(self, at: int) -> PyTree:
        """The state of boundary `at`, on its devices."""
        return jax.tree.map(_up, self._states[at], is_leaf=lambda x: isinstance(x, _OnHost))

    def drop(self, at: int) -> None:
        """Free boundary `at`."""
        del self._states[at]


class _OnHost:
    """A leaf on the host, with what it takes to put it back."""

    def __init__(self, x: jax.Array):
        self.impl = jax.random.key_impl(x) if is_key(x) else None
        # An array that no one placed must come back unplaced, or every program would be compiled a second time.
        self.sharding = x.sharding if x.committed else None
        # np.asarray of a CPU array is a view of its buffer; a copy outlives it.
        self.data = np.array(jax.random.key_data(x) if self.impl else x)


def _down(x: jax.Array) -> _OnHost:
    return _OnHost(x)


def _up(x: Any) -> jax.Array:
    if x.impl is None:
        return jax.device_put(x.data, x.sharding)
    return jax.device_put(jax.random.wrap_key_data(x.data, impl=x.impl), x.sharding)


_STORES = {"device": DeviceStore, "host": HostStore}


class Stores:
    """All tiers together, and how full they got.

    Peaks count boundary states and bytes held by a tier, without the states of the segment at work.
    """

    def __init__(self) -> None:
        self._tiers: dict[str, Store] = {}
        self._where: dict[int, tuple[str, int]] = {}
        self._held: dict[str, tuple[int, int]] = {}
        self.peak_states: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}

    def save(self, at: int, state: PyTree, tier: str) -> None:
        """Keep `state` for boundary `at` in a tier."""
        self._tiers.setdefault(tier, _STORES[tier]()).save(at, state)
        self._where[at] = tier, nbytes(state)
        self._count(tier, 1, nbytes(state))

    def restore(self, at: int) -> PyTree:
        """The state of boundary `at`."""
        return self._tiers[self._where[at][0]].restore(at)

    def drop(self, at: int) -> None:
        """Free boundary `at`."""
        tier, size = self._where.pop(at)
        self._tiers[tier].drop(at)
        self._count(tier, -1, -size)

    def _count(self, tier: str, states: int, size: int) -> None:
        held, full = self._held.get(tier, (0, 0))
        self._held[tier] = held + states, full + size
        self.peak_states[tier] = max(self.peak_states.get(tier, 0), held + states)
        self.peak_bytes[tier] = max(self.peak_bytes.get(tier, 0), full + size)
