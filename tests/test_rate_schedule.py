"""Learning-rate schedules: their gradient, the command on the digits and on a directory, resuming, refusals."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import metagradient as mg
from metagradient.cli import main
from metagradient.data.images import load_digits
from metagradient.descent import journal as journal_module
from metagradient.files import append_text
from metagradient.progress import Progress
from metagradient.tasks import schedule as schedule_module
from metagradient.tasks import trials as trials_module
from metagradient.tasks.classifier import Classifier, Recipe
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.schedule import Grid, RateSchedule
from metagradient.tasks.trials import Trials

SMALL = """
examples = 200
target = 100
validation = 100
test = 100
knots = 4
meta_steps = 4
rate = 0.5
final_rate = 0.3
finalists = 2
finalist_seeds = 2
seeds = 2
at_once = 2

[recipe]
widths = [4, 4]
batch = 50
steps = 20
learning_rate = 0.01
start = 1.0
end = 1.0

[grid]
peaks = [0.01, 0.1]
positions = [0.3]
starts = [0.1]
ends = [0.1, 0.5]
constants = [0.01, 0.1]
"""
ARMS = ("start", "flat", "grid", "grid_accuracy", "mgd")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    return file


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


def without_seconds(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if "seconds" not in name}


@pytest.mark.parametrize("kind", ["log_knots", "log_rate"])
def test_gradients_of_learning_rates_are_those_of_finite_differences(kind: str):
    steps = 6
    digits = load_digits().take(np.arange(128))
    classifier = Classifier(Recipe(widths=(4, 4), batch=32, steps=steps), 10, 1)
    with jax.enable_x64(True):
        images = classifier.fitted(replace(digits, images=digits.images.astype(np.float64)))
        single = classifier.training(images.images, images.labels, 0)
        training = replace(single, init=lambda z: jax.tree.map(_double, single.init(z)))
        objective = classifier.mean_loss(images)
        logs = np.log(0.1) + 0.2 * np.random.default_rng(0).standard_normal(4 if kind == "log_knots" else steps)

        def z(logs: np.ndarray) -> dict[str, Any]:
            return {kind: (mg.Shared if kind == "log_knots" else mg.PerStep)(jnp.asarray(logs))}

        def value(logs: np.ndarray) -> float:
            return float(objective(mg.train(training, z(logs)), None))

        _, grad = mg.value_and_metagrad(training, objective, segment=mg.Segment(1, "steps", "state"))(z(logs))
        differences = [(value(logs + h) - value(logs - h)) / 2e-4 for h in 1e-4 * np.eye(len(logs))]
    assert np.abs(differences).min() > 1e-4  # no gradient vanishes, or equality would say little
    np.testing.assert_allclose(grad[kind].value, differences, rtol=1e-5, atol=1e-8)


def _double(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def test_the_command_learns_a_schedule_and_counts_what_everything_cost(small, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["schedule", "--config", str(small), "--out", str(out)]) == 0
    found = result(out)
    assert found["loss_mgd"] < found["loss_start"] - 0.02  # from a flat start that is far too low
    for what in ("accuracy", "loss"):
        for grid in ("grid", "grid_accuracy"):
            assert found[f"{what}_over_{grid}"] == pytest.approx(found[f"{what}_mgd"] - found[f"{what}_{grid}"])
    assert found["grid_size"] == 4
    assert found["training_runs_grid"] == 4 + 2 * 2
    assert found["training_runs_flat"] == 2 * 2
    # Four meta-steps, each of a run, its adjoint (three runs' worth) and the rehearsal of its first segment.
    assert 4 * 4 < found["training_runs_mgd"] - 2 * 2 < 4 * 4.5
    rows = [json.loads(line) for line in (out / "trainings.jsonl").read_text().splitlines()]
    seeds = {stage: {row["seed"] for row in rows if row["stage"] == stage} for stage in ("grid", "flat", "fresh")}
    assert seeds["flat"] == {row["seed"] for row in rows if row["stage"] == "finalists of mgd"}
    assert not seeds["fresh"] & (seeds["grid"] | seeds["flat"])
    # The grid's picks are the finalists with the better mean on the finalists' seeds.
    for name, what, sign in ("grid", "loss", 1), ("grid_accuracy", "accuracy", -1):
        grid = {row["number"]: sign * row[what] for row in rows if row["stage"] == "grid"}
        again = [row for row in rows if row["stage"] == f"finalists of {name}"]
        means = [sign * np.mean([row[what] for row in again if row["number"] == number]) for number in (0, 1)]
        pick = sorted(grid, key=grid.__getitem__)[int(np.argmin(means))]
        picked = [found[f"{name}_{part}"] for part in ("peak", "position", "start", "end")]
        assert picked == list(Grid((0.01, 0.1), (0.3,), (0.1,), (0.1, 0.5)).combinations(0)[pick])
    saved = np.load(out / "schedules.npz")
    np.testing.assert_allclose(saved["learnt"][0], 0.01, rtol=1e-5)
    np.testing.assert_array_equal(saved["mgd"], saved["learnt"][found["best_step"]])
    page = (out / "report.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "best of the grid" in page
    assert "the grid 8." in capsys.readouterr().out


def mnist_like(directory: Path) -> Path:
    """scikit-learn's digits as grey PNGs of 28 x 28, in the Parquet layout of MNIST."""
    digits = load_digits()
    large = np.pad(digits.images[..., 0].repeat(3, axis=1).repeat(3, axis=2), [(0, 0), (2, 2), (2, 2)])

    def png(pixels: np.ndarray) -> bytes:
        file = io.BytesIO()
        Image.fromarray((255 * pixels).astype(np.uint8)).save(file, "PNG")
        return file.getvalue()

    directory.mkdir()
    for split, rows in {"train": range(400), "test": range(1000, 1100)}.items():
        images = pa.array([{"bytes": png(large[i]), "path": None} for i in rows])
        table = pa.table({"image": images, "label": pa.array(digits.labels[rows.start : rows.stop].astype(np.int64))})
        pq.write_table(table, directory / f"{split}-00000-of-00001.parquet")
    return directory


