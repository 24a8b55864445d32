"""Smoothness of ResNet-9 recipes on CIFAR-10 averaged to 16x16: tables and figures of docs/smoothness.md.

    python benchmarks/smoothness.py --data DIR [--runs runs/smoothness] [--out docs] [--parts recipes standard]

About an hour on one core. What the files under --runs hold is not run again; --parts names those that are wanted
(recipes, standard, scaled, adam, rates, close), and without it all are. The document tells of them.
"""

import argparse
import datetime
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from metagradient.descent.loop import fresh_seed
from metagradient.report.page import Table
from metagradient.smoothness.sweep import Candidate, Knobs, Outcome, Sweep, sweep
from metagradient.tasks.classifier import ROUGH, Recipe
from metagradient.tasks.means import with_error
from metagradient.tasks.smoothness import Bench, SmoothnessProbe, cuts_of, load, probe
from metagradient.tasks.smoothness_page import (
    HEADER,
    cells_of,
    correlation,
    gains,
    landscapes,
    name,
    printed,
    row_of,
    trade_off,
)

CONFIG = SmoothnessProbe(
    shrink=2,
    examples=4000,
    validation=2000,
    test=4000,
    recipe=Recipe(steps=60),
    rates=(0.1, 0.15, 0.2, 0.3, 0.6),
    directions=3,
    accuracy_seeds=3,
    gain_images=100,
    gain_steps=6,
    gain_seeds=2,
)
RECIPES: list[dict[str, Any]] = [
    {},
    {"pooling": "max"},
    {"pooling": "logsumexp"},
    {"norm_before_activation": False},
    {"activation": "relu"},
    {"widths": [4, 8, 16]},
    {"batch": 125},
    {"batch": 500},
    {"widths": [12, 24, 48]},
]
STANDARD: list[dict[str, Any]] = [ROUGH, *({k: v for k, v in ROUGH.items() if k != knob} for knob in ROUGH)]
SCALED = {"final_scale": 0.125}
SCALED_RATES = (0.6, 1.2, 2.4, 4.8)
ADAM: list[dict[str, Any]] = [
    {"optimizer": "adam", "momentum": 0.9, "second_decay": 0.999, **knobs}
    for knobs in ({}, {"eps_root": 1e-6}, {"eps_root": 1e-12}, {"second_decay": 0.9})
]
ADAM_RATES = (0.003, 0.01, 0.03)
CLOSE_STEPS = (0.05, 0.1, 0.2)


def at_given_rates(bench: Bench) -> Callable[[Knobs], Candidate]:
    """Candidates whose learning rate is a knob, `rate`, and not to be chosen."""

    def make(knobs: Knobs) -> Candidate:
        candidate = bench.candidate({k: v for k, v in knobs.items() if k != "rate"})
        return replace(candidate, z=lambda _: candidate.z(knobs["rate"]), gain=None)

    return make


def given_rates(bench: Bench, recipes: list[dict[str, Any]], file: Path, step: Any, seeds: int) -> Sweep:
    chosen = [fresh_seed(bench.config.seed, i) for i in range(seeds)]
    make = at_given_rates(bench)
    return sweep(make, recipes, rates=[1.0], file=file, step=step, accuracy_seeds=chosen, at_once=1, progress=tell)


def tell(outcome: Outcome) -> None:
    print(printed(outcome), f"[{outcome.seconds:.0f} s]", flush=True)


def parts(bench: Bench, runs: Path) -> dict[str, Callable[[], Sweep]]:
    def close() -> Sweep:
        chosen = [found["recipes"]().outcomes[0], found["standard"]().outcomes[0]]
        recipes = [{**o.knobs, "rate": o.rate} for o in chosen]
        patient = Bench(replace(bench.config, directions=5), bench.pool, bench.validation, bench.test)
        return given_rates(patient, recipes, runs / "close.jsonl", CLOSE_STEPS, 6)

    rates = [{**knobs, "rate": rate} for knobs in ({}, ROUGH) for rate in CONFIG.rates[::2]]
    higher = Bench(replace(bench.config, rates=SCALED_RATES), bench.pool, bench.validation, bench.test)
    adam = Bench(replace(bench.config, rates=ADAM_RATES), bench.pool, bench.validation, bench.test)
    found: dict[str, Callable[[], Sweep]] = {
        "recipes": lambda: probe(bench, RECIPES, runs / "recipes.jsonl", tell),
        "standard": lambda: probe(bench, STANDARD, runs / "standard.jsonl", tell),
        "scaled": lambda: probe(higher, [SCALED], runs / "scaled.jsonl", tell),
        "adam": lambda: probe(adam, ADAM, runs / "adam.jsonl", tell),
        "rates": lambda: given_rates(bench, rates, runs / "rates.jsonl", 0.1, 3),
        "close": close,
    }
    return found


