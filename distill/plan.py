"""What is missing: videos against a store, as tasks for workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from stores.errors import VideoError
from stores.progress import Progress
from stores.shards import FrameSet, LabelSet, ShardSet
from stores.table import VideoRow
from stores.targets import TargetStore
from stores.videos import Reader, VideoFile, VideoRecord, hash_file, probe_video

CONTEXT_FRAMES: Final = 15
"""Frames that a student sees before the one that it predicts."""


@dataclass(frozen=True)
class Task:
    """The missing shards of one video; one worker does them, decoding the video once."""

    video: VideoRow
    label_shards: tuple[int, ...]
    frame_shards: tuple[int, ...] = ()

    def without(self, label_shards: set[int], frame_shards: set[int]) -> Task:
        """Return the task less the shards that are done."""
        return Task(
            self.video,
            tuple(shard for shard in self.label_shards if shard not in label_shards),
            tuple(shard for shard in self.frame_shards if shard not in frame_shards),
        )

    @property
    def is_empty(self) -> bool:
        return not self.label_shards and not self.frame_shards

    def num_frames(self, shards: ShardSet) -> int:
        """Return the frames that the missing shards of a shard set hold."""
        wanted = self.label_shards if isinstance(shards, LabelSet) else self.frame_shards
        return sum(len(shards.frames_of(shard, self.video)) for shard in wanted)


@dataclass(frozen=True)
class Failure:
    """Something that could not be labelled, and why."""

    video: str
    reason: str


def probe_videos(
    files: Iterable[VideoFile], store: TargetStore | None, *, reader: Reader
) -> tuple[list[VideoRecord], list[Failure]]:
    """Learn content hash and true length of videos.

    A video whose content the store knows is not decoded again.
    """
    files = list(files)
    records: list[VideoRecord] = []
    failures: list[Failure] = []
    with Progress(len(files), unit="videos", label="probing") as progress:
        for file in files:
            try:
                if _as_text(file.path) != file.path:
                    raise VideoError(f"the name {file.path!a} is not text; rename the file")
                digest = hash_file(file.absolute)
                known = store.find_content(digest) if store is not None else None
                if known is None:
                    records.append(probe_video(file, content_hash=digest, reader=reader))
                else:
                    record = VideoRecord(
                        id=file.id,
                        root=str(file.root),
                        path=file.path,
                        content_hash=digest,
                        frames=known.frames,
                        height=known.height,
                        width=known.width,
                        fps=known.fps,
                    )
                    records.append(record)
            except VideoError as error:
                failures.append(Failure(_as_text(file.id), _as_text(str(error))))
            progress.advance()
    return records, failures


@dataclass(frozen=True)
class Budget:
    """How much of each video is labelled; see :meth:`stores.shards.ShardSet.sample`."""

    blocks: int
    """Shards of each video."""
    seed: int = 0


def plan_tasks(
    videos: Iterable[VideoRow],
    labels: LabelSet,
    frames: FrameSet | None,
    budget: Budget | None = None,
) -> list[Task]:
    """Return what is missing, the longest task first; videos with equal content are one task.

    Args:
        videos: What is wanted.
        labels: The label set.
        frames: The frame set, if frames are kept.
        budget: Some shards of each video only, with the frames of the clips that end in them.
    """
    tasks = {}
    for video in videos:
        wanted = wanted_shards(labels, video, budget)
        shown: Sequence[int] = frames.shards(video) if frames is not None else ()
        if frames is not None and budget is not None:
            spans = [labels.frames_of(shard, video) for shard in wanted]
            clips = {t for span in spans for t in range(span.start - CONTEXT_FRAMES, span.stop)}
            shown = [s for s in shown if not clips.isdisjoint(frames.frames_of(s, video))]
        tasks[video.first] = Task(
            video,
            tuple(shard for shard in wanted if shard not in labels.receipts),
            tuple(s for s in shown if frames is not None and s not in frames.receipts),
        )
    missing = [task for task in tasks.values() if not task.is_empty]
    # The longest first, so that none is left over when the others are done; then as in the store.
    return sorted(missing, key=lambda task: (-len(task.label_shards), task.video.first))


def wanted_shards(labels: LabelSet, video: VideoRow, budget: Budget | None) -> Sequence[int]:
    """Return the shards of a video that are to be there in the end."""
    if budget is None:
        return labels.shards(video)
    return labels.sample(video, blocks=budget.blocks, seed=budget.seed)


def _as_text(name: str) -> str:
    """Replace what a file name holds that is no text in any encoding."""
    return name.encode("utf-8", "replace").decode()
