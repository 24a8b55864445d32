"""Choose instruction data for a target: metagradient descent beside the baselines that a practitioner would use."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console

from metagradient._train import train
from metagradient.data.instructions import write as write_instructions
from metagradient.descent.journal import whole_lines
from metagradient.descent.seeds import fresh_seed
from metagradient.files import append_text, write_text
from metagradient.report.page import write
from metagradient.step.segment import SINGLE_STEPS
from metagradient.tasks import less
from metagradient.tasks.directory import RunDirectory, free_directory
from metagradient.tasks.finetuning import Tuner
from metagradient.tasks.instruction_data import Prepared, Sources, chunked, load_model, template_named
from metagradient.tasks.instruction_descent import selected
from metagradient.tasks.instruction_page import SELECTED, TRAINED, arm_rows, figures, page, results
from metagradient.tasks.instruction_setup import InstructionSelection, budget, read_sources
from metagradient.tasks.pretraining import pretrain, read_texts
from metagradient.tasks.ranking import highest
from metagradient.trees import PyTree

COMMAND = "select-instruction"
_SCORES, _START = "scores.npz", "start"


def run(config: InstructionSelection, *, resume: bool = False) -> dict[str, float]:
    """Select, measure every arm, and fill the run's directory.

    Arguments:
        resume: go on with the run that `config.out` holds.

    Returns: the figures in `result.json`. For every arm (`all`, `random`, `length`, `embedding`, `less`, `mgd`), means
        over fresh seeds on the target's test questions: `loss_ARM`, `tokens_ARM` (share of the answer's tokens that
        are the likeliest after the true ones before them), `accuracy_ARM` (greedy decoding says exactly the answer),
        `choice_ARM` (the answer is the likeliest of its task's), each with its standard error `error_...`, and
        `behind_ARM`, `error_behind_ARM`: by how much its loss is above MGD's, paired by seed. And `meta_step`, how
        many were taken to what was selected.

    Errors: `ConfigError` for settings that the data can't meet; `DataError` for files that can't be read.

    Cost: pre-training where no model is named; `meta_steps` metagradients; LESS's gradients of the pool for every epoch
        of its warm-up; 6 x `fresh` + 2 x `choosing` fine-tunings.
    """
    start = perf_counter()
    sources = read_sources(config)
    given = load_model(config.model) if config.model else None
    directory = RunDirectory.begin(config.out or free_directory(COMMAND), config, COMMAND, resume=resume)
    seconds_before = sum(t["seconds"] for t in directory.timings)
    task = _prepared(config, sources, given, directory)
    meta_step, counts = selected(config, task, directory)
    selections = {**_baselines(config, task, directory), "mgd": np.repeat(np.arange(len(counts)), counts)}
    trained = _measured(config, task, selections, directory)
    size = len(selections["random"])
    result = {
        **figures(trained),
        "candidates": len(task.pool),
        "selected": size,
        "meta_step": meta_step,
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


def _baselines(config: InstructionSelection, task: Prepared, directory: RunDirectory) -> dict[str, np.ndarray]:
    """Rows that each baseline trains on, ascending."""
    n, path = len(task.pool), directory / _SCORES
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
        chosen = {name: np.flatnonzero(highest(stored[name], config.share)) for name in ("length", "embedding", "less")}
    random = np.sort(np.random.default_rng((config.seed, 6)).choice(n, budget(config, n), replace=False))
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
    lines = whole_lines(path)
    done = {(line["arm"], line["seed"]) for line in lines}
    if ("before", -1) not in done:
        _add(path, lines, {"arm": "before", "seed": -1, **_scores(config, task, task.tuner.initial(0))})
    for i in range(config.fresh):
        seed = fresh_seed(config.seed, i)
        for arm, rows in selections.items():
            if (arm, seed) in done:
                continue
            state = train(task.tuner.training(task.pool, seed, rows=rows), {}, segment=SINGLE_STEPS)
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
