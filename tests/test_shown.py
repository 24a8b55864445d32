"""How public objects show themselves, and what is said to slips."""

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import metagradient as mg
from metagradient.shown import Shown, brief

pytestmark = pytest.mark.core
MANY = 10**6


def page_of_slips() -> Any:
    spec = importlib.util.spec_from_file_location("slips", Path(__file__).parents[1] / "benchmarks" / "slips.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SLIPS = page_of_slips()


@pytest.mark.parametrize("name", SLIPS.SLIPS)
def test_a_slip_ends_in_a_typed_error(name):
    error = SLIPS.message(SLIPS.SLIPS[name])
    assert SLIPS.typed(error), error
    assert len(str(error)) > 30


def every_object() -> dict[str, Any]:
    """One of each public class whose objects hold data, with a million examples."""
    batches = [{"x": np.ones((32, 64), np.float32), "index": np.arange(32)} for _ in range(50)]

    def loss(params: Any, batch: Any, z: Any) -> Any:
        return jnp.mean(z["weights"] * (batch["x"] @ params["w"] - 1) ** 2)

    def objective(state: Any, z: Any) -> Any:
        return jnp.sum(state.params["w"] ** 2)

    def losses(params: Any, model_state: Any, batch: Any) -> Any:
        return (batch["x"] @ params["w"]) ** 2

    training = mg.Training.from_loss(loss, optax.adam(0.1, eps_root=1e-8), {"w": jnp.ones(64)}, batches)
    z = {"weights": mg.PerExample(jnp.ones(MANY))}
    gradient = mg.value_and_metagrad(training, objective)
    found = gradient.evaluate(z)
    descent = mg.descend(training, objective, z, mg.updates.sign(0.1), 3)
    step = next(descent)
    short = mg.Training.from_loss(loss, optax.sgd(0.01), {"w": jnp.ones(64)}, batches[:3])
    few = {"weights": mg.PerExample(jnp.ones(32))}
    return {
        "Best": descent.best,
        "CheckReport": mg.check(short, objective, few, directions=1),
        "CountSurrogate": mg.CountSurrogate(lambda counts: training, batches, losses, 1),
        "Descent": descent,
        "Evaluation": found,
        "Finalist": descent.finalists(1)[0],
        "Memory": mg.Memory("2GB"),
        "MetaStep": step,
        "Metagradient": gradient,
        "PerExample": z["weights"],
        "PerGroup": mg.PerGroup(jnp.ones(10), np.arange(MANY) % 10),
        "PerStep": mg.PerStep(jnp.ones(MANY)),
        "Plan": mg.plan(training, z),
        "Replay": mg.Replay(memory="2GB", window=3),
        "Segment": mg.Segment(4),
        "Shared": mg.Shared(jnp.ones(MANY)),
        "Smoothness": mg.metasmoothness(short, objective, few, directions=1),
        "Stats": found.stats,
        "TrainState": found.state,
        "Training": training,
        "mean_over": mg.mean_over(batches, lambda state, batch: jnp.mean(batch["x"] @ state.params["w"])),
    }


def test_every_public_object_shows_itself_in_a_few_lines():
    objects = every_object()
    classes = {name for name in mg.__all__ if inspect.isclass(getattr(mg, name))}
    assert classes <= set(objects)
    for name, x in objects.items():
        text = repr(x)
        assert len(text) < 2000, name
        assert text.startswith(type(x).__name__), name
        if isinstance(x, Shown):
            assert 0 < len(x._repr_html_()) < 5000, name
    assert "float32[1000000]" in repr(objects["PerExample"])
    assert "50 of {'x': float32[32, 64], 'index': int64[32]}" in repr(objects["Training"])
    assert "window=3" in repr(objects["Replay"])
    assert "<th" in objects["Training"]._repr_html_()


def test_what_is_shown_is_escaped_and_cut():
    assert "&lt;lambda&gt;" in mg.Replay(stats=lambda s: s)._repr_html_()
    assert brief({"a": np.arange(3), "b": [1.0] * 50, "c": "x" * 500}).endswith("…")
    assert brief(np.arange(3)) == "[0, 1, 2] int64"
    assert brief((1,)) == "(1,)"
