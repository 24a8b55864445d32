"""What a schedule is predicted to cost: steps, bytes and seconds, counted action by action."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from metagradient.replay.budget import Costs, LeafKind
from metagradient.replay.hierarchy import Block
from metagradient.replay.schedule import (
    TIERS,
    Action,
    Advance,
    Drop,
    Keep,
    PullBack,
    Restore,
    Save,
    Schedule,
    Tier,
    binomial_advances,
)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a metagradient is predicted to cost under one schedule.

    Arguments:
        name: the schedule, in words.
        keep: what a step leaves to its adjoint.
        length: steps a segment.
        forward_steps: steps taken, replays included, as `Runner` counts them.
        adjoint_steps: steps pulled back.
        states: most boundary states stored at once, by tier.
        bytes: most bytes held at once, by tier; on the device with kept segments and states at work.
        seconds: predicted, without compilation and the objective.
    """

    name: str
    keep: LeafKind
    length: int
    forward_steps: int
    adjoint_steps: int
    states: dict[Tier, int] = field(hash=False)
    bytes: dict[Tier, int] = field(hash=False)
    seconds: float


def price(schedule: Schedule, costs: Costs, steps: int, *, length: int = 1, keep: LeafKind = "state") -> Estimate:
    """What a schedule is predicted to cost.

    Arguments:
        schedule: any schedule.
        costs: what the parts of the run cost.
        steps: steps to differentiate, T.
        length: steps a segment.
        keep: what a step leaves to its adjoint; `costs` must price it.

    Cost: a walk over its actions.

    >>> from metagradient.schedule import TwoLevel
    >>> price(TwoLevel(10), Costs.on_paper("1GB", 1.0), 100).forward_steps
    181
    """
    return walked(schedule.actions(-(-steps // length)), costs, steps, length, keep, type(schedule).__name__)


def walked(
    actions: Iterable[Action | Block], costs: Costs, steps: int, length: int, keep: LeafKind, name: str
) -> Estimate:
    """As `price`, for actions of which some may be binomial parts in one piece."""
    leaf, ends = costs.leaves[keep], costs.elides(keep, length)
    last = -(-steps // length) - 1
    stored: dict[int, Tier] = {}
    states, most = dict.fromkeys(TIERS, 0), dict.fromkeys(TIERS, 0)
    advances = elided = kept = room = 0
    transfers = 0.0
    before = None
    for action in actions:
        more_states = more_kept = 0
        match action:
            case Advance(start, stop):
                advances += stop - start
            case Save(at, tier):
                stored[at] = tier
                states[tier] += 1
                transfers += costs.save_seconds.get(tier, 0.0)
            case Restore(at):
                transfers += costs.restore_seconds.get(stored[at], 0.0)
            case Drop(at):
                states[stored.pop(at)] -= 1
            case Keep():
                kept += 1
            case PullBack(segment):
                # The objective asks for the end of the last segment, and a Keep that follows for that of any other.
                elided += ends and isinstance(before, Keep) and segment < last
                kept -= 1
            case Block(segments, slots):
                advances += binomial_advances(len(segments), slots)
                elided += ends * (len(segments) - (segments.stop > last))
                more_states, more_kept = min(slots, len(segments) - 1), 1
        for tier in TIERS:
            most[tier] = max(most[tier], states[tier] + (more_states if tier == "device" else 0))
        device_states, device_kept = states["device"] + more_states, kept + more_kept
        room = max(room, device_states * costs.state_bytes + device_kept * length * leaf.bytes)
        before = action
    used: dict[Tier, int] = {tier: most[tier] * costs.state_bytes for tier in TIERS}
    used["device"] = room - costs.room(0, transfers=any(most[tier] for tier in TIERS[1:]))
    seconds = (
        advances * length * costs.a_step(keep)
        + (steps - elided) * leaf.step_seconds
        + steps * leaf.adjoint_seconds
        + transfers
        + (advances + 2 * (last + 1)) * costs.a_walk(keep, length)
    )
    return Estimate(name, keep, length, advances * length + steps - elided, steps, most, used, seconds)
