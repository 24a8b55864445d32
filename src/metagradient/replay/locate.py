"""Where something not finite first appeared: the search behind the error, once a run has failed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metagradient.step.rule import Cotangent
from metagradient.step.runner import Runner
from metagradient.step.segment import Kept
from metagradient.trees import PyTree, floating_paths, is_floating, paths, zeros


def locate_in_segment(runner: Runner, i: int, state: PyTree) -> str:
    """Step through segment i, and say where a state first holds something not finite."""
    for t, batch in _single_steps(runner, i):
        new = runner.form.advance_one(state, runner.given, np.int32(t), batch)[0]
        bad = not_finite(runner, new)
        if bad:
            return (
                f"step {t} made {names(bad)} of the state non-finite (the state before it was finite). "
                f"{_divided(new) or _LOWER}"
            )
        state = new
    return f"the state became non-finite between steps {runner.steps(i).start} and {runner.steps(i).stop}"


def locate_in_adjoint(runner: Runner, i: int, kept: Kept, cotangent: Cotangent) -> str:
    """Step backwards through segment i, and say where a cotangent first holds something not finite."""
    loop = runner.segment.loop != "steps"
    queries = cotangent[0].shape[:1] if runner.queries else ()
    for t, batch in reversed(list(_single_steps(runner, i))):
        at = t - runner.steps(i).start
        take = (lambda tree, at=at: jax.tree.map(lambda x: x[at], tree)) if loop else (lambda seq, at=at: seq[at])
        state, beside = take(kept.states), take(kept.beside)
        total = zeros(runner.given.z, *queries)
        pulled = runner.form.pull_one(runner.queries, total, cotangent, runner.given, np.int32(t), state, beside, batch)
        cotangent, finite = pulled.cotangent, np.asarray(pulled.finite)
        if not np.all(finite):
            leaves = floating_paths(state)
            bad = [leaves[j] for j in np.flatnonzero(~finite)]
            after = runner.form.advance_one(state, runner.given, np.int32(t), batch)[0]
            return f"the adjoint of step {t} made the cotangent of {names(bad)} non-finite. {_remedy(after)}"
    return f"a cotangent became non-finite between steps {runner.steps(i).start} and {runner.steps(i).stop}"


_LOWER = "Lower the learning rate, clip gradients, or look for a log, root or division at zero in the loss"

# Of optimiser states by name: the root's argument, who holds it, and what keeps it from zero.
_ADAM = "nu", "Adam", "an eps_root (1e-8 or more; larger is smoother)"
_RMS = "nu", "rmsprop", "eps_in_sqrt=True and an eps of 1e-8 or more, or an initial_scale"
_SECOND_MOMENTS = {
    "ScaleByRmsState": _RMS,
    "ScaleByRStdDevState": _RMS,
    "ScaleByRssState": ("sum_of_squares", "adagrad", "an initial_accumulator_value and an eps, 1e-7 or more"),
}


@dataclass(frozen=True)
class _Zeros:
    """A second moment of the optimiser's that holds zeros: where, of which leaf, and what keeps it from them."""

    path: str
    leaf: str
    moment: jax.Array
    remedy: str


def _zeros(state: PyTree) -> Iterator[_Zeros]:
    def holds(node: Any) -> bool:
        return isinstance(node, tuple) and hasattr(node, _SECOND_MOMENTS.get(type(node).__name__, _ADAM)[0])

    for path, node in jax.tree.leaves_with_path(state, is_leaf=holds):
        if holds(node):
            attribute, name, remedy = _SECOND_MOMENTS.get(type(node).__name__, _ADAM)
            for leaf, x in paths(getattr(node, attribute)):
                if is_floating(x) and bool((x == 0).any()):
                    yield _Zeros(f"{jax.tree_util.keystr(path)}.{attribute}{leaf}", leaf, x, f"give {name} {remedy}")


def _divided(new: PyTree) -> str | None:
    """The remedy where entries of a state are not finite, and a second moment is zero at just those."""
    for zero in _zeros(new):
        for path, x in paths(new):
            like = path.endswith(zero.leaf) and x.shape == zero.moment.shape and is_floating(x)
            if like and bool((~jnp.isfinite(x) & (zero.moment == 0)).any()):
                return f"The optimiser's second moment {zero.path} holds zeros, and it divides by them: {zero.remedy}"
    return None


def _remedy(after: PyTree) -> str:
    zero = next(_zeros(after), None)
    if zero:
        return (
            f"The optimiser's second moment {zero.path} holds zeros, where the derivative of its root is infinite: "
            f"{zero.remedy}"
        )
    return (
        "The step is finite but its derivative isn't: look for a root, norm, log or division at zero in the loss or "
        "the optimiser; Adam needs eps_root > 0"
    )


def _single_steps(runner: Runner, i: int) -> Iterator[tuple[int, PyTree]]:
    return ((t, runner.feed[t]) for t in runner.steps(i))


def not_finite(runner: Runner, state: PyTree) -> list[str]:
    """Paths of the leaves of a state that are not finite."""
    return [path for (path, _), good in zip(paths(state), runner.programs.finite(state), strict=True) if not good]


def names(leaves: list[str]) -> str:
    """The first few of them, in words."""
    return ", ".join(leaves[:3]) + (f" and {len(leaves) - 3} more" if len(leaves) > 3 else "")
