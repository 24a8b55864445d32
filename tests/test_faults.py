"""What is wrong is told by a typed error that says where, before compute is spent; and no wrong number is returned."""

from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from problems import BATCH, STEPS, Problem, cross_entropy, digit_loss, digit_losses, mlp, with_optimiser

import metagradient as mg
from metagradient import Segment
from metagradient.errors import (
    BatchError,
    ImpureStepError,
    MetagradientError,
    NonFiniteError,
    PrecisionError,
    ReplayMismatch,
    StructureError,
)
from metagradient.schedule import Binomial, KaryTree, KeepAll, TwoLevel

pytestmark = pytest.mark.core

STEPWISE = Segment(1, "steps", "state")
LENGTH = 6
START = {"w": np.ones(3, np.float32), "taken": np.int32(0)}
Z = {"weights": mg.PerExample(np.ones(4, np.float32)), "rate": mg.PerStep(np.full(LENGTH, 0.1, np.float32))}
BATCHES = [{"x": np.full(3, t + 1, np.float32), "index": np.arange(3)} for t in range(LENGTH)]


def forget(state, batch, z):
    """A linear step, cheap to compile."""
    return {"w": state["w"] * (1 - z["rate"] * z["weights"]) + batch["x"], "taken": state["taken"] + 1}


def norm(state, z):
    del z
    return jnp.sum(state["w"] ** 2)


@pytest.fixture
def ran():
    """One entry a step, or loss, that ran; one that was only traced leaves none."""
    entries = []
    yield entries
    jax.effects_barrier()


def counted(function, ran):
    def counting(*arguments):
        jax.debug.callback(lambda: ran.append(None))
        return function(*arguments)

    return counting


@contextmanager
def refused(ran, error, *words):
    """An error whose message holds all `words`, and no step that ran."""
    with pytest.raises(error) as caught:
        yield
    jax.effects_barrier()
    assert not ran
    for word in words:
        assert word in str(caught.value)


def test_the_step_that_is_broken_below_is_sound(ran):
    value, grad = mg.value_and_metagrad(mg.Training(START, counted(forget, ran), BATCHES), norm)(Z)
    jax.effects_barrier()
    assert ran
    assert np.isfinite(value)
    assert np.all(np.asarray(grad["rate"].value))


# Structure of z.

Z_FAULTS = {
    "an integer": ({**Z, "n": np.arange(3)}, StructureError, ["z['n']", "int"]),
    "an integer of a kind": ({**Z, "n": mg.Shared(np.arange(3))}, StructureError, ["z['n'].value", "int"]),
    "a boolean": ({**Z, "n": np.array(True)}, StructureError, ["z['n']", "bool"]),
    "a key": ({**Z, "n": jax.random.key(0)}, StructureError, ["z['n']", "key"]),
    "a text": ({**Z, "name": "adam"}, StructureError, ["z['name']"]),
    "too short": ({**Z, "rate": mg.PerStep(np.ones(5, np.float32))}, StructureError, ["z['rate']", "[5]", "T = 6"]),
    "too long": ({**Z, "rate": mg.PerStep(np.ones(7, np.float32))}, StructureError, ["z['rate']", "[7]", "T = 6"]),
    "no axis": ({**Z, "rate": mg.PerStep(np.float32(1))}, StructureError, ["z['rate']", "[]", "T = 6"]),
    "no axis of examples": ({**Z, "weights": mg.PerExample(np.float32(1))}, StructureError, ["z['weights']"]),
}


@pytest.mark.parametrize("name", Z_FAULTS)
def test_metaparameters_of_the_wrong_kind(name, ran):
    z, error, words = Z_FAULTS[name]
    with refused(ran, error, *words):
        mg.value_and_metagrad(mg.Training(START, counted(forget, ran), BATCHES), norm)(z)


@pytest.mark.parametrize(
    ("rows", "word"),
    [([0, 1, 1], "distinct"), ([0, -1, 2], "negative"), ([0, 1], "2 rows"), ([0.0, 1.0, 2.0], "integers")],
)
def test_rows_of_the_wrong_kind(rows, word):
    with pytest.raises(StructureError, match=word):
        mg.PerExample(np.ones(3), rows=rows)


