"""What a traced step says about itself: whether it is the same program again, and at which precision it computes."""

import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.source_info_util import summarize

from metagradient.trees import PyTree

_HALF = ("float16", "bfloat16", "float8", "float4")
_MATMUL = ("dot_general", "conv_general_dilated")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def trace(function: Callable[..., Any], *arguments: Any) -> tuple[core.ClosedJaxpr, PyTree]:
    """Trace `function` afresh, past every cache that is keyed on the function itself.

    Returns: the program, and the shapes and dtypes that it returns.
    """
    return jax.make_jaxpr(lambda *xs: function(*xs), return_shape=True)(*arguments)


def _inner(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        yield value.jaxpr
    elif isinstance(value, core.Jaxpr):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _inner(item)


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """All equations of a program, those of its inner programs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in _inner(value):
                yield from equations(inner)


def has_loops(closed: core.ClosedJaxpr) -> bool:
    """Whether the program holds loops or rematerialisation: what XLA can't merge with a copy of itself."""
    return any(e.primitive.name in ("scan", "while", "checkpoint", "remat2") for e in equations(closed.jaxpr))


def digest(closed: core.ClosedJaxpr, *, lasting: bool = False) -> str:
    """Digest of a program: equal for equal programs with equal constants.

    Arguments:
        lasting: equal in another process too, where every constant goes by its content.

    Cost: about 10 µs an equation, and the bytes of the constants that live in numpy, or of all.
    """
    sink = hashlib.blake2b(digest_size=16)

    def feed(value: Any) -> None:
        if isinstance(value, core.ClosedJaxpr):
            feed(value.jaxpr)
            feed(value.consts)
        elif isinstance(value, core.Jaxpr):
            program(value)
        elif isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
            sink.update(b"(")
            for item in value:
                feed(item)
        elif isinstance(value, (np.ndarray, np.generic)):
            sink.update(f"{value.dtype}{value.shape}".encode())
            sink.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, jax.Array):
            # Immutable: small ones by content, for a constant that Python makes anew; large ones by identity.
            value = jax.random.key_data(value) if lasting and _is_key(value) else value
            feed(np.asarray(value) if lasting or (value.size <= 4096 and not _is_key(value)) else id(value))
        elif not callable(value):
            sink.update(_ADDRESS.sub("", repr(value)).encode())

    def program(jaxpr: core.Jaxpr) -> None:
        number: dict[Any, int] = {}

        def atom(x: Any) -> str:
            if isinstance(x, core.Literal):
                return f"{x.val!r}:{x.aval.str_short()}"
            return f"{number.setdefault(x, len(number))}:{x.aval.str_short()}"

        for x in (*jaxpr.constvars, *jaxpr.invars):
            sink.update(atom(x).encode())
        for eqn in jaxpr.eqns:
            sink.update(eqn.primitive.name.encode())
            sink.update(" ".join(map(atom, (*eqn.invars, *eqn.outvars))).encode())
            for name in sorted(eqn.params):
                sink.update(name.encode())
                feed(eqn.params[name])
        sink.update(" ".join(map(atom, jaxpr.outvars)).encode())

    feed(closed)
    return sink.hexdigest()


def _is_key(value: jax.Array) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def lowered_precision(closed: core.ClosedJaxpr) -> str | None:
    """First place where a program computes below float32, in words; None where it doesn't."""
    for eqn in equations(closed.jaxpr):
        where = f"`{eqn.primitive.name}` at {summarize(eqn.source_info)}"
        for var in eqn.outvars:
            dtype = str(getattr(var.aval, "dtype", ""))
            if dtype.startswith(_HALF):
                return f"{where} computes in {dtype}"
        if eqn.primitive.name in _MATMUL and _low(eqn):
            return f"{where} asks for precision {eqn.params['precision']}"
    return None


def _low(eqn: core.JaxprEqn) -> bool:
    dtype = eqn.params["preferred_element_type"] or jnp.float32
    if dtype == jnp.float64 or not jnp.issubdtype(dtype, jnp.floating):
        return False
    precision = eqn.params["precision"]
    if isinstance(precision, lax.DotAlgorithmPreset):
        return "F32_F32_F32" not in precision.name and "F64" not in precision.name
    both = precision if isinstance(precision, tuple) else (precision,)
    return any(p is not None and p is not lax.Precision.HIGHEST for p in both)
