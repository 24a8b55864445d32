"""Learn a learning-rate schedule by metagradient descent, and hold it against a grid of one-cycle schedules."""

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from metagradient.data.images import Images, load_digits, load_images
from metagradient.descent import updates
from metagradient.descent.journal import read_lines
from metagradient.descent.loop import descend
from metagradient.descent.seeds import fresh_seed
from metagradient.errors import ConfigError
from metagradient.files import write_text
from metagradient.metaparameters import PerStep, Shared
from metagradient.progress import Progress
from metagradient.report.page import write
from metagradient.tasks.classifier import Classifier, Recipe, interpolated, one_cycle
from metagradient.tasks.directory import RunDirectory, free_directory
from metagradient.tasks.means import standard_error
from metagradient.tasks.schedule_page import ARMS, GRIDS, page, printed
from metagradient.tasks.trials import Criterion, Search, Trials, badness
from metagradient.trees import PyTree

_TRIED = "schedules.jsonl"  # learning rates at every meta-step, one line each


@dataclass(frozen=True)
class Grid:
    """One-cycle schedules that are tried instead: all combinations. And constant rates, tried apart."""

    peaks: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    """highest learning rates"""
    positions: tuple[float, ...] = (0.1, 0.3, 0.5)
    """where the peak is, as a share of the run"""
    starts: tuple[float, ...] = (0.1,)
    """learning rates of the first step, as a share of the peak"""
    ends: tuple[float, ...] = (0.01, 0.1)
    """learning rates of the last step, as a share of the peak"""
    constants: tuple[float, ...] = (0.05, 0.1, 0.2)
    """constant learning rates"""

    def combinations(self, seed: int) -> np.ndarray:
        """Peak, position, start and end of every one-cycle schedule, float[n, 4], shuffled: any prefix is a sample."""
        found = np.array(list(product(self.peaks, self.positions, self.starts, self.ends)))
        return np.random.default_rng((seed, 3)).permutation(found)


@dataclass(frozen=True)
class RateSchedule:
    """Learn a learning-rate schedule with metagradients, and compare it with the best of a grid.

    Without --data: scikit-learn's 1,797 handwritten digits. With it: any directory of labelled images in Parquet
    (CIFAR-10, MNIST, ...); --preset tiny has settings for it that take minutes, --preset paper the published ones.
    """

    data: Path | None = None
    """directory with train-*.parquet, and perhaps test-*.parquet; none takes the digits"""
    shrink: int = 2
    """average images of --data down by this factor, where it divides their size"""
    out: Path | None = None
    """directory of this run; none takes a free one under runs/"""
    seed: int = 0
    """seed of the split and of all trainings' seeds"""
    examples: int = 897
    """training images"""
    target: int = 300
    """images whose loss the descent lowers"""
    validation: int = 300
    """images on which the best meta-step and the best of the grid are picked"""
    test: int = 300
    """images on which results are measured, of the test files where there are any"""
    recipe: Recipe = field(
        default_factory=lambda: Recipe(widths=(8, 16), batch=64, steps=60, learning_rate=0.05, start=1.0, end=1.0)
    )
    """how a classifier is trained; the descent starts from its schedule, which is flat where start and end are 1"""
    knots: int = 10
    """learning rates learnt, at even places of the run with straight lines (in the logarithm) between; 0 learns one
    for every step"""
    meta_steps: int = 12
    """meta-steps, each with fresh seeds"""
    inner_seeds: int = 1
    """trainings a meta-step, each from a seed of its own"""
    rate: float = 0.3
    """how far the logarithm of a learning rate moves in the first meta-step"""
    final_rate: float = 0.06
    """... and in the last"""
    momentum: float = 0.8
    """momentum of the descent (Adam's first decay)"""
    second_decay: float = 0.95
    """Adam's second decay in the descent"""
    patience: int | None = None
    """stop after so many meta-steps without a better validation loss; none never stops early"""
    grid: Grid = field(default_factory=Grid)
    """what is tried instead"""
    at_once: int = 8
    """trainings of the grid in one program, where measuring shows that it pays"""
    finalists: int = 3
    """schedules of the grid, and of the descent, whose validation loss is measured again"""
    finalist_seeds: int = 2
    """... on so many other seeds; the best mean is picked"""
    seeds: int = 5
    """fresh seeds on which results are measured"""


