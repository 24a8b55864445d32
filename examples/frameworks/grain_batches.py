"""A grain pipeline as batches, and jax.grad through the run.

A `grain.MapDataset` is a random-access sequence: it can be read again at any step, as replays do. Shuffling and
augmentation draw on keys of their own, so that a step's batch is the same at every read. `.repeat()` makes it as long
as the run; an iterator (`.to_iter_dataset()`) can't be replayed, and is refused.
"""

import digits
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

import metagradient as mg


def example(i: int) -> dict[str, np.ndarray]:
    return {"x": digits.images[digits.train[i]], "y": digits.given[i], "index": np.asarray(i)}


def shifted(example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Augmentation: a picture moved sideways by a pixel, or not."""
    picture = np.roll(example["x"].reshape(8, 8), rng.integers(-1, 2), axis=1)
    return {**example, "x": picture.reshape(64)}


batches = (
    grain.MapDataset.range(digits.EXAMPLES)
    .seed(0)
    .shuffle()
    .map(example)
    .random_map(shifted)
    .repeat(13)
    .batch(digits.BATCH, drop_remainder=True)
)


def losses(params, x, y):
    hidden = jax.nn.gelu(x @ params["first"])
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["last"], y)


def main() -> float:
    a, b = jax.random.split(jax.random.key(0))
    init = {"first": jax.random.normal(a, (64, 32)) / 8, "last": jax.random.normal(b, (32, 10)) / 6}
    training = mg.Training.from_loss(
        lambda params, batch, z: jnp.mean(z["weights"] * losses(params, batch["x"], batch["y"])),
        optax.adam(0.01, eps_root=1e-8), init, batches,
    )  # fmt: skip

    def objective(z):
        state = mg.train(training, z, adjoint=mg.Replay(schedule=mg.schedule.TwoLevel()))
        return losses(state.params, digits.images[digits.clean], digits.labels[digits.clean]).mean()

    value, grad = jax.value_and_grad(objective)({"weights": mg.PerExample(jnp.ones(digits.EXAMPLES))})
    share = digits.wrong_among_harmful(grad["weights"].value)
    print(f"loss {value:.3f}; of the 60 most harmful examples {share:.0%} carry a wrong label")
    return share


if __name__ == "__main__":
    main()
