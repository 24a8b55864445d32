"""What a practitioner would try against wrong labels: scores of examples, the higher the more trusted."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagradient._jax import compiled
from metagradient.data.images import Images
from metagradient.optional import library
from metagradient.tasks.classifier import Classifier
from metagradient.training import TrainState
from metagradient.trees import PyTree

_CHUNK = 250
_FOLDS = 4

Fit = Callable[[np.ndarray], TrainState]
"""Trains on some rows of the pool, int[m], and returns the final state."""


def small_loss(classifier: Classifier, state: TrainState, pool: Images) -> np.ndarray:
    """Minus each example's loss under a network trained on all of them, float[n]."""
    assert pool.observed is not None
    scores = classifier.scores(state, pool.images)
    return -np.asarray(optax.softmax_cross_entropy_with_integer_labels(scores, pool.observed))


def gradient_cosine(classifier: Classifier, state: TrainState, pool: Images, target: Images) -> np.ndarray:
    """Cosine of each example's loss gradient with the mean gradient of clean target images, float[n].

    Gradients are in all parameters of a network trained on the pool, with its batch-norm statistics held fixed.

    Cost: a backward pass an example, with a copy of the parameters for each of a few hundred at once.
    """
    assert pool.observed is not None
    mean = _mean_gradient(classifier, state, target)
    cosines, chunks = compiled(partial(_cosines, classifier)), range(0, len(pool), _CHUNK)
    return np.concatenate(
        [np.asarray(cosines(state, pool.images[i : i + _CHUNK], pool.observed[i : i + _CHUNK], mean)) for i in chunks]
    )


def cleanlab() -> tuple[Any, Any]:
    """Cleanlab's modules of filters and of ranks; `ConfigError` where it isn't installed."""
    return library("cleanlab.filter", "labels"), library("cleanlab.rank", "labels")


def confident_learning(classifier: Classifier, fit: Fit, pool: Images, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Confident learning, by the cleanlab library: from class probabilities of networks that didn't see an example.

    Arguments:
        fit: as `Fit`; called for each of four folds.
        seed: of the folds.

    Returns: which examples it keeps, bool[n]; and the label quality (self-confidence) by which it ranks, float[n].

    Errors: `ConfigError` where cleanlab is not installed.

    Source: C. Northcutt, L. Jiang, I. Chuang, "Confident Learning", JAIR 2021.
    """
    filters, ranks = cleanlab()
    assert pool.observed is not None
    probabilities = np.empty((len(pool), classifier.classes))
    folds = np.array_split(np.random.default_rng((seed, 6)).permutation(len(pool)), _FOLDS)
    for number, fold in enumerate(folds):
        state = fit(np.concatenate(folds[:number] + folds[number + 1 :]))
        probabilities[fold] = jax.nn.softmax(classifier.scores(state, pool.images[fold]))
    wrong = filters.find_label_issues(pool.observed, probabilities, n_jobs=1)
    return ~wrong, ranks.get_label_quality_scores(pool.observed, probabilities)


def _loss(classifier: Classifier, state: TrainState, params: PyTree, image: jax.Array, label: jax.Array) -> jax.Array:
    logits = classifier.logits(TrainState(params, None, state.model_state, state.step), image[None])
    return optax.softmax_cross_entropy_with_integer_labels(logits[0], label)


def _flat_gradient(classifier: Classifier, state: TrainState, image: Any, label: Any) -> jax.Array:
    gradient = jax.grad(partial(_loss, classifier, state))(state.params, image, label)
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradient)])


def _mean_gradient(classifier: Classifier, state: TrainState, images: Images) -> jax.Array:
    objective = classifier.mean_loss(images)

    def loss(params: PyTree) -> jax.Array:
        return objective(TrainState(params, None, state.model_state, state.step), None)

    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(jax.grad(loss)(state.params))])


def _cosines(classifier: Classifier, state: TrainState, images: Any, labels: Any, mean: jax.Array) -> jax.Array:
    gradients = jax.vmap(lambda x, y: _flat_gradient(classifier, state, x, y))(images, labels)
    norms = jnp.linalg.norm(gradients, axis=1) * jnp.linalg.norm(mean)
    return gradients @ mean / jnp.where(norms > 0, norms, 1)
