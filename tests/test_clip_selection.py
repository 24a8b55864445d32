"""Filtering an image–text pool: the baselines, the measures, and the whole run."""

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tars import digit, uid, write_pool, write_tar

import metagradient as mg
from metagradient.cli import parse
from metagradient.data.image_text import load_pool, read_uids
from metagradient.errors import ConfigError, DataError, MetagradientError
from metagradient.models.clip import contrastive_losses
from metagradient.report.page import render
from metagradient.tasks.clip_baselines import CaptionRules, chosen, drawn, without_duplicates
from metagradient.tasks.clip_descent import start
from metagradient.tasks.clip_page import page
from metagradient.tasks.clip_rater import feature_names, features, rated
from metagradient.tasks.clip_selection import ClipSelection, Prepared, prepare, run
from metagradient.tasks.clip_training import (
    Objective,
    PairRecipe,
    PairTrainer,
    fitted_scale,
    recalls,
    soft_rank,
    zero_shot,
)
from metagradient.tasks.clip_trials import Arm, figures, load_names
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.ranking import highest

RECIPE = PairRecipe(
    size=8, patch=2, widths=(4, 8), text_width=8, text_heads=2, vocabulary=200, words=8, pieces=4, embedding=8,
    batch=24, steps=12, learning_rate=0.02,
)  # fmt: skip


def config(data: Path, out: Path | None = None, **changes: Any) -> ClipSelection:
    return ClipSelection(
        data=data, out=out, recipe=RECIPE, meta_steps=2, rate=0.5, score_steps=(8,), shares=(0.5, 0.8),
        scorers=2, rule_words=(1, 3), choosing=1, fresh=2, **changes,
    )  # fmt: skip


