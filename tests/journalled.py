"""A small descent with a journal, that can be killed at any of its writes: shared by the tests, and run by them.

    python tests/journalled.py DIRECTORY CALL PHASE

is killed with SIGKILL at the CALL-th write, "before" it, after a part of it ("torn"), or "after" it.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from quick import quickly

import metagradient as mg
from metagradient.descent import journal

STEPS = 4


def decay(state: jax.Array, batch: dict, z: dict) -> jax.Array:
    return state - z["rate"] * state


def training(seed: int = 0) -> mg.Training:
    start = 1 + np.random.default_rng(seed).random(3, np.float32)
    return mg.Training(jnp.asarray(start), decay, [{"step": np.int32(t)} for t in range(4)])


def objective(state: jax.Array, z: dict) -> jax.Array:
    return jnp.sum(state**2)


def descent(out: Path, **changes: Any) -> mg.Descent:
    """Momentum, a count and a key in the update's memory; fresh seeds; a best that isn't the last."""
    rate = optax.linear_schedule(0.2, 0.1, 8)
    given: dict[str, Any] = {
        "training": training,
        "objective": objective,
        "z": {"rate": mg.PerStep(jnp.full(4, 0.1)), "unused": jnp.zeros(())},
        "update": optax.chain(mg.updates.normalised(rate, 0.5), mg.updates.block_coordinate(0.7)),
        "steps": STEPS,
        "seeds": 2,
        "project": mg.updates.box(0.0, 0.9),
        "held_out": lambda s, z: (z["rate"][1] - 0.3) ** 2 + 0 * s.sum(),
        "segment": mg.Segment(1, "steps", "state"),
        "out": out,
    }
    return mg.descend(**{**given, **changes})


def fail_at(call: int, phase: str, die: Callable[[], Any], patch: Callable[[Any, str, Any], Any] = setattr) -> None:
    """Let the `call`-th write of a journal, from 0, go wrong."""
    append, replace = journal.append_text, journal.replace_file
    left = [call + 1]

    def now(when: str) -> bool:
        return when == phase and left[0] == 0

    def appended(path: Path, text: str) -> None:
        left[0] -= 1
        if now("before"):
            die()
        if now("torn"):
            append(path, text[: len(text) // 2])
            die()
        append(path, text)
        if now("after"):
            die()

    def replaced(path: Path, write: Callable[[Path], Any]) -> None:
        left[0] -= 1
        if now("before"):
            die()
        if now("torn"):
            partial = path.with_name(path.name + ".partial")
            write(partial)
            os.truncate(partial, partial.stat().st_size // 2)
            die()
        replace(path, write)
        if now("after"):
            die()

    patch(journal, "append_text", appended)
    patch(journal, "replace_file", replaced)


if __name__ == "__main__":
    fail_at(int(sys.argv[2]), sys.argv[3], lambda: os.kill(os.getpid(), signal.SIGKILL))
    with quickly():
        list(descent(Path(sys.argv[1])))
