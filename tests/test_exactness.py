"""In float64, metagradients equal the gradient of the unrolled run to 1e-10, leaf by leaf, on every way to them."""

from dataclasses import replace
from functools import cache
from itertools import cycle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    BATCH,
    CLASSES,
    EXAMPLES,
    OPTIMISERS,
    STEPS,
    VISITED,
    Problem,
    assert_same,
    batch_norm,
    batch_norm_held_out,
    batches,
    cross_entropy,
    digit_loss,
    digit_losses,
    dropout,
    equinox_model,
    every_kind,
    held_out,
    logits,
    mlp,
    reference,
    ridge,
    rows,
    tied,
    with_optimiser,
)
from quick import slow_but

import metagradient as mg
from metagradient import Segment
from metagradient.schedule import Binomial, KaryTree, KeepAll, Schedule, TwoLevel

pytestmark = pytest.mark.core

STEPWISE, TREE = Segment(1, "steps", "state"), KaryTree(2, "host")
SCHEDULES = [KeepAll()]
for tier in ("device", "host"):
    SCHEDULES += [TwoLevel(tier=tier), KaryTree(2, tier), KaryTree(3, tier), Binomial(1, tier), Binomial(3, tier)]


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


@cache
def known(name):
    """A problem of the table of optimisers, and its reference: several tests start from the same one."""
    problem = with_optimiser(name)
    return problem, reference(problem)


def metagradient(problem, *, training=None, schedule: Schedule = TREE, segment=STEPWISE, window=None):
    training = training or problem.training()
    function = mg.value_and_metagrad(training, problem.objective, schedule=schedule, segment=segment, window=window)
    return function(problem.z)


# The others are slow: their kinds of state are met in test_optimizers.
ALWAYS = ("sgd", "adam", "driven", "noise", "clipped")


@pytest.mark.parametrize(
    ("name", "schedule"), slow_but(ALWAYS, zip(OPTIMISERS, cycle(SCHEDULES), strict=False)), ids=str
)
def test_every_optimiser(name, schedule):
    problem, expected = known(name)
    assert_same(metagradient(problem, schedule=schedule), expected)


def test_every_schedule():
    problem, expected = known("driven")
    training = problem.training()
    for schedule in SCHEDULES:
        assert_same(metagradient(problem, training=training, schedule=schedule, segment=Segment(2)), expected)


SEGMENTS = [
    *[Segment(4, "scan", "state"), Segment(32, "scan", "gradient")],
    *[Segment(4, "unroll", "state"), Segment(3, "unroll", "gradient")],
    *[Segment(4, "steps", "state"), Segment(3, "steps", "gradient"), Segment(1, "steps", "gradient")],
    *[Segment(3, "steps", "linearisation"), Segment(4, "scan", "linearisation")],
]


@pytest.mark.parametrize("segment", SEGMENTS, ids=lambda s: f"{s.length}-{s.loop}-{s.keep}")
def test_every_segment_one_that_does_not_divide_the_run_too(segment):
    problem, expected = known("momentum")
    assert_same(metagradient(problem, segment=segment), expected)


@pytest.mark.parametrize("segment", [None, 4], ids=["nothing", "a length"])
def test_a_segment_that_is_chosen_by_measuring(segment):
    problem, expected = known("momentum")
    assert_same(metagradient(problem, segment=segment), expected)


@pytest.mark.parametrize(
    "segment",
    [STEPWISE, Segment(4, "scan", "gradient"), Segment(1, "steps", "gradient", unroll_microbatches=True)],
    ids=["recomputed", "kept", "unrolled"],
)
def test_micro_batches_give_the_numbers_of_the_whole_batch(segment):
    problem, expected = known("driven")
    assert_same(metagradient(replace(problem, microbatches=4), segment=segment), expected)


def test_a_loss_an_example():
    problem, expected = known("driven")
    training = replace(problem, loss=digit_losses).training(per_example=True, microbatches=2)
    assert_same(metagradient(problem, training=training), expected)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_batch_norm(microbatches):
    problem = batch_norm(microbatches=microbatches)
    assert_same(metagradient(problem), reference(problem))


def test_parameters_used_twice():
    problem = tied()
    assert_same(metagradient(problem), reference(problem))


