"""`jax.grad` through a run: the same traversal behind JAX's own transformations."""

import gc
import threading
import weakref
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    EXAMPLES,
    OPTIMISERS,
    STEPS,
    assert_same,
    cross_entropy,
    digit_loss,
    dropout,
    logits,
    reference,
    rows,
    unrolled,
    with_optimiser,
)
from quick import crossed, slow_but

import metagradient as mg
from metagradient._jax import compile_seconds
from metagradient.errors import DerivativeError, NonFiniteError, StructureError
from metagradient.replay.schedule import Advance, Keep
from metagradient.step.contract import Contract

pytestmark = pytest.mark.core
STEPWISE = mg.Segment(1, "steps", "state")
QUERIES_OF = np.random.default_rng(1).normal(size=(EXAMPLES, 5))
BINOMIAL = mg.Replay(schedule=mg.schedule.Binomial(4), segment=STEPWISE)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def through(problem: Any, adjoint: mg.Replay = BINOMIAL, **options: Any) -> Any:
    """The objective of a run as a function of z."""
    training = problem.training(**options)
    return lambda z: problem.objective(mg.train(training, z, adjoint=adjoint), None)


# The table's others are differentiated by the same programs in test_exactness.
@pytest.mark.parametrize("name", slow_but(("momentum", "adam", "driven", "noise"), OPTIMISERS))
def test_the_gradient_is_that_of_the_unrolled_loop(name):
    problem = with_optimiser(name)
    value, found = jax.value_and_grad(through(problem))(problem.z)
    expected, grad = reference(problem)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert_same(found, grad)


SCHEDULES = [mg.schedule.Binomial(3), mg.schedule.TwoLevel(), mg.schedule.KaryTree(2, "disk"), mg.schedule.KeepAll()]


@pytest.mark.parametrize(("verify", "later"), [("boundaries", 1), ("off", 0)])
def test_a_step_is_traced_again_twice_by_the_first_call_and_once_by_a_later_one(monkeypatch, verify, later):
    traced, real = [], Contract._retraced
    monkeypatch.setattr(Contract, "_retraced", lambda self: (traced.append(None), real(self))[1])
    # A loss of its own: programs of an equal one may be there.
    problem = replace(with_optimiser("sgd"), loss=lambda *arguments: digit_loss(*arguments))
    evaluate = mg.value_and_metagrad(problem.training(), problem.objective, segment=STEPWISE, verify=verify)
    evaluate(problem.z)
    first = len(traced)
    evaluate(problem.z)
    assert (first, len(traced) - first) == (2, later)


