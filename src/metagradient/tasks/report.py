"""`metagradient report`: pages of runs, made again from their files, and a comparison of several."""

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from metagradient.errors import ConfigError
from metagradient.report.page import Page, write
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.pages import comparison, plain
from metagradient.tasks.registry import TASKS


@dataclass(frozen=True)
class Report:
    """Write report.html of every run anew, from the files in its directory; with several runs, compare them too."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """run directories, finished or not"""
    out: Path | None = None
    """file of the comparison; none takes comparison.html"""


def run(config: Report) -> list[Path]:
    """Write the pages, and print where they are.

    Returns: their files; the comparison last.

    Errors: `ConfigError` where no run is named, or a directory holds none.

    Cost: no training; seconds a page.
    """
    if not config.runs:
        raise ConfigError("metagradient report needs run directories: metagradient report runs/demo")
    if config.out and len(config.runs) == 1:
        raise ConfigError("--out is the file of a comparison: name several runs")
    if config.out and not config.out.parent.is_dir():
        raise ConfigError(f"--out {config.out}: there is no such directory")
    directories = [RunDirectory.read(path) for path in config.runs]
    pages = {directory / "report.html": page(directory) for directory in directories}
    if len(directories) > 1:
        pages[config.out or Path("comparison.html")] = comparison(directories)
    for path, made in pages.items():
        write(made, path)
        Console().print(f"report: {path}", markup=False, soft_wrap=True)
    return list(pages)


def page(directory: RunDirectory) -> Page:
    """The page of a run: its task's, or a plain one where that has none, or the run isn't finished."""
    task = TASKS[directory.command]() if directory.command in TASKS else None
    return task.page(directory) if task and task.page and directory.figures is not None else plain(directory)
