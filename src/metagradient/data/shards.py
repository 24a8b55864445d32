"""Tar shards of image–text pairs, read in place: what is damaged is named and skipped, and reading goes on.

A shard holds the members of a pair one after the other, under one key: `KEY.png` (or another image), `KEY.txt` and
`KEY.json`, as webdataset and DataComp write them. Nothing is unpacked to disk.
"""

import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Literal, TypeAlias, get_args

from metagradient.errors import DataError

FaultKind: TypeAlias = Literal[
    "damaged tar",
    "unsafe name",
    "not a file",
    "repeated part",
    "missing image",
    "missing caption",
    "missing json",
    "unreadable image",
    "unreadable caption",
    "unreadable json",
    "bad uid",
    "duplicate uid",
]
"""What can be wrong with a shard, a member, or a pair.

    damaged tar         cut short, or a header that is none: what comes after it in this shard is not read
    unsafe name         absolute, or with `..`, a backslash, a drive or a control character: the member is refused
    not a file          a link, a device, a pipe: the member is refused (directories are passed over in silence)
    repeated part       a second image, caption or json under one key: the first counts
    missing ...         the pair lacks it, and is skipped
    unreadable ...      an image that can't be decoded, a caption that isn't UTF-8, a json that is no object: skipped
    bad uid             the json's `uid` isn't 32 hexadecimal digits: skipped
    duplicate uid       a pair with this uid came before: skipped
"""

IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp")
"""Endings of images."""

_BLOCK = 512
_UNSAFE = re.compile(r"^/|^[A-Za-z]:|(^|/)\.\.(/|$)|[\\\x00-\x1f\x7f]")
_NAMED = 5
# A pair's part past this is no thumbnail, caption or record: its header lies, or is hostile.
_MOST_BYTES = 2**28


@dataclass(frozen=True)
class Fault:
    """Something wrong.

    Arguments:
        kind: what.
        where: shard, and member or key in it.
        detail: what the reader said of it.
    """

    kind: FaultKind
    where: str
    detail: str = ""


@dataclass
class Faults:
    """Faults, counted by kind, with the names of the first few of each.

    Arguments:
        counts: how many, by kind.
        named: where the first ones were, by kind.
    """

    counts: Counter[FaultKind] = field(default_factory=Counter)
    named: dict[FaultKind, list[str]] = field(default_factory=dict)

    def add(self, fault: Fault) -> None:
        """Count one."""
        self.counts[fault.kind] += 1
        named = self.named.setdefault(fault.kind, [])
        if len(named) < _NAMED:
            named.append(f"{fault.where}: {fault.detail}" if fault.detail else fault.where)

    def __str__(self) -> str:
        if not self.counts:
            return "no faults"
        parts = []
        for kind in get_args(FaultKind):
            if count := self.counts[kind]:
                more = f", and {count - len(self.named[kind])} more" if count > len(self.named[kind]) else ""
                parts.append(f"{count} x {kind} ({'; '.join(self.named[kind])}{more})")
        return "\n".join(parts)


@dataclass(frozen=True)
class RawPair:
    """A pair as it lies in its shard: encoded image, and the bytes of caption and json.

    Arguments:
        where: shard and key.
    """

    where: str
    image: bytes
    caption: bytes
    json: bytes


def shard_files(source: str | Path | Iterable[str | Path]) -> list[Path]:
    """The tars that a source names: those of a directory called `NNNNNNNN.tar`, in order, or those given.

    Errors: `DataError` for a directory without any, or a file that isn't there.
    """
    if isinstance(source, (str, Path)):
        source = Path(source)
        if source.is_dir():
            found = sorted(p for p in source.glob("*.tar") if p.stem.isdigit())
            if not found:
                raise DataError(f"{source} holds no shards: name a directory with 00000000.tar, 00000001.tar, ...")
            return found
        source = [source]
    files = [Path(file) for file in source]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is absent: name tar shards, or a directory of them")
    return files


def raw_pairs(files: Iterable[Path]) -> Iterator[RawPair | Fault]:
    """The pairs of some shards, and what is wrong, in the order of the files.

    Cost: the memory of one pair.
    """
    for file in files:
        yield from _pairs_of(file)


def _pairs_of(file: Path) -> Iterator[RawPair | Fault]:
    key, parts = None, {}
    for found in _members(file):
        if isinstance(found, Fault):
            yield found
            continue
        name, content = found
        path = PurePosixPath(name)
        # As webdataset has it: the key ends at the first dot of the file's name.
        stem, _, ending = path.name.partition(".")
        here, ending = str(path.with_name(stem)) if stem else name, ending.lower()
        if here != key:
            if key is not None:
                yield from _finished(file, key, parts)
            key, parts = here, {}
        part = "image" if ending in IMAGES else {"txt": "caption", "json": "json"}.get(ending)
        if part is None:
            continue
        if part in parts:
            yield Fault("repeated part", f"{file.name}:{ascii(name)[1:-1]}", f"a second {part}")
            continue
        parts[part] = content
    if key is not None:
        yield from _finished(file, key, parts)


def _finished(file: Path, key: str, parts: dict[str, bytes]) -> Iterator[RawPair | Fault]:
    """A pair whose members have all been read. Members of other kinds alone (a README) are no pair."""
    where = f"{file.name}:{ascii(key)[1:-1]}"
    if not parts:
        return
    missing: dict[str, FaultKind] = {"image": "missing image", "caption": "missing caption", "json": "missing json"}
    for part, kind in missing.items():
        if part not in parts:
            yield Fault(kind, where)
            return
    yield RawPair(where, parts["image"], parts["caption"], parts["json"])


def _members(file: Path) -> Iterator[tuple[str, bytes] | Fault]:
    """Names and contents of a tar's files. A tar that is damaged ends in a fault."""
    try:
        with file.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                # tarfile keeps every member it has seen; a shard is walked once.
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]
                yield from _member(file, tar, member)
            # For tarfile a header that is none ends the archive like a proper end does.
            yield from _end(file, stream, tar.offset)
    except (tarfile.TarError, OSError, ValueError, UnicodeError) as error:
        yield Fault("damaged tar", file.name, str(error))


def _member(file: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[tuple[str, bytes] | Fault]:
    where = f"{file.name}:{ascii(member.name)[1:-1]}"
    if _UNSAFE.search(member.name):
        yield Fault("unsafe name", where)
    elif member.isdir():
        return
    elif not member.isfile():
        yield Fault("not a file", where)
    elif member.size > _MOST_BYTES:
        yield Fault("damaged tar", where, f"a member of {member.size} bytes")
    else:
        content = tar.extractfile(member)
        assert content is not None
        yield member.name, content.read()


def _end(file: Path, stream: IO[bytes], offset: int) -> Iterator[Fault]:
    stream.seek(offset)
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK:
        yield Fault("damaged tar", file.name, "it ends without an end mark: cut short")
    elif any(block):
        yield Fault("damaged tar", file.name, f"no header at byte {offset}")
