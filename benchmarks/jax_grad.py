"""`jax.grad` through a run, beside value_and_metagrad: seconds a call, in turns; docs/jax_grad.md.

    git worktree add ../before 71238c5
    python benchmarks/jax_grad.py --before ../before [--out docs/jax_grad.md]

Each source tree has a process of its own, which is asked for one call at a time, ten times each, in turns; minima and
medians. The objective is under `jax.jit`. Values and gradients are compared with those of the older tree.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

ROUNDS = 10
# Steps, batch, widths of a network on digits.
PROBLEMS = {
    "128 steps, 64-32-10, batch 32": (128, 32, (64, 32, 10)),
    "64 steps, 64-512-512-10, batch 256": (64, 256, (64, 512, 512, 10)),
    "1,024 steps, 64-32-10, batch 32": (1024, 32, (64, 32, 10)),
}
WAYS = {"before": "`value_and_metagrad`, 71238c5", "now": "`value_and_metagrad`", "grad": "`jax.value_and_grad`"}


def worker() -> None:
    """Answer calls: a problem's name and a way on a line; seconds, the value and the gradient's norm on another."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from sklearn.datasets import load_digits

    import metagradient as mg

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = (pixels / 16).astype(np.float32)
    n = 1200

    def made(steps: int, batch: int, widths: tuple[int, ...]) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        init = [rng.normal(size=pair).astype(np.float32) / pair[0] ** 0.5 for pair in pairwise(widths)]

        def scores(params: Any, x: Any) -> Any:
            for w in params[:-1]:
                x = jnp.tanh(x @ w)
            return x @ params[-1]

        def losses(params: Any, x: Any, y: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(scores(params, x), y)

        def loss(params: Any, batch: Any, z: Any) -> Any:
            return jnp.mean(z["weights"] * losses(params, batch["x"], batch["y"]))

        index = [rng.choice(n, batch, replace=False) for _ in range(steps)]
        batches = [{"x": images[i], "y": labels[i], "index": i} for i in index]
        training = mg.Training.from_loss(loss, optax.adam(1e-2, eps_root=1e-8), init, batches)
        segment = mg.Segment(16, "scan")
        z = {"weights": mg.PerExample(jnp.ones(n))}
        objective = jax.jit(lambda state, z: jnp.mean(losses(state.params, images[n:], labels[n:])))
        options = {"segment": segment, "schedule": mg.schedule.TwoLevel()}
        evaluate = mg.value_and_metagrad(training, objective, **options)
        ways = {"now": lambda: evaluate(z), "before": lambda: evaluate(z)}
        if hasattr(mg, "Replay"):
            adjoint = mg.Replay(**options)
            through = jax.value_and_grad(lambda z: objective(mg.train(training, z, adjoint=adjoint), None))
            ways["grad"] = lambda: through(z)
        return ways

    ways = {name: made(*sizes) for name, sizes in PROBLEMS.items()}
    for line in sys.stdin:
        name, way = json.loads(line)
        start = perf_counter()
        value, grad = jax.block_until_ready(ways[name][way]())
        seconds = perf_counter() - start
        norm = float(jnp.linalg.norm(grad["weights"].value))
        print(json.dumps([seconds, float(value), norm]), flush=True)


class Tree:
    """A source tree's process."""

    def __init__(self, source: Path):
        environment = {**os.environ, "PYTHONPATH": str(source / "src")}
        command = [sys.executable, __file__, "--worker"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def call(self, name: str, way: str) -> tuple[float, float, float]:
        """Seconds, value, norm of the gradient."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps([name, way]), file=self._process.stdin, flush=True)
        seconds, value, norm = json.loads(self._process.stdout.readline())
        return seconds, value, norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of 71238c5")
    parser.add_argument("--out", type=Path, default=Path("docs/jax_grad.md"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return worker()
    now = Tree(Path(__file__).parents[1])
    trees = {"before": Tree(given.before), "now": now, "grad": now}
    rows = []
    for name in PROBLEMS:
        first = {way: trees[way].call(name, way) for way in WAYS}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(ROUNDS):
            for way in WAYS:
                seconds[way].append(trees[way].call(name, way)[0])
        base = min(seconds["before"])
        for way, title in WAYS.items():
            apart = max(abs(a - b) / abs(b) for a, b in zip(first[way][1:], first["before"][1:], strict=True))
            least, mid = min(seconds[way]), median(seconds[way])
            rows.append(
                (
                    name,
                    title,
                    f"{first[way][0]:.2f}",
                    f"{least:.3f}",
                    f"{mid:.3f}",
                    f"{least / base:.2f}",
                    f"{apart:.0e}",
                )
            )
            print(*rows[-1], sep=" | ", flush=True)
    head = ("run", "through", "first call, s", "least, s", "median, s", "least / 71238c5's", "apart from it")
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "optax"))
    given.out.write_text(
        "# Through `jax.grad`\n\n"
        "`jax.value_and_grad` of an objective of `mg.train(training, z, adjoint=mg.Replay(...))`, beside\n"
        "`value_and_metagrad`, now and before there was the first: the same schedule (`TwoLevel`), segments of 16\n"
        "steps, an objective under `jax.jit`. Calls are made in turns; differences are those of value and gradient\n"
        "norm.\n\n"
        f"{table}\n\n{platform.system()} {platform.machine()}, Python {platform.python_version()}, {packages}, "
        f"{datetime.date.today()}. Made by `python benchmarks/jax_grad.py --before CHECKOUT`.\n",
        encoding="utf-8",
    )
    return None


if __name__ == "__main__":
    main()
