"""Learn a learning-rate schedule, one rate a step, from a flat start.

Result: the validation loss after 60 steps falls from 1.10 to below 0.2 in 20 meta-steps (scikit-learn's digits, a
linear model with momentum).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import metagradient as mg

STEPS, BATCH = 60, 64


def main(meta_steps: int = 20) -> list[float]:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = jnp.asarray(pixels / 16, jnp.float32), jnp.asarray(digits)  # [1797, 64], [1797]
    order = np.random.default_rng(0).permutation(len(labels))
    train, validation = order[:1000], jnp.asarray(order[1000:1400])
    batches = [{"rows": np.random.default_rng(t).choice(train, BATCH)} for t in range(STEPS)]

    def cross_entropy(params: dict, rows: jax.Array) -> jax.Array:
        logits = images[rows] @ params["w"] + params["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    training = mg.Training.from_loss(
        loss=lambda params, batch, z: cross_entropy(params, batch["rows"]),
        optimizer=lambda z: optax.sgd(jnp.exp(z["log_rate"]), momentum=0.9),
        init={"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)},
        batches=batches,
    )
    # Rates are learnt as logarithms: they stay positive, and a unit is a factor.
    z = {"log_rate": mg.PerStep(jnp.full(STEPS, np.log(0.02), jnp.float32))}

    def objective(state: mg.TrainState, z: dict) -> jax.Array:
        return cross_entropy(state.params, validation)

    descent = mg.descend(training, objective, z, mg.updates.normalised(0.2, momentum=0.5), meta_steps)
    losses = []
    for record in descent:
        losses.append(record.value)
        print(f"meta-step {record.step:2d}   validation loss {record.value:.4f}")
    assert descent.best
    rates = np.exp(descent.best.z["log_rate"].value)
    print(f"best rates, of meta-step {descent.best.step}:", np.round(rates[::6], 3))
    return losses


if __name__ == "__main__":
    main()
