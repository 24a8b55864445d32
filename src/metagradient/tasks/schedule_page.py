"""What a learnt learning-rate schedule leaves for people: a table on the terminal, and a page."""

from typing import Any

import numpy as np
from rich.console import Console

from metagradient.report.figures import Figure, against_compute, lines, schedules
from metagradient.report.page import Page, Section, Table
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.pages import closing, say_report

ARMS = {
    "start": "the descent's start",
    "flat": "best constant rate",
    "grid": "best of the grid, by loss",
    "grid_accuracy": "best of the grid, by accuracy",
    "mgd": "metagradient descent",
}
GRIDS = ("grid", "grid_accuracy")
_SHORT = {"mgd": "descent", "grid": "grid by loss", "grid_accuracy": "grid by accuracy", "flat": "best constant"}


def arms_table(directory: RunDirectory) -> Table:
    """A row an arm: name, accuracy and loss with standard errors, training runs that finding it took."""
    result = _result(directory)
    rows = [
        (
            words,
            f"{result[f'accuracy_{name}']:.2%} ± {result[f'accuracy_{name}_error']:.2%}",
            f"{result[f'loss_{name}']:.4f} ± {result[f'loss_{name}_error']:.4f}",
            f"{result[f'training_runs_{name}']:.0f} training runs",
        )
        for name, words in ARMS.items()
    ]
    header = ("learning rates", "test accuracy", "test loss", "compute to find them")
    return Table(header, rows, "Mean ± standard error over fresh seeds.", emphasis=len(rows) - 1)


def verdict(directory: RunDirectory) -> str:
    """The descent against the grid, in two sentences."""
    result = _result(directory)
    runs = {name: f"{result[f'training_runs_{name}']:.0f}" for name in ("mgd", "grid")}
    against = [
        f"{100 * result[f'accuracy_over_{name}']:+.2f} ± {100 * result[f'accuracy_over_{name}_error']:.2f} points of "
        f"accuracy and {result[f'loss_over_{name}']:+.4f} ± {result[f'loss_over_{name}_error']:.4f} of loss against "
        f"the {ARMS[name]}"
        for name in GRIDS
    ]
    return (
        f"On the same fresh seeds, the descent has {'; '.join(against)}. It took {runs['mgd']} training runs' worth of "
        f"compute, the grid {runs['grid']}."
    )


def picked_step(directory: RunDirectory) -> str:
    """Which of the descent's schedules was picked, in words."""
    assert directory.figures is not None
    step, steps = directory.figures["best_step"], directory.figures["meta_steps"]
    return "the mean of the last half of the meta-steps" if step == steps else f"meta-step {step}"


def picks(directory: RunDirectory) -> str:
    """What was picked of the grid, in a sentence each."""
    result = _result(directory)
    return " ".join(
        f"The {ARMS[name]} peaks at {result[f'{name}_peak']:g} after {result[f'{name}_position']:.0%} of the run, "
        f"starts at {result[f'{name}_start']:g} and ends at {result[f'{name}_end']:g} of its peak."
        for name in GRIDS
    )


def figures(directory: RunDirectory) -> tuple[Figure, Figure, Figure]:
    """Schedules, accuracy against compute, and losses per meta-step, of a finished run."""
    result, saved = _result(directory), np.load(directory / "schedules.npz")
    records = directory.records
    chosen = {name: saved[arm] for arm, name in _SHORT.items()}
    curves = {_SHORT[arm]: saved[f"curve_{arm}"] for arm in ("mgd", *GRIDS)}
    levels = {_SHORT["flat"]: result["accuracy_flat"]}
    return (
        schedules(saved["learnt"], chosen),
        against_compute(
            curves,
            levels,
            y="test accuracy",
            caption="Test accuracy of what each search would have picked, had it been stopped there (picked on one "
            "training each; mean and standard error over fresh seeds).",
        ),
        lines(
            {"target": [r["value"] for r in records], "validation": [r["held_out"] for r in records]},
            x="meta-step",
            y="loss",
            caption="Loss of the trained model at the schedule of each meta-step, on fresh seeds: on the images "
            "that the descent aims at, and on those that only pick its best step.",
        ),
    )


def page(directory: RunDirectory) -> Page:
    """The report of a finished run, made from the files in its directory."""
    result = _result(directory)
    settings = directory.config
    curves, compute, losses = figures(directory)
    learnt = f"{settings['knots']} points of it" if settings["knots"] else "a learning rate for every step"
    summary = (
        "A learning rate says how far each training step moves a model, and good ones change over the run. Here such a "
        f"schedule ({learnt}) was learnt by metagradient descent: train a model, differentiate its final loss "
        "through the whole training run, and move the schedule against that gradient. "
        f"Each of the {result['meta_steps']} meta-steps trains on fresh seeds.\n\n"
        f"It is held against the best of {result['grid_size']} one-cycle schedules (up to a peak, and down), each "
        f"trained and compared on the same validation images. {verdict(directory)}"
    )
    return Page(
        "Learning a learning-rate schedule",
        summary,
        [
            Section(
                "What was learnt",
                f"Each row trains the same model with other learning rates; means ± standard errors over "
                f"{result['seeds']} fresh seeds that no search saw, on test images that none saw. A metagradient "
                "counts as about four training runs, a training of the grid as one; measuring models isn't counted.",
                arms_table(directory),
                (curves,),
            ),
            Section(
                "Accuracy against compute",
                "Both searches stop being worth their compute somewhere; this shows where.",
                figures=(compute,),
            ),
            Section(
                "How it got there",
                f"Picked was {picked_step(directory)}: of {settings['finalists']} finalists (the mean of the last half "
                f"of the meta-steps, and those with the lowest validation loss) the best on "
                f"{settings['finalist_seeds']} other seeds. The grid's picks were chosen likewise, by loss and by "
                f"accuracy. {picks(directory)}",
                figures=(losses,),
            ),
            *closing(
                directory,
                f"Wall time: descent {result['seconds_mgd']:.0f} s, grid {result['seconds_grid']:.0f} s, all "
                f"{result['seconds']:.0f} s.",
            ),
        ],
        [
            (f"{result['accuracy_mgd']:.1%}", "test accuracy, learnt"),
            (f"{result['accuracy_grid']:.1%}", f"best of {result['grid_size']} tried, by loss"),
            (f"{result['training_runs_mgd']:.0f}", f"training runs; the grid took {result['training_runs_grid']:.0f}"),
        ],
    )


def printed(console: Console, directory: RunDirectory) -> None:
    """Print the table of arms, and the verdict."""
    console.print(arms_table(directory).printed())
    console.print(verdict(directory), highlight=False)
    say_report(directory)


def _result(directory: RunDirectory) -> dict[str, Any]:
    assert directory.figures is not None
    return directory.figures
