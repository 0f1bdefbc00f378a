"""The driver: find, probe, plan, hand out, collect receipts, commit, report."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Final

from distill.events import Failure, Retry, ShardDone
from distill.executors import Executor, InlineExecutor, RayExecutor
from distill.failures import FailureList
from distill.plan import Target, Task, plan_tasks, wanted_shards
from distill.settings import DistillSettings
from distill.status import RunStatus
from distill.survey import Survey, is_complete, refusal, survey_videos
from distill.worker import WorkerSettings
from stores.errors import VideoError
from stores.finding import find_videos
from stores.schema import LabelRequest, environment
from stores.shards import Committer, Request, ShardSet
from stores.table import VideoRow
from stores.targets import TargetStore
from stores.videos import VideoFile
from teachers.base import Teacher

log = logging.getLogger(__name__)

SAVE_SECONDS: Final = 5.0
"""Between two writes of the failure list."""


@dataclass
class DistillReport:
    """What a run did."""

    label_sets: tuple[str, ...] = ()
    """Names of the label sets that were filled."""
    videos: int = 0
    """Videos that are complete now."""
    frames: int = 0
    """Frames labelled by this run, in each label set."""
    shards: int = 0
    """Shards committed by this run."""
    smaller_batches: int = 0
    """Shards of which fewer windows than asked for fitted into the device's memory at once."""
    retries: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    passed_over: int = 0
    """Failures of earlier runs that were not tried again; they are among ``failures``."""

    def __str__(self) -> str:
        names = ", ".join(self.label_sets)
        if not self.shards and not self.failures:
            return f"{names}: nothing to do, {self.videos} videos are complete"
        rate = self.frames / self.seconds if self.seconds else 0.0
        parts = [
            f"{names}: {self.videos} videos complete, {self.shards} shards written",
            f"{self.frames} frames labelled in {self.seconds:.1f} s ({rate:.0f} per second)",
        ]
        if self.smaller_batches:
            parts.append(f"{self.smaller_batches} shards in smaller batches, for want of memory")
        if self.failures:
            videos = len({failure.video for failure in self.failures})
            parts.append(f"{videos} videos failed")
        return ", ".join(parts)


def label_videos(
    paths: Sequence[Path],
    store: str | Path,
    settings: DistillSettings,
    *,
    lists: Sequence[Path] = (),
    split: str | None = None,
) -> DistillReport:
    """Label videos with a teacher into a store; what the store has is not done again.

    Args:
        paths: Video files, folders that are searched for them, data sets and catalogues.
        store: Path or URL of the store; made if it is not there.
        settings: How.
        lists: Files that name videos; see :func:`stores.finding.find_videos`.
        split: Take this split of data sets and catalogues alone.

    Raises:
        VideoError: If there is no video that can be decoded.
        ValueError: If the settings do not fit the teacher or the machine.
        WorkerError: If no worker can start.
        ClusterError: If the Ray cluster cannot be used.
        TargetStoreError: If the store cannot be opened or written.
        KeyboardInterrupt: After an interruption, when what was being done is finished and kept.
    """
    return label_files(lambda: find_videos(paths, lists, split=split), store, settings)


def label_files(
    find: Callable[[], Sequence[VideoFile]], store: str | Path, settings: DistillSettings
) -> DistillReport:
    """Label videos as :func:`label_videos`, whoever finds them.

    Args:
        find: Finds them; called when the teacher is there.
        store: Path or URL of the store; made if it is not there.
        settings: How.
    """
    teacher = settings.build_teacher()
    requests = settings.requests(teacher)
    files = find()
    known = TargetStore.open_if_there(store)
    failed = FailureList.load(known.place) if known is not None else FailureList()
    survey = survey_videos(files, known, requests, failed, settings)
    if not survey.records:
        failures = [*survey.failures, *survey.passed_over]
        more = f" ({len(failures) - 1} more videos failed too)" if len(failures) > 1 else ""
        raise VideoError(failures[0].reason + more)
    target = TargetStore.open_or_create(store)
    with target.writer() as token:
        failed = FailureList.load(target.place)  # another driver may have been faster
        return _label(target, token, files, survey, failed, teacher, requests, settings)


