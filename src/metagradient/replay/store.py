"""Stores for boundary states, one a tier. Copies and files are made in the background, while the device computes."""

import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from metagradient.errors import StoreError
from metagradient.trees import PyTree, is_key, nbytes

# Saves under way hold on to their device arrays: more than a few would undo what a tier is for.
_SAVES_UNDER_WAY = 2


class Store(Protocol):
    """Where states of one tier are kept, by boundary number."""

    def save(self, at: int, state: PyTree) -> None:
        """Keep `state` for boundary `at`."""
        ...

    def prefetch(self, at: int) -> None:
        """Start to bring boundary `at` closer: it will be restored next."""
        ...

    def restore(self, at: int) -> PyTree:
        """The state of boundary `at`, on its devices."""
        ...

    def drop(self, at: int) -> None:
        """Free boundary `at`."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class DeviceStore:
    """States stay where they are: a save holds a reference, and costs nothing but the memory."""

    def __init__(self) -> None:
        self._states: dict[int, PyTree] = {}

    def save(self, at: int, state: PyTree) -> None:
        """Keep `state` for boundary `at`."""
        self._states[at] = state

    def prefetch(self, at: int) -> None:
        """Nothing to do."""

    def restore(self, at: int) -> PyTree:
        """The state of boundary `at`."""
        return self._states[at]

    def drop(self, at: int) -> None:
        """Let go of boundary `at`."""
        del self._states[at]

    def close(self) -> None:
        """Let go of all states."""
        self._states.clear()


class HostStore:
    """States are copied to host memory (pinned, where the device has it), and back to where they came from."""

    def __init__(self) -> None:
        self._background = _Background()
        self._states: dict[int, Future[PyTree]] = {}

    def save(self, at: int, state: PyTree) -> None:
        """Copy `state` to the host for boundary `at`, in the background."""
        self._states[at] = self._background.save(lambda: jax.tree.map(_Leaf.on_host, state))

    def prefetch(self, at: int) -> None:
        """Nothing to do: a transfer to the device doesn't wait for the device."""

    def restore(self, at: int) -> PyTree:
        """The state of boundary `at`, on its devices."""
        return _placed(self._states[at].result())

    def drop(self, at: int) -> None:
        """Free boundary `at`."""
        del self._states[at]

    def close(self) -> None:
        """Free all states."""
        self._background.close()
        self._states.clear()


