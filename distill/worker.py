"""A worker: one teacher, loaded once, that labels task after task."""

from __future__ import annotations

import os
import platform
import resource
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from distill.events import Begun, Stumble, Usage, WorkerEvent
from distill.label import TeacherMemoryError, Times, label_video
from distill.plan import Task, Unit
from stores.decode import Reader, decoder_version
from stores.errors import (
    StoreBusyError,
    StoreWriteError,
    TargetValueError,
    TinyHDError,
    VideoChangedError,
    VideoError,
)
from stores.shards import LabelSet, ShardSet
from stores.targets import TargetStore
from teachers.base import Precision
from teachers.registry import build

REPORT_SECONDS: Final = 0.5
"""What happens within so long is told at once: many small shards cost few messages."""
BEGUN_SECONDS: Final = 0.05
"""The same for what is begun, so that it is known what a worker died of."""


class WorkerError(TinyHDError):
    """A worker cannot do what it is asked to."""


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker needs to know; it travels to other processes and machines."""

    store: str
    """Path or URL."""
    token: str
    """Of the driver; a worker writes only as long as this driver has the store."""
    sets: tuple[str, ...]
    """Keys of the label sets and frame sets that are filled."""
    teacher: str
    weights: Path | None = None
    teacher_options: Mapping[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    device: str = "cpu"
    precision: Precision = "float32"
    reader: Reader = "pyav"
    batch: int = 1
    threads: int = 1
    shares: bool = True
    """Whether workers may take over what others have not begun."""


@dataclass(frozen=True)
class WorkerInfo:
    """Who a worker is."""

    name: str
    host: str
    pid: int


class LabelWorker:
    """Runs inside a Ray actor, or in the driver's own process. Call :meth:`start` first."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._left: deque[Unit] = deque()
        self._number = -1  # of the task
        self._times = Times()

    def start(self) -> WorkerInfo:
        """Load the teacher and open the store.

        Raises:
            WorkerError: If teacher or decoder differ from those that the label set is from.
            ValueError: If there is no such teacher, or its weights do not fit.
            TargetStoreError: If the store cannot be opened.
        """
        import torch

        settings = self._settings
        torch.set_num_threads(settings.threads)
        self._teacher = build(
            settings.teacher,
            size=settings.size,
            device=settings.device,
            precision=settings.precision,
            weights=settings.weights,
            **settings.teacher_options,
        )
        store = TargetStore.open(settings.store, mode="r+", with_videos=False)
        self._sets: dict[str, ShardSet] = {key: store.open_set(key) for key in settings.sets}
        here = {
            **self._teacher.provenance,
            "decoder": decoder_version(settings.reader),
        }
        for shard_set in self._sets.values():
            shard_set.write_only_for(settings.token)
            if isinstance(shard_set, LabelSet):
                _check_same(here, shard_set.request.provenance)
        self._info = WorkerInfo(f"{platform.node()}:{os.getpid()}", platform.node(), os.getpid())
        return self._info

    def run(self, task: Task, number: int = 0) -> Iterator[tuple[WorkerEvent, ...]]:
        """Do a task and tell, now and then, what was done; a stumble is told last.

        Args:
            task: What to do.
            number: Of the task; see :meth:`give_up`.
        """
        with self._lock:
            self._left, self._number = deque(task.units), number
        times = self._times = Times()
        meter = _Meter(self._info.name)
        events: list[WorkerEvent] = []
        told_at = time.monotonic()
        try:
            for event in label_video(
                task,
                teacher=self._teacher,
                sets=self._sets,
                reader=self._settings.reader,
                batch=self._settings.batch,
                claim=self._claim,
                times=times,
            ):
                events.append(event)
                at_least = BEGUN_SECONDS if isinstance(event, Begun) else REPORT_SECONDS
                if time.monotonic() - told_at >= at_least:
                    yield (*events, meter.read(times))
                    events.clear()
                    told_at = time.monotonic()
        except Exception as error:  # a teacher, a decoder or a store may fail in any way
            events.append(_stumble(error))
        with self._lock:
            self._left.clear()
        yield (*events, meter.read(times))

    def signs_of_life(self) -> int:
        """Return a number that grows as long as something is done, be it slowly."""
        return self._times.signs_of_life

    def give_up(self, count: int, number: int = 0) -> tuple[Unit, ...]:
        """Give up units of a task that were not begun, from its end.

        Args:
            count: How many, at most.
            number: Of the task, which may have ended or not yet begun: calls overtake each other.

        Returns:
            What is given up, for others to do.
        """
        with self._lock:
            if number != self._number:
                return ()
            given = [self._left.pop() for _ in range(min(count, len(self._left)))]
        return tuple(reversed(given))

    def _claim(self, unit: Unit) -> bool:
        with self._lock:
            if not self._left or self._left[0] != unit:
                return False
            self._left.popleft()
            return True


class _Meter:
    """Reads what this process uses."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._last = self._now(Times())

    def read(self, times: Times) -> Usage:
        """Return what was used since the last reading."""
        now = self._now(times)
        wall, cpu, teacher, waited = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Usage(self._name, wall, cpu, teacher, waited, peak)

    @staticmethod
    def _now(times: Times) -> tuple[float, float, float, float]:
        return (
            time.monotonic(),
            time.process_time(),
            times.teacher_seconds,
            times.waited_seconds,
        )


def _stumble(error: Exception) -> Stumble:
    reason = str(error).strip() or type(error).__name__
    where = "".join(traceback.format_exception(error))
    shard = getattr(error, "at_shard", None)
    if isinstance(error, VideoError | VideoChangedError):
        # What cannot be read here may be read elsewhere.
        return Stumble(reason, where, "video", is_final=isinstance(error, VideoChangedError))
    if isinstance(error, StoreWriteError | StoreBusyError | TeacherMemoryError):
        return Stumble(reason, where, "run", is_final=not isinstance(error, StoreWriteError))
    if isinstance(error, TargetValueError):
        return Stumble(reason, where, "unit", is_final=True, shard=shard)
    if not isinstance(error, TinyHDError):
        reason = f"{type(error).__name__}: {reason.splitlines()[-1]}"
    return Stumble(reason, where, "unit", shard=shard)


def _check_same(here: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Refuse to mix what another teacher or decoder says with what a label set is from."""
    for name, value in here.items():
        if wanted.get(name) != value:
            raise WorkerError(
                f"{platform.node()} has another {name} than the label set: {value}, not "
                f"{wanted.get(name)}; install the same versions and weights on every machine"
            )
