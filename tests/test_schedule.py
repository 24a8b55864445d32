"""Schedules, on integers: the simulator's promises, closed forms, the published table, and an independent oracle."""

import ast
import inspect
import sys
from dataclasses import FrozenInstanceError
from functools import cache
from math import ceil, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metagradient.errors import ScheduleError
from metagradient.replay import schedule as schedule_module
from metagradient.replay.schedule import (
    TIERS,
    Action,
    Advance,
    Binomial,
    Cost,
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
lengths = st.integers(1, 5000)
parameters = st.one_of(st.integers(1, 12), st.integers(1, 6000))
tiers = st.sampled_from(TIERS)
schedules = st.one_of(
    st.just(KeepAll()),
    st.builds(TwoLevel, st.none() | parameters, tiers),
    st.builds(KaryTree, parameters.map(lambda k: k + 1), tiers),
    st.builds(Binomial, parameters, tiers),
)
EVERY_KIND = [KeepAll(), TwoLevel(), TwoLevel(7), KaryTree(2), KaryTree(8), Binomial(1), Binomial(10), Binomial(9999)]


def peak(cost: Cost) -> int:
    return sum(cost.peak_slots.values())


@light
@given(schedules, lengths)
def test_every_schedule_keeps_its_promises(schedule: Schedule, segments: int):
    cost = simulate(schedule, segments)
    assert cost.segments == cost.keeps == segments


@pytest.mark.parametrize("segments", [1, 2, 3, 5000])
@pytest.mark.parametrize("schedule", EVERY_KIND, ids=str)
def test_shortest_and_long_runs(schedule: Schedule, segments: int):
    assert simulate(schedule, segments).keeps == segments


@light
@given(schedules, st.integers(1, 60))
def test_no_action_is_superfluous(schedule: Schedule, segments: int):
    actions = list(schedule.actions(segments))
    for number in range(len(actions)):
        with pytest.raises(ScheduleError):
            audit(actions[:number] + actions[number + 1 :], segments)


@light
@given(schedules, st.integers(1, 60))
def test_no_action_may_happen_twice_in_a_row_but_a_restore(schedule: Schedule, segments: int):
    actions = list(schedule.actions(segments))
    for number, action in enumerate(actions):
        if not isinstance(action, Restore):
            with pytest.raises(ScheduleError, match=f"^action {number + 1}, "):
                audit([*actions[: number + 1], *actions[number:]], segments)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", [TwoLevel, lambda tier: KaryTree(4, tier), lambda tier: Binomial(6, tier)])
def test_states_are_stored_in_the_tier_asked_for(kind, tier):
    slots = simulate(kind(tier=tier), 100).peak_slots
    assert slots[tier] > 0
    assert all(slots[other] == 0 for other in TIERS if other != tier)


def test_keep_all_keeps_the_first_run():
    assert list(KeepAll().actions(2)) == [Keep(0), Keep(1), PullBack(1), PullBack(0)]
    assert simulate(KeepAll(), 50) == Cost(50, 0, 50, 0, dict.fromkeys(TIERS, 0), 50)


def test_two_level_in_full():
    assert list(TwoLevel(2, "disk").actions(5)) == [
        *[Save(0, "disk"), Advance(0, 2), Save(2, "disk"), Advance(2, 4)],
        *[Keep(4), PullBack(4)],
        *[Restore(2), Keep(2), Keep(3), PullBack(3), PullBack(2), Drop(2)],
        *[Restore(0), Keep(0), Keep(1), PullBack(1), PullBack(0), Drop(0)],
    ]


@light
@given(lengths, parameters)
def test_two_level_counts(segments: int, every: int):
    cost = simulate(TwoLevel(every), segments)
    chunks = ceil(segments / every)
    assert cost.advances == (chunks - 1) * every
    assert peak(cost) == cost.restores == chunks - 1
    assert cost.peak_kept == min(every, segments)


@pytest.mark.parametrize("segments", [1, 2, 4, 5, 99, 100, 101, 3125])
def test_two_level_chunks_default_to_the_square_root(segments: int):
    assert simulate(TwoLevel(), segments) == simulate(TwoLevel(ceil(sqrt(segments))), segments)


def test_tree_in_full():
    assert list(KaryTree(2).actions(4)) == [
        *[Save(0, "device"), Advance(0, 2), Save(2, "device"), Advance(2, 3), Keep(3), PullBack(3)],
        *[Restore(2), Keep(2), PullBack(2), Drop(2)],
        *[Restore(0), Advance(0, 1), Keep(1), PullBack(1)],
        *[Restore(0), Keep(0), PullBack(0), Drop(0)],
    ]


@cache
def tree_counts(size: int, k: int) -> tuple[int, int]:
    """Advances of a node, and its peak slots with its own included, by recursion on the definition."""
    if size == 1:
        return 0, 0
    children = [size // k + (i < size % k) for i in range(min(k, size))]
    counts = [tree_counts(child, k) for child in children]
    advances = sum(children[:-1]) + sum(below for below, _ in counts)
    # Child i is traversed while the starts of children 0..i-1 are stored; all but the last are stored even at size 1.
    starts = [1] * (len(children) - 1) + [0]
    return advances, max(i + max(starts[i], slots) for i, (_, slots) in enumerate(counts))


@light
@given(lengths, parameters.map(lambda k: k + 1))
def test_tree_counts(segments: int, k: int):
    cost = simulate(KaryTree(k), segments)
    assert (cost.advances, peak(cost)) == tree_counts(segments, k)
    assert cost.peak_kept == 1


@cache
def fewest_advances(segments: int, slots: int) -> float:
    """The optimum by dynamic programming over the place of the next stored state."""
    if segments == 1:
        return 0
    if slots == 0:
        return float("inf")
    return min(
        first + fewest_advances(segments - first, slots - 1) + fewest_advances(first, slots)
        for first in range(1, segments)
    )


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 5, 8, 13, 30, 59, 60, 70])
def test_binomial_is_optimal(slots: int):
    for segments in range(1, 61):
        cost = simulate(Binomial(slots), segments)
        assert cost.advances == binomial_advances(segments, slots) == fewest_advances(segments, slots)


