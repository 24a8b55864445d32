"""`PerGroup`: one number for many examples. `args=`: constants of a run."""

import gc
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
    STEPS,
    Problem,
    assert_same,
    cross_entropy,
    digit_loss,
    logits,
    mlp,
    reference,
    with_optimiser,
)
from quick import crossed

import metagradient as mg
from metagradient._jax import compile_seconds
from metagradient.errors import BatchError, StructureError
from metagradient.given import Given
from metagradient.metaparameters import canonical

pytestmark = pytest.mark.core
STEPWISE = mg.Segment(1, "steps", "state")
SEGMENTS = [STEPWISE, mg.Segment(4, "scan"), mg.Segment(2, "unroll")]
GROUPS = np.random.default_rng(0).integers(0, 5, EXAMPLES)
MIXTURE = np.linspace(0.5, 1.5, 5)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def grouped(value: Any = MIXTURE, **changes: Any) -> Problem:
    """Digits whose weights are those of their groups."""
    z = {**with_optimiser("momentum").z, "weights": mg.PerGroup(value, GROUPS)}
    return replace(with_optimiser("momentum"), z=z, **changes)


def curriculum() -> Any:
    return MIXTURE * np.linspace(0.8, 1.2, STEPS)[:, None]


@pytest.mark.parametrize(("segment", "microbatches", "value"), crossed(SEGMENTS, [1, 2], [curriculum(), MIXTURE]))
def test_the_gradient_is_that_of_the_unrolled_loop(segment, microbatches, value):
    problem = grouped(value, microbatches=microbatches)
    schedule = mg.schedule.Binomial(3)
    evaluate = mg.value_and_metagrad(problem.training(), problem.objective, segment=segment, schedule=schedule)
    value, found = evaluate(problem.z)
    expected, grad = reference(problem)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    assert_same(found, grad)
    np.testing.assert_array_equal(found["weights"].groups, GROUPS)


@pytest.mark.parametrize("segment", SEGMENTS, ids=str)
def test_it_is_the_sum_of_each_groups_examples(segment):
    problem = grouped()
    training = problem.training()
    of_groups = mg.value_and_metagrad(training, problem.objective, segment=segment)(problem.z)[1]["weights"].value
    each = {**problem.z, "weights": mg.PerExample(MIXTURE[GROUPS])}
    of_examples = mg.value_and_metagrad(training, problem.objective, segment=segment)(each)[1]["weights"].value
    sums = np.bincount(GROUPS, np.asarray(of_examples), 5)
    np.testing.assert_allclose(of_groups, sums, rtol=0, atol=1e-12 * np.abs(sums).max())


def test_windows_queries_and_jax_grad():
    problem = grouped(curriculum())
    training = problem.training()
    truncated = mg.value_and_metagrad(training, problem.objective, window=4, segment=STEPWISE)(problem.z)[1]["weights"]
    expected = reference(problem, window=4)[1]["weights"]
    assert_same(truncated, expected)
    assert not np.any(truncated.value[: STEPS - 4])
    both = mg.value_and_metagrad(
        training, lambda s, z: jnp.stack([problem.objective(s, z), jnp.sum(z["weights"] ** 3)]), vector=True
    )(problem.z)[1]["weights"]
    assert_same(jax.tree.map(lambda x: x[0], both), reference(problem)[1]["weights"])
    np.testing.assert_allclose(both.value[1], 3 * curriculum() ** 2, rtol=1e-12)
    through = jax.grad(lambda z: problem.objective(mg.train(training, z, adjoint=mg.Replay()), None))(problem.z)
    assert_same(through, reference(problem)[1])


def test_trainings_side_by_side_and_directions():
    problem = grouped()
    training = problem.training()
    zs = [{**problem.z, "weights": mg.PerGroup(a * MIXTURE, GROUPS)} for a in (0.5, 1.0, 2.0)]
    for together, z in zip(mg.train_many(training, zs, at_once=3), zs, strict=True):
        alone = mg.train(training, z, segment=STEPWISE)
        np.testing.assert_allclose(together.params["w1"], alone.params["w1"], rtol=1e-10)
    report = mg.metasmoothness(training, problem.objective, problem.z, directions=1)
    assert report.finite
    assert mg.check(training, problem.objective, problem.z, directions=1).ok