# Batches.


def with_batch(t, **changes):
    batch = {k: v for k, v in {**BATCHES[t], **changes}.items() if v is not None}
    return [*BATCHES[:t], batch, *BATCHES[t + 1 :]]


BATCH_FAULTS = {
    "no index": (with_batch(0, index=None), ["batches[0]", '"index"']),
    "no index later": (with_batch(4, index=None), ["batches[4]", '"index"']),
    "past the end": (with_batch(4, index=np.array([0, 4, 1])), ["batches[4]", "holds 4", "[0, 4)"]),
    "negative": (with_batch(2, index=np.array([0, -1, 1])), ["batches[2]", "holds -1", "[0, 4)"]),
    "not integers": ([{**b, "index": np.ones(3, np.float32)} for b in BATCHES], ["batches[", '"index"', "float32"]),
    "not a vector": ([{**b, "index": np.int32(1)} for b in BATCHES], ["batches[", '"index"', "int32[]"]),
    "uneven": (with_batch(5, x=np.ones(2, np.float32)), ["batches[5]", "['x']", "float32[2]", "float32[3]"]),
    "another dtype": (with_batch(3, x=np.ones(3, np.int32)), ["batches[3]", "['x']", "int32[3]"]),
    "another structure": (with_batch(3, y=np.ones(3)), ["batches[3]", "['y']"]),
    "none": ([], ["T = 0"]),
}


class Source:
    """A random-access source that is no list: it is read as the run goes."""

    def __init__(self, batches):
        self.given = batches

    def __len__(self):
        return len(self.given)

    def __getitem__(self, t):
        return self.given[t]


@pytest.mark.parametrize("name", BATCH_FAULTS)
def test_batches_in_memory_of_the_wrong_kind(name, ran):
    batches, words = BATCH_FAULTS[name]
    with refused(ran, BatchError, *words):
        mg.value_and_metagrad(mg.Training(START, counted(forget, ran), batches), norm)(
            {**Z, "rate": mg.PerStep(np.ones(len(batches), np.float32))}
        )


@pytest.mark.parametrize("name", BATCH_FAULTS)
def test_batches_from_a_source_of_the_wrong_kind(name):
    batches, words = BATCH_FAULTS[name]
    with pytest.raises(BatchError) as caught:
        mg.value_and_metagrad(mg.Training(START, forget, Source(batches)), norm, segment=STEPWISE)(
            {**Z, "rate": mg.PerStep(np.ones(len(batches), np.float32))}
        )
    for word in words:
        assert word in str(caught.value)


# Options.

OPTION_FAULTS = {
    "window 0": ({"window": 0}, ["window", "T = 6", "got 0"]),
    "window 7": ({"window": 7}, ["window", "T = 6", "got 7"]),
    "verify": ({"verify": "never"}, ["verify", "'never'"]),
}


@pytest.mark.parametrize("name", OPTION_FAULTS)
def test_options_of_the_wrong_kind(name, ran):
    options, words = OPTION_FAULTS[name]
    with refused(ran, StructureError, *words):
        mg.value_and_metagrad(mg.Training(START, counted(forget, ran), BATCHES), norm, **options)(Z)


@pytest.mark.parametrize(
    "make",
    [lambda: Segment(0), lambda: Segment(2, "while"), lambda: Segment(2, "scan", "everything")],  # pyright: ignore
)
def test_segments_of_the_wrong_kind(make):
    with pytest.raises(StructureError, match="Segment"):
        make()


OBJECTIVE_FAULTS = {
    "a vector": (lambda state, z: state["w"], False, ["float32[3]", "scalar", "vector=True"]),
    "an integer": (lambda state, z: state["taken"], False, ["int32[]", "floating scalar"]),
    "a pair": (lambda state, z: (norm(state, z), 0.0), False, ["PyTreeDef", "floating scalar"]),
    "a scalar for a vector": (norm, True, ["float32[]", "vector"]),
    "a matrix": (lambda state, z: jnp.outer(state["w"], state["w"]), True, ["float32[3, 3]", "vector"]),
}


