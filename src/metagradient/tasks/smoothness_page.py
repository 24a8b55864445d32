"""What a probe of recipes is told as: names, tables, figures, a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from metagradient.report.figures import Figure, curves, scatter
from metagradient.report.page import Page, Section, Table
from metagradient.smoothness.sweep import Knobs, Outcome, Sweep
from metagradient.tasks.classifier import ROUGH
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.means import with_error
from metagradient.tasks.pages import closing


@dataclass(frozen=True)
class Cut:
    """A validation loss along a metagradient.

    Arguments:
        name: of the recipe.
        places: a, in z - a g/|g|.
        losses: there.
        slope: |g|, what the loss falls by a unit of a if the metagradient is right and the loss a line.
    """

    name: str
    places: list[float]
    losses: list[float]
    slope: float


_WORDS = {
    ("norm_before_activation", False): "norm after the activation",
    ("norm_before_activation", True): "norm before the activation",
    ("activation", "relu"): "ReLU",
    ("activation", "gelu"): "GELU",
    ("pooling", "max"): "max pooling",
    ("pooling", "average"): "average pooling",
    ("pooling", "logsumexp"): "logsumexp pooling",
}
_SMOOTH: dict[str, Any] = {"activation": "gelu", "norm_before_activation": True, "pooling": "average"}


def name(knobs: Knobs) -> str:
    """A recipe in words: as the smooth one or the standard one, whichever it is nearer to, with its changes."""
    rough = {knob for knob, value in ROUGH.items() if knobs.get(knob) == value}
    standard = len(rough) > len(ROUGH) / 2
    changes = {k: v for k, v in knobs.items() if not (standard and k in rough)}
    if standard:
        changes = {**{k: _SMOOTH[k] for k in ROUGH if k not in rough}, **changes}
    return ", ".join(["standard" if standard else "smooth", *(_worded(k, v) for k, v in changes.items())])


def _worded(knob: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"{knob.replace('_', ' ')} {'-'.join(map(str, value))}"
    return _WORDS.get((knob, value), f"{knob.replace('_', ' ')} {value}")


def row_of(outcome: Outcome, kind: str) -> dict[str, Any] | None:
    """The probe's row of a kind, at its first step size."""
    rows = outcome.smoothness["rows"] if outcome.smoothness else []
    return next((row for row in rows if row["kind"] == kind), None)


def printed(outcome: Outcome) -> str:
    """An outcome in a line."""
    cells = dict(zip(HEADER, cells_of(outcome), strict=True))
    return f"{cells.pop('recipe')}: " + ", ".join(f"{key} {value}" for key, value in cells.items() if value)


HEADER = ("recipe", "learning rate", "examples", "classes", "noise", "accuracy", "gain", "metagradient")


def cells_of(outcome: Outcome) -> list[str]:
    """An outcome as a row under `HEADER`."""
    examples, groups = row_of(outcome, "examples"), row_of(outcome, "groups")
    a = np.array(outcome.accuracies)
    rates = [float(rate) for rate in outcome.losses]
    edge = outcome.rate in (min(rates), max(rates)) and len(rates) > 1
    finite = outcome.smoothness["finite"] if outcome.smoothness else None
    return [
        name(outcome.knobs),
        f"{outcome.rate:g}{' (edge)' if edge else ''}" if outcome.rate is not None else "none trains",
        _score(examples),
        _score(groups),
        f"{max(r['null_high'] for r in (examples, groups) if r):.2f}" if examples or groups else "",
        with_error(a, ".1%") if len(a) else "",
        f"{outcome.gain:.3f}" if outcome.gain is not None else "",
        {True: "finite", False: "not finite", None: ""}[finite] or outcome.problem or "",
    ]


def _score(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['score']:.2f}" + (" ({:.2f} to {:.2f})".format(*row["interval"]) if row["interval"] else "")


def correlation(found: Sweep) -> tuple[float, int] | None:
    """Spearman's, of smoothness along examples with what descent gains; and of how many recipes. None below three."""
    pairs = [(r["score"], o.gain) for o in found if (r := row_of(o, "examples")) and o.gain is not None]
    if len(pairs) < 3:
        return None
    smoothness, gains = zip(*pairs, strict=True)
    ranks: Any = stats.spearmanr(smoothness, gains)
    return float(ranks.statistic), len(pairs)


