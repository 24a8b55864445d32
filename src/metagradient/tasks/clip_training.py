"""A CLIP by configuration: how it is trained on pairs with weights or counts, and what it is good for afterwards."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagradient.data.batches import EpochBatches
from metagradient.data.captions import HashedWords
from metagradient.data.image_text import Pool
from metagradient.errors import ConfigError
from metagradient.models.clip import CLIP, ConvolutionTower, TextTower, Transformer, VisionTower, contrastive_losses
from metagradient.models.convolution import Method
from metagradient.step.programs import hold
from metagradient.tasks.classifier import one_cycle
from metagradient.tasks.clip_rater import rated
from metagradient.training import Training, TrainState
from metagradient.trees import PyTree

Objective: TypeAlias = Literal["rank", "fitted", "learnt", "fixed"]

_CHUNK = 1024
_RANKS = (1, 5, 10)
# Scales that "fitted" tries: 3 to 100.
_SCALES = np.geomspace(3, 100, 36).astype(np.float32)
# Width of the steps that "rank" counts by, in cosines.
_SOFTNESS = 0.05


@dataclass(frozen=True, kw_only=True)
class PairRecipe:
    """How a CLIP is trained. The defaults are sized for 32x32 images and a CPU."""

    tower: Literal["convolution", "transformer"] = "convolution"
    """image tower: convolutions with a norm of each image by itself, or a vision transformer"""
    size: int = 32
    """images are brought to size x size pixels"""
    patch: int = 2
    """the image tower sees squares of patch x patch pixels as one place"""
    widths: tuple[int, ...] = (32, 64, 128)
    """convolutions: features of each stage"""
    groups: int = 1
    """... groups of features that a norm takes together; they divide every width"""
    image_width: int = 64
    """vision transformer: features"""
    image_layers: int = 2
    """... blocks"""
    image_heads: int = 4
    """... heads"""
    text_width: int = 64
    """text transformer: features"""
    text_layers: int = 1
    """... blocks"""
    text_heads: int = 4
    """... heads"""
    vocabulary: int = 4096
    """ids that pieces of words are hashed to"""
    words: int = 8
    """words a caption"""
    pieces: int = 8
    """pieces a word; 1 takes whole words alone"""
    embedding: int = 64
    """dimensions of the common space"""
    scale: float = 10.0
    """what cosines are multiplied by at first"""
    learn_scale: bool = True
    """whether training moves that"""
    learning_rate: float = 2e-3
    """peak learning rate of a one-cycle schedule, for Adam"""
    peak: float = 0.2
    """where the schedule peaks, as a share of the run"""
    start: float = 0.1
    """learning rate at the first step, as a share of the peak"""
    end: float = 0.02
    """learning rate at the last step, as a share of the peak"""
    momentum: float = 0.9
    """Adam's first decay"""
    second_decay: float = 0.98
    """Adam's second decay"""
    eps_root: float = 1e-10
    """inside Adam's root"""
    weight_decay: float = 1e-4
    """decoupled weight decay"""
    batch: int = 256
    """batch size; the loss tells all pairs of a batch apart"""
    steps: int = 200
    """training steps"""
    slices: int = 1
    """the towers see a batch in so many slices, the loss all of it: the same numbers in less memory"""
    loop: Literal["map", "unroll"] = "unroll"
    """slices in a loop, or written out (which convolutions on a CPU need)"""
    convolution: Method = "auto"
    """how convolutions are computed"""


