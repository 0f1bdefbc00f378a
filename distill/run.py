"""The driver: find, probe, plan, hand out, collect receipts, commit, report."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from distill.executors import Executor, InlineExecutor, RayExecutor
from distill.label import ShardDone
from distill.plan import Budget, Failure, Task, plan_tasks, probe_videos, wanted_shards
from distill.worker import WorkerSettings
from stores.codec import GRID_STEP
from stores.errors import VideoChangedError, VideoError
from stores.progress import Progress
from stores.schema import FRAME_ALIGNMENT, FrameRequest, LabelRequest, Variant, environment
from stores.shards import Committer, FrameSet, LabelSet
from stores.table import VideoRow
from stores.targets import TargetStore
from stores.videos import Reader, VideoRecord, decoder_version, find_videos
from teachers.base import Teacher
from teachers.registry import build

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """How videos are labelled."""

    teacher: str
    size: tuple[int, int] | None = None
    """Height and width fed to the teacher; its published size if not given."""
    variant: Variant = "identity"
    """``hflip``: the teacher sees mirrored frames."""
    with_frames: tuple[int, int] | None = None
    """Height and width at which the frames are kept too."""
    reader: Reader = "pyav"
    batch: int | None = None
    """Windows labelled together; the teacher's own number if not given."""
    shard_frames: int = FRAME_ALIGNMENT
    grid_step: float = GRID_STEP
    budget: Budget | None = None
    """How much of each video is labelled; all if not given."""
    replace_changed: bool = False
    """Whether a video whose content has changed is labelled anew; else it is an error."""
    executor: Literal["ray", "inline"] = "ray"
    actors: int | None = None
    cpus_per_actor: int = 1
    address: str | None = None


@dataclass
class DistillReport:
    """What a run did."""

    label_set: str = ""
    videos: int = 0
    """Videos that are complete now."""
    frames: int = 0
    """Frames labelled by this run."""
    shards: int = 0
    """Shards committed by this run."""
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.shards and not self.failures:
            return f"{self.label_set}: nothing to do, {self.videos} videos are complete"
        rate = self.frames / self.seconds if self.seconds else 0.0
        text = (
            f"{self.label_set}: {self.videos} videos complete, {self.shards} shards written, "
            f"{self.frames} frames labelled in {self.seconds:.1f} s ({rate:.0f} per second)"
        )
        return f"{text}, {len(self.failures)} videos failed" if self.failures else text


def label_videos(
    paths: Sequence[Path], store: str | Path, settings: DistillSettings
) -> DistillReport:
    """Label videos with a teacher into a store; what the store has is not done again.

    Args:
        paths: Video files, and folders that are searched for them.
        store: Path or URL of the store; made if it is not there.
        settings: How.

    Raises:
        VideoError: If there is no video that can be decoded.
        ValueError: If the settings do not fit the teacher.
        TargetStoreError: If the store cannot be opened or written.
    """
    teacher = build(settings.teacher, size=settings.size)
    request = _label_request(teacher, settings)
    files = find_videos(paths)
    known = TargetStore.open_if_there(store)
    records, failures = probe_videos(files, known, reader=settings.reader)
    if not records:
        more = f" ({len(failures) - 1} more videos failed too)" if len(failures) > 1 else ""
        raise VideoError(failures[0].reason + more)
    for failure in failures:
        log.warning("skipped %s: %s", failure.video, failure.reason)
    target = TargetStore.open_or_create(store)
    with target.writer() as token:
        return _label_records(target, token, records, failures, teacher, request, settings)


