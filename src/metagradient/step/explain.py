"""What is wrong with a function of the user's, said at its first trace, in place of Python's words and JAX's."""

import dis
import inspect
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp

from metagradient._jax import Program, places
from metagradient.errors import DerivativeError, MetagradientError, StructureError
from metagradient.metaparameters import TRACED, Shared, is_kind
from metagradient.trees import PyTree

_READ = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
_UNKNOWN_SHAPE = "concrete values of integer type"
_UNDIFFERENTIABLE = re.compile(
    r"Reverse-mode differentiation does not work|callbacks do not support JVP"
    r"|forward-mode differentiation \(jvp\) to a custom_vjp"
)
_UNIMPLEMENTED = re.compile(r"[Dd]erivative|[Dd]ifferentia")
_RULE = re.compile(r"rule .*for '([\w-]+)'")
_LIBRARIES = (
    *("jax", "jaxlib", "opt_einsum", "optax", "chex", "equinox", "flax", "haiku", "numpy"),
    *("metagradient", "contextlib", "functools"),
)


@dataclass(frozen=True)
class Call:
    """A function of the user's.

    Arguments:
        name: what messages call it.
        function: itself.
        takes: names of its arguments.
    """

    name: str
    function: Callable[..., Any]
    takes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether it takes that many arguments, as far as it tells."""
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError):
            return True
        try:
            signature.bind(*self.takes)
        except TypeError:
            return False
        return True


@contextmanager
def explained(*calls: Call, program: Callable[[], Program] | None = None) -> Iterator[None]:
    """Say in metagradient's words what functions of the user's did wrong; any other error passes unchanged.

    Arguments:
        calls: functions that may be called. One after the first is at fault where an error passed through the module
            of its name in `step`.
        program: traces the first one undifferentiated, to find the place of what can't be.

    Errors: `StructureError` for a function of other arguments, or one that reads a value that is traced;
        `DerivativeError` for one that JAX can't differentiate.
    """
    try:
        yield
    except MetagradientError:
        raise
    except Exception as error:
        better = _in_words(error, calls, program)
        if better is None:
            raise
        raise better from error


def _in_words(
    error: Exception, calls: tuple[Call, ...], program: Callable[[], Program] | None
) -> MetagradientError | None:
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    call = next((c for c in calls[1:] if f"metagradient.step.{c.name}" in modules), calls[0])
    if isinstance(error, _READ) or (isinstance(error, TypeError) and _UNKNOWN_SHAPE in str(error)):
        return StructureError(
            f"the {call.name} reads the value of a traced array{_place(error)}, which float(), bool(), int(), .item(), "
            "if, range, np.asarray and shapes that depend on values do: values are only known once the compiled "
            f"program runs. Keep to jnp and lax in the {call.name} (jnp.where or lax.cond for if, lax.fori_loop for "
            "range, jnp.where(mask, x, 0) for x[mask])"
        )
    if isinstance(error, jax.errors.UnexpectedTracerError):
        return DerivativeError(f"the {call.name} holds what somebody around the run traces{_place(error)}. {TRACED}")
    if isinstance(error, AttributeError) and error.name == "value" and isinstance(error.obj, jax.Array):
        return StructureError(
            f"the {call.name} asks for .value{_place(error)}: functions of yours see bare arrays, whatever their kinds "
            "in z. Drop .value"
        )
    expression = _UNIMPLEMENTED if isinstance(error, NotImplementedError) else _UNDIFFERENTIABLE
    if expression.search(str(error)) and not _raised_by_user(error):
        return DerivativeError(
            f"JAX can't differentiate the {call.name}{_place(error) or _place_in(program, str(error))}: "
            f"{_line(error)} {_derivative_remedy(str(error))}"
        )
    if isinstance(error, TypeError) and not _place(error) and not call.fits:
        return StructureError(
            f"the {call.name} is called with ({', '.join(call.takes)}), and takes "
            f"{inspect.signature(call.function)}: {_line(error)}"
        )
    return None


def _derivative_remedy(message: str) -> str:
    if "lax.while_loop" in message:
        return (
            "Take lax.scan, lax.fori_loop with bounds that are Python numbers, or a loop with a rule of its own "
            "(equinox.internal.while_loop with kind='checkpointed')"
        )
    return (
        "Give that operation a rule of its own (jax.custom_vjp or jax.custom_jvp, itself differentiable), or "
        "lax.stop_gradient around all that it reads where no gradient is meant to pass"
    )


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") + "."


def _is_library(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES


def _place(error: Exception) -> str:
    """` at FILE:LINE (FUNCTION)`, the innermost in code that is neither ours nor a library's; empty where none is."""
    theirs = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if not _is_library(frame)]
    return " at {0.f_code.co_filename}:{1} ({0.f_code.co_name})".format(*theirs[-1]) if theirs else ""