@pytest.mark.parametrize("name", OBJECTIVE_FAULTS)
def test_objectives_of_the_wrong_kind(name, ran):
    objective, vector, words = OBJECTIVE_FAULTS[name]
    with refused(ran, StructureError, *words):
        mg.value_and_metagrad(mg.Training(START, counted(forget, ran), BATCHES), objective, vector=vector)(Z)


def test_an_objective_over_no_batch():
    with pytest.raises(StructureError, match="at least one batch"):
        mg.mean_over([], lambda state, batch: jnp.zeros(()))


# Steps and losses.

STEP_FAULTS = {
    "a leaf less": (lambda s, b, z: {"w": s["w"]}, ["['taken']"]),
    "a leaf more": (lambda s, b, z: {**s, "extra": s["w"]}, ["['extra']"]),
    "another shape": (lambda s, b, z: {**s, "w": s["w"][:2]}, ["['w']", "float32[2]", "float32[3]"]),
    "another dtype": (lambda s, b, z: {**s, "taken": s["taken"] + 0.5}, ["['taken']", "float32[]", "int32[]"]),
}


@pytest.mark.parametrize("name", STEP_FAULTS)
def test_steps_that_return_another_state(name, ran):
    step, words = STEP_FAULTS[name]
    with refused(ran, StructureError, *words):
        mg.value_and_metagrad(mg.Training(START, counted(step, ran), BATCHES), norm)(Z)


def test_a_state_without_leaves(ran):
    with refused(ran, StructureError, "initial state"):
        mg.value_and_metagrad(mg.Training({}, counted(lambda s, b, z: s, ran), BATCHES), lambda s, z: jnp.zeros(()))(Z)


def digits(ran, loss=digit_loss, **changes):
    return replace(with_optimiser("sgd", np.float32), loss=counted(loss, ran), **changes)


def test_parameters_that_are_not_floating(ran):
    with refused(ran, StructureError, "['steps']", "int32"):
        digits(ran, init={**mlp(np.float32), "steps": np.int32(3)}).training()


@pytest.mark.parametrize(("loss", "per_example"), [(digit_losses, False), (digit_loss, True)])
def test_losses_of_the_wrong_rank(loss, per_example, ran):
    problem = digits(ran, loss)
    with refused(
        ran, StructureError, "[8]" if per_example is None else "per_example=True" if per_example else "scalar"
    ):
        mg.value_and_metagrad(problem.training(per_example=per_example), problem.objective)(problem.z)


def test_micro_batches_that_do_not_divide_the_batch(ran):
    problem = digits(ran, microbatches=3)
    with refused(ran, StructureError, str(BATCH), "3 equal micro-batches"):
        mg.value_and_metagrad(problem.training(), problem.objective)(problem.z)


def test_no_micro_batch(ran):
    with refused(ran, StructureError, "microbatches", "got 0"):
        digits(ran, microbatches=0).training()


# Precision.


def in_half(params, batch, z):
    hidden = jnp.tanh(batch["x"].astype(jnp.bfloat16) @ params["w1"].astype(jnp.bfloat16)).astype(jnp.float32)
    return jnp.mean(z["weights"] * cross_entropy(hidden @ params["w2"], batch["y"]))


def asking(precision):
    def loss(params, batch, z):
        hidden = jnp.tanh(jnp.matmul(batch["x"], params["w1"], precision=precision))
        return jnp.mean(z["weights"] * cross_entropy(hidden @ params["w2"], batch["y"]))

    return loss


def halved(params):
    return {**params, "w1": params["w1"].astype(jnp.bfloat16)}


