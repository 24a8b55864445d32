"""What a loss's program holds, and so which adjoint is right and fast for it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import jax

from metagradient._jax import TRUE_DERIVATIVE, Program, convolves, has_loops, own_rules

F = TypeVar("F", bound=Callable[..., Any])


def true_derivative(function: F) -> F:
    """Mark a function with a rule of its own (`jax.custom_vjp`, `jax.custom_jvp`) whose rule is its derivative.

    A loss that holds somebody's own rule is differentiated in reverse over reverse, as the rule may be anything
    (gradient reversal, clipping in the backward pass). A rule that is a faster or more stable way to the true
    derivative, and that can be differentiated forwards itself, keeps the two-stage adjoint once it is marked.

    Arguments:
        function: what is called in the loss.

    Returns: the same function, marked wherever it is called: within loops, conditionals and other transformations too.

    Danger: nothing compares the rule with the derivative. A mark that isn't true makes metagradients wrong.

    >>> import jax, jax.numpy as jnp, metagradient as mg
    >>> @mg.true_derivative
    ... @jax.custom_vjp
    ... def softplus(x):
    ...     return jnp.logaddexp(x, 0)
    >>> softplus.__wrapped__.defvjp(lambda x: (jnp.logaddexp(x, 0), x), lambda x, g: (g * jax.nn.sigmoid(x),))
    >>> float(jax.grad(softplus)(0.0))
    0.5
    """

    @wraps(function)
    def marked(*arguments: Any, **options: Any) -> Any:
        with jax.named_scope(TRUE_DERIVATIVE):
            return function(*arguments, **options)

    return marked  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Held:
    """What matters of a loss's program.

    Arguments:
        loops: it has loops or rematerialisation, whose linearisation would keep all that they bound.
        convolves: it has convolutions.
        rules: where it has derivative rules that may be anything.
    """

    loops: bool
    convolves: bool
    rules: tuple[str, ...]

    @classmethod
    def of(cls, program: Program) -> "Held":
        """Read off a traced loss."""
        return cls(has_loops(program), convolves(program), tuple(own_rules(program)))
