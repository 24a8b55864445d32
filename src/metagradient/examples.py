"""Which leaves of a batch hold examples: one rule, for micro-batches and for means over a validation set."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import jax

from metagradient.errors import StructureError
from metagradient.trees import PyTree, paths

Examples: TypeAlias = tuple[str | int, ...] | Callable[[PyTree], int] | None
"""Names of the entries of a batch that hold examples; or `batch -> n`; or None, for the rule of `Axis`."""


def checked(examples: Any) -> Examples:
    """What the user gave as `examples=`, in a form that can be hashed; `StructureError` for what is neither form."""
    if examples is None:
        return None
    if callable(examples):
        return cast("Callable[[PyTree], int]", examples)
    if isinstance(examples, str):
        return (examples,)
    if isinstance(examples, Sequence) and examples and all(isinstance(name, str | int) for name in examples):
        return tuple(examples)
    raise StructureError(f"examples= takes names of a batch's entries, or a function batch -> n, not {examples!r}")


def holds_examples(batch: PyTree, examples: Examples) -> tuple[int, list[bool]]:
    """How many examples a batch has, and which of its leaves hold them along their first axis.

    Arguments:
        batch: pytree of arrays.
        examples: names of entries (`batch["x"]` is `"x"`, `batch[0]` is 0): all leaves with an axis below them;
            `batch -> n`: every leaf whose first axis is n long; None: n is the length of `batch["index"]`, or else the
            one first-axis length that all leaves with an axis share.

    Returns: n, and a truth value for each leaf, in order.

    Errors: `StructureError` where nothing says which leaves hold examples.
    """
    leaves = jax.tree.leaves_with_path(batch)
    if isinstance(examples, tuple):
        named = [_entry(path) in examples and leaf.ndim > 0 for path, leaf in leaves]
        missing = [name for name in examples if name not in {_entry(path) for path, _ in leaves}]
        if missing:
            raise StructureError(f"examples= names {missing[0]!r}, which is no entry of the batch: {_shapes(batch)}")
        lengths = {leaf.shape[0] for (_, leaf), holds in zip(leaves, named, strict=True) if holds}
        if len(lengths) != 1:
            raise StructureError(f"the entries {examples} hold no one number of examples: {_shapes(batch)}")
        return lengths.pop(), named
    if examples is not None:
        n = int(examples(batch))
        if not any(leaf.ndim and leaf.shape[0] == n for _, leaf in leaves):
            raise StructureError(f"examples= says {n}, but no leaf of the batch is {n} long: {_shapes(batch)}")
    elif isinstance(batch, dict) and getattr(batch.get("index"), "ndim", 0):
        n = batch["index"].shape[0]
    else:
        lengths = {leaf.shape[0] for _, leaf in leaves if leaf.ndim}
        if len(lengths) != 1:
            raise StructureError(
                "which leaves of the batch hold examples can't be told: their first axes differ, and there is no "
                f'"index" ({_shapes(batch)}). Name them: examples=("x", "y")'
            )
        n = lengths.pop()
    return n, [leaf.ndim > 0 and leaf.shape[0] == n for _, leaf in leaves]


def _entry(path: tuple[Any, ...]) -> str | int | None:
    """Name of the entry of the batch that a leaf lies in."""
    first = path[0] if path else None
    return next((getattr(first, name) for name in ("key", "name", "idx") if hasattr(first, name)), None)


def _shapes(batch: PyTree) -> str:
    return ", ".join(f"{path} {leaf.dtype}{list(leaf.shape)}" for path, leaf in paths(batch)) or "no leaves"
