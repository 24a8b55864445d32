"""The command line: `metagradient demo`, ... Needs the extra `cli`, but for `metagradient doctor`."""

import argparse
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import Field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from metagradient import doctor
from metagradient.errors import ConfigError, MetagradientError
from metagradient.optional import library
from metagradient.tasks.registry import SELECTIONS, TASKS

_COMMANDS = sorted({"doctor", *(name.partition("-")[0] for name in TASKS)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (2 for input that can't be used)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["doctor"]:
        return doctor.main(arguments[1:])
    try:
        for needed in ("tomli_w", "tyro"):
            library(needed, "cli")
        if not arguments or arguments[0] not in _COMMANDS:
            print(_usage(), file=sys.stdout if arguments[:1] in ([], ["--help"], ["-h"]) else sys.stderr)
            return 0 if arguments[:1] in ([], ["--help"], ["-h"]) else 2
        from metagradient._jax import compilation_cache

        compilation_cache()
        name, rest = _named(*arguments)
        task = TASKS[name]()
        if resumed := begun(name, task.config, rest):
            task.run(resumed, resume=True)
        else:
            task.run(parse(name, task.config, rest, with_data=task.preset))
    except MetagradientError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    return 0


def _named(command: str, *rest: str) -> tuple[str, Sequence[str]]:
    """A command's name among the tasks, and the arguments that are left."""
    if command != "select":
        return command, rest
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--task")
    first.add_argument("--resume")
    given, left = first.parse_known_args(rest)
    name = f"select-{given.task}"
    if given.resume:
        from metagradient.tasks.directory import RunDirectory

        left = ["--resume", given.resume, *left]
        name = name if given.task else RunDirectory.read(Path(given.resume)).command
    if name.removeprefix("select-") not in SELECTIONS:
        raise ConfigError(f"metagradient select needs --task, one of {', '.join(SELECTIONS)}")
    return name, left


def begun(command: str, config: Any, arguments: Sequence[str]) -> Any | None:
    """The configuration of the run that --resume names; None where it isn't given.

    Arguments:
        command: its name.
        config: its configuration's defaults, a dataclass.
        arguments: what follows the command.

    Errors: `ConfigError` for a directory without a run that can be gone on with, and for other settings beside it.
    """
    from metagradient.tasks.directory import RunDirectory

    first = argparse.ArgumentParser(prog=_typed(command), add_help=False, allow_abbrev=False)
    first.add_argument("--resume", type=Path, metavar="DIR")
    given, rest = first.parse_known_args(arguments)
    if given.resume is None:
        return None
    if rest:
        raise ConfigError(f"--resume goes on with the settings that a run was begun with: leave out {' '.join(rest)}")
    directory = RunDirectory.unfinished(given.resume, command)
    return replace(_with_values(config, directory.config, str(given.resume / "config.toml")), out=given.resume)


def parse(command: str, config: Any, arguments: Sequence[str], *, with_data: str | None = None) -> Any:
    """A command's configuration: its defaults, then a preset's or a file's values, then flags.

    Arguments:
        command: its name.
        config: its configuration's defaults, a dataclass.
        arguments: what follows the command.
        with_data: the preset to start from where --data is given, and neither --preset nor --config.

    Errors: `ConfigError` for a preset or file that is absent, or holds a setting that the command hasn't.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    given, rest = first.parse_known_args(arguments)
    named = any(argument.split("=")[0] == "--data" for argument in rest) and not given.config
    preset = given.preset or (with_data if named else None)
    if preset:
        config = _with_values(config, _preset(command, preset), f"preset {preset}")
    if given.config:
        if not given.config.is_file():
            raise ConfigError(f"--config {given.config}: no such file")
        values = tomllib.loads(given.config.read_text())
        if values.pop("command", command) != command:
            raise ConfigError(f"--config {given.config}: not of metagradient {command}")
        config = _with_values(config, values, str(given.config))
    return library("tyro", "cli").cli(
        type(config),
        args=rest,
        default=config,
        prog=_typed(command),
        description=f"{type(config).__doc__}\n\n{_also(command)}",
    )


def _typed(command: str) -> str:
    """What a user types to run a command."""
    return f"metagradient {command.replace('select-', 'select --task ')}"


def _usage() -> str:
    return (
        "usage: metagradient COMMAND [--out DIR] [--seed N] [--data DIR] [--preset NAME] [--config FILE.toml] ...\n"
        "       metagradient COMMAND --resume DIR\n"
        "       metagradient report DIR...\n"
        "       metagradient doctor\n\n"
        f"commands: {', '.join(_COMMANDS)}; metagradient COMMAND --help lists a command's settings\n"
        f"tasks of select: --task {', --task '.join(SELECTIONS)}"
    )


def _also(command: str) -> str:
    presets = ", ".join(_presets(command)) or "none"
    return f"Also: --preset NAME ({presets}), --config FILE.toml, --resume DIR"


def _presets(command: str) -> list[str]:
    folder = files("metagradient") / "presets" / command
    return sorted(p.name.removesuffix(".toml") for p in folder.iterdir()) if folder.is_dir() else []


def _preset(command: str, name: str) -> dict[str, Any]:
    if name not in _presets(command):
        raise ConfigError(f"{command} has no preset {name!r}; there are {', '.join(_presets(command)) or 'none'}")
    return tomllib.loads((files("metagradient") / "presets" / command / f"{name}.toml").read_text())


def _with_values(config: Any, values: dict[str, Any], source: str) -> Any:
    known = {f.name: f for f in fields(config)}
    strange = sorted(set(values) - set(known))
    if strange:
        raise ConfigError(f"{source}: unknown setting {', '.join(strange)}; known are {', '.join(known)}")
    return replace(config, **{k: _value(getattr(config, k), known[k], v, source) for k, v in values.items()})


def _value(default: Any, setting: Field[Any], value: Any, source: str) -> Any:
    """A value of a file as its setting holds it: a path, a tuple, or a configuration within the configuration."""
    if is_dataclass(default) and isinstance(value, dict):
        return _with_values(default, value, f"{source}, {setting.name}")
    if "Path" in str(setting.type):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
