"""A descent's curves for TensorBoard."""

from pathlib import Path
from typing import Any

from metagradient.errors import ConfigError


class Board:
    """Event files in a folder.

    Arguments:
        folder: made where absent, at the first meta-step.
        start: number of the first meta-step; events from there on, of a process that was killed, count no more.

    Errors: `ConfigError` where the package that writes them is not installed.
    """

    def __init__(self, folder: Path, start: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ConfigError("tensorboard=True needs a package: pip install 'metagradient[tensorboard]'") from error
        self._make = lambda: SummaryWriter(str(folder), purge_step=start)
        self._writer: Any = None

    def add(self, step: int, values: dict[str, float | None]) -> None:
        """The values of a meta-step, by name."""
        self._writer = self._writer or self._make()
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """End the event file."""
        if self._writer:
            self._writer.close()
