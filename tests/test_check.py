"""`check` passes what is right; what is wrong fails in the row that it should, and the text blames the right part."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import rows

import metagradient as mg
from metagradient import _check, _jax
from metagradient._jax import doubles_beside_single_draws
from metagradient.given import accumulate
from metagradient.schedule import KaryTree, KeepAll, TwoLevel
from metagradient.step import rules, segment
from metagradient.step.from_loss import LossStep
from metagradient.step.runner import Runner
from metagradient.step.segment import Segment

pytestmark = pytest.mark.core

T = 6
Z = {"rate": mg.PerStep(jnp.full(T, 0.3)), "pull": jnp.asarray(0.2)}
X = np.random.default_rng(0).normal(size=(T, 5)).astype(np.float32)
BATCHES = [{"x": x} for x in X]
check = partial(mg.check, directions=1, segment=Segment(1, "steps"))


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    options = _jax._compiler_options(jax.default_backend()) or {}
    monkeypatch.setattr(_jax, "_compiler_options", lambda backend: {**options, "xla_backend_optimization_level": 0})


def step(state: jax.Array, batch: dict, z: dict) -> jax.Array:
    return state - z["rate"] * jnp.tanh(state - batch["x"] + z["pull"])


def objective(state: jax.Array, z: dict) -> jax.Array:
    return jnp.mean(state**2)


def text(report: mg.CheckReport) -> str:
    """A report without its lines and frames."""
    return " ".join("".join(c if c not in "│┃" else " " for c in str(report)).split())


# A small net that reads the number off a digit, for whatever concerns `Training.from_loss`.

STEPS, EXAMPLES, BATCH = 4, 12, 4
SGD = optax.sgd(0.3, momentum=0.9)


def net(dtype: Any = np.float32) -> dict:
    rng = np.random.default_rng(1)
    return {"w1": rng.normal(size=(64, 4)).astype(dtype) / 4, "w2": rng.normal(size=(4,)).astype(dtype) / 2}


def net_batches() -> list[dict]:
    data, rng = rows(0, EXAMPLES, np.float32), np.random.default_rng(0)
    drawn = [rng.integers(0, EXAMPLES, BATCH) for _ in range(STEPS)]
    return [{"x": data["x"][i], "y": (data["y"][i] / 9).astype(np.float32), "index": i} for i in drawn]


def net_z() -> dict:
    return {"weights": mg.PerExample(jnp.ones(EXAMPLES)), "heat": mg.PerStep(jnp.linspace(0.8, 1.2, STEPS))}


def net_loss(params: dict, batch: dict, z: dict, hidden: Callable[[Any], Any] = lambda x: x) -> jax.Array:
    scores = hidden(jnp.tanh(batch["x"] @ params["w1"])) @ params["w2"] * z["heat"]
    return jnp.mean(z["weights"] * (scores - batch["y"]) ** 2)


def net_objective(state: Any, z: Any) -> jax.Array:
    del z
    data, params = rows(100, 110, np.float32), state.params
    return jnp.mean((jnp.tanh(data["x"] @ params["w1"]) @ params["w2"] - data["y"] / 9) ** 2)


def checked(loss: Callable[..., Any] = net_loss, optimizer: Any = None, **options: Any) -> mg.CheckReport:
    """The report on the net."""
    made = {name: options.pop(name) for name in ("microbatches", "has_model_state") if name in options}
    init = options.pop("init", net())
    training = mg.Training.from_loss(loss, optimizer or SGD, init, net_batches(), **made)
    return check(training, net_objective, net_z(), **options)


# What is right passes.


def test_a_good_run_passes_and_the_report_is_readable_and_plain_data():
    report = mg.check(mg.Training(jnp.ones(5), step, BATCHES), objective, Z)
    assert report.ok
    assert len(report.directions) == 2
    assert all(d.relative_error < 1e-9 for d in report.directions)
    assert all(d.forward_error is not None and d.forward_error < 1e-12 for d in report.directions)
    assert "FAIL" not in str(report)
    assert "z['rate']" in str(report)
    assert json.loads(report.to_json())["ok"] is True


def test_bad_input_is_an_error_not_a_report():
    with pytest.raises(mg.errors.StructureError):
        mg.check(mg.Training(jnp.ones(5), step, BATCHES), objective, {**Z, "rate": mg.PerStep(jnp.ones(T + 1))})


def test_a_jax_that_was_not_tested_is_named(monkeypatch):
    training = mg.Training(jnp.ones(5), step, BATCHES)
    assert "note:" not in str(check(training, objective, Z))
    monkeypatch.setattr(_check, "untested", lambda: "jax 0.99 is none of the releases")
    report = check(training, objective, Z)
    assert "note: jax 0.99 is none of the releases" in text(report)
    assert report.ok


KEYS = {
    "typed": lambda: jax.random.key(3),
    "legacy": lambda: jax.random.PRNGKey(3),
    "rbg": lambda: jax.random.key(3, impl="rbg"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_the_twin_draws_the_random_numbers_of_the_run(kind):
    def noisy(state, batch, z):
        values, key = state
        key, mask, noise = jax.random.split(key, 3)
        # Noise in the dtype of an array, as optax's has it: of the same bits in float64 too.
        x = batch["x"] * jax.random.bernoulli(mask, 0.7, values.shape)
        x = x + 0.3 * jax.random.normal(noise, x.shape, x.dtype)
        return step(values, {"x": x}, z), key

    report = check(mg.Training((jnp.ones(5), KEYS[kind]()), noisy, BATCHES), lambda s, z: objective(s[0], z), Z)
    assert report.ok, str(report)
    assert all(p["relative_difference"] < 1e-5 for p in report.precision.values())


def test_the_twin_draws_the_noise_of_an_optimizer():
    noisy = optax.chain(optax.add_noise(1e-2, 0.5, jax.random.key(3)), optax.sgd(0.3))
    assert checked(optimizer=noisy).ok


@pytest.mark.parametrize("x64", [True, False])
def test_draws_of_float64_are_those_of_float32(x64):
    key, p = jax.random.key(0), np.linspace(0.1, 0.9, 5, dtype=np.float32)
    draws: dict[str, Callable[[Any], Any]] = {
        "normal": lambda p: jax.random.normal(key, p.shape, p.dtype),
        "default": lambda p: jax.random.normal(key, p.shape),
        "uniform": lambda p: jax.random.uniform(key, p.shape, dtype=p.dtype),
        "bernoulli": lambda p: jax.random.bernoulli(key, p),
        "categorical": lambda p: jax.random.categorical(key, jnp.log(p), shape=(20,)),
        "randint": lambda p: jax.random.randint(key, (20,), 0, 1000),
        "permutation": lambda p: jax.random.permutation(key, p),
        "choice": lambda p: jax.random.choice(key, 5, (20,), p=p / p.sum()),
    }
    expected = {name: np.asarray(draw(p)) for name, draw in draws.items()}
    functions = dict(vars(jax.random))
    with doubles_beside_single_draws(x64=x64):
        double = jnp.asarray(p, jnp.float64)
        found = {name: draw(double) for name, draw in draws.items()}
        assert found["normal"].dtype == jnp.float64
        assert found["default"].dtype == jnp.zeros(()).dtype == (jnp.float64 if x64 else jnp.float32)
    for name in draws:
        np.testing.assert_allclose(np.asarray(found[name]), expected[name], rtol=1e-6, err_msg=name)
    assert dict(vars(jax.random)) == functions
    assert jnp.zeros(2).dtype == jnp.float32


def looped(state: jax.Array, batch: dict, z: dict, dtype: Any = None) -> jax.Array:
    """A loop whose carry is as wide as JAX makes it, or of a dtype that is fixed."""
    total, _ = jax.lax.scan(lambda c, x: (c + jnp.tanh(x), None), jnp.zeros((), dtype), state - batch["x"])
    return state - z["rate"] * (total + z["pull"]) * state


def drawing(draw: Callable[..., jax.Array], dtype: Any = None) -> mg.Training:
    """A loop beside random numbers."""

    def noisy(state, batch, z):
        values, key = state
        return looped(values, batch, z, dtype) + 0.1 * draw(jax.random.fold_in(key, 0), (5,)), jax.random.split(key)[0]

    return mg.Training((jnp.ones(5), jax.random.key(0)), noisy, BATCHES)


def of_values(state: tuple, z: dict) -> jax.Array:
    return objective(state[0], z)


def test_a_loop_that_starts_with_zeros_is_checked():
    assert check(mg.Training(jnp.ones(5), looped, BATCHES), objective, Z).ok
    report = check(drawing(lambda *arguments: jax.random.normal(*arguments)), of_values, Z)
    assert report.ok, str(report)


def test_numbers_drawn_past_the_functions_of_jax_random_are_those_of_the_run():
    def step(state, batch, z):
        values, key = state
        return values - z["rate"] * (values - past(jax.random.fold_in(key, 1), (5,))) * z["pull"], key

    past = jax.random.normal
    report = check(mg.Training((jnp.ones(5), jax.random.key(0)), step, BATCHES), of_values, Z)
    assert report.ok, str(report)


def test_a_run_without_a_twin_is_told_with_the_remedy():
    fixed = check(drawing(lambda *arguments: jax.random.normal(*arguments), jnp.float32), of_values, Z)
    assert not fixed.ok
    assert fixed.replays
    assert "the run has no float64 twin, so nothing was compared" in text(fixed)
    assert "must follow the dtypes of their arguments: x.dtype, not jnp.float32" in text(fixed)
    past = check(drawing(jax.random.normal), of_values, Z)
    assert not past.ok
    assert "drawn past the functions of jax.random" in text(past)


def test_a_process_in_x64_stays_in_it():
    with jax.enable_x64(True):
        key = jax.random.key(0)

        def noisy(state, batch, z):
            return step(state, batch, z) + 0.1 * jax.random.normal(key, (5,))

        z = {"rate": mg.PerStep(np.full(T, 0.3)), "pull": np.asarray(0.2)}
        batches = [{"x": x.astype(np.float64)} for x in X]
        report = check(mg.Training(np.ones(5), noisy, batches), objective, z)
        assert report.ok, str(report)
        assert all(p["relative_difference"] == 0 for p in report.precision.values())
        assert jnp.zeros(()).dtype == jnp.float64


def test_a_dtype_that_is_fixed_in_the_run_is_named_and_no_alarm():
    def fixed(state, batch, z):
        return step(state.astype(jnp.float32), batch, z).astype(state.dtype)

    report = check(mg.Training(jnp.ones(5), fixed, BATCHES), objective, Z)
    assert report.ok, str(report)
    assert report.single
    assert "test_check.py" in report.single[0]
    assert "computes in float32 at" in text(report)


def test_adam_on_inputs_that_are_always_zero():
    # Weights that get no gradient stand where Adam's root has its smallest argument, eps_root.
    def loss(params, batch, z):
        return jnp.mean(z["weights"] * (batch["x"] @ params * z["heat"] - batch["y"]) ** 2)

    def held_out(state, z):
        data = rows(100, 110, np.float32)
        return jnp.mean((data["x"] @ state.params - data["y"] / 9) ** 2)

    zeros = jnp.zeros(64)
    training = mg.Training.from_loss(loss, optax.adam(0.02, eps_root=1e-8), zeros, net_batches())
    report = check(training, held_out, net_z())
    assert report.ok, str(report)


def test_a_leaf_without_effect_is_no_alarm():
    def idle(state, batch, z):
        # Nothing but rounding is left of what z["idle"] does.
        return step(state, batch, z) + (z["idle"] + state) - (state + 2 * z["idle"]) + z["idle"] * jnp.cos(0 * state)

    report = check(mg.Training(jnp.ones(5), idle, BATCHES), objective, {**Z, "idle": jnp.asarray([0.7, 0.1, 0, 0, 3])})
    assert report.ok, str(report)
    alone = check(mg.Training(jnp.ones(5), lambda s, b, z: 0.9 * s, BATCHES), objective, {"idle": jnp.ones(3)})
    assert alone.ok, str(alone)


# The program that is checked is the one that will run.


def test_a_fault_of_one_way_to_compile_is_found_where_that_is_asked_for(monkeypatch):
    real = segment.pull_many

    def faulty(*arguments):
        pulled = real(*arguments)
        return replace(pulled, total=jax.tree.map(lambda x: 1.01 * x, pulled.total))

    monkeypatch.setattr("metagradient.step.programs.pull_many", faulty)

    def report(how):
        return check(mg.Training(jnp.ones(5), step, BATCHES), objective, Z, segment=how)

    assert report(Segment(4, "steps")).ok
    wrong = report(Segment(4, "scan"))
    assert not wrong.ok
    assert not wrong.forward_agrees


@pytest.mark.parametrize(
    "options", [{"schedule": KeepAll()}, {"schedule": TwoLevel()}, {"memory": mg.Memory(device=400)}]
)
def test_schedules_and_budgets_reach_both_metagradients(options, monkeypatch):
    used = []
    real = mg.value_and_metagrad

    def spied(*arguments, **given):
        made = real(*arguments, **given)
        evaluate = made.evaluate

        def noted(z):
            found = evaluate(z)
            used.append(found.stats.schedule)
            return found

        made.evaluate = noted
        return made

    monkeypatch.setattr("metagradient._check.value_and_metagrad", spied)
    monkeypatch.setattr("metagradient._twin.value_and_metagrad", spied)
    report = check(mg.Training(jnp.ones(5), step, BATCHES), objective, Z, **options)
    assert report.ok, str(report)
    assert len(used) == 2
    assert used[0] == used[1]
    if "schedule" in options:
        assert used[0] == options["schedule"]
    else:
        assert used[0].memory == options["memory"]


@pytest.mark.parametrize("how", [Segment(1, "steps"), Segment(4, "scan")])
def test_a_window_passes_on_a_right_run(how):
    whole = check(mg.Training(jnp.ones(5), step, BATCHES), objective, Z, segment=how)
    last = check(mg.Training(jnp.ones(5), step, BATCHES), objective, Z, segment=how, window=3)
    assert last.ok, str(last)
    assert last.directions[0].metagradient != pytest.approx(whole.directions[0].metagradient, rel=0.1)
    assert last.directions[0].extrapolated != pytest.approx(whole.directions[0].extrapolated, rel=0.1)


def test_a_start_that_depends_on_z_passes():
    training = mg.Training(lambda z: jnp.ones(5) * jnp.sin(z["pull"]), step, BATCHES)
    assert check(training, objective, Z).ok
    assert check(training, objective, Z, window=3).ok


def test_a_mean_over_a_validation_set_passes():
    held_out = mg.mean_over([{"x": X[0]}, {"x": X[1][:3]}], lambda state, b: jnp.mean((state[:3] - b["x"][:3]) ** 2))
    assert check(mg.Training(jnp.ones(5), step, BATCHES), held_out, Z).ok


# An alarm on each wrong metagradient, in its row. Each is put into the library as it once was.


@jax.custom_vjp
def reversal(x):
    return x


reversal.defvjp(lambda x: (x, None), lambda _, g: (-0.7 * g,))


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -3e-2, 3e-2),))


@jax.custom_jvp
def stretched(x):
    return jnp.tanh(x)


stretched.defjvp(lambda x, t: (jnp.tanh(x[0]), t[0] * jnp.sqrt(1 + x[0] ** 2)))


def test_a_rule_that_is_seen_passes():
    assert checked(lambda params, batch, z: net_loss(params, batch, z, reversal)).ok


@pytest.mark.parametrize("rule", [reversal, clipped, stretched], ids=["reversal", "clipped", "stretched"])
def test_rules_that_are_not_seen(rule, monkeypatch):
    monkeypatch.setattr(rules, "own_rules", lambda program: [])
    report = checked(lambda params, batch, z: net_loss(params, batch, z, rule))
    assert not report.forward_agrees
    assert not report.differences_agree
    assert not report.ok


def scaled(monkeypatch):
    """The pull-back, a hundredth too large in one leaf."""
    real = segment._pulled

    def pulled(*arguments):
        cotangent, ct_z, asymmetry = real(*arguments)
        return cotangent, {**ct_z, "pull": jax.tree.map(lambda x: 1.01 * x, ct_z["pull"])}, asymmetry

    monkeypatch.setattr(segment, "_pulled", pulled)


def first_step_only(monkeypatch):
    """What every step gives is added to the first step's entry."""

    def added(total, cotangent, t, index, groups):
        return accumulate(total, cotangent, 0 * t, index, groups)

    monkeypatch.setattr(segment, "accumulate", added)


