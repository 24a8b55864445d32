"""Definitions 1 and 2 of metasmoothness, what noise would read, and intervals: numpy alone."""

import numpy as np

_RESAMPLES = 2000


def second_difference(values: tuple[float, float, float], step: float) -> float:
    r"""Definition 1, lower is smoother: $|\Delta_f(z + hv; v) - \Delta_f(z; v)| / h$.

    Arguments:
        values: f at z, z + hv, z + 2hv.
        step: h.
    """
    at_0, at_h, at_2h = values
    return abs((at_2h - at_h) / step - (at_h - at_0) / step) / step


def sign_agreement(first: np.ndarray, second: np.ndarray) -> float:
    r"""Definition 2, in [-1, 1], higher is smoother.

    $\hat S = \sum_i \mathrm{sign}(a_i)\, \frac{|a_i + b_i|}{\|a + b\|_1}\, \mathrm{sign}(b_i)$, with the movements
    $a = \theta_h - \theta_0$ and $b = \theta_{2h} - \theta_h$.

    Arguments:
        first, second: float64[n], a and b.

    Returns: the score; NaN where a + b is zero.
    """
    moved = np.abs(first + second)
    total = moved.sum()
    return float(np.sum(np.sign(first) * moved * np.sign(second)) / total) if total else float("nan")


def noise_scores(first: list[np.ndarray], second: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Definition 2 of pure noise with this run's movements.

    Every sign is a fair coin, and every |a| meets the |b| of another parameter of its leaf, drawn at random. Scores are
    not around zero: the weights |a + b| favour parameters that happened to move the same way twice. For normal
    movements the mean is sqrt(2) - 1, for heavier tails less. (The other kind of noise does read zero: three end points
    that have nothing to do with each other, where a movement out is followed by one back.)

    Arguments:
        first, second: movements a and b as in `sign_agreement`, an array a leaf.

    Returns: float64[draws], scores of independent draws: 200, or fewer (20 at least) above 100,000 parameters.
    """
    first = [np.abs(a) for a in first]
    second = [np.abs(b) for b in second]
    every = np.concatenate(first)
    scores = np.empty(int(np.clip(2e7 / max(len(every), 1), 20, 200)))
    for draw in range(len(scores)):
        met = np.concatenate([rng.permutation(b) for b in second])
        # Only whether two signs agree matters: |a| + |b| where they do, -||a| - |b|| where they don't.
        same = rng.random(len(every)) < 0.5
        plus, minus = (every + met)[same].sum(), np.abs(every - met)[~same].sum()
        scores[draw] = (plus - minus) / (plus + minus) if plus + minus else 0.0
    return scores


def bootstrap(values: np.ndarray, rng: np.random.Generator, level: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval of a mean, resampled over the values.

    Arguments:
        values: float64[n].
        level: its coverage.

    Returns: its ends; None for fewer than two values.
    """
    if len(values) < 2:
        return None
    means = rng.choice(values, (_RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
