"""The metagradient of a meta-step: of one training, or averaged over several seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagradient._replay import Replay, Stats
from metagradient._train import train
from metagradient.counts import CountSurrogate
from metagradient.descent.seeds import fresh_seed, inner_seed
from metagradient.descent.updates import unit_rms
from metagradient.errors import NonFiniteError, StructureError
from metagradient.metagrad import Evaluation, Metagradient
from metagradient.metaparameters import bare
from metagradient.step.segment import Segment
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
        options: as in `value_and_metagrad`, segment included.

    It holds the last run that it differentiated, and so the programs that the next one, of another seed, shares.
    """

    training: Differentiable | Callable[[int], Differentiable]
    objective: Callable[[PyTree, PyTree], jax.Array]
    held_out: Callable[[PyTree, PyTree], jax.Array] | None
    seed: int
    seeds: int
    options: Replay

    def __post_init__(self) -> None:
        self._last: Any = None
        self._last_scored: Any = None

    def at(self, step: int, z: PyTree, segment: Segment | None) -> Measured:
        """The metagradient of a meta-step.

        Arguments:
            segment: how the steps before were compiled; None leaves it to the user's wish.
        """
        seeds: list[SeedRecord] = []
        stats: list[Stats] = []
        runs: list[float] = []
        mean = Mean()
        for number in range(self.seeds):
            run, drawn = self._training(step, number)
            found, took = self._evaluated(run, z, stats[-1].segment if stats else segment or self.options.segment)
            seeds.append(self._record(drawn, found, z))
            stats.append(found.stats)
            runs.append(took)
            mean.add(found.grad)
        grad, agreement = mean.found
        return Measured(grad, agreement, tuple(seeds), _together(stats), sum(runs))

    def _evaluated(self, run: Differentiable, z: PyTree, segment: Segment | int | None) -> tuple[Evaluation, float]:
        """A metagradient, and what it took in plain training runs."""
        options = replace(self.options, segment=segment)
        if isinstance(run, CountSurrogate):
            found = run.evaluate_with(self.objective, z, options)
            self._last = run
            return found
        metagradient = Metagradient(run, self.objective, options)
        found = metagradient.evaluate(z)
        self._last = metagradient
        return found, found.stats.in_steps / len(run.batches)

    def _training(self, step: int, number: int) -> tuple[Differentiable, int | None]:
        if isinstance(self.training, (Training, CountSurrogate)):
            return self.training, None
        seed = inner_seed(self.seed, step, number)
        return self._drawn(seed), seed

    def _drawn(self, seed: int) -> Differentiable:
        assert not isinstance(self.training, (Training, CountSurrogate))
        drawn = self.training(seed)
        check_drawn(drawn, seed)
        return drawn

    def seeds_for(self, fresh: int) -> list[int | None]:
        """Seeds to try a z on, which no meta-step draws; a fixed training has none."""
        if isinstance(self.training, (Training, CountSurrogate)):
            return [None]
        return [fresh_seed(self.seed, number) for number in range(fresh)]

    def score(self, z: PyTree, seed: int | None) -> float:
        """Held-out value (without `held_out`, the objective's) of one training."""
        run = self.training if seed is None else self._drawn(seed)
        assert isinstance(run, (Training, CountSurrogate))
        segment = self.options.segment
        state = run.trained(z) if isinstance(run, CountSurrogate) else train(run, z, segment=segment)
        self._last_scored = run
        return self._score(self.held_out or self.objective, state, bare(z))

    def _score(self, function: Callable[[PyTree, PyTree], jax.Array], state: PyTree, z: PyTree) -> float:
        score = jnp.asarray(function(state, z))
        if score.shape:
            raise StructureError(f"held_out returned {score.dtype}{list(score.shape)}, expected a scalar")
        if not bool(jnp.isfinite(score)):
            raise NonFiniteError(f"held_out is {score}, at a final state that is finite")
        return float(score)

    def _record(self, seed: int | None, found: Evaluation, z: PyTree) -> SeedRecord:
        held_out = self._score(self.held_out, found.state, bare(z)) if self.held_out else None
        return SeedRecord(seed, float(found.value), held_out, float(optax.tree.norm(found.grad)))


def check_drawn(drawn: Any, seed: int) -> None:
    """Raise `StructureError` unless a function of a seed returned what can be differentiated."""
    if not isinstance(drawn, (Training, CountSurrogate)):
        raise StructureError(f"training({seed}) returned {type(drawn).__name__}, not a Training or CountSurrogate")


class Mean:
    r"""Mean of metagradients, every leaf of each at unit root mean square; leaves of zeros don't count.

    Of one alone, it is that one as it is.
    """

    def __init__(self) -> None:
        self._first: PyTree = None
        self._count = 0
        self._total: PyTree = None
        self._seen: PyTree = None

    def add(self, grad: PyTree) -> None:
        """One more."""
        self._first, self._count = grad if self._count == 0 else None, self._count + 1
        unit = jax.tree.map(unit_rms, grad)
        seen = jax.tree.map(lambda g: jnp.any(g != 0).astype(g.dtype), grad)
        first = self._total is None
        self._total = unit if first else add(self._total, unit)
        self._seen = seen if first else add(self._seen, seen)

    @property
    def found(self) -> tuple[PyTree, float | None]:
        r"""The mean, and the mean cosine between two of them.

        That is averaged over the leaves that are not zero in at least two; None without such a leaf. A leaf's $n$ unit
        vectors $u_i$ have it of their sum alone:

        $$\frac{1}{n(n-1)}\sum_{i \ne j} u_i \cdot u_j = \frac{\|\sum_i u_i\|^2 - n}{n(n-1)}$$
        """
        if self._count == 1:
            return self._first, None
        leaves = zip(jax.tree.leaves(self._total), jax.tree.leaves(self._seen), strict=True)
        cosines = [(float(jnp.mean(t**2)) - n) / (n * (n - 1)) for t, n in ((t, int(n)) for t, n in leaves) if n > 1]
        mean = jax.tree.map(lambda t, n: t / jnp.maximum(n, 1), self._total, self._seen)
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
