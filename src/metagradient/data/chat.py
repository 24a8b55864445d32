"""Conversations as token arrays of one shape: chat templates, loss on the assistant's words alone, truncation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from metagradient.data.instructions import Instruction
from metagradient.errors import ConfigError, DataError

_PROMPT_SHARE = 4  # A truncated conversation keeps at least 1/4 of its tokens for what comes before the answer.


@dataclass(frozen=True)
class Template:
    """How a conversation is written out.

    Arguments:
        begin: before the first turn.
        head, tail: before and after a turn's content; `{role}` is its role. The tail of an assistant's turn is learnt:
            it is how the model says that it is done.
        after: after the tail, never learnt.
        system: a system turn for conversations without one, or None.
        names: of roles, where they differ.
        marks: what a vocabulary for this template must hold as single tokens.
    """

    begin: str
    head: str
    tail: str
    after: str = ""
    system: str | None = None
    names: tuple[tuple[str, str], ...] = ()
    marks: tuple[str, ...] = ()

    def pieces(self, one: Instruction) -> Iterator[tuple[str, bool, bool]]:
        """The written conversation in pieces `(text, whether it is the template's own, whether it is learnt)`."""
        yield self.begin, True, False
        messages = [(m.role, m.content) for m in one.messages]
        if self.system is not None and messages[0][0] != "system":
            messages.insert(0, ("system", self.system))
        names = dict(self.names)
        for role, content in messages:
            learnt = role == "assistant"
            yield self.head.replace("{role}", names.get(role, role)), True, False
            yield content, False, learnt
            yield self.tail, True, learnt
            yield self.after, True, False


_SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
_PLAIN = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

TEMPLATES = {
    "plain": Template("", "<|{role}|>", "<|end|>", marks=_PLAIN),
    "chatml": Template("", "<|im_start|>{role}\n", "<|im_end|>", "\n"),
    "smollm2": Template("", "<|im_start|>{role}\n", "<|im_end|>", "\n", system=_SMOLLM2),
    "llama3": Template("<|begin_of_text|>", "<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>"),
    "gemma": Template(
        "<bos>", "<start_of_turn>{role}\n", "<end_of_turn>", "\n", names=(("assistant", "model"), ("system", "user"))
    ),
}
"""Templates by name. `plain` is for small models with a vocabulary of their own (`metagradient.data.vocabulary`)."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Conversations as arrays of one length, for predicting each next token.

    Arguments:
        tokens: int32[n, length], 0 past the end.
        targets: int32[n, length], the token that follows each.
        weights: float32[n, length]: 1 over the number of learnt tokens where the target is one of them, else 0. So a
            conversation's weighted losses sum to its mean loss.
        used: int32[n], tokens before the padding.
        cut: bool[n], conversations that were truncated.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    used: np.ndarray
    cut: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What a batch of them holds, by name."""
        return {"tokens": self.tokens, "targets": self.targets, "weights": self.weights}

    @property
    def answers(self) -> np.ndarray:
        """Learnt tokens of each, int[n]."""
        return np.count_nonzero(self.weights, axis=1)

    def take(self, rows: Any) -> Self:
        """Those at `rows`, int[m] or bool[n], copied."""
        return type(self)(self.tokens[rows], self.targets[rows], self.weights[rows], self.used[rows], self.cut[rows])

    def buckets(self, batch: int, rows: np.ndarray | None = None) -> list[np.ndarray]:
        """Rows in batches of like length, so that little padding is computed on.

        Arguments:
            batch: conversations a batch; the last, of the longest, may hold fewer.
            rows: group these only, int[m].

        Returns: int arrays; each conversation is in exactly one.
        """
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        rows = rows[np.argsort(self.used[rows], kind="stable")]
        return [rows[i : i + batch] for i in range(0, len(rows), batch)]

    def bucket(self, rows: np.ndarray, multiple: int) -> dict[str, np.ndarray]:
        """A batch of these rows: arrays cut to the next multiple of the longest's tokens, and `index`, int32[b]."""
        length = min(self.tokens.shape[1], int(-(-self.used[rows].max() // multiple)) * multiple)
        return {
            **{name: array[rows, :length] for name, array in self.arrays.items()},
            "index": np.asarray(rows, np.int32),
        }


class Buckets(Sequence[dict[str, Any]]):
    """Conversations once through, in batches of like length with `index`, made when they are read.

    Arguments:
        encoded: the conversations.
        batch, rows: as in `Encoded.buckets`.
        multiple: batches are as long as the next multiple of it: each length is compiled once.
    """

    def __init__(
        self,
        encoded: Encoded,
        batch: int,
        multiple: int,
        rows: np.ndarray | None = None,
    ):
        self._encoded, self._multiple = encoded, multiple
        self._rows = encoded.buckets(batch, rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: Any) -> Any:
        return self._encoded.bucket(self._rows[number], self._multiple)


def encode(instructions: Sequence[Instruction], tokenizer: Any, template: Template, length: int) -> Encoded:
    """Write conversations out, and cut them into tokens.

    What the template adds and what people said are tokenised apart: the mask is exact, and a mark of the template
    inside somebody's text stays text.

    A conversation longer than `length` + 1 tokens is truncated: first what follows the last answer goes; then, where
    that answer alone is longer than 3/4 of the room, its end; then the conversation's start. So the question's end,
    where options and the question proper mostly stand, and the start of the answer stay.

    Arguments:
        tokenizer: a `tokenizers.Tokenizer`.
        template: how they are written out; its marks must be single tokens of the vocabulary.
        length: tokens of an array's row.

    Errors: `ConfigError` for a template whose marks the tokenizer doesn't know, or a length below 8; `DataError` for
        no conversations.
    """
    if length < 8:
        raise ConfigError(f"length must be at least 8 tokens, got {length}")
    if not instructions:
        raise DataError("there are no conversations to encode")
    _check_marks(tokenizer, template)
    n = len(instructions)
    tokens, targets = np.zeros((n, length), np.int32), np.zeros((n, length), np.int32)
    weights, used, cut = np.zeros((n, length), np.float32), np.zeros(n, np.int32), np.zeros(n, bool)
    for row, (ids, learnt) in enumerate(_tokenised(instructions, tokenizer, template)):
        kept = _window(learnt, length + 1)
        cut[row] = len(kept) < len(ids)
        ids, learnt = ids[kept], learnt[kept]
        used[row] = m = len(ids) - 1
        tokens[row, :m], targets[row, :m] = ids[:-1], ids[1:]
        weights[row, :m] = learnt[1:] / learnt[1:].sum()
    return Encoded(tokens, targets, weights, used, cut)


def _window(learnt: np.ndarray, room: int) -> np.ndarray:
    """Positions that a truncated conversation keeps, ascending; see `encode`."""
    (ends,) = np.nonzero(learnt)
    last = int(ends[-1]) + 1
    if len(learnt) <= room:
        return np.arange(len(learnt))
    first = last
    while first > 0 and learnt[first - 1]:
        first -= 1
    # The first token is never predicted: an answer always keeps something before it.
    last = min(last, first + room - max(1, min(first, room // _PROMPT_SHARE)))
    return np.arange(max(0, last - room), last)


def _tokenised(
    instructions: Sequence[Instruction], tokenizer: Any, template: Template
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids and whether each is learnt, of every conversation. Ends of turns always are: there is something to learn."""
    known: dict[str, list[int]] = {}
    for one in instructions:
        ids: list[int] = []
        learnt: list[bool] = []
        for text, own, learns in template.pieces(one):
            if own and text not in known:
                known[text] = _ids(tokenizer, text, marks=True)
            found = known[text] if own else _ids(tokenizer, text, marks=False)
            ids += found
            learnt += [learns] * len(found)
        yield np.array(ids, np.int32), np.array(learnt)


def _ids(tokenizer: Any, text: str, *, marks: bool) -> list[int]:
    if not text:
        return []
    # Whether a mark such as <|im_end|> in the text becomes the token, or is taken for the characters it consists of.
    tokenizer.encode_special_tokens = not marks
    return tokenizer.encode(text, add_special_tokens=False).ids


def _check_marks(tokenizer: Any, template: Template) -> None:
    for mark in (template.tail, template.begin, *template.marks):
        if mark and tokenizer.token_to_id(mark) is None:
            raise ConfigError(f"the tokenizer has no token {mark!r}: choose the template that its model was tuned with")
