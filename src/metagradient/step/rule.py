"""The two things that the engine asks of a training step: advance a state, pull a cotangent back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import jax

from metagradient.metaparameters import bare
from metagradient.trees import PyTree, floating

Cotangent: TypeAlias = tuple[jax.Array, ...]
"""Cotangents of a state: one array for each of its floating leaves, in order."""

Keep: TypeAlias = Literal["state", "gradient", "linearisation"]
"""What a step leaves to its adjoint: its state alone, its loss gradient too, or that gradient's linearisation too."""


class Rule(Protocol):
    """A step and its adjoint. Hashable: equal rules share compiled programs.

    `z` is a wrapped slice (`metaparameters.slices`). `kept` is what `advance` leaves for `pull_back` beside the state.
    """

    @property
    def keep(self) -> Keep:
        """What `advance` leaves for `pull_back`."""
        ...

    @property
    def linearises(self) -> bool:
        """Whether a step can keep its linearisation."""
        ...

    def advance(self, state: PyTree, batch: PyTree, z: PyTree) -> tuple[PyTree, PyTree]:
        """`(state, batch, z_t) -> (next state, kept)`."""
        ...

    def pull_back(
        self, state: PyTree, kept: PyTree, batch: PyTree, z: PyTree, cotangent: Cotangent
    ) -> tuple[Cotangent, PyTree]:
        """Cotangents of (state, z_t) from that of the next state."""
        ...

    def formed(self, keep: Keep, unroll: bool) -> "Rule":
        """The same step, leaving `keep` to its adjoint, with its micro-batches unrolled or looped over."""
        ...

    def choices(self, state: PyTree, batch: PyTree, z: PyTree) -> tuple[Keep, tuple[bool, ...]]:
        """What a single step should keep, and which ways to treat micro-batches are worth measuring."""
        ...


@dataclass(frozen=True)
class WrittenStep:
    """A step that the user wrote by hand, differentiated whole by `jax.vjp` (reverse over reverse).

    Cost: exact, and slower and larger than `LossStep` where the step holds a gradient.
    """

    step: Callable[[PyTree, PyTree, PyTree], PyTree]

    @property
    def keep(self) -> Keep:
        """Nothing but the state."""
        return "state"

    @property
    def linearises(self) -> bool:
        """Its adjoint takes the step anew."""
        return False

    def advance(self, state: PyTree, batch: PyTree, z: PyTree) -> tuple[PyTree, PyTree]:
        """One step; nothing is kept beside the state."""
        return self.step(state, batch, bare(z)), ()

    def pull_back(
        self, state: PyTree, kept: PyTree, batch: PyTree, z: PyTree, cotangent: Cotangent
    ) -> tuple[Cotangent, PyTree]:
        """Vector-Jacobian product of the whole step."""
        del kept
        values, rebuild = floating(state)
        _, vjp = jax.vjp(lambda x, z: floating(self.step(rebuild(x), batch, bare(z)))[0], values, z)
        return vjp(cotangent)

    def formed(self, keep: Keep, unroll: bool) -> Rule:
        """There is one form."""
        del keep, unroll
        return self

    def choices(self, state: PyTree, batch: PyTree, z: PyTree) -> tuple[Keep, tuple[bool, ...]]:
        """There is one form."""
        del state, batch, z
        return "state", (False,)
