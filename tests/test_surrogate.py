"""Gradients in counts: the definition unrolled in float64, streams, what is refused, and descents by them."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import batch_norm as batch_norm_problem
from problems import cross_entropy, held_out, logits, mlp, rows

import metagradient as mg
from metagradient.data.batches import EpochBatches
from metagradient.errors import BatchError, ConfigError, NonFiniteError, StructureError
from metagradient.models import chunked_cross_entropy

pytestmark = pytest.mark.core

POOL, STEPS, AT = 24, 9, 5
ADAM = optax.adam(0.05, eps_root=1e-8)
COUNTS = np.random.default_rng(3).integers(0, 3, POOL).astype(float)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def loss(params: Any, batch: Any, z: Any) -> jax.Array:
    assert z == {}
    return jnp.mean(losses(params, None, batch))


def losses(params: Any, model_state: Any, batch: Any) -> jax.Array:
    del model_state
    return cross_entropy(logits(params, batch["x"]), batch["y"])


def training(counts: np.ndarray, seed: int = 0, loss: Any = loss, microbatches: int = 1) -> mg.Training:
    ids = np.repeat(np.arange(POOL), counts)
    batches = EpochBatches(rows(0, POOL), batch=8, steps=STEPS, seed=seed, rows=ids)
    return mg.Training.from_loss(loss, ADAM, mlp(), batches, microbatches=microbatches)


def candidates(size: int = POOL) -> list[dict[str, np.ndarray]]:
    ids = np.arange(POOL)
    data = {**rows(0, POOL), "index": ids}
    return [{k: v[i : i + size] for k, v in data.items()} for i in range(0, POOL, size)]


def surrogate(**changes: Any) -> mg.CountSurrogate:
    return replace(mg.CountSurrogate(training, candidates(), losses, AT), **changes)


def definition(z: jax.Array, losses: Any = losses) -> jax.Array:
    """The run with every candidate's loss, times z, in the loss of step k; a plain loop."""
    run = training(COUNTS.astype(int))
    params = jax.tree.map(jnp.asarray, mlp())
    opt_state = ADAM.init(params)
    for t in range(STEPS):

        def total(params: Any, t: int = t) -> jax.Array:
            value = jnp.mean(cross_entropy(logits(params, run.batches[t]["x"]), run.batches[t]["y"]))
            (pool,) = candidates()
            return value + (jnp.vdot(z, losses(params, None, pool)) if t == AT else 0)

        updates, opt_state = ADAM.update(jax.grad(total)(params), opt_state, params)
        params = optax.apply_updates(params, updates)
    return held_out(mg.TrainState(params, opt_state, None, jnp.int32(STEPS)), None)


def z_of(counts: Any = COUNTS) -> dict[str, mg.PerExample]:
    return {"counts": mg.PerExample(jnp.asarray(counts))}


def test_it_is_the_gradient_of_the_definition():
    value, expected = jax.value_and_grad(definition)(jnp.zeros(POOL))
    found, runs = surrogate().evaluate(held_out, z_of())
    assert float(found.value) == pytest.approx(float(value), rel=1e-12)
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(found.grad["counts"].value, expected, atol=1e-10 * np.abs(expected).max())
    # The run, one step that is rehearsed, three steps more for each that is pulled back, three batches of candidates.
    assert runs == pytest.approx((STEPS + 1 + 3 * (STEPS - AT - 1) + POOL / 8) / STEPS)


def test_candidates_with_count_zero_have_a_gradient():
    grad = surrogate().evaluate(held_out, z_of())[0].grad["counts"].value
    assert (COUNTS == 0).any()
    assert np.all(grad[COUNTS == 0] != 0)


@pytest.mark.parametrize("size", [1, 7, 24])
def test_a_stream_gives_what_one_batch_gives(size):
    def stream() -> Iterator[Any]:
        yield from candidates(size)

    whole = surrogate().evaluate(held_out, z_of())[0].grad["counts"].value
    streamed = surrogate(candidates=stream()).evaluate(held_out, z_of())[0].grad["counts"].value
    np.testing.assert_allclose(streamed, whole, rtol=1e-12)


@pytest.mark.parametrize("at", [0, STEPS - 2])
def test_first_and_last_step(at, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "AT", at)
    expected = jax.grad(definition)(jnp.zeros(POOL))
    found = surrogate(at=at).evaluate(held_out, z_of())[0].grad["counts"].value
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(expected).max())


