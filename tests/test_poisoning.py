"""Poisoning: its gradients, its box, its baseline, and the command."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

import metagradient as mg
from metagradient.cli import main, parse
from metagradient.data.images import Images, load_digits, load_images
from metagradient.tasks.classifier import Classifier, Recipe
from metagradient.tasks.gradient_canceling import cancel, corrupted, summed_gradient, value_and_pixel_gradient
from metagradient.tasks.poisoning import Poison, Trained, figures, project, signs
from metagradient.tasks.poisoning_report import ARMS, PLACES

ROWS = np.array([3, 17, 30])
DIGITS = load_digits()


def problem(dtype: Any = np.float32) -> tuple[Classifier, Images, Images]:
    """A classifier of one convolution, its 48 training images, and 60 others."""
    classifier = Classifier(Recipe(widths=(4,), batch=16, steps=9, learning_rate=0.4), 10, 1)
    images = replace(DIGITS, images=DIGITS.images.astype(dtype))
    return classifier, images.take(np.arange(48)), images.take(np.arange(100, 160))


def in_double(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def test_the_metagradient_of_pixels_is_that_of_central_differences():
    with jax.enable_x64(True):
        classifier, pool, target = problem(np.float64)
        training = classifier.training(pool.images, pool.labels, 0)
        training = replace(training, init=lambda z, start=training.initial: in_double(start(z)))
        z = {"pixels": mg.PerExample(jnp.zeros((3, 8, 8, 1)), rows=ROWS)}
        objective = classifier.mean_loss(target)
        _, grad = mg.value_and_metagrad(training, objective)(z)
        direction = np.random.default_rng(0).standard_normal((3, 8, 8, 1))

        def at(h: float) -> float:
            moved = {"pixels": mg.PerExample(h * direction, rows=ROWS)}
            return float(objective(mg.train(training, moved), moved))

        slope = {h: (at(h) - at(-h)) / (2 * h) for h in (1e-4, 2e-4)}
        expected = (4 * slope[1e-4] - slope[2e-4]) / 3
        found = float(np.vdot(grad["pixels"].value, direction))
    assert abs(expected) > 2e-4
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def trained() -> tuple[Classifier, mg.TrainState, Images]:
    classifier, pool, _ = problem()
    return classifier, mg.train(classifier.training(pool.images, pool.labels, 0), {}), pool


def test_parameter_corruption_moves_along_the_loss_gradient_by_its_share(trained):
    classifier, state, pool = trained
    moved = corrupted(classifier, state, pool.images, pool.labels, 0.1)

    def flat(tree: Any) -> np.ndarray:
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    def loss(params: Any) -> jax.Array:
        logits = classifier.logits(replace(state, params=params), jnp.asarray(pool.images))
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(48), pool.labels])

    move, gradient = flat(moved.params) - flat(state.params), flat(jax.grad(loss)(state.params))
    assert np.linalg.norm(move) == pytest.approx(0.1 * np.linalg.norm(flat(state.params)), rel=1e-4)
    cosine = np.vdot(move, gradient) / np.linalg.norm(move) / np.linalg.norm(gradient)
    assert cosine == pytest.approx(1, abs=1e-5)
    before, after = flat(state.model_state), flat(moved.model_state)
    assert not np.allclose(before, after)


def test_gradient_canceling_follows_its_objective(trained):
    classifier, state, pool = trained
    state = corrupted(classifier, state, pool.images, pool.labels, 0.1)
    poisoned, clean = pool.take(np.arange(16)), pool.take(np.arange(16, 48))
    gradient = summed_gradient(classifier, state, clean.images, clean.labels)
    noisy = jnp.clip(poisoned.images + 0.1 * np.random.default_rng(0).random(poisoned.images.shape), 0, 1)

    def objective(x: jax.Array) -> jax.Array:
        """The same, reverse over reverse, over all images at once."""

        def loss(params: Any) -> jax.Array:
            images = jnp.concatenate([clean.images, x])
            labels = np.concatenate([clean.labels, poisoned.labels])
            logits = classifier.logits(replace(state, params=params), images)
            return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(48), labels])

        return sum((0.5 * jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(state.params))), jnp.zeros(()))

    value, found = value_and_pixel_gradient(classifier, state, gradient, noisy, jnp.asarray(poisoned.labels))
    expected, of_it = jax.value_and_grad(objective)(noisy)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_allclose(found, of_it, rtol=1e-3, atol=1e-4 * float(jnp.abs(of_it).max()))

    inside = np.ones((8, 8, 1), np.float32)
    inside[:2] = 0
    images, left = cancel(
        classifier, state, gradient, poisoned.images * inside, poisoned.labels, inside, steps=40, rate=0.03
    )
    assert left[-1] < 0.9 * left[0]
    assert np.all((images >= 0) & (images <= inside))


def test_the_box_holds_images_and_the_update_moves_every_pixel_by_its_sign():
    images, inside = DIGITS.images[:3], np.ones((8, 8, 1), np.float32)
    inside[:, :1] = 0
    images = images * inside
    update = signs(lambda count: 0.3 - 0.1 * count, 0.5)

    def pixels(values: np.ndarray) -> Any:
        return {"pixels": mg.PerExample(jnp.asarray(values), rows=ROWS)}

    z: Any = pixels(np.zeros_like(images))
    changes: Any
    memory, gradient = update.init(z), np.random.default_rng(0).standard_normal(images.shape).astype(np.float32)
    changes, memory = update.update(pixels(gradient), memory, z)
    np.testing.assert_allclose(changes["pixels"].value, -0.3 * np.sign(gradient), rtol=1e-6)
    # Weaker by far, but as long once normalised: the momentum doesn't outweigh it.
    changes, _ = update.update(pixels(-1e-3 * gradient), memory, z)
    np.testing.assert_allclose(changes["pixels"].value, 0.2 * np.sign(gradient), rtol=1e-6)

    found = project(pixels(5 * gradient)["pixels"], images, inside)
    poisoned = images + np.asarray(found.value)
    np.testing.assert_allclose(poisoned, np.clip(images + 5 * gradient, 0, inside), atol=1e-6)
    np.testing.assert_array_equal(found.rows, ROWS)


def test_figures_pair_trainings_by_seed():
    rights = {"clean": [0.9, 0.7], "metagradient": [0.6, 0.5]}
    trained = [
        Trained(arm, place, seed, 1.0, np.arange(10) < 10 * rights.get(arm, [0.8, 0.8])[i])
        for place in PLACES
        for i, seed in enumerate([5] if place == "attacked" else [1, 2])
        for arm in ARMS
    ]
    found = figures(trained)
    assert found["drop_metagradient_fresh"] == pytest.approx(25)
    assert found["error_metagradient_fresh"] == pytest.approx(5)
    assert found["drop_metagradient_attacked"] == pytest.approx(30)
    # Three of ten images lost: their paired differences have a standard deviation of 0.483.
    assert found["error_metagradient_attacked"] == pytest.approx(48.3 / 10**0.5, rel=1e-3)
    assert found["accuracy_noise_standard"] == pytest.approx(0.8)


def mnist_like(directory: Path, sizes: dict[str, int], side: int = 28) -> Path:
    """Grey PNGs in MNIST's Parquet layout: the digits, enlarged."""
    directory.mkdir()
    start = 0
    for split, size in sizes.items():
        rows = []
        for image in DIGITS.images[start : start + size]:
            file = io.BytesIO()
            grey = Image.fromarray((255 * image[..., 0]).astype(np.uint8)).resize((side, side))
            grey.save(file, "PNG")
            rows.append({"bytes": file.getvalue(), "path": None})
        labels = pa.array(DIGITS.labels[start : start + size].astype(np.int64))
        pq.write_table(pa.table({"image": rows, "label": labels}), directory / f"{split}-00000-of-00001.parquet")
        start += size
    return directory


