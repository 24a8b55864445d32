"""What is kept by score."""

import numpy as np

from metagradient.errors import ConfigError


def highest(scores: np.ndarray, share: float) -> np.ndarray:
    """The share of examples with the highest scores, bool[n]; ties go to the lower number.

    Errors: `ConfigError` for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"a share to keep must be in (0, 1], got {share}")
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[: max(1, round(share * len(scores)))]] = True
    return kept
