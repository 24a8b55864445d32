"""`CountSurrogate`: the gradient of a training run in how often each candidate example is trained on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagradient._jax import compiled, own_rules, trace
from metagradient._replay import Replay
from metagradient._train import train
from metagradient.errors import BatchError, ConfigError, NonFiniteError, StructureError
from metagradient.metagrad import Evaluation, Metagradient
from metagradient.metaparameters import PerExample, PerGroup, bare, canonical, is_kind
from metagradient.replay.budget import Memory
from metagradient.replay.schedule import Schedule
from metagradient.run import full_precision
from metagradient.shown import Shown
from metagradient.start import arrays
from metagradient.step.feed import Feed, shown_batches
from metagradient.step.from_loss import LossStep, TrainState
from metagradient.step.optimizer import is_optimizer
from metagradient.step.programs import shared
from metagradient.step.segment import SINGLE_STEPS, Segment
from metagradient.training import Batches, Training
from metagradient.trees import PyTree, zeros


@dataclass(frozen=True, eq=False, repr=False)
class CountSurrogate(Shown):
    r"""A run on a data set made by counts, and its gradient in them.

    Counts are whole numbers $c_i \ge 0$: candidate i is in the data set $c_i$ times. The surrogate adds every
    candidate's loss, times $z_i$, to the loss of one step k. At $z = 0$ it is the real run, and it has a gradient for
    every candidate, those with count 0 too:

    $$\nabla_{z_i} f = \langle u, \nabla_\theta \ell_i(\theta_k) \rangle,$$

    with u the cotangent of step k's loss gradient. So the steps after k are differentiated, and then one pass over the
    candidates takes the derivative of their losses in the direction u: they may be streamed from anywhere.

    Arguments:
        training: counts, int64[n], to the run on the data set that they make (`EpochBatches(rows=np.repeat(ids,
            counts))`); from `Training.from_loss`. Its loss and optimiser are given an empty dictionary for z.
        candidates: the pool in batches, once through: pytrees of arrays that are dictionaries with `"index"`, int[b],
            in [0, n). Each shape is compiled once. A candidate that no batch holds gets gradient 0, one that several
            hold the sum.
        losses: `(params, model_state, batch) -> [b]`, the candidates' losses $\ell_i$; with `args`,
            `(params, model_state, batch, args) -> [b]`. What else a batch holds may
            enter a loss (the negatives of a contrastive one); it is differentiated like the rest.
        at: k, from 0 to T - 2.
        args: constants of the losses, any pytree of arrays: an argument of their program. Those of `training` are its
            own.

    A loss with another scale only scales the gradient.

    Source: arXiv 2503.13751, section 3.1 and algorithm 1; `updates.counts` and `updates.exchange` are its moves.
    """

    training: Callable[[np.ndarray], Training]
    candidates: Iterable[PyTree]
    losses: Callable[..., jax.Array]
    at: int
    args: PyTree = None
    programs: "_Slopes" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "args", arrays("args", self.args))
        object.__setattr__(self, "programs", shared(_Slopes, (self.losses, self.args is not None)))

    def shown(self) -> dict[str, Any]:
        """The run, the pool, and the step."""
        return {
            "training": self.training,
            "candidates": shown_batches(self.candidates),
            "losses": self.losses,
            "at": self.at,
        }

    def evaluate(
        self,
        objective: Callable[[PyTree, PyTree], jax.Array],
        z: PyTree,
        *,
        memory: Memory | str | None = None,
        schedule: Schedule | None = None,
        segment: Segment | int | None = None,
        verify: Literal["boundaries", "off"] = "boundaries",
        progress: bool = False,
    ) -> tuple[Evaluation, float]:
        """The objective of the run that counts make, and its gradient in them.

        Arguments:
            objective: `(final state, z) -> scalar`; it must not read z.
            z: counts `[n]`, whole numbers in a floating array: a pytree with one leaf, `PerExample`.
            memory, schedule, segment, verify, progress: as in `value_and_metagrad`.

        Returns: the metagradient, in the structure of z; and the compute it took, in plain training runs.

        Errors: `StructureError` for z or a training of another kind; `ConfigError` for a step out of range;
            `BatchError` for a candidate's index; and those of `value_and_metagrad`.

        Cost: the run; adjoints of the steps after k; a forward pass and its tangent over the candidates (as many matrix
            products as training on each once). Memory: that of the metagradient, of one batch of candidates, and n
            numbers on the host.
        """
        options = Replay(memory=memory, schedule=schedule, segment=segment, verify=verify, progress=progress)
        return self.evaluate_with(objective, z, options)

    def evaluate_with(
        self, objective: Callable[[PyTree, PyTree], jax.Array], z: PyTree, options: Replay
    ) -> tuple[Evaluation, float]:
        """`evaluate`, with its options in one."""
        start = perf_counter()
        if options.window is not None:
            raise ConfigError("a gradient in counts has no window=: its step is `at`")
        z = canonical(z)
        counts = _counts(z)
        training = self.training(np.asarray(counts.value).astype(np.int64))
        rule, batches, steps = _blind(training.rule), training.batches, len(training.batches)
        if not 0 <= self.at < steps - 1:
            raise ConfigError(f"at must be from 0 to {steps - 2}, so that a step follows it, got {self.at}")
        state = self._head(training, rule, options.segment)
        batch = Feed(batches)[self.at]
        pushed = shared(_Pushed, rule)
        tail = Training(
            lambda z: pushed.advance(state, batch, z["push"], training.args), rule,
            _Part(batches, self.at + 1, steps), training.args, allow_low_precision=training.allow_low_precision,
        )  # fmt: skip
        metagradient = Metagradient(tail, objective, options)
        self.programs.beside = pushed, tail.programs, metagradient.programs
        found = metagradient.evaluate({"push": zeros(state.params)})
        with full_precision(training.allow_low_precision):
            grad, passes = self._slopes(state, found.grad["push"], len(counts.value))
        grad = jax.tree.unflatten(jax.tree.structure(z), [jnp.asarray(grad, counts.value.dtype)])
        stats = replace(
            found.stats, forward_steps=found.stats.forward_steps + self.at + 1, seconds=perf_counter() - start
        )
        batch_size = len(jax.tree.leaves(batch)[0])
        return replace(found, grad=grad, stats=stats), (stats.in_steps + passes / batch_size) / steps

    def trained(self, z: PyTree) -> PyTree:
        """The final state of the run that counts make."""
        training = self.training(np.asarray(_counts(canonical(z)).value).astype(np.int64))
        return train(replace(training, step=_blind(training.rule)), {})

    def _head(self, training: Training, rule: LossStep, segment: Segment | int | None) -> TrainState:
        """The state before step k."""
        if not self.at:
            return training.initial({})
        head = replace(training, step=rule, batches=_Part(training.batches, 0, self.at))
        return train(head, {}, segment=segment or SINGLE_STEPS)

    def _slopes(self, state: TrainState, direction: PyTree, n: int) -> tuple[np.ndarray, int]:
        """Derivatives of all candidates' losses in a direction, [n], and how many candidates went by."""
        grad, passes = np.zeros(n, jnp.result_type(*jax.tree.leaves(direction))), 0
        # The device works on one batch while the next is read.
        before: tuple[np.ndarray, Any] = np.zeros(0, int), np.zeros(0)
        for number, batch in enumerate(self.candidates):
            index = _index(number, batch, n)
            slopes = self.programs.slopes(state.params, state.model_state, batch, self.args, direction)
            if slopes.shape != index.shape:
                raise StructureError(
                    f"losses returned shape {list(slopes.shape)} for {len(index)} candidates, expected one loss each"
                )
            np.add.at(grad, before[0], np.asarray(before[1]))
            before = index, slopes
            passes += len(index)
        np.add.at(grad, before[0], np.asarray(before[1]))
        if not np.isfinite(grad).all():
            bad = int(np.flatnonzero(~np.isfinite(grad))[0])
            raise NonFiniteError(f"the derivative of candidate {bad}'s loss at step {self.at} is {grad[bad]}")
        return grad, passes


