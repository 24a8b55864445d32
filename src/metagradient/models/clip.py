"""CLIP: an image tower and a text tower, trained to tell the pairs of a batch apart; smooth by default."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from metagradient.errors import StructureError
from metagradient.models.convolution import Method, conv3x3
from metagradient.models.initial import normals

_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """Pre-norm blocks of full attention and a GELU MLP, and a norm at the end; no dropout.

    Arguments:
        width: features.
        layers: blocks.
        heads: of the attention; they divide the width.
        expansion: hidden features of the MLP, in widths.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    expansion: int = 4

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise StructureError(f"{self.heads} heads don't divide a width of {self.width}")

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> dict:
        """Parameters: `"layers"`, a list of blocks, and `"norm"`."""
        d, h = self.width, self.expansion * self.width
        shapes = [shape for _ in range(self.layers) for shape in ((d, 3 * d), (d, d), (d, h), (h, d))]
        draws = iter(normals(key, shapes, dtype) if shapes else [])
        # Residual branches start small, as in GPT-2: depth leaves the size of the sum alone.
        branch = 1 / math.sqrt(2 * max(1, self.layers))
        layers = [
            {
                "attention": {"norm": _norm(d, dtype), "in": _linear(next(draws)), "out": _linear(next(draws), branch)},
                "mlp": {"norm": _norm(d, dtype), "in": _linear(next(draws)), "out": _linear(next(draws), branch)},
            }
            for _ in range(self.layers)
        ]
        return {"layers": layers, "norm": _norm(d, dtype)}

    def apply(self, params: dict, x: Array, mask: Array | None = None) -> Array:
        """Features of sequences.

        Arguments:
            params: from `init`.
            x: `[batch, length, width]`.
            mask: bool `[batch, length]`, which places are attended to; None for all.
        """
        for layer in params["layers"]:
            x = x + self._attention(layer["attention"], x, mask)
            inner = jax.nn.gelu(_apply_linear(layer["mlp"]["in"], _normalised(layer["mlp"]["norm"], x)))
            x = x + _apply_linear(layer["mlp"]["out"], inner)
        return _normalised(params["norm"], x)

    def _attention(self, params: dict, x: Array, mask: Array | None) -> Array:
        batch, length, width = x.shape
        split = _apply_linear(params["in"], _normalised(params["norm"], x))
        query, key, value = jnp.moveaxis(split.reshape(batch, length, 3, self.heads, -1), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(width // self.heads)
        if mask is not None:
            scores = jnp.where(mask[:, None, None, :], scores, -1e9)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)
        return _apply_linear(params["out"], mixed.reshape(batch, length, width))


@dataclass(frozen=True, kw_only=True)
class VisionTower:
    """A vision transformer (Dosovitskiy et al., 2021), its features averaged over the patches.

    Arguments:
        size: images are size x size pixels.
        patch: patches are patch x patch pixels; it divides the size.
        transformer: its blocks.
    """

    size: int = 32
    patch: int = 8
    transformer: Transformer = Transformer()

    def __post_init__(self) -> None:
        if self.size % self.patch:
            raise StructureError(f"patches of {self.patch} pixels don't divide images of {self.size}")

    @property
    def width(self) -> int:
        """Features that it gives."""
        return self.transformer.width

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> dict:
        """Parameters: `"patches"`, `"places"` and those of the transformer."""
        first, second = jax.random.split(key)
        count, width = (self.size // self.patch) ** 2, self.width
        patches, places = normals(first, [(3 * self.patch**2, width), (count, width)], dtype)
        blocks = self.transformer.init(second, dtype)
        return {"patches": _linear(patches), "places": 0.02 * places, **blocks}

    def apply(self, params: dict, images: Array) -> Array:
        """Features `[batch, width]` of images `[batch, size, size, 3]`, normalised."""
        x = _apply_linear(params["patches"], patchify(images, self.patch))
        x = x.reshape(x.shape[0], -1, self.width) + params["places"]
        return self.transformer.apply(params, x).mean(1)


@dataclass(frozen=True, kw_only=True)
class ConvolutionTower:
    """Stages of a 3x3 convolution, a norm of each image by itself, GELU and 2x2 average pooling.

    No norm looks across the batch, so an image's features are its own, and micro-batches are exact.

    Arguments:
        size: images are size x size pixels; it divides by `patch`, and evenly into two at every pooling.
        patch: the stem sees squares of patch x patch pixels as one place.
        widths: features of each stage.
        groups: of features that a norm takes together, over all places (group norm); they divide every width.
        convolution: see `conv3x3`.
    """

    size: int = 32
    patch: int = 2
    widths: tuple[int, ...] = (32, 64, 128)
    groups: int = 1
    convolution: Method = "auto"

    def __post_init__(self) -> None:
        side, poolings = self.size // self.patch, len(self.widths) - 1
        if self.size % self.patch or side % 2**poolings:
            raise StructureError(
                f"images of {self.size} pixels, in patches of {self.patch}, can't be halved {poolings} times"
            )
        if any(width % self.groups for width in self.widths):
            raise StructureError(f"{self.groups} groups don't divide widths of {self.widths}")

    @property
    def width(self) -> int:
        """Features that it gives."""
        return self.widths[-1]

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> dict:
        """Parameters: `"stages"`, a list of `{"kernel": [3, 3, in, out], "scale": [out], "bias": [out]}`."""
        inputs = (3 * self.patch**2, *self.widths[:-1])
        draws = normals(key, [(3, 3, i, o) for i, o in zip(inputs, self.widths, strict=True)], dtype)
        return {
            "stages": [
                {"kernel": draw * math.sqrt(2 / (9 * draw.shape[2])), **_norm(draw.shape[3], dtype)} for draw in draws
            ]
        }

    def apply(self, params: dict, images: Array) -> Array:
        """Features `[batch, width]` of images `[batch, size, size, 3]`, normalised."""
        x = patchify(images, self.patch)
        *stages, last = params["stages"]
        for stage in stages:
            x = self._stage(stage, x)
            batch, height, width, features = x.shape
            x = x.reshape(batch, height // 2, 2, width // 2, 2, features).mean((2, 4))
        return self._stage(last, x).mean((1, 2))

    def _stage(self, params: dict, x: Array) -> Array:
        x = conv3x3(x, params["kernel"], method=self.convolution)
        grouped = x.reshape(*x.shape[:3], self.groups, -1)
        mean, variance = (f(grouped, (1, 2, 4), keepdims=True) for f in (jnp.mean, jnp.var))
        x = ((grouped - mean) * lax.rsqrt(variance + _EPSILON)).reshape(x.shape)
        return jax.nn.gelu(x * params["scale"] + params["bias"])


@dataclass(frozen=True, kw_only=True)
class TextTower:
    """A transformer over words, each the sum of its pieces' embeddings; its features are averaged over the words.

    With one piece a word it is a transformer over plain token ids.

    Arguments:
        vocabulary: ids, 0 being padding.
        length: words a caption.
        transformer: its blocks.
    """

    vocabulary: int = 4096
    length: int = 8
    transformer: Transformer = Transformer()

    @property
    def width(self) -> int:
        """Features that it gives."""
        return self.transformer.width

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> dict:
        """Parameters: `"pieces"`, `"places"` and those of the transformer."""
        first, second = jax.random.split(key)
        pieces, places = normals(first, [(self.vocabulary, self.width), (self.length, self.width)], dtype)
        return {"pieces": pieces, "places": 0.1 * places, **self.transformer.init(second, dtype)}

    def apply(self, params: dict, ids: Array) -> Array:
        """Features `[batch, width]` of captions, int `[batch, length, pieces]`."""
        there = (ids > 0).astype(params["pieces"].dtype)
        # Unit size whatever the number of pieces.
        share = lax.rsqrt(jnp.maximum(there.sum(-1), 1))
        x = jnp.einsum("blpd,blp->bld", params["pieces"][ids], there * share[..., None]) + params["places"]
        words = (ids > 0).any(-1)
        # A caption without a word is one of padding: never a vector of zeros, which has no direction.
        words = words | ~words.any(-1, keepdims=True)
        x = self.transformer.apply(params, x, words)
        return jnp.einsum("bld,bl->bd", x, words.astype(x.dtype)) / words.sum(-1, keepdims=True)


@dataclass(frozen=True, kw_only=True)
class CLIP:
    """Two towers into one space, on whose unit sphere matching images and captions lie near each other.

    Arguments:
        image: the image tower.
        text: the text tower.
        embedding: dimensions of the common space.
        scale: what cosines are multiplied by, at first: the inverse of the temperature.
        learn_scale: whether training moves it, as its logarithm; no cut bounds it, as a cut has a kink.

    Source: A. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021.
    """

    image: VisionTower | ConvolutionTower = ConvolutionTower()
    text: TextTower = TextTower()
    embedding: int = 64
    scale: float = 10.0
    learn_scale: bool = True

    @classmethod
    def vit_b32(cls, *, vocabulary: int = 49408, length: int = 77) -> "CLIP":
        """The published ViT-B/32, of 151 million parameters; its text features are averaged, not the last token's."""
        return cls(
            image=VisionTower(size=224, patch=32, transformer=Transformer(width=768, layers=12, heads=12)),
            text=TextTower(
                vocabulary=vocabulary, length=length, transformer=Transformer(width=512, layers=12, heads=8)
            ),
            embedding=512,
            scale=1 / 0.07,
        )

    def init(self, key: Array, dtype: DTypeLike = jnp.float32) -> dict:
        """Parameters: `"image"`, `"text"`, two projections, and `"log_scale"` where that is learnt."""
        of_image, of_text, of_projections = jax.random.split(key, 3)
        widths = self.image.width, self.text.width
        image, text = normals(of_projections, [(width, self.embedding) for width in widths], dtype)
        params: dict[str, Any] = {
            "image": {"tower": self.image.init(of_image, dtype), "projection": image / math.sqrt(self.image.width)},
            "text": {"tower": self.text.init(of_text, dtype), "projection": text / math.sqrt(self.text.width)},
        }
        if self.learn_scale:
            params["log_scale"] = jnp.asarray(math.log(self.scale), dtype)
        return params

    def embed_images(self, params: dict, images: Array) -> Array:
        """Unit vectors `[batch, embedding]` of images `[batch, size, size, 3]`, bytes, or floats in [0, 1]."""
        dtype = params["image"]["projection"].dtype
        floats = images.astype(dtype) / 255 if jnp.issubdtype(images.dtype, jnp.integer) else images.astype(dtype)
        return _unit(self.image.apply(params["image"]["tower"], (floats - 0.5) / 0.25) @ params["image"]["projection"])

    def embed_texts(self, params: dict, ids: Array) -> Array:
        """Unit vectors `[batch, embedding]` of captions, int `[batch, length, pieces]`."""
        return _unit(self.text.apply(params["text"]["tower"], ids) @ params["text"]["projection"])

    def scale_of(self, params: dict) -> Array:
        """What cosines are multiplied by."""
        return jnp.exp(params["log_scale"]) if self.learn_scale else jnp.asarray(self.scale)

    def losses(
        self, params: dict, images: Array, ids: Array, *, slices: int = 1, loop: Literal["map", "unroll"] = "unroll",
        same: Array | None = None,
    ) -> Array:  # fmt: skip
        """The contrastive loss of every pair among the whole batch, its towers run a slice at a time.

        Embeddings of a slice are computed anew when they are differentiated, so that only one slice's activations are
        alive (GradCache; Gao et al., 2021), and the loss couples all of them: the numbers are those of one slice. The
        `microbatches` of `Training.from_loss` are something else: they would cut the batch into several, each with
        negatives of its own.

        Arguments:
            images, ids: the batch, as `embed_images` and `embed_texts` take it.
            slices: m >= 1, dividing the batch.
            loop: "map" is a `lax.map` over slices, one small program; "unroll" writes them out, which a convolution on
                a CPU needs (in a loop it is 20 times slower).
            same: int `[batch]`, ids of the pairs: two places of one id are not each other's negatives.

        Returns: `[batch]`.

        Errors: `StructureError` where the slices don't divide the batch.

        Cost: with several slices one forward pass of the towers more, and the activations of one slice.
        """

        def embed(part: tuple[Array, Array]) -> tuple[Array, Array]:
            return self.embed_images(params, part[0]), self.embed_texts(params, part[1])

        of_images, of_texts = in_slices(embed, (images, ids), slices, loop)
        return contrastive_losses(of_images, of_texts, self.scale_of(params), same)


def in_slices(
    function: Callable[[Any], Any], batch: Any, slices: int, loop: Literal["map", "unroll"] = "unroll"
) -> Any:
    """`function(batch)`, where rows don't depend on each other, a slice at a time and rematerialised.

    Arguments:
        function: a pytree of arrays `[n, ...]` to another.
        batch: the former, for all rows.
        slices, loop: as in `CLIP.losses`.
    """
    if slices == 1:
        return function(batch)
    size = jax.tree.leaves(batch)[0].shape[0]
    if slices < 1 or size % slices:
        raise StructureError(f"a batch of {size} can't be cut into {slices} equal slices")
    parts = jax.tree.map(lambda x: x.reshape(slices, size // slices, *x.shape[1:]), batch)
    one = jax.checkpoint(function)
    if loop == "map":
        return jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), lax.map(one, parts))
    found = [one(jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(slices)]
    return jax.tree.map(lambda *x: jnp.concatenate(x), *found)


def contrastive_losses(images: Array, texts: Array, scale: Array | float, same: Array | None = None) -> Array:
    r"""The symmetric InfoNCE loss of every pair of a batch: half of its image among texts and of its text among images.

    $$\ell_i = -s\, u_i \cdot v_i
      + \tfrac12 \log \sum_j e^{s\, u_i \cdot v_j} + \tfrac12 \log \sum_j e^{s\, u_j \cdot v_i}$$

    Arguments:
        images, texts: unit vectors $u$ and $v$, `[batch, embedding]`, a pair a row.
        scale: $s$.
        same: int `[batch]`: places of one id are not each other's negatives.

    Returns: `[batch]`.
    """
    scores = scale * images @ texts.T
    matching = jnp.diagonal(scores)
    if same is not None:
        other = (same[:, None] != same) | jnp.eye(len(same), dtype=bool)
        scores = jnp.where(other, scores, -jnp.inf)
    return (jax.nn.logsumexp(scores, 0) + jax.nn.logsumexp(scores, 1)) / 2 - matching


def patchify(images: Array, patch: int) -> Array:
    """Squares of patch x patch pixels side by side: `[batch, height / patch, width / patch, patch² · channels]`."""
    batch, height, width, channels = images.shape
    squares = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return squares.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, -1)


def _norm(features: int, dtype: DTypeLike) -> dict:
    return {"scale": jnp.ones(features, dtype), "bias": jnp.zeros(features, dtype)}


def _normalised(params: dict, x: Array) -> Array:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + _EPSILON) * params["scale"] + params["bias"]


def _linear(draw: Array, gain: float = 1.0) -> dict:
    return {"weight": draw * (gain / math.sqrt(draw.shape[0])), "bias": jnp.zeros(draw.shape[1], draw.dtype)}


def _apply_linear(params: dict, x: Array) -> Array:
    return x @ params["weight"] + params["bias"]


def _unit(x: Array) -> Array:
    return x * lax.rsqrt(jnp.sum(x**2, -1, keepdims=True) + _EPSILON**2)
