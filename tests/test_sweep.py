"""Sweeps over recipes: what is measured, what is kept, what isn't run twice."""

import gc
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metagradient as mg
from metagradient.errors import ConfigError, StructureError
from metagradient.smoothness.sweep import Candidate, Outcome, Sweep, jointly, one_at_a_time, sweep

TARGET = np.linspace(-1, 1, 24)


class Maker:
    """Descent on a quadratic, rough where asked; counts what it made."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []

    def __call__(self, knobs: Any) -> Candidate:
        self.made.append(dict(knobs))

        def step(state: Any, batch: Any, z: Any) -> Any:
            noise = knobs["rough"] * jnp.sin(1e6 * z["weights"].sum() * jnp.arange(1, 25))
            return state - z["rate"] * (state - z["weights"].mean() * TARGET) + noise

        def z(rate: float) -> dict[str, Any]:
            return {"weights": mg.PerExample(jnp.ones(4)), "rate": jnp.asarray(rate)}

        def training(seed: int) -> mg.Training:
            return mg.Training(jnp.full(24, 1e-3 * seed), step, [{"index": jnp.arange(4)}] * 8)

        return Candidate(
            training=training,
            z=z,
            objective=lambda state, z: jnp.sum((state - TARGET) ** 2),
            accuracy=lambda state: float(np.mean(np.sign(state) == np.sign(TARGET))),
            directions=lambda z, seed: {"mine": [{"weights": mg.PerExample(jnp.arange(4.0)), "rate": jnp.zeros(())}]},
            gain=lambda training, rate: rate * knobs["rough"] + float(training.init[0]),
        )


OPTIONS: dict[str, Any] = {"rates": [0.1, 0.5, 40.0], "step": 0.1, "at_once": 1}


def test_each_recipe_is_probed_at_the_rate_that_suits_it(tmp_path: Path):
    found = sweep(Maker(), [{"rough": 0.0}, {"rough": 0.3}], file=tmp_path / "s.jsonl", **OPTIONS)
    tame, rough = found.outcomes
    assert tame.rate == 0.5
    assert min(v for v in tame.losses.values() if v is not None) == tame.losses["0.5"]
    assert tame.score == pytest.approx(1, abs=1e-4)
    assert rough.score < 0.5
    assert len(tame.accuracies) == 3
    assert tame.accuracy == pytest.approx(1)
    assert rough.gain == pytest.approx(0.3 * (rough.rate or 0))
    assert found.ranked("score")[0] is tame
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [line["knobs"] for line in lines] == [{"rough": 0.0}, {"rough": 0.3}]
    assert lines[0]["smoothness"]["rows"][0]["grade"] == "smooth"


def test_a_gain_is_the_mean_of_those_of_its_seeds():
    found = sweep(Maker(), [{"rough": 0.0}], gain_seeds=(100, 300), **OPTIONS).outcomes[0]
    assert found.gain == pytest.approx(0.2)
    assert sweep(Maker(), [{"rough": 0.0}], seed=400, **OPTIONS).outcomes[0].gain == pytest.approx(0.4)
    with pytest.raises(StructureError, match="gain_seeds"):
        sweep(Maker(), [{"rough": 0.0}], gain_seeds=(), **OPTIONS)


def test_compiled_programs_do_not_pile_up_over_recipes():
    live: list[int] = []

    def count(_: Outcome) -> None:
        gc.collect()
        live.append(len(jax.devices()[0].client.live_executables()))

    sweep(Maker(), [{"rough": 0.01 * i} for i in range(4)], progress=count, **OPTIONS)
    assert live[-1] <= live[0] + 3


def test_slack_takes_a_lower_rate_that_is_nearly_as_good():
    rates = [0.6, 0.5, 0.1]
    exact = sweep(Maker(), [{"rough": 0.0}], **{**OPTIONS, "rates": rates}).outcomes[0]
    near = sweep(Maker(), [{"rough": 0.0}], slack=1e-2, **{**OPTIONS, "rates": rates}).outcomes[0]
    assert (exact.rate, near.rate) == (0.6, 0.5)


def test_what_the_file_holds_is_not_run_again(tmp_path: Path):
    file, recipes = tmp_path / "s.jsonl", [{"rough": 0.0}, {"rough": 0.1}]
    first, told = Maker(), []
    whole = sweep(first, recipes, file=file, **OPTIONS)
    # The process was killed while it wrote the second line.
    text = file.read_text()
    file.write_text(text[:-40])
    second = Maker()
    again = sweep(second, recipes, file=file, progress=told.append, **OPTIONS)
    assert second.made == recipes[1:]
    assert told == again.outcomes
    assert again.outcomes[0] == whole.outcomes[0]
    assert again.outcomes[1].losses == whole.outcomes[1].losses
    assert len(file.read_text().splitlines()) == 2
    with pytest.raises(ConfigError, match="other settings"):
        sweep(Maker(), recipes, file=file, **{**OPTIONS, "step": 0.2})
    file.write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="line 1"):
        sweep(Maker(), recipes, file=file, **OPTIONS)


def test_a_recipe_that_diverges_is_an_outcome():
    found = sweep(Maker(), [{"rough": float(np.inf)}], **OPTIONS).outcomes[0]
    assert found.rate is None
    assert found.problem is not None
    assert found.accuracy == 0
    assert found.score == -np.inf


def test_the_front_holds_what_no_other_beats():
    def outcome(score: float, accuracy: float) -> Outcome:
        return Outcome({"s": score}, 0.1, {}, [accuracy], {"rows": [{"score": score}]}, None, None, 0.0)

    points = [(0.9, 0.5), (0.8, 0.6), (0.7, 0.55), (0.2, 0.7), (0.2, 0.4), (0.9, 0.45)]
    front = Sweep([outcome(*p) for p in points]).front
    assert [(o.score, o.accuracy) for o in front] == [(0.9, 0.5), (0.8, 0.6), (0.2, 0.7)]


def test_recipes_one_knob_at_a_time_and_jointly():
    base, choices = {"a": 1, "b": 2}, {"a": [1, 3], "b": [5]}
    assert one_at_a_time(base, choices) == [base, {"a": 3, "b": 2}, {"a": 1, "b": 5}]
    assert jointly(base, choices) == [{"a": 1, "b": 5}, {"a": 3, "b": 5}]


def test_a_sweep_over_nothing_is_refused():
    for recipes, rates, words in [([], [0.1], "at least one"), ([{}, {}], [0.1], "twice"), ([{}], [-0.1], "positive")]:
        with pytest.raises(StructureError, match=words):
            sweep(Maker(), recipes, rates=rates)
