"""What a run of instruction selection shows: figures over arms, tables, the page."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metagradient.data.instructions import Instruction
from metagradient.descent.journal import read_lines
from metagradient.report.figures import lines
from metagradient.report.page import Page, Section, Table
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.means import shown, standard_error
from metagradient.tasks.pages import closing

TRAINED, SELECTED = "trained.jsonl", "selected.jsonl"
NAMES = {
    "before": "nothing (the start)",
    "all": "the whole pool",
    "random": "a random subset",
    "length": "the longest answers",
    "embedding": "the nearest to the target (embeddings)",
    "less": "LESS",
    "mgd": "metagradient descent",
}
"""Arms as readers call them."""

_MEASURES = {
    "loss": "test loss",
    "tokens": "tokens right",
    "accuracy": "exact answers",
    "choice": "right choices",
    "behind": "loss above MGD's",
}
_EXAMPLES = 6


def figures(trained: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over fresh seeds with their standard errors, and each arm's distance from MGD's loss, paired by seed.

    Arguments:
        trained: the lines of `trained.jsonl`.

    Returns: see `instruction_selection.run`. The start, which no seed varies, has an error of 0; with one seed errors
        are NaN.
    """
    by_arm: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in trained:
        by_arm.setdefault(line["arm"], {})[line["seed"]] = line
    found: dict[str, float] = {}
    for arm, of_seed in by_arm.items():
        for measure in _MEASURES:
            values = [line[measure] for line in of_seed.values() if measure in line]
            if values:
                found[f"{measure}_{arm}"] = float(np.mean(values))
                found[f"error_{measure}_{arm}"] = 0.0 if arm == "before" else standard_error(values)
        seeds = sorted(set(of_seed) & set(by_arm.get("mgd", {})))
        if seeds and arm != "mgd":
            apart = [of_seed[seed]["loss"] - by_arm["mgd"][seed]["loss"] for seed in seeds]
            found[f"behind_{arm}"], found[f"error_behind_{arm}"] = float(np.mean(apart)), standard_error(apart)
    return found


def arm_rows(pool: Sequence[Instruction], rows: np.ndarray) -> dict[str, Any]:
    """What a selection consists of: shares of the data sets, and the median characters of its answers."""
    sets = Counter(pool[i].dataset for i in rows)
    return {
        "datasets": {name: count / len(rows) for name, count in sets.most_common()},
        "different": len(np.unique(rows)),
        "answer": float(np.median([len(pool[i].answer) for i in rows])),
        "question": float(np.median([sum(len(m.content) for m in pool[i].messages) for i in rows])),
    }


def results(result: Mapping[str, float]) -> Table:
    """Means over seeds, an arm a row; of what was measured."""
    measures = {name: text for name, text in _MEASURES.items() if any(f"{name}_{arm}" in result for arm in NAMES)}

    def cell(measure: str, arm: str) -> str:
        if f"{measure}_{arm}" not in result:
            return "–"
        mean, error = result[f"{measure}_{arm}"], result[f"error_{measure}_{arm}"]
        # The start has no seeds.
        return f"{mean:.3f}" if arm == "before" else shown(mean, error, ".3f")

    rows = [
        (name, *(cell(measure, arm) for measure in measures)) for arm, name in NAMES.items() if f"loss_{arm}" in result
    ]
    return Table(
        ("trained on", *measures.values()),
        rows,
        "On the target's test questions: mean ± standard error.",
        emphasis=len(rows) - 1,
    )


def by_task(trained: Sequence[Mapping[str, Any]]) -> Table:
    """Mean test loss of each arm on each task of the target."""
    arms = [arm for arm in NAMES if any(line["arm"] == arm for line in trained)]
    tasks = list(trained[0]["tasks"])

    def mean(arm: str, task: str) -> float:
        return float(np.mean([line["tasks"][task][0] for line in trained if line["arm"] == arm]))

    rows = [(task, *(f"{mean(arm, task):.3f}" for arm in arms)) for task in tasks]
    return Table(("task", *(NAMES[arm] for arm in arms)), rows)


