from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from stores import schema
from stores.errors import (
    DamagedStoreError,
    FormatVersionError,
    LabelSetNotFoundError,
    NotATargetStoreError,
    StoreBusyError,
    TargetStoreError,
    TargetValueError,
    VideoChangedError,
    VideoNotFoundError,
    VideoNotLabelledError,
)
from stores.maps import MapLayout, MapSpec
from stores.receipts import Receipt
from stores.shard_file import ZstdPacking
from stores.shards import LabelSet
from stores.targets import TargetStore
from stores.videos import VideoRecord


def layout(*sizes: tuple[int, int]) -> MapLayout:
    maps = tuple(
        MapSpec(name=f"m{h}", height=h, width=w, activation="exp", order="activate_first")
        for h, w in sizes
    )
    return MapLayout(height=32, width=32, maps=maps, saliency=maps[0].name)


def request(
    *sizes: tuple[int, int], shard_frames: int = 16, window: int = 4
) -> schema.LabelRequest:
    return schema.LabelRequest(
        teacher="toy",
        provenance={"window": window},
        layout=layout(*(sizes or ((8, 8), (4, 4)))),
        shard_frames=shard_frames,
    )


def record(name: str, frames: int, content: bytes | None = None) -> VideoRecord:
    digest = hashlib.sha256(content or name.encode()).digest()
    return VideoRecord(name, "/videos", f"{name}.avi", digest, frames, 48, 64, 25.0)


