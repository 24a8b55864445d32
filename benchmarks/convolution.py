"""Exact forms of a 3x3 convolution, timed where a metagradient uses them.

    taskset -c 0 python benchmarks/convolution.py            # one thread;  --rounds N, --out FILE
    python benchmarks/convolution.py                         # all of them

Prints Markdown. A gradient is that of the sum of squares of the output, in input and kernel (the kernel alone for
images); its adjoint is the `jax.jvp` of that gradient. Every figure is the median over rounds of time divided by the
direct form's in the same round; the forms of one row take turns.
"""

import argparse
import datetime
import functools
import operator
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from metagradient.models import conv3x3

SHAPES = [(64, 32, 3, 32), (64, 32, 32, 64), (64, 16, 64, 128), (64, 8, 128, 128), (250, 8, 8, 16)]
SCAN_STEPS = 3
SCAN_BATCH = 8


def shifted_views(x: Array) -> list[list[Array]]:
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [[padded[:, row : row + height, column : column + width] for column in range(3)] for row in range(3)]


def sum_of_nine(x: Array, kernel: Array) -> Array:
    products = [view @ kernel[i, j] for i, row in enumerate(shifted_views(x)) for j, view in enumerate(row)]
    return functools.reduce(operator.add, products)


def sum_of_three(x: Array, kernel: Array) -> Array:
    kernels = kernel.reshape(3, -1, kernel.shape[-1])
    products = [jnp.concatenate(row, -1) @ kernels[i] for i, row in enumerate(shifted_views(x))]
    return functools.reduce(operator.add, products)


def winograd(x: Array, kernel: Array) -> Array:
    """F(2x2, 3x3): 16 products where the others need 36, and additions."""
    batch, height, width, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))

    def inward(array, axis):
        stop = array.shape[axis] - 3
        a, b, c, d = (lax.slice_in_dim(array, i, i + stop, stride=2, axis=axis) for i in range(4))
        return a - c, b + c, c - b, b - d

    def outward(a, b, c, d):
        return a + b + c, b - c - d

    tiles = jnp.stack([tile for rows in inward(padded, 1) for tile in inward(rows, 2)])
    basis = jnp.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], kernel.dtype)
    kernels = jnp.einsum("ai,bj,ijco->abco", basis, basis, kernel).reshape(16, channels, -1)
    products = (tiles.reshape(16, -1, channels) @ kernels).reshape(4, 4, batch, height // 2, width // 2, -1)
    rows = [jnp.stack(outward(*row), 3) for row in outward(*products)]
    return jnp.stack(rows, 2).reshape(batch, height, width, -1)


FORMS: dict[str, Callable] = {
    "direct": functools.partial(conv3x3, method="direct"),
    "patches": functools.partial(conv3x3, method="patches"),
    "three products": sum_of_three,
    "nine products": sum_of_nine,
    "Winograd": winograd,
}


def program(form: Callable, *, adjoint: bool, images: bool) -> Callable:
    """(x, kernel, two directions) -> cotangents, the kernel's last."""

    def gradient(x, kernel):
        return jax.grad(lambda x, kernel: jnp.sum(form(x, kernel) ** 2) / 2, (1,) if images else (0, 1))(x, kernel)

    def run(x, kernel, x_direction, kernel_direction):
        if not adjoint:
            return gradient(x, kernel)
        x_direction = jnp.zeros_like(x) if images else x_direction
        return jax.jvp(gradient, (x, kernel), (x_direction, kernel_direction))[1]

    return run


def scanned(run: Callable) -> Callable:
    """Steps that each see a new input and kernel, so that nothing can be hoisted out of the loop."""

    def scan(x, kernel, *directions):
        def step(carry, _):
            x, kernel = carry
            change = run(x, kernel, *directions)
            return (jnp.roll(x, 1, 0), kernel - 1e-9 * change[-1]), [jnp.mean(part) for part in change]

        return lax.scan(step, (x, kernel), length=SCAN_STEPS)

    return scan


def interleaved(programs: dict[str, Callable], arguments: list[Array], rounds: int) -> tuple[dict[str, float], float]:
    """Median ratio of each program's time to the first's, and the first's median seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, compiled in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    first = np.array(next(iter(seconds.values())))
    return {name: float(np.median(np.array(times) / first)) for name, times in seconds.items()}, float(np.median(first))


def temporary_mebibytes(compiled: jax.stages.Compiled) -> float:
    analysis = compiled.memory_analysis()
    return float("nan") if analysis is None else analysis.temp_size_in_bytes / 2**20


def compiled_forms(arguments: list[Array], *, adjoint: bool, scan: bool = False) -> dict[str, jax.stages.Compiled]:
    images = arguments[0].shape[-1] == 3
    runs = {name: program(form, adjoint=adjoint, images=images) for name, form in FORMS.items()}
    return {name: jax.jit(scanned(run) if scan else run).lower(*arguments).compile() for name, run in runs.items()}


def rows(rounds: int):
    for batch, size, channels, features in SHAPES:
        random = np.random.default_rng(0)
        shapes = [(batch, size, size, channels), (3, 3, channels, features)] * 2
        arguments = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]
        few = [array[:SCAN_BATCH] if array.shape[0] == batch else array for array in arguments]
        for adjoint in (False, True):
            alone = compiled_forms(arguments, adjoint=adjoint)
            ratios, seconds = interleaved(alone, arguments, rounds)
            in_scan = {f"{name}, scan": form for name, form in compiled_forms(few, adjoint=adjoint, scan=True).items()}
            direct = compiled_forms(few, adjoint=adjoint)["direct"]
            scan_ratios, _ = interleaved({"direct": direct} | in_scan, few, max(1, rounds // 3))
            cells = [f"{ratios[name]:.2f} ({temporary_mebibytes(alone[name]):.0f})" for name in FORMS]
            cells += [f"{scan_ratios[f'{name}, scan'] / SCAN_STEPS:.2f}" for name in FORMS]
            label = f"{batch}x{size}x{size}x{channels} → {features}, {'adjoint' if adjoint else 'gradient'}"
            yield f"| {label} | {seconds * 1e3:.1f} | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    columns = ["convolution", "direct, ms", *FORMS, *(f"{name}, in a scan" for name in FORMS)]
    lines = [
        f"JAX {jax.__version__}, {jax.default_backend()}, {platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} core(s), {datetime.date.today()}. "
        "Time in units of the direct form's (MiB of temporaries); "
        f"in a scan: a step of {SCAN_STEPS}, batch {SCAN_BATCH}, in units of the direct form out of a scan.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    print("\n".join(lines), flush=True)
    for row in rows(options.rounds):
        lines.append(row)
        print(row, flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
