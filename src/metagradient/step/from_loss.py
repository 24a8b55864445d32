"""A loss and an optax optimiser make a step, and the step's fast adjoint."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from metagradient._jax import reaching, trace
from metagradient.errors import DerivativeError, StructureError
from metagradient.examples import Examples, holds_examples
from metagradient.layout import nothing, placed, returned, shares, spread
from metagradient.metaparameters import PerExample, bare, is_kind, wrapped
from metagradient.shown import Shown
from metagradient.step.adjoint import (
    Loss,
    PullBack,
    asymmetry,
    gradient_pull_back,
    linearised_gradient,
    reversed_gradient,
)
from metagradient.step.explain import Call, pair, value_of_loss
from metagradient.step.optimizer import first_state, is_optimizer, optimizer_of, updated
from metagradient.step.rule import Adjoint, Choices, Cotangent, Keep, Rule, with_args
from metagradient.step.rules import Held
from metagradient.trees import PyTree, add, floating, is_floating, paths


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class TrainState(Shown):
    """Everything that evolves in a run built by `Training.from_loss`.

    Arguments:
        params: pytree of floating arrays.
        opt_state: the optimiser's state.
        model_state: batch-norm statistics, PRNG keys, counters; None where the loss has none.
        step: int32 scalar, the number of steps taken.
    """

    params: PyTree
    opt_state: PyTree
    model_state: PyTree
    step: jax.Array


@dataclass(frozen=True, repr=False)
class LossStep(Shown):
    """The step of `Training.from_loss`. Its arguments are described there.

    Arguments:
        keep: "gradient" leaves each step's gradient to its adjoint, which then doesn't compute it again. With "state"
            the adjoint linearises it anew, and reads the gradient off that: free, unless there are loops
            (micro-batches, scanned layers), whose linearisation would keep all that they bound; then it is computed
            twice.
            "linearisation" leaves the whole linearised gradient (its activations), so that only a tangent is left to
            do; not for micro-batches, nor for a loss with derivative rules of its own.
        unroll: write micro-batches one after the other instead of as a loop.
        takes_args: whether the loss takes the run's constants, last.
    """

    loss: Callable[..., Any]
    optimizer: Any
    microbatches: int = 1
    has_model_state: bool = False
    per_example: bool = False
    examples: Examples = None
    keep: Keep = "state"
    unroll: bool = False
    takes_args: bool = False

    def shown(self) -> dict[str, Any]:
        """What makes it."""
        return {"loss": self.loss, "optimizer": self.optimizer}

    def __call__(self, state: TrainState, batch: PyTree, z: PyTree, args: PyTree = None) -> TrainState:
        """`(state, batch, z_t, args) -> state`, as a hand-written step; with micro-batches, `z_t` must be wrapped."""
        return self.bound(args).advance(state, batch, wrapped(z))[0]

    def bound(self, args: PyTree) -> "LossStep":
        """The step whose loss takes no constants of the run."""
        if not self.takes_args:
            return self
        return replace(self, loss=with_args(self.loss, args), takes_args=False)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The loss, and what makes an optimiser of z."""
        takes = ("params", "model_state") if self.has_model_state else ("params",)
        made = () if is_optimizer(self.optimizer) else (Call("optimizer", self.optimizer, ("z_t",)),)
        return Call("loss", self.loss, (*takes, "batch", "z_t", *("args",) * self.takes_args)), *made

    def initial(self, params: PyTree, model_state: PyTree, z: PyTree) -> TrainState:
        """The state before the first step; `z` is the first step's slice, wrapped."""
        for path, leaf in paths(params):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise StructureError(
                    f"parameter {path} is {leaf.dtype}; parameters must be floating (put the rest in model_state)"
                )
        opt_state = first_state(self.optimizer, params, z)
        return TrainState(params, opt_state, model_state, jnp.zeros((), jnp.int32))

    def advance(self, state: TrainState, batch: PyTree, z: PyTree) -> tuple[TrainState, PyTree]:
        """One optimiser step; leaves behind what `keep` says."""
        return self._advanced(state, batch, z, None)

    def advance_pushed(self, state: TrainState, batch: PyTree, z: PyTree, push: PyTree) -> TrainState:
        """One step whose loss gradient has `push` added to it, a tree like the parameters."""
        return self._advanced(state, batch, z, push)[0]

    def _advanced(self, state: TrainState, batch: PyTree, z: PyTree, push: PyTree) -> tuple[TrainState, PyTree]:
        if self.keep == "linearisation":
            if self._held(state, batch, z).rules:
                raise StructureError(
                    "the loss holds a derivative rule of its own, so its gradient can't be kept linearised: keep "
                    '"state" or "gradient"'
                )
            loss, statistics = self._floating_loss(state, batch)
            gradient, value, model_state, pull_back = linearised_gradient(
                loss, state.params, statistics, z, value_read=self._value_read(state, z)
            )
            kept = gradient, self._worth_keeping(value, state, z), pull_back
        else:
            gradient, value, model_state = self._gradient(state, batch, z)
            kept = (gradient, self._worth_keeping(value, state, z)) if self.keep == "gradient" else ()
        gradient = gradient if push is None else add(gradient, push)
        params, opt_state = self._update(state.params, state.opt_state, gradient, value, z)
        return TrainState(params, opt_state, model_state, state.step + 1), kept

    def _worth_keeping(self, value: jax.Array, state: TrainState, z: PyTree) -> jax.Array | None:
        """The loss, where the optimiser reads it: computing it for nobody costs a chunked loss a product."""
        return value if self._value_read(state, z) else None

    def pull_back(self, state: TrainState, kept: PyTree, batch: PyTree, z: PyTree) -> Adjoint:
        """Two-stage adjoint: through the optimiser, then through the gradient, a micro-batch at a time."""
        held, value_read = self._held(state, batch, z), self._value_read(state, z)
        gradient, value, through_gradient = self._found(state, kept, batch, z, held, value_read)
        value = jnp.zeros((), jnp.result_type(*jax.tree.leaves(state.params))) if value is None else value
        moments, with_moments = floating(state.opt_state)

        def update(
            params: PyTree, moments: tuple, gradient: PyTree, value: jax.Array, z: PyTree
        ) -> tuple[PyTree, tuple]:
            params, opt_state = self._update(params, with_moments(moments), gradient, value, z)
            return params, floating(opt_state)[0]

        _, vjp = jax.vjp(update, state.params, moments, gradient, value, z)
        n, m = len(jax.tree.leaves(state.params)), len(moments)

        def adjoint(cotangent: Cotangent) -> tuple[Cotangent, PyTree, jax.Array]:
            ct_params = jax.tree.unflatten(jax.tree.structure(state.params), cotangent[:n])
            ct_moments, ct_statistics = cotangent[n : n + m], cotangent[n + m :]
            params_1, moments_, u, w, z_1 = vjp((ct_params, ct_moments))
            w = w if value_read else None

            def one(batch: PyTree, z: PyTree) -> tuple[tuple[PyTree, tuple, PyTree], jax.Array]:
                if through_gradient:
                    return through_gradient(u, ct_statistics, w), jnp.zeros(())
                loss, statistics = self._floating_loss(state, batch)
                pull_back, probe = self._through(loss, state, statistics, z, held)
                return pull_back(u, ct_statistics, w), probe(u)

            (params_2, statistics_, z_2), asymmetric = self._over_microbatches(one, batch, z)
            total = add(params_1, params_2)
            return (*jax.tree.leaves(total), *moments_, *statistics_), add(z_1, z_2), asymmetric

        return adjoint

    def formed(self, keep: Keep, unroll: bool) -> Rule:
        """The same step in another form; `StructureError` where micro-batches rule it out."""
        if keep == "linearisation" and self.microbatches > 1:
            raise StructureError("micro-batches bound the memory of a step, and linearisations would keep all of it")
        return replace(self, keep=keep, unroll=unroll)

    def choices(self, state: TrainState, batch: PyTree, z: PyTree) -> Choices:
        """A gradient is worth keeping where the adjoint would compute a second one."""
        held = self._held(state, batch, z)
        if self.microbatches > 1:
            return Choices("gradient", (False, True), convolves=held.convolves)
        if held.rules:
            return Choices(convolves=held.convolves)
        return Choices("gradient" if held.loops else "state", linearises=True, convolves=held.convolves)

    def _found(
        self, state: TrainState, kept: PyTree, batch: PyTree, z: PyTree, held: Held, value_read: bool
    ) -> tuple[PyTree, jax.Array | None, PullBack | None]:
        """The step's gradient, its loss where that is read, and their pull-back where that comes with them."""
        if self.keep == "linearisation":
            return kept
        if self.keep == "gradient":
            return *kept, None
        loss, statistics = self._floating_loss(state, batch)
        arguments = loss, state.params, statistics, z
        if self.microbatches == 1 and held.rules and self._reverses(*arguments):
            gradient, value, _, pull_back = reversed_gradient(*arguments)
            return gradient, value, pull_back
        if self.microbatches > 1 or held.rules or held.loops:
            return *self._gradient(state, batch, z)[:2], None
        gradient, value, _, pull_back = linearised_gradient(*arguments, value_read=value_read)
        return gradient, value, pull_back

    def _through(
        self, loss: Loss, state: TrainState, statistics: tuple, z: PyTree, held: Held
    ) -> tuple[PullBack, Callable[[PyTree], jax.Array]]:
        """The pull-back of a loss gradient, and what finds its asymmetry, where that isn't ruled out."""
        arguments = loss, state.params, statistics, z
        if not held.rules:
            return gradient_pull_back(*arguments), lambda u: jnp.zeros(())
        if self._reverses(*arguments):
            return reversed_gradient(*arguments)[-1], lambda u: jnp.zeros(())
        key = jax.random.fold_in(jax.random.key(0), state.step)
        return gradient_pull_back(*arguments), lambda u: asymmetry(*arguments, u, key)

    @staticmethod
    def _reverses(loss: Loss, params: PyTree, statistics: tuple, z: PyTree) -> bool:
        """Whether the gradient of a loss with rules of its own can be differentiated in reverse.

        Bounded while loops whose own rule replays them can't be, but forwards they can.
        """

        def both() -> PyTree:
            gradient, value, _, pull_back = reversed_gradient(loss, params, statistics, z)
            return pull_back(gradient, statistics, value)

        try:
            jax.eval_shape(both)
        except Exception:

            def forwards() -> PyTree:
                return gradient_pull_back(loss, params, statistics, z)(params, statistics, None)

            try:
                jax.eval_shape(forwards)
            except Exception as error:
                raise DerivativeError(
                    f"the gradient of the loss can't be differentiated: {error}. A rule of its own in the loss "
                    "(jax.custom_vjp, jax.custom_jvp) must be differentiable itself"
                ) from error
            return False
        return True

    def _held(self, state: TrainState, batch: PyTree, z: PyTree) -> Held:
        """What one call of the loss holds."""
        return Held.of(trace(self.value, state, batch, z)[0])

    def value(self, state: TrainState, batch: PyTree, z: PyTree) -> PyTree:
        """The loss and the new model state, of the first micro-batch."""
        batch, z = (batch, z) if self.microbatches == 1 else self._parts(batch, z)(0)
        return self._loss(state.params, state.model_state, batch, z)

    def check_adjoint(self, state: TrainState, batch: PyTree, z: PyTree) -> None:
        """A gradient that could be traced can be differentiated, unless rules of the loss's own can't."""
        held = self._held(state, batch, z)
        if held.rules:
            batch, z = (batch, z) if self.microbatches == 1 else self._parts(batch, z)(0)
            loss, statistics = self._floating_loss(state, batch)
            self._reverses(loss, state.params, statistics, z)

    def _value_read(self, state: TrainState, z: PyTree) -> bool:
        """Whether the optimiser reads the loss itself."""

        def update(value: jax.Array, state: TrainState, z: PyTree) -> PyTree:
            return self._update(state.params, state.opt_state, state.params, value, z)

        value = jnp.zeros((), jnp.result_type(*jax.tree.leaves(state.params)))
        return 0 in reaching(trace(update, value, state, z)[0])

    def _optimizer(self, z: PyTree) -> optax.GradientTransformationExtraArgs:
        return optimizer_of(self.optimizer, bare(z))

    def _update(
        self, params: PyTree, opt_state: PyTree, gradient: PyTree, value: jax.Array, z: PyTree
    ) -> tuple[PyTree, PyTree]:
        return updated(self._optimizer(z), params, opt_state, gradient, value)

    def _loss(self, params: PyTree, model_state: PyTree, batch: PyTree, z: PyTree) -> tuple[jax.Array, PyTree]:
        if self.has_model_state:
            found = self.loss(params, model_state, batch, bare(z))
            value, model_state = pair(found, "the loss must return (value, model_state)")
        else:
            value = self.loss(params, batch, bare(z))
        return jnp.mean(value_of_loss(value, self.per_example)), model_state

    def _floating_loss(self, state: TrainState, batch: PyTree) -> tuple[Loss, tuple]:
        """The loss as a function of floating leaves alone, and the floating leaves of the model state."""
        statistics, with_statistics = floating(state.model_state)

        def loss(params: PyTree, statistics: tuple, z: PyTree) -> tuple[tuple[jax.Array, tuple], PyTree]:
            value, model_state = self._loss(params, with_statistics(statistics), batch, z)
            return (value, floating(model_state)[0]), model_state

        return loss, statistics

    def _gradient(self, state: TrainState, batch: PyTree, z: PyTree) -> tuple[PyTree, jax.Array, PyTree]:
        """Gradient, loss and new model state."""

        def one(batch: PyTree, z: PyTree) -> tuple[PyTree, jax.Array, PyTree]:
            (value, model_state), gradient = jax.value_and_grad(self._loss, has_aux=True)(
                state.params, state.model_state, batch, z
            )
            return gradient, value, model_state

        return self._over_microbatches(one, batch, z)

    def _over_microbatches(self, one: Callable[[PyTree, PyTree], Any], batch: PyTree, z: PyTree) -> Any:
        """Mean of `one(batch, z)` over equal slices; its `PerExample` leaves are joined instead of added.

        What isn't floating in the result (counters, keys) is the same for every slice, and taken from the first.
        """
        m = self.microbatches
        if m == 1:
            return one(batch, z)
        parts = self._parts(batch, z)
        shape, treedef = jax.tree.flatten(returned(lambda: one(*parts(0))), _is_example)
        adds = [not _is_example(x) and is_floating(x) for x in shape]

        def body(total: list[jax.Array], j: Any) -> tuple[list[jax.Array], list[jax.Array]]:
            leaves = jax.tree.leaves(one(*parts(j)), is_leaf=_is_example)
            summed = [x for x, a in zip(leaves, adds, strict=True) if a]
            rest = [x.value if _is_example(x) else x for x, a in zip(leaves, adds, strict=True) if not a]
            return [t + x for t, x in zip(total, summed, strict=True)], rest

        start = [nothing(x) for x, a in zip(shape, adds, strict=True) if a]
        total, rest = lax.scan(body, start, jnp.arange(m), unroll=m if self.unroll else 1)
        summed, apart = iter(total), iter(rest)
        joined = [
            next(summed) / m if a else PerExample(_join(next(apart)) / m) if _is_example(x) else next(apart)[0]
            for x, a in zip(shape, adds, strict=True)
        ]
        return jax.tree.unflatten(treedef, joined)

    def _parts(self, batch: PyTree, z: PyTree) -> Callable[[Any], tuple[PyTree, PyTree]]:
        """Micro-batch j, and what it sees of z: leaves that hold examples are cut, all others go whole to each."""
        m = self.microbatches
        n, holds = holds_examples(batch, self.examples)
        if n % m:
            raise StructureError(f"a batch of {n} examples can't be cut into {m} equal micro-batches")
        leaves, treedef = jax.tree.flatten(batch)

        def part(x: jax.Array, j: Any) -> jax.Array:
            over = spread(x)
            if n // m % shares(over[0]):
                raise StructureError(
                    f"micro-batches of {n // m} examples can't be spread over {over[0]!r} as their batch is, into "
                    f"{shares(over[0])} equal parts: take fewer micro-batches"
                )
            parts = placed(lambda x: jnp.reshape(x, (m, n // m, *x.shape[1:])), (None, *over), x)
            return lax.dynamic_index_in_dim(parts, j, keepdims=False)

        def cut(j: Any) -> tuple[PyTree, PyTree]:
            parts = [part(x, j) if held else x for x, held in zip(leaves, holds, strict=True)]
            seen = jax.tree.map(lambda k: PerExample(part(k.value, j)) if _is_example(k) else k, z, is_leaf=is_kind)
            return jax.tree.unflatten(treedef, parts), seen

        return cut


def _is_example(x: Any) -> bool:
    return isinstance(x, PerExample)


def _join(x: jax.Array) -> jax.Array:
    return placed(lambda x: x.reshape(-1, *x.shape[2:]), spread(x)[1:], x)
