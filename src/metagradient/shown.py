"""How objects show themselves: in a line, and as a table in notebooks, however large what they hold is."""

import dataclasses
from html import escape
from typing import Any

import jax
import numpy as np

from metagradient._jax import Tracer

_ENTRIES, _LETTERS, _SMALL = 6, 240, 6


class Words(str):
    """Text that is shown without quotes."""


class Shown:
    """A base of what has a `repr` of a few hundred letters, whatever it holds."""

    def shown(self) -> dict[str, Any]:
        """What is shown, by name; for a dataclass its fields."""
        assert dataclasses.is_dataclass(self)
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.repr}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={brief(x)}' for name, x in self.shown().items())})"

    def _repr_html_(self) -> str:
        if type(self).__str__ is not object.__str__:
            return f"<pre>{escape(str(self))}</pre>"
        left = "style='text-align: left'"
        rows = (
            f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(brief(x))}</td></tr>"
            for name, x in self.shown().items()
        )
        return f"<table><caption>{escape(type(self).__name__)}</caption>{''.join(rows)}</table>"


def brief(x: Any) -> str:
    """A value in some two hundred letters: arrays by dtype and shape, or in full where they are small."""
    text = _brief(x)
    return text if len(text) <= _LETTERS else f"{text[: _LETTERS - 1]}…"


def _brief(x: Any) -> str:
    if isinstance(x, float):
        return f"{x:.6g}"
    if isinstance(x, Words):
        return str(x)
    if x is None or isinstance(x, bool | int | str):
        return repr(x if not isinstance(x, str) or len(x) < _LETTERS else x[:_LETTERS])
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return _array(x)
    names = getattr(x, "_fields", None)
    if isinstance(x, tuple) and names is not None:
        pairs = zip(names, x, strict=True)
        return f"{type(x).__name__}({_joined((f'{name}={_brief(v)}' for name, v in pairs), len(x))})"
    if isinstance(x, dict):
        return f"{{{_joined((f'{k!r}: {_brief(v)}' for k, v in x.items()), len(x))}}}"
    if isinstance(x, list | tuple):
        inside = _joined(map(_brief, x), len(x))
        return f"[{inside}]" if isinstance(x, list) else f"({inside}{',' * (len(x) == 1)})"
    if callable(x) and hasattr(x, "__qualname__"):
        return x.__qualname__.replace("<locals>.", "")
    if dataclasses.is_dataclass(x) and not isinstance(x, Shown):
        names = [field.name for field in dataclasses.fields(x) if field.repr]
        return f"{type(x).__name__}({_joined((f'{name}={_brief(getattr(x, name))}' for name in names), len(names))})"
    plain = type(x).__repr__ is object.__repr__
    return type(x).__name__ if plain else repr(x)


def _array(x: Any) -> str:
    kind = f"{x.dtype}{list(x.shape)}"
    held = isinstance(x, np.ndarray) or (isinstance(x, jax.Array) and not isinstance(x, Tracer))
    if not held or x.size > _SMALL or x.dtype.kind not in "fiub" or not getattr(x, "is_fully_addressable", True):
        return kind
    values = np.array2string(np.asarray(x), precision=5, separator=", ").replace("\n", "")
    return values if not x.shape else f"{values} {x.dtype}"


def _joined(parts: Any, count: int = 0) -> str:
    first = []
    for part in parts:
        if len(first) == _ENTRIES:
            return f"{', '.join(first)}, … {count - _ENTRIES} more"
        first.append(part)
    return ", ".join(first)
