"""Which training recipes have useful metagradients? Probe each, at the learning rate that suits it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from metagradient._train import train_many
from metagradient.data.images import Images, load_digits, load_images
from metagradient.descent import updates
from metagradient.descent.journal import RECORDS
from metagradient.descent.loop import descend
from metagradient.descent.seeds import fresh_seed
from metagradient.errors import ConfigError
from metagradient.files import write_text
from metagradient.metagrad import value_and_metagrad
from metagradient.metaparameters import PerExample, PerStep
from metagradient.report.page import Page, write
from metagradient.smoothness.directions import random_directions
from metagradient.smoothness.sweep import Candidate, Knobs, Outcome, Sweep, jointly, one_at_a_time, read_sweep, sweep
from metagradient.tasks.classifier import ROUGH, Classifier, Recipe, one_cycle
from metagradient.tasks.directory import RunDirectory, free_directory
from metagradient.tasks.pages import say_report
from metagradient.tasks.smoothness_page import Cut, compared, figures_of, printed, told
from metagradient.training import Training
from metagradient.trees import PyTree

_CUTS = "cuts.json"
_RANDOM_MOVES = 3


@dataclass(frozen=True)
class Choices:
    """Values that knobs of the recipe take beside its own; an empty tuple leaves a knob alone."""

    norm_before_activation: tuple[bool, ...] = (False,)
    """batch norm before the activation"""
    activation: tuple[str, ...] = ("relu",)
    """relu or gelu"""
    pooling: tuple[str, ...] = ("logsumexp", "max")
    """max, average or logsumexp"""
    final_scale: tuple[float, ...] = (0.125,)
    """factor of the logits"""
    width_multiplier: tuple[int, ...] = ()
    """factor of every width"""
    batch: tuple[int, ...] = ()
    """batch sizes; steps change so that as many images are seen"""
    momentum: tuple[float, ...] = ()
    """Nesterov's momentum, or Adam's first decay"""
    second_decay: tuple[float, ...] = ()
    """Adam's second decay"""
    eps_root: tuple[float, ...] = ()
    """inside Adam's root"""


@dataclass(frozen=True)
class SmoothnessProbe:
    """Probe training recipes for smoothness in their data weights, and show what it costs in accuracy.

    Every recipe is trained at a few learning rates, and probed at the one that suits it. Without --data: scikit-learn's
    1,797 handwritten digits. With it: any directory of labelled images in Parquet (CIFAR-10, MNIST, ...); --preset tiny
    has settings for it that take minutes, --preset paper the published ones.
    """

    data: Path | None = None
    """directory with train-*.parquet, and perhaps test-*.parquet; none takes the digits"""
    shrink: int = 1
    """average images of --data down by this factor"""
    out: Path | None = None
    """directory of this run; none takes a free one under runs/"""
    seed: int = 0
    """seed of the split, of trainings and of directions"""
    examples: int = 800
    """training images"""
    validation: int = 400
    """images that choose learning rates, and whose loss metagradients are of"""
    test: int = 500
    """images on which accuracy is measured, of the test files where there are any"""
    recipe: Recipe = field(default_factory=lambda: Recipe(widths=(8, 16), batch=100, steps=40))
    """the recipe to start from; its learning rate is replaced"""
    choices: Choices = field(default_factory=Choices)
    """what knobs to turn"""
    jointly: bool = False
    """all combinations of choices instead of one knob at a time"""
    standard: bool = True
    """probe the standard recipe too, and the standard recipe with one of its three knobs made smooth"""
    rates: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    """peak learning rates to choose from"""
    slack: float = 0.04
    """of them the lowest is taken whose validation loss is no more than this above the best"""
    directions: int = 3
    """directions of each kind: a random tenth of the examples, a random class"""
    step: tuple[float, ...] = (0.1,)
    """step sizes of the probe, in units of a data weight"""
    accuracy_seeds: int = 3
    """fresh seeds on which accuracy is measured"""
    gain_images: int = 20
    """training images whose pixels metagradient descent poisons, to measure what it gains; 0 leaves that out"""
    gain_steps: int = 2
    """meta-steps of that"""
    gain_rate: float = 0.12
    """move of every pixel in one of them"""
    gain_seeds: int = 1
    """seeds over which that is averaged"""
    cut_points: int = 9
    """points of a cut through the loss along the metagradient; 0 leaves cuts out"""
    cut_reach: float = 0.3
    """root mean square of the weights' move at a cut's ends"""

    def recipes(self) -> list[dict[str, Any]]:
        """Changes of the recipe to probe; the first is none."""
        choices = {k: v for k, v in asdict(self.choices).items() if v}
        if self.jointly:
            own = asdict(self.recipe)
            found = jointly({}, {k: [own[k], *(x for x in v if x != own[k])] for k, v in choices.items()})
        else:
            found = one_at_a_time({}, choices)
        if self.standard:
            repaired = [{k: v for k, v in ROUGH.items() if k != knob} for knob in ROUGH]
            found += [r for r in (ROUGH, *repaired) if r not in found]
        return found