def test_micro_batches_change_nothing():
    def halved(counts: np.ndarray) -> mg.Training:
        return training(counts, microbatches=2)

    one, two = (surrogate(training=t).evaluate(held_out, z_of())[0].grad["counts"].value for t in (training, halved))
    np.testing.assert_allclose(one, two, atol=1e-12 * np.abs(one).max())


def test_losses_with_a_rule_of_their_own():
    def chunked(params: Any, model_state: Any, batch: Any) -> jax.Array:
        del model_state
        return chunked_cross_entropy(jnp.tanh(batch["x"] @ params["w1"]), params["w2"].T, batch["y"], chunk=5)

    def plain(params: Any, model_state: Any, batch: Any) -> jax.Array:
        return losses({**params, "b2": jnp.zeros_like(params["b2"])}, model_state, batch)

    expected = jax.grad(lambda z: definition(z, plain))(jnp.zeros(POOL))
    found = surrogate(losses=chunked).evaluate(held_out, z_of())[0].grad["counts"].value
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(expected).max())


def test_batch_norm_statistics_are_those_of_step_k():
    problem = batch_norm_problem()

    def run(counts: np.ndarray) -> mg.Training:
        ids = np.repeat(np.arange(POOL), counts)
        batches = EpochBatches(rows(0, POOL), batch=8, steps=STEPS, seed=0, rows=ids)
        return mg.Training.from_loss(normed, problem.optimizer, problem.init, batches, has_model_state=True)

    def normed(params: Any, model_state: Any, batch: Any, z: Any) -> Any:
        del z
        unit = {"weights": jnp.ones(len(batch["y"])), "temperature": jnp.ones(()), "ridge": jnp.zeros(())}
        return problem.loss(params, model_state, batch, unit)

    def of_pool(params: Any, model_state: Any, batch: Any) -> jax.Array:
        scores = (batch["x"] @ params["w1"]) * sum(jnp.sum(x) for x in jax.tree.leaves(model_state))
        return jnp.sum(scores**2, -1)

    found = (
        mg.CountSurrogate(run, candidates(), of_pool, AT).evaluate(problem.objective, z_of())[0].grad["counts"].value
    )

    def unrolled(z: jax.Array) -> jax.Array:
        batches = run(COUNTS.astype(int)).batches
        params, model_state = jax.tree.map(jnp.asarray, problem.init)
        opt_state = problem.optimizer.init(params)
        for t in range(STEPS):

            def total(params: Any, t: int = t, model_state: Any = model_state) -> Any:
                value, new = normed(params, model_state, batches[t], {})
                (pool,) = candidates()
                return value + (jnp.vdot(z, of_pool(params, model_state, pool)) if t == AT else 0), new

            gradient, model_state = jax.grad(total, has_aux=True)(params)
            updates, opt_state = problem.optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
        return problem.objective(mg.TrainState(params, opt_state, model_state, jnp.int32(STEPS)), {})

    expected = jax.grad(unrolled)(jnp.zeros(POOL))
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(expected).max())


def written(counts: np.ndarray) -> mg.Training:
    del counts
    return mg.Training(jnp.ones(()), lambda s, b, z: s, [{}] * STEPS)


@pytest.mark.parametrize(
    ("changes", "z", "error", "message"),
    [
        ({"at": STEPS - 1}, z_of, ConfigError, "at must be from 0 to 7"),
        ({"training": written}, z_of, StructureError, "Training.from_loss"),
        ({}, lambda: z_of(COUNTS + 0.5), StructureError, "whole numbers"),
        ({}, lambda: {"counts": jnp.asarray(COUNTS)}, StructureError, "one PerExample leaf"),
        ({"candidates": [rows(0, 4)]}, z_of, BatchError, 'candidate batch 0 has no "index"'),
        ({"candidates": [{**rows(0, 1), "index": np.array([POOL])}]}, z_of, BatchError, "leaves"),
        ({"losses": lambda p, s, b: jnp.mean(losses(p, s, b))}, z_of, StructureError, "expected one loss each"),
        ({"losses": lambda p, s, b: jnp.sqrt(0 * losses(p, s, b))}, z_of, NonFiniteError, "candidate 0's loss"),
    ],
)
def test_what_is_refused(changes, z, error, message):
    with pytest.raises(error, match=message):
        surrogate(**changes).evaluate(held_out, z())


def test_a_window_is_refused():
    with pytest.raises(ConfigError, match="window"):
        mg.descend(surrogate(), held_out, z_of(), mg.updates.counts(0.3), 1, window=3)


