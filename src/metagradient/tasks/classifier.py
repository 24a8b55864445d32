"""An image classifier by configuration: what schedules, poisons, weights and probes of images have in common."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagradient.data.batches import EpochBatches
from metagradient.data.images import Images
from metagradient.errors import ConfigError
from metagradient.models import ResNet9
from metagradient.models.convolution import Method
from metagradient.objectives import MeanOver, mean_over
from metagradient.step.programs import hold
from metagradient.training import Training, TrainState
from metagradient.trees import PyTree

_CHUNK = 1000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a ResNet-9 is trained on images. The defaults are smooth, and sized for 16x16 images and a CPU."""

    widths: tuple[int, ...] = (8, 16, 32)
    """features of the stem and of each stage"""
    width_multiplier: int = 1
    """multiplies every width"""
    pool_stem: bool = True
    """pool right after the stem too"""
    activation: Literal["relu", "gelu"] = "gelu"
    """relu is rougher"""
    norm_before_activation: bool = True
    """batch norm before the activation; after it is rougher"""
    pooling: Literal["max", "average", "logsumexp"] = "average"
    """max is rougher"""
    final_scale: float = 1.0
    """multiplies the logits"""
    optimizer: Literal["nesterov", "adam"] = "nesterov"
    """SGD with Nesterov momentum, or Adam"""
    learning_rate: float = 0.2
    """peak learning rate of a one-cycle schedule"""
    peak: float = 0.3
    """where the schedule peaks, as a share of the run"""
    start: float = 0.1
    """learning rate at the first step, as a share of the peak"""
    end: float = 0.01
    """learning rate at the last step, as a share of the peak"""
    momentum: float = 0.85
    """Nesterov's momentum, or Adam's first decay"""
    second_decay: float = 0.99
    """Adam's second decay"""
    eps_root: float = 1e-8
    """inside Adam's root"""
    weight_decay: float = 1e-4
    """L2 penalty's factor for SGD; decoupled for Adam"""
    batch: int = 250
    """batch size"""
    steps: int = 80
    """training steps"""
    convolution: Method = "auto"
    """how convolutions are computed; patches where trainings run vmapped"""

    def rates(self) -> np.ndarray:
        """Its learning rates, float32[steps]: linear up to the peak, linear down."""
        return one_cycle(self.steps, self.learning_rate, self.peak, self.start, self.end)


ROUGH: dict[str, Any] = {"activation": "relu", "norm_before_activation": False, "pooling": "max"}
"""What a standard recipe does otherwise than a smooth one: `replace(recipe, **ROUGH)`."""


def one_cycle(steps: int, rate: float, peak: float, start: float, end: float) -> np.ndarray:
    """Learning rates of a one-cycle schedule, float32[steps]: linear from `start * rate` up to `rate`, and down.

    Arguments:
        rate: the highest.
        peak: where it is reached, as a share of the run.
        start, end: the first and last, as shares of the highest.
    """
    at = np.arange(steps) / max(1, steps - 1)
    return np.interp(at, [0, peak, 1], [start * rate, rate, end * rate]).astype(np.float32)


