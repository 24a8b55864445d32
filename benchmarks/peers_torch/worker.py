"""What both workers do: run one contender for every line read, and say what it took. Only NumPy is imported here."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np


def memory(field: str) -> float:
    """MiB of this process: "VmRSS" resident now, "VmHWM" the most so far (unlike ru_maxrss, free of the parent's)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return float("nan")


def serve(prepare: Callable[[], Callable[[], dict[str, np.ndarray]]], results: Path) -> None:
    """Answer every line of standard input with a run, as one line of JSON; keep the first run's arrays in `results`.

    The contender's own prints go to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run = prepare()
    loaded = memory("VmRSS")
    for _ in sys.stdin:
        start = perf_counter()
        arrays = run()
        seconds = perf_counter() - start
        if not results.exists():
            np.savez(results, **arrays)
        print(json.dumps({"seconds": seconds, "loaded": loaded, "peak": memory("VmHWM")}), file=answers)
