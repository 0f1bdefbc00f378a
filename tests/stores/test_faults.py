"""Killed writers, full disks, and many processes at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from stores.errors import StoreWriteError, VideoNotLabelledError
from stores.receipts import Receipt
from stores.shards import LabelSet
from stores.targets import TargetStore
from stores.verify import verify_store
from tests.stores.test_targets import planes, record, request

PROJECT = Path(__file__).resolve().parents[2]
SHARDS = 400
Receipts = tuple[int, tuple[bytes, ...]]

WRITER = """
import sys
from stores.targets import TargetStore
from tests.stores.test_targets import planes, record, request
store = TargetStore.open_or_create(sys.argv[1])
with store.writer() as token:
    store.add_videos([record(f"v{i}", 16 * 20) for i in range(20)])
    labels = store.ensure_set(request(), {})
    labels.write_only_for(token)
    print("ready", flush=True)
    for video in store.videos:
        for shard in labels.missing(video):
            labels.commit([labels.write_shard(shard, planes(16, seed=shard), video)])
            print(shard, flush=True)
"""


def check_shards(labels: LabelSet) -> list[int]:
    """Compare everything that can be read with what was written; return the shards."""
    found = []
    for video in labels.store.videos:
        for shard in labels.shards(video):
            span = labels.frames_of(shard, video)
            if shard not in labels.receipts:
                with pytest.raises(VideoNotLabelledError):
                    labels.read(video.id, span.start, span.stop)
                continue
            found.append(shard)
            for name, values in labels.read(video.id, span.start, span.stop).items():
                assert np.abs(values - planes(16, seed=shard)[name]).max() <= 1 / 64
    return found


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_killed_writer_loses_no_committed_shard(tmp_path: Path, kills: int) -> None:
    """SIGKILL at random moments, the first of them while the store is made."""
    path = tmp_path / "targets.zarr"
    moments = random.Random(0)
    told: set[int] = set()
    for number in range(kills):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdout is not None
            if number % 5:  # else also while Python starts and the store is opened or made
                assert process.stdout.readline() == "ready\n"
                time.sleep(moments.uniform(0, 0.1))
            else:
                time.sleep(moments.uniform(0.5, 3))
            process.kill()
            told |= {int(line) for line in process.stdout if line.strip().isdecimal()}
        store = TargetStore.open_if_there(path)
        if store is None or not store.label_sets:
            continue
        readable = check_shards(store.label_set(request().name))
        assert told <= set(readable)
    assert told
    report = verify_store(path)
    assert report.problems == []
    subprocess.run(
        [sys.executable, "-c", WRITER, str(path)], cwd=PROJECT, check=True, stdout=subprocess.PIPE
    )
    assert len(check_shards(TargetStore.open(path).label_set())) == SHARDS
    report = verify_store(path)
    assert (report.problems, report.uncommitted) == ([], 0)
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk can only be made by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(labels: LabelSet, data: Mapping[str, npt.NDArray[np.float32]]) -> None:
    (video,) = labels.store.videos
    for shard in labels.shards(video):
        labels.commit([labels.write_shard(shard, data, video)])


def test_full_disk_is_reported_and_leaves_the_store_consistent(small_disk: Path) -> None:
    store = TargetStore.create(small_disk / "targets.zarr")
    with store.writer():
        store.add_videos([record("v", 256 * 100)])
        labels = store.ensure_set(request((64, 64)), {})
        data = {"maps_64x64": np.random.default_rng(0).normal(0, 9, (16, 1, 64, 64))}
        values = {name: array.astype(np.float32) for name, array in data.items()}
        with pytest.raises(StoreWriteError, match=r"no space is left .* make room"):
            fill(labels, values)
    assert not list(small_disk.rglob("*.partial"))
    report = verify_store(store.url)
    assert report.problems == []
    assert report.objects > 3


def test_write_protected_store_says_so(tmp_path: Path) -> None:
    store = TargetStore.create(tmp_path / "targets.zarr")
    store.add_videos([record("v", 16)])
    labels = store.ensure_set(request(), {})
    folder = tmp_path / "targets.zarr" / labels.key / "maps_8x8"
    folder.rename(folder.with_name("aside"))
    folder.write_bytes(b"")  # also root cannot write below a file
    video = store.video("v")
    with pytest.raises(StoreWriteError, match=r"cannot write .*maps_8x8"):
        labels.write_shard(labels.shards(video)[0], planes(16), video)


def write_some(path: str, token: str, part: int, receipts: Queue[Receipts]) -> None:
    labels = TargetStore.open(path, mode="r+").label_set(request().name)
    labels.write_only_for(token)
    for video in map(labels.store.video, [f"v{i}" for i in range(10)]):
        for shard in labels.shards(video):
            if shard % 4 == part:
                receipt = labels.write_shard(shard, planes(16, seed=shard), video)
                receipts.put((receipt.shard, receipt.digests))


def read_some(path: str, seed: int, stop: Event, counts: Queue[int]) -> None:
    choose = random.Random(seed)
    labels = TargetStore.open(path).label_set(request().name)
    count = 0
    while not stop.is_set():
        labels.store.refresh()
        labels.refresh()
        for video in labels.store.videos:
            for span in labels.coverage(video.id):
                start = choose.randrange(span.start, span.stop)
                end = choose.randrange(start, span.stop) + 1
                read = labels.read(video.id, start, end)
                for frame in range(start, end):
                    expected = planes(16, seed=(video.first + frame) // 16)
                    for name, values in read.items():
                        error = np.abs(values[frame - start] - expected[name][frame % 16]).max()
                        assert error <= 1 / 64
                count += 1
    counts.put(count)


@pytest.mark.slow
def test_many_write_and_read_at_once(tmp_path: Path) -> None:
    """4 processes write disjoint shards, one commits and adds videos, 4 read meanwhile."""
    path = str(tmp_path / "targets.zarr")
    spawn = multiprocessing.get_context("spawn")
    receipts, stop, counts = spawn.Queue(), spawn.Event(), spawn.Queue()
    store = TargetStore.create(path)
    with store.writer() as token:
        store.add_videos([record(f"v{i}", 16 * 20) for i in range(10)])
        labels = store.ensure_set(request(), {})
        writers = [
            spawn.Process(target=write_some, args=(path, token, part, receipts))
            for part in range(4)
        ]
        readers = [
            spawn.Process(target=read_some, args=(path, seed, stop, counts)) for seed in range(4)
        ]
        for process in (*readers, *writers):
            process.start()
        for number in range(10 * 20):
            labels.commit([Receipt(*receipts.get(timeout=120))])
            if number % 10 == 0:
                store.add_videos([record(f"later{number}", 40)])
        for process in writers:
            process.join(timeout=60)
        stop.set()
        done = [counts.get(timeout=60) for _ in readers]
        for process in readers:
            process.join(timeout=60)
    assert [process.exitcode for process in (*writers, *readers)] == [0] * 8
    assert min(done) > 0
    assert len(TargetStore.open(path).videos) == 30
    assert verify_store(path).problems == []


def read_in_child(labels: LabelSet) -> float:
    return float(labels.read("v", 3, 9)["maps_8x8"].sum())


def test_opened_label_set_is_read_in_forked_processes(tmp_path: Path) -> None:
    store = TargetStore.create(tmp_path / "targets.zarr")
    store.add_videos([record("v", 16)])
    labels = store.ensure_set(request(), {})
    video = store.video("v")
    labels.commit([labels.write_shard(labels.shards(video)[0], planes(16), video)])
    expected = read_in_child(labels)
    for _ in range(3):
        pipe, other = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover - in another process
            os.write(other, repr(read_in_child(labels)).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert float(os.read(pipe, 100)) == expected
        os.close(pipe)
        os.close(other)
