"""Libraries that only some features need."""

from importlib import import_module
from typing import Any

from metagradient.errors import ConfigError


def library(name: str, extra: str) -> Any:
    """Import an optional library.

    Arguments:
        name: of the module.
        extra: of this package, which brings it.

    Errors: `ConfigError` where it isn't installed, saying how to get it.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(f"this needs the {name} library: pip install 'metagradient[{extra}]'") from error
