"""Updates for `descend`, and projections: `mg.updates`."""

from metagradient.descent.updates import box, normalise, normalised

__all__ = ["box", "normalise", "normalised"]
