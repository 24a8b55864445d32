"""How a metaparameter reaches a step, and how its cotangent comes back.

Every leaf of `z` is of one kind. A step sees a slice of it, and its cotangent has the size of that slice: a step
costs its batch, however many examples or steps `z` covers.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from metagradient._jax import Tracer
from metagradient.errors import DerivativeError, StructureError
from metagradient.shown import Shown, brief
from metagradient.trees import PyTree, is_floating, strong

ORDER = "arguments come in the order training, objective, z"
TRACED = (
    "To differentiate it, call jax.grad(lambda z: objective(mg.train(training, z, adjoint=mg.Replay()))): a gradient "
    "comes back through z alone, so what it should reach goes into z, not into args, init, batches or a closure. "
    "Around that call there can be no jax.jit, jax.vmap, jax.checkpoint or second jax.grad (several z: "
    "mg.train_many; several objectives: mg.value_and_metagrad(..., vector=True))"
)


@dataclass(frozen=True, repr=False)
class _Kind(Shown):
    value: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _listed(self.value, type(self).__name__))

    def __repr__(self) -> str:
        covers = "".join(
            f", {name}={brief(x)}" for name, x in self.shown().items() if name != "value" and x is not None
        )
        return f"{type(self).__name__}({brief(self.value)}{covers})"

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
@dataclass(frozen=True, repr=False)
class Shared(_Kind):
    """A metaparameter that every step sees whole: a weight decay, another network's parameters.

    A bare array in `z` means the same.

    Arguments:
        value: floating array of any shape.

    Cost: its cotangent is summed over all steps in its own shape.
    """


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, repr=False)
class PerStep(_Kind):
    """One entry a training step: step `t` sees `value[t]`. Learning rates, momenta.

    Arguments:
        value: floating array `[T, ...]`, T the number of training steps.

    Errors: `StructureError` where the length is not T.

    Cost: a step's cotangent has the size of one entry.
    """


class _Ids:
    """Integers as static pytree data: compared by content, hashed once."""

    def __init__(self, name: str, ids: Any):
        self.ids = np.array(ids)
        if self.ids.ndim != 1 or not np.issubdtype(self.ids.dtype, np.integer):
            raise StructureError(f"{name} must be a vector of integers, got {self.ids.dtype}{self.ids.shape}")
        self.ids.setflags(write=False)

    @cached_property
    def _hash(self) -> int:
        return hash(self.ids.tobytes())

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is type(self) and np.array_equal(self.ids, other.ids))


class _Rows(_Ids):
    """Ids of the examples that a `PerExample` leaf covers."""

    def __init__(self, ids: Any):
        super().__init__("PerExample rows", ids)
        self.order = np.argsort(self.ids, kind="stable")
        self.sorted = self.ids[self.order]
        if self.ids.size and (self.sorted[0] < 0 or np.any(np.diff(self.sorted) == 0)):
            raise StructureError("PerExample rows must be distinct and not negative")


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, init=False, repr=False)
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

    def shown(self) -> dict[str, Any]:
        """Its value, and the examples that it covers."""
        return {"value": self.value, "rows": self.rows}

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


class _Groups(_Ids):
    """The group of every example, on the device once."""

    def __init__(self, ids: Any):
        super().__init__("PerGroup groups", ids)
        if self.ids.min(initial=0) < 0:
            raise StructureError(f"PerGroup groups must not be negative: groups[{int(self.ids.argmin())}] is")
        self.bound = int(self.ids.max(initial=-1)) + 1

    @cached_property
    def device(self) -> jax.Array:
        return jnp.asarray(self.ids, jnp.int32)


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, init=False, repr=False)
class PerGroup(_Kind):
    """One entry a group of training examples: a step sees its examples' groups'. Mixtures, curricula.

    Arguments:
        value: floating array `[G]`, or `[T, G]` with one row a training step.
        groups: the group of every example: integers `[n]` in `[0, G)`; example i sees `value[groups[i]]`.

    A step sees an array `[batch]`, as of `PerExample`; the gradient is the sum of that over each group.

    Errors: `StructureError` for a value of another shape, or groups outside `[0, G)`; `BatchError` where a batch has no
    `"index"`, or one outside `[0, n)`.

    Cost: as `PerExample` a step, and G numbers (T G) in all. Groups take four bytes an example on the device, once.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> mg.PerGroup(jnp.ones(2), groups=[0, 0, 1]).value.shape
    (2,)
    """

    _groups: _Groups | None = None

    def __init__(self, value: Any, groups: Any):
        value = _listed(value, "PerGroup")
        object.__setattr__(self, "value", value)
        object.__setattr__(self, "_groups", groups if isinstance(groups, _Groups) else _Groups(groups))
        if hasattr(value, "shape"):
            self.check(value)

    def shown(self) -> dict[str, Any]:
        """Its value, and the examples' groups."""
        return {"value": self.value, "groups": self.groups}

    @property
    def groups(self) -> np.ndarray | None:
        """The group of every example, int[n]; None inside the engine, which holds them elsewhere."""
        return None if self._groups is None else self._groups.ids

    def check(self, value: Any) -> None:
        """Raise `StructureError` unless this is a value for these groups."""
        if len(value.shape) not in (1, 2):
            raise StructureError(f"PerGroup takes a value of shape [G], or [T, G], got {list(value.shape)}")
        if self._groups is not None and self._groups.bound > value.shape[-1]:
            raise StructureError(
                f"PerGroup groups hold {self._groups.bound - 1}, outside [0, {value.shape[-1]}): value has shape "
                f"{list(value.shape)}, one entry a group"
            )

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Any]:
        """The value is the only leaf; groups belong to the structure."""
        return ((jax.tree_util.GetAttrKey("value"), self.value),), self._groups

    @classmethod
    def tree_unflatten(cls, aux: Any, children: tuple[Any]) -> Self:
        """Inverse of `tree_flatten_with_keys`."""
        self = object.__new__(cls)
        object.__setattr__(self, "value", children[0])
        object.__setattr__(self, "_groups", aux)
        return self


