"""ResNet-9 for small images: smooth by default, standard by one call."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from metagradient.errors import StructureError
from metagradient.models.convolution import Method, conv3x3
from metagradient.models.initial import normals


@dataclass(frozen=True, kw_only=True)
class ResNet9:
    """A stem, then stages of convolution and 2x2 pooling; the first and the last stage end in a residual pair.

    The architecture is D. Page's (2018). Its defaults here are the choices that made training metasmooth in
    Engstrom et al. 2025 (arXiv 2503.13751): batch norm *before* a smooth activation, average pooling. Widths
    (64, 128, 256, 512) give 6.6 million parameters; (8, 16, 32) with `pool_stem`, sized for 16x16 images and a CPU,
    29,650.

    Arguments:
        classes: logits an image.
        channels: of the input images.
        widths: features of the stem and of each stage.
        width_multiplier: multiplies every width; wider is smoother.
        pool_stem: pool right after the stem too, for a quarter of the work.
        activation: "gelu", or "relu", whose kinks make the run rougher.
        norm_before_activation: convolution, norm, activation; else convolution, activation, norm.
        pooling: "average", "max", or "logsumexp": the log of the mean exponential, smooth and between the two. Within
            the network over 2x2, at its end over what is left.
        final_scale: multiplies the logits. The paper divides by 8 to 10; in short runs that needs a learning rate so
            high that it costs smoothness: probe it.
        momentum: share of the running statistics that a training step keeps.
        epsilon: added to variances.
        convolution: how convolutions are computed: see `conv3x3`. Choose "patches" for trainings that run in a
            `lax.scan`, or vmapped over parameters, on a CPU.
    """

    classes: int = 10
    channels: int = 3
    widths: tuple[int, ...] = (64, 128, 256, 512)
    width_multiplier: int = 1
    pool_stem: bool = False
    activation: Literal["relu", "gelu"] = "gelu"
    norm_before_activation: bool = True
    pooling: Literal["max", "average", "logsumexp"] = "average"
    final_scale: float = 1.0
    momentum: float = 0.9
    epsilon: float = 1e-5
    convolution: Method = "auto"

    @classmethod
    def smooth(cls, **changes: Any) -> "ResNet9":
        """The metasmooth recipe, which is the default: norm before GELU, average pooling."""
        return cls(**changes)

    @classmethod
    def standard(cls, **changes: Any) -> "ResNet9":
        """The rough recipe that metagradients fail on: norm after ReLU, max pooling."""
        return cls(**{"activation": "relu", "norm_before_activation": False, "pooling": "max"} | changes)

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> tuple[dict, dict]:
        """Draw parameters and the batch-norm statistics that go with them.

        Returns: `(params, model_state)`. Both hold `"stem"`, a block, and `"stages"`, a list of lists of blocks. A
        block's parameters are `{"kernel": [3, 3, in, out], "scale": [out], "bias": [out]}`, its state
        `{"mean": [out], "variance": [out]}`. `params["head"]` is `{"weight": [in, classes], "bias": [classes]}`.
        """
        widths = [width * self.width_multiplier for width in self.widths]
        depths = [3 if index in (0, len(widths) - 2) else 1 for index in range(len(widths) - 1)]
        kernels = [(3, 3, self.channels, widths[0])]
        for inputs, features, depth in zip(widths[:-1], widths[1:], depths, strict=True):
            kernels += [(3, 3, inputs, features)] + [(3, 3, features, features)] * (depth - 1)
        *draws, head = normals(key, [*kernels, (widths[-1], self.classes)], dtype)
        blocks = iter([_block(draw) for draw in draws])
        params = {
            "stem": next(blocks),
            "stages": [[next(blocks) for _ in range(depth)] for depth in depths],
            "head": {"weight": head / math.sqrt(widths[-1]), "bias": jnp.zeros(self.classes, dtype)},
        }
        state = {
            "stem": _fresh_statistics(params["stem"]),
            "stages": [[_fresh_statistics(block) for block in stage] for stage in params["stages"]],
        }
        return params, state

    def apply(self, params: dict, model_state: dict, x: Array, *, train: bool = True) -> tuple[Array, dict]:
        """Logits of images.

        Arguments:
            params: from `init`.
            model_state: from `init`, an earlier `apply`, or `recalibrate`.
            x: `[batch, height, width, channels]`, normalised; height and width divisible by 2 at every pooling.
            train: normalise by the batch and move the running statistics towards it; else normalise by them.

        Returns: `(logits [batch, classes], model_state)`.

        Raises: StructureError if the images don't halve evenly at every pooling.
        """
        logits, statistics = self._network(params, model_state, x, train=train)
        if not train:
            return logits, model_state
        keep = self.momentum
        return logits, jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, model_state, statistics)

    def recalibrate(self, params: dict, model_state: dict, inputs: Iterable[Array]) -> dict:
        """Batch-norm statistics of these very parameters, for evaluation: the mean over batches, each in train mode.

        The running statistics lag behind the parameters, by about `1 / (1 - momentum)` steps.

        Arguments:
            params: from `init` or a training.
            model_state: gives the structure; its values are not read.
            inputs: batches of images of equal size, as `apply` takes them; at least one.

        Returns: a model state. Cost: one forward pass a batch.
        """
        totals, count = jax.tree.map(jnp.zeros_like, model_state), 0
        for x in inputs:
            statistics = self._batch_statistics(params, model_state, x)
            totals, count = jax.tree.map(jnp.add, totals, statistics), count + 1
        if not count:
            raise StructureError("ResNet9.recalibrate: no batch of inputs; give it at least one.")
        return jax.tree.map(lambda total: total / count, totals)

    def _network(self, params: dict, running: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        """Logits, and the statistics that each norm used: the batch's in training, else the running ones."""
        poolings = len(params["stages"]) + self.pool_stem
        if any(size % 2**poolings for size in x.shape[1:3]):
            raise StructureError(
                f"ResNet9: images of {x.shape[1]}x{x.shape[2]} cannot be halved {poolings} times; "
                f"give sizes divisible by {2**poolings}, or fewer widths."
            )
        block = partial(self._apply_block, train=train)
        x, stem_statistics = block(params["stem"], running["stem"], x)
        x = self._pool2x2(x) if self.pool_stem else x
        stage_statistics = []
        for blocks, states in zip(params["stages"], running["stages"], strict=True):
            x, first = block(blocks[0], states[0], x)
            x = self._pool2x2(x)
            statistics, branch = [first], x
            for params_of_block, state in zip(blocks[1:], states[1:], strict=True):
                branch, used = block(params_of_block, state, branch)
                statistics.append(used)
            x = x + branch if len(blocks) > 1 else x
            stage_statistics.append(statistics)
        features = _POOLINGS[self.pooling](x, (1, 2))
        logits = (features @ params["head"]["weight"] + params["head"]["bias"]) * self.final_scale
        return logits, {"stem": stem_statistics, "stages": stage_statistics}

    def _apply_block(self, params: dict, running: dict, x: Array, *, train: bool) -> tuple[Array, dict]:
        activation = getattr(jax.nn, self.activation)
        x = conv3x3(x, params["kernel"], method=self.convolution)
        x = x if self.norm_before_activation else activation(x)
        used = {"mean": jnp.mean(x, (0, 1, 2)), "variance": jnp.var(x, (0, 1, 2))} if train else running
        x = (x - used["mean"]) * (params["scale"] / jnp.sqrt(used["variance"] + self.epsilon)) + params["bias"]
        return (activation(x) if self.norm_before_activation else x), used

    @cached_property
    def _batch_statistics(self) -> Callable[[dict, dict, Array], dict]:
        return jax.jit(lambda params, model_state, x: self._network(params, model_state, x, train=True)[1])

    def _pool2x2(self, x: Array) -> Array:
        batch, height, width, features = x.shape
        return _POOLINGS[self.pooling](x.reshape(batch, height // 2, 2, width // 2, 2, features), (2, 4))


def _log_mean_exp(x: Array, axes: tuple[int, int]) -> Array:
    return jax.nn.logsumexp(x, axes) - math.log(x.shape[axes[0]] * x.shape[axes[1]])


_POOLINGS = {"max": jnp.max, "average": jnp.mean, "logsumexp": _log_mean_exp}


def _block(draw: Array) -> dict:
    *_, inputs, features = draw.shape
    return {
        "kernel": draw * math.sqrt(2 / (9 * inputs)),
        "scale": jnp.ones(features, draw.dtype),
        "bias": jnp.zeros(features, draw.dtype),
    }


def _fresh_statistics(block: dict) -> dict:
    return {"mean": jnp.zeros_like(block["bias"]), "variance": jnp.ones_like(block["bias"])}
