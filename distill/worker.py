"""A worker: one teacher, loaded once, that labels video after video."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from distill.label import ShardDone, label_video
from distill.plan import Failure, Task
from stores.errors import TargetStoreError
from stores.shards import FrameSet, LabelSet
from stores.targets import TargetStore
from stores.videos import Reader
from teachers.registry import build

Event = ShardDone | Failure


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What a worker needs to know; it travels to other processes and machines."""

    store: str
    """Path or URL."""
    token: str
    """Of the driver; a worker writes only as long as this driver has the store."""
    labels: str
    """Name of the label set."""
    frames: str | None
    """Name of the frame set, if one is to be filled too."""
    teacher: str
    size: tuple[int, int] | None
    reader: Reader
    batch: int
    threads: int


class LabelWorker:
    """Runs inside a Ray actor, or in the driver's own process."""

    def __init__(self, settings: WorkerSettings) -> None:
        import torch

        torch.set_num_threads(settings.threads)
        self._settings = settings
        self._teacher = build(settings.teacher, size=settings.size)
        store = TargetStore.open(settings.store, mode="r+")
        self._labels: LabelSet = store.label_set(settings.labels)
        self._labels.write_only_for(settings.token)
        self._frames: FrameSet | None = None
        if settings.frames is not None:
            self._frames = store.frame_set(settings.frames)
            self._frames.write_only_for(settings.token)

    def run(self, task: Task) -> Iterator[Event]:
        """Do a task; a video that cannot be labelled ends in a failure, not in an exception."""
        try:
            yield from label_video(
                task,
                teacher=self._teacher,
                labels=self._labels,
                frames=self._frames,
                reader=self._settings.reader,
                batch=self._settings.batch,
            )
        except TargetStoreError as error:
            yield Failure(task.video.id, str(error))