def no_moments(monkeypatch):
    """No cotangent passes the optimiser's moments."""
    real = LossStep.pull_back

    def pull_back(self, state, kept, batch, z):
        adjoint = real(self, state, kept, batch, z)
        n, m = len(jax.tree.leaves(state.params)), len(jax.tree.leaves(state.opt_state))

        def without(cotangent):
            return adjoint((*cotangent[:n], *(jnp.zeros_like(c) for c in cotangent[n : n + m]), *cotangent[n + m :]))

        return without

    monkeypatch.setattr(LossStep, "pull_back", pull_back)


def stale_in_pull_back(monkeypatch):
    """A pull-back reads the batch of the step before."""
    real = Runner.keep

    def keep(self, i, state):
        kept, end = real(self, i, state)
        return replace(kept, batches=self.batches(max(i - 1, 0))), end

    monkeypatch.setattr(Runner, "keep", keep)


@pytest.mark.parametrize("fault", [scaled, first_step_only, no_moments, stale_in_pull_back], ids=lambda f: f.__name__)
def test_a_wrong_pull_back(fault, monkeypatch):
    fault(monkeypatch)
    written = mg.Training(jnp.ones(5), lambda *arguments: step(*arguments), BATCHES)
    report = checked() if fault is no_moments else check(written, objective, Z)
    assert report.replays
    assert not report.forward_agrees
    assert not report.differences_agree
    assert not report.ok
    assert "FAIL" in str(report)
    assert text(report).count("the metagradient is in doubt") == 2


