"""The page of a run that cleaned a labelled set, made from what lies in its directory."""

import json

import numpy as np

from metagradient.report.figures import least_trusted, lines, weights_by_group
from metagradient.report.page import Page, Section, Table
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.means import with_error
from metagradient.tasks.pages import closing

ACCURACIES, WEIGHTS = "accuracies.json", "weights.npz"

ARMS = {
    "all": "all examples as labelled",
    "random": "a random part of them, as large as cleanlab's",
    "small_loss": "those of small loss",
    "cosine": "those whose gradient is like the target's",
    "cleanlab": "those that confident learning (cleanlab) keeps",
    "target": "the clean target alone",
    "all_target": "all examples as labelled, and the target",
    "mgd": "all, at the metagradient's weights",
    "mgd_target": "all, at the metagradient's weights, and the target",
    "right": "those whose label is right (oracle)",
    "clean": "all with true labels (upper bound)",
    "clean_target": "all with true labels, and the target (upper bound)",
}
"""What a network is trained on."""

RANKINGS = {"mgd": "metagradient's weight", "small_loss": "loss", "cosine": "gradient cosine", "cleanlab": "cleanlab"}
"""By what examples are ranked."""


def arms_table(directory: RunDirectory) -> Table:
    """Test accuracies, an arm a row."""
    accuracies = json.loads((directory / ACCURACIES).read_text())
    result = directory.figures or {}

    kept = {name: f"{result[f'kept_{name}']:.0%}" if f"kept_{name}" in result else "" for name in ARMS}
    rows = [(text, with_error(accuracies[name], ".2%"), kept[name]) for name, text in ARMS.items()]
    return Table(
        ("trained on", "test accuracy", "kept"),
        rows,
        "Test accuracy, mean ± standard error over fresh seeds",
        emphasis=list(ARMS).index("mgd"),
    )


def page(directory: RunDirectory) -> Page:
    """The report of a finished run, of its files alone."""
    config, result, records = directory.config, directory.figures, directory.records
    assert result is not None
    with np.load(directory / WEIGHTS) as stored:
        learnt = dict(stored)
    weights, given, true, lowest = (learnt[name] for name in ("weights", "given", "true", "lowest"))
    summary = (
        f"{len(weights)} images with human labels, {result['share_wrong']:.0%} of them wrong. A weight for each was "
        f"learnt by differentiating whole training runs, so that a network trained with them does better on "
        f"{config['target']} clean images.\n\n"
        f"Trained on everything as labelled a network reaches {result['accuracy_all']:.1%} on test images; at the "
        f"learnt weights {result['accuracy_mgd']:.1%}; with all labels corrected {result['accuracy_clean']:.1%}. "
        f"That is {result['way']:.0%} of the way."
    )
    losses = {"clean target": [r["value"] for r in records], "held out": [r["held_out"] for r in records]}
    aurocs = [(text, f"{result[f'auroc_{name}']:.3f}") for name, text in RANKINGS.items()]
    return Page(
        "Which labels to trust?",
        summary,
        [
            Section(
                "What training on each choice gives",
                "All rows train the same network for as many steps. Baselines that drop examples keep the share with "
                "the lowest loss on the held-out clean images.",
                arms_table(directory),
            ),
            Section(
                "How each ranks wrong labels",
                "Area under the ROC curve, 1 where every wrong label is trusted less than every right one. Weights are "
                "made to train a better network, not to rank: the two are not the same.",
                Table(("ranked by", "AUROC"), aurocs),
            ),
            Section(
                "Which examples it trusts",
                figures=(
                    weights_by_group(weights, given != true),
                    least_trusted(
                        learnt["lowest_images"], weights[lowest], given[lowest], true[lowest],
                        learnt["classes"].tolist(),
                    ),
                ),
            ),
            Section(
                "How it got there",
                figures=(lines(losses, x="meta-step", y="loss", caption="Loss per meta-step, each on fresh seeds."),),
            ),
            *closing(
                directory,
                f"{result['training_runs']:.0f} training runs' worth of compute in the descent, counted in matrix "
                f"products; {result['seconds']:.0f} seconds in all, baselines and evaluation included.",
            ),
        ],
        [
            (f"{result['accuracy_all']:.1%} → {result['accuracy_mgd']:.1%}", "test accuracy"),
            (f"{result['way']:.0%}", "of the way to true labels"),
            (f"{result['auroc_mgd']:.2f}", "AUROC of wrong labels"),
        ],
    )  # fmt: skip
