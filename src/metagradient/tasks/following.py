"""A descent followed to its end, its progress shown."""

from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from metagradient.descent.loop import Descent, MetaStep


def follow(descent: Descent, steps: int, value: str, each: Callable[[MetaStep], None] = lambda record: None) -> None:
    """Take the meta-steps that are left, with a progress bar.

    Arguments:
        descent: the descent.
        steps: its meta-steps, those before a resume included.
        value: what its objective is, in words.
        each: called after every meta-step.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("meta-steps", total=steps, completed=descent.step)
        for record in descent:
            progress.update(bar, advance=1, description=f"meta-steps ({value} {record.value:.3f})")
            each(record)
