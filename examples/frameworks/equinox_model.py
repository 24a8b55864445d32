"""equinox, with batch norm and dropout: which training digits carry a wrong label, told by the metagradient.

`eqx.partition` takes a model apart into arrays, which are trained, and everything else, which the loss closes over.
"""

import digits
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import metagradient as mg


class Net(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    last: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        a, b = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(64, 32, key=a), eqx.nn.Linear(32, 10, key=b)
        self.norm, self.dropout = eqx.nn.BatchNorm(32, "batch", mode="batch", momentum=0.9), eqx.nn.Dropout(0.1)

    def __call__(self, x: jax.Array, state: eqx.nn.State, key: jax.Array):
        x, state = self.norm(self.first(x), state)
        return self.last(self.dropout(jax.nn.gelu(x), key=key)), state


model, start = eqx.nn.make_with_state(Net)(jax.random.key(0))
params, static = eqx.partition(model, eqx.is_inexact_array)


def scores(params, state, key, x, *, train: bool):
    model = eqx.nn.inference_mode(eqx.combine(params, static), not train)
    keys = jax.random.split(key, len(x))
    return jax.vmap(model, axis_name="batch", in_axes=(0, None, 0), out_axes=(0, None))(x, state, keys)


def loss(params, model_state, batch, z):
    state, key = model_state
    key, here = jax.random.split(key)
    found, state = scores(params, state, here, batch["x"], train=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(found, batch["y"])
    return jnp.mean(z["weights"] * losses), (state, key)


def objective(trained, z):
    state, key = trained.model_state
    found, _ = scores(trained.params, state, key, digits.images[digits.clean], train=False)
    return optax.softmax_cross_entropy_with_integer_labels(found, digits.labels[digits.clean]).mean()


def main() -> float:
    training = mg.Training.from_loss(
        loss, optax.sgd(0.2, momentum=0.9), (params, (start, jax.random.key(1))),
        [digits.batch(t) for t in range(digits.STEPS)], has_model_state=True,
    )  # fmt: skip
    value, grad = mg.value_and_metagrad(training, objective)({"weights": mg.PerExample(jnp.ones(digits.EXAMPLES))})
    share = digits.wrong_among_harmful(grad["weights"].value)
    print(f"loss {value:.3f}; of the 60 most harmful examples {share:.0%} carry a wrong label")
    return share


if __name__ == "__main__":
    main()
