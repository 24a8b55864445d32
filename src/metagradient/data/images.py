"""Labelled images: scikit-learn's digits, and CIFAR-10 with CIFAR-10N's human labels."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import numpy as np

from metagradient.errors import DataError

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images in memory.

    Arguments:
        images: float32[n, height, width, channels] in [0, 1].
        labels: int32[n], the true classes.
        observed: int32[n], the labels that an annotator gave, some of them wrong; None where there are only true ones.
        classes: names of the classes.
    """

    images: np.ndarray
    labels: np.ndarray
    observed: np.ndarray | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Any) -> Self:
        """The images at `rows`, int[m] or bool[n], copied."""
        observed = None if self.observed is None else self.observed[rows]
        return replace(self, images=self.images[rows], labels=self.labels[rows], observed=observed)

    def shrunk(self, factor: int) -> Self:
        """The images with every `factor` x `factor` square averaged to one pixel.

        Errors: `DataError` where `factor` doesn't divide height and width.
        """
        n, height, width, channels = self.images.shape
        if factor < 1 or height % factor or width % factor:
            raise DataError(f"images of {height} x {width} can't be shrunk by {factor}: it must divide both")
        squares = self.images.reshape(n, height // factor, factor, width // factor, factor, channels)
        return replace(self, images=squares.mean(axis=(2, 4)))


def load_digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, float32[1797, 8, 8, 1]; they come with that package.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test split).

    >>> load_digits().images.shape
    (1797, 8, 8, 1)
    """
    from sklearn import datasets

    digits: Any = datasets.load_digits()
    images = (digits.images[..., None] / 16).astype(np.float32)
    return Images(images, digits.target.astype(np.int32), None, tuple("0123456789"))


def load_cifar10(
    directory: str | Path, labels: str | None = "worse", *, split: str = "train", limit: int | None = None
) -> Images:
    """CIFAR-10 in the Parquet layout of `uoft-cs/cifar10`, with CIFAR-10N's human labels.

    Arguments:
        directory: holds `train-*.parquet`, `test-*.parquet` (columns `img`, `label`) and `cifar10n.parquet`
            (`index`, `clean`, and a column for every label set).
        labels: column of `cifar10n.parquet` for `observed` (`worse`, `aggre`, `random1`, ...); None for none. The test
            split has no human labels, so there it is ignored.
        split: "train" or "test".
        limit: number of images, from the first; None for all.

    Returns: images float32[n, 32, 32, 3].

    Errors: `DataError` for a file or column that is absent, an image that can't be read, human labels that belong to
        other images, or a limit that the data can't meet.

    Cost: about 0.2 ms an image, and 12 kB; all 50,000 take 600 MB.

    Source: A. Krizhevsky, 2009; J. Wei et al., "Learning with Noisy Labels Revisited", ICLR 2022.
    """
    if split not in ("train", "test"):
        raise DataError(f"split must be 'train' or 'test', got {split!r}")
    files = sorted(Path(directory).glob(f"{split}-*.parquet"))
    if not files:
        raise DataError(f"{directory} holds no {split}-*.parquet: name a directory with CIFAR-10 in Parquet")
    images, clean = _columns(files, ("img", "label"), limit)
    if limit is not None and not 1 <= limit <= len(clean):
        raise DataError(f"limit must be between 1 and the {len(clean)} images of {split}, got {limit}")
    clean = clean.to_numpy().astype(np.int32)
    observed = None
    if labels is not None and split == "train":
        observed = _human_labels(Path(directory) / "cifar10n.parquet", labels, clean)
    pixels = _decoded((row["bytes"].as_py() for row in images), files[0].parent)
    return Images(pixels, clean, observed, _CIFAR10)


def _columns(files: list[Path], names: tuple[str, ...], limit: int | None = None) -> list[Any]:
    import pyarrow as pa
    from pyarrow import dataset

    try:
        source = dataset.dataset([str(file) for file in files], format="parquet")
        missing = sorted(set(names) - set(source.schema.names))
        if missing:
            raise DataError(f"{files[0]} has no column {', '.join(missing)}; it has {', '.join(source.schema.names)}")
        columns = list(names)
        table = source.to_table(columns=columns) if limit is None else source.head(max(limit, 0), columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{files[0]} can't be read as Parquet: {error}") from error
    return [table[name] for name in names]


def _human_labels(file: Path, name: str, clean: np.ndarray) -> np.ndarray:
    if not file.is_file():
        raise DataError(f"{file} is absent: it holds the human labels {name!r}; labels=None does without")
    index, stated, given = (column.to_numpy() for column in _columns([file], ("index", "clean", name)))
    order = np.argsort(index)[: len(clean)]
    if not np.array_equal(index[order], np.arange(len(clean))) or not np.array_equal(stated[order], clean):
        raise DataError(f"{file} belongs to other images: its columns index and clean don't match the training labels")
    return given[order].astype(np.int32)


def _decoded(encoded: Iterable[bytes], source: Path) -> np.ndarray:
    from PIL import Image

    pictures = []
    for row, content in enumerate(encoded):
        try:
            pictures.append(np.asarray(Image.open(BytesIO(content)).convert("RGB")))
        except (OSError, TypeError) as error:
            raise DataError(f"{source}: image {row} can't be decoded: {error}") from error
        if pictures[row].shape != pictures[0].shape:
            raise DataError(f"{source}: image {row} is {pictures[row].shape}, the first is {pictures[0].shape}")
    return np.stack(pictures).astype(np.float32) / 255
