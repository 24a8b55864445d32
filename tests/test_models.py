"""What the shipped models promise: counts, dtypes, causality, batch-norm statistics, usable second derivatives."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import carefully

from metagradient.errors import StructureError
from metagradient.models import MLP, Decoder, ResNet9

pytestmark = pytest.mark.core

# These programs run once: less optimisation saves a third of the tests' time.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

SMALL_RESNET = {"widths": (4, 6, 8), "pool_stem": True}
RESNETS = {
    "smooth": ResNet9.smooth(**SMALL_RESNET),
    "standard": ResNet9.standard(**SMALL_RESNET),
    "logsumexp": ResNet9(**SMALL_RESNET, pooling="logsumexp", final_scale=0.125),
}
DECODERS = {
    "tied": Decoder(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        attention_chunk=4,
        loss_chunk=3,
    ),
    "untied": Decoder(
        vocab_size=40,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    ),
}
DECODERS["written out"] = replace(DECODERS["tied"], rematerialise=False)
MODELS = {"mlp": MLP(sizes=(64, 5, 10), activation="relu")} | RESNETS | DECODERS


def inputs_for(model, batch=3):
    random = np.random.default_rng(0)
    if isinstance(model, Decoder):
        return jnp.asarray(random.integers(0, model.vocab_size, (batch, 7)))
    return jnp.asarray(random.normal(size=(batch, 8, 8) if isinstance(model, MLP) else (batch, 8, 8, 3)))


initial = cache(lambda model: model.init(jax.random.key(0)))


@partial(jit, static_argnums=0, static_argnames="train")
def apply(model, params, state, x, *, train=True):
    return model.apply(params, state, x, train=train)


@partial(jit, static_argnums=0)
def hidden(model, params, tokens):
    return model.hidden(params, tokens)


def direction_like(tree):
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape), leaf.dtype), tree)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (MLP(), 9_610),
        (ResNet9(), 6_573_130),
        (ResNet9(widths=(8, 16, 32)), 29_650),
        (Decoder(), 134_515_008),
        (Decoder(tie_word_embeddings=False), 162_826_560),
    ],
)
def test_documented_configurations_have_their_documented_parameter_counts(model, parameters):
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameters


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_in_the_dtype_of_its_parameters(name, dtype):
    model = MODELS[name]
    with jax.enable_x64(dtype == "float64"):
        params, state = jax.eval_shape(partial(model.init, dtype=dtype), jax.random.key(0))
        x = inputs_for(model)
        logits, after = jax.eval_shape(model.apply, params, state, x)
        assert logits.shape == ((*x.shape, 40) if isinstance(model, Decoder) else (3, 10))
        assert {leaf.dtype.name for leaf in jax.tree.leaves((params, state, logits, after))} == {dtype}
        assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("name", ["mlp", "smooth", "standard"])
def test_every_parameter_has_a_finite_gradient_and_adjoint(name):
    model = MODELS[name]
    params, state = initial(model)
    x = inputs_for(model)

    def loss(params):
        return -jnp.mean(jax.nn.log_softmax(model.apply(params, state, x)[0])[:, 0])

    gradient_and_adjoint = jit(lambda params: jax.jvp(jax.grad(loss), (params,), (direction_like(params),)))
    with carefully():
        found = gradient_and_adjoint(params)
    for path, leaf in jax.tree.leaves_with_path(found):
        assert jnp.all(jnp.isfinite(leaf)), path
        assert jnp.any(leaf != 0), path


# ResNet-9


@pytest.fixture(params=["smooth", "standard"])
def resnet(request):
    model = RESNETS[request.param]
    return model, *initial(model), inputs_for(model, batch=8)


def test_training_moves_the_running_statistics_and_evaluation_only_reads_them(resnet):
    model, params, state, x = resnet
    _, moved = apply(model, params, state, x)
    batch = model.recalibrate(params, state, [x])
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state, batch)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), moved, expected)
    logits, kept = apply(model, params, moved, x, train=False)
    jax.tree.map(np.testing.assert_array_equal, kept, moved)
    in_other_company, _ = apply(model, params, moved, x.at[1:].mul(2), train=False)
    np.testing.assert_allclose(logits[0], in_other_company[0], rtol=1e-5, atol=1e-6)


def test_statistics_recalibrated_on_a_batch_evaluate_it_as_training_does(resnet):
    model, params, state, x = resnet
    trained, _ = apply(model, params, state, x)
    evaluated, _ = apply(model, params, model.recalibrate(params, state, [x]), x, train=False)
    np.testing.assert_allclose(evaluated, trained, rtol=1e-4, atol=1e-5)


def test_recalibration_averages_its_batches_and_needs_one(resnet):
    model, params, state, x = resnet
    halves = [model.recalibrate(params, state, [half]) for half in (x[:4], x[4:])]
    both = model.recalibrate(params, state, (x[:4], x[4:]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), both, jax.tree.map(lambda a, b: (a + b) / 2, *halves))
    with pytest.raises(StructureError, match="at least one"):
        model.recalibrate(params, state, [])


@pytest.mark.parametrize("norm_before_activation", [True, False])
def test_the_norm_sits_on_the_side_of_the_activation_that_was_asked_for(norm_before_activation):
    """A norm makes what comes before it blind to its scale; GELU isn't homogeneous, so after it that shows."""
    model = ResNet9(**SMALL_RESNET, norm_before_activation=norm_before_activation, epsilon=0.0)
    params, state = initial(model)
    x = inputs_for(model, batch=8)
    louder = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 3 if "kernel" in str(path[-1]) else leaf, params
    )
    same = jnp.allclose(apply(model, params, state, x)[0], apply(model, louder, state, x)[0], rtol=1e-3, atol=1e-4)
    assert same == norm_before_activation


