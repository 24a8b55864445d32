"""One contender of ours on one problem: `ours.py CONTENDER PROBLEM.npz RESULTS.npz`, started by run.py."""

import math
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from problems import LAYERS, Problem
from worker import serve

import metagradient as mg
from metagradient.models import conv3x3

Params = dict[str, jax.Array]
Run = Callable[[], dict[str, np.ndarray]]

LINEARISED = mg.Segment(1, "steps", "linearisation")
CONTENDERS: dict[str, tuple[mg.schedule.Schedule, mg.Segment | None]] = {
    "keep all": (mg.schedule.KeepAll(), None),
    "keep all, linearised": (mg.schedule.KeepAll(), LINEARISED),
    "two-level": (mg.schedule.TwoLevel(), None),
    "two-level, linearised": (mg.schedule.TwoLevel(), LINEARISED),
    "binary tree": (mg.schedule.KaryTree(2), None),
    "binary tree, linearised": (mg.schedule.KaryTree(2), LINEARISED),
    "float64": (mg.schedule.KeepAll(), None),
}


def mlp(p: Params, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]


def convnet(p: Params, x: jax.Array) -> jax.Array:
    def block(name: str, x: jax.Array) -> jax.Array:
        x = conv3x3(x, p[f"{name}_w"])
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        return jax.nn.gelu((x - mean) * lax.rsqrt(variance + 1e-5) * p[f"{name}_scale"] + p[f"{name}_bias"])

    def pool(x: jax.Array) -> jax.Array:  # [b, h, w, c] -> [b, h/2, w/2, c]
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))

    x = pool(block("conv2", block("conv1", x)))
    x = x + block("res1b", block("res1a", x))
    x = pool(block("conv3", x))
    x = x + block("res2b", block("res2a", x))
    return x.mean((1, 2)) @ p["head_w"] + p["head_b"]


def decoder(p: Params, x: jax.Array) -> jax.Array:
    def dense(name: str, x: jax.Array) -> jax.Array:
        return x @ p[f"{name}_w"] + p[f"{name}_b"]

    def norm(name: str, x: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return centred * lax.rsqrt(variance + 1e-5) * p[f"{name}_scale"] + p[f"{name}_bias"]

    b, s = x.shape
    causal = jnp.tril(jnp.ones((s, s), bool))
    h = p["embedding"][x] + p["positions"][:s]  # [b, s, d]
    for i in range(LAYERS):
        qkv = dense(f"layer{i}_qkv", norm(f"layer{i}_norm1", h)).reshape(b, s, 3, 4, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [b, s, heads, d/heads]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(causal, scores, -jnp.inf)), v)
        h = h + dense(f"layer{i}_out", mixed.reshape(b, s, -1))
        h = h + dense(f"layer{i}_down", jax.nn.gelu(dense(f"layer{i}_up", norm(f"layer{i}_norm2", h))))
    return norm("norm", h) @ p["head_w"]


MODELS: dict[str, Callable[[Params, jax.Array], jax.Array]] = {"mlp": mlp, "convnet": convnet, "decoder": decoder}


def metagradient(problem: Problem, contender: str) -> Run:
    schedule, segment = CONTENDERS[contender]
    dtype = jnp.float64 if contender == "float64" else jnp.float32
    model, optimizer = MODELS[problem.settings.model], adamw(problem)

    def losses(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
        each = optax.softmax_cross_entropy_with_integer_labels(model(params, x), y)
        return each.reshape(len(y), -1).mean(1)  # one an example

    def cast(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x

    training = mg.Training.from_loss(
        lambda params, batch, z: jnp.mean(z["weights"] * losses(params, batch["x"], batch["y"])),
        optimizer,
        jax.tree.map(lambda x: jnp.asarray(x, dtype), problem.params),
        [jax.tree.map(cast, batch) for batch in problem.batches()],
    )
    valid_x, valid_y = cast(problem.data["valid_x"]), problem.data["valid_y"]
    function = mg.value_and_metagrad(
        training,
        lambda state, z: losses(state.params, valid_x, valid_y).mean(),
        schedule=schedule,
        segment=segment,
    )

    def run() -> dict[str, np.ndarray]:
        found = function.evaluate({"weights": mg.PerExample(jnp.ones(problem.examples, dtype))})
        final = {f"params/{k}": np.array(v) for k, v in found.state.params.items()}
        return {"value": np.array(found.value), "weights": np.array(found.grad["weights"].value), **final}

    return run


def adamw(problem: Problem) -> optax.GradientTransformation:
    s = problem.settings
    return optax.adamw(s.rate, eps=s.eps, eps_root=s.eps_root, weight_decay=s.decay)


def plain(problem: Problem) -> Run:
    """Training alone, compiled as one loop or a step at a time, whichever is faster."""
    model, optimizer = MODELS[problem.settings.model], adamw(problem)

    def loss(params: Params, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(params, batch["x"]), batch["y"]).mean()

    def step(state: Any, batch: Any) -> tuple[Any, None]:
        params, opt_state = state
        updates, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    one = jax.jit(lambda state, batch: step(state, batch)[0], donate_argnums=0)
    many = jax.jit(partial(lax.scan, step), donate_argnums=0)
    batches = list(problem.batches())

    def start() -> Any:
        params = jax.tree.map(jnp.array, problem.params)
        return params, optimizer.init(params)

    def stepping(state: Any, steps: int) -> Any:
        for batch in batches[:steps]:
            state = one(state, batch)
        return state

    def scanning(state: Any, steps: int) -> Any:
        return many(state, jax.tree.map(lambda *x: np.stack(x), *batches[:steps]))[0]

    def seconds(loop: Callable[[Any, int], Any]) -> float:
        jax.block_until_ready(loop(start(), 2))
        begin = perf_counter()
        jax.block_until_ready(loop(start(), 2))
        return perf_counter() - begin

    @cache
    def loop() -> Callable[[Any, int], Any]:
        """A short trial tells a loop that the compiler handles badly (convolutions); dispatch favours a scan."""
        return scanning if seconds(scanning) < 1.5 * seconds(stepping) else stepping

    def run() -> dict[str, np.ndarray]:
        params, _ = jax.block_until_ready(loop()(start(), len(batches)))
        return {f"params/{k}": np.array(v) for k, v in params.items()}

    return run


def main(contender: str, problem: str, results: str) -> None:
    jax.config.update("jax_enable_x64", contender == "float64")

    def prepare() -> Run:
        read = Problem.read(Path(problem))
        return plain(read) if contender == "plain" else metagradient(read, contender)

    serve(prepare, Path(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
