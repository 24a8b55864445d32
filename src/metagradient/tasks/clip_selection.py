"""Filter an image–text pool: choose the pairs by metagradients, and hold that against what others would choose."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Literal

import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as Printed

from metagradient.data.image_text import Pool, load_pool, write_uids
from metagradient.descent import updates
from metagradient.descent.loop import Descent, descend
from metagradient.descent.seeds import fresh_seed
from metagradient.errors import ConfigError
from metagradient.metaparameters import PerExample
from metagradient.report.page import write
from metagradient.surrogate import CountSurrogate
from metagradient.tasks.clip_baselines import Candidate, CaptionRules, chosen, highest, without_duplicates
from metagradient.tasks.clip_page import ARMS, WEIGHTS, arms_table, page
from metagradient.tasks.clip_training import Objective, PairRecipe, PairTrainer
from metagradient.tasks.clip_trials import Arm, Names, Trials, load_names
from metagradient.tasks.directory import RunDirectory, free_directory
from metagradient.training import Training

NAME = "select-clip"

_SHOWN = 24
# Seeds of what baselines are chosen by, and of the models that score pairs: not among the `fresh` ones.
_CHOOSING, _SCORING = 1000, 2000


@dataclass(frozen=True)
class ClipSelection:
    """Filter an image–text pool: choose its pairs so that a CLIP trained on them does better on a small clean set.

    --data is a directory of webdataset / DataComp shards (00000000.tar, ...), beside them a tar of clean pairs to aim
    at and one to report on. The choice is written as a DataComp uid file, subset.npy.
    """

    data: Path | None = None
    """directory with the pool's tar shards"""
    val: str = "val.tar"
    """tar of clean pairs: a part is the target, the rest is held out and chooses"""
    test: str = "test.tar"
    """tar of clean pairs on which results are measured"""
    variant: str = "skin_tone"
    """clean pairs whose json holds something under this name are left out: variants of another pair's image"""
    classes: str = "classes.json"
    """names of groups for zero-shot classification, where the file is there"""
    limit: int | None = None
    """pairs of the pool, from the first; none takes all"""
    out: Path | None = None
    """directory of this run; none takes a free one under runs/"""
    seed: int = 0
    """seed of the splits, of the inner seeds and of the fresh ones"""
    target_share: float = 0.65
    """share of the clean validation pairs that the descent aims at; the others choose among its meta-steps"""
    recipe: PairRecipe = field(default_factory=PairRecipe)
    """how a CLIP is trained"""
    method: Literal["weights", "counts"] = "weights"
    """what a pair gets: a weight, or a count (algorithm 1 of the paper)"""
    objective: Objective = "rank"
    """what the descent lowers: contrastive loss at the best, the learnt or a fixed scale, or the matches' log rank"""
    meta_steps: int = 16
    """meta-steps, each with fresh seeds"""
    seeds: int = 1
    """inner seeds a meta-step"""
    window: int | None = None
    """weights: differentiate the last steps of a training only; none takes all of them"""
    rate: float = 0.3
    """weights: root mean square of their move in the first meta-step"""
    final_rate: float = 0.1
    """... and in the last"""
    momentum: float = 0.8
    """weights: momentum of the descent"""
    most: float = 2.0
    """weights: the highest that a pair may have; it starts at 1"""
    flip: float = 0.2
    """counts: probability with which a count moves"""
    at: int | None = None
    """counts: the step k at which every candidate's loss is added; none takes three quarters of the run"""
    score_steps: tuple[int, ...] = (75, 200)
    """CLIP-score filter: after how many steps a model trained on the pool scores it; validation chooses"""
    score_shares: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    """... and how many pairs are kept"""
    rule_words: tuple[int, ...] = (1, 2, 3)
    """caption rules: least number of words; validation chooses"""
    choosing: int = 2
    """seeds by which validation chooses a baseline's setting"""
    fresh: int = 4
    """fresh seeds on which results are measured, the same for all arms"""


