"""LoRA: train a product of two thin matrices beside each frozen projection of a decoder."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from metagradient.errors import ConfigError
from metagradient.models.initial import normals
from metagradient.trees import PyTree

_PLACES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True, kw_only=True)
class LoRA:
    r"""Adapters of a `Decoder`: a projection $W$ acts as $W + \frac{\alpha}{r} B A$, and only $A$ and $B$ are trained.

    The product starts at zero, so that an adapted decoder starts as the decoder itself.

    Arguments:
        rank: r, rows of A and columns of B.
        alpha: scale of the product, divided by the rank.
        targets: names of the projections, among `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj` and
            `down_proj`.

    Errors: `ConfigError` for a rank below 1, no target, or a name that is none of these.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self) -> None:
        known = [name for names in _PLACES.values() for name in names]
        unknown = sorted({*self.targets} - {*known})
        if self.rank < 1 or not self.targets or unknown:
            raise ConfigError(
                f"LoRA takes a rank from 1 and targets among {', '.join(known)}; got rank {self.rank} and "
                f"{', '.join(unknown or self.targets) or 'no target'}"
            )

    def init(self, params: PyTree, key: Array, dtype: DTypeLike = jnp.float32) -> dict:
        r"""Draw adapters for a decoder's parameters.

        Arguments:
            params: from `Decoder.init` or a checkpoint; only shapes are read.
            key: $A$ is normal, of standard deviation $1/\sqrt{\mathrm{in}}$; $B$ is zero.

        Returns: `{block: {projection: {"lora_a": [L, r, in], "lora_b": [L, out, r]}}}`.
        """
        places = [(block, name) for block, names in _PLACES.items() for name in names if name in self.targets]
        shapes = [params["layers"][block][name]["weight"].shape for block, name in places]
        draws = normals(key, [(layers, self.rank, inputs) for layers, _, inputs in shapes], dtype)
        adapters: dict = {}
        for (block, name), (layers, outputs, inputs), draw in zip(places, shapes, draws, strict=True):
            b = jnp.zeros((layers, outputs, self.rank), dtype)
            adapters.setdefault(block, {})[name] = {"lora_a": draw / math.sqrt(inputs), "lora_b": b}
        return adapters

    def attach(self, params: PyTree, adapters: PyTree) -> dict:
        """Parameters for a `Decoder`: the frozen ones, shared and not copied, with the scaled adapters beside them."""
        layers = dict(params["layers"])
        for block, names in adapters.items():
            layers[block] = {
                **layers[block],
                **{name: {**layers[block][name], **self._scaled(adapter)} for name, adapter in names.items()},
            }
        return {**params, "layers": layers}

    def merged(self, params: PyTree, adapters: PyTree) -> dict:
        """Parameters of a plain decoder that computes the same: the products are added to the frozen projections."""
        attached = self.attach(params, adapters)
        layers = dict(attached["layers"])
        for block, names in adapters.items():
            layers[block] = {**layers[block], **{name: _merged(layers[block][name]) for name in names}}
        return {**attached, "layers": layers}

    def _scaled(self, adapter: dict) -> dict:
        return {"lora_a": adapter["lora_a"], "lora_b": adapter["lora_b"] * (self.alpha / self.rank)}


def _merged(projection: dict) -> dict:
    return {"weight": projection["weight"] + projection["lora_b"] @ projection["lora_a"]}