def short(data: Path, out: Path, **changes: Any) -> ClipSelection:
    """A run with as little beside its descent as can be."""
    return replace(config(data, out, **changes), shares=(0.5,), scorers=1, rule_words=(1,), fresh=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pool(tmp_path_factory.mktemp("data") / "pool")


@pytest.fixture(scope="module")
def trained(data: Path) -> tuple[Prepared, PairTrainer, mg.TrainState]:
    """A longer training on the whole pool."""
    task, trainer = prepare(config(data)), PairTrainer(replace(RECIPE, steps=60))
    ones = {"weights": mg.PerExample(jnp.ones(len(task.pool)))}
    return task, trainer, mg.train(trainer.training(task.arrays, 0), ones)


@pytest.fixture(scope="module")
def weighed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run by a rater and weights, which is the default."""
    out = tmp_path_factory.mktemp("weighed") / "run"
    run(config(data, out))
    return out


def figures_of(directory: Path) -> dict[str, float]:
    return json.loads((directory / "result.json").read_text())


def same(a: dict[str, float], b: dict[str, float]) -> None:
    assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}


def test_a_run_weighs_the_pool_and_fills_its_directory(weighed: Path):
    out, found = weighed, figures_of(weighed)
    assert found["pairs"] == 96
    arms = ("all", "random", "rules", "duplicates", "score", "ensemble", "subset", "mgd", "oracle")
    for arm in arms:
        assert 0 <= found[f"recall_{arm}"] <= 1
        assert 0 <= found[f"group_{arm}"] <= 1
        assert found[f"error_{arm}"] >= 0
        mean = np.mean([found[f"{way}_at_{k}_{arm}"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)])
        assert found[f"recall_{arm}"] == pytest.approx(mean)
        assert found[f"gain_{arm}"] == pytest.approx(found[f"recall_{arm}"] - found["recall_all"])
    assert found["pairs_oracle"] == 72
    assert found["mismatched_oracle"] == 0
    assert found["mismatched_all"] == 1
    assert {found[f"pairs_{arm}"] for arm in ("score", "ensemble")} <= {48, 77}
    assert found["pairs_random"] == found["pairs_subset"]
    with np.load(out / "weights.npz") as saved:
        counts = dict(zip(saved["uids"].tolist(), saved["counts"].tolist(), strict=True))
        assert saved["weights"].min() >= 0
        assert saved["weights"].max() <= 4
        assert np.ptp(saved["weights"]) > 0.3
        weights, chosen_by = saved["weights"], json.loads(str(saved["settings"]))["subset"]
        expected = drawn(weights, 96, 0) if "drawn" in chosen_by else highest(weights, float(chosen_by.split()[-1]))
        assert saved["counts"].tolist() == expected.astype(int).tolist()
        assert np.count_nonzero(expected) == found["pairs_subset"]
    listed = read_uids(out / "subset.npy")
    assert listed == sorted(listed)
    assert {u: listed.count(u) for u in set(listed)} == {u: c for u, c in counts.items() if c}
    text = (out / "report.html").read_text()
    assert "MGD&#39;s weights" in text
    assert "cosine after 8 steps" in text
    assert "<script" not in text
    assert render(page(RunDirectory.read(out))) == text


def test_a_run_that_was_killed_in_its_trials_goes_on_to_the_same(data: Path, weighed: Path, tmp_path: Path, capsys):
    out, found = tmp_path / "run", figures_of(weighed)
    copytree(weighed, out)
    # Gone on with, it trains only what is missing.
    (out / "result.json").unlink()
    lines = (out / "trainings.jsonl").read_text().splitlines(keepends=True)
    (out / "trainings.jsonl").write_text("".join(lines[:-3]) + lines[-3][:20])
    same(run(config(data, out), resume=True), found)
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert (out / "trainings.jsonl").read_text() == "".join(lines)


@pytest.mark.slow
def test_a_run_counts_the_pool_by_algorithm_1(data: Path, tmp_path: Path):
    out = tmp_path / "run"
    found = run(short(data, out, method="counts", flip=0.5))
    assert "recall_mgd" not in found
    with np.load(out / "weights.npz") as saved:
        np.testing.assert_array_equal(saved["weights"], saved["counts"])
        assert found["pairs_subset"] == np.count_nonzero(saved["counts"])
        assert len(read_uids(out / "subset.npy")) == saved["counts"].sum()
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert all(r["grad_norm"] > 0 for r in records)
    assert "a count" in (out / "report.html").read_text().lower()


@pytest.mark.slow
def test_no_selection_reads_the_truth(data: Path, weighed: Path, tmp_path: Path):
    """Without the truth in the pool everything that is chosen is chosen alike."""
    blind = tmp_path / "blind"
    blind.mkdir()
    for file in data.glob("*"):
        content = file.read_bytes()
        assert b'"shuffled": true' in content or not file.stem.isdigit()
        # The same length: a tar stays a tar.
        (blind / file.name).write_bytes(
            content.replace(b'"shuffled": true', b'"shufflex": true').replace(
                b'"shuffled": false', b'"shufflex": false'
            )
        )
    out, seeing = tmp_path / "run", figures_of(weighed)
    found = run(config(blind, out))
    assert (out / "subset.npy").read_bytes() == (weighed / "subset.npy").read_bytes()
    for arm in ("random", "rules", "duplicates", "score", "ensemble", "subset", "mgd"):
        assert found[f"recall_{arm}"] == seeing[f"recall_{arm}"]
    assert "recall_oracle" not in found
    assert not any(name.startswith("mismatched") for name in found)


@pytest.mark.slow
def test_faults_are_said_and_shown(data: Path, tmp_path: Path, capsys):
    hurt = tmp_path / "hurt"
    hurt.mkdir()
    for file in data.glob("*"):
        (hurt / file.name).write_bytes(file.read_bytes())
    bad = [("000009000.png", b"no image"), *digit(1700)[1:], ("../evil.txt", b"x")]
    write_tar(hurt / "00000002.tar", [(name.replace("000001700", "000009000"), content) for name, content in bad])
    found = run(short(hurt, tmp_path / "run", method="weights"))
    assert found["pairs"] == 96
    with np.load(tmp_path / "run" / "weights.npz") as saved:
        assert str(saved["rater"]) == "{}"
    err = capsys.readouterr().err
    for text in (err, (tmp_path / "run" / "report.html").read_text()):
        assert "1 x unreadable image (00000002.tar:000009000" in text
        assert "1 x unsafe name (00000002.tar:../evil.txt" in text


def prepared(data: Path) -> Prepared:
    return prepare(config(data))


def test_validation_pairs_are_split_and_variants_left_out(data: Path, tmp_path: Path):
    task = prepared(data)
    assert (len(task.pool), len(task.val), len(task.test)) == (96, 40, 40)
    assert set(task.target.uids) | set(task.held_out.uids) == set(task.val.uids)
    assert len(task.target) == 26
    assert not set(task.test.uids) & (set(task.val.uids) | set(task.pool.uids))
    other = write_pool(tmp_path / "other")
    variants = [digit(1000 + n, skin_tone=tone) for n, tone in enumerate(["1F3FB", None, None, None, None, "x"])]
    write_tar(other / "test.tar", [m for members in variants for m in members])
    assert prepared(other).test.uids == tuple(uid(1000 + n) for n in (1, 2, 3, 4))


def test_the_objectives_follow_a_training(trained):
    task, trainer, state = trained
    matched, initial = (
        task.pool.take(np.flatnonzero(~task.mismatched)[:30]),
        trainer.training(task.arrays, 0).initial({}),
    )
    # So short a training brings matches little nearer: their ranks don't tell it from the start.
    objective = jax.jit(trainer.objective(matched, "fitted"))
    assert objective(state, {}) < objective(initial, {})
    images, texts = trainer.embedded(state, task.val)
    rank = float(soft_rank(jnp.asarray(images), jnp.asarray(texts)))
    of_all = {kind: float(jax.jit(trainer.objective(task.val, kind))(state, {})) for kind in get_args(Objective)}
    assert of_all["rank"] == pytest.approx(rank, rel=1e-4)
    assert of_all["fitted"] <= min(of_all["learnt"], of_all["fixed"]) + 1e-3


def test_the_fitted_scale_is_a_minimum_so_that_its_derivative_may_be_left_out():
    rng = np.random.default_rng(0)
    u = rng.normal(size=(30, 8))
    v = u + 0.7 * rng.normal(size=(30, 8))
    u, v = (jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32) for x in (u, v))
    scale = float(fitted_scale(u, v))
    assert 3 < scale < 100

    def at(s: float) -> float:
        return float(contrastive_losses(u, v, s).mean())

    assert at(scale) <= min(at(0.8 * scale), at(1.25 * scale))
    moved = jax.grad(lambda u: contrastive_losses(u, v, fitted_scale(u, v)).mean())(u)
    held = jax.grad(lambda u: contrastive_losses(u, v, scale).mean())(u)
    np.testing.assert_array_equal(moved, held)


def test_recalls_and_soft_ranks_count():
    scores = np.array([[0.9, 0.1, 0.0], [0.8, 0.5, 0.1], [0.3, 0.2, 0.7]], np.float32)
    # Texts as axes: a score is an image's coordinate.
    found = recalls(scores, np.eye(3, dtype=np.float32))
    assert found["image_to_text_at_1"] == pytest.approx(2 / 3)
    assert found["text_to_image_at_1"] == 1
    assert found["image_to_text_at_5"] == 1
    assert found["recall"] == pytest.approx((2 / 3 + 5) / 6)
    sharp = soft_rank(jnp.asarray(scores), jnp.eye(3), 1e-3)
    assert float(sharp) == pytest.approx(np.log(2) / 6, abs=1e-4)
    tied = recalls(np.ones((12, 2)), np.ones((12, 2)))
    assert tied["recall"] == 0


def test_zero_shot_goes_by_the_mean_of_a_groups_names(tmp_path: Path):
    names = np.array([[1, 0], [0.8, 0.6], [0, 1]])
    images = np.array([[0.9, 0.4], [0, 1], [1, 0]])
    assert zero_shot(images, names, np.array([0, 0, 1]), np.array([0, 1, 1])) == pytest.approx(2 / 3)
    file = tmp_path / "classes.json"
    assert load_names(file) is None
    file.write_text('{"groups": ["Flags", "Food"], "subgroups": {"Flags": ["country-flag"]}}')
    found = load_names(file)
    assert found is not None
    assert found.texts == ("Flags", "country flag", "Food")
    assert found.of.tolist() == [0, 0, 1]
    for bad in ("[1]", "{", '{"groups": 3}'):
        file.write_text(bad)
        with pytest.raises(DataError, match=r"classes\.json"):
            load_names(file)


@pytest.mark.parametrize("method", ["rater", "both"])
def test_a_rater_begins_at_the_score_filter(trained, method):
    task, trainer, state = trained
    embedded = trainer.embedded_arrays(state, task.arrays)
    table = features(task.pool, [[embedded], [embedded]], [trainer.embedded(state, task.target)], 0)
    scores = (embedded[0] * embedded[1]).sum(1)
    c = ClipSelection(method=method, score_steps=(8, 60), head_start=2.5)
    z = start(c, len(scores))
    assert float(z["rater"][feature_names((8, 60)).index("cosine after 60 steps")]) == 2.5
    weights = rated(jnp.asarray(table), z["rater"])
    assert highest(np.asarray(weights), 0.5).tolist() == highest(scores, 0.5).tolist()
    assert float(weights.max() - weights.min()) > 1.5
    assert set(z) == ({"rater"} if method == "rater" else {"rater", "weights"})


def test_a_rater_goes_by_features_that_tell_mismatched_pairs(trained):
    task, trainer, state = trained
    vectors = trainer.embedded_arrays(state, task.arrays)
    table = features(task.pool, [[vectors]], [trainer.embedded(state, task.target)], 0)
    names = feature_names([60])
    assert table.shape == (96, len(names))
    np.testing.assert_allclose(table.mean(0), 0, atol=0.1)
    assert np.abs(table).max() <= 3
    assert np.isfinite(table).all()
    wrong = task.pool.column("shuffled").astype(bool)
    cosine = table[:, names.index("cosine after 60 steps")]
    assert cosine[wrong].mean() < cosine[~wrong].mean() - 0.2
    np.testing.assert_allclose(rated(jnp.asarray(table), jnp.zeros(len(names))), 1)
    # Of several models it takes means: one that sees captions turned around cancels every cosine.
    images, texts = vectors
    aim = trainer.embedded(state, task.target)
    several = features(task.pool, [[(images, -texts), vectors]], [aim, aim], 0)
    assert np.abs(several[:, names.index("cosine after 60 steps")]).max() < 0.1
    place = names.index("image: nearness to the target")
    np.testing.assert_allclose(several[:, place], table[:, place], atol=1e-5)
    # The gradient of a rater is that of weights through the rater.
    training = trainer.training({**task.arrays, "features": table}, 1, steps=5)
    objective = trainer.objective(task.val)
    rater = jnp.linspace(-0.1, 0.1, len(names))
    _, found = mg.value_and_metagrad(training, objective)({"rater": rater})
    weights, pull_back = jax.vjp(lambda r: rated(jnp.asarray(table), r), rater)
    plain = trainer.training(task.arrays, 1, steps=5)
    _, of_weights = mg.value_and_metagrad(plain, objective)({"weights": mg.PerExample(weights)})
    (expected,) = pull_back(of_weights["weights"].value)
    np.testing.assert_allclose(found["rater"], expected, atol=1e-3 * float(jnp.abs(expected).max()))


def test_filters(tmp_path: Path):
    captions = [
        "a fine red ball",
        "ball",
        "ein schöner Ball",
        "12 34 5678 9",
        "猫 と 犬 です",
        "a b c",
        "A fine RED ball!",
    ]
    members = [digit(n, caption) for n, caption in enumerate(captions)]
    members.append([(f"{7:09d}.png", members[0][0][1]), *digit(7, "another caption")[1:]])
    write_tar(tmp_path / "0.tar", [m for of_pair in members for m in of_pair])
    pool = load_pool(tmp_path, 8)
    assert CaptionRules()(pool).tolist() == [True, False, True, False, False, False, True, False]
    assert CaptionRules(words=1, characters=1, letters=0)(pool).all()
    kept = without_duplicates(pool)
    assert kept.tolist() == [True] * 6 + [False, False]
    assert highest(np.array([0.1, 0.5, 0.5, -1]), 0.5).tolist() == [False, True, True, False]
    with pytest.raises(ConfigError, match="share"):
        highest(np.ones(3), 0)


def test_pairs_are_drawn_in_proportion_to_weights():
    weights = np.array([0.0, 0.3, 1.2, 0.0, 2.5, 0.0])
    for count in (4, 100):
        draws = np.array([drawn(weights, count, seed) for seed in range(400)])
        share = weights / weights.sum() * count
        assert (draws.sum(1) == count).all()
        assert ((draws >= np.floor(share)) & (draws <= np.ceil(share))).all()
        np.testing.assert_allclose(draws.mean(0), share, atol=0.1)
    assert drawn(np.ones(7, np.float32) / 3, 7, 1).tolist() == [1] * 7


def test_a_setting_is_chosen_by_its_recall_and_one_that_keeps_too_little_is_left_out():
    masks = [("a", np.arange(5) < 1), ("b", np.arange(5) < 3), ("c", np.arange(5) < 4)]
    found = chosen(masks, lambda name, rows: {"b": 0.2, "c": 0.1}[name], 2)
    assert (found.name, found.rows.tolist(), found.recall) == ("b", [0, 1, 2], 0.2)
    assert chosen(masks[2:], lambda name, rows: 1 / 0, 2).name == "c"
    with pytest.raises(ConfigError, match="fewer pairs than a batch"):
        chosen(masks[:1], lambda name, rows: 1.0, 2)


def test_figures_pair_arms_by_seed():
    def rows(*recalls: float) -> list[dict[str, float]]:
        return [{"recall": r, "image_to_text_at_1": r / 2} for r in recalls]

    measured = {"all": rows(0.1, 0.3), "random": rows(0.1, 0.2), "score": rows(0.2, 0.4), "subset": rows(0.3, 0.6)}
    found = figures(measured)
    assert found["gain_score"] == pytest.approx(0.1)
    assert found["gain_error_score"] == pytest.approx(0)
    assert found["error_score"] == pytest.approx(0.1)
    assert found["best_baseline_gain"] == pytest.approx(0.1)
    assert found["gain_ratio"] == pytest.approx(2.5)
    assert found["image_to_text_at_1_subset"] == pytest.approx(0.225)
    assert Arm(np.array([0, 2, 2]), np.array([0.5, 1, 2])).share(3).tolist() == [0.5, 0, 1]


def test_presets_are_read():
    tiny = parse("select-clip", ClipSelection(), ["--preset", "tiny"])
    assert tiny.recipe.size == 32
    paper = parse("select-clip", ClipSelection(), ["--preset", "paper-datacomp-small"])
    assert (paper.recipe.batch, paper.recipe.steps, paper.at, paper.meta_steps) == (4096, 3125, 2800, 40)
    assert paper.method == "counts"
    model = jax.eval_shape(PairTrainer(paper.recipe).model.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(model)) > 1.4e8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "needs --data"),
        ({"target_share": 1.0}, "target_share"),
        ({"meta_steps": 0}, "at least 1"),
        ({"score_steps": (99,)}, "score_steps"),
        ({"shares": (0.0,)}, "shares"),
        ({"method": "counts", "at": 11}, "at must be in"),
        ({"limit": 10}, "fewer than a batch"),
        ({"val": "absent.tar"}, r"absent\.tar is absent"),
        ({"recipe": replace(RECIPE, patch=3)}, "can't be halved"),
    ],
)
def test_settings_that_cannot_be_used_are_said_before_compute(data: Path, tmp_path: Path, changes, message):
    with pytest.raises(MetagradientError, match=message):
        run(replace(config(data, tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()
