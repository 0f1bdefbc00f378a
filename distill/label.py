"""One video through one teacher: decode once, label, write shards. There is no Ray in it."""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from distill.events import Begun, Labelled, ShardDone
from distill.plan import Task, Unit
from stores.ahead import read_ahead
from stores.decode import Frame, FrameIndex, Reader, decode_spans
from stores.errors import TinyHDError, VideoChangedError
from stores.frames import resize_frames
from stores.schema import Variant
from stores.shards import FrameSet, LabelSet, ShardSet
from stores.table import VideoRow
from stores.videos import FileStamp, hash_file
from teachers.base import Teacher

log = logging.getLogger(__name__)

READ_AHEAD_FRAMES: Final = 64
SHARDS_BEING_WRITTEN: Final = 2
"""Shards that are packed and written while the teacher looks at the next one."""

Views = Mapping[str, Frame]
"""A frame as each set of shards needs it, by the set's key."""
Planes = dict[str, npt.NDArray[np.float32]]
"""A teacher's native planes by array, each ``(frame, map, y, x)``."""


class TeacherMemoryError(TinyHDError):
    """A teacher does not fit into the memory of its device."""


@dataclass
class Times:
    """Where a worker's time goes."""

    teacher_seconds: float = 0.0
    waited_seconds: float = 0.0
    signs_of_life: int = 0
    """Frames that were decoded, pieces of files that were read, batches that were labelled."""

    def live(self) -> None:
        """Give a sign of life."""
        self.signs_of_life += 1


class FrameBuffer:
    """Frames of a video in order; those that may be needed again are kept.

    Args:
        decoded: Numbers and views, in ascending order.
        times: Waiting for frames is added here.
    """

    def __init__(self, decoded: Iterator[tuple[int, Views]], times: Times) -> None:
        self._decoded, self._times = decoded, times
        self._kept: dict[int, Views] = {}

    def get(self, span: range, key: str) -> npt.NDArray[np.uint8]:
        """Return a set's view of frames, ``(len(span), height, width, 3)``.

        Raises:
            VideoError: If the video ends before they do.
        """
        began = time.monotonic()
        while span[-1] not in self._kept:
            number, views = next(self._decoded)
            self._kept[number] = views
        self._times.waited_seconds += time.monotonic() - began
        return np.stack([self._kept[number][key] for number in span])

    def forget_before(self, number: int) -> None:
        """Forget frames that nobody will ask for again."""
        for kept in [kept for kept in self._kept if kept < number]:
            del self._kept[kept]


