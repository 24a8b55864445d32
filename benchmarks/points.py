"""Points of a benchmark, each measured in a process of its own, so that none pays for another's memory or programs."""

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def point(script: str, *arguments: object) -> dict[str, Any]:
    """What `script --point ARGUMENTS` prints last, as JSON, run in a process of its own."""
    command = [sys.executable, script, "--point", *map(str, arguments)]
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(ran.stdout.splitlines()[-1])


def parsed(parser: argparse.ArgumentParser, measure: Callable[..., dict[str, Any]]) -> argparse.Namespace:
    """The options of a benchmark, `--out` among them; a process that `point` started prints what it measured, and ends.

    Arguments:
        measure: takes the arguments of `point`, as strings.
    """
    parser.add_argument("--out", type=Path)
    parser.add_argument("--point", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(measure(*given.point)))
        sys.exit()
    return given


def peak_mib() -> float:
    """Most memory that this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> str:
    """The machine and the versions, for the foot of a page."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib"))
    return f"{_processor()}, Python {platform.python_version()}, {versions}, {datetime.date.today()}"


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} cores of {names[0]}" if names else platform.machine()
