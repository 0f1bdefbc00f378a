"""How the process keeps memory."""

from __future__ import annotations

import ctypes
from typing import Final

# Parameters of glibc's mallopt(3).
M_TRIM_THRESHOLD: Final = -1
M_TOP_PAD: Final = -2
M_MMAP_MAX: Final = -4
TOP_PAD_BYTES: Final = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next allocation; for glibc only.

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
        and mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        and mallopt(M_TOP_PAD, TOP_PAD_BYTES)
    )
