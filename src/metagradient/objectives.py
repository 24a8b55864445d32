"""Objectives: what a metagradient is the gradient of."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from metagradient._jax import Program, Tracer, compiled, convolves, trace
from metagradient.errors import DerivativeError, StructureError
from metagradient.examples import Examples, checked, holds_examples
from metagradient.metaparameters import ORDER, bare, check_concrete
from metagradient.shown import Shown
from metagradient.start import arrays
from metagradient.step.explain import Call, explained
from metagradient.step.feed import Batches, array, check_leaves, check_source, shown_batches
from metagradient.step.programs import shared, signature
from metagradient.step.rule import Cotangent
from metagradient.step.segment import over_queries
from metagradient.trees import PyTree, add, floating, is_floating

# How a set is taken: walked a batch at a time, or, to be traced, as a function of its first batch or of all at once.
# JAX's caches tell these apart, so that no program that was traced in one is met in another.
_TAKEN = jax.make_user_context("walked")
_CALLED: ContextVar[list["MeanOver"] | None] = ContextVar("_CALLED", default=None)


@dataclass(frozen=True, eq=False, repr=False)
class MeanOver(Shown):
    """A mean over a validation set that is walked in batches; made by `mean_over`."""

    batches: Batches
    loss: Callable[..., jax.Array]
    args: PyTree = None
    examples: Examples = None
    programs: "_MeanPrograms" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "programs", shared(_MeanPrograms, (self.loss, self.args is not None)))

    def shown(self) -> dict[str, Any]:
        """The set and the loss."""
        given = {} if self.args is None else {"args": self.args}
        return {"batches": shown_batches(self.batches), "loss": self.loss, **given}

    def __call__(self, state: PyTree, z: PyTree = None) -> jax.Array:
        """The mean at a final state: a scalar, or a vector where the loss is one.

        It is differentiated a batch at a time, in reverse mode. `DerivativeError` in a compiled function, which would
        hold the whole set.
        """
        del z
        called = _CALLED.get()
        if called is not None:
            called.append(self)
        if _TAKEN.value == "whole":
            return self._whole(state)
        if _TAKEN.value == "first batch":
            return self._loss(state, jax.tree.map(array, self.batches[0]))
        mean = jax.custom_vjp(self._mean)
        mean.defvjp(self._forward, _back)
        return mean(state)

    def shares(self) -> Iterator[tuple[float, PyTree]]:
        """Every batch, and its share of all examples."""
        sizes = [holds_examples(batch, self.examples)[0] for batch in self._read()]
        for size, batch in zip(sizes, self._read(), strict=True):
            yield size / sum(sizes), batch

    def _read(self) -> Iterator[PyTree]:
        return (jax.tree.map(array, self.batches[i]) for i in range(len(self.batches)))

    def _mean(self, state: PyTree) -> jax.Array:
        self._check(state)
        return self._mean_of(lambda batch: self.programs.value(state, batch, self.args))

    def _forward(self, state: PyTree) -> tuple[jax.Array, tuple[Any, Any]]:
        self._check(state)
        value, slopes = self._mean_of(lambda batch: self.programs.value_and_slopes(state, batch, self.args))
        return value, (slopes, state)

    def _mean_of(self, function: Callable[[PyTree], PyTree]) -> PyTree:
        """Mean over examples of what a function gives for each batch; every batch is read once."""
        total, count = None, 0
        for batch in self._read():
            size = holds_examples(batch, self.examples)[0]
            part = jax.tree.map(lambda x, size=size: size * x, function(batch))
            total, count = part if total is None else add(total, part), count + size
        return jax.tree.map(lambda x: x / count, total)

    def _check(self, state: PyTree) -> None:
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(state)):
            raise DerivativeError(
                "mean_over is called in a compiled or mapped function, whose program would hold all of its "
                f"{len(self.batches)} batches. Call it outside of jax.jit, jax.vmap and jax.jvp: value_and_metagrad "
                "and jax.grad take an objective that isn't compiled, and walk its set a batch at a time"
            )

    def _whole(self, state: PyTree) -> jax.Array:
        return self._mean_of(lambda batch: self._loss(state, batch))

    def _loss(self, state: PyTree, batch: PyTree) -> jax.Array:
        return self.programs.function(state, batch, self.args)


def _back(kept: tuple[Any, Any], cotangent: jax.Array) -> tuple[PyTree]:
    slopes, state = kept
    leaves, treedef = jax.tree.flatten(state)
    of_leaf = iter(slopes)
    found = [jnp.tensordot(cotangent, next(of_leaf), cotangent.ndim) if is_floating(x) else None for x in leaves]
    return (jax.tree.unflatten(treedef, found),)


class _MeanPrograms:
    """Compiled programs of a loss over a batch; they live as long as the objectives that hold them.

    Arguments:
        loss: what `mean_over` was given, and whether it takes args.
    """

    def __init__(self, loss: tuple[Callable[..., jax.Array], bool]):
        given, takes_args = loss

        def function(state: PyTree, batch: PyTree, args: PyTree) -> jax.Array:
            return given(state, batch, args) if takes_args else given(state, batch)

        # No method: a program that held this object would hold itself.
        self.function, self.takes_args = function, takes_args

    @cached_property
    def value(self) -> Callable[..., jax.Array]:
        """`(state, batch, args) -> value`."""
        function = self.function
        return compiled(lambda *arguments: function(*arguments))

    @cached_property
    def value_and_slopes(self) -> Callable[..., tuple[jax.Array, Cotangent]]:
        """`(state, batch, args) -> (value, its derivatives in the state's floating leaves)`."""
        function = self.function

        def found(state: PyTree, batch: PyTree, args: PyTree) -> tuple[jax.Array, Cotangent]:
            values, rebuild = floating(state)

            def of(x: Cotangent) -> jax.Array:
                return function(rebuild(x), batch, args)

            value, vjp = jax.vjp(of, values)
            return value, _slopes(vjp, value, of, values)[0]

        return compiled(found)


def mean_over(
    batches: Batches,
    loss: Callable[..., jax.Array],
    *,
    args: PyTree = None,
    examples: Sequence[str | int] | Callable[[PyTree], int] | None = None,
) -> MeanOver:
    """An objective: the mean of a loss over a set that need not fit in one batch.

    Arguments:
        batches: sequence of pytrees of arrays; their numbers of examples may differ, and are their weights.
        loss: `(state, batch) -> scalar`, the mean over the batch, or a vector of them where `vector=True` is asked of
            `value_and_metagrad`.
        args: constants, any pytree of arrays: then the loss is `(state, batch, args)`. An argument of its program.
        examples: which leaves hold examples, as in `Training.from_loss`.

    Returns: an objective `(state, z) -> scalar`. It may be part of another: `lambda state, z: mean(state) + decay(z)`
        is walked a batch at a time too, by `value_and_metagrad`, and by `jax.grad` outside compiled functions.

    Errors: `StructureError` for an empty sequence, or where a batch doesn't tell how many examples it holds;
        `BatchError` for one that can't be read again.

    Cost: a loss and its gradient a batch; the memory of one batch. A compilation for every different batch shape.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> objective = mg.mean_over([{"x": jnp.ones(4)}, {"x": jnp.zeros(2)}], lambda state, b: (state * b["x"]).mean())
    >>> round(float(objective(3.0)), 6)
    2.0
    """
    check_source(batches)
    if not len(batches):
        raise StructureError("mean_over needs at least one batch")
    if not callable(loss):
        raise StructureError(f"mean_over takes (batches, loss), and the loss is {type(loss).__name__}")
    first = jax.tree.map(array, batches[0])
    check_leaves("batches[0]", first)
    args = arrays("args", args)
    check_concrete("args", args)
    objective = MeanOver(batches, loss, args, checked(examples))
    holds_examples(first, objective.examples)
    return objective


class _Programs:
    """Compiled programs of an objective: they live as long as the metagradients that hold them.

    Arguments:
        function: `(state, z) -> value`, or `-> (value, aux)`.
    """

    def __init__(self, function: Callable[[PyTree, PyTree], Any]):
        self.function = function

    @cached_property
    def value_and_pull_back(self) -> Callable[..., tuple[jax.Array, PyTree, Cotangent, PyTree]]:
        """`(has_aux, state, z) -> (value, aux, cotangents of the state's floating leaves, and of z)`."""
        function = self.function

        def found(has_aux: bool, state: PyTree, z: PyTree) -> Any:
            return _pulled_back(function, has_aux, state, z, _slopes)

        return compiled(found, static_argnums=0)


def _slopes(vjp: Callable[..., Any], value: jax.Array, of: Callable[..., Any], *arguments: Any) -> Any:
    """Cotangents of the arguments of a scalar, or, along a first axis, of each entry of a vector."""
    if not value.ndim:
        return vjp(jnp.ones_like(value))
    one_hot = jnp.eye(value.shape[0], dtype=value.dtype)
    return over_queries(vjp, one_hot, convolves=convolves(trace(of, *arguments)[0]))


def _pulled_back(
    function: Callable[..., Any], has_aux: bool, state: PyTree, z: PyTree, slopes: Callable[..., Any]
) -> tuple[jax.Array, PyTree, Cotangent, PyTree]:
    values, rebuild = floating(state)

    def of(x: Cotangent, z: PyTree) -> tuple[jax.Array, PyTree]:
        found = function(rebuild(x), z)
        return found if has_aux else (found, None)

    value, vjp, aux = jax.vjp(of, values, z, has_aux=True)
    return value, aux, *slopes(vjp, value, of, values, z)


@dataclass(frozen=True)
class Ended:
    """An objective at a final state.

    Arguments:
        value: a scalar, or a vector of queries.
        aux: what else it returned.
        cotangent: of the state's floating leaves; with a leading axis of queries where there are some.
        total: of z, as `cotangent`.
    """

    value: jax.Array
    aux: PyTree
    cotangent: Cotangent
    total: PyTree


class Objective:
    """An objective, its programs, and what is known of it.

    Arguments:
        function: `(state, z) -> scalar`, z with bare arrays.
        vector: it returns a vector instead.
        has_aux: it returns `(value, aux)`.
    """

    def __init__(self, function: Callable[[PyTree, PyTree], Any], *, vector: bool = False, has_aux: bool = False):
        if not callable(function):
            raise StructureError(f"objective is {function!r:.80}, not a function (state, z) -> scalar: {ORDER}")
        self.function, self.vector, self.has_aux = function, vector, has_aux
        self.programs: Any = function.programs if isinstance(function, MeanOver) else shared(_Programs, function)
        self._walks: dict[Any, bool] = {}
        self._differentiable: set[Any] = set()
        self._call = Call("objective", function, ("state", "z"))
        if isinstance(function, MeanOver):
            takes = ("state", "batch", *("args",) * function.programs.takes_args)
            self._call = Call("loss of mean_over", function.loss, takes)

    def check(self, state: PyTree, z: PyTree) -> None:
        """Raise `StructureError` unless it returns a floating scalar (or vector); once for shapes of state and z."""
        z = bare(z)
        about = signature((state, z))
        if about in self._walks:
            return
        function = self.function
        with explained(self._call), sets_taken() as sets:
            out = jax.eval_shape(lambda s, z: function(s, z), state, z)
        self._check_type(out)
        self._walks[about] = bool(sets)

    def check_derivative(self, state: PyTree, z: PyTree) -> None:
        """`check`, and raise `DerivativeError` where it can't be differentiated: a trace that a call won't repeat."""
        self.check(state, z)
        state_and_z = state, bare(z)
        about = signature(state_and_z)
        if about in self._differentiable:
            return
        if self._walks[about]:
            pulled = partial(jax.eval_shape, self._differentiated)
        else:
            pulled = partial(self.programs.value_and_pull_back.eval_shape, self.has_aux)

        def program() -> Program:
            with sets_taken():
                return trace(self.function, *state_and_z)[0]

        with explained(self._call, program=program), sets_taken():
            pulled(*state_and_z)
        self._differentiable.add(about)

    def value_and_pull_back(self, state: PyTree, z: PyTree) -> Ended:
        """Its value, and the cotangents of a state and of a bare z."""
        if not self._walks[signature((state, z))]:
            return Ended(*self.programs.value_and_pull_back(self.has_aux, state, z))
        return Ended(*self._differentiated(state, z))

    def _differentiated(self, state: PyTree, z: PyTree) -> tuple[jax.Array, PyTree, Cotangent, PyTree]:
        """Not in one program: sets are walked in Python."""

        def slopes(vjp: Callable[..., Any], value: jax.Array, *_: Any) -> Any:
            if not self.vector:
                return vjp(jnp.ones_like(value))
            # Not mapped: what users compiled themselves would be batched by a compiler that may get that wrong.
            each = [vjp(one_hot) for one_hot in jnp.eye(value.shape[0], dtype=value.dtype)]
            return jax.tree.map(lambda *x: jnp.stack(x), *each)

        return _pulled_back(self.function, self.has_aux, state, z, slopes)

    def _check_type(self, out: Any) -> None:
        if self.has_aux:
            if not (isinstance(out, tuple | list) and len(out) == 2):
                raise StructureError(
                    f"the objective returned {jax.tree.structure(out)}, expected (value, aux), as has_aux=True says"
                )
            out = out[0]
        shape = getattr(out, "shape", None)
        if shape is None or len(shape) != self.vector or not jnp.issubdtype(out.dtype, jnp.floating):
            found = f"{out.dtype}{list(shape)}" if shape is not None else jax.tree.structure(out)
            wanted = "a floating vector, one entry a query (vector=True)" if self.vector else "a floating scalar"
            more = "" if self.vector else "; vector=True allows a vector"
            more += "; has_aux=True allows (value, aux)" if shape is None and not self.has_aux else ""
            raise StructureError(f"the objective returned {found}, expected {wanted}{more}")


@contextmanager
def sets_taken(*, whole: bool = False) -> Iterator[list[MeanOver]]:
    """Take sets as any other function in this context: to be traced, and in every mode of differentiation.

    Arguments:
        whole: of all their batches at once; else of the first, for types.

    Yields: the sets that were called, as they are.
    """
    called: list[MeanOver] = []
    token = _CALLED.set(called)
    try:
        with _TAKEN("whole" if whole else "first batch"):
            yield called
    finally:
        _CALLED.reset(token)
