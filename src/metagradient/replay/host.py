"""Memory of the device and of its host: what is free, and giving back what was freed."""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache

import jax


def free_bytes() -> int:
    """Free memory of the device that computes: of the host, where that is the device."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return free_host_bytes()


def free_host_bytes() -> int:
    """Free memory of the host."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def give_back() -> None:
    """Return to the system what the C library keeps of memory that was freed.

    glibc keeps freed pages of states and temporaries between others that live: a process would stay as large as its
    largest pass. Nothing happens with other C libraries.
    """
    _trim()(0)


@cache
def _trim() -> Callable[[int], object]:
    if not sys.platform.startswith("linux"):
        return lambda _: None
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
