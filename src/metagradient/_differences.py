"""A derivative in one direction, beside central differences that carry a bound on their own error."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_LEVELS = 12
_KINK = 0.1
# Differences that are known no better than this decide nothing.
_VAGUE = 0.01
# Where two ways through the same program differ by no more, they agree.
_ROUNDING, _ROUNDING_IN_SINGLE = 1e-6, 1e-3
# By how much steps of differences are larger where the twin computes in float32.
_IN_SINGLE = 16
# A share of the objective's value that a change of z by its whole size must move, to be told from none.
_NEGLIGIBLE = 1e-10


@dataclass(frozen=True)
class Rivals:
    """Derivatives by JAX's rules; see `Direction`.

    Arguments:
        metagradient, forward, through: as there.
    """

    metagradient: float
    forward: float | None
    through: float | None


@dataclass(frozen=True)
class Direction:
    """The metagradient in one direction, beside other ways to the same number, in float64.

    Arguments:
        metagradient: its derivative in this direction.
        forward: the same by forward mode, a step at a time, from the first to the last; None where a step refuses that.
            Both are derivatives by JAX's rules.
        through: by forward mode too, with gradients going through where the run stops them; None where that makes no
            difference. It is the derivative of the run's value.
        steps: step sizes h of central differences, largest first.
        differences: central differences of the run's value at those steps.
        extrapolated: of them, by Richardson (Ridders' choice of the best).
        bound: how far the extrapolation may be off, by its own estimate and rounding.
        kink: by how much one-sided differences stay apart as h shrinks, as a share of the derivative. Zero where the
            run is differentiable; ties in a max pooling, or a relu at zero, keep it up.
        negligible: what can't be told from zero.
        rounding: relative error up to which two ways through the same program agree.
    """

    metagradient: float
    forward: float | None
    through: float | None
    steps: list[float]
    differences: list[float]
    extrapolated: float
    bound: float
    kink: float
    negligible: float
    rounding: float

    @property
    def derivative(self) -> float:
        """What differences should be."""
        return self.metagradient if self.through is None else self.through

    @property
    def size(self) -> float:
        """What the errors of differences are relative to."""
        return max(abs(self.derivative), abs(self.extrapolated), self.negligible) or 1.0

    @property
    def relative_error(self) -> float:
        """Derivative and differences, apart."""
        return abs(self.extrapolated - self.derivative) / self.size

    @property
    def forward_error(self) -> float | None:
        """Metagradient and forward mode, apart."""
        if self.forward is None:
            return None
        return _apart(self.metagradient, self.forward, self.negligible)

    @property
    def forward_agrees(self) -> bool:
        """Whether forward mode, where there is one, gives the metagradient."""
        return self.forward_error is None or self.forward_error <= self.rounding

    def agrees(self, tolerance: float) -> bool:
        """Whether differences confirm the derivative."""
        return not self.vague and self.relative_error <= tolerance + 4 * self.bound / self.size

    @property
    def kinked(self) -> bool:
        """Whether the run isn't differentiable here."""
        return self.kink > _KINK

    @property
    def vague(self) -> bool:
        """Whether the differences are too rough to decide anything."""
        return self.bound > _VAGUE * self.size or self.kinked


def _apart(a: float, b: float, negligible: float) -> float:
    """Relative difference of two numbers, of which both may be nothing."""
    return abs(a - b) / (max(abs(a), abs(b), negligible) or 1.0)


def differ(a: float, b: float) -> bool:
    """Whether two derivatives are apart by more than rounding."""
    return _apart(a, b, 0.0) > _ROUNDING


def compared(
    rivals: Rivals, value: Callable[[float], float], step: float, tolerance: float, *, single: bool
) -> Direction:
    """Derivatives in a direction beside differences of the run's value.

    Arguments:
        rivals: the derivatives.
        value: of the run, at a distance in the direction.
        step: largest distance; halved until differences settle, and settle on the derivative.
        tolerance: relative error that matters.
        single: whether some of the run is computed in float32.
    """
    middle = value(0.0)
    negligible, rounding = _NEGLIGIBLE * abs(middle), _ROUNDING_IN_SINGLE if single else _ROUNDING
    through = rivals.through
    if through is None or rivals.forward is None or _apart(through, rivals.forward, negligible) <= rounding:
        through = None
    expected = rivals.metagradient if through is None else through
    # A power of two: Python numbers are taken in float32, where they stand beside float64 arrays.
    h, steps, central, gap, jump, kink = 2.0 ** round(np.log2(step)), [], [], 0.0, 0.0, 0.0
    h, precision = (_IN_SINGLE * h, np.finfo(np.float32)) if single else (h, np.finfo(np.float64))
    best, bound, row = 0.0, np.inf, []

    def settled() -> bool:
        error = tolerance * max(abs(best), abs(expected))
        return bound <= 0.1 * error and abs(best - expected) <= error + 4 * bound

    while len(steps) < _LEVELS and (len(steps) < 3 or not settled()):
        down, up = value(-h), value(h)
        steps.append(h)
        central.append((up - down) / (2 * h))
        noise = float(precision.eps) * max(abs(up), abs(down)) / h
        # One-sided differences of a smooth run close in as h does; what stays, the same at every h, is a kink.
        gap, wider = ((up - middle) - (middle - down)) / h, gap
        jump, last = 2 * gap - wider, jump
        size = max(abs(expected), abs(central[-1]), negligible) or 1.0
        stays = abs(jump - last) < 0.25 * abs(jump)
        kink = max(abs(jump) - 8 * noise, 0.0) / size if stays else 0.0
        # Central differences err by powers of h squared; every column takes one more away (Ridders 1982).
        row, before = [central[-1]], row
        found, error = 0.0, np.inf
        for j, above in enumerate(before):
            row.append(row[j] + (row[j] - above) / (4 ** (j + 1) - 1))
            this = max(abs(row[-1] - row[j]), abs(row[-1] - above)) + noise
            found, error = (row[-1], this) if this < error else (found, error)
        # What larger steps agreed on must hold at smaller ones.
        if error < bound or abs(found - best) > 4 * (error + bound):
            best, bound = found, error
        h /= 2
    return Direction(
        rivals.metagradient, rivals.forward, through, steps, central, best, float(bound), kink, negligible, rounding
    )
