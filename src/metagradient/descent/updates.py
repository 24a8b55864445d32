"""Updates of metaparameters: optax transformations, to be chained with optax's own, and projections.

A meta-step is `z <- project(z + update(gradient))`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from metagradient.trees import PyTree


def normalise() -> optax.GradientTransformation:
    """Scale every leaf of a metagradient to unit root mean square; a leaf of zeros stays zero.

    Metagradients of different seeds can differ tenfold in size: this keeps one from drowning the others.
    """

    def scale(g: jax.Array) -> jax.Array:
        rms = jnp.sqrt(jnp.mean(g**2))
        return g / jnp.where(rms > 0, rms, 1)

    return optax.stateless(lambda g, _: jax.tree.map(scale, g))


def normalised(rate: optax.ScalarOrSchedule, momentum: float = 0.0) -> optax.GradientTransformation:
    r"""Descent with momentum, in moves of a given size.

    $$m \leftarrow \mu m + g / \mathrm{rms}(g), \qquad z \leftarrow z - \eta\, m / \mathrm{rms}(m)$$

    Arguments:
        rate: $\eta$, the root mean square of a meta-step's move, in units of z; or a schedule over meta-steps.
        momentum: $\mu$ in [0, 1).
    """
    return optax.chain(
        normalise(),
        optax.trace(momentum),
        normalise(),
        optax.scale_by_learning_rate(rate),
    )


def box(low: float, high: float) -> Callable[[PyTree], PyTree]:
    """Projection of every leaf onto [low, high]."""
    return lambda z: jax.tree.map(lambda x: jnp.clip(x, low, high), z)