@dataclass(frozen=True)
class PairTrainer:
    """A recipe. Every training that one object makes runs the same compiled programs.

    Metaparameters, optional: `weights` (`PerExample` `[n]`), which multiply each pair's loss; `rater` (`Shared` `[f]`),
    which makes further such weights of the pairs' `features`, an array `[n, f]` beside those of `arrays`.

    Arguments:
        recipe: how a CLIP is trained.
    """

    recipe: PairRecipe

    @cached_property
    def model(self) -> CLIP:
        """The network."""
        r = self.recipe
        if r.tower == "transformer":
            blocks = Transformer(width=r.image_width, layers=r.image_layers, heads=r.image_heads)
            image = VisionTower(size=r.size, patch=r.patch, transformer=blocks)
        else:
            image = ConvolutionTower(
                size=r.size, patch=r.patch, widths=r.widths, groups=r.groups, convolution=r.convolution
            )
        blocks = Transformer(width=r.text_width, layers=r.text_layers, heads=r.text_heads)
        text = TextTower(vocabulary=r.vocabulary, length=r.words, transformer=blocks)
        return CLIP(image=image, text=text, embedding=r.embedding, scale=r.scale, learn_scale=r.learn_scale)

    @cached_property
    def tokens(self) -> HashedWords:
        """Captions as numbers."""
        r = self.recipe
        return HashedWords(r.vocabulary, r.words, r.pieces)

    def arrays(self, pool: Pool) -> dict[str, np.ndarray]:
        """Pairs as `training` takes them: images uint8 `[n, size, size, 3]`, captions int32 `[n, words, pieces]`."""
        return {"image": pool.images, "text": self.tokens(pool.captions)}

    def training(
        self, arrays: dict[str, np.ndarray], seed: int, *, rows: np.ndarray | None = None, steps: int | None = None
    ) -> Training:
        """A training at one seed, of initial parameters and of order.

        Arguments:
            arrays: from `arrays`.
            rows: train on these only, int[m], some perhaps repeatedly.
            steps: stop after so many; None for all. The schedule is that of all.
        """
        r = self.recipe
        count = len(arrays["text"] if rows is None else rows)
        if count < r.batch:
            raise ConfigError(f"a training set of {count} pairs holds no batch of {r.batch}")
        batches = EpochBatches(arrays, batch=r.batch, steps=steps or r.steps, seed=seed, rows=rows)
        init = self.model.init(jax.random.key(seed))
        training = Training.from_loss(self.loss, self._optimizer, init, batches)
        hold(self, training.programs)
        return training

    @cached_property
    def loss(self) -> Callable[[PyTree, PyTree, PyTree], jax.Array]:
        """The loss of a batch, `(params, batch, z) -> scalar`."""

        def loss(params: PyTree, batch: PyTree, z: PyTree) -> jax.Array:
            weights = z.get("weights", 1.0)
            if "rater" in z:
                weights = weights * rated(batch["features"], z["rater"])
            return jnp.mean(weights * self.losses(params, None, batch))

        return loss

    @cached_property
    def losses(self) -> Callable[[PyTree, PyTree, PyTree], jax.Array]:
        """The losses of the pairs of a batch among each other, `(params, model_state, batch) -> [b]`."""
        r = self.recipe

        def losses(params: PyTree, model_state: PyTree, batch: PyTree) -> jax.Array:
            del model_state
            return self.model.losses(
                params, batch["image"], batch["text"], slices=r.slices, loop=r.loop, same=batch["index"]
            )

        return losses

    @cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        r = self.recipe
        rates = jnp.asarray(one_cycle(r.steps, r.learning_rate, r.peak, r.start, r.end))
        return optax.adamw(
            lambda count: rates[count], r.momentum, r.second_decay, eps_root=r.eps_root, weight_decay=r.weight_decay
        )

    def objective(self, pairs: Pool, kind: Objective = "rank") -> Callable[[TrainState, PyTree], jax.Array]:
        """How badly a trained CLIP tells pairs apart, as a differentiable `(state, z) -> scalar`.

        Arguments:
            pairs: all of them are each other's negatives.
            kind: "fitted" is the contrastive loss at the scale that makes it lowest, "learnt" at the scale that
                training ended with, "fixed" at the scale it began with; "rank" is the mean logarithm of a match's rank,
                counted by sigmoids of differences of cosines.

        Cost: an embedding of all pairs at once.
        """
        images, texts = jnp.asarray(pairs.images), jnp.asarray(self.tokens(pairs.captions))

        def objective(state: TrainState, z: PyTree) -> jax.Array:
            del z
            of_images = self.model.embed_images(state.params, images)
            of_texts = self.model.embed_texts(state.params, texts)
            if kind == "rank":
                return soft_rank(of_images, of_texts)
            if kind == "fixed":
                scale = jnp.asarray(self.recipe.scale)
            elif kind == "learnt":
                scale = self.model.scale_of(state.params)
            else:
                scale = fitted_scale(of_images, of_texts)
            return contrastive_losses(of_images, of_texts, scale).mean()

        return objective

    def embedded(self, state: TrainState, pairs: Pool) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors of images and of captions, float32[n, embedding] each, computed a chunk at a time."""
        return self.embedded_arrays(state, self.arrays(pairs))

    def embedded_arrays(self, state: TrainState, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """As `embedded`, of what `arrays` gives."""
        chunks = range(0, len(arrays["text"]), _CHUNK)
        of_images = [self._embed_images(state.params, arrays["image"][i : i + _CHUNK]) for i in chunks]
        of_texts = [self._embed_texts(state.params, arrays["text"][i : i + _CHUNK]) for i in chunks]
        return np.concatenate(of_images), np.concatenate(of_texts)

    def embedded_texts(self, state: TrainState, texts: list[str]) -> np.ndarray:
        """Unit vectors of texts, float32[n, embedding]."""
        return np.asarray(self._embed_texts(state.params, self.tokens(texts)))

    @cached_property
    def _embed_images(self) -> Callable[[PyTree, Any], jax.Array]:
        return jax.jit(self.model.embed_images)

    @cached_property
    def _embed_texts(self) -> Callable[[PyTree, Any], jax.Array]:
        return jax.jit(self.model.embed_texts)


def fitted_scale(images: jax.Array, texts: jax.Array) -> jax.Array:
    """The scale, of 36 between 3 and 100, at which the contrastive loss is lowest; a constant to any derivative.

    At a minimum the loss doesn't change with the scale, so that its derivative may be taken at a constant one.
    """
    scales = jnp.asarray(_SCALES, images.dtype)
    losses = jax.lax.map(lambda scale: contrastive_losses(images, texts, scale).mean(), scales)
    return jax.lax.stop_gradient(scales[jnp.argmin(losses)])


def soft_rank(images: jax.Array, texts: jax.Array, softness: float = _SOFTNESS) -> jax.Array:
    """Mean logarithm of the rank of every match, in both directions, counted by sigmoids of differences of cosines."""
    scores = images @ texts.T
    matching = jnp.diagonal(scores)
    beaten = jax.nn.sigmoid((scores - matching[:, None]) / softness).sum(1)
    beaten_by_images = jax.nn.sigmoid((scores - matching) / softness).sum(0)
    # A match counts half against itself.
    return (jnp.log(0.5 + beaten) + jnp.log(0.5 + beaten_by_images)).mean() / 2


def recalls(images: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """Retrieval among pairs: the share of images whose caption is among the k nearest, and of captions likewise.

    Arguments:
        images, texts: unit vectors float[n, d], a pair a row.

    Returns: `image_to_text_at_K` and `text_to_image_at_K` for K of 1, 5, 10, and `recall`, the mean of the six. A tie
        counts against the match.
    """
    scores = images @ texts.T
    matching = np.diag(scores)
    ranks = {
        "image_to_text": (scores >= matching[:, None]).sum(1),
        "text_to_image": (scores >= matching[None, :]).sum(0),
    }
    found = {f"{way}_at_{k}": float((rank <= k).mean()) for way, rank in ranks.items() for k in _RANKS}
    return {**found, "recall": float(np.mean(list(found.values())))}


def zero_shot(images: np.ndarray, names: np.ndarray, groups: np.ndarray, truth: np.ndarray) -> float:
    """Share of images whose group's names lie nearest on average.

    Arguments:
        images: unit vectors float[n, d].
        names: unit vectors float[m, d] of names.
        groups: int[m], the group that each name is one of.
        truth: int[n], the group of each image.
    """
    means = np.stack([names[groups == group].mean(0) for group in range(groups.max() + 1)])
    means /= np.linalg.norm(means, axis=1, keepdims=True) + 1e-12
    return float(((images @ means.T).argmax(1) == truth).mean())
