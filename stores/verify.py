"""Is a store what it says? Structure, tables, receipts, and every shard."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from stores import schema
from stores.codec import LIMIT, silence_codec_remark
from stores.errors import DamagedStoreError, TargetStoreError
from stores.metadata import (
    METADATA,
    Metadata,
    check_root,
    empty_set,
    empty_store,
    read_attributes,
    read_length,
    read_metadata,
)
from stores.places import PARTIAL, Place, open_place
from stores.progress import Progress
from stores.receipts import read_receipts, write_receipts
from stores.shards import FrameSet, LabelSet, Request, ShardSet, is_dropped, read_set
from stores.targets import TargetStore
from stores.upkeep import shard_of

TABLE_CHUNK: Final = re.compile(r"c(/\d+)+")
READ_AHEAD: Final = 16


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    key: str
    """Of the object concerned, or of the group."""
    what: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}"


@dataclass
class VerifyReport:
    """What was looked at and what was found."""

    problems: list[Problem] = field(default_factory=list)
    objects: int = 0
    """Committed shards that were read, counted per array."""
    bytes: int = 0
    uncommitted: int = 0
    """Objects without a receipt, left by a run that was stopped; the next run overwrites them."""
    repaired: int = 0
    """Shards whose receipts were taken back."""

    @property
    def is_clean(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        if self.is_clean:
            text = f"no problems; {self.objects} files of shards are what was written"
        else:
            text = f"{len(self.problems)} problems; {self.objects} files of shards looked at"
        if self.repaired:
            text += f"; {self.repaired} taken back, label them again with tinyhd distill"
        if self.uncommitted:
            text += f"; {self.uncommitted} files of a stopped run wait to be overwritten"
        return text

    def add(self, key: str, what: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(key, what))


def verify_store(where: str | Path, *, repair: bool = False) -> VerifyReport:
    """Check structure, tables, receipts, the hash of every shard and the values in it.

    Args:
        where: Path or URL of the store.
        repair: Take back the receipts of shards that are damaged or gone, and all receipts of a
            chunk of receipts that cannot be read, so that ``distill`` makes those shards again.

    Raises:
        NotATargetStoreError: If there is no store.
        FormatVersionError: If it is of another version of the format.
        StoreBusyError: If it is to be repaired and another process writes it.
    """
    silence_codec_remark()
    place = open_place(where)
    report = VerifyReport()
    check_root(place)
    _check_structure(place, report)
    try:
        store = TargetStore.open(where, mode="r+" if repair else "r")
    except DamagedStoreError as error:
        if not any(problem.key == error.key for problem in report.problems):
            report.add(error.key, error.what)
        report.add("videos", "cannot be read, so no shard was looked at; restore it from a copy")
        return report
    _check_videos(store, report)
    if repair:
        with store.writer():
            _check_sets(store, report, repair=True)
    else:
        _check_sets(store, report, repair=False)
    return report


def _check_structure(place: Place, report: VerifyReport) -> None:
    """Compare the root and the table of videos with those of an empty store."""
    expected = empty_store()
    for key, metadata in expected.items():
        found = _metadata(place, key, report)
        if found is not None and not _is_alike(found, metadata):
            report.add(key, "is not what this version of the format has there")
    for key, _ in place.walk():
        folder, _, rest = key.partition("/")
        if key in expected or key.endswith(PARTIAL) or folder in ("labels", "frames", "runs"):
            continue
        column, _, chunk = rest.partition("/")
        if not (column in schema.VIDEO_COLUMNS and TABLE_CHUNK.fullmatch(chunk)):
            report.add(key, "is a foreign file")


def _check_videos(store: TargetStore, report: VerifyReport) -> None:
    ranges: dict[int, tuple[int, bytes]] = {}
    for number, row in enumerate(store.rows):
        known = ranges.setdefault(row.first, (row.frames, row.content_hash))
        if known != (row.frames, row.content_hash):
            report.add(f"videos, row {number} ({row.id!r})", "shares its range with other content")
    end = 0
    for first, (frames, _) in sorted(ranges.items()):
        if first < end:
            report.add("videos", f"the range that begins at {first} overlaps the one before")
        end = first + frames


def _check_sets(store: TargetStore, report: VerifyReport, *, repair: bool) -> None:
    for folder in ("labels", "frames"):
        keys = [key for key, _ in store.place.walk(folder)]
        for key in keys:
            if key.count("/") == 1 and key != f"{folder}/zarr.json":
                report.add(key, "is a foreign file")
        for name in sorted({key.split("/")[1] for key in keys if key.count("/") > 1}):
            _check_set(store, f"{folder}/{name}", report, repair=repair)


def _check_set(store: TargetStore, key: str, report: VerifyReport, *, repair: bool) -> None:
    objects = dict(store.place.walk(key))
    if f"{key}/{METADATA}" not in objects and not _holds_shards(key, objects):
        return  # in the making, or left so by a run that was stopped
    try:
        if is_dropped(read_attributes(store.place, key)):
            what = "was dropped and is not yet deleted; finish that with: tinyhd store drop"
            report.add(key, what)
            return
        _, request = read_set(store.place, key)
        if not _check_receipts(store, key, request, report, repair=repair):
            return
        shard_set = store.open_set(key)
    except DamagedStoreError as error:
        report.add(error.key, error.what)
        return
    except TargetStoreError as error:
        report.add(key, str(error))
        return
    _check_arrays(store, shard_set, report)
    _check_keys(shard_set, objects, report)
    damaged = _check_shards(shard_set, objects, report)
    if repair and damaged:
        shard_set.clear(damaged)
        report.repaired += len(damaged)


def _holds_shards(key: str, objects: Mapping[str, int]) -> bool:
    """Return whether a set has more objects than one in the making."""
    return any(
        not name.endswith(METADATA) and not name.startswith(f"{key}/receipts/") for name in objects
    )


def _check_arrays(store: TargetStore, shard_set: LabelSet | FrameSet, report: VerifyReport) -> None:
    """Compare arrays with those that the attributes ask for, and receipts with the videos."""
    *arrays, group = empty_set(shard_set.request, shard_set.attributes).items()
    for key, metadata in (*arrays, group):
        found = _metadata(store.place, key, report)
        if found is not None and not _is_alike(found, metadata):
            report.add(key, "is not what the attributes of its group ask for")
    lengths = []
    for array in shard_set.array_names:
        with suppress(TargetStoreError):  # which was found above
            lengths.append(read_length(store.place, f"{shard_set.key}/{array}"))
    there = shard_set.receipts.shards()
    if there and min(lengths, default=0) < (there[-1] + 1) * shard_set.shard_frames:
        report.add(shard_set.key, "has shards beyond the end of an array")
    owned = {
        shard
        for first in {row.first: row for row in store.rows}.values()
        for shard in shard_set.receipts.shards(shard_set.shards(first))
    }
    for shard in there:
        if not all(any(digest) for digest in shard_set.receipts[shard].digests):
            report.add(shard_set.receipts.key, f"shard {shard} is there in some arrays only")
        if shard not in owned:
            report.add(shard_set.receipts.key, f"shard {shard} belongs to no video")


def _check_keys(shard_set: ShardSet, objects: Mapping[str, int], report: VerifyReport) -> None:
    known = {f"{shard_set.key}/zarr.json"}
    known |= {f"{shard_set.key}/{name}/zarr.json" for name in (*shard_set.array_names, "receipts")}
    for key in sorted(objects.keys() - known):
        name, _, rest = key.removeprefix(f"{shard_set.key}/").partition("/")
        if name == "receipts" and TABLE_CHUNK.fullmatch(rest):
            continue
        shard = shard_of(key) if name in shard_set.array_names else None
        if shard is not None and key == shard_set.shard_key(name, shard):
            report.uncommitted += shard not in shard_set.receipts
        elif not key.endswith(PARTIAL):  # else of a run that goes on or was killed
            report.add(key, "is a foreign file")


def _check_shards(
    shard_set: ShardSet, objects: Mapping[str, int], report: VerifyReport
) -> list[int]:
    """Read every committed shard; return those that are not what their receipts say."""
    damaged: set[int] = set()
    there = shard_set.receipts.shards()
    work = [(shard, name) for shard in there for name in shard_set.array_names]
    label = f"verifying {shard_set.name}"
    with Progress(len(work), unit="shards", label=label) as progress, ThreadPoolExecutor() as pool:
        for begin in range(0, len(work), READ_AHEAD):
            batch = work[begin : begin + READ_AHEAD]
            found = pool.map(lambda item: _check_shard(shard_set, *item), batch)
            for (shard, name), (what, is_damaged) in zip(batch, found, strict=True):
                key = shard_set.shard_key(name, shard)
                if what:
                    report.add(key, what)
                if is_damaged:
                    damaged.add(shard)
                report.objects += 1
                report.bytes += objects.get(key, 0)
                progress.advance()
    return sorted(damaged)


def _check_shard(shard_set: ShardSet, shard: int, name: str) -> tuple[str, bool]:
    """Return what is wrong with a shard of an array, or nothing, and whether it is damage.

    That a network or a disk gives no answer says nothing of the shard: its receipt stays.
    """
    receipt = shard_set.receipts[shard]
    try:
        data = shard_set.store.place.read(shard_set.shard_key(name, shard))
    except FileNotFoundError:
        return "is gone, though its receipt is there", True
    except OSError as error:
        return f"cannot be read: {error}", False
    if hashlib.sha256(data).digest() != receipt.digests[shard_set.array_names.index(name)]:
        return "is not what its receipt says: damaged or exchanged", True
    try:
        values = shard_set.formats[name].unpack(data)
    except ValueError as error:
        return f"cannot be unpacked: {error}", True
    if isinstance(shard_set, LabelSet) and not (np.abs(values) <= LIMIT).all():
        return f"holds values beyond +-{LIMIT:g}", True
    return "", False


def _check_receipts(
    store: TargetStore, key: str, request: Request, report: VerifyReport, *, repair: bool
) -> bool:
    """Read all chunks of receipts and, for repair, empty the damaged ones; are all whole now?"""
    receipts, is_whole = f"{key}/receipts", True
    length = read_length(store.place, receipts)
    store.refresh()  # after the length, as another process may be adding videos
    if length * request.shard_frames > store.num_frames:
        what = f"says that there are {length} shards, more than the videos have"
        report.add(f"{receipts}/{METADATA}", what)
        return False
    num_arrays = len(request.arrays)
    for chunk, start in enumerate(range(0, length, schema.RECEIPT_CHUNK)):
        try:
            read_receipts(store.place, receipts, num_arrays, chunk)
        except DamagedStoreError as error:
            report.add(error.key, error.what)
            if not repair:
                is_whole = False
                continue
            store.check_driver()
            shape = (schema.RECEIPT_CHUNK, num_arrays, schema.DIGEST_BYTES)
            write_receipts(store.place, receipts, chunk, np.zeros(shape, np.uint8))
            report.repaired += min(schema.RECEIPT_CHUNK, length - start)
    return is_whole


def _metadata(place: Place, key: str, report: VerifyReport) -> Metadata | None:
    try:
        return read_metadata(place, key)
    except TargetStoreError as error:
        report.add(key, error.what if isinstance(error, DamagedStoreError) else str(error))
        return None


def _is_alike(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Return whether metadata are equal but for the length."""

    def fixed(metadata: Mapping[str, Any]) -> str:
        shape = metadata.get("shape")
        rest = shape[1:] if isinstance(shape, list) else shape
        return json.dumps({**metadata, "shape": rest}, sort_keys=True)

    return fixed(found) == fixed(expected)
