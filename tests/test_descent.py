"""Metagradient descent: the loop, its seeds, its best and its patience."""

from itertools import combinations, pairwise, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metagradient as mg
from metagradient.descent.gradients import Mean
from metagradient.descent.loop import fresh_seed, inner_seed
from metagradient.errors import ConfigError, NonFiniteError, StructureError

pytestmark = pytest.mark.core


def decay(state: jax.Array, batch: dict, z: dict) -> jax.Array:
    return state - z["rate"] * state


def training(seed: int = 0) -> mg.Training:
    start = 1 + np.random.default_rng(seed).random(3, np.float32)
    return mg.Training(jnp.asarray(start), decay, [{}] * 4)


def objective(state: jax.Array, z: dict) -> jax.Array:
    return jnp.sum(state**2)


RATE = {"rate": jnp.float32(0.1)}


def test_descent_lowers_the_objective_and_reports_what_it_did():
    records = list(
        mg.descend(
            training(),
            objective,
            {"rate": mg.PerStep(jnp.full(4, 0.1))},
            mg.updates.normalised(0.05),
            5,
            held_out=lambda s, z: jnp.abs(s).max(),
        )
    )
    assert [r.step for r in records] == list(range(5))
    assert all(b.value < a.value for a, b in pairwise(records))
    state = mg.train(training(), {"rate": mg.PerStep(jnp.full(4, 0.1))})
    assert records[0].held_out == pytest.approx(float(jnp.abs(state).max()))
    assert records[0].training_runs >= 4


def test_everything_is_measured_at_z_and_the_next_step_starts_from_next_z():
    descent = mg.descend(training(), objective, RATE, mg.updates.sign(0.05), 3, held_out=objective)
    records = list(descent)
    assert records[0].z["rate"] == RATE["rate"]
    for record, after in pairwise(records):
        assert record.next_z is after.z
        assert record.value == record.held_out == pytest.approx(float(objective(mg.train(training(), record.z), {})))
    assert descent.z is records[-1].next_z
    assert descent.step == 3
    assert descent.over


def test_it_is_lazy_and_goes_on_where_it_was_left():
    descent = mg.descend(training(), objective, RATE, mg.updates.sign(0.05), 3)
    assert descent.best is None
    assert next(descent).step == 0
    assert (descent.step, descent.over) == (1, False)
    assert [r.step for r in descent] == [1, 2]
    assert list(descent) == []


def test_every_meta_step_draws_fresh_seeds_and_the_descent_is_deterministic():
    def run() -> tuple[list[int], list[float]]:
        seen = []

        def fresh(seed: int) -> mg.Training:
            seen.append(seed)
            return training(seed)

        update = mg.updates.normalised(0.01, momentum=0.5)
        found = [r.value for r in mg.descend(fresh, objective, RATE, update, 3, seed=3, seeds=2)]
        return seen, found

    first, again = run(), run()
    assert first == again
    assert len(set(first[0])) == 6


def test_several_seeds_are_scaled_and_averaged():
    z = {"rate": mg.PerStep(jnp.asarray([0.1, 0.2, 0.3, 0.4]))}
    (record,) = mg.descend(training, objective, z, optax.sgd(1.0), 1, seeds=3, held_out=lambda s, z: s.max())
    units, values = [], []
    for seed in record.seeds:
        assert seed.seed is not None
        value, grad = mg.value_and_metagrad(training(seed.seed), objective)(z)
        g = np.asarray(grad["rate"].value)
        units.append(g / np.sqrt(np.mean(g**2)))
        values.append(float(value))
        assert seed.value == pytest.approx(float(value))
        assert seed.grad_norm == pytest.approx(float(np.linalg.norm(g)))
    np.testing.assert_allclose(z["rate"].value - record.next_z["rate"].value, np.mean(units, axis=0), rtol=1e-5)
    assert record.value == pytest.approx(np.mean(values))
    assert record.held_out == pytest.approx(np.mean([s.held_out or 0.0 for s in record.seeds]))
    assert record.agreement == pytest.approx(np.mean([np.mean(a * b) for a, b in combinations(units, 2)]), rel=1e-5)
    assert record.training_runs >= 3 * 4
    assert record.stats.adjoint_steps == 3 * 4


def _average(grads: list[Any]) -> tuple[Any, float | None]:
    mean = Mean()
    for grad in grads:
        mean.add(grad)
    return mean.found


def test_a_seed_without_a_metagradient_does_not_count():
    grads: list[Any] = [{"a": jnp.asarray([3.0, -4.0]), "b": jnp.zeros(2)}, {"a": jnp.zeros(2), "b": jnp.zeros(2)}]
    mean, agreement = _average(grads)
    assert agreement is None
    np.testing.assert_allclose(mean["a"], np.array([3, -4]) / np.sqrt(12.5), rtol=1e-6)
    np.testing.assert_array_equal(mean["b"], 0)
    # One of unit size, one a million times larger: they weigh the same.
    mean, agreement = _average([jnp.asarray([1.0, 1.0]), jnp.asarray([-1e6, 1e6])])
    np.testing.assert_allclose(mean, [0, 1], atol=1e-6)
    assert agreement == pytest.approx(0, abs=1e-6)