def label_video(
    task: Task,
    *,
    teacher: Teacher,
    sets: Mapping[str, ShardSet],
    reader: Reader,
    batch: int,
    claim: Callable[[Unit], bool] = lambda unit: True,
    times: Times | None = None,
) -> Iterator[Begun | ShardDone | Labelled]:
    """Label what a task misses, and keep frames where that is asked.

    Batches have a composition that starts anew at every shard, so that a shard's bytes do not
    depend on what was labelled before it. Where a batch does not fit into the device's memory, its
    shard is begun anew with half of it.

    Args:
        task: What to do.
        teacher: Who labels.
        sets: Label sets and frame sets by key.
        reader: Who decodes.
        batch: Windows labelled together.
        claim: Asked before each unit; at a no, what is left is somebody else's.
        times: Where the time goes is added here.

    Yields:
        Each unit when it is begun, each shard when it lies on the disk, and in between what went
        through the teacher.

    Raises:
        VideoError: If the video cannot be decoded, or is not the one that was planned with.
        TargetValueError: If the teacher's maps cannot be stored.
        StoreWriteError: If the store cannot be written.
        TeacherMemoryError: If not even one window fits into the device's memory; of a recurrent
            teacher, not a whole batch.
    """
    video, times = task.video, times or Times()
    check_unchanged(video, task.stamp, times.live)
    sets = {key: sets[key] for key in task.sets}
    steps = _steps(task, sets, teacher)
    contexts = [_context(task, span, unit, sets, teacher) for span, unit in steps]
    decoded = decode_views(
        video,
        _join(contexts),
        _viewers(sets, teacher),
        reader=reader,
        index=task.index,
        on_frame=times.live,
    )
    teacher.reset()
    with (
        closing(read_ahead(decoded, READ_AHEAD_FRAMES)) as frames,
        ThreadPoolExecutor(1, thread_name_prefix="write") as writer,
    ):
        buffer = FrameBuffer(frames, times)
        writing: deque[Future[ShardDone]] = deque()

        def write(unit: Unit, key: str, data: dict[str, Any], fewer: int) -> ShardDone:
            try:
                receipt = sets[key].write_shard(unit.shard, data, video)
            except Exception as error:  # raised again; only where it arose is noted
                blame(error, unit.shard)
                raise
            return ShardDone(video.id, key, receipt, len(task.span(unit)), fewer)

        def planes_of(key: str, span: range, batch: int) -> Iterator[Planes]:
            return label_span(
                buffer, key, span, teacher, num_frames=video.frames, batch=batch, times=times
            )

        at = task.units[0].shard
        try:
            for (span, unit), context in zip(steps, contexts, strict=True):
                buffer.forget_before(context.start)
                if unit is None:
                    (key,) = sets
                    for _ in planes_of(key, span, batch):
                        yield Labelled(0)  # a recurrent teacher passes by; nothing is counted
                    continue
                if not claim(unit):
                    break
                at = unit.shard
                yield Begun(at)
                for key in unit.sets:
                    data: dict[str, npt.NDArray[Any]]
                    shard_set, used = sets[key], batch
                    if isinstance(shard_set, FrameSet):
                        data = {shard_set.array_names[0]: buffer.get(span, key)}
                    else:
                        label = functools.partial(planes_of, key, span)
                        data, used = yield from _label_shard(label, teacher, batch)
                    fewer = used if used < batch else 0
                    writing.append(writer.submit(write, unit, key, data, fewer))
                    while writing and (writing[0].done() or len(writing) > SHARDS_BEING_WRITTEN):
                        yield writing.popleft().result()
        except Exception as error:  # raised again, after what is done was told
            for future in writing:  # the shards before are not at fault, and count
                if future.exception() is None:
                    yield future.result()
            blame(error, at)
            raise
        for future in writing:
            yield future.result()


def _label_shard(
    label: Callable[[int], Iterator[Planes]], teacher: Teacher, batch: int
) -> Generator[Labelled, None, tuple[Planes, int]]:
    """Return a shard's planes, and the batch that fitted into memory.

    Args:
        label: Gives the planes in batches of a number.
        teacher: Who labels.
        batch: Windows that are to be labelled together.
    """
    while True:
        parts: list[Planes] = []
        done = 0
        try:
            for planes in label(batch):
                parts.append(planes)
                count = len(next(iter(planes.values())))
                done += count
                yield Labelled(count)
        except torch.OutOfMemoryError as error:
            if batch == 1 or teacher.is_recurrent:  # whose state is that of the batch
                raise TeacherMemoryError(
                    f"a batch of {batch} of {teacher.spec.name} does not fit into the memory of "
                    f"{teacher.device}; use a smaller --batch or --size, or another device"
                ) from error
            if done:
                yield Labelled(-done)
            batch //= 2
            log.warning("out of memory on %s: trying %d windows at once", teacher.device, batch)
        else:
            break
        parts.clear()
        torch.cuda.empty_cache()  # only now, as the error held what the batch had taken
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, batch


def blame(error: Exception, shard: int) -> None:
    """Note the shard at which an error arose, if none is noted yet."""
    if not hasattr(error, "at_shard"):
        error.at_shard = shard  # type: ignore[attr-defined]