TINY = [
    *("--meta-steps", "3", "--cancel-steps", "5", "--fresh", "2", "--corruptions", "0.1"),
    *("--recipe.widths", "4", "6", "--recipe.batch", "40", "--recipe.steps", "12", "--recipe.learning-rate", "0.1"),
    *("--share", "0.1", "--examples", "80", "--target", "120", "--held-out", "50", "--test", "60"),
]


def result(directory: Path) -> dict[str, float]:
    return json.loads((directory / "result.json").read_text())


def test_the_command_poisons_digits_and_fills_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert main(["poison", "--out", str(out), *TINY]) == 0
    found = result(out)
    assert found["poisoned"] == 8
    assert found["loss_metagradient_attacked"] > found["loss_clean_attacked"]
    for arm in ARMS:
        for place in PLACES:
            assert 0 <= found[f"accuracy_{arm}_{place}"] <= 1
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert records[-1]["value"] > records[0]["value"]
    with np.load(out / "poisons.npz") as saved:
        assert len(set(saved["rows"].tolist())) == 8
        assert saved["images"].shape == saved["clean"].shape == (8, 8, 8, 1)
        assert np.all((saved["images"] >= 0) & (saved["images"] <= 1))
        assert np.abs(saved["images"] - saved["clean"]).max() > 0.1
        assert np.all(saved["labels"] < 10)
    page = (out / "report.html").read_text()
    assert "gradient canceling" in page
    assert "<script" not in page
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page
    assert parse("poison", Poison(), ["--config", str(out / "config.toml")]).recipe.widths == (4, 6)

    # Killed after its ascent: gone on with, it comes to the same.
    (out / "result.json").unlink()
    assert main(["poison", "--resume", str(out)]) == 0
    assert {k: v for k, v in result(out).items() if k != "seconds"} == {
        k: v for k, v in found.items() if k != "seconds"
    }


