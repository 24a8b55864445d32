"""Clean a labelled set: learn a weight for every example, and hold training with them against what others would do."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from sklearn.metrics import roc_auc_score

from metagradient._train import train
from metagradient.data.images import Images, load_cifar10
from metagradient.descent import updates
from metagradient.descent.loop import Descent, descend
from metagradient.descent.seeds import fresh_seed
from metagradient.errors import ConfigError
from metagradient.files import write_text
from metagradient.metaparameters import PerExample
from metagradient.report.page import write
from metagradient.step.segment import SINGLE_STEPS
from metagradient.tasks.classifier import Classifier, Recipe
from metagradient.tasks.directory import RunDirectory, free_directory
from metagradient.tasks.following import follow
from metagradient.tasks.label_filters import cleanlab, confident_learning, gradient_cosine, small_loss
from metagradient.tasks.means import standard_error
from metagradient.tasks.noisy_labels_page import ACCURACIES, WEIGHTS, arms_table, page
from metagradient.tasks.pages import say_report
from metagradient.training import Training, TrainState

NAME = "select-labels"


@dataclass(frozen=True)
class NoisyLabels:
    """Clean a labelled set: learn how much to trust each example from a small clean set, and train with that.

    Images as parquet files with human labels (CIFAR-10 and CIFAR-10N) in --data.
    """

    data: Path | None = None
    """directory with images and human labels in parquet"""
    labels: str = "worse"
    """which human labels to train on"""
    shrink: int = 2
    """images are averaged down by this factor"""
    out: Path | None = None
    """directory of this run; none takes a free one under runs/"""
    seed: int = 0
    """seed of the split, of the inner seeds and of the fresh ones"""
    examples: int = 4000
    """training examples, with human labels"""
    target: int = 2000
    """clean examples that the descent aims at"""
    held_out: int = 2000
    """other clean examples, by which baselines choose how much to drop"""
    test: int = 10000
    """test images, on which results are measured"""
    recipe: Recipe = field(default_factory=Recipe)
    """how networks are trained"""
    meta_steps: int = 14
    """meta-steps, each with fresh seeds"""
    seeds: int = 1
    """inner seeds a meta-step"""
    rate: float = 0.3
    """root mean square of the weights' move in the first meta-step"""
    final_rate: float = 0.05
    """... and in the last"""
    momentum: float = 0.8
    """momentum of the descent"""
    most: float = 2.0
    """the highest weight that an example may have; it starts at 1"""
    shares: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """shares of the examples that a baseline may keep; held-out loss chooses"""
    fresh: int = 3
    """fresh seeds on which results are measured"""


@dataclass(frozen=True)
class Arm:
    """What a network is trained on.

    Arguments:
        labels: int32[n + m], those taken for the pool's n examples and the target's m.
        weights: float32[n + m].
        rows: int[k], which of them are used.
    """

    labels: np.ndarray
    weights: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Prepared:
    """The images, and how networks are trained on them.

    Arguments:
        pool: training examples, with human labels as `observed`.
        target, held_out, test: clean images: the descent's aim, those that choose, those that are reported.
    """

    config: NoisyLabels
    classifier: Classifier
    pool: Images
    target: Images
    held_out: Images
    test: Images

    @property
    def images(self) -> np.ndarray:
        """Pool and target images, one behind the other: every arm trains on some of them, by the same programs."""
        return np.concatenate([self.pool.images, self.target.images])

    def arm(self, rows: Any = None, *, weights: Any = None, target: bool = False, true: bool = False) -> Arm:
        """The pool as labelled by humans, or what is asked for.

        Arguments:
            rows: of the pool, int[k] or bool[n]; None takes all.
            weights: float[n] of the pool; None takes 1.
            target: the target images too, at weight 1.
            true: the pool's true labels.
        """
        n, m = len(self.pool), len(self.target)
        assert self.pool.observed is not None
        labels = np.concatenate([self.pool.labels if true else self.pool.observed, self.target.labels])
        used = np.arange(n) if rows is None else np.arange(n)[rows]
        used = np.concatenate([used, np.arange(n, n + m)]) if target else used
        given = np.ones(n) if weights is None else np.asarray(weights)
        return Arm(labels, np.concatenate([given, np.ones(m)]).astype(np.float32), used)

    def trained(self, arm: Arm, seed: int) -> TrainState:
        """The final state of a training on an arm."""
        training = self.classifier.training(self.images, arm.labels, seed, rows=arm.rows)
        return train(training, {"weights": PerExample(jnp.asarray(arm.weights))}, segment=SINGLE_STEPS)


