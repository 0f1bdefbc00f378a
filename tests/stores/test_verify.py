"""Damage of every kind is found and named, and repaired by taking back receipts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from stores import schema
from stores.errors import (
    DamagedStoreError,
    FormatVersionError,
    NotATargetStoreError,
    VideoNotLabelledError,
)
from stores.summary import summarise
from stores.targets import TargetStore
from stores.upkeep import sweep
from stores.verify import verify_store
from tests.stores.test_targets import planes, record, request


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of two videos, all labelled, the short one with frames."""
    path = tmp_path / "targets.zarr"
    store = TargetStore.create(path)
    with store.writer():
        store.add_videos([record("a", 40), record("b", 16)])
        labels = store.ensure_set(request(), {"machine": "test"})
        for video in store.videos:
            for shard in labels.shards(video):
                data = planes(len(labels.frames_of(shard, video)), seed=shard)
                labels.commit([labels.write_shard(shard, data, video)])
        frames = store.ensure_set(
            schema.FrameRequest(height=8, width=8, decoder={"reader": "test"}, shard_frames=16), {}
        )
        video = store.video("b")
        black = {"rgb_8x8": np.zeros((16, 8, 8, 3), np.uint8)}
        frames.commit([frames.write_shard(frames.shards(video)[0], black, video)])
    return path


def one(path: Path, pattern: str) -> Path:
    (file,) = path.glob(pattern)
    return file


def flip(file: Path, *, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at % len(content)] ^= 0x04
    file.write_bytes(content)


def test_whole_store_has_no_problems(path: Path) -> None:
    report = verify_store(path)
    assert report.problems == []
    assert report.objects == 4 * 2 + 1
    assert "no problems" in str(report)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


Harm = Callable[[Path], object]
SHARD = "labels/*/maps_8x8/c.1.0.0.0"


@pytest.mark.parametrize(
    "harm", [lambda f: flip(f, at=9), lambda f: flip(f, at=-3), cut, Path.unlink]
)
@pytest.mark.parametrize("pattern", [SHARD, "frames/*/rgb_8x8/c.16.0.0.0"])
def test_damaged_shard_is_named_and_only_its_receipt_is_taken_back(
    path: Path, pattern: str, harm: Harm
) -> None:
    file = one(path, pattern)
    harm(file)
    report = verify_store(path)
    assert [problem.key for problem in report.problems] == [file.relative_to(path).as_posix()]
    assert verify_store(path, repair=True).repaired == 1
    again = verify_store(path)
    assert again.problems == []
    store = TargetStore.open(path)
    if pattern == SHARD:
        labels = store.label_set()
        assert labels.coverage("a") == [range(16), range(32, 40)]
        assert labels.coverage("b") == [range(16)]
        with pytest.raises(VideoNotLabelledError):
            labels.read("a", 16, 20)


def test_exchanged_shards_are_found(path: Path) -> None:
    first, second = one(path, SHARD), one(path, "labels/*/maps_8x8/c.0.0.0.0")
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert len(verify_store(path).problems) == 2


@pytest.mark.parametrize("column", list(schema.VIDEO_COLUMNS))
@pytest.mark.parametrize("at", [5, -6])
def test_damage_in_the_table_of_videos_is_found(path: Path, column: str, at: int) -> None:
    file = next(file for file in (path / "videos" / column / "c").rglob("*") if file.is_file())
    flip(file, at=at)
    assert [problem.key for problem in verify_store(path).problems] == [
        file.relative_to(path).as_posix(),
        "videos",  # no shard was looked at
    ]


@pytest.mark.parametrize("column", list(schema.VIDEO_COLUMNS))
def test_missing_part_of_the_table_of_videos_is_found(path: Path, column: str) -> None:
    file = next(file for file in (path / "videos" / column / "c").rglob("*") if file.is_file())
    file.unlink()
    (problem, _) = verify_store(path).problems
    assert (problem.key, problem.what) == (file.relative_to(path).as_posix(), "is gone")


@pytest.mark.parametrize(
    "harm", [lambda f: flip(f, at=5), lambda f: flip(f, at=40), lambda f: flip(f, at=-2), cut]
)
def test_damaged_receipts_are_named_and_taken_back(path: Path, harm: Harm) -> None:
    damage_receipts(path, harm)


def test_missing_receipts_are_named_and_taken_back(path: Path) -> None:
    damage_receipts(path, Path.unlink)


def damage_receipts(path: Path, harm: Harm) -> None:
    file = one(path, "labels/*/receipts/c/0/0/0")
    harm(file)
    (problem,) = verify_store(path).problems
    assert problem.key == file.relative_to(path).as_posix()
    with pytest.raises(DamagedStoreError, match="receipts/c/0/0/0"):
        TargetStore.open(path).label_set("toy")
    assert verify_store(path, repair=True).repaired > 0
    report = verify_store(path)
    assert report.problems == []
    assert report.uncommitted == 8
    store = TargetStore.open(path)
    assert not len(store.label_sets[0].receipts)
    assert len(store.frame_sets[0].receipts) == 1


@pytest.mark.parametrize(
    "key",
    ["grid_step", "description", "environment", "error_bounds", "fingerprint", "maps", "arrays"],
)
def test_changed_attributes_are_found(path: Path, key: str) -> None:
    file = one(path, "labels/*/zarr.json")
    metadata = json.loads(file.read_text())
    metadata["attributes"][key] = {"grid_step": 1 / 16}.get(key, "exchanged")
    file.write_text(json.dumps(metadata))
    (problem, *_) = verify_store(path).problems
    assert problem.key == file.relative_to(path).as_posix()
    with pytest.raises(DamagedStoreError, match=r"labels/.*zarr\.json"):
        TargetStore.open(path).label_set("toy")