@dataclass(frozen=True)
class Classifier:
    """A recipe for images of one kind. Every training that one object makes runs the same compiled programs.

    Metaparameters by name, each optional: `weights` (`PerExample` `[n]`, multiplies losses), `pixels` (`PerExample`
    `[n, height, width, channels]`, added to images), `log_rate` (`PerStep` `[steps]`, logarithms of learning rates),
    `log_knots` (`Shared` `[k]`, logarithms of learning rates at even places of the run, linear between).

    Arguments:
        recipe: how it is trained.
        classes: number of classes.
        channels: of the images.
    """

    recipe: Recipe
    classes: int
    channels: int

    @cached_property
    def model(self) -> ResNet9:
        """The network."""
        r = self.recipe
        return ResNet9(
            classes=self.classes, channels=self.channels, widths=r.widths, width_multiplier=r.width_multiplier,
            pool_stem=r.pool_stem, activation=r.activation, norm_before_activation=r.norm_before_activation,
            pooling=r.pooling, final_scale=r.final_scale, convolution=r.convolution,
        )  # fmt: skip

    def fitted(self, images: Images) -> Images:
        """Images padded to a size that the network can halve at every pooling."""
        return images.padded(2 ** (len(self.recipe.widths) - 1 + self.recipe.pool_stem))

    def training(
        self, images: np.ndarray, labels: np.ndarray, seed: int, *, rows: np.ndarray | None = None
    ) -> Training:
        """A training at one seed, of initial parameters and of order.

        Arguments:
            images: float32[n, height, width, channels] in [0, 1].
            labels: int32[n].
            rows: train on these only, int[m].
        """
        r = self.recipe
        if len(labels if rows is None else rows) < r.batch:
            raise ConfigError(f"the training set must hold at least a batch of {r.batch}")
        batches = EpochBatches({"x": images, "y": labels}, batch=r.batch, steps=r.steps, seed=seed, rows=rows)
        init = self.model.init(jax.random.key(seed))
        training = Training.from_loss(self._loss, self._optimizer, init, batches, has_model_state=True)
        hold(self, training.programs)
        return training

    def logits(self, state: TrainState, images: jax.Array) -> jax.Array:
        """What a trained network says of images, `[n, classes]`, in evaluation mode."""
        return self.model.apply(state.params, state.model_state, normalised(images), train=False)[0]

    def mean_loss(self, images: Images) -> MeanOver:
        """The objective: a trained network's mean cross-entropy on images."""
        chunks = range(0, len(images), _CHUNK)
        batches = [
            {"x": jnp.asarray(images.images[i : i + _CHUNK]), "y": jnp.asarray(images.labels[i : i + _CHUNK])}
            for i in chunks
        ]
        return mean_over(batches, self._evaluate)

    def scores(self, state: TrainState, images: np.ndarray) -> np.ndarray:
        """Logits of many images, float32[n, classes], computed a chunk at a time."""
        chunks = range(0, len(images), _CHUNK)
        return np.concatenate([np.asarray(self._jitted_logits(state, images[i : i + _CHUNK])) for i in chunks])

    def accuracy(self, state: TrainState, images: Images) -> float:
        """Share of images that a trained network names rightly."""
        return float(np.mean(self.scores(state, images.images).argmax(-1) == images.labels))

    @cached_property
    def _jitted_logits(self) -> Callable[[TrainState, Any], jax.Array]:
        return jax.jit(self.logits)

    @cached_property
    def _evaluate(self) -> Callable[[TrainState, PyTree], jax.Array]:
        def loss(state: TrainState, batch: PyTree) -> jax.Array:
            logits = self.logits(state, batch["x"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

        return loss

    @cached_property
    def _loss(self) -> Callable[..., Any]:
        def loss(params: PyTree, model_state: PyTree, batch: PyTree, z: PyTree) -> tuple[jax.Array, PyTree]:
            x = batch["x"] + z["pixels"] if "pixels" in z else batch["x"]
            logits, model_state = self.model.apply(params, model_state, normalised(x), train=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
            return jnp.mean(z["weights"] * losses if "weights" in z else losses), model_state

        return loss

    @cached_property
    def _optimizer(self) -> Callable[[PyTree], optax.GradientTransformation]:
        r = self.recipe

        def optimizer(z: PyTree) -> optax.GradientTransformation:
            rate = self._rate(z)
            if r.optimizer == "adam":
                return optax.adamw(rate, r.momentum, r.second_decay, eps_root=r.eps_root, weight_decay=r.weight_decay)
            return optax.chain(optax.add_decayed_weights(r.weight_decay), optax.sgd(rate, r.momentum, nesterov=True))

        return optimizer

    def _rate(self, z: PyTree) -> Any:
        """The learning rate of a step: a number, or a schedule over the optimiser's count."""
        if "log_rate" in z:
            return jnp.exp(z["log_rate"])
        if "log_knots" in z:
            return lambda count: jnp.exp(interpolated(z["log_knots"], count, self.recipe.steps))
        rates = jnp.asarray(self.recipe.rates())
        return lambda count: rates[count]


def interpolated(knots: jax.Array, step: Any, steps: int) -> jax.Array:
    """Knots `[k]` at even places of a run, linearly interpolated at a step (or steps) of it."""
    return jnp.interp(step / max(1, steps - 1), jnp.linspace(0, 1, knots.shape[0]), knots)


def normalised(images: jax.Array) -> jax.Array:
    """Pixels in [0, 1] as the network takes them."""
    return (images - 0.5) / 0.25
