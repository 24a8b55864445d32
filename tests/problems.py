"""Small training runs on real digits, and a slow reference that shares no code with the library.

Gradients must not vanish, or a wrong one passes: models are smooth (tanh), runs are short and stop far from
convergence, learning rates move the loss by a tenth or more, and objectives are read on digits that are in no batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn.datasets import load_digits

import metagradient as mg

EXAMPLES, BATCH, STEPS, HIDDEN, CLASSES = 32, 8, 11, 6, 10
VISITED = 24
"""Examples from here on are in no batch."""


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    return np.asarray(pixels) / 16, np.asarray(labels)


def rows(start: int, stop: int, dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Some of the 1,797 digits: pixels in [0, 1], of which a few at the border are zero in every digit, and labels."""
    pixels, labels = _digits()
    return {"x": pixels[start:stop].astype(dtype), "y": labels[start:stop]}


def batches(steps: int = STEPS, dtype: Any = np.float64) -> list[dict[str, np.ndarray]]:
    """Batches of the first `VISITED` digits; every batch holds one of them twice."""
    rng, data, drawn = np.random.default_rng(0), rows(0, EXAMPLES, dtype), []
    for _ in range(steps):
        index = rng.integers(0, VISITED, BATCH)
        index[-1] = index[0]
        drawn.append({"x": data["x"][index], "y": data["y"][index], "index": index})
    return drawn


def mlp(dtype: Any = np.float64) -> dict[str, np.ndarray]:
    """Parameters of a multilayer perceptron, float[64, h], float[h, 10], float[10]."""
    rng = np.random.default_rng(1)
    return {
        "w1": (rng.normal(size=(64, HIDDEN)) / 4).astype(dtype),
        "w2": (rng.normal(size=(HIDDEN, CLASSES)) / 2).astype(dtype),
        "b2": np.zeros(CLASSES, dtype),
    }


def logits(params: dict, x: Any) -> jax.Array:
    return jnp.tanh(x @ params["w1"]) @ params["w2"] + params["b2"]


