"""Anything with optax's `init` and `update` as an optimiser, and by name what can't be differentiated through."""

import inspect
import traceback
from collections.abc import Callable
from typing import Any

import jax
import optax

from metagradient.errors import StructureError
from metagradient.trees import PyTree, mismatch

_REMEDY = "give optax.adam(1e-3), say, or a function z_t -> optimiser"


def is_optimizer(value: Any) -> bool:
    """Whether `value` has optax's interface, and isn't a function that makes one."""
    return callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))


def check_optimizer(value: Any) -> None:
    """Raise `StructureError` for what is neither an optimiser nor a function of the user's that returns one."""
    if is_optimizer(value):
        return
    if not callable(value):
        raise StructureError(f"the optimizer is {value!r}: {_REMEDY}")
    if str(getattr(value, "__module__", "")).partition(".")[0] == "optax":
        name = getattr(value, "__name__", repr(value))
        raise StructureError(f"the optimizer is the function {name} itself, which wasn't called: {_REMEDY}")


def optimizer_of(made: Any, z: PyTree) -> optax.GradientTransformationExtraArgs:
    """The optimiser of a step: `made` itself, or what it makes of z.

    Errors: `StructureError` where it makes something else.
    """
    found = made if is_optimizer(made) else made(z)
    if not is_optimizer(found):
        raise StructureError(f"the optimizer returned {type(found).__name__} for z_t: {_REMEDY}")
    if isinstance(found, optax.GradientTransformation):
        return optax.with_extra_args_support(found)
    kinds = [p.kind for p in inspect.signature(found.update).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return optax.GradientTransformationExtraArgs(found.init, found.update)
    return optax.with_extra_args_support(optax.GradientTransformation(found.init, found.update))


def first_state(optimizer: optax.GradientTransformation, params: PyTree) -> PyTree:
    """The optimiser's first state; `StructureError` by name where it takes other parameters."""
    return _named(lambda: optimizer.init(params), optimizer.init)


def updated(
    optimizer: optax.GradientTransformationExtraArgs,
    params: PyTree,
    opt_state: PyTree,
    gradient: PyTree,
    value: jax.Array,
) -> tuple[PyTree, PyTree]:
    """New parameters and optimiser state.

    What optax calls extra arguments are `value`, the step's loss, and `grad`, its gradient. A line search asks for
    the loss as a function, and loops until it is low enough, which reverse mode can't go through: `StructureError`.
    """

    def update() -> tuple[PyTree, PyTree]:
        updates, new = optimizer.update(gradient, opt_state, params, value=value, grad=gradient, value_fn=_no_function)
        return optax.apply_updates(params, updates), new

    new, state = _named(update, optimizer.update)
    for what, before, after in (("parameters", params, new), ("optimiser state", opt_state, state)):
        if jax.tree.structure(before) != jax.tree.structure(after):
            raise StructureError(f"the optimizer made {what} of another kind: {mismatch(before, after)}")
    return new, state


def _no_function(*arguments: Any, **options: Any) -> Any:
    raise StructureError(
        "it asks for value_fn, the loss as a function: a line search loops until the loss is low enough, and reverse "
        "mode can't go through that. Take an optimiser with a learning rate"
    )


def _named(work: Callable[[], Any], function: Callable[..., Any]) -> Any:
    """What `work` returns; an error in it names the part of optax that raised it."""
    try:
        return work()
    except (TypeError, AttributeError, ValueError, KeyError, NotImplementedError) as error:
        if isinstance(error, jax.errors.JAXTypeError):
            raise
        raise StructureError(f"the optimizer {_culprit(error, function)} can't be used here: {error}") from error


def _culprit(error: BaseException, function: Callable[..., Any]) -> str:
    """The innermost transformation in optax that an error passed through, else the function that was called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [
        frame.f_code.co_qualname.partition(".<locals>")[0]
        for frame in frames
        if frame.f_globals.get("__name__", "").startswith("optax.") and ".<locals>" in frame.f_code.co_qualname
    ]
    names = [name for name in names if name not in ("chain", "with_extra_args_support", "named_chain")]
    return names[-1] if names else getattr(function, "__qualname__", repr(function)).partition(".<locals>")[0]
