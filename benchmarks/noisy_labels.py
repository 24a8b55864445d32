"""Wrong labels of CIFAR-10N, seed by seed: runs `metagradient select --task labels`, writes docs/noisy_labels.md.

    python benchmarks/noisy_labels.py --data DIR [--labels worse random1] [--seeds 3] [--runs DIR] [--out docs]

DIR holds CIFAR-10 and CIFAR-10N in Parquet. A seed takes about six minutes on one core; runs that are there are gone on
with, or only read.
"""

import argparse
import datetime
import json
import platform
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from metagradient.report.page import Table
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.means import with_error
from metagradient.tasks.noisy_labels import NAME, NoisyLabels, run
from metagradient.tasks.noisy_labels_page import ACCURACIES, ARMS, RANKINGS


def interval(values: Any) -> str:
    """Mean and standard error of accuracies, in points."""
    return with_error(100 * np.asarray(values), ".2f")


def section(labels: str, directories: list[RunDirectory]) -> list[str]:
    found = [json.loads((d / ACCURACIES).read_text()) for d in directories]
    results: list[Any] = [d.figures for d in directories]
    accuracies = {name: np.array([f[name] for f in found]).reshape(-1) for name in ARMS}
    # Every accuracy of an arm has its twin, of the same split and fresh seed, in every other.
    whole = (accuracies["clean"] - accuracies["all"]).mean()
    way, with_target = ((accuracies[name] - accuracies["all"]).mean() / whole for name in ("mgd", "mgd_target"))
    rows = [
        (
            text,
            interval(accuracies[name]),
            "" if name == "mgd" else interval(accuracies["mgd"] - accuracies[name]),
            "" if name == "mgd_target" else interval(accuracies["mgd_target"] - accuracies[name]),
            f"{np.mean([r[f'kept_{name}'] for r in results]):.0%}" if f"kept_{name}" in results[0] else "",
        )
        for name, text in ARMS.items()
    ]
    header = ("trained on", "test accuracy, %", "MGD's gain over it", "MGD + target's gain over it", "kept")
    aurocs = [(text, f"{np.mean([r[f'auroc_{name}'] for r in results]):.3f}") for name, text in RANKINGS.items()]
    ways_by_seed = [f"{r['way']:.0%}" for r in results]
    runs = np.mean([r["training_runs"] for r in results])
    return [
        f"## Labels {labels!r}: {np.mean([r['share_wrong'] for r in results]):.0%} of them wrong",
        "",
        Table(header, rows).markdown(),
        "",
        f"Trained at MGD's weights a network goes **{way:.0%}** of the way from all examples as labelled to all with "
        f"true labels ({', '.join(ways_by_seed)} by seed); with the target's examples added, which cost nothing more, "
        f"**{with_target:.0%}**. The descent took {runs:.0f} training runs' worth of compute.",
        "",
        "How well each ranks the wrong labels; weights are made to train a better network, not to rank:",
        "",
        Table(("ranked by", "AUROC"), aurocs).markdown(),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--labels", nargs="+", default=["worse", "random1"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/noisy-labels"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    config = NoisyLabels(data=given.data)
    blocks = [
        section(
            labels,
            [
                RunDirectory.finished(
                    given.runs / f"{labels}-{seed}", replace(config, labels=labels, seed=seed), NAME, run
                )
                for seed in range(given.seeds)
            ],
        )
        for labels in given.labels
    ]
    text = "\n".join(
        [
            "# Cleaning a labelled set: CIFAR-10N",
            "",
            f"CIFAR-10 (a JPEG copy) averaged to 16x16, {config.examples:,} training images with human labels, "
            f"{config.target:,} clean ones as target, {config.held_out:,} more by which baselines choose how much to "
            f"drop, {config.test:,} test images. A smooth ResNet-9 of widths 8-16-32, {config.recipe.steps} steps of "
            f"batch {config.recipe.batch}, in every row. MGD: {config.meta_steps} meta-steps on weights in [0, "
            f"{config.most:g}], each from a fresh seed of initial parameters and order. Means ± standard errors over "
            f"{given.seeds} seeds of split and descent with {config.fresh} fresh training seeds each, which no "
            "method saw; gains are paired. Small-loss and gradient cosine keep the share that does best on held-out "
            "images.",
            "",
            *(line for block in blocks for line in block),
            f"Made by `python benchmarks/noisy_labels.py --data DIR --out docs` on "
            f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}: {platform.machine()}, jax {version('jax')}, cleanlab "
            f"{version('cleanlab')}, metagradient {version('metagradient')}.",
        ]
    )
    print(text)
    if given.out:
        (given.out / "noisy_labels.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
