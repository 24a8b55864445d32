"""Choose instruction data for a target: metagradient descent beside the baselines that a practitioner would use."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

from metagradient.data.instructions import write as write_instructions
from metagradient.descent import updates
from metagradient.descent.journal import read_lines
from metagradient.descent.loop import descend
from metagradient.descent.seeds import fresh_seed
from metagradient.errors import ConfigError
from metagradient.files import append_text, write_text
from metagradient.metaparameters import PerExample
from metagradient.report.page import write
from metagradient.run import train
from metagradient.step.segment import Segment
from metagradient.surrogate import CountSurrogate
from metagradient.tasks import less
from metagradient.tasks.directory import RunDirectory, free_directory
from metagradient.tasks.finetuning import FineTuning, Tuner
from metagradient.tasks.following import follow
from metagradient.tasks.instruction_data import Prepared, Sources, chunked, load_model, template_named
from metagradient.tasks.instruction_page import SELECTED, TRAINED, arm_rows, figures, page, results
from metagradient.tasks.pretraining import Pretraining, pretrain, read_texts
from metagradient.training import Training
from metagradient.trees import PyTree

COMMAND = "select-instruction"
_SCORES, _START = "scores.npz", "start"


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


def run(config: InstructionSelection, *, resume: bool = False) -> dict[str, float]:
    """Select, measure every arm, and fill the run's directory.

    Arguments:
        resume: go on with the run that `config.out` holds.

    Returns: the figures in `result.json`. For every arm (`all`, `random`, `length`, `embedding`, `less`, `mgd`), means
        over fresh seeds on the target's test questions: `loss_ARM`, `tokens_ARM` (share of the answer's tokens that
        are the likeliest after the true ones before them), `accuracy_ARM` (greedy decoding says exactly the answer),
        `choice_ARM` (the answer is the likeliest of its task's), each with its standard error `error_...`, and
        `behind_ARM`, `error_behind_ARM`: by how much its loss is above MGD's, paired by seed.

    Errors: `ConfigError` for settings that the data can't meet; `DataError` for files that can't be read.

    Cost: pre-training where no model is named; `meta_steps` metagradients; LESS's gradients of the pool for every epoch
        of its warm-up; 6 x `fresh` fine-tunings.
    """
    start = perf_counter()
    sources = _sources(config)
    given = load_model(config.model) if config.model else None
    directory = RunDirectory.begin(config.out or free_directory(COMMAND), config, COMMAND, resume=resume)
    seconds_before = sum(t["seconds"] for t in directory.timings)
    task = _prepared(config, sources, given, directory)
    counts = _descend(config, task, directory)
    selections = {**_baselines(config, task, directory), "mgd": np.repeat(np.arange(len(counts)), counts)}
    trained = _measured(config, task, selections, directory)
    size = len(selections["random"])
    result = {
        **figures(trained),
        "candidates": len(task.pool),
        "selected": size,
        "different": int(np.count_nonzero(counts)),
        "cut_pool": float(task.pool.cut.mean()),
        "cut_test": float(task.test.cut.mean()),
        "skipped": sum(len(s.skipped) for s in sources.summaries.values()),
        "training_runs": sum(t["training_runs"] for t in directory.timings),
        "seconds": seconds_before + perf_counter() - start,
    }
    _write_selection(directory, task, counts, selections)
    directory.result(result)
    write(page(directory), directory / "report.html")
    _print(directory)
    return result


def _sources(config: InstructionSelection) -> Sources:
    c = config
    if c.data is None:
        raise ConfigError("--data must name a directory with pool.jsonl and targets/")
    if min(c.aim, c.meta_steps, c.fresh, c.less_epochs, c.less_dimension, c.exchanged) < 1:
        raise ConfigError("aim, meta_steps, fresh, less_epochs, less_dimension and exchanged must be at least 1")
    for name in ("share", "drawn", "less_share"):
        if not 0 < getattr(c, name) <= 1:
            raise ConfigError(f"{name} must be in (0, 1], got {getattr(c, name)}")
    if c.method not in ("exchange", "counts", "weights"):
        raise ConfigError(f"method is exchange, counts or weights, got {c.method!r}")
    if not 0 <= _step(c) < c.tuning.steps - 1:
        raise ConfigError(f"at must leave a step after it in a run of {c.tuning.steps}, got {c.at}")
    if not template_named(c.template).marks and c.model is None:
        raise ConfigError(f"the small decoder has no vocabulary for template {c.template}: plain, or name its --model")
    sources = Sources.read(c.data, c.target, candidates=c.candidates, aim=c.aim, tests=c.tests, seed=c.seed)
    if round(c.share * len(sources.pool)) < c.tuning.batch:
        raise ConfigError(
            f"a share of {c.share} of {len(sources.pool)} candidates doesn't hold a batch of {c.tuning.batch}"
        )
    return sources


def _prepared(config: InstructionSelection, sources: Sources, given: Any, directory: RunDirectory) -> Prepared:
    """The model, pre-trained where none was named, and the conversations as it takes them."""
    template = template_named(config.template)
    if given is None:
        folder = directory / _START
        if not (folder / "tokenizer.json").exists():
            texts = ["\n".join(m.content for m in one.messages) for one in sources.pool]
            texts += read_texts(config.text) if config.text else []
            pretrain(config.small, texts, template.marks, config.seed, folder)
        given = load_model(folder)
    model, params, tokenizer = given
    model = chunked(model, params, config.tuning.length)
    return Prepared(sources, Tuner(config.tuning, model, params), tokenizer, template)


def _step(config: InstructionSelection) -> int:
    return round(config.at * config.tuning.steps)


def _size(config: InstructionSelection, task: Prepared) -> int:
    return round(config.share * len(task.pool))


def _descend(config: InstructionSelection, task: Prepared, directory: RunDirectory) -> np.ndarray:
    """How often each candidate is selected, int[n]: of the meta-step with the lowest held-out loss."""
    c, n, size = config, len(task.pool), _size(config, task)
    rate = optax.linear_schedule(c.rate, c.final_rate, max(1, c.meta_steps - 1))
    first = np.zeros(n, np.float32)
    first[np.random.default_rng((c.seed, 4)).choice(n, size, replace=False)] = 1
    training, z, update, project = {
        "exchange": (_surrogate(c, task), {"counts": PerExample(first)}, updates.exchange(c.exchanged), None),
        # The surrogate has gradients for the candidates that were drawn, and the others stay: p = 1 among those.
        "counts": (_surrogate(c, task), {"counts": PerExample(np.ones(n, np.float32))}, updates.counts(1.0), None),
        "weights": (
            lambda seed: task.tuner.training(task.pool, seed),
            {"weights": PerExample(jnp.ones(n))},
            updates.normalised(rate, c.momentum),
            updates.box(0, 2),
        ),
    }[c.method]
    descent = descend(
        training,
        task.tuner.mean_loss(task.aim),
        z,
        update,
        c.meta_steps,
        project=project,
        held_out=task.tuner.mean_loss(task.held_out),
        seed=c.seed,
        out=directory.path,
        # A compiled loop over steps would stack what every batch holds by reference.
        segment=Segment(1, "steps", "gradient") if task.tuner.lora else None,
    )
    follow(descent, c.meta_steps, "loss on the target")
    assert descent.best is not None
    if c.method == "weights":
        return _top(np.asarray(descent.z["weights"].value), size, n)
    return np.asarray(descent.best.z["counts"].value).astype(np.int64)


def _surrogate(config: InstructionSelection, task: Prepared) -> Any:
    """From a seed to the run on counts, with a random share of the candidates to differentiate in.

    Candidates that Algorithm 1's mask would leave alone need no gradient: the mask is drawn before the pass over them.
    """
    n, tuner = len(task.pool), task.tuner
    # In whole batches: a last one of another size would be compiled anew in every meta-step.
    batch = config.tuning.evaluation_batch
    size = min(n, max(1, round(config.drawn * n / batch)) * batch)

    def training(counts: np.ndarray, seed: int) -> Training:
        return tuner.training(task.pool, seed, rows=np.repeat(np.arange(n), counts))

    def surrogate(seed: int) -> CountSurrogate:
        drawn = np.random.default_rng((seed, 5)).choice(n, size, replace=False)
        candidates = tuner.candidates(task.pool, drawn)
        return CountSurrogate(lambda counts: training(counts, seed), candidates, tuner.losses, _step(config))

    return surrogate


def _top(scores: np.ndarray, size: int, n: int) -> np.ndarray:
    """Counts of one for the `size` highest scores; of equal ones the lower number goes first."""
    counts = np.zeros(n, np.int64)
    counts[np.argsort(-scores, kind="stable")[:size]] = 1
    return counts


def _baselines(config: InstructionSelection, task: Prepared, directory: RunDirectory) -> dict[str, np.ndarray]:
    """Rows that each baseline trains on, ascending."""
    n, size = len(task.pool), _size(config, task)
    path = directory / _SCORES
    if not path.exists():
        c = config
        warm = less.warmed_up(task.tuner, task.pool, c.less_share, c.less_epochs, c.seed)
        of_less = less.scores(
            task.tuner, task.pool, task.aim, task.aim_tasks, warm, dimension=c.less_dimension, seed=c.seed
        )
        partial = directory / f"partial-{_SCORES}"
        np.savez(partial, less=of_less, embedding=_similarity(task), length=_lengths(task))
        partial.replace(path)
    with np.load(path) as stored:
        chosen = {name: np.flatnonzero(_top(stored[name], size, n)) for name in ("length", "embedding", "less")}
    random = np.sort(np.random.default_rng((config.seed, 6)).choice(n, size, replace=False))
    return {"all": np.arange(n), "random": random, **chosen}


def _similarity(task: Prepared) -> np.ndarray:
    """Highest cosine of a candidate's embedding with the mean one of a target task, float[n]."""

    def embedded(data: Any) -> np.ndarray:
        found = np.empty((len(data), task.tuner.model.hidden_size), np.float32)
        for batch in task.tuner.candidates(data):
            rows = batch["index"]
            found[rows] = task.tuner.embeddings({"tokens": batch["tokens"], "used": data.used[rows]})
        return found

    aims = embedded(task.aim)
    means = np.stack([aims[rows].mean(0) for rows in task.aim_tasks])
    pool = embedded(task.pool)
    norms = np.linalg.norm(pool, axis=1)[:, None] * np.linalg.norm(means, axis=1)
    return (pool @ means.T / norms).max(1)


def _lengths(task: Prepared) -> np.ndarray:
    """Characters of each candidate's answers: the longest are selected."""
    return np.array([sum(len(m.content) for m in one.messages if m.role == "assistant") for one in task.sources.pool])


def _measured(
    config: InstructionSelection, task: Prepared, selections: Mapping[str, np.ndarray], directory: RunDirectory
) -> list[dict[str, Any]]:
    """Every arm trained from every fresh seed: a line each in the directory, none of them twice."""
    path = directory / TRAINED
    lines = read_lines(path)
    # Without a last line that a kill tore.
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    done = {(line["arm"], line["seed"]) for line in lines}
    if ("before", -1) not in done:
        _add(path, lines, {"arm": "before", "seed": -1, **_scores(config, task, task.tuner.initial(0))})
    for i in range(config.fresh):
        seed = fresh_seed(config.seed, i)
        for arm, rows in selections.items():
            if (arm, seed) in done:
                continue
            state = train(task.tuner.training(task.pool, seed, rows=rows), {})
            _add(path, lines, {"arm": arm, "seed": seed, **_scores(config, task, state.params)})
    return lines


def _add(path: Path, lines: list[dict[str, Any]], line: dict[str, Any]) -> None:
    append_text(path, json.dumps(line) + "\n")
    lines.append(line)


def _scores(config: InstructionSelection, task: Prepared, params: PyTree) -> dict[str, Any]:
    """A tuned model on the test questions: means, and the same for each task."""
    losses, shares, exact = task.tuner.scores(params, task.test)
    found: dict[str, Any] = {
        "loss": float(losses.mean()),
        "tokens": float(shares.mean()),
        "accuracy": float(exact.mean()),
    }
    if config.choices and task.choices:
        found["choice"] = float(task.choices.right_ones(task.tuner, params).mean())
    by_task = {name: [float(losses[r].mean()), float(exact[r].mean())] for name, r in task.test_tasks.items()}
    return {**found, "tasks": by_task}


def _write_selection(
    directory: RunDirectory, task: Prepared, counts: np.ndarray, selections: Mapping[str, np.ndarray]
) -> None:
    pool = task.sources.pool
    chosen = [replace(pool[i], extra={**pool[i].extra, "count": int(counts[i])}) for i in np.flatnonzero(counts)]
    write_instructions(directory / SELECTED, chosen)
    np.savez(
        directory / "selections.npz",
        counts=counts,
        ids=np.array([one.id for one in pool]),
        rows_random=selections["random"],
        rows_length=selections["length"],
        rows_embedding=selections["embedding"],
        rows_less=selections["less"],
    )
    groups = {arm: arm_rows(pool, rows) for arm, rows in selections.items()}
    write_text(directory / "composition.json", json.dumps(groups) + "\n")
    lines = {name: [str(s) for s in summary.skipped[:20]] for name, summary in task.sources.summaries.items()}
    write_text(directory / "skipped.json", json.dumps(lines) + "\n")


def _print(directory: RunDirectory) -> None:
    console, result = Console(), directory.figures
    assert result is not None
    console.print(results(result).printed())
    console.print(
        f"selected: {directory / SELECTED}   report: {directory / 'report.html'}", markup=False, soft_wrap=True
    )
