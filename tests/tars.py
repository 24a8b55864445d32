"""Tar shards that tests write: captioned digits, sound or damaged on purpose."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from metagradient.data.images import load_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS = load_digits()


def uid(number: int) -> str:
    return f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"


def png(image: np.ndarray, size: int = 8) -> bytes:
    """An image float[height, width] in [0, 1] as an encoded RGB picture."""
    file = io.BytesIO()
    Image.fromarray((255 * image).astype(np.uint8)).convert("RGB").resize((size, size)).save(file, "PNG")
    return file.getvalue()


def digit(number: int, caption: str | None = None, **record: Any) -> list[tuple[str, bytes]]:
    """The three members of a captioned digit."""
    key, label = f"{number:09d}", int(DIGITS.labels[number])
    text = f"the digit {WORDS[label]} in its form {number}" if caption is None else caption
    json_ = {"uid": uid(number), "group": WORDS[label], **record}
    return [
        (f"{key}.png", png(DIGITS.images[number, ..., 0])),
        (f"{key}.txt", text.encode()),
        (f"{key}.json", json.dumps(json_).encode()),
    ]


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.size, found.type, found.linkname = size, kind, link
    return found


def write_tar(path: Path, members: Iterable[tuple[str, bytes] | tarfile.TarInfo]) -> Path:
    """A tar of named contents, and of members without any."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                name, content = member
                tar.addfile(info(name, len(content)), io.BytesIO(content))
    return path


def write_pool(directory: Path, pairs: int = 96, *, wrong: int = 24, clean: int = 40) -> Path:
    """A directory like a real one: two shards, some of whose captions are another's; val, test and classes.json."""
    directory.mkdir(exist_ok=True)
    members = []
    for number in range(pairs):
        if number < wrong:
            other = WORDS[(int(DIGITS.labels[number]) + 1 + number % 9) % 10]
            members.append(digit(number, f"the digit {other} in its form {number}", shuffled=True))
        else:
            members.append(digit(number, shuffled=False))
    order = np.random.default_rng(0).permutation(pairs)
    for shard, rows in enumerate(np.array_split(order, 2)):
        write_tar(directory / f"{shard:08d}.tar", [m for row in rows for m in members[row]])
    for start, name in ((pairs, "val.tar"), (pairs + clean, "test.tar")):
        write_tar(directory / name, [m for number in range(start, start + clean) for m in digit(number)])
    (directory / "classes.json").write_text(json.dumps({"groups": list(WORDS), "subgroups": {"zero": ["nought"]}}))
    return directory
