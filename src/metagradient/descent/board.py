"""A descent's curves for TensorBoard."""

from pathlib import Path
from time import time
from typing import Any

from metagradient.errors import ConfigError


class Board:
    """Event files in a folder, on the disk by the end of each meta-step: no thread, no queue.

    Arguments:
        folder: made where absent, at the first meta-step.
        start: number of the first meta-step; events from there on, of a process that was killed, count no more.

    Errors: `ConfigError` where the package that writes them is not installed.
    """

    def __init__(self, folder: Path, start: int):
        try:
            import tensorboardX  # noqa: F401
        except ImportError as error:
            raise ConfigError("tensorboard=True needs a package: pip install 'metagradient[tensorboard]'") from error
        self._folder = folder
        self._start = start
        self._writer: Any = None

    def add(self, step: int, values: dict[str, float | None]) -> None:
        """The values of a meta-step, by name."""
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        self._writer = self._writer or self._opened()
        for name, value in values.items():
            if value is not None:
                self._writer.write_event(Event(wall_time=time(), step=step, summary=scalar(name, value)))
        self._writer.flush()

    def close(self) -> None:
        """End the event file."""
        if self._writer:
            self._writer.close()

    def _opened(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        self._folder.mkdir(parents=True, exist_ok=True)
        # Files are named by the second: a suffix tells quick resumes apart.
        writer = EventsWriter(str(self._folder / "events"), f".{self._start}")
        start = SessionLog(status=SessionLog.START)
        writer.write_event(Event(wall_time=time(), step=self._start, session_log=start))
        return writer