def close_rows(found: Sweep) -> list[list[str]]:
    rows = []
    for which, outcome in zip(("smooth", "standard"), found, strict=True):
        assert outcome.smoothness is not None
        accuracy = with_error(outcome.accuracies, ".1%")
        for row in outcome.smoothness["rows"]:
            low, high = row["interval"]
            score = f"{row['score']:.3f} ({low:.3f} to {high:.3f})"
            noise = f"{row['null']:.2f}, {row['null_high']:.2f}"
            kind = "examples" if row["kind"] == "examples" else "classes"
            rows.append([which, kind, f"{row['step']:g}", score, noise, f"{row['curvature']:.3g}", accuracy])
            accuracy = ""
    return rows


def accuracy_difference(found: Sweep) -> str:
    """Smooth less standard, paired by seed."""
    smooth, standard = (np.array(o.accuracies) for o in found)
    d = 100 * (smooth - standard)
    return f"{with_error(d, '+.1f')} points over {len(d)} seeds"


def everything(found: dict[str, Sweep]) -> Sweep:
    """The recipes of the big table."""
    return Sweep([o for part in ("recipes", "scaled", "standard", "adam") for o in found.get(part, Sweep([]))])


def smooth_and_standard(close: Sweep) -> list[str]:
    return [
        "## Smooth and standard",
        "",
        f"Each at its own learning rate. Test accuracy of the smooth recipe less the standard one's: "
        f"{accuracy_difference(close)}.",
        "",
        Table(
            ("recipe", "directions", "h", "Def. 2 (95 %)", "noise: mean, 97.5 %", "Def. 1", "test accuracy"),
            close_rows(close),
        ).markdown(),
        "",
    ]


def by_rate(found: Sweep) -> list[str]:
    rates = [[f"{o.knobs['rate']:g}", *cells_of(o)] for o in found]
    header = ("rate", *HEADER[:1], *HEADER[2:6])
    return ["## By learning rate", "", Table(header, [[r[0], r[1], *r[3:7]] for r in rates]).markdown(), ""]


def reached(found: Sweep) -> str:
    """Which recipes are as smooth as was wanted, and what that costs in accuracy."""
    rows = {name(o.knobs): (row_of(o, "examples"), row_of(o, "groups")) for o in found}
    smooth = [n for n, (a, b) in rows.items() if a and b and a["score"] >= 0.95 and b["score"] >= 0.85]
    rough = max(row["score"] for row in rows["standard"] if row)
    best, standard = (o.accuracies for o in (found.outcomes[0], *(o for o in found if o.knobs == ROUGH)))
    d = 100 * (np.array(best) - np.array(standard))
    difference = with_error(d, "+.1f")
    return (
        f"Wanted were 0.95 along examples and 0.85 along classes: {'; '.join(smooth) or 'none'} reach both. "
        f"The standard recipe was to stay below 0.15, and reads {rough:.2f} at most. The first recipe less the "
        f"standard one, each at its own learning rate: {difference} points of accuracy, paired by seed."
    )


def two_kinds(found: Sweep) -> str:
    """What recipes gain that read above a half, and the others; and what a probe would come to that told just these."""
    read = [(row["score"], o.gain) for o in found if (row := row_of(o, "examples")) and o.gain is not None]
    smooth, rough = (np.array([pair for pair in read if (pair[0] > 0.5) == high]) for high in (True, False))
    within: Any = stats.spearmanr(*smooth.T)
    n, share = len(read), len(smooth) / len(read)
    # Of two groups whose ranks don't overlap, and are random within each.
    apart = 3 * share * (1 - share) * n**2 / (n**2 - 1)

    def gains_of(group: np.ndarray) -> str:
        return f"{group[:, 1].min():.3f} to {group[:, 1].max():.3f}, {group[:, 1].mean():.3f} on average"

    return (
        f"The {len(smooth)} that read above 0.5 gain {gains_of(smooth)}; the other {len(rough)} {gains_of(rough)}. "
        f"Among the former the correlation is {within.statistic:.2f}: they read {smooth[:, 0].min():.2f} to "
        f"{smooth[:, 0].max():.2f}, and what they gain goes by other things, as learning rates and batch sizes. A "
        f"probe that told nothing but the two kinds apart, without fail, would come to {apart:.2f} on average."
    )


