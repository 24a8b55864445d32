"""What is read off JAX's internals: the same on the oldest and the newest release."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from metagradient import _jax
from metagradient.errors import ConfigError

pytestmark = [pytest.mark.core, pytest.mark.optimised]
X = jnp.linspace(-1, 1, 6)


@jax.custom_vjp
def reversal(x):
    return x


reversal.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_jvp
def stretched(x):
    return x


stretched.defjvp(lambda x, t: (x[0], 2 * t[0]))


def program(function, *arguments):
    return _jax.trace(function, *(arguments or (X,)))[0]


def nested(function):
    """Within a scan in a conditional in a checkpoint in a jit."""

    @jax.jit
    @jax.checkpoint
    def outer(x):
        return lax.cond(x.sum() > 0, lambda x: lax.scan(lambda c, _: (function(c), None), x, None, 3)[0], jnp.sin, x)

    return outer


def test_programs_are_traced_afresh():
    traced = []

    def function(x):
        traced.append(x)
        return x + 1

    assert _jax.trace(function, X)[1].shape == (6,)
    _jax.trace(function, X)
    assert len(traced) == 2


def test_inner_programs_are_found():
    names = {e.primitive.name for e in _jax.equations(program(nested(jnp.tanh)))}
    assert {"tanh", "scan", "cond", "sin"} <= names


@pytest.mark.parametrize(
    ("question", "yes", "no"),
    [
        (_jax.has_loops, nested(jnp.tanh), jnp.tanh),
        (_jax.convolves, lambda x: lax.conv(x.reshape(1, 1, 6, 1), jnp.ones((1, 1, 2, 1)), (1, 1), "SAME"), jnp.tanh),
        (_jax.drawn_bits, lambda x: x + jax.random.normal(jax.random.key(0)), jnp.tanh),
        (_jax.drawn_bits, nested(lambda x: x * jax.random.bernoulli(jax.random.PRNGKey(0), 0.5, x.shape)), jnp.tanh),
    ],
)
def test_what_a_program_holds(question, yes, no):
    assert question(program(yes))
    assert not question(program(no))


@pytest.mark.parametrize("place", [lambda f: f, nested, jax.vmap], ids=["plain", "nested", "vmap"])
def test_rules_of_somebody_s_own_are_seen_and_jax_s_are_not(place):
    from metagradient import true_derivative

    for rule in (reversal, stretched):
        (found,) = _jax.own_rules(program(place(rule)))
        assert "test_jax.py" in found
    for rule in (jax.nn.relu, jax.nn.silu, jnp.sinc, partial(jax.scipy.special.xlogy, 1.0), true_derivative(reversal)):
        assert not _jax.own_rules(program(place(rule)))


def test_solves_and_transposes_by_where_they_are_defined():
    def solved(x):
        return lax.custom_linear_solve(lambda v: 2 * v, x, lambda _, b: b / 2, lambda _, b: b / 3)

    def root(x):
        return lax.custom_root(lambda y: y**3 - x, x, lambda f, y: y + 1, lambda g, y: y / g(jnp.ones_like(y)))

    def transposed(x):
        return jax.custom_derivatives.linear_call(lambda _, x: x, lambda _, g: 2 * g, (), x)

    for own in (solved, root, transposed):
        assert _jax.own_rules(program(own)), own
    assert not _jax.own_rules(program(lambda x: jnp.linalg.solve(jnp.eye(6) * 2, x)))


def test_stopped_gradients_are_placed():
    (found,) = _jax.stopped_gradients(program(nested(lambda x: x + lax.stop_gradient(x))))
    assert "test_jax.py" in found
    assert not _jax.stopped_gradients(program(jnp.tanh))


def test_inputs_that_reach_an_output():
    def function(a, b, c):
        del c
        return jax.jit(lambda x: x + 1)(b), jnp.ones(2)

    assert _jax.reaching(program(function, X, X, X)) == {1}
    assert _jax.reaching(program(lambda a, b: a, X, X)) == {0}


def test_digests_tell_programs_and_constants_apart():
    small, large = np.arange(3.0), jnp.arange(5000.0)
    digests = {
        _jax.digest(program(function))
        for function in (
            jnp.tanh, jnp.sin, nested(jnp.tanh), nested(jnp.sin), lambda x: x[:3] + small, lambda x: x[:3] + small * 2,
            lambda x: x.sum() + large, lambda x: x * 2, lambda x: x * 3,
        )
    }  # fmt: skip
    assert len(digests) == 9
    assert _jax.digest(program(nested(jnp.tanh))) == _jax.digest(program(nested(jnp.tanh)))
    again = jnp.arange(5000.0)
    one, other = program(lambda x: x.sum() + large), program(lambda x: x.sum() + again)
    assert _jax.digest(one) != _jax.digest(other)
    assert _jax.digest(one, lasting=True) == _jax.digest(other, lasting=True)


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), "bfloat16"),
        (lambda x: jnp.dot(x, x, precision="default"), "precision"),
        (nested(lambda x: x * jnp.dot(x, x, precision=lax.Precision.HIGH)), "precision"),
    ],
)
def test_lowered_precision(function, word):
    assert word in (_jax.lowered_precision(program(function)) or "")


def test_full_precision_is_not_lowered():
    with jax.default_matmul_precision("highest"):
        assert _jax.lowered_precision(program(lambda x: jnp.dot(x, x))) is None


def test_compilations_are_counted():
    with _jax.compile_seconds() as spent:
        jax.jit(lambda x: x * 3.25 + 1)(X)
    assert spent.programs == 1
    assert spent.seconds > 0
    with _jax.compile_seconds() as spent:
        pass
    assert spent.programs == 0


def test_weak_types():
    assert _jax.is_weak(jnp.asarray(1.0))
    assert not _jax.is_weak(jnp.ones(2))


def test_a_norm_s_pull_back_of_many_cotangents_is_right():
    """jaxlib 0.10 on CPU fuses this wrongly, from the third row on, without the options that `compiled` gives."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 32)), jnp.float32)
    cotangents = jnp.asarray(np.random.default_rng(1).normal(size=(9, 512, 32)), jnp.float32)

    def pulled(x, cotangents):
        _, vjp = jax.vjp(lambda x: x * jnp.mean(x, -1, keepdims=True), x)
        return jax.vmap(lambda c: vjp(c)[0])(cotangents)

    found = _jax.compiled(pulled)(x, cotangents)
    expected = cotangents * x.mean(-1, keepdims=True) + (cotangents * x).sum(-1, keepdims=True) / 32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_steps_through_norms_side_by_side_are_right():
    """jaxlib 0.12 on CPU fuses this wrongly, in every row, without the options that `compiled` gives."""
    random = np.random.default_rng(0)
    params, y = random.normal(size=(9, 512, 72)).astype(np.float32), random.normal(size=(512, 72)).astype(np.float32)

    def step(p):
        return p - 1e3 * jax.grad(lambda p: jnp.mean(y * p * lax.rsqrt(jnp.mean(p**2, -1, keepdims=True))))(p)

    expected = np.stack([_jax.compiled(step)(p) for p in params])
    np.testing.assert_allclose(_jax.compiled(jax.vmap(step))(params), expected, rtol=1e-4, atol=1e-4)


