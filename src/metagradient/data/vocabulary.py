"""A small vocabulary of our own: byte-level BPE, trained on the texts at hand."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from metagradient.errors import ConfigError, DataError
from metagradient.optional import library

TOKENIZER = "tokenizer.json"


def trained(texts: Iterable[str], size: int, marks: tuple[str, ...] = ()) -> Any:
    """A byte-level BPE tokenizer (Digits apart, as SmolLM2's) learnt from texts: any text can be written in it.

    Arguments:
        texts: what to learn from; they are not kept.
        size: tokens at most, the 256 bytes and the marks among them.
        marks: strings that are one token each, and come first.

    Returns: a `tokenizers.Tokenizer`; the same texts give the same one.

    Errors: `ConfigError` where the `tokenizers` library isn't installed, or for a size below 256 and the marks.
    """
    tokenizers = library("tokenizers", "lm")
    if size < 256 + len(marks):
        raise ConfigError(f"a vocabulary must hold 256 bytes and {len(marks)} marks, got a size of {size}")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre = tokenizers.pre_tokenizers
    made.pre_tokenizer = pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(marks),
        initial_alphabet=sorted(pre.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return made


def load_tokenizer(directory: str | Path) -> Any:
    """The tokenizer of a model's directory, from its `tokenizer.json`.

    Errors: `ConfigError` where the `tokenizers` library isn't installed; `DataError` for a file that is absent or
        damaged.
    """
    tokenizers = library("tokenizers", "lm")
    path = Path(directory) / TOKENIZER
    if not path.is_file():
        raise DataError(f"{directory} has no {TOKENIZER}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare exceptions
        raise DataError(f"{path} can't be read: {error}") from error
