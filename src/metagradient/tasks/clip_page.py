"""The page of a run that filtered an image–text pool, made from what lies in its directory."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from metagradient.report.figures import Figure, least_trusted, lines
from metagradient.report.page import Page, Section, Table
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.means import shown
from metagradient.tasks.pages import closing

ARMS = {
    "all": "no filter",
    "random": "as many at random as MGD keeps",
    "rules": "caption rules",
    "duplicates": "without duplicates",
    "score": "CLIP-score filter",
    "ensemble": "CLIP-score filter by several models",
    "subset": "MGD's subset file",
    "mgd": "MGD's weights",
    "oracle": "ground truth: matched pairs alone",
}
"""What a CLIP is trained on."""

WEIGHTS = "weights.npz"
"""File of a run's directory: weights and counts, uids, and the pairs at both ends."""

_TENTHS = 10
_CAPTION = 20


def arms_table(directory: RunDirectory) -> Table:
    """What each arm came to, a row each."""
    r = _figures(directory)
    arms = [arm for arm in ARMS if f"recall_{arm}" in r]
    grouped, known = "group_all" in r, "mismatched_all" in r
    header = ["trained on", "pairs", "mean recall", "gain over no filter"]
    header += ["group accuracy"] * grouped + ["mismatched pairs kept"] * known
    rows = []
    for arm in arms:
        row = [ARMS[arm], str(r[f"pairs_{arm}"]), _with_error(r, "recall", "error", arm)]
        row.append("" if arm == "all" else _with_error(r, "gain", "gain_error", arm, sign="+"))
        if grouped:
            row.append(_with_error(r, "group", "group_error", arm))
        if known:
            row.append(f"{r[f'mismatched_{arm}']:.0%}")
        rows.append(tuple(row))
    caption = "Means over fresh seeds ± one standard error; gains are paired by seed"
    return Table(tuple(header), rows, caption, emphasis=arms.index("subset"))


def recalls_table(directory: RunDirectory) -> Table:
    """The six recalls whose mean is reported, an arm a row."""
    r = _figures(directory)
    names = [f"{way}_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    rows = [
        (text, *(f"{r[f'{name}_{arm}']:.3f}" for name in names))
        for arm, text in ARMS.items()
        if f"recall_{arm}" in r
    ]  # fmt: skip
    return Table(("trained on", *(name.replace("_", " ") for name in names)), rows)


def curves(directory: RunDirectory) -> Figure:
    """Losses on target and held-out pairs, meta-step by meta-step."""
    records = directory.records
    losses = {"target": [r["value"] for r in records], "held out": [r["held_out"] for r in records]}
    return lines(losses, x="meta-step", y="objective", caption="The objective before each meta-step, on fresh seeds.")


