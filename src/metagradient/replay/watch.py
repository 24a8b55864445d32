"""What a traversal passes through, compared with the first run: states and batches by their fingerprints."""

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from metagradient.errors import DerivativeError, ReplayMismatch
from metagradient.step.runner import Reached
from metagradient.step.segment import Pulled
from metagradient.trees import PyTree, paths

_PENDING = 4
# A probe of a symmetric Jacobian finds rounding; of another, numbers of order one.
_ASYMMETRIC = 0.01


class NotFinite(Exception):
    """Inside the engine only: something not finite went by; a careful pass finds out where."""


class Watch:
    """Remembers what the first run passed through, and compares every replay with it.

    Comparisons lag a few programs behind, so that the device never waits for them.

    Arguments:
        stamp: fingerprint of batches.
        on: whether to compare; non-finite values are looked for in any case.
    """

    def __init__(self, stamp: Callable[[PyTree], Any], on: bool):
        self.on = on
        self._stamp = stamp
        self._first: dict[tuple[str, int], Any] = {}
        self._pending: deque[tuple[Any, ...]] = deque()

    def state(self, step: int, reached: Reached, *, wait: bool = True) -> None:
        """The state before `step` was reached, for the first time or again.

        Arguments:
            wait: let the device run only a few states ahead; not needed where they are all kept.
        """
        self._see("state", step, reached.state, *reached.stamp)
        if wait:
            self._settle(_PENDING)

    def batches(self, step: int, batches: PyTree) -> None:
        """The batches of a segment that starts at `step` were read."""
        if self.on:
            self._see("batch", step, batches, self._stamp(batches), None)
            self._settle(_PENDING)

    def cotangent(self, step: int, pulled: Pulled, *, last: bool) -> None:
        """The cotangent of the state before `step` was found.

        Arguments:
            last: it is the first state that is differentiated. What of it depends on z is seen in the gradient; of the
                rest (moments that start as zeros, under a root) it needn't be finite.
        """
        self._pending.append(("cotangent", step, None, None, pulled.asymmetry, None if last else pulled.finite))
        self._settle(_PENDING)

    def settle(self) -> None:
        """Make all comparisons that are still open."""
        self._settle(0)

    def _see(self, what: str, step: int, tree: PyTree, found: Any, finite: Any) -> None:
        expected = self._first.setdefault((what, step), found) if self.on else found
        # The structure alone, for names: the state itself must not be held back.
        structure = jax.tree.structure(tree) if expected is not found else None
        self._pending.append((what, step, structure, expected, found, finite))

    def _settle(self, most: int) -> None:
        while len(self._pending) > most:
            what, step, structure, expected, found, finite = self._pending.popleft()
            if structure is not None and not np.array_equal(expected, found):
                which = np.flatnonzero(np.any(np.asarray(expected) != np.asarray(found), axis=1))
                leaf = paths(jax.tree.unflatten(structure, range(structure.num_leaves)))[which[0]][0]
                raise ReplayMismatch(_explain(what, step, leaf))
            if finite is not None and not np.asarray(finite).all():
                raise NotFinite
            if what == "cotangent" and (apart := max(float(x) for x in jax.tree.leaves(found))) > _ASYMMETRIC:
                raise DerivativeError(
                    "the loss holds a derivative rule of its own that isn't the derivative of its value: from step "
                    f"{step} on its gradient's Jacobian is asymmetric (by {apart:.0%}), and the gradient can't be "
                    "differentiated in reverse, where that wouldn't matter. Write the rule without while loops"
                )


def _explain(what: str, step: int, leaf: str) -> str:
    if what == "batch":
        return (
            f"the batches from step {step} on changed between two reads (leaf {leaf}): batches[t] must be the same at "
            "every call"
        )
    return (
        f"replay reached another state before step {step} than the first run (leaf {leaf} differs). The step or its "
        "batches draw on something outside (state, batch, z_t): fresh randomness, a callback, a changed global; on a "
        "GPU, also nondeterministic kernels (set XLA_FLAGS=--xla_gpu_deterministic_ops=true)"
    )
