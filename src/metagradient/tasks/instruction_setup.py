"""The configuration of a selection of instruction data, and what it is checked against."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from metagradient.errors import ConfigError
from metagradient.tasks.finetuning import FineTuning
from metagradient.tasks.instruction_data import Sources, template_named
from metagradient.tasks.pretraining import Pretraining


@dataclass(frozen=True)
class InstructionSelection:
    """Choose instruction-tuning data for a target, from a pool of conversations.

    Reads the format of LESS and open-instruct: --data names a directory with pool.jsonl and targets/TARGET.jsonl, whose
    lines say their task and split (dev, test). The model is a small decoder, pre-trained on the pool's texts first, or
    one that --model names: a directory in Hugging Face's layout, or a GGUF file.
    """

    data: Path | None = None
    """directory with pool.jsonl and targets/; needed"""
    target: str = "bbh"
    """name of the target: targets/TARGET.jsonl"""
    text: Path | None = None
    """text file, or directory of them, that the small decoder is pre-trained on besides"""
    model: Path | None = None
    """directory with config.json, *.safetensors and tokenizer.json, or a GGUF file; none takes the small decoder"""
    template: str = "plain"
    """how conversations are written out: plain (the small decoder), chatml, smollm2, llama3, gemma"""
    out: Path | None = None
    """directory of this run; none takes a free one under runs/"""
    seed: int = 0
    """seed of the split, of random choices, and of the inner seeds"""
    candidates: int | None = None
    """conversations of the pool, from the first; none takes all"""
    aim: int = 20
    """development questions of each target task that selections aim at; the rest is held out"""
    tests: int | None = None
    """test questions of each target task; none takes all"""
    share: float = 0.05
    """share of the pool that is selected"""
    tuning: FineTuning = field(default_factory=FineTuning)
    """how a model is fine-tuned, in every arm"""
    small: Pretraining = field(default_factory=Pretraining)
    """the small decoder"""
    method: Literal["exchange", "counts", "weights"] = "exchange"
    """what moves: counts at a fixed budget, free counts (Algorithm 1), or weights of the whole pool"""
    at: float = 0.75
    """counts: where the step lies at which candidates get their gradients, as a share of the run"""
    drawn: float = 0.25
    """counts: share of the candidates that a meta-step considers (p of Algorithm 1)"""
    exchanged: int = 60
    """exchange: candidates that gain a count in a meta-step, and others that lose one"""
    rate: float = 0.3
    """weights: root mean square of a move in the first meta-step"""
    final_rate: float = 0.1
    """weights: ... and in the last"""
    momentum: float = 0.8
    """weights: momentum of the descent"""
    meta_steps: int = 20
    """meta-steps, each with a fresh seed"""
    choosing: int = 3
    """seeds by which held-out questions choose between the meta-step that looked best and the last"""
    less_share: float = 0.05
    """LESS: share of the pool that its warm-up trains on"""
    less_epochs: int = 4
    """LESS: epochs of the warm-up, after each of which gradients are taken"""
    less_dimension: int = 4096
    """LESS: numbers that a gradient is projected to"""
    fresh: int = 3
    """fresh seeds on which results are measured"""
    choices: bool = True
    """also ask test questions as choices among their task's answers"""


def read_sources(config: InstructionSelection) -> Sources:
    """The conversations of a configuration. `ConfigError` and `DataError` as in `instruction_selection.run`."""
    c = config
    if c.data is None:
        raise ConfigError("--data must name a directory with pool.jsonl and targets/")
    if min(c.aim, c.meta_steps, c.choosing, c.fresh, c.less_epochs, c.less_dimension, c.exchanged) < 1:
        raise ConfigError(
            "aim, meta_steps, choosing, fresh, less_epochs, less_dimension and exchanged must be at least 1"
        )
    for name in ("share", "drawn", "less_share"):
        if not 0 < getattr(c, name) <= 1:
            raise ConfigError(f"{name} must be in (0, 1], got {getattr(c, name)}")
    if c.method not in ("exchange", "counts", "weights"):
        raise ConfigError(f"method is exchange, counts or weights, got {c.method!r}")
    if not 0 <= at(c) < c.tuning.steps - 1:
        raise ConfigError(f"at must leave a step after it in a run of {c.tuning.steps}, got {c.at}")
    if not template_named(c.template).marks and c.model is None:
        raise ConfigError(f"the small decoder has no vocabulary for template {c.template}: plain, or name its --model")
    sources = Sources.read(c.data, c.target, candidates=c.candidates, aim=c.aim, tests=c.tests, seed=c.seed)
    if budget(c, len(sources.pool)) < c.tuning.batch:
        raise ConfigError(
            f"a share of {c.share} of {len(sources.pool)} candidates doesn't hold a batch of {c.tuning.batch}"
        )
    return sources


def at(config: InstructionSelection) -> int:
    """The step at which candidates get their gradients."""
    return round(config.at * config.tuning.steps)


def budget(config: InstructionSelection, n: int) -> int:
    """How many of n candidates are selected."""
    return round(config.share * n)