@dataclass(frozen=True)
class Probed:
    """What one step k is worth, measured.

    Arguments:
        at: k.
        before, after: the objective on fresh seeds, before and after one update by the gradient at k.
    """

    at: int
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def gain(self) -> float:
        """By how much the update lowered the objective, on average."""
        return float(np.mean(self.before) - np.mean(self.after))


def probe_at(
    surrogate: Callable[[int, int], CountSurrogate],
    objective: Callable[[PyTree, PyTree], jax.Array],
    z: PyTree,
    update: optax.GradientTransformation,
    ats: Sequence[int],
    *,
    seed: int,
    fresh: Sequence[int],
    **options: Any,
) -> list[Probed]:
    """Which step k gives gradients of use: one update by each, and the objective of fresh trainings before and after.

    Arguments:
        surrogate: `(seed, k) -> CountSurrogate`.
        objective: as in `CountSurrogate.evaluate`.
        z: counts to start from.
        update: as in `descend`.
        ats: steps to try.
        seed: of the runs that are differentiated.
        fresh: seeds of the runs that are measured, others than `seed`.
        options: as in `CountSurrogate.evaluate`.

    Returns: what was measured, for each of `ats`. The highest `gain` is the k to take.

    Errors: `ConfigError` without steps or fresh seeds; and those of `CountSurrogate.evaluate`.

    Cost: a gradient for each k, and a training for each k and fresh seed.
    """
    if not ats or not fresh or seed in fresh:
        raise ConfigError("probe_at takes steps to try, and fresh seeds, none of them the differentiated run's own")
    z = canonical(z)
    # Programs are shared while somebody holds them: each run is held until the next one is made.
    last: list[Any] = [None]

    def measured(z: PyTree, at: int) -> tuple[float, ...]:
        counts, values = np.asarray(_counts(z).value).astype(np.int64), []
        for number in fresh:
            drawn = surrogate(number, at).training(counts)
            last[0] = replace(drawn, step=_blind(drawn.rule))
            values.append(float(objective(train(last[0], {}, segment=SINGLE_STEPS), bare(z))))
        return tuple(values)

    before, memory = measured(z, ats[0]), update.init(z)
    found = []
    for at in ats:
        made = surrogate(seed, at)
        grad = made.evaluate(objective, z, **options)[0].grad
        moved = optax.apply_updates(z, update.update(grad, memory, z)[0])
        found.append(Probed(at, before, measured(moved, at)))
    return found


