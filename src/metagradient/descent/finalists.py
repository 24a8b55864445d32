"""Which z to take: candidates tried again, on common fresh seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from metagradient.descent.gradients import Gradients
from metagradient.errors import ConfigError
from metagradient.shown import Shown
from metagradient.trees import PyTree


@dataclass(frozen=True, repr=False)
class Finalist(Shown):
    """A candidate, tried on fresh seeds.

    Arguments:
        name: the meta-step that started from it, or what the caller called it.
        z: it.
        scores: held-out value (without `held_out`, the objective's) of the training of each fresh seed.
        behind: by how much it is worse than the best one, on average over seeds; 0 for that.
        error: standard error of that, of differences at the same seed; None with one seed.
    """

    name: str
    z: PyTree = field(repr=False)
    scores: tuple[float, ...]
    behind: float
    error: float | None

    @property
    def mean(self) -> float:
        """Mean score."""
        return float(np.mean(self.scores))


def ranked(gradients: Gradients, candidates: Mapping[str, PyTree], fresh: int, maximise: bool) -> list[Finalist]:
    """Candidates by their mean score on fresh seeds, the best first; see `Descent.finalists`."""
    if not candidates:
        raise ConfigError("finalists need a candidate: take a meta-step first, or give some")
    scores = {name: np.array(gradients.scores(z, fresh)) for name, z in candidates.items()}
    best = (max if maximise else min)(scores, key=lambda name: scores[name].mean())
    found = []
    for name, z in candidates.items():
        apart = (scores[name] - scores[best]) * (-1 if maximise else 1)
        error = float(apart.std(ddof=1) / np.sqrt(len(apart))) if len(apart) > 1 else None
        found.append(Finalist(name, z, tuple(scores[name].tolist()), float(apart.mean()), error))
    return sorted(found, key=lambda one: one.behind)