def planes(frames: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"maps_8x8": (frames, 1, 8, 8), "maps_4x4": (frames, 1, 4, 4)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def store(tmp_path: Path) -> TargetStore:
    store = TargetStore.create(tmp_path / "targets.zarr")
    store.add_videos([record("a", 300), record("b", 40), record("c", 16)])
    return store


@pytest.fixture
def labels(store: TargetStore) -> LabelSet:
    return store.ensure_set(request(), {"machine": "test"})


def test_videos_start_at_multiples_of_256(store: TargetStore) -> None:
    assert [(video.id, video.first) for video in store.videos] == [("a", 0), ("b", 512), ("c", 768)]
    reopened = TargetStore.open(store.url)
    assert reopened.videos == store.videos


def test_equal_content_shares_a_range(store: TargetStore) -> None:
    store.add_videos([record("copy of b", 40, b"b"), record("d", 10)])
    assert store.video("copy of b").first == store.video("b").first
    assert store.video("d").first == 1024


def test_known_videos_are_added_once_and_changed_ones_refused(store: TargetStore) -> None:
    store.add_videos([record("b", 40)])
    assert len(store.videos) == 3
    with pytest.raises(VideoChangedError, match="content has changed"):
        store.add_videos([record("b", 40, b"other")])


def test_shard_is_readable_only_after_its_receipt(store: TargetStore, labels: LabelSet) -> None:
    video = store.video("b")
    data = planes(16)
    receipt = labels.write_shard(labels.shards(video)[1], data, video)
    with pytest.raises(VideoNotLabelledError, match="frames 16-32 of 'b'"):
        TargetStore.open(store.url).label_set().read("b", 16, 32)
    labels.commit([receipt])
    reader = TargetStore.open(store.url).label_set()
    read = reader.read("b", 20, 30)
    for name, values in data.items():
        assert np.abs(read[name] - values[4:14]).max() <= 1 / 64
    assert reader.coverage(video.id) == [range(16, 32)]
    with pytest.raises(VideoNotLabelledError, match="tinyhd distill"):
        reader.read("b", 15, 17)


def test_receipt_is_the_hash_of_the_file(store: TargetStore, labels: LabelSet) -> None:
    video = store.video("c")
    receipt = labels.write_shard(labels.shards(video)[0], planes(16), video)
    for name, digest in zip(labels.array_names, receipt.digests, strict=True):
        file = Path(store.url) / labels.shard_key(name, receipt.shard)
        assert hashlib.sha256(file.read_bytes()).digest() == digest


def test_receipt_beyond_the_end_is_refused(labels: LabelSet) -> None:
    end = labels.store.num_frames // labels.shard_frames
    for shard in (-1, end):
        with pytest.raises(ValueError, match="beyond the end"):
            labels.commit([Receipt(shard, (bytes([1]) * 32,) * 2)])
    assert len(TargetStore.open(labels.store.url).label_set(labels.name).receipts) == 0


def test_last_shard_is_filled_up_but_not_read(store: TargetStore, labels: LabelSet) -> None:
    video = store.video("b")  # 40 frames: the third shard holds 8
    shard = labels.shards(video)[2]
    assert labels.frames_of(shard, video) == range(32, 40)
    labels.commit([labels.write_shard(shard, planes(8), video)])
    assert labels.coverage(video.id) == [range(32, 40)]
    with pytest.raises(VideoNotLabelledError, match="which has 40"):
        labels.read("b", 32, 41)
    array: Any = zarr.open_array(Path(store.url, labels.key, "maps_4x4"), mode="r")
    raw = np.asarray(array[video.first + 32 : video.first + 48])
    np.testing.assert_array_equal(raw[8:], np.repeat(raw[7:8], 8, axis=0))


def test_coverage_joins_neighbouring_shards(store: TargetStore, labels: LabelSet) -> None:
    video = store.video("a")
    for index in (0, 1, 3, 18):
        count = len(labels.frames_of(labels.shards(video)[index], video))
        labels.commit([labels.write_shard(labels.shards(video)[index], planes(count), video)])
    assert labels.coverage(video.id) == [range(32), range(48, 64), range(288, 300)]
    assert len(labels.missing(video)) == 15


@pytest.mark.parametrize("value", [np.nan, -np.inf, 2000.0])
def test_bad_values_are_refused_before_anything_is_written(
    store: TargetStore, labels: LabelSet, value: float
) -> None:
    video = store.video("b")
    data = planes(16)
    data["maps_4x4"][3, 0, 1, 2] = value
    with pytest.raises(TargetValueError, match="frame 19 of 'b'"):
        labels.write_shard(labels.shards(video)[1], data, video)
    folder = Path(store.url) / "labels" / labels.name
    assert not list(folder.rglob("c.*"))


def test_incomplete_shards_are_refused(store: TargetStore, labels: LabelSet) -> None:
    video, shard = store.video("c"), labels.shards(store.video("c"))[0]
    with pytest.raises(ValueError, match="needs"):
        labels.write_shard(shard, {"maps_8x8": planes(16)["maps_8x8"]}, video)
    with pytest.raises(ValueError, match=r"maps_8x8 needs the shape \(16, 1, 8, 8\), got \(9"):
        labels.write_shard(shard, planes(9), video)


def test_black_frames_are_written_like_others(store: TargetStore) -> None:
    frames = store.ensure_set(
        schema.FrameRequest(height=8, width=8, decoder={"reader": "test"}, shard_frames=16), {}
    )
    video = store.video("c")
    black = {"rgb_8x8": np.zeros((16, 8, 8, 3), np.uint8)}
    frames.commit([frames.write_shard(frames.shards(video)[0], black, video)])
    found = TargetStore.open(store.url).find_frame_set(height=8, width=8)
    assert found is not None
    assert found.read("c", 0, 16).sum() == 0


def test_equal_requests_find_the_same_label_set(store: TargetStore, labels: LabelSet) -> None:
    again = store.ensure_set(request(), {"machine": "another"})
    assert (again.name, again.attributes) == (labels.name, labels.attributes)
    other = store.ensure_set(request(window=5), {})
    assert other.fingerprint != labels.fingerprint
    with pytest.raises(LabelSetNotFoundError, match=f"{labels.name}|{other.name}"):
        store.label_set()
    assert store.label_set(other.name).fingerprint == other.fingerprint
    assert store.label_set(labels.name[:-2]).fingerprint == labels.fingerprint
    with pytest.raises(LabelSetNotFoundError, match="'hd2s' was asked for"):
        store.label_set("hd2s")


def test_label_set_grows_with_the_videos(store: TargetStore, labels: LabelSet) -> None:
    video = store.video("c")
    labels.commit([labels.write_shard(labels.shards(video)[0], planes(16), video)])
    before = labels.read("c", 0, 16)
    store.add_videos([record("d", 20)])
    grown = store.ensure_set(request(), {})
    assert grown.missing(store.video("d")) == list(grown.shards(store.video("d")))
    for name, values in grown.read("c", 0, 16).items():
        np.testing.assert_array_equal(values, before[name])


def test_one_writer_at_a_time(store: TargetStore) -> None:
    with (
        store.writer(),
        pytest.raises(StoreBusyError, match="being written"),
        TargetStore.open(store.url, mode="r+").writer(),
    ):
        pass
    with TargetStore.open(store.url, mode="r+").writer():
        pass


def test_takeover_removes_what_a_killed_writer_left(store: TargetStore, labels: LabelSet) -> None:
    leftover = Path(store.url) / "labels" / labels.name / "maps_8x8" / "c.0.0.0.abc.partial"
    leftover.write_bytes(b"half")
    with store.writer():
        assert not leftover.exists()


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotATargetStoreError, match="does not exist"):
        TargetStore.open(tmp_path / "missing.zarr")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("dear reader")
    with pytest.raises(NotATargetStoreError, match="not a target store"):
        TargetStore.open(tmp_path / "folder")
    with pytest.raises(NotATargetStoreError, match="is there already"):
        TargetStore.create(tmp_path / "folder")
    with pytest.raises(NotATargetStoreError, match="not a target store"):
        TargetStore.open(tmp_path / "folder" / "letter.txt")