@pytest.mark.slow
def test_any_image_directory_will_do_and_a_rate_for_every_step(small, tmp_path):
    data = mnist_like(tmp_path / "mnist")
    out = tmp_path / "run"
    arguments = ["--data", str(data), "--config", str(small), "--knots", "0", "--meta-steps", "3", "--at-once", "1"]
    arguments += ["--recipe.steps", "8"]
    assert main(["schedule", *arguments, "--out", str(out)]) == 0
    found = result(out)
    assert {f"{what}_{arm}" for what in ("accuracy", "loss", "training_runs") for arm in ARMS} <= set(found)
    learnt = np.load(out / "schedules.npz")["learnt"]
    assert learnt.shape == (4, 8)
    assert len(set(learnt[2].tolist())) > 4
    np.testing.assert_allclose(learnt[3], np.sqrt(learnt[1] * learnt[2]), rtol=1e-5)
    (data / "test-00000-of-00001.parquet").unlink()
    assert main(["schedule", *arguments, "--out", str(tmp_path / "without")]) == 2
    assert (
        main(["schedule", *arguments, "--meta-steps", "1", "--examples", "100", "--out", str(tmp_path / "without")])
        == 0
    )


def cut_off_after(lines: int) -> Callable[[Path, str], None]:
    left = count(lines, -1)

    def written(path: Path, text: str) -> None:
        if next(left) <= 0:
            raise KeyboardInterrupt
        append_text(path, text)

    return written


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on_to_the_same_figures(small, tmp_path, monkeypatch):
    # One way to compile, which is otherwise measured: so that bits can be compared.
    monkeypatch.setattr(schedule_module, "descend", partial(mg.descend, segment=mg.Segment(1, "steps", "state")))
    settings = ["--config", str(small), "--at-once", "1", "--recipe.steps", "8", "--meta-steps", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["schedule", *settings, "--out", str(whole)]) == 0
    # Cut off after so many lines: in the second meta-step, and in the grid.
    for lines, begun in (3, [*settings, "--out", str(cut)]), (8, ["--resume", str(cut)]):
        with monkeypatch.context() as patch:
            written = cut_off_after(lines)
            patch.setattr(journal_module, "append_text", written)
            patch.setattr(trials_module, "append_text", written)
            with pytest.raises(KeyboardInterrupt):
                main(["schedule", *begun])
    assert main(["schedule", "--resume", str(cut)]) == 0
    assert without_seconds(result(cut)) == without_seconds(result(whole))
    for name, expected in np.load(whole / "schedules.npz").items():
        np.testing.assert_array_equal(np.load(cut / "schedules.npz")[name], expected)
    (cut / "report.html").unlink()
    assert main(["report", str(cut)]) == 0
    assert "best of the grid" in (cut / "report.html").read_text()
    assert main(["schedule", "--resume", str(cut)]) == 2  # it is finished