def test_a_stale_batch_in_a_replay(monkeypatch):
    real, seen = Runner.batches, set()

    def batches(self, i):
        again = (id(self), i) in seen and i > 0
        seen.add((id(self), i))
        return real(self, i - 1 if again else i)

    monkeypatch.setattr(Runner, "batches", batches)
    report = check(mg.Training(jnp.ones(5), step, BATCHES), objective, Z, schedule=KaryTree(2))
    assert not report.replays
    assert not report.ok
    assert report.error
    assert report.error in text(report)


def test_micro_batches_of_what_holds_no_examples(monkeypatch):
    def loss(params, batch, z):
        return net_loss(params, batch, z) * jnp.sum(batch["classes"])

    classes = np.linspace(0.5, 1.5, 10, dtype=np.float32)

    def report():
        batches = [{**batch, "classes": classes} for batch in net_batches()]
        made = mg.Training.from_loss(lambda *arguments: loss(*arguments), SGD, net(), batches, microbatches=2)
        return check(made, net_objective, net_z())

    assert report().ok

    def every_axis(self, batch, z):
        def cut(x, j):
            return jax.lax.dynamic_index_in_dim(x.reshape(2, -1, *x.shape[1:]), j, keepdims=False)

        def parts(j):
            seen = {**z, "weights": mg.PerExample(cut(z["weights"].value, j))}
            return jax.tree.map(lambda x: cut(x, j), batch), seen

        return parts

    monkeypatch.setattr(LossStep, "_parts", every_axis)
    wrong = report()
    assert not wrong.microbatches_agree
    assert not wrong.ok
    assert "the loss isn't a mean over examples, or examples= should name the leaves that hold them" in text(wrong)


