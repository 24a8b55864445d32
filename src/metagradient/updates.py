"""Updates for `descend`, and projections: `mg.updates`."""

from metagradient.descent.updates import (
    ball,
    block_coordinate,
    box,
    counts,
    exchange,
    inside,
    normalise,
    normalised,
    pixel_ascent,
    sign,
    simplex,
)

__all__ = [
    "ball",
    "block_coordinate",
    "box",
    "counts",
    "exchange",
    "inside",
    "normalise",
    "normalised",
    "pixel_ascent",
    "sign",
    "simplex",
]
