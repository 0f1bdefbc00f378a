"""The log of a run: JSON lines below ``runs/log``, which decide nothing."""

from __future__ import annotations

import json
import os
import time
import uuid
from typing import Any, Final

from stores.places import Place

LOG_FOLDER: Final = "runs/log"
PART_LINES: Final = 1000
"""Lines of an object. Object stores cannot add to one, so the last is written anew each time."""
WRITE_SECONDS: Final = 5.0


class RunLog:
    """Lines that are written together, every few seconds.

    Args:
        place: Where the store lies.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._name = f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}"
        self._part = 0
        self._lines: list[str] = []
        self._is_written = True
        self._written_at = 0.0

    def add(self, entry: dict[str, Any]) -> None:
        """Add a line, with time and process."""
        self._lines.append(json.dumps({"time": time.time(), "pid": os.getpid(), **entry}))
        self._is_written = False
        if time.monotonic() - self._written_at >= WRITE_SECONDS or len(self._lines) >= PART_LINES:
            self.write()

    def write(self) -> None:
        """Write what is not written yet."""
        if self._is_written:
            return
        text = "".join(f"{line}\n" for line in self._lines)
        self._place.write(f"{LOG_FOLDER}/{self._name}-{self._part:03}.jsonl", text.encode())
        self._is_written, self._written_at = True, time.monotonic()
        if len(self._lines) >= PART_LINES:
            self._part += 1
            self._lines.clear()
