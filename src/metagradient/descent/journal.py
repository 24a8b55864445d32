"""The journal of a descent: a directory from which it goes on exactly where it was, whenever it was killed.

    records.jsonl       a line a meta-step: what was found; the same bytes however often the descent was interrupted
    timings.jsonl       a line a meta-step: what it took
    kept/               the z of every n-th meta-step, where `keep` asks for them
    finalists.jsonl     a line for each training on which candidates were tried again
    descent.safetensors z, the best z, the update's memory, and the last line of records.jsonl

A meta-step is done once the last of these has taken the place of its predecessor, in one move. The line is appended to
`records.jsonl` after that; where a kill came between, or tore the line, opening the journal completes it.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from metagradient.errors import ConfigError, StoreError
from metagradient.files import append_text, replace_file, write_text
from metagradient.metaparameters import PerExample, PerGroup, is_kind
from metagradient.shown import Shown
from metagradient.step.segment import Segment
from metagradient.trees import PyTree, is_key, paths

RECORDS, TIMINGS, STATE = "records.jsonl", "timings.jsonl", "descent.safetensors"


@dataclass(frozen=True, repr=False)
class Best(Shown):
    """The best metaparameters so far.

    Arguments:
        step: meta-step at whose start they stood.
        score: what was measured at them, averaged over seeds: the held-out value; without one, the objective's.
        z: they themselves.
    """

    step: int
    score: float
    z: PyTree


@dataclass(frozen=True)
class Position:
    """All that the next meta-step depends on.

    Arguments:
        step: its number, which is how many were taken.
        z: metaparameters.
        memory: of the update.
        best: so far; None before the first meta-step.
        segment: how steps are compiled; None where that is still to be chosen.
    """

    step: int
    z: PyTree
    memory: PyTree
    best: Best | None
    segment: Segment | None


class Journal:
    """Where a descent writes down what it did.

    Arguments:
        directory: made where absent, at the first meta-step.
        identity: what a descent must share with the one that began the journal, by name: plain JSON.
        also: more of it, that takes work, or that can't be had of another descent's z: asked for when the rest agrees.
        start: position at which a new descent starts.

    Errors: `ConfigError` where the directory holds another descent, or records of something else; `StoreError` where
        files are damaged, or can't be read or written.
    """

    def __init__(
        self, directory: Path, identity: dict[str, Any], start: Position, also: Callable[[], dict[str, Any]] = dict
    ):
        self.directory = directory
        self._before = 0, 0  # bytes of records.jsonl, and their checksum
        known = json.loads(json.dumps(identity))
        try:
            stored = self._stored() if (directory / STATE).exists() else None
            if stored:
                self._refuse({name: x for name, x in stored[0]["identity"].items() if name in known}, known)
            self._identity = {**known, **json.loads(json.dumps(also()))}
            self.position = self._restored(start, *stored) if stored else self._fresh(start)
        except OSError as error:
            raise _as_store_error(f"{directory} can't be read", error) from error

    def commit(self, position: Position, record: dict[str, Any], timing: dict[str, Any]) -> None:
        """A meta-step is done: the descent stands at `position`, whatever happens from now on."""
        line = json.dumps(record) + "\n"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            append_text(self.directory / TIMINGS, json.dumps(timing) + "\n")
            self._write(position, line)
            append_text(self.directory / RECORDS, line)
        except (OSError, SafetensorError) as error:
            raise _as_store_error(f"meta-step {record['step']} can't be written to {self.directory}", error) from error
        self._count(line)

    def _refuse(self, begun: dict[str, Any], given: dict[str, Any]) -> None:
        differences = list(_differences(begun, given))
        if differences:
            raise ConfigError(
                f"{self.directory} holds another descent: {'; '.join(differences)}. Choose another directory, or go on "
                "with what this one was begun with"
            )

    def _fresh(self, start: Position) -> Position:
        if (self.directory / RECORDS).exists():
            raise ConfigError(
                f"{self.directory} holds {RECORDS} without {STATE}: it can't be resumed. Choose another directory"
            )
        (self.directory / TIMINGS).unlink(missing_ok=True)
        return start

    def _write(self, position: Position, line: str) -> None:
        arrays = {name: _on_host(leaf) for name, leaf in _leaves(position)}
        best = position.best
        header = {
            "identity": self._identity,
            "step": position.step,
            "best": {"step": best.step, "score": best.score} if best else None,
            "segment": asdict(position.segment) if position.segment else None,
            "before": self._before,
            "line": line,
            "checksums": {name: crc32(array.tobytes()) for name, array in arrays.items()},
        }
        text = json.dumps(header)
        # One entry: safetensors writes several in any order.
        note = {"descent": f"{crc32(text.encode())} {text}"}
        replace_file(self.directory / STATE, lambda path: save_file(arrays, path, metadata=note))

    def _stored(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        file = self.directory / STATE
        try:
            with safe_open(file, framework="numpy") as stored:
                header = _header(file, stored.metadata())
                arrays = {name: stored.get_tensor(name) for name in header["checksums"]}
        except SafetensorError as error:
            raise StoreError(f"{file} is damaged: {error}") from error
        return header, arrays

    def _restored(self, start: Position, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Position:
        self._refuse(header["identity"], self._identity)
        for name, array in arrays.items():
            if crc32(array.tobytes()) != header["checksums"][name]:
                raise StoreError(f"{self.directory / STATE} was changed on disk: {name} fails its checksum")
        self._complete(header)

        def restored(part: str, like: PyTree) -> PyTree:
            leaves = [_placed(arrays[part + path], leaf) for path, leaf in paths(like)]
            return jax.tree.unflatten(jax.tree.structure(like), leaves)

        best = Best(**header["best"], z=restored("best", start.z)) if header["best"] else None
        segment = Segment(**header["segment"]) if header["segment"] else None
        return Position(header["step"], restored("z", start.z), restored("memory", start.memory), best, segment)

    def _complete(self, header: dict[str, Any]) -> None:
        """Append what is missing of the last line, and drop timings of a meta-step that was not done."""
        records = self.directory / RECORDS
        found = records.read_bytes() if records.exists() else b""
        length, checksum = header["before"]
        before, last, line = found[:length], found[length:], header["line"].encode()
        if len(before) < length or crc32(before) != checksum or not line.startswith(last):
            raise StoreError(f"{records} was changed on disk: it is not what the descent wrote")
        if last != line:
            append_text(records, line[len(last) :].decode())
        self._before = length, checksum
        self._count(header["line"])
        timings = self.directory / TIMINGS
        try:
            taken = read_lines(timings)
            for number, line in enumerate(taken, 1):
                if not isinstance(line, dict):
                    raise StoreError(f"{timings} was changed on disk: line {number} is no JSON object")
        except StoreError as error:
            raise StoreError(f"{error}. It holds nothing but timings: remove it, and the descent goes on") from error
        kept = [t for t in taken if isinstance(t.get("step"), int) and t["step"] < header["step"]]
        write_text(timings, "".join(json.dumps(t) + "\n" for t in kept))

    def _count(self, line: str) -> None:
        length, checksum = self._before
        self._before = length + len(line.encode()), crc32(line.encode(), checksum)


def read_lines(path: Path) -> list[Any]:
    """The lines of a file of JSON lines, but for a last one that is torn; none where it is absent.

    Errors: `StoreError` for a whole line that isn't JSON: no kill makes one.
    """
    *lines, _torn = (path.read_bytes() if path.exists() else b"").split(b"\n")
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1)]


def _parsed(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except ValueError as error:
        raise StoreError(f"{path} was changed on disk: line {number} is no JSON ({error})") from error


def whole_lines(path: Path) -> list[Any]:
    """As `read_lines`, and a last line that a kill tore is cut off the file: what is appended starts a line."""
    lines = read_lines(path)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def described(tree: PyTree) -> dict[str, str]:
    """What each leaf of a tree is, in words, by path: kind, dtype, shape, and the examples or groups that it covers."""

    def words(kind: Any) -> str:
        arrays = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(kind)]
        rows = kind.rows if isinstance(kind, PerExample) else None
        groups = kind.groups if isinstance(kind, PerGroup) else None
        covers = [] if rows is None else [f"of rows with checksum {crc32(rows.tobytes())}"]
        covers += [] if groups is None else [f"of groups with checksum {crc32(groups.tobytes())}"]
        return " ".join([*([type(kind).__name__] if is_kind(kind) else []), *arrays, *covers])

    leaves = jax.tree.flatten_with_path(tree, is_leaf=is_kind)[0]
    return {jax.tree_util.keystr(path): words(kind) for path, kind in leaves}


def checksum(tree: PyTree) -> int:
    """Checksum of the content of all leaves."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total = crc32(_on_host(leaf).tobytes(), total)
    return total


