"""The two things that the engine asks of a training step: advance a state, pull a cotangent back."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from metagradient._jax import convolves, trace
from metagradient.metaparameters import bare
from metagradient.step.explain import Call
from metagradient.trees import PyTree, floating

Cotangent: TypeAlias = tuple[jax.Array, ...]
"""Cotangents of a state: one array for each of its floating leaves, in order."""

Adjoint: TypeAlias = Callable[[Cotangent], tuple[Cotangent, PyTree, jax.Array]]
"""From a cotangent of the next state: those of the state and of z_t, and the asymmetry that a probe found (else 0)."""

Keep: TypeAlias = Literal["state", "gradient", "linearisation"]
"""What a step leaves to its adjoint: its state alone, its loss gradient too, or that gradient's linearisation too."""


@dataclass(frozen=True)
class Choices:
    """What may be chosen in compiling a step.

    Arguments:
        keep: what a single step should leave to its adjoint.
        unrolls: which ways to treat micro-batches are worth measuring.
        linearises: whether a step can keep its linearisation.
        convolves: whether it holds a convolution, which a compiled loop slows down on CPUs.
    """

    keep: Keep = "state"
    unrolls: tuple[bool, ...] = (False,)
    linearises: bool = False
    convolves: bool = False


class Rule(Protocol):
    """A step and its adjoint. Equal rules share compiled programs, where they can be hashed.

    `z` is a wrapped slice (`metaparameters.slices`). `kept` is what `advance` leaves for `pull_back` beside the state.
    """

    @property
    def keep(self) -> Keep:
        """What `advance` leaves for `pull_back`."""
        ...

    @property
    def calls(self) -> tuple[Call, ...]:
        """The functions of the user's that it calls."""
        ...

    def bound(self, args: PyTree) -> "Rule":
        """The same step with constants of the run put in, if it takes some; the other methods are then that one's."""
        ...

    def value(self, state: PyTree, batch: PyTree, z: PyTree) -> PyTree:
        """What the first of them returns, undifferentiated."""
        ...

    def advance(self, state: PyTree, batch: PyTree, z: PyTree) -> tuple[PyTree, PyTree]:
        """`(state, batch, z_t) -> (next state, kept)`."""
        ...

    def pull_back(self, state: PyTree, kept: PyTree, batch: PyTree, z: PyTree) -> Adjoint:
        """The adjoint of one step. What doesn't depend on the cotangent is computed here, once for many of them."""
        ...

    def formed(self, keep: Keep, unroll: bool) -> "Rule":
        """The same step, leaving `keep` to its adjoint, with its micro-batches unrolled or looped over."""
        ...

    def check_adjoint(self, state: PyTree, batch: PyTree, z: PyTree) -> None:
        """Raise, in JAX's words or ours, for a step whose derivative can't be traced. It is called in a trace."""
        ...

    def choices(self, state: PyTree, batch: PyTree, z: PyTree) -> Choices:
        """What may be chosen for this step: one trace of it."""
        ...


def with_args(function: Callable[..., Any], args: PyTree) -> Callable[..., Any]:
    """A function of the user's whose last argument is the run's constants, without that argument."""
    return lambda *arguments: function(*arguments, args)


@dataclass(frozen=True)
class WrittenStep:
    """A step that the user wrote by hand, differentiated whole by `jax.vjp` (reverse over reverse).

    Arguments:
        step: `(state, batch, z_t) -> state`.
        takes_args: whether it takes the run's constants, last.

    Cost: exact, and slower and larger than `LossStep` where the step holds a gradient.
    """

    step: Callable[..., PyTree]
    takes_args: bool = False

    @property
    def keep(self) -> Keep:
        """Nothing but the state."""
        return "state"

    @property
    def calls(self) -> tuple[Call, ...]:
        """The step itself."""
        return (Call("step", self.step, ("state", "batch", "z_t", *("args",) * self.takes_args)),)

    def bound(self, args: PyTree) -> Rule:
        """The step of three arguments."""
        return WrittenStep(with_args(self.step, args)) if self.takes_args else self

    def value(self, state: PyTree, batch: PyTree, z: PyTree) -> PyTree:
        """The next state."""
        return self.step(state, batch, bare(z))

    def advance(self, state: PyTree, batch: PyTree, z: PyTree) -> tuple[PyTree, PyTree]:
        """One step; nothing is kept beside the state."""
        return self.step(state, batch, bare(z)), ()

    def pull_back(self, state: PyTree, kept: PyTree, batch: PyTree, z: PyTree) -> Adjoint:
        """Vector-Jacobian product of the whole step."""
        del kept
        values, rebuild = floating(state)
        _, vjp = jax.vjp(lambda x, z: floating(self.step(rebuild(x), batch, bare(z)))[0], values, z)
        return lambda cotangent: (*vjp(cotangent), jnp.zeros(()))

    def check_adjoint(self, state: PyTree, batch: PyTree, z: PyTree) -> None:
        """The first time that the step is differentiated."""
        self.pull_back(state, (), batch, z)(floating(state)[0])

    def formed(self, keep: Keep, unroll: bool) -> Rule:
        """There is one form."""
        del keep, unroll
        return self

    def choices(self, state: PyTree, batch: PyTree, z: PyTree) -> Choices:
        """There is one form."""
        return Choices(convolves=convolves(trace(self.advance, state, batch, z)[0]))