PRECISION_FAULTS = {
    "a parameter": (digit_loss, halved, [".params['w1']", "bfloat16"]),
    "inside the loss": (in_half, dict, ["bfloat16", "test_faults.py"]),
    "asked for": (asking("bfloat16"), dict, ["dot_general", "test_faults.py"]),
    "asked for by name": (asking(lax.Precision.HIGH), dict, ["dot_general", "HIGH", "test_faults.py"]),
    "an algorithm": (asking(lax.DotAlgorithmPreset.BF16_BF16_F32), dict, ["dot_general", "test_faults.py"]),
}


@pytest.mark.parametrize("name", PRECISION_FAULTS)
def test_half_precision_in_the_loop(name, ran):
    loss, change, words = PRECISION_FAULTS[name]
    problem = digits(ran, loss, init=change(mlp(np.float32)))
    with refused(ran, PrecisionError, *words, "allow_low_precision=True"):
        mg.value_and_metagrad(problem.training(), problem.objective)(problem.z)


@pytest.mark.parametrize("precision", ["bfloat16", "tensorfloat32", "high", "default"])
def test_matrix_products_lowered_by_configuration(precision, ran):
    problem = digits(ran)
    function = mg.value_and_metagrad(problem.training(), problem.objective)
    with jax.default_matmul_precision(precision), refused(ran, PrecisionError, precision, "'highest'"):
        function(problem.z)
    with jax.default_matmul_precision(precision), refused(ran, PrecisionError, precision):
        mg.train(problem.training(), problem.z)


@pytest.mark.parametrize("name", ["inside the loss", "asked for"])
def test_low_precision_that_is_allowed(name):
    loss, change, _ = PRECISION_FAULTS[name]
    problem = Problem(loss, optax.sgd(0.3), change(mlp(np.float32)), z=with_optimiser("sgd", np.float32).z)
    problem = replace(problem, z={"weights": problem.z["weights"]})
    with jax.default_matmul_precision("bfloat16"):
        value, _ = mg.value_and_metagrad(
            problem.training(allow_low_precision=True), problem.objective, segment=STEPWISE
        )(problem.z)
    assert np.isfinite(value)


def test_products_are_in_full_precision_though_nothing_asks_for_it():
    """On accelerators the default is less; the program that is compiled says so itself."""
    seen = []

    def step(state, batch, z):
        seen.append(jax.config.jax_default_matmul_precision)  # pyright: ignore[reportAttributeAccessIssue]
        return forget(state, batch, z)

    mg.value_and_metagrad(mg.Training(START, step, BATCHES), norm, segment=STEPWISE)(Z)
    assert set(seen) == {"highest"}


# Steps that are not functions of their arguments.

WAYS = [
    *[(KeepAll(), STEPWISE), (TwoLevel(), STEPWISE), (Binomial(1, "host"), STEPWISE)],
    *[(KeepAll(), Segment(2)), (KaryTree(2), Segment(2)), (KeepAll(), Segment(LENGTH)), (KeepAll(), None)],
]
ways = pytest.mark.parametrize(("schedule", "segment"), WAYS, ids=str)


@ways
def test_randomness_drawn_while_tracing(schedule, segment, ran):
    def step(state, batch, z):
        noisy = {**batch, "x": batch["x"] + np.random.default_rng().normal(size=3).astype(np.float32)}
        return forget(state, noisy, z)

    with refused(ran, ImpureStepError, "randomness"):
        mg.value_and_metagrad(
            mg.Training(START, counted(step, ran), BATCHES), norm, schedule=schedule, segment=segment
        )(Z)


def noise(calls, quiet=0):
    """Noise by a callback, zero for the first calls."""

    def draw():
        calls.append(None)
        return np.float32(np.random.default_rng().normal() if len(calls) > quiet else 0)

    return lambda: lax.stop_gradient(jax.pure_callback(draw, jax.ShapeDtypeStruct((), jnp.float32)))


@ways
def test_randomness_drawn_by_a_callback(schedule, segment):
    draw = noise([])

    def step(state, batch, z):
        return forget(state, {**batch, "x": batch["x"] + draw()}, z)

    with pytest.raises(ReplayMismatch, match=r"step \d.*\['w'\].*callback"):
        mg.value_and_metagrad(mg.Training(START, step, BATCHES), norm, schedule=schedule, segment=segment)(Z)


