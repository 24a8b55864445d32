"""What the first metagradient of a process costs, cold and with a warm compilation cache; docs/first_call.md.

    python benchmarks/first_call.py [--corpus FILE] [--out docs/first_call.md]

The models of benchmarks/cost.py in runs of 32 steps (the decoder: 8). The floor is the tracing, lowering and
compilation of the three programs that no metagradient can do without (a step, its adjoint, the objective and its
gradient); *the run* is the second call. Every figure is the median of processes of their own.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import cost
import jax
from points import machine, parsed, point

import metagradient as mg
from metagradient._jax import compile_seconds

PROCESSES = 3
MODELS = {
    "MLP": lambda corpus: cost.mlp(32),
    "ResNet-9": lambda corpus: cost.resnet9(32),
    "decoder": lambda corpus: cost.decoder(corpus, 8),
}


def beyond(work: Callable[[], Any]) -> float:
    """Seconds of a first round beyond a second one: tracing, lowering and compilation."""
    return cost.seconds(work) - cost.seconds(work)


def first_call(problem: cost.Problem) -> dict[str, Any]:
    """The first call and later ones, as a user makes them."""
    work = problem.metagradient(segment=None)
    with compile_seconds() as compiling:
        first = cost.seconds(work)
    run = median(cost.seconds(work) for _ in range(3))
    return {"first": first, "programs": compiling.programs, "run": run, "segment": asdict(work()[2].segment)}


def floor(problem: cost.Problem, segment: mg.Segment) -> dict[str, float]:
    """Seconds of the programs that no metagradient can do without."""
    state = problem.training.initial(problem.z)
    gradient = jax.jit(jax.value_and_grad(lambda params: problem.objective(replace(state, params=params), problem.z)))
    return {"floor": beyond(problem.programs(segment)) + beyond(lambda: gradient(state.params))}


def measured(what: str, name: str, corpus: str, given: str = "") -> dict[str, Any]:
    """One point, in this process: the floor of a given segment, or a first call, with a given cache."""
    problem = MODELS[name](Path(corpus) if corpus else None)
    # What JAX itself starts with is in no figure.
    jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
    if what == "floor":
        return floor(problem, mg.Segment(**json.loads(given)))
    if given:
        mg.compilation_cache(given)
    return first_call(problem)


def row(name: str, corpus: str) -> str:
    """One model's figures."""
    cold = [point(__file__, "first", name, corpus) for _ in range(PROCESSES)]
    segment = json.dumps(cold[0]["segment"])
    floors = [point(__file__, "floor", name, corpus, segment)["floor"] for _ in range(PROCESSES)]
    with tempfile.TemporaryDirectory() as cache:
        point(__file__, "first", name, corpus, cache)
        warm = [point(__file__, "first", name, corpus, cache) for _ in range(PROCESSES)]
    first, run, again = (median(p[part] for p in of) for of, part in ((cold, "first"), (cold, "run"), (warm, "first")))
    least = median(floors)
    return (
        f"| {name} | {first:.2f} | {cold[0]['programs']} | {run:.2f} | {least:.2f} | {first / (1.3 * least + run):.2f} "
        f"| {again:.2f} | {(again - run) / (first - run):.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="a text file, for the decoder; without it, the decoder is left out")
    given = parsed(parser, measured)
    lines = [
        "# The first metagradient of a process",
        "",
        "In seconds. *Of its bound* is the first call over 1.3 floors and a run; *warm* is a "
        "first call that finds an earlier process's programs (`mg.compilation_cache`), its share without runs.",
        "",
        "| model | first call | programs | the run | floor | of its bound | warm | share of a cold one |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        if name != "decoder" or given.corpus:
            lines.append(row(name, str(given.corpus or "")))
            print(lines[-1], flush=True)
    lines += ["", f"Made by `python benchmarks/first_call.py --corpus FILE`: {machine()}; medians of {PROCESSES}."]
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
