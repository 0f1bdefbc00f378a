from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from stores.decode import decode_video
from stores.errors import TargetStoreError, VideoError
from stores.frames import resize_frames
from stores.targets import TargetStore
from student.clips import MAX_TRIES, ClipContent, ClipDataset, ClipError, load_batches
from student.pools import ClipKey, Spares


def content(height: int, width: int) -> ClipContent:
    return ClipContent(height=height, width=width, labels=("pqft",))


def test_kept_frames_are_the_decoded_ones(labelled: Path, video_folder: Path) -> None:
    key = ClipKey("sub/middle", 30)
    dataset = ClipDataset(labelled, content(32, 32))
    assert dataset.find_frames(["long", "sub/middle"])
    _, kept, (planes,), density, fixations, view, _ = dataset[key]
    assert view is None
    assert density is None
    assert fixations is None
    decoded = list(decode_video(video_folder / "sub" / "middle.mp4"))[15:31]
    np.testing.assert_array_equal(kept, resize_frames(np.stack(decoded), 32, 32))
    assert planes["maps_32x32"].shape == (1, 1, 32, 32)

    elsewhere = ClipDataset(labelled, content(48, 64))
    assert not elsewhere.find_frames(["sub/middle"])
    np.testing.assert_array_equal(elsewhere[key][1], np.stack(decoded))


def test_videos_are_found_where_they_lie_now(
    labelled: Path, video_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(video_folder, tmp_path / "moved")
    dataset = ClipDataset(labelled, content(48, 64), videos_root=tmp_path / "moved")
    dataset.find_frames(["long"])
    assert dataset[ClipKey("long", 20)][1].shape == (16, 48, 64, 3)
    missing = ClipDataset(labelled, content(48, 64), videos_root=tmp_path)
    with pytest.raises(VideoError, match="--videos-root"):
        missing.find_frames(["long"])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_with_any_number_of_workers(labelled: Path, workers: int) -> None:
    keys = [ClipKey("long", 15), ClipKey("short", 20), ClipKey("long", 60)]
    dataset = pickle.loads(pickle.dumps(ClipDataset(labelled, content(32, 32))))
    dataset.find_frames(["long"])  # opens the store before workers start
    batches = list(load_batches(dataset, keys, batch_size=2, workers=workers))
    assert [batch.keys for batch in batches] == [keys[:2], keys[2:]]
    assert batches[0].frames.shape == (2, 16, 32, 32, 3)
    expected = TargetStore.open(labelled).label_set().read("short", 20, 21)
    for name, values in expected.items():
        torch.testing.assert_close(batches[0].planes[0][name][1], torch.from_numpy(values))


SPARES = Spares({"long": [range(15, 32)], "sub/middle": [range(15, 24), range(30, 40)]}, seed=3)


@pytest.fixture
def damaged(labelled: Path, video_folder: Path, tmp_path: Path) -> ClipDataset:
    """Targets of frames 32 to 47 of one video are gone, and another video is no video any more."""
    store, videos = tmp_path / "targets.zarr", tmp_path / "videos"
    shutil.copytree(labelled, store)
    shutil.copytree(video_folder, videos)
    labels = TargetStore.open(store).label_set()
    shard = labels.shards(labels.store.video("long"))[2]
    (store / labels.shard_key(labels.array_names[0], shard)).unlink()
    dataset = ClipDataset(store, content(48, 64), videos_root=videos)
    dataset.find_frames(["long", "sub/middle"])
    (videos / "short.avi").write_bytes(b"nothing")
    return dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_that_cannot_be_read_are_replaced(damaged: ClipDataset, workers: int) -> None:
    """By the same clips, whoever reads them."""
    keys = [ClipKey("long", 20), ClipKey("long", 40), ClipKey("short", 20)]
    batches = list(load_batches(damaged, keys, batch_size=2, workers=workers, spares=SPARES))
    expected = [keys[0], SPARES.draw(keys[1], 1), SPARES.draw(keys[2], 1)]
    assert [key for batch in batches for key in batch.keys] == expected
    assert [len(batch.frames) for batch in batches] == [2, 1]
    first, last = (bad for batch in batches for bad in batch.bad)
    assert first.key == keys[1]
    assert "is gone, though its receipt is there" in first.reason
    assert last.key == keys[2]
    assert last.source.endswith("short.avi")
    good = next(load_batches(damaged, expected[1:2], batch_size=1))
    np.testing.assert_array_equal(batches[0].frames[1], good.frames[0])


def test_clips_that_cannot_be_read_are_an_error_without_spares(damaged: ClipDataset) -> None:
    with pytest.raises(TargetStoreError, match="is gone"):
        next(load_batches(damaged, [ClipKey("long", 40)], batch_size=1))


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_replacements_are_replaced_until_it_is_hopeless(
    damaged: ClipDataset, workers: int
) -> None:
    half = Spares({"long": [range(28, 36)]}, seed=0)
    keys = [ClipKey("long", last) for last in range(32, 48)]
    batches = list(load_batches(damaged, keys, batch_size=4, spares=half))
    assert [len(batch.keys) for batch in batches] == [4] * 4
    assert all(key.last in range(28, 32) for batch in batches for key in batch.keys)
    assert sum(len(batch.bad) for batch in batches) > len(keys)
    none = Spares({"long": [range(32, 48)]}, seed=0)
    with pytest.raises(ClipError, match=rf"{MAX_TRIES} clips .* none can be read; .* is gone"):
        list(load_batches(damaged, keys, batch_size=4, workers=workers, spares=none))
