"""A random-access, seeded sequence of batches over arrays in memory."""

import operator
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from metagradient.errors import BatchError


class EpochBatches:
    """Batches that walk shuffled epochs: batch t depends on the arguments and t alone.

    Every epoch is a permutation of its own, drawn from (seed, epoch). The last `n % batch` examples of a permutation
    sit that epoch out, so that all batches have one shape.

    Arguments:
        arrays: arrays `[n, ...]` by name; every batch holds their rows under the same names.
        batch: examples a batch, at most the number walked.
        steps: T, the number of batches.
        seed: integer in [0, 2**64).
        rows: walk only these examples, int[m]; None for all. A batch's `index` still counts in `arrays`.

    Errors: `BatchError` for arrays of different lengths, one named `index`, rows outside `arrays`, more examples a
        batch than there are, no step, or a seed out of range.

    Cost: a read copies its rows; the permutation of the epoch last read is kept.

    >>> batches = EpochBatches({"x": np.arange(10.0)}, batch=4, steps=5, seed=0)
    >>> len(batches), sorted(batches[3]), batches[3]["index"].dtype
    (5, ['index', 'x'], dtype('int32'))
    """

    def __init__(
        self, arrays: Mapping[str, np.ndarray], *, batch: int, steps: int, seed: int, rows: np.ndarray | None = None
    ):
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) != 1:
            raise BatchError(f"arrays must have one length, got {lengths or 'none'}")
        if "index" in arrays:
            raise BatchError("no array may be named 'index': a batch holds its example ids there")
        (n,) = set(lengths.values())
        ids = np.arange(n) if rows is None else np.array(rows)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer) or np.any((ids < 0) | (ids >= n)):
            raise BatchError(f"rows must be a vector of integers in [0, {n})")
        if not 1 <= batch <= len(ids):
            raise BatchError(f"batch must be between 1 and the {len(ids)} examples there are, got {batch}")
        if steps < 1:
            raise BatchError(f"steps must be at least 1, got {steps}")
        if not 0 <= seed < 2**64:
            raise BatchError(f"seed must be in [0, 2**64), got {seed}")
        self._arrays = dict(arrays)
        self._batch = batch
        self._steps = steps
        self._an_epoch = len(ids) // batch
        ids = ids.astype(np.int32)

        @lru_cache(maxsize=1)
        def permuted(epoch: int) -> np.ndarray:
            return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(ids)

        self._permuted = permuted

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, t: int) -> dict[str, np.ndarray]:
        """Batch t: rows `[batch, ...]` of every array, and `index`, int32[batch]. `IndexError` outside [0, T)."""
        t = operator.index(t)
        if not 0 <= t < self._steps:
            raise IndexError(f"batch {t} of {self._steps}")
        epoch, place = divmod(t, self._an_epoch)
        index = self._permuted(epoch)[place * self._batch : (place + 1) * self._batch].copy()
        return {**{name: array.take(index, axis=0) for name, array in self._arrays.items()}, "index": index}