@dataclass(frozen=True)
class _Splits:
    train: Images
    target: Images
    validation: Images
    test: Images


def run(config: RateSchedule, *, resume: bool = False) -> dict[str, Any]:
    """Run the task, print what was learnt, and fill the run's directory.

    Arguments:
        resume: go on with the run that `config.out` holds.

    Returns: the figures in `result.json`. For every arm (`start`, `flat`, `grid`, `grid_accuracy`, `mgd`):
        `accuracy_ARM`, `loss_ARM` (means over fresh seeds, on the test images), their standard errors `..._error`, and
        `training_runs_ARM`, the compute that finding it took. `accuracy_over_grid`, `loss_over_grid`, ...: the
        descent's minus the grid's, with errors of paired seeds. `best_step`, `grid_peak`, ...: what was picked;
        a `best_step` equal to `meta_steps` is the mean of the last half of them.
        `seconds`, `seconds_grid`, `seconds_mgd`: wall time, of all parts of a run that was resumed.

    Errors: `ConfigError` for sizes that the data can't meet; `DataError` for files that can't be read.

    Cost: `meta_steps` metagradients, a training for every schedule of the grid, `finalist_seeds` for every finalist and
        constant, and up to about 16 x `seeds` to measure; about two minutes for the digits on two cores.
    """
    _check(config)
    splits = _split(config)
    classes = max(len(images.classes) for images in (splits.train, splits.test))
    classifier = Classifier(config.recipe, classes, splits.train.images.shape[-1])
    splits = _Splits(*(classifier.fitted(s) for s in (splits.train, splits.target, splits.validation, splits.test)))
    directory = RunDirectory.begin(config.out or free_directory("schedule"), config, "schedule", resume=resume)
    with Progress(True) as progress:
        trials = Trials(
            classifier,
            splits.train,
            {"validation": splits.validation, "test": splits.test},
            directory,
            at_once=config.at_once,
            progress=progress,
        )
        own = config.recipe.rates()
        search = _with_mean(config, trials, _descend(config, classifier, splits, directory, progress))
        combinations = config.grid.combinations(config.seed)
        searches = {**_grids(config, trials, combinations), "mgd": search}
        picks = {name: _picked(config, trials, name, search) for name, search in searches.items()}
        flat = _flat(config, trials)
        arms = {"start": own, "flat": flat, **{n: searches[n].rates[p] for n, p in picks.items()}}
        fresh = _measured(config, trials, arms, searches)
    runs = _training_runs(config, searches)
    seconds = sum(line["seconds"] for line in directory.timings)
    result = {
        **_figures({name: fresh[name] for name in ARMS}),
        **{f"training_runs_{name}": count for name, count in runs.items()},
        "seconds_grid": trials.seconds("grid"),
        "seconds_mgd": seconds,
        "seconds": seconds + trials.seconds(),
        "best_step": picks["mgd"],
        **{
            f"{name}_{what}": value
            for name in GRIDS
            for what, value in zip(("peak", "position", "start", "end"), combinations[picks[name]], strict=True)
        },
        "flat_rate": float(flat[0]),
        "grid_size": len(combinations),
        "meta_steps": len(search.rates) - 1,
        "seeds": config.seeds,
    }
    shown: dict[str, Any] = {
        "learnt": search.rates,
        **arms,
        **{f"curve_{name}": _curve(name, search, fresh) for name, search in searches.items()},
    }
    np.savez(directory / "schedules.npz", **shown)
    directory.result(result)
    write(page(directory), directory / "report.html")
    printed(Console(), directory)
    return result


def _check(config: RateSchedule) -> None:
    """Raise `ConfigError` for settings that can't work, before anything is read."""
    r, grid = config.recipe, config.grid
    for name in (
        "examples",
        "target",
        "validation",
        "test",
        "shrink",
        "meta_steps",
        "inner_seeds",
        "finalists",
        "finalist_seeds",
        "at_once",
    ):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(config, name)}")
    if config.examples < r.batch:
        raise ConfigError(f"examples must hold at least a batch of {r.batch}, got {config.examples}")
    if config.knots == 1 or not 0 <= config.knots <= r.steps:
        raise ConfigError(f"knots must be 0, or between 2 and the {r.steps} steps of a run, got {config.knots}")
    if config.patience is not None and config.patience < 1:
        raise ConfigError(f"patience must be at least 1, got {config.patience}")
    if config.seeds < 2:
        raise ConfigError(f"seeds must be at least 2, to have an error, got {config.seeds}")
    for name in ("peaks", "positions", "starts", "ends", "constants"):
        values = getattr(grid, name)
        if not values or min(values) <= 0:
            raise ConfigError(f"grid.{name} must hold numbers above 0, got {values}")
    if max(grid.positions) >= 1:
        raise ConfigError(f"grid.positions must be below 1, got {grid.positions}")
    if min(r.learning_rate, r.start, r.end) <= 0:
        raise ConfigError("recipe.learning_rate, start and end must be above 0: their logarithms are learnt")


