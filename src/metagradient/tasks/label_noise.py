"""Find mislabelled training examples, and train better in spite of them: the library's main job in small."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from sklearn.metrics import roc_auc_score

from metagradient._train import train
from metagradient.data.batches import EpochBatches
from metagradient.data.images import Images, load_cifar10, load_digits
from metagradient.descent import updates
from metagradient.descent.loop import Descent, descend
from metagradient.descent.seeds import fresh_seed
from metagradient.errors import ConfigError
from metagradient.files import write_text
from metagradient.metaparameters import PerExample
from metagradient.models import MLP, ResNet9
from metagradient.report.figures import least_trusted, lines, weights_by_group
from metagradient.report.page import Page, Section, Table, write
from metagradient.step.programs import hold
from metagradient.step.segment import Segment
from metagradient.tasks.directory import RunDirectory, free_directory
from metagradient.tasks.following import follow
from metagradient.tasks.means import with_error
from metagradient.tasks.pages import closing, say_report
from metagradient.training import Training, TrainState
from metagradient.trees import PyTree

# Least trusted examples that the report shows.
_SHOWN = 24


@dataclass(frozen=True)
class LabelNoise:
    """Find mislabelled examples with metagradients: learn a weight for each from a small clean set.

    Without --data: scikit-learn's 1,797 handwritten digits, a share of whose training labels is flipped. With it:
    CIFAR-10 and CIFAR-10N's human labels, as parquet files in that directory; --preset cifar10 has settings for it.
    """

    data: Path | None = None
    """directory with CIFAR-10 and CIFAR-10N in parquet; none takes the digits"""
    labels: str = "worse"
    """which of CIFAR-10N's human labels to train on"""
    shrink: int = 2
    """CIFAR-10 images are averaged down by this factor"""
    out: Path | None = None
    """directory of this run; none takes a free one under runs/"""
    seed: int = 0
    """seed of the split, the flips and the inner seeds"""
    flipped: float = 0.5
    """share of the digits' training labels to flip (human labels come with their own noise)"""
    examples: int = 1097
    """training examples"""
    target: int = 200
    """clean examples that the descent aims at"""
    held_out: int = 500
    """examples on which results are measured"""
    width: int = 64
    """width of the model's hidden layer, or of its first convolution"""
    steps: int = 200
    """training steps"""
    batch: int = 128
    """batch size"""
    learning_rate: float = 0.005
    """peak learning rate of an inner training (Adam, cosine decay)"""
    meta_steps: int = 16
    """meta-steps, each with a fresh seed"""
    rate: float = 0.3
    """root mean square of the weights' move in the first meta-step"""
    final_rate: float = 0.1
    """... and in the last"""
    momentum: float = 0.8
    """momentum of the descent"""
    seeds: int = 5
    """fresh seeds on which results are measured"""


@dataclass(frozen=True)
class _Arm:
    """What a model is trained on: examples, the labels taken for them, a weight for each, and which are used."""

    images: np.ndarray
    labels: np.ndarray
    weights: jax.Array
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class _Recipe:
    """How a model is trained: everything that arms and seeds have in common, so that all run the same programs."""

    config: LabelNoise
    model: MLP | ResNet9
    optimizer: optax.GradientTransformation
    loss: Callable[[PyTree, PyTree, PyTree, PyTree], tuple[jax.Array, PyTree]]

    def training(self, arm: _Arm, seed: int) -> Training:
        """The arm's training at one seed, of initial parameters and order."""
        data = {"x": arm.images, "y": arm.labels}
        c = self.config
        batches = EpochBatches(data, batch=c.batch, steps=c.steps, seed=seed, rows=arm.rows)
        init = self.model.init(jax.random.key(seed))
        training = Training.from_loss(self.loss, self.optimizer, init, batches, has_model_state=True)
        hold(self, training.programs)
        return training

    def logits(self, state: TrainState, images: np.ndarray) -> jax.Array:
        """What a trained model says of images, in evaluation mode."""
        return self.model.apply(state.params, state.model_state, jnp.asarray(images), train=False)[0]

    def accuracy(self, arm: _Arm, held_out: Images, segment: Segment | None) -> np.ndarray:
        """Accuracy on held-out images, for every fresh seed."""
        z = {"weights": PerExample(arm.weights)}

        def one(seed: int) -> float:
            state = train(self.training(arm, seed), z, segment=segment)
            return float((self.logits(state, held_out.images).argmax(-1) == held_out.labels).mean())

        return np.array([one(fresh_seed(self.config.seed, i)) for i in range(self.config.seeds)])


