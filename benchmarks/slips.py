"""Slips that anybody makes, and what is said to them, as docs/slips.md.

    python benchmarks/slips.py [--out docs/slips.md]

Every slip is made, and its message printed as it is. Exits with 1 where one goes through, or ends in an error that
isn't typed.
"""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metagradient as mg

N, T = 8, 6
BATCHES = [{"x": np.ones((4, 3)) * (t + 1), "y": np.ones(4), "index": np.arange(4) + t % 4} for t in range(T)]
PARAMS = {"w": jnp.zeros(3)}
WEIGHTS = {"weights": mg.PerExample(jnp.ones(N))}
KEY = jax.random.key(0)


def loss(params: Any, batch: Any, z: Any) -> Any:
    return jnp.mean(z["weights"] * (batch["x"] @ params["w"] - batch["y"]) ** 2)


def objective(state: Any, z: Any) -> Any:
    return jnp.sum((state.params["w"] - 1) ** 2)


def run(**changes: Any) -> mg.Training:
    given = {"loss": loss, "optimizer": optax.sgd(0.1), "init": PARAMS, "batches": BATCHES, **changes}
    return mg.Training.from_loss(**given)


def grad(training: Any = None, of: Any = objective, z: Any = WEIGHTS, **options: Any) -> Any:
    return mg.value_and_metagrad(training or run(), of, **options)(z)


def half(params: Any, batch: Any, z: Any) -> Any:
    return loss(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), batch, z)


def impure(params: Any, batch: Any, z: Any) -> Any:
    return loss(params, batch, z) * np.random.default_rng().random()


def branches(params: Any, batch: Any, z: Any) -> Any:
    return loss(params, batch, z) if params["w"][0] > 0 else 2 * loss(params, batch, z)


SLIPS: dict[str, Callable[[], Any]] = {
    "an optimiser that isn't called": lambda: run(optimizer=optax.adam),
    "a generator as batches": lambda: run(batches=(b for b in BATCHES)),
    "one batch as batches": lambda: run(batches=BATCHES[0]),
    "no batches": lambda: grad(run(batches=[])),
    "a last batch that is shorter": lambda: grad(run(batches=[*BATCHES, {k: v[:2] for k, v in BATCHES[0].items()}])),
    "batches without ids": lambda: grad(run(batches=[{k: b[k] for k in "xy"} for b in BATCHES])),
    "an id past the weights": lambda: grad(z={"weights": mg.PerExample(jnp.ones(3))}),
    "training and objective swapped": lambda: mg.value_and_metagrad(objective, run()),  # pyright: ignore[reportArgumentType]
    "z before the objective": lambda: mg.metasmoothness(run(), WEIGHTS, objective),  # pyright: ignore[reportArgumentType]
    "a keyword misspelt": lambda: grad(windw=3),
    "a keyword misspelt in a descent": lambda: mg.descend(run(), objective, WEIGHTS, optax.sgd(0.1), 3, windw=3),  # pyright: ignore[reportCallIssue]
    "a memory that can't be read": lambda: grad(memory="2 gigs"),
    "a schedule by name": lambda: grad(schedule="keep_all"),
    "a segment of no steps": lambda: grad(segment=0),
    "a window longer than the run": lambda: grad(window=T + 1),
    "memory and schedule": lambda: grad(memory="2GB", schedule=mg.schedule.TwoLevel()),
    "a bare array for example weights": lambda: grad(z={"weights": jnp.ones(N)}),
    "integers in z": lambda: grad(z={"weights": mg.PerExample(np.ones(N, int))}),
    "a learning rate for other steps": lambda: grad(
        run(optimizer=lambda z: optax.sgd(z["lr"])), z={**WEIGHTS, "lr": mg.PerStep(jnp.ones(T + 2))}
    ),
    "a name in z": lambda: grad(z={**WEIGHTS, "name": "mine"}),
    "an objective that asks for .value": lambda: grad(of=lambda s, z: jnp.sum(z["weights"].value)),
    "an objective that returns a vector": lambda: grad(of=lambda s, z: s.params["w"]),
    "an objective that returns aux": lambda: grad(of=lambda s, z: (objective(s, z), {})),
    "an objective of the batch": lambda: grad(of=lambda state, z, batch: objective(state, z)),
    "a loss of two arguments": lambda: grad(run(loss=lambda params, batch: 0.0)),
    "a loss for each example": lambda: grad(run(loss=lambda p, b, z: z["weights"] * (b["x"] @ p["w"]) ** 2)),
    "a loss that reads a value": lambda: grad(run(loss=branches)),
    "a loss in half precision": lambda: grad(run(loss=half)),
    "fresh randomness in a loss": lambda: grad(run(loss=impure)),
    "Adam without eps_root": lambda: grad(run(optimizer=optax.adam(0.1), init={"w": jnp.ones(3), "u": jnp.ones(2)})),
    "a line search": lambda: grad(run(optimizer=optax.lbfgs())),
    "parameters of integers": lambda: run(init={"w": np.zeros(3, int)}),
    "groups outside the mixture": lambda: mg.PerGroup(jnp.ones(2), groups=[0, 1, 2]),
    "jax.grad through train": lambda: jax.grad(lambda z: objective(mg.train(run(), z), z))(WEIGHTS),
    "jax.jit around a run": lambda: jax.jit(lambda z: mg.train(run(), z))(WEIGHTS),
    "a learning rate that is closed over": lambda: jax.grad(
        lambda lr: objective(mg.train(run(optimizer=optax.sgd(lr)), WEIGHTS, adjoint=mg.Replay()), None)
    )(0.1),
    "jax.jacrev of a run": lambda: jax.jacrev(lambda z: mg.train(run(), z, adjoint=mg.Replay()).params["w"])(WEIGHTS),
    "a mean over a set in jax.jit": lambda: jax.jit(mg.mean_over([{"x": np.ones(3)}] * 9, lambda s, b: s @ b["x"]))(
        jnp.ones(3)
    ),
    "an update that isn't called": lambda: mg.descend(run(), objective, WEIGHTS, mg.updates.sign, 3),  # pyright: ignore[reportArgumentType]
    "seeds of a fixed training": lambda: mg.descend(run(), objective, WEIGHTS, mg.updates.sign(0.1), 3, seeds=4),
    "patience without a held-out objective": lambda: mg.descend(
        run(), objective, WEIGHTS, mg.updates.sign(0.1), 3, patience=2
    ),
}


