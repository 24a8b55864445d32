"""Image–text pairs from webdataset / DataComp tar shards, and DataComp's files of uids."""

import json
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np

from metagradient.data.shards import Fault, Faults, RawPair, raw_pairs, shard_files
from metagradient.errors import DataError

_UID = np.dtype("u8,u8")
_MOST_PIXELS = 2**26


@dataclass(frozen=True, eq=False)
class Pair:
    """An image and its caption.

    Arguments:
        image: uint8[size, size, 3].
        caption: its text, stripped of white space around it.
        uid: 32 hexadecimal digits, lower case.
        record: all that its json holds.
    """

    image: np.ndarray
    caption: str
    uid: str
    record: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Pool:
    """Pairs in memory.

    Arguments:
        images: uint8[n, size, size, 3].
        captions: n texts.
        uids: n times 32 hexadecimal digits.
        records: what each pair's json holds.
        faults: what was wrong with their shards.
    """

    images: np.ndarray
    captions: tuple[str, ...]
    uids: tuple[str, ...]
    records: tuple[dict[str, Any], ...]
    faults: Faults

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, rows: Any) -> Self:
        """The pairs at `rows`, int[m] or bool[n], copied; faults stay."""
        ids = np.arange(len(self))[rows]
        captions, uids, records = (tuple(of[i] for i in ids) for of in (self.captions, self.uids, self.records))
        return replace(self, images=self.images[ids], captions=captions, uids=uids, records=records)

    def column(self, name: str) -> np.ndarray:
        """What every json holds under a name, object[n]; None where it doesn't."""
        values = np.empty(len(self), object)
        values[:] = [record.get(name) for record in self.records]
        return values


def read_pairs(source: str | Path | Iterable[str | Path], size: int) -> Iterator[Pair | Fault]:
    """The pairs of tar shards one by one, and what is wrong with them, in the order of the shards.

    Arguments:
        source: a directory of `NNNNNNNN.tar`, a tar, or several.
        size: images are brought to size x size pixels: their shorter side scaled (bicubic), their middle cut out. What
            is transparent becomes white.

    Errors: `DataError` where there are no shards. What is wrong with a shard or a pair is no error but a `Fault`; the
        pair is skipped.

    Cost: the memory of a pair, and about 100 bytes for every uid that came before.
    """
    files, seen = shard_files(source), set()
    return _decoded(files, size, seen)


def _decoded(files: list[Path], size: int, seen: set[int]) -> Iterator[Pair | Fault]:
    for raw in raw_pairs(files):
        found = raw if isinstance(raw, Fault) else _decode(raw, size)
        if isinstance(found, Pair):
            uid = int(found.uid, 16)
            if uid in seen:
                found = Fault("duplicate uid", raw.where, found.uid)
            seen.add(uid)
        yield found


def pair_batches(source: str | Path | Iterable[str | Path], size: int, batch: int, faults: Faults) -> Iterator[Pool]:
    """The pairs of tar shards in batches: for pools larger than memory.

    Arguments:
        source, size: as in `read_pairs`.
        batch: pairs a batch; the last one may have fewer.
        faults: gains what is wrong.

    Errors: as `read_pairs`. Cost: the memory of a batch.
    """

    def good() -> Iterator[Pair]:
        for found in read_pairs(source, size):
            if isinstance(found, Fault):
                faults.add(found)
            else:
                yield found

    pairs = good()
    while chunk := list(islice(pairs, batch)):
        yield _collected(chunk, faults)


def load_pool(source: str | Path | Iterable[str | Path], size: int, *, limit: int | None = None) -> Pool:
    """All pairs of tar shards, or the first few, in memory.

    Arguments:
        source, size: as in `read_pairs`.
        limit: pairs at most; None for all.

    Returns: the pairs that can be used; its `faults` count and name the others.

    Errors: `DataError` where there are no shards, or no pair in them that can be used.

    Cost: about 0.3 ms a pair of small PNGs, and 3 size² bytes.
    """
    faults = Faults()
    pool = next(pair_batches(source, size, 2**62 if limit is None else limit, faults), None)
    if pool is None:
        raise DataError(f"{source}: no image–text pair can be used; {faults}")
    return pool


def _collected(pairs: list[Pair], faults: Faults) -> Pool:
    return Pool(
        np.stack([pair.image for pair in pairs]),
        tuple(pair.caption for pair in pairs),
        tuple(pair.uid for pair in pairs),
        tuple(pair.record for pair in pairs),
        faults,
    )


def _decode(raw: RawPair, size: int) -> Pair | Fault:
    try:
        record = json.loads(raw.json)
    # A json nested thousands deep runs out of stack.
    except (ValueError, RecursionError) as error:
        return Fault("unreadable json", raw.where, str(error))
    if not isinstance(record, dict):
        return Fault("unreadable json", raw.where, f"a {type(record).__name__}, not an object")
    uid = str(record.get("uid", "")).lower()
    if len(uid) != 32 or not set(uid) <= set("0123456789abcdef"):
        return Fault("bad uid", raw.where, repr(record.get("uid")))
    try:
        caption = raw.caption.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        return Fault("unreadable caption", raw.where, str(error))
    try:
        image = _image(raw.image, size)
    except _UNDECODABLE as error:
        return Fault("unreadable image", raw.where, str(error))
    return Pair(image, caption, uid, record)


# What Pillow raises on broken files, its decoders' own slips included.
_UNDECODABLE = (
    OSError, ValueError, TypeError, SyntaxError, EOFError, IndexError, KeyError, OverflowError, struct.error, zlib.error
)  # fmt: skip


def _image(content: bytes, size: int) -> np.ndarray:
    """An encoded image as uint8[size, size, 3]."""
    from PIL import Image, ImageOps

    with _opened(content) as image:
        clear = "A" in image.getbands() or "transparency" in image.info
        rgb = image.convert("RGBA" if clear else "RGB")
    if clear:
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    if rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb)


def _opened(content: bytes) -> Any:
    """An image whose pixels aren't read yet, unless it has too many: a small file can hold one larger than memory."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(BytesIO(content))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ValueError(str(error)) from error
    if image.width * image.height > _MOST_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    return image


def write_uids(path: str | Path, uids: Iterable[str]) -> None:
    """Write uids as DataComp's resharder reads them: `.npy`, sorted pairs of their upper and lower 64 bits.

    Arguments:
        path: the file.
        uids: 32 hexadecimal digits each.

    Errors: `DataError` for a uid that is something else.

    Source: S. Gadre et al., "DataComp", NeurIPS 2023; github.com/mlfoundations/datacomp.
    """
    halves = []
    for uid in uids:
        try:
            upper, lower = struct.unpack(">QQ", bytes.fromhex(uid))
        except (ValueError, struct.error) as error:
            raise DataError(f"a uid is 32 hexadecimal digits, not {uid!r}") from error
        halves.append((upper, lower))
    with Path(path).open("wb") as file:
        np.save(file, np.sort(np.array(halves, _UID)))


def read_uids(path: str | Path) -> list[str]:
    """The uids of a file that `write_uids` or DataComp's filters wrote, in its order, as 32 hexadecimal digits.

    Errors: `DataError` for a file that is absent, or holds something else.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} can't be read as a file of uids: {error}") from error
    if not isinstance(found, np.ndarray) or found.dtype != _UID or found.ndim != 1:
        raise DataError(f'{path} holds no uids: they are a vector of dtype "u8,u8"')
    return [f"{upper:016x}{lower:016x}" for upper, lower in found.tolist()]
