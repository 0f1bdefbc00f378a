"""Is a store what it says? Structure, tables, receipts, and every shard."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr

from stores import schema
from stores.codec import LIMIT, silence_codec_remark
from stores.errors import TargetStoreError
from stores.maps import error_bounds
from stores.places import PARTIAL, Place, open_place
from stores.progress import Progress
from stores.shards import LabelSet, ShardSet
from stores.targets import TargetStore, check_root, empty_set, empty_store
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
    except TargetStoreError as error:
        report.add("videos", str(error))
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
    expected = {key: json.loads(data) for key, data in empty_store().items()}
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
    there = {key for key, _ in store.place.walk("videos")}
    for column in schema.VIDEO_COLUMNS:
        for chunk in range(-(-len(store.rows) // schema.VIDEO_CHUNK)):
            key = f"videos/{column}/c/{chunk}" + ("/0" if column == "content_hash" else "")
            if key not in there:
                report.add(key, "is gone")
    ranges: dict[int, tuple[int, bytes]] = {}
    for number, row in enumerate(store.rows):
        where = f"videos, row {number} ({row.id!r})"
        if row.frames < 1 or row.height < 1 or row.width < 1 or not row.id:
            report.add(where, "has no name, frames or size")
        if row.first % schema.FRAME_ALIGNMENT:
            report.add(where, f"begins at {row.first}, no multiple of {schema.FRAME_ALIGNMENT}")
        if not any(row.content_hash):
            report.add(where, "has no content hash")
        if not schema.DROPPED <= row.superseded_by < len(store.rows):
            report.add(where, f"is superseded by row {row.superseded_by}, which is not there")
        known = ranges.setdefault(row.first, (row.frames, row.content_hash))
        if known != (row.frames, row.content_hash):
            report.add(where, "shares its range with other content")
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
    metadata = _metadata(store.place, f"{key}/zarr.json", report)
    if metadata is None:
        return
    before = len(report.problems)
    attributes = metadata.get("attributes", {})
    if not attributes:
        return  # in the making, or left so by a run that was stopped
    if attributes.get("dropped"):
        report.add(key, "was dropped and is not yet deleted; finish that with: tinyhd store drop")
        return
    _check_attributes(f"{key}/zarr.json", attributes, report)
    for name in (*attributes.get("arrays", ()), "receipts"):
        _metadata(store.place, f"{key}/{name}/zarr.json", report)
    if len(report.problems) > before:
        return
    if repair:
        _empty_damaged_receipts(store, key, report)
    try:
        shard_set = store.open_set(key)
    except TargetStoreError as error:
        report.add(f"{key}/receipts" if "receipts" in str(error) else key, str(error))
        return
    store.refresh()  # after the receipts, as another process may be adding videos
    _check_arrays(store, shard_set, report)
    _check_keys(shard_set, objects, report)
    damaged = _check_shards(shard_set, objects, report)
    if repair and damaged:
        shard_set.clear(damaged)
        report.repaired += len(damaged)


def _check_attributes(key: str, attributes: Mapping[str, Any], report: VerifyReport) -> None:
    if schema.digest(attributes) != attributes.get("digest"):
        report.add(key, "the attributes are not those that were written")
    request = schema.LabelRequest if key.startswith("labels/") else schema.FrameRequest
    identity = {name: attributes.get(name) for name in request.identity_names}
    if schema.fingerprint(identity) != attributes.get("fingerprint"):
        report.add(key, "the fingerprint is not that of the attributes")


def _check_arrays(store: TargetStore, shard_set: ShardSet, report: VerifyReport) -> None:
    """Compare arrays with those that the attributes ask for, and receipts with the videos."""
    if isinstance(shard_set, LabelSet):
        step = float(shard_set.attributes["grid_step"])
        if shard_set.attributes["error_bounds"] != error_bounds(shard_set.layout, step):
            report.add(shard_set.key, "the error bounds are not those of its grid step")
    for key, metadata in empty_set(shard_set.request).items():
        found = _metadata(store.place, key, report)
        if found is not None and not _is_alike(found, metadata):
            report.add(key, "is not what the attributes of its group ask for")
    owned = {shard for row in store.rows for shard in shard_set.shards(row)}
    for shard in shard_set.committed_shards:
        receipt = shard_set.receipt(shard)
        if receipt is not None and not all(any(digest) for digest in receipt.digests):
            report.add(f"{shard_set.key}/receipts", f"shard {shard} is there in some arrays only")
        if shard not in owned:
            report.add(f"{shard_set.key}/receipts", f"shard {shard} belongs to no video")


def _check_keys(shard_set: ShardSet, objects: Mapping[str, int], report: VerifyReport) -> None:
    known = {f"{shard_set.key}/zarr.json"}
    known |= {f"{shard_set.key}/{name}/zarr.json" for name in (*shard_set.array_names, "receipts")}
    for key in sorted(objects.keys() - known):
        name, _, rest = key.removeprefix(f"{shard_set.key}/").partition("/")
        if name == "receipts" and TABLE_CHUNK.fullmatch(rest):
            continue
        shard = shard_of(key) if name in shard_set.array_names else None
        if shard is not None and key == shard_set.shard_key(name, shard):
            report.uncommitted += not shard_set.is_committed(shard)
        elif not key.endswith(PARTIAL):  # else of a run that goes on or was killed
            report.add(key, "is a foreign file")


def _check_shards(
    shard_set: ShardSet, objects: Mapping[str, int], report: VerifyReport
) -> list[int]:
    """Read every committed shard; return those that are not what their receipts say."""
    damaged: set[int] = set()
    work = [(shard, name) for shard in shard_set.committed_shards for name in shard_set.array_names]
    label = f"verifying {shard_set.name}"
    with Progress(len(work), unit="shards", label=label) as progress, ThreadPoolExecutor() as pool:
        for begin in range(0, len(work), READ_AHEAD):
            batch = work[begin : begin + READ_AHEAD]
            found = pool.map(lambda item: _check_shard(shard_set, *item), batch)
            for (shard, name), what in zip(batch, found, strict=True):
                key = shard_set.shard_key(name, shard)
                if what:
                    damaged.add(shard)
                    report.add(key, what)
                report.objects += 1
                report.bytes += objects.get(key, 0)
                progress.advance()
    return sorted(damaged)


def _check_shard(shard_set: ShardSet, shard: int, name: str) -> str:
    """Return what is wrong with a shard of an array, or nothing."""
    receipt = shard_set.receipt(shard)
    if receipt is None:
        return ""
    try:
        data = shard_set.store.place.read(shard_set.shard_key(name, shard))
    except FileNotFoundError:
        return "is gone, though its receipt is there"
    except OSError as error:
        return f"cannot be read: {error}"
    if hashlib.sha256(data).digest() != receipt.digests[shard_set.array_names.index(name)]:
        return "is not what its receipt says: damaged or exchanged"
    try:
        values = shard_set.formats[name].unpack(data)
    except ValueError as error:
        return f"cannot be unpacked: {error}"
    if isinstance(shard_set, LabelSet) and not (np.abs(values) <= LIMIT).all():
        return f"holds values beyond +-{LIMIT:g}"
    return ""


def _empty_damaged_receipts(store: TargetStore, key: str, report: VerifyReport) -> None:
    """Delete the chunks of receipts that cannot be read."""
    group: Any = zarr.open_group(store.place.zarr_store(read_only=False), path=key, mode="r+")
    receipts = group["receipts"]
    for start in range(0, receipts.shape[0], schema.RECEIPT_CHUNK):
        stop = min(start + schema.RECEIPT_CHUNK, receipts.shape[0])
        try:
            receipts[start:stop]
        except Exception as error:  # damaged chunks make a codec fail in any way
            report.add(f"{key}/receipts", f"those of shards {start}-{stop} are damaged: {error}")
            chunk = receipts.metadata.encode_chunk_key((start // schema.RECEIPT_CHUNK, 0, 0))
            store.check_driver()
            store.place.delete([f"{key}/receipts/{chunk}"])
            report.repaired += stop - start


def _metadata(place: Place, key: str, report: VerifyReport) -> dict[str, Any] | None:
    try:
        metadata = json.loads(place.read(key))
    except FileNotFoundError:
        report.add(key, "is gone")
        return None
    except (OSError, ValueError) as error:
        report.add(key, f"cannot be read: {error}")
        return None
    if not isinstance(metadata, dict):
        report.add(key, "is no Zarr metadata")
        return None
    return metadata


def _is_alike(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Return whether metadata are equal but for the length."""

    def fixed(metadata: Mapping[str, Any]) -> str:
        values = {**metadata, "shape": list(metadata.get("shape", ()))[1:]}
        return json.dumps(values, sort_keys=True)

    return fixed(found) == fixed(expected)