def _split(config: RateSchedule) -> _Splits:
    wanted = config.examples + config.target + config.validation
    test = None
    if config.data is None:
        pool = load_digits()
    elif any(config.data.glob("test-*.parquet")):
        pool = _shrunk(load_images(config.data, limit=wanted), config.shrink)
        test = _shrunk(load_images(config.data, "test", limit=config.test), config.shrink)
    else:
        pool = _shrunk(load_images(config.data, limit=wanted + config.test), config.shrink)
    if test is None and wanted + config.test > len(pool):
        raise ConfigError(
            f"examples + target + validation + test is {wanted + config.test}, but there are only {len(pool)} images"
        )
    order = np.random.default_rng((config.seed, 1)).permutation(len(pool))
    ends = np.cumsum([config.examples, config.target, config.validation])
    train, target, validation, rest = (pool.take(rows) for rows in np.split(order, ends))
    return _Splits(train, target, validation, test or rest.take(np.arange(config.test)))


def _shrunk(images: Images, factor: int) -> Images:
    return images if any(size % factor for size in images.images.shape[1:3]) else images.shrunk(factor)


def _start(config: RateSchedule) -> PyTree:
    """Metaparameters that give the recipe's own schedule."""
    logs = np.log(config.recipe.rates())
    if not config.knots:
        return {"log_rate": PerStep(jnp.asarray(logs))}
    places = np.linspace(0, len(logs) - 1, config.knots)
    return {"log_knots": Shared(jnp.asarray(np.interp(places, np.arange(len(logs)), logs), jnp.float32))}


def _rates(z: PyTree, steps: int) -> np.ndarray:
    """The learning rate of every step, float32[steps]."""
    logs = z["log_rate"].value if "log_rate" in z else interpolated(z["log_knots"].value, jnp.arange(steps), steps)
    return np.asarray(jnp.exp(logs), np.float32)


def _descend(
    config: RateSchedule, classifier: Classifier, splits: _Splits, directory: RunDirectory, progress: Progress
) -> Search:
    """The descent as a search. A meta-step measures the schedule that it starts from."""
    rate = optax.linear_schedule(config.rate, config.final_rate, max(1, config.meta_steps - 1))
    update = optax.chain(
        updates.normalise(),
        optax.scale_by_adam(config.momentum, config.second_decay),
        optax.scale_by_learning_rate(rate),
    )
    descent = descend(
        lambda seed: classifier.training(splits.train.images, splits.train.labels, seed),
        classifier.mean_loss(splits.target),
        _start(config),
        update,
        config.meta_steps,
        seeds=config.inner_seeds,
        held_out=classifier.mean_loss(splits.validation),
        patience=config.patience,
        seed=config.seed,
        out=directory.path,
    )
    progress.expect("meta-steps", config.meta_steps - descent.step)
    tried: list[Any] = read_lines(directory / _TRIED)
    while not descent.over:
        # Before the step is taken: however it ends, what it measured is written down.
        tried = [*tried[: descent.step], _rates(descent.z, config.recipe.steps).tolist()]
        write_text(directory / _TRIED, "".join(json.dumps(rates) + "\n" for rates in tried))
        next(descent)
        progress.tick("meta-steps", 1)
    costs = np.cumsum([line["training_runs"] for line in directory.timings])
    scores = [(line["held_out"], np.nan) for line in directory.records]
    return Search(np.array(tried, np.float32), costs, np.array(scores), "loss")


