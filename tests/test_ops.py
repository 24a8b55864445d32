"""Memory-saving operations against their naive forms: value, gradient and the gradient's adjoint, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metagradient.models import causal_attention, chunked_cross_entropy, conv3x3

pytestmark = pytest.mark.core

# These programs run once: less optimisation saves a third of the tests' time.
COMPILE_FAST = {"xla_backend_optimization_level": 0}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def derivatives(operation, arguments, directions):
    """The operation's value and, of a scalar made of it, gradient and adjoint: tangents of both in one program.

    The sine makes the operation's cotangent depend on its value, as it does inside a network.
    """

    def scalar(arguments):
        value = operation(*arguments)
        return jnp.sum(jnp.sin(value) * jnp.cos(jnp.arange(value.size)).reshape(value.shape)), value

    def gradient(arguments):
        return jax.grad(scalar, has_aux=True)(arguments)

    return jax.jvp(gradient, (arguments,), (directions,))


def reverse_over_reverse(operation, arguments, directions):
    gradient = jax.grad(lambda arguments: jnp.sum(jnp.sin(operation(*arguments))))
    return jax.vjp(gradient, arguments)[1](directions)


def assert_same_derivatives(operation, naive, *shapes, derivatives=derivatives):
    arguments = tuple(normal(seed, *shape) for seed, shape in enumerate(shapes))
    directions = tuple(normal(10 + seed, *shape) for seed, shape in enumerate(shapes))
    compiled = jax.jit(derivatives, static_argnums=0, compiler_options=COMPILE_FAST)
    got, expected = (compiled(form, arguments, directions) for form in (operation, naive))
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype == jnp.float64
        assert jnp.linalg.norm(theirs) > 1e-3
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def temporary_bytes(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def gradient_and_adjoint(scalar, count):
    """Programs of a gradient in `count` arguments, and of its adjoint, which takes as many directions after them."""
    gradient = jax.grad(scalar, tuple(range(count)))

    def adjoint(*arguments):
        return jax.jvp(gradient, arguments[:count], arguments[count:])[1]

    return gradient, adjoint


# Cross-entropy


def naive_cross_entropy(hidden, matrix, weights, targets):
    logits = hidden @ matrix.T
    picked = jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
    return weights * (jax.nn.logsumexp(logits, 1) - picked)


def cross_entropies(count, vocabulary, chunk):
    """Ours and the naive one, as functions of (hidden, matrix, weights), and the shapes of those."""
    targets = jnp.arange(count) * 7 % vocabulary

    def ours(hidden, matrix, weights):
        return chunked_cross_entropy(hidden, matrix, targets, weights, chunk=chunk)

    def naive(hidden, matrix, weights):
        return naive_cross_entropy(hidden, matrix, weights, targets)

    return ours, naive, (count, 6), (vocabulary, 6), (count,)


@pytest.mark.parametrize(("count", "vocabulary", "chunk"), [(12, 50, 4), (13, 3072, 5), (3, 2053, 64), (1, 2, 1)])
def test_cross_entropy_has_the_derivatives_of_the_naive_form(count, vocabulary, chunk):
    assert_same_derivatives(*cross_entropies(count, vocabulary, chunk))


def test_cross_entropy_bears_a_second_reverse_pass():
    assert_same_derivatives(*cross_entropies(5, 3072, 2), derivatives=reverse_over_reverse)


def test_cross_entropy_weighs_every_token_one_by_default_and_ignores_weightless_targets():
    hidden, matrix = normal(0, 4, 3), normal(1, 10, 3)
    targets = jnp.array([1, -100, 9, 0])
    weights = jnp.array([1.0, 0.0, 1.0, 1.0])
    losses = chunked_cross_entropy(hidden, matrix, targets, weights, chunk=3)
    np.testing.assert_allclose(losses, naive_cross_entropy(hidden, matrix, weights, targets.at[1].set(0)), rtol=1e-12)
    unweighted = chunked_cross_entropy(hidden, matrix, targets, chunk=3)
    np.testing.assert_array_equal(unweighted[weights > 0], losses[weights > 0])


def test_cross_entropy_holds_no_second_copy_of_the_logits():
    count, vocabulary, width = 1024, 49_152, 64
    targets = jnp.zeros(count, int)
    shapes = (count, width), (vocabulary, width), (count,)
    gradient, adjoint = gradient_and_adjoint(
        lambda hidden, matrix, weights: chunked_cross_entropy(hidden, matrix, targets, weights).sum(), 3
    )
    naive, _ = gradient_and_adjoint(
        lambda hidden, matrix, weights: naive_cross_entropy(hidden, matrix, weights, targets).sum(), 3
    )
    adjoint_bytes = temporary_bytes(adjoint, *shapes, *shapes)
    assert adjoint_bytes <= 1.5 * temporary_bytes(gradient, *shapes)
    assert adjoint_bytes <= 0.2 * temporary_bytes(naive, *shapes)
    assert adjoint_bytes < 4 * count * vocabulary


# Attention


def naive_attention(query, key, value):
    length, shared = query.shape[1], query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, shared, 2), jnp.repeat(value, shared, 2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(query.shape[-1])
    scores = jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


@pytest.mark.parametrize(
    ("length", "chunk", "heads", "key_heads"), [(3, 64, 4, 4), (11, 2, 4, 2), (17, 1, 3, 1)], ids=str
)
def test_attention_has_the_derivatives_of_the_naive_form(length, chunk, heads, key_heads):
    """In one chunk; in two spans and a part of a chunk; in four spans."""
    assert_same_derivatives(
        lambda *arguments: causal_attention(*arguments, chunk=chunk),
        naive_attention,
        (2, length, heads, 5),
        (2, length, key_heads, 5),
        (2, length, key_heads, 5),
    )


def test_attention_never_holds_a_full_matrix_of_scores():
    length, heads = 2048, 4
    shapes = ((1, length, heads, 16),) * 3
    _, adjoint = gradient_and_adjoint(lambda *arguments: (causal_attention(*arguments) ** 2).sum(), 3)
    assert temporary_bytes(adjoint, *shapes, *shapes) < 0.8 * 4 * heads * length**2


# Convolution


def naive_convolution(x, kernel):
    _, height, width, _ = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        jnp.einsum("bhwc,co->bhwo", padded[:, row : row + height, column : column + width], kernel[row, column])
        for row in range(3)
        for column in range(3)
    )


@pytest.mark.parametrize("method", ["direct", "patches"])
def test_convolution_has_the_derivatives_of_the_naive_form(method):
    assert_same_derivatives(
        lambda x, kernel: conv3x3(x, kernel, method=method), naive_convolution, (2, 6, 4, 5), (3, 3, 5, 7)
    )


@pytest.mark.parametrize("channels", [3, 5])
def test_a_convolution_of_unspecified_method_is_the_same_one(channels):
    x, kernel = normal(0, 2, 6, 4, channels), normal(1, 3, 3, channels, 7)
    np.testing.assert_allclose(conv3x3(x, kernel), naive_convolution(x, kernel), rtol=1e-10, atol=1e-10)