def test_a_training_written_down_is_not_done_again(tmp_path, monkeypatch):
    images = load_digits().take(np.arange(96))
    classifier = Classifier(Recipe(widths=(4, 4), batch=32, steps=4), 10, 1)
    directory = RunDirectory.begin(tmp_path / "run", RateSchedule(), "schedule")
    done: list[int] = []

    def counted(training: Any, zs: Any, **options: Any) -> Any:
        done.append(len(zs))
        return mg.train_many(training, zs, **options)

    monkeypatch.setattr(trials_module, "train_many", counted)

    def trials(progress: Progress) -> Trials:
        return Trials(classifier, images, {"validation": images}, directory, at_once=2, progress=progress)

    rates = np.geomspace(0.01, 0.1, 3)[:, None] * np.ones(4)
    with Progress(False) as progress:
        first = trials(progress).scores("grid", rates, 1, "validation")
        assert sum(done) == 3
        path = directory / "trainings.jsonl"
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:2]))
        np.testing.assert_array_equal(trials(progress).scores("grid", rates, 1, "validation")[:2], first[:2])
        assert sum(done) == 4
        trials(progress).scores("grid", rates, 2, "validation")
        assert sum(done) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples", "5000"], "only 1797 images"),
        (["--examples", "10"], "at least a batch"),
        (["--knots", "1"], "knots must be"),
        (["--knots", "61"], "60 steps"),
        (["--seeds", "1"], "seeds must be at least 2"),
        (["--meta-steps", "0"], "meta_steps must be at least 1"),
        (["--grid.ends", "0"], "grid.ends"),
        (["--grid.positions", "1.0"], "grid.positions"),
        (["--recipe.start", "0"], "above 0"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_trained(arguments, message, tmp_path, capsys):
    assert main(["schedule", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_an_unknown_setting_in_a_table_is_named(tmp_path, capsys):
    (tmp_path / "c.toml").write_text("[recipe]\nwidth = 3")
    assert main(["schedule", "--config", str(tmp_path / "c.toml")]) == 2
    assert "unknown setting width" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["tiny", "paper"])
def test_presets_hold_settings_that_pass_every_check(name: str):
    from metagradient.cli import parse
    from metagradient.tasks.schedule import _check

    config = parse("schedule", RateSchedule(), ["--preset", name])
    _check(config)
    sizes = [len(getattr(config.grid, name)) for name in ("peaks", "positions", "starts", "ends")]
    assert np.prod(sizes) >= {"tiny": 200, "paper": 1000}[name]
    if name == "paper":
        assert config.recipe.steps == 18 * config.examples // config.recipe.batch
        assert Classifier(config.recipe, 10, 3).model.width_multiplier == 2
