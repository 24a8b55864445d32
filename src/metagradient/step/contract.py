"""What a training must keep to before compute is spent on it: structure, precision, purity."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from metagradient._jax import Program, digest, lowered_precision, trace
from metagradient.errors import ImpureStepError, PrecisionError, StructureError
from metagradient.given import Given
from metagradient.metaparameters import check_concrete
from metagradient.step.explain import explained
from metagradient.step.programs import Programs, signature
from metagradient.trees import PyTree, is_floating, mismatch, paths


class Contract:
    """A step, traced: it must return the state it got, in full precision, and trace to the same program every time.

    Arguments:
        programs: of the step; they remember the program that it first was.
        state, batch: the first ones.
        given: what every step is given.

    Cost: a trace a call of `check` (two at the first of its kind) and of `recheck`.
    """

    def __init__(self, programs: Programs, state: PyTree, batch: PyTree, given: Given, *, allow_low_precision: bool):
        arguments, rule = _shapes((state, given, batch)), programs.rule

        def first(method: str) -> Callable[..., Any]:
            """A method `(state, batch, z_t)` of the step, at the first one."""

            def called(state: PyTree, given: Given, batch: PyTree) -> Any:
                return getattr(rule.bound(given.args), method)(state, batch, given.seen(jnp.int32(0), batch))

            return called

        def step(*arguments: PyTree) -> PyTree:
            return first("advance")(*arguments)[0]

        self._digests = programs.digests
        # A program is traced for the mesh in use, and says so.
        self._key = jax.sharding.get_abstract_mesh(), signature(arguments)
        self._state = arguments[0]
        self._allow_low_precision = allow_low_precision
        self._trace: Callable[[], Any] = lambda: trace(step, *arguments)
        self._adjoint: Callable[[], Any] = lambda: jax.eval_shape(first("check_adjoint"), *arguments)
        self._explained = lambda: explained(*rule.calls, program=lambda: trace(first("value"), *arguments)[0])

    def check(self) -> None:
        """Raise `StructureError`, `PrecisionError` or `ImpureStepError` for a step that can't be replayed.

        `DerivativeError` for a loss that has no gradient.
        """
        if not jax.tree.leaves(self._state):
            raise StructureError("the initial state has no leaves: there is nothing to train")
        with self._explained():
            closed, after = self._trace()
        for held in closed.consts:
            check_concrete("an array that the step closes over", held)
        problem = mismatch(self._state, after)
        if problem:
            raise StructureError(f"the step must return a state like the one it got, but {problem}")
        if not self._allow_low_precision:
            _check_precision(self._state, closed)
        if self._key not in self._digests:
            self._digests[self._key] = self._retraced()
        self.recheck(digest(closed))

    def check_adjoint(self) -> None:
        """Raise `DerivativeError` for a step that can't be pulled back through, where one trace tells."""
        with self._explained():
            self._adjoint()

    def recheck(self, found: str | None = None) -> None:
        """Raise `ImpureStepError` if the step no longer traces to the program that it first was."""
        found = found or self._retraced()
        if found != self._digests.setdefault(self._key, found):
            raise ImpureStepError(
                "the step traces to another program than before: it reads something outside (state, batch, z_t) that "
                "changed (fresh randomness, a global, an attribute). Pass it in z, the state or the batch, or build a "
                "new function for it"
            )

    @property
    def program(self) -> Program:
        """Of the first step, traced: `(state, given, batch) -> state`."""
        return self._trace()[0]

    def _retraced(self) -> str:
        return digest(self.program)


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
