"""haiku, with batch norm and dropout: which training digits carry a wrong label, told by the metagradient.

`hk.transform_with_state` makes pure functions: their state and dropout's key are model state.
"""

import digits
import haiku as hk
import jax
import jax.numpy as jnp
import optax

import metagradient as mg


def forward(x: jax.Array, train: bool) -> jax.Array:
    x = jax.nn.gelu(hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)(hk.Linear(32)(x), train))
    return hk.Linear(10)(hk.dropout(hk.next_rng_key(), 0.1, x) if train else x)


net = hk.transform_with_state(forward)
params, start = net.init(jax.random.PRNGKey(0), digits.images[:2], True)


def loss(params, model_state, batch, z):
    state, key = model_state
    key, here = jax.random.split(key)
    scores, state = net.apply(params, state, here, batch["x"], True)
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])
    return jnp.mean(z["weights"] * losses), (state, key)


def objective(trained, z):
    state, key = trained.model_state
    scores, _ = net.apply(trained.params, state, key, digits.images[digits.clean], False)
    return optax.softmax_cross_entropy_with_integer_labels(scores, digits.labels[digits.clean]).mean()


def main() -> float:
    training = mg.Training.from_loss(
        loss, optax.sgd(0.2, momentum=0.9), (params, (start, jax.random.PRNGKey(1))),
        [digits.batch(t) for t in range(digits.STEPS)], has_model_state=True,
    )  # fmt: skip
    value, grad = mg.value_and_metagrad(training, objective)({"weights": mg.PerExample(jnp.ones(digits.EXAMPLES))})
    share = digits.wrong_among_harmful(grad["weights"].value)
    print(f"loss {value:.3f}; of the 60 most harmful examples {share:.0%} carry a wrong label")
    return share


if __name__ == "__main__":
    main()
