"""Instruction selection: exact gradients through tunings, LESS beside plain loops, measures, and whole small runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import slow_but

import metagradient as mg
from metagradient.data.chat import TEMPLATES, Encoded, encode
from metagradient.data.instructions import Instruction, Message, read, write
from metagradient.data.vocabulary import trained
from metagradient.descent.journal import read_lines
from metagradient.errors import ConfigError, DataError
from metagradient.models import Decoder, checkpoints
from metagradient.report.page import render
from metagradient.step.segment import SINGLE_STEPS
from metagradient.tasks import less
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.finetuning import FineTuning, Tuner
from metagradient.tasks.instruction_data import Prepared, Sources
from metagradient.tasks.instruction_descent import CHOSEN
from metagradient.tasks.instruction_page import figures, page
from metagradient.tasks.instruction_selection import InstructionSelection, run
from metagradient.tasks.pretraining import Pretraining

pytest.importorskip("tokenizers")

PLAIN = TEMPLATES["plain"]
SMALL = Decoder(
    vocab_size=300,
    hidden_size=12,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    rematerialise=False,
)
RECIPE = FineTuning(length=16, batch=4, steps=4, learning_rate=0.02, evaluation_batch=5)
LORA = replace(RECIPE, lora_rank=2, lora_targets=("q_proj", "o_proj", "up_proj"))


def asked(number: int, question: str, answer: str, **extra: Any) -> Instruction:
    messages = (Message("user", question), Message("assistant", answer))
    return Instruction("d", f"q{number}", messages, {"task": "t", **extra})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return trained(["count the days of the week, one to seven"], 300, PLAIN.marks)


@pytest.fixture(scope="module")
def pool(tokenizer: Any) -> Encoded:
    words = ["yes", "no", "seven", "the days of the week"]
    return encode([asked(i, f"count {i}", words[i % 4]) for i in range(12)], tokenizer, PLAIN, RECIPE.length)


def tuner(recipe: FineTuning, dtype: str = "float32") -> Tuner:
    return Tuner(recipe, SMALL, SMALL.init(jax.random.key(0), dtype)[0])


def in_double(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def started(tuner: Tuner) -> Any:
    """Trained parameters in double precision, adapters that aren't zero."""
    moved = jax.tree.map(lambda x: x + 0.05, tuner.initial(0)) if tuner.lora else tuner.start
    return in_double(moved)


@pytest.mark.parametrize(
    ("of", "recipe"),
    slow_but(["counts"], [("weights", RECIPE), ("counts", LORA)]),
    ids=["weights", "counts, lora"],
)
def test_metagradients_through_a_tuning_are_those_of_the_unrolled_run(of: str, recipe: FineTuning, pool: Encoded):
    with jax.enable_x64(True):
        tuned = tuner(recipe, "float64")
        double = Encoded(pool.tokens, pool.targets, pool.weights.astype(np.float64), pool.used, pool.cut)
        start = started(tuned)
        ids = np.repeat(np.arange(12), np.arange(12) % 3)
        training = tuned.training(double, 3, rows=None if of == "weights" else ids)
        training = mg.Training.from_loss(tuned._loss, tuned.optimizer, start, training.batches, args=tuned.args)
        objective, at = tuned.mean_loss(double.take(np.arange(5))), 1
        last, whole = (double.take(rows).arrays for rows in (np.arange(5), np.arange(12)))

        def unrolled(z: jax.Array) -> jax.Array:
            params, moments = start, tuned.optimizer.init(start)
            for t in range(recipe.steps):
                batch = training.batches[t]

                def loss(params: Any, batch: Any = batch, t: int = t) -> jax.Array:
                    losses = tuned.losses(params, None, batch, tuned.args)
                    if of == "weights":
                        return jnp.mean(z[batch["index"]] * losses)
                    return jnp.mean(losses) + (z @ tuned.losses(params, None, whole, tuned.args) if t == at else 0)

                updates, moments = tuned.optimizer.update(jax.grad(loss)(params), moments, params)
                params = optax.apply_updates(params, updates)
            return tuned.losses(params, None, last, tuned.args).mean()

        if of == "weights":
            weights = jnp.linspace(0.5, 1.5, 12)
            expected = jax.jit(jax.grad(unrolled))(weights)
            z = {"weights": mg.PerExample(weights)}
            found = mg.value_and_metagrad(training, objective)(z)[1]["weights"].value
        else:
            counts = {"counts": mg.PerExample(jnp.asarray(np.arange(12) % 3, jnp.float64))}
            surrogate = mg.CountSurrogate(
                lambda counts: training, tuned.candidates(double), tuned.losses, at, tuned.args
            )
            expected = jax.jit(jax.grad(unrolled))(jnp.zeros(12))
            found = surrogate.evaluate(objective, counts)[0].grad["counts"].value
        scale = float(jnp.abs(expected).max())
        assert scale > 1e-5
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * max(1, scale))


