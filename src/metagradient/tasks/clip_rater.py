"""What a rater of image–text pairs goes by: features of a pair from models trained on the pool, and of its caption.

A weight of its own for every pair is as many numbers to learn as the pool has pairs. A few hundred clean pairs don't
hold that much: such weights fit them, and say little of what they stand for. A rater's weight is a function of a few
features, so that what is learnt of one pair holds for all that are like it.

Source of the idea: D. Calian et al., "DataRater", arXiv 2505.17895, whose rater is a network that sees the data.
"""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from metagradient.data.captions import words
from metagradient.data.image_text import Pool
from metagradient.models.clip import contrastive_losses

Embedded: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Unit vectors of images and of captions by one model, float32[n, d] each."""

_NEGATIVES = 512
_DIRECTIONS = 8
_NEAREST = 5
_FURTHEST = 3.0


def features(
    pool: Pool,
    embeddings: Sequence[Sequence[Embedded]],
    targets: Sequence[Embedded],
    seed: int,
) -> np.ndarray:
    """Features of every pair, float32[n, f], each of mean 0 and variance 1, cut off at 3.

    After every number of steps: the cosine of image and caption, and the pair's contrastive loss among random others,
    each a mean over models. After the last: how near images and captions lie to the target's, a mean over models too,
    and the first principal components of both, by the last model. Of the caption: its length in words and in
    characters, and the shares of letters and digits.

    `feature_names` has their names.

    Arguments:
        pool: the pairs.
        embeddings: of the pool, by models trained on it: for every number of steps, by every model.
        targets: of the target, by every model after the last number of steps.
        seed: of who is whose negative.
    """
    columns = []
    order = np.random.default_rng(seed).permutation(len(pool))
    for models in embeddings:
        columns.append(np.mean([(images * texts).sum(1) for images, texts in models], axis=0))
        columns.append(np.mean([_losses(images, texts, order) for images, texts in models], axis=0))
    for kind in (0, 1):
        nearness = [_nearness(here[kind], there[kind]) for here, there in zip(embeddings[-1], targets, strict=True)]
        columns += [*_components(embeddings[-1][-1][kind]).T, np.mean(nearness, axis=0)]
    solid = ["".join(caption.split()) for caption in pool.captions]
    columns += [
        np.log1p([len(words(caption)) for caption in pool.captions]),
        np.log1p([len(caption) for caption in solid]),
        np.array([sum(c.isascii() and c.isalpha() for c in text) / max(1, len(text)) for text in solid]),
        np.array([sum(c.isdigit() for c in text) / max(1, len(text)) for text in solid]),
    ]
    table = np.stack(columns, 1).astype(np.float64)
    table = (table - table.mean(0)) / np.maximum(table.std(0), 1e-6)
    return np.clip(table, -_FURTHEST, _FURTHEST).astype(np.float32)


def feature_names(steps: Sequence[int]) -> list[str]:
    """Names of the features, in their order.

    Arguments:
        steps: after how many the models were taken.
    """
    of_models = [name for count in steps for name in (cosine_name(count), f"contrastive loss after {count} steps")]
    of_vectors = [
        f"{kind}: {what}"
        for kind in ("image", "caption")
        for what in (*(f"component {i + 1}" for i in range(_DIRECTIONS)), "nearness to the target")
    ]
    return [*of_models, *of_vectors, *(f"caption: {what}" for what in ("words", "characters", "letters", "digits"))]


def cosine_name(steps: int) -> str:
    """Name of the feature that CLIP-score filters go by: the cosine of image and caption after so many steps."""
    return f"cosine after {steps} steps"


def rated(table: jax.Array, rater: jax.Array) -> jax.Array:
    """Weights `2 / (1 + exp(-s / 2))`, `[n]`, of pairs whose features `[n, f]` times a rater `[f]` sum up to s."""
    return 2 * jax.nn.sigmoid(table @ rater / 2)


def _losses(images: np.ndarray, texts: np.ndarray, order: np.ndarray, scale: float = 10.0) -> np.ndarray:
    """Contrastive losses among random others, float32[n]; those of a last, smaller batch are brought to its scale."""
    found = np.zeros(len(order), np.float32)
    for start in range(0, len(order), _NEGATIVES):
        rows = order[start : start + _NEGATIVES]
        losses = contrastive_losses(jnp.asarray(images[rows]), jnp.asarray(texts[rows]), scale)
        found[rows] = np.asarray(losses) - np.log(len(rows))
    return found


def _components(vectors: np.ndarray) -> np.ndarray:
    """The first eight principal components, float[n, 8]; of fewer dimensions, zeros for those that aren't there."""
    centred = vectors - vectors.mean(0)
    _, _, directions = np.linalg.svd(centred.T @ centred)
    found = np.zeros((len(vectors), _DIRECTIONS), vectors.dtype)
    found[:, : len(directions)] = centred @ directions[:_DIRECTIONS].T
    return found


def _nearness(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Mean cosine with the five nearest others, float[n]."""
    nearest = np.sort(vectors @ others.T, axis=1)[:, -_NEAREST:]
    return nearest.mean(1)
