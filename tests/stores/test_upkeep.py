"""Stores grow, are joined and thinned; every step may be repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from stores.errors import (
    DamagedStoreError,
    LabelSetNotFoundError,
    TargetStoreError,
    VideoChangedError,
    VideoNotFoundError,
)
from stores.grid import ShardGrid
from stores.targets import TargetStore
from stores.upkeep import merge, sweep
from stores.verify import verify_store
from tests.stores.test_targets import planes, record, request


def make(path: Path, videos: dict[str, int], *, window: int = 4, every: int = 1) -> TargetStore:
    """A store where every n-th shard of each video is labelled; values depend on the content."""
    store = TargetStore.open_or_create(path)
    with store.writer():
        store.add_videos([record(name, frames) for name, frames in videos.items()])
        labels = store.ensure_set(request(window=window), {"machine": "test"})
        for name in videos:
            video = store.video(name)
            for shard in labels.shards(video)[::every]:
                span = labels.frames_of(shard, video)
                data = planes(len(span), seed=span.start + sum(video.content_hash))
                labels.commit([labels.write_shard(shard, data, video)])
    return store


def contents(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and "runs" not in file.relative_to(path).parts
    }


def test_merged_stores_hold_what_both_held(tmp_path: Path) -> None:
    one = make(tmp_path / "one.zarr", {"a": 300, "b": 40})
    two = make(tmp_path / "two.zarr", {"b": 40, "c": 20, "a": 300}, every=2)
    make(tmp_path / "two.zarr", {"c": 20}, window=9)
    two = TargetStore.open(two.url)
    report = merge(one, two)
    assert (report.videos, report.damaged) == (1, [])
    assert report.shards == 1 + 2  # shard 0 of c in the one set, both in the other
    both = TargetStore.open(tmp_path / "one.zarr")
    assert [video.id for video in both.videos] == ["a", "b", "c"]
    for other in two.label_sets:
        own = both.open_set(other.key)
        for video in two.videos:
            here = both.video(video.id)
            for span in other.coverage(video.id):
                ours = own.read_arrays(here, span.start, span.stop)
                for name, values in other.read_arrays(video, span.start, span.stop).items():
                    np.testing.assert_array_equal(values, ours[name])
    assert verify_store(tmp_path / "one.zarr").problems == []


def test_merging_again_changes_nothing(tmp_path: Path) -> None:
    one = make(tmp_path / "one.zarr", {"a": 40})
    two = make(tmp_path / "two.zarr", {"b": 40})
    merge(one, two)
    before = contents(tmp_path / "one.zarr")
    report = merge(TargetStore.open(one.url, mode="r+"), two)
    assert (report.videos, report.shards, report.known) == (0, 0, 3)
    assert contents(tmp_path / "one.zarr") == before


def test_shards_are_copied_byte_for_byte(tmp_path: Path) -> None:
    one, two = make(tmp_path / "1.zarr", {"a": 40}), make(tmp_path / "2.zarr", {"b": 40})
    merge(one, two)
    (labels,) = two.label_sets
    own = TargetStore.open(one.url).open_set(labels.key)
    theirs = labels.shards(two.video("b"))
    ours = own.shards(own.store.video("b"))
    for there, here in zip(theirs, ours, strict=True):
        for name in labels.array_names:
            copied = one.place.read(own.shard_key(name, here))
            assert copied == two.place.read(labels.shard_key(name, there))


def test_other_content_under_one_name_is_refused_before_anything_is_copied(tmp_path: Path) -> None:
    one = make(tmp_path / "one.zarr", {"a": 40})
    two = TargetStore.create(tmp_path / "two.zarr")
    two.add_videos([record("new", 20), record("a", 40, b"other")])
    before = contents(tmp_path / "one.zarr")
    with pytest.raises(VideoChangedError, match="'a' has other content"):
        merge(one, two)
    assert contents(tmp_path / "one.zarr") == before


def test_damaged_shards_are_not_copied(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one.zarr", {"a": 40}), make(tmp_path / "two.zarr", {"b": 40})
    file = next((tmp_path / "two.zarr").glob("labels/*/maps_4x4/c.1.0.0.0"))
    file.write_bytes(b"damaged" + file.read_bytes()[7:])
    report = merge(one, two)
    assert report.damaged == [file.relative_to(tmp_path / "two.zarr").as_posix()]
    assert report.shards == 2
    own = TargetStore.open(one.url)
    assert own.label_set().coverage("b") == [range(16), range(32, 40)]
    assert verify_store(one.url).problems == []


def test_dropped_video_is_gone_and_can_come_back(tmp_path: Path) -> None:
    store = make(tmp_path / "targets.zarr", {"a": 40, "b": 20})
    with store.writer():
        store.drop_videos(["a"])
        assert sweep(store) == 3 * 2
        assert sweep(store) == 0
    with pytest.raises(VideoNotFoundError):
        TargetStore.open(store.url).label_set().read("a", 0, 1)
    report = verify_store(store.url)
    assert (report.problems, report.uncommitted) == ([], 0)
    again = make(tmp_path / "targets.zarr", {"a": 40})
    assert again.label_set().coverage("a") == [range(40)]
    assert again.video("a").first == 512


def test_content_that_another_video_has_too_stays(tmp_path: Path) -> None:
    store = make(tmp_path / "targets.zarr", {"a": 40})
    with store.writer():
        store.add_videos([record("copy", 40, b"a")])
        store.drop_videos(["a"])
        assert sweep(store) == 0
    store.label_set().read("copy", 0, 40)


def test_dropping_that_was_cut_off_is_finished_by_the_next_sweep(tmp_path: Path) -> None:
    store = make(tmp_path / "targets.zarr", {"a": 40, "b": 20})
    make(tmp_path / "targets.zarr", {"b": 20}, window=9)
    store.drop_set(store.label_sets[0].key)
    store.drop_videos(["a"])
    names = [item.name for item in TargetStore.open(store.url).label_sets]
    assert len(names) == 1
    assert "is not yet deleted" in str(verify_store(store.url).problems[0])
    again = TargetStore.open(store.url, mode="r+")
    with again.writer():
        assert sweep(again) > 0
    assert verify_store(store.url).problems == []
    assert [folder.name for folder in (tmp_path / "targets.zarr/labels").glob("*-*")] == names


def test_dropped_label_set_can_be_made_again(tmp_path: Path) -> None:
    store = make(tmp_path / "targets.zarr", {"a": 40})
    with store.writer():
        store.drop_set(store.label_set().key)
        with pytest.raises(TargetStoreError, match="tinyhd store drop"):
            store.ensure_set(request(), {})
        sweep(store)
        with pytest.raises(LabelSetNotFoundError):
            store.label_set()
    assert make(tmp_path / "targets.zarr", {"a": 40}).label_set().receipts.shards() == [0, 1, 2]


def test_source_that_is_not_what_was_written_is_not_merged(tmp_path: Path) -> None:
    """Whatever its attributes or rows say, the target stays as it is or gets what is whole."""
    one = make(tmp_path / "one.zarr", {"a": 40})
    two = make(tmp_path / "two.zarr", {"b": 20})
    make(tmp_path / "two.zarr", {"b": 20}, window=9)
    broken, whole = two.find_sets("labels", None)
    path = tmp_path / "two.zarr" / broken / "zarr.json"
    path.write_text(path.read_text().replace('"grid_step": 0.03125', '"grid_step": 0.0625'))
    report = merge(one, TargetStore.open(two.url))
    assert report.damaged == [f"{broken}/zarr.json"]
    assert report.shards == 2
    assert verify_store(one.url).problems == []
    assert whole in TargetStore.open(one.url).find_sets("labels", None)
    column: Any = zarr.open_array(tmp_path / "two.zarr", path="videos/frames")
    column[0] = 10**15
    before = contents(tmp_path / "one.zarr")
    with pytest.raises(DamagedStoreError, match="frames"):
        merge(one, TargetStore.open(two.url))
    assert contents(tmp_path / "one.zarr") == before


def test_changed_video_gets_a_new_row_on_request(tmp_path: Path) -> None:
    store = make(tmp_path / "targets.zarr", {"a": 40, "b": 20})
    changed = record("a", 30, b"cut again")
    with pytest.raises(VideoChangedError):
        store.add_videos([changed])
    with store.writer():
        store.add_videos([changed], replace_changed=True)
    again = TargetStore.open(store.url)
    video = again.video("a")
    assert (video.frames, video.first) == (30, 512)
    assert [row.superseded_by for row in again.rows] == [2, -1, -1]
    assert again.label_set().coverage(video.id) == []
    assert verify_store(store.url).problems == []
    before = make(tmp_path / "targets.zarr", {"b": 20})
    with before.writer():
        before.drop_rows([0])
        assert sweep(before) == 3 * 2
    assert verify_store(store.url).problems == []


def test_process_that_died_before_it_marked_the_old_row_left_one_video(tmp_path: Path) -> None:
    store = make(tmp_path / "targets.zarr", {"a": 40})
    store.add_videos([record("a", 30, b"cut again")], replace_changed=True)
    with zarr.config.set({"array.write_empty_chunks": True}):
        column: Any = zarr.open_array(tmp_path / "targets.zarr", path="videos/superseded_by")
    column[0] = -1
    again = TargetStore.open(store.url, mode="r+")
    assert [(video.id, video.frames) for video in again.videos] == [("a", 30)]
    assert [row.superseded_by for row in again.rows] == [1, -1]
    with again.writer():
        again.drop_videos(["a"])
    assert TargetStore.open(store.url).videos == []


def test_larger_samples_contain_smaller_ones(tmp_path: Path) -> None:
    store = make(tmp_path / "targets.zarr", {"a": 1000, "b": 1000})
    labels = store.label_set()
    for name in ("a", "b"):
        video = store.video(name)
        samples = [set(labels.grid.sample(video, blocks=n, seed=3)) for n in (1, 4, 9, 1000)]
        assert [len(sample) for sample in samples] == [1, 4, 9, 63]
        assert samples[0] < samples[1] < samples[2] < samples[3]
        assert samples[2] != set(labels.grid.sample(video, blocks=9, seed=4))
        poor = {labels.shards(video)[0], labels.shards(video)[-1]}  # no full window; not full
        assert not samples[2] & poor
    offsets = [
        [
            shard - labels.shards(store.video(name)).start
            for shard in labels.grid.sample(store.video(name), blocks=9, seed=3)
        ]
        for name in ("a", "b")
    ]
    assert offsets[0] != offsets[1]


def test_blocks_whose_windows_reach_beyond_the_video_come_last(tmp_path: Path) -> None:
    store = make(tmp_path / "targets.zarr", {"a": 16 * 10})
    video, grid = store.video("a"), ShardGrid(16, head_frames=31, tail_frames=31)
    begin = grid.shards(video).start
    assert {shard - begin for shard in grid.sample(video, blocks=6, seed=3)} == set(range(2, 8))
    assert len(grid.sample(video, blocks=7, seed=3)) == 7
