"""The command line: `metagradient demo`, ..."""

import argparse
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import Field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import jax
import tyro
from rich.console import Console

from metagradient.errors import ConfigError, MetagradientError

_CACHE = Path.home() / ".cache" / "metagradient" / "compiled"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (2 for input that can't be used)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = _commands()
    if not arguments or arguments[0] not in commands:
        print(_usage(commands), file=sys.stdout if arguments[:1] in ([], ["--help"], ["-h"]) else sys.stderr)
        return 0 if arguments[:1] in ([], ["--help"], ["-h"]) else 2
    name, *rest = arguments
    config, run, preset = commands[name]()
    jax.config.update("jax_compilation_cache_dir", str(_CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    try:
        run(parse(name, config, rest, with_data=preset))
    except MetagradientError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        return 2
    return 0


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
        config = _with_values(config, tomllib.loads(given.config.read_text()), str(given.config))
    return tyro.cli(
        type(config),
        args=rest,
        default=config,
        prog=f"metagradient {command}",
        description=f"{type(config).__doc__}\n\n{_also(command)}",
    )


Command: TypeAlias = Callable[[], tuple[Any, Callable[[Any], Any], str | None]]
"""Gives the defaults of a configuration, what runs it, and the preset to start from where --data is given."""


def _commands() -> dict[str, Command]:
    """Commands by name; each imports what it needs when it is called."""

    def demo() -> tuple[Any, Callable[[Any], Any], str | None]:
        from metagradient.tasks.label_noise import LabelNoise, run

        return LabelNoise(), run, "cifar10"

    def plan() -> tuple[Any, Callable[[Any], Any], str | None]:
        from metagradient.tasks.pricing import Pricing, run

        return Pricing(), run, None

    def poison() -> tuple[Any, Callable[[Any], Any], str | None]:
        from metagradient.tasks.poisoning import Poison, run

        return Poison(), run, "tiny"

    return {"demo": demo, "plan": plan, "poison": poison}


def _usage(commands: dict[str, Any]) -> str:
    return (
        "usage: metagradient COMMAND [--out DIR] [--seed N] [--data DIR] [--preset NAME] [--config FILE.toml] ...\n\n"
        f"commands: {', '.join(commands)}; metagradient COMMAND --help lists a command's settings"
    )


def _also(command: str) -> str:
    return f"Also: --preset NAME ({', '.join(_presets(command)) or 'none yet'}), --config FILE.toml"


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
    return replace(config, **{k: _read(getattr(config, k), v, known[k], source) for k, v in values.items()})


def _read(old: Any, value: Any, of: Field[Any], source: str) -> Any:
    """A value of a TOML file as its setting takes it: tables are configurations, arrays tuples."""
    if is_dataclass(old) and isinstance(value, dict):
        return _with_values(old, value, f"{source}, {of.name}")
    if "Path" in str(of.type):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
