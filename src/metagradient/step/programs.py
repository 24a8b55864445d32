"""Compiled programs of a step: they live as long as the objects that use them."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakValueDictionary

import jax
import numpy as np

from metagradient._jax import compiled
from metagradient.fingerprint import fingerprint, finite, finite_on_host, host_fingerprint
from metagradient.given import Given
from metagradient.layout import spread
from metagradient.step.rule import Rule
from metagradient.step.segment import Segment, advance_many, advance_one, pull_many, pull_one
from metagradient.trees import PyTree, zeros

T = TypeVar("T")

# Equal steps share their programs while somebody holds them. Entries go with the last holder.
_LIVE: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()


def shared(make: Callable[[Any], T], key: Any) -> T:
    """`make(key)`, or what it made before for an equal key, if anybody still holds that.

    A key that can't be hashed shares nothing.
    """
    try:
        found = _LIVE.get((make, key))
    except TypeError:
        return make(key)
    if found is None:
        found = _LIVE[make, key] = make(key)
    return found


def signature(*trees: PyTree) -> tuple[Hashable, ...]:
    """Structure, shapes and dtypes of trees of arrays, and how their types say that they are spread."""
    leaves, treedef = jax.tree.flatten(trees)
    return treedef, *((x.shape, x.dtype, spread(x)) for x in leaves)


class Form:
    """Programs of one form of a step, each compiled when it is first called.

    They are methods of nobody: a program that held this object would hold itself.
    """

    def __init__(self, rule: Rule):
        self.rule = rule

    @cached_property
    def advance_one(self) -> Any:
        """`(state, given, t, batch)`, see `segment.advance_one`."""
        rule = self.rule
        return compiled(lambda *arguments: advance_one(rule, *arguments))

    @cached_property
    def advance_many(self) -> Callable[..., Any]:
        """`(unroll, length, state, given, start, batches)`, see `segment.advance_many`."""
        rule = self.rule
        return compiled(lambda *arguments: advance_many(rule, *arguments), static_argnums=(0, 1))

    @cached_property
    def advance_company(self) -> Callable[..., Any]:
        """`(states, zs, given, t, batch)`: one step of several trainings, whose states, used up, and zs are stacked."""
        rule = self.rule

        def advance(states: PyTree, zs: PyTree, given: Given, t: jax.Array, batch: PyTree) -> PyTree:
            def one(state: PyTree, z: PyTree) -> PyTree:
                return advance_one(rule, state, replace(given, z=z), t, batch)[0]

            return jax.vmap(one)(states, zs)

        return compiled(advance, donate_argnums=0)

    @cached_property
    def pull_one(self) -> Any:
        """`(queries, total, cotangent, given, t, state, beside, batch)`, see `segment.pull_one`; `total` is used up."""
        rule = self.rule
        return compiled(lambda *arguments: pull_one(rule, *arguments), static_argnums=0, donate_argnums=1)

    @cached_property
    def pull_many(self) -> Callable[..., Any]:
        """`(unroll, queries, total, cotangent, given, start, kept)`, see `segment.pull_many`; `total` is used up."""
        rule = self.rule
        return compiled(lambda *arguments: pull_many(rule, *arguments), static_argnums=(0, 1), donate_argnums=2)


class Programs:
    """All programs of a step, and what was found out in making them.

    Arguments:
        rule: the step.

    Attributes:
        digests: of the step's program as it first was, by signature.
        segments: how steps are compiled, chosen once, by signature.
        plans: schedules that were made for a budget, by signature and budget.
        checked: what was already checked of each training: its batches and its step, and their derivatives.
    """

    def __init__(self, rule: Rule):
        self.rule = rule
        self.digests: dict[Hashable, str] = {}
        self.segments: dict[Hashable, Segment] = {}
        self.plans: dict[Hashable, Any] = {}
        self.checked: WeakKeyDictionary[Any, set[Hashable]] = WeakKeyDictionary()
        self._forms: dict[Hashable, Form] = {}

    def form(self, segment: Segment) -> Form:
        """The programs of one form of the step."""
        key = segment.keep, segment.unroll_microbatches
        if key not in self._forms:
            self._forms[key] = Form(self.rule.formed(*key))
        return self._forms[key]

    def stamp(self, batches: PyTree) -> Any:
        """Fingerprint of batches, where they are: no program for those in the host's memory."""
        if all(isinstance(x, np.ndarray) for x in jax.tree.leaves(batches)):
            return host_fingerprint(batches)
        return self._fingerprint(batches)[0]

    @cached_property
    def _fingerprint(self) -> Callable[[PyTree], tuple[jax.Array, jax.Array]]:
        return compiled(lambda tree: fingerprint(tree))

    def finite(self, tree: PyTree) -> list[bool]:
        """Which leaves are finite: by a program on their device, or by NumPy where that is the host's memory."""
        leaves = jax.tree.leaves(tree)
        if all(isinstance(x, np.ndarray) or {d.platform for d in x.devices()} == {"cpu"} for x in leaves):
            return [finite_on_host(x) for x in leaves]
        return self._finite(leaves).tolist()

    @cached_property
    def _finite(self) -> Callable[[PyTree], jax.Array]:
        return compiled(lambda tree: finite(tree))

    @cached_property
    def zeros(self) -> Callable[[PyTree], PyTree]:
        """Zeros like a tree."""
        return compiled(lambda tree: zeros(tree))


def hold(owner: object, programs: Programs) -> None:
    """Let an object hold programs, so that trainings of equal steps find them as long as it lives."""
    vars(owner)["_held_programs"] = programs


def programs_of(rule: Rule) -> Programs:
    """The programs of a step, shared with every other holder of an equal one."""
    return shared(Programs, rule)
