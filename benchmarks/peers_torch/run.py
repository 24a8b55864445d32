"""Our metagradient beside those of PyTorch libraries, in one command.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 \\
        python benchmarks/peers_torch/run.py --torch-python TORCH_ENV/bin/python --cifar10 DIR_WITH_PARQUET

TORCH_ENV is an environment of its own (requirements.txt says how to build it). Huge pages serve every contender, ours
and theirs. About twelve minutes on two quiet cores.
Every contender is a process of its own. Its first run starts with a fresh process: that gives peak memory, and the time
with compilation. Timed runs then go round in turns, ours next to the peer that keeps states in the same way, and every
second round backwards; ratios are taken within a round, and their median is shown.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
from problems import DESCRIPTIONS, PROBLEMS, Settings, write

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Contender:
    """One row of a table.

    Arguments:
        label: what the table calls it.
        framework: "ours" or "torch".
        name: what its worker calls it.
        rival: label of the row of ours that does the same; None for a row of ours.
        larger: label of the row of ours that does the same and keeps linearisations.
        models: where it takes part.
    """

    label: str
    framework: str
    name: str
    rival: str | None = None
    larger: str | None = None
    models: tuple[str, ...] = tuple(PROBLEMS)


PLAIN, PLAIN_TORCH = "training alone, JAX", "training alone, PyTorch"
REFERENCE, LINEARISED = "ours, KeepAll", "ours, KeepAll of linearisations"
TWO_LEVEL, TWO_LEVEL_LINEARISED = "ours, TwoLevel", "ours, TwoLevel of linearisations"
TREE, TREE_LINEARISED = "ours, KaryTree(2)", "ours, KaryTree(2) of linearisations"
# A scan of small steps loses by them.
LARGE = ("convnet", "decoder")
LINE_UP = (
    Contender(PLAIN, "ours", "plain"),
    Contender(PLAIN_TORCH, "torch", "plain", PLAIN),
    Contender(REFERENCE, "ours", "keep all"),
    # On the decoder, beside all others that stay alive in turns, it runs out of 24 GiB.
    Contender(LINEARISED, "ours", "keep all, linearised", models=("convnet",)),
    Contender("bergson, all", "torch", "bergson all", REFERENCE, LINEARISED),
    Contender("TorchOpt, unrolled", "torch", "torchopt", REFERENCE, LINEARISED),
    Contender(TWO_LEVEL, "ours", "two-level"),
    Contender(TWO_LEVEL_LINEARISED, "ours", "two-level, linearised", models=LARGE),
    Contender("bergson, sqrt", "torch", "bergson sqrt", TWO_LEVEL, TWO_LEVEL_LINEARISED),
    Contender(TREE, "ours", "binary tree"),
    Contender(TREE_LINEARISED, "ours", "binary tree, linearised", models=LARGE),
    Contender("bergson, log", "torch", "bergson log", TREE, TREE_LINEARISED),
)
EXACT = Contender("ours in float64", "ours", "float64")


@dataclass
class Entry:
    """A contender on a problem, and what was measured of it. `failure` is set where it could not run."""

    contender: Contender
    process: subprocess.Popen
    results: Path
    log: Path
    limit: float
    first: float = float("nan")
    loaded: float = float("nan")
    peak: float = float("nan")
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None

    @classmethod
    def start(cls, contender: Contender, problem: Path, directory: Path, options: argparse.Namespace) -> "Entry":
        ours = contender.framework == "ours"
        interpreter, script = (sys.executable, "ours.py") if ours else (options.torch_python, "peer_torch.py")
        stem = directory / f"{problem.stem} {contender.name}"
        results, log = stem.with_suffix(".npz"), stem.with_suffix(".log")
        with log.open("w") as errors:
            process = subprocess.Popen(
                [interpreter, HERE / script, contender.name, problem, results],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # Threads of OpenMP that spin while they wait made a PyTorch step ten times slower.
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
            )
        return cls(contender, process, results, log, options.limit)

    def run(self, *, timed: bool) -> None:
        """One run, unless an earlier one failed."""
        if self.failure:
            return
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        watchdog = threading.Timer(self.limit, self.process.kill)
        start = perf_counter()
        watchdog.start()
        try:
            stdin.write("run\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            self.failure = self._why(late=perf_counter() - start >= self.limit)
            return
        answer = json.loads(line)
        if timed:
            self.seconds.append(answer["seconds"])
        else:
            self.first, self.loaded, self.peak = answer["seconds"], answer["loaded"], answer["peak"]

    def _why(self, *, late: bool) -> str:
        status = self.process.wait()
        if late:
            return f"no answer within {self.limit:.0f} s"
        if status < 0:
            return f"killed by {signal.Signals(-status).name}"
        said = self.log.read_text().strip().splitlines()
        return said[-1] if said else f"exit status {status}"

    def stop(self) -> None:
        self.process.communicate()  # closes its input, which ends its loop


def measure(settings: Settings, directory: Path, options: argparse.Namespace) -> tuple[dict[str, Entry], Path | None]:
    """Run every contender of a problem. Returns the entries by label, and the results in float64."""
    problem = directory / f"{settings.model}.npz"
    write(settings, options.cifar10, problem)
    exact = None
    if options.float64:
        entry = Entry.start(EXACT, problem, directory, options)
        entry.run(timed=False)
        entry.stop()
        exact = None if entry.failure else entry.results
    entries: dict[str, Entry] = {}
    for contender in LINE_UP:
        if settings.model in contender.models:
            entry = entries[contender.label] = Entry.start(contender, problem, directory, options)
            entry.run(timed=False)
            say(f"{settings.model}: {contender.label}: {entry.failure or f'first run {entry.first:.1f} s'}")
    for round_ in range(settings.repeats):
        order = list(entries.values())
        for entry in reversed(order) if round_ % 2 else order:
            entry.run(timed=True)
        say(f"{settings.model}: round {round_ + 1} of {settings.repeats}")
    for entry in entries.values():
        entry.stop()
    return entries, exact


HEADER = (
    "seconds",
    "times own training",
    "times ours",
    "times ours of linearisations",
    "first run, s",
    "peak MiB",
    "of which once loaded",
    "peak, times ours",
    "peak, times ours of linearisations",
    "cosine with ours",
    "relative difference",
    "final parameters, worst leaf",
    "error (float64)",
)


def table(settings: Settings, entries: dict[str, Entry], exact: Path | None) -> str:
    """The Markdown table of a problem."""
    lines = ["| | " + " | ".join(HEADER) + " |", "|---" * (len(HEADER) + 1) + "|"]
    reference = None if entries[REFERENCE].failure else arrays(entries[REFERENCE].results)
    truth = arrays(exact) if exact else None
    for label, entry in entries.items():
        if entry.failure:
            cells = [f"did not run: {entry.failure}"] + [""] * (len(HEADER) - 1)
        else:
            cells = [*cost(entry, entries), *correctness(entry, reference, truth)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    s = settings
    return (
        f"## {DESCRIPTIONS[s.model]}\n\nT = {s.steps}, batch {s.batch}, {s.repeats} timed runs each.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def cost(entry: Entry, entries: dict[str, Entry]) -> list[str]:
    own = entries[PLAIN if entry.contender.framework == "ours" else PLAIN_TORCH]
    rivals = [entries.get(label or "") for label in (entry.contender.rival, entry.contender.larger)]
    memory = [f"{entry.peak / rival.peak:.2f}" if rival and not rival.failure else "" for rival in rivals]
    return [
        f"{median(entry.seconds):.2f}",
        "" if entry is own else ratio(entry, own),
        *(ratio(entry, rival) if rival else "" for rival in rivals),
        f"{entry.first:.1f}",
        f"{entry.peak:.0f}",
        f"{entry.loaded:.0f}",
        *memory,
    ]


def ratio(entry: Entry, other: Entry) -> str:
    if other.failure:
        return ""
    return f"{median(a / b for a, b in zip(entry.seconds, other.seconds, strict=True)):.2f}"


def correctness(entry: Entry, reference: dict | None, truth: dict | None) -> list[str]:
    """Cosine and relative difference of the gradient, the worst leaf of the final parameters, and the true error.

    The weights are the only leaf of z, so that gradient is compared whole.
    """
    found = arrays(entry.results)
    if reference is None or "weights" not in found:
        return [""] * 4
    g, r = found["weights"], reference["weights"]
    leaves = [name for name in reference if name.startswith("params/")]
    worst = max(difference(found[name], reference[name]) for name in leaves)
    return [
        f"{(g * r).sum() / np.linalg.norm(g) / np.linalg.norm(r):.8f}",
        f"{difference(g, r):.1e}",
        f"{worst:.1e}",
        f"{difference(g, truth['weights']):.1e}" if truth else "",
    ]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: value.astype(np.float64) for name, value in file.items()}


def circumstances(torch_python: str) -> str:
    """Machine, versions and date."""
    names = ("torch", "bergson", "torchopt")
    code = f"from importlib.metadata import version; print(*(n + ' ' + version(n) for n in {names}), sep=', ')"
    theirs = subprocess.run([torch_python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    ours = ", ".join(f"{name} {version(name)}" for name in ("metagradient", "jax", "optax"))
    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    machine = models[0].split(":")[1].strip() if models else platform.processor()
    cores, load = len(os.sched_getaffinity(0)), f"load {os.getloadavg()[0]:.1f} at the start"
    tunables = [f"GLIBC_TUNABLES={found}"] if (found := os.environ.get("GLIBC_TUNABLES")) else []
    python = f"Python {platform.python_version()}"
    return "; ".join([f"{cores} cores of {machine}", python, ours, theirs, str(date.today()), load, *tunables])


NOTES = """\
- Same parameters, batches and their order, loss and AdamW (epsilon inside and outside the root), in float32, on every
  row; z holds one weight an example, at 1, and the objective is the mean loss of a validation batch. "Training alone"
  is the same steps without metagradients: compiled with JAX in its fastest loop, eager in PyTorch (whose own fused
  AdamW has no epsilon inside the root).
