"""The command line and its main job."""

import json
import tomllib
from pathlib import Path

import numpy as np
import pytest

from metagradient.cli import main

SMALL = [
    "--examples",
    "600",
    "--held-out",
    "200",
    "--steps",
    "60",
    "--batch",
    "100",
    "--meta-steps",
    "6",
    "--seeds",
    "2",
]
FIGURES = {
    "auroc_flipped",
    "accuracy_all",
    "accuracy_random",
    "accuracy_target",
    "accuracy_mgd",
    "accuracy_clean",
    "seconds",
    "training_runs",
}


def result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def test_the_demo_finds_flipped_labels_and_fills_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "run"
    assert main(["demo", "--out", str(out), *SMALL]) == 0
    found = result(out)
    assert set(found) >= FIGURES
    assert found["auroc_flipped"] > 0.8
    assert found["accuracy_random"] < found["accuracy_mgd"]
    assert found["accuracy_all"] < found["accuracy_clean"]
    # Six meta-steps, each of a run, its adjoint (three runs' worth), and the rehearsal of its first segment.
    assert 6 * 4 < found["training_runs"] < 6 * 4.4
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(6))
    assert records[-1]["value"] < records[0]["value"]
    saved = np.load(out / "weights.npz")
    assert saved["weights"].shape == (600,)
    assert saved["weights"][saved["given"] != saved["true"]].mean() < saved["weights"].mean()
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    assert "AUROC" in capsys.readouterr().out

    # The configuration that it wrote makes the same run again (but for what is measured: seconds, and how to step).
    again = tmp_path / "again"
    assert main(["demo", "--config", str(out / "config.toml"), "--out", str(again)]) == 0
    measured = {"seconds", "training_runs"}
    assert {k: v for k, v in result(again).items() if k not in measured} == {
        k: v for k, v in found.items() if k not in measured
    }
    assert tomllib.loads((out / "config.toml").read_text())["steps"] == 60


@pytest.mark.slow
def test_the_demo_runs_on_named_images(tmp_path: Path, shared_data):
    data = str(shared_data("cifar10"))
    sizes = ["--examples", "300", "--target", "100", "--held-out", "100", "--batch", "50", "--steps", "6"]
    few = ["--meta-steps", "2", "--seeds", "1", "--width", "4"]
    assert main(["demo", "--data", data, "--out", str(tmp_path / "run"), *sizes, *few]) == 0
    assert set(result(tmp_path / "run")) >= FIGURES
    settings = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert settings["learning_rate"] == 0.01  # the preset's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--preset", "huge"], "no preset 'huge'"),
        (["demo", "--config", "absent.toml"], "absent.toml"),
        (["demo", "--examples", "5000"], "only 1797 images"),
        (["demo", "--target", "10"], "at least a batch"),
        (["demo", "--data", "nowhere"], "nowhere"),
    ],
)
def test_input_that_cannot_be_used_is_said_in_a_line(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_directory_that_holds_a_run_is_left_alone(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("seed = 1")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds a run already" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "config.toml").read_text() == "seed = 1"


def test_an_unknown_setting_in_a_file_is_named(tmp_path, capsys):
    (tmp_path / "c.toml").write_text("stepz = 3")
    assert main(["demo", "--config", str(tmp_path / "c.toml")]) == 2
    assert "stepz" in capsys.readouterr().err


def test_usage_lists_the_commands(capsys):
    assert main([]) == 0
    assert "demo" in capsys.readouterr().out
    assert main(["dance"]) == 2


def test_plan_prices_hardware_that_is_not_here(capsys):
    assert main(["plan", "--preset", "adam-8b"]) == 0
    printed = capsys.readouterr().out
    assert "disk" in printed
    assert main(["plan", "--preset", "adam-8b", "--device", "200GB"]) == 2
    assert "smallest" in " ".join(capsys.readouterr().err.split())
    assert main(["plan", "--steps", "10"]) == 2
    assert "--state-bytes" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["paper-datacomp-small", "paper-ift"])
def test_plan_prices_a_published_setting(preset, capsys):
    assert main(["plan", "--preset", preset]) == 0
    printed = capsys.readouterr().out
    assert "before it:" in printed
    assert ("40 of them" in printed) == (preset == "paper-datacomp-small")


def test_plan_prices_a_window_and_several_meta_steps(capsys):
    sizes = ["--steps", "100", "--state-bytes", "1MB", "--step-seconds", "2", "--device", "1GB"]
    assert main(["plan", *sizes, "--window", "10", "--meta-steps", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("10 steps and adjoint steps")
    assert "before it: 90 plain steps, 3.0 min" in printed
    # An adjoint step takes 2.41 plain steps.
    assert "3 of them: 12.4 min" in printed or "3 of them: 12.7 min" in printed, printed
    assert main(["plan", *sizes, "--window", "101"]) == 2
    assert "--window must be from 1 to the 100 steps" in " ".join(capsys.readouterr().err.split())
