"""Anything with optax's `init` and `update` as an optimiser, and by name what can't be differentiated through."""

import inspect
import re
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metagradient._jax import reaching, trace
from metagradient.errors import StructureError
from metagradient.metaparameters import PerExample, PerStep, bare, is_kind
from metagradient.trees import PyTree, is_floating, mismatch, paths

_REMEDY = "give optax.adam(1e-3), say, or a function z_t -> optimizer"
_BY_HAND = "Give another optimizer, or write the step by hand, mg.Training(init, step, batches), and call it there"
_SEARCH = (
    "It searches along a line until the loss is low enough, a loop that reverse mode can't go through. Give an "
    "optimizer with a learning rate"
)
_GIVEN = "value", "grad"
_MISSING = re.compile(r"missing \d+ required \S+ arguments?: (.+)$")
_INSIDE = re.compile(r"(\w+)\.<locals>\.")
_WRAPPERS = "chain", "named_chain", "with_extra_args_support"


def is_optimizer(value: Any) -> bool:
    """Whether `value` has optax's interface, and isn't a function or class that makes one."""
    if isinstance(value, type):
        return False
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def check_optimizer(value: Any) -> None:
    """Raise `StructureError` for what is neither an optimiser nor a function of the user's that returns one."""
    if is_optimizer(value):
        return
    if not callable(value):
        raise StructureError(f"the optimizer is {value!r}: {_REMEDY}")
    if isinstance(value, type) or str(getattr(value, "__module__", "")).partition(".")[0] == "optax":
        name = getattr(value, "__name__", repr(value))
        raise StructureError(f"the optimizer is {name} itself, which wasn't called: {_REMEDY}")


def optimizer_of(made: Any, z: PyTree) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a step: `made` itself, or what it makes of z. Its update takes any extra argument.

    Errors: `StructureError` where it makes something else.
    """
    found = made if is_optimizer(made) else made(z)
    if not is_optimizer(found):
        raise StructureError(f"the optimizer returned {type(found).__name__} for z_t: {_REMEDY}")
    # A GradientTransformation takes no extra arguments, by optax's own rule; any other says which by its signature.
    plain = isinstance(found, optax.GradientTransformation)
    if plain and not isinstance(found, optax.GradientTransformationExtraArgs):
        return optax.with_extra_args_support(found)
    takes = _extra_arguments(found.update)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> tuple[PyTree, PyTree]:
        return found.update(updates, state, params, **{k: v for k, v in extra.items() if takes is None or k in takes})

    return optax.GradientTransformationExtraArgs(found.init, update)


def first_state(made: Any, params: PyTree, z: PyTree) -> PyTree:
    """The optimiser's first state.

    Arguments:
        z: what the first step sees of z, wrapped.

    Errors: `StructureError` where the state depends on a leaf that is another at every step (`inject_hyperparams`
    keeps its numbers there): every step would go by the first one's. Also where the optimiser takes other parameters.
    """

    def start(z: PyTree) -> PyTree:
        optimizer = optimizer_of(made, bare(z))
        return _named(lambda: optimizer.init(params))

    kinds = jax.tree.flatten_with_path(z, is_leaf=is_kind)[0]
    if not is_optimizer(made) and any(isinstance(kind, PerStep | PerExample) for _, kind in kinds):
        reached = reaching(trace(start, z)[0])
        for i, (path, kind) in enumerate(kinds):
            if i in reached and isinstance(kind, PerStep | PerExample):
                leaf = f"z{jax.tree_util.keystr(path)}"
                raise StructureError(
                    f"the optimizer's first state depends on {leaf}, which is {type(kind).__name__}: every step would "
                    "go by what the first one saw of it. Let each update read it instead (as lambda z: "
                    f"optax.sgd({leaf}) does, without inject_hyperparams), or make it mg.Shared"
                )
    return jax.tree.map(_reachable, start(z))


def _reachable(x: Any) -> Any:
    """A scalar of a state, with the largest number for infinity: what `reduce_on_plateau` has as its best loss yet."""
    if not isinstance(x, jax.Array) or x.ndim or not is_floating(x):
        return x
    return jnp.clip(x, jnp.finfo(x.dtype).min, jnp.finfo(x.dtype).max)


def updated(
    optimizer: optax.GradientTransformationExtraArgs,
    params: PyTree,
    opt_state: PyTree,
    gradient: PyTree,
    value: jax.Array,
) -> tuple[PyTree, PyTree]:
    """New parameters and optimiser state.

    What optax calls extra arguments are `value`, the step's loss, and `grad`, its gradient.

    Errors: `StructureError` where the optimiser asks for another, or returns another kind of state or update.
    """

    def update() -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(gradient, opt_state, params, value=value, grad=gradient)
        for (path, p), u in zip(paths(params), jax.tree.leaves(updates), strict=False):
            if jnp.shape(u) not in ((), p.shape):
                raise StructureError(f"its update of parameter {path} has shape {list(u.shape)}, not {list(p.shape)}")
        return optax.apply_updates(params, updates), state

    new, state = _named(update)
    for what, before, after in (("parameters", params, new), ("optimizer state", opt_state, state)):
        if jax.tree.structure(before) != jax.tree.structure(after):
            raise StructureError(f"the optimizer made {what} of another kind: {mismatch(before, after)}")
    return new, state


def _extra_arguments(update: Callable[..., Any]) -> set[str] | None:
    """Which extra arguments an update takes, of those there are; None for any."""
    parameters = inspect.signature(update).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return {name for name in _GIVEN if name in parameters}


def _named(work: Callable[[], Any]) -> Any:
    """What `work` returns; an error in it names the part of the optimiser that raised it."""
    try:
        return work()
    except (TypeError, AttributeError, ValueError, KeyError, NotImplementedError) as error:
        if isinstance(error, jax.errors.JAXTypeError):
            raise
        raise StructureError(f"the optimizer{_culprit(error)} can't be used here: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    missing = _MISSING.search(str(error))
    if missing is None:
        return f"{str(error).rstrip('.')}. {_BY_HAND}"
    remedy = _SEARCH if "'value_fn'" in missing[1] else _BY_HAND
    return f"it asks for {missing[1]}, and a step gives value, its loss, and grad, its gradient. {remedy}"


def _culprit(error: Exception) -> str:
    """` NAME`, the innermost transformation of optax's that an error names or passed through; empty where none is."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    sources = [f.f_code.co_qualname for f in frames if f.f_globals.get("__name__", "").startswith("optax.")]
    names = [found[1] for source in (*sources, str(error)) if (found := _INSIDE.search(source))]
    names = [name for name in names if name not in _WRAPPERS]
    return f" {names[-1]}" if names else ""