def document(found: dict[str, Sweep]) -> list[str]:
    together = everything(found)
    measured = correlation(together)
    assert measured is not None
    return [
        "# Smoothness of ResNet-9 recipes",
        "",
        INTRODUCTION,
        "",
        *(smooth_and_standard(found["close"]) if "close" in found else []),
        "## One knob at a time",
        "",
        Table(HEADER, [cells_of(o) for o in together]).markdown(),
        "",
        reached(together),
        "",
        f"Spearman correlation of smoothness along examples with what descent gains: **{measured[0]:.2f}** over "
        f"{measured[1]} recipes (wanted: 0.7). {two_kinds(together)}",
        "",
        "![accuracy by smoothness](smoothness-trade-off.svg)",
        "",
        "![gain by smoothness](smoothness-gains.svg)",
        "",
        *(by_rate(found["rates"]) if "rates" in found else []),
        "## The loss along the metagradient",
        "",
        "![losses along the metagradient](smoothness-landscapes.svg)",
        "",
        f"Made by `python benchmarks/smoothness.py` on {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}: "
        f"{platform.machine()}, one core, jax {version('jax')}, metagradient {version('metagradient')}.",
    ]


INTRODUCTION = " ".join(
    f"""
CIFAR-10 (a JPEG copy) averaged to 16x16; {CONFIG.examples:,} training images, {CONFIG.validation:,} for validation,
{CONFIG.test:,} for test. A ResNet-9 of widths 8-16-32 (29,650 parameters), batch {CONFIG.recipe.batch},
{CONFIG.recipe.steps} steps of SGD with Nesterov momentum {CONFIG.recipe.momentum}, one-cycle learning rate. *Smooth*:
batch norm before GELU, average pooling. *Standard*: batch norm after ReLU, max pooling. **Learning rate**: of
{", ".join(f"{r:g}" for r in CONFIG.rates)} (logits divided by 8: {", ".join(f"{r:g}" for r in SCALED_RATES)};
Adam: {", ".join(f"{r:g}" for r in ADAM_RATES)}), the
lowest whose validation loss is no more than {CONFIG.slack} above the best, one training each; all else is measured at
that rate. **Def. 2** (1 is smooth): at h = 0.1 on data weights of 1, along {CONFIG.directions} random tenths of the
examples and {CONFIG.directions} whole classes, with 95 % bootstrap intervals over the directions (of three directions,
no more than their range). **Noise**: the 97.5 % quantile of what Def. 2 reads where every sign is a fair coin, and the
sizes of this run's movements are shuffled within each leaf; noise of the other kind, where the three trainings end in
places that have nothing to do with each other, reads 0.
**Accuracy**: test, mean ± standard error over {CONFIG.accuracy_seeds} fresh seeds. **Gain**: by how much
{CONFIG.gain_steps} meta-steps of poisoning of one training ({CONFIG.gain_images} random images, sign steps of
{CONFIG.gain_rate} on pixels) raise the validation loss that they climb, beyond the mean over three moves of the same
pixels by as much with random signs; the mean of {CONFIG.gain_seeds} trainings, of a seed each.
""".split()
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/smoothness"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", nargs="+", choices=("recipes", "standard", "scaled", "adam", "rates", "close"))
    given = parser.parse_args()
    bench = load(replace(CONFIG, data=given.data))
    ways = parts(bench, given.runs)
    found = {part: ways[part]() for part in given.parts or ways}
    text = "\n".join(document(found))
    print(text)
    if given.out:
        together = everything(found)
        cuts = cuts_of(bench, together)
        shown = {"trade-off": trade_off(together), "gains": gains(together), "landscapes": landscapes(cuts)}
        for kind, figure in shown.items():
            assert figure is not None
            (given.out / f"smoothness-{kind}.svg").write_bytes(figure.content)
        (given.out / "smoothness.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