def is_kind(x: Any) -> bool:
    """Whether `x` is one of `Shared`, `PerStep`, `PerExample`, `PerGroup`."""
    return isinstance(x, _Kind)


def check_concrete(name: str, tree: PyTree) -> None:
    """Raise `DerivativeError` for a tree with a leaf that JAX traces: a run is walked in Python, on real arrays."""
    for path, leaf in jax.tree.flatten_with_path(tree)[0]:
        if isinstance(leaf, Tracer):
            raise DerivativeError(
                f"{name}{jax.tree_util.keystr(path)} is traced ({type(leaf).__name__}), and a run is walked in Python, "
                f"on real arrays. {TRACED}"
            )


def canonical(z: PyTree, *, traced: bool = False) -> PyTree:
    """`z` with strongly typed jax arrays; raises `StructureError` for a leaf that is not floating.

    `DerivativeError` for one that is traced, unless that is allowed.
    """
    if not traced:
        check_concrete("z", z)

    def convert(path: Any, leaf: Any) -> jax.Array:
        name = f"z{jax.tree_util.keystr(path)}"
        if callable(leaf) and not path:
            raise StructureError(f"z is a function: {ORDER}")
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
        if isinstance(kind, PerGroup):
            kind.check(kind.value)
    return z


def wrapped(z: PyTree) -> PyTree:
    """`z` as the engine works on it: bare arrays as `Shared`, and groups left to `groups_of`."""

    def wrap(x: Any) -> Any:
        if isinstance(x, PerGroup):
            return PerGroup.tree_unflatten(None, (x.value,))
        return x if is_kind(x) else Shared(x)

    return jax.tree.map(wrap, z, is_leaf=is_kind)


def groups_of(z: PyTree) -> tuple[jax.Array, ...]:
    """Groups of the `PerGroup` leaves of z, in order: int32[n] each, on the device."""
    kinds = jax.tree.leaves(z, is_leaf=is_kind)
    return tuple(k._groups.device for k in kinds if isinstance(k, PerGroup) and k._groups is not None)


def like(z: PyTree, tree: PyTree) -> PyTree:
    """A tree of as many leaves (wrapped, or bare) in the structure that the user gave `z`."""
    return jax.tree.unflatten(jax.tree.structure(z), jax.tree.leaves(tree))


def bare(z: PyTree) -> PyTree:
    """`z` without its kinds: what functions of the user's see."""
    return jax.tree.map(lambda k: k.value if is_kind(k) else k, z, is_leaf=is_kind)


def needs_index(z: PyTree) -> bool:
    """Whether any leaf is `PerExample` or `PerGroup`."""
    return any(isinstance(k, PerExample | PerGroup) for k in jax.tree.leaves(z, is_leaf=is_kind))


def index_bound(z: PyTree) -> int | None:
    """Least number of examples among the leaves of z, not wrapped, that cover all of them."""
    kinds = jax.tree.leaves(z, is_leaf=is_kind)
    covered = [k.value.shape[0] for k in kinds if isinstance(k, PerExample) and k.rows is None]
    grouped = [len(k.groups) for k in kinds if isinstance(k, PerGroup) and k.groups is not None]
    return min((*covered, *grouped), default=None)


def check_steps(z: PyTree, steps: int) -> None:
    """Raise `StructureError` unless leaves with an entry a step have as many as there are steps."""
    for path, kind in jax.tree.flatten_with_path(z, is_leaf=is_kind)[0]:
        curriculum = isinstance(kind, PerGroup) and kind.value.ndim == 2
        if (isinstance(kind, PerStep) or curriculum) and kind.value.shape[:1] != (steps,):
            raise StructureError(
                f"z{jax.tree_util.keystr(path)} is {type(kind).__name__} with shape {list(kind.value.shape)}, but the "
                f"run takes T = {steps} steps"
            )
