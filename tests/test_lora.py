"""LoRA: it starts as the decoder itself, is what its product says, and trains by exact metagradients."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metagradient as mg
from metagradient.errors import ConfigError
from metagradient.models import Decoder
from metagradient.models.lora import LoRA

pytestmark = pytest.mark.core

DECODER = Decoder(
    vocab_size=30,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
)
TARGETS = ("q_proj", "v_proj", "down_proj")
TOKENS = np.random.default_rng(0).integers(0, 30, (6, 5, 9))


def adapted(dtype: str = "float32") -> tuple[LoRA, dict, dict]:
    """Adapters whose product isn't zero."""
    lora = LoRA(rank=2, alpha=6.0, targets=TARGETS)
    params = DECODER.init(jax.random.key(0), dtype)[0]
    drawn = lora.init(params, jax.random.key(1), dtype)
    return (
        lora,
        params,
        jax.tree.map(lambda x: x + 0.1 * jnp.arange(x.size, dtype=dtype).reshape(x.shape) / x.size, drawn),
    )


def test_only_the_targets_have_adapters_and_they_start_as_the_decoder_itself():
    lora = LoRA(rank=2, targets=TARGETS)
    params = DECODER.init(jax.random.key(0))[0]
    adapters = lora.init(params, jax.random.key(1))
    shapes = jax.tree.map(lambda x: x.shape, adapters)
    assert shapes == {
        "self_attn": {
            "q_proj": {"lora_a": (2, 2, 12), "lora_b": (2, 12, 2)},
            "v_proj": {"lora_a": (2, 2, 12), "lora_b": (2, 4, 2)},
        },
        "mlp": {"down_proj": {"lora_a": (2, 2, 20), "lora_b": (2, 12, 2)}},
    }
    plain = DECODER.apply(params, {}, TOKENS[0])[0]
    np.testing.assert_array_equal(DECODER.apply(lora.attach(params, adapters), {}, TOKENS[0])[0], plain)


@pytest.mark.parametrize("rematerialise", [True, False])
def test_adapters_compute_what_their_merged_product_does(rematerialise: bool):
    decoder = replace(DECODER, rematerialise=rematerialise)
    with jax.enable_x64(True):
        lora, params, adapters = adapted("float64")
        found = decoder.apply(lora.attach(params, adapters), {}, TOKENS[0])[0]
        merged = lora.merged(params, adapters)
        assert jax.tree.structure(merged) == jax.tree.structure(params)
        np.testing.assert_allclose(found, decoder.apply(merged, {}, TOKENS[0])[0], rtol=1e-10)
        change = merged["layers"]["mlp"]["down_proj"]["weight"] - params["layers"]["mlp"]["down_proj"]["weight"]
        product = adapters["mlp"]["down_proj"]["lora_b"] @ adapters["mlp"]["down_proj"]["lora_a"]
        np.testing.assert_allclose(change, 3 * product, rtol=1e-9, atol=1e-12)


def test_attaching_shares_the_frozen_parameters():
    lora, params, adapters = adapted()
    attached = lora.attach(params, adapters)
    assert attached["embed_tokens"]["weight"] is params["embed_tokens"]["weight"]
    assert attached["layers"]["self_attn"]["q_proj"]["weight"] is params["layers"]["self_attn"]["q_proj"]["weight"]
    assert "lora_a" not in params["layers"]["self_attn"]["q_proj"]


def test_the_metagradient_through_adapters_is_that_of_the_unrolled_run():
    """Frozen parameters come with the batch, by reference: states hold the adapters alone."""
    with jax.enable_x64(True):
        lora, params, adapters = adapted("float64")
        optimizer = optax.adam(0.03, eps_root=1e-8)

        def losses(adapters: Any, batch: Any) -> jax.Array:
            tokens = batch["tokens"]
            attached = lora.attach(batch["untrained"], adapters)
            return DECODER.token_losses(attached, tokens[:, :-1], tokens[:, 1:]).mean(-1)

        def loss(adapters: Any, batch: Any, z: Any) -> jax.Array:
            return jnp.mean(z["weights"] * losses(adapters, batch))

        batches = [{"tokens": TOKENS[t], "index": (np.arange(5) + 3 * t) % 12, "untrained": params} for t in range(5)]
        weights = jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, 12))
        last = {"tokens": TOKENS[5], "untrained": params}
        training = mg.Training.from_loss(loss, optimizer, adapters, batches)
        z = {"weights": mg.PerExample(weights)}
        found = mg.value_and_metagrad(training, lambda s, z: jnp.mean(losses(s.params, last)))(z)[1]["weights"].value

        def unrolled(weights: jax.Array) -> jax.Array:
            state, moments = adapters, optimizer.init(adapters)
            for batch in batches:
                grad = jax.grad(loss)(state, batch, {"weights": weights[batch["index"]]})
                updates, moments = optimizer.update(grad, moments, state)
                state = optax.apply_updates(state, updates)
            return jnp.mean(losses(state, last))

        expected = jax.jit(jax.grad(unrolled))(weights)
        assert float(jnp.abs(expected).max()) > 1e-6
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "rank from 1"), ({"targets": ()}, "no target"), ({"targets": ("c_attn",)}, "c_attn")],
)
def test_adapters_that_cannot_be_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        LoRA(**settings)
