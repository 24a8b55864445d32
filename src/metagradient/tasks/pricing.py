"""`metagradient plan`: what a metagradient would cost on hardware that need not be here."""

from dataclasses import dataclass

from metagradient.errors import ConfigError
from metagradient.replay.budget import Costs, Memory
from metagradient.replay.plan import Plan, duration, plan


@dataclass(frozen=True)
class Pricing:
    """Size a metagradient on paper: schedule, memory and seconds from a few figures of a run and its hardware.

    Sizes and bandwidths are bytes and bytes a second, as numbers or text ("96GB", "512MiB"). Ratios that are not given
    (an adjoint step takes 2.41 plain steps) are those measured of a decoder.
    """

    steps: int = 0
    """training steps, T"""
    window: int | None = None
    """differentiate the last steps only, as a gradient in counts does; none differentiates all of them"""
    meta_steps: int = 1
    """metagradients in all, one after the other"""
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

    Errors: `ConfigError` for a figure that is missing or out of range; `ScheduleError` for sizes that can't be read,
        and for budgets in which nothing fits.
    """
    for name in ("steps", "state_bytes", "step_seconds", "device"):
        if not getattr(config, name):
            raise ConfigError(f"metagradient plan needs --{name.replace('_', '-')}")
    window = config.steps if config.window is None else config.window
    if not 1 <= window <= config.steps or config.meta_steps < 1:
        raise ConfigError(f"--window must be from 1 to the {config.steps} steps, and --meta-steps at least 1")
    costs = Costs.on_paper(
        config.state_bytes,
        config.step_seconds,
        activation_bytes=config.activation_bytes,
        adjoint_seconds=config.adjoint_seconds,
        host_bandwidth=config.device_bandwidth,
        disk_bandwidth=config.disk_bandwidth,
    )
    found = plan(costs, window, Memory(config.device, config.host, config.disk))
    print(found)
    before = (config.steps - window) * config.step_seconds
    if before:
        print(f"before it: {config.steps - window} plain steps, {duration(before)}")
    if config.meta_steps > 1:
        print(f"{config.meta_steps} of them: {duration(config.meta_steps * (before + found.seconds))}")
    return found