@pytest.mark.parametrize("version", [0, 2, None])
def test_other_format_versions_are_refused(store: TargetStore, version: int | None) -> None:
    path = Path(store.url) / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["attributes"]["version"] = version
    path.write_text(json.dumps(metadata))
    with pytest.raises(FormatVersionError, match=f"has format version {version}"):
        TargetStore.open(store.url)


def test_damaged_attributes_are_named(store: TargetStore, labels: LabelSet) -> None:
    path = Path(store.url) / "labels" / labels.name / "zarr.json"
    metadata = json.loads(path.read_text())
    del metadata["attributes"]["maps"]["saliency"]
    path.write_text(json.dumps(metadata))
    with pytest.raises(TargetStoreError, match="damaged"):
        TargetStore.open(store.url).label_set()


def test_unknown_video_is_named(labels: LabelSet) -> None:
    with pytest.raises(VideoNotFoundError, match="'zzz'"):
        labels.read("zzz", 0, 1)


def test_dropped_rows_and_label_sets_do_not_count(store: TargetStore, labels: LabelSet) -> None:
    store.drop_videos(["b"])
    store.drop_videos(["b"])
    store.drop_set(labels.key)
    reopened = TargetStore.open(store.url, mode="r+")
    assert [video.id for video in reopened.videos] == ["a", "c"]
    with pytest.raises(LabelSetNotFoundError, match="none at all"):
        reopened.label_set()
    with pytest.raises(TargetStoreError, match="being dropped"):
        reopened.ensure_set(request(), {})


def test_label_set_that_holds_nothing_is_not_the_only_one(
    store: TargetStore, labels: LabelSet
) -> None:
    video = store.video("c")
    labels.commit([labels.write_shard(labels.shards(video)[0], planes(16), video)])
    store.ensure_set(request(window=9), {})
    assert store.label_set().name == labels.name


@pytest.mark.parametrize("harm", ["gone", "flipped", "cut"])
def test_damaged_shards_are_named(store: TargetStore, labels: LabelSet, harm: str) -> None:
    video = store.video("c")
    labels.commit([labels.write_shard(labels.shards(video)[0], planes(16), video)])
    path = Path(store.url, labels.shard_key("maps_8x8", labels.shards(video)[0]))
    content = bytearray(path.read_bytes())
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[:-40])
    else:
        content[10] ^= 0xFF
        path.write_bytes(content)
    reader = TargetStore.open(store.url).label_set()
    with pytest.raises(TargetStoreError, match=r"maps_8x8/c\..*tinyhd store verify"):
        reader.read("c", 0, 16)


def test_any_flipped_byte_is_noticed_when_it_is_read(store: TargetStore, labels: LabelSet) -> None:
    video = store.video("c")
    labels.commit([labels.write_shard(labels.shards(video)[0], planes(16), video)])
    path = Path(store.url, labels.shard_key("maps_4x4", labels.shards(video)[0]))
    content = path.read_bytes()
    for place in range(len(content)):
        harmed = bytearray(content)
        harmed[place] ^= 0x10
        path.write_bytes(harmed)
        labels.refresh()
        with pytest.raises(TargetStoreError, match="damaged"):
            labels.read("c", 0, 16)


