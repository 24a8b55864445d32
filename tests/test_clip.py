"""CLIP: the contrastive loss couples the whole batch, and its micro-batched gradients are those of the batch."""

import json
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import Problem, assert_same, reference
from quick import slow_but
from tars import DIGITS, WORDS

import metagradient as mg
from metagradient.data.captions import HashedWords
from metagradient.errors import StructureError
from metagradient.models import CLIP
from metagradient.models.clip import (
    ConvolutionTower,
    TextTower,
    Transformer,
    VisionTower,
    contrastive_losses,
    in_slices,
    patchify,
)

PAIRS, BATCH, STEPS = 24, 12, 2
TOKENS = HashedWords(size=40, words=4, pieces=3)
TEXT = TextTower(vocabulary=40, length=4, transformer=Transformer(width=8, layers=0, heads=2))
TOWERS = {
    "transformer": VisionTower(size=8, patch=4, transformer=Transformer(width=8, layers=1, heads=2)),
    "convolution": ConvolutionTower(size=8, patch=2, widths=(4, 6), groups=2),
}


def clip(tower: str, **changes: Any) -> CLIP:
    return CLIP(image=TOWERS[tower], text=TEXT, embedding=6, scale=4.0, **changes)


def pairs(start: int, stop: int) -> dict[str, np.ndarray]:
    images = DIGITS.images[start:stop].repeat(3, -1).astype(np.float64)
    captions = [f"a {WORDS[label]}" for label in DIGITS.labels[start:stop]]
    return {"image": images, "text": TOKENS(captions)}


def batches() -> list[dict[str, np.ndarray]]:
    rng, data, drawn = np.random.default_rng(0), pairs(0, PAIRS), []
    for _ in range(STEPS):
        index = rng.permutation(PAIRS)[:BATCH]
        index[-1] = index[0]
        drawn.append({**{name: array[index] for name, array in data.items()}, "index": index})
    return drawn


def problem(tower: str, **options: Any) -> Problem:
    """A short run on captioned digits, its objective on others."""
    model, other = clip(tower), jax.tree.map(jnp.asarray, pairs(100, 112))

    def loss(params: Any, batch: Any, z: Any) -> jax.Array:
        losses = model.losses(params, batch["image"], batch["text"], same=batch["index"], **options)
        return jnp.mean(z["weights"] * losses)

    def objective(state: Any, z: Any) -> jax.Array:
        del z
        return model.losses(state.params, other["image"], other["text"]).mean()

    z = {"weights": mg.PerExample(np.linspace(0.5, 1.5, PAIRS))}
    init = jax.tree.map(np.asarray, model.init(jax.random.key(0), jnp.float64))
    return Problem(loss, optax.sgd(0.2, momentum=0.9), init, batches(), z, objective)


@cache
def expected(tower: str) -> tuple[Any, Any, Any]:
    """Value and metagradient of an unrolled run, and the library's metagradient of the whole batch."""
    with jax.enable_x64(True):
        whole = problem(tower)
        _, found = mg.value_and_metagrad(whole.training(), whole.objective)(whole.z)
        return *reference(whole), found


@pytest.mark.parametrize(
    ("tower", "loop"), slow_but(["transformer"], [("transformer", "map"), ("convolution", "unroll")])
)
def test_the_metagradient_through_slices_is_that_of_the_whole_batch_and_of_an_unrolled_run(tower, loop):
    with jax.enable_x64(True):
        value, unrolled, of_whole = expected(tower)
        sliced = problem(tower, slices=3, loop=loop)
        found, of_slices = mg.value_and_metagrad(sliced.training(), sliced.objective)(sliced.z)
        assert found == pytest.approx(float(value), rel=1e-12)
        assert_same(of_whole, unrolled)
        assert_same(of_slices, unrolled)
        assert_same(of_slices, of_whole)


def test_micro_batches_of_the_step_would_decouple_the_batch():
    rng = np.random.default_rng(0)
    u, v = (jnp.asarray(x) for x in rng.normal(size=(2, 12, 3)).astype(np.float32))
    cut = [contrastive_losses(u[i : i + 4], v[i : i + 4], 1.0) for i in range(0, 12, 4)]
    assert np.abs(jnp.concatenate(cut) - contrastive_losses(u, v, 1.0)).max() > 1


def test_slices_hold_the_activations_of_one():
    model = VisionTower(size=8, patch=2, transformer=Transformer(width=32, layers=3, heads=2))
    params, images = model.init(jax.random.key(0)), jnp.zeros((256, 8, 8, 3))

    def bytes_(slices: int) -> int:
        def total(params: Any) -> jax.Array:
            return in_slices(partial(model.apply, params), images, slices, "map").sum()

        analysis: Any = jax.jit(jax.grad(total)).lower(params).compile().memory_analysis()
        return analysis.temp_size_in_bytes

    assert bytes_(16) < bytes_(1) / 4


