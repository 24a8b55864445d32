"""Segments: how many steps one compiled program takes, and how it takes them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metagradient.errors import StructureError
from metagradient.metaparameters import Shared, accumulate, is_kind, needs_index, slices
from metagradient.step.feed import Feed
from metagradient.step.rule import Cotangent, Keep, Rule
from metagradient.trees import PyTree, add, nbytes, strong, zeros

Loop = Literal["scan", "unroll", "steps"]


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


@dataclass(frozen=True)
class Kept:
    """What the pull-back of one segment needs: its states, and what each step left beside its state.

    Stacked along a first axis for compiled loops, lists for single steps.
    """

    states: Any
    beside: Any


def _index(z: PyTree, batch: PyTree) -> Any:
    return batch["index"] if needs_index(z) else None


def _divide(z: PyTree) -> tuple[Any, Callable[[Any], PyTree]]:
    """The parts of a stacked slice of z that change from step to step, and how to rebuild the slice of one."""
    kinds, treedef = jax.tree.flatten(z, is_leaf=is_kind)
    moving = [None if isinstance(k, Shared) else k for k in kinds]
    return moving, lambda parts: jax.tree.unflatten(
        treedef, [k if p is None else p for k, p in zip(kinds, parts, strict=True)]
    )


@partial(jax.jit, static_argnames="rule")
def advance_one(rule: Rule, state: PyTree, z: PyTree, t: Any, batch: PyTree) -> tuple[PyTree, PyTree]:
    """One step: `(next state, what it leaves for its adjoint)`."""
    new, kept = rule.advance(state, batch, slices(z, t, _index(z, batch)))
    return strong(new), kept


@partial(jax.jit, static_argnames=("rule", "unroll"))
def advance_many(
    rule: Rule, unroll: bool, state: PyTree, z: PyTree, start: Any, batches: PyTree
) -> tuple[PyTree, Kept]:
    """Steps over stacked batches. The one program that advances states, whether what it keeps is used or not."""
    length = jax.tree.leaves(batches)[0].shape[0]
    moving, whole = _divide(slices(z, start + jnp.arange(length), _index(z, batches)))

    def body(state: PyTree, x: Any) -> tuple[PyTree, Any]:
        batch, parts = x
        new, kept = rule.advance(state, batch, whole(parts))
        return strong(new), (state, kept)

    state, (states, beside) = lax.scan(body, state, (batches, moving), unroll=length if unroll else 1)
    return state, Kept(states, beside)


def _pull(rule: Rule, queries: bool) -> Callable[..., tuple[Cotangent, PyTree]]:
    return jax.vmap(rule.pull_back, in_axes=(None, None, None, None, 0)) if queries else rule.pull_back


def _add(queries: bool, total: PyTree, cotangent: PyTree, t: jax.Array, index: jax.Array | None) -> PyTree:
    if queries:
        return jax.vmap(accumulate, in_axes=(0, 0, None, None))(total, cotangent, t, index)
    return accumulate(total, cotangent, t, index)


def _finite(cotangent: Cotangent) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in cotangent]) if cotangent else jnp.ones(0, bool)


@partial(jax.jit, static_argnames=("rule", "queries"), donate_argnames="total")
def pull_one(
    rule: Rule, queries: bool, state: PyTree, beside: PyTree, z: PyTree, t: Any, batch: PyTree,
    cotangent: Cotangent, total: PyTree,
) -> tuple[Cotangent, PyTree, jax.Array]:  # fmt: skip
    """Adjoint of one step: `(cotangent of its state, z cotangents so far, which leaves are finite)`.

    With `queries`, every cotangent has a leading axis of queries.
    """
    index = _index(z, batch)
    cotangent, ct_z = _pull(rule, queries)(state, beside, batch, slices(z, t, index), cotangent)
    return cotangent, _add(queries, total, ct_z, t, index), _finite(cotangent)


@partial(jax.jit, static_argnames=("rule", "unroll", "queries"), donate_argnames="total")
def pull_many(
    rule: Rule, unroll: bool, queries: bool, kept: Kept, z: PyTree, start: Any, batches: PyTree,
    cotangent: Cotangent, total: PyTree,
) -> tuple[Cotangent, PyTree, jax.Array]:  # fmt: skip
    """Adjoint of a segment, from last step to first; see `pull_one`."""
    length = jax.tree.leaves(batches)[0].shape[0]
    t, index = start + jnp.arange(length), _index(z, batches)
    moving, whole = _divide(slices(z, t, index))

    def body(carry: tuple[Cotangent, Any], x: Any) -> tuple[tuple[Cotangent, Any], Any]:
        cotangent, shared = carry
        state, beside, batch, parts = x
        cotangent, ct_z = _pull(rule, queries)(state, beside, batch, whole(parts), cotangent)
        kinds = jax.tree.leaves(ct_z, is_leaf=is_kind)
        shared = [None if p is None else add(p, k) for p, k in zip(shared, kinds, strict=True)]
        return (cotangent, shared), [None if isinstance(k, Shared) else k for k in kinds]

    nothing = [k if isinstance(k, Shared) else None for k in jax.tree.leaves(total, is_leaf=is_kind)]
    (cotangent, shared), apart = lax.scan(
        body,
        (cotangent, zeros(nothing)),
        (kept.states, kept.beside, batches, moving),
        reverse=True,
        unroll=length if unroll else 1,
    )
    if queries:
        apart = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), apart)
    parts = [s if a is None else a for s, a in zip(shared, apart, strict=True)]
    ct_z = jax.tree.unflatten(jax.tree.structure(total, is_leaf=is_kind), parts)
    return cotangent, _add(queries, total, ct_z, t, index), _finite(cotangent)


jax.tree_util.register_dataclass(Kept)


@dataclass(eq=False)
class Runner:
    """Walks a training segment by segment, always through the same programs.

    Arguments:
        rule: the step.
        segment: how steps are compiled.
        feed: the batches.
        z: wrapped metaparameters.
        queries: whether cotangents have a leading axis of queries.
        begin: first step that is differentiated; segments are numbered from there, those before it negatively.
        hold_bytes: host memory for batches that were read, so that replays needn't read them again.
    """

    rule: Rule
    segment: Segment
    feed: Feed
    z: PyTree
    queries: bool = False
    begin: int = 0
    hold_bytes: int = 0
    forward_steps: int = 0
    adjoint_steps: int = 0

    def __post_init__(self) -> None:
        self.rule = self.rule.formed(self.segment.keep, self.segment.unroll_microbatches)
        self._loaded: tuple[int, Any] | None = None
        self._kept: dict[int, Any] = {}
        self._held: dict[int, Any] = {}
        self._held_bytes = 0

    def __len__(self) -> int:
        """Number of differentiated segments."""
        return -(-(len(self.feed) - self.begin) // self.segment.length)

    @property
    def before(self) -> int:
        """Number of segments that are only advanced through."""
        return -(-self.begin // self.segment.length)

    def steps(self, i: int) -> range:
        """Steps of segment i; the last of the run, and the last before `begin`, may be short."""
        if i < 0:
            start = (i + self.before) * self.segment.length
            return range(start, min(start + self.segment.length, self.begin))
        start = self.begin + i * self.segment.length
        return range(start, min(start + self.segment.length, len(self.feed)))

    def holds(self, i: int) -> bool:
        """Whether the batches of segment i are at hand: held, of a kept segment, or the last ones read."""
        return i in self._held or i in self._kept or (self._loaded is not None and self._loaded[0] == i)

    def rereads(self, i: int) -> bool:
        """Whether the batches of segment i, once read, would be read again by a replay."""
        return i not in self._held

    def batches(self, i: int) -> Any:
        """Batches of segment i: stacked for a compiled loop, a list for single steps."""
        for held in (self._held, self._kept):
            if i in held:
                return held[i]
        if self._loaded is None or self._loaded[0] != i:
            steps = self.steps(i)
            single = self.segment.loop == "steps"
            read = [self.feed[t] for t in steps] if single else self.feed.segment(steps.start, len(steps))
            self._loaded = i, read
            size = nbytes(read)
            if self._held_bytes + size <= self.hold_bytes:
                self._held[i] = read
                self._held_bytes += size
        return self._loaded[1]

    def forget(self) -> None:
        """Drop all batches but those of kept segments, so that their next use reads them again."""
        self._loaded = None
        self._held.clear()
        self._held_bytes = 0

    def advance(self, i: int, state: PyTree) -> PyTree:
        """State at the end of segment i from that at its start."""
        self.forward_steps += len(self.steps(i))
        if self.segment.loop == "steps":
            for t, batch in zip(self.steps(i), self.batches(i), strict=True):
                state = advance_one(self.rule, state, self.z, np.int32(t), batch)[0]
            return state
        return self._many(i, state)[0]

    def keep(self, i: int, state: PyTree) -> tuple[Kept, Callable[[], PyTree]]:
        """What the pull-back of segment i needs, and how to get the state at its end. Its batches are kept too.

        Where a step keeps nothing but its state, the last step is only taken if that end is asked for.
        """
        self._kept[i] = self.batches(i)
        if self.segment.loop != "steps":
            self.forward_steps += len(self.steps(i))
            end, kept = self._many(i, state)
            return kept, lambda: end
        states, beside = [], []
        steps, batches = self.steps(i), self.batches(i)
        for t, batch in zip(steps[:-1], batches[:-1], strict=True):
            states.append(state)
            state, left = advance_one(self.rule, state, self.z, np.int32(t), batch)
            beside.append(left)
        self.forward_steps += len(steps) - 1
        states.append(state)

        def last() -> tuple[PyTree, PyTree]:
            self.forward_steps += 1
            return advance_one(self.rule, states[-1], self.z, np.int32(steps[-1]), batches[-1])

        if self.rule.keep == "state":
            return Kept(states, [*beside, ()]), lambda: last()[0]
        end, left = last()
        return Kept(states, [*beside, left]), lambda: end

    def pull(self, i: int, kept: Kept, cotangent: Cotangent, total: PyTree) -> tuple[Cotangent, PyTree, jax.Array]:
        """Pull a cotangent back through segment i, adding to the z cotangents, which are used up.

        The segment's batches are kept no longer.
        """
        steps, batches = self.steps(i), self.batches(i)
        self._kept.pop(i, None)
        self.adjoint_steps += len(steps)
        if self.segment.loop != "steps":
            return pull_many(
                self.rule, self._unroll, self.queries, kept, self.z, np.int32(steps.start), batches, cotangent, total
            )
        finite = None
        for t, batch, state, beside in zip(
            reversed(steps), reversed(batches), reversed(kept.states), reversed(kept.beside), strict=True
        ):
            cotangent, total, finite = pull_one(
                self.rule, self.queries, state, beside, self.z, np.int32(t), batch, cotangent, total
            )
        assert finite is not None
        return cotangent, total, finite

    @property
    def _unroll(self) -> bool:
        return self.segment.loop == "unroll"

    def _many(self, i: int, state: PyTree) -> tuple[PyTree, Kept]:
        return advance_many(self.rule, self._unroll, state, self.z, np.int32(self.steps(i).start), self.batches(i))