def test_updates_move_groups_and_a_journal_knows_them(tmp_path):
    problem = grouped()
    training = problem.training()

    def descend(z: Any, steps: int) -> Any:
        update = optax.chain(mg.updates.normalised(0.1), mg.updates.block_coordinate(0.9))
        return mg.descend(
            training, problem.objective, z, update, steps, out=tmp_path / "run", project=mg.updates.box(0, 3)
        )

    first = list(descend(problem.z, 2))
    again = descend(problem.z, 4)
    assert again.step == 2
    records = list(again)
    assert records[-1].value < first[0].value
    np.testing.assert_array_equal(again.z["weights"].groups, GROUPS)
    other = {**problem.z, "weights": mg.PerGroup(MIXTURE, (GROUPS + 1) % 5)}
    with pytest.raises(mg.errors.ConfigError, match="groups with checksum"):
        descend(other, 4)


def test_other_values_and_groups_compile_nothing_and_ten_million_cost_what_ten_thousand_do():
    def program(n: int) -> Any:
        problem = replace(with_optimiser("sgd"), z={"weights": mg.PerGroup(np.ones(100), np.arange(n) % 100)})
        training = Problem(
            lambda p, b, z: jnp.mean(z["weights"] * cross_entropy(logits(p, b["x"]), b["y"])),
            problem.optimizer,
            problem.init,
            problem.batches,
            problem.z,
        ).training()
        z = canonical(problem.z)
        given = Given.of(z)
        form, state = training.programs.form(STEPWISE), training.initial(z)
        cotangent = tuple(jnp.ones_like(x) for x in jax.tree.leaves((state.params, state.opt_state)))
        lowered = form.pull_one.lower(False, given.z, cotangent, given, jnp.int32(0), state, (), training.batches[0])
        compiled = lowered.compile()
        return len(lowered.as_text()), compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

    small, large = program(10_000), program(10_000_000)
    assert abs(small[0] - large[0]) < 200
    assert small[1:] == large[1:]
    problem = grouped()
    training = problem.training()
    evaluate = mg.value_and_metagrad(training, problem.objective, segment=STEPWISE)
    evaluate(problem.z)
    with compile_seconds() as spent:
        evaluate({**problem.z, "weights": mg.PerGroup(2 * MIXTURE, GROUPS[::-1].copy())})
    assert spent.programs == 0


def test_what_is_refused():
    for value, groups, words in [
        (np.ones((2, 3, 4)), [0], r"\[G\], or \[T, G\]"),
        (np.ones(()), [0], r"\[G\], or \[T, G\]"),
        (np.ones(3), [0, 3], r"hold 3, outside \[0, 3\)"),
        (np.ones(3), [0, -1], r"groups\[1\] is"),
        (np.ones(3), [0.0, 1.0], "vector of integers"),
        (np.ones(3), [[0, 1]], "vector of integers"),
    ]:
        with pytest.raises(StructureError, match=words):
            mg.PerGroup(value, groups)
    problem = grouped(MIXTURE * np.ones((STEPS + 1, 1)))
    with pytest.raises(StructureError, match=rf"PerGroup with shape \[{STEPS + 1}, 5\], but the run takes"):
        mg.train(problem.training(), problem.z)
    short = {**grouped().z, "weights": mg.PerGroup(MIXTURE, GROUPS[:4])}
    with pytest.raises(BatchError, match=r"outside \[0, 4\)"):
        mg.train(problem.training(), short)
    bare = [{k: v for k, v in batch.items() if k != "index"} for batch in problem.batches]
    with pytest.raises(BatchError, match="PerGroup"):
        mg.train(replace(problem, batches=bare).training(), grouped().z)
    surrogate: Any = mg.CountSurrogate(lambda counts: problem.training(), [], lambda *a: jnp.zeros(1), 0)
    with pytest.raises(StructureError, match=r"mg\.PerGroup"):
        surrogate.evaluate(problem.objective, {"c": mg.PerGroup(np.ones(5), GROUPS)})


# args


def scaled(params: Any, batch: Any, z: Any, args: Any) -> Any:
    """Digits through frozen features."""
    return digit_loss(params, {**batch, "x": jnp.tanh(batch["x"] @ args["frozen"])}, z)


FROZEN = np.random.default_rng(3).normal(size=(64, 64)) / 8


def with_args(frozen: Any = FROZEN, idle: int = 0, **options: Any) -> mg.Training:
    problem, args = with_optimiser("momentum"), {"frozen": frozen, "idle": np.zeros(idle)}
    return mg.Training.from_loss(scaled, problem.optimizer, problem.init, problem.batches, args=args, **options)


def closed_over(problem: Problem) -> Problem:
    return replace(problem, loss=lambda params, batch, z: scaled(params, batch, z, {"frozen": jnp.asarray(FROZEN)}))


