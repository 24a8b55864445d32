"""One self-contained HTML page: no request leaves it, no script runs in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from rich import table as rich_table
from rich.markup import escape

from metagradient.report.figures import Figure


@dataclass(frozen=True)
class Table:
    """Rows under a header.

    Arguments:
        header: names of the columns.
        rows: cells, shown with `str`.
        caption: what the table shows.
        emphasis: number of the row to stress, or None.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    emphasis: int | None = None

    def markdown(self) -> str:
        """Header and rows in Markdown."""
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)

    def printed(self) -> rich_table.Table:
        """The same for a terminal, under its caption. Brackets in it are no markup."""
        found = rich_table.Table(*map(escape, self.header), title=escape(self.caption))
        for row in self.rows:
            found.add_row(*(escape(str(cell)) for cell in row))
        return found


@dataclass(frozen=True)
class Section:
    """A part of a page, in the order text, table, figures.

    Arguments:
        title: its heading.
        text: paragraphs, parted by empty lines.
        table, figures: what it shows.
    """

    title: str
    text: str = ""
    table: Table | None = None
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Page:
    """A report.

    Arguments:
        title: its heading.
        summary: what was done and found, for someone who has not read the paper; paragraphs parted by empty lines.
        facts: headline figures as (value, what it is).
        sections: its parts; by custom the configuration, versions and cost come last.
    """

    title: str
    summary: str
    sections: Sequence[Section] = ()
    facts: Sequence[tuple[str, str]] = ()


def render(page: Page) -> str:
    """The page as HTML. All text is escaped; the same page gives the same characters."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["paragraphs"] = lambda text: [p for p in text.split("\n\n") if p.strip()]
    template = files("metagradient.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(page=page)


def write(page: Page, path: str | Path) -> None:
    """Write the page to a file, UTF-8. `OSError` where the file can't be written."""
    Path(path).write_text(render(page), encoding="utf-8")
