"""Segments: how many steps one compiled program takes, and how it takes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import lax

from metagradient.errors import StructureError
from metagradient.fingerprint import fingerprint, finite
from metagradient.given import Given, accumulate
from metagradient.metaparameters import Shared, is_kind
from metagradient.step.rule import Adjoint, Cotangent, Keep, Rule
from metagradient.trees import PyTree, add, strong, zeros

Loop = Literal["scan", "unroll", "steps"]

_QUERIES_AT_ONCE = 8


@dataclass(frozen=True)
class Segment:
    """How steps are compiled.

    Arguments:
        length: steps between two boundaries of the run, at least 1.
        loop: "scan", one program that loops over the steps; "unroll", one program that writes them out; "steps", a
            program of one step, called from Python.
        keep: what a step built by `Training.from_loss` leaves to its adjoint: "state" alone, or its loss "gradient"
            too, which the adjoint then needn't compute again: one more array of the parameters' size for every step of
            a segment.
        unroll_microbatches: write micro-batches out instead of looping over them.

    Which loop is fastest is a property of the training and the machine: a scan saves the dispatch of small steps, and
    slows convolutions on CPUs 23 to 45 times. Results are bit-equal for equal segments, not across different ones.
    """

    length: int
    loop: Loop = "scan"
    keep: Keep = "gradient"
    unroll_microbatches: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise StructureError(f"a segment takes at least one step: {self}")
        if self.loop not in get_args(Loop) or self.keep not in get_args(Keep):
            raise StructureError(f"loop is one of {get_args(Loop)}, keep one of {get_args(Keep)}: {self}")


def check_segment(segment: Any) -> None:
    """Raise `StructureError` for a `segment=` that is no `Segment`, number of steps, or None."""
    whole = isinstance(segment, int) and not isinstance(segment, bool) and segment > 0
    if segment is not None and not whole and not isinstance(segment, Segment):
        raise StructureError(
            f"segment is {segment!r}: give the steps of a segment, a whole number from 1, or mg.Segment(...)"
        )


Stamp: TypeAlias = tuple[jax.Array, jax.Array]
"""A state's fingerprint, and which of its leaves are finite; see `fingerprint`."""