def test_seeds_agree_leaf_by_leaf_as_far_as_leaves_are_there():
    first = {"a": jnp.asarray([2.0, 0.0]), "b": jnp.asarray([1.0, 1.0]), "c": jnp.asarray([1.0, 0.0])}
    second = {"a": jnp.asarray([1.0, 1.0]), "b": jnp.asarray([-3.0, -3.0]), "c": jnp.zeros(2)}
    third = {"a": jnp.zeros(2), "b": jnp.asarray([5.0, -5.0]), "c": jnp.zeros(2)}
    _, agreement = _average([first, second, third])
    # a: one pair, at 45 degrees; b: -1, 0 and 0; c: no pair.
    assert agreement == pytest.approx((np.sqrt(0.5) - 1 / 3) / 2, rel=1e-6)


def test_one_seed_agrees_with_nothing():
    (record,) = mg.descend(training, objective, RATE, mg.updates.sign(0.1), 1)
    assert record.agreement is None


def test_best_is_what_the_best_value_was_measured_at():
    # The held-out value falls until the rate passes 0.3, then rises.
    descent = mg.descend(
        training(), objective, RATE, mg.updates.sign(0.1), 6, held_out=lambda s, z: (z["rate"] - 0.31) ** 2
    )
    records = list(descent)
    assert descent.best
    assert descent.best.step == 2
    assert descent.best.score == records[2].held_out == min(r.held_out for r in records if r.held_out is not None)
    assert float(descent.best.z["rate"]) == pytest.approx(0.3)


def test_without_held_out_the_best_value_counts():
    descent = mg.descend(training(), objective, RATE, mg.updates.sign(-0.05), 3)
    records = list(descent)
    assert descent.best
    assert (descent.best.step, descent.best.score) == (0, records[0].value)


def test_patience_stops_a_descent_that_finds_nothing_better():
    def run(patience: int) -> list[int]:
        descent = mg.descend(
            training(),
            objective,
            RATE,
            mg.updates.sign(0.1),
            8,
            held_out=lambda s, z: (z["rate"] - 0.31) ** 2,
            patience=patience,
        )
        return [r.step for r in descent]

    assert run(1) == [0, 1, 2, 3]
    assert run(3) == [0, 1, 2, 3, 4, 5]


def test_seeds_are_distinct_within_a_descent():
    drawn = {inner_seed(7, step, number) for step, number in product(range(500), range(20))}
    fresh = {fresh_seed(7, number) for number in range(10_000)}
    assert len(drawn) == len(fresh) == 10_000
    assert not drawn & fresh
    assert all(0 <= seed < 2**32 for seed in drawn | fresh)
    assert inner_seed(7, 2**21 - 1, 2**10 - 1) not in fresh
    assert inner_seed(7, 3) != inner_seed(8, 3)
    with pytest.raises(ConfigError):
        inner_seed(7, 0, 2**10)


def test_projection_keeps_the_metaparameters_in_their_box():
    update, project = mg.updates.normalised(5.0), mg.updates.box(0.0, 0.3)
    descent = mg.descend(training(), objective, RATE, update, 3, project=project)
    assert all(float(r.next_z["rate"]) == pytest.approx(0.3) for r in descent)


def test_a_plan_is_measured_once_in_a_descent(monkeypatch: pytest.MonkeyPatch):
    import metagradient._plan as module

    planned, plan_run = [], module.plan_run
    monkeypatch.setattr(module, "plan_run", lambda *a: planned.append(a) or plan_run(*a))
    list(mg.descend(training(), objective, RATE, mg.updates.sign(0.01), 3, memory=mg.Memory(device="1MB")))
    assert len(planned) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"training": 3}, "seed -> Training"),
        ({"update": mg.updates.sign}, "optax transformation"),
        ({"steps": -1}, "steps"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": 2, "training": training()}, "the same every time"),
        ({"seed": -1}, "seed must be"),
        ({"patience": 0, "held_out": objective}, "patience"),
        ({"patience": 2}, "held_out"),
        ({"tensorboard": True}, "out="),
    ],
)
def test_arguments_at_odds_are_refused_before_compute(arguments: dict[str, Any], message: str):
    def never(seed: int) -> mg.Training:
        raise AssertionError

    given = {"training": never, "objective": objective, "z": RATE, "update": mg.updates.sign(0.1), "steps": 2}
    with pytest.raises(ConfigError, match=message):
        mg.descend(**{**given, **arguments})


