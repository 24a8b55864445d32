"""Every error that metagradient raises on purpose: what is wrong, where, and what to do."""


class MetagradientError(Exception):
    """Base class of all errors that metagradient raises on purpose."""


class StructureError(MetagradientError, ValueError):
    """A pytree has the wrong structure, shape or dtype: z, a state, a batch, or an objective's value."""


class BatchError(MetagradientError, ValueError):
    """A batch source is empty, uneven, lacks an index, holds one out of range, or changes between reads."""


class ScheduleError(MetagradientError, ValueError):
    """A checkpoint schedule cannot be built, or broke one of its promises in the simulator."""


class PrecisionError(MetagradientError, ValueError):
    """Half precision, or a lowered matmul precision, inside the differentiated loop."""


class ImpureStepError(MetagradientError, RuntimeError):
    """A step (or init, or loss) traced to a different program the second time: it is not a pure function."""


class ReplayMismatch(MetagradientError, RuntimeError):
    """A replayed state, or a batch read again, is not, bit for bit, what the first run saw."""


class NonFiniteError(MetagradientError, FloatingPointError):
    """A NaN or infinity appeared in the run or in its adjoint."""


class ConfigError(MetagradientError, ValueError):
    """A command's configuration, or its run directory, can't be used."""


class StoreError(MetagradientError, OSError):
    """A stored state could not be written, read back, or fails its checksum."""


class DataError(MetagradientError, ValueError):
    """A data set on disk is absent, lacks a column, or holds what can't be read."""


class DerivativeError(MetagradientError, ValueError):
    """A loss can't be differentiated twice, or holds a rule of its own that would make the metagradient wrong."""


class CompilerError(MetagradientError, RuntimeError):
    """A compiled program gave other numbers than another one of the same computation."""
