"""What keeps a run of the tests short: programs that compile quickly, and cases that are slow."""

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import jax
import pytest
from jax._src import compiler

from metagradient import _jax

_PLAIN = compiler.get_compile_options
# On CPUs. Programs compile in a quarter of the time (jaxlib 0.12 has lost the option of emitters: in half of it). The
# older emitters make NaNs of the second derivative of a max pooling: tests of that compile `carefully`.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


MAPPINGS = Path("/proc/self/maps")


def mappings() -> int:
    """Memory mappings of this process, on Linux."""
    return MAPPINGS.read_bytes().count(b"\n")


@cache
def _options() -> dict[str, Any]:
    if jax.default_backend() != "cpu":
        return {}
    return {name: value for name, value in _QUICK.items() if _jax.takes({name: value})}


@contextmanager
def carefully() -> Iterator[None]:
    """All programs that are compiled here are compiled as users compile them, within `quickly` too."""
    set_before, compiler.get_compile_options = compiler.get_compile_options, _PLAIN
    try:
        yield
    finally:
        compiler.get_compile_options = set_before


def slow_but(always: Container[Any], cases: Iterable[Any]) -> list[Any]:
    """Cases as parameters: slow, but for those whose first value is in `always`."""
    each = (case if isinstance(case, tuple) else (case,) for case in cases)
    return [pytest.param(*case, marks=[] if case[0] in always else pytest.mark.slow) for case in each]


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """Parameters of every combination of `axes`.

    As many as the longest axis, in which every value of every axis is met, are always run; the others are slow.
    """
    always = {tuple(i % len(axis) for axis in axes) for i in range(max(map(len, axes)))}
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, at, strict=True)), marks=[] if at in always else pytest.mark.slow
        )
        for at in product(*(range(len(axis)) for axis in axes))
    ]


@contextmanager
def quickly() -> Iterator[None]:
    """All programs that are compiled here are compiled for a quick compilation, not for quick runs."""
    options = _options()

    def quick(*arguments: Any, env_options_overrides: dict[str, Any] | None = None, **more: Any) -> Any:
        return _PLAIN(*arguments, env_options_overrides={**options, **(env_options_overrides or {})}, **more)

    compiler.get_compile_options = quick
    try:
        yield
    finally:
        compiler.get_compile_options = _PLAIN