def test_a_gradient_that_is_noise_in_float32_is_told_by_float64():
    def noisy(state, batch, z):
        # Of an angle this large, float32 doesn't know the phase.
        return step(state, batch, z) + 1e-9 * jnp.sin(1e8 * z["phase"])

    z = {**Z, "phase": jnp.linspace(1.13, 2.31, 5)}
    report = check(mg.Training(jnp.ones(5), noisy, BATCHES), objective, z)
    assert report.forward_agrees
    assert not report.precise
    assert not report.ok


def test_a_step_with_fresh_randomness_is_reported():
    def noisy(state: jax.Array, batch: dict, z: dict) -> jax.Array:
        return step(state, batch, z) + np.random.default_rng().normal()

    report = check(mg.Training(jnp.ones(5), noisy, BATCHES), objective, Z)
    assert not report.replays
    assert not report.ok
    assert report.error


# What is in doubt: the metagradient, the differences, or a rule.


def test_a_wrong_derivative_of_the_user_s_is_found():
    @jax.custom_jvp
    def wrong(x: jax.Array) -> jax.Array:
        return jnp.tanh(x)

    wrong.defjvp(lambda x, t: (jnp.tanh(x[0]), 1.01 * t[0] / jnp.cosh(x[0]) ** 2))

    def tampered(state: jax.Array, batch: dict, z: dict) -> jax.Array:
        return state - z["rate"] * wrong(state - batch["x"] + z["pull"])

    report = check(mg.Training(jnp.ones(5), tampered, BATCHES), objective, Z)
    assert not report.ok
    assert report.forward_agrees
    assert not report.differences_agree
    assert "that of a rule which isn't the derivative of its value" in text(report)