def test_pooling_by_log_mean_exponential_lies_between_average_and_maximum():
    x = inputs_for(ResNet9())
    pooled = {kind: ResNet9(pooling=kind)._pool2x2(x) for kind in ("average", "logsumexp", "max")}
    assert jnp.all(pooled["average"] < pooled["logsumexp"])
    assert jnp.all(pooled["logsumexp"] < pooled["max"])


def test_the_final_scale_multiplies_the_logits_and_width_every_layer():
    model, scaled = (ResNet9(**SMALL_RESNET, final_scale=scale) for scale in (1.0, 0.125))
    params, state = initial(model)
    x = inputs_for(model)
    np.testing.assert_allclose(
        apply(model, params, state, x)[0] * 0.125, apply(scaled, params, state, x)[0], rtol=1e-6, atol=1e-7
    )
    twice, _ = jax.eval_shape(ResNet9(**SMALL_RESNET, width_multiplier=2).init, jax.random.key(0))
    doubled, _ = jax.eval_shape(ResNet9(widths=(8, 12, 16)).init, jax.random.key(0))
    assert twice == doubled


def test_both_ways_to_convolve_are_one_network():
    direct, patches = (ResNet9(**SMALL_RESNET, convolution=method) for method in ("direct", "patches"))
    params, state = initial(direct)
    x = inputs_for(direct)
    logits = [apply(model, params, state, x)[0] for model in (direct, patches)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_images_that_do_not_halve_evenly_are_refused_with_the_sizes_that_do():
    model = ResNet9(widths=(4, 6, 8))
    params, state = initial(model)
    with pytest.raises(StructureError, match="divisible by 4"):
        model.apply(params, state, jnp.zeros((1, 18, 16, 3)))


# Decoder


def reference_logits(model, params, tokens):
    """The layers one after the other, full score matrices, positions rotated as Hugging Face's Llama does it."""
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    batch, length = tokens.shape
    size = params["layers"]["self_attn"]["q_proj"]["weight"].shape[1] // heads

    def norm(weights, x):
        return weights["weight"] * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + model.rms_norm_eps)

    def rotate(x):
        angles = jnp.arange(length)[:, None] / model.rope_theta ** (jnp.arange(0, size, 2) / size)
        angles = jnp.concatenate([angles, angles], -1)[:, None]
        half = jnp.concatenate([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * jnp.cos(angles) + half * jnp.sin(angles)

    def attention(weights, x):
        project = {name: x @ weights[f"{name}_proj"]["weight"].T for name in "qkv"}
        query = rotate(project["q"].reshape(batch, length, heads, size))
        key = jnp.repeat(rotate(project["k"].reshape(batch, length, groups, size)), heads // groups, 2)
        value = jnp.repeat(project["v"].reshape(batch, length, groups, size), heads // groups, 2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(size)
        shares = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf))
        return jnp.einsum("bhqk,bkhd->bqhd", shares, value).reshape(batch, length, -1) @ weights["o_proj"]["weight"].T

    x = params["embed_tokens"]["weight"][tokens]
    for index in range(model.num_hidden_layers):
        layer = jax.tree.map(lambda leaf: leaf[index], params["layers"])  # noqa: B023
        x = x + attention(layer["self_attn"], norm(layer["input_layernorm"], x))
        y, mlp = norm(layer["post_attention_layernorm"], x), {k: v["weight"].T for k, v in layer["mlp"].items()}
        x = x + (jax.nn.silu(y @ mlp["gate_proj"]) * (y @ mlp["up_proj"])) @ mlp["down_proj"]
    unembedding = params["embed_tokens" if model.tie_word_embeddings else "lm_head"]["weight"]
    return norm(params["norm"], x) @ unembedding.T


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_losses_have_the_derivatives_of_a_plain_llama(name):
    model = DECODERS[name]
    with jax.enable_x64(True):
        params, _ = model.init(jax.random.key(0), "float64")
        tokens = inputs_for(model)
        targets = jnp.roll(tokens, -1, 1)
        weights = jnp.asarray(np.random.default_rng(2).uniform(size=tokens.shape))

        def ours(z):
            return jnp.mean(model.token_losses(z["params"], tokens, targets, z["weights"]))

        def reference(z):
            log_probabilities = jax.nn.log_softmax(reference_logits(model, z["params"], tokens))
            return -jnp.mean(z["weights"] * jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0])

        z = {"params": params, "weights": weights}
        tangents = partial(jax.jvp, primals=(z,), tangents=(direction_like(z),))
        got, expected = (jit(lambda loss=loss: tangents(jax.value_and_grad(loss)))() for loss in (ours, reference))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10), got, expected)


@pytest.mark.parametrize("name", DECODERS)
def test_a_future_token_changes_nothing_before_it(name):
    model = DECODERS[name]
    params, _ = initial(model)
    tokens = inputs_for(model)
    changed = tokens.at[:, 4].set((tokens[:, 4] + 1) % model.vocab_size)
    before, after = hidden(model, params, tokens), hidden(model, params, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert jnp.all(jnp.any(before[:, 4:] != after[:, 4:], -1))


def test_rotary_positions_tell_the_order_of_tokens_and_not_where_a_sequence_starts():
    """Wherever it stands, a token that has seen only copies of itself looks the same."""
    model = DECODERS["tied"]
    params, _ = initial(model)
    copies = hidden(model, params, jnp.full((1, 6), 3))
    np.testing.assert_allclose(copies, jnp.broadcast_to(copies[:, :1], copies.shape), rtol=1e-4, atol=1e-5)
    one, other = (hidden(model, params, jnp.array([tokens])) for tokens in ([3, 4, 5], [4, 3, 5]))
    assert jnp.max(jnp.abs(one[:, 2] - other[:, 2])) > 1e-4