@dataclass(frozen=True)
class Prepared:
    """The pairs, and how a CLIP is trained on them.

    Arguments:
        pool: what is chosen from.
        target, held_out, test: clean pairs: the descent's aim, those that choose, those that are reported.
        val: target and held-out pairs together, by which baselines choose their settings.
        names: what zero-shot classification goes by, or None.
    """

    config: ClipSelection
    trainer: PairTrainer
    pool: Pool
    target: Pool
    held_out: Pool
    val: Pool
    test: Pool
    names: Names | None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The pool as trainings take it."""
        return self.trainer.arrays(self.pool)

    @property
    def mismatched(self) -> np.ndarray | None:
        """The ground truth for evaluation, bool[n]; None where the pool has none. No method of selection reads it."""
        column = self.pool.column("shuffled")
        return None if any(value is None for value in column) else column.astype(bool)


def run(config: ClipSelection, *, resume: bool = False) -> dict[str, float]:
    """Choose pairs, train on them and on every baseline's choice, and fill the run's directory.

    Arguments:
        resume: go on with the run that `config.out` holds.

    Returns: the figures in `result.json`. For every arm: `recall_ARM` (mean of recall at 1, 5 and 10 in both
        directions), its standard error `error_ARM`, `gain_ARM` over no filter with `gain_error_ARM` (of differences
        paired by seed), the six recalls, `pairs_ARM`; where the data allow them, `group_ARM` with `group_error_ARM`
        (zero-shot accuracy) and `mismatched_ARM` (share of the mismatched pairs that is kept; with weights, of their
        weight). Then `best_baseline_gain`, `gain_ratio` (MGD's gain over that), `training_runs`, `seconds`.

    Errors: `ConfigError` for settings that the data can't meet; `DataError` for files that can't be read.

    Cost: `meta_steps` x `seeds` metagradients, and about 30 + 8 `fresh` trainings.
    """
    start = perf_counter()
    task = prepare(config)
    directory = RunDirectory.begin(config.out or free_directory(NAME), config, NAME, resume=resume)
    seconds_before = sum(t["seconds"] for t in directory.timings)
    _say_faults(task)
    weights = _descended(task, directory)
    counts = np.rint(weights).astype(int)
    trials = Trials(task.trainer, task.arrays, task.names, directory)
    arms, settings = _arms(task, trials, weights, counts)
    seeds = [fresh_seed(config.seed, i) for i in range(config.fresh)]
    measured = {
        name: [trials.measured(f"test of {name}", arm, seed, task.test) for seed in seeds] for name, arm in arms.items()
    }
    result = {
        **figures(measured),
        **{f"pairs_{name}": int(np.count_nonzero(arm.share(len(task.pool)))) for name, arm in arms.items()},
        **_mismatched(task, arms),
        "pairs": len(task.pool),
        "training_runs": sum(t["training_runs"] for t in directory.timings),
        "seconds": seconds_before + perf_counter() - start,
    }
    _save(task, directory, weights, counts, settings)
    directory.result(result)
    write(page(directory), directory / "report.html")
    _print(directory)
    return result


def prepare(config: ClipSelection) -> Prepared:
    """The pairs and the trainer of a configuration. `ConfigError` and `DataError` as in `run`."""
    c = config
    if c.data is None:
        raise ConfigError("select --task clip needs --data, a directory of tar shards with image–text pairs")
    if min(c.meta_steps, c.seeds, c.choosing, c.fresh) < 1:
        raise ConfigError("meta_steps, seeds, choosing and fresh must be at least 1")
    if not 0 < c.target_share < 1:
        raise ConfigError(f"target_share must be in (0, 1), got {c.target_share}")
    if not c.score_steps or not 1 <= min(c.score_steps) <= max(c.score_steps) <= c.recipe.steps:
        raise ConfigError(f"score_steps must be at least one, and in [1, {c.recipe.steps}], got {c.score_steps}")
    if not c.score_shares or not 0 < min(c.score_shares) <= max(c.score_shares) <= 1:
        raise ConfigError(f"score_shares must be in (0, 1], and at least one, got {c.score_shares}")
    if c.method == "counts" and not 0 <= at(c) < c.recipe.steps - 1:
        raise ConfigError(f"at must be in [0, {c.recipe.steps - 2}], got {c.at}")
    trainer = PairTrainer(c.recipe)
    trainer.model  # Towers that don't fit their images are refused here.  # noqa: B018
    pool = load_pool(c.data, c.recipe.size, limit=c.limit)
    if len(pool) < c.recipe.batch:
        raise ConfigError(f"the pool holds {len(pool)} pairs, fewer than a batch of {c.recipe.batch}")
    val, test = (load_pool(c.data / name, c.recipe.size) for name in (c.val, c.test))
    val, test = (p.take(np.array([value is None for value in p.column(c.variant)])) for p in (val, test))
    count = round(c.target_share * len(val))
    if not 2 <= count <= len(val) - 2 or len(test) < 2:
        raise ConfigError(
            f"{len(val)} validation pairs at target_share {c.target_share}, and {len(test)} test pairs: target, "
            "held-out and test pairs must be two at least"
        )
    order = np.random.default_rng((c.seed, 1)).permutation(len(val))
    names = load_names(c.data / c.classes)
    return Prepared(c, trainer, pool, val.take(order[:count]), val.take(order[count:]), val, test, names)


def at(config: ClipSelection) -> int:
    """The step k of `counts`."""
    return round(0.75 * config.recipe.steps) if config.at is None else config.at


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


def _descended(task: Prepared, directory: RunDirectory) -> np.ndarray:
    """What each pair is worth, float32[n]: weights or counts, those of the lowest loss on held-out pairs."""
    c, trainer, n = task.config, task.trainer, len(task.pool)
    arrays = task.arrays

    def training(seed: int) -> Training:
        return trainer.training(arrays, seed)

    def surrogate(seed: int) -> CountSurrogate:
        order = np.random.default_rng((c.seed, 2, seed)).permutation(n).astype(np.int32)

        def counted(counts: np.ndarray) -> Training:
            return trainer.training(arrays, seed, rows=np.repeat(np.arange(n), counts))

        return CountSurrogate(counted, Candidates(arrays, order, c.recipe.batch), trainer.losses, at(c))

    start = {c.method: PerExample(jnp.ones(n))}
    options = {
        "objective": trainer.objective(task.target, c.objective), "steps": c.meta_steps, "seeds": c.seeds,
        "held_out": trainer.objective(task.held_out, c.objective), "seed": c.seed, "out": directory.path,
    }  # fmt: skip
    if c.method == "weights":
        rate = optax.linear_schedule(c.rate, c.final_rate, max(1, c.meta_steps - 1))
        update = updates.normalised(rate, c.momentum)
        project = updates.box(0, c.most)
        descent = descend(training, z=start, update=update, project=project, window=c.window, **options)
    else:
        descent = descend(surrogate, z=start, update=updates.counts(c.flip, c.seed), **options)
    _watch(descent, c.meta_steps)
    assert descent.best is not None
    return np.asarray(descent.best.z[c.method].value)


def _watch(descent: Descent, steps: int) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("meta-steps", total=steps, completed=descent.step)
        for record in descent:
            progress.update(bar, advance=1, description=f"meta-steps (loss on the target {record.value:.3f})")


def _arms(
    task: Prepared, trials: Trials, weights: np.ndarray, counts: np.ndarray
) -> tuple[dict[str, Arm], dict[str, str]]:
    """What is trained on, by arm; and the settings that validation chose for the baselines."""
    c, pool, n = task.config, task.pool, len(task.pool)
    seeds = [fresh_seed(c.seed, _CHOOSING + i) for i in range(c.choosing)]

    def recall(name: str, rows: np.ndarray) -> float:
        found = [trials.measured(f"validation of {name}", Arm(rows), seed, task.val) for seed in seeds]
        return float(np.mean([f["recall"] for f in found]))

    rules = [(f"rules: {w} words at least", CaptionRules(words=w)(pool)) for w in c.rule_words]
    scores = [
        (f"score: step {steps}, share {share:g}", highest(trials.scores(fresh_seed(c.seed, _SCORING), steps), share))
        for steps in c.score_steps
        for share in c.score_shares
    ]
    found: dict[str, Candidate] = {
        "rules": chosen(rules, recall, c.recipe.batch),
        "duplicates": chosen([("all but repetitions", without_duplicates(pool))], recall, c.recipe.batch),
        "score": chosen(scores, recall, c.recipe.batch),
    }
    subset = np.repeat(np.arange(n), counts)
    if len(subset) < c.recipe.batch:
        raise ConfigError(f"the descent left {len(subset)} pairs, fewer than a batch: lower rate or meta_steps")
    random = np.random.default_rng((c.seed, 3)).permutation(n)[: max(c.recipe.batch, np.count_nonzero(counts))]
    arms = {
        "all": Arm(np.arange(n)),
        "random": Arm(np.sort(random)),
        **{name: Arm(candidate.rows) for name, candidate in found.items()},
        "subset": Arm(subset),
    }
    if c.method == "weights":
        arms["mgd"] = Arm(np.arange(n), weights)
    if task.mismatched is not None and (~task.mismatched).sum() >= c.recipe.batch:
        arms["oracle"] = Arm(np.flatnonzero(~task.mismatched))
    return {name: arms[name] for name in ARMS if name in arms}, {name: f.name for name, f in found.items()}


def figures(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, float]:
    """Flat figures of what was measured by arm, a fresh seed each, the same seeds for all: see `run`."""
    found: dict[str, float] = {}
    for arm, of_arm in measured.items():
        recall, base = (np.array([m["recall"] for m in rows]) for rows in (of_arm, measured["all"]))
        found |= {f"recall_{arm}": float(recall.mean()), f"error_{arm}": _error(recall)}
        found |= {f"gain_{arm}": float((recall - base).mean()), f"gain_error_{arm}": _error(recall - base)}
        if "group" in of_arm[0]:
            group = np.array([m["group"] for m in of_arm])
            found |= {f"group_{arm}": float(group.mean()), f"group_error_{arm}": _error(group)}
        for name in of_arm[0]:
            if "_at_" in name:
                found[f"{name}_{arm}"] = float(np.mean([m[name] for m in of_arm]))
    baselines = [found[f"gain_{arm}"] for arm in ("random", "rules", "duplicates", "score") if arm in measured]
    found["best_baseline_gain"] = max(baselines)
    ours = found["gain_mgd" if "mgd" in measured else "gain_subset"]
    # A baseline that gains nothing makes no ratio.
    found["gain_ratio"] = ours / max(baselines) if max(baselines) > 0 else float("inf")
    return found


def _error(values: np.ndarray) -> float:
    """The standard error of a mean over seeds; 0 for one seed, which has none."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def _mismatched(task: Prepared, arms: Mapping[str, Arm]) -> dict[str, float]:
    wrong = task.mismatched
    if wrong is None or not wrong.any():
        return {}
    found = {name: float(arm.share(len(wrong))[wrong].mean()) for name, arm in arms.items()}
    return {f"mismatched_{name}": share for name, share in found.items()}


def _save(
    task: Prepared, directory: RunDirectory, weights: np.ndarray, counts: np.ndarray, settings: Mapping[str, str]
) -> None:
    pool = task.pool
    write_uids(
        directory / "subset.npy", (uid for uid, count in zip(pool.uids, counts, strict=True) for _ in range(count))
    )
    order = np.argsort(weights, kind="stable")
    shown = {"lowest": order[:_SHOWN], "highest": order[::-1][:_SHOWN]}
    captions = np.array(pool.captions)
    np.savez(
        directory / WEIGHTS, weights=weights, counts=counts, uids=np.array(pool.uids),
        **shown,
        **{f"{name}_images": pool.images[rows] for name, rows in shown.items()},
        **{f"{name}_captions": captions[rows] for name, rows in shown.items()},
        **({} if task.mismatched is None else {"mismatched": task.mismatched}),
        settings=np.array(json.dumps(dict(settings))), faults=np.array(str(pool.faults)),
    )  # fmt: skip


def _say_faults(task: Prepared) -> None:
    """Say what was wrong with the shards."""
    for name, pairs in (("pool", task.pool), ("validation", task.val), ("test", task.test)):
        if pairs.faults.counts:
            Console(stderr=True).print(f"{name}: {pairs.faults}", markup=False, soft_wrap=True)


def _print(directory: RunDirectory) -> None:
    found, console = arms_table(directory), Console()
    table = Printed(*found.header, title=found.caption)
    for row in found.rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"report: {directory / 'report.html'}", soft_wrap=True)
