"""flax linen, with batch norm and dropout: which training digits carry a wrong label, told by the metagradient.

Batch statistics and dropout's key are model state: a step takes both, and hands on new ones.
"""

from typing import Any

import digits
import jax
import jax.numpy as jnp
import optax
from flax import linen

import metagradient as mg


class Net(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = linen.gelu(linen.BatchNorm(use_running_average=not train, momentum=0.9)(linen.Dense(32)(x)))
        return linen.Dense(10)(linen.Dropout(0.1, deterministic=not train)(x))


net = Net()
variables = net.init(jax.random.key(0), digits.images[:2], False)


def loss(params, model_state, batch, z):
    statistics, key = model_state
    key, here = jax.random.split(key)
    scores, updated = net.apply(
        {"params": params, "batch_stats": statistics}, batch["x"], True,
        rngs={"dropout": here}, mutable=["batch_stats"],
    )  # fmt: skip
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])
    return jnp.mean(z["weights"] * losses), (updated["batch_stats"], key)


def objective(state, z):
    statistics, _ = state.model_state
    scores: Any = net.apply({"params": state.params, "batch_stats": statistics}, digits.images[digits.clean], False)
    return optax.softmax_cross_entropy_with_integer_labels(scores, digits.labels[digits.clean]).mean()


def main() -> float:
    training = mg.Training.from_loss(
        loss, optax.sgd(0.2, momentum=0.9),
        (variables["params"], (variables["batch_stats"], jax.random.key(1))),
        [digits.batch(t) for t in range(digits.STEPS)], has_model_state=True,
    )  # fmt: skip
    value, grad = mg.value_and_metagrad(training, objective)({"weights": mg.PerExample(jnp.ones(digits.EXAMPLES))})
    share = digits.wrong_among_harmful(grad["weights"].value)
    print(f"loss {value:.3f}; of the 60 most harmful examples {share:.0%} carry a wrong label")
    return share


if __name__ == "__main__":
    main()
