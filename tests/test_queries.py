"""Many queries at once, through norms: what jaxlib on CPU compiles wrongly above 32,768 elements."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metagradient as mg
from metagradient.errors import CompilerError
from metagradient.given import Given
from metagradient.step import segment as segments
from metagradient.step.segment import Segment

pytestmark = [pytest.mark.core, pytest.mark.optimised]
EXAMPLES, WIDTH, STEPS = 512, 72, 2
STEPWISE = Segment(1, "steps", "state")
Z = {"weights": mg.PerExample(jnp.ones(EXAMPLES)), "rate": mg.PerStep(jnp.full(STEPS, 0.5))}


def layer_norm(x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, -1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


def rms_norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5)


def by_mean(x: jax.Array) -> jax.Array:
    """The least that is compiled wrongly."""
    return x * jnp.mean(x, -1, keepdims=True)


NORMS = {f.__name__: f for f in (layer_norm, rms_norm, by_mean)}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def training_with(norm: Any) -> mg.Training:
    """A loss whose hidden layer is normed: its tangents go through the norm."""

    def loss(params, batch, z):
        hidden = norm(batch["x"] @ params["w"])
        return jnp.mean(z["weights"] * jnp.mean(jnp.tanh(hidden - batch["y"]), -1))

    index = np.arange(EXAMPLES)
    batches = [{"x": draw(t, EXAMPLES, 16), "y": draw(9 + t, EXAMPLES, WIDTH), "index": index} for t in range(STEPS)]
    return mg.Training.from_loss(loss, lambda z: optax.sgd(z["rate"], 0.9), {"w": draw(2, 16, WIDTH) / 4}, batches)


def written_with(norm: Any) -> mg.Training:
    """A hand-written step that norms its state: its cotangents go back through the norm."""

    def step(state, batch, z):
        weights = z["weights"][:, None]
        return {"w": state["w"] - z["rate"] * weights * norm(state["w"]) * batch["y"]}

    batches = [{"y": draw(t, EXAMPLES, WIDTH), "index": np.arange(EXAMPLES)} for t in range(STEPS)]
    return mg.Training({"w": draw(3, EXAMPLES, WIDTH)}, step, batches)


def answers(count: int) -> Any:
    x, y = jnp.asarray(draw(4, count, 16)), jnp.asarray(draw(5, count, WIDTH))
    return lambda state, z: jnp.mean(jnp.tanh(x @ state.params["w"]) * y, -1)


def normed_answers(norm: Any, count: int) -> Any:
    y = jnp.asarray(draw(6, count, EXAMPLES, WIDTH))
    return lambda state, z: jnp.einsum("qij,ij->q", y, norm(state["w"]))


def assert_as_alone(training: mg.Training, objective: Any, queries: int, segment: Segment) -> None:
    grad = mg.value_and_metagrad(training, objective, vector=True, segment=segment)(Z)[1]
    # Alone, as one query at a time: the first, the third (where the compiler goes wrong), and the last.
    for query in (0, 2, queries - 1):
        alone = mg.value_and_metagrad(
            training, lambda state, z, query=query: objective(state, z)[query], segment=segment
        )(Z)[1]
        for name in Z:
            a, b = grad[name].value[query], alone[name].value
            assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < 1e-5, (name, query)


@pytest.mark.parametrize(
    ("norm", "queries", "segment"),
    [
        *(("layer_norm", queries, STEPWISE) for queries in (8, 32, 128)),
        *(("rms_norm", queries, STEPWISE) for queries in (8, 32, 128)),
        ("by_mean", 32, STEPWISE),
        ("layer_norm", 32, Segment(2, "scan", "state")),
    ],
)
def test_queries_back_through_norms_are_what_they_are_alone(norm, queries, segment):
    assert EXAMPLES * WIDTH > 32_768
    assert_as_alone(written_with(NORMS[norm]), normed_answers(NORMS[norm], queries), queries, segment)


@pytest.mark.parametrize("segment", [STEPWISE, Segment(2, "scan", "gradient")], ids=str)
def test_queries_through_a_normed_loss_are_what_they_are_alone(segment):
    assert_as_alone(training_with(layer_norm), answers(32), 32, segment)


def test_trainings_side_by_side_are_what_they_are_alone():
    """The same fault in vmapped trainings."""
    training = mg.Training.from_loss(
        lambda params, batch, z: jnp.mean(batch["y"] * z["scale"] * rms_norm(params)), optax.sgd(1e3),
        draw(7, EXAMPLES, WIDTH), [{"y": draw(t, EXAMPLES, WIDTH)} for t in range(STEPS)],
    )  # fmt: skip
    zs = [{"scale": jnp.float32(1 + number / 9)} for number in range(9)]
    for together, z in zip(mg.train_many(training, zs, at_once=9), zs, strict=True):
        alone = mg.train(training, z).params
        assert float(jnp.linalg.norm(together.params - alone) / jnp.linalg.norm(alone)) < 1e-5


def test_a_compiler_that_batches_wrongly_is_found_out(monkeypatch):
    """For whatever the next compiler breaks: the last query is compared with itself alone, on the first step."""

    def wrong(pull, cotangents, *, convolves=False):
        found = jax.lax.map(pull, cotangents)
        return jax.tree.map(lambda x: x.at[2:].multiply(0.6), found)

    monkeypatch.setattr(segments, "over_queries", wrong)
    with pytest.raises(CompilerError, match=r"step 1: .*40%"):
        mg.value_and_metagrad(training_with(rms_norm), answers(8), vector=True)(Z)


def test_memory_does_not_grow_with_queries():
    training = training_with(rms_norm)
    given, form = Given.of(Z), training.programs.form(STEPWISE)

    def temporary(queries: int) -> int:
        state, batch = training.initial(Z), training.batches[0]
        cotangent = tuple(jnp.ones((queries, *x.shape)) for x in jax.tree.leaves((state.params, state.opt_state)))
        total = jax.tree.map(lambda x: jnp.zeros((queries, *x.shape)), given.z)
        adjoint = form.pull_one.lower(True, total, cotangent, given, jnp.int32(0), state, (), batch).compile()
        return adjoint.memory_analysis().temp_size_in_bytes - queries * (EXAMPLES + 2) * 4

    assert temporary(64) < 1.5 * temporary(8) + 64 * 16 * WIDTH * 8
