"""The configuration of a filtering of an image–text pool, and the pairs that it is about."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from metagradient.data.image_text import Pool, load_pool
from metagradient.errors import ConfigError
from metagradient.tasks.clip_training import Objective, PairRecipe, PairTrainer
from metagradient.tasks.clip_trials import Names, load_names


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
    method: Literal["both", "rater", "weights", "counts"] = "both"
    """what is learnt: a weight for each pair, a rater that gives weights by features, both (multiplied), or a count for
    each pair (the paper's algorithm 1)"""
    objective: Objective = "rank"
    """what the descent lowers: contrastive loss at the best, the learnt or a fixed scale, or the matches' log rank"""
    meta_steps: int = 16
    """meta-steps, each with fresh seeds"""
    seeds: int = 1
    """inner seeds a meta-step"""
    window: int | None = None
    """rater and weights: differentiate the last steps of a training only; none takes all of them"""
    rate: float = 0.3
    """rater and weights: root mean square of their move in the first meta-step"""
    final_rate: float = 0.15
    """... and in the last"""
    momentum: float = 0.7
    """rater and weights: momentum of the descent"""
    head_start: float = 3.0
    """rater: what a pair's cosine after the last of score_steps, in standard deviations, counts for at first: the
    descent begins at a soft CLIP-score filter; 0 begins with all pairs alike"""
    most: float = 2.0
    """weights: the highest that a pair may have, a rater's factor apart; it starts at 1"""
    flip: float = 0.2
    """counts: probability with which a count moves"""
    at: int | None = None
    """counts: the step k at which every candidate's loss is added; none takes three quarters of the run"""
    score_steps: tuple[int, ...] = (75, 200)
    """CLIP-score filter: after how many steps a model trained on the pool scores it, of which validation chooses one;
    a rater goes by all of them"""
    scorers: int = 1
    """models, of a seed each, whose mean a rater goes by; with several, a CLIP-score filter by the mean of all their
    scores is one more baseline"""
    shares: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    """shares of the pool that a filter by score or by weights may keep; validation chooses, for weights also between
    these and a draw in proportion to them"""
    rule_words: tuple[int, ...] = (1, 2, 3)
    """caption rules: least number of words; validation chooses"""
    choosing: int = 2
    """seeds by which validation chooses a baseline's setting, and the meta-step that is taken"""
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


def prepare(config: ClipSelection) -> Prepared:
    """The pairs and the trainer of a configuration. `ConfigError` and `DataError` as in `run`."""
    c = config
    if c.data is None:
        raise ConfigError("select --task clip needs --data, a directory of tar shards with image–text pairs")
    if min(c.meta_steps, c.seeds, c.scorers, c.choosing, c.fresh) < 1:
        raise ConfigError("meta_steps, seeds, scorers, choosing and fresh must be at least 1")
    if not 0 < c.target_share < 1:
        raise ConfigError(f"target_share must be in (0, 1), got {c.target_share}")
    if not c.score_steps or not 1 <= min(c.score_steps) <= max(c.score_steps) <= c.recipe.steps:
        raise ConfigError(f"score_steps must be at least one, and in [1, {c.recipe.steps}], got {c.score_steps}")
    if not c.shares or not 0 < min(c.shares) <= max(c.shares) <= 1:
        raise ConfigError(f"shares must be in (0, 1], and at least one, got {c.shares}")
    if c.method != "counts" and c.window is not None and not 1 <= c.window <= c.recipe.steps:
        raise ConfigError(f"window must be in [1, {c.recipe.steps}], got {c.window}")
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
