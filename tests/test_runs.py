"""Run directories: begun, resumed, shown again from their files, compared."""

import json
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metagradient.run
from metagradient.cli import begun, main, parse
from metagradient.descent import journal
from metagradient.errors import ConfigError
from metagradient.step.segment import Segment
from metagradient.tasks.directory import RunDirectory
from metagradient.tasks.report import Report, run

pytestmark = pytest.mark.core

SMALL = {"examples": 300, "held-out": 100, "target": 100, "batch": 100, "steps": 12, "meta-steps": 3, "seeds": 1}
DEMO = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Inner:
    widths: tuple[int, ...] = (8, 16)
    scale: float = 1.0


@dataclass(frozen=True)
class Config:
    """A configuration."""

    out: Path | None = None
    data: Path | None = None
    seed: int = 0
    inner: Inner = field(default_factory=Inner)


def test_a_configuration_comes_back_from_its_directory(tmp_path: Path):
    config = Config(tmp_path / "run", Path("images"), 3, Inner((4, 2), 2.0))
    directory = RunDirectory.begin(tmp_path / "run", config, "probe")
    assert RunDirectory.read(directory.path) == directory
    assert directory.command == "probe"
    assert begun("probe", Config(), ["--resume", str(directory.path)]) == config
    again = parse("probe", Config(), ["--config", str(directory / "config.toml"), "--seed", "4"])
    assert again == Config(None, Path("images"), 4, Inner((4, 2), 2.0))
    with pytest.raises(ConfigError, match="not of metagradient other"):
        parse("other", Config(), ["--config", str(directory / "config.toml")])


def test_a_run_is_resumed_only_as_it_was_begun(tmp_path: Path):
    directory = RunDirectory.begin(tmp_path, Config(), "probe")
    for step in range(2):
        directory.record(step=step)
    assert RunDirectory.begin(tmp_path, Config(), "probe", resume=True).records == [{"step": 0}, {"step": 1}]
    with pytest.raises(ConfigError, match="other settings: seed"):
        RunDirectory.begin(tmp_path, Config(seed=1), "probe", resume=True)
    with pytest.raises(ConfigError, match="metagradient probe"):
        RunDirectory.begin(tmp_path, Config(), "other", resume=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        RunDirectory.begin(tmp_path, Config(), "probe")
    directory.result({"score": 1.0})
    with pytest.raises(ConfigError, match="finished run"):
        RunDirectory.begin(tmp_path, Config(), "probe", resume=True)


def test_a_run_is_made_once_and_gone_on_with_where_it_was_cut_off(tmp_path: Path):
    resumed = []

    def run(config: Config, *, resume: bool) -> None:
        assert config.out is not None
        directory = RunDirectory.begin(config.out, config, "probe", resume=resume)
        resumed.append(resume)
        if resume:
            directory.result({"score": config.seed})

    def finished(config: Config) -> RunDirectory:
        return RunDirectory.finished(tmp_path / "run", config, "probe", run)

    assert finished(Config(seed=3)).figures is None  # it was cut off
    with pytest.raises(ConfigError, match="other settings: seed"):
        finished(Config(seed=4))
    assert finished(Config(seed=3)).figures == {"score": 3}
    assert finished(Config(seed=3)).figures == {"score": 3}
    assert resumed == [False, True]
    with pytest.raises(ConfigError, match="other settings: seed"):
        finished(Config(seed=4))
    with pytest.raises(ConfigError, match="metagradient probe"):
        RunDirectory.finished(tmp_path / "run", Config(), "other", run)


@pytest.fixture(scope="module")
def one_segment():
    """Steps compiled in one way: what is measured can differ from run to run, and with it the last bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metagradient.run, "choose", lambda *_: Segment(1, "steps", "state"))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, one_segment: None) -> Path:
    out = tmp_path_factory.mktemp("runs") / "demo"
    assert main(["demo", "--out", str(out), *DEMO]) == 0
    return out


def test_a_run_that_was_killed_is_resumed_to_the_same_figures(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Killed(BaseException):
        pass

    calls, append = count(), journal.append_text

    def killed(path: Path, text: str) -> None:
        if next(calls) == 3:  # the record of the second meta-step, when its state is written already
            raise Killed
        append(path, text)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(journal, "append_text", killed)
        with pytest.raises(Killed):
            main(["demo", "--out", str(out), *DEMO])
    assert not (out / "result.json").exists()

    assert main(["report", str(out)]) == 0
    assert "not finished" in (out / "report.html").read_text()

    assert main(["demo", "--resume", str(out)]) == 0
    results = [json.loads((d / "result.json").read_text()) for d in (out, finished)]
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in results] == [
        {k: v for k, v in results[1].items() if k != "seconds"}
    ] * 2
    assert (out / "records.jsonl").read_bytes() == (finished / "records.jsonl").read_bytes()
    assert (np.load(out / "weights.npz")["weights"] == np.load(finished / "weights.npz")["weights"]).all()

    capsys.readouterr()
    assert main(["demo", "--resume", str(out)]) == 2
    assert "finished run" in " ".join(capsys.readouterr().err.split())


def test_a_report_is_made_again_from_files_alone(finished: Path, tmp_path: Path):
    page = (finished / "report.html").read_bytes()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in finished.iterdir():
        if file.name != "report.html":
            (moved / file.name).write_bytes(file.read_bytes())
    assert run(Report((moved,))) == [moved / "report.html"]
    assert (moved / "report.html").read_bytes() == page


def some_run(path: Path, command: str, values: list[float], **figures: Any) -> RunDirectory:
    directory = RunDirectory.begin(path, Config(seed=len(values)), command)
    for step, value in enumerate(values):
        directory.record(step=step, value=value, held_out=None, note="text")
    if figures:
        directory.result(figures)
    return directory


def test_several_runs_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    some_run(Path("a"), "probe", [3.0, 2.0, 1.0], score=0.25, only_here=7)
    some_run(Path("b"), "other", [4.0, 3.5], score=0.5)
    some_run(Path("c"), "other", [])
    assert main(["report", "a", "b", "c"]) == 0
    page = (tmp_path / "comparison.html").read_text()
    assert '<th scope="row">score</th><td>0.25</td><td>0.5</td><td></td>' in page
    assert '<th scope="row">only_here</th><td>7</td><td></td><td></td>' in page
    assert '<th scope="row">command</th><td>probe</td><td>other</td><td>other</td>' in page
    assert '<th scope="row">seed</th><td>3</td><td>2</td><td>0</td>' in page
    assert "inner.scale" not in page
    assert "value by meta-step: a from 3 to 1; b from 4 to 3.5." in page
    assert page.count("<figure>") == 1
    plain = (tmp_path / "a" / "report.html").read_text()
    assert '<th scope="row">inner.widths</th><td>[8, 16]</td>' in plain
    assert main(["report", "a", "b", "--out", "ab.html"]) == 0
    assert (tmp_path / "ab.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report"], "needs run directories"),
        (["report", "nowhere"], "nowhere is no run directory"),
        (["report", "somewhere", "--out", "x.html"], "several runs"),
        (["report", "one", "two", "--out", "nowhere/x.html"], "no such directory"),
        (["demo", "--resume", "nowhere"], "nowhere is no run directory"),
        (["demo", "--resume", "nowhere", "--seed", "1"], "leave out --seed 1"),
    ],
)
def test_what_cannot_be_shown_or_resumed_is_said_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_of_another_command_is_not_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    some_run(tmp_path / "run", "probe", [1.0])
    assert main(["demo", "--resume", str(tmp_path / "run")]) == 2
    assert "metagradient probe" in " ".join(capsys.readouterr().err.split())
