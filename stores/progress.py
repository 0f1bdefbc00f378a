"""Progress of a long job: a bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Final

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_SECONDS: Final = 10.0


class Progress:
    """Count units of work; show rate and remaining time. Use in a ``with``.

    Args:
        total: Units in all; 0 if that is not known.
        unit: What is counted, in the plural.
        label: What is being done.
        done: Units that an earlier run did; they do not count for the rate.
    """

    def __init__(self, total: int, *, unit: str, label: str, done: int = 0) -> None:
        self._total, self._unit, self._label = total, unit, label
        self._done = self._start = self._last = done
        self._began = self._logged = time.monotonic()
        self._bar = (
            tqdm(total=total or None, initial=done, unit=f" {unit}", desc=label, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._began < self._logged and self._done != self._last:
            self._log()  # short jobs log nothing; long ones end with a last line

    def advance(self, units: int = 1, *, note: str = "") -> None:
        """Add finished units; ``note`` is shown behind the numbers."""
        self._done += units
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(units)
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._log(note)

    def _log(self, note: str = "") -> None:
        self._logged, self._last = time.monotonic(), self._done
        rate = (self._done - self._start) / max(self._logged - self._began, 1e-9)
        if self._done > self._total:  # the total was an estimate
            self._total = 0
        if not self._total:
            log.info(
                "%s: %d %s, %.1f per second%s",
                *(self._label, self._done, self._unit, rate, f", {note}" if note else ""),
            )
            return
        left = tqdm.format_interval((self._total - self._done) / rate) if rate else "unknown"
        log.info(
            "%s: %d of %d %s, %.1f per second, %s left%s",
            *(self._label, self._done, self._total, self._unit, rate, left),
            f", {note}" if note else "",
        )
