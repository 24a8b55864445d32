"""Exact gradients through whole training runs, in bounded memory, on JAX.

The public names are imported when they are first used: `import metagradient` alone takes no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metagradient import errors, schedule, smoothness, updates
    from metagradient._check import CheckReport, check
    from metagradient._jax import compilation_cache
    from metagradient._plan import plan
    from metagradient._replay import Replay, Stats
    from metagradient._train import states, train, train_many
    from metagradient.counts import CountSurrogate, probe_at
    from metagradient.descent.loop import Best, Descent, MetaStep, descend, fresh_seed
    from metagradient.metagrad import Evaluation, Metagradient, value_and_metagrad
    from metagradient.metaparameters import PerExample, PerGroup, PerStep, Shared
    from metagradient.objectives import mean_over
    from metagradient.replay.budget import Memory
    from metagradient.replay.plan import Plan
    from metagradient.smoothness.probe import Smoothness, metasmoothness
    from metagradient.step.rules import true_derivative
    from metagradient.step.segment import Segment
    from metagradient.training import Training, TrainState

__version__ = "0.1.0"

__all__ = [
    "Best",
    "CheckReport",
    "CountSurrogate",
    "Descent",
    "Evaluation",
    "Memory",
    "MetaStep",
    "Metagradient",
    "PerExample",
    "PerGroup",
    "PerStep",
    "Plan",
    "Replay",
    "Segment",
    "Shared",
    "Smoothness",
    "Stats",
    "TrainState",
    "Training",
    "check",
    "compilation_cache",
    "descend",
    "errors",
    "fresh_seed",
    "mean_over",
    "metasmoothness",
    "plan",
    "probe_at",
    "schedule",
    "smoothness",
    "states",
    "train",
    "train_many",
    "true_derivative",
    "updates",
    "value_and_metagrad",
]

_MODULES = ("errors", "schedule", "smoothness", "updates")
# As in the imports above. A module of this package can't bear the name of one of its functions: once imported, it would
# be found under that name.
_NAMES = {
    "_check": ("CheckReport", "check"),
    "_jax": ("compilation_cache",),
    "_plan": ("plan",),
    "_replay": ("Replay", "Stats"),
    "_train": ("states", "train", "train_many"),
    "counts": ("CountSurrogate", "probe_at"),
    "descent.loop": ("Best", "Descent", "MetaStep", "descend", "fresh_seed"),
    "metagrad": ("Evaluation", "Metagradient", "value_and_metagrad"),
    "metaparameters": ("PerExample", "PerGroup", "PerStep", "Shared"),
    "objectives": ("mean_over",),
    "replay.budget": ("Memory",),
    "replay.plan": ("Plan",),
    "smoothness.probe": ("Smoothness", "metasmoothness"),
    "step.rules": ("true_derivative",),
    "step.segment": ("Segment",),
    "training": ("TrainState", "Training"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
