"""The page of a poisoning run, made from what lies in its directory."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from metagradient.report.figures import before_and_after, lines
from metagradient.report.page import Page, Section, Table
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.pages import closing

ARMS = {
    "clean": "nothing poisoned",
    "metagradient": "metagradient poison",
    "canceling": "gradient canceling",
    "flips": "their labels flipped instead",
    "noise": "random pixels",
}
"""What a network is trained on: nothing poisoned, the attack, and three baselines in the same images."""

PLACES = {
    "attacked": "the attacked run",
    "fresh": "fresh seeds",
    "standard": "standard recipe, fresh seeds",
}
"""Where it is trained: in the attacked run, at fresh seeds, and by the standard recipe at fresh seeds."""

POISONS = "poisons.npz"
"""File of a run's directory: which images, what they were, and what they became."""

_POINTS = 40


def curves(records: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Losses on attacked and on held-out images, a meta-step each. The descent takes low for good, and noted minus."""
    return [r["value"] for r in records], [abs(r["held_out"]) for r in records]


def drops(result: Mapping[str, float]) -> Table:
    """Drops in points of accuracy with their standard errors, and the accuracy left, an arm a row."""

    def cell(arm: str, place: str) -> str:
        accuracy = f"{result[f'accuracy_{arm}_{place}']:.1%}"
        if arm == "clean":
            return accuracy
        return f"−{result[f'drop_{arm}_{place}']:.2f} ± {result[f'error_{arm}_{place}']:.2f} ({accuracy})".replace(
            "−-", "+"
        )

    rows = [(name, *(cell(arm, place) for place in PLACES)) for arm, name in ARMS.items()]
    caption = "Points of test accuracy lost ± standard error (accuracy left)."
    return Table(("changed in the poisoned images", *PLACES.values()), rows, caption, emphasis=1)


def losses(result: Mapping[str, float]) -> Table:
    """Mean test losses, an arm a row."""
    rows = [(name, *(f"{result[f'loss_{arm}_{place}']:.3f}" for place in PLACES)) for arm, name in ARMS.items()]
    return Table(("changed in the poisoned images", *PLACES.values()), rows, emphasis=1)


def page(directory: RunDirectory) -> Page:
    """The report of a finished run, of its files alone."""
    config, result = directory.config, directory.figures
    assert result is not None
    with np.load(directory / POISONS) as stored:
        saved = dict(stored)
    one_run = not config["seeds"]
    count, share = int(result["poisoned"]), f"{config['share']:.1%}"
    aim = (
        "one training run, whose seed of initial parameters and of order the attack knows"
        if one_run
        else f"trainings of any seed: every meta-step averaged the metagradients of {config['seeds']} fresh ones"
    )
    summary = (
        f"How much harm can {share} of the training images do? Pixels of {count} of {config['examples']} training "
        f"images were changed, their labels left alone, to make the trained network worse on clean images. The changes "
        f"were found by differentiating through whole training runs. The attack aimed at {aim}.\n\n"
        f"In the attacked run test accuracy fell from {result['accuracy_clean_attacked']:.1%} to "
        f"{result['accuracy_metagradient_attacked']:.1%}, by {result['drop_metagradient_attacked']:.1f} points; "
        f"trained again from fresh seeds on the same poisoned images it fell by "
        f"{result['drop_metagradient_fresh']:.1f} points, and with a standard recipe by "
        f"{result['drop_metagradient_standard']:.1f}."
    )
    attacked, held_out = curves(directory.records)
    ascent = {"attacked images": attacked, "held out": held_out}
    every = max(1, len(saved["gradient_left"]) // _POINTS)
    return Page(
        "How much harm can poisoned images do?",
        summary,
        [
            Section(
                "What each attack costs the network",
                "Points of test accuracy lost against the same training on clean data, ± one standard error (over "
                "seeds where there are several, else over test images), and the accuracy left. All rows change the "
                "same images, and only one of them labels. The standard recipe (ReLU, norm after it, max pooling) is "
                "one that the attack never saw.",
                drops(result),
            ),
            Section("Test losses", "Mean cross-entropy on the test images.", losses(result)),
            Section(
                "What the images look like",
                figures=(before_and_after(saved["clean"], saved["images"], saved["labels"], list(saved["classes"])),),
            ),
            Section(
                "How it got there",
                "Every meta-step trains once for each inner seed, measures the loss on clean images, and moves every "
                "poisoned pixel by a fixed amount in the direction that raises it.",
                figures=(
                    lines(ascent, x="meta-step", y="loss", caption="Loss on clean images, before each meta-step."),
                    lines(
                        {"gradient left": saved["gradient_left"][::every].tolist()},
                        x=f"step / {every}",
                        y="share of the clean gradient",
                        caption="Gradient canceling: what is left of the training gradient at its target parameters.",
                    ),
                ),
            ),
            *closing(
                directory,
                f"{result['training_runs']:.0f} training runs' worth of compute in the attack, counted in matrix "
                f"products, {result['cancel_training_runs']:.0f} in gradient canceling; {result['seconds']:.0f} "
                "seconds in all, compilation and evaluation included.",
            ),
        ],
        [
            (f"{result['drop_metagradient_attacked']:.1f}", "points lost in the attacked run"),
            (f"{result['drop_metagradient_fresh']:.1f}", "points lost at fresh seeds"),
            (f"{result['drop_metagradient_standard']:.1f}", "points lost by the standard recipe"),
            (f"{result['drop_canceling_attacked']:.1f}", "points lost to gradient canceling, attacked run"),
        ],
    )
