"""The commands, by name. Each is imported when it is called for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metagradient.tasks.directory import RunDirectory


@dataclass(frozen=True)
class Task:
    """A command.

    Arguments:
        config: its configuration's defaults, a dataclass.
        run: takes a configuration; where there is a run directory to go on with, `resume=True` too.
        preset: what to start from where --data is given; see `metagradient.cli.parse`.
        page: run directory -> `metagradient.report.page.Page`, for a finished run; None for a command without one.
    """

    config: Any
    run: Callable[..., Any]
    preset: str | None = None
    page: "Callable[[RunDirectory], Any] | None" = None


def _demo() -> Task:
    from metagradient.tasks import label_noise as task

    return Task(task.LabelNoise(), task.run, preset="cifar10", page=task.page)


def _plan() -> Task:
    from metagradient.tasks import pricing as task

    return Task(task.Pricing(), task.run)


def _poison() -> Task:
    from metagradient.tasks import poisoning as task
    from metagradient.tasks.poisoning_report import page

    return Task(task.Poison(), task.run, preset="tiny", page=page)


def _report() -> Task:
    from metagradient.tasks import report as task

    return Task(task.Report(), task.run)


def _smoothness() -> Task:
    from metagradient.tasks import smoothness as task

    return Task(task.SmoothnessProbe(), task.run, preset="tiny", page=task.page)


def _schedule() -> Task:
    from metagradient.tasks import schedule as task
    from metagradient.tasks.schedule_page import page

    return Task(task.RateSchedule(), task.run, preset="tiny", page=page)


def _select_clip() -> Task:
    from metagradient.tasks import clip_selection as task
    from metagradient.tasks.clip_page import page

    return Task(task.ClipSelection(), task.run, preset="tiny", page=page)


def _select_instruction() -> Task:
    from metagradient.tasks import instruction_selection as task
    from metagradient.tasks.instruction_page import page

    return Task(task.InstructionSelection(), task.run, preset="tiny", page=page)


def _select_labels() -> Task:
    from metagradient.tasks import noisy_labels as task
    from metagradient.tasks.noisy_labels_page import page

    return Task(task.NoisyLabels(), task.run, page=page)


TASKS: dict[str, Callable[[], Task]] = {
    "demo": _demo,
    "plan": _plan,
    "poison": _poison,
    "report": _report,
    "schedule": _schedule,
    "select-clip": _select_clip,
    "select-instruction": _select_instruction,
    "select-labels": _select_labels,
    "smoothness": _smoothness,
}
"""By the name that run directories and presets know them by: `metagradient select --task clip` is "select-clip"."""

SELECTIONS = tuple(name.removeprefix("select-") for name in TASKS if name.startswith("select-"))
"""What `metagradient select --task` takes."""
