"""`descend`: metagradient descent, one loop for every task."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from metagradient._jax import digest, trace
from metagradient._replay import Replay, Stats
from metagradient.counts import CountSurrogate
from metagradient.descent.board import Board
from metagradient.descent.finalists import Finalist, ranked
from metagradient.descent.gradients import Differentiable, Gradients, Measured, SeedRecord, check_drawn
from metagradient.descent.identity import of_objective, of_run
from metagradient.descent.journal import Best, Journal, Position, checksum, described
from metagradient.descent.kept import KEPT, Kept
from metagradient.descent.seeds import MOST_NUMBERS, MOST_STEPS, fresh_seed, inner_seed
from metagradient.errors import ConfigError, NonFiniteError, StructureError
from metagradient.metaparameters import canonical
from metagradient.replay.budget import Memory
from metagradient.replay.schedule import Schedule
from metagradient.shown import Shown, Words
from metagradient.step.segment import Segment
from metagradient.training import Training
from metagradient.trees import PyTree, mismatch, paths, strong

__all__ = ["Best", "Descent", "Finalist", "MetaStep", "SeedRecord", "descend", "fresh_seed", "inner_seed"]


@dataclass(frozen=True, repr=False)
class MetaStep(Shown):
    """What one meta-step did. All of it was measured at `z`; `next_z` is for the next meta-step to measure.

    Arguments:
        step: its number, from 0.
        value: the objective, averaged over seeds.
        held_out: another objective at the same final states, or None.
        grad_norm: Euclidean norm of the metagradient, averaged over seeds.
        agreement: mean cosine between two seeds' metagradients, averaged over z's leaves; None with one seed. Near 0,
            smaller moves and more momentum let further meta-steps add up.
        seeds: the same of each of its trainings.
        z: the metaparameters that the step started from.
        next_z: those that its update led to.
        stats: what its metagradients took, together.
        training_runs: compute spent, in plain training runs (an adjoint step counts as three steps).
    """

    step: int
    value: float
    held_out: float | None
    grad_norm: float
    agreement: float | None
    seeds: tuple[SeedRecord, ...]
    z: PyTree
    next_z: PyTree
    stats: Stats
    training_runs: float

    def found(self) -> dict[str, Any]:
        """Its line in `records.jsonl`: the same whenever the same descent is run."""
        figures = {name: getattr(self, name) for name in ("step", "value", "held_out", "grad_norm", "agreement")}
        return {**figures, "seeds": [asdict(seed) for seed in self.seeds]}

    def took(self) -> dict[str, Any]:
        """Its line in `timings.jsonl`: what depends on the machine, and on the schedule that fits its memory."""
        names = ("seconds", "compile_seconds", "forward_steps", "adjoint_steps", "peak_bytes")
        figures = {name: getattr(self.stats, name) for name in names}
        return {"step": self.step, **figures, "training_runs": self.training_runs}


class Descent(Iterator[MetaStep], Shown):
    """A metagradient descent under way; made by `descend`. Iterating over it takes its meta-steps, one at a time."""

    def __init__(
        self,
        gradients: Gradients,
        move: "_Move",
        start: Position,
        steps: int,
        patience: int | None,
        journal: Journal | None,
        board: Board | None,
        kept: Kept,
    ):
        self._gradients = gradients
        self._move = move
        self._at = start
        self._steps = steps
        self._patience = patience
        self._journal = journal
        self._board = board
        self._kept = kept

    def shown(self) -> dict[str, Any]:
        """Where it stands."""
        best = self.best
        return {
            "step": Words(f"{self.step} of {self._steps}"),
            "best": Words(f"{best.score:.6g} at meta-step {best.step}") if best else None,
            "z": self.z,
        }

    @property
    def step(self) -> int:
        """Meta-steps taken, those before a resume included."""
        return self._at.step

    @property
    def z(self) -> PyTree:
        """The metaparameters after the last update. No meta-step has measured them yet."""
        return self._at.z

    @property
    def best(self) -> Best | None:
        """The best held-out value so far (without `held_out`, the best value), and the z that it was measured at.

        None before the first meta-step. What the last update led to was not measured, so it is no candidate.
        """
        return self._at.best

    @property
    def kept(self) -> dict[int, PyTree]:
        """The z that a meta-step started from, by its number, for every n-th, as `keep` said. Read from the journal."""
        return self._kept.read()

    def finalists(self, fresh: int = 4, *, candidates: Mapping[str, PyTree] | None = None) -> list[Finalist]:
        """Candidates tried again, on common fresh seeds: which z to take.

        Arguments:
            fresh: trainings of each candidate, at least 1, with seeds that no meta-step draws, the same for all. A
                fixed training is run once.
            candidates: z's by name. None takes the best, the last and those that were kept.

        Returns: what was measured, best first: of `held_out`, or of the objective without one. `finalists()[0].z` is
            the z to take; `behind` and `error` of the next one say how sure that is.

        Errors: `ConfigError` without a training or a candidate; those of `train`.

        Cost: `fresh` trainings for each candidate; with `out`, each is written down, and not made again.
        """
        if fresh < 1:
            raise ConfigError(f"finalists are tried on at least one fresh seed, got {fresh}")
        if candidates is None:
            candidates = {f"meta-step {step}": z for step, z in self.kept.items()}
            if self.best:
                candidates[f"meta-step {self.best.step}"] = self.best.z
            candidates[f"meta-step {self.step}"] = self.z
        return ranked(
            self._gradients,
            {name: canonical(z) for name, z in candidates.items()},
            fresh,
            maximise=self._move.maximise,
            out=self._journal.directory if self._journal else None,
        )

    @property
    def segment(self) -> Segment | None:
        """How steps are compiled; None before the first meta-step, where that is left to be measured."""
        return self._at.segment

    @property
    def over(self) -> bool:
        """Whether all meta-steps are taken, or patience has run out."""
        at = self._at
        waited = at.step - 1 - at.best.step if at.best else 0
        return at.step >= self._steps or (self._patience is not None and waited >= self._patience)

    def __next__(self) -> MetaStep:
        if self.over:
            if self._board:
                self._board.close()
            raise StopIteration
        at = self._at
        found = self._gradients.at(at.step, at.z, at.segment)
        z, memory = self._move(found.grad, at.memory, at.z)
        record = _record(at, found, z)
        after = Position(
            at.step + 1, z, memory, _better(at.best, record, maximise=self._move.maximise), found.stats.segment
        )
        if self._board:
            shown = {name: getattr(record, name) for name in ("value", "held_out", "grad_norm", "agreement")}
            self._board.add(record.step, shown)
        self._kept.add(at.step, at.z)
        if self._journal:
            self._journal.commit(after, record.found(), record.took())
        self._at = after
        return record


def descend(
    training: Differentiable | Callable[[int], Differentiable],
    objective: Callable[[PyTree, PyTree], jax.Array],
    z: PyTree,
    update: optax.GradientTransformation,
    steps: int,
    *,
    seeds: int = 1,
    project: Callable[[PyTree], PyTree] | None = None,
    held_out: Callable[[PyTree, PyTree], jax.Array] | None = None,
    maximise: bool = False,
    keep: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    tensorboard: bool = False,
    memory: Memory | str | None = None,
    schedule: Schedule | None = None,
    segment: Segment | int | None = None,
    window: int | None = None,
    verify: Literal["boundaries", "off"] = "boundaries",
    progress: bool = False,
) -> Descent:
    r"""Metagradient descent: train, differentiate through the training, update the metaparameters, repeat.

    $$z \leftarrow \mathrm{project}(z + \mathrm{update}(\nabla f(z)))$$

    Which z to take in the end? The best one was measured on seeds that it was chosen by, and flatters itself:
    `Descent.finalists` tries the best, the last and those that were kept again, on common fresh seeds.

    Arguments:
        training: the run, or `seed -> Training`; then every meta-step draws fresh seeds, and what is learnt must hold
            for all of them (a fixed seed gets exploited). Build loss and optimiser outside that function, so that
            every meta-step runs the same compiled programs. In place of a `Training` it may be a `CountSurrogate`,
            with counts for z.
        objective: `(final state, z) -> scalar` to minimise, z with bare arrays.
        z: metaparameters to start from.
        update: an optax transformation of metagradients, in the kinds of z; see `metagradient.updates`.
        steps: number of meta-steps.
        seeds: trainings a meta-step, each with a seed of its own. With several, each one's metagradient is scaled to
            unit root mean square, leaf by leaf, and then they are averaged, so that no seed drowns the others (a leaf
            that is zero for a seed doesn't count). Values are averaged as they are.
        project: applied to z, with its kinds, after every update.
        held_out: a second objective that steers nothing, and picks the best z: metagradient descent overfits small
            targets.
        maximise: climb instead: the objective is maximised, and higher is better for it and for `held_out`.
        keep: keep the z of every n-th meta-step, from the first: in `Descent.kept`, and with `out` in `out/kept`. None
            keeps the best and the last alone.
        patience: stop after so many meta-steps without a new best held-out value; None takes all steps.
        seed: seed of the inner seeds, from 0.
        out: directory of a journal; `metagradient.descent.journal` tells its files. Called again with the same one,
            `descend` goes on after the last meta-step that was done, wherever it was killed, and ends in the same bits.
            `steps`, `patience` and `keep` may differ from those that it was begun with. Whatever else differs is
            refused by name: the programs of step, objective and `held_out`, T, the first and last batch, the initial
            state, z, args, window, segment, seeds, JAX's version; of `seed -> Training`, those of the first one drawn.
            Batches in between are not compared.
        tensorboard: write event files to `out/tensorboard`; needs `pip install 'metagradient[tensorboard]'`.
        memory, schedule, segment, window, verify, progress: as in `value_and_metagrad`.

    Returns: an iterator over the meta-steps that are left to take; take as many as wanted. A meta-step measures the z
        that it starts from (`record.z`) and ends in an update (`record.next_z`). So what the last update led to, the
        descent's own `z`, is not measured: ask for a step more, or measure it on a `fresh_seed`. `best` holds the best
        z that was measured, and its step.

    Errors, before compute: `StructureError` for a z that can't be differentiated in; `ConfigError` for arguments out of
        range or at odds with each other, and for a journal of another descent, saying what differs; `StoreError` for a
        journal that is damaged. Later: those of `value_and_metagrad`; `StructureError` and `NonFiniteError` for what
        `update`, `project` or `held_out` return.

    Cost: `seeds` metagradients a meta-step. With `out`, z twice and the update's memory are written in each, and a
        call traces the step and the objectives, and draws a training.

    Source: arXiv 2503.13751, section 3.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> training = mg.Training(jnp.ones(()), lambda s, b, z: s - z["rate"] * 2 * s, [{}] * 4)
    >>> update = mg.updates.normalised(0.05)
    >>> descent = mg.descend(training, lambda s, z: s**2, {"rate": jnp.asarray(0.1)}, update, steps=4)
    >>> records = list(descent)
    >>> records[-1].value < records[0].value, descent.best.step
    (True, 3)
    """
    z = canonical(z)
    options = Replay(memory=memory, schedule=schedule, segment=segment, window=window, verify=verify, progress=progress)
    fresh = not isinstance(training, (Training, CountSurrogate))
    wrong = {
        "training must be a Training (or CountSurrogate), or a function seed -> Training": fresh
        and not callable(training),
        "update must be an optax transformation: call what makes one, mg.updates.sign(0.1)": not isinstance(
            update, optax.GradientTransformation
        ),
        f"steps must be in [0, {MOST_STEPS}], got {steps}": not 0 <= steps <= MOST_STEPS,
        f"seeds must be in [1, {MOST_NUMBERS}], got {seeds}": not 1 <= seeds <= MOST_NUMBERS,
        f"seeds={seeds} takes a function seed -> Training: a Training is the same every time": seeds > 1 and not fresh,
        f"seed must be at least 0, got {seed}": seed < 0,
        f"patience must be at least 1, got {patience}": patience is not None and patience < 1,
        "patience waits for a better held-out value: give held_out too": patience is not None and held_out is None,
        "tensorboard=True needs out=, the directory that its files go to": tensorboard and out is None,
        f"keep must be at least 1, got {keep}": keep is not None and keep < 1,
        "a gradient in counts has no window=: its step is `at`": isinstance(training, CountSurrogate)
        and window is not None,
    }
    for message, found in wrong.items():
        if found:
            raise ConfigError(message)
    move = _Move(update, project, maximise)
    start = Position(0, z, strong(update.init(z)), None, segment if isinstance(segment, Segment) else None)
    journal = None
    if out is not None:

        def also() -> dict[str, Any]:
            run: Any = training
            if fresh:
                run = run(inner_seed(seed, 0, 0))
                check_drawn(run, inner_seed(seed, 0, 0))
            objectives = {"digest of the objective": objective, "held_out": held_out}
            return {
                **of_run(run, z, window),
                **{name: of_objective(function, run, z) for name, function in objectives.items()},
            }

        identity = {
            "JAX": jax.__version__,
            "z": described(z),
            "checksum of the first z": checksum(z),
            "memory of the update": described(start.memory),
            "digest of update and projection": move.digest(start),
            "training": "drawn by seed" if fresh else "fixed",
            "seed": seed,
            "seeds": seeds,
            "maximise": maximise,
            "window": window,
            "segment": str(segment),
        }
        journal = Journal(Path(out), identity, start, also)
        start = journal.position
    board = Board(Path(out) / "tensorboard", start.step) if out is not None and tensorboard else None
    gradients = Gradients(training, objective, held_out, seed, seeds, options)
    kept = Kept(keep, z, None if out is None else Path(out) / KEPT, start.step)
    return Descent(gradients, move, start, steps, patience, journal, board, kept)


@dataclass(frozen=True)
class _Move:
    """From a metagradient to the next z."""

    update: optax.GradientTransformation
    project: Callable[[PyTree], PyTree] | None
    maximise: bool = False

    def __call__(self, grad: PyTree, memory: PyTree, z: PyTree) -> tuple[PyTree, PyTree]:
        """The next z, and the update's next memory."""
        new, left = self._moved(grad, memory, z)
        for what, old, now in (("z of another kind", z, new), ("memory of another kind", memory, left)):
            problem = mismatch(old, now)
            if problem:
                raise StructureError(f"the update or projection made a {what}: {problem}")
        bad = [path for path, leaf in paths(new) if not bool(jnp.isfinite(leaf).all())]
        if bad:
            raise NonFiniteError(f"the update or projection made z{bad[0]} non-finite, from a finite metagradient")
        return new, left

    def digest(self, start: Position) -> str | None:
        """Digest of the program, settings included; None for one that can't be traced."""
        try:
            return digest(trace(self._moved, start.z, start.memory, start.z)[0], lasting=True)
        except jax.errors.JAXTypeError:
            return None

    def _moved(self, grad: PyTree, memory: PyTree, z: PyTree) -> tuple[PyTree, PyTree]:
        grad = jax.tree.map(jnp.negative, grad) if self.maximise else grad
        changes, memory = self.update.update(grad, memory, z)
        z = optax.apply_updates(z, changes)
        return strong(self.project(z) if self.project else z), strong(memory)


def _record(at: Position, found: Measured, next_z: PyTree) -> MetaStep:
    value, grad_norm = found.mean("value"), found.mean("grad_norm")
    assert value is not None
    assert grad_norm is not None
    held_out, took = found.mean("held_out"), found.training_runs
    return MetaStep(at.step, value, held_out, grad_norm, found.agreement, found.seeds, at.z, next_z, found.stats, took)


def _better(best: Best | None, record: MetaStep, *, maximise: bool) -> Best:
    score = record.value if record.held_out is None else record.held_out
    sign = -1 if maximise else 1
    return best if best and sign * best.score <= sign * score else Best(record.step, score, record.z)
