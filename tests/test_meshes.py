"""A run whose batches, parameters and metaparameters are spread over a mesh gives what it gives on one device."""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, reshard
from problems import CLASSES, VISITED, assert_same, rows
from quick import crossed, quickly

import metagradient as mg
from metagradient import Segment
from metagradient.errors import BatchError, NonFiniteError, StructureError
from metagradient.layout import spread
from metagradient.schedule import Binomial, KaryTree, TwoLevel

pytestmark = pytest.mark.core

EXAMPLES, BATCH, STEPS, HIDDEN = 32, 16, 6, 8
STEPWISE = Segment(1, "steps", "state")
KINDS = {
    "auto": (AxisType.Auto,) * 2,
    "explicit": (AxisType.Explicit,) * 2,
    "mixed": (AxisType.Auto, AxisType.Explicit),
}

# Of every array by name, the mesh axes that its axes are spread over. Rows of "pixels" can't stay as they are where
# their examples are spread over "data" themselves.
SPREAD = {
    **dict.fromkeys(("x", "y", "index"), ("data",)),
    "w1": (None, "model"),
    "w2": ("model", None),
    "b2": (),
    "mean": ("model",),
    "key": (),
    "weights": ("data",),
    "temperature": ("model",),
    "ridge": (),
    "lr": (),
    "decay": (),
    "pixels": ("model", "data"),
    "chosen": ("data",),
    "start": (None, "model"),
}
Place = Callable[[Any], Any]
"""Puts a tree of named arrays where it belongs."""


def over(mesh: Mesh) -> Place:
    def put(path: Any, x: Any) -> jax.Array:
        name = next(key.key for key in reversed(path) if getattr(key, "key", None) in SPREAD)
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*SPREAD[name])))

    return lambda tree: jax.tree.map_with_path(put, tree)


def here(tree: Any) -> Any:
    return tree


def typed(*axes: Any) -> PartitionSpec | None:
    """What a product over an axis that is spread must say of its output, where shardings are part of types."""
    explicit = jax.sharding.get_abstract_mesh().explicit_axes
    return PartitionSpec(*(name if name in explicit else None for name in axes)) if explicit else None


def scores(params: Any, x: Any, examples: Any) -> jax.Array:
    hidden = jnp.tanh(x @ params["w1"])
    return jnp.einsum("bh,hc->bc", hidden, params["w2"], out_sharding=typed(examples, None)) + params["b2"]


def cross_entropy(found: Any, y: Any) -> jax.Array:
    return -jnp.sum(y * jax.nn.log_softmax(found), axis=-1)


def losses(params: Any, batch: Any, z: Any) -> jax.Array:
    found = scores(params, batch["x"], "data") * z["temperature"]
    return cross_entropy(found, batch["y"]) * z["weights"] + z["ridge"] * jnp.sum(params["w1"] ** 2)


def loss(params: Any, batch: Any, z: Any) -> jax.Array:
    return jnp.mean(losses(params, batch, z))


def loss_without_ridge(params: Any, batch: Any, z: Any) -> jax.Array:
    """Weights of pixels that are zero in every digit get no gradient."""
    return loss(params, batch, {**z, "ridge": 0.0})


def loss_of_pixels(params: Any, batch: Any, z: Any) -> jax.Array:
    return loss(params, {**batch, "x": batch["x"] + z["pixels"] * z["chosen"][:, None]}, z)


def loss_with_mean(params: Any, model_state: Any, batch: Any, z: Any) -> tuple[jax.Array, Any]:
    """A key that draws dropout, and a running mean of what is hidden."""
    key, drawn = jax.random.split(model_state["key"])
    x = batch["x"] * jax.random.bernoulli(drawn, 0.8, batch["x"].shape[1:])
    mean = 0.8 * model_state["mean"] + 0.2 * jnp.mean(jnp.tanh(x @ params["w1"]), axis=0)
    return loss(params, {**batch, "x": x}, z), {"key": key, "mean": mean}


def written_step(params: Any, batch: Any, z: Any) -> Any:
    return jax.tree.map(lambda p, g: p - 0.3 * g, params, jax.grad(loss)(params, batch, z))


def driven(z: Any) -> optax.GradientTransformation:
    return optax.adamw(z["lr"], eps_root=1e-6, weight_decay=z["decay"])


MOMENTUM = optax.sgd(0.1, momentum=0.9)
CLIPPED = optax.chain(optax.clip_by_global_norm(0.5), MOMENTUM)


def digits(start: int, stop: int) -> dict[str, np.ndarray]:
    data = rows(start, stop)
    return {"x": data["x"], "y": np.eye(CLASSES)[data["y"]]}


def each_held_out(state: Any, z: Any) -> jax.Array:
    del z
    data = digits(100, 103)
    return cross_entropy(scores(state.params, data["x"], None), data["y"])


def held_out(state: Any, z: Any) -> jax.Array:
    return jnp.mean(each_held_out(state, z))


def held_out_and_mean(state: Any, z: Any) -> jax.Array:
    return held_out(state, z) + jnp.sum(state.model_state["mean"] ** 2)


