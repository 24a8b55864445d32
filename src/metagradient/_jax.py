"""Everything that reads JAX's internals, in one file: traced programs, their digests, compilation, precision.

Each function has a test in `tests/test_jax.py`, which runs on the oldest and the newest JAX.
"""

import hashlib
import inspect
import os
import re
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import compilation_cache as _cache
from jax._src import config
from jax.core import Tracer
from jax.extend import core
from jax.extend.source_info_util import summarize

from metagradient.errors import ConfigError

__all__ = ["Tracer"]

Program: TypeAlias = Any
"""What `trace` returns: a closed jaxpr. From jax 0.11 on it is of the same type as an open one."""

_COMPILE = "/jax/core/compile/backend_compile_duration"
_HALF = ("float16", "bfloat16", "float8", "float4")
_MATMUL = ("dot_general", "conv_general_dilated")
_LOOPS = ("scan", "while", "checkpoint", "remat2")
_DRAWN = "metagradient.drawn"
_DRAWS = [
    name
    for name, function in vars(jax.random).items()
    if inspect.isfunction(function) and {"key", "shape"} <= set(inspect.signature(function).parameters)
]
_NARROW = {np.dtype(f"{kind}64"): np.dtype(f"{kind}32") for kind in ("float", "int", "uint")}
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_JAX_FOLDER = os.path.dirname(jax.__file__)

# A rule that a user can give: a custom_vjp is one always; the others are where a user's function is in them.
_VJP = ("custom_vjp_call", "custom_vjp_call_jaxpr")
_JVP = ("custom_jvp_call", "custom_jvp_call_jaxpr")
_TRANSPOSES = ("linear_call", "custom_transpose_call", "custom_linear_solve")
# From jax 0.11 on: a primitive made of a class, with rules of its own.
_CLASS = "call_hi_primitive"
TRUE_DERIVATIVE = "metagradient.true_derivative"
"""Name scope that marks a call whose own rule is the derivative of its value."""


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """`jax.jit` of a function that nobody else holds, for a program called from Python.

    A function made for the caller is freed, and its programs with it, when the caller drops what is returned; so no
    user's function may be a static argument here.
    """
    return jax.jit(function, compiler_options=_compiler_options(jax.default_backend()), **options)


@cache
def _compiler_options(backend: str) -> dict[str, Any] | None:
    # XLA's fusions of elementwise operations and reductions into YNNPACK, new in jaxlib 0.10, compute wrongly what
    # vmapped norms are pulled back by: rows from the third on (0.10), or a step of every one of several trainings
    # (0.12, on processors with AVX-512 at least). Products by themselves are right, and up to a seventh faster with it.
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    return options if backend == "cpu" and takes(options) else None


def takes(options: dict[str, Any]) -> bool:
    """Whether this compiler has these options."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True


def compilation_cache(path: str | Path | None = None) -> Path:
    """Keep compiled programs on disk, so that the next process starts warm.

    It sets JAX's own persistent cache, for all programs of this process from now on, however quickly they compile. The
    commands call it.

    Arguments:
        path: a folder, made where absent; None takes `~/.cache/metagradient/compiled`.

    Returns: the folder.

    Errors: `ConfigError` where it can't be made.

    >>> import tempfile, metagradient as mg
    >>> mg.compilation_cache(tempfile.mkdtemp()).is_dir()
    True
    """
    folder = Path.home() / ".cache" / "metagradient" / "compiled" if path is None else Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} can't hold compiled programs: {error}") from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # JAX looks for a folder once, when it first compiles.
    _cache.reset_cache()
    return folder


class Compiling:
    """Seconds that XLA compiled, and programs."""

    seconds = 0.0
    programs = 0


@contextmanager
def compile_seconds() -> Iterator[Compiling]:
    """Count the seconds that XLA compiles, and the programs, while the context is open."""
    spent = Compiling()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE:
            spent.seconds += duration_secs
            spent.programs += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield spent
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def is_weak(x: jax.Array) -> bool:
    """Whether an array's dtype gives way to others, as that of a Python number does."""
    return bool(x.aval.weak_type)


