"""How the process keeps memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Final

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD: Final = -1
M_TOP_PAD: Final = -2
M_MMAP_MAX: Final = -4
NEVER: Final = -1  # of an unsigned number: the largest
TOP_PAD_BYTES: Final = 64 * 2**20

KEEP_FREED: Final[Mapping[str, str]] = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**64 + NEVER),
    "MALLOC_TOP_PAD_": str(TOP_PAD_BYTES),
    "MALLOC_ARENA_MAX": "1",  # other threads' arenas hold no more than 64 MB in a piece
}
"""The environment in which processes to come keep what they free, whichever thread does it."""


def keep_freed_memory() -> bool:
    """Let this process' main thread keep freed memory for its next allocation; for glibc only.

    By default glibc gives large blocks back to the system at once, and every layer whose result is
    larger than 32 MB, or lies at the heap's end, pays for the zeroed pages of a new one: on a CPU
    that was up to half of a network's time. The process' memory stays at its peak.

    Returns:
        Whether it was done; elsewhere than on glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(
        mallopt(M_MMAP_MAX, 0)
        and mallopt(M_TRIM_THRESHOLD, NEVER)
        and mallopt(M_TOP_PAD, TOP_PAD_BYTES)
    )