def test_two_parameters_that_start_as_one_array_are_two():
    init = mlp()
    shared = jnp.asarray(init["w2"])

    def loss(params, batch, z):
        scores = jnp.tanh(batch["x"] @ params["w1"]) @ (params["one"] + 2 * params["other"])
        return jnp.mean(cross_entropy(scores, batch["y"]) * z["weights"])

    def objective(state, z):
        params = state.params
        return held_out(replace(state, params={**params, "w2": params["one"] + params["other"], "b2": 0.0}), z)

    z = {"weights": every_kind()["weights"]}
    problem = Problem(loss, OPTIMISERS["adam"], {"w1": init["w1"], "one": shared, "other": shared}, z=z)
    problem = replace(problem, objective=objective)
    assert_same(metagradient(problem), reference(problem))


def pixels_loss(params, batch, z):
    x = batch["x"] + z["pixels"]
    return jnp.mean(cross_entropy(logits(params, x), batch["y"]) * z["weights"]) + z["ridge"] * ridge(params)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_examples_of_some_rows_in_any_order(microbatches):
    covered, unvisited = [17, 3, EXAMPLES - 1, 0, 8], 2
    assert covered[unvisited] >= VISITED
    rng = np.random.default_rng(5)
    pixels = mg.PerExample(rng.normal(size=(len(covered), 64)) / 10, rows=covered)
    weights = mg.PerExample(np.linspace(0.5, 1.5, EXAMPLES))
    # A bare array is Shared.
    z = {"pixels": pixels, "weights": weights, "ridge": jnp.asarray(1e-2)}
    problem = Problem(pixels_loss, OPTIMISERS["momentum"], z=z, microbatches=microbatches)
    value, grad = metagradient(problem)
    assert_same((value, grad), reference(replace(problem, microbatches=1)))
    assert grad["pixels"].rows.tolist() == covered
    assert not np.any(grad["pixels"].value[unvisited])
    assert not np.any(grad["weights"].value[VISITED:])