def trace(function: Callable[..., Any], *arguments: Any) -> tuple[Program, Any]:
    """Trace `function` afresh, past every cache that is keyed on the function itself.

    Returns: the program, and the shapes and dtypes that it returns.
    """
    # jax 0.10 reads a float64 shape as float32 where x64 is off.
    arguments = jax.tree.map(
        lambda x: jax.typeof(x).update(dtype=x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x, arguments
    )
    return jax.make_jaxpr(lambda *xs: function(*xs), return_shape=True)(*arguments)


def _opened(program: Any) -> core.Jaxpr:
    return getattr(program, "jaxpr", program)


def _programs_in(value: Any) -> Iterator[core.Jaxpr]:
    if isinstance(value, (core.ClosedJaxpr, core.Jaxpr)):
        yield _opened(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _programs_in(item)


def equations(program: Program) -> Iterator[core.JaxprEqn]:
    """All equations of a program, those of its inner programs included."""
    for eqn in _opened(program).eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in _programs_in(value):
                yield from equations(inner)


def has_loops(program: Program) -> bool:
    """Whether the program holds loops or rematerialisation: what XLA can't merge with a copy of itself."""
    return any(e.primitive.name in _LOOPS for e in equations(program))


def convolves(program: Program) -> bool:
    """Whether the program holds a convolution."""
    return any(e.primitive.name == "conv_general_dilated" for e in equations(program))


def drawn_bits(program: Program) -> set[int]:
    """How many bits the random numbers of a program are made of: 64 for those of float64."""
    return {e.params["bit_width"] for e in equations(program) if e.primitive.name == "random_bits"}


def stopped_gradients(program: Program) -> list[str]:
    """Where the program stops gradients, as `file:line (function)`; those of JAX's own functions left out."""
    return _places(e for e in equations(program) if e.primitive.name == "stop_gradient")


def places(program: Program, primitive: str) -> list[str]:
    """Where the program has equations of a primitive, as `file:line (function)`."""
    return _places(e for e in equations(program) if e.primitive.name == primitive)


def through_stops(function: Callable[..., Any], places: Container[str] | None = None) -> Callable[..., Any]:
    """`function` of arrays with gradients going through where it stops them: everywhere, or at some places.

    What hides in a rule of a `custom_jvp` or `custom_vjp` stays as it is.
    """

    def opened(*arguments: Any) -> Any:
        program, shape = trace(function, *arguments)
        leaves = core.jaxpr_as_fun(_without_stops(program, places))(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return opened


def _without_stops(value: Any, places: Container[str] | None) -> Any:
    """An equation's parameter, with the stops in the programs that it holds taken out."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_without_stops(item, places) for item in value)
    if not isinstance(value, (core.ClosedJaxpr, core.Jaxpr)):
        return value
    eqns = []
    for eqn in _opened(value).eqns:
        stops = eqn.primitive.name == "stop_gradient" and (places is None or summarize(eqn.source_info) in places)
        params = {name: _without_stops(param, places) for name, param in eqn.params.items()}
        eqns.append(eqn.replace(primitive=core.primitives.copy_p if stops else eqn.primitive, params=params))
    inner = _opened(value).replace(eqns=eqns)
    return inner if _opened(value) is value else value.replace(jaxpr=inner)


def in_single(program: Program) -> list[str]:
    """Where a program of float64 values takes one of them to float32, as `file:line (function)`."""
    return _places(
        e
        for e in equations(program)
        if e.primitive.name == "convert_element_type"
        and _DRAWN not in str(e.source_info.name_stack)
        and getattr(e.invars[0].aval, "dtype", None) == jnp.float64
        and e.params["new_dtype"] == jnp.float32
    )


def own_rules(program: Program) -> list[str]:
    """Where the program holds a derivative rule that somebody wrote, and that isn't JAX's or marked as true.

    Any `custom_vjp`; a `custom_jvp`, linear solve or transpose whose function isn't defined in JAX; and `custom_root`,
    whose tangent solve is the user's.
    """
    return list(dict.fromkeys(_defined(e) for e in equations(program) if _has_own_rule(e)))


def _has_own_rule(eqn: core.JaxprEqn) -> bool:
    name = eqn.primitive.name
    if name not in (*_VJP, *_JVP, *_TRANSPOSES, _CLASS) or TRUE_DERIVATIVE in str(eqn.source_info.name_stack):
        return False
    if name in _VJP:
        return True
    if name == _CLASS:
        kind = type(eqn.params["_prim"])
        return not kind.__module__.startswith("jax.") or kind.__name__ == "CustomRoot"
    return any(not _is_jax(source) or source.startswith("_custom_root ") for source in _sources(eqn))


def _sources(eqn: core.JaxprEqn) -> list[str]:
    return [_source(function) for value in eqn.params.values() for function in _functions_in(value)]


def _defined(eqn: core.JaxprEqn) -> str:
    """Where the first function of somebody's own in an equation is defined; else where it is called."""
    return next((source for source in _sources(eqn) if source and not _is_jax(source)), summarize(eqn.source_info))


def _functions_in(value: Any) -> Iterator[Any]:
    """Everything in an equation's parameters that knows where it was defined."""
    if isinstance(value, (core.ClosedJaxpr, core.Jaxpr)):
        yield _opened(value)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _functions_in(item)
    elif callable(value) and hasattr(value, "debug_info"):
        yield value


def _source(function: Any) -> str:
    """`name at file:line` of what was traced."""
    return str(getattr(getattr(function, "debug_info", None), "func_src_info", None) or "")


def _is_jax(source: str) -> bool:
    return _JAX_FOLDER in source


def _places(eqns: Iterator[core.JaxprEqn]) -> list[str]:
    return list(dict.fromkeys(summarize(eqn.source_info) for eqn in eqns))


def reaching(program: Program) -> set[int]:
    """Positions of the inputs that some output may depend on, judged by which equations read them."""
    jaxpr = _opened(program)
    sources: dict[Any, set[int]] = {var: {i} for i, var in enumerate(jaxpr.invars)}

    def of(atom: Any) -> set[int]:
        return set() if isinstance(atom, core.Literal) else sources.get(atom, set())

    for eqn in jaxpr.eqns:
        read = set().union(*map(of, eqn.invars))
        if read:
            sources.update(dict.fromkeys(eqn.outvars, read))
    return set().union(*map(of, jaxpr.outvars))


def digest(program: Program, *, lasting: bool = False) -> str:
    """Digest of a program: equal for equal programs with equal constants.

    Arguments:
        lasting: equal in another process too, where every constant goes by its content.

    Cost: about 10 µs an equation, and the bytes of the constants that live in numpy, or of all.
    """
    sink = hashlib.blake2b(digest_size=16)

    def feed(value: Any) -> None:
        if isinstance(value, (core.ClosedJaxpr, core.Jaxpr)):
            written(_opened(value))
            feed(list(getattr(value, "consts", ())))
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

    def written(jaxpr: core.Jaxpr) -> None:
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

    feed(program)
    return sink.hexdigest()


def _is_key(value: jax.Array) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def lowered_precision(program: Program) -> str | None:
    """First place where a program computes below float32, in words; None where it doesn't."""
    for eqn in equations(program):
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


@contextmanager
def doubles_beside_single_draws(*, x64: bool = True) -> Iterator[None]:
    """Arrays are float64, while `jax.random` draws what it draws for float32: in float64 it takes other bits.

    Where `jax_enable_x64` is on anyway, all stays as it is.

    Arguments:
        x64: what is made without a dtype is float64 too; else it is float32, and arrays that are float64 stay so.
    """
    # The mode is part of what JAX caches programs by: none that is traced here is met outside.
    mode, allow = config.explicit_x64_dtypes, config.ExplicitX64Mode.ALLOW
    if jax.config.jax_enable_x64 or mode.value == allow:  # pyright: ignore[reportAttributeAccessIssue]
        yield
        return
    functions = {name: getattr(jax.random, name) for name in _DRAWS}

    def in_single(draw: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(draw)
        def drawn(*arguments: Any, **options: Any) -> Any:
            if mode.value != allow:
                return draw(*arguments, **options)
            leaves, treedef = jax.tree.flatten((arguments, options))
            with jax.named_scope(_DRAWN):
                narrowed = [_narrowed(x) for x in leaves]
            arguments, options = jax.tree.unflatten(treedef, narrowed)
            asked_wide = any(a is not b for a, b in zip(leaves, narrowed, strict=True))
            asked_single = any(isinstance(x, np.dtype | type) and np.dtype(x) == np.float32 for x in leaves)
            with jax.enable_x64(False):
                found = draw(*arguments, **options)
                wide = found.dtype == jnp.float32 and (asked_wide or (x64 and not asked_single))
                return found.astype(jnp.float64) if wide else found

        return drawn

    try:
        for name, function in functions.items():
            setattr(jax.random, name, in_single(function))
        with mode(allow), jax.enable_x64(x64):
            yield
    finally:
        for name, function in functions.items():
            setattr(jax.random, name, function)


def _narrowed(x: Any) -> Any:
    """An argument of a draw with 32 bits in the place of 64: an array, or a dtype itself."""
    if isinstance(x, jax.Array):
        return x.astype(_NARROW[x.dtype]) if x.dtype in _NARROW else x
    return _NARROW.get(np.dtype(x), x) if isinstance(x, np.dtype | type) else x
