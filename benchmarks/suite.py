"""What the seconds of the test suite go to; prints the table of CONTRIBUTING.md.

    python benchmarks/suite.py [-- -n 2]

Runs pytest with this file as a plugin, which notes every test's seconds and those that JAX traces, lowers and compiles.
Seconds are of workers: with two of them, half of the sum goes by.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

FOLDER = "METAGRADIENT_SUITE"
PARTS = {
    "jaxpr_trace_duration": "tracing",
    "jaxpr_to_mlir_module_duration": "lowering",
    "backend_compile_duration": "compilation",
}
ROOMS = {
    "the command line and applications": (
        "clip_selection", "instruction_selection", "poisoning", "noisy_labels", "rate_schedule", "smoothness_task",
        "demo", "runs", "report",
    ),
    "exactness: steps, optimizers, rules, queries, groups": (
        "exactness", "optimizers", "rules", "queries", "groups_and_args", "examples_axis", "replay", "surrogate",
        "train_many", "lora", "clip",
    ),
    "several devices": ("meshes", "fingerprint"),
    "bits, faults, lifetimes, check": ("bits", "faults", "lifetimes", "check", "slips", "shown", "jax", "memory"),
    "schedules and plans": ("schedule", "plan", "store"),
}  # fmt: skip

spent: dict[str, float] = defaultdict(float)


def _listen(event: str, duration_secs: float, **_: Any) -> None:
    if part := PARTS.get(event.rsplit("/", 1)[-1]):
        spent[part] += duration_secs
        spent["programs"] += part == "compilation"


def pytest_configure(config: pytest.Config) -> None:
    import jax

    jax.monitoring.register_event_duration_secs_listener(_listen)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    before, start = dict(spent), perf_counter()
    yield
    found = {"file": item.path.stem.removeprefix("test_"), "tests": 1, "seconds": perf_counter() - start}
    line = json.dumps(found | {name: amount - before.get(name, 0) for name, amount in spent.items()})
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    with (Path(os.environ[FOLDER]) / worker).open("a") as file:
        file.write(line + "\n")


def table(folder: Path, wall: float) -> list[str]:
    """Rows by room, the longest first."""
    room_of = {name: room for room, names in ROOMS.items() for name in names}
    columns = ("tests", "seconds", *PARTS.values(), "programs")
    rooms: dict[str, list[float]] = {}
    for line in (line for path in folder.iterdir() for line in path.read_text().splitlines()):
        row = json.loads(line)
        amounts = [row.get(column, 0) for column in columns]
        for room in (room_of.get(row["file"], "models, data, examples and the rest"), "**all**"):
            rooms[room] = [a + b for a, b in zip(rooms.get(room, [0.0] * len(columns)), amounts, strict=True)]
    rows = sorted(rooms.items(), key=lambda item: (item[0] == "**all**", -item[1][1]))
    return [
        f"| what | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
        *(f"| {name} | {' | '.join(f'{x:,.0f}' for x in amounts)} |" for name, amounts in rows),
        "",
        f"Wall time of pytest: {wall:.0f} s.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", default=["-n", "2"], help="of pytest, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
        start = perf_counter()
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "suite", *given.arguments],
            env={**os.environ, FOLDER: folder, "PYTHONPATH": paths},
            check=False,
        )
        print("\n".join(table(Path(folder), perf_counter() - start)))
    sys.exit(ran.returncode)


if __name__ == "__main__":
    main()
