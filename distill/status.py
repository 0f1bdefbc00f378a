"""What one sees of a run: a bar, or lines, and the same in the run's log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, Self

from distill.events import Event, Failure, Labelled, Retry, ShardDone, Usage
from distill.plan import Task
from stores.progress import Progress
from stores.targets import TargetStore

LOG_SECONDS: Final = 10.0
SHOWN_WORKERS: Final = 4
"""Workers whose use is shown one by one on a bar; of more, the mean."""


class RunStatus:
    """Follows the events of a run; use in a ``with``.

    Args:
        store: Whose log gets the lines.
        tasks: All that is to be done.
        label: What is being done.
        device: Of the teacher.
    """

    def __init__(
        self, store: TargetStore, tasks: Sequence[Task], *, label: str, device: str
    ) -> None:
        self._store = store
        self._left = Counter[str]()
        for task in tasks:
            self._left[task.video.id] += sum(len(unit.sets) for unit in task.units)
        self._videos = len(self._left)
        self._videos_done = 0
        self._total = sum(task.num_windows for task in tasks)
        self._frames = self._shards = self._failures = self._retries = 0
        self._workers: dict[str, Usage] = {}
        self._busy = "gpu" if device.startswith("cuda") else "cpu"
        self._began = self._logged_at = time.monotonic()
        self._bar = Progress(self._total, unit="frames", label=label)

    def __enter__(self) -> Self:
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.__exit__(*exception)
        self._log("progress")

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._began

    def note(self, event: Event) -> None:
        """Take an event into account."""
        if isinstance(event, Labelled):
            self._frames += event.num_frames
            self._bar.advance(event.num_frames, note=self._note())
        elif isinstance(event, ShardDone):
            self._shards += 1
            self._left[event.video] -= 1
            self._videos_done += self._left[event.video] == 0
            if event.batch:
                self._store.log_run(
                    event="smaller batch", video=event.video, set=event.set,
                    shard=event.receipt.shard, batch=event.batch,
                )  # fmt: skip
        elif isinstance(event, Usage):
            self._workers[event.worker] = event
        elif isinstance(event, Retry):
            self._retries += 1
            self._store.log_run(
                event="retry", video=event.video, tries=event.tries, reason=event.reason
            )
        elif isinstance(event, Failure):
            self._failures += 1

    def tick(self) -> None:
        """Log how far the run is, now and then."""
        if time.monotonic() - self._logged_at >= LOG_SECONDS:
            self._log("progress")

    def _note(self) -> str:
        parts = [f"{self._videos_done}/{self._videos} videos", f"{self._shards} shards"]
        if self._failures:
            parts.append(f"{self._failures} failed")
        shares = [self._share(usage) for usage in self._workers.values()]
        if len(shares) > SHOWN_WORKERS:
            parts.append(f"{self._busy} {sum(shares) / len(shares):.0%} of {len(shares)}")
        elif shares:
            parts.append(f"{self._busy} {' '.join(f'{share:.0%}' for share in shares)}")
        return ", ".join(parts)

    def _share(self, usage: Usage) -> float:
        """Return how busy a worker is: its teacher on a GPU, else its CPUs (1 is one of them)."""
        busy = usage.teacher_seconds if self._busy == "gpu" else usage.cpu_seconds
        return busy / max(usage.seconds, 1e-9)

    def _log(self, event: str) -> None:
        self._logged_at = time.monotonic()
        rate = self._frames / max(self.seconds, 1e-9)
        entry: dict[str, Any] = {
            "videos": self._videos_done,
            "frames": self._frames,
            "frames_per_second": round(rate, 2),
            "shards": self._shards,
            "failures": self._failures,
            "retries": self._retries,
            "seconds_left": round((self._total - self._frames) / rate) if rate > 0 else None,
            "workers": {
                name: {
                    "cpu": round(usage.cpu_seconds / max(usage.seconds, 1e-9), 2),
                    "teacher": round(usage.teacher_seconds / max(usage.seconds, 1e-9), 2),
                    "waiting": round(usage.waited_seconds / max(usage.seconds, 1e-9), 2),
                    "memory_bytes": usage.memory_bytes,
                }
                for name, usage in self._workers.items()
            },
        }
        self._store.log_run(event=event, **entry)