@pytest.mark.parametrize("segment", [STEPWISE, Segment(2)], ids=str)
@pytest.mark.parametrize("schedule", [KeepAll(), TwoLevel()], ids=str)
def test_randomness_drawn_by_a_callback_in_a_loss(schedule, segment):
    draw = noise([])

    def loss(params, batch, z):
        return digit_loss(params, {**batch, "x": batch["x"] + draw()}, z)

    problem = replace(with_optimiser("sgd", np.float32), loss=loss)
    with pytest.raises(ReplayMismatch, match=r"step \d.*\.params"):
        mg.value_and_metagrad(problem.training(), problem.objective, schedule=schedule, segment=segment)(problem.z)


@pytest.mark.parametrize("schedule", [TwoLevel(2), KaryTree(2), Binomial(1)], ids=str)
def test_randomness_that_sets_in_late_shows_in_a_replay(schedule):
    draw = noise([], quiet=4)

    def step(state, batch, z):
        return forget(state, {**batch, "x": batch["x"] + draw()}, z)

    with pytest.raises(ReplayMismatch, match=r"step \d"):
        mg.value_and_metagrad(mg.Training(START, step, BATCHES), norm, schedule=schedule, segment=STEPWISE)(Z)


def test_a_start_drawn_anew():
    def init(z):
        return {"w": jnp.mean(z["weights"]) + np.random.default_rng().normal(size=3), "taken": 0}

    with pytest.raises(ImpureStepError):
        mg.value_and_metagrad(mg.Training(init, forget, BATCHES), norm, segment=STEPWISE)(Z)


def bits(found):
    return b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found))


def scaled(read):
    """A fresh step that reads a number outside its arguments."""

    def step(state, batch, z):
        return forget(state, {**batch, "x": batch["x"] * read()}, z)

    return step


@ways
def test_a_step_altered_between_two_calls(schedule, segment, ran):
    settings = {"scale": 1.0}
    training = mg.Training(START, counted(scaled(lambda: settings["scale"]), ran), BATCHES)
    function = mg.value_and_metagrad(training, norm, schedule=schedule, segment=segment)
    first = bits(function(Z))
    settings["scale"] = 2.0
    # A step that was checked once is traced again beside the run, and the altered one is not differentiated.
    with pytest.raises(ImpureStepError, match="another program"):
        function(Z)
    jax.effects_barrier()
    ran.clear()
    with refused(ran, ImpureStepError, "another program"):
        mg.train(training, Z)
    settings["scale"] = 1.0
    if segment is not None:
        assert bits(function(Z)) == first
    # A new function is a new step.
    settings["scale"] = 2.0
    altered = mg.Training(START, scaled(lambda: settings["scale"]), BATCHES)
    assert bits(mg.value_and_metagrad(altered, norm, schedule=schedule, segment=segment)(Z)) != first


class Watched(Source):
    """A source that counts its reads, and tells `on_read` of every one: (number of reads before, t)."""

    def __init__(self, batches, on_read):
        super().__init__(batches)
        self.reads = 0
        self.on_read = on_read

    def __getitem__(self, t):
        self.on_read(self.reads, t)
        self.reads += 1
        return super().__getitem__(t)


REPLAYS = pytest.mark.parametrize(
    ("schedule", "segment"),
    [(KeepAll(), STEPWISE), (KaryTree(2, "host"), STEPWISE), (Binomial(1), Segment(3))],
    ids=str,
)


@REPLAYS
def test_a_step_altered_by_a_read_in_mid_run(schedule, segment):
    """At whichever read."""

    def run(altering):
        settings = {"scale": 1.0}

        def on_read(number, t):
            settings["scale"] = 2.0 if number >= altering else 1.0

        source = Watched(BATCHES, on_read)
        training = mg.Training(START, scaled(lambda: settings["scale"]), source)
        mg.value_and_metagrad(training, norm, schedule=schedule, segment=segment)(Z)
        return source.reads

    reads = run(10**9)
    assert reads > LENGTH
    # The reads before these are over when the step is looked at for the first time.
    for altering in range(4, reads, 3):
        with pytest.raises(ImpureStepError):
            run(altering)


