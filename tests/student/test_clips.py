from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from stores.decode import decode_video
from stores.errors import VideoError
from stores.frames import resize_frames
from stores.targets import TargetStore
from student.clips import (
    ClipDataset,
    ClipKey,
    draw_clips,
    load_batches,
    split_clips,
    spread_clips,
)


def test_training_and_validation_share_no_frame(labelled: Path) -> None:
    labels = TargetStore.open(labelled).label_set()
    split = split_clips(labels, holdout=0.4)
    assert split.training == {"long": [range(15, 42)], "sub/middle": [range(15, 24)]}
    assert split.validation == {"long": [range(57, 70)], "sub/middle": [range(39, 40)]}


def test_everything_is_trained_on_without_holdout(labelled: Path) -> None:
    split = split_clips(TargetStore.open(labelled).label_set(), holdout=0)
    assert split.training == {
        "long": [range(15, 70)],
        "short": [range(15, 24)],
        "sub/middle": [range(15, 40)],
    }
    assert not split.validation


def test_missing_labels_are_left_out(labelled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "targets.zarr"
    shutil.copytree(labelled, copy)
    labels = TargetStore.open(copy, mode="r+").label_set()
    video = labels.store.video("long")
    labels.clear([labels.shards(video)[2]])  # frames 32 to 47
    split = split_clips(TargetStore.open(copy).label_set(), holdout=0)
    assert split.training["long"] == [range(15, 32), range(48, 70)]


def test_nothing_to_train_on_is_an_error(labelled: Path) -> None:
    with pytest.raises(ValueError, match="no clip to train on"):
        split_clips(TargetStore.open(labelled).label_set(), holdout=0.9)


def test_draws_depend_on_seed_and_epoch_alone() -> None:
    spans = {"a": [range(15, 40), range(60, 90)], "b": [range(15, 16)]}
    first = draw_clips(spans, per_video=30, seed=1, epoch=2)
    assert first == draw_clips(spans, per_video=30, seed=1, epoch=2)
    assert first != draw_clips(spans, per_video=30, seed=1, epoch=3)
    assert first != draw_clips(spans, per_video=30, seed=2, epoch=2)
    assert sorted(key.video for key in first) == ["a"] * 30 + ["b"] * 30
    lasts = {key.last for key in first if key.video == "a"}
    assert all(last in range(15, 40) or last in range(60, 90) for last in lasts)
    assert len(lasts) > 10


def test_validation_clips_are_spread() -> None:
    clips = spread_clips({"a": [range(10, 20), range(30, 41)], "b": [range(5, 7)]}, per_video=3)
    assert clips == [("a", 10), ("a", 30), ("a", 40), ("b", 5), ("b", 6)]


def test_kept_frames_are_the_decoded_ones(labelled: Path, video_folder: Path) -> None:
    key = ClipKey("sub/middle", 30)
    dataset = ClipDataset(labelled, "pqft", height=32, width=32)
    assert dataset.find_frames(["long", "sub/middle"])
    _, kept, planes = dataset[key]
    decoded = list(decode_video(video_folder / "sub" / "middle.mp4"))[15:31]
    np.testing.assert_array_equal(kept, resize_frames(np.stack(decoded), 32, 32))
    assert planes["maps_32x32"].shape == (1, 1, 32, 32)

    elsewhere = ClipDataset(labelled, "pqft", height=48, width=64)
    assert not elsewhere.find_frames(["sub/middle"])
    np.testing.assert_array_equal(elsewhere[key][1], np.stack(decoded))


def test_videos_are_found_where_they_lie_now(
    labelled: Path, video_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(video_folder, tmp_path / "moved")
    dataset = ClipDataset(labelled, "pqft", height=48, width=64, videos_root=tmp_path / "moved")
    dataset.find_frames(["long"])
    assert dataset[ClipKey("long", 20)][1].shape == (16, 48, 64, 3)
    missing = ClipDataset(labelled, "pqft", height=48, width=64, videos_root=tmp_path)
    with pytest.raises(VideoError, match="--videos-root"):
        missing.find_frames(["long"])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_any_number_of_workers(labelled: Path, workers: int) -> None:
    keys = [ClipKey("long", 15), ClipKey("short", 20), ClipKey("long", 60)]
    dataset = pickle.loads(pickle.dumps(ClipDataset(labelled, "pqft", height=32, width=32)))
    dataset.find_frames(["long"])  # opens the store before workers start
    batches = list(load_batches(dataset, keys, batch_size=2, workers=workers))
    assert [batch.keys for batch in batches] == [keys[:2], keys[2:]]
    assert batches[0].frames.shape == (2, 16, 32, 32, 3)
    expected = TargetStore.open(labelled).label_set().read("short", 20, 21)
    for name, values in expected.items():
        torch.testing.assert_close(batches[0].planes[name][1:], torch.from_numpy(values))
