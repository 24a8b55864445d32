"""The directory of a run: its configuration, a record a meta-step, its figures, its report."""

import json
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from platform import platform, python_version
from typing import Any, Self

import jax

from metagradient.descent.journal import RECORDS, TIMINGS, read_lines
from metagradient.errors import ConfigError
from metagradient.files import append_text, write_text
from metagradient.optional import library

_CONFIG, _RESULT, _VERSIONS = "config.toml", "result.json", "versions.json"


@dataclass(frozen=True)
class RunDirectory:
    """Where a run leaves what it found.

        config.toml         the command and its settings; `--config` and `--resume` read it back
        versions.json       what it was made with
        records.jsonl       a line a meta-step; where `descend` keeps its journal here, that is its own
        timings.jsonl       what each took
        result.json         its figures, a flat dictionary: a run that has one is finished
        report.html         one self-contained page

    Arguments:
        path: the directory.
        command: that made it.
        config: its settings, but for `out`, as TOML has them.
    """

    path: Path
    command: str
    config: dict[str, Any]

    @classmethod
    def begin(cls, path: Path, config: Any, command: str, *, resume: bool = False) -> Self:
        """The directory of a new run, or of one that is gone on with.

        Arguments:
            path: made where absent.
            config: a dataclass; all but its `out` is written.
            command: that makes it.
            resume: go on with the run that it holds.

        Errors: `ConfigError` where it holds a run already; with `resume`, where it holds none that can be gone on with:
            it is absent, finished, another command's, or was begun with other settings.
        """
        self = cls._with(path, config, command)
        if resume:
            self._require_settings_of(cls.unfinished(path, command))
        elif (path / _CONFIG).exists():
            raise ConfigError(f"{path} holds a run already: choose another --out, delete it, or --resume it")
        else:
            path.mkdir(parents=True, exist_ok=True)
            write_text(path / _CONFIG, _toml({"command": command, **self.config}))
        write_text(path / _VERSIONS, json.dumps(versions(), indent=2) + "\n")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """A run that is there, finished or not. `ConfigError` where there is none."""
        try:
            values = tomllib.loads((path / _CONFIG).read_text(encoding="utf-8"))
            return cls(path, values.pop("command"), values)
        except (OSError, tomllib.TOMLDecodeError, KeyError) as error:
            raise ConfigError(f"{path} is no run directory: its {_CONFIG} is absent or names no command") from error

    @classmethod
    def finished(cls, path: Path, config: Any, command: str, run: Callable[..., Any]) -> Self:
        """A run that is there, or is made now, or gone on with where it was cut off.

        Arguments:
            path, config, command: as in `begin`.
            run: `run(config, resume=...)` makes it, or goes on with it.

        Errors: `ConfigError` where another command's run is there, or one of other settings.
        """
        if (path / _CONFIG).exists():
            self = cls.read(path)
            self._require_command(command)
            cls._with(path, config, command)._require_settings_of(self)
            if self.figures is not None:
                return self
        run(replace(config, out=path), resume=(path / _CONFIG).exists())
        return cls.read(path)

    @classmethod
    def unfinished(cls, path: Path, command: str) -> Self:
        """A run that can be gone on with. `ConfigError` where it is another command's, or finished."""
        self = cls.read(path)
        self._require_command(command)
        if self.figures is not None:
            raise ConfigError(
                f"{path} holds a finished run: `metagradient report {path}` shows it, another --out begins a new one"
            )
        return self

    @classmethod
    def _with(cls, path: Path, config: Any, command: str) -> Self:
        """With settings of a dataclass, as TOML has them."""
        written = _toml(_plain({k: v for k, v in asdict(config).items() if k != "out"}))
        return cls(path, command, tomllib.loads(written))

    def _require_command(self, command: str) -> None:
        """`ConfigError` unless it is this command's run."""
        if self.command != command:
            raise ConfigError(
                f"{self.path} holds a run of `metagradient {self.command}`, not of `metagradient {command}`"
            )

    def _require_settings_of(self, other: Self) -> None:
        """`ConfigError` unless it has the settings of another, which is there already."""
        changed = sorted(k for k in {*other.config, *self.config} if other.config.get(k) != self.config.get(k))
        if changed:
            raise ConfigError(f"{self.path} was begun with other settings: {', '.join(changed)}")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of `records.jsonl`."""
        return read_lines(self / RECORDS)

    @property
    def timings(self) -> list[dict[str, Any]]:
        """The lines of `timings.jsonl`."""
        return read_lines(self / TIMINGS)

    @property
    def figures(self) -> dict[str, Any] | None:
        """What `result.json` holds; None for a run that isn't finished."""
        return _json(self / _RESULT)

    @property
    def versions(self) -> dict[str, str]:
        """What the run was last worked on with."""
        return _json(self / _VERSIONS) or {}

    def record(self, **values: Any) -> None:
        """Append a line to `records.jsonl`; for a run whose records no `descend` writes."""
        append_text(self / RECORDS, json.dumps(values) + "\n")

    def result(self, values: dict[str, Any]) -> None:
        """Write the run's figures, a flat dictionary, to `result.json`: it is finished."""
        write_text(self / _RESULT, json.dumps(values, indent=2) + "\n")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as TOML holds them: without those that are None, paths as strings."""

    def plain(value: Any) -> Any:
        return _plain(value) if isinstance(value, dict) else str(value) if isinstance(value, Path) else value

    return {k: plain(v) for k, v in values.items() if v is not None}


def free_directory(name: str) -> Path:
    """The first of runs/name, runs/name-2, ... that holds no run."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(path for path in (Path("runs") / n for n in names) if not path.exists())


def versions() -> dict[str, str]:
    """What a run is made with."""
    return {
        "python": python_version(),
        **{name: version(name) for name in ("metagradient", "jax", "optax", "numpy")},
        "platform": platform(terse=True),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    }


def _toml(values: dict[str, Any]) -> str:
    return library("tomli_w", "cli").dumps(values)


def _json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