def test_options_that_the_compiler_has_not_got():
    assert not _jax.takes({"xla_cpu_an_option_that_there_never_was": ""})


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    code = """
import sys, jax, jax.numpy as jnp
import metagradient as mg

jax.jit(lambda x: x - 1)(1.0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
assert str(mg.compilation_cache(sys.argv[1])) == sys.argv[1]
training = mg.Training(jnp.ones(3), lambda s, b, z: s * z, [{}] * 4)
value, grad = mg.value_and_metagrad(training, lambda s, z: s.sum())(jnp.float32(0.9))
print(len(hits), value, grad)
"""

    def run() -> list[str]:
        command = [sys.executable, "-c", code, str(tmp_path / "cache")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    (cold, *first), (warm, *second) = run(), run()
    assert int(warm) >= int(cold) + 3
    assert first == second
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match="can't hold compiled programs"):
        _jax.compilation_cache(file / "below")


def test_doubles_beside_single_draws():
    drawn = jax.random.normal(jax.random.key(0), (3,))
    with _jax.doubles_beside_single_draws():
        x = jnp.asarray(np.ones(3), jnp.float64)
        found = jax.jit(
            lambda x: jax.grad(lambda x: jnp.sum(jnp.tanh(x) * jax.random.normal(jax.random.key(0), (3,))))(x)
        )(x)
        assert found.dtype == jnp.float64
        np.testing.assert_array_equal(jax.random.normal(jax.random.key(0), (3,)), drawn)
    assert jnp.asarray(1.0).dtype == jnp.float32
