"""What is missing: videos against a store, as tasks for workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from stores.decode import FrameIndex
from stores.grid import ShardGrid
from stores.schema import LabelRequest
from stores.shards import Request, ShardSet
from stores.table import VideoRow
from stores.videos import FileStamp

CONTEXT_FRAMES: Final = 15
"""Frames that a student sees before the one that it predicts."""
STRETCH_FRAMES: Final = 2048
"""Long videos are cut into tasks of about so many frames, so that several workers share them."""
WHOLE_FRAMES: Final = 512
"""A task of so few frames from the video's beginning is decoded from there, whoever does it."""
MARGIN_FRAMES: Final = 256
"""Frames around those to label of which a teacher may look at some."""


@dataclass(frozen=True)
class Unit:
    """The missing shards of one span of a video: what is done whole or not at all."""

    shard: int
    sets: tuple[str, ...]
    """Keys of the label sets and frame sets that miss it."""

    @property
    def num_label_sets(self) -> int:
        """Number of label sets that miss it."""
        return sum(key.startswith(f"{LabelRequest.folder}/") for key in self.sets)


@dataclass(frozen=True)
class Task:
    """Units of one video, in the order of its frames; one worker does them."""

    video: VideoRow
    grid: ShardGrid
    units: tuple[Unit, ...]
    stamp: FileStamp | None = None
    """Of the file when it was probed."""
    packed: bytes | None = None
    """Where the video's frames lie, packed; see :meth:`ready`."""
    index: FrameIndex | None = None
    """By which decoding begins near the units; without it, at the video's beginning."""

    def with_units(self, units: Iterable[Unit]) -> Task:
        """Return the task with other units, which are among its own."""
        return replace(self, units=tuple(units))

    def ready(self) -> Task:
        """Return the task as a worker needs it: with where the frames around its units lie."""
        if self.packed is None:
            return self
        spans = [self.span(unit) for unit in self.units]
        around = range(
            max(0, spans[0].start - MARGIN_FRAMES),
            min(self.video.frames, spans[-1].stop + MARGIN_FRAMES),
        )
        index = FrameIndex.unpack(self.packed, self.video.frames).part(around)
        return replace(self, packed=None, index=index)

    def span(self, unit: Unit) -> range:
        """Return the frames that a unit is about."""
        return self.grid.frames_of(unit.shard, self.video)

    @property
    def sets(self) -> tuple[str, ...]:
        """Keys of all sets that the units miss."""
        return tuple(dict.fromkeys(key for unit in self.units for key in unit.sets))

    @property
    def num_windows(self) -> int:
        """Windows that a teacher looks at: frames to label, in each label set."""
        return sum(unit.num_label_sets * len(self.span(unit)) for unit in self.units)


@dataclass(frozen=True)
class Found:
    """What a look at a video's file gave."""

    stamp: FileStamp
    packed: bytes | None
    """Its :class:`~stores.decode.FrameIndex`, packed, as there may be very many."""

    @classmethod
    def of(cls, stamp: FileStamp, index: FrameIndex | None) -> Found:
        """Pack what was found."""
        return cls(stamp, None if index is None else index.pack())


@dataclass(frozen=True)
class Budget:
    """How much of each video is labelled; see :meth:`stores.grid.ShardGrid.sample`."""

    blocks: int
    """Shards of each video."""
    seed: int = 0


@dataclass(frozen=True)
class Target:
    """A label set or frame set that is to be filled, which need not be there yet."""

    request: Request
    has: Callable[[int], bool]
    """Tells whether a shard is there."""

    @classmethod
    def of(cls, shard_set: ShardSet) -> Target:
        """Return a set that is there as a target."""
        return cls(shard_set.request, shard_set.receipts.__contains__)


def plan_tasks(
    videos: Iterable[VideoRow],
    targets: Sequence[Target],
    *,
    budget: Budget | None = None,
    is_given_up: Callable[[VideoRow, int], bool] = lambda video, shard: False,
    found: Mapping[bytes, Found] | None = None,
    is_recurrent: bool = False,
) -> list[Task]:
    """Return what is missing, the longest task first; videos with equal content are one.

    Args:
        videos: What is wanted.
        targets: Sets to fill, all with the same number of frames per shard.
        budget: Some shards of each video only, with the frames of the clips that end in them.
        is_given_up: Tells which shards of a video are not to be tried.
        found: By content hash, what a look at the file gave.
        is_recurrent: Whether the teacher has to see a video from its beginning: a task is then a
            whole video, for one set.
    """
    grid = targets[0].request.grid
    tasks: list[Task] = []
    for video in {row.first: row for row in videos}.values():
        units = []
        for shard, wanted in wanted_shards(video, targets, budget).items():
            keys = tuple(target.request.key for target in wanted if not target.has(shard))
            if keys and not is_given_up(video, shard):
                units.append(Unit(shard, keys))
        if not units:
            continue
        task = Task(video, grid, tuple(units))
        look = (found or {}).get(video.content_hash)
        if is_recurrent:
            tasks += _passes(task, look)
        else:
            tasks += _stretches(task, look)
    # The longest first, so that none is left over when the others are done; then as in the store.
    return sorted(
        tasks, key=lambda task: (-task.num_windows, task.video.first, task.units[0].shard)
    )


def wanted_shards(
    video: VideoRow, targets: Sequence[Target], budget: Budget | None
) -> dict[int, list[Target]]:
    """Return the shards of a video that are to be there in the end, each with its sets."""
    wanted: dict[int, list[Target]] = {}
    labels = [target for target in targets if isinstance(target.request, LabelRequest)]
    frames = [target for target in targets if target not in labels]
    grid = targets[0].request.grid
    if budget is None:
        return {shard: list(targets) for shard in grid.shards(video)}
    label_grid = labels[0].request.grid
    for shard in label_grid.sample(video, blocks=budget.blocks, seed=budget.seed):
        wanted.setdefault(shard, []).extend(labels)
        span = grid.frames_of(shard, video)
        first = max(0, span.start - CONTEXT_FRAMES) // grid.shard_frames
        for shown in range(grid.shards(video).start + first, shard + 1):
            wanted.setdefault(shown, []).extend(
                target for target in frames if target not in wanted.get(shown, [])
            )
    return dict(sorted(wanted.items()))


def _passes(task: Task, found: Found | None) -> list[Task]:
    """Return a task for each set, which one worker does from the video's beginning."""
    stamp = found.stamp if found is not None else None
    return [
        Task(
            task.video,
            task.grid,
            tuple(Unit(unit.shard, (key,)) for unit in task.units if key in unit.sets),
            stamp,
        )
        for key in task.sets
    ]


def _stretches(task: Task, found: Found | None) -> list[Task]:
    """Cut a task into stretches, if decoding can begin in the middle of its video."""
    if found is None:
        return [task]
    task = replace(task, stamp=found.stamp)
    first, last = task.span(task.units[0]), task.span(task.units[-1])
    if found.packed is None or (not first.start and last.stop <= WHOLE_FRAMES):
        return [task]
    task = replace(task, packed=found.packed)
    at_most = max(1, STRETCH_FRAMES // task.grid.shard_frames)
    return [
        task.with_units(task.units[begin : begin + at_most])
        for begin in range(0, len(task.units), at_most)
    ]
