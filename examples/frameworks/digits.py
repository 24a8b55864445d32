"""What the examples of this folder share: scikit-learn's digits, a fifth of the training labels wrong."""

import numpy as np
from sklearn.datasets import load_digits

EXAMPLES, STEPS, BATCH = 600, 120, 64

pixels, labels = map(np.asarray, load_digits(return_X_y=True))
images = (pixels / 16).astype(np.float32)
_rng = np.random.default_rng(0)
_order = _rng.permutation(len(images))
train, clean = _order[:EXAMPLES], _order[EXAMPLES:1200]
flipped = _rng.random(EXAMPLES) < 0.2
given = np.where(flipped, (labels[train] + _rng.integers(1, 10, EXAMPLES)) % 10, labels[train])


def batch(t: int) -> dict[str, np.ndarray]:
    """The batch of step t: the same at every call, with the ids of its examples in "index"."""
    index = np.random.default_rng(t).choice(EXAMPLES, BATCH, replace=False)
    return {"x": images[train[index]], "y": given[index], "index": index}


def wrong_among_harmful(grad: np.ndarray) -> float:
    """Of the 60 examples whose weight the objective would lower most, the share that carries a wrong label."""
    return float(flipped[np.argsort(-grad)[:60]].mean())