@REPLAYS
def test_a_step_that_reads_what_the_last_read_left_behind(schedule, segment):
    """It is the same program again whenever the run is back at its first batch."""
    last = []

    def on_read(number, t):
        last[:] = [1.0 + t]

    training = mg.Training(START, scaled(lambda: last[0]), Watched(BATCHES, on_read))
    with pytest.raises(ImpureStepError):
        mg.value_and_metagrad(training, norm, schedule=schedule, segment=segment)(Z)


# Batches that change.


class InPlace(Source):
    """A source that hands out one buffer, filled anew at every read; from read number `late` on, with other content."""

    def __init__(self, batches, late):
        super().__init__(batches)
        self.reads = 0
        self.late = late
        self.buffer = {k: v.copy() for k, v in batches[0].items()}
        self.served = list(batches)

    def __getitem__(self, t):
        for name, value in self.given[t].items():
            self.buffer[name][...] = value
        if self.reads >= self.late:
            self.buffer["x"] += 1 if self.late else self.reads
        self.reads += 1
        self.served[t] = {k: v.copy() for k, v in self.buffer.items()}
        return self.buffer


def in_place(late, schedule, segment, **options):
    source = InPlace(BATCHES, late)
    function = mg.value_and_metagrad(
        mg.Training(START, forget, source), norm, schedule=schedule, segment=segment, **options
    )
    return function, source


@REPLAYS
def test_a_buffer_handed_out_again_and_again_is_sound(schedule, segment):
    function, _ = in_place(10**9, schedule, segment)
    expected = mg.value_and_metagrad(mg.Training(START, forget, BATCHES), norm, schedule=schedule, segment=segment)
    assert bits(function(Z)) == bits(expected(Z))


@ways
def test_a_source_that_changes_at_every_read(schedule, segment):
    function, _ = in_place(0, schedule, segment)
    with pytest.raises(BatchError, match=r"batches\[0\] differs between two reads"):
        function(Z)


@REPLAYS
@pytest.mark.parametrize("hold", [True, False], ids=["held", "read again"])
def test_a_source_that_changes_once(schedule, segment, hold, monkeypatch):
    """At whichever read: an error, or the metagradient of the run on the batches that were read last."""
    if not hold:
        monkeypatch.setattr("metagradient._replay.free_host_bytes", lambda: 0)
    function, source = in_place(10**9, schedule, segment)
    function(Z)
    caught = []
    for late in range(1, source.reads + 1):
        function, changing = in_place(late, schedule, segment)
        try:
            found = bits(function(Z))
        except (BatchError, ReplayMismatch) as error:
            caught.append(str(error))
        else:
            read = mg.Training(START, forget, changing.served)
            assert found == bits(mg.value_and_metagrad(read, norm, schedule=schedule, segment=segment)(Z)), late
    # What keeps every state, or holds batches, reads every batch but the first once.
    assert len(caught) >= (2 if hold or isinstance(schedule, KeepAll) else LENGTH)
    assert all("batch" in message for message in caught)
    assert any("['x']" in message for message in caught)


def test_a_run_that_is_trusted_is_not_verified():
    """Guards the tests above: it is the verification that catches these."""
    function, _ = in_place(12, KeepAll(), STEPWISE, verify="off")
    assert np.isfinite(function(Z)[0])
    draw = noise([])
    noisy = mg.Training(START, lambda s, b, z: forget(s, {**b, "x": b["x"] + draw()}, z), BATCHES)
    value, _ = mg.value_and_metagrad(noisy, norm, segment=STEPWISE, schedule=TwoLevel(), verify="off")(Z)
    assert np.isfinite(value)


# Numbers that are not finite.

segments = pytest.mark.parametrize("segment", [STEPWISE, Segment(4)], ids=["steps", "scan"])


