"""`Given`: what a run's programs take beside state, step number and batch; how z reaches a step, and comes back."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import jax
import jax.numpy as jnp

from metagradient.layout import placed, rows_spread, spread
from metagradient.metaparameters import PerExample, PerGroup, PerStep, Shared, groups_of, is_kind, needs_index, wrapped
from metagradient.trees import PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given:
    """What every step of a run is given.

    Arguments:
        z: wrapped metaparameters.
        args: constants of the run.
        groups: of the `PerGroup` leaves of z, in order: the group of every example, int32[n] each.
    """

    z: PyTree
    args: PyTree = None
    groups: tuple[jax.Array, ...] = ()

    @classmethod
    def of(cls, z: PyTree, args: PyTree = None) -> Self:
        """That of metaparameters in the user's form."""
        return cls(wrapped(z), args, groups_of(z))

    def index(self, batch: PyTree) -> Any:
        """Ids of a batch's examples, where z needs them."""
        return batch["index"] if needs_index(self.z) else None

    def seen(self, t: Any, batch: PyTree) -> PyTree:
        """What step t sees of z, wrapped."""
        return slices(self.z, t, self.index(batch), self.groups)


def slices(z: PyTree, t: Any, index: Any, groups: tuple[jax.Array, ...] = ()) -> PyTree:
    """What steps `t` see of a wrapped `z`, still wrapped.

    Arguments:
        z: wrapped metaparameters.
        t: int[...], step numbers.
        index: int[..., batch], example ids of those steps; None where no leaf is `PerExample` or `PerGroup`.
        groups: as in `Given`.

    Returns: `Shared` whole; `PerStep` `[..., *entry]`; `PerExample` `[..., batch, *entry]`; `PerGroup` as `PerExample`.
    """
    of_leaf = iter(groups)

    def take(kind: Any) -> Any:
        if isinstance(kind, PerStep):
            return PerStep(placed(lambda value, t: value[t], rows_spread(t, kind.value), kind.value, t))
        if isinstance(kind, PerExample):

            def rows(value: jax.Array, index: jax.Array) -> jax.Array:
                return value.at[kind.slots(index)].get(mode="fill", fill_value=0)

            return PerExample(placed(rows, rows_spread(index, kind.value), kind.value, index))
        if isinstance(kind, PerGroup):

            def of_groups(value: jax.Array, ids: jax.Array, t: jax.Array, index: jax.Array) -> jax.Array:
                return value[_place(value, ids, t, index)]

            return PerExample(placed(of_groups, spread(index), kind.value, next(of_leaf), jnp.asarray(t), index))
        return kind

    return jax.tree.map(take, z, is_leaf=is_kind)


def accumulate(total: PyTree, cotangent: PyTree, t: Any, index: Any, groups: tuple[jax.Array, ...] = ()) -> PyTree:
    """Add the cotangents of `slices(z, t, index, groups)` to `total`, which has the shape of `z`.

    `Shared` cotangents are already summed over the steps. An example that a batch holds twice is added twice.
    """
    of_leaf: Iterator[jax.Array] = iter(groups)

    def put(kind: Any, ct: Any) -> Any:
        if isinstance(kind, PerStep):
            return PerStep(placed(lambda x, t, ct: x.at[t].add(ct), spread(kind.value), kind.value, t, ct.value))
        if isinstance(kind, PerExample):

            def added(value: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
                return value.at[kind.slots(index)].add(rows, mode="drop")

            value = placed(added, spread(kind.value), kind.value, index, ct.value)
            return jax.tree.unflatten(jax.tree.structure(kind), [value])
        if isinstance(kind, PerGroup):

            def summed(value: jax.Array, ids: jax.Array, t: jax.Array, index: jax.Array, rows: jax.Array) -> jax.Array:
                return value.at[_place(value, ids, t, index)].add(rows)

            ids = next(of_leaf)
            value = placed(summed, spread(kind.value), kind.value, ids, jnp.asarray(t), index, ct.value)
            return jax.tree.unflatten(jax.tree.structure(kind), [value])
        return Shared(kind.value + ct.value)

    return jax.tree.map(put, total, cotangent, is_leaf=is_kind)


def _place(value: jax.Array, ids: jax.Array, t: jax.Array, index: jax.Array) -> tuple[jax.Array, ...]:
    """Where examples' entries lie in the value of a `PerGroup` leaf."""
    of_example = ids[index]
    return (of_example,) if value.ndim == 1 else (t[..., None], of_example)