@pytest.mark.parametrize("part", ["zarr.json", "videos/first/c/0", "labels/*/receipts/c/0/0/0"])
def test_damaged_tables_are_named(store: TargetStore, labels: LabelSet, part: str) -> None:
    video = store.video("c")
    labels.commit([labels.write_shard(labels.shards(video)[0], planes(16), video)])
    (path,) = Path(store.url).glob(part)
    path.write_bytes(b"[]")
    with pytest.raises(TargetStoreError, match=r"damaged|not a target store"):
        TargetStore.open(store.url).label_set()


def test_workers_of_a_driver_that_was_replaced_stop_writing(
    store: TargetStore, labels: LabelSet
) -> None:
    video = store.video("c")
    with store.writer() as token:
        labels.write_only_for(token)
        labels.write_shard(labels.shards(video)[0], planes(16), video)
    with store.writer(), pytest.raises(StoreBusyError, match="taken over"):
        labels.write_shard(labels.shards(video)[0], planes(16), video)


def test_working_directory_does_not_become_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TargetStoreError, match="a folder of its own"):
        TargetStore.open_or_create(".")
    TargetStore.create("targets.zarr").add_videos([record("a", 5)])
    monkeypatch.chdir(tmp_path / "targets.zarr")
    assert [video.id for video in TargetStore.open(".").videos] == ["a"]


def test_two_processes_may_make_one_store(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from stores.targets import TargetStore; "
        f"TargetStore.open_or_create(Path({str(tmp_path / 't.zarr')!r}))"
    )
    makers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [maker.wait() for maker in makers] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["t.zarr"]


def test_equal_content_of_another_length_is_refused(store: TargetStore) -> None:
    """Two decoders may give other numbers of frames of one file."""
    with pytest.raises(TargetStoreError, match=r"41 frames here, and 40 in .* --reader"):
        store.add_videos([record("copy of b", 41, b"b")])
    assert len(TargetStore.open(store.url).videos) == 3


def test_store_that_was_opened_for_reading_is_not_written(
    store: TargetStore, labels: LabelSet
) -> None:
    reader = TargetStore.open(store.url)
    for write in (
        lambda: reader.add_videos([record("d", 5)]),
        lambda: reader.ensure_set(request(), {}),
        lambda: reader.drop_set(labels.key),
        lambda: reader.label_set(labels.name).clear([0]),
    ):
        with pytest.raises(TargetStoreError, match="opened for reading"):
            write()


def test_chunk_that_claims_to_be_large_is_damage() -> None:
    """A few bytes of Zstandard may unpack to gigabytes; nothing is unpacked to find out."""
    packing = ZstdPacking((8, 8, 3), "uint8")
    large = ZstdPacking((4096, 4096, 3), "uint8")
    bomb = large.pack(np.zeros((8, 4096, 4096, 3), np.uint8))
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(ValueError, match="a chunk holds 402653184 bytes, not 1536"):
        packing.unpack_into(bomb, np.empty((8, 8, 8, 3), np.uint8))
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()
    small = ZstdPacking((8, 8, 1), "uint8").pack(np.zeros((8, 8, 8, 1), np.uint8))
    with pytest.raises(ValueError, match="a chunk holds 512 bytes, not 1536"):
        packing.unpack_into(small, np.empty((8, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("frames", [1, 3, 100, 400, 70_000])
def test_frames_of_any_size_are_unpacked(frames: int) -> None:
    """Zstandard writes a content's size in one, two or four bytes."""
    packing = ZstdPacking((1,), "uint8")
    values = (np.arange(frames) % 251).astype(np.uint8).reshape(-1, 1)
    out = np.empty_like(values)
    packing.unpack_into(packing.pack(values), out)
    np.testing.assert_array_equal(out, values)


def test_errors_travel_between_processes() -> None:
    error = DamagedStoreError("targets.zarr", "videos/id/c/0", "is gone")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.key) == (str(error), "videos/id/c/0")


@pytest.mark.parametrize(
    ("field", "value"),
    [("activation", "softmax"), ("order", "never"), ("height", 0), ("width", 10**6)],
)
def test_maps_that_cannot_be_are_refused(field: str, value: str | int) -> None:
    values: dict[str, Any] = {
        "name": "m",
        "height": 4,
        "width": 4,
        "activation": "exp",
        "order": "resize_first",
    }
    with pytest.raises(ValueError, match="m "):
        MapSpec(**{**values, field: value})


def test_shards_that_do_not_divide_256_are_refused() -> None:
    with pytest.raises(ValueError, match="frames per shard"):
        request(shard_frames=100)
