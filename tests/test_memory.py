"""`plan` and `memory=`: a budget decides how a real run is differentiated, and changes no bit of the result."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import metagradient as mg
from metagradient.trees import nbytes

pytestmark = [pytest.mark.core, pytest.mark.optimised]

STEPS = 24


def loss(params: dict, batch: dict, z: dict) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(problems.logits(params, batch["x"]), batch["y"])
    return jnp.mean(z["weights"] * losses)


TARGET = problems.rows(500, 540, np.float32)
TRAINING = mg.Training.from_loss(
    loss, optax.adam(1e-2, eps_root=1e-8), problems.mlp(np.float32), problems.batches(STEPS, np.float32)
)
Z = {"weights": mg.PerExample(jnp.ones(problems.EXAMPLES))}
STATE = nbytes(TRAINING.initial(Z))


def objective(state: mg.TrainState, z: dict) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(
        problems.logits(state.params, TARGET["x"]), TARGET["y"]
    ).mean()


@pytest.mark.parametrize("memory", [{"device": 9 * STATE}, {"device": 9 * STATE, "host": "1MB", "disk": "1MB"}])
def test_a_budget_is_kept_and_changes_no_bit(memory: dict, tmp_path):
    where = {"path": tmp_path} if "disk" in memory else {}
    budget = mg.Memory(**memory, **where)
    value, grad, stats = mg.value_and_metagrad(
        TRAINING, objective, memory=budget, segment=mg.Segment(1, "steps", "state")
    ).with_stats(Z)
    everything = mg.value_and_metagrad(TRAINING, objective, schedule=mg.schedule.KeepAll(), segment=stats.segment)(Z)
    assert stats.forward_steps > STEPS + 1
    assert stats.peak_bytes.get("device", 0) <= 9 * STATE
    assert stats.peak_bytes.get("host", 0) <= 10**6
    assert np.array_equal(value, everything[0])
    assert np.array_equal(grad["weights"].value, everything[1]["weights"].value)
    assert not list(tmp_path.iterdir())


def test_a_plan_says_what_will_happen():
    plan = mg.plan(TRAINING, Z, memory=mg.Memory(device=12 * STATE), segment=mg.Segment(1, "steps", "state"))
    stats = mg.value_and_metagrad(TRAINING, objective, schedule=plan).with_stats(Z)[2]
    # The rehearsal of the first segment is the call's, not the schedule's.
    assert stats.forward_steps == plan.estimate.forward_steps + 1
    assert stats.adjoint_steps == plan.estimate.adjoint_steps
    assert stats.peak_states == {tier: n for tier, n in plan.estimate.states.items() if n}
    # Three states at work are in the plan's bytes, and not in the statistics.
    assert 0.9 * plan.estimate.bytes["device"] <= stats.peak_bytes["device"] + 3 * STATE <= 12 * STATE
    assert plan.seconds > plan.estimate.seconds > 0
    assert "chosen" in str(plan)


def test_a_budget_in_which_nothing_fits_says_the_smallest_that_does():
    with pytest.raises(mg.errors.ScheduleError, match="smallest"):
        mg.plan(TRAINING, Z, memory=mg.Memory(device=2 * STATE))


def test_a_budget_and_a_schedule_are_one_too_many():
    with pytest.raises(mg.errors.StructureError, match="either"):
        mg.value_and_metagrad(TRAINING, objective, memory=mg.Memory(), schedule=mg.schedule.KeepAll())


def test_micro_batches_do_not_keep_linearisations():
    split = mg.Training.from_loss(loss, optax.sgd(0.1), TRAINING.init.params, TRAINING.batches, microbatches=2)
    with pytest.raises(mg.errors.StructureError, match="linearisation"):
        mg.value_and_metagrad(split, objective, segment=mg.Segment(1, "steps", "linearisation"))(Z)
