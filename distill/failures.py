"""The failure list: what could not be labelled, kept in the store until it can."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any, Final

from distill.events import Failure
from stores.places import Place
from stores.videos import FileStamp

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
        self._entries = {_is_about(entry): entry for entry in entries}
        self.is_changed = False
        """Whether it is not what was last saved."""

    @property
    def entries(self) -> list[Failure]:
        """All entries, the oldest first."""
        return list(self._entries.values())

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
        self.is_changed = False

    def add(self, failure: Failure) -> None:
        """Add an entry; it replaces one about the same."""
        self._entries[_is_about(failure)] = failure
        self.is_changed = True

    def failed_files(self) -> dict[str, Failure]:
        """Return the entries about files that could not be opened, by path."""
        return {entry.file: entry for entry in self.entries if entry.file}

    def failed_shards(self, sets: Iterable[str]) -> dict[tuple[str, int], Failure]:
        """Return the entries about shards of any of some sets.

        Returns:
            By content hash, in hexadecimal, and shard, counted from the video's first.
        """
        keys = set(sets)
        return {
            (entry.content_hash, shard): entry
            for entry in self.entries
            if not keys.isdisjoint(entry.sets)
            for shard in entry.shards
        }

    def forget_shards(self, is_done: Callable[[str, int, str], bool]) -> None:
        """Take off the list what is done now.

        Args:
            is_done: Tells it of a content hash, a shard counted from the video's first, and a set.
        """
        kept = []
        for entry in self.entries:
            left = tuple(
                shard
                for shard in entry.shards
                if not all(is_done(entry.content_hash, shard, key) for key in entry.sets)
            )
            if left or not entry.shards:
                kept.append(replace(entry, shards=left))
        self._entries = {_is_about(entry): entry for entry in kept}

    def forget_files(self, paths: Iterable[str]) -> None:
        """Take files off the list that can be opened now."""
        opened = set(paths)
        kept = [entry for entry in self.entries if entry.file not in opened]
        self._entries = {_is_about(entry): entry for entry in kept}


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
