"""`metagradient smoothness`: probes recipes, and tells."""

import json
import tomllib
from pathlib import Path

import pytest
from quick import carefully

from metagradient.cli import main, parse
from metagradient.tasks.classifier import ROUGH, Recipe
from metagradient.tasks.smoothness import Choices, SmoothnessProbe, load, probe
from metagradient.tasks.smoothness_page import name

SMALL = """
    --examples 200 --validation 100 --test 100 --rates 0.1 0.2 --directions 2 --accuracy-seeds 2 --gain-steps 1
    --cut-points 3 --recipe.widths 4 --recipe.batch 50 --recipe.steps 12 --no-standard --choices.pooling max
    --choices.norm-before-activation --choices.activation --choices.final-scale
""".split()  # noqa: SIM905


def test_recipes_of_digits_are_probed_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    with carefully():
        assert main(["smoothness", "--out", str(out), *SMALL]) == 0
    found = json.loads((out / "result.json").read_text())
    assert found["recipes"] == 2
    assert found["score_examples_smooth"] > 0.9
    assert found["smoothest"] == "smooth"
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [line["knobs"] for line in lines] == [{}, {"pooling": "max"}]
    assert all(line["rate"] in (0.1, 0.2) and len(line["accuracies"]) == 2 for line in lines)
    assert lines[0]["gain"] > 0
    assert {row["kind"] for row in lines[0]["smoothness"]["rows"]} == {"examples", "groups"}
    assert lines[0]["smoothness"]["finite"] is True
    page = (out / "report.html").read_text()
    assert "smooth, max pooling" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("<figure>") == 2  # too few recipes to correlate
    assert "smooth" in capsys.readouterr().out
    settings = tomllib.loads((out / "config.toml").read_text())
    assert settings["recipe"]["widths"] == [4]
    again = parse("smoothness", SmoothnessProbe(), ["--config", str(out / "config.toml")])
    assert again.recipe.widths == (4,)
    assert again.choices.activation == ()


@pytest.mark.slow
def test_the_standard_recipe_is_rough(tmp_path: Path):
    config = SmoothnessProbe(recipe=Recipe(widths=(8, 16), batch=100, steps=40), gain_images=0)
    with carefully():
        smooth, standard = probe(load(config), [{}, ROUGH], tmp_path / "s.jsonl")
    assert smooth.score > 0.8
    assert standard.score < smooth.score - 0.3


def test_presets_hold_the_settings_they_name():
    paper = parse("smoothness", SmoothnessProbe(), ["--preset", "paper"])
    assert paper.recipe.widths == (64, 128, 256, 512)
    assert paper.recipe.steps * paper.recipe.batch == 18 * paper.examples
    tiny = parse("smoothness", SmoothnessProbe(), ["--data", "somewhere"], with_data="tiny")
    assert tiny.shrink == 2
    assert tiny.data == Path("somewhere")
    assert tiny.recipe == Recipe(widths=(8, 16, 32), batch=250, steps=40)


def test_recipes_are_named_by_what_they_change():
    config = SmoothnessProbe(choices=Choices((False,), (), ("max",), (0.125,), batch=(500,)), standard=False)
    named = [name(r) for r in config.recipes()]
    assert named == [
        "smooth", "smooth, norm after the activation", "smooth, max pooling", "smooth, final scale 0.125",
        "smooth, batch 500",
    ]  # fmt: skip
    assert SmoothnessProbe(choices=Choices((), (), (), ())).recipes()[:2] == [{}, ROUGH]
    assert name(ROUGH) == "standard"
    assert name({"widths": [4, 8, 16]}) == name({"widths": (4, 8, 16)}) == "smooth, widths 4-8-16"
    assert name({k: v for k, v in ROUGH.items() if k != "pooling"} | {"batch": 500}) == (
        "standard, average pooling, batch 500"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--examples", "5000"], "only 1797 images"),
        (["--test", "0"], "at least 1"),
        (["--rates", "-1"], "positive"),
        (["--data", "nowhere"], "nowhere"),
        (["--recipe.batch", "900", "--rates", "0.1"], "at least a batch"),
    ],
)
def test_input_that_cannot_be_used_is_said_in_a_line(arguments, message, tmp_path, capsys):
    assert main(["smoothness", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
