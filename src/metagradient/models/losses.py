"""Cross-entropy over a large vocabulary, without all of its logits, in the gradient and in the gradient's adjoint."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from metagradient.step.rules import true_derivative

_SLICE = 1024


def chunked_cross_entropy(
    hidden: Array, matrix: Array, targets: Array, weights: Array | None = None, *, chunk: int = 64
) -> Array:
    r"""Weighted cross-entropy of every token, `chunk` rows of logits at a time.

    Token `i` costs $w_i (\log \sum_v e^{h_i \cdot E_v} - h_i \cdot E_{y_i})$. The backward rule is our own: it
    rebuilds the logits of one chunk, and adds to the gradient of `matrix` in place, one slice of the vocabulary at a
    time. It is ordinary JAX code, so `jax.jvp` of `jax.grad` (the adjoint of a training step) carries the same chunks
    with their tangents, and `jax.linearize` of the gradient keeps no logits. Reverse over reverse is right too, but
    not as small.

    Arguments:
        hidden: `[N, d]`, float.
        matrix: `[V, d]`, float: the unembedding, one row a token of the vocabulary.
        targets: `[N]`, integer in `[0, V)`. Elsewhere (the -100 of padding) no target logit is subtracted: give such
            tokens weight 0.
        weights: `[N]`, float; ones if None. Differentiable, once and twice, like `hidden` and `matrix`.
        chunk: tokens whose logits are alive at once; more is a little faster.

    Returns: `[N]`, the weighted losses.

    Cost: 3 products of `N·V·d` for a gradient, 7 for its adjoint, as many as with all logits kept (one more, or three,
    where the losses themselves are read too). Memory beyond arguments and results: 2 chunks of logits, `2·chunk·V`
    numbers, in a gradient and 3 in its adjoint, whatever `N` and `d`.

    Raises: TypeError under `jax.jvp` or `jax.jacfwd` of the loss itself (of its gradient, they work).
    """
    count, width = hidden.shape
    weights = jnp.ones(count, hidden.dtype) if weights is None else weights
    chunk = min(chunk, count)
    padding = -count % chunk

    def chunks(array: Array) -> Array:
        padded = jnp.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(-1, chunk, *array.shape[1:])

    vocabulary = matrix.reshape(_slices(matrix.shape[0]), -1, width)
    return _losses(chunks(hidden), vocabulary, chunks(targets), chunks(weights)).reshape(-1)[:count]


def _slices(size: int) -> int:
    """The least number of equal slices of at most `_SLICE` rows; 1 where `size` has no divisor near that."""
    return next((count for count in range(-(-size // _SLICE), size // 64 + 1) if size % count == 0), 1)


def _chunk_losses(hidden: Array, matrix: Array, targets: Array) -> tuple[Array, Array, Array, Array]:
    """Logits and where they are a target's, `[slices, chunk, V / slices]`; normalisers and losses, `[chunk]`."""
    slices, rows, _ = matrix.shape
    # One product a slice: a product over the whole vocabulary would need a buffer for either half of its tangent.
    logits = lax.map(lambda part: hidden @ part.T, matrix)
    is_target = jnp.arange(slices * rows).reshape(slices, 1, rows) == targets[:, None]
    normalisers = jax.nn.logsumexp(logits, (0, 2))
    return logits, is_target, normalisers, normalisers - jnp.sum(jnp.where(is_target, logits, 0), (0, 2))


def _evaluate(hidden: Array, matrix: Array, targets: Array, weights: Array) -> Array:
    """Losses `[chunks, chunk]` of `[chunks, chunk, d]` against `[slices, V / slices, d]`."""
    return lax.map(lambda of: of[2] * _chunk_losses(of[0], matrix, of[1])[-1], (hidden, targets, weights))


def _forward(hidden: Array, matrix: Array, targets: Array, weights: Array):
    # Not `_losses` itself: an adjoint pushes tangents through this, which a `custom_vjp` function refuses.
    return _evaluate(hidden, matrix, targets, weights), (hidden, matrix, targets, weights)


def _backward(saved: tuple[Array, Array, Array, Array], cotangents: Array):
    hidden, matrix, targets, weights = saved

    # The checkpoint is for callers who keep the linearisation of this gradient: they keep the chunk's inputs alone.
    @jax.checkpoint
    def pull_back(matrix_cotangent, of):
        hidden, targets, weights, cotangents = of
        logits, is_target, normalisers, losses = _chunk_losses(hidden, matrix, targets)
        logits_cotangent = (weights * cotangents)[:, None] * (jnp.exp(logits - normalisers[:, None]) - is_target)

        def through_slice(index, cotangent):
            of_hidden, of_matrix = cotangent
            part = logits_cotangent[index]
            return of_hidden + part @ matrix[index], of_matrix.at[index].add(part.T @ hidden)

        start = jnp.zeros_like(hidden), matrix_cotangent
        hidden_cotangent, matrix_cotangent = lax.fori_loop(0, matrix.shape[0], through_slice, start)
        return matrix_cotangent, (hidden_cotangent, cotangents * losses)

    matrix_cotangent, (hidden_cotangent, weights_cotangent) = lax.scan(
        pull_back, jnp.zeros_like(matrix), (hidden, targets, weights, cotangents)
    )
    return hidden_cotangent, matrix_cotangent, None, weights_cotangent


_ruled = jax.custom_vjp(_evaluate)
_ruled.defvjp(_forward, _backward)
_losses = true_derivative(_ruled)