@pytest.mark.parametrize(
    ("schedule", "segment"), crossed(SCHEDULES, [STEPWISE, mg.Segment(3, "scan"), mg.Segment(2, "unroll")]), ids=str
)
def test_steps_are_as_the_schedule_says_and_bits_those_of_value_and_metagrad(schedule, segment):
    problem, stats = with_optimiser("adam"), []
    adjoint = mg.Replay(schedule=schedule, segment=segment, verify="off", stats=stats.append)
    training = problem.training()
    value, found = jax.value_and_grad(lambda z: problem.objective(mg.train(training, z, adjoint=adjoint), None))(
        problem.z
    )
    together = mg.value_and_metagrad(training, problem.objective, schedule=schedule, segment=segment, verify="off")
    other, expected, took = together.with_stats(problem.z)
    segments = -(-STEPS // segment.length)
    steps = [min(segment.length, STEPS - i * segment.length) for i in range(segments)]
    actions = list(schedule.actions(segments))
    advanced = sum(sum(steps[a.start : a.stop]) for a in actions if isinstance(a, Advance))
    kept = sum(steps[a.segment] for a in actions if isinstance(a, Keep))
    assert stats[0].adjoint_steps == took.adjoint_steps == STEPS
    assert stats[0].forward_steps == took.forward_steps
    if segment.loop != "steps":
        assert stats[0].forward_steps == advanced + kept
    elif isinstance(schedule, mg.schedule.Binomial):
        # A single step that keeps its state alone is only taken where its end is read: here the last.
        assert stats[0].forward_steps == advanced + 1
    assert float(value) == pytest.approx(float(other), rel=1e-14)
    assert_same(found, expected, 1e-13)


def test_aux_and_what_jax_does_with_it():
    problem = with_optimiser("momentum")
    training = problem.training()

    def outer(z):
        state = mg.train(training, z, adjoint=BINOMIAL)
        return problem.objective(state, None), {"params": state.params, "step": state.step}

    (_, aux), found = jax.value_and_grad(outer, has_aux=True)(problem.z)
    expected = reference(problem)[1]
    assert_same(found, expected)
    plain = mg.train(training, problem.z, segment=STEPWISE)
    assert int(aux["step"]) == STEPS
    for a, b in zip(jax.tree.leaves(aux["params"]), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_array_equal(a, b)
    # The same of value_and_metagrad.
    both = mg.value_and_metagrad(
        training, lambda s, z: (problem.objective(s, z), {"ridge": z["ridge"], "w": s.params["w1"]}), has_aux=True,
        segment=STEPWISE,
    )  # fmt: skip
    (value, aux), found = both(problem.z)
    assert_same(found, expected)
    assert float(aux["ridge"]) == float(problem.z["ridge"].value)
    np.testing.assert_array_equal(aux["w"], plain.params["w1"])
    assert float(both.evaluate(problem.z).value) == float(value)
    with pytest.raises(StructureError, match="has_aux=True says"):
        mg.value_and_metagrad(training, problem.objective, has_aux=True)(problem.z)


def test_several_runs_in_one_objective_and_z_made_of_something_else():
    problem = with_optimiser("momentum")
    run, loop = through(problem), unrolled(problem)

    def made(u: dict) -> dict:
        weights = EXAMPLES * jax.nn.softmax(jnp.tanh(jnp.asarray(QUERIES_OF) @ u["net"]))
        return {**problem.z, "weights": mg.PerExample(weights), "ridge": mg.Shared(jnp.exp(u["log_ridge"]))}

    def objective(run: Any) -> Any:
        return lambda u: run(made(u)) + 2 * run(jax.tree.map(lambda x: 0.5 * x, made(u)))

    u = {"net": jnp.asarray(np.random.default_rng(0).normal(size=5)), "log_ridge": jnp.asarray(-4.0)}
    value, found = jax.value_and_grad(objective(run))(u)
    expected, grad = jax.value_and_grad(objective(loop))(u)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert_same(found, grad)


def test_a_run_whose_start_comes_from_z_and_a_window():
    problem = with_optimiser("sgd")
    problem = replace(
        problem,
        init=lambda z, start=problem.init: jax.tree.map(lambda p: p * (1 + z["ridge"]), start),
    )
    assert_same(jax.grad(through(problem))(problem.z), reference(problem)[1])
    truncated = jax.grad(through(problem, mg.Replay(schedule=mg.schedule.TwoLevel(), segment=STEPWISE, window=4)))
    assert_same(
        {k: v for k, v in truncated(problem.z).items() if k != "temperature"},
        {k: v for k, v in reference(problem, window=4)[1].items() if k != "temperature"},
    )


def test_states_with_keys_and_counters():
    problem = dropout()
    training = problem.training()
    grad = jax.grad(lambda z: problem.objective(mg.train(training, z, adjoint=BINOMIAL), None))(problem.z)
    assert_same(grad, mg.value_and_metagrad(training, problem.objective, segment=STEPWISE)(problem.z)[1], 1e-12)


def test_the_mean_over_a_set_is_part_of_an_objective_a_batch_at_a_time():
    problem = with_optimiser("momentum")
    read: list[int] = []
    data, cuts = rows(100, 120), [slice(0, 8), slice(8, 16), slice(16, 20)]

    class Set:
        def __len__(self) -> int:
            return len(cuts)

        def __getitem__(self, i: int) -> dict:
            read.append(i)
            return {name: column[cuts[i]] for name, column in data.items()}

    def loss(state: Any, batch: Any) -> Any:
        return jnp.mean(cross_entropy(logits(state.params, batch["x"]), batch["y"]))

    mean, training = mg.mean_over(Set(), loss), problem.training()
    whole = replace(problem, objective=lambda s, z: loss(s, data) + jnp.sum(z["weights"] ** 2))
    expected = reference(whole)

    def penalised(state: Any, z: Any) -> Any:
        return mean(state, z) + jnp.sum(z["weights"] ** 2)

    value, found = mg.value_and_metagrad(training, penalised, segment=STEPWISE)(problem.z)
    assert float(value) == pytest.approx(float(expected[0]), rel=1e-12)
    assert_same(found, expected[1])

    def through_jax(z: Any) -> Any:
        return mean(mg.train(training, z, adjoint=BINOMIAL)) + jnp.sum(z["weights"].value ** 2)

    assert_same(jax.grad(through_jax)(problem.z), expected[1])
    with compile_seconds() as spent:
        mg.value_and_metagrad(training, penalised, segment=STEPWISE)(problem.z)
    assert spent.programs < 3 * len(cuts), "the set is compiled into the objective"
    for wrapped in (jax.jit, jax.vmap):
        with pytest.raises(DerivativeError, match="mean_over is called in a compiled or mapped function"):
            wrapped(mean)(jax.tree.map(lambda x: jnp.stack([x] * 2), mg.train(training, problem.z)))
    with pytest.raises(DerivativeError, match="mean_over is called in a compiled"):
        mg.value_and_metagrad(training, lambda s, z: jax.jit(mean)(s))(problem.z)


# What may not be asked, each with a remedy.

SMALL = with_optimiser("sgd")


def stacked(z: Any) -> Any:
    return jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * 2), z)


