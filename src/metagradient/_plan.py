"""`plan`: measure a few steps of a run, and find the cheapest way to differentiate it in a memory budget."""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import jax

from metagradient.metaparameters import canonical
from metagradient.replay.budget import Costs, Leaf, LeafKind, Memory
from metagradient.replay.plan import Plan
from metagradient.replay.plan import plan as planned
from metagradient.replay.schedule import TIERS, Tier
from metagradient.replay.store import Stores
from metagradient.run import Run, full_precision
from metagradient.step.choose import first_choices
from metagradient.step.segment import Segment
from metagradient.training import Training
from metagradient.trees import PyTree, floating, nbytes

_REPEATS = 5


def plan(
    training: Training,
    z: PyTree,
    *,
    memory: Memory | None = None,
    segment: Segment | int | None = None,
    window: int | None = None,
) -> Plan:
    """What a metagradient will cost, before it is run: the cheapest schedule that fits a memory budget.

    Arguments:
        training: the run.
        z: metaparameters; only their shapes matter.
        memory: budgets; None takes half of the free memory of the device, and no other tier.
        segment: how steps are compiled. A `Segment` fixes that and what a step keeps, an int the length; None leaves
            both to be measured.
        window: as in `value_and_metagrad`.

    Returns: a `Plan`, which is a schedule: print it, or pass it on as `schedule=`.

    Errors: those of `value_and_metagrad` for input of the wrong kind; `ScheduleError` for a budget in which nothing
        fits, with the smallest in which something does.

    Cost: a few steps and adjoints in each form that may be chosen, a transfer to each tier with a budget, and a
        compilation of each.

    >>> import jax.numpy as jnp, metagradient as mg
    >>> training = mg.Training(jnp.ones(100), lambda state, batch, z: state * z, [{}] * 50)
    >>> planned = mg.plan(training, jnp.asarray(0.9), memory=mg.Memory(device="4kB"))
    >>> planned.estimate.adjoint_steps, planned.estimate.bytes["device"] <= 4000
    (50, True)
    """
    with full_precision(training.allow_low_precision):
        return plan_run(Run.prepared(training, canonical(z), window), memory or Memory(), segment)


def planned_once(run: Run, memory: Memory, segment: Segment | int | None) -> Plan:
    """`plan_run`, made once for a step, the shapes that it works on and a budget."""
    about, known = (run.signature, run.begin, memory), run.programs.plans
    if (about, segment) not in known:
        made = known[about, segment] = plan_run(run, memory, segment)
        # Whoever asks for the segment that was chosen wants the same plan.
        known.setdefault((about, made.segment), made)
    return known[about, segment]


def plan_run(run: Run, memory: Memory, segment: Segment | int | None) -> Plan:
    """`plan` for a run that is prepared."""
    chosen = run.chosen(segment)
    kinds: list[LeafKind] = [chosen.keep] if isinstance(segment, Segment) else _kinds(run, chosen)
    costs = _measured(run, chosen, kinds, memory)
    lengths = None if segment is None and chosen.loop == "scan" else [chosen.length]
    steps = len(run.feed) - run.begin
    found = planned(costs, steps, memory, lengths=lengths)
    rehearsal = found.length * costs.leaves[found.keep].step_seconds
    call_seconds = _seconds(run.contract.recheck) + rehearsal
    return replace(found, loop=chosen.loop if found.length > 1 else "steps", call_seconds=call_seconds)


def _kinds(run: Run, segment: Segment) -> list[LeafKind]:
    """What a step may keep: what was chosen, and linearisations where single steps can leave them."""
    choices = first_choices(run.programs.rule, run.feed, run.given, run.state)
    if not choices.linearises or segment.loop != "steps":
        return [segment.keep]
    return [choices.keep, "linearisation"]


def _measured(run: Run, segment: Segment, kinds: list[LeafKind], memory: Memory) -> Costs:
    leaves: dict[LeafKind, Leaf] = {kind: _leaf(run, replace(segment, keep=kind)) for kind in kinds}
    slower: list[Tier] = [tier for tier in TIERS[1:] if getattr(memory, tier)]
    transfers: dict[Tier, tuple[float, float]] = {tier: _transfer(run, tier, memory) for tier in slower}
    starting, reading = _walk(run, segment)
    return Costs(
        nbytes(run.state),
        min(leaf.step_seconds for leaf in leaves.values()),
        leaves,
        {tier: save for tier, (save, _) in transfers.items()},
        {tier: restore for tier, (_, restore) in transfers.items()},
        working_bytes=3 * nbytes(run.state) + nbytes((run.given.args, run.given.groups)),
        host_seconds=starting,
        read_seconds=reading,
        compiled=segment.loop != "steps",
    )


def _leaf(run: Run, segment: Segment) -> Leaf:
    runner = run.runner(segment)
    steps = len(runner.steps(0))
    cotangent, total = floating(run.state)[0], run.programs.zeros(run.given.z)
    kept, _ = runner.keep(0, run.state)

    def step() -> None:
        jax.block_until_ready(runner.keep(0, run.state)[1]().state)

    def adjoint() -> None:
        nonlocal total
        pulled = jax.block_until_ready(runner.pull(0, kept, cotangent, total))
        total = pulled.total

    forward = _seconds(step) / steps
    return Leaf(nbytes((kept.states, kept.beside)) // steps, forward, _seconds(adjoint) / steps, forward)


def _transfer(run: Run, tier: Tier, memory: Memory) -> tuple[float, float]:
    """Seconds to save and to restore one state, not hidden behind compute."""
    saves, restores = [], []
    with Stores(memory.path) as stores:
        for at in range(_REPEATS):
            start = perf_counter()
            stores.save(at, run.state, tier)
            stores.drop(at) if tier == "disk" else stores.restore(at)
            saves.append(perf_counter() - start)
            stores.save(_REPEATS + at, run.state, tier)
            stores.prefetch(_REPEATS + at)
            start = perf_counter()
            jax.block_until_ready(stores.restore(_REPEATS + at))
            restores.append(perf_counter() - start)
    return median(saves), median(restores)


def _walk(run: Run, segment: Segment) -> tuple[float, float]:
    """What a walk adds to its steps on the host: its start, and reading a batch."""
    runner, stamp = run.runner(segment), run.programs.stamp
    steps = len(runner.steps(0))

    def read() -> None:
        runner.forget()
        runner.batches(0)

    def prepare() -> Any:
        return runner.advance(0, run.state).state, stamp(runner.batches(0))

    return _seconds(prepare), _seconds(read) / steps


def _seconds(work: Callable[[], Any]) -> float:
    """Until `work` returns: what it started on the device is waited for beside the clock."""
    jax.block_until_ready(work())
    times = []
    for _ in range(_REPEATS):
        start = perf_counter()
        started = work()
        times.append(perf_counter() - start)
        jax.block_until_ready(started)
    return median(times)
