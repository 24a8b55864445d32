"""How robust is a training pipeline to poisoned data? Attack it with metagradients, and measure.

A share of the training images may be changed, pixels only, labels untouched. Metagradient ascent finds the pixels
that most raise the trained network's loss on clean images; gradient canceling, flipped labels and random pixels in the
same images are measured beside it. All images come from files that the user names, or from scikit-learn.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from metagradient._train import train
from metagradient.data.images import Images, load_digits, load_images
from metagradient.descent import updates
from metagradient.descent.loop import descend
from metagradient.descent.seeds import fresh_seed
from metagradient.errors import ConfigError, DataError
from metagradient.metaparameters import PerExample
from metagradient.report.page import write
from metagradient.step.segment import SINGLE_STEPS
from metagradient.tasks.classifier import ROUGH, Classifier, Recipe
from metagradient.tasks.directory import RunDirectory, free_directory
from metagradient.tasks.following import follow
from metagradient.tasks.gradient_canceling import cancel, corrupted, summed_gradient
from metagradient.tasks.means import standard_error
from metagradient.tasks.pages import say_report
from metagradient.tasks.poisoning_report import ARMS, PLACES, POISONS, drops, page
from metagradient.training import Training, TrainState


@dataclass(frozen=True)
class Poison:
    """Measure how much a share of poisoned training images can harm a trained classifier.

    Pixels of the chosen images are moved, within [0, 1] and without touching labels, so that a network trained on them
    does worse on clean images. Without --data: scikit-learn's 1,797 handwritten digits. With it: any directory of
    images in Parquet (columns img or image, and label), with a train and a test split.
    """

    data: Path | None = None
    """directory of images in parquet; none takes the digits"""
    shrink: int = 1
    """images are averaged down by this factor"""
    out: Path | None = None
    """directory of this run; none takes a free one under runs/"""
    seed: int = 0
    """seed of the split, of the chosen images, and of the attacked run"""
    examples: int = 900
    """training examples"""
    share: float = 0.025
    """share of them that is poisoned"""
    target: int = 400
    """clean images whose loss the attack raises"""
    held_out: int = 200
    """other clean images, which choose among the meta-steps"""
    test: int = 297
    """test images, on which results are measured"""
    recipe: Recipe = field(default_factory=lambda: Recipe(batch=100, steps=60))
    """how the attacked network is trained"""
    standard_rate: float = 0.1
    """peak learning rate of the standard recipe (ReLU, norm after it, max pooling), to which the poison is carried"""
    seeds: int = 0
    """inner seeds a meta-step, fresh each time; 0 attacks one run, at one fixed seed"""
    window: int | None = None
    """differentiate the last steps of a training only; none takes all of them"""
    meta_steps: int = 10
    """meta-steps"""
    rate: float = 0.12
    """move of every poisoned pixel in the first meta-step"""
    final_rate: float = 0.05
    """... and in the last"""
    momentum: float = 0.0
    """momentum of the ascent, on normalised metagradients"""
    corruptions: tuple[float, ...] = (0.05, 0.1, 0.2)
    """gradient canceling: how far its target parameters are from the trained ones, as shares of their norm; the one
    that harms held-out images most counts"""
    cancel_steps: int = 300
    """gradient canceling: steps for each of them"""
    cancel_rate: float = 0.03
    """gradient canceling: first learning rate, in pixel values"""
    fresh: int = 3
    """fresh seeds on which results are measured"""


@dataclass(frozen=True)
class Prepared:
    """The images, and who may change what.

    Arguments:
        pool, target, held_out, test: training images; those attacked; those that choose; those reported.
        rows: int[m], which training images are poisoned, ascending.
        ids: int[n], where each training image lies in the user's training split.
        inside: float32[height, width, channels], the highest value of every pixel: 1, or 0 in a padded border.
    """

    config: Poison
    classifier: Classifier
    pool: Images
    target: Images
    held_out: Images
    test: Images
    rows: np.ndarray
    ids: np.ndarray
    inside: np.ndarray

    @property
    def chosen(self) -> Images:
        """The images to be poisoned, as they are."""
        return self.pool.take(self.rows)

    def with_images(self, images: np.ndarray) -> Images:
        """The training images with others, float32[m, ...], in the chosen rows; labels stay."""
        everything = self.pool.images.copy()
        everything[self.rows] = images
        return replace(self.pool, images=everything)


@dataclass(frozen=True)
class Trained:
    """What a training came to on the test images.

    Arguments:
        arm, place, seed: what was trained where, from which seed.
        loss: mean cross-entropy.
        right: bool[n], which images it names rightly.
    """

    arm: str
    place: str
    seed: int
    loss: float
    right: np.ndarray


def run(config: Poison, *, resume: bool = False) -> dict[str, float]:
    """Run the attack and its baselines, measure them, and fill the run's directory.

    Arguments:
        resume: go on with the run that `config.out` holds.

    Returns: the figures in `result.json`. For every arm (`metagradient`, `canceling`, `flips`, `noise`) and place
        (`attacked`, `fresh`, `standard`): `drop_ARM_PLACE`, in points of accuracy against the clean training at the
        same seed, `error_ARM_PLACE`, its standard error, `accuracy_ARM_PLACE`, `loss_ARM_PLACE`; then `training_runs`,
        `cancel_training_runs`, `seconds`.

    Errors: `ConfigError` for sizes that the data can't meet; `DataError` for files that can't be read.

    Cost: `meta_steps` metagradients for each inner seed, gradient canceling, and 5 (1 + 2 `fresh`) trainings.
    """
    start = perf_counter()
    task = prepare(config)
    directory = RunDirectory.begin(config.out or free_directory("poison"), config, "poison", resume=resume)
    seconds_before = sum(t["seconds"] for t in directory.timings)
    poisoned = _attack(task, directory)
    cancelled, share, left = _canceled(task)
    chosen = task.chosen
    arms = {
        "clean": task.pool,
        "metagradient": task.with_images(poisoned),
        "canceling": task.with_images(cancelled),
        "flips": _flipped(task),
        "noise": task.with_images(_noise(task)),
    }
    trained = _measured(task, arms)
    result = {
        **figures(trained),
        "poisoned": len(task.rows),
        "corruption": share,
        "gradient_left": float(left[-1]),
        "training_runs": sum(t["training_runs"] for t in directory.timings),
        "cancel_training_runs": _cancel_training_runs(config, len(task.rows)),
        "seconds": seconds_before + perf_counter() - start,
    }
    np.savez(
        directory / POISONS, rows=task.ids[task.rows], images=poisoned, clean=chosen.images, labels=chosen.labels,
        canceling=cancelled, gradient_left=left, classes=np.array(task.pool.classes),
    )  # fmt: skip
    directory.result(result)
    write(page(directory), directory / "report.html")
    _print(result, directory)
    return result


def prepare(config: Poison) -> Prepared:
    """The images and the classifier of a configuration. `ConfigError` and `DataError` as in `run`."""
    c, r = config, config.recipe
    if min(c.examples, c.target, c.held_out, c.test, c.meta_steps, c.cancel_steps, c.fresh) < 1 or c.seeds < 0:
        raise ConfigError("examples, target, held_out, test, meta_steps, cancel_steps and fresh must be at least 1")
    if not c.corruptions or min(c.corruptions) <= 0:
        raise ConfigError(f"corruptions must be positive, and at least one, got {c.corruptions}")
    poisoned = round(c.share * c.examples)
    if not 1 <= poisoned <= c.examples:
        raise ConfigError(f"a share of {c.share} of {c.examples} examples is {poisoned} images to poison")
    if c.examples < r.batch:
        raise ConfigError(f"examples must hold at least a batch of {r.batch}")
    (pool, target, held_out, test), ids = _images(c)
    classifier = Classifier(r, len(pool.classes), pool.images.shape[-1])
    rows = np.random.default_rng((c.seed, 3)).choice(c.examples, poisoned, replace=False)
    inside = classifier.fitted(replace(pool.take([0]), images=np.ones_like(pool.images[:1]))).images[0]
    fitted = [classifier.fitted(images) for images in (pool, target, held_out, test)]
    return Prepared(c, classifier, *fitted, rows=np.sort(rows), ids=ids, inside=inside)


def _images(config: Poison) -> tuple[tuple[Images, Images, Images, Images], np.ndarray]:
    """Training pool, target, held-out and test images, and where those of the pool lie in the training split."""
    c = config
    sizes = [c.examples, c.target, c.held_out]
    if c.data:
        everything = load_images(c.data, limit=sum(sizes)).shrunk(c.shrink)
        test = load_images(c.data, "test", limit=c.test).shrunk(c.shrink)
        if test.images.shape[1:] != everything.images.shape[1:]:
            raise DataError(f"{c.data}: test images are not of the size and channels of training images")
    else:
        everything, test = load_digits().shrunk(c.shrink), None
        sizes.append(c.test)
    if sum(sizes) > len(everything):
        raise ConfigError(
            f"examples, target, held_out and test are {sum(sizes)}, but there are {len(everything)} images"
        )
    order = np.random.default_rng((c.seed, 1)).permutation(len(everything))[: sum(sizes)]
    pool, target, held_out, *rest = (everything.take(rows) for rows in np.split(order, np.cumsum(sizes)[:-1]))
    return (pool, target, held_out, test or rest[0]), order[: c.examples]


def project(pixels: PerExample, images: np.ndarray, inside: np.ndarray) -> PerExample:
    """Changes of pixels, cut so that every changed image stays in its box.

    Arguments:
        pixels: changes, float32[m, height, width, channels].
        images: what they are added to, of the same shape.
        inside: float32[height, width, channels], the highest value of every pixel.
    """
    value = jnp.clip(images + pixels.value, 0, inside) - images
    return PerExample(value, rows=pixels.rows)


def signs(rate: optax.Schedule, momentum: float) -> optax.GradientTransformation:
    """Steps along the sign of metagradients with momentum: each pixel moves by `rate`, in units of pixel values."""
    return optax.chain(updates.normalise(), optax.trace(momentum), updates.sign(rate))


def _attack(task: Prepared, directory: RunDirectory) -> np.ndarray:
    """The poisoned images, float32[m, ...].

    At a fixed seed those of the highest held-out loss, which is then of one and the same run; where seeds vary, those
    of the last meta-step.
    """
    c, images = task.config, task.chosen.images

    def training(seed: int) -> Training:
        return task.classifier.training(task.pool.images, task.pool.labels, seed)

    descent = descend(
        training if c.seeds else training(c.seed),
        task.classifier.mean_loss(task.target),
        {"pixels": PerExample(jnp.zeros_like(images), rows=task.rows)},
        signs(optax.linear_schedule(c.rate, c.final_rate, max(1, c.meta_steps - 1)), c.momentum),
        c.meta_steps,
        seeds=max(1, c.seeds),
        project=lambda z: {"pixels": project(z["pixels"], images, task.inside)},
        held_out=task.classifier.mean_loss(task.held_out),
        maximise=True,
        seed=c.seed,
        out=directory.path,
        window=c.window,
    )
    follow(descent, c.meta_steps, "loss on the target")
    z = descent.z if c.seeds or descent.best is None else descent.best.z
    return np.clip(images + np.asarray(z["pixels"].value), 0, task.inside)


def _canceled(task: Prepared) -> tuple[np.ndarray, float, np.ndarray]:
    """Gradient canceling: images, how far its target parameters are, and what was left of the gradient."""
    c, classifier, chosen = task.config, task.classifier, task.chosen
    clean = task.pool.take(np.delete(np.arange(len(task.pool)), task.rows))
    state = _train(classifier, task.pool, c.seed)
    found = []
    for share in c.corruptions:
        aim = corrupted(classifier, state, task.pool.images, task.pool.labels, share)
        gradient = summed_gradient(classifier, aim, clean.images, clean.labels)
        images, left = cancel(
            classifier, aim, gradient, chosen.images, chosen.labels, task.inside,
            steps=c.cancel_steps, rate=c.cancel_rate,
        )  # fmt: skip
        harmed = _train(classifier, task.with_images(images), c.seed)
        found.append(
            (_loss(classifier.scores(harmed, task.held_out.images), task.held_out.labels), images, share, left)
        )
    _, images, share, left = max(found, key=lambda f: f[0])
    return images, share, left


def _cancel_training_runs(config: Poison, images: int) -> float:
    """Compute of gradient canceling in plain training runs: a step of it counts as four on as many images."""
    a_step = 4 * images / (config.recipe.batch * config.recipe.steps)
    return 1 + len(config.corruptions) * (1 + config.cancel_steps * a_step)


def _flipped(task: Prepared) -> Images:
    classes, labels = len(task.pool.classes), task.pool.labels.copy()
    moved = np.random.default_rng((task.config.seed, 4)).integers(1, classes, len(task.rows))
    labels[task.rows] = (labels[task.rows] + moved) % classes
    return replace(task.pool, labels=labels)


def _noise(task: Prepared) -> np.ndarray:
    rng = np.random.default_rng((task.config.seed, 5))
    return rng.random((len(task.rows), *task.inside.shape), np.float32) * task.inside


def _measured(task: Prepared, arms: Mapping[str, Images]) -> list[Trained]:
    """Every arm trained in every place."""
    c = task.config
    rough = replace(c.recipe, **ROUGH, learning_rate=c.standard_rate)
    standard = Classifier(rough, task.classifier.classes, task.classifier.channels)
    fresh = [fresh_seed(c.seed, i) for i in range(c.fresh)]
    runs = [("attacked", task.classifier, c.seed)]
    runs += [("fresh", task.classifier, seed) for seed in fresh] + [("standard", standard, seed) for seed in fresh]
    trained = []
    for place, classifier, seed in runs:
        for arm, images in arms.items():
            scores = classifier.scores(_train(classifier, images, seed), task.test.images)
            right = scores.argmax(-1) == task.test.labels
            trained.append(Trained(arm, place, seed, _loss(scores, task.test.labels), right))
    return trained


def figures(trained: list[Trained]) -> dict[str, float]:
    """Flat figures of trainings: see `run`.

    Standard errors are over seeds where there are several, else over test images, of paired differences.
    """
    found = {}
    for place in PLACES:
        there = {arm: [t for t in trained if (t.arm, t.place) == (arm, place)] for arm in ARMS}
        for arm, of_arm in there.items():
            found[f"accuracy_{arm}_{place}"] = float(np.mean([t.right.mean() for t in of_arm]))
            found[f"loss_{arm}_{place}"] = float(np.mean([t.loss for t in of_arm]))
            if arm == "clean":
                continue
            pairs = [100.0 * (a.right.astype(float) - b.right) for a, b in zip(there["clean"], of_arm, strict=True)]
            drops = np.array([p.mean() for p in pairs]) if len(pairs) > 1 else pairs[0]
            found[f"drop_{arm}_{place}"] = float(drops.mean())
            found[f"error_{arm}_{place}"] = standard_error(drops)
    return found


def _print(result: dict[str, float], directory: RunDirectory) -> None:
    Console().print(drops(result).printed())
    say_report(directory)


def _train(classifier: Classifier, images: Images, seed: int) -> TrainState:
    return train(classifier.training(images.images, images.labels, seed), {}, segment=SINGLE_STEPS)


def _loss(scores: np.ndarray, labels: np.ndarray) -> float:
    return float(optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean())
