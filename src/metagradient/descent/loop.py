"""`descend`: metagradient descent, one loop for every task."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from metagradient.metagrad import Stats, value_and_metagrad
from metagradient.metaparameters import canonical
from metagradient.training import Training
from metagradient.trees import PyTree

# In matrix products: a plain step is 3 forward passes, its adjoint a gradient (3) and the gradient's tangent (6).
_ADJOINT_IN_STEPS = 3


@dataclass(frozen=True)
class MetaStep:
    """What one meta-step did.

    Arguments:
        step: its number, from 0.
        value: the objective, at the z that the step started from.
        held_out: another objective at the same final state, or None.
        z: the metaparameters after the step.
        grad_norm: Euclidean norm of the metagradient.
        stats: what the metagradient took.
        training_runs: compute spent, in plain training runs (an adjoint step counts as three steps).
    """

    step: int
    value: float
    held_out: float | None
    z: PyTree
    grad_norm: float
    stats: Stats
    training_runs: float


def descend(
    training: Training | Callable[[int], Training],
    objective: Callable[[PyTree, PyTree], jax.Array],
    z: PyTree,
    update: optax.GradientTransformation,
    steps: int,
    *,
    project: Callable[[PyTree], PyTree] | None = None,
    held_out: Callable[[PyTree, PyTree], jax.Array] | None = None,
    seed: int = 0,
    **options: Any,
) -> Iterator[MetaStep]:
    """Metagradient descent: train, differentiate through the training, update the metaparameters, repeat.

    Arguments:
        training: the run, or `seed -> Training`; then every meta-step draws a fresh seed, and what is learnt must hold
            for all of them (a fixed seed gets exploited). Build loss and optimiser outside that function, so that
            every meta-step runs the same compiled programs.
        objective: `(final state, z) -> scalar` to minimise.
        z: metaparameters to start from.
        update: an optax transformation of metagradients; see `metagradient.updates`.
        steps: number of meta-steps.
        project: applied to z after every update.
        held_out: a second objective, only reported: metagradient descent overfits small targets.
        seed: seed of the inner seeds.
        options: as in `value_and_metagrad`.

    Returns: an iterator over `MetaStep`; take as many as wanted.

    Errors: those of `value_and_metagrad`.

    Cost: a metagradient a meta-step.

    Source: arXiv 2503.13751, section 3.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> training = mg.Training(jnp.ones(()), lambda s, b, z: s - z["rate"] * 2 * s, [{}] * 4)
    >>> update = mg.updates.normalised(0.05)
    >>> records = list(mg.descend(training, lambda s, z: s**2, {"rate": jnp.asarray(0.1)}, update, steps=4))
    >>> records[-1].value < records[0].value
    True
    """
    z = canonical(z)
    memory = update.init(z)
    segment = options.pop("segment", None)
    for step in range(steps):
        run = training if isinstance(training, Training) else training(inner_seed(seed, step))
        found = value_and_metagrad(run, objective, segment=segment, **options).evaluate(z)
        segment = found.stats.segment
        other = float(held_out(found.state, z)) if held_out else None
        changes, memory = update.update(found.grad, memory, z)
        z = optax.apply_updates(z, changes)
        z = project(z) if project else z
        yield MetaStep(
            step,
            float(found.value),
            other,
            z,
            float(optax.tree.norm(found.grad)),
            found.stats,
            (found.stats.forward_steps + _ADJOINT_IN_STEPS * found.stats.adjoint_steps) / len(run.batches),
        )


def inner_seed(seed: int, step: int) -> int:
    """Seed of the training in a meta-step: distinct for all (seed, step), and from `fresh_seed`."""
    return int(np.random.SeedSequence((seed, 0, step)).generate_state(1)[0])


def fresh_seed(seed: int, number: int) -> int:
    """Seed for evaluation that no meta-step of the same descent has drawn."""
    return int(np.random.SeedSequence((seed, 1, number)).generate_state(1)[0])
