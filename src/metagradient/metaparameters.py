"""How a metaparameter reaches a step, and how its cotangent comes back.

Every leaf of `z` is of one kind. A step sees a slice of it, and its cotangent has the size of that slice: a step
costs its batch, however many examples or steps `z` covers.
"""

from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from metagradient.errors import StructureError
from metagradient.layout import placed, rows_spread, spread
from metagradient.trees import PyTree, is_floating, strong


@dataclass(frozen=True)
class _Kind:
    value: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _listed(self.value, type(self).__name__))

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Any]:
        return ((jax.tree_util.GetAttrKey("value"), self.value),), None

    @classmethod
    def tree_unflatten(cls, aux: Any, children: tuple[Any]) -> Self:
        # The value may be anything here (None, shapes, a pair of what it was mapped to): no checks.
        del aux
        self = object.__new__(cls)
        object.__setattr__(self, "value", children[0])
        return self


def _listed(value: Any, kind: str) -> Any:
    """A value as it is, or the array that a list of numbers makes."""
    if not isinstance(value, list | tuple):
        return value
    try:
        traced = any(isinstance(x, jax.Array) for x in jax.tree.leaves(value))
        array = jnp.asarray(value) if traced else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise StructureError(f"{kind} takes one array of numbers, not {value!r:.80}: {error}") from error
    if array.dtype.kind in "OUSMm":
        raise StructureError(f"{kind} takes one array of numbers, not {value!r:.80}")
    return array


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class Shared(_Kind):
    """A metaparameter that every step sees whole: a weight decay, another network's parameters.

    A bare array in `z` means the same.

    Arguments:
        value: floating array of any shape.

    Cost: its cotangent is summed over all steps in its own shape.
    """


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class PerStep(_Kind):
    """One entry a training step: step `t` sees `value[t]`. Learning rates, momenta.

    Arguments:
        value: floating array `[T, ...]`, T the number of training steps.

    Errors: `StructureError` where the length is not T.

    Cost: a step's cotangent has the size of one entry.
    """


class _Rows:
    """Example ids as static pytree data: compared by content, hashed once."""

    def __init__(self, ids: Any):
        self.ids = np.array(ids)
        if self.ids.ndim != 1 or not np.issubdtype(self.ids.dtype, np.integer):
            raise StructureError(f"PerExample rows must be a vector of integers, got {self.ids.dtype}{self.ids.shape}")
        self.order = np.argsort(self.ids, kind="stable")
        self.sorted = self.ids[self.order]
        if self.ids.size and (self.sorted[0] < 0 or np.any(np.diff(self.sorted) == 0)):
            raise StructureError("PerExample rows must be distinct and not negative")
        self.ids.setflags(write=False)
        self._hash = hash(self.ids.tobytes())

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Rows) and np.array_equal(self.ids, other.ids))


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, init=False)
class PerExample(_Kind):
    """One entry a training example: a step sees the rows of its `batch["index"]`. Data weights, pixels.

    Arguments:
        value: floating array `[n, ...]`, n the number of examples (or of `rows`).
        rows: ids of the examples covered, where `z` covers only some (poisoned images, say): distinct integers
            `[n]`, entry j of `value` belongs to example `rows[j]`. A step sees zeros for every other example.

    Errors: `StructureError` for repeated or negative rows; `BatchError` where a batch has no `"index"`, or one
    outside `[0, n)`.

    Cost: a step's cotangent has the size of its batch, and is added to the total in place.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> mg.PerExample(jnp.zeros((2, 8, 8)), rows=[7, 3]).value.shape
    (2, 8, 8)
    """

    _rows: _Rows | None = None

    def __init__(self, value: Any, rows: Any = None):
        value = _listed(value, "PerExample")
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "_rows", rows if rows is None or isinstance(rows, _Rows) else _Rows(rows))
        if self._rows is not None and hasattr(value, "shape") and value.shape[:1] != self._rows.ids.shape:
            raise StructureError(
                f"PerExample value has shape {value.shape}, expected {self._rows.ids.size} rows, one for each of `rows`"
            )

    @property
    def rows(self) -> np.ndarray | None:
        """Ids of the examples covered, int[n]; None where every example is."""
        return None if self._rows is None else self._rows.ids

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Any]:
        """The value is the only leaf; rows belong to the structure."""
        return ((jax.tree_util.GetAttrKey("value"), self.value),), self._rows

    @classmethod
    def tree_unflatten(cls, aux: Any, children: tuple[Any]) -> Self:
        """Inverse of `tree_flatten_with_keys`."""
        # The structure may hold anything (a tree of None, of shapes, of vmapped axes): no checks here.
        self = object.__new__(cls)
        object.__setattr__(self, "value", children[0])
        object.__setattr__(self, "_rows", aux)
        return self

    def slots(self, index: jax.Array) -> jax.Array:
        """Position in `value` of every example id; past the end where the id isn't covered."""
        if self._rows is None:
            return index
        if not self._rows.ids.size:
            return jnp.zeros_like(index)
        at = jnp.searchsorted(jnp.asarray(self._rows.sorted), index)
        at = jnp.minimum(at, self._rows.ids.size - 1)
        found = jnp.asarray(self._rows.sorted)[at] == index
        return jnp.where(found, jnp.asarray(self._rows.order)[at], self._rows.ids.size)


