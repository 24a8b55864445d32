"""A Llama-like decoder language model whose adjoint needs one layer's activations and one chunk of logits at a time."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from metagradient.models.attention import causal_attention
from metagradient.models.initial import normals
from metagradient.models.losses import chunked_cross_entropy


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's longer context: slow rotary frequencies are divided by `factor`, those between are blended.

    Arguments:
        factor: by which the slow ones are divided.
        low_freq_factor: wavelengths over `original_max_position_embeddings / low_freq_factor` are slow.
        high_freq_factor: wavelengths under `original_max_position_embeddings / high_freq_factor` stay.
        original_max_position_embeddings: positions that the model was first trained on.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scaled(self, frequencies: Array) -> Array:
        """Frequencies, float[n], as they are used."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = jnp.clip(share, 0, 1)
        return share * frequencies + (1 - share) * frequencies / self.factor


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """RMS norm, rotary positions, grouped-query attention, SwiGLU, optionally tied embeddings; no dropout.

    Fields have the names and meanings of a Hugging Face Llama `config.json`, and parameters those of its tensors, so
    SmolLM2 and Llama weights load by name; the default is SmolLM2-135M, 134,515,008 parameters. Gemma's differ in
    `hidden_act`, `scale_embeddings` and `norm_offset`; `metagradient.models.checkpoints` sets them. A projection whose
    dictionary holds `lora_a` and `lora_b` adds their product (`metagradient.models.lora`). Every layer's tensors
    are stacked in a leading axis. By default a `lax.scan` runs the layers, each under `jax.checkpoint`, so a gradient
    or its adjoint keeps one `[batch, length, hidden_size]` a layer. (Unrolled layers gain nothing from a checkpoint on
    a CPU: the compiler merges the recomputation away.)

    Arguments:
        vocab_size: rows of the embedding.
        hidden_size: of the residual stream.
        intermediate_size: of the SwiGLU.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides the query heads.
        head_dim: size of a head; `hidden_size / num_attention_heads` if None.
        rope_theta: base of the rotary wavelengths.
        rope_scaling: what is done to them for a longer context, or None.
        hidden_act: activation of the gate: SiLU, or GELU in its approximation by tanh.
        scale_embeddings: multiply embeddings by the root of `hidden_size`.
        norm_offset: added to the weights of norms (Gemma stores them less one).
        rms_norm_eps: added to mean squares.
        tie_word_embeddings: unembed with the embedding matrix.
        attention_chunk: queries whose scores are alive at once.
        loss_chunk: tokens whose logits are alive at once.
        rematerialise: compute a layer's activations again when they are differentiated. False writes the layers out and
            keeps them: faster where they fit, and then a step can keep its linearisation too.
    """

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int | None = None
    rope_theta: float = 100_000.0
    rope_scaling: Llama3Rope | None = None
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    scale_embeddings: bool = False
    norm_offset: float = 0.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attention_chunk: int = 64
    loss_chunk: int = 64
    rematerialise: bool = True

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> tuple[dict, dict]:
        """Draw parameters, named and oriented as Hugging Face's: `weight [out, in]`; and an empty model state.

        Returns: `({"embed_tokens", "layers", "norm"[, "lm_head"]}, {})`, every leaf of `layers` stacked, `[L, ...]`.
        """
        size, layers, inner = self.hidden_size, self.num_hidden_layers, self.intermediate_size
        queries, keys = self.num_attention_heads * self._head_size, self.num_key_value_heads * self._head_size
        attention = {
            "q_proj": (queries, size),
            "k_proj": (keys, size),
            "v_proj": (keys, size),
            "o_proj": (size, queries),
        }
        mlp = {"gate_proj": (inner, size), "up_proj": (inner, size), "down_proj": (size, inner)}
        embeddings = ["embed_tokens"] if self.tie_word_embeddings else ["embed_tokens", "lm_head"]
        linear_shapes = [(layers, *shape) for shape in (*attention.values(), *mlp.values())]
        draws = normals(key, linear_shapes + [(self.vocab_size, size)] * len(embeddings), dtype)

        def linear(inputs: int) -> dict:
            return {"weight": next(draws) / math.sqrt(inputs)}

        def ones(*shape: int) -> dict:
            return {"weight": jnp.full(shape, 1 - self.norm_offset, dtype)}

        params = {
            "layers": {
                "input_layernorm": ones(layers, size),
                "self_attn": {name: linear(inputs) for name, (_, inputs) in attention.items()},
                "post_attention_layernorm": ones(layers, size),
                "mlp": {name: linear(inputs) for name, (_, inputs) in mlp.items()},
            },
            "norm": ones(size),
        }
        return params | {name: {"weight": next(draws) * 0.02} for name in embeddings}, {}

    def apply(self, params: dict, model_state: dict, tokens: Array, *, train: bool = True) -> tuple[Array, dict]:
        """All logits `[batch, length, vocab_size]` of `tokens [batch, length]`; to train, use `token_losses`."""
        del train
        return self.hidden(params, tokens) @ self._unembedding(params).T, model_state

    def logits(self, params: dict, tokens: Array, at: Array) -> Array:
        """Logits `[batch, k, vocab_size]` of the positions `at [batch, k]` alone, of `tokens [batch, length]`."""
        hidden = jnp.take_along_axis(self.hidden(params, tokens), at[..., None], 1)
        return hidden @ self._unembedding(params).T

    def token_losses(self, params: dict, tokens: Array, targets: Array, weights: Array | None = None) -> Array:
        """Cross-entropy of every target, with one chunk of logits alive at a time.

        Arguments:
            params: from `init`.
            tokens: `[batch, length]`, integer; padding goes at the end.
            targets: `[batch, length]`, integer: the token that follows each.
            weights: `[batch, length]`, float, multiplies the losses (0 on padding and prompts); ones if None.

        Returns: `[batch, length]`. Cost and errors: see `chunked_cross_entropy`.
        """
        losses = chunked_cross_entropy(
            self.hidden(params, tokens).reshape(-1, self.hidden_size),
            self._unembedding(params),
            targets.reshape(-1),
            None if weights is None else weights.reshape(-1),
            chunk=self.loss_chunk,
        )
        return losses.reshape(targets.shape)

    def hidden(self, params: dict, tokens: Array) -> Array:
        """The last layer's normalised output, `[batch, length, hidden_size]`, of `tokens [batch, length]`."""
        x = params["embed_tokens"]["weight"][tokens]
        if self.scale_embeddings:
            x = x * math.sqrt(self.hidden_size)
        rotation = self._rotation(tokens.shape[1], x.dtype)

        def layer(x: Array, weights: dict) -> tuple[Array, None]:
            x = x + self._attention(weights["self_attn"], self._norm(weights["input_layernorm"], x), rotation)
            return x + self._feed_forward(weights["mlp"], self._norm(weights["post_attention_layernorm"], x)), None

        if self.rematerialise:
            x = lax.scan(jax.checkpoint(layer), x, params["layers"])[0]
        else:
            for weights in _unstacked(params["layers"]):
                x = layer(x, weights)[0]
        return self._norm(params["norm"], x)

    @property
    def _head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def _unembedding(self, params: dict) -> Array:
        return params["embed_tokens" if self.tie_word_embeddings else "lm_head"]["weight"]

    def _norm(self, norm: dict, x: Array) -> Array:
        weight = norm["weight"] + self.norm_offset if self.norm_offset else norm["weight"]
        return weight * x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + self.rms_norm_eps)

    def _attention(self, weights: dict, x: Array, rotation: tuple[Array, Array]) -> Array:
        def heads(name: str) -> Array:
            return _linear(weights[name], x).reshape(*x.shape[:2], -1, self._head_size)

        query, key = _rotate(heads("q_proj"), *rotation), _rotate(heads("k_proj"), *rotation)
        attended = causal_attention(query, key, heads("v_proj"), chunk=self.attention_chunk)
        return _linear(weights["o_proj"], attended.reshape(*x.shape[:2], -1))

    def _feed_forward(self, weights: dict, x: Array) -> Array:
        gate = _linear(weights["gate_proj"], x)
        gate = jax.nn.silu(gate) if self.hidden_act == "silu" else jax.nn.gelu(gate, approximate=True)
        return _linear(weights["down_proj"], gate * _linear(weights["up_proj"], x))

    def _rotation(self, length: int, dtype: DTypeLike) -> tuple[Array, Array]:
        """Cosines and sines `[length, 1, head_size / 2]` of position times frequency."""
        exponents = jnp.arange(0, self._head_size, 2, dtype=dtype) / self._head_size
        frequencies = self.rope_theta**-exponents
        if self.rope_scaling:
            frequencies = self.rope_scaling.scaled(frequencies)
        angles = jnp.arange(length, dtype=dtype)[:, None, None] * frequencies
        return jnp.cos(angles), jnp.sin(angles)


def _unstacked(layers: dict) -> list[dict]:
    # A split's cotangent is one concatenation, where that of indexing is a sum of padded stacks.
    leaves, treedef = jax.tree.flatten(layers)
    parts = [[x[0] for x in lax.split(leaf, [1] * leaf.shape[0])] for leaf in leaves]
    return [jax.tree.unflatten(treedef, layer) for layer in zip(*parts, strict=True)]


def _linear(weights: dict, x: Array) -> Array:
    y = x @ weights["weight"].T
    return y + (x @ weights["lora_a"].T) @ weights["lora_b"].T if "lora_a" in weights else y


def _rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Turn each pair (i, i + size / 2) of a head by its angle: Hugging Face's layout of rotary positions."""
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)