def test_a_rule_that_forward_mode_refuses_leaves_the_differences():
    @jax.custom_vjp
    def half(x):
        return jnp.tanh(x)

    half.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (0.5 * g / jnp.cosh(x) ** 2,))

    @jax.custom_vjp
    def true(x):
        return jnp.tanh(x)

    true.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (g / jnp.cosh(x) ** 2,))

    def report(f):
        def ruled(state, batch, z):
            return state - z["rate"] * f(state - batch["x"] + z["pull"])

        return check(mg.Training(jnp.ones(5), ruled, BATCHES), objective, Z)

    assert report(true).ok
    wrong = report(half)
    assert wrong.directions[0].forward is None
    assert not wrong.ok
    assert "the derivative is in doubt: of the run, by a rule that isn't one, or of the engine" in text(wrong)


def test_a_kink_is_blamed_on_the_run():
    def tied(state: jax.Array, batch: dict, z: dict) -> jax.Array:
        # Two equal entries: the maximum has no derivative in a direction that parts them.
        return state + jnp.max(z["a"]) * jnp.ones_like(state)

    report = check(mg.Training(jnp.ones(2), tied, BATCHES), objective, {"a": jnp.ones(2)})
    assert not report.differences_agree
    assert "the differences are in doubt: one-sided ones are" in text(report)
    assert "by a kink or tie in the run" in text(report)


