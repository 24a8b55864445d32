"""Objectives: what a metagradient is the gradient of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from metagradient.errors import StructureError
from metagradient.step.rule import Cotangent
from metagradient.trees import PyTree, add, floating


@dataclass(frozen=True, eq=False)
class MeanOver:
    """A mean over a validation set that is walked in batches; made by `mean_over`."""

    batches: Sequence[PyTree]
    loss: Callable[[PyTree, PyTree], jax.Array]

    def __call__(self, state: PyTree, z: PyTree) -> jax.Array:
        """The mean at a final state."""
        del z
        sizes = [_examples(b) for b in self.batches]
        values = [n * self.loss(state, b) for n, b in zip(sizes, self.batches, strict=True)]
        return sum(values[1:], values[0]) / sum(sizes)


def mean_over(batches: Sequence[PyTree], loss: Callable[[PyTree, PyTree], jax.Array]) -> MeanOver:
    """An objective: the mean of a loss over a set that need not fit in one batch.

    Arguments:
        batches: sequence of pytrees of arrays; sizes may differ, and weigh by the first axis of their first leaf.
        loss: `(state, batch) -> scalar`, the mean over the batch, or a vector of them where `vector=True` is asked of
            `value_and_metagrad`.

    Returns: an objective `(state, z) -> scalar`. Its value and cotangent are summed a batch at a time.

    Errors: `StructureError` for an empty sequence.

    Cost: a loss and its gradient a batch; the memory of one batch. A compilation for every different batch shape.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> objective = mg.mean_over([{"x": jnp.ones(4)}, {"x": jnp.zeros(2)}], lambda state, b: (state * b["x"]).mean())
    >>> round(float(objective(3.0, None)), 6)
    2.0
    """
    if not len(batches):
        raise StructureError("mean_over needs at least one batch")
    return MeanOver(batches, loss)


def _examples(batch: PyTree) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


@dataclass(frozen=True)
class _OnBatch:
    """A loss over a batch, in the form `(state, z, batch) -> value`."""

    loss: Callable[[PyTree, PyTree], jax.Array]

    def __call__(self, state: PyTree, z: PyTree, batch: PyTree) -> jax.Array:
        del z
        return self.loss(state, batch)


@partial(jax.jit, static_argnames=("function", "queries"))
def _value_and_pull_back(
    function: Callable[..., jax.Array], queries: bool, state: PyTree, z: PyTree, *data: PyTree
) -> tuple[jax.Array, Cotangent, PyTree]:
    values, rebuild = floating(state)
    value, vjp = jax.vjp(lambda x, z: function(rebuild(x), z, *data), values, z)
    pulled = jax.vmap(vjp)(jnp.eye(value.shape[0], dtype=value.dtype)) if queries else vjp(jnp.ones_like(value))
    return value, *pulled


def value_and_pull_back(
    objective: Callable[..., jax.Array], queries: bool, state: PyTree, z: PyTree
) -> tuple[jax.Array, Cotangent, PyTree]:
    """An objective's value, and the cotangents of (state, z).

    Arguments:
        objective: `(state, z) -> scalar`, or `-> vector` with `queries`.
        z: in the structure that the user gave.

    Returns: value; cotangents of the state's floating leaves; cotangents of z in its structure. With `queries`,
        cotangents have a leading axis.
    """
    if not isinstance(objective, MeanOver):
        return _value_and_pull_back(objective, queries, state, z)
    examples = sum(_examples(b) for b in objective.batches)
    total = None
    for batch in objective.batches:
        share = _examples(batch) / examples
        value, cotangent, _ = _value_and_pull_back(_OnBatch(objective.loss), queries, state, (), batch)
        part = jax.tree.map(lambda x, share=share: x * share, (value, cotangent))
        total = part if total is None else add(total, part)
    assert total is not None
    value, cotangent = total
    return value, cotangent, jax.tree.map(lambda x: jnp.zeros((*value.shape, *x.shape), x.dtype), z)


def check_objective(objective: Callable[..., Any], queries: bool, state: PyTree, z: PyTree) -> None:
    """Raise `StructureError` unless the objective returns a floating scalar (or vector, with `queries`)."""
    out = jax.eval_shape(lambda s, z: objective(s, z), state, z)
    shape = getattr(out, "shape", None)
    if shape is None or len(shape) != (1 if queries else 0) or not jnp.issubdtype(out.dtype, jnp.floating):
        found = f"{out.dtype}{list(shape)}" if shape is not None else jax.tree.structure(out)
        wanted = "a floating vector, one entry a query (vector=True)" if queries else "a floating scalar"
        raise StructureError(
            f"the objective returned {found}, expected {wanted}" + ("" if queries else "; vector=True allows a vector")
        )
