"""Optimizers by name: exact against an unrolled loop that calls optax itself, or refused in words before compute."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from problems import EXAMPLES, Problem, assert_same, batches, cross_entropy, matrices_only, ridge, rows, seen
from quick import slow_but

import metagradient as mg
from metagradient import Segment
from metagradient.errors import NonFiniteError, StructureError

pytestmark = pytest.mark.core
STEPS = 5
KEEPS = [Segment(1, "steps", "gradient"), Segment(1, "steps", "state"), Segment(1, "steps", "linearisation")]


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield


# Digits by one layer, as there are many optimizers to compile. A ridge penalty keeps gradients of the border's pixels
# from zero, where the root of a second moment has no derivative.


def layer() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {"w": rng.normal(size=(64, 10)) / 4, "b": rng.normal(size=10) / 4}


def losses(params: Any, batch: Any) -> jax.Array:
    return cross_entropy(3 * jnp.tanh(batch["x"] @ params["w"] + params["b"]), batch["y"])


def loss(params: Any, batch: Any, z: Any) -> jax.Array:
    return jnp.mean(losses(params, batch) * z.get("weights", 1.0)) + z.get("ridge", 0.03) * ridge(params)


def objective(state: Any, z: Any) -> jax.Array:
    del z
    return jnp.mean(losses(state.params, rows(100, 120)))


@jax.jit
def value_and_gradient(params: Any, batch: Any, z: Any) -> Any:
    return jax.value_and_grad(loss)(params, batch, z)


def reference(problem: Problem, extra: bool = True) -> Any:
    """Value and gradient of a plain loop that calls optax itself.

    Arguments:
        extra: give updates their extra arguments. `optax.contrib.sam` says that it takes any, and takes none.
    """

    def run(z: Any) -> Any:
        params = jax.tree.map(jnp.asarray, problem.init)
        opt_state = None
        for t, batch in enumerate(problem.batches):
            z_t = seen(z, t, batch["index"])
            optimizer: Any = problem.optimizer if hasattr(problem.optimizer, "init") else problem.optimizer(z_t)
            if isinstance(optimizer, optax.GradientTransformation):
                optimizer = optax.with_extra_args_support(optimizer)
            value, gradient = value_and_gradient(params, batch, {k: z_t[k] for k in ("weights", "ridge") if k in z_t})
            given = {"value": value, "grad": gradient} if extra else {}
            with jax.disable_jit():
                opt_state = optimizer.init(params) if opt_state is None else opt_state
                updates, opt_state = optimizer.update(gradient, opt_state, params, **given)
            params = optax.apply_updates(params, updates)
        return problem.objective(mg.TrainState(params, opt_state, None, jnp.int32(STEPS)), z)

    return jax.value_and_grad(run)(jax.tree.map(jnp.asarray, problem.z))


def metagradient(problem: Problem, *, segment: Segment = KEEPS[0], **options: Any) -> Any:
    function = mg.value_and_metagrad(problem.training(**options), problem.objective, segment=segment, verify="off")
    return function(problem.z)


def digits(optimizer: Any, **changes: Any) -> Problem:
    z = {"weights": mg.PerExample(np.ones(EXAMPLES)), "ridge": np.asarray(0.03)}
    given = {"loss": loss, "init": layer(), "batches": batches(STEPS), "z": z, "objective": objective}
    return Problem(**given | {"optimizer": optimizer} | changes)


def taking(update: Any, init: Any = None) -> Any:
    """A transformation whose update takes extra arguments."""
    return optax.GradientTransformationExtraArgs(init or optax.identity().init, update)


def rates(about: float) -> mg.PerStep:
    return mg.PerStep(about * np.linspace(1, 0.6, STEPS))


@dataclass(frozen=True, eq=False)
class Row:
    """An optimizer, and where it is exact.

    Arguments:
        make: from a step's learning rate.
        rate: about it. Where that is None, `make` is called with a number, and gives an object instead of a function.
        signs: it reads gradients by their sign alone: example weights have no derivative; rates, which are left, do.
        extra: as in `reference`.
        tolerance: of the comparison.
    """

    make: Callable[[Any], Any]
    rate: float | None
    signs: bool = False
    extra: bool = True
    tolerance: float = 1e-10

    def problem(self, **changes: Any) -> Problem:
        if self.rate is None:
            return digits(self.make(0.1), **changes)
        problem = digits(lambda z: self.make(z["lr"]), **changes)
        given = {} if self.signs else problem.z
        return digits(problem.optimizer, **{"z": given | {"lr": rates(self.rate)}} | changes)


def chained(*parts: Any) -> Callable[[Any], Any]:
    """SGD with transformations before it."""
    return lambda lr: optax.chain(*parts, optax.sgd(lr))


def late(step: Any, **extra: Any) -> Any:
    return step > 2


EXACT: dict[str, Row] = {
    "adabelief": Row(lambda lr: optax.adabelief(lr, eps_root=1e-6), 0.02),
    "adadelta": Row(lambda lr: optax.adadelta(lr, eps=1e-4), 2.0),
    "adafactor": Row(lambda lr: optax.adafactor(lr, min_dim_size_to_factor=4, eps=1e-6), 0.1),
    "adafactor, unfactored": Row(
        lambda lr: optax.adafactor(lr, eps=1e-6, momentum=0.5, dtype_momentum=jnp.float64), 0.1
    ),
    "adagrad": Row(lambda lr: optax.adagrad(lr), 0.1),
    "adam": Row(lambda lr: optax.adam(lr, eps_root=1e-6), 0.02),
    "adamax": Row(lambda lr: optax.adamax(lr, eps=1e-4), 0.02),
    "adamaxw": Row(lambda lr: optax.adamaxw(lr, eps=1e-4, weight_decay=0.1, mask=matrices_only), 0.02),
    "adamw": Row(lambda lr: optax.adamw(lr, eps_root=1e-6, weight_decay=0.1), 0.02),
    "adan": Row(lambda lr: optax.adan(lr, eps_root=1e-6, weight_decay=0.1), 0.02),
    "amsgrad": Row(lambda lr: optax.amsgrad(lr, eps_root=1e-6), 0.02),
    "fromage": Row(lambda lr: optax.fromage(lr), 0.1),
    "lamb": Row(lambda lr: optax.lamb(lr, eps_root=1e-6, weight_decay=0.1), 0.05),
    "lars": Row(lambda lr: optax.lars(lr, weight_decay=0.1, trust_coefficient=0.1), 0.5),
    "lion": Row(lambda lr: optax.lion(lr, weight_decay=0.1), 0.01, signs=True),
    "nadam": Row(lambda lr: optax.nadam(lr, eps_root=1e-6), 0.02),
    "nadamw": Row(lambda lr: optax.nadamw(lr, eps_root=1e-6, weight_decay=0.1), 0.02),
    "noisy_sgd": Row(lambda lr: optax.noisy_sgd(lr, key=jax.random.key(3)), 0.3),
    "novograd": Row(lambda lr: optax.novograd(lr, eps_root=1e-6, weight_decay=0.1), 0.05),
    "optimistic_adam": Row(lambda lr: optax.optimistic_adam(lr, optimism=0.01, eps_root=1e-6), 0.02),
    "optimistic_adam_v2": Row(lambda lr: optax.optimistic_adam_v2(lr, eps_root=1e-6), 0.02),
    "optimistic_gradient_descent": Row(lambda lr: optax.optimistic_gradient_descent(lr), 0.2),
    "radam": Row(lambda lr: optax.radam(lr, b2=0.3, eps_root=1e-6, threshold=1.5), 0.05),
    "rmsprop": Row(lambda lr: optax.rmsprop(lr, eps=1e-4, momentum=0.5), 0.01),
    "rmsprop, centered": Row(lambda lr: optax.rmsprop(lr, eps=1e-4, centered=True, bias_correction=True), 0.01),
    "sgd": Row(lambda lr: optax.sgd(lr), 0.3),
    "sign_sgd": Row(lambda lr: optax.sign_sgd(lr), 0.02, signs=True),
    "signum": Row(lambda lr: optax.signum(lr), 0.02, signs=True),
    "sm3": Row(lambda lr: optax.sm3(lr), 0.1),
    "yogi": Row(lambda lr: optax.yogi(lr), 0.05),
    "polyak_sgd": Row(lambda lr: optax.chain(optax.polyak_sgd(10.0, 0.3, eps=0.1), optax.scale(lr)), 1.0),
    # Wrappers and states of their own.
    "MultiSteps": Row(lambda lr: optax.MultiSteps(optax.adam(lr, eps_root=1e-6), 2), 0.05),
    "MultiSteps, an object": Row(lambda lr: optax.MultiSteps(optax.sgd(lr, momentum=0.9), 2), None),
    "MultiSteps.gradient_transformation": Row(
        lambda lr: optax.MultiSteps(
            optax.sgd(lr), 2, should_skip_update_fn=optax.skip_not_finite
        ).gradient_transformation(),
        0.3,
    ),
    "inject_hyperparams, a schedule": Row(
        lambda lr: optax.inject_hyperparams(optax.sgd)(optax.cosine_decay_schedule(lr, STEPS), momentum=0.9), None
    ),
    "inject_hyperparams, a number": Row(lambda lr: optax.inject_hyperparams(optax.adam)(lr, eps_root=1e-6), None),
    "inject_stateful_hyperparams": Row(
        lambda lr: optax.inject_stateful_hyperparams(optax.sgd)(optax.linear_schedule(lr, 0.0, STEPS)), None
    ),
    "masked": Row(lambda lr: optax.chain(optax.masked(optax.trace(0.9), matrices_only), optax.sgd(lr)), 0.1),
    "partition": Row(
        lambda lr: optax.partition({"a": optax.adam(lr, eps_root=1e-6), "b": optax.sgd(lr)}, {"w": "a", "b": "b"}),
        0.05,
    ),
    "selective_transform": Row(
        lambda lr: optax.selective_transform(optax.sgd(lr), freeze_mask={"w": False, "b": True}), 0.1
    ),
    "apply_if_finite": Row(lambda lr: optax.apply_if_finite(optax.adam(lr, eps_root=1e-6), 3), 0.02),
    "conditionally_transform": Row(
        lambda lr: optax.chain(optax.conditionally_transform(optax.clip_by_global_norm(0.1), late), optax.sgd(lr)),
        0.3,
    ),
    "apply_every": Row(chained(optax.apply_every(2)), 0.2),
    "ema": Row(chained(optax.ema(0.7)), 0.3),
    "flatten": Row(lambda lr: optax.flatten(optax.adam(lr, eps_root=1e-6)), 0.02),
    "clipping": Row(chained(optax.adaptive_grad_clip(0.2), optax.clip_by_block_rms(0.1), optax.clip(0.2)), 0.3),
    "centralize": Row(chained(optax.centralize(), optax.normalize_by_update_norm()), 0.3),
    "keep_params_nonnegative": Row(lambda lr: optax.chain(optax.sgd(lr), optax.keep_params_nonnegative()), 0.3),
    # Optimizers that ask for the loss.
    "reduce_on_plateau": Row(
        lambda lr: optax.chain(optax.sgd(lr), contrib.reduce_on_plateau(factor=0.5, patience=1, rtol=0.3)), 0.3
    ),
    "momo": Row(lambda lr: contrib.momo(lr, weight_decay=0.1), 10.0),
    "momo, capped": Row(lambda lr: contrib.momo(lr, adapt_lower_bound=True, lower_bound=0.5), 0.3),
    "momo_adam": Row(lambda lr: contrib.momo_adam(lr, eps=1e-3), 0.02),
    # The rest of contrib.
    "acprop": Row(lambda lr: contrib.acprop(lr, eps_root=1e-6, eps=1e-4), 0.02),
    "ademamix": Row(lambda lr: contrib.ademamix(lr, eps_root=1e-6, weight_decay=0.1), 0.01),
    "simplified_ademamix": Row(lambda lr: contrib.simplified_ademamix(lr, alpha=1.0, eps_root=1e-6), 0.01),
    "adopt": Row(lambda lr: contrib.adopt(lr, eps=1e-3), 0.05),
    "cocob": Row(lambda lr: contrib.cocob(lr, eps=1e-3), 1.0),
    "dadapt_adamw": Row(lambda lr: contrib.dadapt_adamw(lr, eps=1e-3, estim_lr0=1e-2, weight_decay=0.1), 1.0),
    "dog": Row(lambda lr: contrib.dog(lr, init_step=("distance", 0.1)), 1.0),
    "dowg": Row(lambda lr: contrib.dowg(lr, 0.1), 1.0),
    # Takes its projection in float32.
    "galore": Row(lambda lr: contrib.galore(lr, rank=3, update_proj_gap=2), 0.02, tolerance=1e-5),
    "madgrad": Row(lambda lr: contrib.madgrad(lr, eps=1e-3), 0.05),
    "muon": Row(lambda lr: contrib.muon(lr, ns_steps=2, weight_decay=0.1, adam_eps_root=1e-6), 0.02),
    "prodigy": Row(lambda lr: contrib.prodigy(lr, eps=1e-3, estim_lr0=1e-2), 1.0),
    "sam": Row(
        lambda lr: contrib.sam(optax.sgd(lr), optax.chain(contrib.normalize(), optax.sgd(0.1)), sync_period=2),
        0.3,
        extra=False,
    ),
    "schedule_free_sgd": Row(lambda lr: contrib.schedule_free_sgd(lr), 0.3),
    "schedule_free_adamw": Row(lambda lr: contrib.schedule_free_adamw(lr, eps=1e-3, weight_decay=0.1), 0.05),
    "split_real_and_imaginary": Row(lambda lr: contrib.split_real_and_imaginary(optax.adam(lr, eps_root=1e-6)), 0.02),
}


# One of every kind of state, wrapper and reading is always run; the others, of the same kinds, are slow.
ALWAYS = {
    *("adafactor", "adam", "lamb", "lion", "noisy_sgd", "radam", "rmsprop, centered", "polyak_sgd", "MultiSteps"),
    *("MultiSteps, an object", "inject_hyperparams, a schedule", "masked", "partition", "apply_if_finite", "flatten"),
    *("conditionally_transform", "clipping", "reduce_on_plateau", "momo", "dog", "galore", "muon", "sam", "sm3"),
    *("schedule_free_adamw", "keep_params_nonnegative"),
}


@pytest.mark.parametrize(
    ("name", "segment"),
    slow_but(ALWAYS, zip(EXACT, cycle(KEEPS), strict=False)),
    ids=lambda x: getattr(x, "keep", x),
)
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning:optax")
def test_exact(name, segment):
    row = EXACT[name]
    try:
        row.make(0.1)
    except (AttributeError, TypeError) as missing:
        if tuple(map(int, optax.__version__.split(".")[:3])) >= (0, 2, 8):
            raise
        pytest.skip(f"the optax installed has no such optimizer: {missing}")
    problem = row.problem()
    assert_same(metagradient(problem, segment=segment), reference(problem, row.extra), row.tolerance)


# Refused, or without a derivative by nature.


LINE = r"asks for .*value_fn.* and a step gives value.*learning rate"
HAND = r"write the step by hand"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "lbfgs": (optax.lbfgs, rf"scale_by_zoom_linesearch can't be used here: it {LINE}"),
    "scale_by_zoom_linesearch": (
        lambda: optax.chain(optax.sgd(0.1), optax.scale_by_zoom_linesearch(10)),
        rf"scale_by_zoom_linesearch can't be used here: it {LINE}",
    ),
    "scale_by_backtracking_linesearch": (
        lambda: optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(10)),
        rf"scale_by_backtracking_linesearch can't be used here: it {LINE}",
    ),
    "lookahead": (lambda: optax.lookahead(optax.sgd(0.1), 2, 0.5), rf"lookahead .*{HAND}"),
    "sophia": (lambda: contrib.sophia(0.1), rf"hutchinson_estimator_diag_hessian .*obj_fn.*{HAND}"),
    "sam, opaque": (
        lambda: contrib.sam(optax.sgd(0.1), optax.sgd(0.1), opaque_mode=True),
        rf"sam can't be used here: .*grad_fn.*{HAND}",
    ),
    "differentially_private_aggregate": (
        lambda: contrib.differentially_private_aggregate(1.0, 1.0, key=jax.random.key(0)),
        rf"differentially_private_aggregate .*{HAND}",
    ),
}


@pytest.mark.parametrize("of_z", [False, True], ids=["object", "function"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_before_compute(name, of_z, monkeypatch):
    make, words = REFUSED[name]
    problem = digits((lambda z: make()) if of_z else make())
    monkeypatch.setattr("metagradient._replay.Pass.forward", None)
    with pytest.raises(StructureError, match=words):
        metagradient(problem)


NEVER = {
    # Optax's own loops give NaN: a root of zero, in the branch that isn't taken too.
    "radam, as it comes": Row(lambda lr: optax.radam(lr), 0.02),
    "mechanize": Row(lambda lr: contrib.mechanize(optax.sgd(lr), s_init=0.1), 0.3),
}


@pytest.mark.parametrize("name", NEVER)
def test_no_derivative_is_an_error_that_names_the_step_and_never_a_number(name):
    problem = NEVER[name].problem()
    assert not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(reference(problem)))
    with pytest.raises(NonFiniteError, match=r"the adjoint of step \d made the cotangent of \.(params|opt_state)"):
        metagradient(problem)


@pytest.mark.parametrize("loop", ["steps", "scan"])
def test_a_root_of_a_first_state_of_zeros_matters_where_that_depends_on_z(loop):
    """As in adopt, dadapt_adamw and dog, whose first moments and distances are zero whatever z is."""

    def rooted(state: Any, batch: Any, z: Any) -> Any:
        return {"x": jnp.sqrt(state["x"]) + z["start"] + z["step"]}

    def end(state: Any, z: Any) -> jax.Array:
        return state["x"]

    z, segment = {"start": jnp.zeros(()), "step": jnp.asarray(2.0)}, Segment(2, loop)
    training = mg.Training({"x": jnp.zeros(())}, rooted, [{"nothing": np.zeros(1)}] * 3)
    gradient = mg.value_and_metagrad(training, end, segment=segment)(z)[1]
    # x = 2, 2 + sqrt(2), 2 + sqrt(2 + sqrt(2))
    second = 2 + np.sqrt(2)
    right = 1 + (1 + 1 / (2 * np.sqrt(2))) / (2 * np.sqrt(second))
    np.testing.assert_allclose([gradient["start"], gradient["step"]], right, rtol=1e-12)
    training = mg.Training(lambda z: {"x": z["start"]}, rooted, [{"nothing": np.zeros(1)}] * 3)
    with pytest.raises(NonFiniteError, match=r"the adjoint of step 0 made the cotangent of \['x'\] non-finite"):
        mg.value_and_metagrad(training, end, segment=segment)(z)


# The loss itself, which some optimizers read: its cotangent is the tangent of the loss's own.


def polyak(changed: Callable[[Any], Any] = lambda value: value) -> Any:
    """A step as long as the loss is above a third."""
    inner = optax.polyak_sgd(10.0, f_min=0.3)

    def update(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> Any:
        return inner.update(updates, state, params, value=changed(value), **extra)

    return taking(update, inner.init)


VALUE_SEGMENTS = [
    *[Segment(1, "steps", keep) for keep in ("state", "gradient", "linearisation")],
    *[Segment(3, "scan", keep) for keep in ("state", "gradient", "linearisation")],
]


@pytest.fixture(scope="module")
def by_value(float64):
    problem = digits(polyak())
    return problem, reference(problem)


@pytest.mark.parametrize("segment", VALUE_SEGMENTS, ids=lambda s: f"{s.loop}-{s.keep}")
def test_the_loss_that_an_optimizer_reads_is_differentiated(by_value, segment):
    problem, expected = by_value
    assert_same(metagradient(problem, segment=segment), expected)


def test_the_loss_makes_a_difference(by_value):
    _, (_, expected) = by_value
    _, stopped = reference(digits(polyak(jax.lax.stop_gradient)))
    assert abs(stopped["ridge"] / expected["ridge"] - 1) > 0.05
    assert_same(metagradient(digits(polyak(jax.lax.stop_gradient)))[1], stopped)


@pytest.mark.parametrize("segment", VALUE_SEGMENTS[:2] + VALUE_SEGMENTS[3:5], ids=lambda s: f"{s.loop}-{s.keep}")
def test_an_optimizer_reads_the_mean_of_micro_batches(by_value, segment):
    problem, expected = by_value
    assert_same(metagradient(problem, segment=segment, microbatches=4), expected)


@pytest.mark.parametrize("segment", [VALUE_SEGMENTS[0], VALUE_SEGMENTS[5]], ids=lambda s: f"{s.loop}-{s.keep}")
def test_several_queries_through_an_optimizer_that_reads_the_loss(by_value, segment):
    problem, expected = by_value

    def queries(state: Any, z: Any) -> jax.Array:
        return jnp.stack([objective(state, z), -2 * objective(state, z), jnp.sum(state.params["w"] ** 2)])

    found = mg.value_and_metagrad(problem.training(), queries, vector=True, segment=segment)(problem.z)
    for q, factor in enumerate([1, -2]):
        assert_same(jax.tree.map(lambda x, q=q, factor=factor: x[q] / factor, found), expected)
    norm = digits(problem.optimizer, objective=lambda state, z: queries(state, z)[2])
    assert_same(jax.tree.map(lambda x: x[2], found), reference(norm))


# What an optimizer keeps in its first state is the same for all steps.


KEPT: dict[str, Callable[[Any], Any]] = {
    "inject_hyperparams": lambda z: optax.inject_hyperparams(optax.sgd)(learning_rate=z["lr"], momentum=0.5),
    "inject_hyperparams, beside others": lambda z: optax.chain(
        optax.clip(1.0), optax.inject_hyperparams(optax.adam)(z["lr"], eps_root=1e-6)
    ),
    "rprop": lambda z: optax.rprop(z["lr"]),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("kind", [mg.PerStep, mg.PerExample])
def test_a_first_state_may_not_depend_on_what_changes_from_step_to_step(name, kind, monkeypatch):
    monkeypatch.setattr("metagradient._replay.Pass.forward", None)
    make = KEPT[name] if kind is mg.PerStep else lambda z: KEPT[name]({"lr": jnp.mean(z["lr"])})
    z = {"lr": kind(np.full(STEPS if kind is mg.PerStep else EXAMPLES, 0.1)), "ridge": np.asarray(0.03)}
    problem = digits(make, z=z)
    words = rf"first state depends on z\['lr'\], which is {kind.__name__}.*optax\.sgd\(z\['lr'\]\)"
    with pytest.raises(StructureError, match=words):
        metagradient(problem)
    with pytest.raises(StructureError, match=words):
        mg.train(problem.training(), problem.z)


@pytest.mark.parametrize("name", KEPT)
def test_a_first_state_that_depends_on_a_shared_metaparameter_is_differentiated(name):
    z = {"lr": np.asarray(0.05)}
    if name != "rprop":  # which reads gradients by their sign
        z |= {"ridge": np.asarray(0.03), "weights": mg.PerExample(np.ones(EXAMPLES))}
    problem = digits(KEPT[name], z=z)
    assert_same(metagradient(problem), reference(problem))


def test_a_leaf_that_no_first_state_reads_may_change_from_step_to_step():
    """Beside an injected number, a schedule of z, read by every update."""

    def make(z: Any) -> Any:
        return optax.chain(optax.inject_hyperparams(optax.trace)(z["momentum"]), optax.scale(-z["lr"]))

    problem = digits(
        make, z={"momentum": np.asarray(0.5), "lr": rates(0.1), "weights": mg.PerExample(np.ones(EXAMPLES))}
    )
    assert_same(metagradient(problem), reference(problem))


# What isn't an optimizer.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (optax.adam, r"adam itself, which wasn't called: give optax\.adam\(1e-3\)"),
        (contrib.muon, "muon itself"),
        (optax.MultiSteps, "MultiSteps itself"),
        (0.1, r"the optimizer is 0\.1: give"),
        ("adam", r"the optimizer is 'adam': give"),
        (None, "the optimizer is None: give"),
    ],
    ids=["adam uncalled", "muon uncalled", "a class", "a number", "a name", "nothing"],
)
def test_what_is_no_optimizer_is_refused_where_it_is_given(given, words):
    with pytest.raises(StructureError, match=words):
        digits(given).training()


@pytest.mark.parametrize("given", [lambda z: 0.1, lambda z: optax.sgd, lambda z: optax.MultiSteps, lambda z: None])
def test_a_function_that_returns_no_optimizer_is_refused(given):
    with pytest.raises(StructureError, match=r"the optimizer returned .* for z_t: give optax\.adam\(1e-3\)"):
        metagradient(digits(given))


class Heavy(NamedTuple):
    velocity: Any
    steps: Any


class HeavyBall:
    """An optimizer of the user's own, which asks for the loss alone."""

    def __init__(self, rate: Any, decay: Any):
        self.rate, self.decay = rate, decay

    def init(self, params: Any) -> Heavy:
        return Heavy(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32))

    def update(self, updates: Any, state: Heavy, params: Any = None, *, value: Any) -> tuple[Any, Heavy]:
        velocity = jax.tree.map(lambda v, g: self.decay * v + g, state.velocity, updates)
        rate = self.rate * jnp.tanh(value)
        return jax.tree.map(lambda v: -rate * v, velocity), Heavy(velocity, state.steps + 1)


