"""Before anything is labelled: what is missing, and what it will cost."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from distill.events import Failure, Labelled, ShardDone
from distill.failures import FailureList
from distill.label import (
    FrameBuffer,
    Times,
    decode_views,
    label_span,
    label_video,
    view_for,
)
from distill.plan import Budget, Target, Task, Unit, plan_tasks
from distill.settings import DistillSettings
from distill.survey import Survey, refusal, survey_videos, targets_of
from stores.codec import logit_error_bound
from stores.errors import VideoError
from stores.finding import find_videos
from stores.maps import render_maps
from stores.schema import FRAME_ALIGNMENT, LabelRequest
from stores.shards import Request
from stores.summary import format_bytes
from stores.table import VideoRow
from stores.targets import TargetStore
from stores.videos import VideoRecord
from student.metrics import kl_divergence
from teachers.base import Teacher

BLOCK_FRAMES: Final = 16
"""Frames of a block, of which a budget allows some number for each video."""
BUDGETS: Final = (1, 2, 4, 8, 16)
SHOWN_VIDEOS: Final = 6
CALIBRATED_VIDEOS: Final = 3
CALIBRATION_SECONDS: Final = 20.0
CLIPS_PER_EPOCH: Final = 2
"""Clips of each video in an epoch of the paper's recipe."""
WINDOWS_PER_CLIP: Final = {"TinyHD-M": 16, "TinyHD-S": 1}
"""How often a step with the teacher in it runs the teacher for a clip."""


@dataclass(frozen=True)
class Price:
    """What it takes to label so much of each video, less what is there already."""

    what: str
    windows: int
    kept_frames: int
    """Frames that are kept themselves."""
    shards: int
    files: int
    videos: int


@dataclass(frozen=True)
class Drift:
    """How far a lower precision's targets are from those of float32."""

    kl_nats: float
    """KL(float32 || lower) of normalised maps, the mean over frames and maps."""
    worst_kl_nats: float
    largest: float
    """The largest difference of two logits."""
    share: float
    """Of logits that differ by more than the store's grid may."""


@dataclass(frozen=True)
class Calibration:
    """What one worker of this machine does, measured on some of the videos."""

    device: str
    threads: int
    batch: int
    windows: int
    seconds: float
    teacher_seconds: float
    waited_seconds: float
    bytes_per_window: float
    """Of a frame's maps in a label set."""
    bytes_per_kept_frame: float
    drift: Drift | None = None

    @property
    def windows_per_second(self) -> float:
        return self.windows / self.seconds


