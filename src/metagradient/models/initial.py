"""Random initial parameters."""

import math
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax import Array
from jax.typing import DTypeLike


def normals(key: Array, shapes: Iterable[tuple[int, ...]], dtype: DTypeLike) -> Iterator[Array]:
    """Standard normal arrays of the given shapes, one after the other.

    They are cut from one draw: a CPU needs over a second to compile a draw of each new shape.
    """
    shapes = list(shapes)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    drawn = jax.random.normal(key, (ends[-1],), dtype)
    for shape, end in zip(shapes, ends, strict=True):
        yield drawn[end - math.prod(shape) : end].reshape(shape)