- "Times ours" compares with the row of ours that keeps states in the same way. "Linearisations" keep activations of
  the steps at hand too, as the peers' graphs do: all steps, those between two states, or one. Peak memory is that of
  a fresh process after one run, libraries and compiler included; "once loaded" is what it held before that run.
- bergson is driven by its `Trainer` as its command line drives it; it takes any module that returns a loss. It saves
  states to a directory on disk, and ours stay in memory. TorchOpt is `MetaAdamW`; it keeps one graph of the whole run,
  and has no schedule that would bound its memory.
- "Error (float64)" is the relative difference to our gradient computed in float64.
"""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def chosen(options: argparse.Namespace) -> list[Settings]:
    """Settings of the problems asked for, with --set applied."""
    settings = {name: PROBLEMS[name] for name in options.models}
    for change in options.set:
        key, _, value = change.partition("=")
        model, _, name = key.partition(".")
        if model in settings:
            settings[model] = replace(settings[model], **{name: type(getattr(settings[model], name))(value)})
    return list(settings.values())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get("METAGRADIENT_DATA")
    parser.add_argument(
        "--torch-python",
        default=os.environ.get("METAGRADIENT_TORCH_PYTHON"),
        help="the peers' Python interpreter (default: $METAGRADIENT_TORCH_PYTHON)",
    )
    parser.add_argument(
        "--cifar10",
        type=Path,
        default=Path(data) / "cifar10" if data else None,
        help="directory with CIFAR-10 as parquet (default: $METAGRADIENT_DATA/cifar10); without it, no convnet",
    )
    parser.add_argument("--models", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="MODEL.FIELD=VALUE",
        help="change a problem: decoder.batch=16 decoder.steps=16 mlp.repeats=3",
    )
    parser.add_argument("--no-float64", dest="float64", action="store_false", help="skip the gradient in float64")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one run may take")
    parser.add_argument("--out", type=Path, default=Path("peers_torch.md"), help="where the tables go")
    options = parser.parse_args()
    if not options.torch_python:
        parser.error("--torch-python or METAGRADIENT_TORCH_PYTHON must name the peers' interpreter")
    if options.cifar10 is None and "convnet" in options.models:
        say("no --cifar10: leaving the convnet out")
        options.models.remove("convnet")
    return options


def main() -> None:
    options = parse()
    parts = ["# Beside PyTorch peers\n", circumstances(options.torch_python) + "\n"]
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        for settings in chosen(options):
            entries, exact = measure(settings, Path(directory), options)
            parts.append(table(settings, entries, exact))
            failed += [f"{settings.model}: {label}: {e.failure}" for label, e in entries.items() if e.failure]
            options.out.write_text("\n".join([*parts, NOTES]))
    print(options.out.read_text())
    if failed:
        sys.exit("did not run: " + "; ".join(failed))


if __name__ == "__main__":
    main()