def run(config: LabelNoise, *, resume: bool = False) -> dict[str, float]:
    """Run the task, print what was learnt, and fill the run's directory.

    Arguments:
        resume: go on with the run that `config.out` holds.

    Returns: the figures in `result.json`: `auroc_flipped`, accuracies (means over fresh seeds), `seconds`,
        `training_runs`.

    Errors: `ConfigError` for sizes that the data can't meet; `DataError` for files that can't be read.

    Cost: `meta_steps` metagradients and 5 x `seeds` trainings; about a minute for the digits on two cores.
    """
    start = perf_counter()
    pool, target, held_out = _split(config)
    directory = RunDirectory.begin(config.out or free_directory("demo"), config, "demo", resume=resume)
    seconds_before = sum(t["seconds"] for t in directory.timings)
    assert pool.observed is not None
    wrong = pool.observed != pool.labels
    recipe = _recipe(config, pool)
    noisy = _Arm(pool.images, pool.observed, jnp.ones(len(pool)))
    descent = _descend(recipe, noisy, target, held_out, directory)
    weights = np.asarray(descent.z["weights"].value)
    size = int(np.clip(round(weights.sum() ** 2 / (weights**2).sum()), config.batch, len(pool)))
    subset = np.random.default_rng((config.seed, 2)).choice(len(pool), size, replace=False)
    arms = {
        "all": noisy,
        "random": _Arm(pool.images, pool.observed, jnp.ones(len(pool)), subset),
        "target": _Arm(target.images, target.labels, jnp.ones(len(target))),
        "mgd": _Arm(pool.images, pool.observed, jnp.asarray(weights)),
        "clean": _Arm(pool.images, pool.labels, jnp.ones(len(pool))),
    }
    accuracies = {name: recipe.accuracy(arm, held_out, descent.segment) for name, arm in arms.items()}
    result = {
        "auroc_flipped": float(roc_auc_score(wrong, -weights)),
        **{f"accuracy_{name}": float(values.mean()) for name, values in accuracies.items()},
        "seconds": seconds_before + perf_counter() - start,
        "training_runs": sum(t["training_runs"] for t in directory.timings),
        "examples": len(pool),
        "share_flipped": float(wrong.mean()),
        "random_subset": size,
    }
    lowest = np.argsort(weights, kind="stable")[:_SHOWN]
    np.savez(
        directory / "weights.npz",
        weights=weights,
        given=pool.observed,
        true=pool.labels,
        lowest=lowest,
        lowest_images=pool.images[lowest],
        classes=np.array(pool.classes),
    )
    write_text(directory / "accuracies.json", json.dumps({name: a.tolist() for name, a in accuracies.items()}) + "\n")
    directory.result(result)
    write(page(directory), directory / "report.html")
    _print(directory)
    return result


def _split(config: LabelNoise) -> tuple[Images, Images, Images]:
    """Training pool (with wrong labels as `observed`), clean target, and held-out images."""
    wanted = config.examples + config.target + config.held_out
    everything = load_cifar10(config.data, config.labels, limit=wanted) if config.data else load_digits()
    if wanted > len(everything):
        raise ConfigError(f"examples + target + held_out is {wanted}, but there are only {len(everything)} images")
    if min(config.examples, config.target) < config.batch:
        raise ConfigError(f"examples and target must hold at least a batch of {config.batch}")
    if config.data:
        everything = everything.shrunk(config.shrink)
    rng = np.random.default_rng((config.seed, 1))
    order = rng.permutation(len(everything))
    target, held_out, pool = np.split(order[:wanted], [config.target, config.target + config.held_out])
    if not config.data:
        everything = _flipped(everything, config.flipped, rng)
    return everything.take(pool), everything.take(target), everything.take(held_out)


def _flipped(images: Images, share: float, rng: np.random.Generator) -> Images:
    n, classes = len(images), len(images.classes)
    flip = rng.random(n) < share
    observed = np.where(flip, (images.labels + rng.integers(1, classes, n)) % classes, images.labels)
    return Images(images.images, images.labels, observed.astype(np.int32), images.classes)


