"""The image–text experiment: which objective orders known subsets, and what a pool's filters are worth.

    python benchmarks/clip_selection.py --data DIR [--runs runs/clip] [--preset tiny] [--beside RUN...] [--out docs]

DIR holds the pool's shards, val.tar and test.tar. Writes docs/clip_selection.md. What --runs holds already is
read, not made again. --beside names finished runs with other settings: every look at the test pairs is to be shown.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from string import Template

import jax.numpy as jnp
import numpy as np

import metagradient as mg
from metagradient.cli import parse
from metagradient.descent.journal import read_lines
from metagradient.descent.seeds import fresh_seed
from metagradient.files import append_text
from metagradient.models.clip import contrastive_losses
from metagradient.report.page import Table
from metagradient.tasks.clip_page import arms_table, curves, recalls_table
from metagradient.tasks.clip_selection import NAME, ClipSelection, Prepared, prepare, run
from metagradient.tasks.clip_training import fitted_scale, recalls, soft_rank
from metagradient.tasks.clip_trials import TRAININGS
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.means import with_error

TEMPLATE = Path(__file__).with_name("clip_selection.md.in")
STEPS = (60, 120, 200)
SUBSETS = {
    "oracle": "matched pairs alone",
    "all": "everything",
    "random": "a random subset of the oracle's size",
}
OBJECTIVES = {
    "recall": "mean recall",
    "fitted": "contrastive, best scale",
    "learnt": "contrastive, learnt scale",
    "fixed": "contrastive, scale 10",
    "rank": "log rank",
}


def orders(file: Path, task: Prepared, steps: Sequence[int], seeds: int) -> list[dict[str, float]]:
    """Objectives of models trained on known subsets, on validation pairs: a line each of a file."""
    wrong = task.mismatched
    assert wrong is not None
    matched = np.flatnonzero(~wrong)
    random = np.sort(np.random.default_rng((task.config.seed, 4)).permutation(len(wrong))[: len(matched)])
    rows = {"oracle": matched, "all": np.arange(len(wrong)), "random": random}
    done = {(r["subset"], r["steps"], r["seed"]) for r in read_lines(file)}
    for count in steps:
        trainer = replace(task.trainer, recipe=replace(task.trainer.recipe, steps=count))
        for seed in (fresh_seed(task.config.seed, 3000 + i) for i in range(seeds)):
            for subset in SUBSETS:
                if (subset, count, seed) in done:
                    continue
                state = mg.train(trainer.training(task.arrays, seed, rows=rows[subset]), {})
                images, texts = trainer.embedded(state, task.val)
                u, v = jnp.asarray(images), jnp.asarray(texts)
                found = {
                    "recall": recalls(images, texts)["recall"],
                    "fitted": float(contrastive_losses(u, v, fitted_scale(u, v)).mean()),
                    "learnt": float(contrastive_losses(u, v, trainer.model.scale_of(state.params)).mean()),
                    "fixed": float(contrastive_losses(u, v, trainer.recipe.scale).mean()),
                    "rank": float(soft_rank(u, v)),
                }
                append_text(file, json.dumps({"subset": subset, "steps": count, "seed": seed, **found}) + "\n")
    return read_lines(file)


def orders_table(found: Sequence[dict[str, float]]) -> Table:
    """Mean and standard error of each objective on each subset, and whether it orders them rightly in every seed."""
    rows = []
    for count in sorted({r["steps"] for r in found}):
        of_subset = {
            subset: sorted((r for r in found if (r["subset"], r["steps"]) == (subset, count)), key=lambda r: r["seed"])
            for subset in SUBSETS
        }
        for name, text in OBJECTIVES.items():
            values = {subset: np.array([r[name] for r in rs]) for subset, rs in of_subset.items()}
            sign = 1 if name == "recall" else -1
            right = [
                np.sum(sign * (values[a] - values[b]) > 0) for a, b in (("oracle", "all"), ("all", "random"))
            ]  # fmt: skip
            seeds = len(values["all"])
            cells = (with_error(v, ".3f") for v in values.values())
            rows.append((count, text, *cells, *(f"{n} of {seeds}" for n in right)))
    header = ("steps", "objective", *SUBSETS, "oracle better than all", "all better than random")
    return Table(header, rows)


def designs_table(directories: Sequence[RunDirectory]) -> Table:
    """What runs with different settings came to: on validation, by which one chooses, and on the test pairs."""
    rows = []
    for directory in directories:
        c, r = directory.config, directory.figures
        assert r is not None
        tried: dict[str, list[float]] = {}
        for line in read_lines(directory / TRAININGS):
            if line["what"].startswith("validation of weights"):
                tried.setdefault(line["what"], []).append(line["recall"])
        best = max(float(np.mean(found)) for found in tried.values())
        gains = (f"{r[f'gain_{arm}']:+.3f} ± {r[f'gain_error_{arm}']:.3f}" for arm in ("subset", "mgd"))
        ratios = (f"{r[f'gain_{arm}'] / r['gain_score']:.1f}" for arm in ("subset", "mgd"))
        # Runs of before there was one had no head start.
        settings = (c["method"], f"{c.get('head_start', 0):g}", c["meta_steps"], c["scorers"], c["fresh"])
        rows.append((*settings, f"{best:.3f}", *gains, *ratios))
    header = (
        *("method", "head start", "meta-steps", "scorers", "fresh seeds", "best recall on validation"),
        *("gain of the subset", "gain of the weights", "subset's, over one model's score filter", "weights'"),
    )
    return Table(header, rows)


def beside(directories: Sequence[RunDirectory]) -> str:
    """A section on runs with other settings; nothing where there are none but the first."""
    if len(directories) < 2:
        return ""
    return (
        "## Settings that were tried\n\nThe first row is the run above; all are measured on the same test pairs, and "
        f"validation chooses.\n\n{designs_table(directories).markdown()}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/clip"))
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--beside", type=Path, nargs="+", default=[])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    config = parse("select-clip", ClipSelection(), ["--preset", given.preset, "--data", str(given.data)])
    given.runs.mkdir(parents=True, exist_ok=True)
    directory = RunDirectory.finished(given.runs / given.preset, config, NAME, run)
    ordered = orders(given.runs / "orders.jsonl", prepare(config), STEPS, given.seeds)
    result = directory.figures
    assert result is not None

    def gain(arm: str) -> str:
        return f"{result[f'gain_{arm}']:+.4f} ± {result[f'gain_error_{arm}']:.4f}"

    (given.out / "clip_selection-curves.svg").write_bytes(curves(directory).content)
    text = Template(TEMPLATE.read_text()).substitute(
        orders=orders_table(ordered).markdown(),
        arms=arms_table(directory).markdown(),
        recalls=recalls_table(directory).markdown(),
        seeds=config.fresh,
        order_seeds=given.seeds,
        ratio=f"{result['gain_ratio']:.2f}",
        ours=gain("mgd"),
        **{arm: gain(arm) for arm in ("subset", "score", "ensemble", "oracle")},
        scorers=config.scorers,
        twice_ensemble=f"{2 * result['gain_ensemble']:+.4f}",
        beside=beside([directory, *(RunDirectory.read(path) for path in given.beside)]),
        score_ratio=f"{result['gain_subset'] / result['gain_score']:.2f}",
        weights_ratio=f"{result['gain_mgd'] / result['gain_score']:.2f}",
        ensemble_ratio=f"{result['gain_mgd'] / result['best_baseline_gain']:.2f}",
        runs=f"{result['training_runs']:.0f}",
        meta_step=result["meta_step"],
        meta_steps=config.meta_steps,
        pairs=result["pairs"],
        preset=given.preset,
        made=f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}: {platform.machine()}, one core, "
        f"jax {version('jax')}, metagradient {version('metagradient')}",
    )
    (given.out / "clip_selection.md").write_text(text)


if __name__ == "__main__":
    main()
