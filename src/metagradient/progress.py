"""A progress bar over the steps of a traversal."""

from types import TracebackType
from typing import Self

import rich.progress


class Progress:
    """Forward and adjoint steps on one line each; silent unless asked.

    Arguments:
        show: whether anything is printed.
    """

    def __init__(self, show: bool):
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:>10}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            disable=not show,
            transient=True,
        )
        self._tasks: dict[str, rich.progress.TaskID] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, what: str, steps: int) -> None:
        """Announce how many steps of a kind there will be."""
        self._tasks[what] = self._bar.add_task(what, total=steps)

    def tick(self, what: str, steps: int) -> None:
        """Count steps done."""
        self._bar.advance(self._tasks[what], steps)