def test_a_curve_is_no_kink():
    # Hardly a slope, and much curvature: one-sided differences are far apart until h is small.
    def curved(state: jax.Array, batch: dict, z: dict) -> jax.Array:
        return state + (z["a"] - 1.0001) ** 2

    report = check(mg.Training(jnp.ones(2), curved, BATCHES), objective, {"a": jnp.asarray(1.0)})
    assert report.ok, str(report)


def test_differences_that_do_not_settle_are_in_doubt():
    def rough(state: jax.Array, batch: dict, z: dict) -> jax.Array:
        # Every scale adds as much to the slope as the one above it.
        return state + 1e-3 * sum(jnp.sin(7.0**k * z["a"]) / 7.0**k for k in range(14))

    report = check(mg.Training(jnp.ones(2), rough, BATCHES), objective, {"a": jnp.asarray(1.0)})
    assert report.forward_agrees
    assert not report.differences_agree
    assert "the differences are in doubt: they don't settle; give a smaller step=" in text(report)


def test_a_run_that_jumps_leaves_the_differences_in_doubt():
    def jumps(state: jax.Array, batch: dict, z: dict) -> jax.Array:
        # A straight line on the whole, in steps far below the differences' h, which have no slope.
        return state + jnp.round(z["a"] * 2.0**30) / 2.0**30 + 0.1 * z["a"]

    with jax.enable_x64(True):
        training = mg.Training(np.ones(2), jumps, [{"x": x.astype(np.float64)} for x in X])
        report = check(training, objective, {"a": np.asarray(1.0)})
    assert report.forward_agrees
    assert not report.differences_agree
    assert "the differences are in doubt, as forward mode confirms the metagradient: the run jumps" in text(report)


