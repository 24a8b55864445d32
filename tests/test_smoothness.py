"""Metasmoothness against closed forms, numpy, and what noise must read."""

import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import EXAMPLES, with_optimiser

import metagradient as mg
from metagradient.errors import NonFiniteError, StructureError
from metagradient.smoothness.measures import bootstrap, noise_scores, sign_agreement


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def definition_2(theta_0: np.ndarray, theta_h: np.ndarray, theta_2h: np.ndarray) -> float:
    total, score = sum(abs(c - a) for a, c in zip(theta_0, theta_2h, strict=True)), 0.0
    for a, b, c in zip(theta_0, theta_h, theta_2h, strict=True):
        score += float(np.sign(b - a)) * abs(c - a) / total * float(np.sign(c - b))
    return score


def along(v: Any, z: Any = 0.0, objective: Any = None) -> dict[str, Any]:
    """A bare z and one direction in it."""
    return {
        "objective": objective,
        "z": jnp.asarray(z, jnp.float64),
        "directions": {"given": [jnp.asarray(v, jnp.float64)]},
    }


def shaped_by(theta: Any, size: int) -> mg.Training:
    """A run of one step that ends at theta(z)."""
    return mg.Training(jnp.zeros(size), lambda state, batch, z: theta(z), [{}])


def test_a_run_linear_in_z_reads_one_and_its_curvature_is_the_objectives():
    rng = np.random.default_rng(0)
    matrix, v = rng.normal(size=(70, 3)), rng.normal(size=3)
    training = mg.Training(jnp.ones(70), lambda s, b, z: 0.9 * s + jnp.asarray(matrix) @ z, [{}] * 5)
    found = mg.metasmoothness(training, **along(v, np.ones(3), lambda s, z: jnp.sum(s**2)), step=[0.1, 0.4])
    jacobian = matrix * sum(0.9**t for t in range(5))
    for row in found.rows:
        assert row.score == pytest.approx(1, abs=1e-12)
        assert row.curvature == pytest.approx(2 * np.sum((jacobian @ v) ** 2), rel=1e-9)
        assert row.grade == "smooth"
    assert found.finite is True
    assert found.verdict.startswith("smooth")


def test_a_kink_reads_what_the_formula_says():
    kinks = np.linspace(-0.3, 0.6, 10)
    found = mg.metasmoothness(shaped_by(lambda z: jnp.abs(z - jnp.asarray(kinks)), 10), **along(1.0), step=0.2)
    expected = definition_2(*(np.abs(far - kinks) for far in (0, 0.2, 0.4)))
    assert 0 < expected < 0.99
    assert found.rows[0].scores == pytest.approx([expected], abs=1e-12)


def test_noise_with_independent_movements_reads_the_null_of_its_own_run():
    rng = np.random.default_rng(1)
    # Heavy tails, so that no textbook constant would do: the null is this run's.
    first, second = rng.standard_t(3, size=(2, 4000))
    found = mg.metasmoothness(shaped_by(lambda z: first * (z > 0.05) + second * (z > 0.15), 4000), **along(1.0))
    row = found.rows[0]
    assert abs(row.score - row.null) < 2 * (row.null_high - row.null) < 0.1
    assert 0.25 < row.null < 0.6
    # Other noise: end points that know nothing of each other.
    rate = 1e6 * (1 + rng.random(4000))
    found = mg.metasmoothness(shaped_by(lambda z: jnp.sin(rate * jnp.exp(z)), 4000), **along(1.0))
    assert found.rows[0].score == pytest.approx(0, abs=0.05)
    assert found.rows[0].grade == "no smoother than noise"
    assert "no smoother than noise" in found.verdict


def test_the_null_is_the_mean_over_all_signs():
    a, b = np.array([1.0, 2.0, 0.5]), np.array([0.7, 2.5, 3.0])
    rng = np.random.default_rng(0)
    drawn = np.concatenate([noise_scores([a[:2], a[2:]], [b[:2], b[2:]], rng) for _ in range(30)])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 6)).reshape(6, -1).T
    # Magnitudes change places within their leaf only.
    exact = np.mean([sign_agreement(s[:3] * a, s[3:] * b[order]) for s in signs for order in ([0, 1, 2], [1, 0, 2])])
    assert drawn.mean() == pytest.approx(exact, abs=4 * drawn.std() / len(drawn) ** 0.5)
    assert abs(exact) > 0.2


@pytest.mark.parametrize("kind", ["weights", "temperature", "ridge"])
def test_a_training_on_digits_reads_what_numpy_makes_of_its_runs(kind: str):
    problem = with_optimiser("momentum")
    training, z = problem.training(), problem.z
    draws = mg.smoothness.random_directions(z, 2, seed=3)
    only = [{k: x if k == kind else jax.tree.map(jnp.zeros_like, x) for k, x in v.items()} for v in draws["normal"]]
    found = mg.metasmoothness(training, problem.objective, z, directions={kind: only}, step=0.05)

    def trained(v: Any, far: float) -> tuple[np.ndarray, float]:
        at = jax.tree.map(lambda x, d: jnp.asarray(x + far * d), z, v)
        state = mg.train(training, at)
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)]), float(problem.objective(state, at))

    for number, v in enumerate(only):
        (p0, f0), (p1, f1), (p2, f2) = (trained(v, far) for far in (0, 0.05, 0.1))
        assert found.rows[0].scores[number] == pytest.approx(definition_2(p0, p1, p2), abs=1e-6)
        assert found.rows[0].curvatures is not None
        assert found.rows[0].curvatures[number] == pytest.approx(abs(f2 - 2 * f1 + f0) / 0.05**2, rel=1e-4)
    assert found.trainings == 5


