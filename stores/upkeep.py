"""Deleting what was dropped, and joining stores. Every step can be repeated."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Final

from stores.errors import TargetStoreError, VideoChangedError
from stores.progress import Progress
from stores.receipts import Receipt
from stores.schema import DROPPED
from stores.shards import Committer, ShardSet
from stores.targets import TargetStore
from stores.videos import VideoRecord

DELETED_AT_ONCE: Final = 100
COPIED_AT_ONCE: Final = 16
"""Shards in flight: an object store is slow to answer, and a disk slow to flush."""
RECORD_FIELDS: Final = [field.name for field in fields(VideoRecord)]


@dataclass
class MergeReport:
    """What was copied."""

    videos: int = 0
    """Videos that were new."""
    shards: int = 0
    """Shards copied."""
    bytes: int = 0
    known: int = 0
    """Shards that were there already."""
    damaged: list[str] = field(default_factory=list)
    """Keys of shards and sets that are not what was written, and were not copied."""

    def __str__(self) -> str:
        return (
            f"{self.videos} new videos, {self.shards} shards copied ({self.bytes} bytes), "
            f"{self.known} known already"
        )


def sweep(store: TargetStore) -> int:
    """Delete what belongs to dropped sets and videos; return the number of objects.

    Receipts go before shards: what is half deleted is not there. Use inside
    :meth:`TargetStore.writer`.
    """
    deleted = 0
    for key in store.dropped_sets:
        root = f"{key}/zarr.json"
        deleted += _delete(store, [name for name, _ in store.place.walk(key) if name != root])
        deleted += _delete(store, [root])
    for shard_set in (*store.label_sets, *store.frame_sets):
        dead = _dead_shards(store, shard_set)
        if not dead:
            continue
        shard_set.clear(dead)
        for array in shard_set.array_names:
            there = store.place.walk(f"{shard_set.key}/{array}")
            deleted += _delete(store, [name for name, _ in there if shard_of(name) in dead])
    return deleted


def merge(target: TargetStore, source: TargetStore) -> MergeReport:
    """Copy videos, targets and frames that another store has and this one has not.

    Shards are copied byte for byte, after they were compared with their receipts. Where both have a
    shard, the target keeps its own.

    Raises:
        VideoChangedError: If an id has other content in the other store; nothing is copied then.
        TargetStoreError: If stores cannot be read or written.
    """
    report = MergeReport()
    with target.writer():
        _check_videos(target, source)
        sweep(target)
        new = [video for video in source.videos if target.find_video(video.id) is None]
        target.add_videos(
            [VideoRecord(*(getattr(video, name) for name in RECORD_FIELDS)) for video in new]
        )
        report.videos = len(new)
        for error in source.damaged_sets:
            report.damaged.append(error.key)
        for other in (*source.label_sets, *source.frame_sets):
            _copy_shards(target.adopt_set(other), other, report)
    return report


def shard_of(key: str) -> int | None:
    """Return the number of the shard whose object has a key, or nothing if it is another's."""
    name = key.rpartition("/")[2]
    kind, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if kind == "c" and number.isdecimal() else None


def _delete(store: TargetStore, keys: list[str]) -> int:
    """Delete objects as the store's driver; return how many."""
    with Progress(len(keys), unit="objects", label="deleting") as progress:
        for begin in range(0, len(keys), DELETED_AT_ONCE):
            batch = keys[begin : begin + DELETED_AT_ONCE]
            store.check_driver()
            store.place.delete(batch)
            progress.advance(len(batch))
    return len(keys)


def _dead_shards(store: TargetStore, shard_set: ShardSet) -> set[int]:
    """Return the shards of videos that were dropped and whose content no other video has."""
    used = {row.first for row in store.rows if row.superseded_by != DROPPED}
    return {
        shard
        for row in store.rows
        if row.superseded_by == DROPPED and row.first not in used
        for shard in shard_set.shards(row)
    }


def _check_videos(target: TargetStore, source: TargetStore) -> None:
    changed = []
    for video in source.videos:
        known = target.find_video(video.id)
        if known is not None and known.content_hash != video.content_hash:
            changed.append(video.id)
        same = target.find_content(video.content_hash)
        if same is not None and same.frames != video.frames:
            raise TargetStoreError(
                f"{video.id!r} has {video.frames} frames in {source.url} and {same.frames} in "
                f"{target.url}: different decoders; drop it from one of them"
            )
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise VideoChangedError(
            f"{changed[0]!r}{more} has other content in {source.url} than in {target.url}; drop it "
            f"from one of them with: tinyhd store drop STORE --video {changed[0]}"
        )


def _copy_shards(own: ShardSet, other: ShardSet, report: MergeReport) -> None:
    pairs: dict[int, int] = {}  # shard of the other -> of ours
    for video in other.store.videos:
        here = own.shards(own.store.video(video.id))
        pairs.update(zip(other.shards(video), here, strict=True))
    wanted = []
    for theirs, ours in pairs.items():
        if theirs in other.receipts:
            if ours in own.receipts:
                report.known += 1
            else:
                wanted.append((other.receipts[theirs], ours))
    committer = Committer(own)
    label = f"copying {own.name}"
    with (
        Progress(len(wanted), unit="shards", label=label) as progress,
        ThreadPoolExecutor(COPIED_AT_ONCE) as pool,
    ):
        try:
            for begin in range(0, len(wanted), COPIED_AT_ONCE):
                batch = wanted[begin : begin + COPIED_AT_ONCE]
                own.store.check_driver()
                copies = pool.map(lambda item: _copy_shard(own, other, *item), batch)
                for (receipt, shard), (size, damaged) in zip(batch, copies, strict=True):
                    if damaged:
                        report.damaged += damaged
                    else:
                        committer.add(Receipt(shard, receipt.digests))
                        report.shards += 1
                        report.bytes += size
                    progress.advance()
                committer.commit_if_due()
        finally:  # also when interrupted: what was copied is kept
            committer.commit()


def _copy_shard(
    own: ShardSet, other: ShardSet, receipt: Receipt, shard: int
) -> tuple[int, list[str]]:
    """Copy a shard's objects if all are what the receipt says; return bytes, or damaged keys."""
    objects, damaged = {}, []
    for name, expected in zip(other.array_names, receipt.digests, strict=True):
        key = other.shard_key(name, receipt.shard)
        try:
            objects[name] = other.store.place.read(key)
            is_whole = hashlib.sha256(objects[name]).digest() == expected
        except OSError:
            is_whole = False
        if not is_whole:
            damaged.append(key)
    if not damaged:
        for name, data in objects.items():
            own.store.place.write(own.shard_key(name, shard), data)
    return sum(map(len, objects.values())), damaged
