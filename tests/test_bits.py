"""In float32, one segment gives the same bits whatever the schedule, store, call or process; and compiles once."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import EXAMPLES, STEPS, Problem, batch_norm, digit_loss, dropout, mlp, with_optimiser

import metagradient as mg
from metagradient import Segment
from metagradient.given import Given
from metagradient.schedule import Binomial, KaryTree, KeepAll, TwoLevel
from metagradient.step.runner import Runner
from metagradient.trees import floating

pytestmark = [pytest.mark.core, pytest.mark.optimised]

SCHEDULES = [KeepAll()]
for tier in ("device", "host"):
    SCHEDULES += [TwoLevel(tier=tier), KaryTree(2, tier), KaryTree(3, tier), Binomial(1, tier), Binomial(3, tier)]

STEPWISE, SCANNED = Segment(1, "steps", "state"), Segment(3)
SEGMENTS = [STEPWISE, SCANNED]


def digest(tree):
    """Of every bit of a tree, keys too."""
    sink = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(tree):
        typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        sink.update(np.asarray(jax.random.key_data(leaf) if typed else leaf).tobytes())
    return sink.hexdigest()


def driven():
    return with_optimiser("driven", np.float32)


@pytest.fixture
def pulled(monkeypatch):
    """Digests of all states that adjoints were taken at, by segment, of every traversal."""
    seen = []
    pull = Runner.pull

    def spy(self, i, kept, cotangent, total):
        seen.append((i, digest(kept.states), digest(cotangent)))
        return pull(self, i, kept, cotangent, total)

    monkeypatch.setattr(Runner, "pull", spy)
    return seen


RUNS = {
    "stepwise": (driven, STEPWISE),
    "scanned": (driven, SCANNED),
    "keys, micro-batches": (lambda: dropout(microbatches=2), Segment(4, "steps", "gradient")),
    "model state, unrolled": (batch_norm, Segment(2, "unroll", "state")),
    "linearisations": (driven, Segment(4, "steps", "linearisation")),
}


@pytest.mark.parametrize(("problem", "segment"), RUNS.values(), ids=RUNS)
def test_schedules_and_stores_change_no_bit_and_compile_nothing(problem, segment, pulled):
    problem = problem()
    training = problem.training()
    first = compiled = owner = None
    for schedule in SCHEDULES:
        pulled.clear()
        # The one before holds the objective's programs until this one shares them.
        owner = mg.value_and_metagrad(training, problem.objective, schedule=schedule, segment=segment)
        found = owner.evaluate(problem.z)
        bits = digest((found.value, found.grad)), digest(found.state), list(pulled)
        assert len(pulled) == -(-STEPS // segment.length)
        assert len({states for _, states, _ in pulled}) == len(pulled), "the run stands still, and tests nothing"
        first = first or bits
        assert bits == first, schedule
        if compiled is not None:
            assert found.stats.compile_seconds == 0, schedule
        compiled = found.stats.compile_seconds


def test_a_second_call_gives_the_same_bits_and_compiles_nothing():
    problem = driven()

    def fresh(params, batch, z):
        return digit_loss(params, batch, z)

    training = replace(problem, loss=fresh).training()
    function = mg.value_and_metagrad(training, problem.objective, segment=STEPWISE)
    value, grad, stats = function.with_stats(problem.z)
    again = function.with_stats(problem.z)
    assert stats.compile_seconds > 0
    assert again[2].compile_seconds == 0
    assert digest(again[:2]) == digest((value, grad))


def test_another_training_of_the_same_functions_compiles_nothing():
    """A fresh seed each meta-step makes a new `Training` on other batches: its programs are there already."""
    problem = driven()
    segment = SCANNED
    owner = mg.value_and_metagrad(problem.training(), problem.objective, segment=segment)
    owner(problem.z)
    shuffled = [problem.batches[t] for t in np.random.default_rng(0).permutation(STEPS)]
    training = mg.Training.from_loss(problem.loss, problem.optimizer, problem.init, shuffled)
    stats = mg.value_and_metagrad(training, problem.objective, segment=segment).with_stats(problem.z)[2]
    assert stats.compile_seconds == 0


def final_parameters(state, z):
    del z
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(state.params)])[:50]


@pytest.mark.parametrize("segment", SEGMENTS, ids=lambda s: f"{s.length}-{s.loop}")
def test_plain_training_passes_through_the_same_bits(segment):
    problem = driven()
    training = problem.training()
    found = mg.value_and_metagrad(training, final_parameters, vector=True, segment=segment).evaluate(problem.z)
    trained = mg.train(training, problem.z, segment=segment)
    assert digest(trained) == digest(found.state)
    assert digest(final_parameters(trained, None)) == digest(found.value)


SCRIPT = """
from test_bits import *
for segment in SEGMENTS:
    problem = driven()
    print(digest(mg.value_and_metagrad(problem.training(), problem.objective, segment=segment)(problem.z)))
