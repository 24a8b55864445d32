"""`Training`: one object that drives training, replay, the traced step and every probe, so that none can disagree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import jax.numpy as jnp
import optax

from metagradient.errors import StructureError
from metagradient.examples import checked
from metagradient.given import Given
from metagradient.metaparameters import ORDER, bare
from metagradient.shown import Shown
from metagradient.start import arrays, check_parameters, is_function, started
from metagradient.step.explain import pair
from metagradient.step.feed import Batches, check_source, shown_batches
from metagradient.step.from_loss import LossStep, TrainState
from metagradient.step.optimizer import check_optimizer, is_optimizer
from metagradient.step.programs import Programs, programs_of
from metagradient.step.rule import Rule, WrittenStep
from metagradient.trees import PyTree

__all__ = ["Batches", "TrainState", "Training"]


@dataclass(frozen=True, eq=False, repr=False)
class Training(Shown):
    """A training run: where it starts, how it steps, and on what.

    Arguments:
        init: `z -> state`, or the state itself where the start doesn't depend on z. A state is any pytree of arrays
            and holds everything that evolves: parameters, moments, statistics, PRNG keys, counters.
        step: `(state, batch, z_t) -> state`, pure and jit-able. `z_t` has the structure of z with bare arrays:
            `Shared` whole, `PerStep` its t-th entry, `PerExample` the rows of `batch["index"]`, `PerGroup` those
            of their groups. Nor does `init` see kinds: its z has bare arrays.
        batches: random-access sequence; `len(batches)` is T, `batches[t]` a pytree of arrays of the same shapes and
            dtypes for every t, equal at every read.
        args: constants of the run, any pytree of arrays: a frozen base model, a pool, a teacher. Where given, the step
            is `(state, batch, z_t, args) -> state`. They are converted once, held once, and an argument of the compiled
            program: other values compile nothing. They aren't differentiated.
        allow_low_precision: let the step compute in half precision, or with lowered matmul precision. Metagradients
            are then often noise.

    A hand-written step is differentiated whole, reverse over reverse. `Training.from_loss` gives a faster and smaller
    adjoint wherever the step is a loss gradient and an optimiser.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> decay = lambda state, batch, z: state * (1 - z["rate"])
    >>> training = mg.Training(jnp.ones(3), decay, [{}] * 10)
    >>> z = {"rate": mg.PerStep(jnp.full(10, 0.1))}
    >>> value, gradient = mg.value_and_metagrad(training, lambda state, z: state.sum())(z)
    >>> gradient["rate"].value.shape
    (10,)
    """

    init: Any
    step: Callable[..., PyTree]
    batches: Batches
    args: PyTree = None
    allow_low_precision: bool = field(default=False, kw_only=True)
    programs: Programs = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_source(self.batches)
        if not callable(self.step):
            raise StructureError(
                f"step is {type(self.step).__name__}, expected a function (state, batch, z_t) -> state"
            )
        object.__setattr__(self, "args", arrays("args", self.args))
        object.__setattr__(self, "programs", programs_of(self.rule))

    @classmethod
    def from_loss(
        cls,
        loss: Callable[..., Any],
        optimizer: optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation],
        init: Any,
        batches: Batches,
        *,
        args: PyTree = None,
        microbatches: int = 1,
        examples: Sequence[str | int] | Callable[[PyTree], int] | None = None,
        has_model_state: bool = False,
        per_example: bool = False,
        allow_low_precision: bool = False,
    ) -> Self:
        """A run that steps an optax optimiser along a loss gradient; its state is a `TrainState`.

        Arguments:
            loss: `(params, batch, z_t) -> scalar`, the mean over the batch. With `has_model_state`:
                `(params, model_state, batch, z_t) -> (scalar, model_state)`. With `per_example`, a vector, one loss an
                example, in the scalar's place; the step's loss is their mean.
            optimizer: anything with optax's `init` and `update`, or `z_t -> one`, so that its settings can be
                metaparameters. An update that takes extra arguments is given `value`, the step's loss, and `grad`, its
                gradient; both are differentiated (`polyak_sgd`, `momo`). Its first state may depend on `Shared` leaves
                of z alone: `optax.inject_hyperparams` and `rprop` keep numbers there, and would go by those of step 0.
                Build it once, outside any function of a seed: a new object means a new compilation.
            init: params; with `has_model_state`, `(params, model_state)`; or `z -> either`.
            batches: as in `Training`.
            args: as in `Training`. Where given, the loss takes them last: `(params, batch, z_t, args)`,
                `(params, model_state, batch, z_t, args)`; init and optimizer don't.
            microbatches: m >= 1; the loss is called on m equal slices of the batch and results averaged (losses,
                gradients, floating model state). The numbers are those of m = 1 wherever the loss is a mean over
                examples; the memory is that of a slice. Leaves of the batch that hold no examples (class weights, a
                step's key) go whole to every slice: the same key to each.
            examples: which leaves of a batch hold examples along their first axis: names of its entries
                (`("x", "y")`), or `batch -> n` for all that are n long. None: those as long as `batch["index"]`;
                without one, all with an axis, which must be of one length. Read where micro-batches are cut.
            has_model_state: the loss carries batch-norm statistics, keys or counters.
            per_example: the loss returns one loss an example.
            allow_low_precision: as in `Training`.

        Errors: `StructureError` for parameters that are not floating, a batch that m doesn't divide, or an optimizer
            that asks for more (`lbfgs` and other line searches, `lookahead`, `sophia`).

        Cost: a step's adjoint is one gradient and one tangent of it, about three plain steps in matrix products.
        """
        if microbatches < 1:
            raise StructureError(f"microbatches must be at least 1, got {microbatches}")
        check_optimizer(optimizer)
        step = LossStep(
            loss, optimizer, microbatches, has_model_state, per_example, checked(examples), takes_args=args is not None
        )

        def start(z: PyTree) -> TrainState:
            given = started(init, bare(z))
            params, model_state = given, None
            if has_model_state:
                params, model_state = pair(given, "init must be (params, model_state)")
            params, model_state = arrays("params", params), arrays("model_state", model_state)
            check_parameters(params)
            first = None
            if not is_optimizer(optimizer):
                first = Given.of(z).seen(jnp.zeros((), jnp.int32), batches[0])
            return step.initial(params, model_state, first)

        fixed = not is_function(init) and is_optimizer(optimizer)
        return cls(
            start(None) if fixed else _Start(start), step, batches, args, allow_low_precision=allow_low_precision
        )

    def shown(self) -> dict[str, Any]:
        """Its steps, and what they take."""
        return {
            "init": self.init,
            "step": self.step,
            "batches": shown_batches(self.batches),
            **({} if self.args is None else {"args": self.args}),
        }

    @property
    def rule(self) -> Rule:
        """The step together with its adjoint."""
        return self.step if isinstance(self.step, LossStep) else WrittenStep(self.step, self.args is not None)

    @property
    def starts_from_z(self) -> bool:
        """Whether the initial state may depend on the metaparameters."""
        return is_function(self.init)

    def initial(self, z: PyTree) -> PyTree:
        """The state before the first step, with strongly typed leaves."""
        seen = z if isinstance(self.init, _Start) else bare(z)
        return arrays("state", started(self.init, seen, self.rule.calls))


@dataclass(frozen=True)
class _Start:
    """`init` of `Training.from_loss`, which takes z with its kinds: an optimiser may be made of its first slice."""

    function: Callable[[PyTree], TrainState]

    def __call__(self, z: PyTree) -> TrainState:
        return self.function(z)


def check_training(training: Any) -> None:
    """Raise `StructureError` for what is no `Training`."""
    if isinstance(training, Training):
        return
    raise StructureError(f"training is a {type(training).__name__}, not an mg.Training: {ORDER}")
