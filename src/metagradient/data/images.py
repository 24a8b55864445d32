"""Labelled images: scikit-learn's digits, and CIFAR-10 with CIFAR-10N's human labels."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Self

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

    def padded(self, multiple: int) -> Self:
        """The images with a border of zeros, as even as can be, up to the next multiple of `multiple` pixels."""
        borders = [(-size % multiple // 2, -(-(-size % multiple) // 2)) for size in self.images.shape[1:3]]
        return replace(self, images=np.pad(self.images, [(0, 0), *borders, (0, 0)]))


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


def load_images(directory: str | Path, split: str = "train", *, limit: int | None = None) -> Images:
    """Labelled images in the Hugging Face Parquet layout: CIFAR-10, MNIST, or any other of one size.

    Arguments:
        directory: holds `<split>-*.parquet`, with a column of encoded images (`img` or `image`, a struct whose `bytes`
            is a PNG, JPEG, ...) and a column `label` of integers from 0. Class names are read from the files' metadata
            where they are there.
        split: "train" or "test".
        limit: number of images, from the first; None for all.

    Returns: images float32[n, height, width, channels], 1 channel where the first is grey, else 3; no `observed`.

    Errors: `DataError` for a file or column that is absent, a label that is negative, an image that can't be read or
        has another size, or a limit that the data can't meet.

    Cost: as `load_cifar10`.
    """
    files = _split_files(directory, split)
    names = _schema(files[0]).names
    column = next((name for name in ("img", "image") if name in names), "img")
    images, labels = _columns(files, (column, "label"), limit)
    _check_limit(limit, len(labels), split)
    labels = labels.to_numpy().astype(np.int32)
    if labels.min(initial=0) < 0:
        raise DataError(f"{directory}: {split} has a negative label; drop unlabelled images")
    pixels = _decoded((row["bytes"].as_py() for row in images), files[0].parent, mode=None)
    classes = _class_names(files[0]) or tuple(str(i) for i in range(labels.max(initial=0) + 1))
    if labels.max(initial=0) >= len(classes):
        raise DataError(f"{directory}: {split} has label {labels.max()}, but {len(classes)} class names")
    return Images(pixels, labels, None, classes)


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
    files = _split_files(directory, split)
    images, clean = _columns(files, ("img", "label"), limit)
    _check_limit(limit, len(clean), split)
    clean = clean.to_numpy().astype(np.int32)
    observed = None
    if labels is not None and split == "train":
        observed = _human_labels(Path(directory) / "cifar10n.parquet", labels, clean)
    pixels = _decoded((row["bytes"].as_py() for row in images), files[0].parent)
    return Images(pixels, clean, observed, _CIFAR10)


def _split_files(directory: str | Path, split: str) -> list[Path]:
    if split not in ("train", "test"):
        raise DataError(f"split must be 'train' or 'test', got {split!r}")
    files = sorted(Path(directory).glob(f"{split}-*.parquet"))
    if not files:
        raise DataError(f"{directory} holds no {split}-*.parquet: name a directory with images in Parquet")
    return files


def _check_limit(limit: int | None, there: int, split: str) -> None:
    if limit is not None and not 1 <= limit <= there:
        raise DataError(f"limit must be between 1 and the {there} images of {split}, got {limit}")


def _schema(file: Path) -> Any:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} can't be read as Parquet: {error}") from error


def _class_names(file: Path) -> tuple[str, ...] | None:
    """Names in the Hugging Face feature description of the column `label`, or None."""
    described = (_schema(file).metadata or {}).get(b"huggingface")
    if not described:
        return None
    names = json.loads(described).get("info", {}).get("features", {}).get("label", {}).get("names")
    return tuple(names) if names else None


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


def _decoded(encoded: Iterable[bytes], source: Path, *, mode: Literal["L", "RGB"] | None = "RGB") -> np.ndarray:
    """Images as float32[n, height, width, channels]; without a mode, grey where the first one is."""
    from PIL import Image

    pictures = []
    for row, content in enumerate(encoded):
        try:
            image = Image.open(BytesIO(content))
            mode = mode or ("L" if image.mode in ("1", "L", "I;16") else "RGB")
            pictures.append(np.atleast_3d(np.asarray(image.convert(mode))))
        except (OSError, TypeError) as error:
            raise DataError(f"{source}: image {row} can't be decoded: {error}") from error
        if pictures[row].shape != pictures[0].shape:
            raise DataError(f"{source}: image {row} is {pictures[row].shape}, the first is {pictures[0].shape}")
    return np.stack(pictures).astype(np.float32) / 255