@dataclass
class Forecast:
    """What a run would do."""

    label_sets: tuple[str, ...]
    survey: Survey
    price: Price
    """Of what was asked for."""
    videos: list[tuple[str, int]] = field(default_factory=list)
    """Names of the videos to label and how many windows of each, the most first."""
    budgets: list[Price] = field(default_factory=list)
    passed_over: list[Failure] = field(default_factory=list)
    calibration: Calibration | None = None

    def __str__(self) -> str:
        survey, price = self.survey, self.price
        frames = sum(record.frames for record in survey.records)
        lines = [
            ", ".join(self.label_sets),
            f"  {len(survey.records)} videos with {frames} frames, {survey.duplicates} of them "
            f"copies of others, {len(survey.failures)} that cannot be labelled",
            f"  to do: {price.videos} videos, {price.windows} windows, {price.shards} shards, "
            f"{price.files} files",
        ]
        if self.videos:
            shown = ", ".join(f"{name} ({frames})" for name, frames in self.videos[:SHOWN_VIDEOS])
            more = len(self.videos) - SHOWN_VIDEOS
            lines.append(f"  windows of each: {shown}" + (f" and {more} more" if more > 0 else ""))
        lines += [f"  {item.video}: {item.reason}" for item in survey.failures[:SHOWN_VIDEOS]]
        if self.passed_over:
            lines.append(
                f"  {len(self.passed_over)} failures of earlier runs are left out; --retry-failed "
                "takes them up"
            )
        lines += ["", *self._table()]
        if self.calibration is not None:
            lines += ["", *self._measured(self.calibration)]
        return "\n".join(lines)

    def _table(self) -> list[str]:
        rows: list[tuple[str, ...]] = [("each video", "windows", "shards", "files", "time", "size")]
        for price in (*self.budgets, self.price):
            duration = size = "-"
            if self.calibration is not None:
                duration = _duration(price.windows / self.calibration.windows_per_second)
                size = format_bytes(
                    price.windows * self.calibration.bytes_per_window
                    + price.kept_frames * self.calibration.bytes_per_kept_frame
                )
            numbers = (price.windows, price.shards, price.files)
            rows.append((price.what, *(f"{number}" for number in numbers), duration, size))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  " + "  ".join(
                cell.ljust(width) if not column else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]  # fmt: skip
        if self.calibration is None:
            lines.append("  time and size: with --calibrate")
        return lines

    def _measured(self, measured: Calibration) -> list[str]:
        share = measured.teacher_seconds / measured.seconds
        waited = measured.waited_seconds / measured.seconds
        lines = [
            f"  measured here: {measured.windows} windows in {measured.seconds:.1f} s, "
            f"{measured.windows_per_second:.3g} per second on {measured.device} with "
            f"{measured.threads} threads, {measured.batch} at once",
            f"  {share:.0%} of the time in the teacher, {waited:.0%} waiting for frames, the rest "
            "packing and writing; times are those of one such worker",
        ]
        if measured.drift is not None:
            drift = measured.drift
            lines.append(
                f"  off float32: KL {drift.kl_nats:.2g} nats, at most {drift.worst_kl_nats:.2g}; "
                f"{100 * drift.share:.2g}% of the logits further off than rounding to the store's "
                f"grid may bring them, the largest {drift.largest:.3g}"
            )
        videos = max(1, len(self.survey.records) - self.survey.duplicates)
        parts = [
            f"{self.price.windows / (videos * CLIPS_PER_EPOCH * windows):.3g} epochs of a {student}"
            for student, windows in WINDOWS_PER_CLIP.items()
        ]
        lines.append(
            "  against running the teacher in every step, as of the paper's 2 clips of each video, "
            f"it has paid for itself after {' or '.join(parts)}"
        )
        return lines


def forecast_run(
    paths: Sequence[Path],
    store: str | Path,
    settings: DistillSettings,
    *,
    lists: Sequence[Path] = (),
    split: str | None = None,
    calibrate: bool = False,
) -> Forecast:
    """Say what :func:`distill.run.label_videos` would do; the store is only read.

    Args:
        paths: Video files, folders that are searched for them, data sets and catalogues.
        store: Path or URL of the store, which need not be there.
        settings: How.
        lists: Files that name videos.
        split: Take this split of data sets and catalogues alone.
        calibrate: Label some blocks of some videos, into a scratch folder, to measure.

    Raises:
        VideoError: If there is no video that can be decoded.
        ValueError: If the settings do not fit the teacher.
        TargetStoreError: If the store cannot be read.
    """
    teacher = settings.build_teacher()
    requests = settings.requests(teacher)
    known = TargetStore.open_if_there(store)
    failed = FailureList.load(known.place) if known is not None else FailureList()
    files = find_videos(paths, lists, split=split)
    survey = survey_videos(files, known, requests, failed, settings)
    if not survey.records:
        raise VideoError([*survey.failures, *survey.passed_over][0].reason)
    refused = {record.id: refusal(record, known, settings) for record in survey.records}
    survey.failures += [Failure(name, reason) for name, reason in refused.items() if reason]
    survey.records = [record for record in survey.records if not refused[record.id]]
    rows = _rows(survey.records, known)
    passed: dict[int, Failure] = {}

    shards = {} if settings.retry_failed else failed.failed_shards(item.key for item in requests)

    def is_given_up(video: VideoRow, shard: int) -> bool:
        number = shard - requests[0].grid.shards(video).start
        entry = shards.get((video.content_hash.hex(), number))
        if entry is None:
            return False
        passed[id(entry)] = entry
        return True

    tasks = plan_tasks(
        rows,
        targets_of(known, requests),
        budget=settings.budget,
        is_given_up=is_given_up,
        found=survey.found,
        is_recurrent=teacher.is_recurrent,
    )
    what = "all frames" if settings.budget is None else _blocks(settings.budget.blocks)
    result = Forecast(
        label_sets=tuple(item.name for item in requests if isinstance(item, LabelRequest)),
        survey=survey,
        price=_price(what, tasks, requests),
        videos=_windows_of_videos(tasks),
        passed_over=[*survey.passed_over, *passed.values()],
    )
    blocks = replace(settings, shard_frames=BLOCK_FRAMES).requests(teacher)
    targets = targets_of(known, blocks)
    seed = settings.budget.seed if settings.budget is not None else 0
    for number in BUDGETS:
        if settings.budget is None or number != settings.budget.blocks:
            planned = plan_tasks(rows, targets, budget=Budget(number, seed))
            result.budgets.append(_price(_blocks(number), planned, blocks))
    if calibrate and survey.records:
        result.calibration = _calibrate(survey, settings)
    return result