SINGLE_STEPS = Segment(1, "steps", "state")
"""One program of one step: what needs no choice, for trainings that nobody differentiates."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """What the pull-back of one segment needs: its states, what each step left beside its state, and its batches.

    Stacked along a first axis for compiled loops, lists for single steps.
    """

    states: Any
    beside: Any
    batches: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pulled:
    """What came back through a segment.

    Arguments:
        cotangent: of the state at its start.
        total: z cotangents so far.
        finite: which leaves of the cotangent are finite.
        asymmetry: largest that a probe found, or a list of them; 0 where the adjoint needs none.
    """

    cotangent: Cotangent
    total: PyTree
    finite: jax.Array
    asymmetry: Any


def _divide(z: PyTree) -> tuple[Any, Callable[[Any], PyTree]]:
    """The parts of a stacked slice of z that change from step to step, and how to rebuild the slice of one."""
    kinds, treedef = jax.tree.flatten(z, is_leaf=is_kind)
    moving = [None if isinstance(k, Shared) else k for k in kinds]
    return moving, lambda parts: jax.tree.unflatten(
        treedef, [k if p is None else p for k, p in zip(kinds, parts, strict=True)]
    )


def advance_one(rule: Rule, state: PyTree, given: Given, t: Any, batch: PyTree) -> tuple[PyTree, PyTree, Stamp]:
    """One step: `(next state, what it leaves for its adjoint, the next state's fingerprint)`."""
    new, kept = rule.bound(given.args).advance(state, batch, given.seen(t, batch))
    new = strong(new)
    return new, kept, _stamped(new)


def _stamped(state: PyTree) -> Stamp:
    """Fingerprint of what a program returns, as it is returned."""
    return fingerprint(lax.optimization_barrier(state))


def advance_many(
    rule: Rule, unroll: bool, length: int, state: PyTree, given: Given, start: Any, batches: PyTree
) -> tuple[PyTree, Any, Any, Stamp]:
    """`length` steps over stacked batches: the last state; all before a step; what steps left; the last's fingerprint.

    The one program that advances states, whether what it keeps is used or not.
    """
    rule = rule.bound(given.args)
    moving, whole = _divide(given.seen(start + jnp.arange(length), batches))

    def body(state: PyTree, x: Any) -> tuple[PyTree, Any]:
        batch, parts = x
        new, kept = rule.advance(state, batch, whole(parts))
        return strong(new), (state, kept)

    state, (states, beside) = lax.scan(body, state, (batches, moving), length=length, unroll=length if unroll else 1)
    return state, states, beside, _stamped(state)


def over_queries(pull: Callable[..., Any], cotangents: PyTree, *, convolves: bool = False) -> Any:
    """`pull` of every cotangent along a first axis, one after another, or a few at a time on accelerators.

    Memory is that of one of them, however many there are; and a compiler that fuses batched pull-backs wrongly (jaxlib
    0.10 on CPU, through norms) gets none to fuse. But a loop makes convolutions on CPUs some 45 times slower: there
    all are batched.
    """
    if jax.default_backend() != "cpu":
        return lax.map(pull, cotangents, batch_size=_QUERIES_AT_ONCE)
    return jax.vmap(pull)(cotangents) if convolves else lax.map(pull, cotangents)


def _pulled(
    rule: Rule, queries: bool, state: PyTree, beside: PyTree, batch: PyTree, z: PyTree, cotangent: Cotangent
) -> tuple[Cotangent, PyTree, jax.Array]:
    pull: Adjoint = rule.pull_back(state, beside, batch, z)
    if not queries:
        return pull(cotangent)
    convolves = rule.choices(state, batch, z).convolves
    cotangent, ct_z, asymmetries = over_queries(pull, cotangent, convolves=convolves)
    return cotangent, ct_z, jnp.max(asymmetries)


def _add(queries: bool, total: PyTree, cotangent: PyTree, given: Given, t: Any, batch: PyTree) -> PyTree:
    at = t, given.index(batch), given.groups
    if queries:
        return jax.vmap(lambda total, cotangent: accumulate(total, cotangent, *at))(total, cotangent)
    return accumulate(total, cotangent, *at)


def pull_one(
    rule: Rule,
    queries: bool,
    total: PyTree,
    cotangent: Cotangent,
    given: Given,
    t: Any,
    state: PyTree,
    beside: PyTree,
    batch: PyTree,
) -> Pulled:
    """Adjoint of one step. With `queries`, every cotangent has a leading axis of queries."""
    rule, seen = rule.bound(given.args), given.seen(t, batch)
    cotangent, ct_z, asymmetry = _pulled(rule, queries, state, beside, batch, seen, cotangent)
    return Pulled(cotangent, _add(queries, total, ct_z, given, t, batch), finite(cotangent), asymmetry)


def pull_many(
    rule: Rule,
    unroll: bool,
    queries: bool,
    total: PyTree,
    cotangent: Cotangent,
    given: Given,
    start: Any,
    kept: Kept,
) -> Pulled:
    """Adjoint of a segment, from last step to first; see `pull_one`."""
    length = jax.tree.leaves(kept.states)[0].shape[0]
    rule, t = rule.bound(given.args), start + jnp.arange(length)
    moving, whole = _divide(given.seen(t, kept.batches))

    def body(carry: tuple[Cotangent, Any], x: Any) -> tuple[tuple[Cotangent, Any], Any]:
        cotangent, shared = carry
        state, beside, batch, parts = x
        cotangent, ct_z, asymmetry = _pulled(rule, queries, state, beside, batch, whole(parts), cotangent)
        kinds = jax.tree.leaves(ct_z, is_leaf=is_kind)
        shared = [None if p is None else add(p, k) for p, k in zip(shared, kinds, strict=True)]
        return (cotangent, shared), ([None if isinstance(k, Shared) else k for k in kinds], asymmetry)

    nothing = [k if isinstance(k, Shared) else None for k in jax.tree.leaves(total, is_leaf=is_kind)]
    (cotangent, shared), (apart, asymmetries) = lax.scan(
        body,
        (cotangent, zeros(nothing)),
        (kept.states, kept.beside, kept.batches, moving),
        reverse=True,
        unroll=length if unroll else 1,
    )
    if queries:
        apart = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), apart)
    parts = [s if a is None else a for s, a in zip(shared, apart, strict=True)]
    ct_z = jax.tree.unflatten(jax.tree.structure(total, is_leaf=is_kind), parts)
    return Pulled(
        cotangent, _add(queries, total, ct_z, given, t, kept.batches), finite(cotangent), jnp.max(asymmetries)
    )
