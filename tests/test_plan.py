"""Plans: what the simulator, an exhaustive search, closed forms and the executor itself make of them."""

import ast
import inspect
import re
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count, pairwise
from math import inf
from pathlib import Path
from random import Random
from time import process_time

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import metagradient as mg
from metagradient.errors import ScheduleError
from metagradient.replay import budget, hierarchy, search
from metagradient.replay import price as pricing
from metagradient.replay.budget import Costs, Leaf, Memory, format_bytes, parse_bytes
from metagradient.replay.hierarchy import Level, Problem, reversal, seconds
from metagradient.replay.plan import Plan, plan
from metagradient.replay.price import price
from metagradient.replay.schedule import (
    TIERS,
    Advance,
    Binomial,
    Drop,
    KaryTree,
    Keep,
    KeepAll,
    PullBack,
    Restore,
    Save,
    Schedule,
    TwoLevel,
    audit,
    binomial_advances,
    simulate,
)

pytestmark = pytest.mark.core

light = settings(deadline=None, max_examples=25)


# Bytes and figures ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *[(0, 0), (7, 7), (1e3, 1000), ("7", 7), ("7 B", 7), ("4GB", 4 * 10**9), ("4 gb", 4 * 10**9)],
        *[("512MiB", 512 * 2**20), ("1.5K", 1500), ("2Ti", 2 * 2**40), ("1e9", 10**9), (" 0.5 TB ", 5 * 10**11)],
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "4 XB", "-1", "4GBs", "1,000", -1, float("nan"), float("inf"), True, None])
def test_sizes_that_are_none(text):
    with pytest.raises(ScheduleError, match="a size is a number of bytes"):
        parse_bytes(text)


@given(st.integers(0, 10**18))
def test_sizes_are_printed_to_three_digits(size: int):
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.01)


def test_memory_says_which_budget_is_wrong():
    assert Memory("1GB", disk=5, path="/tmp/x") == Memory(10**9, None, 5, Path("/tmp/x"))
    with pytest.raises(ScheduleError, match=r"^host: a size"):
        Memory(host="much")
    with pytest.raises(ScheduleError, match="say how many bytes, with disk="):
        Memory(path="/tmp/x")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"state_bytes": 0}, "state_bytes must be positive"),
        ({"advance_seconds": -1.0}, "advance_seconds must be finite"),
        ({"advance_seconds": inf}, "advance_seconds must be finite"),
        ({"save_seconds": {"tape": 1.0}}, "a tier is one of device, host, disk"),
        ({"restore_seconds": {"host": -1.0}}, r"restore_seconds\['host'\] must be finite"),
        ({"leaves": {}}, "give some of state, gradient, linearisation"),
        ({"leaves": {"all": Leaf(1, 1.0, 1.0)}}, "give some of state, gradient, linearisation"),
    ],
)
def test_costs_that_are_none(wrong, message):
    with pytest.raises(ScheduleError, match=message):
        replace(given_costs(), **wrong)


def test_costs_on_paper():
    costs = Costs.on_paper("3GB", 2.0, host_bandwidth="6GB", disk_bandwidth="1GB", adjoint_seconds=4.0)
    assert costs.save_seconds == costs.restore_seconds == {"host": 0.5, "disk": 3.5}
    assert costs.leaves["state"] == Leaf(3 * 10**9, 2.0, 4.0, 2.0)
    assert costs.leaves["gradient"].bytes == 4 * 10**9
    assert "linearisation" not in costs.leaves
    with pytest.raises(ScheduleError, match="give host_bandwidth too"):
        Costs.on_paper(1, 1.0, disk_bandwidth=1)


@pytest.mark.parametrize("module", [budget, hierarchy, pricing, search])
def test_the_arithmetic_needs_no_jax(module):
    tree = ast.parse(inspect.getsource(module))
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in names if name.startswith(("metagradient", "jax"))}
    rooms = {f"metagradient.replay.{room}" for room in ("schedule", "budget", "hierarchy", "price")}
    assert ours <= {"metagradient.errors", *rooms}


# One problem, against an exhaustive search ----------------------------------------------------------------------------