def _rows(records: Sequence[VideoRecord], store: TargetStore | None) -> list[VideoRow]:
    """Return the rows that the videos have in the store, or would get."""
    rows = []
    first = store.num_frames if store is not None else 0
    new: dict[bytes, VideoRow] = {}
    for record in records:
        row = store.find_content(record.content_hash) if store is not None else None
        row = row or new.get(record.content_hash)
        if row is None:
            values = {name: getattr(record, name) for name in VideoRecord.__dataclass_fields__}
            row = new[record.content_hash] = VideoRow(**values, first=first)
            first += -(-record.frames // FRAME_ALIGNMENT) * FRAME_ALIGNMENT
        rows.append(row)
    return rows


def _price(what: str, tasks: Sequence[Task], requests: Sequence[Request]) -> Price:
    arrays = {request.key: len(request.arrays) for request in requests}
    keys = [key for task in tasks for unit in task.units for key in unit.sets]
    return Price(
        what=what,
        windows=sum(task.num_windows for task in tasks),
        kept_frames=sum(
            len(task.span(unit)) * (len(unit.sets) - unit.num_label_sets)
            for task in tasks
            for unit in task.units
        ),
        shards=len(keys),
        files=sum(arrays[key] for key in keys),
        videos=len({task.video.first for task in tasks}),
    )


def _duration(seconds: float) -> str:
    for length, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def _windows_of_videos(tasks: Sequence[Task]) -> list[tuple[str, int]]:
    windows = Counter[str]()
    for task in tasks:
        windows[task.video.id] += task.num_windows
    return windows.most_common()


def _blocks(number: int) -> str:
    return f"{number} block{'s' * (number > 1)} of {BLOCK_FRAMES}"


def _calibrate(survey: Survey, settings: DistillSettings) -> Calibration:
    """Label blocks of some videos into a scratch store for a while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.cpus_per_actor)
    step = max(1, len(survey.records) // CALIBRATED_VIDEOS)
    chosen = survey.records[::step][:CALIBRATED_VIDEOS]
    try:
        teacher = settings.build_teacher(device=settings.device)
        next(_label_head(chosen[0], range(1), teacher, settings))  # what is only done once
        with tempfile.TemporaryDirectory(prefix="tinyhd-calibrate-") as folder:
            measured = _measure(Path(folder) / "targets.zarr", chosen, survey, teacher, settings)
        if settings.precision == "float32":
            return measured
        reference = replace(settings, precision="float32").build_teacher(device=settings.device)
        return replace(measured, drift=_measure_drift(chosen, reference, teacher, settings))
    finally:
        torch.set_num_threads(threads)


def _measure(
    where: Path,
    records: Sequence[VideoRecord],
    survey: Survey,
    teacher: Teacher,
    settings: DistillSettings,
) -> Calibration:
    requests = replace(settings, shard_frames=BLOCK_FRAMES).requests(teacher)
    store = TargetStore.create(where)
    store.add_videos(records)
    sets = {request.key: store.ensure_set(request, {}) for request in requests}
    targets = [Target.of(shard_set) for shard_set in sets.values()]
    planned = plan_tasks(
        store.videos, targets, found=survey.found, is_recurrent=teacher.is_recurrent
    )
    # One stretch of each video: what is measured must not grow with their length.
    tasks = list({task.video.first: task for task in reversed(planned)}.values())
    batch = settings.batch or teacher.spec.batch
    times = Times()
    windows = 0
    frames = dict.fromkeys(sets, 0)
    began, cpu_began = time.monotonic(), time.process_time()
    for number, task in enumerate(tasks, 1):
        until = _Until(began + CALIBRATION_SECONDS * number / len(tasks))
        for event in label_video(
            task.ready(),
            teacher=teacher,
            sets=sets,
            reader=settings.reader,
            batch=batch,
            claim=until,
            times=times,
        ):
            if isinstance(event, Labelled):
                windows += event.num_frames
            elif isinstance(event, ShardDone):
                frames[event.set] += event.num_frames
    seconds = time.monotonic() - began
    if settings.device == "cpu":  # decoding had a core to itself, which it has not beside others
        seconds = max(seconds, (time.process_time() - cpu_began) / settings.cpus_per_actor)
    bytes_of = {"labels": 0.0, "frames": 0.0}
    for key, number in frames.items():
        size = sum(num for name, num in store.place.walk(key) if "/c." in name)
        bytes_of[key.partition("/")[0]] += size / max(1, number)
    return Calibration(
        device=settings.device,
        threads=settings.cpus_per_actor,
        batch=batch,
        windows=windows,
        seconds=seconds,
        teacher_seconds=times.teacher_seconds,
        waited_seconds=times.waited_seconds,
        bytes_per_window=bytes_of["labels"] / len(settings.variants),
        bytes_per_kept_frame=bytes_of["frames"],
    )


class _Until:
    """Says yes to the first unit, and to others until a time."""

    def __init__(self, ends: float) -> None:
        self._ends, self._is_first = ends, True

    def __call__(self, unit: Unit) -> bool:
        is_first, self._is_first = self._is_first, False
        return is_first or time.monotonic() < self._ends


def _measure_drift(
    records: Sequence[VideoRecord], reference: Teacher, lower: Teacher, settings: DistillSettings
) -> Drift:
    layout = reference.spec.layout
    bound = logit_error_bound(settings.grid_step)
    divergences, differences = [], []
    for record in records:
        span = range(min(BLOCK_FRAMES, record.frames))
        exact, rounded = (
            next(_label_head(record, span, teacher, settings)) for teacher in (reference, lower)
        )
        differences += [np.abs(exact[name] - rounded[name]).ravel() for name in exact]
        size = {"height": layout.height, "width": layout.width}
        one, other = (
            render_maps(
                {name: torch.from_numpy(values) for name, values in planes.items()},
                layout, layout.names, **size,
            )
            for planes in (exact, rounded)
        )  # fmt: skip
        for name, maps in one.items():
            for wanted, given in zip(maps, other[name], strict=True):
                log_given = given.clamp(min=torch.finfo(given.dtype).tiny).log()
                divergences.append(kl_divergence(wanted, log_given).item())
    all_differences = np.concatenate(differences)
    return Drift(
        kl_nats=float(np.mean(divergences)),
        worst_kl_nats=float(np.max(divergences)),
        largest=float(all_differences.max()),
        share=float((all_differences > bound).mean()),
    )


def _label_head(
    record: VideoRecord, span: range, teacher: Teacher, settings: DistillSettings
) -> Iterator[dict[str, np.ndarray]]:
    """Yield a teacher's planes of the first frames of a video."""
    video = VideoRow(
        **{name: getattr(record, name) for name in VideoRecord.__dataclass_fields__}, first=0
    )
    context = teacher.context_of(span, video.frames)
    views = {"": view_for(teacher, settings.variants[0])}
    teacher.reset()
    buffer = FrameBuffer(decode_views(video, [context], views, reader=settings.reader), Times())
    yield from label_span(buffer, "", span, teacher, num_frames=video.frames, batch=len(span))