def _label(
    store: TargetStore,
    token: str,
    files: Sequence[VideoFile],
    survey: Survey,
    failed: FailureList,
    teacher: Teacher,
    requests: Sequence[Request],
    settings: DistillSettings,
) -> DistillReport:
    report = DistillReport(
        label_sets=tuple(item.name for item in requests if isinstance(item, LabelRequest))
    )
    report.failures += survey.passed_over
    report.passed_over = len(survey.passed_over)
    for failure in survey.failures:
        _fail(failure, report, store)
    videos = _add_records(store, survey, report, settings)
    batch = settings.batch or teacher.spec.batch
    surroundings = environment(device=settings.device, threads=settings.cpus_per_actor, batch=batch)
    sets: dict[str, ShardSet] = {}
    for request in requests:
        sets[request.key] = store.ensure_set(request, surroundings)
    targets = [Target.of(shard_set) for shard_set in sets.values()]
    passed = _passed_over(videos, targets, failed, report, settings)
    tasks = plan_tasks(
        videos,
        targets,
        budget=settings.budget,
        is_given_up=lambda video, shard: (video.first, shard) in passed,
        found=survey.found,
        is_recurrent=teacher.is_recurrent,
    )
    for name in report.label_sets:
        store.log_run(event="start", label_set=name, tasks=len(tasks), **surroundings)
    began = time.monotonic()
    had_failures = bool(failed.entries)
    try:
        if tasks:
            worker = WorkerSettings(
                store=store.place.absolute_url,
                token=token,
                sets=tuple(sets),
                teacher=settings.teacher,
                weights=settings.weights.resolve() if settings.weights is not None else None,
                teacher_options=settings.teacher_options,
                size=settings.size,
                device=settings.device,
                precision=settings.precision,
                reader=settings.reader,
                batch=batch,
                threads=settings.cpus_per_actor,
                shares=not teacher.is_recurrent,
            )
            run_tasks(store, tasks, _executor(worker, settings), sets, report, settings, failed)
    finally:
        report.seconds = time.monotonic() - began
        store.check_driver()  # what follows is not for one that was replaced
        if report.retries:
            store.place.remove_leftovers()  # of workers that died; none is left
        _update(failed, files, videos, targets, survey, report)
        if failed.entries or had_failures:
            failed.save(store.place)
        store.log_run(
            event="end",
            frames=report.frames,
            shards=report.shards,
            failures=len(report.failures),
            seconds=round(report.seconds, 2),
        )
    report.videos = sum(is_complete(video, targets, settings.budget) for video in videos)
    return report


def _add_records(
    store: TargetStore, survey: Survey, report: DistillReport, settings: DistillSettings
) -> list[VideoRow]:
    """Add the videos to the store's table, all but those that are not what the store knows."""
    fitting = []
    for record in survey.records:
        if reason := refusal(record, store, settings):
            _fail(Failure(record.id, reason), report, store)
        else:
            fitting.append(record)
    store.add_videos(fitting, replace_changed=settings.replace_changed)
    # Where the videos lie now may not be where they lay when the store first saw them.
    return [
        replace(store.video(record.id), root=record.root, path=record.path) for record in fitting
    ]


def _passed_over(
    videos: Sequence[VideoRow],
    targets: Sequence[Target],
    failed: FailureList,
    report: DistillReport,
    settings: DistillSettings,
) -> set[tuple[int, int]]:
    """Return first frame and shard of what failed before and is not to be tried again."""
    passed: set[tuple[int, int]] = set()
    if settings.retry_failed or not failed.entries:
        return passed
    entries: dict[int, Failure] = {}
    shards = failed.failed_shards(target.request.key for target in targets)
    contents = {content for content, _ in shards}
    for video in videos:
        content = video.content_hash.hex()
        if content not in contents:
            continue
        for shard, wanted in wanted_shards(video, targets, settings.budget).items():
            number = shard - targets[0].request.grid.shards(video).start
            entry = shards.get((content, number))
            if entry is not None and not all(target.has(shard) for target in wanted):
                passed.add((video.first, shard))
                entries[id(entry)] = entry
    report.failures += entries.values()
    report.passed_over += len(entries)
    return passed


