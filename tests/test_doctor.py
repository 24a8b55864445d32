"""`metagradient doctor`, and commands without what they need."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from metagradient import doctor, versions
from metagradient.cli import main


def without(*libraries: str, command: str) -> subprocess.CompletedProcess[str]:
    """A command, in an interpreter that can't import some libraries."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({libraries})); "
        f"from metagradient.cli import main; sys.exit(main(['{command}']))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_doctor_says_what_is_here(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines()}
    for name in ("jax", "jaxlib", "optax", "numpy"):
        assert rows[name][0] == version(name)
    assert "cpu" in rows["devices"] or "x" in rows["devices"]
    assert "extras" in rows


def test_the_doctor_names_what_was_not_tested(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "TESTED_JAX", ("0.1", "0.2"))
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    number = version("jax")
    assert f"jax {number} is none of the releases that metagradient was tested with (0.1, 0.2): mg.check" in told
    assert any(line.split() == ["jax", number, "untested"] for line in told.splitlines())


def test_extras_lack_what_their_own_extras_lack():
    requirements = [
        "jax>=0.10.2",
        "pytest>=8; extra == 'tests'",
        'no-such-library<2,>=1; extra == "odd"',
        'metagradient[odd, tests]; extra == "all"',
    ]
    assert doctor.missing(requirements) == {"all": ["no-such-library"], "odd": ["no-such-library"], "tests": []}


def test_the_doctor_needs_neither_the_command_line_nor_jax():
    told = without("tyro", "tomli_w", "jax", command="doctor")
    assert told.returncode == 0
    assert "devices       none: ModuleNotFoundError" in told.stdout
    assert told.stderr == ""


@pytest.mark.parametrize("library", ["tyro", "tomli_w"])
@pytest.mark.parametrize("command", ["demo", "report"])
def test_a_command_without_its_extra_says_so_in_a_line(library: str, command: str):
    told = without(library, command=command)
    assert told.returncode == 2
    assert told.stdout == ""
    assert told.stderr == f"error: this needs the {library} library: pip install 'metagradient[cli]'\n"
