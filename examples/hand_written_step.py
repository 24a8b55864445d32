"""Any step can be differentiated: here a hand-written one, with a decay of its own and noise from a key in the state.

Result: the metagradient in the noise scale agrees with finite differences to four digits.
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_diabetes

import metagradient as mg

STEPS = 200


def main() -> tuple[float, float]:
    inputs, progression = load_diabetes(return_X_y=True)
    table = np.column_stack([np.asarray(inputs), np.asarray(progression)])  # [442, 11]
    table = jnp.asarray((table - table.mean(0)) / table.std(0), jnp.float32)
    x, y = table[:, :-1], table[:, -1]
    train, held_out = np.arange(300), jnp.arange(300, 442)
    batches = [{"rows": np.random.default_rng(t).choice(train, 32)} for t in range(STEPS)]

    def error(w: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.mean((x[rows] @ w - y[rows]) ** 2)

    def step(state: dict, batch: dict, z: dict) -> dict:
        """Noisy gradient descent on a ridge loss; the state holds everything that evolves, the key included."""
        key, draw = jax.random.split(state["key"])
        noise = z["noise"] * jax.random.normal(draw, state["w"].shape)
        gradient = jax.grad(error)(state["w"], batch["rows"]) + jnp.exp(z["log_decay"]) * state["w"]
        return {"w": state["w"] - 0.02 * (gradient + noise), "key": key}

    training = mg.Training({"w": jnp.zeros(10), "key": jax.random.key(0)}, step, batches)

    def objective(state: dict, z: dict) -> jax.Array:
        return error(state["w"], held_out)

    z = {"noise": jnp.asarray(0.5), "log_decay": jnp.asarray(-2.0)}
    value, grad = mg.value_and_metagrad(training, objective)(z)
    h = 0.01
    ends = [float(objective(mg.train(training, {**z, "noise": z["noise"] + s * h}), z)) for s in (1, -1)]
    differences = (ends[0] - ends[1]) / (2 * h)
    print(f"held-out error {value:.4f}")
    print(f"d error / d noise: metagradient {grad['noise']:.5f}, finite differences {differences:.5f}")
    print(f"d error / d log_decay: metagradient {grad['log_decay']:.5f}")
    return float(grad["noise"]), differences


if __name__ == "__main__":
    main()
