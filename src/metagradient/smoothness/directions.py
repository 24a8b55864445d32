"""Directions in which a training is probed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagradient.errors import StructureError
from metagradient.metaparameters import PerExample, canonical, is_kind
from metagradient.trees import PyTree


def random_directions(
    z: PyTree, count: int = 3, *, groups: np.ndarray | None = None, share: float = 0.1, seed: int = 0
) -> dict[str, list[PyTree]]:
    """Random directions of every kind that z allows.

    Arguments:
        z: metaparameters.
        count: directions of a kind.
        groups: int[n], the group (class, source) of each example.
        share: of the examples that an "examples" direction moves, in (0, 1].
        seed: of the draws.

    Returns: directions like z, by kind. "normal": every entry of z an independent standard normal. Where z has
        `PerExample` leaves, "examples": one in the entries of a random share of the examples, zero elsewhere. With
        groups, "groups": one in the entries of all examples of one random group (no group twice), zero elsewhere.

    Errors: `StructureError` for a count or share out of range, groups that are not one integer an example, or groups
        where z has no `PerExample` leaf.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> found = mg.smoothness.random_directions({"weights": mg.PerExample(jnp.ones(20))}, 2, groups=np.arange(20) % 4)
    >>> {kind: float(trees[0]["weights"].value.sum()) for kind, trees in found.items() if kind != "normal"}
    {'examples': 2.0, 'groups': 5.0}
    """
    z = canonical(z)
    n = examples(z)
    if count < 1 or not 0 < share <= 1:
        raise StructureError(f"a probe takes at least one direction and a share in (0, 1], got {count} and {share}")
    drawn = {"normal": _normal(z, count, np.random.default_rng((seed, 0)))}
    if n is not None:
        rng, chosen = np.random.default_rng((seed, 1)), max(1, round(share * n))
        picks = [rng.choice(n, chosen, replace=False) for _ in range(count)]
        drawn["examples"] = [_ones_at(z, np.isin(np.arange(n), pick)) for pick in picks]
    if groups is not None:
        drawn["groups"] = _of_groups(z, n, np.asarray(groups), count, np.random.default_rng((seed, 2)))
    return drawn


def examples(z: PyTree) -> int | None:
    """Number of examples that the `PerExample` leaves of z cover, None without such leaves.

    Errors: `StructureError` where they cover different numbers.
    """
    kinds = [k for k in jax.tree.leaves(z, is_leaf=is_kind) if isinstance(k, PerExample)]
    sizes = {k.value.shape[0] for k in kinds}
    if len(sizes) > 1:
        raise StructureError(
            f"PerExample leaves of z cover {sorted(sizes)} examples: give directions for each yourself"
        )
    return sizes.pop() if sizes else None


def _normal(z: PyTree, count: int, rng: np.random.Generator) -> list[PyTree]:
    return [jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), z) for _ in range(count)]


def _of_groups(z: PyTree, n: int | None, groups: np.ndarray, count: int, rng: np.random.Generator) -> list[PyTree]:
    if n is None:
        raise StructureError("groups are groups of examples, but no leaf of z is PerExample")
    if groups.shape != (n,) or not np.issubdtype(groups.dtype, np.integer):
        raise StructureError(f"groups must be int[{n}], one an example, got {groups.dtype}{list(groups.shape)}")
    names = np.unique(groups)
    return [_ones_at(z, groups == name) for name in rng.permutation(names)[:count]]


def _ones_at(z: PyTree, where: np.ndarray) -> PyTree:
    """One in the entries of some examples, bool[n]; zero in all else."""

    def fill(kind: Any) -> Any:
        if not isinstance(kind, PerExample):
            return jax.tree.map(jnp.zeros_like, kind)
        along = jnp.asarray(where).reshape(-1, *[1] * (kind.value.ndim - 1))
        return jax.tree.map(lambda x: jnp.broadcast_to(along, x.shape).astype(x.dtype), kind)

    return jax.tree.map(fill, z, is_leaf=is_kind)