def label_span(
    buffer: FrameBuffer,
    key: str,
    span: range,
    teacher: Teacher,
    *,
    num_frames: int,
    batch: int,
    times: Times | None = None,
) -> Iterator[Planes]:
    """Yield a teacher's native planes by array for each batch of a span."""
    for begin in range(span.start, span.stop, batch):
        part = range(begin, min(begin + batch, span.stop))
        context = teacher.context_of(part, num_frames)
        frames = buffer.get(context, key)
        began = time.monotonic()
        prepared = teacher.prepare(frames)
        labelled = teacher.label(prepared, first=context.start, span=part, num_frames=num_frames)
        planes = {name: values.cpu().numpy() for name, values in labelled.items()}
        if times is not None:
            times.teacher_seconds += time.monotonic() - began
            times.live()
        yield planes


def decode_views(
    video: VideoRow,
    spans: Sequence[range],
    viewers: Mapping[str, Callable[[Frame], Frame]],
    *,
    reader: Reader,
    index: FrameIndex | None = None,
    on_frame: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Views]]:
    """Yield frames of some spans of a video, each decoded once and seen by every viewer."""
    size = (video.height, video.width)
    for number, frame in decode_spans(
        video.absolute, spans, size=size, index=index, reader=reader, on_frame=on_frame
    ):
        yield number, {key: view(frame) for key, view in viewers.items()}


def view_for(teacher: Teacher, variant: Variant) -> Callable[[Frame], Frame]:
    """Return what brings a decoded frame to a teacher's input, mirrored first if it is to be."""

    def mirrored(frame: Frame) -> Frame:
        return teacher.resize(np.ascontiguousarray(frame[:, ::-1]))

    return mirrored if variant == "hflip" else teacher.resize


def check_unchanged(
    video: VideoRow, stamp: FileStamp | None, on_chunk: Callable[[], None] = lambda: None
) -> None:
    """Make sure that a file is the video that was planned with.

    A file of the same size and time of modification is taken to be; another one is read.

    Raises:
        VideoChangedError: If it is not.
        VideoError: If it cannot be read.
    """
    if stamp is not None and FileStamp.of(video.absolute) == stamp:
        return
    if hash_file(video.absolute, on_chunk) != video.content_hash:
        raise VideoChangedError(f"{video.absolute} has changed since it was probed; start again")


def _viewers(sets: Mapping[str, ShardSet], teacher: Teacher) -> dict[str, Callable[[Frame], Frame]]:
    viewers: dict[str, Callable[[Frame], Frame]] = {}
    for key, shard_set in sets.items():
        if isinstance(shard_set, LabelSet):
            viewers[key] = view_for(teacher, shard_set.request.variant)
        elif isinstance(shard_set, FrameSet):
            viewers[key] = _view_at(shard_set.height, shard_set.width)
    return viewers


def _view_at(height: int, width: int) -> Callable[[Frame], Frame]:
    return lambda frame: resize_frames(frame[None], height, width)[0]


def _steps(
    task: Task, sets: Mapping[str, ShardSet], teacher: Teacher
) -> list[tuple[range, Unit | None]]:
    """Return spans in order with their units; a recurrent teacher sees what is before them, too."""
    steps: list[tuple[range, Unit | None]] = [(task.span(unit), unit) for unit in task.units]
    if not teacher.is_recurrent or not any(isinstance(s, LabelSet) for s in sets.values()):
        return steps
    units = {unit.shard: unit for unit in task.units}
    first = task.grid.shards(task.video).start
    shards = range(first, task.units[-1].shard + 1)
    return [(task.grid.frames_of(shard, task.video), units.get(shard)) for shard in shards]


def _context(
    task: Task, span: range, unit: Unit | None, sets: Mapping[str, ShardSet], teacher: Teacher
) -> range:
    """Return the frames that must be at hand for a step."""
    if unit is not None and not any(isinstance(sets[key], LabelSet) for key in unit.sets):
        return span
    context = teacher.context_of(span, task.video.frames)
    return range(min(span.start, context.start), max(span.stop, context.stop))


def _join(spans: Sequence[range]) -> list[range]:
    """Return ascending spans, joined where they touch."""
    joined: list[range] = []
    for span in spans:
        if joined and span.start <= joined[-1].stop:
            span = range(joined[-1].start, max(joined.pop().stop, span.stop))
        joined.append(span)
    return joined
