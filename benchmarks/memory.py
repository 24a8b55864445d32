"""Seconds and memory of a metagradient against schedule, run length, tier and model size; Markdown and figures.

    python benchmarks/memory.py [--corpus TEXT] [--out docs/memory.md]

Every point is a fresh process: plain training and the metagradient once each to compile, and then in turns, five times
where they are short. Seconds are medians; the peak is the process's resident memory beyond what it held when plain
training had been compiled and run.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import cost
import jax
import matplotlib as mpl
from matplotlib.figure import Figure

import metagradient as mg
from metagradient.trees import nbytes

SCHEDULES = {
    "every state": mg.schedule.KeepAll,
    "two-level": mg.schedule.TwoLevel,
    "tree": mg.schedule.KaryTree,
    "binomial": mg.schedule.Binomial,
}
_ROUNDS, _SHORT = 5, 5.0
COLOURS = ("#3d8fd1", "#e07b39", "#4aa564", "#a974c9")


def points(corpus: str | None) -> dict[str, list[dict[str, Any]]]:
    """Settings of every point, by table."""
    models = [{"model": "MLP", "size": hidden} for hidden in (128, 512, 2048)] + [{"model": "ResNet-9"}]
    models += [{"model": "decoder", "corpus": corpus}] if corpus else []
    big = {"model": "MLP", "size": 2048, "steps": 100}
    return {
        "k": [
            {"schedule": name, "argument": k, "steps": 1000}
            for name, ks in (("tree", (2, 4, 8, 16)), ("binomial", (3, 6, 12, 24)))
            for k in ks
        ],
        "T": [
            {"schedule": name, "argument": argument, "steps": steps}
            for name, argument in (("every state", None), ("two-level", None), ("binomial", 10))
            for steps in (100, 1000, 10_000)
        ],
        "tier": [{**big, "schedule": "two-level", "tier": tier} for tier in ("device", "host", "disk")],
        "model": [
            {**model, "schedule": name, "steps": 48} for model in models for name in ("every state", "two-level")
        ],
    }


def problem(model: str, size: int, steps: int, corpus: str | None) -> cost.Problem:
    if model == "ResNet-9":
        return cost.resnet9(steps)
    if model == "decoder":
        assert corpus
        return cost.decoder(Path(corpus), steps)
    return cost.mlp(steps, length=min(16, steps), hidden=size)


def resident(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(
    schedule: str,
    steps: int,
    argument: int | None = None,
    tier: str = "device",
    model: str = "MLP",
    size: int = 128,
    corpus: str | None = None,
) -> dict[str, float]:
    made = problem(model, size, steps, corpus)
    plain = made.plain()
    cost.seconds(plain)
    before = resident("VmRSS")
    given: list[Any] = [] if argument is None else [argument]
    named = {} if schedule == "every state" else {"tier": tier}
    work = made.metagradient(schedule=SCHEDULES[schedule](*given, **named))
    stats = work()[2]
    rounds = _ROUNDS if stats.seconds - stats.compile_seconds < _SHORT else 1
    pairs = [(cost.seconds(plain), cost.seconds(work)) for _ in range(rounds)]
    return {
        "seconds": median(b for _, b in pairs),
        "ratio": median(b / a for a, b in pairs),
        "forward_steps": stats.forward_steps,
        "device_mib": stats.peak_bytes["device"] / 2**20,
        "elsewhere_mib": sum(size for tier, size in stats.peak_bytes.items() if tier != "device") / 2**20,
        "state_mib": nbytes(made.training.initial(made.z)) / 2**20,
        "peak_mib": resident("VmHWM") - before,
    }


def label(point: dict[str, Any]) -> str:
    name = point["schedule"] + (f"({point['argument']})" if point.get("argument") else "")
    return name + (f", {point['tier']}" if "tier" in point else "")


def model_of(point: dict[str, Any]) -> str:
    model = point.get("model", "MLP")
    return f"{model} {point.get('size', 128)}" if model == "MLP" else model


def table(title: str, found: list[tuple[dict[str, Any], dict[str, float]]]) -> list[str]:
    rows = [
        f"| {model_of(p)} | {p['steps']} | {label(p)} | {m['forward_steps'] / p['steps']:.2f} | {m['seconds']:.2f} "
        f"| {m['ratio']:.1f} | {m['state_mib']:.2f} | {m['device_mib']:.1f} | {m['elsewhere_mib']:.1f} "
        f"| {m['peak_mib']:.0f} |"
        for p, m in found
    ]
    head = "| model | T | schedule | forward steps / T | seconds | times plain | one state, MiB |"
    held = "stored and kept on the device, MiB | stored elsewhere, MiB | process grew by, MiB |"
    return [f"## {title}", "", f"{head} {held}", "|---" * 10 + "|", *rows]


def figure(path: Path, name: str, found: list[tuple[dict[str, Any], dict[str, float]]]) -> None:
    """Two panels: times plain training and device memory, by what the table varies."""
    x = {"k": "argument", "T": "steps", "tier": "tier", "model": "model"}[name]
    canvas = Figure(figsize=(8, 3), layout="constrained")
    panels = canvas.subplots(1, 2)
    shown = (("ratio", "times plain training"), ("device_mib", "stored and kept on the device, MiB"))
    for axes, (key, y) in zip(panels, shown, strict=True):
        for colour, schedule in zip(COLOURS, dict.fromkeys(p["schedule"] for p, _ in found), strict=False):
            some = [(p, m) for p, m in found if p["schedule"] == schedule]
            across = [model_of(p) if x == "model" else p[x] for p, _ in some]
            axes.plot(across, [m[key] for _, m in some], "o-", color=colour, label=schedule)
        axes.set(xlabel={"argument": "k, or slots", "steps": "T"}.get(x, x), ylabel=y)
        if x == "steps":
            axes.set_xscale("log")
        if key != "ratio":
            axes.set_yscale("log")
        axes.tick_params(axis="x", labelrotation=20 if x == "model" else 0)
    panels[-1].legend(frameon=False)
    with mpl.rc_context({"svg.hashsalt": "metagradient"}):
        canvas.savefig(path, metadata={"Date": None})


TITLES = {
    "k": "Against k, and against the number of stored states",
    "T": "Against the length of the run",
    "tier": "Against the tier",
    "model": "Against the model",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", help="a text file, for the decoder; without it, the decoder is left out")
    parser.add_argument("--out", type=Path, default=Path("memory.md"))
    parser.add_argument("--one", help="a point, as JSON: measure it here")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(**json.loads(given.one))))
        return
    blocks = ["# Seconds and memory of a metagradient"]
    for name, several in points(given.corpus).items():
        found = []
        for point in several:
            command = [sys.executable, __file__, "--one", json.dumps(point)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append((point, json.loads(said)))
            print(point, found[-1][1], file=sys.stderr, flush=True)
        drawn = given.out.with_name(f"{given.out.stem}-{name.lower()}.svg")
        figure(drawn, name, found)
        blocks += ["\n".join(table(TITLES[name], found)), f"![{TITLES[name]}]({drawn.name})"]
    blocks.append(
        f"Made by `python benchmarks/memory.py` on {datetime.date.today()}: {platform.machine()}, "
        f"{jax.devices()[0].device_kind}, jax {version('jax')}, metagradient {version('metagradient')}. Every point "
        f"is a fresh process; medians of {_ROUNDS} rounds, or one where it takes {_SHORT:.0f} s or more; segments of "
        "16 steps for the MLP, single steps for the others. What the process grew by includes batches, which without a "
        "budget are held (64 KiB a step of the MLP), compiled programs and their scratch space."
    )
    given.out.write_text("\n\n".join(blocks) + "\n")


if __name__ == "__main__":
    main()