class DiskStore:
    """States go to safetensors files with checksums, in a folder of their own that is removed at the end.

    Arguments:
        folder: where that folder is made; None takes the system's temporary folder.

    Errors: `StoreError` where a file can't be written or read, or its content isn't what was saved.
    """

    def __init__(self, folder: Path | None):
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
            self.folder = Path(tempfile.mkdtemp(prefix="metagradient-states-", dir=folder))
        except OSError as error:
            raise StoreError(f"states can't be stored under {folder}: {error}") from error
        self._background = _Background()
        self._saves: dict[int, Future[PyTree]] = {}
        self._reads: dict[int, Future[PyTree]] = {}

    def save(self, at: int, state: PyTree) -> None:
        """Write `state` for boundary `at`, in the background."""
        self._saves[at] = self._background.save(lambda: self._write(at, jax.tree.map(_Leaf.on_host, state)))

    def prefetch(self, at: int) -> None:
        """Start to read boundary `at` into host memory."""
        if at not in self._reads:
            self._reads[at] = self._background.submit(lambda: self._read(at))

    def restore(self, at: int) -> PyTree:
        """The state of boundary `at`, on its devices."""
        self.prefetch(at)
        return _placed(self._reads.pop(at).result())

    def drop(self, at: int) -> None:
        """Remove the file of boundary `at`."""
        self._reads.pop(at, None)
        self._saves.pop(at).result()
        self._file(at).unlink(missing_ok=True)

    def close(self) -> None:
        """Remove all files."""
        self._background.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, at: int) -> Path:
        return self.folder / f"{at}.safetensors"

    def _write(self, at: int, state: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(state)
        arrays = {str(i): np.ascontiguousarray(leaf.data).reshape(-1).view(np.uint8) for i, leaf in enumerate(leaves)}
        checksums = {name: str(zlib.crc32(array.data)) for name, array in arrays.items()}
        partial = self._file(at).with_suffix(".partial")
        try:
            save_file(arrays, partial, metadata=checksums)
            partial.replace(self._file(at))
        except (OSError, SafetensorError) as error:
            raise StoreError(f"the state at boundary {at} can't be written to {self.folder}: {error}") from error
        return jax.tree.unflatten(treedef, [leaf.emptied() for leaf in leaves])

    def _read(self, at: int) -> PyTree:
        leaves, treedef = jax.tree.flatten(self._saves[at].result())
        file = self._file(at)
        try:
            with safe_open(file, framework="numpy") as stored:
                checksums = stored.metadata() or {}
                arrays = [stored.get_tensor(str(i)) for i in range(len(leaves))]
        except (OSError, SafetensorError) as error:
            raise StoreError(f"the state at boundary {at} can't be read from {file}: {error}") from error
        for i, array in enumerate(arrays):
            if checksums.get(str(i)) != str(zlib.crc32(array.data)):
                raise StoreError(f"{file} was changed on disk: leaf {i} fails its checksum")
        return jax.tree.unflatten(treedef, [leaf.filled(a) for leaf, a in zip(leaves, arrays, strict=True)])


class Stores:
    """All tiers together, and how full they got.

    Peaks count boundary states and bytes held by a tier; on the device with what segments were kept for their
    pull-back, without the working states.

    Arguments:
        folder: where a disk tier puts its files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._make: dict[str, Callable[[], Store]] = {
            "device": DeviceStore,
            "host": HostStore,
            "disk": lambda: DiskStore(folder),
        }
        self._tiers: dict[str, Store] = {}
        self._where: dict[int, tuple[str, int]] = {}
        self._held: dict[str, tuple[int, int]] = {}
        self.peak_states: dict[str, int] = {}
        self.peak_bytes: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for store in self._tiers.values():
            store.close()

    def save(self, at: int, state: PyTree, tier: str) -> None:
        """Keep `state` for boundary `at` in a tier."""
        if tier not in self._tiers:
            self._tiers[tier] = self._make[tier]()
        self._tiers[tier].save(at, state)
        self._where[at] = tier, nbytes(state)
        self._count(tier, 1, nbytes(state))

    def prefetch(self, at: int) -> None:
        """Boundary `at` will be restored next, if it is stored."""
        if at in self._where:
            self._tiers[self._where[at][0]].prefetch(at)

    def restore(self, at: int) -> PyTree:
        """The state of boundary `at`."""
        return self._tiers[self._where[at][0]].restore(at)

    def drop(self, at: int) -> None:
        """Free boundary `at`."""
        tier, size = self._where.pop(at)
        self._tiers[tier].drop(at)
        self._count(tier, -1, -size)

    def kept(self, size: int) -> None:
        """Count a kept segment on the device; a negative size, its end."""
        self._count("device", 0, size)

    def _count(self, tier: str, states: int, size: int) -> None:
        held, full = self._held.get(tier, (0, 0))
        self._held[tier] = held + states, full + size
        if states > 0:
            self.peak_states[tier] = max(self.peak_states.get(tier, 0), held + states)
        self.peak_bytes[tier] = max(self.peak_bytes.get(tier, 0), full + size)


class _Background:
    """One thread that copies and writes, in order."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "metagradient-store")
        self._saves: deque[Future[Any]] = deque()

    def submit(self, work: Callable[[], PyTree]) -> Future[PyTree]:
        return self._pool.submit(work)

    def save(self, work: Callable[[], PyTree]) -> Future[PyTree]:
        if len(self._saves) >= _SAVES_UNDER_WAY:
            self._saves.popleft().result()
        self._saves.append(self._pool.submit(work))
        return self._saves[-1]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._saves.clear()


@dataclass(frozen=True)
class _Leaf:
    """A leaf off its device, with what it takes to put it back."""

    data: Any
    dtype: Any
    shape: tuple[int, ...]
    sharding: Any
    key_impl: Any

    @classmethod
    def on_host(cls, x: jax.Array) -> Self:
        impl = jax.random.key_impl(x) if is_key(x) else None
        # An array that no one placed must come back unplaced, or every program would be compiled a second time.
        sharding = x.sharding if x.committed else None
        raw = jax.random.key_data(x) if impl else x
        pinned = _pinned(raw)
        # np.asarray of a CPU array is a view of its buffer; a copy outlives it.
        data = jax.device_put(raw, pinned).block_until_ready() if pinned else np.array(raw)
        return cls(data, raw.dtype, raw.shape, sharding, impl)

    def emptied(self) -> "_Leaf":
        return _Leaf(None, self.dtype, self.shape, self.sharding, self.key_impl)

    def filled(self, data: np.ndarray) -> "_Leaf":
        return _Leaf(data.view(self.dtype).reshape(self.shape), self.dtype, self.shape, self.sharding, self.key_impl)

    def placed(self) -> jax.Array:
        data = jax.random.wrap_key_data(self.data, impl=self.key_impl) if self.key_impl else self.data
        return jax.device_put(data, self.sharding)


def _pinned(x: jax.Array) -> Any:
    """Sharding of `x` in pinned host memory, or None where its devices have none of their own."""
    device = next(iter(x.devices()))
    kinds = {memory.kind for memory in device.addressable_memories()}
    separate = device.platform != "cpu" and "pinned_host" in kinds
    return x.sharding.with_memory_kind("pinned_host") if separate else None


def _placed(state: PyTree) -> PyTree:
    return jax.tree.map(_Leaf.placed, state, is_leaf=lambda x: isinstance(x, _Leaf))
