"""Seeds of a descent: those that its trainings draw, and those for evaluation."""

import numpy as np

from metagradient.errors import ConfigError

# A seed has 32 bits: every random generator takes it whole. Half of them are for evaluation.
MOST_STEPS, MOST_NUMBERS = 2**21, 2**10


def inner_seed(seed: int, step: int, number: int = 0) -> int:
    """Seed of a training in a meta-step: in one descent distinct for all (step, number), and from every `fresh_seed`.

    Arguments:
        seed: of the descent, from 0.
        step: in [0, 2**21).
        number: of the training in that meta-step, in [0, 2**10).

    Returns: a seed in [0, 2**32).

    Errors: `ConfigError` for arguments out of range.
    """
    _require(0 <= step < MOST_STEPS and 0 <= number < MOST_NUMBERS, f"step {step}, number {number}")
    return _spread(seed, step * MOST_NUMBERS + number)


def fresh_seed(seed: int, number: int) -> int:
    """Seed for evaluation that no meta-step of the same descent draws; distinct for all numbers in [0, 2**31).

    Errors: `ConfigError` for arguments out of range.
    """
    _require(0 <= number < 2**31, f"number {number}")
    return _spread(seed, 2**31 + number)


def _spread(seed: int, place: int) -> int:
    """A permutation of [0, 2**32) that depends on `seed`: its steps are all invertible."""
    _require(seed >= 0, f"seed {seed}")
    for factor, shift in np.random.SeedSequence(seed).generate_state(6).reshape(3, 2).tolist():
        place = (place * (factor | 1) + shift) % 2**32
        place ^= place >> 15
    return place


def _require(holds: bool, found: str) -> None:
    if not holds:
        raise ConfigError(f"a seed of a descent can't be drawn for {found}: out of range")
