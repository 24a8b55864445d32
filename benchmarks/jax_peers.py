"""Metagradients beside what JAX users would write by hand, on one MLP run; prints a Markdown table.

    python benchmarks/jax_peers.py [--steps 512] [--repeats 7] [--out docs/jax_peers.md]

Everything runs interleaved in one process; ratios are medians of the ratios to plain training in the same round. Peak
memory is that of a fresh process that does nothing else. Every gradient is compared with ours.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import metagradient as mg
from metagradient.data.batches import EpochBatches
from metagradient.models import MLP

BATCH, TRAIN = 256, 1200
SCHEDULES = mg.schedule


class Problem:
    """A run of Adam on digits, as our `Training`, and as one step for hand-written loops."""

    def __init__(self, steps: int):
        digits, target = load_digits(return_X_y=True)
        images, labels = (digits / 16).astype(np.float32), target.astype(np.int32)
        data = {"x": images[:TRAIN], "y": labels[:TRAIN]}
        self.steps = steps
        batches = EpochBatches(data, batch=BATCH, steps=steps, seed=0)
        self.batches = [batches[t] for t in range(steps)]
        self.stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *self.batches)
        self.model = MLP(sizes=(64, 128, 10))
        self.params = self.model.init(jax.random.key(0))[0]
        self.optimizer = optax.adam(1e-3, eps_root=1e-8)
        self.weights = jnp.ones(TRAIN)
        self.target = {"x": images[TRAIN:], "y": labels[TRAIN:]}
        self.training = mg.Training.from_loss(
            lambda params, batch, z: self.loss(params, batch, z["weights"]), self.optimizer, self.params, self.batches
        )
        self.z = {"weights": mg.PerExample(self.weights)}

    def losses(self, params, batch):
        logits, _ = self.model.apply(params, {}, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    def loss(self, params, batch, weights):
        return jnp.mean(weights * self.losses(params, batch))

    def objective(self, state, z):
        del z
        return jnp.mean(self.losses(state.params, self.target))

    def step(self, carry, batch, weights):
        params, memory = carry
        gradient = jax.grad(self.loss)(params, batch, weights[batch["index"]])
        updates, memory = self.optimizer.update(gradient, memory, params)
        return optax.apply_updates(params, updates), memory

    def start(self):
        return self.params, self.optimizer.init(self.params)

    def end(self, carry):
        return jnp.mean(self.losses(carry[0], self.target))


def ours(problem: Problem, **options) -> Callable[[], jax.Array]:
    evaluate = mg.value_and_metagrad(problem.training, problem.objective, **options)
    return lambda: evaluate(problem.z)[1]["weights"].value


def by_hand(problem: Problem, loop: Callable) -> Callable[[], jax.Array]:
    gradient = jax.jit(jax.grad(lambda w, stacked: problem.end(loop(problem.start(), stacked, w))))
    return lambda: gradient(problem.weights, problem.stacked)


def scanned(problem: Problem):
    return lambda carry, xs, w: jax.lax.scan(lambda c, x: (problem.step(c, x, w), None), carry, xs)[0]


def nested(problem: Problem, inner: int):
    def loop(carry, xs, w):
        @jax.checkpoint
        def segment(c, x):
            return jax.lax.scan(lambda c, x: (problem.step(c, x, w), None), c, x)[0], None

        blocks = jax.tree.map(lambda x: x.reshape(-1, inner, *x.shape[1:]), xs)
        return jax.lax.scan(segment, carry, blocks)[0]

    return loop


def equinox_loop(problem: Problem, checkpoints: int):
    def loop(carry, xs, w):
        def body(c, x):
            return problem.step(c, x, w), None

        return eqxi.scan(body, carry, xs, kind="checkpointed", checkpoints=checkpoints)[0]

    return loop


def variants(problem: Problem) -> dict[str, Callable[[], jax.Array]]:
    plain = jax.jit(lambda w, xs: scanned(problem)(problem.start(), xs, w))
    leaf = mg.Segment(16)
    return {
        "plain training (scan)": lambda: plain(problem.weights, problem.stacked)[0],
        "ours, every state kept": ours(problem, schedule=SCHEDULES.KeepAll(), segment=leaf),
        "ours, two-level": ours(problem, schedule=SCHEDULES.TwoLevel(every=1), segment=mg.Segment(16)),
        "ours, 10 boundary states": ours(problem, schedule=SCHEDULES.Binomial(10), segment=leaf),
        "scan, unrolled by reverse mode": by_hand(problem, scanned(problem)),
        "nested jax.checkpoint, 16 a block": by_hand(problem, nested(problem, 16)),
        "equinox, 26 checkpoints": by_hand(problem, equinox_loop(problem, 26)),
        "equinox, 10 checkpoints": by_hand(problem, equinox_loop(problem, 10)),
    }


def seconds(work: Callable[[], jax.Array]) -> float:
    start = perf_counter()
    jax.block_until_ready(work())
    return perf_counter() - start


def peak_mib(name: str, steps: int) -> float:
    command = [sys.executable, __file__, "--steps", str(steps), "--only", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compared(gradient: np.ndarray, reference: np.ndarray) -> str:
    return f"{np.linalg.norm(gradient - reference) / np.linalg.norm(reference):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    runs = variants(Problem(given.steps))
    if given.only:
        jax.block_until_ready(runs[given.only]())
        jax.block_until_ready(runs[given.only]())
        # Not ru_maxrss, which a child starts with its parent's.
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        print(int(peak.split()[1]) / 1024)
        return
    names = list(runs)
    gradients = {name: np.asarray(run()) for name, run in runs.items() if name != names[0]}
    seconds(runs[names[0]])
    times = {name: [] for name in names}
    for _ in range(given.repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    reference = gradients["ours, every state kept"]
    rows = []
    for name in names:
        ratios = [t / p for t, p in zip(times[name], times[names[0]], strict=True)]
        differs = compared(gradients[name], reference) if name in gradients else ""
        rows.append(
            f"| {name} | {median(times[name]):.3f} | {median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} "
            f"| {peak_mib(name, given.steps):.0f} | {differs} |"
        )
    table = "\n".join(
        [
            f"# Metagradients beside hand-written JAX: MLP 64-128-10, Adam, T = {given.steps}, batch {BATCH}, float32",
            "",
            "| way | seconds | times plain training | range | peak MiB of a fresh process | differs from ours by |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Medians of {given.repeats} interleaved rounds. Made by `python benchmarks/jax_peers.py` on "
            f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}: {platform.machine()}, {jax.devices()[0].device_kind}, "
            f"jax {version('jax')}, equinox {version('equinox')}, metagradient {version('metagradient')}.",
        ]
    )
    print(table)
    if given.out:
        given.out.write_text(table + "\n")


if __name__ == "__main__":
    main()