def _recipe(config: LabelNoise, pool: Images) -> _Recipe:
    classes, (*_, channels) = len(pool.classes), pool.images.shape
    if config.data:
        widths = (config.width, 2 * config.width, 4 * config.width)
        model = ResNet9.smooth(classes=classes, channels=channels, widths=widths, pool_stem=True)
    else:
        model = MLP(sizes=(int(np.prod(pool.images.shape[1:])), config.width, classes))
    optimizer = optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps), eps_root=1e-8)

    def loss(params: PyTree, model_state: PyTree, batch: PyTree, z: PyTree) -> tuple[jax.Array, PyTree]:
        logits, model_state = model.apply(params, model_state, batch["x"], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
        return jnp.mean(z["weights"] * losses), model_state

    return _Recipe(config, model, optimizer, loss)


def _descend(recipe: _Recipe, noisy: _Arm, target: Images, held_out: Images, directory: RunDirectory) -> Descent:
    config = recipe.config

    def mean_loss(state: TrainState, images: Images) -> jax.Array:
        logits = recipe.logits(state, images.images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, images.labels).mean()

    rate = optax.linear_schedule(config.rate, config.final_rate, max(1, config.meta_steps - 1))
    descent = descend(
        lambda seed: recipe.training(noisy, seed),
        lambda state, z: mean_loss(state, target),
        {"weights": PerExample(noisy.weights)},
        updates.normalised(rate, config.momentum),
        config.meta_steps,
        project=updates.box(0, 1),
        held_out=lambda state, z: mean_loss(state, held_out),
        seed=config.seed,
        out=directory.path,
    )
    follow(descent, config.meta_steps, "loss on clean target")
    return descent


_NAMES = {
    "all": "all examples as labelled",
    "random": "a random subset of the same size",
    "target": "the clean target set alone",
    "mgd": "the metagradient's weights",
    "clean": "true labels (upper bound)",
}


def _arms(directory: RunDirectory) -> Table:
    accuracies = json.loads((directory / "accuracies.json").read_text())
    rows = [(_NAMES[name], with_error(values, ".1%")) for name, values in accuracies.items()]
    return Table(("trained on", "held-out accuracy"), rows, "Mean ± standard error over fresh seeds.", emphasis=3)


def _print(directory: RunDirectory) -> None:
    console, result = Console(), _figures(directory)
    console.print(_arms(directory).printed())
    console.print(
        f"AUROC of wrong labels by weight: {result['auroc_flipped']:.3f}   "
        f"compute: {result['training_runs']:.0f} training runs' worth, {result['seconds']:.0f} s in all"
    )
    say_report(directory)


def page(directory: RunDirectory) -> Page:
    """The report of a finished run, of its files alone."""
    config, result, records = directory.config, _figures(directory), directory.records
    with np.load(directory / "weights.npz") as stored:
        learnt = dict(stored)
    weights, given, true, lowest = (learnt[name] for name in ("weights", "given", "true", "lowest"))
    images = "images of CIFAR-10 with human labels" if "data" in config else "handwritten digits"
    losses = {"clean target": [r["value"] for r in records], "held out": [r["held_out"] for r in records]}
    summary = (
        f"{len(weights)} {images}, {result['share_flipped']:.0%} of them with a wrong label. A weight for each was "
        f"learnt by differentiating whole training runs: in {len(records)} meta-steps, each with a fresh seed, weights "
        f"moved so that a model trained with them does better on {config['target']} clean examples.\n\n"
        f"A model trained on everything reaches {result['accuracy_all']:.1%} on held-out images, one trained with the "
        f"learnt weights {result['accuracy_mgd']:.1%}, one with all labels corrected {result['accuracy_clean']:.1%}."
    )
    return Page(
        "Which labels are wrong?",
        summary,
        [
            Section(
                "What was learnt",
                "Each row trains the same model in the same way; means over seeds that the descent never saw.",
                _arms(directory),
            ),
            Section(
                "Which examples it trusts",
                "A weight near zero says: training on this example hurts. No true label of these was ever shown.",
                figures=(
                    weights_by_group(weights, given != true),
                    least_trusted(
                        learnt["lowest_images"],
                        weights[lowest],
                        given[lowest],
                        true[lowest],
                        learnt["classes"].tolist(),
                        _SHOWN,
                    ),
                ),
            ),
            Section(
                "How it got there",
                "The loss of the trained model, at the weights of each meta-step.",
                figures=(lines(losses, x="meta-step", y="loss", caption="Loss per meta-step, each on a fresh seed."),),
            ),
            *closing(
                directory,
                f"{result['training_runs']:.0f} training runs' worth of compute in the descent, counted in matrix "
                f"products; {result['seconds']:.0f} seconds in all, compilation and evaluation included.",
            ),
        ],
        [
            (f"{result['auroc_flipped']:.3f}", "AUROC of wrong labels"),
            (f"{result['accuracy_all']:.1%} → {result['accuracy_mgd']:.1%}", "held-out accuracy"),
            (f"{result['training_runs']:.0f}", "training runs' worth of compute"),
        ],
    )


def _figures(directory: RunDirectory) -> dict[str, float]:
    assert directory.figures is not None
    return directory.figures