def trained(z: Any, adjoint: mg.Replay | None = BINOMIAL, **changes: Any) -> Any:
    problem = replace(SMALL, **changes)
    args = {"args": changes.pop("args")} if "args" in changes else {}
    return problem.objective(mg.train(problem.training(**args), z, adjoint=adjoint), None)


MISUSES = {
    "no adjoint": lambda z: jax.grad(lambda z: trained(z, None))(z),
    "jit of a run": lambda z: jax.jit(trained)(z),
    "jit of a gradient": lambda z: jax.jit(jax.grad(trained))(z),
    "vmap": lambda z: jax.vmap(trained)(stacked(z)),
    "a gradient of a gradient": lambda z: jax.grad(lambda z: jax.grad(trained)(z)["ridge"].value)(z),
    "checkpoint": lambda z: jax.grad(jax.checkpoint(trained))(z),
    "jit without adjoint": lambda z: jax.jit(lambda z: trained(z, None))(z),
    "the rate of an optimiser": lambda z: jax.grad(lambda x: trained(z, optimizer=optax.sgd(x)))(0.1),
    "a number in a loss": lambda z: jax.grad(lambda x: trained(z, loss=lambda *a: x * digit_loss(*a)))(1.0),
    "a start": lambda z: jax.grad(lambda x: trained(z, init=jax.tree.map(lambda p: x * p, SMALL.init)))(1.0),
    "a start of z": lambda z: jax.grad(lambda x: trained(z, init=lambda _: jax.tree.map(lambda p: x * p, SMALL.init)))(
        1.0
    ),
    "batches": lambda z: jax.grad(lambda x: trained(z, batches=[{**b, "x": x * b["x"]} for b in SMALL.batches]))(1.0),
}


@pytest.mark.parametrize("name", MISUSES)
def test_what_is_traced_is_refused_with_a_remedy(name):
    with pytest.raises(DerivativeError, match=r"trace[sd].*adjoint=mg\.Replay"):
        MISUSES[name](jax.tree.map(jnp.asarray, SMALL.z))


def test_args_that_are_traced_are_refused():
    def run(scale: Any) -> Any:
        training = mg.Training.from_loss(
            lambda p, b, z, args: args * digit_loss(p, b, z), SMALL.optimizer, SMALL.init, SMALL.batches, args=scale
        )
        return SMALL.objective(mg.train(training, SMALL.z, adjoint=BINOMIAL), None)

    with pytest.raises(DerivativeError, match=r"args is traced.*not into args"):
        jax.grad(run)(1.0)


def test_many_cotangents_and_a_second_way_back_are_refused():
    training = SMALL.training()

    def params(z: Any) -> Any:
        return mg.train(training, z, adjoint=BINOMIAL).params["b2"]

    z = jax.tree.map(jnp.asarray, SMALL.z)
    with pytest.raises(DerivativeError, match="vector=True"):
        jax.jacrev(params)(z)
    found, back = jax.vjp(params, z)
    weights = jnp.arange(found.size) ** 2.0
    once = back(weights)[0]
    assert_same(once, reference(replace(SMALL, objective=lambda s, z: jnp.vdot(weights, s.params["b2"])))[1])
    with pytest.raises(DerivativeError, match=r"already taken.*call mg\.train again"):
        back(jnp.ones_like(found))


def test_forward_mode_is_jaxs_own_error():
    z = jax.tree.map(jnp.asarray, SMALL.z)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(trained, (z,), (z,))


def test_what_is_not_finite_is_diagnosed_on_both_ways():
    z = jax.tree.map(jnp.asarray, SMALL.z)
    with pytest.raises(NonFiniteError, match=r"step 0 made \.params"):
        jax.grad(lambda z: trained(z, loss=lambda *a: digit_loss(*a) / (a[1]["index"][0] - a[1]["index"][0])))(z)
    with pytest.raises(NonFiniteError, match=r"objective's derivative in \.params\['b2'\] of the final state"):
        jax.grad(lambda z: trained(z, objective=lambda s, z: jnp.sqrt(0 * s.params["b2"]).sum()))(z)
    with pytest.raises(NonFiniteError, match=r"gradient of z\['ridge'\]"):
        jax.grad(
            lambda z: trained(z, loss=lambda p, b, z: digit_loss(p, b, z) + jnp.sqrt(0 * z["ridge"]) * p["b2"][0])
        )(z)


