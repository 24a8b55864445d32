"""Filter an image–text pool: choose the pairs by metagradients, and hold that against what others would choose."""

import json
from collections.abc import Mapping, Sequence
from time import perf_counter

import numpy as np
from rich.console import Console

from metagradient.data.image_text import write_uids
from metagradient.descent.seeds import fresh_seed
from metagradient.errors import ConfigError
from metagradient.report.page import write
from metagradient.tasks.clip_baselines import Candidate, CaptionRules, chosen, drawn, without_duplicates
from metagradient.tasks.clip_descent import Learnt, learnt
from metagradient.tasks.clip_page import ARMS, WEIGHTS, arms_table, page
from metagradient.tasks.clip_setup import ClipSelection, Prepared, prepare
from metagradient.tasks.clip_trials import Arm, Trials, figures
from metagradient.tasks.directory import RunDirectory, free_directory
from metagradient.tasks.pages import say_report
from metagradient.tasks.ranking import highest

NAME = "select-clip"

_SHOWN = 24
# Seeds of what baselines are chosen by, and of the models that score pairs: not among the `fresh` ones.
_CHOOSING, _SCORING = 1000, 2000


def run(config: ClipSelection, *, resume: bool = False) -> dict[str, float]:
    """Choose pairs, train on them and on every baseline's choice, and fill the run's directory.

    Arguments:
        resume: go on with the run that `config.out` holds.

    Returns: the figures in `result.json`. For every arm: `recall_ARM` (mean of recall at 1, 5 and 10 in both
        directions), its standard error `error_ARM`, `gain_ARM` over no filter with `gain_error_ARM` (of differences
        paired by seed), the six recalls, `pairs_ARM`; where the data allow them, `group_ARM` with `group_error_ARM`
        (zero-shot accuracy) and `mismatched_ARM` (share of the mismatched pairs that is kept; with weights, of their
        weight). Then `best_baseline_gain`, `gain_ratio` (the gain of MGD's subset over that), `meta_step` (the one
        that was taken), `training_runs`, `seconds`.

    Errors: `ConfigError` for settings that the data can't meet; `DataError` for files that can't be read.

    Cost: `meta_steps` x `seeds` metagradients, and about 40 + 9 `fresh` trainings; with several `scorers`, 20 more.
    """
    start = perf_counter()
    task = prepare(config)
    directory = RunDirectory.begin(config.out or free_directory(NAME), config, NAME, resume=resume)
    seconds_before = sum(t["seconds"] for t in directory.timings)
    _say_faults(task)
    trials = Trials(task.trainer, task.arrays, task.names, directory)
    choosing = [fresh_seed(config.seed, _CHOOSING + i) for i in range(config.choosing)]
    scoring = [fresh_seed(config.seed, _SCORING + i) for i in range(config.scorers)]
    found = learnt(task, trials, scoring, choosing, directory)
    arms, settings = _arms(task, trials, scoring, choosing, found.weights)
    counts = np.bincount(arms["subset"].rows, minlength=len(task.pool))
    seeds = [fresh_seed(config.seed, i) for i in range(config.fresh)]
    measured = {
        name: [trials.measured(f"test of {name}", arm, seed, task.test) for seed in seeds] for name, arm in arms.items()
    }
    result = {
        **figures(measured),
        **{f"pairs_{name}": int(np.count_nonzero(arm.share(len(task.pool)))) for name, arm in arms.items()},
        **_mismatched(task, arms),
        "pairs": len(task.pool),
        "meta_step": found.step,
        "training_runs": sum(t["training_runs"] for t in directory.timings),
        "seconds": seconds_before + perf_counter() - start,
    }
    _save(task, directory, found, counts, settings)
    directory.result(result)
    write(page(directory), directory / "report.html")
    _print(directory)
    return result


