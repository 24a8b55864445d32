"""The metagradient of a meta-step: of one training, or averaged over several seeds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagradient.descent.seeds import inner_seed
from metagradient.descent.updates import unit_rms
from metagradient.errors import NonFiniteError, StructureError
from metagradient.metagrad import Evaluation, Stats, value_and_metagrad
from metagradient.replay.plan import Plan
from metagradient.step.segment import Segment
from metagradient.surrogate import CountSurrogate
from metagradient.training import Training
from metagradient.trees import PyTree, add

Differentiable: TypeAlias = Training | CountSurrogate
"""What a meta-step can take the metagradient of: a run, or one on a data set made by counts."""


@dataclass(frozen=True)
class SeedRecord:
    """One training of a meta-step, and its metagradient.

    Arguments:
        seed: that it was drawn for; None where the training is a fixed one.
        value: the objective.
        held_out: the other objective, or None.
        grad_norm: Euclidean norm of the metagradient.
    """

    seed: int | None
    value: float
    held_out: float | None
    grad_norm: float


@dataclass(frozen=True)
class Measured:
    """What was measured at one z.

    Arguments:
        grad: the metagradient; of several seeds, the mean of those at unit root mean square.
        agreement: mean cosine between two seeds' metagradients; None where there is one.
        seeds: a record for each training.
        stats: what they took, together.
        training_runs: the same in plain training runs.
    """

    grad: PyTree
    agreement: float | None
    seeds: tuple[SeedRecord, ...]
    stats: Stats
    training_runs: float

    def mean(self, name: str) -> float | None:
        """Mean over seeds of a figure of theirs; None where they have none."""
        values = [getattr(seed, name) for seed in self.seeds]
        return None if None in values else float(np.mean(values))


@dataclass
class Gradients:
    """Finds metagradients, meta-step by meta-step.

    Arguments:
        training, objective, held_out, seed, seeds: as in `descend`.
        segment: as the user gave it.
        options: of `value_and_metagrad`, the segment apart.
    """

    training: Differentiable | Callable[[int], Differentiable]
    objective: Callable[[PyTree, PyTree], jax.Array]
    held_out: Callable[[PyTree, PyTree], jax.Array] | None
    seed: int
    seeds: int
    segment: Segment | int | None
    options: dict[str, Any]

    def at(self, step: int, z: PyTree, segment: Segment | None) -> Measured:
        """The metagradient of a meta-step.

        Arguments:
            segment: how the steps before were compiled; None leaves it to the user's wish.
        """
        seeds: list[SeedRecord] = []
        stats: list[Stats] = []
        runs: list[float] = []

        def grads() -> Iterator[PyTree]:
            for number in range(self.seeds):
                run, drawn = self._training(step, number)
                wished = stats[-1].segment if stats else segment or self.segment
                found, took = self._evaluated(run, z, wished)
                self._keep_plan(found.stats)
                seeds.append(self._record(drawn, found, z))
                stats.append(found.stats)
                runs.append(took)
                yield found.grad

        grad, agreement = average(grads()) if self.seeds > 1 else (next(grads()), None)
        return Measured(grad, agreement, tuple(seeds), _together(stats), sum(runs))

    def _evaluated(self, run: Differentiable, z: PyTree, segment: Segment | int | None) -> tuple[Evaluation, float]:
        """A metagradient, and what it took in plain training runs."""
        if isinstance(run, CountSurrogate):
            return run.evaluate(self.objective, z, segment=segment, **self.options)
        found = value_and_metagrad(run, self.objective, segment=segment, **self.options).evaluate(z)
        return found, found.stats.in_steps / len(run.batches)

    def _training(self, step: int, number: int) -> tuple[Differentiable, int | None]:
        if isinstance(self.training, (Training, CountSurrogate)):
            return self.training, None
        seed = inner_seed(self.seed, step, number)
        drawn = self.training(seed)
        if not isinstance(drawn, (Training, CountSurrogate)):
            raise StructureError(f"training({seed}) returned {type(drawn).__name__}, not a Training or CountSurrogate")
        return drawn, seed

    def _record(self, seed: int | None, found: Evaluation, z: PyTree) -> SeedRecord:
        held_out = None
        if self.held_out:
            other = jnp.asarray(self.held_out(found.state, z))
            if other.shape:
                raise StructureError(f"held_out returned {other.dtype}{list(other.shape)}, expected a scalar")
            if not bool(jnp.isfinite(other)):
                raise NonFiniteError(f"held_out is {other}, at a final state that is finite")
            held_out = float(other)
        return SeedRecord(seed, float(found.value), held_out, float(optax.tree.norm(found.grad)))

    def _keep_plan(self, stats: Stats) -> None:
        """A plan is measured once, not again in every meta-step."""
        if isinstance(stats.schedule, Plan):
            self.options = {**self.options, "memory": None, "schedule": stats.schedule}


def average(grads: Iterable[PyTree]) -> tuple[PyTree, float | None]:
    r"""Mean of metagradients, every leaf of each at unit root mean square; leaves of zeros don't count.

    Returns: the mean; and the mean cosine between two of them, averaged over the leaves that are not zero in at least
    two, or None without such a leaf. A leaf's $n$ unit vectors $u_i$ have it of their sum alone:

    $$\frac{1}{n(n-1)}\sum_{i \ne j} u_i \cdot u_j = \frac{\|\sum_i u_i\|^2 - n}{n(n-1)}$$
    """
    total, count = None, None
    for grad in grads:
        unit = jax.tree.map(unit_rms, grad)
        seen = jax.tree.map(lambda g: jnp.any(g != 0).astype(g.dtype), grad)
        total, count = (unit, seen) if total is None else (add(total, unit), add(count, seen))
    leaves = zip(jax.tree.leaves(total), jax.tree.leaves(count), strict=True)
    cosines = [(float(jnp.mean(t**2)) - n) / (n * (n - 1)) for t, n in ((t, int(n)) for t, n in leaves) if n > 1]
    mean = jax.tree.map(lambda t, n: t / jnp.maximum(n, 1), total, count)
    return mean, float(np.mean(cosines)) if cosines else None


def _together(stats: Sequence[Stats]) -> Stats:
    def most(peaks: Sequence[dict[str, int]]) -> dict[str, int]:
        return {tier: max(p.get(tier, 0) for p in peaks) for tier in dict.fromkeys(t for p in peaks for t in p)}

    return replace(
        stats[-1],
        forward_steps=sum(s.forward_steps for s in stats),
        adjoint_steps=sum(s.adjoint_steps for s in stats),
        peak_states=most([s.peak_states for s in stats]),
        peak_bytes=most([s.peak_bytes for s in stats]),
        seconds=sum(s.seconds for s in stats),
        compile_seconds=sum(s.compile_seconds for s in stats),
    )