# Stopped gradients: the metagradient is that of the loop, and differences know the other one.


def detached(state: jax.Array, batch: dict, z: dict) -> jax.Array:
    target = jax.lax.stop_gradient(jnp.tanh(state + batch["x"]))
    return state - z["rate"] * (state - target + z["pull"])


def test_stopped_gradients_are_told_with_their_place():
    report = check(mg.Training(jnp.ones(5), detached, BATCHES), objective, Z)

    def loop(z):
        state = jnp.ones(5)
        for t, batch in enumerate(BATCHES):
            state = detached(state, batch, {"rate": z["rate"].value[t], "pull": z["pull"]})
        return objective(state, z)

    direction = report.directions[0]
    assert report.ok, str(report)
    assert direction.through is not None
    assert abs(direction.through - direction.metagradient) > 0.05 * abs(direction.metagradient)
    found = mg.value_and_metagrad(mg.Training(jnp.ones(5), detached, BATCHES), objective)(Z)[1]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.grad(loop)(Z)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    line = detached.__code__.co_firstlineno + 1
    assert [place.split(" ")[0].rpartition("/")[-1].startswith(f"test_check.py:{line}:") for place in report.stops]
    assert len(report.stops) == 1
    assert "gradients are stopped at" in text(report)
    assert "what jax.grad gives of the whole loop, and not the derivative of the run's value" in text(report)
    assert "through the stops" in text(report)


def test_a_wrong_metagradient_is_found_beside_stopped_gradients(monkeypatch):
    first_step_only(monkeypatch)
    report = check(mg.Training(jnp.ones(5), lambda *arguments: detached(*arguments), BATCHES), objective, Z)
    assert not report.forward_agrees
    assert not report.ok


def test_stops_without_effect_are_not_mentioned():
    def shifted(state: jax.Array, batch: dict, z: dict) -> jax.Array:
        top = jax.lax.stop_gradient(jnp.max(state))
        return step(state, batch, z) + 0.1 * (top + jnp.log(jnp.sum(jnp.exp(state - top))))

    report = check(mg.Training(jnp.ones(5) + X[0], shifted, BATCHES), objective, Z)
    assert report.ok
    assert not report.stops
    assert "stopped" not in str(report)