def test_every_kind_of_direction_shares_the_run_at_z_and_whole_is_plain_data():
    problem = with_optimiser("sgd")
    groups = np.arange(EXAMPLES) % 4
    found = mg.metasmoothness(
        problem.training(), problem.objective, problem.z, directions=2, step=(0.05, 0.1), groups=groups
    )
    assert [(r.kind, r.step) for r in found.rows] == [
        (kind, h) for kind in ("normal", "examples", "groups") for h in (0.05, 0.1)
    ]
    assert found.trainings == 1 + 3 * 2 * 3
    plain = json.loads(found.to_json())
    assert plain["rows"][4]["kind"] == "groups"
    assert plain["verdict"] == found.verdict
    printed = str(found)
    assert "groups" in printed
    assert "metagradient: finite" in printed
    assert found.worst.score == min(r["score"] for r in plain["rows"])


def test_directions_are_what_they_say():
    z = {"w": mg.PerExample(jnp.ones(40)), "lr": mg.Shared(jnp.ones(()))}
    drawn = mg.smoothness.random_directions(z, 3, groups=np.arange(40) % 2, share=0.25, seed=1)
    for v in drawn["examples"]:
        assert sorted(np.unique(v["w"].value)) == [0, 1]
        assert v["w"].value.sum() == 10
        assert v["lr"].value == 0
    assert len(drawn["groups"]) == 2  # no group twice
    for v in drawn["groups"]:
        assert len(set(np.flatnonzero(v["w"].value) % 2)) == 1
        assert v["w"].value.sum() == 20
    assert float(drawn["normal"][0]["lr"].value) != 0


def test_theta_is_what_definition_2_watches():
    def step(state: dict, batch: Any, z: Any) -> dict:
        return {"tame": z * jnp.arange(1.0, 4), "wild": jnp.sin(1e6 * z * jnp.arange(1.0, 4))}

    training = mg.Training({"tame": jnp.zeros(3), "wild": jnp.zeros(3)}, step, [{}])
    assert mg.metasmoothness(training, **along(1.0), theta=lambda s: s["tame"]).rows[0].score == 1
    assert mg.metasmoothness(training, **along(1.0)).rows[0].score < 0.9


def test_a_smooth_run_without_a_finite_metagradient_is_found_out():
    # The root's derivative is infinite where its argument starts, though parameters move along a line.
    def step(state: jax.Array, batch: Any, z: Any) -> jax.Array:
        return state + z + jnp.sqrt(0 * z)

    training = mg.Training(jnp.zeros(3), step, [{}])
    found = mg.metasmoothness(training, **along(1.0, 1.0, lambda s, z: s.sum()))
    assert found.rows[0].score == 1
    assert found.finite is False
    assert "isn't finite" in found.verdict


def test_intervals_hold_the_mean_and_need_two_directions():
    rng = np.random.default_rng(0)
    low, high = bootstrap(np.array([0.2, 0.5, 0.9]), rng) or (0, 0)
    assert 0.2 <= low < 1.6 / 3 < high <= 0.9
    assert bootstrap(np.array([0.5]), rng) is None


def test_input_that_cannot_be_probed_is_refused_before_a_step():
    def never(*_: Any) -> Any:
        raise AssertionError("a step was traced")

    training = mg.Training(jnp.zeros(3), never, [{}])
    z = {"w": mg.PerExample(jnp.ones(4))}
    for options, words in [
        ({"step": 0.0}, "positive"),
        ({"step": []}, "positive"),
        ({"step": float("nan")}, "positive"),
        ({"directions": 0}, "at least one direction"),
        ({"groups": np.arange(3)}, r"int\[4\]"),
        ({"groups": np.ones(4)}, r"int\[4\]"),
        ({"directions": {}}, "at least one kind"),
        ({"directions": {"mine": []}}, "at least one"),
        ({"directions": {"mine": [jnp.ones(4)]}}, "not like z"),
        ({"directions": {"mine": [{"w": mg.PerExample(jnp.zeros(4))}]}}, "is zero"),
        ({"directions": {"mine": [z]}, "groups": np.arange(4)}, "not both"),
        ({"theta": lambda s: ()}, "nothing to watch"),
        ({"objective": lambda s, z: s}, "floating scalar"),
    ]:
        with pytest.raises(StructureError, match=words):
            mg.metasmoothness(training, **{"objective": None, "z": z, **options})
    with pytest.raises(StructureError, match="no leaf of z is PerExample"):
        mg.metasmoothness(training, None, jnp.ones(()), groups=np.arange(4))


def test_runs_that_say_nothing_are_errors():
    with pytest.raises(StructureError, match="no parameter moves"):
        mg.metasmoothness(shaped_by(lambda z: jnp.zeros(3), 3), **along(1.0))
    with pytest.raises(NonFiniteError, match=r"z \+ 0.2 v along given direction 0"):
        mg.metasmoothness(shaped_by(lambda z: jnp.ones(3) * jnp.sqrt(0.15 - z), 3), **along(1.0))
