"""Trainings of a CLIP on parts of a pool, each done once and written down."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from metagradient._train import states, train
from metagradient.data.image_text import Pool
from metagradient.descent.journal import whole_lines
from metagradient.errors import DataError
from metagradient.files import append_text
from metagradient.metaparameters import PerExample
from metagradient.step.segment import SINGLE_STEPS
from metagradient.tasks.clip_training import PairTrainer, recalls, soft_rank, zero_shot
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.means import standard_error
from metagradient.training import Training, TrainState
from metagradient.trees import PyTree

BASELINES = ("random", "rules", "duplicates", "score", "ensemble")
"""Arms that a filter must do better than."""

TRAININGS = "trainings.jsonl"
"""File of a run's directory: a line a training, what it was on and what it came to."""


@dataclass(frozen=True)
class Arm:
    """What a CLIP is trained on.

    Arguments:
        rows: int[m], the pairs, some perhaps repeatedly.
        weights: float[n] of all pairs of the pool; None for 1.
    """

    rows: np.ndarray
    weights: np.ndarray | None = None

    def share(self, n: int) -> np.ndarray:
        """How much of each of the pool's n pairs is trained on, float[n] in [0, 1]: weights above 1 count as 1."""
        there = np.minimum(np.bincount(self.rows, minlength=n), 1.0)
        return there if self.weights is None else there * np.minimum(self.weights, 1.0)


@dataclass(frozen=True)
class Scorer:
    """A model trained on the whole pool, and what it makes of it.

    Arguments:
        state: its final state.
        images, texts: unit vectors of the pool, float32[n, embedding] each.
    """

    state: TrainState
    images: np.ndarray
    texts: np.ndarray

    @property
    def scores(self) -> np.ndarray:
        """Cosines of image and caption, float32[n]."""
        return (self.images * self.texts).sum(1)


@dataclass(frozen=True)
class Names:
    """Names of groups, for zero-shot classification by `group` of a pair's json.

    Arguments:
        groups: the groups.
        texts: what is embedded: names of groups and of their subgroups.
        of: int[m], the group of each text.
    """

    groups: tuple[str, ...]
    texts: tuple[str, ...]
    of: np.ndarray

    def truth(self, pairs: Pool) -> np.ndarray:
        """The group of each pair, int[n]; -1 where it is none of these."""
        numbers = {group: number for number, group in enumerate(self.groups)}
        return np.array([numbers.get(group, -1) for group in pairs.column("group")])


def load_names(file: Path) -> Names | None:
    """Group names of a `classes.json`, `{"groups": [...], "subgroups": {group: [...]}}`; None where there is no file.

    Errors: `DataError` for a file that holds something else.
    """
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        groups = tuple(str(group) for group in found["groups"])
        texts = [[group, *found.get("subgroups", {}).get(group, [])] for group in groups]
        plain = [[str(name).replace("-", " ") for name in names] for names in texts]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file} holds no groups, as {{'groups': [...], 'subgroups': {{...}}}}: {error!r}") from error
    of = np.repeat(np.arange(len(groups)), [len(names) for names in plain])
    return Names(groups, tuple(name for names in plain for name in names), of)


