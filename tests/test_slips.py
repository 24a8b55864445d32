"""What users of training libraries get wrong most: each slip has a typed error with its remedy, before compute."""

import functools
from contextlib import contextmanager
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax import lax
from journalled import descent

import metagradient as mg
from metagradient import Segment
from metagradient.descent.journal import RECORDS, TIMINGS, read_lines
from metagradient.errors import BatchError, DerivativeError, NonFiniteError, StoreError, StructureError

pytestmark = pytest.mark.core

STEPS, BATCH, EXAMPLES = 5, 4, 7
START = {"w": np.ones(3, np.float32), "b": np.ones((), np.float32)}
BATCHES = [
    {"x": np.full((BATCH, 3), t + 1, np.float32), "y": np.ones(BATCH, np.float32), "index": np.arange(BATCH)}
    for t in range(STEPS)
]
Z = {"weights": mg.PerExample(np.ones(EXAMPLES, np.float32))}


def squares(params, batch, z):
    return jnp.mean(z["weights"] * (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def norm(state, z):
    del z
    return jnp.sum(state.params["w"] ** 2)


@pytest.fixture
def ran():
    """One entry a step that ran; one that was only traced leaves none."""
    entries = []
    yield entries
    jax.effects_barrier()


@contextmanager
def refused(error, ran, *words):
    """An error whose message holds all `words`, and no step that ran."""
    with pytest.raises(error) as caught:
        yield caught
    jax.effects_barrier()
    assert not ran
    assert caught.type is error
    for word in words:
        assert word in str(caught.value)


def counted(ran):
    """SGD that tells of every update."""
    sgd = optax.sgd(1e-3)

    def update(updates, state, params=None):
        jax.debug.callback(lambda: ran.append(None))
        return sgd.update(updates, state, params)

    return optax.GradientTransformation(sgd.init, update)


def metagradient(ran, loss=squares, objective=norm, z=Z, init=START, batches=BATCHES, optimizer=None, **options):
    training = mg.Training.from_loss(loss, optimizer or counted(ran), init, batches, **options)
    return mg.value_and_metagrad(training, objective)(z)


def test_what_is_broken_below_is_sound(ran):
    value, grad = metagradient(ran)
    jax.effects_barrier()
    assert ran
    assert np.isfinite(value)
    assert np.all(np.asarray(grad["weights"].value)[:BATCH])


# Batches.


class Loader:
    def __iter__(self):
        return iter(BATCHES)


class SizedLoader(Loader):
    def __len__(self):
        return STEPS


class Endless:
    def __getitem__(self, t):
        return BATCHES[t % STEPS]


def with_leaf(name, value):
    return [{**batch, name: value} for batch in BATCHES]


SOURCES = {
    "a generator": ((b for b in BATCHES), ["generator", "list(...)"]),
    "an iterator": (iter(BATCHES), ["list(...)"]),
    "a loader that is only walked": (Loader(), ["Loader", "__len__", "__getitem__", "list(...)"]),
    "a loader with a length": (SizedLoader(), ["__getitem__", "list(...)"]),
    "no length": (Endless(), ["Endless", "__len__", "grain.MapDataset"]),
    "a dictionary of stacks": ({"x": np.ones((STEPS, BATCH, 3))}, ["dictionary", "for t in range(steps)"]),
    "an array": (np.ones((STEPS, BATCH)), ["is an array", "{'x': x}"]),
    "none": (None, ["None", "sequence of pytrees"]),
    "a path": ("train.npz", ["'train.npz'", "sequence of pytrees"]),
}
LEAVES = {
    "texts": (with_leaf("y", np.array(["a"] * BATCH)), ["batches[0]['y']", "<U1", "Encode"]),
    "a text": (with_leaf("y", "cat"), ["batches[0]['y']", "Encode"]),
    "bytes": (with_leaf("y", np.array([b"a"] * BATCH)), ["batches[0]['y']", "Encode"]),
    "objects": (with_leaf("y", np.array([{}, (), None, 1], object)), ["batches[0]['y']", "object", "ragged"]),
    "a function": (with_leaf("y", len), ["batches[0]['y']", "object"]),
    "dates": (with_leaf("y", np.array(["2024-01-01"] * BATCH, "datetime64[D]")), ["batches[0]['y']", "datetime64"]),
    "spans": (with_leaf("y", np.ones(BATCH, "timedelta64[s]")), ["batches[0]['y']", "timedelta64", "Encode"]),
    "records": (with_leaf("y", np.zeros(BATCH, "f4, i4")), ["batches[0]['y']", "Encode"]),
    "an index that is too short": (with_leaf("index", np.arange(2)), ["2 ids", "4 examples", "needs its id"]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources_of_batches(name, ran):
    batches, words = SOURCES[name]
    with refused(BatchError, ran, *words):
        metagradient(ran, batches=batches)
    if not isinstance(batches, str):
        with refused(BatchError, ran, *words):
            mg.mean_over(batches, lambda state, batch: jnp.zeros(()))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_of_batches(name, ran):
    batches, words = LEAVES[name]
    with refused(BatchError, ran, *words):
        metagradient(ran, batches=batches)


def test_a_batch_of_nothing(ran):
    with refused(BatchError, ran, "batches[0] is None", "{}"):
        metagradient(ran, batches=[None] * STEPS, z={"weights": jnp.ones(())})


def test_arrays_of_another_library_are_read(ran):
    """Whatever numpy can read, though its dtype isn't numpy's."""

    class Foreign:
        dtype = "foreign.float32"

        def __init__(self, values):
            self.values = values

        def __array__(self, dtype=None, copy=None):
            return self.values

    value, _ = metagradient(ran, batches=[{**b, "x": Foreign(b["x"])} for b in BATCHES])
    assert value == metagradient(ran)[0]


# Parameters and states.

MLP = eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))


class Dropping(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(3, 1, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.linear(x))


PARTITION, SPLIT = "eqx.partition(model, eqx.is_array)", "nnx.split(model, nnx.Param, ...)"
PARAMETERS = {
    "an equinox model": (MLP, ["params.activation", "a function", PARTITION]),
    "one in a dictionary": ({"net": MLP}, ["params['net'].activation", PARTITION]),
    "an nnx model": (Dropping(), ["uint32", SPLIT]),
    "one in a tuple": ((Dropping(), START), ["uint32", SPLIT]),
    "a linen model": (linen.Dense(3), ["init is a Dense", "model.init(key, x)"]),
    "a function of no model": ({**START, "act": jnp.tanh}, ["params['act']", "a function", PARTITION]),
    "a text": ({**START, "name": "adam"}, ["params['name']", "'adam'", "keep names"]),
    "texts": ({**START, "name": np.array(["a", "b"])}, ["params['name']", "keep names"]),
    "an object": ({**START, "o": object()}, ["params['o']", "not an array of numbers"]),
    "none": (None, ["params hold no array", "floating arrays"]),
    "nothing but none": ({"w": None}, ["params hold no array", "floating arrays"]),
    "no entry": ({}, ["params hold no array", "floating arrays"]),
}


@pytest.mark.parametrize("of_z", [False, True], ids=["fixed", "of z"])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name, of_z, ran):
    params, words = PARAMETERS[name]
    if of_z and isinstance(params, linen.Module):
        words = words[1:] and ["params is", "model.init(key, x)"]
    with refused(StructureError, ran, *words):
        metagradient(ran, init=(lambda z: params) if of_z else params)


def test_models_of_arrays_alone_are_trained(ran):
    """The remedies work, and a model without anything else needs none."""

    def of_module(params, batch, z):
        return jnp.mean(z["weights"] * (jax.vmap(params)(batch["x"])[:, 0] - batch["y"]) ** 2)

    def size(state, z):
        del z
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(state.params))

    linear = eqx.nn.Linear(3, 1, use_bias=False, key=jax.random.key(0))
    assert np.isfinite(metagradient(ran, of_module, size, init=linear)[0])
    params, static = eqx.partition(MLP, eqx.is_array)

    def of_parts(params, batch, z):
        return of_module(eqx.combine(params, static), batch, z)

    assert np.isfinite(metagradient(ran, of_parts, size, init=params)[0])
    graph, params, rest = nnx.split(Dropping(), nnx.Param, ...)

    def of_graph(params, batch, z):
        model = nnx.merge(graph, params, rest, copy=True)
        return jnp.mean(z["weights"] * (model(batch["x"])[:, 0] - batch["y"]) ** 2)

    assert np.isfinite(metagradient(ran, of_graph, size, init=params)[0])


@pytest.mark.parametrize("state", [{"w": np.ones(3, np.float32), "name": "adam"}, {"w": jnp.tanh}])
@pytest.mark.parametrize("of_z", [False, True], ids=["fixed", "of z"])
def test_states_of_hand_written_steps(state, of_z, ran):
    name, leaf = next((name, leaf) for name, leaf in state.items() if not hasattr(leaf, "dtype"))
    with refused(StructureError, ran, f"state['{name}']", "eqx.partition" if callable(leaf) else "keep names"):
        mg.train(mg.Training((lambda z: state) if of_z else state, lambda s, b, z: s, BATCHES), Z)


def test_a_text_in_the_model_state(ran):
    with refused(StructureError, ran, "model_state['mode']", "'train'", "keep names"):
        metagradient(ran, init=(START, {"mode": "train"}), has_model_state=True)


@pytest.mark.parametrize(
    "init", [START, (START,), (START, {}, {}), START["w"]], ids=["a dict", "one", "three", "array"]
)
@pytest.mark.parametrize("of_z", [False, True], ids=["fixed", "of z"])
def test_a_model_state_that_is_not_given(init, of_z, ran):
    with refused(StructureError, ran, "has_model_state=True", "(params, model_state)"):
        metagradient(ran, init=(lambda z: init) if of_z else init, has_model_state=True)


# What functions return.

PAIR = "has_model_state=True, but the loss must return (value, model_state)"
RETURNED = {
    "an aux": (lambda p, b, z: (squares(p, b, z), {"seen": b["x"]}), {}, ["a tuple", "has_model_state=True"]),
    "a list": (lambda p, b, z: [squares(p, b, z)], {}, ["a list", "its value alone"]),
    "a dictionary": (lambda p, b, z: {"loss": squares(p, b, z)}, {}, ["a dict", "its value alone"]),
    "nothing": (lambda p, b, z: None, {}, ["returned None", "its value alone"]),
    "an integer": (lambda p, b, z: jnp.int32(1), {}, ["int32", "must be floating"]),
    "a complex number": (lambda p, b, z: squares(p, b, z) + 0j, {}, ["complex64", "must be floating"]),
    "a value without its state": (lambda p, s, b, z: squares(p, b, z), {"has_model_state": True}, [PAIR, "an array"]),
    "three": (lambda p, s, b, z: (squares(p, b, z), s, s), {"has_model_state": True}, [PAIR, "a tuple"]),
    "losses in a list": (lambda p, b, z: [1.0] * BATCH, {"per_example": True}, ["a list", "its value alone"]),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_losses_return(name, ran):
    loss, options, words = RETURNED[name]
    init = (START, {"n": np.float32(0)}) if options.get("has_model_state") else START
    with refused(StructureError, ran, *words):
        metagradient(ran, loss, init=init, **options)


# What functions take.


def over(loss):
    return mg.mean_over(BATCHES, loss)


LOSS, STEP, OBJECTIVE = "(params, batch, z_t)", "(state, batch, z_t)", "(state, z)"
SIGNATURES = {
    "a loss of two": (lambda ran: metagradient(ran, lambda p, b: 0.0), ["the loss", LOSS, "(p, b)"]),
    "a loss of four": (lambda ran: metagradient(ran, lambda p, s, b, z: 0.0), ["the loss", LOSS, "(p, s, b, z)"]),
    "a compiled one": (lambda ran: metagradient(ran, jax.jit(lambda p, b: 0.0)), ["the loss", LOSS, "(p, b)"]),
    "a partial one": (
        lambda ran: metagradient(ran, functools.partial(squares, START)),
        ["the loss", LOSS, "(batch, z)"],
    ),
    "a loss of three with a model state": (
        lambda ran: metagradient(ran, squares, init=(START, {"n": np.float32(0)}), has_model_state=True),
        ["the loss", "(params, model_state, batch, z_t)", "(params, batch, z)"],
    ),
    "an objective of one": (
        lambda ran: metagradient(ran, objective=lambda s: 0.0),
        ["the objective", OBJECTIVE, "(s)"],
    ),
    "a mean of three": (
        lambda ran: metagradient(ran, objective=over(lambda s, b, z: 0.0)),
        ["loss of mean_over", "(state, batch)", "(s, b, z)"],
    ),
    "a step of two": (
        lambda ran: mg.train(mg.Training(START, lambda s, b: s, BATCHES), Z),  # pyright: ignore[reportArgumentType]
        ["the step", STEP, "(s, b)"],
    ),
    "an init of none": (lambda ran: metagradient(ran, init=lambda: START), ["the init function", "(z)", "()"]),
    "an init of a step by hand": (
        lambda ran: mg.train(mg.Training(lambda z, key: START, lambda s, b, z: s, BATCHES), Z),
        ["the init function", "(z)", "(z, key)"],
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_functions_take(name, ran):
    make, words = SIGNATURES[name]
    with refused(StructureError, ran, *words) as caught:
        make(ran)
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_wrapper_that_changes_the_arguments_is_right(ran):
    """Though its signature is that of what it wraps."""

    @functools.wraps(lambda params, batch: None)
    def loss(params, batch, z):
        return squares(params, batch, z)

    assert np.isfinite(metagradient(ran, loss)[0])


# Functions that read a value while they are traced.

READS = {
    "float": float,
    "int": lambda x: jnp.ones(()) * int(x),
    "bool": lambda x: x if x > 0 else -x,
    "item": lambda x: x.item(),
    "numpy": lambda x: jnp.asarray(np.asarray(x)),
    "a function of numpy's": lambda x: np.exp(x),
    "range": lambda x: sum((x for _ in range(x.astype(int))), x),
    "a mask": lambda x: jnp.ones(3)[jnp.ones(3) > x].sum(),
    "a shape": lambda x: jnp.ones(x.astype(int)).sum(),
}
KEEP = "Keep to jnp"


@pytest.mark.parametrize("name", READS)
def test_a_loss_that_reads_a_value(name, ran):
    with refused(StructureError, ran, "the loss", KEEP, "test_slips.py") as caught:
        metagradient(ran, lambda p, b, z: READS[name](squares(p, b, z)))
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("name", READS)
def test_an_objective_that_reads_a_value(name, ran):
    with refused(StructureError, ran, "the objective", KEEP, "test_slips.py"):
        metagradient(ran, objective=lambda s, z: READS[name](norm(s, z)))


def test_other_functions_that_read_a_value(ran):
    def step(state, batch, z):
        jax.debug.callback(lambda: ran.append(None))
        return {**state, "w": state["w"] * float(jnp.mean(z["weights"]))}

    with refused(StructureError, ran, "the step", KEEP):
        mg.value_and_metagrad(mg.Training(START, step, BATCHES), lambda s, z: jnp.sum(s["w"]))(Z)
    with refused(StructureError, ran, "the loss of mean_over", KEEP):
        metagradient(ran, objective=over(lambda s, b: float(jnp.sum(s.params["w"]))))
    with refused(StructureError, ran, "the optimizer", KEEP):
        metagradient(ran, z={**Z, "lr": jnp.ones(())}, optimizer=lambda z: optax.sgd(float(z["lr"])))
    with refused(StructureError, ran, "the init function", KEEP):
        metagradient(ran, init=lambda z: {**START, "b": float(z["weights"][0])})


# Functions that JAX can't differentiate.


def looped(x):
    return lax.while_loop(lambda c: c < 10.0, lambda c: 2 * c, 1.0 + x**2)


def called_back(x):
    return jax.pure_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct((), jnp.float32), x)


def bounded(x):
    return lax.fori_loop(0, jnp.int32(x), lambda i, c: 0.9 * c, x)


ROUGH = {
    "a while loop": (looped, ["(looped)", "lax.scan", "equinox.internal.while_loop", "fori_loop"]),
    "a loop of traced bounds": (bounded, ["(bounded)", "lax.scan", "fori_loop"]),
    "a callback": (called_back, ["(called_back)", "jax.custom_vjp"]),
}


@pytest.mark.parametrize("name", ROUGH)
@pytest.mark.parametrize("microbatches", [1, 2])
def test_losses_without_a_derivative(name, microbatches, ran):
    of, words = ROUGH[name]
    with refused(DerivativeError, ran, "the loss", "test_slips.py", *words):
        metagradient(ran, lambda p, b, z: of(squares(p, b, z)), microbatches=microbatches)


@pytest.mark.parametrize("name", ROUGH)
def test_objectives_without_a_derivative(name, ran):
    of, words = ROUGH[name]
    with refused(DerivativeError, ran, "the objective", "test_slips.py", *words):
        metagradient(ran, objective=lambda s, z: of(norm(s, z)))
    with refused(DerivativeError, ran, "loss of mean_over", "test_slips.py", *words):
        metagradient(ran, objective=over(lambda s, b: of(norm(s, b))))
    with refused(DerivativeError, ran, "the objective", "test_slips.py", *words):
        training = mg.Training.from_loss(squares, counted(ran), START, BATCHES)
        mg.value_and_metagrad(training, lambda s, z: of(norm(s, z))[None], vector=True)(Z)


@pytest.mark.parametrize("name", ROUGH)
def test_steps_and_starts_without_a_derivative(name, ran):
    of, words = ROUGH[name]

    def step(state, batch, z):
        jax.debug.callback(lambda: ran.append(None))
        return {**state, "b": of(state["b"] * jnp.mean(z["weights"]))}

    training = mg.Training(START, step, BATCHES)
    with refused(DerivativeError, ran, "the step", "test_slips.py", *words):
        mg.value_and_metagrad(training, lambda s, z: s["b"])(Z)
    with refused(DerivativeError, ran, "the init function", "test_slips.py", *words):
        metagradient(ran, init=lambda z: {**START, "b": of(z["weights"][0])})
    # What needs no derivative is trained.
    assert np.isfinite(mg.train(training, Z)["b"])


def test_a_rule_of_the_loss_that_has_no_derivative_itself(ran):
    """First derivatives are there, second ones aren't."""

    own = jax.custom_vjp(lambda x: x**2)
    own.defvjp(lambda x: (x**2, x), lambda x, g: (g * called_back(2 * x),))
    with refused(DerivativeError, ran, "must be differentiable itself"):
        metagradient(ran, lambda p, b, z: own(squares(p, b, z)))


# Metaparameters.


@pytest.mark.parametrize("make", [list, tuple])
def test_lists_of_numbers(make, ran):
    value, grad = metagradient(ran, z={"weights": mg.PerExample(make([1.0] * EXAMPLES))})
    expected = metagradient(ran)
    assert value == expected[0]
    np.testing.assert_array_equal(grad["weights"].value, expected[1]["weights"].value)
    assert mg.PerExample([1.0, 2.0], rows=[7, 3]).value.shape == (2,)
    assert mg.PerStep(make([0.1, 0.2])).value.shape == mg.Shared(make([0.1, 0.2])).value.shape == (2,)
    # As a pytree, a kind holds what it is given.
    doubled = jax.tree.map(lambda x: (x, x), mg.PerStep(jnp.ones(2)))
    assert isinstance(doubled.value, tuple)


@pytest.mark.parametrize("kind", [mg.PerExample, mg.PerStep, mg.Shared])
def test_what_is_no_array(kind, ran):
    with refused(StructureError, ran, kind.__name__, "one array of numbers"):
        kind([[1.0], [1.0, 2.0]])
    with refused(StructureError, ran, kind.__name__, "one array of numbers"):
        kind(["a", "b"])
    with refused(StructureError, ran, "z['weights'].value", "floating array", "outside z"):
        metagradient(ran, z={"weights": kind("abc")})
    with refused(StructureError, ran, "z['weights']", kind.__name__, "one array"):
        metagradient(ran, z={"weights": kind(None)})
    with refused(StructureError, ran, "z['weights']", kind.__name__, "one array"):
        metagradient(ran, z={"weights": kind({"a": jnp.ones(EXAMPLES)})})


PER_EXAMPLE = "mg.PerExample where each belongs to an example"
PER_STEP = "mg.PerStep where each belongs to a step"
ONES = np.ones(EXAMPLES, np.float32)


@pytest.mark.parametrize("value", [ONES, jnp.asarray(ONES), mg.Shared(ONES)], ids=["numpy", "jax", "shared"])
def test_a_bare_array_with_an_entry_an_example(value, ran):
    words = ["z['weights'] is a bare array of 7 entries", "every step sees whole", PER_EXAMPLE, 'batch["index"]']
    with refused(StructureError, ran, "incompatible shapes", "(7,), (4,)", *words) as caught:
        metagradient(ran, z={"weights": value})
    assert isinstance(caught.value.__cause__, TypeError)
    batches = [{"x": b["x"], "y": b["y"]} for b in BATCHES]
    with refused(StructureError, ran, *words):
        metagradient(ran, z={"weights": value}, batches=batches)


USES = {
    "images": (np.ones((EXAMPLES, 3), np.float32), lambda p, b, z: jnp.mean((b["x"] + z["k"]) @ p["w"])),
    "a product": (ONES, lambda p, b, z: jnp.mean(b["x"] @ p["w"]) * jnp.dot(z["k"], b["y"])),
    "an einsum": (ONES, lambda p, b, z: jnp.einsum("i,ij,j->", z["k"], b["x"], p["w"])),
    "a broadcast": (ONES, lambda p, b, z: jnp.sum(jnp.broadcast_to(z["k"], (BATCH,))) * p["w"][0]),
    "a loss of it": (ONES, lambda p, b, z: z["k"] * jnp.mean(p["w"])),
}


@pytest.mark.parametrize("name", USES)
def test_uses_of_a_bare_array(name, ran):
    value, loss = USES[name]
    with refused(StructureError, ran, "z['k'] is a bare array of 7 entries", PER_EXAMPLE):
        metagradient(ran, loss, z={"k": value})


def test_a_bare_array_with_an_entry_a_step(ran):
    z = {**Z, "lr": jnp.full(STEPS, 0.1)}
    words = ["z['lr'] is a bare array of 5 entries", "every step sees whole", PER_STEP]
    with refused(StructureError, ran, *words):
        metagradient(ran, z=z, optimizer=lambda z: optax.sgd(z["lr"]))
    with refused(StructureError, ran, *words):
        metagradient(ran, lambda p, b, z: z["lr"] * squares(p, b, z), z=z)
    with refused(StructureError, ran, *words):
        mg.train(mg.Training(START, lambda s, b, z: {**s, "b": s["b"] * z["lr"]}, BATCHES), z)


def rejecting(error):
    def loss(params, batch, z):
        raise error

    return loss


@pytest.mark.parametrize(
    "error",
    [
        ValueError("expected shape (7,), got (4,)"),
        TypeError("loss() takes 2 positional arguments but 3 were given, shapes (7,) [7]"),
        KeyError("w"),
        AssertionError("(7,)"),
        NotImplementedError("derivative of shape (7,)"),
        ValueError("Reverse-mode differentiation does not work"),
        RuntimeError("out of patience"),
    ],
    ids=repr,
)
def test_errors_of_the_users_own_pass_unchanged(error, ran):
    z = {**Z, "bare": ONES}
    with pytest.raises(type(error)) as caught:
        metagradient(ran, rejecting(error), z=z)
    assert caught.value is error
    with pytest.raises(type(error)) as caught:
        metagradient(ran, objective=lambda s, z: rejecting(error)(s, None, z), z=z)
    assert caught.value is error
    assert error.__cause__ is None


def test_a_shape_that_has_nothing_to_do_with_z(ran):
    with pytest.raises((TypeError, ValueError), match="ncompatible shapes") as caught:
        metagradient(ran, lambda p, b, z: jnp.sum(b["x"] * jnp.ones(9)), z={**Z, "bare": ONES})
    assert not issubclass(caught.type, StructureError)


# Second moments of zero.

OPTIMISERS = {
    "adam": (optax.adam(0.1), ["give Adam an eps_root", ".nu"]),
    "adamw": (optax.adamw(0.1), ["give Adam an eps_root", ".nu"]),
    "rmsprop, its eps outside the root": (optax.rmsprop(0.1, eps_in_sqrt=False), ["rmsprop", "eps_in_sqrt=True"]),
    "adam without eps": (optax.adam(0.1, eps=0.0), ["give Adam an eps_root", "step 0 made", "divides by them"]),
    "rmsprop without eps": (optax.rmsprop(0.1, eps=0.0), ["rmsprop", "an eps of 1e-8", "divides by them"]),
    "centred rmsprop": (optax.rmsprop(0.1, centered=True, eps_in_sqrt=False), ["rmsprop", "eps_in_sqrt=True"]),
    "adagrad": (
        optax.adagrad(0.1, initial_accumulator_value=0.0, eps=0.0),
        ["adagrad", "initial_accumulator_value", "sum_of_squares"],
    ),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_remedy_is_that_of_the_optimizer(name):
    """A parameter whose gradient is always zero: its second moment is too."""
    optimizer, words = OPTIMISERS[name]
    init = {**START, "idle": np.ones(2, np.float32)}

    def loss(params, batch, z):
        return squares(params, batch, z) + jnp.mean(z["weights"]) * 0.0 * jnp.sum(params["idle"])

    training = mg.Training.from_loss(loss, optimizer, init, BATCHES)
    with pytest.raises(NonFiniteError) as caught:
        mg.value_and_metagrad(
            training, lambda s, z: norm(s, z) + jnp.sum(s.params["idle"]), segment=Segment(1, "steps", "state")
        )(Z)
    for word in (*words, "holds zeros", "['idle']"):
        assert word in str(caught.value)
    others = {"adam": "Adam", "rmsprop": "rmsprop", "adagrad": "adagrad"}
    assert not [who for key, who in others.items() if key not in name and f"give {who}" in str(caught.value)]


# Journals.

GARBAGE = {
    "bytes": b"\xff\xfe\x00\n",
    "words": b"meta-step 1 took long\n",
    "a cut line": b'{"step": 1, "seco\n',
    "another object": b"[1, 2]\n",
}


@pytest.fixture(scope="module")
def journal(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("descent") / "run"
    list(descent(out))
    return out


@pytest.mark.parametrize("name", GARBAGE)
def test_timings_that_were_overwritten(name, journal):
    timings = journal / TIMINGS
    whole = timings.read_bytes()
    timings.write_bytes(whole + GARBAGE[name])
    with refused(StoreError, [], TIMINGS, "remove it"):
        descent(journal)
    timings.unlink()
    assert list(descent(journal)) == []
    timings.write_bytes(whole)


@pytest.mark.parametrize("line", [b'{"seconds": 1.0}\n', b'{"step": "one"}\n'], ids=["no step", "a text"])
def test_timings_of_no_step_are_dropped(line, journal):
    timings = journal / TIMINGS
    whole = timings.read_bytes()
    timings.write_bytes(line + whole)
    assert list(descent(journal)) == []
    assert timings.read_bytes() == whole


@pytest.mark.parametrize("torn", [b'{"step": 1, "seco', b"\xff\xfe", b"\x00" * 512], ids=["cut", "bytes", "zeros"])
def test_timings_that_a_kill_tore(torn, journal):
    timings = journal / TIMINGS
    whole = timings.read_bytes()
    timings.write_bytes(whole + torn)
    assert list(descent(journal)) == []
    assert timings.read_bytes() == whole


def test_records_that_were_overwritten_name_the_line(journal):
    before = len(read_lines(journal / RECORDS))
    copy = journal.parent / "copy.jsonl"
    copy.write_bytes((journal / RECORDS).read_bytes() + b"\xff\n")
    with refused(StoreError, [], "copy.jsonl", f"line {before + 1}"):
        read_lines(copy)
