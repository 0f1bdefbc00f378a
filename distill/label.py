"""One video through one teacher: decode once, fill shards. There is no Ray in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from distill.plan import Task
from stores.ahead import read_ahead
from stores.errors import VideoError
from stores.frames import resize_frames
from stores.receipts import Receipt
from stores.shards import FrameSet, LabelSet, ShardSet
from stores.table import VideoRow
from stores.videos import Frame, Reader, decode_video, hash_file
from teachers.base import Teacher

READ_AHEAD_FRAMES: Final = 32


@dataclass(frozen=True)
class ShardDone:
    """A shard that lies on the disk and waits for its receipt to be committed."""

    video: str
    kind: Literal["labels", "frames"]
    receipt: Receipt
    num_frames: int


class ShardFiller(ABC):
    """Fill the missing shards of one video and one shard set from frames that come in order.

    Subclasses say which frames a shard needs and what its values are.
    """

    kind: Literal["labels", "frames"]

    def __init__(self, shard_set: ShardSet, video: VideoRow, shards: Sequence[int]) -> None:
        self._set, self._video = shard_set, video
        self._left = sorted(shards, reverse=True)
        if self._left:
            self.begin_shard(self._set.frames_of(self._left[-1], video))

    @property
    def is_done(self) -> bool:
        return not self._left

    def feed(self, index: int, frame: Frame) -> Iterator[ShardDone]:
        """Take frame ``index`` of the video; yield the shard that it completes, if it does."""
        if self.is_done:
            return
        span = self._set.frames_of(self._left[-1], self._video)
        self.take(index, frame)
        if index + 1 < span.stop:
            return
        shard = self._left.pop()
        receipt = self._set.write_shard(shard, self.end_shard(), self._video)
        yield ShardDone(self._video.id, self.kind, receipt, len(span))
        if self._left:
            self.begin_shard(self._set.frames_of(self._left[-1], self._video))

    @abstractmethod
    def begin_shard(self, span: range) -> None:
        """Get ready for the frames of a shard."""

    @abstractmethod
    def take(self, index: int, frame: Frame) -> None:
        """Look at a frame; it may lie before the shard's span, never behind it."""

    @abstractmethod
    def end_shard(self) -> dict[str, npt.NDArray[Any]]:
        """Return the values of the span by array."""


class LabelFiller(ShardFiller):
    """Have a teacher label frames, in batches whose composition starts anew at every shard."""

    kind = "labels"

    def __init__(
        self,
        labels: LabelSet,
        video: VideoRow,
        shards: Sequence[int],
        *,
        teacher: Teacher,
        batch: int,
    ) -> None:
        self._teacher, self._batch = teacher, batch
        self._is_mirrored = labels.request.variant == "hflip"
        self._frames: list[Frame] = []
        self._first = 0  # index of self._frames[0] in the video
        super().__init__(labels, video, shards)

    def begin_shard(self, span: range) -> None:
        self._todo = span
        self._planes: dict[str, list[npt.NDArray[np.float32]]] = {}
        self._forget_before(self._teacher.context_of(span).start)

    def take(self, index: int, frame: Frame) -> None:
        if index < self._teacher.context_of(self._todo).start:
            return
        if not self._frames:
            self._first = index
        if self._is_mirrored:
            frame = np.ascontiguousarray(frame[:, ::-1])
        self._frames.append(self._teacher.resize(frame))
        batch = self._todo[: self._batch]
        if index + 1 < batch.stop:
            return
        prepared = self._teacher.prepare(np.stack(self._frames))
        labelled = self._teacher.label(prepared, first=self._first, span=batch)
        for name, planes in labelled.items():
            self._planes.setdefault(name, []).append(planes.float().cpu().numpy())
        self._todo = self._todo[len(batch) :]
        self._forget_before(self._teacher.context_of(range(batch.stop, batch.stop + 1)).start)

    def end_shard(self) -> dict[str, npt.NDArray[Any]]:
        return {name: np.concatenate(batches) for name, batches in self._planes.items()}

    def _forget_before(self, index: int) -> None:
        del self._frames[: max(0, index - self._first)]
        self._first = max(self._first, index)


class FrameFiller(ShardFiller):
    """Keep the frames themselves, at a student's size."""

    kind = "frames"

    def __init__(self, frames: FrameSet, video: VideoRow, shards: Sequence[int]) -> None:
        self._size = (frames.height, frames.width)
        super().__init__(frames, video, shards)

    def begin_shard(self, span: range) -> None:
        self._span = span
        self._frames: list[Frame] = []

    def take(self, index: int, frame: Frame) -> None:
        if index in self._span:
            self._frames.append(resize_frames(frame[None], *self._size)[0])

    def end_shard(self) -> dict[str, npt.NDArray[Any]]:
        return {self._set.array_names[0]: np.stack(self._frames)}


def label_video(
    task: Task,
    *,
    teacher: Teacher,
    labels: LabelSet,
    frames: FrameSet | None,
    reader: Reader,
    batch: int,
) -> Iterator[ShardDone]:
    """Label the missing shards of a video and keep its frames where that is asked.

    Yields:
        Each shard as soon as it lies on the disk.

    Raises:
        VideoError: If the video cannot be decoded, or not to the length that it was planned with.
        TargetValueError: If the teacher's maps cannot be stored.
    """
    video = task.video
    fillers: list[ShardFiller] = [
        LabelFiller(labels, video, task.label_shards, teacher=teacher, batch=batch)
    ]
    if frames is not None:
        fillers.append(FrameFiller(frames, video, task.frame_shards))
    if hash_file(video.absolute) != video.content_hash:
        raise VideoError(f"{video.absolute} has changed since it was probed; start again")
    count = 0
    with closing(
        read_ahead(decode_video(video.absolute, reader=reader), READ_AHEAD_FRAMES)
    ) as decoded:
        for index, frame in enumerate(decoded):
            count = index + 1
            for filler in fillers:
                yield from filler.feed(index, frame)
            if all(filler.is_done for filler in fillers) and count < video.frames:
                return
    if count != video.frames:
        raise VideoError(
            f"{video.absolute} gave {count} frames, but {video.frames} when it was probed; "
            "was it changed meanwhile?"
        )
