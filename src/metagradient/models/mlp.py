"""A multilayer perceptron."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from metagradient.models.initial import normals


@dataclass(frozen=True, kw_only=True)
class MLP:
    """Linear layers of the given sizes, input and output included, with an activation between them.

    The default, for 8x8 digits, has 9,610 parameters.
    """

    sizes: tuple[int, ...] = (64, 128, 10)
    activation: Literal["relu", "gelu"] = "gelu"

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> tuple[dict, dict]:
        """Draw parameters, `{"layers": [{"weight": [in, out], "bias": [out]}, ...]}`, and an empty model state."""
        shapes = list(zip(self.sizes[:-1], self.sizes[1:], strict=True))
        layers = [
            {"weight": draw * math.sqrt(2 / draw.shape[0]), "bias": jnp.zeros(draw.shape[1], dtype)}
            for draw in normals(key, shapes, dtype)
        ]
        return {"layers": layers}, {}

    def apply(self, params: dict, model_state: dict, x: Array, *, train: bool = True) -> tuple[Array, dict]:
        """Logits `[batch, sizes[-1]]` of `x [batch, ...]`, whose other axes are flattened; the state is passed on."""
        del train
        activation = getattr(jax.nn, self.activation)
        *hidden, last = params["layers"]
        x = x.reshape(x.shape[0], -1)
        for layer in hidden:
            x = activation(x @ layer["weight"] + layer["bias"])
        return x @ last["weight"] + last["bias"], model_state