@segments
@pytest.mark.parametrize("schedule", [KeepAll(), KaryTree(2, "host")], ids=str)
@pytest.mark.parametrize("step", [0, 5, STEPS - 1])
def test_the_step_that_first_gave_something_not_finite(step, schedule, segment):
    problem = with_optimiser("adam", np.float32)
    batches = [{**batch, "x": batch["x"].copy()} for batch in problem.batches]
    batches[step]["x"][2, 30] = np.nan
    training = replace(problem, batches=batches).training()
    with pytest.raises(NonFiniteError, match=rf"^step {step} made \.params\['\w\w'\]"):
        mg.value_and_metagrad(training, problem.objective, schedule=schedule, segment=segment)(problem.z)


@segments
def test_a_window_whose_first_steps_are_not_finite(segment):
    problem = with_optimiser("adam", np.float32)
    batches = [{**batch, "x": batch["x"].copy()} for batch in problem.batches]
    batches[3]["x"][2, 30] = np.inf
    training = replace(problem, batches=batches).training()
    with pytest.raises(NonFiniteError, match=r"^step 3 made"):
        mg.value_and_metagrad(training, problem.objective, window=4, segment=segment)(problem.z)


@segments
def test_a_start_that_is_not_finite(segment):
    problem = with_optimiser("sgd", np.float32)
    init = {**problem.init, "b2": np.full(10, np.nan, np.float32)}
    training = replace(problem, init=init).training()
    with pytest.raises(NonFiniteError, match=r"initial state.*\.params\['b2'\]|\.params\['b2'\].*initial state"):
        mg.value_and_metagrad(training, problem.objective, segment=segment)(problem.z)


@segments
def test_an_adam_without_eps_root_on_pixels_that_are_always_zero(segment):
    """Border pixels of digits are: their second moment is zero, where the root has no finite derivative."""
    problem = replace(with_optimiser("adam", np.float32), optimizer=optax.adam(0.02))
    problem = replace(problem, z={**problem.z, "ridge": np.float32(0)})
    with pytest.raises(NonFiniteError, match=rf"step {STEPS - 1} .*\.opt_state.*\.nu\['w1'\].*eps_root"):
        mg.value_and_metagrad(problem.training(), problem.objective, segment=segment)(problem.z)


@segments
def test_the_step_whose_derivative_is_not_finite(segment):
    """A root of zero, finite itself, in one step."""

    def step(state, batch, z):
        zero = jnp.where(batch["x"] == 3, 0 * state["w"], 1)
        return {**forget(state, batch, z), "w": forget(state, batch, z)["w"] + jnp.sqrt(zero)}

    with pytest.raises(NonFiniteError, match=r"step 2 .*\['w'\]"):
        mg.value_and_metagrad(mg.Training(START, step, BATCHES), norm, segment=segment)(Z)


@segments
def test_a_gradient_of_z_alone_that_is_not_finite(segment):
    def step(state, batch, z):
        return forget(state, {**batch, "x": batch["x"] + jnp.sqrt(z["level"])}, z)

    z = {**Z, "level": mg.Shared(np.float32(0))}
    with pytest.raises(NonFiniteError, match=r"z\['level'\]\.value"):
        mg.value_and_metagrad(mg.Training(START, step, BATCHES), norm, segment=segment)(z)


def test_an_objective_that_is_not_finite():
    with pytest.raises(NonFiniteError, match="objective's value"):
        mg.value_and_metagrad(
            mg.Training(START, forget, BATCHES), lambda state, z: jnp.log(-norm(state, z)), segment=STEPWISE
        )(Z)


def test_an_objective_whose_derivative_is_not_finite():
    """The norm of a difference that is zero."""
    with pytest.raises(NonFiniteError, match="objective"):
        mg.value_and_metagrad(
            mg.Training(START, forget, BATCHES), lambda state, z: jnp.linalg.norm(0 * state["w"]), segment=STEPWISE
        )(Z)


def test_every_error_is_a_metagradient_error():
    assert all(
        issubclass(error, MetagradientError)
        for error in (BatchError, ImpureStepError, NonFiniteError, PrecisionError, ReplayMismatch, StructureError)
    )
