"""Updates for `descend`, and projections: `mg.updates`."""

from metagradient.descent.updates import (
    ascent,
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
    "ascent",
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
