"""A process is killed before each single write of every verb; the next one finishes the work."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stores import receipts, schema
from stores.places import LocalPlace
from stores.targets import TargetStore
from stores.upkeep import merge, sweep
from stores.verify import verify_store
from tests.stores.test_targets import planes, record, request


class KilledError(BaseException):
    """Not caught by anything but what catches a kill's traces."""


Verb = Callable[[Path], object]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables and receipts of several chunks, though there are few rows."""
    monkeypatch.setattr(schema, "VIDEO_CHUNK", 2)
    monkeypatch.setattr(schema, "RECEIPT_CHUNK", 16)
    monkeypatch.setattr(receipts, "RECEIPT_CHUNK", 16)
    monkeypatch.setattr(receipts, "AT_ONCE", 1)


def label(store: TargetStore, *, every: int = 1, window: int = 4) -> None:
    labels = store.ensure_set(request(window=window), {"machine": "test"})
    for video in store.videos:
        for shard in labels.missing(video)[::every]:
            span = labels.frames_of(shard, video)
            seed = int.from_bytes(video.content_hash[:4], "little") + span.start
            labels.commit([labels.write_shard(shard, planes(len(span), seed=seed), video)])


def grow(path: Path) -> None:
    store = TargetStore.open_or_create(path / "a.zarr")
    with store.writer():
        store.add_videos([record(name, 20) for name in ("u", "v", "w", "x", "y")])
        label(store)


def exchange(path: Path) -> None:
    store = TargetStore.open(path / "a.zarr", mode="r+")
    with store.writer():
        store.add_videos(
            [record("u", 30, b"new u"), record("v", 20), record("y", 30, b"new y")],
            replace_changed=True,
        )
        label(store)


def add_frames(path: Path) -> None:
    store = TargetStore.open(path / "a.zarr", mode="r+")
    with store.writer():
        asked = schema.FrameRequest(height=8, width=8, decoder={"reader": "t"}, shard_frames=16)
        frames = store.ensure_set(asked, {})
        video = store.video("w")
        for shard in frames.missing(video):
            count = len(frames.frames_of(shard, video))
            data = {"rgb_8x8": np.full((count, 8, 8, 3), 7, np.uint8)}
            frames.commit([frames.write_shard(shard, data, video)])


def thin(path: Path) -> None:
    store = TargetStore.open(path / "a.zarr", mode="r+")
    with store.writer():
        store.drop_videos(["u", "w"])
        sweep(store)


def drop_labels(path: Path) -> None:
    store = TargetStore.open(path / "a.zarr", mode="r+")
    with store.writer():
        for key in store.find_sets("labels", None):
            store.drop_set(key)
        sweep(store)


def join(path: Path) -> None:
    merge(TargetStore.open_or_create(path / "a.zarr"), TargetStore.open(path / "b.zarr"))


def other(path: Path) -> None:
    """What is joined with the store: a video that both have, two new ones, another label set."""
    store = TargetStore.open_or_create(path / "b.zarr")
    with store.writer():
        store.add_videos([record(name, 20) for name in ("w", "z", "q")])
        label(store)
        label(store, window=9)


def contents(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).digest()
        for file in path.rglob("*")
        if file.is_file() and "runs" not in file.relative_to(path).parts
    }


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("before", "verb"),
    [
        ((), grow),
        ((grow,), exchange),
        ((grow,), add_frames),
        ((grow, exchange), thin),
        ((grow,), drop_labels),
        ((other,), join),
        ((grow, other), join),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(v.__name__ for v in value),
)
def test_verb_that_was_cut_off_anywhere_is_finished_by_the_same_verb(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: tuple[Verb, ...],
    verb: Verb,
    every: int,
) -> None:
    start, whole = tmp_path / "start", tmp_path / "whole"
    start.mkdir()
    for step in before:
        step(start)
    shutil.copytree(start, whole)
    verb(whole)
    expected = contents(whole)
    write, delete = LocalPlace.write, LocalPlace.delete
    left = 0

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError

    def counted_write(place: LocalPlace, key: str, data: bytes) -> None:
        count()
        write(place, key, data)

    def counted_delete(place: LocalPlace, keys: list[str]) -> None:
        for key in keys:
            count()
            delete(place, [key])

    for writes in range(every // 2, 10000, every):
        path = tmp_path / str(writes)
        shutil.copytree(start, path)
        left = writes
        with monkeypatch.context() as patch:
            patch.setattr(LocalPlace, "write", counted_write)
            patch.setattr(LocalPlace, "delete", counted_delete)
            try:
                verb(path)
                is_killed = False
            except KilledError:
                is_killed = True
        store = TargetStore.open_if_there(path / "a.zarr")
        if store is not None:  # whatever can be read is whole, and what was dropped is away
            report = verify_store(path / "a.zarr")
            assert [p for p in report.problems if "not yet deleted" not in p.what] == []
        verb(path)
        assert contents(path) == expected, writes
        shutil.rmtree(path)
        if not is_killed:
            break
    assert writes >= 10
    assert verify_store(whole / "a.zarr").problems == []
