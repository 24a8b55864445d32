"""Reading batches: every one is held to the first one's structure, and to the index range of z."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from metagradient._jax import Tracer
from metagradient.errors import BatchError
from metagradient.metaparameters import check_concrete
from metagradient.shown import Words, brief
from metagradient.step.programs import signature
from metagradient.trees import PyTree, is_key, mismatch, paths

_REMEDY = "take list(...) of it where it fits in memory, else a grain.MapDataset or a class with both methods"


class Batches(Protocol):
    """A random-access sequence of batches: the same pytree of arrays at every read of the same step."""

    def __len__(self) -> int: ...

    def __getitem__(self, t: int, /) -> PyTree: ...


def check_source(batches: Any) -> None:
    """Raise `BatchError` unless `batches` is a random-access sequence: `len(batches)` steps, `batches[t]` at step t."""
    if batches is None or isinstance(batches, (str, bytes)):
        raise BatchError(f"batches is {batches!r}: give a sequence of pytrees of arrays, one for each step")
    if isinstance(batches, dict):
        raise BatchError(
            "batches is a dictionary: give a sequence of dictionaries, one for each step. Of stacked arrays make one "
            "by [{name: x[t] for name, x in stacked.items()} for t in range(steps)]"
        )
    if hasattr(batches, "shape"):
        raise BatchError("batches is an array: give a sequence of pytrees of arrays, [{'x': x} for x in array]")
    missing = [name for name in ("__len__", "__getitem__") if not hasattr(type(batches), name)]
    if missing:
        raise BatchError(
            f"batches is a {type(batches).__name__} without {' and '.join(missing)}, but replays read it again in any "
            f"order: {_REMEDY}"
        )


def shown_batches(batches: Any) -> Words:
    """A source of batches in words; none is read that isn't in memory."""
    listed = isinstance(batches, list | tuple) and batches
    of = f"of {brief(batches[0])}" if listed else f"in a {type(batches).__name__}"
    return Words(f"{len(batches)} {of}" if hasattr(batches, "__len__") else of)


def array(x: Any) -> Any:
    """A leaf of a batch as the array that it is, or that numpy makes of it."""
    return x if isinstance(x, jax.Array | Tracer) or isinstance(getattr(x, "dtype", None), np.dtype) else np.asarray(x)


def check_leaves(name: str, batch: PyTree) -> None:
    """Raise `BatchError` for a batch with a leaf that a compiled program can't take."""
    if batch is None:
        raise BatchError(f"{name} is None: give a pytree of arrays, {{}} for a step that reads none")
    for path, leaf in paths(batch):
        # Of kind V are records, and numbers that numpy doesn't know.
        if not is_key(leaf) and (leaf.dtype.kind in "OUSMm" or not _is_number(leaf)):
            raise BatchError(
                f"{name}{path} is {leaf.dtype}: a batch holds numbers. Encode strings, dates and objects as numbers, "
                "and pad what is ragged"
            )


def _is_number(x: Any) -> bool:
    return x.dtype.kind != "V" or jnp.issubdtype(x.dtype, jnp.number)


def _copy(x: Any) -> Any:
    # A source may hand out one buffer again and again; a copy is what this step saw.
    return x if isinstance(x, jax.Array) else np.array(x)


@dataclass(frozen=True, eq=False)
class Feed:
    """The batches of a run, checked as they are read.

    Arguments:
        batches: random-access sequence of pytrees of arrays.
        indexed: whether each needs an `"index"`, as z has `PerExample` or `PerGroup` leaves.
        bound: what ids lie below, or None.
    """

    batches: Any
    indexed: bool = False
    bound: int | None = None

    def __len__(self) -> int:
        return len(self.batches)

    @cached_property
    def first(self) -> PyTree:
        """The first batch, to which all others are held."""
        first = self._read(0)
        check_concrete("batches[0]", first)
        first = jax.tree.map(_copy, first)
        check_leaves("batches[0]", first)
        if self.indexed:
            self._check_lengths(first)
        return first

    @cached_property
    def _signature(self) -> tuple:
        return signature(self.first)

    def check(self, *, whole: bool) -> None:
        """Raise `BatchError` for an empty, uneven or changing source, or a bad index, before compute is spent.

        Arguments:
            whole: read a sequence in memory (list or tuple) from end to end. Of any other only the first batch is
                read, twice, and the last; the rest is checked as it is used.
        """
        if not len(self):
            raise BatchError("batches is empty (T = 0): there is no step to differentiate")
        in_memory = whole and isinstance(self.batches, (list, tuple))
        for t in range(len(self)) if in_memory else {0, len(self) - 1}:
            self._checked(t)
        for a, b in zip(jax.tree.leaves(self.first), jax.tree.leaves(self._read(0)), strict=True):
            a, b = (jax.random.key_data(x) if is_key(x) else x for x in (a, b))
            if np.asarray(a).tobytes() != np.asarray(b).tobytes():
                raise BatchError(
                    "batches[0] differs between two reads: a batch must be a pure function of its step "
                    "(draw augmentation from a key made of the step number)"
                )

    def __getitem__(self, t: int) -> PyTree:
        """Batch of step t, copied, after all checks."""
        return jax.tree.map(_copy, self._checked(t))

    def segment(self, start: int, length: int) -> PyTree:
        """Batches of steps start, start + 1, ..., stacked along a new first axis."""
        leaves, treedef = jax.tree.flatten(self.first)
        stacked = [[] if isinstance(x, jax.Array) else np.empty((length, *x.shape), x.dtype) for x in leaves]
        for i in range(length):
            for into, x in zip(stacked, jax.tree.leaves(self._checked(start + i)), strict=True):
                if isinstance(into, list):
                    into.append(x)
                else:
                    into[i] = x
        return jax.tree.unflatten(treedef, [jnp.stack(x) if isinstance(x, list) else x for x in stacked])

    def _checked(self, t: int) -> PyTree:
        batch = self._read(t)
        if signature(batch) != self._signature:
            raise BatchError(
                f"batches[{t}] is not like batches[0]: {mismatch(self.first, batch)}. "
                "All batches need the same shapes: drop or pad the last"
            )
        if self.indexed:
            self._check_index(t, batch["index"])
        return batch

    def _read(self, t: int) -> PyTree:
        batch = jax.tree.map(array, self.batches[t])
        if self.indexed and not (isinstance(batch, dict) and "index" in batch):
            raise BatchError(
                f'z has PerExample or PerGroup leaves, but batches[{t}] has no "index": add the ids of its examples as '
                "int[batch]"
            )
        return batch

    def _check_index(self, t: int, index: Any) -> None:
        ids = np.asarray(index)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise BatchError(f'batches[{t}]["index"] must be a vector of integers, got {ids.dtype}{list(ids.shape)}')
        low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
        if low < 0 or (self.bound is not None and high >= self.bound):
            raise BatchError(
                f'batches[{t}]["index"] holds {low if low < 0 else high}, outside [0, {self.bound}), the examples '
                "that z covers (PerExample, PerGroup)"
            )

    @staticmethod
    def _check_lengths(batch: PyTree) -> None:
        index, lengths = batch["index"], [x.shape[0] for name, x in batch.items() if name != "index" and _has_axis(x)]
        if _has_axis(index) and len(lengths) > 1 and set(lengths) == {max(lengths)} and index.shape[0] < lengths[0]:
            raise BatchError(
                f'batches[0]["index"] has {index.shape[0]} ids, but the batch holds {lengths[0]} examples: every '
                "example needs its id"
            )


def _has_axis(x: Any) -> bool:
    return getattr(x, "ndim", 0) > 0