def run_tasks(
    store: TargetStore,
    tasks: Sequence[Task],
    executor: Executor,
    sets: dict[str, ShardSet],
    report: DistillReport,
    settings: DistillSettings,
    failed: FailureList,
) -> None:
    """Do tasks, commit what comes, and put it in the report.

    Raises:
        WorkerError: If no worker can start, or all would fail.
        StoreBusyError: If another driver has taken over the store.
        KeyboardInterrupt: After an interruption, when what was begun is finished.
    """
    committers = {key: Committer(shard_set) for key, shard_set in sets.items()}
    label = f"labelling with {settings.teacher}"
    with (
        _interruptions() as interrupted,
        executor,
        RunStatus(store, tasks, label=label, device=settings.device) as status,
        _interruptions(interrupted),  # again, as Ray has put its own handler in their place
    ):
        is_draining = False
        saved_at = time.monotonic()
        try:
            # Closed here: an exception's traceback would keep the workers for as long as it lives.
            with closing(executor.run(tasks)) as events:
                for event in events:
                    if interrupted.is_set() and not is_draining:
                        is_draining = True
                        log.info("finishing what is begun; interrupt again to stop at once")
                        executor.drain()
                    if isinstance(event, ShardDone):
                        committers[event.set].add(event.receipt)
                        report.shards += 1
                        report.smaller_batches += bool(event.batch)
                        if isinstance(sets[event.set].request, LabelRequest):
                            report.frames += event.num_frames
                    elif isinstance(event, Retry):
                        report.retries += 1
                        log.warning("%s: try %d failed: %s", event.video, event.tries, event.reason)
                    elif isinstance(event, Failure):
                        _fail(event, report, store)
                        failed.add(event)
                    if failed.is_changed and time.monotonic() - saved_at > SAVE_SECONDS:
                        failed.save(store.place)
                        saved_at = time.monotonic()
                    for committer in committers.values():
                        committer.commit_if_due()
                    if event is not None:
                        status.note(event)
                    status.tick()
        finally:  # also when the run is interrupted: what lies on the disk is kept
            for committer in committers.values():
                committer.commit()
        if is_draining:
            raise KeyboardInterrupt


def _fail(failure: Failure, report: DistillReport, store: TargetStore) -> None:
    report.failures.append(failure)
    log.warning("failed %s: %s", failure.video, failure.reason)
    store.log_run(
        event="failure",
        video=failure.video,
        reason=failure.reason,
        traceback=failure.traceback,
        shards=list(failure.shards),
        tries=failure.tries,
    )


def _update(
    failed: FailureList,
    files: Sequence[VideoFile],
    videos: Sequence[VideoRow],
    targets: Sequence[Target],
    survey: Survey,
    report: DistillReport,
) -> None:
    """Put on the failure list what failed, and take off it what is done."""
    grid = targets[0].request.grid
    firsts = {video.content_hash.hex(): grid.shards(video).start for video in videos}
    has = {target.request.key: target.has for target in targets}

    def is_done(content: str, shard: int, key: str) -> bool:
        return content in firsts and key in has and has[key](firsts[content] + shard)

    failed.forget_shards(is_done)
    bad = {failure.video for failure in (*survey.failures, *survey.passed_over)}
    failed.forget_files(str(file.absolute) for file in files if file.id not in bad)
    for failure in report.failures:
        if failure.shards or failure.file:
            failed.add(failure)


@contextmanager
def _interruptions(event: threading.Event | None = None) -> Iterator[threading.Event]:
    """Catch the first SIGINT or SIGTERM, so that what is begun can be finished; not the second."""
    is_interrupted = event or threading.Event()

    def catch(number: int, frame: FrameType | None) -> None:
        if is_interrupted.is_set():
            raise KeyboardInterrupt
        is_interrupted.set()

    if threading.current_thread() is not threading.main_thread():
        yield is_interrupted  # signals are the business of the main thread
        return
    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield is_interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _executor(worker: WorkerSettings, settings: DistillSettings) -> Executor:
    if settings.executor == "inline":
        return InlineExecutor(worker)
    return RayExecutor(
        worker,
        actors=settings.actors,
        cpus_per_actor=settings.cpus_per_actor,
        gpus_per_actor=settings.gpus,
        address=settings.address,
        hang_seconds=settings.hang_seconds,
    )