def is_kind(x: Any) -> bool:
    """Whether `x` is one of `Shared`, `PerStep`, `PerExample`."""
    return isinstance(x, _Kind)


def canonical(z: PyTree) -> PyTree:
    """`z` with strongly typed jax arrays; raises `StructureError` for a leaf that is not floating."""

    def convert(path: Any, leaf: Any) -> jax.Array:
        name = f"z{jax.tree_util.keystr(path)}"
        try:
            leaf = strong(leaf)
        except (TypeError, ValueError, OverflowError) as error:
            raise StructureError(
                f"{name} is not an array: {str(error).rstrip('.')}. A metaparameter is a floating array; keep names, "
                "functions and other settings outside z"
            ) from error
        if not is_floating(leaf):
            raise StructureError(f"{name} is {leaf.dtype}: a metaparameter must be floating to have a gradient")
        return leaf

    z = jax.tree.map_with_path(convert, z)
    for path, kind in jax.tree.flatten_with_path(z, is_leaf=is_kind)[0]:
        if is_kind(kind) and not isinstance(kind.value, jax.Array):
            raise StructureError(
                f"z{jax.tree_util.keystr(path)} is {type(kind).__name__} of a {type(kind.value).__name__}, expected "
                "one array: give every array a kind of its own"
            )
        if isinstance(kind, PerExample) and not kind.value.ndim:
            raise StructureError(f"z{jax.tree_util.keystr(path)} is PerExample, but has no axis of examples")
    return z


def wrapped(z: PyTree) -> PyTree:
    """`z` with bare arrays wrapped as `Shared`: the form that the engine works on."""
    return jax.tree.map(lambda x: x if is_kind(x) else Shared(x), z, is_leaf=is_kind)


def like(z: PyTree, tree: PyTree) -> PyTree:
    """A wrapped `tree` in the structure that the user gave `z`."""
    return jax.tree.map(lambda x, k: k if is_kind(x) else k.value, z, tree, is_leaf=is_kind)


def bare(z: PyTree) -> PyTree:
    """`z` without its kinds: what a user's step or loss sees."""
    return jax.tree.map(lambda k: k.value if is_kind(k) else k, z, is_leaf=is_kind)


def needs_index(z: PyTree) -> bool:
    """Whether any leaf is `PerExample`."""
    return any(isinstance(k, PerExample) for k in jax.tree.leaves(z, is_leaf=is_kind))


def index_bound(z: PyTree) -> int | None:
    """Least number of examples among the `PerExample` leaves that cover all of them."""
    kinds = jax.tree.leaves(z, is_leaf=is_kind)
    return min((k.value.shape[0] for k in kinds if isinstance(k, PerExample) and k.rows is None), default=None)


def check_steps(z: PyTree, steps: int) -> None:
    """Raise `StructureError` unless every `PerStep` leaf of a wrapped z has one entry a step."""
    for path, kind in jax.tree.flatten_with_path(z, is_leaf=is_kind)[0]:
        if isinstance(kind, PerStep) and kind.value.shape[:1] != (steps,):
            raise StructureError(
                f"z{jax.tree_util.keystr(path)} is PerStep with shape {list(kind.value.shape)}, but the run takes "
                f"T = {steps} steps"
            )


def slices(z: PyTree, t: jax.Array, index: jax.Array | None) -> PyTree:
    """What steps `t` see of a wrapped `z`, still wrapped.

    Arguments:
        z: wrapped metaparameters.
        t: int[...], step numbers.
        index: int[..., batch], example ids of those steps; None where no leaf is `PerExample`.

    Returns: `Shared` whole; `PerStep` `[..., *entry]`; `PerExample` `[..., batch, *entry]`.
    """

    def take(kind: Any) -> Any:
        if isinstance(kind, PerStep):
            return PerStep(placed(lambda value, t: value[t], rows_spread(t, kind.value), kind.value, t))
        if isinstance(kind, PerExample):
            assert index is not None

            def rows(value: jax.Array, index: jax.Array) -> jax.Array:
                return value.at[kind.slots(index)].get(mode="fill", fill_value=0)

            return PerExample(placed(rows, rows_spread(index, kind.value), kind.value, index))
        return kind

    return jax.tree.map(take, z, is_leaf=is_kind)


def accumulate(total: PyTree, cotangent: PyTree, t: jax.Array, index: jax.Array | None) -> PyTree:
    """Add the cotangents of `slices(z, t, index)` to `total`, which has the shape of `z`.

    `Shared` cotangents are already summed over the steps. An example that a batch holds twice is added twice.
    """

    def put(kind: Any, ct: Any) -> Any:
        if isinstance(kind, PerStep):
            return PerStep(placed(lambda x, t, ct: x.at[t].add(ct), spread(kind.value), kind.value, t, ct.value))
        if isinstance(kind, PerExample):
            assert index is not None

            def added(value: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
                return value.at[kind.slots(index)].add(rows, mode="drop")

            value = placed(added, spread(kind.value), kind.value, index, ct.value)
            return jax.tree.unflatten(jax.tree.structure(kind), [value])
        return Shared(kind.value + ct.value)

    return jax.tree.map(put, total, cotangent, is_leaf=is_kind)
