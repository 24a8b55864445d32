"""Causal attention that never holds a full matrix of scores, in the gradient or in the gradient's adjoint."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

_SPANS = 4
_CHUNKS_PER_SPAN = 4


def causal_attention(query: Array, key: Array, value: Array, *, chunk: int = 64) -> Array:
    """Softmax attention of every position to itself and those before it, `chunk` queries at a time; exact.

    A chunk's scores are rebuilt when they are differentiated (`jax.checkpoint`), so a gradient, and the `jax.jvp` of a
    gradient, hold one chunk of them. Long sequences are walked in up to four spans of queries, each against the keys up
    to its own end: 5/8 of the products of a full square of scores, where exactly causal ones would be 1/2.

    Arguments:
        query: `[batch, length, heads, size]`, float, already rotated where positions are.
        key: `[batch, length, key_heads, size]`; `key_heads` divides `heads`, and neighbouring query heads share one.
        value: like `key`.
        chunk: queries whose scores are alive at once.

    Returns: `[batch, length, heads, size]`.

    Cost: a gradient computes the scores once more than naive attention does. Memory: a few chunks of scores, of
    `batch·heads·chunk·length` numbers each, whatever the derivative.
    """
    batch, length, heads, size = query.shape
    groups = key.shape[2]
    chunk = min(chunk, length)
    count = -(-length // chunk)
    padded = jnp.pad(query / math.sqrt(size), [(0, 0), (0, count * chunk - length), (0, 0), (0, 0)])
    chunks = jnp.moveaxis(padded.reshape(batch, count, chunk, groups, heads // groups, size), 1, 0)
    per_span = max(_CHUNKS_PER_SPAN, -(-count // _SPANS))
    spans = [
        _attend_span(chunks[first : first + per_span], first * chunk, key, value) for first in range(0, count, per_span)
    ]
    attended = jnp.moveaxis(jnp.concatenate(spans), 0, 1)
    return attended.reshape(batch, count * chunk, heads, size)[:, :length]


def _attend_span(queries: Array, first: int, key: Array, value: Array) -> Array:
    """Queries `[chunks, batch, chunk, groups, shared, size]`, the first at position `first`, to all keys they see."""
    count, _, chunk, *_ = queries.shape
    end = min(first + count * chunk, key.shape[1])
    key, value = key[:, :end], value[:, :end]

    @jax.checkpoint
    def attend(of: tuple[Array, Array]) -> Array:
        start, queries = of
        scores = jnp.einsum("bqgsd,bkgd->bgsqk", queries, key)
        visible = jnp.arange(end) <= start + jnp.arange(chunk)[:, None]
        shares = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf))
        return jnp.einsum("bgsqk,bkgd->bqgsd", shares, value)

    return lax.map(attend, (first + chunk * jnp.arange(count), queries))