def classes(state: Any, batch: Any) -> jax.Array:
    """Mean log-likelihood of a batch, by class."""
    return jnp.mean(batch["y"] * jax.nn.log_softmax(scores(state.params, batch["x"], "data")), axis=0)


@cache
def batches() -> list[dict[str, np.ndarray]]:
    rng, data, drawn = np.random.default_rng(0), digits(0, EXAMPLES), []
    for _ in range(STEPS):
        index = rng.integers(0, VISITED, BATCH)
        index[-1] = index[0]
        drawn.append({"x": data["x"][index], "y": data["y"][index], "index": index})
    return drawn


@cache
def parameters() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    w1, w2 = rng.normal(size=(64, HIDDEN)) / 4, rng.normal(size=(HIDDEN, CLASSES)) / 2
    return {"w1": w1, "w2": w2, "b2": np.zeros(CLASSES)}


def metaparameters(*more: str) -> dict[str, Any]:
    z = {
        "weights": mg.PerExample(np.ones(EXAMPLES)),
        "temperature": mg.PerStep(np.linspace(0.8, 1.2, STEPS)),
        "ridge": mg.Shared(np.asarray(1e-2)),
        "pixels": mg.PerExample(np.random.default_rng(2).normal(size=(EXAMPLES, 64)) / 10),
        "chosen": mg.PerExample(np.ones(8), rows=np.arange(1, 17, 2)),
        "lr": mg.PerStep(np.linspace(0.03, 0.01, STEPS)),
        "decay": mg.Shared(np.asarray(0.1)),
        "start": parameters()["w1"],
    }
    return {name: z[name] for name in ("weights", "temperature", "ridge", *more)}


@dataclass(frozen=True)
class Case:
    """A run, and how it is differentiated.

    Arguments:
        options: of `value_and_metagrad`.
        loss, optimizer, training: of `Training.from_loss`; without an optimiser the loss is a whole step.
        objective: of the final state.
        over_batches: a loss whose mean over a set in two batches, spread over the mesh too, is the objective instead.
        more: names of further metaparameters.
    """

    options: dict[str, Any]
    loss: Any = loss
    optimizer: Any = MOMENTUM
    objective: Any = held_out
    over_batches: Any = None
    more: tuple[str, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)

    def made(self, place: Place) -> tuple[mg.Training, Any, Any]:
        """Training, objective and z, with every array where it belongs."""
        data, params, z = [place(b) for b in batches()], place(parameters()), place(metaparameters(*self.more))
        init = params
        if "start" in self.more:
            init = lambda z: {**params, "w1": z["start"]}  # noqa: E731
        elif "has_model_state" in self.training:
            init = params, place({"key": jax.random.key(0), "mean": np.zeros(HIDDEN)})
        if self.optimizer is None:
            training = mg.Training(init, self.loss, data)
        else:
            training = mg.Training.from_loss(self.loss, self.optimizer, init, data, **self.training)
        sets = [place(digits(100, 108)), place(digits(108, 124))]
        return training, mg.mean_over(sets, self.over_batches) if self.over_batches else self.objective, z


CASES = {
    "steps, a tree of replays through host memory": Case({"segment": STEPWISE, "schedule": KaryTree(2, "host")}),
    "a budget": Case({"memory": mg.Memory(device="1MB", host="1MB")}),
    "scan, rows of many axes, disk": Case(
        {"segment": Segment(3), "schedule": Binomial(1, "disk")}, loss_of_pixels, more=("pixels", "chosen")
    ),
    "unrolled, a window": Case({"segment": Segment(2, "unroll", "state"), "window": 4}),
    "linearisations, clipped by a norm": Case(
        {"segment": Segment(2, "steps", "linearisation"), "schedule": TwoLevel(2)}, optimizer=CLIPPED
    ),
    "micro-batches unrolled, a loss an example": Case(
        {"segment": Segment(3, "steps", "gradient", unroll_microbatches=True)},
        losses,
        training={"microbatches": 2, "per_example": True},
    ),
    "micro-batches, scan, statistics and keys": Case(
        {"segment": Segment(3), "schedule": KaryTree(2, "host")},
        loss_with_mean,
        objective=held_out_and_mean,
        training={"has_model_state": True, "microbatches": 2},
    ),
    "queries, rows of many axes, a start from z": Case(
        {"segment": STEPWISE, "vector": True},
        loss_of_pixels,
        objective=each_held_out,
        more=("pixels", "chosen", "start"),
    ),
    "queries, micro-batches, scan, mean over batches": Case(
        {"segment": Segment(3), "vector": True}, over_batches=classes, training={"microbatches": 2}
    ),
    "Adam, an optimiser of z": Case({"segment": STEPWISE}, optimizer=driven, more=("lr", "decay")),
    "a step written by hand": Case(
        {"segment": Segment(3)},
        written_step,
        optimizer=None,
        objective=lambda state, z: held_out(mg.TrainState(state, (), None, jnp.int32(0)), z),
    ),
}


# Where some axes are automatic, `jax.eval_shape` says nothing of the others.
COMBINATIONS = [*crossed(["auto", "explicit"], list(CASES)), ("mixed", "micro-batches, scan, statistics and keys")]