def test_contrastive_losses_are_their_definition():
    rng = np.random.default_rng(0)
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 5, 3)))
    scores = 7 * u @ v.T
    expected = [
        -np.log(np.exp(scores[i, i]) / np.exp(scores[i]).sum()) / 2
        - np.log(np.exp(scores[i, i]) / np.exp(scores[:, i]).sum()) / 2
        for i in range(5)
    ]
    np.testing.assert_allclose(contrastive_losses(jnp.asarray(u), jnp.asarray(v), 7.0), expected, rtol=1e-5)


def test_a_pair_that_a_batch_holds_twice_is_no_negative_of_itself():
    rng = np.random.default_rng(0)
    u, v = (jnp.asarray(x) for x in rng.normal(size=(2, 4, 3)).astype(np.float32))
    once = contrastive_losses(u, v, 1.0)
    twice = contrastive_losses(
        jnp.concatenate([u, u[:1]]), jnp.concatenate([v, v[:1]]), 1.0, jnp.array([3, 1, 2, 0, 3])
    )
    np.testing.assert_allclose(twice[0], once[0], rtol=1e-6)
    np.testing.assert_allclose(twice[-1], once[0], rtol=1e-6)
    assert twice[1] > once[1]


@pytest.mark.parametrize("tower", list(TOWERS))
def test_an_embedding_does_not_depend_on_its_batch(tower):
    model, data = clip(tower), pairs(0, 6)
    params = model.init(jax.random.key(0))
    for embed, name in ((jax.jit(model.embed_images), "image"), (jax.jit(model.embed_texts), "text")):
        together = embed(params, jnp.asarray(data[name]))
        np.testing.assert_allclose(jnp.sum(together**2, -1), 1, rtol=1e-5)
        alone = embed(params, jnp.asarray(data[name][2:3]))
        np.testing.assert_allclose(alone[0], together[2], atol=1e-6)
        assert np.abs(together[0] - together[1]).max() > 1e-2


def test_bytes_and_floats_are_the_same_image_and_padding_says_nothing():
    model = clip("convolution")
    params = model.init(jax.random.key(0))
    bytes_ = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    np.testing.assert_allclose(
        model.embed_images(params, jnp.asarray(bytes_)),
        model.embed_images(params, jnp.asarray(bytes_ / np.float32(255))),
        atol=1e-6,
    )
    embed = jax.jit(model.embed_texts)
    short = jnp.asarray(TOKENS(["a one", ""]))
    moved = jax.tree.map(jnp.copy, params)
    moved["text"]["tower"]["pieces"] = moved["text"]["tower"]["pieces"].at[0].add(3.0)
    np.testing.assert_array_equal(embed(params, short), embed(moved, short))
    gradient = jax.jit(jax.grad(lambda p: model.embed_texts(p, short).sum()))(params)
    assert bool(jnp.isfinite(gradient["text"]["projection"]).all())


def test_patches_are_squares_of_the_image():
    images = jnp.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    found = patchify(images, 2)
    assert found.shape == (2, 2, 2, 12)
    np.testing.assert_array_equal(found[1, 0, 1], images[1, :2, 2:].reshape(-1))


def test_a_fixed_scale_is_no_parameter():
    assert "log_scale" not in clip("transformer", learn_scale=False).init(jax.random.key(0))
    model = clip("transformer")
    assert float(model.scale_of(model.init(jax.random.key(0)))) == pytest.approx(4.0)


def test_the_published_model_has_its_parameters():
    model = CLIP.vit_b32()
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    # 151.3 million; the published one has a class token and no bias for its patches.
    assert count == pytest.approx(151.3e6, rel=0.002)
    assert json.dumps(shapes["image"]["projection"].shape) == "[768, 512]"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Transformer(width=10, heads=4), "4 heads"),
        (lambda: VisionTower(size=10, patch=4), "patches of 4 pixels"),
        (lambda: ConvolutionTower(size=12, patch=2, widths=(4, 4, 4)), "can't be halved 2 times"),
        (lambda: ConvolutionTower(widths=(6, 8), groups=4), "4 groups"),
        (lambda: in_slices(lambda x: x, jnp.zeros(7), 2), "can't be cut into 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(StructureError, match=message):
        make()


def test_models_can_be_changed_by_configuration():
    assert replace(clip("transformer"), scale=9.0).scale == 9.0
    assert hash(clip("transformer")) == hash(clip("transformer"))
