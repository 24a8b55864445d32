"""Sweeps over training recipes: how smooth each is, how well it trains, and which trade-offs are worth having."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from metagradient._train import train_many
from metagradient.errors import ConfigError, NonFiniteError, StructureError
from metagradient.files import append_text, write_text
from metagradient.metaparameters import bare
from metagradient.smoothness.probe import metasmoothness
from metagradient.training import Training
from metagradient.trees import PyTree

Knobs: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe, ready to be trained and probed at any learning rate.

    Arguments:
        training: `seed -> Training`.
        z: `learning rate -> metaparameters` to train and probe at. With the rate in z, all rates run one program.
        objective: `(final state, z) -> scalar`, the validation loss: picks the learning rate, and is what Definition 1
            is about.
        accuracy: `final state -> share` of test examples named rightly.
        directions: `(z, seed) -> directions by kind` for the probe, which leave learning rates alone.
        gain: `(training, learning rate) -> figure`: what metagradient descent gains, say; None measures none.
    """

    training: Callable[[int], Training]
    z: Callable[[float], PyTree]
    objective: Callable[[PyTree, PyTree], jax.Array]
    accuracy: Callable[[PyTree], float]
    directions: Callable[[PyTree, int], Mapping[str, Sequence[PyTree]]]
    gain: Callable[[Training, float], float] | None = None


@dataclass(frozen=True)
class Outcome:
    """What a sweep found of one recipe.

    Arguments:
        knobs: the recipe.
        rate: the learning rate chosen by validation loss; None where every one diverges.
        losses: validation losses by learning rate; None where training diverges.
        accuracies: test accuracies at that rate, one a seed.
        smoothness: `Smoothness.to_dict()` at that rate; None where a training of the probe diverges.
        gain: the candidate's own figure, or None.
        problem: what went wrong, or None.
        seconds: wall time.
    """

    knobs: dict[str, Any]
    rate: float | None
    losses: dict[str, float | None]
    accuracies: list[float]
    smoothness: dict[str, Any] | None
    gain: float | None
    problem: str | None
    seconds: float

    @property
    def score(self) -> float:
        """The lowest score of the probe's rows; minus infinity without one."""
        return min(row["score"] for row in self.smoothness["rows"]) if self.smoothness else -math.inf

    @property
    def accuracy(self) -> float:
        """Mean test accuracy; zero where training diverges."""
        return float(np.mean(self.accuracies)) if self.accuracies else 0.0


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Arguments:
        outcomes: one a recipe, in the order given.
    """

    outcomes: list[Outcome]

    def ranked(self, by: Literal["score", "accuracy"] = "score") -> list[Outcome]:
        """Outcomes, best first."""
        return sorted(self.outcomes, key=lambda o: getattr(o, by), reverse=True)

    @property
    def front(self) -> list[Outcome]:
        """Outcomes that no other beats in both smoothness and accuracy (the Pareto front), smoothest first."""
        front: list[Outcome] = []
        for outcome in sorted(self.outcomes, key=lambda o: (o.score, o.accuracy), reverse=True):
            if not front or outcome.accuracy > front[-1].accuracy:
                front.append(outcome)
        return front

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self.outcomes)


def one_at_a_time(base: Knobs, choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The base recipe, and all that differ from it in a single knob.

    >>> one_at_a_time({"pooling": "average", "batch": 250}, {"pooling": ["max"], "batch": [250, 500]})[1:]
    [{'pooling': 'max', 'batch': 250}, {'pooling': 'average', 'batch': 500}]
    """
    changed = [{**base, knob: value} for knob, values in choices.items() for value in values]
    return [dict(base), *(recipe for recipe in changed if recipe != base)]


