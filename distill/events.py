"""What a worker tells its driver; nothing larger than this passes between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from distill.plan import Task, Unit
from stores.receipts import Receipt
from stores.videos import FileStamp


@dataclass(frozen=True)
class ShardDone:
    """A shard that lies on the disk and waits for its receipt to be committed."""

    video: str
    set: str
    """Key of the label set or frame set."""
    receipt: Receipt
    num_frames: int
    batch: int = 0
    """Windows that were labelled together, if that was fewer than asked for; else 0."""


@dataclass(frozen=True)
class Begun:
    """A unit that a worker begins."""

    shard: int


@dataclass(frozen=True)
class Labelled:
    """Frames that went through the teacher; negative where they have to go again."""

    num_frames: int


@dataclass(frozen=True)
class Usage:
    """What a worker used since it last said so."""

    worker: str
    seconds: float
    cpu_seconds: float
    teacher_seconds: float
    """In the teacher, on whatever device."""
    waited_seconds: float
    """For frames."""
    memory_bytes: int
    """Of the process, at most so far."""


@dataclass(frozen=True)
class Stumble:
    """A worker could not go on with its task."""

    reason: str
    traceback: str
    blame: Literal["video", "unit", "run"]
    """``video``: all that is left of the task would fail. ``unit``: the first unit that is not done
    may be at fault. ``run``: every other task would fail, too."""
    is_final: bool = False
    """Whether trying again would end the same way."""
    shard: int | None = None
    """Of the unit at fault, if it is known."""


@dataclass(frozen=True)
class Retry:
    """Something is tried again."""

    video: str
    tries: int
    reason: str


@dataclass(frozen=True)
class Failure:
    """Something that could not be labelled, and why."""

    video: str
    reason: str
    traceback: str = ""
    tries: int = 1
    content_hash: str = ""
    """Of the video, in hexadecimal; nothing if it could not be opened."""
    shards: tuple[int, ...] = ()
    """Counted from the video's first; nothing if it could not be opened."""
    sets: tuple[str, ...] = ()
    """Keys of the label sets and frame sets whose shards they are."""
    file: str = ""
    """Path of a video that could not be opened."""
    stamp: FileStamp | None = None
    """Of that file."""


WorkerEvent = Begun | ShardDone | Labelled | Usage | Stumble
"""What comes from a worker."""
Event = Begun | ShardDone | Labelled | Usage | Retry | Failure
"""What comes from an executor."""


def failure_of(task: Task, units: tuple[Unit, ...], stumble: Stumble, tries: int) -> Failure:
    """Return the entry of the failure list for units of a task."""
    first = task.grid.shards(task.video).start
    return Failure(
        video=task.video.id,
        reason=stumble.reason,
        traceback=stumble.traceback,
        tries=tries,
        content_hash=task.video.content_hash.hex(),
        shards=tuple(unit.shard - first for unit in units),
        sets=tuple(sorted({key for unit in units for key in unit.sets})),
    )