@light
@given(lengths, parameters)
def test_binomial_counts(segments: int, slots: int):
    cost = simulate(Binomial(slots), segments)
    assert cost.advances == binomial_advances(segments, slots)
    assert peak(cost) <= min(slots, segments - 1)
    assert cost.peak_kept == 1


@pytest.mark.parametrize("segments", [1, 2, 5000])
def test_binomial_with_one_slot_restarts_from_the_beginning(segments: int):
    assert simulate(Binomial(1), segments).advances == segments * (segments - 1) // 2


@light
@given(st.integers(1, 100_000), parameters)
def test_binomial_advances_are_monotone(segments: int, slots: int):
    advances = binomial_advances(segments, slots)
    assert binomial_advances(segments, slots + 1) <= advances < binomial_advances(segments + 1, slots)
    assert advances >= segments - 1


@light
@given(st.integers(2, 5000), st.integers(2, 64))
def test_no_tree_beats_binomial_with_the_same_slots(segments: int, k: int):
    advances, slots = tree_counts(segments, k)
    assert binomial_advances(segments, slots) <= advances


@pytest.mark.parametrize("slots", [1, 5, 300, 10**9])
def test_binomial_is_lazy_and_quick_on_the_longest_runs(slots: int):
    actions = Binomial(slots).actions(100_000)
    assert next(actions) == Save(0, "device")
    assert next(actions).__class__ is Advance


@pytest.mark.parametrize("segments", [1, 2, 3, 10, 47, 100, 250])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 9, 40, 300])
def test_binomial_takes_the_actions_of_an_independent_revolve(segments: int, slots: int):
    """Equal action by action, so equal in saves too, not only in the optimal count of advances."""
    oracle = pytest.importorskip("checkpoint_schedules")
    theirs: list[Action] = []
    moved: list[Action] = []
    for action in oracle.MultistageCheckpointSchedule(segments, slots, 0, trajectory="revolve"):
        match action:
            case oracle.Forward(write_adj_deps=True, n0=n0):
                theirs.append(Keep(n0))
            case oracle.Forward(write_ics=write, n0=n0, n1=n1):
                theirs += [Save(n0, "device")] * write + [Advance(n0, n1)]
            case oracle.Reverse(n0=n0):
                # Theirs frees a slot as it reads it for the last time, ours once that read's pull-back is over.
                theirs += [PullBack(n0), *moved]
                moved = []
            case oracle.Copy(n=n):
                theirs.append(Restore(n))
            case oracle.Move(n=n):
                theirs.append(Restore(n))
                moved = [Drop(n)]
            case oracle.EndReverse():
                break
    assert list(Binomial(slots).actions(segments)) == theirs


# Forward steps a segment, and slots, as published. The tree's published slots are one more than ours in every row, as
# when a node's last child is stored even if it is a leaf; here a leaf that is reached stays the working state.
TABLE = [
    *[(1000, 2, 5.04, 10, 3.64), (1000, 8, 3.14, 22, 2.70), (1000, 32, 1.94, 62, 1.94)],
    *[(3125, 2, 6.04, 12, 4.24), (3125, 8, 3.47, 27, 2.86), (3125, 32, 2.61, 65, 2.27)],
    *[(10_000, 2, 6.90, 14, 4.61), (10_000, 8, 4.12, 30, 3.40), (10_000, 32, 2.84, 71, 2.73)],
]


@pytest.mark.parametrize(("segments", "k", "tree", "slots", "binomial"), TABLE)
def test_table_of_forward_steps(segments: int, k: int, tree: float, slots: int, binomial: float):
    cost = simulate(KaryTree(k), segments)
    assert (round(cost.advances / segments, 2), peak(cost) + 1) == (tree, slots)
    assert round(binomial_advances(segments, slots) / segments, 2) == binomial