def test_an_example_twice_in_a_batch_counts_twice():
    """The second half of the batch repeats the first, at which each weight's gradient is that of two examples."""
    index = np.arange(BATCH) % (BATCH // 2)
    data = rows(0, EXAMPLES)
    once = [{"x": data["x"][index], "y": data["y"][index], "index": np.arange(BATCH)}] * STEPS
    twice = [{**batch, "index": index} for batch in once]
    z = {"weights": mg.PerExample(np.ones(BATCH)), "temperature": jnp.ones(()), "ridge": jnp.zeros(())}
    problem = Problem(batches=once, z=z)
    apart = metagradient(problem)[1]["weights"].value
    together = metagradient(replace(problem, batches=twice))[1]["weights"].value
    assert np.all(np.abs(apart) > 1e-6)
    np.testing.assert_allclose(together[: BATCH // 2], apart[: BATCH // 2] + apart[BATCH // 2 :], rtol=1e-10)
    assert not np.any(together[BATCH // 2 :])


def test_a_start_that_depends_on_z():
    problem = started()
    assert_same(metagradient(problem), reference(problem))


def test_parameters_and_model_state_that_start_from_z():
    problem = batch_norm()
    params, statistics = problem.init
    # Example weights reach the start too, whole.
    problem = replace(
        problem,
        z=problem.z | {"scale": np.asarray(1.1), "variance": mg.Shared(statistics["variance"])},
        init=lambda z: (
            jax.tree.map(lambda p: p * z["scale"] * jnp.mean(z["weights"]), params),
            {**statistics, "variance": z["variance"] ** 2},
        ),
    )
    assert_same(metagradient(problem), reference(problem))


def test_an_objective_that_reads_z():
    problem, _ = known("momentum")

    def objective(state, z):
        return held_out(state, z) * (1 + jnp.sum(z["weights"] ** 3)) + z["temperature"][2] ** 2

    problem = replace(problem, objective=objective)
    assert_same(metagradient(problem), reference(problem))


def started():
    """The driven problem, with its first layer from z."""
    problem = with_optimiser("driven")
    return replace(problem, z=problem.z | {"w1": mlp()["w1"]}, init=lambda z: {**mlp(), "w1": z["w1"]})


@pytest.mark.parametrize("window", [1, 4])
def test_a_window_differentiates_the_last_steps(window):
    problem = started()
    value, grad = metagradient(problem, window=window, segment=Segment(3, "steps", "state"))
    again = metagradient(problem, window=window, segment=Segment(3, "steps", "state"), schedule=KeepAll())
    assert_same((value, grad["lr"]), (again[0], again[1]["lr"]), 0)
    expected_value, expected = reference(problem, window)
    outside = STEPS - window
    assert not np.any(grad["lr"].value[:outside])
    assert np.all(np.abs(grad["lr"].value[outside:]) > 0)
    late = {i for batch in problem.batches[outside:] for i in batch["index"]}
    assert set(np.flatnonzero(grad["weights"].value)) == late
    assert not np.any(grad.pop("w1"))
    assert not np.any(expected.pop("w1"))
    assert_same((value, grad), (expected_value, expected))


def test_a_window_of_the_whole_run_is_the_metagradient():
    problem = started()
    assert_same(metagradient(problem, window=STEPS), metagradient(problem), 0)


QUERIES = rows(100, 103)


def queries(state, z):
    """A loss a query, float[3]; the second reads z too."""
    losses = cross_entropy(logits(state.params, QUERIES["x"]), QUERIES["y"])
    return losses.at[1].add(jnp.sum(z["weights"] ** 2))


@pytest.mark.parametrize("segment", [STEPWISE, Segment(4)], ids=["steps", "scan"])
def test_several_queries_in_one_traversal(segment):
    problem = started()
    together = mg.value_and_metagrad(
        problem.training(), queries, vector=True, schedule=KaryTree(2, "host"), segment=segment
    )
    values, grads = together(problem.z)
    assert grads["weights"].value.shape == (3, EXAMPLES)
    assert grads["w1"].shape == (3, *mlp()["w1"].shape)
    for q in range(3):
        one = replace(problem, objective=lambda state, z, q=q: queries(state, z)[q])
        assert_same(jax.tree.map(lambda x, q=q: x[q], (values, grads)), metagradient(one, schedule=KeepAll()))


def uneven(sizes):
    stops = np.cumsum(sizes) + 100
    return [rows(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def test_an_objective_that_is_walked_in_uneven_batches():
    problem, expected = known("momentum")

    def loss(state, batch):
        return jnp.mean(cross_entropy(logits(state.params, batch["x"]), batch["y"]))

    walked = replace(problem, objective=mg.mean_over(uneven([11, 7, 2]), loss))
    assert_same(metagradient(walked), expected)


def test_several_queries_walked_in_uneven_batches():
    problem, expected = known("momentum")

    def loss(state, batch):
        one = jnp.mean(cross_entropy(logits(state.params, batch["x"]), batch["y"]))
        return jnp.stack([one, 3 * one])

    objective = mg.mean_over(uneven([11, 7, 2]), loss)
    found = mg.value_and_metagrad(problem.training(), objective, vector=True, segment=STEPWISE)(problem.z)
    assert_same(jax.tree.map(lambda x: x[1] / 3, found), expected)
    assert_same(jax.tree.map(lambda x: x[0], found), expected)


@cache
def dropout_reference():
    return reference(dropout())


def test_a_key_in_the_model_state():
    problem = dropout()
    assert_same(metagradient(problem), dropout_reference())


def test_a_step_written_by_hand():
    """The same run in a state of the user's own making: a typed key, an integer counter, momentum written out."""
    problem = dropout()
    params, key = problem.init

    def step(state, batch, z):
        key, here = jax.random.split(state["key"])
        kept = jax.random.bernoulli(here, 0.8, (64,))
        gradient = jax.grad(digit_loss)(state["params"], {**batch, "x": batch["x"] * kept}, z)
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["momentum"], gradient)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], momentum)
        return {"params": params, "momentum": momentum, "key": key, "taken": state["taken"] + 1}

    start = {"params": params, "momentum": jax.tree.map(np.zeros_like, params), "key": key, "taken": 0}

    def objective(state, z):
        return held_out(mg.TrainState(state["params"], None, None, state["taken"]), z)

    expected = dropout_reference()
    for segment in (STEPWISE, Segment(4)):
        written = mg.value_and_metagrad(
            mg.Training(start, step, problem.batches), objective, schedule=KaryTree(2, "host"), segment=segment
        )
        assert_same(written(problem.z), expected)


def test_keys_in_batches():
    """A key a step, without an axis of examples: it goes whole to every micro-batch."""
    keys = jax.random.split(jax.random.key(7), STEPS)
    drawn = [{**batch, "key": key} for batch, key in zip(batches(), keys, strict=True)]

    def loss(params, batch, z):
        kept = jax.random.bernoulli(batch["key"], 0.8, (64,))
        return digit_loss(params, {**batch, "x": batch["x"] * kept}, z)

    masked = [
        {**batch, "x": batch["x"] * np.asarray(jax.random.bernoulli(batch["key"], 0.8, (64,)))} for batch in drawn
    ]
    masked = [{k: v for k, v in batch.items() if k != "key"} for batch in masked]
    expected = reference(Problem(batches=masked))
    assert_same(metagradient(Problem(loss, batches=drawn, microbatches=4), segment=Segment(4)), expected)


def test_numbers_and_transposed_arrays_in_batches():
    drawn = [{**batch, "x": np.asfortranarray(batch["x"]), "scale": 0.5 + t / 20} for t, batch in enumerate(batches())]

    def loss(params, batch, z):
        return digit_loss(params, {**batch, "x": batch["x"] * batch["scale"]}, z)

    expected = reference(Problem(batches=[{**b, "x": b["x"] * (0.5 + t / 20)} for t, b in enumerate(batches())]))
    assert_same(metagradient(Problem(loss, batches=drawn)), expected)


MODULES = {
    "a network": lambda key: eqx.nn.MLP(64, CLASSES, 6, 1, activation=jnp.tanh, key=key),
    "one leaf": lambda key: eqx.nn.Linear(64, CLASSES, use_bias=False, key=key),
}


@pytest.mark.parametrize("name", MODULES)
def test_an_equinox_module_as_parameters(name):
    problem = equinox_model(MODULES[name](jax.random.key(0)))
    expected = reference(replace(problem, init=lambda z: problem.init))
    assert_same(metagradient(problem), expected)


def difference(function, z, direction, h):
    ahead, behind = (function(jax.tree.map(lambda x, d, s=s: x + s * d, z, direction)) for s in (h, -h))
    return (ahead - behind) / (2 * h)


@pytest.mark.parametrize(
    "problem", [lambda: with_optimiser("driven"), lambda: with_optimiser("muon"), batch_norm, tied]
)
def test_finite_differences(problem):
    """Richardson's extrapolation of central differences along a random direction, through `train` alone."""
    problem = problem()
    training = problem.training()
    z = jax.tree.map(jnp.asarray, problem.z)
    rng = np.random.default_rng(4)
    # Relative to each entry, so that no metaparameter is moved across zero.
    direction = jax.tree.map(lambda x: x * rng.normal(size=x.shape), z)

    def function(z):
        return problem.objective(mg.train(training, z, segment=STEPWISE), z)

    coarse, fine = (difference(function, z, direction, h) for h in (2e-3, 1e-3))
    numeric = (4 * fine - coarse) / 3
    _, grad = metagradient(problem, training=training)
    exact = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(direction), strict=True))
    assert abs(numeric) > 1e-4
    assert abs(exact - numeric) <= 1e-6 * abs(numeric)


def test_a_schedule_from_the_budget_and_statistics_that_count_steps():
    problem, expected = known("momentum")
    function = mg.value_and_metagrad(problem.training(), problem.objective, segment=STEPWISE)
    value, grad, stats = function.with_stats(problem.z)
    assert_same((value, grad), expected)
    assert stats.schedule == KeepAll()
    assert stats.adjoint_steps == STEPS


@pytest.mark.parametrize("optimizer", [optax.sgd(0.3), lambda z: optax.sgd(0.3)], ids=["made", "of z"])
def test_nothing_to_differentiate(optimizer):
    value, grad = metagradient(Problem(lambda p, b, z: digit_loss(p, b, every_slice()), optimizer, z={}))
    assert grad == {}
    assert np.isfinite(value)


def every_slice():
    return {"weights": jnp.ones(BATCH), "temperature": 1.0, "ridge": 0.0}


def test_batch_norm_is_read_at_its_running_statistics():
    """Guards the problem itself: without a cotangent of the statistics, its gradient would be another."""
    problem = batch_norm()
    params, statistics = problem.init
    state = mg.TrainState(params, None, statistics, jnp.int32(0))
    _, pull = jax.vjp(
        lambda s: batch_norm_held_out(replace(state, model_state={**statistics, "mean": s}), None), statistics["mean"]
    )
    assert np.any(np.abs(pull(jnp.ones(()))[0]) > 1e-3)


@pytest.mark.parametrize("segment", [Segment(1, "steps", "state"), Segment(4), Segment(3, "unroll")], ids=str)
def test_batches_without_leaves(segment):
    """A run of ten steps that read no data: (1 - rate)^10."""
    training = mg.Training(jnp.ones(3), lambda state, batch, z: state * (1 - z["rate"]), [{}] * 10)
    grad = mg.value_and_metagrad(training, lambda state, z: state[0], segment=segment)({"rate": jnp.asarray(0.1)})[1]
    assert float(grad["rate"]) == pytest.approx(-10 * 0.9**9, rel=1e-6)
