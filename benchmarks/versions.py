"""Tests in this environment, as a row of docs/versions.md.

    python benchmarks/versions.py [--out docs/versions.md] -- <pytest arguments>

Runs pytest, and writes the row of this environment (its Python, JAX, jaxlib, optax and device), in the place of the one
that is there; none where pytest didn't come to its end. Returns pytest's exit code.
"""

import argparse
import datetime
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import jax

COLUMNS = (
    *("Python", "jax", "jaxlib", "optax", "device"),
    *("what was run", "passed", "failed", "skipped", "seconds", "date"),
)
ENVIRONMENT = 5
"""Columns, from the first, that a row is replaced by."""

HEAD = f"""# Versions tested

What `pytest` found in each environment, warnings as errors; skipped tests include those that fail as expected.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
"""
FOOT = "\nMade by `python benchmarks/versions.py -- <pytest arguments>` in each environment.\n"


def environment() -> list[str]:
    device = f"{platform.system()} {platform.machine()}, {jax.devices()[0].device_kind}"
    return [platform.python_version(), *(version(name) for name in ("jax", "jaxlib", "optax")), device]


def tested(arguments: list[str]) -> tuple[int, list[str]]:
    """Pytest's exit code, and the other columns of the row."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        code = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, f"--junitxml={file}"], check=False
        ).returncode
        seconds = time.monotonic() - begin
        if code > 1:  # neither passed nor failed: interrupted, or used wrongly
            sys.exit(code)
        suites = ElementTree.parse(file).getroot().iter("testsuite")
        counts = [
            {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} for suite in suites
        ]
    tests, failures, errors, skipped = (
        sum(c[key] for c in counts) for key in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    date = f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}"
    run = f"`{shlex.join(['pytest', *arguments])}`"
    return code, [run, str(tests - failed - skipped), str(failed), str(skipped), f"{seconds:.0f}", date]


def rows(path: Path) -> list[list[str]]:
    """The rows that are there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return [row for row in cells if tuple(row) != COLUMNS]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "versions.md")
    parser.add_argument("pytest", nargs="*")
    given = parser.parse_args()
    here = environment()
    code, found = tested(given.pytest)
    kept = [row for row in rows(given.out) if row[:ENVIRONMENT] != here]
    table = sorted([*kept, [*here, *found]], key=lambda row: [[int(n) for n in v.split(".")] for v in row[:2]])
    given.out.write_text(HEAD + "".join(f"| {' | '.join(row)} |\n" for row in table) + FOOT, encoding="utf-8")
    print(f"written: {given.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
