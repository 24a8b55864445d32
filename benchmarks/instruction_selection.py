"""Writes `docs/instruction_selection.md` from the directories of finished runs.

    python benchmarks/instruction_selection.py --small RUN --agreement FILE [--pretrained RUN...] --out docs

The runs: `metagradient select --task instruction --data DIR --preset small --text FILE`, and `... --preset smollm2-135m
--model FILE.gguf` without the text. `--agreement` is what peers_torch/logits.py wrote of that file.
"""

import argparse
import datetime
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template

from metagradient.descent.journal import read_lines
from metagradient.report.page import Table
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.instruction_data import Sources
from metagradient.tasks.instruction_page import NAMES, TRAINED, by_task, composition, results

TEMPLATE = Path(__file__).with_name("instruction_selection.md.in")


def targets(result: Mapping[str, float]) -> str:
    """Whether MGD is better than LESS, random and all: in loss paired by seed, and in accuracy."""

    def held(gain: float, error: float) -> str:
        return "yes" if gain > 2 * error else "no" if gain < -2 * error else "within two errors"

    rows = []
    for arm in ("less", "random", "all"):
        behind, error = result[f"behind_{arm}"], result[f"error_behind_{arm}"]
        row = [NAMES[arm], f"{behind:+.3f} ± {error:.3f}", held(behind, error)]
        for measure in ("tokens", "accuracy"):
            more = result[f"{measure}_mgd"] - result[f"{measure}_{arm}"]
            error = (result[f"error_{measure}_mgd"] ** 2 + result[f"error_{measure}_{arm}"] ** 2) ** 0.5
            row += [f"{100 * more:+.1f} ± {100 * error:.1f}", held(more, error)]
        rows.append(row)
    header = ["MGD against", "loss above MGD's", "better?"]
    for what in ("tokens right", "exact answers"):
        header += [f"MGD's {what} more, points", "better?"]
    return Table(header, rows).markdown()


def known(run: RunDirectory) -> tuple[float, list[str]]:
    """Answers of the test questions that are the whole answer of some candidate too, and those that aren't.

    Returns: the share of questions with one of the former; the three commonest of the latter.
    """
    c = run.config
    limits = {name: c.get(name) for name in ("candidates", "tests")}
    sources = Sources.read(Path(c["data"]), c["target"], aim=c["aim"], seed=c["seed"], **limits)
    answers = {one.answer for one in sources.pool}
    others = Counter(one.answer for one in sources.test if one.answer not in answers)
    return 1 - others.total() / len(sources.test), [answer for answer, _ in others.most_common(3)]


def cost(run: RunDirectory) -> str:
    """Which of its meta-steps a run took, and what it cost, in words."""
    result = run.figures or {}
    return (
        f"Held-out questions chose what stood after {result['meta_step']} of {len(run.records)} meta-steps. Cost: "
        f"{result['training_runs']:.0f} tunings' worth in the descent."
    )


def described(run: RunDirectory, names: Sequence[str]) -> str:
    """Settings of a run as a list, `outer.inner` within a configuration."""
    flat = {
        f"{outer}.{name}" if isinstance(inner, dict) else outer: value
        for outer, inner in run.config.items()
        for name, value in (inner.items() if isinstance(inner, dict) else [(outer, inner)])
    }
    return ", ".join(f"{name} {flat[name]}" for name in names if name in flat)


def pretrained(paths: Sequence[Path], settings: Sequence[str]) -> str:
    """What runs on a pre-trained model gave."""
    if not paths:
        return (
            "`metagradient select --task instruction --preset smollm2-135m --data DIR --model FILE.gguf` runs it; it "
            "was not made."
        )

    def told(run: RunDirectory) -> str:
        assert run.figures is not None
        return f"{results(run.figures).markdown()}\n\nSettings: {described(run, settings)}. {cost(run)}"

    return "\n\n".join(told(RunDirectory.read(path)) for path in paths)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", type=Path, required=True)
    parser.add_argument(
        "--pretrained", type=Path, nargs="+", default=[], help="without it, the page says that this run is to be made"
    )
    parser.add_argument("--agreement", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    given = parser.parse_args()
    small = RunDirectory.read(given.small)
    agreement = json.loads(given.agreement.read_text())
    assert small.figures is not None
    share, others = known(small)
    settings = (
        *("method", "share", "meta_steps", "exchanged", "drawn", "at", "tuning.steps", "tuning.batch", "tuning.length"),
        *("tuning.learning_rate", "tuning.lora_rank", "less_epochs", "less_share", "fresh"),
    )
    text = Template(TEMPLATE.read_text()).substitute(
        agreement=f"{agreement['largest difference']:.1e}",
        largest=f"{agreement['largest logit']:.0f}",
        agreement_tokens=agreement["tokens"],
        targets=targets(small.figures),
        results=results(small.figures).markdown(),
        tasks=by_task(read_lines(small / TRAINED)).markdown(),
        composition=composition(small).markdown(),
        settings=described(small, settings),
        cost=cost(small),
        candidates=f"{small.figures['candidates']:,.0f}",
        different=f"{small.figures['different']:.0f}",
        selected=f"{small.figures['selected']:.0f}",
        cut_pool=f"{small.figures['cut_pool']:.0%}",
        cut_test=f"{small.figures['cut_test']:.0%}",
        known=f"{share:.0%}",
        unknown=", ".join(others),
        length=small.config["tuning"]["length"],
        large=pretrained(given.pretrained, ("candidates", "tests", "aim", *settings)),
        made=f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}: {platform.machine()}, "
        f"jax {small.versions['jax']}, metagradient {version('metagradient')}",
    )
    (given.out / "instruction_selection.md").write_text(text)


if __name__ == "__main__":
    main()
