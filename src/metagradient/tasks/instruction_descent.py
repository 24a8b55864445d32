"""The descent of a selection of instruction data: counts, or weights, of the candidates."""

import json
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from metagradient._train import train
from metagradient.counts import CountSurrogate
from metagradient.descent import updates
from metagradient.descent.journal import whole_lines
from metagradient.descent.loop import descend
from metagradient.descent.seeds import fresh_seed
from metagradient.files import append_text
from metagradient.metaparameters import PerExample
from metagradient.step.segment import SINGLE_STEPS
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.following import follow
from metagradient.tasks.instruction_data import Prepared
from metagradient.tasks.instruction_setup import InstructionSelection, at, budget
from metagradient.tasks.ranking import highest
from metagradient.training import Training

CHOSEN = "chosen.jsonl"
"""File of a run's directory: held-out losses by which a meta-step was chosen, a line a training."""

# Seeds that choose: not among the `fresh` ones.
_CHOOSING = 1000


def selected(config: InstructionSelection, task: Prepared, directory: RunDirectory) -> tuple[int, np.ndarray]:
    """Descend, or go on with the descent that the directory holds.

    Every meta-step trains from another seed, and seeds differ by more than meta-steps do: its held-out loss alone says
    little. So what was measured best is tried again beside what the last meta-step led to, both from the same seeds.

    Returns: meta-steps taken by then; how often each candidate is selected, int[n].
    """
    c, n = config, len(task.pool)
    rate = optax.linear_schedule(c.rate, c.final_rate, max(1, c.meta_steps - 1))
    first = np.zeros(n, np.float32)
    first[np.random.default_rng((c.seed, 4)).choice(n, budget(c, n), replace=False)] = 1
    training, z, update, project = {
        "exchange": (_surrogate(c, task), {"counts": PerExample(first)}, updates.exchange(c.exchanged), None),
        # The surrogate has gradients for the candidates that were drawn, and the others stay: p = 1 among those.
        "counts": (_surrogate(c, task), {"counts": PerExample(np.ones(n, np.float32))}, updates.counts(1.0), None),
        "weights": (
            lambda seed: task.tuner.training(task.pool, seed),
            {"weights": PerExample(jnp.ones(n))},
            updates.normalised(rate, c.momentum),
            updates.box(0, 2),
        ),
    }[c.method]
    descent = descend(
        training,
        task.tuner.mean_loss(task.aim),
        z,
        update,
        c.meta_steps,
        project=project,
        held_out=task.tuner.mean_loss(task.held_out),
        seed=c.seed,
        out=directory.path,
    )
    follow(descent, c.meta_steps, "loss on the target")
    assert descent.best is not None
    found = {descent.best.step: descent.best.z, descent.step: descent.z}
    counts = {step: _counts(c, z) for step, z in found.items()}
    # Counts that nothing was trained on may be too few to train on.
    counts = {step: of_step for step, of_step in counts.items() if of_step.sum() >= c.tuning.batch}
    step = min(counts, key=lambda step: _held_out(c, task, step, counts[step], directory))
    return step, counts[step]


def _counts(config: InstructionSelection, z: Mapping[str, PerExample]) -> np.ndarray:
    """How often each candidate is selected, int[n]."""
    if config.method == "weights":
        return highest(np.asarray(z["weights"].value), config.share).astype(np.int64)
    return np.asarray(z["counts"].value).astype(np.int64)


def _held_out(
    config: InstructionSelection, task: Prepared, step: int, counts: np.ndarray, directory: RunDirectory
) -> float:
    """Mean held-out loss of models tuned on a selection: a line for each seed in the directory, none of them twice."""
    path, loss = directory / CHOSEN, task.tuner.mean_loss(task.held_out)
    found = {line["seed"]: line["held_out"] for line in whole_lines(path) if line["step"] == step}
    for seed in (fresh_seed(config.seed, _CHOOSING + i) for i in range(config.choosing)):
        if seed not in found:
            rows = np.repeat(np.arange(len(counts)), counts)
            found[seed] = float(
                loss(train(task.tuner.training(task.pool, seed, rows=rows), {}, segment=SINGLE_STEPS), {})
            )
            append_text(path, json.dumps({"step": step, "seed": seed, "held_out": found[seed]}) + "\n")
    return float(np.mean(list(found.values())))


def _surrogate(config: InstructionSelection, task: Prepared) -> Any:
    """From a seed to the run on counts, with a random share of the candidates to differentiate in.

    Candidates that Algorithm 1's mask would leave alone need no gradient: the mask is drawn before the pass over them.
    """
    n, tuner = len(task.pool), task.tuner
    # In whole batches: a last one of another size would be compiled anew in every meta-step.
    batch = config.tuning.evaluation_batch
    count = min(n, max(1, round(config.drawn * n / batch)) * batch)

    def training(counts: np.ndarray, seed: int) -> Training:
        return tuner.training(task.pool, seed, rows=np.repeat(np.arange(n), counts))

    def surrogate(seed: int) -> CountSurrogate:
        drawn = np.random.default_rng((seed, 5)).choice(n, count, replace=False)
        candidates = tuner.candidates(task.pool, drawn)
        return CountSurrogate(lambda counts: training(counts, seed), candidates, tuner.losses, at(config), tuner.args)

    return surrogate