def _raised_by_user(error: Exception) -> bool:
    """Whether a `raise` or `assert` of the user's own made an error: JAX takes its frames out of tracebacks."""
    last = error.__traceback__
    while last and last.tb_next:
        last = last.tb_next
    if last is None or _is_library(last.tb_frame):
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _place_in(program: Callable[[], Program] | None, message: str) -> str:
    """The same of the first equation that a message names, for what is raised once the function has returned."""
    found, named = [], _RULE.search(message)
    if program:
        with suppress(Exception):
            found = places(program(), named[1] if named else "while")
    return f" at {found[0]}" if found else ""


@contextmanager
def bare_arrays_explained(z: PyTree, batch: PyTree, steps: int) -> Iterator[None]:
    """Where shapes don't fit, name the bare arrays of z that may be meant per example, or per step.

    Arguments:
        z: in the structure that the user gave.
        batch: the first one.
        steps: T.

    Errors: `StructureError` in place of one about shapes that JAX raised, or of another `StructureError`, where its
        message has the length of such an array.
    """
    try:
        yield
    except (TypeError, ValueError, AssertionError) as error:
        known = isinstance(error, StructureError) or not isinstance(error, MetagradientError)
        remedy = None if _raised_by_user(error) or not known else _wrapping(z, batch, steps, str(error))
        if remedy is None:
            raise
        raise StructureError(f"{_line(error)} {remedy}") from error


def _wrapping(z: PyTree, batch: PyTree, steps: int, message: str) -> str | None:
    index = batch.get("index") if isinstance(batch, dict) else None
    examples = {len(x) for x in jax.tree.leaves(batch if index is None else index) if jnp.ndim(x)}
    for path, leaf in jax.tree.flatten_with_path(z, is_leaf=is_kind)[0]:
        if isinstance(leaf, Shared):
            leaf = leaf.value
        n = leaf.shape[0] if not is_kind(leaf) and jnp.ndim(leaf) else 1
        if n == 1 or n in examples or not re.search(rf"[(\[]{n}\b", message):
            continue
        per_step = "wrap it in mg.PerStep where each belongs to a step, or " if n == steps else ""
        return (
            f"z{jax.tree_util.keystr(path)} is a bare array of {n} entries, which every step sees whole: {per_step}"
            f'wrap it in mg.PerExample where each belongs to an example (batch["index"] finds its rows)'
        )
    return None


def value_of_loss(found: Any, per_example: bool) -> Any:
    """What a loss returned, once it is known to be floating, and a scalar or, with `per_example`, a vector."""
    if isinstance(found, tuple | list | dict) or found is None:
        name = "None" if found is None else f"a {type(found).__name__}"
        raise StructureError(
            f"loss returned {name}, expected its value alone. What evolves beside parameters goes "
            "with it under has_model_state=True, (params, model_state, batch, z_t) -> (value, model_state), "
            "init=(params, model_state); what is only looked at belongs in an objective"
        )
    shape, dtype = jnp.shape(found), jnp.result_type(found)
    if per_example != (len(shape) == 1):
        raise StructureError(
            f"loss returned shape {shape}, expected "
            + (
                "one loss an example, a vector (per_example=True)"
                if per_example
                else "a scalar (per_example=True takes one loss an example)"
            )
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise StructureError(f"loss returned {dtype}: a loss must be floating to have a gradient")
    return found


def pair(found: Any, what: str) -> tuple[Any, Any]:
    """Two values that belong together under `has_model_state`."""
    if not (isinstance(found, tuple | list) and len(found) == 2):
        name = "an array" if hasattr(found, "dtype") else f"a {type(found).__name__}"
        raise StructureError(f"has_model_state=True, but {what}, not {name}")
    return found[0], found[1]
