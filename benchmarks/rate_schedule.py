"""A learnt learning-rate schedule beside a grid of one-cycles on CIFAR-10: runs `metagradient schedule`, writes a page.

    python benchmarks/rate_schedule.py --data DIR [--run runs/schedule-cifar10] [--out docs]

DIR holds CIFAR-10 in Parquet. The run takes half an hour to an hour on one core; where it was cut off, the same command
goes on with it, and where it is finished, only the page is made. With --out, writes schedule.md and its figures.
"""

import argparse
import datetime
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from metagradient.cli import parse
from metagradient.report.page import Table
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.schedule import RateSchedule, run
from metagradient.tasks.schedule_page import ARMS, GRIDS, arms_table, figures, picked_step, picks, verdict


def by_compute(directory: RunDirectory) -> str:
    saved = np.load(directory / "schedules.npz")
    curves = {ARMS[name]: saved[f"curve_{name}"] for name in (*GRIDS, "mgd")}
    points = sorted((runs, name, value, error) for name, curve in curves.items() for runs, value, error in curve)
    lines = [(f"{runs:.0f}", name, f"{value:.2%} ± {error:.2%}") for runs, name, value, error in points]
    return Table(("training runs spent", "search", "test accuracy"), lines).markdown()


def measuring(config: dict[str, Any], result: dict[str, Any]) -> tuple[float, float]:
    """Compute of measuring on target and validation images, which `training_runs` leaves out, in training runs.

    In forward passes of an image: a training takes 3 a step and image, a gradient of the loss on the target 3.
    """
    training = 3 * config["recipe"]["batch"] * config["recipe"]["steps"]
    a_meta_step = config["inner_seeds"] * (3 * config["target"] + config["validation"]) / training
    return result["meta_steps"] * a_meta_step, result["grid_size"] * config["validation"] / training


def page(directory: RunDirectory) -> str:
    config, result = directory.config, directory.figures
    assert result is not None
    recipe, descent, grid = config["recipe"], *measuring(config, result)
    return f"""# A learnt learning-rate schedule on CIFAR-10

`metagradient schedule --preset tiny --data DIR` learns the learning rates of a training run by metagradient descent,
from a flat start, and holds them against the best of a grid of one-cycles. Data: CIFAR-10 (JPEG copy), averaged to
16x16. Model: the smooth ResNet-9, widths {"-".join(str(w) for w in recipe["widths"])}, {recipe["steps"]} steps of batch
{recipe["batch"]} on {config["examples"]:,} images. {config["knots"]} knots in the logarithm of the rate;
{result["meta_steps"]} meta-steps, each from fresh seeds ({config["inner_seeds"]}), for {config["target"]:,} images.

{arms_table(directory).markdown()}

Means ± standard errors over {result["seeds"]} seeds that no search used, on {config["test"]:,} test images that none
saw. {verdict(directory)}

Picks are made on the same {config["validation"]:,} validation images: of the descent's meta-steps by loss, of the
grid's {result["grid_size"]} schedules by loss and by accuracy. The {config["finalists"]} best by a single training are
trained again from {config["finalist_seeds"]} other seeds, and the best mean is taken (which is counted). One of the
descent's finalists is the geometric mean of the schedules of its last half. The descent took {picked_step(directory)}.
{picks(directory)}

![Learning rates: of every meta-step, of the descent's pick, the grid's, and the best constant](schedule-rates.svg)

## Accuracy against compute

What each search would have picked, had it been stopped earlier: its best single training on validation until then,
again trained from the fresh seeds. The grid is in random order.

{by_compute(directory)}

![Test accuracy against the compute of the search](schedule-compute.svg)

Compute is counted in training runs: a training of the grid is one; a meta-step is the steps it took forward, and three
for every adjoint step (matrix products). Measuring on target and validation images isn't counted: it would add
{descent:.0f} runs to the descent and {grid:.0f} to the grid.

![Loss per meta-step on target and validation images](schedule-losses.svg)

Made by `python benchmarks/rate_schedule.py --data DIR --out docs` on {datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}:
{platform.machine()}, jax {version("jax")}, metagradient {version("metagradient")}.
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/schedule-cifar10"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    config = parse("schedule", RateSchedule(), ["--preset", "tiny", "--data", str(given.data)])
    directory = RunDirectory.finished(given.run, config, "schedule", run)
    print(page(directory))
    if given.out:
        (given.out / "schedule.md").write_text(page(directory))
        for name, figure in zip(("rates", "compute", "losses"), figures(directory), strict=True):
            (given.out / f"schedule-{name}.svg").write_bytes(figure.content)


if __name__ == "__main__":
    main()