def _label_records(
    store: TargetStore,
    token: str,
    records: Sequence[VideoRecord],
    failures: list[Failure],
    teacher: Teacher,
    request: LabelRequest,
    settings: DistillSettings,
) -> DistillReport:
    report = DistillReport(failures=list(failures))
    videos = _add_records(store, records, report, replace_changed=settings.replace_changed)
    batch = settings.batch or teacher.spec.batch
    surroundings = environment(
        device=str(teacher.device), threads=settings.cpus_per_actor, batch=batch
    )
    labels = store.ensure_label_set(request, surroundings)
    report.label_set = labels.name
    frames = None
    if settings.with_frames is not None:
        frames = store.ensure_frame_set(_frame_request(settings), surroundings)
    tasks = plan_tasks(videos, labels, frames, settings.budget)
    store.log_run(event="start", label_set=labels.name, tasks=len(tasks), **surroundings)
    began = time.monotonic()
    if tasks:
        worker = WorkerSettings(
            store=store.place.absolute_url,
            token=token,
            labels=labels.name,
            frames=frames.name if frames is not None else None,
            teacher=settings.teacher,
            size=settings.size,
            reader=settings.reader,
            batch=batch,
            threads=settings.cpus_per_actor,
        )
        _run_tasks(tasks, _executor(worker, settings), labels, frames, report)
    report.seconds = time.monotonic() - began
    report.videos = sum(
        all(shard in labels.receipts for shard in wanted_shards(labels, video, settings.budget))
        for video in videos
    )
    for failure in report.failures:
        store.log_run(event="failure", video=failure.video, reason=failure.reason)
    store.log_run(event="end", frames=report.frames, seconds=report.seconds)
    return report


def _add_records(
    store: TargetStore,
    records: Sequence[VideoRecord],
    report: DistillReport,
    *,
    replace_changed: bool,
) -> list[VideoRow]:
    """Add the videos to the store's table, all but those that are not what the store knows."""
    fitting = []
    for record in records:
        known = store.find_video(record.id)
        is_changed = known is not None and known.content_hash != record.content_hash
        if is_changed and not replace_changed:
            error = VideoChangedError(
                f"{record.absolute} has other content than the {record.id!r} in {store.url}; "
                "give it another name, or label it anew with --replace-changed"
            )
            log.warning("skipped %s: %s", record.id, error)
            report.failures.append(Failure(record.id, str(error)))
        else:
            fitting.append(record)
    store.add_videos(fitting, replace_changed=replace_changed)
    # Where the videos lie now may not be where they lay when the store first saw them.
    return [
        replace(store.video(record.id), root=record.root, path=record.path) for record in fitting
    ]


def _run_tasks(
    tasks: Sequence[Task],
    executor: Executor,
    labels: LabelSet,
    frames: FrameSet | None,
    report: DistillReport,
) -> None:
    total = sum(task.num_frames(labels) for task in tasks)
    committers = {"labels": Committer(labels)}
    if frames is not None:
        committers["frames"] = Committer(frames)
    with Progress(total, unit="frames", label=f"labelling with {labels.teacher}") as progress:
        try:
            # Closed here: an exception's traceback would keep the workers for as long as it lives.
            with closing(executor.run(tasks)) as events:
                for event in events:
                    if isinstance(event, ShardDone):
                        committers[event.kind].add(event.receipt)
                        report.shards += 1
                        if event.kind == "labels":
                            report.frames += event.num_frames
                            progress.advance(event.num_frames)
                    elif isinstance(event, Failure):
                        log.warning("failed %s: %s", event.video, event.reason)
                        report.failures.append(event)
                    for committer in committers.values():
                        committer.commit_if_due()
        finally:  # also when the run is interrupted: what lies on the disk is kept
            for committer in committers.values():
                committer.commit()


def _executor(worker: WorkerSettings, settings: DistillSettings) -> Executor:
    if settings.executor == "inline":
        return InlineExecutor(worker)
    return RayExecutor(
        worker,
        actors=settings.actors,
        cpus_per_actor=settings.cpus_per_actor,
        address=settings.address,
    )


def _label_request(teacher: Teacher, settings: DistillSettings) -> LabelRequest:
    provenance = {
        **teacher.spec.provenance,
        "weights_sha256": teacher.weights_sha256,
        "decoder": decoder_version(settings.reader),
    }
    return LabelRequest(
        teacher=teacher.spec.name,
        provenance=provenance,
        layout=teacher.spec.layout,
        description=teacher.spec.description,
        variant=settings.variant,
        grid_step=settings.grid_step,
        shard_frames=settings.shard_frames,
    )


def _frame_request(settings: DistillSettings) -> FrameRequest:
    height, width = settings.with_frames or (0, 0)
    return FrameRequest(
        height=height,
        width=width,
        decoder=decoder_version(settings.reader),
        shard_frames=settings.shard_frames,
    )
