"""`value_and_metagrad`: the gradient of an objective of a whole training run, by REPLAY."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Literal

import jax
import numpy as np

from metagradient._jax import compile_seconds
from metagradient._replay import Pass, Replay, Stats
from metagradient.errors import NonFiniteError
from metagradient.metaparameters import bare, canonical
from metagradient.objectives import Ended, Objective
from metagradient.replay.budget import Memory
from metagradient.replay.schedule import Schedule
from metagradient.run import Run, full_precision
from metagradient.shown import Shown
from metagradient.step.segment import Segment
from metagradient.training import Training, check_training
from metagradient.trees import PyTree


@dataclass(frozen=True, repr=False)
class Evaluation(Shown):
    """One metagradient.

    Arguments:
        value: the objective's value.
        grad: its gradient, in the structure and types of z.
        stats: what it took.
        state: the final state, which the objective read.
        aux: what else the objective returned, with `has_aux`; else None.
    """

    value: jax.Array
    grad: PyTree
    stats: Stats
    state: PyTree
    aux: PyTree = None


class Metagradient(Shown):
    """A function `z -> (value, gradient)`; made by `value_and_metagrad`, whose arguments are described there.

    Attributes:
        training, objective: what it is the metagradient of.
        options: how the run is differentiated.
        programs: those of the objective.
    """

    def __init__(
        self,
        training: Training,
        objective: Callable[[PyTree, PyTree], Any],
        options: Replay,
        *,
        vector: bool = False,
        has_aux: bool = False,
    ):
        check_training(training)
        self.training = training
        self.objective = objective
        self.options = options
        self._objective = Objective(objective, vector=vector, has_aux=has_aux)
        self.programs = self._objective.programs

    def shown(self) -> dict[str, Any]:
        """The run, the objective, and the options that were given."""
        return {"training": self.training, "objective": self.objective, **self.options.shown()}

    def __call__(self, z: PyTree) -> tuple[Any, PyTree]:
        """Value of the objective (with `has_aux`, value and aux), and its gradient in the structure of z."""
        value, grad, _ = self.with_stats(z)
        return value, grad

    def with_stats(self, z: PyTree) -> tuple[Any, PyTree, Stats]:
        """What a call returns, and what it took."""
        found = self.evaluate(z)
        value = (found.value, found.aux) if self._objective.has_aux else found.value
        return value, found.grad, found.stats

    def evaluate(self, z: PyTree) -> Evaluation:
        """Value, gradient, what they took, and the final state."""
        start = perf_counter()
        z = canonical(z)
        with full_precision(self.training.allow_low_precision), compile_seconds() as compiling:
            run = Run.prepared(self.training, z, self.options.window, retrace=False)
            self._objective.check_derivative(run.state, z)
            passed = Pass(run, z, self.options, queries=self._objective.vector)
            state = passed.forward()
            ended = self._ended(state, z)
            grad = passed.back(ended.cotangent, ended.total)
        assert passed.stats is not None
        stats = replace(passed.stats, seconds=perf_counter() - start, compile_seconds=compiling.seconds)
        return Evaluation(ended.value, grad, stats, state, ended.aux)

    def _ended(self, state: PyTree, z: PyTree) -> Ended:
        ended = self._objective.value_and_pull_back(state, bare(z))
        if not np.isfinite(ended.value).all():
            raise NonFiniteError(f"the objective's value is {ended.value}, at a final state that is finite")
        return ended


def value_and_metagrad(
    training: Training,
    objective: Callable[[PyTree, PyTree], Any],
    *,
    memory: Memory | str | None = None,
    schedule: Schedule | None = None,
    segment: Segment | int | None = None,
    window: int | None = None,
    vector: bool = False,
    has_aux: bool = False,
    verify: Literal["boundaries", "off"] = "boundaries",
    progress: bool = False,
) -> Metagradient:
    r"""The exact gradient of an objective of a training run in its metaparameters, by REPLAY.

    With $s_{t+1} = h_t(s_t, z)$ and an objective $\phi(s_T, z)$, returns $\phi$ and

    $$\nabla_z = \sum_t \bar s_{t+1} \partial_z h_t + \bar s_0 \partial_z s_0 + \partial_z \phi, \qquad
      \bar s_t = \bar s_{t+1} \partial_s h_t, \quad \bar s_T = \partial_s \phi.$$

    Exact is what `jax.grad` gives of the whole loop, to rounding. Where a loss stops gradients (`lax.stop_gradient`,
    detached targets), or a rule in it isn't the derivative of its value, that isn't the derivative of the run: `check`
    tells the two apart.

    Arguments:
        training: the run.
        objective: `(final state, z) -> scalar`, with bare arrays for z, whatever their kinds; `mean_over` builds one
            from a validation set. It is compiled.
        memory, schedule, segment, window, verify, progress: as in `Replay`.
        vector: the objective returns a vector `[q]`; then every leaf of the gradient gains a leading axis q, and one
            traversal serves all queries.
        has_aux: the objective returns `(value, aux)`, aux any pytree of arrays.

    Returns: a function `z -> (value, gradient)`, with the gradient in the structure and types of z; with `has_aux`,
        `z -> ((value, aux), gradient)`. Its `with_stats` also tells what it took, its `evaluate` the final state too.

    `jax.grad` through `train(training, z, adjoint=Replay(...))` is the same, for objectives of several runs, and for z
    that is made of something else.

    Errors, before compute wherever they can be known: `StructureError` (z, state or objective of the wrong kind),
        `BatchError` (batches empty, uneven, changing, or with a bad index), `PrecisionError`, `ImpureStepError`,
        `DerivativeError` (a loss, step or objective that JAX can't differentiate). Later:
        `ReplayMismatch` (a replay differs from the first run), `NonFiniteError` (with step and leaf).

    Cost: T steps and T adjoints (about two to three plain steps each), and the schedule's replays: none for `KeepAll`,
        one run for `TwoLevel`, about log_k T for `KaryTree(k)`. Without `memory=`, batches that were read are held in
        host memory, up to a sixteenth of what is free, so that replays needn't read them again.

    Many devices of one process: spread batches, the initial state and z over a mesh, and states stay spread as they
    are. With explicit axes (what `jax.make_mesh` makes) everything is called within `jax.set_mesh(mesh)`, the gradient
    is spread as z is, and a micro-batch must be divisible as its batch was.

    Source: Engstrom et al. 2025, "Optimizing ML Training with Metagradient Descent", arXiv 2503.13751.

    >>> import jax.numpy as jnp, optax, metagradient as mg
    >>> batches = [{"x": jnp.arange(4.0) + t, "index": jnp.arange(4)} for t in range(20)]
    >>> def loss(params, batch, z):
    ...     return jnp.mean(z["weights"] * (params["w"] * batch["x"] - 1) ** 2)
    >>> training = mg.Training.from_loss(loss, optax.sgd(1e-3), {"w": jnp.zeros(())}, batches)
    >>> gradient = mg.value_and_metagrad(training, lambda state, z: (state.params["w"] - 0.5) ** 2)
    >>> value, grad = gradient({"weights": mg.PerExample(jnp.ones(4))})
    >>> grad["weights"].value.shape
    (4,)
    """
    options = Replay(memory=memory, schedule=schedule, segment=segment, window=window, verify=verify, progress=progress)
    return Metagradient(training, objective, options, vector=vector, has_aux=has_aux)
