"""Instruction data in the form of LESS and open-instruct: a conversation a line of JSON."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metagradient.errors import DataError
from metagradient.files import write_text

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """A turn of a conversation.

    Arguments:
        role: `system`, `user` or `assistant`.
        content: what is said.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Instruction:
    """A conversation.

    Arguments:
        dataset: where it comes from.
        id: its name.
        messages: its turns; at least one is the assistant's, and none of those is empty.
        extra: any other fields of its line (`task`, `split`, ...).
    """

    dataset: str
    id: str
    messages: tuple[Message, ...]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """The assistant's last turn."""
        return next(m.content for m in reversed(self.messages) if m.role == "assistant")

    def answered(self, answer: str) -> "Instruction":
        """The same with another last turn of the assistant; what follows that turn is dropped."""
        last = max(i for i, m in enumerate(self.messages) if m.role == "assistant")
        return Instruction(self.dataset, self.id, (*self.messages[:last], Message("assistant", answer)), self.extra)


@dataclass(frozen=True)
class Skipped:
    """A line that was left out.

    Arguments:
        file, line: where, lines from 1.
        reason: why, in words.
    """

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


@dataclass(frozen=True)
class Summary:
    """What reading a file came to.

    Arguments:
        read: lines that were taken.
        skipped: lines that were left out.
    """

    read: int
    skipped: tuple[Skipped, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """How many lines were left out for each reason, without its particulars."""
        return dict(Counter(skip.reason.split(":")[0] for skip in self.skipped))

    def __str__(self) -> str:
        why = "; ".join(f"{count} {reason}" for reason, count in self.reasons.items())
        first = f" (the first: {self.skipped[0]})" if self.skipped else ""
        return f"{self.read} conversations read, {len(self.skipped)} lines skipped" + (f": {why}{first}" if why else "")


def read(path: str | Path, *, limit: int | None = None) -> tuple[list[Instruction], Summary]:
    """Conversations of a JSON-lines file.

    A line must be a JSON object in UTF-8 with `dataset` and `id`, strings, and `messages`, a list of objects with
    `role` (`system`, `user`, `assistant`) and `content`, a string. At least one turn must be the assistant's, and none
    of those may be empty or blank. A line that isn't so, or whose id came before, is skipped, and the summary names
    it. Empty lines don't count.

    Arguments:
        path: the file.
        limit: conversations to read, from the first; None for all.

    Returns: the conversations, and what was read and skipped.

    Errors: `DataError` for a file that can't be opened, or holds not one conversation.

    Cost: one line in memory at a time beside what is returned.
    """
    found: list[Instruction] = []
    skipped: list[Skipped] = []
    ids: set[str] = set()
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if limit is not None and len(found) >= limit:
                    break
                if not line.strip():
                    continue
                try:
                    one = _parsed(line)
                    if one.id in ids:
                        raise _Unusable(f"a repeated id: {one.id}")
                except _Unusable as error:
                    skipped.append(Skipped(str(path), number, str(error)))
                else:
                    ids.add(one.id)
                    found.append(one)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}") from error
    summary = Summary(len(found), tuple(skipped))
    if not found:
        raise DataError(f"{path} holds no conversation: {summary}")
    return found, summary


def write(path: str | Path, instructions: Iterable[Instruction]) -> None:
    """Write conversations to a JSON-lines file that `read`, and LESS, take. The file is whole or absent."""
    lines = [json.dumps(_line(one), ensure_ascii=False) + "\n" for one in instructions]
    write_text(Path(path), "".join(lines))


def by_task(instructions: Sequence[Instruction]) -> dict[str, list[int]]:
    """Positions of the conversations of each `task`, or `dataset` where that is absent; in order of appearance."""
    tasks: dict[str, list[int]] = {}
    for i, one in enumerate(instructions):
        tasks.setdefault(str(one.extra.get("task", one.dataset)), []).append(i)
    return tasks


class _Unusable(Exception):
    """Inside this module only: what is wrong with a line."""


def _parsed(line: bytes) -> Instruction:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Unusable(f"not UTF-8: at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise _Unusable("not a JSON object")
    for name in ("dataset", "id"):
        if not isinstance(row.get(name), str):
            raise _Unusable(f"no field {name} that is a string")
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _Unusable("no field messages that is a list")
    turns = tuple(_message(m) for m in messages)
    answers = [m.content for m in turns if m.role == "assistant"]
    if not answers:
        raise _Unusable("no answer")
    if not all(answer.strip() for answer in answers):
        raise _Unusable("an empty answer")
    extra = {name: value for name, value in row.items() if name not in ("dataset", "id", "messages")}
    return Instruction(row["dataset"], row["id"], turns, extra)


def _message(found: Any) -> Message:
    if not isinstance(found, dict) or not isinstance(found.get("content"), str):
        raise _Unusable("a message without content that is a string")
    if found.get("role") not in ROLES:
        raise _Unusable(f"a message of unknown role: {found.get('role')!r}")
    try:
        found["content"].encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Unusable("text that is half a character: a lone surrogate") from error
    return Message(found["role"], found["content"])


def _line(one: Instruction) -> dict[str, Any]:
    messages = [{"role": m.role, "content": m.content} for m in one.messages]
    return {"dataset": one.dataset, "id": one.id, **one.extra, "messages": messages}
