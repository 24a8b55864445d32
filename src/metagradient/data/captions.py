"""Captions as numbers: every word as hashes of itself and of the character n-grams in it, of one shape for all."""

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_WORD = re.compile(r"[^\W_]+", re.UNICODE)


@dataclass(frozen=True)
class HashedWords:
    """A tokeniser without a vocabulary: a word is a bag of hashed pieces, so that a word never seen shares some.

    The pieces of `cats` are `<cats>`, `<ca`, `cat`, `ats`, `ts>`, as in fastText (Bojanowski et al., 2017). Words are
    runs of letters and digits, in lower case.

    Arguments:
        size: number of ids: 0 is padding, pieces hash to 1 .. size - 1.
        words: words a caption; more are cut off.
        pieces: pieces a word; more are cut off.
        n: length of the n-grams.
    """

    size: int = 4096
    words: int = 8
    pieces: int = 8
    n: int = 3

    def __call__(self, captions: Iterable[str]) -> np.ndarray:
        """Ids of captions, int32[captions, words, pieces]."""
        known = lru_cache(maxsize=None)(self._pieces)
        captions = list(captions)
        ids = np.zeros((len(captions), self.words, self.pieces), np.int32)
        for row, caption in zip(ids, captions, strict=True):
            for place, word in zip(row, words(caption), strict=False):
                pieces = known(word)
                place[: len(pieces)] = pieces
        return ids

    def _pieces(self, word: str) -> list[int]:
        whole = f"<{word}>"
        grams = [whole[i : i + self.n] for i in range(len(whole) - self.n + 1)]
        # The word by a name that no n-gram has.
        names = [f"={word}", *grams][: self.pieces]
        return [1 + zlib.crc32(name.encode()) % (self.size - 1) for name in names]


def words(caption: str) -> list[str]:
    """The words of a caption: runs of letters and digits, in lower case.

    >>> words("flag: St. Kitts & Nevis_01")
    ['flag', 'st', 'kitts', 'nevis', '01']
    """
    return _WORD.findall(caption.lower())