def test_set_in_the_making_is_no_problem_but_one_whose_group_is_gone_is(path: Path) -> None:
    group = one(path, "labels/*/zarr.json")
    making = path / "labels" / "toy-identity-00000000" / "maps_8x8" / "zarr.json"
    making.parent.mkdir(parents=True)
    making.write_bytes(one(path, "labels/toy*/maps_8x8/zarr.json").read_bytes())
    assert verify_store(path).problems == []
    group.unlink()
    (problem,) = verify_store(path).problems
    assert (problem.key, problem.what) == (group.relative_to(path).as_posix(), "is gone")


@pytest.mark.parametrize("pattern", [SHARD, "labels/*/receipts/c/0/0/0"])
def test_what_gives_no_answer_is_named_and_not_taken_back(path: Path, pattern: str) -> None:
    """A network that is away for a moment must not cost receipts."""
    file = one(path, pattern)
    content = file.read_bytes()
    file.unlink()
    file.mkdir()  # reading it is an error, but not that it is gone
    report = verify_store(path, repair=True)
    assert any("cannot" in problem.what for problem in report.problems)
    assert report.repaired == 0
    file.rmdir()
    file.write_bytes(content)
    assert verify_store(path).problems == []
    assert len(TargetStore.open(path).label_set("toy").receipts) == 4


def test_array_that_ends_before_its_shards_is_found(path: Path) -> None:
    file = one(path, "labels/*/maps_8x8/zarr.json")
    metadata = json.loads(file.read_text())
    metadata["shape"][0] = 256  # b lies behind
    file.write_text(json.dumps(metadata))
    (problem,) = verify_store(path).problems
    assert problem.what == "has shards beyond the end of an array"


def test_length_that_is_damaged_is_found_at_once(path: Path) -> None:
    for pattern in ("labels/*/receipts/zarr.json", "videos/first/zarr.json"):
        file = one(path, pattern)
        content = file.read_text()
        metadata = json.loads(content)
        metadata["shape"][0] = 10**12
        file.write_text(json.dumps(metadata))
        assert verify_store(path, repair=True).problems
        with pytest.raises(DamagedStoreError):
            TargetStore.open(path).label_set("toy")
        file.write_text(content)
    assert verify_store(path).problems == []


def test_one_damaged_set_leaves_the_others_usable(path: Path) -> None:
    one(path, "frames/*/zarr.json").write_text("{")
    store = TargetStore.open(path, mode="r+")
    assert len(store.label_set().read("b", 0, 16)) == 2
    (error,) = store.damaged_sets
    assert error.key.startswith("frames/")
    assert f"damaged: {error}" in str(summarise(store))
    (key,) = store.find_sets("frames", None)
    with store.writer():
        store.drop_videos(["a"])
        store.drop_set(key)
        sweep(store)
    assert verify_store(path).problems == []


def test_rows_that_cannot_be_are_refused(path: Path) -> None:
    column: Any = zarr.open_array(path, path="videos/frames")
    for frames in (0, -5, 10**15):
        column[0] = frames
        with pytest.raises(DamagedStoreError, match=rf"row 0 \('a'\),.* has {frames} frames"):
            TargetStore.open(path)


@pytest.mark.parametrize(
    "pattern",
    [
        "zarr.json",
        "videos/zarr.json",
        "videos/frames/zarr.json",
        "labels/zarr.json",
        "labels/*/zarr.json",
        "labels/*/maps_4x4/zarr.json",
        "labels/*/receipts/zarr.json",
        "frames/*/rgb_8x8/zarr.json",
    ],
)
@pytest.mark.parametrize("harm", [lambda f: f.write_bytes(b"[]"), cut, Path.unlink])
def test_damaged_metadata_are_named(path: Path, pattern: str, harm: Harm) -> None:
    file = one(path, pattern)
    harm(file)
    if pattern == "zarr.json":
        with pytest.raises(NotATargetStoreError, match=r"targets\.zarr"):
            verify_store(path)
        return
    report = verify_store(path)
    assert file.relative_to(path).as_posix() in {problem.key for problem in report.problems}


def test_other_codecs_are_found(path: Path) -> None:
    file = one(path, "labels/*/maps_8x8/zarr.json")
    file.write_text(file.read_text().replace('"scale": 32', '"scale": 16'))
    (problem,) = verify_store(path).problems
    assert problem.key.endswith("maps_8x8/zarr.json")


@pytest.mark.parametrize(
    "name",
    [
        *("letter.txt", "videos/letter.txt", "videos/id/c/zero", "labels/letter.txt"),
        *("labels/toy*/letter.txt", "labels/*/maps_8x8/c.0.0.0.0.bak", "frames/*/rgb_8x8/c.x"),
    ],
)
def test_foreign_files_are_named(path: Path, name: str) -> None:
    folder, _, file = name.rpartition("/")
    place = one(path, folder) / file if folder else path / file
    place.write_text("dear reader")
    (problem,) = verify_store(path).problems
    assert problem.key == place.relative_to(path).as_posix()
    assert "foreign" in problem.what


def test_files_of_a_stopped_run_are_no_problem(path: Path) -> None:
    one(path, SHARD).with_name("c.2.0.0.0.partial").write_bytes(b"half")
    store = TargetStore.open(path, mode="r+")
    store.label_set().clear([2])
    report = verify_store(path)
    assert report.problems == []
    assert report.uncommitted == 2


def test_what_is_no_store_is_refused(tmp_path: Path, path: Path) -> None:
    with pytest.raises(NotATargetStoreError, match="does not exist"):
        verify_store(tmp_path / "nowhere.zarr")
    root = path / "zarr.json"
    root.write_text(root.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(FormatVersionError, match="has format version 9"):
        verify_store(path)
