"""Updates of metaparameters, and projections.

A meta-step is `z <- project(z + update(metagradient))`. An update is an optax transformation, so that optax's own are
updates too (`optax.adam(0.1)`), and all of them chain; what it returns is added to z, which it may read. A projection
is a function `z -> z`. Both work on every leaf by itself, whatever its kind.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from optax import projections

from metagradient._jax import Tracer
from metagradient.errors import ConfigError, StructureError
from metagradient.metaparameters import PerExample, PerStep, is_kind
from metagradient.trees import PyTree, paths

Projection: TypeAlias = Callable[[PyTree], PyTree]


def normalise() -> optax.GradientTransformation:
    """Scale every leaf of a metagradient to unit root mean square; a leaf of zeros stays zero.

    Metagradients of different seeds can differ tenfold in size: this keeps one from drowning the others.
    """
    return optax.stateless(lambda g, _: jax.tree.map(unit_rms, g))


def unit_rms(x: jax.Array) -> jax.Array:
    """An array divided by its root mean square; zeros stay zeros. Squares neither overflow nor vanish."""
    largest = jnp.max(jnp.abs(x), initial=0)
    x = x / jnp.where(largest > 0, largest, 1)
    rms = jnp.sqrt(jnp.sum(x**2) / max(x.size, 1))
    return x / jnp.where(rms > 0, rms, 1)


def normalised(rate: optax.ScalarOrSchedule, momentum: float = 0.0) -> optax.GradientTransformation:
    r"""Descent with momentum, in moves of a given size.

    $$m \leftarrow \mu m + g / \mathrm{rms}(g), \qquad z \leftarrow z - \eta\, m / \mathrm{rms}(m)$$

    Arguments:
        rate: $\eta$, the root mean square of a meta-step's move, in units of z; or a schedule over meta-steps.
        momentum: $\mu$ in [0, 1).
    """
    return optax.chain(
        normalise(),
        optax.trace(momentum),
        normalise(),
        optax.scale_by_learning_rate(rate),
    )


def sign(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    r"""Descent by signs, $z \leftarrow z - \eta\, \mathrm{sign}(g)$: every entry moves as far, or not at all.

    Arguments:
        rate: $\eta$, in units of z; or a schedule over meta-steps.
    """
    return optax.sign_sgd(rate)


class BlockState(NamedTuple):
    """Memory of `block_coordinate`: the key of all draws to come."""

    key: jax.Array


def block_coordinate(p: float, seed: int = 0) -> optax.GradientTransformation:
    r"""Let a random part of z move: a block stays put unless $m \sim \mathrm{Bernoulli}(p)$ is 1.

    A block is an example of a `PerExample` leaf, a step of a `PerStep` leaf, an entry of any other; each meta-step
    draws anew. Chain it after what makes the moves: `optax.chain(normalised(0.1), block_coordinate(0.2))`.

    Arguments:
        p: in (0, 1].
        seed: of the draws; the key is part of the memory, so that a resumed descent goes on with the same draws.

    Errors: `ConfigError` for p outside (0, 1].
    """
    _require(0 < p <= 1, f"p must be in (0, 1], got {p}")

    def update(updates: PyTree, state: BlockState, params: PyTree = None) -> tuple[PyTree, BlockState]:
        del params
        key, drawn = jax.random.split(state.key)
        kinds, treedef = jax.tree.flatten(updates, is_leaf=is_kind)

        def masked(number: int, kind: Any) -> Any:
            blocked = isinstance(kind, (PerExample, PerStep))

            def mask(x: jax.Array) -> jax.Array:
                shape = (*x.shape[:1], *[1] * (x.ndim - 1)) if blocked else x.shape
                return jnp.where(jax.random.bernoulli(jax.random.fold_in(drawn, number), p, shape), x, 0)

            return jax.tree.map(mask, kind)

        return jax.tree.unflatten(treedef, [masked(i, kind) for i, kind in enumerate(kinds)]), BlockState(key)

    return optax.GradientTransformation(lambda _: BlockState(jax.random.key(seed)), update)  # pyright: ignore[reportArgumentType]


def counts(p: float, seed: int = 0) -> optax.GradientTransformation:
    r"""Data selection: counts of examples that move by one, or not at all.

    $$c \leftarrow \max(c - \mathrm{sign}(g) \odot m, 0), \qquad m_i \sim \mathrm{Bernoulli}(p)$$

    z holds how often each example is trained on: whole numbers from 0, in a floating array, and they stay whole.

    Arguments:
        p: in (0, 1].
        seed: of the draws; see `block_coordinate`.

    Errors: `ConfigError` for p outside (0, 1]; `StructureError` for counts that are negative or not whole.

    Source: arXiv 2503.13751, algorithm 1.
    """
    return optax.chain(
        _of_counts(),
        optax.scale_by_sign(),
        block_coordinate(p, seed),
        optax.scale(-1.0),
        optax.keep_params_nonnegative(),
    )


def exchange(n: int) -> optax.GradientTransformation:
    """Data selection at a fixed size: in every leaf, n examples gain a count, and n others lose one.

    The example with the i-th lowest metagradient gains what that with the i-th highest and c > 0 loses, for i up to n,
    as long as the one is lower than the other. So fewer move where fewer can, or where metagradients are equal. Of
    equal ones the lower number goes first. The total stays the same.

    z holds whole numbers from 0, in a floating array, and they stay whole.

    Arguments:
        n: at least 1.

    Errors: `ConfigError` for n below 1; `StructureError` for counts that are negative or not whole.

    Cost: two sorts of each leaf.

    Source: arXiv 2503.13751, appendix C.2.

    >>> c, g = jnp.asarray([1.0, 0.0, 2.0, 0.0]), jnp.asarray([0.1, -0.5, 0.7, 0.9])
    >>> update = exchange(1)
    >>> (c + update.update(g, update.init(c), c)[0]).tolist()
    [1.0, 1.0, 1.0, 0.0]
    """
    _require(n >= 1, f"n must be at least 1, got {n}")

    def change(g: jax.Array, c: jax.Array) -> jax.Array:
        flat, held = g.reshape(-1), c.reshape(-1) > 0
        gains = jnp.argsort(flat)[:n]
        loses = jnp.argsort(jnp.where(held, -flat, jnp.inf))[:n]
        moves = (held[loses] & (flat[gains] < flat[loses])).astype(c.dtype)
        return jnp.zeros(c.size, c.dtype).at[gains].add(moves).at[loses].add(-moves).reshape(c.shape)

    def update(updates: PyTree, state: optax.OptState, params: PyTree = None) -> tuple[PyTree, optax.OptState]:
        return jax.tree.map(change, updates, params), state

    return optax.GradientTransformation(_of_counts().init, update)


def pixel_ascent(
    rate: optax.ScalarOrSchedule,
    originals: PyTree,
    *,
    radius: float | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> optax.GradientTransformation:
    r"""Poisoning: ascent by signs on pixels, within `ball(originals, radius, low, high)`.

    It climbs by itself: `descend` is left to minimise, so that it climbs the objective, and its `best` is the lowest.

    Arguments:
        rate: of a meta-step, in units of a pixel; or a schedule over meta-steps.
        originals, radius, low, high: as in `ball`.

    Floating sums can leave the ball in their last digit; `descend`'s `project=ball(...)` is exact.
    """
    return optax.chain(optax.scale(-1.0), sign(rate), inside(ball(originals, radius, low=low, high=high)))


def inside(project: Projection) -> optax.GradientTransformation:
    """Shorten an update so that z stays in a set: its projection of z + update, less z. Last in a chain.

    For code that takes updates and no projection; `descend` has `project=`, which is exact where this one rounds.
    """

    def update(updates: PyTree, params: PyTree) -> PyTree:
        return jax.tree.map(jnp.subtract, project(optax.apply_updates(params, updates)), params)

    return optax.stateless(update)  # pyright: ignore[reportArgumentType]


def box(low: Any, high: Any) -> Projection:
    """Projection onto [low, high]: numbers, or arrays in the structure of z for bounds of its own for every entry."""

    def project(z: PyTree) -> PyTree:
        return projections.projection_box(z, *(jax.tree.broadcast(bound, z) for bound in (low, high)))

    return project


def ball(originals: PyTree, radius: float | None = None, *, low: float = 0.0, high: float = 1.0) -> Projection:
    """Projection of pixels to at most `radius` from the originals, and to [low, high].

    Arguments:
        originals: in the structure of z, kinds included; z holds pixels, not what is added to them.
        radius: at least 0, in units of a pixel; None leaves [low, high] alone.

    Errors: `ConfigError` for a negative radius.
    """
    if radius is None:
        return box(low, high)
    _require(radius >= 0, f"radius must be at least 0, got {radius}")
    return box(
        jax.tree.map(lambda x: jnp.maximum(x - radius, low), originals),
        jax.tree.map(lambda x: jnp.minimum(x + radius, high), originals),
    )


def simplex(total: float = 1.0) -> Projection:
    """Projection of every leaf onto the entries from 0 that sum to `total`, the nearest ones.

    Errors: `ConfigError` for a total that is not positive.
    """
    _require(total > 0, f"total must be positive, got {total}")
    return lambda z: jax.tree.map(lambda x: projections.projection_simplex(x, total), z)


def _of_counts() -> optax.GradientTransformation:
    """Leaves updates as they are; its `init` raises `StructureError` unless z holds counts."""

    def init(params: PyTree) -> optax.OptState:
        for path, leaf in paths(params):
            if not isinstance(leaf, Tracer) and not bool(jnp.all((leaf >= 0) & (leaf == jnp.round(leaf)))):
                raise StructureError(f"z{path} must hold counts: whole numbers from 0, in a floating array")
        return optax.EmptyState()

    return optax.GradientTransformation(init, optax.identity().update)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