def test_a_metaparameter_must_be_floating():
    with pytest.raises(StructureError, match="rate"):
        mg.descend(training(), objective, {"rate": jnp.arange(3)}, mg.updates.sign(0.1), 2)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"training": lambda seed: None}, StructureError, "NoneType"),
        ({"project": lambda z: {"rate": jnp.zeros(2)}}, StructureError, "rate"),
        ({"project": lambda z: {"rate": z["rate"] * jnp.nan}}, NonFiniteError, "rate"),
        ({"held_out": lambda s, z: jnp.nan * s.sum()}, NonFiniteError, "held_out"),
        ({"held_out": lambda s, z: s}, StructureError, "scalar"),
    ],
)
def test_what_functions_return_is_checked(changed: dict[str, Any], error: type[Exception], message: str):
    given = {"training": training(), "objective": objective, "z": RATE, "update": mg.updates.sign(0.1), "steps": 2}
    with pytest.raises(error, match=message):
        next(mg.descend(**{**given, **changed}))


# Which z: climbing, kept ones, finalists.


def test_a_descent_climbs():
    down = mg.descend(training(), objective, RATE, mg.updates.sign(-0.05), 4, held_out=lambda s, z: -jnp.sum(s**2))
    up = mg.descend(training(), objective, RATE, mg.updates.sign(0.05), 4, held_out=objective, maximise=True)
    for a, b in zip(down, up, strict=True):
        assert float(a.next_z["rate"]) == float(b.next_z["rate"])
        assert a.value == b.value
        assert a.held_out == -b.held_out  # pyright: ignore[reportOptionalOperand]
    assert down.best
    assert up.best
    assert up.best.step == down.best.step == 3
    assert up.best.score == -down.best.score


def test_every_nth_z_is_kept(tmp_path):
    in_memory = mg.descend(training(), objective, RATE, mg.updates.sign(0.05), 5, keep=2)
    records = list(in_memory)
    assert list(in_memory.kept) == [0, 2, 4]
    for step, z in in_memory.kept.items():
        assert float(z["rate"]) == float(records[step].z["rate"])

    def on_disk(steps: int) -> mg.Descent:
        update = mg.updates.sign(0.05)
        return mg.descend(training(), objective, RATE, update, steps, keep=2, out=tmp_path / "run")

    list(on_disk(3))
    resumed = on_disk(5)
    assert list(resumed.kept) == [0, 2]
    list(resumed)
    for step, z in in_memory.kept.items():
        np.testing.assert_array_equal(resumed.kept[step]["rate"], z["rate"])
    # Of a process that was killed after it wrote a z, and before its meta-step was done.
    (tmp_path / "run" / "kept" / "000006.safetensors").write_bytes(b"torn")
    assert list(on_disk(5).kept) == [0, 2, 4]
    (tmp_path / "run" / "kept" / "000002.safetensors").write_bytes(b"torn")
    with pytest.raises(mg.errors.StoreError, match="000002"):
        _ = on_disk(5).kept


def test_finalists_are_tried_on_common_seeds_that_no_meta_step_draws(tmp_path):
    drawn: list[int] = []

    def made(seed: int) -> mg.Training:
        drawn.append(seed)
        return training(seed)

    descent = mg.descend(made, objective, RATE, mg.updates.sign(0.05), 4, keep=3, out=tmp_path / "run")
    list(descent)
    used, drawn[:] = set(drawn), []
    found = descent.finalists(3)
    fresh = [mg.fresh_seed(0, number) for number in range(3)]
    # Kept, best and last: the best is the last measured one, which was kept too.
    assert [one.name for one in found] == ["meta-step 4", "meta-step 3", "meta-step 0"]
    assert set(drawn) == set(fresh)
    assert not used & set(fresh)
    for one in found:
        expected = [float(objective(mg.train(training(seed), one.z), {})) for seed in fresh]
        assert list(one.scores) == pytest.approx(expected, rel=1e-6)
        apart = np.subtract(one.scores, found[0].scores)
        assert one.behind == pytest.approx(apart.mean())
        assert one.error == pytest.approx(apart.std(ddof=1) / 3**0.5)
    # Again, by a process that goes on: no training is made twice.
    drawn.clear()
    again = mg.descend(made, objective, RATE, mg.updates.sign(0.05), 4, keep=3, out=tmp_path / "run")
    drawn.clear()
    assert [one.scores for one in again.finalists(3)] == [one.scores for one in found]
    assert not drawn
    mine = again.finalists(2, candidates={"mine": {"rate": 0.3}, "start": RATE})
    assert [one.name for one in mine] == ["mine", "start"]
    climbing = mg.descend(made, objective, RATE, mg.updates.sign(0.05), 2, maximise=True)
    list(climbing)
    assert climbing.finalists(2)[0].name == "meta-step 2"
    fixed = mg.descend(training(), objective, RATE, mg.updates.sign(0.05), 2)
    list(fixed)
    assert len(fixed.finalists(5)[0].scores) == 1
    with pytest.raises(ConfigError, match="at least one fresh seed"):
        fixed.finalists(0)
    with pytest.raises(ConfigError, match="need a candidate"):
        fixed.finalists(candidates={})
