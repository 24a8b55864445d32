"""Which z to take: candidates tried again, on common fresh seeds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from metagradient.descent.gradients import Gradients
from metagradient.descent.journal import checksum, whole_lines
from metagradient.errors import ConfigError
from metagradient.files import append_text
from metagradient.shown import Shown
from metagradient.trees import PyTree

FINALISTS = "finalists.jsonl"


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


def ranked(
    gradients: Gradients, candidates: Mapping[str, PyTree], fresh: int, *, maximise: bool, out: Path | None
) -> list[Finalist]:
    """Candidates by their mean score on fresh seeds, the best first; see `Descent.finalists`.

    Arguments:
        out: directory that holds a line for each training in `finalists.jsonl`, so that none is made twice.
    """
    if not candidates:
        raise ConfigError("finalists need a candidate: take a meta-step first, or give some")
    path, known = out and out / FINALISTS, {}
    if path:
        known = {(line["z"], line["seed"]): line["score"] for line in whole_lines(path)} if path.exists() else {}

    def score(z: PyTree, seed: int | None) -> float:
        about = checksum(z), seed
        if about not in known:
            known[about] = gradients.score(z, seed)
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                append_text(path, json.dumps({"z": about[0], "seed": seed, "score": known[about]}) + "\n")
        return known[about]

    seeds = gradients.seeds_for(fresh)
    scores = {name: np.array([score(z, seed) for seed in seeds]) for name, z in candidates.items()}
    best = (max if maximise else min)(scores, key=lambda name: scores[name].mean())
    found = []
    for name, z in candidates.items():
        apart = (scores[name] - scores[best]) * (-1 if maximise else 1)
        error = float(apart.std(ddof=1) / np.sqrt(len(apart))) if len(apart) > 1 else None
        found.append(Finalist(name, z, tuple(scores[name].tolist()), float(apart.mean()), error))
    return sorted(found, key=lambda one: one.behind)