@dataclass(frozen=True)
class Bench:
    """Images, and recipes made ready to be probed on them.

    Arguments:
        config: the settings.
        pool, validation, test: images.
    """

    config: SmoothnessProbe
    pool: Images
    validation: Images
    test: Images

    def classifier(self, knobs: Knobs) -> Classifier:
        """The recipe with some knobs turned. Another batch size sees as many images, in other steps."""
        base = self.config.recipe
        # From a file of outcomes, tuples come back as lists.
        recipe = replace(base, **{k: tuple(v) if isinstance(v, list) else v for k, v in knobs.items()})
        if "steps" not in knobs:
            recipe = replace(recipe, steps=max(1, base.steps * base.batch // recipe.batch))
        return Classifier(recipe, len(self.pool.classes), self.pool.images.shape[-1])

    def candidate(self, knobs: Knobs) -> Candidate:
        """What a sweep takes."""
        classifier = self.classifier(knobs)
        pool, validation, test = (classifier.fitted(x) for x in (self.pool, self.validation, self.test))
        objective = classifier.mean_loss(validation)

        def log_rate(rate: float) -> PerStep:
            r = classifier.recipe
            return PerStep(jnp.log(jnp.asarray(one_cycle(r.steps, rate, r.peak, r.start, r.end))))

        def z(rate: float) -> PyTree:
            return {"weights": PerExample(jnp.ones(len(pool))), "log_rate": log_rate(rate)}

        def gain(training: Training, rate: float) -> float:
            return self._gain(training, objective, pool, log_rate(rate))

        def directions(z: PyTree, seed: int) -> dict[str, list[PyTree]]:
            drawn = random_directions(
                {"weights": z["weights"]}, self.config.directions, groups=pool.labels.astype(np.int64), seed=seed
            )
            still = jax.tree.map(jnp.zeros_like, z["log_rate"])
            return {kind: [{**v, "log_rate": still} for v in drawn[kind]] for kind in ("examples", "groups")}

        return Candidate(
            training=lambda seed: classifier.training(pool.images, pool.labels, seed),
            z=z,
            objective=objective,
            accuracy=lambda state: classifier.accuracy(state, test),
            directions=directions,
            gain=gain if self.config.gain_images else None,
        )

    def _gain(self, training: Training, objective: Any, pool: Images, log_rate: PerStep) -> float:
        """What a few meta-steps of poisoning, of this one training, raise the validation loss by.

        Counted from the mean over the same moves with random signs: at a rough recipe's z any move changes the loss,
        and a rate that was chosen for a low loss there would count as a gain of the descent.
        """
        c, rng = self.config, np.random.default_rng((self.config.seed, 5))
        rows = np.sort(rng.choice(len(pool), c.gain_images, replace=False))
        chosen = jnp.asarray(pool.images[rows])
        z = {"pixels": PerExample(jnp.zeros_like(chosen), rows), "log_rate": log_rate}

        def only_pixels(update: PyTree, _: Any) -> PyTree:
            return {**update, "log_rate": jax.tree.map(jnp.zeros_like, update["log_rate"])}

        def in_range(z: PyTree) -> PyTree:
            moved = PerExample(jnp.clip(z["pixels"].value, -chosen, 1 - chosen), rows)
            return {**z, "pixels": moved}

        update = optax.chain(updates.sign(c.gain_rate), optax.stateless(only_pixels))
        descent = descend(training, objective, z, update, c.gain_steps, project=in_range, maximise=True)
        list(descent)
        moved = descent.z["pixels"].value
        drawn = [rng.choice([-1.0, 1.0], moved.shape).astype(np.float32) for _ in range(_RANDOM_MOVES)]
        randomly = [in_range({**z, "pixels": PerExample(moved * signs, rows)}) for signs in drawn]
        zs = [descent.z, *randomly]
        after, *others = (float(objective(s, None)) for s in train_many(training, zs, at_once=1))
        return after - float(np.mean(others))

    def cut(self, name: str, outcome: Outcome) -> Cut:
        """The validation loss along the metagradient, at the recipe's learning rate."""
        assert outcome.rate is not None
        candidate = self.candidate(outcome.knobs)
        training, z = candidate.training(self.config.seed), candidate.z(outcome.rate)
        _, grad = value_and_metagrad(training, candidate.objective)(z)
        g = grad["weights"].value
        # z - a g/|g|: a is a Euclidean norm, of which the reach is the part of one example.
        ends = self.config.cut_reach * len(g) ** 0.5
        places = np.linspace(-ends, ends, self.config.cut_points)
        unit = g / jnp.linalg.norm(g)
        zs = [{**z, "weights": PerExample(z["weights"].value - a * unit)} for a in places]
        states = train_many(training, zs, at_once=1)
        losses = [float(candidate.objective(state, None)) for state in states]
        return Cut(name, places.tolist(), losses, float(jnp.linalg.norm(g)))


def run(config: SmoothnessProbe, *, resume: bool = False) -> dict[str, Any]:
    """Run the task, print what was found, and fill the run's directory.

    Arguments:
        resume: go on with the run that `config.out` holds; recipes that were probed are not probed again.

    Returns: the figures in `result.json`.

    Errors: `ConfigError` for sizes that the data can't meet; `DataError` for files that can't be read.

    Cost: for each recipe, a training a learning rate and an accuracy seed, 1 + 4 x directions trainings a step size,
        for each of `gain_seeds` `gain_steps` metagradients and 4 trainings; then, for smooth and standard, a
        metagradient and a cut's trainings.
    """
    start = perf_counter()
    console = Console()
    bench = load(config)
    directory = RunDirectory.begin(config.out or free_directory("smoothness"), config, "smoothness", resume=resume)
    found = probe(bench, config.recipes(), directory / RECORDS, lambda o: console.print(printed(o), highlight=False))
    cuts = cuts_of(bench, found) if config.cut_points else []
    write_text(directory / _CUTS, json.dumps([vars(cut) for cut in cuts]) + "\n")
    result = {**figures_of(found), "seconds": perf_counter() - start}
    directory.result(result)
    write(page(directory), directory / "report.html")
    say_report(directory)
    return result


def page(directory: RunDirectory) -> Page:
    """The report of a finished run, of its files alone."""
    cuts = [Cut(**cut) for cut in json.loads((directory / _CUTS).read_text(encoding="utf-8"))]
    return told(directory, read_sweep(directory / RECORDS), cuts)


def probe(bench: Bench, recipes: Sequence[Knobs], file: Path, progress: Any = None) -> Sweep:
    """Sweep over recipes, with the settings of a bench."""
    c = bench.config
    seeds = [fresh_seed(c.seed, i) for i in range(c.accuracy_seeds)]
    return sweep(
        bench.candidate, recipes, rates=c.rates, slack=c.slack, file=file, step=c.step, accuracy_seeds=seeds,
        gain_seeds=list(range(c.seed, c.seed + c.gain_seeds)), seed=c.seed, at_once=1, progress=progress,
    )  # fmt: skip


def cuts_of(bench: Bench, found: Sweep) -> list[Cut]:
    """Cuts through the losses of the recipes that are compared."""
    return [bench.cut(name, outcome) for name, outcome in compared(found).items()]


def load(config: SmoothnessProbe) -> Bench:
    """Read and split the images."""
    sizes = [config.examples, config.validation, config.test]
    if min(sizes) < 1:
        raise ConfigError(f"examples, validation and test must each be at least 1, got {sizes}")
    apart = config.data is not None and any(config.data.glob("test-*.parquet"))
    wanted = sum(sizes[:2] if apart else sizes)
    everything = load_images(config.data, limit=wanted).shrunk(config.shrink) if config.data else load_digits()
    if wanted > len(everything):
        raise ConfigError(f"examples + validation + test is {wanted}, but there are only {len(everything)} images")
    order = np.random.default_rng((config.seed, 1)).permutation(len(everything))[:wanted]
    pool, validation, test = (everything.take(rows) for rows in np.split(order, np.cumsum(sizes)[:2]))
    if apart:
        assert config.data is not None
        test = load_images(config.data, "test", limit=config.test).shrunk(config.shrink)
    return Bench(config, pool, validation, test)
