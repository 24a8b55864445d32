"""How long XLA spends compiling."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

_COMPILE = "/jax/core/compile/backend_compile_duration"


class _Compiling:
    seconds = 0.0


@contextmanager
def compile_seconds() -> Iterator[_Compiling]:
    """Count the seconds that XLA compiles while the context is open."""
    spent = _Compiling()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE:
            spent.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield spent
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