def page(directory: RunDirectory) -> Page:
    """The report of a finished run, of its files alone."""
    config, result = directory.config, _figures(directory)
    with np.load(directory / WEIGHTS) as stored:
        saved = dict(stored)
    settings = json.loads(str(saved["settings"]))
    kept = int(np.count_nonzero(saved["counts"]))
    what = "count" if config["method"] == "counts" else "weight"
    repeated = saved["counts"].max() > 1
    chosen_by = f"those of high {what}s, some repeatedly" if repeated else f"those of the highest {what}s"
    summary = (
        f"Which of {result['pairs']} image–text pairs should a CLIP be trained on? A {what} for each pair "
        "was learnt by differentiating training runs: moved so that a model trained with them does better on a few "
        f"clean pairs. No filter looked at which pairs are mismatched. The choice is in subset.npy: {kept} different "
        f"pairs, {chosen_by}.\n\n"
        f"On test pairs that nothing was chosen by, mean recall at 1, 5 and 10 is {result['recall_all']:.3f} without a "
        f"filter and {result['recall_subset']:.3f} with what was learnt, a gain of "
        f"{_with_error(result, 'gain', 'gain_error', 'subset', '+')}; the best baseline's is "
        f"{result['best_baseline_gain']:+.3f}."
    )
    chosen = "; ".join(settings.values())
    sections = [
        Section(
            "What each choice is worth",
            "Every row trains the same model for the same number of steps, from the same fresh seeds. Mean recall is "
            "the mean of recall at 1, 5 and 10, of captions by image and of images by caption. Settings of baselines "
            f"and how MGD's subset is made of its weights were chosen on validation pairs: {chosen}.",
            arms_table(directory),
        ),
        Section("Recalls", table=recalls_table(directory)),
        Section("How it got there", figures=(curves(directory),)),
        Section("The pairs at both ends", "Lowest and highest, with their captions.", figures=_ends(saved)),
    ]
    if rater := json.loads(str(saved["rater"])):
        sections.insert(3, _rater(rater))
    if "mismatched" in saved:
        sections.insert(3, Section("Where the mismatched pairs went", figures=(_mismatched(saved),)))
    if str(saved["faults"]) != "no faults":
        sections.append(Section("What was wrong with the shards", str(saved["faults"])))
    return Page(
        "Which pairs should a CLIP be trained on?",
        summary,
        [
            *sections,
            *closing(
                directory,
                f"{result['training_runs']:.0f} training runs' worth of compute in the descent, counted in matrix "
                f"products; {result['seconds']:.0f} seconds in all, compilation and evaluation included.",
            ),
        ],
        [
            (f"{result['recall_all']:.3f} → {result['recall_subset']:.3f}", "mean recall on test pairs"),
            (f"{result['gain_subset']:+.3f}", "gain over no filter"),
            (f"{result['best_baseline_gain']:+.3f}", "gain of the best baseline"),
            (f"{result['training_runs']:.0f}", "training runs' worth of compute"),
        ],
    )


def _rater(rater: Mapping[str, float]) -> Section:
    rows = [(name, f"{value:+.2f}") for name, value in sorted(rater.items(), key=lambda item: -abs(item[1]))]
    return Section(
        "What the rater goes by",
        "A pair's weight is 2 / (1 + exp(-s / 2)), times its own weight where it has one; s is the sum of its "
        "features, each of mean 0 and variance 1, times these numbers. Components are directions among "
        "embeddings of images and of captions: their signs mean nothing.",
        Table(("feature", "counts for"), rows),
    )


def _mismatched(saved: Mapping[str, Any]) -> Figure:
    order = np.argsort(saved["weights"], kind="stable")
    tenths = [float(part.mean()) for part in np.array_split(saved["mismatched"][order], _TENTHS)]
    return lines(
        {"mismatched": tenths},
        x="tenth of the pairs, lowest weights first",
        y="share",
        caption="Share of mismatched pairs in each tenth of the pool. Level where nothing was learnt of them.",
    )


def _ends(saved: Mapping[str, Any]) -> tuple[Figure, ...]:
    figures = []
    for end in ("lowest", "highest"):
        captions = [_short(caption) for caption in saved[f"{end}_captions"].tolist()]
        places = np.arange(len(captions))
        figure = least_trusted(saved[f"{end}_images"] / 255, places, places, None, captions)
        words = f"The {len(captions)} pairs with the {end} weights, under their captions."
        figures.append(replace(figure, caption=words, alt=words))
    return tuple(figures)


def _short(caption: str) -> str:
    """A caption that fits over its picture, in characters that any font has."""
    plain = caption.encode("ascii", "replace").decode()
    plain = plain if len(plain) <= _CAPTION else f"{plain[: _CAPTION - 2]}.."
    # Between two of these matplotlib would set a formula.
    return plain.replace("$", r"\$")


def _with_error(result: Mapping[str, float], name: str, error: str, arm: str, sign: str = "") -> str:
    return shown(result[f"{name}_{arm}"], result[f"{error}_{arm}"], f"{sign}.3f")


def _figures(directory: RunDirectory) -> dict[str, float]:
    assert directory.figures is not None
    return directory.figures
