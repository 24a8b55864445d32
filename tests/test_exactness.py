"""In float64, metagradients equal the gradient of the unrolled run to 1e-10, leaf by leaf, whatever the way there."""

from dataclasses import replace
from itertools import cycle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import (
    BATCH,
    EXAMPLES,
    HIDDEN,
    OPTIMISERS,
    STEPS,
    VISITED,
    Problem,
    assert_same,
    batch_norm,
    cross_entropy,
    digit_losses,
    dropout,
    equinox_model,
    held_out,
    logits,
    mlp,
    reference,
    ridge,
    rows,
    tied,
    with_optimiser,
)

import metagradient as mg
from metagradient import Segment
from metagradient.schedule import Binomial, KaryTree, KeepAll, TwoLevel

STEPWISE = Segment(1, "steps", "state")
TIERS = ("device", "host")
KINDS = (TwoLevel, *(lambda tier, k=k: KaryTree(k, tier) for k in (2, 3)), *(lambda tier, s=s: Binomial(s, tier) for s in (1, 3)))
SCHEDULES = [KeepAll(), *(TwoLevel(tier=tier) for tier in TIERS)]
SCHEDULES += [KaryTree(k, tier) for k in (2, 3) for tier in TIERS]
SCHEDULES += [Binomial(slots, tier) for slots in (1, 3) for tier in TIERS]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def metagradient(problem: Problem, schedule=KeepAll(), segment=STEPWISE, window=None, **options):
    training = problem.training(**options)
    return mg.value_and_metagrad(training, problem.objective, schedule=schedule, segment=segment, window=window)(
        problem.z
    )


@pytest.mark.parametrize(("name", "schedule"), zip(OPTIMISERS, cycle(SCHEDULES), strict=False))
def test_every_optimiser(name, schedule):
    problem = with_optimiser(name)
    assert_same(metagradient(problem, schedule), reference(problem))


def test_every_schedule():
    problem = with_optimiser("driven")
    expected = reference(problem)
    for schedule in SCHEDULES:
        assert_same(metagradient(problem, schedule, Segment(2)), expected)


@pytest.mark.parametrize("length", [1, 4, STEPS, 32])
@pytest.mark.parametrize("loop", ["scan", "unroll", "steps"])
@pytest.mark.parametrize("keep", ["state", "gradient"])
def test_every_segment(length, loop, keep): ...