def cheapest(problem: Problem, *, ordered: bool) -> float:
    """Dijkstra's search over everything that a traversal can do, as the simulator allows it.

    Kept segments are adjacent. With `ordered`, no state is saved in a faster tier than one later in the run.
    """
    tiers = [(0.0, 0.0), *((level.save_seconds, level.restore_seconds) for level in problem.levels)]
    slots = [problem.segments, *(level.slots for level in problem.levels)]
    last = problem.segments

    def moves(state):
        working, lazy, owed, stored, kept = state
        on_device = sum(tier == 0 for _, tier in stored)
        room = problem.room - on_device * problem.state_bytes - kept * problem.kept_bytes
        if working is not None and working < owed and room >= problem.kept_bytes:
            # What was kept before is reached now.
            yield problem.elided_seconds * lazy - problem.elided_seconds, (working + 1, True, owed, stored, kept + 1)
        if kept:
            if working == owed:
                left = tuple(s for s in stored if s[0] < owed - kept)
                yield problem.elided_seconds * (owed == last), (None, False, owed - kept, left, 0)
            return
        for at, tier in stored:
            yield tiers[tier][1], (at, False, owed, stored, 0)
            yield 0.0, (working, False, owed, tuple(s for s in stored if s[0] != at), 0)
        if working is None or working == owed:
            return
        yield problem.advance_seconds, (working + 1, False, owed, stored, 0)
        if any(at == working for at, _ in stored):
            return
        for tier, (save, _) in enumerate(tiers):
            full = room < problem.state_bytes if tier == 0 else sum(t == tier for _, t in stored) >= slots[tier]
            fits = all(t >= tier if at < working else t <= tier for at, t in stored)
            if not full and (fits or not ordered):
                yield save, (working, False, owed, tuple(sorted((*stored, (working, tier)))), 0)

    number = count()
    # Distances stay non-negative if every segment that may be elided is paid for ahead.
    start = (0, False, last, (), 0)
    queue: list[tuple] = [(0.0, next(number), start)]
    done = set()
    while queue:
        spent, _, state = heappop(queue)
        if state in done:
            continue
        done.add(state)
        if state[2] == 0:
            return spent - (last + 1) * problem.elided_seconds
        for price_, after in moves(state):
            paid = price_ + problem.elided_seconds * (after[4] > state[4])
            heappush(queue, (spent + paid, next(number), after))
    return inf


def some_problem(random: Random, levels: int) -> Problem:
    advance = random.choice([1.0, 2.0])
    state, kept = random.choice([(1, 1), (2, 3), (3, 2), (1, 4), (5, 2)])
    kinds = ("host", "disk")[:levels]
    return Problem(
        segments=random.randint(2, 8 - levels),
        advance_seconds=advance,
        elided_seconds=random.choice([0.0, advance, 0.5 * advance]),
        room=kept + random.randint(0, 3 * state + 2 * kept),
        state_bytes=state,
        kept_bytes=kept,
        levels=tuple(
            Level(kind, random.randint(1, 2), random.choice([0.0, 0.3, 1.5, 4.0]), random.choice([0.0, 0.3, 1.5, 4.0]))
            for kind in kinds
        ),
    )


def spent(problem: Problem) -> float:
    """What the actions of a problem's reversal cost, checked one by one; the slots and the room are never exceeded."""
    levels = {level.tier: level for level in problem.levels}
    stored, on_device, kept, elided, total = {}, 0, 0, 0, 0.0
    actions = list(reversal(problem))
    for before, action in zip([None, *actions], actions, strict=False):
        match action:
            case Advance(start, stop):
                total += (stop - start) * problem.advance_seconds
            case Save(at, tier):
                stored[at] = tier
                total += levels[tier].save_seconds if tier in levels else 0.0
                on_device += tier == "device"
            case Restore(at):
                total += levels[stored[at]].restore_seconds if stored[at] in levels else 0.0
            case Drop(at):
                on_device -= stored.pop(at) == "device"
            case Keep():
                kept += 1
            case PullBack():
                elided += isinstance(before, Keep)
                kept -= 1
        assert on_device * problem.state_bytes + kept * problem.kept_bytes <= problem.room
    peaks = audit(actions, problem.segments).peak_slots
    assert all(peaks[level.tier] <= level.slots for level in problem.levels)
    assert peaks["device"] <= problem.device_slots
    return total - elided * problem.elided_seconds


