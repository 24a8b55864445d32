"""The examples do what their first lines say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from quick import slow_but

EXAMPLES = Path(__file__).parents[1] / "examples"


FRAMEWORKS = sorted(path.stem for path in (EXAMPLES / "frameworks").glob("*.py") if path.stem != "digits")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_learning_rate_schedule_lowers_the_loss():
    losses = load("learning_rate_schedule").main(meta_steps=8)
    assert losses[-1] < 0.5 * losses[0]


def test_example_weights_find_flipped_labels():
    assert load("example_weights").main() > 0.9


def test_hand_written_step_agrees_with_finite_differences():
    metagradient, differences = load("hand_written_step").main()
    assert metagradient == pytest.approx(differences, rel=2e-3)


# One of each way to carry a model, as parameters or as state too, is always run.
@pytest.mark.parametrize("name", slow_but(["haiku_model", "flax_nnx"], FRAMEWORKS))
def test_frameworks_find_flipped_labels(name, monkeypatch):
    """A fifth of the labels are wrong: of the most harmful examples, more than twice as many."""
    monkeypatch.syspath_prepend(EXAMPLES / "frameworks")
    assert load(f"frameworks/{name}").main() > 0.45