def run(config: NoisyLabels, *, resume: bool = False) -> dict[str, float]:
    """Learn weights, train with them and on every baseline's choice, and fill the run's directory.

    Arguments:
        resume: go on with the run that `config.out` holds.

    Returns: the figures in `result.json`: `accuracy_ARM` and `error_ARM` (mean over fresh seeds, its standard error),
        `auroc_RANKING` of wrong labels, `kept_ARM` (share of examples that a filter kept), `way` (of MGD from all
        examples as labelled to all with true labels), `training_runs`, `seconds`.

    Errors: `ConfigError` for sizes that the data can't meet, and where cleanlab is not installed; `DataError` for files
        that can't be read.

    Cost: `meta_steps` x `seeds` metagradients, and about 17 + 10 `fresh` trainings.
    """
    start = perf_counter()
    cleanlab()
    task = prepare(config)
    directory = RunDirectory.begin(config.out or free_directory(NAME), config, NAME, resume=resume)
    seconds_before = sum(t["seconds"] for t in directory.timings)
    weights = np.asarray(_descend(task, directory).z["weights"].value)
    arms, rankings, kept = _baselines(task)
    arms |= {"mgd": task.arm(weights=weights), "mgd_target": task.arm(weights=weights, target=True)}
    seeds = [fresh_seed(config.seed, i) for i in range(config.fresh)]
    accuracies = {
        name: [task.classifier.accuracy(task.trained(arm, seed), task.test) for seed in seeds]
        for name, arm in arms.items()
    }
    assert task.pool.observed is not None
    wrong = task.pool.observed != task.pool.labels
    result = {
        **figures(accuracies),
        **{
            f"auroc_{name}": float(roc_auc_score(wrong, -score)) for name, score in {**rankings, "mgd": weights}.items()
        },
        **{f"kept_{name}": share for name, share in kept.items()},
        "share_wrong": float(wrong.mean()),
        "examples": len(wrong),
        "training_runs": sum(t["training_runs"] for t in directory.timings),
        "seconds": seconds_before + perf_counter() - start,
    }
    lowest = np.argsort(weights, kind="stable")[:24]
    np.savez(
        directory / WEIGHTS, weights=weights, given=task.pool.observed, true=task.pool.labels, lowest=lowest,
        lowest_images=task.pool.images[lowest], classes=np.array(task.pool.classes),
    )  # fmt: skip
    write_text(directory / ACCURACIES, json.dumps(accuracies) + "\n")
    directory.result(result)
    write(page(directory), directory / "report.html")
    Console().print(arms_table(directory).printed())
    say_report(directory)
    return result


def prepare(config: NoisyLabels) -> Prepared:
    """The images and the classifier of a configuration. `ConfigError` and `DataError` as in `run`."""
    c = config
    if c.data is None:
        raise ConfigError("select --task labels needs --data, a directory of images with human labels")
    if min(c.examples, c.target, c.held_out, c.test, c.meta_steps, c.seeds, c.fresh) < 1:
        raise ConfigError("examples, target, held_out, test, meta_steps, seeds and fresh must be at least 1")
    if not c.shares or min(c.shares) <= 0 or max(c.shares) > 1:
        raise ConfigError(f"shares must be in (0, 1], and at least one, got {c.shares}")
    if min(min(c.shares) * c.examples, c.target) < c.recipe.batch:
        raise ConfigError(f"the target, and the lowest share of the examples, must hold a batch of {c.recipe.batch}")
    sizes = [c.examples, c.target, c.held_out]
    everything = load_cifar10(c.data, c.labels, limit=sum(sizes)).shrunk(c.shrink)
    test = load_cifar10(c.data, None, split="test", limit=c.test).shrunk(c.shrink)
    order = np.random.default_rng((c.seed, 1)).permutation(len(everything))
    pool, target, held_out = (everything.take(rows) for rows in np.split(order, np.cumsum(sizes)[:-1]))
    classifier = Classifier(c.recipe, len(pool.classes), pool.images.shape[-1])
    return Prepared(c, classifier, *(classifier.fitted(images) for images in (pool, target, held_out, test)))


