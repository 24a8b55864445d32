"""What the pages of all tasks share: their last sections, a page for any run, and one that compares several."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from metagradient.report.figures import Figure, lines
from metagradient.report.page import Page, Section, Table
from metagradient.tasks.directory import RunDirectory


def closing(directory: RunDirectory, cost: str) -> list[Section]:
    """By custom the last sections of a page: settings, cost in words, and versions."""
    return [
        Section("Settings", table=Table(("setting", "value"), list(_flat(directory.config).items()))),
        Section("Cost and versions", cost, Table(("what", "version"), list(directory.versions.items()))),
    ]


def say_report(directory: RunDirectory) -> None:
    """Print where a run's report is. Brackets in a path are no markup, and it is printed on one line."""
    Console().print(f"report: {directory / 'report.html'}", markup=False, soft_wrap=True)


def plain(directory: RunDirectory) -> Page:
    """A page for a run of any task: one that isn't finished, or whose task has none of its own."""
    figures, records = directory.figures, directory.records
    state = "It is finished." if figures is not None else "It is not finished: --resume goes on with it."
    seconds = sum(t["seconds"] for t in directory.timings)
    sections = [Section("How far it got", f"{len(records)} meta-steps.", figures=_curves([directory]))]
    if figures:
        rows = [(name, _shown(value)) for name, value in figures.items()]
        sections.insert(0, Section("What came out", table=Table(("figure", "value"), rows)))
    return Page(
        str(directory.path),
        f"A run of metagradient {directory.command}. {state}",
        [*sections, *closing(directory, f"{seconds:.0f} seconds in meta-steps.")],
    )


def comparison(directories: Sequence[RunDirectory]) -> Page:
    """Several runs side by side: their figures, the settings in which they differ, and their curves."""
    names = [str(d.path) for d in directories]
    figures = [d.figures or {} for d in directories]
    settings = [{"command": d.command, **_flat(d.config)} for d in directories]
    differing = [row for row in _side_by_side(settings) if len(set(row[1:])) > 1]
    return Page(
        f"{len(directories)} runs compared",
        "Figures of each run's result, the settings that are not the same for all, and what was measured in each "
        "meta-step. A run without figures is not finished.",
        [
            Section("Figures", table=Table(("figure", *names), _side_by_side(figures))),
            Section("Settings that differ", table=Table(("setting", *names), differing)),
            Section("Curves", figures=_curves(directories)),
        ],
    )


def _side_by_side(values: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for every name: the name, and the value that each has for it."""
    rows = dict.fromkeys(name for one in values for name in one)
    return [(name, *(_shown(one.get(name, "")) for one in values)) for name in rows]


def _flat(settings: dict[str, Any], within: str = "") -> dict[str, Any]:
    """Settings by name; those of a configuration within the configuration as `outer.inner`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{within}{name}.") if isinstance(value, dict) else {within + name: value}
    return flat


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _curves(directories: Sequence[RunDirectory]) -> list[Figure]:
    """A figure for every number that records hold, with a line for each run that has it."""
    records = {str(d.path): d.records for d in directories}
    names = dict.fromkeys(name for rows in records.values() for row in rows for name in _numbers(row))
    return [
        lines(
            {run: [row[name] for row in rows] for run, rows in records.items() if _has(rows, name)},
            x="meta-step",
            y=name,
            caption=f"{name}, meta-step by meta-step.",
        )
        for name in names
        if any(_has(rows, name) for rows in records.values())
    ]


def _numbers(row: dict[str, Any]) -> Iterable[str]:
    return (k for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool) and k != "step")


def _has(rows: Sequence[dict[str, Any]], name: str) -> bool:
    return bool(rows) and all(name in _numbers(row) for row in rows)
