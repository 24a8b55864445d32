"""Filters of image–text pools that a practitioner would try first. None reads which pairs are mismatched."""

import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from metagradient.data.captions import words
from metagradient.data.image_text import Pool
from metagradient.errors import ConfigError

_HASH_SIDE = 8


@dataclass(frozen=True)
class CaptionRules:
    """Rules on captions after DataComp's basic filter, which asks for English, more than two words and five characters.

    Without a language model, English is a share of ASCII letters.

    Arguments:
        words: at least so many.
        characters: at least so many.
        letters: at least this share of the characters, white space apart, are ASCII letters.

    Source: S. Gadre et al., "DataComp", NeurIPS 2023, section 4.
    """

    words: int = 3
    characters: int = 6
    letters: float = 0.5

    def __call__(self, pool: Pool) -> np.ndarray:
        """Which pairs are kept, bool[n]."""
        return np.array([self._keeps(caption) for caption in pool.captions], bool)

    def _keeps(self, caption: str) -> bool:
        solid = "".join(caption.split())
        letters = sum(c.isascii() and c.isalpha() for c in solid)
        return (
            len(words(caption)) >= self.words
            and len(caption) >= self.characters
            and letters >= self.letters * len(solid)
        )


def without_duplicates(pool: Pool) -> np.ndarray:
    """All but repetitions, bool[n]: of pairs with one caption, or with images that are nearly one, the first is kept.

    Captions are compared by their words. Images are compared by 8 x 8 means, each reduced to two bits a channel and a
    place and to the signs of neighbours' differences: re-encoded and slightly scaled copies share them.
    """
    seen: set[Hashable] = set()
    kept = np.zeros(len(pool), bool)
    for i, (caption, image) in enumerate(zip(pool.captions, pool.images, strict=True)):
        names: set[Hashable] = {("caption", tuple(words(caption))), ("image", image_hash(image))}
        kept[i] = not names & seen
        seen |= names
    return kept


def image_hash(image: np.ndarray) -> str:
    """A hash that near-duplicates share.

    Arguments:
        image: uint8[size, size, 3], of at least 8 x 8 pixels.

    Errors: `ConfigError` for a smaller one.
    """
    size = image.shape[0] // _HASH_SIDE * _HASH_SIDE
    if not size:
        raise ConfigError(f"images of {image.shape[0]} pixels are too small to hash: 8 x 8 at least")
    step = size // _HASH_SIDE
    squares = image[:size, :size].astype(np.float32).reshape(_HASH_SIDE, step, _HASH_SIDE, step, 3).mean((1, 3))
    grey = squares.mean(-1)
    # A difference of less than a grey level is noise.
    across, down = (np.diff(grey, axis=axis) > 1 for axis in (0, 1))
    colours = (squares / 64).astype(np.uint8)
    return hashlib.md5(across.tobytes() + down.tobytes() + colours.tobytes(), usedforsecurity=False).hexdigest()


def drawn(weights: np.ndarray, count: int, seed: int) -> np.ndarray:
    """How often each pair comes in a draw in proportion to weights, int[n], in all `count` times.

    A pair whose share of the count is x comes floor(x) or ceil(x) times, x times on average (systematic sampling).

    Arguments:
        weights: float[n], from 0, not all 0.
        count: how many are drawn.
        seed: of the one number that chance decides.
    """
    ends = np.cumsum(weights, dtype=np.float64)
    ends = np.append(ends[:-1] / ends[-1] * count, count)
    return np.diff(np.floor(ends + np.random.default_rng(seed).random()), prepend=0).astype(int)


@dataclass(frozen=True)
class Candidate:
    """One setting of a filter.

    Arguments:
        name: the setting, in words.
        rows: the pairs it keeps, int[m], some perhaps repeatedly.
        recall: what models trained on them reached on held-out pairs; NaN where it wasn't tried.
    """

    name: str
    rows: np.ndarray
    recall: float = float("nan")


def chosen(
    candidates: Sequence[tuple[str, np.ndarray]], recall: Callable[[str, np.ndarray], float], fewest: int
) -> Candidate:
    """The setting of a filter that does best on held-out pairs.

    Arguments:
        candidates: settings by name, and which pairs each keeps, bool[n], or how often, int[n].
        recall: `(name, rows) -> recall` on held-out pairs of models trained on those rows. Not called where there is
            nothing to choose.
        fewest: settings that keep fewer pairs are left out: they make no batch.

    Errors: `ConfigError` where all keep too few.
    """
    able = [Candidate(name, np.repeat(np.arange(len(kept)), kept)) for name, kept in candidates if kept.sum() >= fewest]
    if not able:
        names = ", ".join(name for name, _ in candidates)
        raise ConfigError(f"every setting of a filter ({names}) keeps fewer pairs than a batch of {fewest}")
    if len(able) == 1:
        return able[0]
    tried = [Candidate(c.name, c.rows, recall(c.name, c.rows)) for c in able]
    return max(tried, key=lambda c: c.recall)
