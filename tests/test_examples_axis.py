"""One rule for which leaves of a batch hold examples: in micro-batches, and in means over a validation set."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    BATCH,
    CLASSES,
    OPTIMISERS,
    Problem,
    assert_same,
    batches,
    cross_entropy,
    every_kind,
    logits,
    reference,
    rows,
)
from quick import crossed

import metagradient as mg
from metagradient.errors import BatchError, StructureError
from metagradient.examples import checked, holds_examples
from metagradient.step.segment import Segment

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def weighted_loss(params: dict, batch: dict, z: dict) -> jax.Array:
    losses = cross_entropy(logits(params, batch["x"]) * z["temperature"], batch["y"])
    noise = 0.1 * jax.random.normal(batch["key"], (64,))
    return jnp.mean(z["weights"] * batch["class_weights"][batch["y"]] * losses) + jnp.mean(noise @ params["w1"])


def with_class_weights(**changes: Any) -> Problem:
    """Class weights, as many as two micro-batches divide, a key and a scale, that all examples share."""
    shared = {
        "class_weights": np.linspace(0.5, 2, CLASSES),
        "key": np.asarray(jax.random.PRNGKey(3)),
        "scale": np.float64(2),
    }
    z = {name: kind for name, kind in every_kind().items() if name != "ridge"}
    drawn = [{**batch, **shared} for batch in batches()]
    return Problem(**{"loss": weighted_loss, "optimizer": OPTIMISERS["momentum"], "batches": drawn, "z": z} | changes)


SEGMENTS = [Segment(1, "steps", "state"), Segment(4), Segment(2, "unroll", unroll_microbatches=True)]


@pytest.mark.parametrize(("segment", "microbatches"), crossed(SEGMENTS, [2, 4]), ids=str)
def test_micro_batches_cut_what_holds_examples_and_nothing_else(segment, microbatches):
    problem = with_class_weights(microbatches=microbatches)
    value, grad = mg.value_and_metagrad(problem.training(), problem.objective, segment=segment)(problem.z)
    # Without micro-batches: neither the library's rule nor another one cuts anything.
    expected_value, expected = reference(replace(problem, microbatches=1))
    assert_same(value, expected_value)
    assert_same(grad, expected)


NAMED = {"names": ("x", "y", "index"), "function": lambda batch: batch["x"].shape[0]}


@pytest.mark.parametrize("examples", NAMED.values(), ids=NAMED)
def test_examples_that_are_named(examples):
    problem = with_class_weights(microbatches=2)
    training = problem.training(examples=examples)
    grad = mg.value_and_metagrad(training, problem.objective)(problem.z)[1]
    assert_same(grad, reference(replace(problem, microbatches=1))[1])


def test_a_name_tells_apart_what_a_length_cannot():
    """As many classes as examples: by length the weights would be cut."""
    problem = with_class_weights(microbatches=2)
    assert CLASSES != BATCH
    drawn = [{**b, "class_weights": np.linspace(0.5, 2, BATCH), "y": b["y"] % BATCH} for b in problem.batches]
    problem = replace(problem, batches=drawn)
    grad = mg.value_and_metagrad(problem.training(examples=("x", "y", "index")), problem.objective)(problem.z)[1]
    assert_same(grad, reference(replace(problem, microbatches=1))[1])


BATCHES: dict[str, tuple[Any, Any, tuple[int, list[bool]]]] = {
    "index": ({"a": np.ones(3), "index": np.arange(8), "x": np.ones((8, 2))}, None, (8, [False, True, True])),
    "one length": ({"x": np.ones((8, 2)), "y": np.ones(8), "scale": np.ones(())}, None, (8, [False, True, True])),
    "a tuple": ((np.ones((8, 2)), np.ones(8)), None, (8, [True, True])),
    "a tuple's places": ((np.ones((8, 2)), np.ones(4)), (0,), (8, [True, False])),
    "below a name": (
        {"images": {"l": np.ones(8), "r": np.ones(8)}, "w": np.ones(4)},
        "images",
        (8, [True, True, False]),
    ),
    "a function": ({"x": np.ones((8, 2)), "w": np.ones(4)}, lambda b: len(b["x"]), (8, [False, True])),
}


@pytest.mark.parametrize(("batch", "examples", "expected"), BATCHES.values(), ids=BATCHES)
def test_the_rule(batch, examples, expected):
    assert holds_examples(batch, checked(examples)) == expected


AMBIGUOUS: dict[str, tuple[Any, Any, str]] = {
    "two lengths": ({"x": np.ones((8, 2)), "w": np.ones(4)}, None, r"examples=\(\"x\", \"y\"\)"),
    "no axis": ({"x": np.ones(())}, None, "can't be told"),
    "a list of numbers": ({"x": [np.ones(()), np.ones(())]}, None, "can't be told"),
    "a name that isn't there": ({"x": np.ones(8)}, ("y",), "'y', which is no entry"),
    "names of two lengths": ({"x": np.ones(8), "w": np.ones(4)}, ("x", "w"), "no one number"),
    "a number that nothing has": ({"x": np.ones(8)}, lambda b: 7, "says 7"),
}


@pytest.mark.parametrize(("batch", "examples", "words"), AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_is_ambiguous_is_refused(batch, examples, words):
    with pytest.raises(StructureError, match=words):
        holds_examples(batch, checked(examples))


def test_examples_of_another_kind_are_refused():
    with pytest.raises(StructureError, match="examples="):
        mg.Training.from_loss(weighted_loss, OPTIMISERS["sgd"], np.ones(2), [{}], examples=3)  # pyright: ignore[reportArgumentType]


def test_micro_batches_of_a_batch_that_does_not_tell_are_refused_before_compute():
    drawn = [{name: x for name, x in b.items() if name != "index"} for b in with_class_weights().batches]
    problem = with_class_weights(batches=drawn, microbatches=2, z={"temperature": every_kind()["temperature"]})
    with pytest.raises(StructureError, match="Name them"):
        mg.value_and_metagrad(problem.training(), problem.objective)(problem.z)


# Means over a validation set.


def chunks() -> list[dict[str, Any]]:
    """Two batches of unequal size, with class weights that come first in the alphabet."""
    return [
        {**rows(a, b), "class_weights": np.linspace(0.5, 2, CLASSES), "a": 1.0} for a, b in ((100, 114), (114, 119))
    ]


def validation(state: Any, batch: dict[str, Any]) -> jax.Array:
    losses = cross_entropy(logits(state.params, batch["x"]), batch["y"])
    return batch["a"] * jnp.mean(batch["class_weights"][batch["y"]] * losses)


@pytest.mark.parametrize("examples", [("x", "y"), lambda batch: len(batch["y"])], ids=["names", "function"])
def test_a_mean_weighs_its_batches_by_their_examples(examples):
    problem = with_class_weights(objective=lambda s, z: validation(s, {**chunks()[0], **rows(100, 119)}))
    objective = mg.mean_over(chunks(), validation, examples=examples)
    value, grad = mg.value_and_metagrad(problem.training(), objective)(problem.z)
    expected_value, expected = reference(problem)
    assert_same(value, expected_value)
    assert_same(grad, expected)
    state = mg.train(problem.training(), problem.z)
    assert float(objective(state, problem.z)) == pytest.approx(float(expected_value), abs=1e-12)


def test_a_mean_that_cannot_tell_its_examples_is_refused():
    with pytest.raises(StructureError, match="Name them"):
        mg.mean_over(chunks(), validation)


def test_a_mean_over_a_generator_is_refused():
    with pytest.raises(BatchError, match=r"list\(\.\.\.\)"):
        mg.mean_over((c for c in chunks()), validation)  # pyright: ignore[reportArgumentType]
