"""Many queries in one traversal, beside one metagradient for each: seconds, memory and agreement; docs/queries.md.

    python benchmarks/queries.py [--out docs/queries.md]

A decoder's block without its attention: an embedding, then layer or RMS norms between matrix products. Every point is a
process of its own, whose resident memory is read at its peak; traversals are timed in turns, five times, medians.
"""

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from points import machine, parsed, peak_mib, point

import metagradient as mg

EXAMPLES, INPUTS, WIDTH, STEPS, ROUNDS = 1024, 64, 128, 8, 5


def layer_norm(x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


def rms_norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


NORMS = {"layer norm": layer_norm, "RMS norm": rms_norm}


def problem(norm: Any) -> tuple[mg.Training, dict[str, Any], Any]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) / np.sqrt(shape[-2] if len(shape) > 1 else 1)).astype(np.float32)

    def logits(params: Any, x: Any) -> Any:
        hidden = norm(x @ params["in"])
        hidden = norm(hidden + jax.nn.gelu(hidden @ params["up"]) @ params["down"])
        return hidden @ params["out"]

    def loss(params: Any, batch: Any, z: Any) -> Any:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["y"])
        return jnp.mean(z["weights"] * losses)

    params = {"in": draw(INPUTS, WIDTH), "up": draw(WIDTH, 512), "down": draw(512, WIDTH), "out": draw(WIDTH, 10)}
    batches = [
        {"x": draw(512, INPUTS) * 8, "y": rng.integers(0, 10, 512), "index": rng.integers(0, EXAMPLES, 512)}
        for _ in range(STEPS)
    ]
    training = mg.Training.from_loss(loss, optax.adam(1e-3, eps_root=1e-8), params, batches)
    x, y = jnp.asarray(draw(128, INPUTS) * 8), jnp.asarray(rng.integers(0, 10, 128))

    def queries(state: Any, z: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits(state.params, x), y)

    return training, {"weights": mg.PerExample(jnp.ones(EXAMPLES))}, queries


def measure(norm: str, count: int) -> dict[str, float]:
    training, z, queries = problem(NORMS[norm])
    segment = mg.Segment(1, "steps", "state")
    before = peak_mib()

    def timed(work: Any) -> float:
        start = perf_counter()
        jax.block_until_ready(work())
        return perf_counter() - start

    def plain() -> Any:
        return mg.train(training, z, segment=segment)

    if not count:
        scalar = mg.value_and_metagrad(training, lambda s, z: queries(s, z)[0], segment=segment)
        plain()
        scalar(z)
        peak = peak_mib() - before
        seconds = [(timed(plain), timed(lambda: scalar(z))) for _ in range(ROUNDS)]
        return {"plain": median(s[0] for s in seconds), "seconds": median(s[1] for s in seconds), "MiB": peak}
    together = mg.value_and_metagrad(training, lambda s, z: queries(s, z)[:count], vector=True, segment=segment)
    plain()
    found = together(z)[1]["weights"].value
    peak = peak_mib() - before
    seconds = [(timed(plain), timed(lambda: together(z))) for _ in range(ROUNDS)]
    error = 0.0
    for query in (0, 2, count - 1):
        alone = mg.value_and_metagrad(training, lambda s, z, q=query: queries(s, z)[q], segment=segment)(z)[1]
        b = alone["weights"].value
        error = max(error, float(jnp.linalg.norm(found[query] - b) / jnp.linalg.norm(b)))
    took = {"plain": median(s[0] for s in seconds), "seconds": median(s[1] for s in seconds)}
    return {**took, "MiB": peak, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = parsed(parser, lambda norm, count: measure(norm, int(count)))
    lines = [
        "# Many queries in one traversal\n",
        f"An embedding, two norms and an MLP of width {WIDTH}, {STEPS} steps of Adam on batches of 512, float32; "
        "`vector=True`. On a CPU the queries of a step are pulled back in a loop within the program, one by one.\n",
        "| norm | queries | seconds | plain runs per query | process grew by, MiB | largest error beside scalar ones |",
        "|---|---|---|---|---|---|",
    ]
    for norm in NORMS:
        for count in (0, 8, 32, 128):
            found = point(__file__, norm, count)
            share = found["seconds"] / found["plain"] / max(1, count)
            error = f"{found['error']:.1e}" if count else ""
            figures = f"{found['seconds']:.3f} | {share:.2f} | {found['MiB']:.0f} | {error}"
            lines.append(f"| {norm} | {count or 'a scalar'} | {figures} |")
            print(lines[-1], flush=True)
    lines.append(f"\nMade by `python benchmarks/queries.py`: {machine()}.")
    (options.out or Path("docs/queries.md")).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