@pytest.mark.parametrize("of_z", [False, True], ids=["object", "function"])
def test_an_optimizer_of_the_users_own(of_z):
    def own(z: Any) -> HeavyBall:
        return HeavyBall(z["lr"], 0.9)

    def as_optax(optimizer: Any) -> Any:
        def update(updates: Any, state: Any, params: Any = None, *, value: Any, **extra: Any) -> Any:
            return optimizer.update(updates, state, params, value=value)

        return taking(update, optimizer.init)

    z = {"weights": mg.PerExample(np.ones(EXAMPLES)), "lr": rates(0.1)}
    if of_z:
        mine, theirs = own, lambda z: as_optax(own(z))
    else:
        z.pop("lr")
        mine, theirs = HeavyBall(0.1, 0.9), as_optax(HeavyBall(0.1, 0.9))
    assert_same(metagradient(digits(mine, z=z)), reference(digits(theirs, z=z)))


def asking() -> Any:
    def update(updates: Any, state: Any, params: Any = None, *, curvature: Any, **extra: Any) -> Any:
        return updates, state

    return taking(update)


class Curved:
    init = staticmethod(optax.identity().init)

    def update(self, updates: Any, state: Any, params: Any = None, *, curvature: Any) -> Any:
        return updates, state


@pytest.mark.parametrize("given", [asking(), optax.chain(optax.sgd(0.1), asking()), Curved()])
def test_an_extra_argument_that_a_step_does_not_have_is_refused_by_name(given):
    with pytest.raises(StructureError, match=rf"asks for 'curvature', and a step gives value, .*{HAND}"):
        metagradient(digits(given))


def changing(update: Callable[[Any, Any], Any]) -> Any:
    def init(params: Any) -> Any:
        return {"velocity": jax.tree.map(jnp.zeros_like, params)}

    return optax.GradientTransformation(init, lambda updates, state, params=None: update(updates, state))


@pytest.mark.parametrize(
    ("update", "words"),
    [
        (lambda u, s: (u, s | {"late": u["b"]}), r"optimizer state of another kind.*late"),
        (lambda u, s: (u, ()), r"optimizer state of another kind"),
        (lambda u, s: (u, {"velocity": u | {"b": u["b"][:3]}}), r"\.opt_state\['velocity'\]\['b'\]"),
        (lambda u, s: (u | {"w": u["w"][:, :1]}, s), r"parameter \['w'\] has shape \[64, 1\], not \[64, 10\]"),
        (lambda u, s: ({"w": u["w"]}, s), r"the optimizer .*can't be used here"),
        (lambda u, s: u, r"the optimizer .*can't be used here"),
    ],
)
def test_an_update_that_changes_parameters_or_state_in_kind_is_refused(update, words):
    with pytest.raises(StructureError, match=words):
        metagradient(digits(changing(update)))
