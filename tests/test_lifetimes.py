"""Programs live as long as the objects that use them: what is dropped is freed, and what is held is shared."""

import gc
import os
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import MAPPINGS, mappings

import metagradient as mg
from metagradient._jax import compile_seconds
from metagradient.schedule import KeepAll
from metagradient.step.runner import Runner
from metagradient.step.segment import Segment

pytestmark = pytest.mark.core
EXAMPLES, BATCH, STEPS = 16, 4, 6
X = np.random.default_rng(0).normal(size=(EXAMPLES, 5)).astype(np.float32)
BATCHES = [{"x": X[i : i + BATCH], "index": np.arange(i, i + BATCH)} for i in (0, 4, 8, 12, 2, 6)]
Z = {"weights": mg.PerExample(jnp.ones(EXAMPLES))}
OPTIMIZER = optax.sgd(0.1)


class Captured:
    """What a function closes over, and what must go with it."""

    def __init__(self, number: float):
        self.number = number


def objective(state: Any, z: Any) -> jax.Array:
    return jnp.sum(state.params["w"] ** 2)


def training_with(captured: Captured, width: int = 5) -> mg.Training:
    def loss(params, batch, z):
        hidden = jnp.tanh(batch["x"] @ params["w"])
        return jnp.mean(z["weights"] * jnp.sum((hidden - captured.number) ** 2, axis=1))

    return mg.Training.from_loss(loss, optax.adam(0.1, eps_root=1e-6), {"w": jnp.ones((5, width)) / 5}, BATCHES)


def alive(references: list[weakref.ref]) -> int:
    gc.collect()
    return sum(reference() is not None for reference in references)


def test_a_pass_leaves_nothing_to_the_collector(monkeypatch):
    """Batches and states that it held are freed when it returns, not when a cycle is found."""
    runners, real = [], Runner.__post_init__

    def noted(self):
        real(self)
        runners.append(weakref.ref(self))

    monkeypatch.setattr(Runner, "__post_init__", noted)
    training = training_with(Captured(1.0))
    evaluate = mg.value_and_metagrad(training, objective)
    through = jax.grad(lambda z: objective(mg.train(training, z, adjoint=mg.Replay()), None))
    evaluate(Z)
    gc.collect()
    gc.disable()
    try:
        runners.clear()
        evaluate(Z)
        through(Z)
        mg.train(training, Z)
        assert len(runners) >= 3
        assert not [runner for runner in runners if runner()]
    finally:
        gc.enable()


def metagradient_of(training: mg.Training) -> None:
    mg.value_and_metagrad(training, objective)(Z)


def by_budget(training: mg.Training) -> None:
    mg.value_and_metagrad(training, objective, memory=mg.Memory(device="1MB"))(Z)


def by_loop(training: mg.Training) -> None:
    mg.value_and_metagrad(training, objective, segment=3, schedule=mg.schedule.TwoLevel())(Z)


def descent_of(training: mg.Training) -> None:
    list(mg.descend(training, objective, Z, mg.updates.sign(0.1), 2))


def queries(training: mg.Training) -> None:
    mg.value_and_metagrad(training, lambda state, z: state.params["w"][0], vector=True)(Z)


def through_jax(training: mg.Training) -> None:
    jax.grad(lambda z: objective(mg.train(training, z, adjoint=mg.Replay(window=2)), None))(Z)


USES = {
    "jax.grad": through_jax,
    "states": lambda training: list(mg.states(training, Z, every=2)),
    "train": lambda training: mg.train(training, Z),
    "train_many": lambda training: mg.train_many(training, [Z, Z]),
    "metagradient": metagradient_of,
    "budget": by_budget,
    "loop": by_loop,
    "queries": queries,
    "descend": descent_of,
    "check": lambda training: mg.check(training, objective, Z, directions=1),
    "metasmoothness": lambda training: mg.metasmoothness(training, objective, Z, directions=1),
    "plan": lambda training: mg.plan(training, Z, memory=mg.Memory(device="1MB")),
}


@pytest.mark.parametrize("use", USES)
def test_dropping_a_training_frees_all_that_its_functions_close_over(use):
    captured = Captured(0.5)
    references: list[weakref.ref] = [weakref.ref(captured)]
    training = training_with(captured)
    references.append(weakref.ref(training.programs))
    USES[use](training)
    assert alive(references) == 2
    del captured, training
    assert alive(references) == 0


def test_dropping_a_metagradient_frees_its_objective():
    training, captured = training_with(Captured(0.5)), Captured(2.0)
    reference = weakref.ref(captured)

    def scaled(state, z, captured=captured):
        return captured.number * objective(state, z)

    metagradient = mg.value_and_metagrad(training, scaled)
    metagradient(Z)
    del captured, scaled, metagradient
    assert alive([reference]) == 0