@pytest.mark.slow
def test_the_command_reads_grey_images_of_another_size_and_leaves_their_border_alone(tmp_path: Path):
    data = mnist_like(tmp_path / "images", {"train": 250, "test": 60})
    out = tmp_path / "run"
    # 28 pixels become 7, in a border up to 8.
    arguments = ["--data", str(data), "--shrink", "4", "--seeds", "1", "--out", str(out), *TINY]
    assert main(["poison", *arguments]) == 0
    with np.load(out / "poisons.npz") as saved:
        assert saved["images"].shape == (8, 8, 8, 1)
        whole = load_images(data).shrunk(4)
        np.testing.assert_array_equal(saved["clean"][:, :7, :7], whole.images[saved["rows"]])
        np.testing.assert_array_equal(saved["labels"], whole.labels[saved["rows"]])
        border = np.ones((8, 8, 1), bool)
        border[:7, :7] = False
        assert np.all(saved["images"][:, border] == 0)
        assert np.all(saved["canceling"][:, border] == 0)


def test_test_images_of_another_size_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = mnist_like(tmp_path / "images", {"train": 250})
    tables = pq.read_table(mnist_like(tmp_path / "others", {"test": 60}, side=32) / "test-00000-of-00001.parquet")
    pq.write_table(tables, data / "test-00000-of-00001.parquet")
    assert main(["poison", "--data", str(data), "--shrink", "4", "--out", str(tmp_path / "run"), *TINY]) == 2
    assert "not of the size" in " ".join(capsys.readouterr().err.split())


def test_only_the_chosen_images_change_and_no_label_but_in_the_flips():
    from metagradient.tasks.poisoning import _flipped, prepare

    task = prepare(Poison(recipe=Recipe(widths=(4, 6), batch=40, steps=12), examples=80, share=0.1))
    others = np.delete(np.arange(80), task.rows)
    poisoned = task.with_images(np.ones_like(task.chosen.images))
    np.testing.assert_array_equal(poisoned.labels, task.pool.labels)
    np.testing.assert_array_equal(poisoned.images[others], task.pool.images[others])
    assert np.all(poisoned.images[task.rows] == 1)
    flipped = _flipped(task)
    np.testing.assert_array_equal(flipped.images, task.pool.images)
    np.testing.assert_array_equal(np.flatnonzero(flipped.labels != task.pool.labels), task.rows)


@pytest.mark.parametrize("preset", ["tiny", "cifar10", "cifar10-transfer", "paper"])
def test_presets_are_read(preset):
    config = parse("poison", Poison(), ["--preset", preset])
    assert config.shrink == (1 if preset == "paper" else 2)
    assert config.recipe.width_multiplier == (2 if preset == "paper" else 1)
    assert isinstance(config.recipe.widths, tuple)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples", "5000"], "there are 1797 images"),
        (["--share", "0"], "0 images to poison"),
        (["--share", "2"], "images to poison"),
        (["--examples", "50"], "at least a batch"),
        (["--meta-steps", "0"], "at least 1"),
        (["--corruptions", "-1"], "must be positive"),
        (["--data", "nowhere"], "nowhere"),
        (["--shrink", "3"], "can't be shrunk"),
    ],
)
def test_input_that_cannot_be_used_is_said_before_compute(arguments, message, tmp_path, capsys):
    assert main(["poison", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
