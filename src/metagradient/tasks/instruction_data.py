"""What instruction selection reads and measures on: candidates, a target in three parts, a model to tune."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metagradient.data.chat import TEMPLATES, Encoded, Template, encode
from metagradient.data.instructions import Instruction, Summary, by_task, read
from metagradient.data.vocabulary import load_tokenizer
from metagradient.errors import ConfigError, DataError
from metagradient.models import Decoder, checkpoints
from metagradient.models.gguf import GGUFFile
from metagradient.tasks.finetuning import Tuner
from metagradient.trees import PyTree

# A question is asked as a choice among the answers of its task, where those are no more than this.
_MOST_CHOICES = 12
_SMALL = 10_000_000


@dataclass(frozen=True)
class Sources:
    """Conversations as they were read.

    Arguments:
        pool: candidates.
        aim: the part of the target's development split that selections aim at.
        held_out: the rest of it, which only chooses.
        test: the target's test split, which is only reported on.
        summaries: what was read and skipped, by file name.
    """

    pool: list[Instruction]
    aim: list[Instruction]
    held_out: list[Instruction]
    test: list[Instruction]
    summaries: Mapping[str, Summary]

    @classmethod
    def read(
        cls, directory: Path, target: str, *, candidates: int | None, aim: int, tests: int | None, seed: int
    ) -> "Sources":
        """Read `pool.jsonl` and `targets/TARGET.jsonl`, whose lines say their `task` and `split` (`dev`, `test`).

        Arguments:
            candidates: from the first; None for all.
            aim: development questions of each task to aim at, drawn by the seed; the others are held out.
            tests: test questions of each task, drawn by the seed; None for all.

        Errors: `DataError` for files that can't be read; `ConfigError` for a target without test questions, or a task
            with too few development questions.
        """
        pool, of_pool = read(directory / "pool.jsonl", limit=candidates)
        questions, of_target = read(directory / "targets" / f"{target}.jsonl")
        parts: dict[str, list[Instruction]] = {"aim": [], "held_out": [], "test": []}
        random = np.random.default_rng((seed, 3))
        for task, rows in by_task(questions).items():
            dev, test = ([questions[i] for i in rows if questions[i].extra.get("split") == s] for s in ("dev", "test"))
            if len(dev) <= aim or not test:
                raise ConfigError(
                    f"task {task} of target {target} has {len(dev)} development and {len(test)} test questions: aim = "
                    f"{aim} must leave some of the former, and there must be some of the latter"
                )
            order = random.permutation(len(dev))
            parts["aim"] += [dev[i] for i in order[:aim]]
            parts["held_out"] += [dev[i] for i in order[aim:]]
            parts["test"] += [test[i] for i in random.permutation(len(test))[:tests]]
        return cls(pool, **parts, summaries={"pool.jsonl": of_pool, f"{target}.jsonl": of_target})


@dataclass(frozen=True, eq=False)
class Choices:
    """Questions with every answer that their task knows, where those are few.

    Arguments:
        encoded: a conversation for each question and answer.
        question: int[m], which question each belongs to.
        right: bool[m], whether it holds the right answer.
    """

    encoded: Encoded
    question: np.ndarray
    right: np.ndarray

    def right_ones(self, tuner: Tuner, params: PyTree) -> np.ndarray:
        """Whether the right answer of each question is the likeliest of its task's, bool[questions]."""
        losses = tuner.scores(params, self.encoded)[0] * self.encoded.answers
        order = np.lexsort((losses, self.question))
        first = np.unique(self.question[order], return_index=True)[1]
        return self.right[order[first]]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Everything that arms have in common.

    Arguments:
        sources: the conversations.
        tuner: fine-tunes.
        tokenizer, template: how conversations are written.
    """

    sources: Sources
    tuner: Tuner
    tokenizer: Any
    template: Template

    def encoded(self, instructions: Sequence[Instruction]) -> Encoded:
        """Conversations as the model takes them."""
        return encode(instructions, self.tokenizer, self.template, self.tuner.recipe.length)

    @cached_property
    def pool(self) -> Encoded:
        """The candidates."""
        return self.encoded(self.sources.pool)

    @cached_property
    def aim(self) -> Encoded:
        """What selections aim at."""
        return self.encoded(self.sources.aim)

    @cached_property
    def held_out(self) -> Encoded:
        """What chooses among meta-steps."""
        return self.encoded(self.sources.held_out)

    @cached_property
    def test(self) -> Encoded:
        """What is reported on."""
        return self.encoded(self.sources.test)

    @cached_property
    def aim_tasks(self) -> list[np.ndarray]:
        """Rows of `aim` of each task."""
        return [np.array(rows) for rows in by_task(self.sources.aim).values()]

    @cached_property
    def test_tasks(self) -> dict[str, np.ndarray]:
        """Rows of `test` of each task."""
        return {task: np.array(rows) for task, rows in by_task(self.sources.test).items()}

    @cached_property
    def choices(self) -> Choices | None:
        """The test questions of tasks with few answers; None where there is no such task."""
        asked: list[Instruction] = []
        questions, right = [], []
        for task, rows in by_task(self.sources.test).items():
            known = [
                one for one in (*self.sources.aim, *self.sources.test) if one.extra.get("task", one.dataset) == task
            ]
            answers = sorted({one.answer for one in known})
            if not 2 <= len(answers) <= _MOST_CHOICES:
                continue
            for row in rows:
                question = self.sources.test[row]
                asked += [question.answered(answer) for answer in answers]
                questions += [row] * len(answers)
                right += [answer == question.answer for answer in answers]
        return Choices(self.encoded(asked), np.array(questions), np.array(right)) if asked else None


def template_named(name: str) -> Template:
    """A template by name. `ConfigError` for one that isn't there."""
    if name not in TEMPLATES:
        raise ConfigError(f"there is no template {name!r}; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def load_model(path: Path) -> tuple[Decoder, PyTree, Any]:
    """A decoder, its parameters and its tokenizer, from a directory in Hugging Face's layout or a GGUF file.

    Errors: `DataError`, `ConfigError` as in `checkpoints.load`, `GGUFFile` and `load_tokenizer`.
    """
    if path.is_file() and path.suffix == ".gguf":
        file = GGUFFile(path)
        return *file.load(), file.tokenizer()
    if not path.is_dir():
        raise DataError(f"{path} is neither a model's directory nor a GGUF file")
    model, params = checkpoints.load(path)
    return model, params, load_tokenizer(path)


def chunked(model: Decoder, params: PyTree, length: int) -> Decoder:
    """A decoder as it runs fastest on conversations of `length` tokens: a small one keeps its activations."""
    large = sum(leaf.size for leaf in jax.tree.leaves(params)) > _SMALL
    return replace(model, attention_chunk=length, loss_chunk=256 if large else 2048, rematerialise=large)
