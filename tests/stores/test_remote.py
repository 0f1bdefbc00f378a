"""Stores on an object store: a real S3 server on this machine."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stores.errors import NotATargetStoreError, StoreBusyError, TargetStoreError
from stores.lease import ObjectLease
from stores.metadata import empty_store, write_metadata
from stores.places import ObjectPlace, open_place
from stores.targets import TargetStore
from stores.upkeep import merge, sweep
from stores.verify import verify_store
from tests.stores.test_targets import planes, record, request
from tests.stores.test_upkeep import make

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def url(bucket: str, request: pytest.FixtureRequest) -> str:
    return f"{bucket}/{abs(hash(request.node.nodeid))}/targets.zarr"


def lease(
    url: str,
    *,
    beat_seconds: float = 0.1,
    stale_seconds: float = 1.0,
    clock: Callable[[], float] = time.monotonic,
) -> ObjectLease:
    place = open_place(url)
    assert isinstance(place, ObjectPlace)
    return ObjectLease(place, beat_seconds=beat_seconds, stale_seconds=stale_seconds, clock=clock)


def test_what_is_written_is_read(url: str) -> None:
    store = TargetStore.create(url)
    with store.writer() as token:
        store.add_videos([record("a", 40), record("b", 16)])
        labels = store.ensure_set(request(), {"machine": "test"})
        labels.write_only_for(token)
        video, data = store.video("a"), planes(16)
        shard = labels.shards(video)[1]
        labels.commit([labels.write_shard(shard, data, video)])
        store.log_run(event="test")
    reader = TargetStore.open(url).label_set()
    assert reader.coverage("a") == [range(16, 32)]
    for name, values in reader.read("a", 18, 27).items():
        assert np.abs(values - data[name][2:11]).max() <= 1 / 64


def test_plain_zarr_reads_it(url: str) -> None:
    import zarr
    from zarr.storage import ObjectStore

    test_what_is_written_is_read(url)
    labels = TargetStore.open(url).label_set()
    place = open_place(url)
    assert isinstance(place, ObjectPlace)
    root: Any = zarr.open_group(ObjectStore(place.objects, read_only=True), mode="r")
    plain = root[f"{labels.key}/maps_8x8"][16:32]
    np.testing.assert_array_equal(plain, labels.read("a", 16, 32)["maps_8x8"])


def test_videos_are_labelled_and_trained_from_there(
    url: str, tmp_path: Path, video_folder: Path
) -> None:
    """The same bytes as on a disk; a second run does nothing; the trainer's data set reads it."""
    from distill import DistillSettings, label_videos
    from student.clips import ClipContent, ClipDataset, load_batches
    from student.pools import ClipKey

    settings = DistillSettings(
        teacher="pqft", size=(64, 64), executor="inline", with_frames=(32, 32), shard_frames=16
    )
    label_videos([video_folder], url, settings)
    label_videos([video_folder], tmp_path / "local.zarr", settings)
    remote, local = open_place(url), open_place(tmp_path / "local.zarr")
    keys = {key for key, _ in local.walk() if not key.startswith("runs/")}
    assert keys == {key for key, _ in remote.walk() if not key.startswith("runs/")}
    for key in keys:
        assert remote.read(key) == local.read(key), key
    assert label_videos([video_folder], url, settings).shards == 0
    assert verify_store(url).problems == []
    name = TargetStore.open(url).label_set().name
    dataset = ClipDataset(url, ClipContent(height=32, width=32, labels=(name,)))
    clips = [ClipKey("long", 20), ClipKey("short", 23)]
    batches = load_batches(dataset, clips, batch_size=2, workers=1)
    assert [tuple(batch.frames.shape) for batch in batches] == [(2, 16, 32, 32, 3)]


@pytest.mark.ray
def test_ray_workers_write_there(url: str, video_folder: Path) -> None:
    """In a process of its own, as workers get their environment when Ray starts."""
    command = [
        *(sys.executable, "cli.py", "distill", str(video_folder / "short.avi"), "--store", url),
        *("--teacher", "pqft", "--size", "64x64", "--shard-frames", "16"),
    ]
    subprocess.run(command, cwd=PROJECT, check=True)
    labels = TargetStore.open(url).label_set()
    assert labels.coverage("short") == [range(24)]
    assert verify_store(url).problems == []


def test_merging_and_dropping_there(url: str, tmp_path: Path) -> None:
    local = make(tmp_path / "local.zarr", {"a": 40, "b": 20})
    remote = TargetStore.create(url)
    assert merge(remote, local).shards == 5
    remote.label_set().read("b", 0, 20)
    with remote.writer():
        remote.drop_videos(["a"])
        assert sweep(remote) == 6
        remote.drop_set(remote.label_set().key)
        assert sweep(remote) > 0
    assert verify_store(url).problems == []


def test_what_is_not_there_is_named(url: str) -> None:
    with pytest.raises(NotATargetStoreError, match="does not exist"):
        TargetStore.open(url)
    with pytest.raises(TargetStoreError, match="s3://, gs:// or az://"):
        TargetStore.open("ftp://somewhere/targets.zarr")