def message(slip: Callable[[], Any]) -> Exception:
    """What is said to a slip; `AssertionError` where it goes through."""
    try:
        slip()
    except Exception as error:
        return error
    return AssertionError("nothing was said")


def typed(error: Exception) -> bool:
    """Whether an error is ours, or Python's own about a keyword that it doesn't know."""
    return isinstance(error, mg.errors.MetagradientError) or "unexpected keyword argument" in str(error)


def source(slip: Callable[[], Any]) -> str:
    """The code of a slip, without what is around it in the table."""
    text = " ".join(line.split("  # pyright")[0].strip() for line in inspect.getsource(slip).splitlines())
    return text.split("lambda: ", 1)[1].rstrip(",").replace("( ", "(").replace(" )", ")")


def page(found: dict[str, Exception]) -> str:
    parts = [
        "# Slips, and what is said to them",
        "",
        "Each of these is made by `python benchmarks/slips.py`, which prints the message as it is. They come before "
        "compute is spent, but for what only values tell.",
    ]
    for name, error in found.items():
        text = str(error).replace("\n", " ").replace(f"{Path(__file__).parent}/", "")
        parts += [
            "",
            f"## {name}",
            "",
            "```python",
            source(SLIPS[name]),
            "```",
            "",
            f"> `{type(error).__name__}`: {text}",
        ]
    return "\n".join([*parts, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/slips.md"))
    out = parser.parse_args().out
    found = {name: message(slip) for name, slip in SLIPS.items()}
    out.write_text(page(found), encoding="utf-8")
    wrong = [name for name, error in found.items() if not typed(error)]
    for name in wrong:
        print(f"{name}: {type(found[name]).__name__}: {str(found[name])[:200]}")
    print(f"{len(found) - len(wrong)} of {len(found)} slips have a typed error: {out}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
