"""What a training must keep to before compute is spent on it: structure, precision, purity."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from metagradient.errors import ImpureStepError, PrecisionError, StructureError
from metagradient.metaparameters import PerStep, is_kind, needs_index, slices
from metagradient.step.rule import Rule
from metagradient.step.trace import digest, lowered_precision, trace
from metagradient.trees import PyTree, is_floating, mismatch, paths


def check_steps(z: PyTree, steps: int) -> None:
    """Raise `StructureError` unless every `PerStep` leaf of a wrapped z has one entry a step."""
    for path, kind in jax.tree.flatten_with_path(z, is_leaf=is_kind)[0]:
        if isinstance(kind, PerStep) and kind.value.shape[:1] != (steps,):
            raise StructureError(
                f"z{jax.tree_util.keystr(path)} is PerStep with shape {list(kind.value.shape)}, but the run takes "
                f"T = {steps} steps"
            )


class Contract:
    """A step, traced: it must return the state it got, in full precision, and trace to the same program every time.

    Arguments:
        rule: the step.
        state, batch, z: the first ones; z wrapped.

    Cost: a trace a call of `check` (two at the first of its kind) and of `still_holds`.
    """

    def __init__(self, rule: Rule, state: PyTree, batch: PyTree, z: PyTree, *, allow_low_precision: bool):
        arguments = _shapes((state, z, batch))

        def step(state: PyTree, z: PyTree, batch: PyTree) -> PyTree:
            index = batch["index"] if needs_index(z) else None
            return rule.advance(state, batch, slices(z, jnp.int32(0), index))[0]

        leaves, treedef = jax.tree.flatten(arguments)
        self._key = rule, treedef, tuple((x.shape, x.dtype) for x in leaves)
        self._state = arguments[0]
        self._allow_low_precision = allow_low_precision
        self._trace: Callable[[], Any] = lambda: trace(step, *arguments)

    def check(self) -> None:
        """Raise `StructureError`, `PrecisionError` or `ImpureStepError` for a step that can't be differentiated."""
        if not jax.tree.leaves(self._state):
            raise StructureError("the initial state has no leaves: there is nothing to train")
        closed, after = self._trace()
        problem = mismatch(self._state, after)
        if problem:
            raise StructureError(f"the step must return a state like the one it got, but {problem}")
        if not self._allow_low_precision:
            _check_precision(self._state, closed)
        _first_digest(self._key, _Once(self._retraced))
        self.still_holds(digest(closed))

    def still_holds(self, found: str | None = None) -> None:
        """Raise `ImpureStepError` if the step no longer traces to the program that it first was."""
        found = found or self._retraced()
        if found != _first_digest(self._key, _Once(lambda: found)):
            raise ImpureStepError(
                "the step traces to another program than before: it reads something outside (state, batch, z_t) that "
                "changed (fresh randomness, a global, an attribute). Pass it in z, the state or the batch, or build a "
                "new function for it"
            )

    def _retraced(self) -> str:
        return digest(self._trace()[0])


class _Once:
    """A thunk that never counts in a cache key."""

    def __init__(self, make: Callable[[], str]):
        self.make = make

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Once)


@lru_cache(maxsize=256)
def _first_digest(key: tuple, make: _Once) -> str:
    del key
    return make.make()


def _shapes(tree: PyTree) -> PyTree:
    return jax.eval_shape(lambda x: x, tree)


def _check_precision(state: PyTree, closed: Any) -> None:
    for path, leaf in paths(state):
        if is_floating(leaf) and leaf.dtype.itemsize < 4:
            raise PrecisionError(
                f"state leaf {path} is {leaf.dtype}: metagradients in half precision are noise. Keep states in "
                "float32, or pass allow_low_precision=True"
            )
    low = lowered_precision(closed)
    if low:
        raise PrecisionError(
            f"the step {low}: metagradients in lowered precision are often noise. Use float32 and precision='highest', "
            "or pass allow_low_precision=True"
        )
