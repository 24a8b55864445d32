"""`metagradient plan`: what a metagradient would cost on hardware that need not be here."""

from dataclasses import dataclass

from metagradient.errors import ConfigError
from metagradient.replay.budget import Costs, Memory
from metagradient.replay.plan import Plan, plan


@dataclass(frozen=True)
class Pricing:
    """Size a metagradient on paper: schedule, memory and seconds from a few figures of a run and its hardware.

    Sizes and bandwidths are bytes and bytes a second, as numbers or text ("96GB", "512MiB"). Ratios that are not given
    (an adjoint step takes 2.41 plain steps) are those measured of a decoder.
    """

    steps: int = 0
    """training steps, T"""
    state_bytes: str = ""
    """one training state: parameters and moments (8 billion parameters under Adam in float32: 96GB)"""
    step_seconds: float = 0.0
    """one plain training step"""
    device: str = ""
    """memory for states on the device, or on all devices together"""
    host: str | None = None
    """memory for states on the host; none uses no host memory"""
    disk: str | None = None
    """room for states on disk; none uses no disk"""
    device_bandwidth: str | None = None
    """between device and host"""
    disk_bandwidth: str | None = None
    """between host and disk"""
    activation_bytes: str | None = None
    """activations of a step, to let it keep its linearisation; none leaves that choice out"""
    adjoint_seconds: float | None = None
    """one adjoint step; none takes 2.41 plain steps"""


def run(config: Pricing) -> Plan:
    """Print a plan, and return it.

    Errors: `ConfigError` for a figure that is missing; `ScheduleError` for sizes that can't be read, and for budgets
        in which nothing fits.
    """
    for name in ("steps", "state_bytes", "step_seconds", "device"):
        if not getattr(config, name):
            raise ConfigError(f"metagradient plan needs --{name.replace('_', '-')}")
    costs = Costs.on_paper(
        config.state_bytes,
        config.step_seconds,
        activation_bytes=config.activation_bytes,
        adjoint_seconds=config.adjoint_seconds,
        host_bandwidth=config.device_bandwidth,
        disk_bandwidth=config.disk_bandwidth,
    )
    found = plan(costs, config.steps, Memory(config.device, config.host, config.disk))
    print(found)
    return found
