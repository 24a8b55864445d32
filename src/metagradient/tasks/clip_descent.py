"""The descent of a filtering of an image–text pool: what each pair is worth, by weights, by a rater, or by counts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from metagradient.counts import CountSurrogate
from metagradient.descent import updates
from metagradient.descent.loop import Descent, descend
from metagradient.files import replace_file
from metagradient.metaparameters import PerExample
from metagradient.tasks.clip_rater import cosine_name, feature_names, features, rated
from metagradient.tasks.clip_setup import ClipSelection, Prepared, at
from metagradient.tasks.clip_trials import Arm, Trials
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.following import follow
from metagradient.training import Training


@dataclass(frozen=True)
class Learnt:
    """What a descent came to by some meta-step.

    Arguments:
        step: meta-steps taken by then.
        weights: float32[n], weights or counts.
        rater: what each feature counts for, by name; empty for a descent without a rater.
    """

    step: int
    weights: np.ndarray
    rater: dict[str, float]


@dataclass(frozen=True)
class Candidates:
    """A pool once through in batches, in a fixed random order, so that each pair's negatives are of all kinds."""

    arrays: Mapping[str, np.ndarray]
    order: np.ndarray
    batch: int

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(self.order), self.batch):
            index = self.order[start : start + self.batch]
            yield {**{name: array[index] for name, array in self.arrays.items()}, "index": index}


def learnt(
    task: Prepared, trials: Trials, scoring: Sequence[int], choosing: Sequence[int], directory: RunDirectory
) -> Learnt:
    """Descend, or go on with the descent that the directory holds.

    Every meta-step trains from another seed, and seeds differ by more than meta-steps do. So four of them are tried
    again, all from the same seeds, and that of the lowest log rank of held-out pairs is taken.

    Arguments:
        scoring: seeds of the models that a rater's features are of.
        choosing: seeds by which the meta-step is chosen.
    """
    c, n = task.config, len(task.pool)
    if c.method == "counts":
        ones = {"counts": PerExample(jnp.ones(n))}
        found = [
            Learnt(step, z["counts"], {})
            for step, z in _descended(task, directory, _surrogate(task), ones, updates.counts(c.flip, c.seed)).items()
        ]
    else:
        found = _by_weights(task, trials, scoring, directory)

    def rank(one: Learnt) -> float:
        rows, weights = np.arange(n), one.weights
        arm = Arm(np.repeat(rows, weights.astype(int))) if c.method == "counts" else Arm(rows, weights)
        what = f"held-out pairs after meta-step {one.step}"
        return float(np.mean([trials.measured(what, arm, seed, task.held_out)["rank"] for seed in choosing]))

    return min(found, key=rank)


def start(config: ClipSelection, n: int) -> dict[str, Any]:
    """Where a descent in a weight for each of n pairs, in a rater, or in both begins.

    All pairs are alike, but for what a rater makes of the models' mean cosines.
    """
    found: dict[str, Any] = {}
    if config.method != "weights":
        names = feature_names(config.score_steps)
        cosine = names.index(cosine_name(config.score_steps[-1]))
        found["rater"] = jnp.zeros(len(names)).at[cosine].set(config.head_start)
    if config.method != "rater":
        found["weights"] = PerExample(jnp.ones(n))
    return found


def _by_weights(task: Prepared, trials: Trials, scoring: Sequence[int], directory: RunDirectory) -> list[Learnt]:
    """Descents in a weight for each pair, in a rater, or in both, whose weights are multiplied."""
    c, n, arrays = task.config, len(task.pool), task.arrays
    names = [] if c.method == "weights" else feature_names(c.score_steps)
    if names:
        arrays = {**arrays, "features": _features(task, trials, scoring)}

    def training(seed: int) -> Training:
        return task.trainer.training(arrays, seed)

    update = updates.normalised(optax.linear_schedule(c.rate, c.final_rate, max(1, c.meta_steps - 1)), c.momentum)
    bounded = partial(_bounded, most=c.most)
    found = []
    for step, z in _descended(task, directory, training, start(c, n), update, window=c.window, project=bounded).items():
        weights = z.get("weights", np.ones(n, np.float32))
        if "rater" in z:
            weights = weights * np.asarray(rated(jnp.asarray(arrays["features"]), jnp.asarray(z["rater"])))
        found.append(Learnt(step, weights, dict(zip(names, z["rater"].tolist(), strict=True)) if names else {}))
    return found


def _bounded(z: dict[str, Any], most: float) -> dict[str, Any]:
    return {name: updates.box(0, most)(value) if name == "weights" else value for name, value in z.items()}


def _descended(
    task: Prepared, directory: RunDirectory, training: Any, start: Any, update: Any, **options: Any
) -> dict[int, dict[str, np.ndarray]]:
    """Metaparameters after each quarter of the meta-steps, by meta-step; files keep them."""
    c, trainer = task.config, task.trainer
    descent = descend(
        training, trainer.objective(task.target, c.objective), start, update, c.meta_steps, seeds=c.seeds,
        held_out=trainer.objective(task.held_out, c.objective), seed=c.seed, out=directory.path, **options,
    )  # fmt: skip
    files = {-(-c.meta_steps * quarter // 4): directory / f"z-{quarter}.npz" for quarter in (1, 2, 3, 4)}

    def save(_: object = None) -> None:
        if descent.step in files and not files[descent.step].exists():
            replace_file(files[descent.step], partial(_save, descent))

    # Before the next meta-step too: a run that was killed between the two goes on here.
    save()
    follow(descent, c.meta_steps, "objective on the target", save)
    return {step: dict(np.load(file)) for step, file in files.items()}


def _save(descent: Descent, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            **{name: np.asarray(getattr(kind, "value", kind)) for name, kind in descent.z.items()},
        )


def _surrogate(task: Prepared) -> Any:
    c, trainer, arrays, n = task.config, task.trainer, task.arrays, len(task.pool)

    def surrogate(seed: int) -> CountSurrogate:
        order = np.random.default_rng((c.seed, 2, seed)).permutation(n).astype(np.int32)

        def counted(counts: np.ndarray) -> Training:
            return trainer.training(arrays, seed, rows=np.repeat(np.arange(n), counts))

        return CountSurrogate(counted, Candidates(arrays, order, c.recipe.batch), trainer.losses, at(c))

    return surrogate


def _features(task: Prepared, trials: Trials, seeds: Sequence[int]) -> np.ndarray:
    """What the rater goes by, of the models that CLIP-score filters score with."""
    scorers = list(zip(*(trials.scorers(seed, task.config.score_steps) for seed in seeds), strict=True))
    embeddings = [[(s.images, s.texts) for s in models] for models in scorers]
    targets = [task.trainer.embedded(s.state, task.target) for s in scorers[-1]]
    return features(task.pool, embeddings, targets, task.config.seed)