@cache
def alone(name: str) -> tuple[Any, Any]:
    """Value and gradient of a case on one device."""
    training, objective, z = CASES[name].made(here)
    return mg.value_and_metagrad(training, objective, **CASES[name].options)(z)


def check_case(name: str, mesh: Mesh) -> None:
    """One device's value and gradient; every array comes out as it went in; a second call compiles nothing."""
    training, objective, z = CASES[name].made(over(mesh))
    metagradient = mg.value_and_metagrad(training, objective, **CASES[name].options)
    found = metagradient.evaluate(z)
    assert_same((found.value, found.grad), alone(name))
    for state in (found.state, mg.train(training, z, segment=found.stats.segment)):
        for (path, end), start in zip(
            jax.tree.leaves_with_path(state), jax.tree.leaves(training.initial(z)), strict=True
        ):
            placed = isinstance(start.sharding, NamedSharding)
            expected = start.sharding if placed else NamedSharding(mesh, PartitionSpec())
            assert end.sharding.is_equivalent_to(expected, end.ndim), (path, end.sharding)
    queries = (None,) * found.value.ndim
    for (path, g), x in zip(jax.tree.leaves_with_path(found.grad), jax.tree.leaves(z), strict=True):
        assert spread(g) == (*queries, *spread(x)), path
    assert metagradient.with_stats(z)[2].compile_seconds == 0


def on_a_mesh(cases: list[tuple[str, str]]) -> None:
    """Called in a process of its own, which has eight devices: prints what failed, by mesh and case."""
    with quickly():
        print(json.dumps(failing(cases)))


def failing(cases: list[tuple[str, str]]) -> dict[str, str]:
    failed = {}
    for kind, name in cases:
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=KINDS[kind])
        alone(name)
        try:
            with jax.set_mesh(mesh):
                check_case(name, mesh)
        except Exception:
            failed[f"{kind}: {name}"] = traceback.format_exc()
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=KINDS["explicit"])
    for name, (error, message, work) in FAULTS.items():
        try:
            work(mesh)
            failed[name] = "nothing was raised"
        except error as found:
            if message not in str(found):
                failed[name] = str(found)
        except Exception:
            failed[name] = traceback.format_exc()
    return failed


def unset(mesh: Mesh) -> None:
    training, objective, z = CASES["a budget"].made(over(mesh))
    mg.value_and_metagrad(training, objective)(z)


def digit_run(mesh: Mesh, change: Callable[[int, Any], Any] = lambda t, batch: batch, **options: Any) -> None:
    with jax.set_mesh(mesh):
        place = over(mesh)
        data = [change(t, place(batch)) for t, batch in enumerate(batches())]
        asked = {"loss": loss, "optimizer": MOMENTUM, **options}
        training = mg.Training.from_loss(init=place(parameters()), batches=data, **asked)
        mg.value_and_metagrad(training, held_out, segment=Segment(3))(place(metaparameters()))


def gathering_step(mesh: Mesh) -> None:
    def step(params: Any, batch: Any, z: Any) -> Any:
        return jax.tree.map(lambda p: reshard(p, PartitionSpec()), written_step(params, batch, z))

    with jax.set_mesh(mesh):
        place = over(mesh)
        training = mg.Training(place(parameters()), step, [place(batch) for batch in batches()])
        mg.value_and_metagrad(training, held_out)(place(metaparameters()))


FAULTS = {
    "a mesh that isn't in use": (StructureError, "jax.set_mesh", unset),
    "micro-batches smaller than the mesh": (
        StructureError,
        "micro-batches of 2 examples",
        lambda mesh: digit_run(mesh, microbatches=8),
    ),
    "a batch that is spread otherwise": (
        BatchError,
        "batches[2] is not like batches[0]: leaf ['index'] is spread over (None,), expected ('data',)",
        lambda mesh: digit_run(mesh, lambda t, batch: batches()[t] if t == 2 else batch),
    ),
    "a state that is spread otherwise": (
        StructureError,
        "leaf ['w1'] is spread over (None, None), expected (None, 'model')",
        gathering_step,
    ),
    "an adjoint that isn't finite": (
        NonFiniteError,
        "the adjoint of step 5",
        lambda mesh: digit_run(mesh, loss=loss_without_ridge, optimizer=optax.adam(0.02)),
    ),
}


@pytest.fixture(scope="module")
def failed(request: pytest.FixtureRequest) -> dict[str, str]:
    """What fails of the cases that are asked for, all walked in one process."""
    of_items = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    cases = [(spec.params["kind"], spec.params["case"]) for spec in of_items if spec and "kind" in spec.params]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    options = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import test_meshes; test_meshes.on_a_mesh({cases!r})"],
        cwd=Path(__file__).parent,
        env={**os.environ, **options, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.mark.parametrize(("kind", "case"), COMBINATIONS)
def test_eight_devices_give_what_one_gives(failed, kind, case):
    assert f"{kind}: {case}" not in failed, failed[f"{kind}: {case}"]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_mesh_with_explicit_axes_refuses(failed, fault):
    assert fault not in failed, failed[fault]