@dataclass(frozen=True)
class _Blind:
    """A loss, or `z -> optimiser`, that is given an empty dictionary for z.

    Arguments:
        takes_args: whether the run's constants come after z.
    """

    function: Callable[..., Any]
    takes_args: bool = False

    def __call__(self, *arguments: Any) -> Any:
        before, args = (arguments[:-2], arguments[-1:]) if self.takes_args else (arguments[:-1], ())
        return self.function(*before, {}, *args)


@dataclass(frozen=True)
class _Part:
    """Some of a run's batches, those of steps start to stop."""

    batches: Batches
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, t: int) -> PyTree:
        if not 0 <= t < len(self):
            raise IndexError(f"batch {t} of {len(self)}")
        return self.batches[self.start + t]


def _blind(rule: Any) -> LossStep:
    if not isinstance(rule, LossStep):
        raise StructureError("a gradient in counts needs a training from Training.from_loss: a step that holds a loss")
    optimizer = rule.optimizer
    if not is_optimizer(optimizer):
        optimizer = _Blind(optimizer)
    return replace(rule, loss=_Blind(rule.loss, rule.takes_args), optimizer=optimizer)


def _counts(z: PyTree) -> PerExample:
    kinds = jax.tree.leaves(z, is_leaf=is_kind)
    if any(isinstance(kind, PerGroup) for kind in kinds):
        raise StructureError("z holds mg.PerGroup, but counts are of examples: give one mg.PerExample leaf")
    if len(kinds) != 1 or not isinstance(kinds[0], PerExample) or kinds[0].rows is not None or kinds[0].value.ndim != 1:
        raise StructureError("z must be counts alone: one PerExample leaf of shape [n], without rows")
    (counts,) = kinds
    if not bool(jnp.all((counts.value >= 0) & (counts.value == jnp.round(counts.value)))):
        raise StructureError("z must hold counts: whole numbers from 0, in a floating array")
    return counts


def _index(number: int, batch: PyTree, n: int) -> np.ndarray:
    if not (isinstance(batch, dict) and "index" in batch):
        raise BatchError(f'candidate batch {number} has no "index": add the ids of its candidates as int[b]')
    index = np.asarray(batch["index"])
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise BatchError(f"candidate batch {number}: its index must be a vector of integers")
    if index.min(initial=0) < 0 or index.max(initial=0) >= n:
        raise BatchError(f"candidate batch {number}: its index leaves [0, {n}), the candidates that z covers")
    return index


class _Pushed:
    """The step whose gradient is pushed, compiled."""

    def __init__(self, rule: LossStep):
        # Differentiated in the push, so within another program: not `compiled`.
        def advance(state: PyTree, batch: PyTree, push: PyTree, args: PyTree) -> PyTree:
            return rule.bound(args).advance_pushed(state, batch, {}, push)

        self.advance = jax.jit(advance)


class _Slopes:
    """Derivatives of candidates' losses in a direction, compiled.

    Arguments:
        losses: as in `CountSurrogate`, and whether they take args.

    Attributes:
        beside: other programs of the same surrogate, held here so that the next one of equal parts finds them.
    """

    def __init__(self, losses: tuple[Callable[..., jax.Array], bool]):
        self.losses, self.takes_args = losses
        self.beside: tuple[Any, ...] = ()

    @cached_property
    def slopes(self) -> Callable[..., jax.Array]:
        """`(params, model_state, batch, args, direction) -> [b]`."""
        losses, takes_args = self.losses, self.takes_args

        def slopes(params: PyTree, model_state: PyTree, batch: PyTree, args: PyTree, direction: PyTree) -> jax.Array:
            def of(params: PyTree) -> jax.Array:
                return losses(params, model_state, batch, *(args,) * takes_args)

            if own_rules(trace(of, params)[0]):
                # What a rule makes of the gradient counts, and not how the value changes: by the definition, in
                # reverse. <gradient of w . losses, direction> is linear in w.
                def along(w: jax.Array) -> jax.Array:
                    gradient = jax.grad(lambda p: jnp.vdot(w, of(p)))(params)
                    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
                    return sum((jnp.vdot(g, d) for g, d in pairs), jnp.zeros((), w.dtype))

                shape = jax.eval_shape(of, params)
                return jax.grad(along)(jnp.ones(shape.shape, shape.dtype))

            # Rules that are marked as true derivatives refuse a tangent, but what reverse mode gives for their values
            # takes one. Nothing calls the pull-back, and the compiler drops it.
            def found(params: PyTree) -> jax.Array:
                return jax.vjp(of, params)[0]

            return jax.jvp(found, (params,), (direction,))[1]

        return compiled(slopes)