def composition(directory: RunDirectory) -> Table:
    """What the selections consist of."""
    groups = json.loads((directory / "composition.json").read_text())
    sets = list(groups["all"]["datasets"])
    rows = [
        (
            NAMES[arm],
            group["different"],
            f"{group['question']:.0f}",
            f"{group['answer']:.0f}",
            *(f"{group['datasets'].get(name, 0):.1%}" for name in sets),
        )
        for arm, group in groups.items()
    ]
    return Table(("selection", "conversations", "median characters", "of them the answer", *sets), rows)


def page(directory: RunDirectory) -> Page:
    """The report of a finished run, of its files alone."""
    config, result, records = directory.config, directory.figures, directory.records
    assert result is not None
    trained, chosen = read_lines(directory / TRAINED), read_lines(directory / SELECTED)
    skipped = json.loads((directory / "skipped.json").read_text())
    losses = {"aimed at": [r["value"] for r in records], "held out": [r["held_out"] for r in records]}
    summary = (
        f"Which of {result['candidates']} conversations should a language model be tuned on to do better on "
        f"{config['target']}? In {len(records)} meta-steps, each with a fresh seed, a choice of conversations moved "
        "along the gradient of the tuned model's loss on development questions, differentiated through the tuning. "
        "All arms start from the same model and take the same number of steps; the selections of the baselines are "
        f"of one size, {result['selected']}.\n\n"
        f"Tuned on the whole pool the model comes to a test loss of {result['loss_all']:.3f}, on LESS's choice to "
        f"{result['loss_less']:.3f}, on the metagradient's to {result['loss_mgd']:.3f}."
    )
    examples = [
        (line["count"], line["id"], _short(line["messages"][0]["content"]), _short(line["messages"][-1]["content"]))
        for line in sorted(chosen, key=lambda line: -line["count"])[:_EXAMPLES]
    ]
    left_out = [line for lines in skipped.values() for line in lines]
    return Page(
        "Which instructions to tune on?",
        summary,
        [
            Section(
                "On the target's test questions",
                "Means over fresh seeds ± one standard error. Test loss: mean cross-entropy of an answer's tokens. "
                "Exact answers: greedy decoding says just that. Right choices: the answer is likelier than the other "
                "answers of its task, where those are few. Test questions chose nothing.",
                results(result),
            ),
            Section("Test loss by task", table=by_task(trained)),
            Section("What was selected", "Shares by data set, and lengths.", composition(directory)),
            Section(
                "Most selected",
                f"All of them are in {SELECTED}, with their counts.",
                Table(("count", "id", "begins", "answer"), examples),
            ),
            Section(
                "How it got there",
                "The loss on development questions of models tuned on each meta-step's choice, each from another seed. "
                "The choice with the lowest held-out loss and that of the end were tried again, both from the same "
                f"{config['choosing']} seeds; what stood after {result['meta_step']} meta-steps is taken.",
                figures=(lines(losses, x="meta-step", y="loss", caption="Loss per meta-step, each on a fresh seed."),),
            ),
            Section(
                "What was read",
                f"{result['skipped']} lines were skipped. {result['cut_pool']:.1%} of the candidates and "
                f"{result['cut_test']:.1%} of the test questions are longer than {config['tuning']['length']} tokens, "
                "and were truncated: the end of the question and the start of the answer stay.",
                Table(("skipped lines (the first of each file)",), [(line,) for line in left_out])
                if left_out
                else None,
            ),
            *closing(
                directory,
                f"{result['training_runs']:.0f} tunings' worth of compute in the descent, counted in matrix products; "
                f"{result['seconds']:.0f} seconds in all, the baselines included.",
            ),
        ],
        [
            (f"{result['loss_all']:.3f} → {result['loss_mgd']:.3f}", "test loss, whole pool → selected"),
            (f"{result['accuracy_all']:.1%} → {result['accuracy_mgd']:.1%}", "exact answers"),
            (f"{result['training_runs']:.0f}", "tunings' worth of compute"),
        ],
    )


def _short(text: str, most: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
