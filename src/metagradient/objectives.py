"""Objectives: what a metagradient is the gradient of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from metagradient._jax import compiled, convolves, trace
from metagradient.errors import StructureError
from metagradient.examples import Examples, checked, holds_examples
from metagradient.step.explain import Call, explained
from metagradient.step.feed import array, check_leaves, check_source
from metagradient.step.programs import shared
from metagradient.step.rule import Cotangent
from metagradient.step.segment import over_queries
from metagradient.trees import PyTree, add, floating, zeros


@dataclass(frozen=True, eq=False)
class MeanOver:
    """A mean over a validation set that is walked in batches; made by `mean_over`."""

    batches: Sequence[PyTree]
    loss: Callable[[PyTree, PyTree], jax.Array]
    examples: Examples = None

    def __call__(self, state: PyTree, z: PyTree) -> jax.Array:
        """The mean at a final state."""
        del z
        values = [share * self.loss(state, batch) for share, batch in self.shares()]
        return sum(values[1:], values[0])

    def shares(self) -> list[tuple[float, PyTree]]:
        """Every batch, and its share of all examples."""
        batches = [jax.tree.map(array, self.batches[i]) for i in range(len(self.batches))]
        sizes = [holds_examples(batch, self.examples)[0] for batch in batches]
        return [(size / sum(sizes), batch) for size, batch in zip(sizes, batches, strict=True)]


def mean_over(
    batches: Sequence[PyTree],
    loss: Callable[[PyTree, PyTree], jax.Array],
    *,
    examples: Sequence[str | int] | Callable[[PyTree], int] | None = None,
) -> MeanOver:
    """An objective: the mean of a loss over a set that need not fit in one batch.

    Arguments:
        batches: sequence of pytrees of arrays; their numbers of examples may differ, and are their weights.
        loss: `(state, batch) -> scalar`, the mean over the batch, or a vector of them where `vector=True` is asked of
            `value_and_metagrad`.
        examples: which leaves hold examples, as in `Training.from_loss`.

    Returns: an objective `(state, z) -> scalar`. Its value and cotangent are summed a batch at a time.

    Errors: `StructureError` for an empty sequence, or where a batch doesn't tell how many examples it holds;
        `BatchError` for one that can't be read again.

    Cost: a loss and its gradient a batch; the memory of one batch. A compilation for every different batch shape.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> objective = mg.mean_over([{"x": jnp.ones(4)}, {"x": jnp.zeros(2)}], lambda state, b: (state * b["x"]).mean())
    >>> round(float(objective(3.0, None)), 6)
    2.0
    """
    check_source(batches)
    if not len(batches):
        raise StructureError("mean_over needs at least one batch")
    if not callable(loss):
        raise StructureError(f"mean_over takes (batches, loss), and the loss is {type(loss).__name__}")
    check_leaves("batches[0]", jax.tree.map(array, batches[0]))
    objective = MeanOver(batches, loss, checked(examples))
    holds_examples(jax.tree.map(array, batches[0]), objective.examples)
    return objective


class ObjectivePrograms:
    """Compiled programs of an objective: they live as long as the metagradients that hold them.

    Arguments:
        function: `(state, z, *data) -> value`.
    """

    def __init__(self, function: Callable[..., jax.Array]):
        self.function = function

    @cached_property
    def value_and_pull_back(self) -> Callable[..., tuple[jax.Array, Cotangent, PyTree]]:
        """`(queries, state, z, *data) -> (value, cotangents of the state's floating leaves, cotangents of z)`."""
        function = self.function

        def found(queries: bool, state: PyTree, z: PyTree, *data: PyTree) -> tuple[jax.Array, Cotangent, PyTree]:
            values, rebuild = floating(state)

            def of(x: Cotangent, z: PyTree) -> jax.Array:
                return function(rebuild(x), z, *data)

            value, vjp = jax.vjp(of, values, z)
            if not queries:
                return value, *vjp(jnp.ones_like(value))
            one_hot = jnp.eye(value.shape[0], dtype=value.dtype)
            return value, *over_queries(vjp, one_hot, convolves=convolves(trace(of, values, z)[0]))

        return compiled(found, static_argnums=0)


def programs_of(objective: Callable[..., jax.Array]) -> ObjectivePrograms:
    """The programs of an objective, shared with every other holder of an equal one."""
    function = _OnBatch(objective.loss) if isinstance(objective, MeanOver) else objective
    return shared(ObjectivePrograms, function)


@dataclass(frozen=True)
class _OnBatch:
    """A loss over a batch, in the form `(state, z, batch) -> value`."""

    loss: Callable[[PyTree, PyTree], jax.Array]

    def __call__(self, state: PyTree, z: PyTree, batch: PyTree) -> jax.Array:
        del z
        return self.loss(state, batch)


def value_and_pull_back(
    programs: ObjectivePrograms, objective: Callable[..., jax.Array], queries: bool, state: PyTree, z: PyTree
) -> tuple[jax.Array, Cotangent, PyTree]:
    """An objective's value, and the cotangents of (state, z).

    Arguments:
        programs: those of the objective.
        objective: `(state, z) -> scalar`, or `-> vector` with `queries`.
        z: in the structure that the user gave.

    Returns: value; cotangents of the state's floating leaves; cotangents of z in its structure. With `queries`,
        cotangents have a leading axis.
    """
    if not isinstance(objective, MeanOver):
        return programs.value_and_pull_back(queries, state, z)
    total = None
    for share, batch in objective.shares():
        value, cotangent, _ = programs.value_and_pull_back(queries, state, (), batch)
        part = jax.tree.map(lambda x, share=share: x * share, (value, cotangent))
        total = part if total is None else add(total, part)
    assert total is not None
    value, cotangent = total
    return value, cotangent, zeros(z, *value.shape)


def check_objective(
    objective: Callable[..., Any], queries: bool, state: PyTree, z: PyTree, programs: ObjectivePrograms | None = None
) -> None:
    """Raise `StructureError` unless the objective returns a floating scalar (or vector, with `queries`).

    With its programs, `DerivativeError` where it can't be differentiated: a trace that a call then needn't repeat.
    """
    call = Call("objective", objective, ("state", "z"))
    if isinstance(objective, MeanOver):
        call = Call("loss of mean_over", objective.loss, ("state", "batch"))
    with explained(call):
        out = jax.eval_shape(lambda s, z: objective(s, z), state, z)
    shape = getattr(out, "shape", None)
    if shape is None or len(shape) != (1 if queries else 0) or not jnp.issubdtype(out.dtype, jnp.floating):
        found = f"{out.dtype}{list(shape)}" if shape is not None else jax.tree.structure(out)
        wanted = "a floating vector, one entry a query (vector=True)" if queries else "a floating scalar"
        raise StructureError(
            f"the objective returned {found}, expected {wanted}" + ("" if queries else "; vector=True allows a vector")
        )
    if programs:
        over = isinstance(objective, MeanOver)
        data = ((), jax.tree.map(array, objective.batches[0])) if over else (z,)
        with explained(call, program=lambda: trace(programs.function, state, *data)[0]):
            programs.value_and_pull_back.eval_shape(queries, state, *data)  # pyright: ignore[reportFunctionMemberAccess]
