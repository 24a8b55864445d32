"""`metagradient doctor`: what this environment has, and whether it is one that was tested."""

import argparse
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from platform import python_version

import metagradient
from metagradient.versions import untested, untested_python

_REQUIREMENT = re.compile(r"""([\w.-]+)(?:\[([^]]*)])?.*;.*\bextra == ['"]([\w.-]+)['"]""")


def main(arguments: Sequence[str]) -> int:
    """Print versions, devices and extras; returns 0. Needs no extra, and no JAX that works."""
    argparse.ArgumentParser("metagradient doctor", description=__doc__).parse_args(arguments)
    tested = {"python": untested_python(), "jax": untested() if _version("jax") else None}
    rows = {"metagradient": metagradient.__version__, "python": python_version()}
    rows |= {name: _version(name) or "not installed" for name in ("jax", "jaxlib", "optax", "numpy")}
    for name, number in rows.items():
        mark = "" if name not in tested or number == "not installed" else "untested" if tested[name] else "tested"
        print(f"{name:<14}{number:<14}{mark}".rstrip())
    print(f"{'devices':<14}{_devices()}")
    print(f"{'extras':<14}{_extras()}")
    for sentence in filter(None, tested.values()):
        print(f"{sentence}: mg.check says whether a metagradient of yours is right here")
    return 0


def missing(requirements: Sequence[str]) -> dict[str, list[str]]:
    """The distributions that each extra lacks here.

    Arguments:
        requirements: as in the package's metadata: `tyro>=0.9; extra == "cli"`. Those of no extra are left out.
    """
    needs: dict[str, list[str]] = {}
    within: dict[str, list[str]] = {}
    for found in filter(None, map(_REQUIREMENT.match, requirements)):
        name, extras, extra = found.groups()
        needs.setdefault(extra, []).extend([] if extras else [name])
        within.setdefault(extra, []).extend(part.strip() for part in (extras or "").split(",") if part.strip())

    def of(extra: str) -> list[str]:
        return [*needs.get(extra, []), *(name for part in within.get(extra, []) for name in of(part))]

    return {extra: [name for name in of(extra) if _version(name) is None] for extra in sorted(needs)}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> str:
    try:
        import jax

        kinds = [device.device_kind for device in jax.devices()]
    except Exception as error:  # whatever a broken installation raises: it is what the user asks about
        return f"none: {type(error).__name__}: {error}"
    return ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))


def _extras() -> str:
    try:
        lacking = missing(requires("metagradient") or [])
    except PackageNotFoundError:
        return "unknown: metagradient is on the path, but isn't installed"
    whole = ", ".join(extra for extra, names in lacking.items() if not names) or "none"
    absent = [f"{extra} ({', '.join(names)})" for extra, names in lacking.items() if names]
    return f"{whole}; not installed: {', '.join(absent)}" if absent else whole