def test_frozen_parameters_are_in_no_state_and_in_every_batch_by_reference(pool: Encoded):
    tuned = tuner(LORA)
    training = tuned.training(pool, 0)
    shapes = {leaf.shape for leaf in jax.tree.leaves(training.initial({}))}
    assert (300, 12) not in shapes
    assert training.args["embed_tokens"]["weight"] is tuned.start["embed_tokens"]["weight"]


def test_scores_are_losses_and_what_greedy_decoding_says(pool: Encoded, tokenizer: Any):
    tuned = tuner(replace(RECIPE, steps=60))
    rows = np.arange(8)
    state = mg.train(tuned.training(pool, 0, rows=rows), {})
    losses, shares, exact = tuned.scores(state.params, pool)
    np.testing.assert_allclose(losses, tuned.losses(state.params, None, pool.arrays), rtol=2e-4, atol=1e-5)
    assert exact[:8].any()
    apply = jax.jit(lambda tokens: SMALL.apply(state.params, {}, tokens)[0])
    for row in range(len(pool)):
        (learnt,) = np.nonzero(pool.weights[row])
        tokens = pool.tokens[row].copy()
        tokens[learnt[0] + 1 :] = 0
        said = []
        for place in learnt:
            logits = apply(tokens[None])[0, place]
            said.append(int(jnp.argmax(logits)))
            if place + 1 < len(tokens):
                tokens[place + 1] = said[-1]
        assert exact[row] == (said == pool.targets[row][learnt].tolist())
        likeliest = np.asarray(apply(pool.tokens[row][None])[0].argmax(-1))
        assert shares[row] == pytest.approx(np.mean((likeliest == pool.targets[row])[learnt]), abs=1e-6)
    value = float(tuned.mean_loss(pool)(state, {}))
    assert value == pytest.approx(float(losses.mean()), rel=1e-5)


def test_choices_ask_for_the_likeliest_answer_of_a_task(tokenizer: Any):
    def part(numbers: range, task: str, answers: list[str]) -> list[Instruction]:
        return [asked(n, f"count {n}", answers[n % len(answers)], task=task) for n in numbers]

    test = part(range(6), "few", ["yes", "no", "seven"]) + part(range(20, 40), "many", [str(n) for n in range(20)])
    sources = Sources(test, test[:3], test[3:6], test, {})
    task = Prepared(sources, tuner(replace(RECIPE, steps=150)), tokenizer, PLAIN)
    choices = task.choices
    assert choices is not None
    assert len(choices.encoded) == 18
    assert choices.right.sum() == 6
    np.testing.assert_array_equal(np.unique(choices.question), np.arange(6))
    state = mg.train(task.tuner.training(task.pool, 0, rows=np.arange(6)), {})
    assert choices.right_ones(task.tuner, state.params).all()
    likelihoods = -task.tuner.scores(state.params, choices.encoded)[0] * choices.encoded.answers
    start = choices.right_ones(task.tuner, task.tuner.start)
    assert not start.all()
    assert likelihoods[choices.right].min() > -3


# LESS