def rooted(params: Any, batch: Any, z: Any) -> Any:
    """A loss without a finite derivative in z alone."""
    return digit_loss(params, batch, z) + jnp.sqrt(0 * z["ridge"]) * params["b2"][0]


# Nothing outlives its use.


def held(adjoint: mg.Replay) -> tuple[Any, list[weakref.ref]]:
    """A run walked forwards, and what it holds."""
    training = SMALL.training()
    found, back = jax.vjp(lambda z: mg.train(training, z, adjoint=adjoint).params, SMALL.z)
    return (found, back), [weakref.ref(training)]


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
def test_a_way_back_that_never_comes_releases_everything(tier, tmp_path):
    adjoint = mg.Replay(memory=None, schedule=mg.schedule.TwoLevel(tier=tier), segment=STEPWISE, progress=True)
    before = threading.active_count()
    run, held_by_it = held(adjoint)
    assert all(ref() for ref in held_by_it)
    del run
    gc.collect()
    assert threading.active_count() <= before
    assert not [ref for ref in held_by_it if ref()]


def test_an_objective_that_raises_releases_everything():
    refs = []

    def objective(z: Any) -> Any:
        training = SMALL.training()
        refs.append(weakref.ref(training))
        mg.train(training, z, adjoint=mg.Replay(schedule=mg.schedule.TwoLevel(tier="disk"), segment=STEPWISE))
        raise RuntimeError("mine")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="mine"):
        jax.grad(objective)(SMALL.z)
    gc.collect()
    assert threading.active_count() <= before
    assert not [ref for ref in refs if ref()]


def precision() -> Any:
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def test_no_context_stays_open_between_the_two_ways():
    training = SMALL.training()
    adjoint = mg.Replay(schedule=mg.schedule.TwoLevel(), segment=STEPWISE, progress=True)
    seen = []

    def objective(z: Any) -> Any:
        state = mg.train(training, z, adjoint=adjoint)
        seen.append(precision())
        return SMALL.objective(state, None)

    jax.grad(objective)(SMALL.z)
    assert seen == [None]
    walk = mg.states(training, SMALL.z, every=2, progress=True)
    next(walk)
    assert precision() is None


def test_options_of_another_kind_are_refused():
    other: Any = "replay", "keep_all", []
    with pytest.raises(StructureError, match=r"give mg\.Replay"):
        mg.train(SMALL.training(), SMALL.z, adjoint=other[0])
    with pytest.raises(StructureError, match=r"mg\.Replay\(segment="):
        mg.train(SMALL.training(), SMALL.z, adjoint=BINOMIAL, segment=3)
    with pytest.raises(StructureError, match="TwoLevel"):
        mg.Replay(schedule=other[1])
    with pytest.raises(StructureError, match="segment is 0"):
        mg.Replay(segment=0)
    with pytest.raises(StructureError, match="memory= or schedule="):
        mg.Replay(memory="2GB", schedule=mg.schedule.TwoLevel())
    with pytest.raises(StructureError, match="stats"):
        mg.Replay(stats=other[2])


# States on the way.


WALKED = [STEPWISE, mg.Segment(4, "scan"), mg.Segment(3, "unroll"), mg.Segment(4, "steps")]


@pytest.mark.parametrize(("segment", "every"), crossed(WALKED, [1, 3, 5, STEPS, STEPS + 7]), ids=str)
def test_states_are_those_that_training_passes_through(segment, every):
    problem = with_optimiser("adam")
    found = list(mg.states(problem.training(), problem.z, every=every, segment=segment))
    assert [t for t, _ in found] == [*range(every, STEPS, every), STEPS]
    last = mg.train(problem.training(), problem.z, segment=segment)
    for a, b in zip(jax.tree.leaves(found[-1][1]), jax.tree.leaves(last), strict=True):
        np.testing.assert_array_equal(a, b)
    short = replace(problem, batches=problem.batches[: found[0][0]])
    z = {**problem.z, "temperature": mg.PerStep(problem.z["temperature"].value[: found[0][0]])}
    alone = mg.train(short.training(), z, segment=STEPWISE)
    np.testing.assert_allclose(found[0][1].params["w1"], alone.params["w1"], rtol=1e-12, atol=1e-14)
    assert int(found[0][1].step) == found[0][0]


def test_states_refuse_what_is_wrong_before_a_step():
    made: Any = SMALL.training
    with pytest.raises(StructureError, match="every is 0"):
        mg.states(SMALL.training(), SMALL.z, every=0)
    with pytest.raises(StructureError, match="training is a method"):
        mg.states(made, SMALL.z, every=2)