@pytest.mark.parametrize(("segments", "forward"), [(1000, 1.96), (3125, 1.97), (10_000, 1.98)])
def test_table_of_two_levels(segments: int, forward: float):
    cost = simulate(TwoLevel(), segments)
    # The table counts rebuilding a chunk's states apart from linearising its segments; the last of them needs none.
    rebuilt = cost.keeps - (cost.restores + 1)
    assert round((cost.advances + rebuilt) / segments, 2) == forward


SAVED = [Save(0, "device"), Advance(0, 1)]
KEPT = [*SAVED, Keep(1)]
DONE = [*KEPT, PullBack(1), Restore(0), Keep(0), PullBack(0), Drop(0)]


def test_the_actions_that_are_broken_below_are_sound():
    assert audit(DONE, 2) == Cost(2, 1, 2, 1, {"device": 1, "host": 0, "disk": 0}, 1)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([Advance(1, 2)], r"action 0, Advance\(start=1, stop=2\): the working state is at boundary 0"),
        ([Advance(0, 0)], "action 0, .* at least one segment"),
        ([Advance(0, 3)], "action 0, .* only segments below 2"),
        ([*KEPT, PullBack(1), Restore(0), Advance(0, 2)], "action 5, .* only segments below 1"),
        ([Save(1, "device")], "action 0, .* the working state is at boundary 0"),
        ([Save(0, "tape")], "action 0, .* the tier must be one of device, host, disk"),  # pyright: ignore[reportArgumentType]
        ([Save(0, "device"), Save(0, "host")], "action 1, .* stored already"),
        ([Restore(0)], "action 0, .* not stored"),
        ([*SAVED, Drop(0), Restore(0)], "action 3, .* not stored"),
        ([Drop(0)], "action 0, .* not stored"),
        ([Keep(1)], "action 0, .* the working state is at boundary 0"),
        ([*KEPT, Keep(2)], "action 3, .* only segments below 2"),
        ([Save(0, "device"), Keep(0), Restore(0), Keep(0)], "action 3, .* kept already"),
        ([*KEPT, PullBack(0)], "action 3, .* the next segment to pull back is 1"),
        ([*KEPT, PullBack(1), PullBack(1)], "action 4, .* the next segment to pull back is 0"),
        ([*SAVED, PullBack(1)], "action 2, .* not kept"),
        ([*KEPT, Restore(0), PullBack(1)], "action 4, .* working state at boundary 2, but it is at 0"),
        ([*DONE, PullBack(0)], "action 8, .* every segment is pulled back"),
        ([], "end before segment 1 is pulled back"),
        (DONE[:4], "end before segment 0 is pulled back"),
        (DONE[:-1], r"end with boundaries \[0\] still stored"),
    ],
)
def test_simulator_rejects(actions: list[Action], message: str):
    with pytest.raises(ScheduleError, match=message):
        audit(actions, 2)


def test_peaks_are_counted_over_time_and_tier():
    actions = [
        *[Save(0, "host"), Advance(0, 1), Save(1, "disk"), Advance(1, 2), Save(2, "disk"), Keep(2), PullBack(2)],
        *[Drop(2), Restore(0), Keep(0), Keep(1), PullBack(1), Drop(1), PullBack(0), Drop(0)],
    ]
    assert audit(actions, 3) == Cost(3, 2, 3, 1, {"device": 0, "host": 1, "disk": 2}, 2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: TwoLevel(0),
        lambda: TwoLevel(-3),
        lambda: TwoLevel(tier="tape"),  # pyright: ignore[reportArgumentType]
        lambda: KaryTree(1),
        lambda: KaryTree(2.5),  # pyright: ignore[reportArgumentType]
        lambda: KaryTree(2, "tape"),  # pyright: ignore[reportArgumentType]
        lambda: Binomial(0),
        lambda: Binomial(3, "tape"),  # pyright: ignore[reportArgumentType]
        lambda: binomial_advances(0, 1),
        lambda: binomial_advances(1, 0),
        lambda: audit([], 0),
    ],
)
def test_bad_parameters_raise(build):
    with pytest.raises(ScheduleError, match="must be"):
        build()


@pytest.mark.parametrize("schedule", EVERY_KIND, ids=str)
@pytest.mark.parametrize("segments", [0, -1])
def test_an_empty_run_raises_before_the_first_action(schedule: Schedule, segments: int):
    with pytest.raises(ScheduleError, match="segments must be an integer of at least 1"):
        schedule.actions(segments)


def test_schedules_and_actions_are_values():
    assert {Binomial(3), Binomial(3), KaryTree(3)} == {Binomial(3), KaryTree(3)}
    with pytest.raises(FrozenInstanceError):
        Keep(0).segment = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_schedules_import_only_the_standard_library_and_the_errors():
    tree = ast.parse(inspect.getsource(schedule_module))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in modules if name.split(".")[0] not in sys.stdlib_module_names}
    assert ours == {"metagradient.errors"}
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))