def test_making_a_store_again_leaves_it_as_it_is(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TargetStore.create(url)
    store.add_videos([record("a", 40)])
    with pytest.raises(NotATargetStoreError, match="is there already"):
        TargetStore.create(url)
    assert [video.id for video in TargetStore.open_or_create(url).videos] == ["a"]
    # Two look at once, and the slower one writes when the faster one has added videos already.
    monkeypatch.setattr(ObjectPlace, "is_there", lambda place: False)
    assert [video.id for video in TargetStore.create(url).videos] == ["a"]


def test_store_whose_making_was_cut_off_is_made_by_the_next(url: str) -> None:
    place = open_place(url)
    for key, metadata in list(empty_store().items())[:7]:
        write_metadata(place, key, metadata)
    with pytest.raises(NotATargetStoreError, match="does not exist"):
        TargetStore.open(url)
    TargetStore.open_or_create(url).add_videos([record("a", 40)])
    assert verify_store(url).problems == []


def test_other_objects_are_not_mixed_with_a_store(url: str) -> None:
    open_place(url).write("letter.txt", b"dear reader")
    with pytest.raises(NotATargetStoreError, match="is not a target store"):
        TargetStore.open_or_create(url)


def test_lease_of_a_server_that_is_away_says_so(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("stores.places.RETRIES", {"max_retries": 0})
    with pytest.raises(OSError, match="cannot read s3://"), lease(url):
        pass


def test_one_driver_at_a_time(url: str) -> None:
    with lease(url) as first:
        with pytest.raises(StoreBusyError, match=f"process {os.getpid()}"), lease(url):
            pass
        first.check()
    with lease(url) as second:
        second.check()
        with pytest.raises(StoreBusyError):
            first.check()


def test_stale_lease_is_taken_over_and_its_driver_stops(url: str) -> None:
    """A driver whose machine sleeps: it beats no more, and then goes on."""
    store = TargetStore.create(url)
    store.add_videos([record("c", 16)])
    labels = store.ensure_set(request(), {})
    video = store.video("c")
    with lease(url, beat_seconds=1000, stale_seconds=1000) as asleep:
        store._lease = asleep
        labels.write_only_for(asleep.token)
        receipt = labels.write_shard(labels.shards(video)[0], planes(16), video)
        with lease(url, stale_seconds=0.4):
            with pytest.raises(StoreBusyError, match="taken over"):
                labels.commit([receipt])
            with pytest.raises(StoreBusyError, match="taken over"):
                labels.write_shard(labels.shards(video)[0], planes(16), video)
    assert not len(TargetStore.open(url).label_set(labels.name).receipts)


def test_driver_that_cannot_renew_stops_in_time(url: str) -> None:
    now = 0.0
    with lease(url, beat_seconds=1000, stale_seconds=30, clock=lambda: now) as held:
        now = 14.0
        held.check()
        now = 16.0
        with pytest.raises(StoreBusyError, match="could not be renewed"):
            held.check()


def test_lease_is_kept_when_a_request_is_sent_again(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As clients do when an answer is lost: the second request finds what the first one wrote."""
    import obstore

    once: Callable[..., object] = obstore.put

    def twice(*arguments: object, **options: object) -> object:
        once(*arguments, **options)
        return once(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(obstore, "put", twice)
        with lease(url, beat_seconds=0.05) as held:
            time.sleep(0.5)
            held.check()
            with pytest.raises(StoreBusyError), lease(url):
                pass
    with lease(url):
        pass


def test_only_one_of_several_takes_a_stale_lease(url: str) -> None:
    place = open_place(url)
    place.write("runs/driver", b'{"token": "of a dead driver"}')
    script = f"""
import sys, time
from stores.errors import StoreBusyError
from stores.lease import ObjectLease
from stores.places import open_place
try:
    with ObjectLease(open_place({url!r}), beat_seconds=0.2, stale_seconds=2):
        time.sleep(4)
except StoreBusyError:
    sys.exit(7)
"""
    processes = [subprocess.Popen([sys.executable, "-c", script], cwd=PROJECT) for _ in range(3)]
    assert sorted(process.wait(timeout=60) for process in processes) == [0, 7, 7]


def test_killed_writer_loses_no_committed_shard(url: str) -> None:
    TargetStore.create(url).add_videos([record("a", 256 * 4)])
    script = f"""
from stores import lease
from stores.targets import TargetStore
from tests.stores.test_targets import planes, request
store = TargetStore.open({url!r}, mode="r+")
with store.writer() as token:
    labels = store.ensure_set(request(), {{}})
    labels.write_only_for(token)
    video = store.video("a")
    for shard in labels.shards(video):
        labels.commit([labels.write_shard(shard, planes(16, seed=shard), video)])
        print(shard, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        for _ in range(5):
            told = int(process.stdout.readline())
        time.sleep(0.03)
        process.kill()
    store = TargetStore.open(url, mode="r+")
    labels = store.label_set()
    video = store.video("a")
    assert len(labels.missing(video)) < 64 - told
    for span in labels.coverage(video.id):
        labels.read("a", span.start, span.stop)
    with lease(url, stale_seconds=0.5) as held:  # as its beats have stopped
        store._lease = held
        shard = labels.missing(video)[0]
        labels.commit([labels.write_shard(shard, planes(16, seed=shard), video)])
    for shard in labels.shards(video)[: told + 1]:
        span = labels.frames_of(shard, video)
        stored = labels.read("a", span.start, span.stop)["maps_8x8"]
        assert np.abs(stored - planes(16, seed=shard)["maps_8x8"]).max() <= 1 / 64


def test_place_travels_to_other_processes_and_refuses_forked_ones(url: str) -> None:
    place = open_place(url)
    place.write("key", b"value")
    assert pickle.loads(pickle.dumps(place)).read("key") == b"value"
    child = os.fork()
    if child == 0:  # pragma: no cover - in another process
        try:
            place.read("key")
        except TargetStoreError as error:
            os._exit(0 if "forked" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_server_that_is_not_there_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("stores.places.RETRIES", {"max_retries": 0})
    with pytest.raises(TargetStoreError, match="cannot read"):
        TargetStore.open(url)