class Trials:
    """Trainings on parts of a pool, and what they come to on clean pairs: a line each in the run's `trainings.jsonl`.

    A line that is there already isn't trained again, so that a run that was cut off goes on.

    Arguments:
        trainer: how a CLIP is trained.
        arrays: the pool, from `trainer.arrays`.
        names: for zero-shot classification, or None.
        directory: the run's.
    """

    def __init__(
        self, trainer: PairTrainer, arrays: dict[str, np.ndarray], names: Names | None, directory: RunDirectory
    ):
        self._trainer, self._arrays, self._names = trainer, arrays, names
        self._path = directory / TRAININGS
        self._rows: dict[tuple[str, int], dict[str, Any]] = {(r["what"], r["seed"]): r for r in whole_lines(self._path)}
        self._scorers: dict[tuple[int, int], Scorer] = {}

    def measured(self, what: str, arm: Arm, seed: int, on: Pool) -> dict[str, float]:
        """Train on an arm, and measure.

        Arguments:
            what: what the training is for; with the seed, it names it.
            seed: of initial parameters and order.
            on: clean pairs.

        Returns: `recall` and what it is the mean of; `rank`, as `soft_rank` has it; `group`, zero-shot accuracy, where
            there are names and groups.

        Cost: a training, unless it was done before.
        """
        if (what, seed) not in self._rows:
            found = self._measure(self._trained(arm, seed), on)
            row = {"what": what, "seed": seed, "pairs": len(np.unique(arm.rows)), **found}
            self._rows[what, seed] = row
            append_text(self._path, json.dumps(row) + "\n")
        return {k: v for k, v in self._rows[what, seed].items() if isinstance(v, float)}

    def scorers(self, seed: int, steps: Sequence[int]) -> list[Scorer]:
        """One model trained on the whole pool, after each of so many steps.

        Cost: a training for as many steps as the most; remembered, but not written down.
        """
        if any((seed, stop) not in self._scorers for stop in steps):
            training, z = self._training(Arm(np.arange(len(self._arrays["text"]))), seed, max(steps))
            for stop, state in states(training, z, every=math.gcd(*steps), segment=SINGLE_STEPS):
                if stop in steps:
                    self._scorers[seed, stop] = Scorer(state, *self._trainer.embedded_arrays(state, self._arrays))
        return [self._scorers[seed, stop] for stop in steps]

    def _trained(self, arm: Arm, seed: int) -> TrainState:
        return train(*self._training(arm, seed), segment=SINGLE_STEPS)

    def _training(self, arm: Arm, seed: int, steps: int | None = None) -> tuple[Training, PyTree]:
        n = len(self._arrays["text"])
        weights = jnp.ones(n) if arm.weights is None else jnp.asarray(arm.weights, jnp.float32)
        training = self._trainer.training(self._arrays, seed, rows=arm.rows, steps=steps)
        return training, {"weights": PerExample(weights)}

    def _measure(self, state: TrainState, on: Pool) -> dict[str, float]:
        images, texts = self._trainer.embedded(state, on)
        found = {**recalls(images, texts), "rank": float(soft_rank(jnp.asarray(images), jnp.asarray(texts)))}
        if self._names is not None:
            truth = self._names.truth(on)
            if (truth >= 0).any():
                names = self._trainer.embedded_texts(state, list(self._names.texts))
                found["group"] = zero_shot(images[truth >= 0], names, self._names.of, truth[truth >= 0])
        return found


def figures(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Flat figures of what was measured by arm, a fresh seed each, the same seeds for all: see `run`."""
    found: dict[str, float] = {}
    for arm, of_arm in measured.items():
        recall, base = (np.array([m["recall"] for m in rows]) for rows in (of_arm, measured["all"]))
        found |= {f"recall_{arm}": float(recall.mean()), f"error_{arm}": standard_error(recall)}
        found |= {f"gain_{arm}": float((recall - base).mean()), f"gain_error_{arm}": standard_error(recall - base)}
        if "group" in of_arm[0]:
            group = np.array([m["group"] for m in of_arm])
            found |= {f"group_{arm}": float(group.mean()), f"group_error_{arm}": standard_error(group)}
        for name in of_arm[0]:
            if "_at_" in name:
                found[f"{name}_{arm}"] = float(np.mean([m[name] for m in of_arm]))
    baselines = [found[f"gain_{arm}"] for arm in BASELINES if arm in measured]
    found["best_baseline_gain"] = max(baselines)
    # A baseline that gains nothing makes no ratio.
    found["gain_ratio"] = found["gain_subset"] / max(baselines) if max(baselines) > 0 else float("inf")
    return found
