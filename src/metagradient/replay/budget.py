"""What a metagradient may use, and what its parts cost: bytes and seconds, measured here or given on paper."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Self, TypeAlias, get_args

from metagradient.errors import ScheduleError
from metagradient.replay.schedule import TIERS, Tier

LeafKind: TypeAlias = Literal["state", "gradient", "linearisation"]
"""What a step leaves to its adjoint; `Segment.keep`."""

KINDS: tuple[LeafKind, ...] = get_args(LeafKind)

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)\s*(?:([kmgtpe])(i?)b?|b|)\s*", re.IGNORECASE)
_PREFIXES = "kmgtpe"

# Measured on a small decoder: a step that keeps, and its adjoint, in plain steps.
_DECODER: Mapping[LeafKind, tuple[float, float]] = MappingProxyType(
    {"state": (1.0, 2.41), "gradient": (1.0, 2.45), "linearisation": (1.33, 1.84)}
)


def parse_bytes(size: float | str) -> int:
    """A number of bytes, from a number or a text such as "4GB", "512 MiB", "1.5e9".

    Errors: `ScheduleError` for anything else, and for negative sizes.

    >>> parse_bytes("4GB"), parse_bytes("512MiB"), parse_bytes(1e3)
    (4000000000, 536870912, 1000)
    """
    if isinstance(size, (int, float)) and not isinstance(size, bool) and isfinite(size) and size >= 0:
        return int(size)
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if not found:
        raise ScheduleError(f'a size is a number of bytes, or a text such as "4GB" or "512MiB", not {size!r}')
    number, prefix, binary = found.groups()
    power = _PREFIXES.index(prefix.lower()) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def format_bytes(size: float) -> str:
    """Bytes for people, in decimal units.

    >>> format_bytes(0), format_bytes(1536), format_bytes(96e9)
    ('0 B', '1.54 kB', '96 GB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if size < 999.5 or unit == "PB":
            break
        size /= 1000
    return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"


@dataclass(frozen=True, slots=True)
class Memory:
    """Budgets, in bytes or as text ("4GB", "512MiB").

    Arguments:
        device: for stored boundary states, the segments kept for their pull-back, the states at work, and `args`. None
            takes half of the free memory.
        host: for boundary states in host memory. None stores none there.
        disk: for boundary states on disk. None stores none there.
        path: the folder of the disk tier; None takes the system's temporary folder.

    Errors: `ScheduleError` for a size that can't be read, and for a path without a budget.

    >>> Memory(device="2GB", disk="1TiB").disk
    1099511627776
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None
    path: Path | None = None

    def __init__(
        self,
        device: float | str | None = None,
        host: float | str | None = None,
        disk: float | str | None = None,
        path: Path | str | None = None,
    ):
        for tier, size in zip(TIERS, (device, host, disk), strict=True):
            try:
                object.__setattr__(self, tier, None if size is None else parse_bytes(size))
            except ScheduleError as error:
                raise ScheduleError(f"{tier}: {error}") from None
        object.__setattr__(self, "path", None if path is None else Path(path))
        if path is not None and disk is None:
            raise ScheduleError(f"path={str(path)!r} is where states on disk go: say how many bytes, with disk=")

    @classmethod
    def of(cls, budget: "Memory | str | float") -> "Memory":
        """A budget as it is, or one of the device alone, given in bytes or as text."""
        if isinstance(budget, Memory):
            return budget
        if not isinstance(budget, str | int | float) or isinstance(budget, bool):
            raise ScheduleError(f'memory is {budget!r}: give mg.Memory(device=, host=, disk=), or a size such as "4GB"')
        return cls(device=budget)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One way to keep a step for its adjoint.

    Arguments:
        bytes: held for a kept step until it is pulled back, its state included.
        step_seconds: a step that keeps this.
        adjoint_seconds: the adjoint of a step, with what was kept at hand.
        advance_seconds: a step in a segment compiled this way, of which nothing is kept; None takes the plain step of
            `Costs`. Where one program serves both, as in `Runner`, it is `step_seconds`.

    Errors: `ScheduleError` for negative or non-finite figures.
    """

    bytes: int
    step_seconds: float
    adjoint_seconds: float
    advance_seconds: float | None = None

    def __post_init__(self) -> None:
        _require_positive("bytes kept of a step", self.bytes)
        for name in ("step_seconds", "adjoint_seconds", "advance_seconds"):
            _require_figure(name, getattr(self, name) or 0)


@dataclass(frozen=True, slots=True)
class Costs:
    """What the parts of a metagradient cost: measured, or given on paper.

    Arguments:
        state_bytes: one state.
        advance_seconds: one step of plain training.
        leaves: the ways to keep a step that may be chosen.
        save_seconds: what saving one state adds to a run, by tier; the device's is 0 unless given.
        restore_seconds: what restoring one state adds to a run, by tier; likewise.
        working_bytes: on the device beside stored and kept states: states at work, cotangents, temporary arrays. None
            takes three states (a step's two, and a cotangent).
        transfer_bytes: on the device for saves under way to slower tiers, where these are used. None takes two states.
        dispatch_seconds: what each walk over a segment adds, whatever its length (fingerprints, a program's start).
        host_seconds: what the host takes to prepare a walk, whatever its length: hidden behind the device's work on the
            walk before where that takes as long.
        read_seconds: what the host takes to read the batch of one step: hidden likewise.
        compiled: whether a segment of several steps is one program. Single steps driven from Python needn't take the
            last step of what is kept as "state" unless its end is asked for.

    Seconds add up in the planner: it is an upper bound to give a save or a restore its whole transfer, of which the
    executor hides what it can behind compute.

    Errors: `ScheduleError` for figures that are negative or not finite, and for unknown tiers and leaves.
    """

    state_bytes: int
    advance_seconds: float
    leaves: Mapping[LeafKind, Leaf]
    save_seconds: Mapping[Tier, float] = field(default_factory=dict)
    restore_seconds: Mapping[Tier, float] = field(default_factory=dict)
    working_bytes: int | None = None
    transfer_bytes: int | None = None
    dispatch_seconds: float = 0.0
    host_seconds: float = 0.0
    read_seconds: float = 0.0
    compiled: bool = False

    def __post_init__(self) -> None:
        _require_positive("state_bytes", self.state_bytes)
        for name in ("advance_seconds", "dispatch_seconds", "host_seconds", "read_seconds"):
            _require_figure(name, getattr(self, name))
        for name in ("working_bytes", "transfer_bytes"):
            _require_figure(name, getattr(self, name) or 0)
        for name in ("save_seconds", "restore_seconds"):
            for tier, seconds in getattr(self, name).items():
                if tier not in TIERS:
                    raise ScheduleError(f"{name}: a tier is one of {', '.join(TIERS)}, not {tier!r}")
                _require_figure(f"{name}[{tier!r}]", seconds)
        if not self.leaves or set(self.leaves) - set(KINDS):
            raise ScheduleError(f"leaves: give some of {', '.join(KINDS)}, not {list(self.leaves)}")

    @classmethod
    def on_paper(
        cls,
        state_bytes: float | str,
        step_seconds: float,
        *,
        parameter_bytes: float | str | None = None,
        activation_bytes: float | str | None = None,
        adjoint_seconds: float | None = None,
        working_bytes: float | str | None = None,
        host_bandwidth: float | str | None = None,
        disk_bandwidth: float | str | None = None,
    ) -> Self:
        """Costs of hardware that isn't here, with the ratios that were measured of a decoder where none are given.

        Arguments:
            state_bytes: one state, over all devices.
            step_seconds: one step of plain training.
            parameter_bytes: what keeping a gradient adds to a step's state; None takes a third of the state (Adam).
            activation_bytes: what keeping a linearisation adds to that; None leaves that choice out.
            adjoint_seconds: one adjoint step with its state kept; None takes 2.41 steps, and the other ways to keep a
                step scale with it.
            working_bytes: as in `Costs`.
            host_bandwidth: bytes a second between device and host, over all devices; "50GB" is 50 GB/s. None leaves
                slower tiers without a price.
            disk_bandwidth: bytes a second between host and disk; a state on disk crosses both.

        Errors: `ScheduleError` for figures that can't be read, and for a disk without a way to it.

        >>> costs = Costs.on_paper("96GB", 12.0, host_bandwidth="100GB", disk_bandwidth="10GB")
        >>> costs.save_seconds["host"], round(costs.save_seconds["disk"], 2)
        (0.96, 10.56)
        """
        state = parse_bytes(state_bytes)
        gradient = state // 3 if parameter_bytes is None else parse_bytes(parameter_bytes)
        scale = 1.0 if adjoint_seconds is None else adjoint_seconds / (_DECODER["state"][1] * step_seconds)
        kept: dict[LeafKind, int] = {"state": state, "gradient": state + gradient}
        if activation_bytes is not None:
            kept["linearisation"] = state + gradient + parse_bytes(activation_bytes)
        leaves: dict[LeafKind, Leaf] = {}
        for kind, size in kept.items():
            step, adjoint = (seconds * step_seconds for seconds in _DECODER[kind])
            leaves[kind] = Leaf(size, step, scale * adjoint, step)
        seconds = _transfers(state, host_bandwidth, disk_bandwidth)
        working = None if working_bytes is None else parse_bytes(working_bytes)
        return cls(state, step_seconds, leaves, seconds, seconds, working)

    def slots(self, tier: Tier, memory: Memory) -> int:
        """States of a slower tier that a budget has room for.

        Errors: `ScheduleError` where the tier has a budget and no price.
        """
        budget = getattr(memory, tier)
        if not budget:
            return 0
        if tier not in self.save_seconds or tier not in self.restore_seconds:
            raise ScheduleError(
                f"the {tier} has a budget, but no seconds: give save_seconds and restore_seconds for it"
            )
        return budget // self.state_bytes

    def room(self, device: int, *, transfers: bool) -> int:
        """Device bytes left for stored and kept states; negative where there is none.

        Arguments:
            device: the budget, in bytes.
            transfers: whether slower tiers are used.
        """
        working = 3 * self.state_bytes if self.working_bytes is None else self.working_bytes
        under_way = 2 * self.state_bytes if self.transfer_bytes is None else self.transfer_bytes
        return device - working - (under_way if transfers else 0)

    def elides(self, kind: LeafKind, length: int) -> bool:
        """Whether the last step of what is kept is only taken if its end is asked for."""
        return kind == "state" and (length == 1 or not self.compiled)

    def a_step(self, kind: LeafKind) -> float:
        """Seconds of a step of which nothing is kept."""
        own = self.leaves[kind].advance_seconds
        return self.advance_seconds if own is None else own

    def a_walk(self, kind: LeafKind, length: int) -> float:
        """Seconds that a walk over a segment adds to its steps, those included that the device waits for the host."""
        device = self.dispatch_seconds + length * self.a_step(kind)
        return self.dispatch_seconds + max(0.0, self.host_seconds + length * self.read_seconds - device)


def _transfers(state: int, host_bandwidth: float | str | None, disk_bandwidth: float | str | None) -> dict[Tier, float]:
    if host_bandwidth is None:
        if disk_bandwidth is not None:
            raise ScheduleError("a state reaches the disk through the host: give host_bandwidth too")
        return {}
    seconds: dict[Tier, float] = {"host": state / _bandwidth(host_bandwidth)}
    if disk_bandwidth is not None:
        seconds["disk"] = seconds["host"] + state / _bandwidth(disk_bandwidth)
    return seconds


def _bandwidth(given: float | str) -> float:
    bandwidth = parse_bytes(given)
    _require_positive("a bandwidth", bandwidth)
    return bandwidth


def _require_figure(name: str, value: float) -> None:
    if not isfinite(value) or value < 0:
        raise ScheduleError(f"{name} must be finite and not negative, but is {value!r}")


def _require_positive(name: str, value: float) -> None:
    if not isfinite(value) or value <= 0:
        raise ScheduleError(f"{name} must be positive, but is {value!r}")