@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_cheaper(levels: int, seed: int):
    problem = some_problem(Random(f"{levels} {seed}"), levels)
    assert seconds(problem) == pytest.approx(cheapest(problem, ordered=levels > 1), rel=1e-5, abs=1e-5)
    if seconds(problem) < inf:
        assert spent(problem) == pytest.approx(seconds(problem), rel=1e-5, abs=1e-5)


problems = st.builds(
    lambda n, advance, elided, state, kept, beyond, levels: Problem(
        n, advance, elided * advance, kept + beyond, state, kept, levels=tuple(levels)
    ),
    *[st.integers(1, 150), st.sampled_from([0.5, 3.0]), st.sampled_from([0.0, 0.2, 1.0])],
    *[st.integers(1, 9), st.integers(1, 9), st.integers(0, 200)],
    st.tuples(st.integers(1, 12), st.integers(0, 9), st.integers(1, 200), st.integers(0, 9)).flatmap(
        lambda x: st.sampled_from(
            [(), (Level("host", x[0], x[1], x[1]),), (Level("host", x[0], x[1], x[1]), Level("disk", x[2], x[3], 2.0))]
        )
    ),
)


@light
@given(problems)
def test_a_reversal_costs_what_was_tabulated(problem: Problem):
    if seconds(problem) < inf:
        assert spent(problem) == pytest.approx(seconds(problem), rel=1e-4, abs=1e-3)


