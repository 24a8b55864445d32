"""What is installed: the names of the package, the files of wheel and sdist, and that both work elsewhere."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from itertools import chain
from pathlib import Path
from types import ModuleType

import pytest

import metagradient as mg
from metagradient import versions

ROOT = Path(__file__).parents[1]

TEN_LINES = """
import jax.numpy as jnp, optax, metagradient as mg

def loss(params, batch, z):
    return jnp.mean(z["weights"] * (batch["x"] @ params - batch["y"]) ** 2)

x, y = jnp.eye(4), jnp.arange(4.0)
batches = [{"x": x, "y": y, "index": jnp.arange(4)}] * 3
training = mg.Training.from_loss(loss, optax.sgd(0.5), jnp.zeros(4), batches)
objective = lambda state, z: jnp.sum((state.params - y) ** 2)
value, grad = mg.value_and_metagrad(training, objective)({"weights": mg.PerExample(jnp.ones(4))})
# Each parameter learns one example: y - s_3 = (1 - w / 4)^3 y, and so the derivative of its square.
assert jnp.allclose(grad["weights"].value, -1.5 * 0.75**5 * y**2), grad
print(mg.__file__, mg.__version__)
"""


def run(code: str, **settings: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **settings},
        cwd=settings.get("HOME"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_takes_no_jax():
    taken = run("import sys, metagradient; print(metagradient.__version__, *sys.modules)").split()
    assert taken[0] == mg.__version__
    assert {"metagradient"} == {name.partition(".")[0] for name in taken} & {"metagradient", "jax", "numpy", "rich"}


def test_every_public_name_is_there():
    names = "import metagradient as mg; print(*[name for name in mg.__all__ if getattr(mg, name, None) is None])"
    assert run(names) == "\n"
    assert set(mg.__all__) <= set(dir(mg))
    # A module binds its own name on the package when it is imported, over whatever was given by that name.
    modules = {path.stem for path in (ROOT / "src" / "metagradient").iterdir()}
    assert not {name for name in modules & set(mg.__all__) if not isinstance(getattr(mg, name), ModuleType)}


def test_type_checkers_see_the_names_that_are_given():
    tree = ast.parse((ROOT / "src" / "metagradient" / "__init__.py").read_text())
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {name.name: line.module for line in checked.body if isinstance(line, ast.ImportFrom) for name in line.names}
    assert sorted(seen) == sorted(mg.__all__)
    for name, module in seen.items():
        given = getattr(mg, name)
        if module != "metagradient":
            assert given is getattr(sys.modules[str(module)], name)


def test_an_unknown_name_is_named():
    with pytest.raises(AttributeError, match="'metagradient' has no attribute 'metagrads'"):
        mg.metagrads  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


def test_the_releases_that_were_tested_are_those_that_are_promised():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prefix = "Programming Language :: Python :: "
    assert [c.removeprefix(prefix) for c in project["classifiers"] if prefix in c] == list(versions.TESTED_PYTHON)
    assert project["requires-python"] == f">={versions.TESTED_PYTHON[0]}"
    (jax,) = (d for d in project["dependencies"] if d.startswith("jax"))
    assert jax.startswith(f"jax>={versions.TESTED_JAX[0]}.")
    oldest, newest = versions.TESTED_JAX[0], versions.TESTED_JAX[-1]
    assert versions.untested(f"{oldest}.2") is versions.untested(f"{newest}.0.1") is None
    newer = f"{newest}9.0"
    assert f"jax {newer} is none of the releases" in str(versions.untested(newer))


@pytest.mark.parametrize("python", [versions.TESTED_PYTHON[0], versions.TESTED_PYTHON[-1]])
def test_the_lock_pins_all_that_tests_and_linters_need(python: str):
    lock = ROOT / "requirements" / f"python{python}.txt"
    if not lock.parent.is_dir():
        pytest.skip("the lock is part of the repository, not of the sdist")
    text = lock.read_text()
    assert "://" not in text
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+) \\\n    --hash=sha256:", text, re.MULTILINE))
    assert len(pinned) == len(re.findall(r"^\w", text, re.MULTILINE))

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [project["dependency-groups"][name] for name in ("test", "lint")]
    extras = project["project"]["optional-dependencies"].values()
    needed = [*project["project"]["dependencies"], *chain(*extras), *chain(*groups)]
    for requirement in needed:
        name, _, exact = re.sub(r"\[.*?]", "", requirement).partition("==")
        name = re.split(r"[<>=~!;\s]", name)[0].lower()
        assert name == "metagradient" or name in pinned
        assert not exact or pinned[name] == exact


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of this checkout, and the wheel that is built from that sdist."""
    out = tmp_path_factory.mktemp("built")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_wheel_and_sdist_hold_what_they_should(built: Path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {
        "metagradient/py.typed",
        "metagradient/presets/demo/cifar10.toml",
        "metagradient/report/page.html.jinja",
    } <= held
    assert {name.split("/")[0] for name in held} == {"metagradient", f"metagradient-{mg.__version__}.dist-info"}

    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("*") if p.suffix == ".py" or "fixtures" in p.parts}
    needed = {"pyproject.toml", "README.md", "LICENSE", "src/metagradient/py.typed", "examples/example_weights.py"}
    assert needed | {p for p in ours if (ROOT / p).is_file() and "__pycache__" not in p} <= held


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_what_was_built_works_outside_the_repository(built: Path, tmp_path: Path, kind: str):
    (file,) = built.glob(kind)
    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(file)], check=True)
    place, number = run(TEN_LINES, PYTHONPATH=str(target), HOME=str(tmp_path)).split()
    assert Path(place).is_relative_to(target)
    assert number == mg.__version__
