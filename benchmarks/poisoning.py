"""The poisoning experiment: CIFAR-10 at 16x16, one attacked run and seeds varied; writes docs/poisoning.md.

    python benchmarks/poisoning.py --data DIR [--runs runs/poisoning] [--out docs]

DIR holds CIFAR-10 in Parquet. Runs that --runs holds already are read, or gone on with, not made again.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from math import comb
from pathlib import Path
from string import Template
from typing import Self, TypeAlias

import jax.numpy as jnp
import numpy as np

import metagradient as mg
from metagradient.cli import parse
from metagradient.descent.seeds import inner_seed
from metagradient.report.figures import Figure, before_and_after, lines
from metagradient.report.page import Table
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.poisoning import Poison, prepare, run
from metagradient.tasks.poisoning_report import POISONS, curves, drops, losses

Agreement: TypeAlias = dict[str, dict[str, list[float]]]

SEEDS = 6
"""Seeds whose metagradients are compared."""

TEMPLATE = Path(__file__).with_name("poisoning.md.in")


@dataclass(frozen=True)
class Found:
    """A run: its figures, its curves over meta-steps, its images."""

    result: Mapping[str, float]
    attacked: list[float]
    held_out: list[float]
    saved: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, directory: RunDirectory) -> Self:
        """What a finished run holds."""
        attacked, held_out = curves(directory.records)
        assert directory.figures is not None
        with np.load(directory / POISONS) as saved:
            return cls(directory.figures, attacked, held_out, dict(saved))

    def images(self) -> Figure:
        s = self.saved
        return before_and_after(s["clean"], s["images"], s["labels"], list(s["classes"]))

    def drop(self, place: str, arm: str = "metagradient", digits: int = 1) -> str:
        """Points lost, with their standard error."""
        return f"{self.result[f'drop_{arm}_{place}']:.{digits}f} ± {self.result[f'error_{arm}_{place}']:.{digits}f}"

    def against(self, place: str) -> str:
        """The drop beside gradient canceling's."""
        ours, other = (self.result[f"drop_{arm}_{place}"] for arm in ("metagradient", "canceling"))
        times = f"{ours / other:.0f} times" if other > 0 else "which lost none"
        return f"{self.drop(place)} points; gradient canceling {self.drop(place, 'canceling', 2)}, {times}"


def cosines_of_seeds(config: Poison, window: int | None) -> list[float]:
    """Cosines between metagradients of different seeds, nothing poisoned yet: each pair's."""
    task, units, segment = prepare(config), [], None
    z = {"pixels": mg.PerExample(jnp.zeros_like(task.chosen.images), rows=task.rows)}
    objective = task.classifier.mean_loss(task.target)
    for seed in range(SEEDS):
        training = task.classifier.training(task.pool.images, task.pool.labels, inner_seed(config.seed, 0, seed))
        gradient = mg.value_and_metagrad(training, objective, window=window, segment=segment)
        _, grad, stats = gradient.with_stats(z)
        segment = stats.segment
        units.append(np.ravel(grad["pixels"].value) / np.linalg.norm(grad["pixels"].value))
    return [float(a @ b) for a, b in combinations(units, 2)]


def agreement(file: Path, configs: Sequence[Poison], windows: Sequence[int | None]) -> Agreement:
    """Cosines between metagradients of different seeds, by network and window; the file keeps them."""
    if not file.exists():
        cosines = {
            "-".join(map(str, config.recipe.widths)): {str(w): cosines_of_seeds(config, w) for w in windows}
            for config in configs
        }
        file.write_text(json.dumps(cosines))
    return json.loads(file.read_text())


def agreement_table(cosines: Agreement, steps: int) -> Table:
    """Mean cosines of pairs of seeds, a row a network, a column a window."""
    windows = next(iter(cosines.values()))
    header = ("widths", *("whole run" if w == "None" else f"last {w} of {steps} steps" for w in windows))
    rows = [(widths, *(f"{np.mean(pairs):.3f}" for pairs in by.values())) for widths, by in cosines.items()]
    return Table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/poisoning"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    presets = "cifar10", "cifar10-transfer"
    configs = [parse("poison", Poison(), ["--preset", preset, "--data", str(given.data)]) for preset in presets]
    fixed, varied = (
        Found.of(RunDirectory.finished(given.runs / preset, config, "poison", run))
        for preset, config in zip(presets, configs, strict=True)
    )
    cosines = agreement(given.runs / "agreement.json", configs, (None, configs[1].window))
    series = {
        "one run": fixed.attacked,
        "one run, held out": fixed.held_out,
        "seeds varied": varied.attacked,
        "seeds varied, held out": varied.held_out,
    }
    pictures = {
        "curves": lines(series, x="meta-step", y="loss", caption="Loss on clean images before each meta-step."),
        "images": fixed.images(),
        "images-transfer": varied.images(),
    }
    for name, figure in pictures.items():
        (given.out / f"poisoning-{name}.svg").write_bytes(figure.content)
    text = Template(TEMPLATE.read_text()).substitute(
        attacked=fixed.against("attacked"),
        fresh=varied.against("fresh"),
        standard=varied.against("standard"),
        drops=drops(fixed.result).markdown(),
        losses=losses(fixed.result).markdown(),
        drops_varied=drops(varied.result).markdown(),
        losses_varied=losses(varied.result).markdown(),
        cost=f"{fixed.result['training_runs']:.0f} and {varied.result['training_runs']:.0f}",
        cost_canceling=f"{fixed.result['cancel_training_runs']:.0f}",
        seconds=f"{fixed.result['seconds']:.0f} and {varied.result['seconds']:.0f}",
        agreement=agreement_table(cosines, configs[1].recipe.steps).markdown(),
        pairs=comb(SEEDS, 2),
        window=configs[1].window,
        seeds=configs[1].seeds,
        meta_steps=configs[1].meta_steps,
        metagradients=configs[1].seeds * configs[1].meta_steps,
        one_fresh=fixed.drop("fresh"),
        varied_fresh=varied.drop("fresh"),
        varied_standard=varied.drop("standard"),
        canceling_error=f"{varied.result['error_canceling_standard']:.1f}",
        left=f"{fixed.result['gradient_left']:.0%}",
        made=f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}: {platform.machine()}, jax {version('jax')}, "
        f"metagradient {version('metagradient')}",
    )
    (given.out / "poisoning.md").write_text(text)


if __name__ == "__main__":
    main()