"""


def test_another_process_gives_the_same_bits():
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    problem = driven()
    here = [
        digest(mg.value_and_metagrad(problem.training(), problem.objective, segment=segment)(problem.z))
        for segment in SEGMENTS
    ]
    assert found.stdout.split() == here


def test_a_batch_source_of_numpy_or_jax_arrays_is_the_same():
    problem = driven()
    segment = STEPWISE
    on_device = [jax.tree.map(jnp.asarray, batch) for batch in problem.batches]
    training = mg.Training.from_loss(problem.loss, problem.optimizer, problem.init, on_device)
    expected = mg.value_and_metagrad(problem.training(), problem.objective, segment=segment)(problem.z)
    assert digest(mg.value_and_metagrad(training, problem.objective, segment=segment)(problem.z)) == digest(expected)


# Cost in z, as the compiler counts it. A gradient of all of z, or a copy of it, would need 4 bytes an entry.


def sized(examples, steps):
    z = {
        "weights": mg.PerExample(np.ones(examples, np.float32)),
        "pixels": mg.PerExample(np.zeros((examples, 64), np.float32)),
        "temperature": mg.PerStep(np.ones(steps, np.float32)),
        "ridge": np.float32(0),
    }
    return jax.tree.map(jnp.asarray, z)


def pixels_loss(params, batch, z):
    return digit_loss(params, {**batch, "x": batch["x"] + z["pixels"]}, z)


def sizes(compiled):
    found = compiled.memory_analysis()
    assert found is not None
    return found


def programs(examples, steps, queries):
    """The compiled step, and its compiled adjoint, for z of a size."""
    problem = Problem(pixels_loss, init=mlp(np.float32), batches=driven().batches)
    training = problem.training()
    z = sized(examples, steps)
    given = Given.of(z)
    state, batch, t = training.initial(z), jax.tree.map(jnp.asarray, problem.batches[0]), jnp.int32(0)
    cotangent, total = floating(state)[0], given.z
    if queries:
        cotangent, total = jax.tree.map(lambda x: jnp.stack([x] * 2), (cotangent, total))
    form = training.programs.form(STEPWISE)
    forward = form.advance_one.lower(state, given, t, batch).compile()
    adjoint = form.pull_one.lower(queries, total, cotangent, given, t, state, (), batch).compile()
    return sizes(forward), sizes(adjoint)


@pytest.mark.parametrize("queries", [False, True], ids=["scalar", "vector"])
def test_the_cost_of_a_step_does_not_grow_with_z(queries):
    small, large = (programs(n, n, queries) for n in (1_000, 100_000))
    for before, after in zip(small, large, strict=True):
        assert after.temp_size_in_bytes <= before.temp_size_in_bytes + 1000
    # The total is added to in place: all of what grows in the output is the donated argument itself.
    grown = large[1].output_size_in_bytes - small[1].output_size_in_bytes
    assert grown == large[1].alias_size_in_bytes - small[1].alias_size_in_bytes
    assert grown == 99_000 * 4 * 66 * (2 if queries else 1)


def test_the_gradient_of_a_long_z_is_that_of_a_short_one():
    """Guards the test above: entries that no batch holds change nothing."""
    problem = driven()
    segment = STEPWISE
    short = mg.value_and_metagrad(problem.training(), problem.objective, segment=segment)
    long_z = problem.z | {"weights": mg.PerExample(np.ones(100 * EXAMPLES, np.float32))}
    (_, a), (_, b) = short(problem.z), short(long_z)
    assert digest(a["weights"].value) == digest(b["weights"].value[:EXAMPLES])
    assert not np.any(b["weights"].value[EXAMPLES:])