def cross_entropy(scores: Any, y: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(scores, y)


def ridge(params: Any) -> Any:
    return sum(jnp.sum(p**2) for p in jax.tree.leaves(params))


def every_kind(dtype: Any = np.float64) -> dict[str, Any]:
    """One metaparameter of every kind: example weights, a temperature a step, the strength of a ridge penalty."""
    return {
        "weights": mg.PerExample(np.ones(EXAMPLES, dtype)),
        "temperature": mg.PerStep(np.linspace(0.8, 1.2, STEPS, dtype=dtype)),
        "ridge": mg.Shared(np.asarray(1e-2, dtype)),
    }


def digit_losses(params: dict, batch: dict, z: dict) -> jax.Array:
    """One loss an example, float[batch]."""
    scores = logits(params, batch["x"]) * z["temperature"]
    return cross_entropy(scores, batch["y"]) * z["weights"] + z["ridge"] * ridge(params)


def digit_loss(params: dict, batch: dict, z: dict) -> jax.Array:
    return jnp.mean(digit_losses(params, batch, z))


def held_out(state: Any, z: Any) -> jax.Array:
    """Mean loss on digits that no batch holds."""
    del z
    data = rows(100, 120, state.params["w1"].dtype)
    return jnp.mean(cross_entropy(logits(state.params, data["x"]), data["y"]))


@dataclass(frozen=True, eq=False)
class Problem:
    """A training run in parts, for the library and for the reference alike. Fields as in `Training.from_loss`."""

    loss: Callable[..., Any] = digit_loss
    optimizer: Any = field(default_factory=lambda: OPTIMISERS["sgd"])
    init: Any = field(default_factory=mlp)
    batches: Any = field(default_factory=batches)
    z: Any = field(default_factory=every_kind)
    objective: Callable[[Any, Any], Any] = held_out
    microbatches: int = 1
    has_model_state: bool = False

    def training(self, **options: Any) -> mg.Training:
        asked = {"microbatches": self.microbatches, "has_model_state": self.has_model_state, **options}
        return mg.Training.from_loss(self.loss, self.optimizer, self.init, self.batches, **asked)


def seen(z: Any, t: Any, index: Any) -> Any:
    """What step t sees of z: example rows by a product with a one-hot matrix, so that no gather is differentiated."""

    def one(kind: Any) -> Any:
        if isinstance(kind, mg.PerStep):
            return kind.value[t]
        if isinstance(kind, mg.PerExample):
            ids = np.arange(kind.value.shape[0]) if kind.rows is None else kind.rows
            return jnp.tensordot((index[:, None] == ids).astype(kind.value.dtype), kind.value, 1)
        if isinstance(kind, mg.PerGroup):
            value = kind.value if kind.value.ndim == 1 else kind.value[t]
            member = jnp.asarray(kind.groups)[index][:, None] == np.arange(value.shape[0])
            return jnp.sum(jnp.where(member, value, 0), 1)
        return kind.value if isinstance(kind, mg.Shared) else kind

    return jax.tree.map(one, z, is_leaf=_is_kind)


def _is_kind(x: Any) -> bool:
    return isinstance(x, mg.Shared | mg.PerStep | mg.PerExample | mg.PerGroup)


def without_kinds(z: Any) -> Any:
    """What functions of the user's see of z."""
    return jax.tree.map(lambda k: k.value if _is_kind(k) else k, z, is_leaf=_is_kind)


def mean(trees: list[Any]) -> Any:
    """Mean of floating leaves; the first of any other, which are equal in all."""

    def one(*leaves: Any) -> Any:
        return sum(leaves[1:], leaves[0]) / len(leaves) if jnp.issubdtype(leaves[0].dtype, jnp.floating) else leaves[0]

    return jax.tree.map(one, *trees)


@cache
def _reference_step(loss: Any, made: Any, has_model_state: bool, microbatches: int) -> Any:
    """A step, compiled once for all problems that share it."""

    def step(carry: Any, z: Any, t: Any, batch: Any) -> Any:
        params, opt_state, model_state = carry
        size, m = jax.tree.leaves(batch)[0].shape[0], microbatches
        results = []
        for start in range(0, size, size // m):
            part = batch if m == 1 else {k: v[start : start + size // m] for k, v in batch.items()}

            def one(params: Any, part: Any = part) -> Any:
                z_t = seen(z, t, part.get("index"))
                if has_model_state:
                    return loss(params, model_state, part, z_t)
                return loss(params, part, z_t), model_state

            results.append(jax.grad(one, has_aux=True)(params))
        gradient, model_state = mean(results)
        updates, opt_state = _optimiser(made, z, t, batch).update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, model_state

    return jax.jit(step)


def _optimiser(made: Any, z: Any, t: Any, batch: Any) -> optax.GradientTransformation:
    return made if isinstance(made, optax.GradientTransformation) else made(seen(z, t, batch.get("index")))


def unrolled(problem: Problem, window: int | None = None) -> Callable[[Any], Any]:
    """The objective as a plain loop over steps, to be differentiated by JAX reverse over reverse.

    Arguments:
        window: no cotangent passes the state before the last `window` steps, or reaches what earlier steps saw of z.
    """
    step: Any = _reference_step(problem.loss, problem.optimizer, problem.has_model_state, problem.microbatches)

    def run(z: Any) -> Any:
        given: Any = problem.init(without_kinds(z)) if callable(problem.init) else problem.init
        params, model_state = given if problem.has_model_state else (given, None)
        params = jax.tree.map(jnp.asarray, params)
        opt_state = _optimiser(problem.optimizer, z, 0, problem.batches[0]).init(params)
        carry: Any = params, opt_state, model_state
        steps = len(problem.batches)
        for t, batch in enumerate(problem.batches):
            frozen = window is not None and t < steps - window
            carry = step(carry, lax.stop_gradient(z) if frozen else z, t, batch)
            carry = lax.stop_gradient(carry) if frozen else carry
        params, opt_state, model_state = carry
        return problem.objective(mg.TrainState(params, opt_state, model_state, jnp.int32(steps)), without_kinds(z))

    return run


def reference(problem: Problem, window: int | None = None) -> tuple[jax.Array, Any]:
    """Value and gradient of `unrolled`, in the structure of z."""
    return jax.value_and_grad(unrolled(problem, window))(jax.tree.map(jnp.asarray, problem.z))


def assert_same(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Equal relative to each leaf's largest entry: a pooled norm hides a wrong leaf behind a large one."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name, scale = jax.tree_util.keystr(path), np.max(np.abs(b))
        assert scale > 0, f"{name} vanishes in the reference, so it tests nothing"
        assert a.shape == b.shape, name
        error = np.max(np.abs(np.asarray(a) - np.asarray(b))) / scale
        assert error <= tolerance, f"{name} is off by {error:.1e} of its largest entry"


def matrices_only(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


OPTIMISERS: dict[str, Any] = {
    "sgd": optax.sgd(0.3),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "cosine": optax.sgd(optax.warmup_cosine_decay_schedule(0.05, 0.3, 3, STEPS)),
    "noise": optax.chain(optax.add_noise(1e-3, 0.5, jax.random.key(3, impl="rbg")), optax.sgd(0.3)),
    "adam": optax.adam(0.02, eps_root=1e-6),
    "adamw": optax.adamw(0.02, eps_root=1e-6, weight_decay=0.1, mask=matrices_only),
    "driven": lambda z: optax.adamw(z["lr"], eps_root=1e-6, weight_decay=z["decay"]),
    "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.02, eps_root=1e-6)),
    "rmsprop": optax.rmsprop(0.01, eps=1e-4, momentum=0.5),
    "muon": optax.contrib.muon(0.02, ns_steps=2, weight_decay=0.1, adam_eps_root=1e-6, adam_weight_decay=0.05),
}
"""ONE table of optimisers, for every test that runs over them."""


def driven(dtype: Any = np.float64) -> dict[str, Any]:
    """Metaparameters that only the optimiser reads: a learning rate a step, and a weight decay."""
    return {"lr": mg.PerStep(np.linspace(0.03, 0.01, STEPS, dtype=dtype)), "decay": mg.Shared(np.asarray(0.1, dtype))}


def with_optimiser(name: str, dtype: Any = np.float64, **changes: Any) -> Problem:
    """Digits by a row of the table."""
    z = every_kind(dtype) | (driven(dtype) if name == "driven" else {})
    return Problem(
        **{"optimizer": OPTIMISERS[name], "init": mlp(dtype), "batches": batches(STEPS, dtype), "z": z} | changes
    )


# Batch norm: statistics of the batch in training, running ones at the end, so that cotangents reach the latter.


def normalised(x: Any, mean: Any, variance: Any) -> Any:
    return (x - mean) / jnp.sqrt(variance + 1e-3)


def batch_norm_loss(params: dict, statistics: dict, batch: dict, z: dict) -> tuple[jax.Array, dict]:
    hidden = batch["x"] @ params["w1"]
    mean, variance = jnp.mean(hidden, axis=0), jnp.var(hidden, axis=0)
    scores = jnp.tanh(normalised(hidden, mean, variance)) @ params["w2"] + params["b2"]
    running = {
        "mean": 0.8 * statistics["mean"] + 0.2 * mean,
        "variance": 0.8 * statistics["variance"] + 0.2 * variance,
        "seen": statistics["seen"] + 1,
    }
    return jnp.mean(z["weights"] * cross_entropy(scores * z["temperature"], batch["y"])), running


def batch_norm_held_out(state: Any, z: Any) -> jax.Array:
    del z
    data, params, statistics = rows(100, 120), state.params, state.model_state
    hidden = normalised(data["x"] @ params["w1"], statistics["mean"], statistics["variance"])
    return jnp.mean(cross_entropy(jnp.tanh(hidden) @ params["w2"] + params["b2"], data["y"]))


def batch_norm(**changes: Any) -> Problem:
    """Running statistics and a counter in the model state."""
    statistics = {"mean": np.zeros(HIDDEN), "variance": np.ones(HIDDEN), "seen": np.int32(0)}
    z = {k: v for k, v in every_kind().items() if k != "ridge"}
    given = {"init": (mlp(), statistics), "optimizer": OPTIMISERS["momentum"], "z": z, "has_model_state": True}
    return Problem(batch_norm_loss, **{"objective": batch_norm_held_out, **given, **changes})


# Dropout: a key in the model state, split by every step.


def dropout_loss(params: dict, key: jax.Array, batch: dict, z: dict) -> tuple[jax.Array, jax.Array]:
    key, here = jax.random.split(key)
    x = batch["x"] * jax.random.bernoulli(here, 0.8, batch["x"].shape[1:])
    return digit_loss(params, {**batch, "x": x}, z), key


def dropout(**changes: Any) -> Problem:
    given = {"init": (mlp(), jax.random.key(0)), "optimizer": OPTIMISERS["momentum"], "has_model_state": True}
    return Problem(dropout_loss, **{**given, **changes})


# Tied parameters: one embedding reads a column of pixels, and is also what predicts the next pixel (17 grey values).


def columns(start: int, stop: int) -> np.ndarray:
    """The fourth column of some digits, int[n, 8]."""
    return np.rint(rows(start, stop)["x"].reshape(-1, 8, 8)[:, :, 3] * 16).astype(np.int32)


def next_pixel(params: dict, column: Any) -> jax.Array:
    """Cross-entropy of the pixels below the first, float[n]."""
    hidden = jnp.tanh(params["embedding"][column[:, :-1]] @ params["mix"])
    return jnp.mean(cross_entropy(hidden @ params["embedding"].T, column[:, 1:]), axis=1)


def tied_loss(params: dict, batch: dict, z: dict) -> jax.Array:
    return jnp.mean(z["weights"] * next_pixel(params, batch["column"])) + z["ridge"] * ridge(params)


def tied_held_out(state: Any, z: Any) -> jax.Array:
    del z
    return jnp.mean(next_pixel(state.params, columns(100, 130)))


def tied() -> Problem:
    rng, column = np.random.default_rng(2), columns(0, EXAMPLES)
    drawn = [{"column": column[b["index"]], "index": b["index"]} for b in batches()]
    init = {"embedding": rng.normal(size=(17, 5)), "mix": rng.normal(size=(5, 5))}
    z = {k: v for k, v in every_kind().items() if k != "temperature"}
    return Problem(tied_loss, OPTIMISERS["adam"], init, drawn, z, tied_held_out)


def equinox_model(module: eqx.Module) -> Problem:
    """Digits by an equinox module: its arrays are the parameters."""
    arrays, static = eqx.partition(module, eqx.is_array)

    def scores(params: Any, x: Any) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(x)

    def loss(params: Any, batch: dict, z: dict) -> jax.Array:
        losses = cross_entropy(scores(params, batch["x"]) * z["temperature"], batch["y"])
        return jnp.mean(losses * z["weights"]) + z["ridge"] * ridge(params)

    def objective(state: Any, z: Any) -> jax.Array:
        del z
        data = rows(100, 120)
        return jnp.mean(cross_entropy(scores(state.params, data["x"]), data["y"]))

    return Problem(loss, init=arrays, objective=objective)
