"""The poisoning experiment: CIFAR-10 at 16x16, one attacked run and seeds varied; writes docs/poisoning.md.

    python benchmarks/poisoning.py --data DIR [--runs runs/poisoning] [--out docs]

DIR holds CIFAR-10 in Parquet. Runs that --runs holds already are read, not made again.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from string import Template

import numpy as np

from metagradient.cli import parse
from metagradient.descent.journal import RECORDS, read_lines
from metagradient.report.figures import Figure, before_and_after, lines
from metagradient.report.page import Table
from metagradient.tasks.poisoning import Poison, run
from metagradient.tasks.poisoning_report import curves, drops, losses

TEMPLATE = Path(__file__).with_name("poisoning.md.in")


@dataclass(frozen=True)
class Found:
    """A run: its figures, its curves over meta-steps, its images."""

    result: Mapping[str, float]
    attacked: list[float]
    held_out: list[float]
    saved: Mapping[str, np.ndarray]

    def images(self) -> Figure:
        s = self.saved
        return before_and_after(s["clean"], s["images"], s["labels"], list(s["classes"]))

    def against(self, place: str) -> str:
        """The drop beside gradient canceling's."""
        ours, other = (self.result[f"drop_{arm}_{place}"] for arm in ("metagradient", "canceling"))
        error, of_other = (self.result[f"error_{arm}_{place}"] for arm in ("metagradient", "canceling"))
        times = f"{ours / other:.0f} times" if other > 0 else "which lost none"
        return f"{ours:.1f} ± {error:.1f} points; gradient canceling {other:.2f} ± {of_other:.2f}, {times}"


def made(directory: Path, config: Poison) -> Found:
    """A run, which is made where it isn't there."""
    if not (directory / "result.json").exists():
        run(replace(config, out=directory))
    attacked, held_out = curves(read_lines(directory / RECORDS))
    with np.load(directory / "poisons.npz") as saved:
        return Found(json.loads((directory / "result.json").read_text()), attacked, held_out, dict(saved))


def markdown(table: Table) -> str:
    """A report's table as Markdown."""
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/poisoning"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    fixed, varied = (
        made(given.runs / preset, parse("poison", Poison(), ["--preset", preset, "--data", str(given.data)]))
        for preset in ("cifar10", "cifar10-transfer")
    )
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
        drops=markdown(drops(fixed.result)),
        losses=markdown(losses(fixed.result)),
        drops_varied=markdown(drops(varied.result)),
        losses_varied=markdown(losses(varied.result)),
        cost=f"{fixed.result['training_runs']:.0f} and {varied.result['training_runs']:.0f}",
        cost_canceling=f"{fixed.result['cancel_training_runs']:.0f}",
        seconds=f"{fixed.result['seconds']:.0f} and {varied.result['seconds']:.0f}",
        left=f"{fixed.result['gradient_left']:.0%}",
        made=f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}: {platform.machine()}, jax {version('jax')}, "
        f"metagradient {version('metagradient')}",
    )
    (given.out / "poisoning.md").write_text(text)


if __name__ == "__main__":
    main()
