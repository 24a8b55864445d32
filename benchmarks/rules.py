"""What an adjoint costs where a loss holds a derivative rule of its own; docs/rules.md.

    python benchmarks/rules.py [--corpus TEXT] [--out docs/rules.md]

The models of benchmarks/cost.py. Their loss is multiplied by one, through an identity with a rule of its own: unmarked,
its gradient is pulled back in reverse over reverse; marked as a true derivative, in two stages, as without it. The two
are timed in turns, one compiled step each; memory is the compiler's count of temporaries.
"""

import argparse
import datetime
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import cost
import jax
import jax.numpy as jnp
import numpy as np

import metagradient as mg
from metagradient.given import Given
from metagradient.metaparameters import canonical
from metagradient.step.segment import Segment
from metagradient.trees import floating

ROUNDS = 9


@jax.custom_vjp
def same(x: jax.Array) -> jax.Array:
    return x


same.defvjp(lambda x: (x, None), lambda _, g: (g,))


def adjoint(problem: Any, rule: Any) -> tuple[Any, Any, int]:
    """One compiled step, one compiled adjoint of it, and the adjoint's temporaries in bytes."""
    step = problem.training.step
    whole = step.loss

    def loss(*arguments: Any) -> Any:
        found = whole(*arguments)
        return (rule(found[0]), found[1]) if isinstance(found, tuple) else rule(found)

    training = replace(problem.training, step=replace(step, loss=loss))
    given = Given.of(canonical(problem.z))
    state, batch, t = training.initial(problem.z), training.batches[0], np.int32(0)
    form = training.programs.form(Segment(1, "steps", "state"))
    cotangent = jax.tree.map(jnp.ones_like, floating(state)[0])

    def pull() -> Any:
        return form.pull_one(False, jax.tree.map(jnp.zeros_like, given.z), cotangent, given, t, state, (), batch)

    arguments = False, jax.tree.map(jnp.zeros_like, given.z), cotangent, given, t, state, (), batch
    temporaries = form.pull_one.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    return lambda: form.advance_one(state, given, t, batch), pull, temporaries


def timed(work: Any) -> float:
    start = perf_counter()
    jax.block_until_ready(work())
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/rules.md"))
    options = parser.parse_args()
    problems = {"MLP 128": cost.mlp(16, length=16, hidden=128), "ResNet-9": cost.resnet9(4)}
    if options.corpus:
        problems["decoder"] = cost.decoder(options.corpus, 4)
    lines = [
        "# Losses with derivative rules of their own\n",
        "A `jax.custom_vjp`, or a `jax.custom_jvp` that isn't JAX's, may say anything: gradient reversal, clipping on "
        "the way back. Then the Jacobian of the loss gradient need not be symmetric, and the adjoint goes by the "
        "definition, in reverse over reverse. `mg.true_derivative` marks a rule that is the derivative of its value. "
        "Times are of one step's adjoint, beside a plain step.\n",
        "| model | plain step, ms | two stages | reversed twice | ratio | temporaries, MiB | reversed twice |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, problem in problems.items():
        step, two, small = adjoint(problem, mg.true_derivative(same))
        _, whole, large = adjoint(problem, same)
        for work in (step, two, whole):
            jax.block_until_ready(work())
        rounds = [(timed(step), timed(two), timed(whole)) for _ in range(ROUNDS)]
        a, b, c = (median(times) for times in zip(*rounds, strict=True))
        lines.append(
            f"| {name} | {1e3 * a:.2f} | {b / a:.2f} | {c / a:.2f} | {c / b:.2f} | {small / 2**20:.1f} | "
            f"{large / 2**20:.1f} |"
        )
        print(lines[-1], flush=True)
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib"))
    lines.append(
        f"\n{platform.machine()}, Python {platform.python_version()}, {versions}, {datetime.date.today()}. Made by "
        "`python benchmarks/rules.py`."
    )
    options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
