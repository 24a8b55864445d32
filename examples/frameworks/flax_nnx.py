"""flax nnx, with batch norm and dropout: which training digits carry a wrong label, told by the metagradient.

`nnx.split` takes a model apart: its parameters are trained, the rest (running statistics, counters of random keys)
evolves as model state, and `nnx.merge` puts both together inside the loss.
"""

import digits
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import metagradient as mg


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first, self.last = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(32, momentum=0.9, rngs=rngs), nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(self.dropout(nnx.gelu(self.norm(self.first(x)))))


graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)


def scores(params, rest, x, *, train: bool):
    model = nnx.merge(graph, params, rest, copy=True)  # a copy: the step stays a pure function
    model.train() if train else model.eval()
    return model(x), nnx.state(model, nnx.Not(nnx.Param))


def loss(params, rest, batch, z):
    found, rest = scores(params, rest, batch["x"], train=True)
    losses = optax.softmax_cross_entropy_with_integer_labels(found, batch["y"])
    return jnp.mean(z["weights"] * losses), rest


def objective(state, z):
    found, _ = scores(state.params, state.model_state, digits.images[digits.clean], train=False)
    return optax.softmax_cross_entropy_with_integer_labels(found, digits.labels[digits.clean]).mean()


def main() -> float:
    training = mg.Training.from_loss(
        loss, optax.sgd(0.2, momentum=0.9), (params, rest), [digits.batch(t) for t in range(digits.STEPS)],
        has_model_state=True,
    )  # fmt: skip
    value, grad = mg.value_and_metagrad(training, objective)({"weights": mg.PerExample(jnp.ones(digits.EXAMPLES))})
    share = digits.wrong_among_harmful(grad["weights"].value)
    print(f"loss {value:.3f}; of the 60 most harmful examples {share:.0%} carry a wrong label")
    return share


if __name__ == "__main__":
    main()
