r"""LESS: choose instructions whose gradients point where the target's do, along a warm-up run.

$$\mathrm{score}(i) = \max_j \sum_e \bar\eta_e \cos(\nabla \ell(\mathrm{target}_j; \theta_e), \Gamma(x_i; \theta_e))$$

over the target's tasks j and the warm-up's epochs e, with $\bar\eta_e$ the mean learning rate of an epoch and $\Gamma$
the step that Adam would take on the example alone, from its moments at $\theta_e$.

Source: Xia, Malladi, Gururangan, Arora, Chen, "LESS: Selecting Influential Data for Targeted Instruction Tuning", ICML
2024, arXiv 2402.04333. What differs: gradients are projected by a count sketch (a random sign and a random one of
`dimension` places for each coordinate) in place of a dense random matrix, which keeps inner products on average too,
and needs no matrix; and with `lora_rank = 0` they are those of all parameters.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metagradient._jax import compiled
from metagradient._train import states
from metagradient.data.chat import Buckets, Encoded
from metagradient.step.segment import SINGLE_STEPS
from metagradient.tasks.finetuning import MULTIPLE, Tuner
from metagradient.training import TrainState
from metagradient.trees import PyTree

_AT_ONCE = 16


def warmed_up(tuner: Tuner, pool: Encoded, share: float, epochs: int, seed: int) -> list[tuple[TrainState, float]]:
    """A warm-up run on a random share of the pool: its state at the end of every epoch, and that epoch's mean rate.

    Cost: the steps of `epochs` epochs.
    """
    count = max(tuner.recipe.batch, round(share * len(pool)))
    rows = np.random.default_rng((seed, 7)).choice(len(pool), min(count, len(pool)), replace=False)
    an_epoch = len(rows) // tuner.recipe.batch
    recipe = replace(tuner.recipe, steps=epochs * an_epoch)
    warming = Tuner(recipe, tuner.model, tuner.start)
    training, rates = warming.training(pool, seed, rows=rows), recipe.rates().reshape(epochs, an_epoch).mean(1)
    on_the_way = states(training, {}, every=an_epoch, segment=SINGLE_STEPS)
    return [(state, float(rate)) for (_, state), rate in zip(on_the_way, rates, strict=True)]


def scores(
    tuner: Tuner,
    pool: Encoded,
    target: Encoded,
    tasks: Sequence[np.ndarray],
    warm: Sequence[tuple[TrainState, float]],
    *,
    dimension: int,
    seed: int,
) -> np.ndarray:
    """LESS's score of every candidate, float64[n], the higher the better.

    Arguments:
        pool, target: candidates, and conversations of the target.
        tasks: rows of the target that belong to each of its tasks.
        warm: from `warmed_up`.
        dimension: numbers that a gradient is projected to.
        seed: of the projection.

    Cost: a gradient of every candidate and target for every epoch; `dimension` numbers a candidate.
    """
    total = np.zeros((len(pool), len(tasks)))
    for state, rate in warm:
        plain = _projected(tuner, state, target, dimension, seed, by_adam=False)
        aims = _unit(np.stack([plain[rows].mean(0) for rows in tasks]))
        total += rate * (_unit(_projected(tuner, state, pool, dimension, seed, by_adam=True)) @ aims.T)
    return total.max(1)


def _projected(
    tuner: Tuner, state: TrainState, data: Encoded, dimension: int, seed: int, *, by_adam: bool
) -> np.ndarray:
    """Projected gradients of conversations, float32[n, dimension]; with `by_adam`, Adam's steps by each alone."""
    sizes = [leaf.size for leaf in jax.tree.leaves(state.params)]
    random = np.random.default_rng((seed, 8))
    places = jnp.asarray(random.integers(0, dimension, sum(sizes)), jnp.int32)
    signs = jnp.asarray(random.choice(np.array([-1, 1], np.float32), sum(sizes)))
    found = np.empty((len(data), dimension), np.float32)
    moments = _moments(state) if by_adam else None
    sketch = compiled(partial(_sketched, tuner), static_argnames="dimension")
    for batch in Buckets(data, _AT_ONCE, MULTIPLE):
        given = {name: batch[name] for name in ("tokens", "targets", "weights")}
        found[batch["index"]] = sketch(state.params, moments, given, tuner.args, places, signs, dimension=dimension)
    return found


def _moments(state: TrainState) -> tuple[PyTree, PyTree]:
    """Adam's first and second moments."""
    (adam,) = [s for s in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(s)]
    return adam.mu, adam.nu


def _is_adam(x: PyTree) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def _sketched(
    tuner: Tuner,
    params: PyTree,
    moments: tuple[PyTree, PyTree] | None,
    batch: PyTree,
    args: PyTree,
    places: jax.Array,
    signs: jax.Array,
    dimension: int,
) -> jax.Array:
    def one(example: PyTree) -> jax.Array:
        alone = jax.tree.map(lambda x: x[None], example)
        gradient = jax.grad(lambda p: tuner.losses(p, None, alone, args).sum())(params)
        if moments is not None:
            gradient = jax.tree.map(partial(_adam_step, tuner), gradient, *moments)
        flat = jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(gradient)])
        return jax.ops.segment_sum(flat * signs, places, dimension)

    return jax.vmap(one)(batch)


def _adam_step(tuner: Tuner, gradient: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
    r = tuner.recipe
    mean = r.first_decay * mean + (1 - r.first_decay) * gradient
    square = r.second_decay * square + (1 - r.second_decay) * gradient**2
    return mean / jnp.sqrt(square + r.eps_root)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
