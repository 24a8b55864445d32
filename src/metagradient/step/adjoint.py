r"""The adjoint of one optimiser step, in two stages.

With $g = \nabla_\theta L(\theta, b, z)$ and $(\theta', o') = \mathrm{opt}(\theta, o, g, z)$, a cotangent of the new
state goes back through the optimiser alone, which leaves a cotangent $u$ for $g$, and then through the gradient:
$\partial_{\theta, z} \langle \nabla_\theta L, u \rangle$ is the derivative of $\nabla_{\theta, z} L$ in direction $u$,
one forward-over-reverse pass (MixFlow-MG, arXiv 2505.00793).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metagradient.trees import PyTree, zeros


def gradient_pull_back(
    loss: Callable[[PyTree, PyTree, PyTree], tuple[jax.Array, PyTree]],
    params: PyTree,
    model_state: PyTree,
    z: PyTree,
    u: PyTree,
    model_state_cotangent: PyTree,
) -> tuple[PyTree, PyTree, PyTree]:
    r"""Pull cotangents of the loss gradient and of the new model state back to (params, model_state, z).

    The vector-Jacobian product of (loss, new model state) with cotangent $(1, \epsilon c)$ at $\theta + \epsilon u$,
    differentiated in $\epsilon$ at 0, is both pull-backs at once.

    Arguments:
        loss: `(params, model_state, z) -> (scalar, new model_state)`, all leaves floating.
        u: cotangent of the loss gradient, shaped like `params`.
        model_state_cotangent: cotangent of the new model state.

    Cost: one gradient and its tangent; memory of about twice a gradient's.
    """

    def reverse(params: PyTree, cotangent: PyTree) -> PyTree:
        value, vjp = jax.vjp(loss, params, model_state, z)
        return vjp((jnp.ones_like(value[0]), cotangent))

    primal = (params, zeros(model_state_cotangent))
    return jax.jvp(reverse, primal, (u, model_state_cotangent))[1]
