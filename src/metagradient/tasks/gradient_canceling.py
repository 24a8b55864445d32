r"""Gradient canceling, the baseline of indiscriminate poisoning that looks at one set of parameters, not at a run.

Target parameters come first: gradient-based parameter corruption moves a trained network by $\epsilon$ along its
loss gradient, which makes it worse. Then pixels of the poisoned images are moved until those parameters are a
stationary point of the poisoned training loss:

$$\theta' = \theta + \epsilon\, g / \|g\|, \qquad
  \min_{x_p \in \text{box}} \tfrac12 \bigl\| \nabla_\theta L_\text{clean}(\theta') +
  \nabla_\theta L_p(\theta'; x_p) \bigr\|^2 .$$

Source: Lu, Kamath, Yu, "Exploring the Limits of Model-Targeted Indiscriminate Data Poisoning Attacks", ICML 2023,
arXiv 2303.03592; X. Sun et al., "Exploring the Vulnerability of Deep Neural Networks: A Study of Parameter
Corruption", AAAI 2021, arXiv 2006.05620 (its closed form for a Euclidean ball).
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagradient._jax import compiled
from metagradient.run import full_precision
from metagradient.tasks.classifier import Classifier, normalised
from metagradient.training import TrainState
from metagradient.trees import PyTree

_CHUNK = 500


def corrupted(
    classifier: Classifier, state: TrainState, images: np.ndarray, labels: np.ndarray, share: float
) -> TrainState:
    """A trained network moved along the gradient of its training loss, by a share of its parameters' Euclidean norm.

    Its batch-norm statistics are those of the moved parameters on the same images.

    Arguments:
        state: the trained network.
        images: float32[n, height, width, channels], what it was trained on.
        labels: int32[n].
        share: the move's length over that of the parameters.

    Cost: a gradient over the images, and a forward pass.
    """
    gradient = summed_gradient(classifier, state, images, labels)
    scale = share * optax.tree.norm(state.params) / optax.tree.norm(gradient)
    params = jax.tree.map(lambda p, g: p + scale * g, state.params, gradient)
    size = min(_CHUNK, len(images))
    whole = range(0, len(images) - size + 1, size)
    chunks = (normalised(jnp.asarray(images[i : i + size])) for i in whole)
    statistics = classifier.model.recalibrate(params, state.model_state, chunks)
    return replace(state, params=params, model_state=statistics)


def summed_gradient(classifier: Classifier, state: TrainState, images: np.ndarray, labels: np.ndarray) -> PyTree:
    """Gradient in the parameters of the summed loss, batch-norm statistics held: a pytree like the parameters."""
    total, gradient = jax.tree.map(jnp.zeros_like, state.params), compiled(partial(_gradient, classifier))
    with full_precision(False):
        for i in range(0, len(images), _CHUNK):
            part = gradient(state, images[i : i + _CHUNK], labels[i : i + _CHUNK])
            total = jax.tree.map(jnp.add, total, part)
    return total


def cancel(
    classifier: Classifier,
    state: TrainState,
    clean: PyTree,
    images: np.ndarray,
    labels: np.ndarray,
    inside: np.ndarray,
    *,
    steps: int,
    rate: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Move pixels until the gradient at the target parameters is cancelled.

    Arguments:
        state: target parameters and statistics.
        clean: `summed_gradient` of the images that stay clean.
        images: float32[m, height, width, channels], where the poisoned images start.
        labels: int32[m], theirs.
        inside: float32[height, width, channels], the highest value of each pixel: 1, or 0 in a padded border.
        steps: steps of Adam, projected to the box after each.
        rate: its learning rate in pixel values at the first step; a cosine brings it to zero.

    Returns: the poisoned images, and float32[steps], the norm of what is left of the gradient as a share of the clean
        gradient's norm, before each step.

    Cost: a gradient and its tangent over m images a step: four plain training steps on as many images.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    x, box = jnp.asarray(images), jnp.asarray(inside)
    toward = compiled(partial(value_and_pixel_gradient, classifier))
    memory, left = optimizer.init(x), []
    whole = optax.tree.norm(clean)
    with full_precision(False):
        for _ in range(steps):
            value, gradient = toward(state, clean, x, labels)
            changes, memory = optimizer.update(gradient, memory)
            x = jnp.clip(jnp.asarray(optax.apply_updates(x, changes)), 0, box)
            left.append(jnp.sqrt(2 * value) / whole)
    return np.asarray(x), np.asarray(left, np.float32)


def value_and_pixel_gradient(
    classifier: Classifier, state: TrainState, clean: PyTree, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    r"""The objective $\frac12 \|u\|^2$, $u = g_\text{clean} + \nabla_\theta L(\theta, x)$, and its gradient in x.

    That gradient is $\nabla_x \langle \nabla_\theta L, u \rangle$ with u held: the tangent of $\nabla_x L$ in the
    direction u of the parameters, one forward-over-reverse pass.
    """
    left = jax.tree.map(jnp.add, clean, _gradient(classifier, state, images, labels))
    value = 0.5 * sum(jnp.vdot(x, x) for x in jax.tree.leaves(left))

    def pixel_gradient(params: PyTree) -> jax.Array:
        return jax.grad(_summed_loss, argnums=3)(classifier, replace(state, params=params), labels, images)

    _, gradient = jax.jvp(pixel_gradient, (state.params,), (left,))
    return jnp.asarray(value), gradient


def _gradient(classifier: Classifier, state: TrainState, images: jax.Array, labels: jax.Array) -> PyTree:
    return jax.grad(lambda params: _summed_loss(classifier, replace(state, params=params), labels, images))(
        state.params
    )


def _summed_loss(classifier: Classifier, state: TrainState, labels: jax.Array, images: jax.Array) -> jax.Array:
    logits = classifier.logits(state, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()
