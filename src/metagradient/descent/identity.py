"""What a descent must share with the one that began its journal, by name: plain data, equal in every process."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from metagradient._jax import digest, trace
from metagradient.counts import CountSurrogate
from metagradient.descent.journal import checksum
from metagradient.metaparameters import PerExample, bare, is_kind
from metagradient.objectives import MeanOver, sets_taken
from metagradient.run import Run, full_precision
from metagradient.step.feed import array
from metagradient.training import Training
from metagradient.trees import PyTree


def of_run(run: Training | CountSurrogate, z: PyTree, window: int | None) -> dict[str, Any]:
    """A run's length, data, start and step.

    Cost: one trace of the step; its first and last batch are read, and its initial state is made.
    """
    if isinstance(run, CountSurrogate):
        return _of_surrogate(run, z)
    with full_precision(run.allow_low_precision):
        prepared = Run.prepared(run, z, window)
        return {
            "number of training steps": len(run.batches),
            "checksum of the first batch": checksum(prepared.feed.first),
            "checksum of the last batch": checksum(prepared.feed[len(run.batches) - 1]),
            "checksum of the initial state": checksum(prepared.state),
            "checksum of args": checksum(run.args),
            "digest of the training step": digest(prepared.contract.program, lasting=True),
        }


def of_objective(objective: Callable[[PyTree, PyTree], Any] | None, run: Training | CountSurrogate, z: PyTree) -> Any:
    """Digest of an objective's program and of what it reads; a word for one that can't be traced, or for none."""
    if objective is None:
        return "absent"
    if isinstance(run, CountSurrogate):
        (counts,) = jax.tree.leaves(z)
        run, state_z = run.training(np.asarray(counts).astype(np.int64)), {}
    else:
        state_z = z
    state = jax.eval_shape(run.initial, state_z)
    try:
        with sets_taken() as sets:
            program = digest(trace(objective, state, bare(z))[0], lasting=True)
    except (TypeError, jax.errors.JAXTypeError):
        return "not traceable"
    return " ".join([program, *(_of_set(mean) for mean in dict.fromkeys(sets))])


def _of_set(mean: MeanOver) -> str:
    first, last = (jax.tree.map(array, mean.batches[i]) for i in (0, len(mean.batches) - 1))
    return f"over {len(mean.batches)} batches, {checksum(first)} to {checksum(last)}, args {checksum(mean.args)}"


def _of_surrogate(surrogate: CountSurrogate, z: PyTree) -> dict[str, Any]:
    (counts,) = (kind.value for kind in jax.tree.leaves(z, is_leaf=is_kind) if isinstance(kind, PerExample))
    training = surrogate.training(np.asarray(counts).astype(np.int64))
    state = training.initial({})
    candidates = jax.tree.map(array, next(iter(surrogate.candidates)))
    given = () if surrogate.args is None else (surrogate.args,)
    losses = trace(surrogate.losses, state.params, state.model_state, candidates, *given)[0]
    return {
        "number of training steps": len(training.batches),
        "checksum of the first batch": checksum(jax.tree.map(array, training.batches[0])),
        "checksum of the initial state": checksum(state),
        "checksum of the first candidates": checksum(candidates),
        "checksum of args": checksum((training.args, surrogate.args)),
        "digest of the candidates' losses": digest(losses, lasting=True),
        "step k": surrogate.at,
    }
