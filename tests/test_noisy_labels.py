"""Cleaning a labelled set: its baselines, what it refuses, and the command on CIFAR-10 with human labels."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagradient as mg
from metagradient.cli import main
from metagradient.data.images import Images, load_digits
from metagradient.tasks.classifier import Classifier, Recipe
from metagradient.tasks.label_filters import confident_learning, gradient_cosine, small_loss
from metagradient.tasks.noisy_labels import NoisyLabels, figures, prepare
from metagradient.tasks.noisy_labels_page import ARMS

DIGITS = load_digits()
FLIPPED = np.arange(0, 300, 3)


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, mg.TrainState, Images, Images]:
    """A classifier trained on 300 digits of which every third has another's label, and a clean target."""
    observed = DIGITS.labels[:300].copy()
    observed[FLIPPED] = (observed[FLIPPED] + 1) % 10
    pool = replace(DIGITS.take(np.arange(300)), observed=observed)
    classifier = Classifier(Recipe(widths=(6, 12), batch=50, steps=60, learning_rate=0.2), 10, 1)
    state = mg.train(classifier.training(pool.images, observed, 0), {})
    return classifier, state, pool, DIGITS.take(np.arange(300, 400))


def separation(scores: np.ndarray) -> float:
    """Mean score of right labels less that of wrong ones, in standard deviations of scores."""
    wrong = np.isin(np.arange(300), FLIPPED)
    return float((scores[~wrong].mean() - scores[wrong].mean()) / scores.std())


def test_small_loss_and_gradient_cosine_trust_right_labels_more(trained):
    classifier, state, pool, target = trained
    assert separation(small_loss(classifier, state, pool)) > 0.5
    # Late in training a cosine tells little apart; that it is the right number is tested below.
    assert separation(gradient_cosine(classifier, state, pool, target)) > 0.1


def test_the_gradient_cosine_is_that_of_plain_gradients(trained):
    classifier, state, pool, target = trained

    def flat(images: Any, labels: Any) -> np.ndarray:
        def loss(params: Any) -> jax.Array:
            logits = classifier.logits(replace(state, params=params), jnp.asarray(images))
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])

        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.grad(loss)(state.params))])

    assert pool.observed is not None
    one, mean = flat(pool.images[7:8], pool.observed[7:8]), flat(target.images, target.labels)
    expected = one @ mean / np.linalg.norm(one) / np.linalg.norm(mean)
    assert gradient_cosine(classifier, state, pool, target)[7] == pytest.approx(expected, abs=1e-4)


def test_confident_learning_sees_no_example_that_it_judges(trained):
    classifier, _, pool, _ = trained
    assert pool.observed is not None
    labels, fitted = pool.observed, []

    def fit(rows: np.ndarray) -> mg.TrainState:
        fitted.append(rows)
        return mg.train(classifier.training(pool.images, labels, 1, rows=rows), {})

    kept, quality = confident_learning(classifier, fit, pool, 0)
    left_out = [np.setdiff1d(np.arange(300), rows) for rows in fitted]
    np.testing.assert_array_equal(np.sort(np.concatenate(left_out)), np.arange(300))
    assert separation(quality) > 0.5
    assert kept[FLIPPED].mean() < kept.mean()


def test_figures():
    found = figures({"all": [0.3, 0.4], "mgd": [0.5, 0.5], "clean": [0.55, 0.55]})
    assert found["way"] == pytest.approx(0.75)
    assert found["error_all"] == pytest.approx(0.05)


TINY = [
    *("--examples", "240", "--target", "120", "--held-out", "60", "--test", "80", "--meta-steps", "2", "--fresh", "1"),
    *("--recipe.widths", "4", "6", "--recipe.batch", "60", "--recipe.steps", "8", "--shares", "0.5", "0.8"),
    *("--shrink", "4"),
]


def test_the_command_fills_its_directory_and_can_be_resumed(tmp_path: Path, shared_data):
    data, out = shared_data("cifar10"), tmp_path / "run"
    asked = ["select", "--task", "labels", "--data", str(data), "--out", str(out), *TINY]
    assert main(asked) == 0
    found = json.loads((out / "result.json").read_text())
    assert set(json.loads((out / "accuracies.json").read_text())) == set(ARMS)
    assert all(0 <= found[f"accuracy_{arm}"] <= 1 for arm in ARMS)
    assert 0.3 < found["share_wrong"] < 0.5
    with np.load(out / "weights.npz") as stored:
        assert stored["weights"].shape == (240,)
        assert stored["weights"].std() > 0.1
    (out / "result.json").unlink()
    assert main(["select", "--resume", str(out)]) == 0
    again = json.loads((out / "result.json").read_text())
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}
    assert main(["report", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["select"], "needs --task, one of clip, instruction, labels"),
        (["select", "--task", "cats"], "needs --task"),
        (["select", "--task", "labels"], "needs --data"),
        (["select", "--task", "labels", "--data", ".", "--shares", "0"], "shares must be in"),
        (["select", "--task", "labels", "--data", ".", "--target", "10"], "must hold a batch"),
    ],
)
def test_what_is_refused(arguments, message, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_missing_cleanlab_is_said_before_anything_is_trained(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    assert main(["select", "--task", "labels", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "pip install 'metagradient[labels]'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_every_arm_trains_on_what_its_name_says(shared_data):
    task = prepare(
        NoisyLabels(data=shared_data("cifar10"), examples=300, target=250, held_out=50, test=50, shares=(1.0,))
    )
    assert task.pool.observed is not None
    n, weights = len(task.pool), np.linspace(0, 2, len(task.pool))
    plain, both = task.arm(weights=weights), task.arm(true=True, target=True)
    np.testing.assert_array_equal(plain.labels[:n], task.pool.observed)
    np.testing.assert_array_equal(plain.rows, np.arange(n))
    np.testing.assert_allclose(plain.weights[:n], weights, rtol=1e-6)
    np.testing.assert_array_equal(both.labels[:n], task.pool.labels)
    np.testing.assert_array_equal(both.rows, np.arange(n + len(task.target)))
    np.testing.assert_array_equal(task.images[n:], task.target.images)
