"""How a metagradient's cost grows: with steps, weights, queries and width; docs/growth.md.

    python benchmarks/growth.py [--out docs/growth.md] [--only steps] [--steps 128 2048]

The MLP of benchmarks/cost.py on the digits. Every point is a process of its own; times are medians of rounds in turns
with plain training of the same run, and memory is what the process grew by over plain training at its peak.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import cost
import jax
import jax.numpy as jnp
import numpy as np
import optax
from points import machine, parsed, peak_mib, point

import metagradient as mg
from metagradient.models import MLP
from metagradient.replay.schedule import binomial_advances
from metagradient.trees import nbytes

STEPS = (128, 512, 2_048, 8_192, 32_768, 100_000)
STATES = 20
WEIGHTS = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8)
QUERIES = (1, 4, 16, 64, 256)
WIDTHS = (32, 128, 512, 2_048)


def beside_plain(problem: cost.Problem, work: Callable[[], Any]) -> dict[str, float]:
    """Seconds of plain training and of `work`, their ratio, and MiB that `work` takes beyond plain training."""
    plain = problem.plain()
    cost.seconds(plain)
    before = peak_mib()
    first = cost.seconds(work)
    times = []
    while len(times) < (1 if first > 20 else 5):
        times.append((cost.seconds(plain), cost.seconds(work)))
    return {
        "plain": median(p for p, _ in times),
        "seconds": median(s for _, s in times),
        "ratio": median(s / p for p, s in times),
        "MiB": peak_mib() - before,
    }


def of_steps(steps: int, states: int) -> dict[str, float]:
    problem = cost.mlp(steps)
    size = nbytes(problem.training.initial(problem.z))
    options: dict[str, Any] = {"segment": None}
    if states:
        plan = mg.plan(problem.training, problem.z, memory=mg.Memory(device=states * size))
        options = {"schedule": plan, "segment": plan.segment}
    work = problem.metagradient(**options)
    found = beside_plain(problem, work)
    stats = work()[2]
    closed = steps
    if states:
        # Griewank & Walther's count of advances for as many slots, and a run of every segment that is kept.
        segments = -(-steps // stats.segment.length)
        closed = (binomial_advances(segments, stats.peak_states["device"]) + segments) * stats.segment.length
    return {
        **found,
        "forward": stats.forward_steps,
        "closed": closed,
        "length": stats.segment.length,
        "held": sum(stats.peak_bytes.values()) / size,
    }


def of_weights(count: int) -> dict[str, float]:
    problem = cost.mlp()
    problem = replace(problem, z={"weights": mg.PerExample(jnp.ones(max(count, 1200)))})
    return beside_plain(problem, problem.metagradient())


def of_queries(count: int) -> dict[str, float]:
    problem = cost.mlp()
    images, labels = cost.digits()
    model = MLP(sizes=(64, 128, 10))

    def queries(state: Any, z: Any) -> jax.Array:
        del z
        logits, _ = model.apply(state.params, {}, jnp.asarray(images[1200 : 1200 + count]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[1200 : 1200 + count])

    problem = replace(problem, objective=queries)
    return beside_plain(problem, problem.metagradient(vector=True))


def of_width(hidden: int) -> dict[str, float]:
    problem = cost.mlp(128, hidden=hidden)
    found = beside_plain(problem, problem.metagradient(segment=None))
    return {**found, "parameters": sum(np.size(x) for x in jax.tree.leaves(problem.training.initial(problem.z).params))}


POINTS = {"steps": of_steps, "weights": of_weights, "queries": of_queries, "width": of_width}


def figures(found: dict[str, float]) -> str:
    return f"{found['plain']:.3f} | {found['seconds']:.3f} | {found['ratio']:.2f} | {found['MiB']:.0f}"


COLUMNS = "plain s | metagradient s | ratio | MiB beyond plain"


def table(name: str, lengths: Sequence[int]) -> list[str]:
    """One table, printed as it grows."""
    rows: list[str] = []

    def add(row: str) -> None:
        print(row, flush=True)
        rows.append(row)

    if name == "steps":
        add(f"| T | budget | {COLUMNS} | states held | segment | forward steps | closed form |")
        add("|---" * 10 + "|")
        for steps in lengths:
            for states in (0, STATES):
                f = point(__file__, name, steps, states)
                budget = f"{states} states" if states else "none"
                add(f"| {steps:,} | {budget} | {figures(f)} | {f['held']:.1f} | {f['length']} | {f['forward']:,} | "
                    f"{f['closed']:,} |")  # fmt: skip
        note = (
            "*States held* counts boundary states and what a step of a segment keeps for its pull-back, in states. The "
            "*closed form* is Griewank and Walther's count for as many stored states (without a budget, a run); a pass "
            "walks its first segment once more, and a plan may keep several segments at once, which saves some."
        )
        return ["## Steps", "", *rows, "", note]
    points = {"weights": WEIGHTS, "queries": QUERIES, "width": WIDTHS}[name]
    extra = {"weights": "", "queries": " ratio per query |", "width": " parameters |"}[name]
    title = {"weights": "example weights", "queries": "queries", "width": "hidden width"}[name]
    add(f"| {title} | {COLUMNS} |{extra}")
    add("|---" * (5 + bool(extra)) + "|")
    for size in points:
        f = point(__file__, name, size)
        more = {"weights": "", "queries": f" {f['ratio'] / size:.2f} |", "width": f" {f.get('parameters', 0):,} |"}[
            name
        ]
        add(f"| {size:,} | {figures(f)} |{more}")
    return [f"## {title.capitalize()}", "", *rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", type=int, default=STEPS, help="lengths of runs")
    parser.add_argument("--only", nargs="+", choices=list(POINTS), default=list(POINTS))
    given = parsed(parser, lambda name, *sizes: POINTS[name](*map(int, sizes)))
    blocks = [["# How a metagradient's cost grows"], *(table(name, given.steps) for name in given.only)]
    blocks.append([f"Made by `python benchmarks/growth.py {shlex.join(sys.argv[1:])}`: {machine()}."])
    text = "\n\n".join("\n".join(block) for block in blocks)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
