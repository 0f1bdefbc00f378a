from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.events import ShardDone
from distill.label import label_video
from distill.plan import Task, Unit
from stores import schema
from stores.decode import decode_video
from stores.errors import TargetValueError, VideoError
from stores.maps import MapLayout, MapSpec
from stores.shards import LabelSet
from stores.targets import TargetStore
from stores.videos import VideoRecord
from teachers.base import Teacher, TeacherSpec
from tests.conftest import probe


class MeanTeacher(Teacher):
    """Says, for each frame, the mean brightness of every frame of its window, in two rows."""

    def __init__(self, window: int = 5) -> None:
        maps = (MapSpec(name="m", height=2, width=5, activation="exp", order="activate_first"),)
        super().__init__(
            TeacherSpec(
                name="mean",
                paper="none",
                licence="none",
                adapter_version=1,
                normalisation="none",
                resize_rule="none",
                window=window,
                head_policy="repeat_first",
                layout=MapLayout(height=16, width=16, maps=maps, saliency="m"),
                batch=7,
            )
        )
        self.batches: list[int] = []

    def logits(self, windows: Tensor) -> dict[str, Tensor]:
        self.batches.append(len(windows))
        means = windows.mean((1, 3, 4)) * 100
        return {"maps_2x5": means[:, None, None].expand(-1, 1, 2, -1)}


@pytest.fixture
def record(video_folder: Path) -> VideoRecord:
    return probe(video_folder / "long.avi")


def label_set(path: Path, record: VideoRecord, *, shard_frames: int = 32) -> LabelSet:
    store = TargetStore.create(path)
    store.add_videos([record])
    request = schema.LabelRequest(
        teacher="mean",
        provenance={"window": 5},
        layout=MeanTeacher().spec.layout,
        shard_frames=shard_frames,
    )
    return store.ensure_set(request, {})


def run(labels: LabelSet, teacher: Teacher, shards: tuple[int, ...], batch: int = 7) -> None:
    task = Task(
        labels.store.videos[0], labels.grid, tuple(Unit(shard, (labels.key,)) for shard in shards)
    )
    events = label_video(
        task, teacher=teacher, sets={labels.key: labels}, reader="pyav", batch=batch
    )
    labels.commit(event.receipt for event in events if isinstance(event, ShardDone))


def brightness(video_folder: Path) -> np.ndarray:
    teacher = MeanTeacher()
    resized = np.stack([teacher.resize(f) for f in decode_video(video_folder / "long.avi")])
    return teacher.prepare(resized).mean((1, 2, 3)).numpy() * 100


def test_every_frame_gets_the_target_of_its_own_window(
    tmp_path: Path, record: VideoRecord, video_folder: Path
) -> None:
    labels = label_set(tmp_path / "a.zarr", record)
    run(labels, MeanTeacher(), (0, 1, 2))
    stored = labels.read("long", 0, 70)["maps_2x5"][:, 0, 0]
    means = brightness(video_folder)
    for frame in range(70):
        window = [max(0, frame - 4 + i) for i in range(5)]
        np.testing.assert_allclose(stored[frame], means[window], atol=1 / 64 + 1e-3)


def test_a_shard_alone_is_the_shard_of_a_whole_run(tmp_path: Path, record: VideoRecord) -> None:
    """Resuming in the middle of a video gives the same bytes."""
    whole = label_set(tmp_path / "whole.zarr", record)
    run(whole, MeanTeacher(), (0, 1, 2))
    parts = label_set(tmp_path / "parts.zarr", record)
    for shard in (2, 0, 1):
        run(parts, MeanTeacher(), (shard,))
    shards = whole.receipts.shards()
    assert shards == parts.receipts.shards()
    assert [whole.receipts[s] for s in shards] == [parts.receipts[s] for s in shards]


def test_batches_start_anew_at_every_shard(tmp_path: Path, record: VideoRecord) -> None:
    teacher = MeanTeacher()
    run(label_set(tmp_path / "a.zarr", record), teacher, (0, 1, 2))
    assert teacher.batches == [7, 7, 7, 7, 4, 7, 7, 7, 7, 4, 6]


def test_windows_reach_back_over_shard_borders(tmp_path: Path, record: VideoRecord) -> None:
    short, long = (label_set(tmp_path / f"{n}.zarr", record, shard_frames=n) for n in (8, 256))
    run(short, MeanTeacher(), tuple(range(9)))
    run(long, MeanTeacher(), (0,))
    found, expected = (labels.read("long", 0, 70)["maps_2x5"] for labels in (short, long))
    np.testing.assert_allclose(found, expected, atol=1 / 32)


def test_other_length_than_planned_is_an_error(
    tmp_path: Path, record: VideoRecord, video_folder: Path
) -> None:
    from dataclasses import replace

    labels = label_set(tmp_path / "a.zarr", replace(record, frames=75))
    with pytest.raises(VideoError, match="ended before frame 70"):
        run(labels, MeanTeacher(), (0, 1, 2))


class NotANumber(MeanTeacher):
    def logits(self, windows: Tensor) -> dict[str, Tensor]:
        values = super().logits(windows)["maps_2x5"]
        return {"maps_2x5": torch.where(values > 0, torch.nan, values)}


def test_maps_that_are_no_numbers_are_refused(tmp_path: Path, record: VideoRecord) -> None:
    labels = label_set(tmp_path / "a.zarr", record)
    with pytest.raises(TargetValueError, match="frame 0 of 'long'"):
        run(labels, NotANumber(), (0,))
    assert labels.coverage(labels.store.videos[0].id) == []