def compared(found: Sweep) -> dict[str, Outcome]:
    """The first recipe, as "smooth", and the standard one, where it is there and trains."""
    standard = [o for o in found if o.knobs == ROUGH]
    named = {"smooth": found.outcomes[0], **({"standard": standard[0]} if standard else {})}
    return {name: outcome for name, outcome in named.items() if outcome.rate is not None}


def figures_of(found: Sweep) -> dict[str, Any]:
    """Headline figures of a sweep, flat."""
    values: dict[str, Any] = {"recipes": len(found.outcomes)}
    for who, outcome in compared(found).items():
        for kind in ("examples", "groups"):
            if row := row_of(outcome, kind):
                values[f"score_{kind}_{who}"] = row["score"]
        values[f"accuracy_{who}"] = outcome.accuracy
        values[f"rate_{who}"] = outcome.rate
    if measured := correlation(found):
        values["spearman_gain"] = measured[0]
    values["smoothest"] = name(found.ranked("score")[0].knobs)
    values["most_accurate"] = name(found.ranked("accuracy")[0].knobs)
    return values


def trade_off(found: Sweep) -> Figure:
    """Accuracy against smoothness, a point a recipe."""
    front = found.front
    points = [(name(o.knobs), o.score, o.accuracy) for o in found if o.smoothness and o.accuracies]
    return scatter(
        points,
        stressed={name(o.knobs) for o in front},
        x="smoothness (Def. 2, the lower of both kinds of direction)",
        y="test accuracy",
        caption="Recipes by smoothness and accuracy, each at its own learning rate. Orange: none is better in both.",
    )


def gains(found: Sweep) -> Figure | None:
    """What metagradient descent gains against smoothness, a point a recipe; None without two."""
    points = [(name(o.knobs), r["score"], o.gain) for o in found if (r := row_of(o, "examples")) and o.gain is not None]
    measured = correlation(found)
    if len(points) < 2 or measured is None:
        return None
    return scatter(
        points,
        stressed=set(),
        x="smoothness (Def. 2, along examples)",
        y="rise of the validation loss",
        caption="What a few meta-steps of poisoning reach, by smoothness: Spearman correlation "
        f"{measured[0]:.2f} over {measured[1]} recipes.",
    )


def landscapes(cuts: Sequence[Cut]) -> Figure:
    """Validation losses along the metagradient, a panel a recipe."""
    return curves(
        {cut.name: (cut.places, cut.losses, cut.slope) for cut in cuts},
        x="a, in z - a g/|g|",
        y="validation loss",
        caption="The validation loss of whole trainings, along the metagradient g in the data weights. Dashed: the "
        "line that the metagradient promises.",
    )


def told(directory: RunDirectory, found: Sweep, cuts: list[Cut]) -> Page:
    """The report."""
    base, rows = found.outcomes[0], [cells_of(o) for o in found.ranked("score")]
    result = directory.figures or {}
    source = f"images of {directory.config['data']}" if "data" in directory.config else "handwritten digits"
    summary = (
        f"{len(found.outcomes)} ways to train a ResNet-9 on {source}. A metagradient says how the trained network "
        "would change if an example weighed a little more; it is of use only where the training answers such a change "
        "smoothly. That was probed here for every recipe, at the learning rate that suits it.\n\n"
        f"The smoothest was: {result['smoothest']}. The most accurate: {result['most_accurate']}."
    )
    facts = [(f"{row['score']:.2f}", "smoothness of the first recipe") for row in [row_of(base, "examples")] if row]
    if "score_examples_standard" in result:
        facts.append((f"{result['score_examples_standard']:.2f}", "smoothness of the standard recipe"))
    if "spearman_gain" in result:
        facts.append((f"{result['spearman_gain']:.2f}", "rank correlation of smoothness with what descent gains"))
    recipes = Section(
        "Recipes, smoothest first",
        "Smoothness is Definition 2 (1 is smooth) along random tenths of the examples and along whole classes, with "
        "95 % bootstrap intervals over the directions. Noise: what pure noise of the same size would read at most. "
        "Accuracy: mean ± standard error over fresh seeds. Gain: by how much a few meta-steps of poisoning raise the "
        "validation loss, beyond what the same moves of pixels with random signs do.",
        Table(HEADER, rows),
        figures=[figure for figure in (trade_off(found), gains(found)) if figure],
    )
    cost = f"{result['seconds']:.0f} seconds since the run was last begun, compilation included."
    along = [Section("The loss along the metagradient", figures=(landscapes(cuts),))] if cuts else []
    return Page(
        "Which recipes have useful metagradients?", summary, [recipes, *along, *closing(directory, cost)], facts
    )
