r"""The adjoint of one optimiser step, in two stages.

With $g = \nabla_\theta L(\theta, b, z)$ and $(\theta', o') = \mathrm{opt}(\theta, o, g, z)$, a cotangent of the new
state goes back through the optimiser alone, which leaves a cotangent $u$ for $g$, and then through the gradient:
$\partial_{\theta, z} \langle \nabla_\theta L, u \rangle$ is the derivative of $\nabla_{\theta, z} L$ in direction $u$,
one forward-over-reverse pass (MixFlow-MG, arXiv 2505.00793).
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from metagradient.trees import PyTree, zeros

Loss: TypeAlias = Callable[[PyTree, PyTree, PyTree], tuple[tuple[jax.Array, PyTree], Any]]
"""`(params, model_state, z) -> ((scalar, new model_state), anything else)`; all leaves but the last's are floating."""

PullBack: TypeAlias = Callable[[PyTree, PyTree], tuple[PyTree, PyTree, PyTree]]
"""Cotangents of (params, model_state, z) from those of the loss gradient and of the new model state."""


def gradient_pull_back(loss: Loss, params: PyTree, model_state: PyTree, z: PyTree) -> PullBack:
    r"""The pull-back of a loss gradient and of the new model state, at once.

    The vector-Jacobian product of (loss, new model state) with cotangent $(1, \epsilon c)$ at $\theta + \epsilon u$,
    differentiated in $\epsilon$ at 0, pulls both back.

    Cost of a call: one gradient and its tangent; memory of about twice a gradient's.
    """
    reverse = _reverse(loss, model_state, z)
    primal = params, zeros(model_state)
    return lambda u, c: jax.jvp(reverse, primal, (u, c), has_aux=True)[1]


def linearised_gradient(loss: Loss, params: PyTree, model_state: PyTree, z: PyTree) -> tuple[PyTree, Any, PullBack]:
    """A loss gradient that keeps all that its pull-back can compute before it knows its arguments.

    Returns: the gradient; the loss's other output; and the pull-back, which is also a pytree of arrays.

    Cost: one gradient, and the memory of the activations of its forward and backward passes. A call of the pull-back
    is one tangent.
    """
    gradients, pull_back, rest = jax.linearize(_reverse(loss, model_state, z), params, zeros(model_state), has_aux=True)
    return gradients[0], rest, pull_back


def _reverse(loss: Loss, model_state: PyTree, z: PyTree) -> Callable[[PyTree, PyTree], tuple[PyTree, Any]]:
    def reverse(params: PyTree, cotangent: PyTree) -> tuple[PyTree, Any]:
        (value, _), vjp, rest = jax.vjp(loss, params, model_state, z, has_aux=True)
        return vjp((jnp.ones_like(value), cotangent)), rest

    return reverse
