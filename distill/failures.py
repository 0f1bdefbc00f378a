"""The failure list: what could not be labelled, kept in the store until it can."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any, Final

from distill.events import Failure
from stores.places import Place
from stores.table import VideoRow
from stores.videos import FileStamp, VideoFile

log = logging.getLogger(__name__)

KEY: Final = "runs/failures.json"


class FailureList:
    """What earlier runs could not do, and this one.

    What is on it is passed over by later runs until it is asked for, so that one bad video does not
    cost three tries each time.

    Args:
        entries: Of earlier runs.
    """

    def __init__(self, entries: Iterable[Failure] = ()) -> None:
        self.entries = list(entries)

    @classmethod
    def load(cls, place: Place) -> FailureList:
        """Read the list of a store; one that cannot be read is empty, which costs tries only."""
        try:
            return cls(_from_json(item) for item in json.loads(place.read(KEY)))
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning("%s in %s cannot be read and begins anew: %s", KEY, place.url, error)
            return cls()

    def save(self, place: Place) -> None:
        """Write the list.

        Raises:
            StoreWriteError: If it cannot be written.
        """
        entries = [asdict(failure) for failure in self.entries]
        place.write(KEY, (json.dumps(entries, indent=1) + "\n").encode())

    def add(self, failure: Failure) -> None:
        """Add an entry; it replaces one about the same."""
        same = [entry for entry in self.entries if _is_about(entry) == _is_about(failure)]
        self.entries = [entry for entry in self.entries if entry not in same]
        self.entries.append(failure)

    def find_file(self, file: VideoFile, stamp: FileStamp) -> Failure | None:
        """Return the entry about a file that could not be opened, if it has not changed since."""
        path = str(file.absolute)
        fitting = (entry for entry in self.entries if entry.file == path and entry.stamp == stamp)
        return next(fitting, None)

    def find_shard(self, video: VideoRow, shard: int, sets: Iterable[str]) -> Failure | None:
        """Return the entry about a shard, counted from the video's first, of any of some sets."""
        content, keys = video.content_hash.hex(), set(sets)
        for entry in self.entries:
            is_its = entry.content_hash == content and shard in entry.shards
            if is_its and not keys.isdisjoint(entry.sets):
                return entry
        return None

    def forget_shards(self, video: VideoRow, done: Iterable[int], sets: Iterable[str]) -> None:
        """Take off the list what is done now: shards counted from the video's first."""
        content, keys, shards = video.content_hash.hex(), set(sets), set(done)
        kept = []
        for entry in self.entries:
            if entry.content_hash == content and not keys.isdisjoint(entry.sets):
                left = tuple(shard for shard in entry.shards if shard not in shards)
                if not left:
                    continue
                entry = replace(entry, shards=left)
            kept.append(entry)
        self.entries = kept

    def forget_file(self, file: VideoFile) -> None:
        """Take a file off the list that can be opened now, or has changed."""
        path = str(file.absolute)
        self.entries = [entry for entry in self.entries if entry.file != path]


def _is_about(failure: Failure) -> tuple[str, str, tuple[int, ...], tuple[str, ...]]:
    return failure.file, failure.content_hash, failure.shards, failure.sets


def _from_json(item: dict[str, Any]) -> Failure:
    stamp = item["stamp"]
    return Failure(
        video=str(item["video"]),
        reason=str(item["reason"]),
        traceback=str(item["traceback"]),
        tries=int(item["tries"]),
        content_hash=str(item["content_hash"]),
        shards=tuple(int(shard) for shard in item["shards"]),
        sets=tuple(str(key) for key in item["sets"]),
        file=str(item["file"]),
        stamp=FileStamp(int(stamp["num_bytes"]), int(stamp["modified_ns"])) if stamp else None,
    )