@pytest.mark.parametrize(("segment", "microbatches"), crossed(SEGMENTS, [1, 2]), ids=str)
def test_args_reach_the_loss_and_the_gradient_is_as_if_they_were_closed_over(segment, microbatches):
    problem = replace(with_optimiser("momentum"), microbatches=microbatches)
    training = with_args(microbatches=microbatches)
    found = mg.value_and_metagrad(training, problem.objective, segment=segment)(problem.z)
    assert_same(found[1], reference(closed_over(problem))[1])
    vector = mg.value_and_metagrad(training, lambda s, z: problem.objective(s, z)[None], vector=True, segment=segment)
    assert_same(jax.tree.map(lambda x: x[0], vector(problem.z)[1]), found[1], 1e-12)


def test_a_written_step_a_mean_and_counts_take_them():
    batches = [{"x": np.arange(3.0) + t} for t in range(5)]
    training = mg.Training(
        jnp.ones(3), lambda s, b, z, args: s - z * args["a"] * (s - b["x"]), batches, {"a": np.float64(0.3)}
    )
    loop = lambda z: _loop(z, batches, 0.3)  # noqa: E731
    mean = mg.mean_over(
        [{"y": np.ones(2)}, {"y": np.zeros(3)}], lambda s, b, args: jnp.mean(args * b["y"]) * jnp.sum(s**2), args=2.0
    )
    value, found = mg.value_and_metagrad(training, mean)(jnp.asarray(0.5))
    expected = jax.value_and_grad(lambda z: 2.0 * 2 / 5 * jnp.sum(loop(z) ** 2))(0.5)
    np.testing.assert_allclose((value, found), expected, rtol=1e-12)
    assert mg.check(training, mean, jnp.asarray(0.5)).ok
    assert float(mean(jnp.ones(3))) == pytest.approx(2 * 2 / 5 * 3)


def _loop(z: Any, batches: Any, a: float) -> Any:
    state = jnp.ones(3)
    for batch in batches:
        state = state - z * a * (state - batch["x"])
    return state


def test_numpy_arrays_are_taken_as_they_were_and_other_values_compile_nothing():
    frozen, problem = FROZEN.copy(), with_optimiser("momentum")
    training = with_args(frozen)
    frozen[:] = 0
    evaluate = mg.value_and_metagrad(training, problem.objective, segment=STEPWISE)
    assert_same(evaluate(problem.z)[1], reference(closed_over(problem))[1])
    other = with_args(FROZEN[::-1])
    assert other.programs is training.programs
    with compile_seconds() as spent:
        mg.value_and_metagrad(other, problem.objective, segment=STEPWISE)(problem.z)
    assert spent.programs == 0


def test_large_args_are_no_part_of_programs_and_go_with_their_training():
    def size(width: int) -> int:
        frozen = np.ones((64, width)), np.ones((width, 64))
        training = mg.Training.from_loss(
            lambda p, b, z, args: digit_loss(p, {**b, "x": b["x"] @ args[0] @ args[1] / width}, z),
            optax.sgd(0.1), mlp(), with_optimiser("sgd").batches, args=frozen,
        )  # fmt: skip
        state, given = training.initial({}), Given.of(canonical(with_optimiser("sgd").z), training.args)
        form = training.programs.form(STEPWISE)
        return len(form.advance_one.lower(state, given, jnp.int32(0), training.batches[0]).as_text())

    # 100 MiB of float64.
    assert abs(size(64) - size(100 * 2**20 // 8 // 128)) < 200
    training, problem = with_args(), with_optimiser("momentum")
    mg.value_and_metagrad(training, problem.objective, segment=STEPWISE)(problem.z)
    gone = weakref.ref(training.args["frozen"])
    del training
    gc.collect()
    assert gone() is None


def test_args_are_part_of_a_runs_identity(tmp_path):
    problem = with_optimiser("momentum")

    def descend(training: mg.Training, steps: int) -> Any:
        return mg.descend(training, problem.objective, problem.z, mg.updates.sign(0.01), steps, out=tmp_path / "run")

    list(descend(with_args(), 1))
    assert descend(with_args(), 2).step == 1
    with pytest.raises(mg.errors.ConfigError, match="checksum of args"):
        descend(with_args(2 * FROZEN), 2)


def test_checks_twin_takes_them_in_float64():
    with jax.enable_x64(False):
        problem = with_optimiser("momentum", np.float32)
        training = mg.Training.from_loss(
            scaled, problem.optimizer, problem.init, problem.batches, args={"frozen": FROZEN.astype(np.float32)}
        )
        report = mg.check(training, problem.objective, problem.z, directions=1)
    assert report.ok, str(report)
    assert not report.single


def test_a_plan_counts_them():
    z, memory = with_optimiser("momentum").z, mg.Memory(device="150kB")
    assert mg.plan(with_args(), z, memory=memory)
    with pytest.raises(mg.errors.ScheduleError, match="feasible"):
        mg.plan(with_args(idle=20_000), z, memory=memory)
