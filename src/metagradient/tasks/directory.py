"""The directory of a run: its configuration, a record a meta-step, its figures, its report."""

import json
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from platform import platform, python_version
from typing import Any

import jax
import tomli_w

from metagradient.errors import ConfigError


class RunDirectory:
    """Where a run leaves what it found: `config.toml`, `records.jsonl`, `result.json`, `report.html`.

    Arguments:
        path: the directory; made where absent.
        config: a dataclass; all but its `out` is written, as a file that `--config` reads back.

    Errors: `ConfigError` where the directory holds a run already.
    """

    def __init__(self, path: Path, config: Any):
        if (path / "config.toml").exists():
            raise ConfigError(f"{path} holds a run already: choose another --out, or delete it")
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        plain = _plain({k: v for k, v in asdict(config).items() if k != "out"})
        (path / "config.toml").write_text(tomli_w.dumps(plain))
        self.config = plain

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def record(self, **values: Any) -> None:
        """Append a line to `records.jsonl`."""
        with (self / "records.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")

    def result(self, values: dict[str, Any]) -> None:
        """Write the run's figures, a flat dictionary, to `result.json`."""
        (self / "result.json").write_text(json.dumps(values, indent=2) + "\n")


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
    """What a run was made with."""
    return {
        "python": python_version(),
        **{name: version(name) for name in ("metagradient", "jax", "optax", "numpy")},
        "platform": platform(terse=True),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
    }