@light
@given(problems, st.integers(1, 7), st.integers(1, 4), st.integers(20, 150))
def test_coarser_problems_are_sound_and_no_cheaper(problem: Problem, fine: int, times: int, reach: int):
    grains = [fine] * (len(problem.levels) - 1) + [fine * times]
    spans = [fine * max(1, reach // fine)] * (len(problem.levels) - 1) + [None]
    levels = tuple(
        replace(level, grain=grain, reach=span)
        for level, grain, span in zip(problem.levels, grains, spans, strict=False)
    )
    for closed in (False, True):
        coarse = replace(problem, levels=levels, reach=reach if levels and not closed else None, closed=closed)
        assert seconds(coarse) >= seconds(problem) * (1 - 1e-5) - 1e-3
        if seconds(coarse) < inf:
            # The last part of the run may be shorter than was tabulated.
            assert spent(coarse) <= seconds(coarse) * (1 + 1e-4) + 1e-3


@light
@given(st.integers(1, 400), st.integers(1, 40), st.booleans())
def test_the_device_alone_is_binomial(segments: int, slots: int, closed: bool):
    # Kept segments so large that one fits: then the closed form holds, of which the tables know nothing.
    problem = Problem(segments, 1.0, 0.0, 1000 + slots, 1, 1000, closed=closed)
    assert seconds(problem) == spent(problem) == binomial_advances(segments, slots)


@pytest.mark.parametrize("segments", [2, 10, 64, 100])
@pytest.mark.parametrize("slots", [1, 3, 9])
def test_keeping_a_state_is_no_cheaper_than_storing_it(segments: int, slots: int):
    """So plans take the closed form where single steps keep their states."""
    problem = Problem(segments, 1.0, 1.0, slots + 1, 1, 1)
    assert seconds(problem) == seconds(replace(problem, closed=True))


def test_what_is_kept_at_once_shares_the_room_with_states():
    # Room for two: two kept segments, or one beside a stored state. The first two segments are kept once that state is
    # dropped, which saves the last of the binomial schedule's advances.
    problem = Problem(4, 1.0, 0.0, room=20, state_bytes=10, kept_bytes=10)
    assert list(reversal(replace(problem, segments=2))) == list(KeepAll().actions(2))
    assert seconds(problem) == binomial_advances(4, 1) - 1


# Whole plans ----------------------------------------------------------------------------------------------------------


def given_costs(**changes) -> Costs:
    """A training of single steps with small figures."""
    costs = Costs(
        state_bytes=10,
        advance_seconds=1.0,
        leaves={
            "state": Leaf(10, 1.0, 2.4),
            "gradient": Leaf(14, 1.0, 2.2),
            "linearisation": Leaf(60, 1.2, 1.4, advance_seconds=1.2),
        },
        save_seconds={"host": 0.3, "disk": 2.0},
        restore_seconds={"host": 0.3, "disk": 2.0},
    )
    return replace(costs, **changes)


def forward_steps(schedule: Schedule, steps: int, length: int, *, elides: bool) -> int:
    """As `Runner` counts: a leaf's last step is left out unless its end is asked for."""
    segments = -(-steps // length)
    cost = simulate(schedule, segments)
    actions = list(schedule.actions(segments))
    unasked = sum(isinstance(a, Keep) and b == PullBack(a.segment) for a, b in pairwise(actions))
    # The objective asks for that of the last.
    return cost.advances * length + steps - (unasked - 1 if elides else 0)


def most_bytes(planned: Plan, costs: Costs) -> int:
    """On the device, of stored states and kept steps together."""
    stored, kept, most = {}, 0, 0
    for action in planned.actions(planned.problem.segments):
        match action:
            case Save(at, tier):
                stored[at] = tier
            case Drop(at):
                del stored[at]
            case Keep():
                kept += planned.length * costs.leaves[planned.keep].bytes
            case PullBack():
                kept -= planned.length * costs.leaves[planned.keep].bytes
        most = max(most, kept + sum(costs.state_bytes for tier in stored.values() if tier == "device"))
    return most


sizes = st.one_of(st.integers(0, 300), st.integers(0, 30_000))


@light
@given(
    st.integers(1, 2000),
    sizes,
    st.none() | sizes,
    st.none() | sizes,
    st.booleans(),
    st.sampled_from([["state"], ["gradient"], ["linearisation"], ["state", "gradient", "linearisation"]]),
    st.sampled_from([0.0, 0.1]),
)
@example(634, 280, 60, None, False, ["state"], 0.0)
def test_plans_keep_their_promises(steps, device, host, disk, compiled, keeps, dispatch):
    costs = given_costs(compiled=compiled, dispatch_seconds=dispatch)
    memory = Memory(110 + device, host, disk)
    planned = plan(costs, steps, memory, keeps=keeps)
    found = simulate(planned, -(-steps // planned.length))
    estimate = planned.estimate
    assert estimate.states == found.peak_slots
    assert estimate.adjoint_steps == steps
    slower = any(found.peak_slots[tier] for tier in ("host", "disk"))
    assert estimate.bytes["device"] == 30 + 20 * slower + most_bytes(planned, costs)
    for tier in TIERS:
        assert estimate.bytes[tier] <= (getattr(memory, tier) or 0)
        assert tier == "device" or estimate.bytes[tier] == 10 * found.peak_slots[tier]
    elides = planned.keep == "state" and (planned.length == 1 or not compiled)
    assert estimate.forward_steps == forward_steps(planned, steps, planned.length, elides=elides)
    again = price(planned, costs, steps, length=planned.length, keep=planned.keep)
    assert replace(again, name=estimate.name, seconds=0.0) == replace(estimate, seconds=0.0)
    assert again.seconds == pytest.approx(estimate.seconds)
    assert all(
        estimate.seconds <= other.seconds * (1 + 1e-5)
        for other in planned.rejected
        if all(other.bytes[tier] <= (getattr(memory, tier) or 0) for tier in TIERS)
    )


@pytest.mark.parametrize(
    "schedule", [KeepAll(), TwoLevel(7), TwoLevel(), KaryTree(3), Binomial(5), Binomial(1)], ids=str
)
@pytest.mark.parametrize("keep", ["state", "gradient"])
def test_prices_by_hand(schedule: Schedule, keep):
    costs = given_costs()
    found = price(schedule, costs, 100, keep=keep)
    assert found.forward_steps == forward_steps(schedule, 100, 1, elides=keep == "state")
    assert found.seconds == pytest.approx(found.forward_steps + 100 * costs.leaves[keep].adjoint_seconds)
    host = price(TwoLevel(10, "host"), costs, 100, keep=keep)
    assert (host.states["host"], host.bytes["host"]) == (9, 90)
    assert host.seconds == pytest.approx(host.forward_steps + 100 * costs.leaves[keep].adjoint_seconds + 9 * 0.6)


@light
@given(st.integers(1, 90), st.lists(st.integers(110, 1200), min_size=2, max_size=2), st.integers(0, 200))
def test_more_memory_is_never_slower(steps, devices, host):
    less, more = sorted(devices)
    costs = given_costs()
    budgets = [(less, host, None), (more, host, None), (more, host + 50, None), (more, host + 50, 90)]
    times = [plan(costs, steps, Memory(*sizes)).seconds for sizes in budgets]
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(times))


def test_more_memory_is_hardly_ever_slower_on_long_runs():
    costs, steps = given_costs(), 5000
    times = [plan(costs, steps, Memory(device, 200, 2000)).seconds for device in (120, 500, 2000, 20_000)]
    assert all(later <= 1.01 * earlier for earlier, later in pairwise(times))


@light
@given(st.integers(1, 2000), st.integers(1, 60))
def test_plans_for_the_device_alone_are_binomial(steps, slots):
    planned = plan(given_costs(), steps, Memory(device=30 + 10 + 10 * slots), keeps=["state"], lengths=[1])
    # Every leaf but the last is elided; advances reach the rest.
    assert planned.estimate.forward_steps == binomial_advances(steps, slots) + 1 or steps <= slots + 1
    if steps <= slots + 1:
        assert planned.estimate.forward_steps == steps


def test_what_fits_is_kept_whole():
    planned = plan(given_costs(), 50, Memory(device=30 + 50 * 60))
    assert (planned.keep, planned.estimate.name) == ("linearisation", "keep all")
    assert list(planned.actions(50)) == list(KeepAll().actions(50))
    without = plan(given_costs(), 50, Memory(device=30 + 50 * 14))
    assert (without.keep, without.estimate.forward_steps) == ("gradient", 50)


def test_one_replay_is_found_where_two_levels_fit():
    """Within the bytes of TwoLevel, no plan takes longer."""
    costs = given_costs()
    for keep in costs.leaves:
        two = price(TwoLevel(), costs, 400, keep=keep)
        assert plan(costs, 400, Memory(two.bytes["device"]), keeps=[keep]).seconds <= two.seconds


def test_slow_tiers_are_used_where_they_pay():
    memory = Memory(device=120, host=100)
    assert plan(given_costs(), 500, memory).estimate.states["host"] == 10
    slow = given_costs(save_seconds={"host": 1e4}, restore_seconds={"host": 1e4})
    assert plan(slow, 500, memory).estimate.states["host"] == 0
    # Room for states under way is what a tier costs the device.
    assert plan(given_costs(transfer_bytes=0), 500, memory).seconds < plan(given_costs(), 500, memory).seconds


def test_one_slow_tier_alone():
    """A device that stores nothing: the host's slots serve far and near."""
    costs = given_costs(transfer_bytes=0)
    planned = plan(costs, 3000, Memory(device=40, host=120))
    assert planned.estimate.states == {"device": 0, "host": 12, "disk": 0}
    assert planned.estimate.forward_steps < 1.15 * binomial_advances(3000, 12)


def test_dispatch_makes_segments_longer():
    quick = given_costs(compiled=True, leaves={"state": Leaf(10, 1.0, 2.4)})
    memory = Memory(device=1000)
    assert plan(replace(quick, dispatch_seconds=3.0), 2000, memory).length > 4
    assert plan(quick, 2000, memory, lengths=[6, 2]).length in (2, 6)


def test_the_host_is_hidden_behind_segments_that_take_as_long():
    """A walk over 4 steps is prepared while the device takes 4 seconds; over 1 step, it waits for the rest of 3."""
    costs = given_costs(compiled=True, leaves={"state": Leaf(10, 1.0, 2.4)}, host_seconds=2.0, read_seconds=0.5)
    assert [costs.a_walk("state", length) for length in (1, 2, 4, 8)] == [1.5, 1.0, 0.0, 0.0]
    assert replace(costs, dispatch_seconds=1.0).a_walk("state", 1) == 1.5
    assert plan(costs, 2000, Memory(device=1000)).length >= 4


@pytest.mark.parametrize("host", [None, 10])
@pytest.mark.parametrize("steps", [1, 2, 1000])
@pytest.mark.parametrize("transfer", [0, 20])
def test_an_infeasible_budget_says_what_would_do(host, steps, transfer):
    costs = given_costs(transfer_bytes=transfer)
    with pytest.raises(ScheduleError, match="smallest feasible") as error:
        plan(costs, steps, Memory(5, host))
    found = re.search(r"feasible is .*? \((\d+) bytes\)", str(error.value))
    assert found
    least = int(found[1])
    assert plan(costs, steps, Memory(least, host)).steps == steps
    with pytest.raises(ScheduleError, match=f"feasible is .* \\({least} bytes\\)"):
        plan(costs, steps, Memory(least - 1, host))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be an integer"),
        ({"lengths": [0]}, "lengths must be at least 1"),
        ({"keeps": ["all"]}, "the costs price state, gradient, linearisation"),
        ({"costs": given_costs(save_seconds={"host": 1.0})}, "the disk has a budget, but no seconds"),
    ],
)
def test_arguments_that_can_not_be_used(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        plan(**{"costs": given_costs(), "steps": 10, "memory": Memory(1000, 10, 10), **arguments})


def test_no_budget_is_half_of_the_free_memory():
    planned = plan(given_costs(), 30)
    assert planned.memory.device
    assert planned.memory.device > 10**6
    assert planned.estimate.name == "keep all"


def test_a_plan_is_for_one_run_and_prints():
    planned = plan(given_costs(), 100, Memory(device=150, host=50))
    assert planned == plan(given_costs(), 100, Memory(device=150, host=50))
    assert len({planned, planned}) == 1
    with pytest.raises(ScheduleError, match="for 100 segments of 1 steps, not for 99"):
        planned.actions(99)
    lines = str(planned).splitlines()
    assert lines[0] == "100 steps and adjoint steps within 150 B device, 50 B host"
    assert max(map(len, lines)) <= 118
    for word in ("chosen", "slower", "over device", "KeepAll", "TwoLevel", str(planned.estimate.forward_steps)):
        assert word in str(planned)


def test_a_large_model_on_paper():
    """8B parameters in float32 with Adam: a state of 96 GB, over a node of 8 devices of 141 GB."""
    costs = Costs.on_paper("96GB", 12.0, activation_bytes="2TB", host_bandwidth="200GB", disk_bandwidth="20GB")
    start = process_time()
    planned = plan(costs, 20_000, Memory("1.1TB", "1TB", "20TB"))
    assert process_time() - start < 10
    found = simulate(planned, planned.problem.segments)
    assert planned.estimate.states == found.peak_slots
    assert found.peak_slots["host"] <= 10
    assert 100 < found.peak_slots["disk"] <= 208
    # Without slower tiers it takes ten runs; with them, no more than a run above what as many free slots would take.
    alone = next(e for e in planned.rejected if not e.states["host"] and e.bytes["device"] <= 1.1e12)
    assert alone.forward_steps > 8 * 20_000
    everything = sum(found.peak_slots.values())
    assert planned.estimate.forward_steps < binomial_advances(20_000, everything) + 20_000


# The executor ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loop", "keep"), [("steps", "state"), ("steps", "gradient"), ("scan", "state")])
@pytest.mark.parametrize("states", [(9, None), (12, 3), (30, None)])
def test_the_executor_takes_the_steps_that_were_predicted(loop, keep, states):
    batches = [{"x": jnp.arange(2.0) + t} for t in range(23)]

    def loss(params, batch, z):
        return jnp.mean((params["w"] * batch["x"] - z) ** 2)

    training = mg.Training.from_loss(loss, optax.sgd(1e-3), {"w": jnp.zeros(2)}, batches)
    state, gradient = 8 + 4, 8
    leaf = Leaf(state if keep == "state" else state + gradient, 1.0, 2.0)
    costs = Costs(state, 1.0, {keep: leaf}, {"host": 0.1}, {"host": 0.1}, 0, 0, compiled=loop == "scan")
    device, host = (None if n is None else n * state for n in states)
    planned = plan(costs, 23, Memory(device, host), lengths=[2, 3] if loop == "scan" else [1, 4])
    gradients = [
        mg.value_and_metagrad(
            training,
            lambda state, z: state.params["w"].sum(),
            schedule=schedule,
            segment=mg.Segment(planned.length, loop, keep),
            verify="off",
        )
        for schedule in (planned, KeepAll())
    ]
    (_, grad, stats), (_, expected, _) = [gradient.with_stats(jnp.asarray(0.3)) for gradient in gradients]
    assert stats.forward_steps == planned.estimate.forward_steps
    assert stats.adjoint_steps == planned.estimate.adjoint_steps
    assert stats.peak_states == {tier: n for tier, n in planned.estimate.states.items() if n}
    np.testing.assert_array_equal(grad, expected)