def _with_mean(config: RateSchedule, trials: Trials, search: Search) -> Search:
    """The descent, with the geometric mean of its last half's schedules as one more that it tried.

    Meta-steps wander, each on fresh seeds, and no single one is where they wander about (Polyak and Juditsky, 1992).
    """
    mean = np.exp(np.log(search.rates[len(search.rates) // 2 :]).mean(0))[None]
    score = trials.scores("mean", mean, _selection_seed(config, 0), "validation")
    return Search(
        np.concatenate([search.rates, mean]),
        np.append(search.costs, search.costs[-1] + 1),
        np.concatenate([search.scores, score]),
        search.by,
        surely=(len(search.rates),),
    )


def _grids(config: RateSchedule, trials: Trials, combinations: np.ndarray) -> dict[str, Search]:
    """The grid, picked from by loss, as the descent is, and by accuracy."""
    rates = np.stack([one_cycle(config.recipe.steps, *row) for row in combinations])
    scores = trials.scores("grid", rates, _selection_seed(config, 0), "validation")
    costs = np.arange(1.0, len(rates) + 1)
    return {"grid": Search(rates, costs, scores, "loss"), "grid_accuracy": Search(rates, costs, scores, "accuracy")}


def _selection_seed(config: RateSchedule, number: int) -> int:
    """Seed for picking among schedules: neither of the descent, nor of the measurement at the end."""
    return fresh_seed(config.seed, config.seeds + number)


def _best(config: RateSchedule, trials: Trials, stage: str, rates: np.ndarray, by: Criterion) -> int:
    """Number of the schedule with the best mean over the finalists' seeds."""
    seeds = [_selection_seed(config, 1 + i) for i in range(config.finalist_seeds)]
    scores = np.mean([trials.scores(stage, rates, seed, "validation") for seed in seeds], axis=0)
    return int(np.argmin(badness(scores, by)))


def _picked(config: RateSchedule, trials: Trials, name: str, search: Search) -> int:
    """Number of the best finalist of a search."""
    finalists = search.finalists(config.finalists)
    return int(finalists[_best(config, trials, f"finalists of {name}", search.rates[finalists], search.by)])


def _flat(config: RateSchedule, trials: Trials) -> np.ndarray:
    """The best constant schedule, float32[T]."""
    rates = np.stack([np.full(config.recipe.steps, rate, np.float32) for rate in config.grid.constants])
    return rates[_best(config, trials, "flat", rates, "loss")]


def _training_runs(config: RateSchedule, searches: dict[str, Search]) -> dict[str, float]:
    """Compute that finding each arm's schedule took, in training runs."""
    extra = {name: min(config.finalists, len(s.rates)) * config.finalist_seeds for name, s in searches.items()}
    return {
        "start": 0.0,
        "flat": float(len(config.grid.constants) * config.finalist_seeds),
        **{name: float(search.costs[-1]) + extra[name] for name, search in searches.items()},
    }


def _measured(
    config: RateSchedule, trials: Trials, arms: dict[str, np.ndarray], searches: dict[str, Search]
) -> dict[str, np.ndarray]:
    """Loss and accuracy on the test images, float[seeds, 2], of arms and of what searches would have picked earlier.

    The latter go by `NAME NUMBER`. All are trained on the same seeds, which nothing else used.
    """
    early = {
        f"{name} {number}": search.rates[number]
        for name, search in searches.items()
        for _, number in search.by_compute()
    }
    wanted = arms | early
    distinct = {rates.tobytes(): rates for rates in wanted.values()}
    rates = np.stack(list(distinct.values()))
    seeds = [fresh_seed(config.seed, i) for i in range(config.seeds)]
    scores = np.stack([trials.scores("fresh", rates, seed, "test") for seed in seeds])
    place = {key: number for number, key in enumerate(distinct)}
    return {name: scores[:, place[rates.tobytes()]] for name, rates in wanted.items()}


def _figures(fresh: dict[str, np.ndarray]) -> dict[str, float]:
    found = {}
    for place, what in enumerate(("loss", "accuracy")):
        series = {f"{what}_{name}": scores[:, place] for name, scores in fresh.items()}
        for name in GRIDS:
            series[f"{what}_over_{name}"] = fresh["mgd"][:, place] - fresh[name][:, place]
        for name, values in series.items():
            found |= {name: float(values.mean()), f"{name}_error": standard_error(values)}
    return found


def _curve(name: str, search: Search, fresh: dict[str, np.ndarray]) -> np.ndarray:
    """Training runs, mean accuracy and its error, float[points, 3]."""
    values = [(runs, fresh[f"{name} {number}"][:, 1]) for runs, number in search.by_compute()]
    return np.array([(runs, v.mean(), standard_error(v)) for runs, v in values])
