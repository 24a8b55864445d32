"""Files that are whole or absent, whatever happens while they are written."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path`, bring it to the disk, and put it in the place of `path` in one move.

    A process that is killed on the way leaves the old file, and at most a `.partial` one that the next call overwrites.
    """
    partial = path.with_name(path.name + ".partial")
    # Some writers (safetensors) make files for their owner alone: this one is like any other.
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    write(partial)
    partial.chmod(mode)
    _sync(partial)
    os.replace(partial, path)
    _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file by text, UTF-8."""
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def append_text(path: Path, text: str) -> None:
    """Append text, UTF-8, and bring it to the disk. A process that is killed on the way can leave a part of it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    # Windows opens no directories.
    with suppress(PermissionError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
