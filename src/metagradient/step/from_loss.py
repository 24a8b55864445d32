"""A loss and an optax optimiser make a step, and the step's fast adjoint."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from metagradient.errors import StructureError
from metagradient.metaparameters import PerExample, bare, is_kind, wrapped
from metagradient.step.adjoint import Loss, PullBack, gradient_pull_back, linearised_gradient
from metagradient.step.rule import Cotangent, Keep, Rule
from metagradient.step.trace import has_loops, trace
from metagradient.trees import PyTree, add, floating, is_floating, paths


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
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


@dataclass(frozen=True)
class LossStep:
    """The step of `Training.from_loss`. Its arguments are described there.

    Arguments:
        keep: "gradient" leaves each step's gradient to its adjoint, which then doesn't compute it again. With "state"
            the adjoint linearises it anew, and reads the gradient off that: free, unless there are loops
            (micro-batches, scanned layers), whose linearisation would keep all that they bound; then it is computed
            twice.
            "linearisation" leaves the whole linearised gradient (its activations), so that only a tangent is left to
            do; not for micro-batches.
        unroll: write micro-batches one after the other instead of as a loop.
    """

    loss: Callable[..., Any]
    optimizer: optax.GradientTransformation | Callable[[PyTree], optax.GradientTransformation]
    microbatches: int = 1
    has_model_state: bool = False
    per_example: bool = False
    keep: Keep = "state"
    unroll: bool = False

    def __call__(self, state: TrainState, batch: PyTree, z: PyTree) -> TrainState:
        """`(state, batch, z_t) -> state`, as a hand-written step; with micro-batches, `z_t` must be wrapped."""
        return self.advance(state, batch, wrapped(z))[0]

    @property
    def linearises(self) -> bool:
        """Micro-batches bound the memory of a step; linearisations would keep all of it."""
        return self.microbatches == 1

    def initial(self, params: PyTree, model_state: PyTree, z: PyTree) -> TrainState:
        """The state before the first step; `z` is the first step's slice."""
        for path, leaf in paths(params):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise StructureError(
                    f"parameter {path} is {leaf.dtype}; parameters must be floating (put the rest in model_state)"
                )
        return TrainState(params, self._optimizer(z).init(params), model_state, jnp.zeros((), jnp.int32))

    def advance(self, state: TrainState, batch: PyTree, z: PyTree) -> tuple[TrainState, PyTree]:
        """One optimiser step; leaves behind what `keep` says."""
        if self.keep == "linearisation":
            loss, statistics = self._floating_loss(state, batch)
            gradient, model_state, pull_back = linearised_gradient(loss, state.params, statistics, z)
            kept = gradient, pull_back
        else:
            gradient, model_state = self._gradient(state, batch, z)
            kept = gradient if self.keep == "gradient" else ()
        params, opt_state = self._update(state.params, state.opt_state, gradient, z)
        return TrainState(params, opt_state, model_state, state.step + 1), kept

    def advance_pushed(self, state: TrainState, batch: PyTree, z: PyTree, push: PyTree) -> TrainState:
        """One step whose loss gradient has `push` added to it, a tree like the parameters."""
        gradient, model_state = self._gradient(state, batch, z)
        params, opt_state = self._update(state.params, state.opt_state, add(gradient, push), z)
        return TrainState(params, opt_state, model_state, state.step + 1)

    def pull_back(
        self, state: TrainState, kept: PyTree, batch: PyTree, z: PyTree, cotangent: Cotangent
    ) -> tuple[Cotangent, PyTree]:
        """Two-stage adjoint: through the optimiser, then through the gradient, a micro-batch at a time."""
        gradient, through_gradient = self._found(state, kept, batch, z)
        moments, with_moments = floating(state.opt_state)
        n, m = len(jax.tree.leaves(state.params)), len(moments)
        ct_params = jax.tree.unflatten(jax.tree.structure(state.params), cotangent[:n])
        ct_moments, ct_statistics = cotangent[n : n + m], cotangent[n + m :]

        def update(params: PyTree, moments: tuple, gradient: PyTree, z: PyTree) -> tuple[PyTree, tuple]:
            params, opt_state = self._update(params, with_moments(moments), gradient, z)
            return params, floating(opt_state)[0]

        _, vjp = jax.vjp(update, state.params, moments, gradient, z)
        params_1, moments_, u, z_1 = vjp((ct_params, ct_moments))

        def one(batch: PyTree, z: PyTree) -> tuple[PyTree, tuple, PyTree]:
            loss, statistics = self._floating_loss(state, batch)
            pull_back = through_gradient or gradient_pull_back(loss, state.params, statistics, z)
            return pull_back(u, ct_statistics)

        params_2, statistics_, z_2 = self._over_microbatches(one, batch, z)
        total = add(params_1, params_2)
        return (*jax.tree.leaves(total), *moments_, *statistics_), add(z_1, z_2)

    def formed(self, keep: Keep, unroll: bool) -> Rule:
        """The same step in another form; `StructureError` where micro-batches rule it out."""
        if keep == "linearisation" and not self.linearises:
            raise StructureError("micro-batches bound the memory of a step, and linearisations would keep all of it")
        return replace(self, keep=keep, unroll=unroll)

    def choices(self, state: TrainState, batch: PyTree, z: PyTree) -> tuple[Keep, tuple[bool, ...]]:
        """A gradient is worth keeping where the adjoint would compute a second one."""
        if self.microbatches > 1:
            return "gradient", (False, True)
        return ("gradient" if self._loops(state, batch, z) else "state"), (False,)

    def _found(self, state: TrainState, kept: PyTree, batch: PyTree, z: PyTree) -> tuple[PyTree, PullBack | None]:
        """The step's gradient, and its pull-back where that comes with it."""
        if self.keep == "linearisation":
            return kept
        if self.keep == "gradient":
            return kept, None
        if self.microbatches > 1 or self._loops(state, batch, z):
            return self._gradient(state, batch, z)[0], None
        loss, statistics = self._floating_loss(state, batch)
        gradient, _, pull_back = linearised_gradient(loss, state.params, statistics, z)
        return gradient, pull_back

    def _loops(self, state: TrainState, batch: PyTree, z: PyTree) -> bool:
        return has_loops(trace(lambda s, b, z: self._loss(s.params, s.model_state, b, z), state, batch, z)[0])

    def _optimizer(self, z: PyTree) -> optax.GradientTransformation:
        if isinstance(self.optimizer, optax.GradientTransformation):
            return self.optimizer
        return self.optimizer(bare(z))

    def _update(self, params: PyTree, opt_state: PyTree, gradient: PyTree, z: PyTree) -> tuple[PyTree, PyTree]:
        updates, opt_state = self._optimizer(z).update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def _loss(self, params: PyTree, model_state: PyTree, batch: PyTree, z: PyTree) -> tuple[jax.Array, PyTree]:
        if self.has_model_state:
            value, model_state = self.loss(params, model_state, batch, bare(z))
        else:
            value = self.loss(params, batch, bare(z))
        if self.per_example != (jnp.ndim(value) == 1):
            raise StructureError(
                f"loss returned shape {jnp.shape(value)}, expected "
                + ("one loss an example, a vector (per_example=True)" if self.per_example else "a scalar")
            )
        return jnp.mean(value), model_state

    def _floating_loss(self, state: TrainState, batch: PyTree) -> tuple[Loss, tuple]:
        """The loss as a function of floating leaves alone, and the floating leaves of the model state."""
        statistics, with_statistics = floating(state.model_state)

        def loss(params: PyTree, statistics: tuple, z: PyTree) -> tuple[tuple[jax.Array, tuple], PyTree]:
            value, model_state = self._loss(params, with_statistics(statistics), batch, z)
            return (value, floating(model_state)[0]), model_state

        return loss, statistics

    def _gradient(self, state: TrainState, batch: PyTree, z: PyTree) -> tuple[PyTree, PyTree]:
        def one(batch: PyTree, z: PyTree) -> tuple[PyTree, PyTree]:
            return jax.grad(self._loss, has_aux=True)(state.params, state.model_state, batch, z)

        return self._over_microbatches(one, batch, z)

    def _over_microbatches(self, one: Callable[[PyTree, PyTree], Any], batch: PyTree, z: PyTree) -> Any:
        """Mean of `one(batch, z)` over equal slices; its `PerExample` leaves are joined instead of added.

        Leaves of the batch without an axis (a step's key or scale) go whole to every slice. What isn't floating in
        the result (counters, keys) is the same for every slice, and taken from the first.
        """
        m = self.microbatches
        if m == 1:
            return one(batch, z)
        shape, treedef = jax.tree.flatten(jax.eval_shape(lambda: one(_part(batch, m, 0), _part(z, m, 0))), _is_example)
        adds = [not _is_example(x) and is_floating(x) for x in shape]

        def body(total: list[jax.Array], j: Any) -> tuple[list[jax.Array], list[jax.Array]]:
            leaves = jax.tree.leaves(one(_part(batch, m, j), _part(z, m, j)), is_leaf=_is_example)
            summed = [x for x, a in zip(leaves, adds, strict=True) if a]
            rest = [x.value if _is_example(x) else x for x, a in zip(leaves, adds, strict=True) if not a]
            return [t + x for t, x in zip(total, summed, strict=True)], rest

        start = [jnp.zeros(x.shape, x.dtype) for x, a in zip(shape, adds, strict=True) if a]
        total, rest = lax.scan(body, start, jnp.arange(m), unroll=m if self.unroll else 1)
        summed, apart = iter(total), iter(rest)
        joined = [
            next(summed) / m if a else PerExample(_join(next(apart)) / m) if _is_example(x) else next(apart)[0]
            for x, a in zip(shape, adds, strict=True)
        ]
        return jax.tree.unflatten(treedef, joined)


def _is_example(x: Any) -> bool:
    return isinstance(x, PerExample)


def _join(x: jax.Array) -> jax.Array:
    return x.reshape(-1, *x.shape[2:])


def _part(tree: PyTree, m: int, j: Any) -> PyTree:
    """Slice `j` of `m` of a batch, or of a wrapped slice of z (of which only `PerExample` leaves are cut)."""

    def part(x: Any) -> Any:
        if _is_example(x):
            return PerExample(part(x.value))
        if is_kind(x) or x.ndim == 0:
            return x
        if x.shape[0] % m:
            raise StructureError(f"a batch leaf of {x.shape[0]} examples can't be cut into {m} equal micro-batches")
        return lax.dynamic_index_in_dim(x.reshape(m, x.shape[0] // m, *x.shape[1:]), j, keepdims=False)

    return jax.tree.map(part, tree, is_leaf=is_kind)
