"""Searches for a schedule: trainings under given learning rates, each done once and written down, and picks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np

from metagradient._train import fastest_company, train_many
from metagradient.data.images import Images
from metagradient.descent.journal import whole_lines
from metagradient.files import append_text
from metagradient.metaparameters import PerStep
from metagradient.progress import Progress
from metagradient.tasks.classifier import Classifier
from metagradient.tasks.directory import RunDirectory
from metagradient.training import Training
from metagradient.trees import PyTree

Criterion: TypeAlias = Literal["loss", "accuracy"]
_POINTS = 6  # of the curve of accuracy against compute: at all of a search, at a half of it, at a quarter, ...


@dataclass(frozen=True)
class Search:
    """A way to find a schedule: those it tried, in order, what each had cost by then, and how well it did.

    `surely` are numbers of schedules that are finalists whatever they scored.
    """

    rates: np.ndarray  # float32[n, T]
    costs: np.ndarray  # float[n], cumulative training runs
    scores: np.ndarray  # float[n, 2], loss and accuracy on validation, one seed each
    by: Criterion
    surely: tuple[int, ...] = ()

    def finalists(self, count: int) -> np.ndarray:
        """Numbers of `count` finalists: those that surely are, then the best, best first."""
        order = np.argsort(badness(self.scores, self.by), kind="stable").tolist()
        return np.array(list(dict.fromkeys([*self.surely, *order]))[:count])

    def by_compute(self) -> list[tuple[float, int]]:
        """What it would have picked with less compute: (training runs, number of the schedule) at halvings of all."""
        points = []
        for runs in self.costs[-1] / 2.0 ** np.arange(_POINTS)[::-1]:
            affordable = int(np.searchsorted(self.costs, runs, side="right"))
            if affordable:
                points.append((float(runs), int(np.argmin(badness(self.scores[:affordable], self.by)))))
        return points


def badness(scores: np.ndarray, by: Criterion) -> np.ndarray:
    """What picks, the lower the better, float[...]: of losses and accuracies, float[..., 2]."""
    return np.nan_to_num(scores[..., 0], nan=np.inf) if by == "loss" else -scores[..., 1]


class Trials:
    """Scores of trainings under learning-rate schedules: a line each in the run's `trainings.jsonl`.

    A line that is there already isn't trained again, so that a run that was cut off goes on.

    Arguments:
        classifier: what is trained.
        images: what it is trained on.
        measured_on: sets of images by name.
        directory: the run's.
        at_once: trainings in one vmapped program, where measuring shows that it pays.
        progress: gains a bar for every stage.
    """

    def __init__(
        self,
        classifier: Classifier,
        images: Images,
        measured_on: Mapping[str, Images],
        directory: RunDirectory,
        *,
        at_once: int,
        progress: Progress,
    ):
        self._classifier, self._images, self._at_once, self._progress = classifier, images, at_once, progress
        self._measured_on = {name: (found, classifier.mean_loss(found)) for name, found in measured_on.items()}
        self._path = directory / "trainings.jsonl"
        self._rows: dict[tuple[str, int, int], dict[str, Any]] = {}
        for row in whole_lines(self._path):
            self._remember(row)
        self._company: int | None = None

    def scores(self, stage: str, rates: np.ndarray, seed: int, on: str) -> np.ndarray:
        """Train under every schedule from one seed, and measure.

        Arguments:
            stage: what the trainings are for; with the seed and a schedule's number, it names a training.
            rates: float32[n, T], above 0.
            seed: of initial parameters and order.
            on: name of the images to measure on.

        Returns: loss and accuracy, float[n, 2]; the loss of a training that diverged is NaN.

        Cost: n trainings, less those done before.
        """
        missing = [i for i in range(len(rates)) if (stage, seed, i) not in self._rows]
        self._progress.expect(stage, len(missing))
        training = self._classifier.training(self._images.images, self._images.labels, seed)
        zs = [{"log_rate": PerStep(jnp.log(jnp.asarray(rates[i], jnp.float32)))} for i in missing]
        for first in range(0, len(missing), self._at_once):
            chunk = slice(first, first + self._at_once)
            start = perf_counter()
            found = [self._score(state, on) for state in self._trained(training, zs[chunk])]
            seconds = (perf_counter() - start) / len(found)
            for number, (loss, accuracy) in zip(missing[chunk], found, strict=True):
                row = {"stage": stage, "seed": seed, "number": number, "loss": loss, "accuracy": accuracy}
                self._remember(row | {"seconds": seconds})
                append_text(self._path, json.dumps(row | {"seconds": seconds}) + "\n")
            self._progress.tick(stage, len(found))
        rows = [self._rows[stage, seed, i] for i in range(len(rates))]
        return np.array([(row["loss"], row["accuracy"]) for row in rows])

    def seconds(self, stage: str | None = None) -> float:
        """Wall time of a stage, or of all, compilation and measuring included."""
        return sum(row["seconds"] for row in self._rows.values() if stage in (None, row["stage"]))

    def _remember(self, row: dict[str, Any]) -> None:
        self._rows[row["stage"], row["seed"], row["number"]] = row

    def _trained(self, training: Training, zs: Sequence[PyTree]) -> list[PyTree]:
        if self._company is None and len(zs) > 1:
            self._company = fastest_company(training, zs)
        return train_many(training, zs, at_once=self._company or 1)

    def _score(self, state: PyTree, on: str) -> tuple[float, float]:
        images, objective = self._measured_on[on]
        return float(objective(state, None)), self._classifier.accuracy(state, images)
