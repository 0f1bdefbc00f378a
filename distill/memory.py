"""What is freed is kept: features that come and go with every batch are not zeroed anew each time.

The C library gives large pieces of memory back to the system at once, and the system fills each
page with zeros when it is used again; for a teacher on a CPU that is a quarter of its time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from typing import Final

M_TRIM_THRESHOLD: Final = -1
M_MMAP_MAX: Final = -4
NEVER: Final = 2**31 - 1

KEEP_FREED: Final[Mapping[str, str]] = {
    "MALLOC_ARENA_MAX": "1",  # what one thread frees another one can use
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(NEVER),
}
"""For the environment of processes to come; other C libraries than GNU's do not heed it."""


def keep_freed_memory() -> None:
    """Have this process keep what its main thread frees, where the C library can do that."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, NEVER)