def _descend(task: Prepared, directory: RunDirectory) -> Descent:
    c, pool = task.config, task.pool
    assert pool.observed is not None
    labels = pool.observed

    def training(seed: int) -> Training:
        return task.classifier.training(pool.images, labels, seed)

    descent = descend(
        training,
        task.classifier.mean_loss(task.target),
        {"weights": PerExample(jnp.ones(len(pool)))},
        updates.normalised(optax.linear_schedule(c.rate, c.final_rate, max(1, c.meta_steps - 1)), c.momentum),
        c.meta_steps,
        seeds=c.seeds,
        project=updates.box(0, c.most),
        held_out=task.classifier.mean_loss(task.held_out),
        seed=c.seed,
        out=directory.path,
    )
    follow(descent, c.meta_steps, "loss on clean target")
    return descent


def _baselines(task: Prepared) -> tuple[dict[str, Arm], dict[str, np.ndarray], dict[str, float]]:
    """Arms by name; scores by which examples are trusted; and the share of them that each filter kept."""
    c, classifier, pool, n = task.config, task.classifier, task.pool, len(task.pool)
    assert pool.observed is not None
    # The seeds of what is only chosen by: not among the `fresh` ones that are reported.
    choosing, folding = (fresh_seed(c.seed, 1000 + i) for i in range(2))
    state = task.trained(task.arm(), choosing)
    sure, quality = confident_learning(classifier, lambda rows: task.trained(task.arm(rows), folding), pool, c.seed)
    rankings = {
        "small_loss": small_loss(classifier, state, pool),
        "cosine": gradient_cosine(classifier, state, pool, task.target),
        "cleanlab": quality,
    }
    held_out = classifier.mean_loss(task.held_out)
    arms, kept = {}, {}
    for name in ("small_loss", "cosine"):
        order = np.argsort(-rankings[name], kind="stable")
        tried = [np.sort(order[: round(share * n)]) for share in c.shares]
        losses = [float(held_out(task.trained(task.arm(rows), choosing), None)) for rows in tried]
        arms[name] = task.arm(tried[int(np.argmin(losses))])
        kept[name] = c.shares[int(np.argmin(losses))]
    kept["cleanlab"] = float(sure.mean())
    if sure.sum() < c.recipe.batch:
        raise ConfigError(f"confident learning keeps {sure.sum()} examples, fewer than a batch of {c.recipe.batch}")
    half = np.random.default_rng((c.seed, 2)).choice(n, max(c.recipe.batch, round(sure.mean() * n)), replace=False)
    right = pool.observed == pool.labels
    ordered = {
        "all": task.arm(),
        "random": task.arm(np.sort(half)),
        **arms,
        "cleanlab": task.arm(sure),
        "target": replace(task.arm(target=True), rows=np.arange(n, n + len(task.target))),
        "all_target": task.arm(target=True),
        "right": task.arm(right),
        "clean": task.arm(true=True),
        "clean_target": task.arm(true=True, target=True),
    }
    return ordered, rankings, kept


def figures(accuracies: Mapping[str, list[float]]) -> dict[str, float]:
    """Flat figures of accuracies by arm, a fresh seed each: see `run`."""
    means = {name: float(np.mean(values)) for name, values in accuracies.items()}
    return {
        **{f"accuracy_{name}": mean for name, mean in means.items()},
        **{f"error_{name}": standard_error(values) for name, values in accuracies.items()},
        "way": (means["mgd"] - means["all"]) / (means["clean"] - means["all"]),
    }