@pytest.mark.parametrize("recipe", [RECIPE, LORA], ids=["all parameters", "lora"])
def test_less_projects_gradients_and_adams_steps(recipe: FineTuning, pool: Encoded):
    tuned = tuner(recipe)
    ((state, _), (later, rate)) = less.warmed_up(tuned, pool, 0.7, 2, seed=0)
    assert int(later.step) == 2 * int(state.step) == 4
    # Trained once, and the bits of a training of the first epoch alone.
    rows = np.random.default_rng((0, 7)).choice(len(pool), round(0.7 * len(pool)), replace=False)
    whole = Tuner(replace(recipe, steps=4), tuned.model, tuned.start).training(pool, 0, rows=rows)
    alone = mg.train(replace(whole, batches=[whole.batches[t] for t in range(2)]), {}, segment=SINGLE_STEPS)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a, b)
    assert rate > 0
    size = sum(leaf.size for leaf in jax.tree.leaves(later.params))
    random = np.random.default_rng((5, 8))
    places, signs = random.integers(0, 64, size), random.choice(np.array([-1, 1], np.float32), size)

    def flat(tree: Any) -> np.ndarray:
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    adam = later.opt_state[0]
    for by_adam in (False, True):
        found = less._projected(tuned, later, pool, 64, 5, by_adam=by_adam)
        gradients = jax.jit(jax.grad(lambda p, b: tuned.losses(p, None, b, tuned.args)[0]))
        for row in (0, 3):
            batch = pool.take([row]).arrays
            gradient = flat(gradients(later.params, batch))
            if by_adam:
                mean, square = 0.9 * flat(adam.mu) + 0.1 * gradient, 0.99 * flat(adam.nu) + 0.01 * gradient**2
                gradient = mean / np.sqrt(square + recipe.eps_root)
            expected = np.zeros(64, np.float32)
            np.add.at(expected, places, signs * gradient)
            np.testing.assert_allclose(found[row], expected, rtol=1e-3, atol=2e-3 * np.abs(expected).max())


def test_less_prefers_what_answers_like_the_target(tokenizer: Any):
    words = ["yes", "the days of the week"]
    candidates = encode([asked(i, f"count {i}", words[i % 2]) for i in range(40)], tokenizer, PLAIN, 16)
    target = encode([asked(i, f"days {i}", "yes") for i in range(6)], tokenizer, PLAIN, 16)
    tuned = tuner(RECIPE)
    warm = less.warmed_up(tuned, candidates, 0.5, 2, seed=0)
    scores = less.scores(tuned, candidates, target, [np.arange(3), np.arange(3, 6)], warm, dimension=512, seed=0)
    assert np.mean(np.argsort(-scores)[:20] % 2 == 0) >= 0.9


# Whole runs


def test_figures_pair_arms_with_mgd_by_seed():
    rows = {"mgd": [1.0, 2.0], "less": [1.5, 2.3], "before": [4.0]}
    lines = [
        {"arm": arm, "seed": -1 if arm == "before" else seed, "loss": loss, "accuracy": loss / 10}
        for arm, losses in rows.items()
        for seed, loss in enumerate(losses)
    ]
    found = figures(lines)
    assert found["loss_less"] == pytest.approx(1.9)
    assert found["behind_less"] == pytest.approx(0.4)
    assert found["error_behind_less"] == pytest.approx(0.1)
    assert found["error_loss_before"] == 0
    assert "behind_mgd" not in found
    assert "choice_less" not in found


TINY = InstructionSelection(
    candidates=240,
    aim=4,
    tests=3,
    share=0.1,
    meta_steps=2,
    drawn=0.5,
    exchanged=5,
    choosing=2,
    less_epochs=1,
    less_share=0.2,
    less_dimension=64,
    fresh=2,
    tuning=FineTuning(length=32, batch=8, steps=8, learning_rate=3e-3),
    small=Pretraining(
        vocabulary=400, hidden_size=16, layers=1, heads=2, intermediate_size=24, length=32, batch=8, steps=20
    ),
)
ARMS = ("all", "random", "length", "embedding", "less", "mgd")


@pytest.fixture(scope="module")
def finished(shared_data, tmp_path_factory) -> tuple[InstructionSelection, dict[str, float]]:
    out = tmp_path_factory.mktemp("selection") / "run"
    config = replace(TINY, data=shared_data("instructions"), out=out)
    return config, run(config)