def by_seed(seed: int, at: int = AT) -> mg.CountSurrogate:
    return surrogate(training=lambda counts: training(counts, seed), at=at)


def test_a_descent_in_counts_lowers_the_objective():
    z = z_of(np.ones(POOL))
    descent = mg.descend(by_seed, held_out, z, mg.updates.counts(0.3), 6, seed=1)
    records = list(descent)
    counts = np.asarray(descent.z["counts"].value)
    assert np.all((counts >= 0) & (counts == np.round(counts)))
    assert np.any(counts != 1)

    def fresh(z: Any) -> float:
        runs = (training(np.asarray(z["counts"].value).astype(int), mg.fresh_seed(1, i)) for i in range(4))
        return float(np.mean([held_out(mg.train(run, {}), None) for run in runs]))

    assert fresh(descent.z) < fresh(z) - 0.01
    assert records[0].training_runs < 3


def test_a_descent_in_counts_goes_on_where_it_stopped(tmp_path):
    def descent(name: str) -> mg.Descent:
        return mg.descend(by_seed, held_out, z_of(np.ones(POOL)), mg.updates.counts(0.3), 4, out=tmp_path / name)

    list(descent("whole"))
    stopped = descent("stopped")
    for _ in range(2):
        next(stopped)
    list(descent("stopped"))
    whole, resumed = ((tmp_path / name / "records.jsonl").read_bytes() for name in ("whole", "stopped"))
    assert whole == resumed


def test_probing_measures_every_step_on_the_same_seeds():
    found = mg.probe_at(by_seed, held_out, z_of(np.ones(POOL)), mg.updates.counts(0.5), [1, 6], seed=0, fresh=[5, 6])
    assert [p.at for p in found] == [1, 6]
    assert found[0].before == found[1].before
    assert found[0].after != found[1].after
    assert len(found[0].after) == 2
    with pytest.raises(ConfigError, match="none of them"):
        mg.probe_at(by_seed, held_out, z_of(), mg.updates.counts(0.5), [1], seed=5, fresh=[5])


STREAM = """
import resource, sys
import jax.numpy as jnp, numpy as np, optax
import metagradient as mg
from metagradient.data.batches import EpochBatches
from sklearn.datasets import load_digits

n, size = int(sys.argv[1]), 8192
x, y = load_digits(return_X_y=True)
x, y = (x / 16).astype(np.float32), y.astype(np.int32)

def losses(params, model_state, batch):
    scores = jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])

def loss(params, batch, z):
    return jnp.mean(losses(params, None, batch))

class Candidates:
    def __iter__(self):
        for start in range(0, n, size):
            ids = np.arange(start, min(start + size, n))
            yield {"x": x[ids % len(x)], "y": y[ids % len(x)], "index": ids}

def training(counts):
    batches = EpochBatches({"x": x, "y": y}, batch=64, steps=6, seed=0)
    params = {"w1": np.full((64, 16), 0.1, np.float32), "w2": np.ones((16, 10), np.float32)}
    return mg.Training.from_loss(loss, optax.sgd(0.1), params, batches)

surrogate = mg.CountSurrogate(training, Candidates(), losses, 3)
objective = lambda state, z: jnp.mean(losses(state.params, None, {"x": x[:100], "y": y[:100]}))
grad = surrogate.evaluate(objective, {"counts": mg.PerExample(jnp.zeros(n))})[0].grad["counts"].value
assert grad.shape == (n,) and bool(jnp.all(grad[: len(x)] == grad[len(x) : 2 * len(x)]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_a_pool_of_a_million_streams_in_the_memory_of_a_small_one():
    def peak(n: int) -> float:
        run = subprocess.run([sys.executable, "-c", STREAM, str(n)], capture_output=True, text=True, check=True)
        return float(run.stdout)

    small, large = peak(40_000), peak(1_000_000)
    # Its examples would take 256 MB; its counts and gradients, in a few copies, take 4 MB each.
    assert large - small < 60


def test_a_held_out_objective_may_read_the_counts_of_a_journalled_descent(tmp_path):
    def fewer(state, z):
        return held_out(state, z) + 1e-3 * jnp.sum(z["counts"])

    z = z_of(np.ones(POOL))
    descent = mg.descend(by_seed, held_out, z, mg.updates.counts(0.3), 1, held_out=fewer, out=tmp_path / "run")
    (record,) = descent
    assert record.held_out == pytest.approx(record.value + 1e-3 * POOL, rel=1e-6)
