"""Look at videos before anything is labelled: what there is, and what of it the store has."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from distill.events import Failure
from distill.failures import FailureList
from distill.plan import Budget, Found, Target, wanted_shards
from distill.settings import DistillSettings
from stores.errors import DamagedStoreError, VideoError
from stores.probing import ProbeFailure, probe_videos
from stores.progress import Progress
from stores.shards import Request
from stores.table import VideoRow
from stores.targets import TargetStore
from stores.videos import FileStamp, VideoFile, VideoRecord

log = logging.getLogger(__name__)


@dataclass
class Survey:
    """What a look at the videos gave."""

    records: list[VideoRecord] = field(default_factory=list)
    """Videos that can be decoded, ordered as they were named."""
    failures: list[Failure] = field(default_factory=list)
    """Files that cannot."""
    passed_over: list[Failure] = field(default_factory=list)
    """Files that could not in an earlier run, and have not changed since."""
    found: dict[bytes, Found] = field(default_factory=dict)
    """By content hash: the file's stamp and where its frames lie."""

    @property
    def duplicates(self) -> int:
        """Files whose content another one has, too."""
        return len(self.records) - len({record.content_hash for record in self.records})


def survey_videos(
    files: Sequence[VideoFile],
    store: TargetStore | None,
    requests: Sequence[Request],
    failed: FailureList,
    settings: DistillSettings,
) -> Survey:
    """Learn content, length and frame positions of videos, several at a time.

    Videos that the store has whole are not decoded; files that failed before and have not changed
    since are passed over, unless they are to be tried again.

    Args:
        files: The videos.
        store: If it is there already.
        requests: What is to be filled.
        failed: What earlier runs could not do.
        settings: How.
    """
    survey = Survey()
    targets = targets_of(store, requests)

    def complete(content_hash: bytes) -> VideoRow | None:
        row = store.find_content(content_hash) if store is not None else None
        return row if row is not None and is_complete(row, targets, settings.budget) else None

    untried: list[VideoFile] = []
    failed_files = {} if settings.retry_failed else failed.failed_files()
    for file in files:
        known = failed_files.get(str(file.absolute))
        if known is None or known.stamp != _stamp(file):
            untried.append(file)
        else:
            survey.passed_over.append(known)
    records: dict[str, VideoRecord] = {}
    with Progress(len(untried), unit="videos", label="probing") as progress:
        for probe in probe_videos(
            untried, reader=settings.reader, known=complete, hang_seconds=settings.hang_seconds
        ):
            if isinstance(probe, ProbeFailure):
                survey.failures.append(_failure(probe))
            else:
                record = probe.record
                records[record.id] = record
                if probe.index is not None or record.content_hash not in survey.found:
                    survey.found[record.content_hash] = Found.of(probe.stamp, probe.index)
            progress.advance()
    survey.records = [records[file.id] for file in files if file.id in records]
    survey.failures.sort(key=lambda failure: failure.video)
    return survey


def refusal(record: VideoRecord, store: TargetStore | None, settings: DistillSettings) -> str:
    """Return why a video cannot be labelled into a store, or nothing."""
    if store is None:
        return ""
    known = store.find_video(record.id)
    if known is not None and known.content_hash != record.content_hash:
        if settings.replace_changed:
            return ""
        return (
            f"{record.absolute} has other content than the {record.id!r} in {store.url}; give it "
            "another name, or label it anew with --replace-changed"
        )
    same = store.find_content(record.content_hash)
    if same is not None and same.frames != record.frames:
        return (
            f"{record.absolute} has {record.frames} frames here, and {same.frames} in {store.url}: "
            "another decoder; use the same --reader for all runs"
        )
    return ""


def targets_of(store: TargetStore | None, requests: Sequence[Request]) -> list[Target]:
    """Return what is to be filled, with what of it is there."""
    targets = []
    for request in requests:
        target = Target(request, lambda shard: False)
        if store is not None and store.find_sets(request.folder, request.name) == [request.key]:
            try:
                target = Target.of(store.open_set(request.key))
            except DamagedStoreError as error:  # an error once it is to be filled
                log.debug("%s", error)
        targets.append(target)
    return targets


def is_complete(video: VideoRow, targets: Sequence[Target], budget: Budget | None) -> bool:
    """Return whether all that is wanted of a video is there."""
    return all(
        target.has(shard)
        for shard, wanted in wanted_shards(video, targets, budget).items()
        for target in wanted
    )


def _stamp(file: VideoFile) -> FileStamp | None:
    try:
        return FileStamp.of(file.absolute)
    except VideoError:
        return None


def _failure(probe: ProbeFailure) -> Failure:
    name = probe.file.id.encode("utf-8", "replace").decode()
    file = str(probe.file.absolute).encode("utf-8", "replace").decode()
    return Failure(name, probe.reason, file=file, stamp=_stamp(probe.file))