def test_a_run_selects_at_its_budget_and_measures_every_arm(finished):
    config, found = finished
    out = config.out
    for arm in ARMS:
        assert np.isfinite([found[f"loss_{arm}"], found[f"error_loss_{arm}"], found[f"choice_{arm}"]]).all()
    assert found["loss_all"] < found["loss_before"]
    chosen, summary = read(out / "selected.jsonl")
    assert not summary.skipped
    assert sum(one.extra["count"] for one in chosen) == found["selected"] == 24
    assert len(chosen) == found["different"]
    pool = {one.id: one for one in read(config.data / "pool.jsonl", limit=240)[0]}
    assert all(one.messages == pool[one.id].messages for one in chosen)
    with np.load(out / "selections.npz") as stored:
        assert len(stored["counts"]) == 240
        assert len(set(stored["rows_less"].tolist())) == 24
        assert len(stored["rows_length"]) == 24
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert all(np.isfinite(r["held_out"]) and r["grad_norm"] > 0 for r in records)
    tried = read_lines(out / CHOSEN)
    losses = {step: [t["held_out"] for t in tried if t["step"] == step] for step in {t["step"] for t in tried}}
    assert 2 in losses
    assert {len(of_step) for of_step in losses.values()} == {config.choosing}
    assert found["meta_step"] == min(losses, key=lambda step: np.mean(losses[step]))
    html = (out / "report.html").read_text()
    assert "LESS" in html
    assert "<script" not in html
    assert html == render(page(RunDirectory.read(out)))


def test_a_run_that_was_killed_comes_to_the_same(finished):
    config, found = finished
    out = config.out
    (out / "result.json").unlink()
    lines = (out / "trained.jsonl").read_text().splitlines(keepends=True)
    (out / "trained.jsonl").write_text("".join(lines[:-2]) + lines[-2][:-9])
    again = run(config, resume=True)
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in found.items() if k != "seconds"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["counts", "weights"])
def test_the_other_methods_run_with_adapters_on_a_model_from_a_directory(method: Any, finished, tmp_path: Path):
    config, _ = finished
    tuning = replace(config.tuning, lora_rank=2)
    again = replace(config, out=tmp_path / "run", model=config.out / "start", method=method, tuning=tuning, fresh=1)
    found = run(replace(again, meta_steps=1, choices=False, candidates=160, share=0.15))
    assert not (tmp_path / "run" / "start").exists()
    assert "choice_mgd" not in found
    with np.load(tmp_path / "run" / "selections.npz") as stored:
        counts = stored["counts"]
    if method == "weights":
        assert (counts.sum(), counts.max()) == (24, 1)
    else:
        # A move more for each meta-step.
        assert counts.max() <= 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "--data must name"),
        ({"aim": 30}, "30 development"),
        ({"meta_steps": 0}, "at least 1"),
        ({"share": 0.0}, r"share must be in \(0, 1\]"),
        ({"share": 0.01}, "doesn't hold a batch"),
        ({"at": 1.0}, "at must leave a step"),
        ({"template": "vicuna"}, "no template 'vicuna'"),
        ({"method": "magic"}, "exchange, counts or weights"),
    ],
)
def test_settings_that_cannot_be_met_are_said_before_compute(changes: dict, message: str, shared_data, tmp_path: Path):
    config = replace(TINY, data=shared_data("instructions"), out=tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        run(replace(config, **changes))
    assert not (tmp_path / "run").exists()


def test_models_and_data_that_cannot_be_read_are_said_before_compute(shared_data, tmp_path: Path):
    config = replace(TINY, data=shared_data("instructions"), out=tmp_path / "run")
    with pytest.raises(DataError, match="neither a model's directory"):
        run(replace(config, model=tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"targets/mmlu\.jsonl"):
        run(replace(config, target="mmlu"))
    checkpoints.save(SMALL, SMALL.init(jax.random.key(0))[0], tmp_path / "model")
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        run(replace(config, model=tmp_path / "model"))
    data = tmp_path / "data"
    (data / "targets").mkdir(parents=True)
    write(data / "pool.jsonl", [asked(i, "a", "b") for i in range(9)])
    write(data / "targets" / "bbh.jsonl", [asked(i, "a", "b", split="dev") for i in range(9)])
    with pytest.raises(ConfigError, match="0 test questions"):
        run(replace(config, data=data))
    assert not (tmp_path / "run").exists()
