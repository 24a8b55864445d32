r"""The pull-back of a loss gradient: the second stage of a step's adjoint.

With $g = \nabla_\theta L(\theta, b, z)$ and $(\theta', o') = \mathrm{opt}(\theta, o, g, z)$, a cotangent of the new
state goes back through the optimiser alone, which leaves a cotangent $u$ for $g$, and then through the gradient:
$\partial_{\theta, z} \langle \nabla_\theta L, u \rangle$ is the derivative of $\nabla_{\theta, z} L$ in direction $u$,
one forward-over-reverse pass (MixFlow-MG, arXiv 2505.00793).

That the two are the same takes the symmetry of the Jacobian of $\nabla L$. It holds for every loss that JAX
differentiates by its own rules. A loss with a rule of somebody's own (`jax.custom_vjp`) need not have it: there the
gradient is pulled back in reverse, by the definition.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from metagradient.trees import PyTree, zeros

Loss: TypeAlias = Callable[[PyTree, PyTree, PyTree], tuple[tuple[jax.Array, PyTree], Any]]
"""`(params, model_state, z) -> ((scalar, new model_state), anything else)`; all leaves but the last's are floating."""

PullBack: TypeAlias = Callable[[PyTree, PyTree, jax.Array | None], tuple[PyTree, PyTree, PyTree]]
"""Cotangents of (params, model_state, z), from those of the loss gradient, of the new model state and of the loss.

The last is None where the loss itself is read by nobody.
"""


def gradient_pull_back(loss: Loss, params: PyTree, model_state: PyTree, z: PyTree) -> PullBack:
    r"""The pull-back of a loss gradient, of the new model state and of the loss, at once, by symmetry.

    The vector-Jacobian product of (loss, new model state) with cotangent $(1 + \epsilon w, \epsilon c)$ at
    $\theta + \epsilon u$, differentiated in $\epsilon$ at 0, pulls all three back.

    Cost of a call: one gradient and its tangent; memory of about twice a gradient's.
    """

    def pull_back(u: PyTree, c: PyTree, w: jax.Array | None) -> tuple[PyTree, PyTree, PyTree]:
        read = w is not None
        reverse = _reverse(loss, model_state, z, read)
        primal, tangent = (params, zeros(model_state)), (u, c)
        if read:
            primal, tangent = (*primal, jnp.ones_like(w)), (*tangent, w)
        return jax.jvp(reverse, primal, tangent, has_aux=True)[1]

    return pull_back


def linearised_gradient(
    loss: Loss, params: PyTree, model_state: PyTree, z: PyTree, *, value_read: bool
) -> tuple[PyTree, jax.Array, Any, PullBack]:
    """A loss gradient that keeps all that its pull-back can compute before it knows its arguments.

    Arguments:
        value_read: whether the loss itself has a cotangent.

    Returns: the gradient; the loss; its other output; and the pull-back, which is also a pytree of arrays.

    Cost: one gradient, and the memory of the activations of its forward and backward passes. A call of the pull-back
    is one tangent.
    """
    primal = params, zeros(model_state)
    if value_read:
        primal = *primal, jnp.ones((), jax.eval_shape(loss, params, model_state, z)[0][0].dtype)
    reverse = _reverse(loss, model_state, z, value_read)
    gradients, linear, (value, rest) = jax.linearize(reverse, *primal, has_aux=True)
    return gradients[0], value, rest, jax.tree_util.Partial(_applied, linear)


def _applied(linear: Any, u: PyTree, c: PyTree, w: jax.Array | None) -> tuple[PyTree, PyTree, PyTree]:
    return linear(u, c) if w is None else linear(u, c, w)


def reversed_gradient(
    loss: Loss, params: PyTree, model_state: PyTree, z: PyTree
) -> tuple[PyTree, jax.Array, Any, PullBack]:
    """A loss gradient and its pull-back in reverse over reverse: what JAX makes of the definition, whatever the loss.

    Returns: as `linearised_gradient`; but its pull-back is no pytree.

    Cost: one gradient and its vector-Jacobian product, and the memory of the activations of both.
    """

    def gradient(params: PyTree, model_state: PyTree, z: PyTree) -> tuple[tuple[PyTree, PyTree, jax.Array], Any]:
        def alone(params: PyTree) -> tuple[jax.Array, Any]:
            (value, statistics), rest = loss(params, model_state, z)
            return value, (statistics, rest)

        (value, (statistics, rest)), g = jax.value_and_grad(alone, has_aux=True)(params)
        return (g, statistics, value), rest

    (g, _, value), vjp, rest = jax.vjp(gradient, params, model_state, z, has_aux=True)
    return g, value, rest, lambda u, c, w: vjp((u, c, jnp.zeros_like(value) if w is None else w))


def asymmetry(loss: Loss, params: PyTree, model_state: PyTree, z: PyTree, u: PyTree, key: jax.Array) -> jax.Array:
    r"""By how much the Jacobian J of a loss gradient fails the symmetry that `gradient_pull_back` takes for granted.

    J is that of the whole gradient in $x = (\theta, s, z)$, u a cotangent of its first part, v random in all of x:
    $|v^\top (J u) - u^\top (J v)|$, where every leaf of v is scaled so that it counts alike.

    Returns: a scalar, near zero (rounding) where J is symmetric, of order one where it isn't.

    Cost: two gradients and their tangents.
    """

    def gradient(*x: PyTree) -> PyTree:
        (value, statistics), vjp, _ = jax.vjp(loss, *x, has_aux=True)
        return vjp((jnp.ones_like(value), zeros(statistics)))

    x = params, model_state, z
    _, pushed = jax.jvp(gradient, x, (u, zeros(model_state), zeros(z)))
    leaves, treedef = jax.tree.flatten(pushed)
    norms = jnp.stack([jnp.linalg.norm(leaf) for leaf in leaves])
    scales = jnp.maximum(norms, 1e-3 * jnp.max(norms))
    scales = jnp.where(scales > 0, scales, 1)
    drawn = [
        jax.random.normal(k, leaf.shape, leaf.dtype) / scale.astype(leaf.dtype)
        for k, leaf, scale in zip(jax.random.split(key, len(leaves)), leaves, scales, strict=True)
    ]
    _, back = jax.jvp(gradient, x, jax.tree.unflatten(treedef, drawn))
    found = sum(jnp.vdot(a, b) for a, b in zip(drawn, leaves, strict=True))
    expected = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(u), jax.tree.leaves(back[0]), strict=True))
    return jnp.abs(found - expected)


def _reverse(loss: Loss, model_state: PyTree, z: PyTree, value_read: bool) -> Callable[..., tuple[PyTree, Any]]:
    def reverse(params: PyTree, cotangent: PyTree, *weight: jax.Array) -> tuple[PyTree, Any]:
        (value, _), vjp, rest = jax.vjp(loss, params, model_state, z, has_aux=True)
        (one,) = weight if value_read else (jnp.ones_like(value),)
        return vjp((one, cotangent)), (value, rest)

    return reverse