def _differences(begun: dict[str, Any], given: dict[str, Any], where: str = "") -> Iterable[str]:
    for name in dict.fromkeys((*begun, *given)):
        was, now = begun.get(name), given.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{where}{name}")
        elif was != now:
            yield f"{where}{name} was {was}, now it is {now}"


def _leaves(position: Position) -> Iterable[tuple[str, jax.Array]]:
    parts = {"z": position.z, "best": position.best.z if position.best else None, "memory": position.memory}
    return ((part + path, leaf) for part, tree in parts.items() for path, leaf in paths(tree))


def _on_host(x: jax.Array) -> np.ndarray:
    return np.array(jax.random.key_data(x) if is_key(x) else x, order="C")


def _placed(array: np.ndarray, like: jax.Array) -> jax.Array:
    """A stored leaf, of the kind that `like` is, where that is."""
    leaf = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like)) if is_key(like) else array
    return jax.device_put(leaf, like.sharding if like.committed else None)


def _header(file: Path, metadata: dict[str, str] | None) -> dict[str, Any]:
    checksum, _, text = (metadata or {}).get("descent", "").partition(" ")
    if checksum != str(crc32(text.encode())):
        raise StoreError(f"{file} was changed on disk: its header fails its checksum")
    return json.loads(text)


def _as_store_error(what: str, error: Exception) -> StoreError:
    return error if isinstance(error, StoreError) else StoreError(f"{what}: {error}")
