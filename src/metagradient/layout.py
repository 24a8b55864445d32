"""How arrays are spread over a mesh, as far as their types say: with `AxisType.Explicit`, shardings are part of types.

Automatic axes and single devices leave types as they are, and what is here does nothing.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from metagradient._jax import trace
from metagradient.errors import StructureError

Spread: TypeAlias = tuple[Any, ...]
"""For each axis of an array the explicit mesh axes that it is spread over, or None."""


def spread(x: Any) -> Spread:
    """How an array is spread, as its type says."""
    sharding = None if isinstance(x, np.ndarray) else jax.typeof(x).sharding
    if sharding is None or not sharding.mesh.explicit_axes:
        return (None,) * x.ndim
    return *sharding.spec, *(None,) * (x.ndim - len(sharding.spec))


def rows_spread(index: Any, value: Any) -> Spread:
    """How rows of `value` are spread that are taken by an index: as the index, and each as in `value`.

    A mesh axis that the index is spread over can't divide a row once more.
    """
    led = spread(index)
    used = {name for axes in led for name in _names(axes)}
    return *led, *(None if used.intersection(_names(axes)) else axes for axes in spread(value)[1:])


def placed(function: Callable[..., jax.Array], over: Spread, *arguments: Any) -> jax.Array:
    """`function(*arguments)` of arrays, spread as `over` says.

    Gathers, scatters and reshapes along an axis that is spread have no type of their own: XLA chooses what lies
    between, and `over` is the type of what comes out.
    """
    if not any(axes for x in arguments for axes in spread(x)):
        return function(*arguments)
    automatic: Callable[..., Any] = jax.sharding.auto_axes(function, out_sharding=PartitionSpec(*over))
    return automatic(*arguments)


def returned(function: Callable[[], Any]) -> Any:
    """Types of what a function returns. `jax.eval_shape` would leave out how it is spread, if one axis is automatic."""
    program, shapes = trace(function)
    return jax.tree.unflatten(jax.tree.structure(shapes), program.out_avals)


def nothing(kind: Any) -> jax.Array:
    """Zeros of a type."""
    sharding = kind.sharding if kind.sharding.mesh.explicit_axes else None
    return jnp.zeros(kind.shape, kind.dtype, device=sharding)


def shares(axes: Any) -> int:
    """Into how many parts mesh axes divide an axis of an array."""
    mesh = jax.sharding.get_abstract_mesh()
    return int(np.prod([mesh.shape[name] for name in _names(axes)], dtype=int))


def check_mesh(*trees: Any) -> None:
    """Raise `StructureError` for arrays on explicit axes of a mesh that isn't the one in use."""
    for x in jax.tree.leaves(trees):
        if not isinstance(x, jax.Array) or not any(spread(x)):
            continue
        mesh = jax.typeof(x).sharding.mesh
        if mesh != jax.sharding.get_abstract_mesh():
            raise StructureError(
                f"an array {x.dtype}{list(x.shape)} is spread over explicit axes {mesh.axis_names} of a mesh that "
                "isn't in use: make and call everything within `with jax.set_mesh(mesh):`, or give the mesh "
                "axis_types=(jax.sharding.AxisType.Auto, ...)"
            )


def _names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)