def jointly(base: Knobs, choices: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The base recipe with every combination of the knobs' values; values of the base aren't implied.

    >>> len(jointly({"seed": 0}, {"pooling": ["average", "max"], "batch": [125, 250, 500]}))
    6
    """
    return [{**base, **dict(zip(choices, values, strict=True))} for values in product(*choices.values())]


def sweep(
    make: Callable[[Knobs], Candidate],
    recipes: Sequence[Knobs],
    *,
    rates: Sequence[float],
    slack: float = 0.0,
    file: str | Path | None = None,
    step: float | Sequence[float] = 0.1,
    accuracy_seeds: Sequence[int] = (1, 2, 3),
    gain_seeds: Sequence[int] | None = None,
    seed: int = 0,
    at_once: int | None = None,
    progress: Callable[[Outcome], None] | None = None,
) -> Sweep:
    """Probe recipes, each at the learning rate that suits it: a recipe at another's is neither accurate nor smooth.

    Arguments:
        make: `knobs -> Candidate`.
        recipes: knobs of each, plain data; see `one_at_a_time` and `jointly`.
        rates: learning rates to choose from, by validation loss of one training each.
        slack: take the lowest rate whose loss is no more than this above the best: lower rates are smoother, and the
            best is known only to within the noise of one training.
        file: JSON lines, one an outcome, appended as they come. Recipes already in it are not run again.
        step: h of the probe, or several.
        accuracy_seeds: seeds of the trainings that measure accuracy.
        gain_seeds: seeds of the trainings of whose gains the mean is taken; None takes `seed` alone.
        seed: of the trainings that choose a rate, and of the probe.
        at_once: as in `metasmoothness`.
        progress: called with every outcome, old ones too.

    Returns: a `Sweep`.

    Errors: `StructureError` for no recipe, two that are equal, or no rate. `ConfigError` for a file written under other
        settings, or that isn't JSON lines. A recipe that diverges is an outcome, not an error.

    Cost: for each recipe, a training a rate, one an accuracy seed, a probe, and what its gain takes. JAX's caches are
        cleared after each, or compiled programs would exhaust the process's memory mappings in a long sweep.

    Source: arXiv 2503.13751, section 4.
    """
    recipes = [dict(r) for r in recipes]
    if not recipes or any(a == b for i, a in enumerate(recipes) for b in recipes[:i]):
        raise StructureError("a sweep takes at least one recipe, and no recipe twice")
    if not slack >= 0:
        raise StructureError(f"slack must not be negative, got {slack}")
    if not len(rates) or not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise StructureError(f"rates must be positive learning rates, at least one, got {list(rates)}")
    gain_seeds = [seed] if gain_seeds is None else gain_seeds
    if not gain_seeds:
        raise StructureError("gain_seeds must hold at least one seed")
    settings = _plain(
        {
            "rates": rates, "slack": slack, "step": step, "accuracy_seeds": accuracy_seeds, "gain_seeds": gain_seeds,
            "seed": seed,
        }
    )  # fmt: skip
    path = Path(file) if file is not None else None
    done = _done(path, settings) if path else []
    outcomes = []
    for recipe in recipes:
        outcome = next((o for o in done if o.knobs == _plain(recipe)), None)
        if outcome is None:
            outcome = _outcome(make(recipe), recipe, rates, slack, step, accuracy_seeds, gain_seeds, seed, at_once)
            if path:
                append_text(path, json.dumps({"settings": settings, **vars(outcome)}) + "\n")
        outcomes.append(outcome)
        if progress:
            progress(outcome)
    return Sweep(outcomes)


def _outcome(
    candidate: Candidate,
    knobs: Knobs,
    rates: Sequence[float],
    slack: float,
    step: float | Sequence[float],
    accuracy_seeds: Sequence[int],
    gain_seeds: Sequence[int],
    seed: int,
    at_once: int | None,
) -> Outcome:
    start = perf_counter()
    training = candidate.training(seed)
    zs = [candidate.z(rate) for rate in rates]
    states = train_many(training, zs, at_once=at_once)
    losses = [float(candidate.objective(state, bare(z))) for state, z in zip(states, zs, strict=True)]
    finite = [loss if math.isfinite(loss) else math.inf for loss in losses]
    named = {str(float(rate)): x if x < math.inf else None for rate, x in zip(rates, finite, strict=True)}
    near = [number for number, loss in enumerate(finite) if loss <= min(finite) + slack]
    taken = min(near, key=lambda number: rates[number])
    rate, z = float(rates[taken]), zs[taken]
    if finite[taken] == math.inf:
        problem = "training diverges at every learning rate"
        return Outcome(_plain(knobs), None, named, [], None, None, problem, perf_counter() - start)
    accuracies = [
        candidate.accuracy(train_many(candidate.training(other), [z], at_once=1)[0]) for other in accuracy_seeds
    ]
    smoothness, gain, problems = None, None, []
    try:
        smoothness = metasmoothness(
            training, candidate.objective, z, directions=candidate.directions(z, seed), step=step, at_once=at_once,
            seed=seed,
        )  # fmt: skip
    except NonFiniteError as problem:
        problems.append(str(problem))
    if candidate.gain:
        try:
            gain = float(np.mean([candidate.gain(candidate.training(other), rate) for other in gain_seeds]))
        except NonFiniteError as problem:
            problems.append(str(problem))
    return Outcome(
        _plain(knobs), rate, named, accuracies, smoothness.to_dict() if smoothness else None, gain,
        "; ".join(problems) or None, perf_counter() - start,
    )  # fmt: skip


def _plain(values: Any) -> Any:
    """As it comes back from a file: tuples are lists."""
    return json.loads(json.dumps(values))


def _done(path: Path, settings: dict[str, Any]) -> list[Outcome]:
    """Outcomes in a sweep's own file, which is made where absent. A last line that was cut off is dropped from it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    write_text(path, text[: text.rfind("\n") + 1])
    for number, (written, _) in enumerate(_lines(path), 1):
        if written != settings:
            raise ConfigError(f"{path}, line {number}: written under other settings ({written}); choose another file")
    return read_sweep(path).outcomes


def read_sweep(path: Path) -> Sweep:
    """What the file of a sweep holds so far.

    Errors: `ConfigError` for a line that is no outcome.
    """
    return Sweep([outcome for _, outcome in _lines(path)])


def _lines(path: Path) -> list[tuple[dict[str, Any], Outcome]]:
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = json.loads(line)
            found.append((values.pop("settings"), Outcome(**values)))
        except (ValueError, TypeError, KeyError, AttributeError) as problem:
            raise ConfigError(f"{path}, line {number}: not an outcome of a sweep ({problem})") from problem
    return found