def _arms(
    task: Prepared, trials: Trials, scoring: Sequence[int], choosing: Sequence[int], weights: np.ndarray
) -> tuple[dict[str, Arm], dict[str, str]]:
    """What is trained on, by arm; and the settings that validation chose for the filters."""
    c, pool, n = task.config, task.pool, len(task.pool)

    def recall(name: str, rows: np.ndarray) -> float:
        found = [trials.measured(f"validation of {name}", Arm(rows), seed, task.val) for seed in choosing]
        return float(np.mean([f["recall"] for f in found]))

    def by_score(name: str, seeds: Sequence[int]) -> Candidate:
        models = zip(*(trials.scorers(seed, c.score_steps) for seed in seeds), strict=True)
        means = {
            steps: np.mean([m.scores for m in of_seeds], axis=0)
            for steps, of_seeds in zip(c.score_steps, models, strict=True)
        }
        settings = [
            (f"{name}: step {steps}, share {share:g}", highest(scores, share))
            for steps, scores in means.items()
            for share in c.shares
        ]
        return chosen(settings, recall, c.recipe.batch)

    rules = [(f"rules: {w} words at least", CaptionRules(words=w)(pool)) for w in c.rule_words]
    found: dict[str, Candidate] = {
        "rules": chosen(rules, recall, c.recipe.batch),
        "duplicates": chosen([("all but repetitions", without_duplicates(pool))], recall, c.recipe.batch),
        "score": by_score("score", scoring[:1]),
    }
    if len(scoring) > 1:
        found["ensemble"] = by_score(f"score of {len(scoring)} models", scoring)
    if c.method == "counts":
        found["subset"] = Candidate("counts", np.repeat(np.arange(n), weights.astype(int)))
    else:
        by_weight = [(f"weights: share {share:g}", highest(weights, share)) for share in c.shares]
        by_weight.append(("weights: drawn", drawn(weights, n, c.seed)))
        found["subset"] = chosen(by_weight, recall, c.recipe.batch)
    subset = found["subset"].rows
    if len(subset) < c.recipe.batch:
        raise ConfigError(f"the descent left {len(subset)} pairs, fewer than a batch: lower flip or meta_steps")
    random = np.random.default_rng((c.seed, 3)).permutation(n)[: max(c.recipe.batch, len(np.unique(subset)))]
    arms = {
        "all": Arm(np.arange(n)),
        "random": Arm(np.sort(random)),
        **{name: Arm(candidate.rows) for name, candidate in found.items()},
    }
    if c.method != "counts":
        arms["mgd"] = Arm(np.arange(n), weights)
    if task.mismatched is not None and (~task.mismatched).sum() >= c.recipe.batch:
        arms["oracle"] = Arm(np.flatnonzero(~task.mismatched))
    return {name: arms[name] for name in ARMS if name in arms}, {name: f.name for name, f in found.items()}


def _mismatched(task: Prepared, arms: Mapping[str, Arm]) -> dict[str, float]:
    wrong = task.mismatched
    if wrong is None or not wrong.any():
        return {}
    return {f"mismatched_{name}": float(arm.share(len(wrong))[wrong].mean()) for name, arm in arms.items()}


def _save(
    task: Prepared, directory: RunDirectory, found: Learnt, counts: np.ndarray, settings: Mapping[str, str]
) -> None:
    pool = task.pool
    write_uids(
        directory / "subset.npy", (uid for uid, count in zip(pool.uids, counts, strict=True) for _ in range(count))
    )
    order = np.argsort(found.weights, kind="stable")
    shown = {"lowest": order[:_SHOWN], "highest": order[::-1][:_SHOWN]}
    captions = np.array(pool.captions)
    np.savez(
        directory / WEIGHTS, allow_pickle=False, weights=found.weights, counts=counts, uids=np.array(pool.uids),
        **shown,
        **{f"{name}_images": pool.images[rows] for name, rows in shown.items()},
        **{f"{name}_captions": captions[rows] for name, rows in shown.items()},
        **({} if task.mismatched is None else {"mismatched": task.mismatched}),
        settings=np.array(json.dumps(dict(settings))), rater=np.array(json.dumps(found.rater)),
        faults=np.array(str(pool.faults)),
    )  # fmt: skip


def _say_faults(task: Prepared) -> None:
    """Say what was wrong with the shards."""
    for name, pairs in (("pool", task.pool), ("validation", task.val), ("test", task.test)):
        if pairs.faults.counts:
            Console(stderr=True).print(f"{name}: {pairs.faults}", markup=False, soft_wrap=True)


def _print(directory: RunDirectory) -> None:
    Console().print(arms_table(directory).printed())
    say_report(directory)