def test_dropping_a_mean_frees_its_loss():
    training, captured = training_with(Captured(0.5)), Captured(2.0)
    reference = weakref.ref(captured)

    def loss(state, batch, captured=captured):
        return captured.number * jnp.mean((batch["x"] @ state.params["w"]) ** 2)

    def use(mean):
        mg.value_and_metagrad(training, lambda state, z: mean(state) + jnp.sum(z["weights"]))(Z)
        jax.grad(lambda z: mean(mg.train(training, z, adjoint=mg.Replay())))(Z)

    mean = mg.mean_over(BATCHES, loss)
    use(mean)
    references = [reference, weakref.ref(mean.programs)]
    del captured, loss, mean
    assert alive(references) == 0


def test_nothing_of_a_traversal_waits_for_the_collector():
    """States, batches and walkers go when a call returns, not when the oldest generation is next collected."""
    training = training_with(Captured(0.5))
    metagradient = mg.value_and_metagrad(training, objective, segment=Segment(1, "steps", "state"))
    metagradient(Z)
    gc.collect()
    gc.disable()
    try:
        before = len(jax.live_arrays())
        for _ in range(3):
            metagradient(Z)
        assert len(jax.live_arrays()) == before
    finally:
        gc.enable()


def test_equal_steps_share_programs_while_somebody_holds_them():
    def loss(params, batch, z):
        return jnp.mean(z["weights"] * (batch["x"] @ params["w"]) ** 2)

    def drawn(seed: int) -> mg.Training:
        w = jax.random.normal(jax.random.key(seed), (5,))
        return mg.Training.from_loss(loss, OPTIMIZER, {"w": w}, BATCHES)

    training = drawn(0)
    mg.train(training, Z)
    for seed in (1, 2):
        training = drawn(seed)
        with compile_seconds() as spent:
            mg.train(training, Z)
        assert spent.programs == 0
    found = [r.stats.compile_seconds for r in mg.descend(drawn, objective, Z, mg.updates.sign(0.1), 4, seeds=2)]
    assert found[0] > 0
    assert found[1:] == [0, 0, 0]


def test_a_probe_over_fresh_seeds_compiles_its_programs_once():
    def losses(params, model_state, batch):
        return (batch["x"] @ params["w"] - 1) ** 2

    def loss(params, batch, z):
        return jnp.mean(losses(params, None, batch))

    def surrogate(seed: int, at: int) -> mg.CountSurrogate:
        w = jax.random.normal(jax.random.key(seed), (5,))
        training = mg.Training.from_loss(loss, OPTIMIZER, {"w": w}, BATCHES)
        return mg.CountSurrogate(lambda counts: training, [{"x": X, "index": np.arange(EXAMPLES)}], losses, at)

    counts = {"c": mg.PerExample(jnp.ones(EXAMPLES))}

    def probed(fresh: list[int]) -> int:
        with compile_seconds() as spent:
            mg.probe_at(surrogate, objective, counts, mg.updates.exchange(1), [2], seed=0, fresh=fresh)
        return spent.programs

    probed([1])
    assert probed([1, 2, 3, 4]) == probed([1])


def resident() -> int:
    return int(Path(f"/proc/{os.getpid()}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def many(count: int) -> list[tuple[int, int]]:
    """Mappings and resident bytes after each of many different trainings."""
    references, found = [], []
    for number in range(count):
        captured = Captured(number / count)
        references.append(weakref.ref(captured))
        metagradient_of(training_with(captured, width=2 + number % 7))
        del captured
        assert alive(references) == 0
        found.append((mappings(), resident()))
    return found


def assert_flat(found: list[tuple[int, int]]) -> None:
    settled, after = found[len(found) // 2 - 1], found[len(found) // 2 :]
    assert max(m for m, _ in after) <= 1.1 * settled[0] + 200
    assert max(r for _, r in after) <= 1.1 * settled[1] + 50e6


@pytest.mark.skipif(not MAPPINGS.exists(), reason="reads Linux's /proc")
def test_a_large_pass_gives_its_memory_back():
    """Freed states of some MiB would stay on the C library's heap."""
    start = {name: jnp.ones((1024, 1024)) for name in "abcd"}
    training = mg.Training(start, lambda state, batch, z: jax.tree.map(lambda x: x * z, state), [{}] * 24)
    evaluate = mg.value_and_metagrad(
        training, lambda state, z: jnp.sum(state["a"]), segment=Segment(1, "steps", "state"), schedule=KeepAll()
    )
    before = resident()
    for _ in range(2):
        stats = evaluate.with_stats(jnp.asarray(0.9))[2]
        assert stats.peak_bytes["device"] == 24 * 4 * 2**22
        assert resident() < before + 150e6


@pytest.mark.skipif(not MAPPINGS.exists(), reason="reads Linux's /proc")
def test_sixteen_different_trainings_leave_nothing_behind():
    assert_flat(many(16))


@pytest.mark.slow
@pytest.mark.skipif(not MAPPINGS.exists(), reason="reads Linux's /proc")
def test_three_hundred_different_trainings_leave_nothing_behind():
    assert_flat(many(300))
