"""Small helpers over pytrees that every room uses: floating leaves, paths, bytes."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metagradient._jax import is_weak
from metagradient.layout import spread

PyTree: TypeAlias = Any


def is_key(x: Any) -> bool:
    """Whether `x` is an array of typed PRNG keys."""
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def is_floating(x: Any) -> bool:
    """Whether a leaf carries cotangents."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def floating(tree: PyTree) -> tuple[tuple[jax.Array, ...], Callable[[tuple[jax.Array, ...]], PyTree]]:
    """Split off the floating leaves of `tree`, and return how to put others in their place.

    Integers, booleans and PRNG keys carry no cotangent; they stay inside the returned function.
    """
    leaves, treedef = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if is_floating(leaf)]

    def rebuild(values: tuple[jax.Array, ...]) -> PyTree:
        new = list(leaves)
        for i, value in zip(where, values, strict=True):
            new[i] = value
        return jax.tree.unflatten(treedef, new)

    return tuple(leaves[i] for i in where), rebuild


def floating_paths(tree: PyTree) -> list[str]:
    """Paths of the floating leaves, in the order of `floating`."""
    return [path for path, leaf in paths(tree) if is_floating(leaf)]


def paths(tree: PyTree) -> list[tuple[str, Any]]:
    """Leaves with printable paths, such as `.params['w']`."""
    return [(jax.tree_util.keystr(path) or "(root)", leaf) for path, leaf in jax.tree.flatten_with_path(tree)[0]]


def strong(tree: PyTree) -> PyTree:
    """`tree` with every leaf a jax array without a weak type, so that one program fits all."""

    def convert(x: Any) -> jax.Array:
        x = x if isinstance(x, jax.Array) else jnp.asarray(x)
        return x if is_key(x) or not is_weak(x) else lax.convert_element_type(x, x.dtype)

    return jax.tree.map(convert, tree)


def zeros(tree: PyTree, *leading: int) -> PyTree:
    """Zeros in the shape of `tree`, spread as it is, with leading axes before those of every leaf."""

    def one(x: Any) -> jax.Array:
        nothing = jnp.zeros_like(x)
        return jnp.broadcast_to(nothing, (*leading, *nothing.shape)) if leading else nothing

    return jax.tree.map(one, tree)


def same_bits(a: PyTree, b: PyTree) -> bool:
    """Whether two trees of equal structure hold the same bits."""

    def bits(x: Any) -> bytes:
        return np.asarray(jax.random.key_data(x) if is_key(x) else x).tobytes()

    return all(bits(x) == bits(y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def add(a: PyTree, b: PyTree) -> PyTree:
    """Sum of two trees, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves of `tree`: arrays, or their shapes and dtypes."""

    def size(x: Any) -> int:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        return int(np.prod(x.shape)) * x.dtype.itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def mismatch(expected: PyTree, found: PyTree) -> str | None:
    """First difference in structure, shape, dtype or spread between two trees of arrays or shapes, in words."""
    if jax.tree.structure(expected) != jax.tree.structure(found):
        names, others = {p for p, _ in paths(expected)}, {p for p, _ in paths(found)}
        gone, new = sorted(names - others), sorted(others - names)
        return (
            f"structure differs (missing {gone[:3] or 'nothing'}, unexpected {new[:3] or 'nothing'}): "
            f"{jax.tree.structure(expected)} against {jax.tree.structure(found)}"
        )
    for (path, a), (_, b) in zip(paths(expected), paths(found), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"leaf {path} has {b.dtype}{list(b.shape)}, expected {a.dtype}{list(a.shape)}"
        if spread(a) != spread(b):
            return f"leaf {path} is spread over {spread(b)}, expected {spread(a)}"
    return None
