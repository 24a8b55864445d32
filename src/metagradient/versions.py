"""The releases that metagradient was tested with."""

import sys
from importlib.metadata import version

TESTED_JAX = ("0.10", "0.12")
"""Minor releases of JAX, the oldest first; `docs/versions.md` has what was run on each."""

TESTED_PYTHON = ("3.11", "3.12", "3.13")
"""Releases of CPython, the oldest first."""


def untested(jax: str | None = None) -> str | None:
    """A sentence that names a minor release of JAX which wasn't tested; None where it was.

    Arguments:
        jax: a version; None takes the installed one's.

    >>> untested("0.99.1")
    'jax 0.99.1 is none of the releases that metagradient was tested with (0.10, 0.12)'
    """
    return _untested("jax", jax or version("jax"), TESTED_JAX)


def untested_python(python: str | None = None) -> str | None:
    """As `untested`, of Python; None takes the running one's version."""
    return _untested("python", python or ".".join(map(str, sys.version_info[:3])), TESTED_PYTHON)


def _untested(name: str, number: str, tested: tuple[str, ...]) -> str | None:
    if ".".join(number.split(".")[:2]) in tested:
        return None
    return f"{name} {number} is none of the releases that metagradient was tested with ({', '.join(tested)})"
