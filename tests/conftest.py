import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from quick import MAPPINGS, mappings, quickly

from metagradient.step import programs

# Run by hand, where torch and transformers are installed.
collect_ignore = ["make_checkpoint_fixtures.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow tests run where they are asked for: `-m slow`, whatever else is asked for beside."""
    if "slow" not in config.option.markexpr:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


# Modules whose tests share no programs, or look at when those are freed.
OF_THEIR_OWN = {
    *("test_check", "test_examples_axis", "test_frameworks", "test_jax", "test_lifetimes", "test_optimizers"),
    *("test_queries", "test_rules", "test_slips", "test_sweep"),
}


MOST_MAPPINGS = 45_000


def pytest_configure() -> None:
    # Of what tracing makes, hardly anything is garbage.
    gc.set_threshold(50_000, 20, 20)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--optimised", action="store_true", help="compile every program as users do, which takes longer")


@pytest.fixture(autouse=True, scope="module")
def compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Programs compile quickly, but in modules marked `optimised`, which are about what the compiler makes of them."""
    if request.config.option.optimised or request.node.get_closest_marker("optimised"):
        jax.clear_caches()
        yield
    else:
        with quickly():
            yield


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_module(
    request: pytest.FixtureRequest, monkeypatch_module: pytest.MonkeyPatch, compiler: None
) -> Iterator[None]:
    """Tests of a module share compiled programs, as the steps of one owner would, and leave none to the next module.

    What JAX caches of them goes too once there are many: programs hold memory mappings, of which Linux allows a process
    some 65,000, and all of a suite's are more.
    """
    if request.module.__name__ not in OF_THEIR_OWN:
        monkeypatch_module.setattr(programs, "_LIVE", {})
    # What other modules left isn't looked through again.
    gc.collect()
    gc.freeze()
    yield
    monkeypatch_module.undo()
    if not MAPPINGS.exists() or mappings() > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    """A monkeypatch that lasts as long as a module."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Directory of a real data set by name; skips the test where it is absent."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    root = Path(os.environ.get("METAGRADIENT_DATA", beside))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"{root / name} is absent: set METAGRADIENT_DATA to a directory that holds {name}")
        return root / name

    return find
