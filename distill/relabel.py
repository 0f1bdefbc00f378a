"""Label some shards of a store anew, and compare."""

from __future__ import annotations

import json
import random
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from distill.label import READ_AHEAD_FRAMES, FrameBuffer, Times, decode_views, label_span, view_for
from stores.ahead import read_ahead
from stores.errors import TargetStoreError, VideoChangedError, VideoNotLabelledError
from stores.progress import Progress
from stores.shards import LabelSet
from stores.table import VideoRow
from stores.targets import TargetStore
from stores.videos import hash_file
from teachers.base import Teacher
from teachers.registry import TEACHERS, build

OWN_OPTIONS: Final = ("name", "size", "device", "precision", "weights")
"""What is told of a teacher elsewhere."""


@dataclass
class RelabelReport:
    """How far a teacher's maps of today are from the stored ones."""

    shards: int = 0
    values: int = 0
    moved: int = 0
    """Values that are one grid step off, as another machine or version may make them."""
    wrong: int = 0
    """Values that are more than one step off."""
    worst: str = ""
    """The first shard with such a value."""

    @property
    def is_within_bounds(self) -> bool:
        return not self.wrong

    def __str__(self) -> str:
        share = self.moved / self.values if self.values else 0.0
        text = (
            f"{self.shards} shards labelled anew: {self.values} values, {share:.2%} of them one "
            "grid step off"
        )
        if self.wrong:
            text += f", {self.wrong} more than that, first in {self.worst}"
        return text


def relabel_shards(
    where: str,
    number: int,
    *,
    labels: str | None = None,
    teacher: str | None = None,
    weights: Path | None = None,
    videos_root: Path | None = None,
    seed: int = 0,
) -> RelabelReport:
    """Label random shards with the teacher that made them and compare with what is stored.

    Args:
        where: Path or URL of the store; it is only read.
        number: Shards to look at; all if there are fewer.
        labels: Name of the label set, or its beginning.
        teacher: What labels, if it is one of your own: what a store names is not imported.
        weights: The teacher's weights, if it has any.
        videos_root: Where the videos lie now, if not where they were labelled.
        seed: Which shards are taken.

    Raises:
        TargetStoreError: If store, label set or videos are not there, or the teacher is another.
        ValueError: If there is no such teacher.
    """
    store = TargetStore.open(where)
    label_set = store.label_set(labels)
    judge = _build_teacher(label_set, teacher, weights)
    choices = [
        (video, shard)
        for video in {row.first: row for row in store.videos}.values()
        for shard in label_set.shards(video)
        if shard in label_set.receipts
    ]
    if not choices:
        raise VideoNotLabelledError(f"{label_set.name} in {where} holds no shard to compare with")
    chosen = random.Random(seed).sample(choices, min(number, len(choices)))
    report = RelabelReport()
    label = f"labelling anew with {label_set.teacher}"
    with Progress(len(chosen), unit="shards", label=label) as progress:
        for video, shard in chosen:
            path = (videos_root or Path(video.root)) / video.path
            if hash_file(path) != video.content_hash:
                raise VideoChangedError(f"{path} is not the video that {where} was labelled from")
            _compare(label_set, video, shard, _label(label_set, video, shard, judge, path), report)
            progress.advance()
    return report


def _build_teacher(label_set: LabelSet, name: str | None, weights: Path | None) -> Teacher:
    layout = label_set.layout
    then = label_set.request.provenance
    description = label_set.request.description
    if name is None and label_set.teacher not in TEACHERS:
        raise TargetStoreError(
            f"{label_set.name} is from a teacher of one's own, "
            f"{description.get('factory', label_set.teacher)!r}; if you trust it, name it with "
            "--teacher"
        )
    teacher = build(
        name or label_set.teacher,
        size=(layout.height, layout.width),
        precision=then["compute"],
        weights=weights,
        **_options(description.get("options", "{}")),
    )
    now = teacher.provenance
    if other := [name for name in now if now[name] != then.get(name)]:
        raise TargetStoreError(
            f"the teacher {label_set.teacher!r} here differs from that of {label_set.name} in: "
            f"{', '.join(other)}"
        )
    return teacher


def _options(text: str) -> dict[str, str]:
    """Return what else a teacher was given, as a store tells."""
    try:
        options = json.loads(text)
        return {str(name): str(value) for name, value in options.items() if name not in OWN_OPTIONS}
    except (ValueError, AttributeError) as error:
        raise TargetStoreError(f"the teacher's options {text!r} cannot be read") from error


def _label(
    label_set: LabelSet, video: VideoRow, shard: int, teacher: Teacher, path: Path
) -> dict[str, npt.NDArray[Any]]:
    request = label_set.request
    batch = int(label_set.attributes["environment"].get("batch", teacher.spec.batch))
    before = label_set.shards(video).start if teacher.is_recurrent else shard
    spans = [label_set.frames_of(other, video) for other in range(before, shard + 1)]
    contexts = [teacher.context_of(part, video.frames) for part in spans]
    teacher.reset()
    decoded = decode_views(
        replace(video, root=str(path.parent), path=path.name),
        [range(min(c.start for c in contexts), max(c.stop for c in contexts))],
        {label_set.key: view_for(teacher, request.variant)},
        reader=request.provenance["decoder"]["reader"],
    )
    with closing(read_ahead(decoded, READ_AHEAD_FRAMES)) as frames:
        buffer = FrameBuffer(frames, Times())
        for part, context in zip(spans, contexts, strict=True):
            buffer.forget_before(context.start)
            planes = label_span(
                buffer, label_set.key, part, teacher, num_frames=video.frames, batch=batch
            )
            parts = list(planes)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _compare(
    label_set: LabelSet,
    video: VideoRow,
    shard: int,
    planes: dict[str, npt.NDArray[Any]],
    report: RelabelReport,
) -> None:
    span = label_set.frames_of(shard, video)
    stored = label_set.read(video.id, span.start, span.stop)
    step = float(label_set.attributes["grid_step"])
    report.shards += 1
    for name, values in planes.items():
        steps = np.abs(np.round(values / step) - np.round(stored[name] / step))
        report.values += steps.size
        report.moved += int((steps == 1).sum())
        if wrong := int((~(steps <= 1)).sum()):
            report.wrong += wrong
            report.worst = report.worst or f"{video.id!r}, frames {span.start}-{span.stop}"
