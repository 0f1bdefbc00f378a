"""The target store: a teacher's soft targets, written once, read by every experiment."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from stores import schema
from stores.codec import silence_codec_remark
from stores.errors import (
    FormatVersionError,
    LabelSetNotFoundError,
    NotATargetStoreError,
    TargetStoreError,
    VideoChangedError,
    VideoNotFoundError,
)
from stores.lease import Lease, take_lease
from stores.places import Place, open_place, writing
from stores.shards import FrameSet, LabelSet, ShardSet, VideoRow, array_in, group_in
from stores.videos import VideoRecord

Mode = Literal["r", "r+"]
LOG_FOLDER: Final = "runs/log"


class TargetStore:
    """A folder of soft targets in Zarr format 3; see ``docs/store-format.md``.

    Use :meth:`open` or :meth:`create`. A store that is open for writing (mode ``r+``) has one
    driver, which holds :meth:`writer`; workers write shards and commit nothing.
    """

    def __init__(self, place: Place, group: zarr.Group) -> None:
        self.place = place
        self.url = place.url
        self._group = group
        self._lease: Lease | None = None
        self._log: list[str] = []
        self._log_key = (
            f"{LOG_FOLDER}/{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}.jsonl"
        )
        self.videos: list[VideoRow] = []
        """Rows of videos that count, in the order of the store."""
        self.rows: list[VideoRow] = []
        """All rows, also of videos that were dropped or replaced."""
        self.refresh()

    @classmethod
    def create(cls, where: str | Path) -> TargetStore:
        """Make an empty store.

        Args:
            where: A path, or a URL of an object store.

        Raises:
            NotATargetStoreError: If something else lies there.
            StoreWriteError: If it cannot be written.
        """
        silence_codec_remark()
        place = open_place(where)
        place.create(empty_store())
        return cls.open(where, mode="r+")

    @classmethod
    def open(cls, where: str | Path, *, mode: Mode = "r") -> TargetStore:
        """Open a store.

        Args:
            where: A path, or a URL of an object store.
            mode: ``r`` to read, ``r+`` to write, too.

        Raises:
            NotATargetStoreError: If there is no store.
            FormatVersionError: If the store is of another version of the format.
        """
        silence_codec_remark()
        place = open_place(where)
        check_root(place)
        try:
            store = place.zarr_store(read_only=mode == "r")
            group = zarr.open_group(store, mode=mode, zarr_format=3)
        except Exception as error:  # zarr fails in any way on metadata that is not its own
            raise NotATargetStoreError(f"{where} is not a target store") from error
        try:
            return cls(place, group)
        except TargetStoreError:
            raise
        except Exception as error:  # damaged chunks make a codec fail in any way
            raise TargetStoreError(
                f"the table of videos in {where} is damaged ({error}); find out more with: "
                f"tinyhd store verify {where}"
            ) from error

    @classmethod
    def open_if_there(cls, where: str | Path, *, mode: Mode = "r") -> TargetStore | None:
        """Open a store, or return nothing if there is only an empty folder or less."""
        return cls.open(where, mode=mode) if open_place(where).is_there() else None

    @classmethod
    def open_or_create(cls, where: str | Path) -> TargetStore:
        """Open a store for writing; make it if there is none."""
        if (store := cls.open_if_there(where, mode="r+")) is not None:
            return store
        try:
            return cls.create(where)
        except NotATargetStoreError:  # another process may have been faster
            return cls.open(where, mode="r+")

    @contextmanager
    def writer(self) -> Iterator[str]:
        """Be the store's one driver, and tidy up after one that was killed.

        Yields:
            A token for :meth:`ShardSet.write_only_for`: workers of a driver that was killed stop
            writing when the next one takes over.

        Raises:
            StoreBusyError: If another process is the driver.
        """
        with take_lease(self.place) as lease:
            self.place.remove_leftovers()
            self.refresh()
            self._lease = lease
            try:
                yield lease.token
            finally:
                self._lease = None

    def check_driver(self) -> None:
        """Make sure, inside :meth:`writer`, that this process still is the driver.

        Raises:
            StoreBusyError: If another process has taken over.
        """
        if self._lease is not None:
            self._lease.check()

    def refresh(self) -> None:
        """Read the table of videos again."""
        # In this order: rows that are whole in "first" are whole in what is opened after it.
        first = np.asarray(array_in(group_in(self._group, "videos"), "first")[:])
        # Up to the first that is not whole: chunks of a long column are not written in order.
        rows = int(np.argmin(np.append(first >= 0, False)))
        table = self._video_table
        columns = {name: np.asarray(table[name][:rows]) for name in schema.VIDEO_COLUMNS}
        self._num_rows = rows
        self._num_frames = 0
        self.rows = []
        for row in range(rows):
            values = {name: column[row] for name, column in columns.items()}
            values["content_hash"] = values["content_hash"].tobytes()
            plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
            video = VideoRow(**plain)
            self._num_frames = max(self._num_frames, video.first + _aligned(video.frames))
            self.rows.append(video)
        # Of several rows with one id the last counts: a process may have died before it could mark
        # the one that it replaced.
        self._by_id = {row.id: row for row in self.rows if row.superseded_by == schema.LIVE}
        self.videos = list(self._by_id.values())
        self._by_content = {video.content_hash: video for video in self.videos}

    def video(self, video_id: str) -> VideoRow:
        """Return the row of a video.

        Raises:
            VideoNotFoundError: If the store has no such video.
        """
        if video_id not in self._by_id:
            raise VideoNotFoundError(f"{self.url} has no video {video_id!r}")
        return self._by_id[video_id]

    def find_video(self, video_id: str) -> VideoRow | None:
        """Return the row of a video, or nothing if the store does not know it."""
        return self._by_id.get(video_id)

    def find_content(self, content_hash: bytes) -> VideoRow | None:
        """Return a row with the given content, under whatever id."""
        return self._by_content.get(content_hash)

    def add_videos(self, records: Sequence[VideoRecord], *, replace_changed: bool = False) -> None:
        """Append rows for videos that the store does not know; known ones are passed over.

        Videos with equal content share a range of the frame axis.

        Args:
            records: The videos.
            replace_changed: Give a video whose content has changed a new row, without targets, that
                replaces its old one.

        Raises:
            VideoChangedError: If the store knows an id with other content, and it is not replaced.
        """
        new: list[VideoRow] = []
        replaced: dict[str, int] = {}  # id -> number of the row
        end = self._num_frames
        first_of = {row.content_hash: row.first for row in self.videos}
        for record in records:
            known = self._by_id.get(record.id)
            if known is not None and known.content_hash == record.content_hash:
                continue
            if known is not None:
                if not replace_changed:
                    raise VideoChangedError(
                        f"{record.absolute} is not the video {record.id!r} that {self.url} was "
                        "labelled from: its content has changed; give it another name"
                    )
                replaced[record.id] = self.rows.index(known)
            first = first_of.setdefault(record.content_hash, end)
            if first == end:
                end += _aligned(record.frames)
            values = {field.name: getattr(record, field.name) for field in fields(VideoRecord)}
            new.append(VideoRow(**values, first=first))
        if new:
            self.check_driver()
            with writing(self.url):
                old = len(self.rows)
                self._append_rows(new)
                for number, row in enumerate(new, start=old):
                    if row.id in replaced:
                        self._video_table["superseded_by"][replaced[row.id]] = number
            self.refresh()

    def drop_videos(self, video_ids: Sequence[str]) -> None:
        """Take videos out of the store; what was stored of them is deleted by :func:`sweep`.

        Raises:
            VideoNotFoundError: If the store has no such video.
        """
        numbers = [self.rows.index(self.video(video_id)) for video_id in video_ids]
        self.drop_rows(numbers)

    def drop_rows(self, numbers: Sequence[int]) -> None:
        """Take rows out of the store, whether they count or were replaced."""
        self.check_driver()
        with writing(self.url):
            for number in numbers:
                self._video_table["superseded_by"][number] = schema.DROPPED
        self.refresh()

    def drop_set(self, shard_set: ShardSet) -> None:
        """Take a label set or frame set out of the store; :func:`sweep` deletes it."""
        self.check_driver()
        with writing(self.url):
            shard_set.group.attrs["dropped"] = True

    def adopt_set(self, other: ShardSet) -> LabelSet | FrameSet:
        """Return this store's set of the same fingerprint; made, without shards, if need be.

        Args:
            other: A set of another store.

        Raises:
            TargetStoreError: If there is another set of the same name.
        """
        self.check_driver()
        names = [*other.array_names, "receipts"]
        with writing(self.url):
            if f"{other.key}/zarr.json" not in dict(self.place.walk(other.key)):
                for name in (*names, None):  # the group last: a set without it is not one yet
                    key = "/".join(filter(None, (other.key, name, "zarr.json")))
                    metadata = json.loads(other.store.place.read(key))
                    if name is not None:
                        metadata["shape"][0] = 0
                    self.place.write(key, json.dumps(metadata, indent=2).encode())
            group = group_in(self._group, other.key)
            if group.attrs.get("fingerprint") != other.fingerprint:
                raise TargetStoreError(f"{other.key} in {self.url} was made for another request")
            for name in other.array_names:
                _lengthen(array_in(group, name), self._num_frames)
            _lengthen(array_in(group, "receipts"), self._num_frames // other.shard_frames)
        return self.open_set(other.key)

    def open_set(self, key: str) -> LabelSet | FrameSet:
        """Open the set whose group has a key."""
        group = group_in(self._group, key)
        return LabelSet(self, group) if key.startswith("labels/") else FrameSet(self, group)

    @property
    def label_sets(self) -> list[LabelSet]:
        """All label sets, ordered by name."""
        return [LabelSet(self, group) for _, group in self._groups("labels")]

    @property
    def frame_sets(self) -> list[FrameSet]:
        """All frame sets, ordered by name."""
        return [FrameSet(self, group) for _, group in self._groups("frames")]

    @property
    def dropped_sets(self) -> list[str]:
        """Keys of sets that were dropped and are not yet deleted."""
        return [
            f"{folder}/{name}"
            for folder in ("labels", "frames")
            for name, attributes in self._sets(folder)
            if attributes.get("dropped")
        ]

    def ensure_label_set(
        self, request: schema.LabelRequest, environment: Mapping[str, str | int]
    ) -> LabelSet:
        """Return the label set of a request, made if it is not there, as long as the frame axis."""
        with writing(self.url):
            return LabelSet(self, self._ensure_group(request, environment))

    def ensure_frame_set(
        self, request: schema.FrameRequest, environment: Mapping[str, str | int]
    ) -> FrameSet:
        """Return the frame set of a request, made if it is not there, as long as the frame axis."""
        with writing(self.url):
            return FrameSet(self, self._ensure_group(request, environment))

    def label_set(self, name: str | None = None) -> LabelSet:
        """Open a label set by its name or the beginning of it; without a name, the only one.

        Raises:
            LabelSetNotFoundError: If none or several match.
        """
        return LabelSet(self, self._find_group("labels", name))

    def frame_set(self, name: str) -> FrameSet:
        """Open a frame set by its name or the beginning of it.

        Raises:
            LabelSetNotFoundError: If none or several match.
        """
        return FrameSet(self, self._find_group("frames", name))

    def find_frame_set(self, *, height: int, width: int) -> FrameSet | None:
        """Return the fullest frame set of a size, or nothing if there is none."""
        fitting = [
            frames for frames in self.frame_sets if (frames.height, frames.width) == (height, width)
        ]
        return max(fitting, key=lambda frames: frames.num_committed, default=None)

    def log_run(self, **entry: Any) -> None:  # noqa: ANN401 - any JSON value
        """Add a line to the log of this run, which is not part of the store's content."""
        self._log.append(json.dumps({"time": time.time(), "pid": os.getpid(), **entry}))
        self.place.write(self._log_key, "".join(f"{line}\n" for line in self._log).encode())

    @property
    def _video_table(self) -> Mapping[str, Any]:
        # Written also where all values are the fill value: a chunk that is gone is then damage.
        with zarr.config.set({"array.write_empty_chunks": True}):
            group = group_in(self._group, "videos")
            return {name: array_in(group, name) for name in schema.VIDEO_COLUMNS}

    def _append_rows(self, rows: Sequence[VideoRow]) -> None:
        start, stop = self._num_rows, self._num_rows + len(rows)
        for name, array in self._video_table.items():
            array.resize((stop, *array.shape[1:]))
            values: npt.NDArray[Any]
            if name == "superseded_by":
                values = np.full(len(rows), schema.LIVE)
            elif name == "content_hash":
                digests = b"".join(row.content_hash for row in rows)
                values = np.frombuffer(digests, np.uint8).reshape(len(rows), -1)
            else:
                dtype = object if array.dtype.kind in "OT" else array.dtype
                values = np.array([getattr(row, name) for row in rows], dtype)
            array[start:stop] = values

    def _ensure_group(
        self,
        request: schema.LabelRequest | schema.FrameRequest,
        environment: Mapping[str, str | int],
    ) -> zarr.Group:
        folder = group_in(self._group, request.folder)
        if request.name not in folder:
            folder.create_group(request.name)
        group = group_in(folder, request.name)
        _ensure_arrays(group, request, self._num_frames)
        if group.attrs.get("dropped"):
            raise TargetStoreError(
                f"{request.name} is being dropped from {self.url}; finish that with: tinyhd store "
                f"drop {self.url}"
            )
        found = group.attrs.get("fingerprint", request.attributes["fingerprint"])
        if found != request.attributes["fingerprint"]:
            raise TargetStoreError(f"{group.path} in {self.url} was made for another request")
        if "fingerprint" not in group.attrs:  # written last: a set without it is not one yet
            names = [array.name for array in request.arrays]
            attributes = {**request.attributes, "arrays": names, "environment": dict(environment)}
            group.attrs.update({**attributes, "digest": schema.digest(attributes)})
        return group

    def _sets(self, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield names and attributes of sets, also of those in the making or being dropped."""
        for name in sorted(self.place.folders(folder)):
            key = f"{folder}/{name}/zarr.json"
            try:
                attributes = dict(json.loads(self.place.read(key))["attributes"])
            except FileNotFoundError:
                continue  # in the making
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise TargetStoreError(
                    f"{key} in {self.url} is damaged ({error!r}); find out more with: tinyhd store "
                    f"verify {self.url}"
                ) from error
            yield name, attributes

    def _groups(self, folder: str) -> list[tuple[str, zarr.Group]]:
        return [
            (name, group_in(self._group, f"{folder}/{name}"))
            for name, attributes in self._sets(folder)
            if "fingerprint" in attributes and not attributes.get("dropped")
        ]

    def _find_group(self, folder: str, name: str | None) -> zarr.Group:
        groups = self._groups(folder)
        exact = [group for n, group in groups if n == name]
        matches = exact or [group for n, group in groups if name is None or n.startswith(name)]
        if name is None and len(matches) > 1:  # sets that no run has put anything into do not count
            matches = [g for g in matches if np.any(np.asarray(array_in(g, "receipts")[:]))]
        if len(matches) == 1:
            return matches[0]
        there = ", ".join(n for n, _ in groups) or "none at all"
        wanted = "say which one with --labels" if name is None else f"{name!r} was asked for"
        raise LabelSetNotFoundError(f"{self.url} holds these {folder}: {there}; {wanted}")


def check_root(place: Place) -> None:
    """Make sure that a place holds a target store that this program reads.

    Raises:
        NotATargetStoreError: If there is no store.
        FormatVersionError: If it is of another version of the format.
        TargetStoreError: If the place cannot be read.
    """
    where = place.url
    try:
        metadata = json.loads(place.read("zarr.json"))
    except FileNotFoundError as error:
        if place.is_there():
            raise NotATargetStoreError(f"{where} is not a target store") from error
        raise NotATargetStoreError(
            f"{where} does not exist; make it with: tinyhd distill VIDEOS --teacher pqft "
            f"--store {where}"
        ) from error
    except NotADirectoryError as error:
        raise NotATargetStoreError(f"{where} is a file, not a target store") from error
    except OSError as error:
        raise TargetStoreError(f"cannot open {where}: {error}") from error
    except ValueError as error:
        raise NotATargetStoreError(
            f"{where} is not a target store, or its zarr.json is damaged"
        ) from error
    attributes = metadata.get("attributes") if isinstance(metadata, dict) else None
    if not isinstance(attributes, dict):
        raise NotATargetStoreError(f"{where} is not a target store, or its zarr.json is damaged")
    if attributes.get("format") != schema.FORMAT:
        raise NotATargetStoreError(f"{where} is a Zarr group, but not a target store")
    if (version := attributes.get("version")) != schema.VERSION:
        raise FormatVersionError(
            f"{where} has format version {version}, this program reads version "
            f"{schema.VERSION}; use the tinyhd release that wrote it, or a newer one"
        )


def empty_set(request: schema.LabelRequest | schema.FrameRequest) -> dict[str, dict[str, Any]]:
    """Return the metadata of the arrays of a set without shards, by their keys in a store."""
    objects: dict[str, Buffer] = {}
    path = f"{request.folder}/{request.name}"
    _ensure_arrays(zarr.create_group(MemoryStore(objects), path=path), request, 0)
    return {
        key: json.loads(data.to_bytes())
        for key, data in objects.items()
        if key.startswith(f"{path}/") and key != f"{path}/zarr.json"
    }


def empty_store() -> dict[str, bytes]:
    """Return the objects of a store without videos, its root last."""
    objects: dict[str, Buffer] = {}
    group = zarr.create_group(
        MemoryStore(objects), attributes={"format": schema.FORMAT, "version": schema.VERSION}
    )
    videos = group.create_group("videos")
    for name, (dtype, fill_value) in schema.VIDEO_COLUMNS.items():
        wide = name == "content_hash"
        videos.create_array(
            name,
            shape=(0, schema.DIGEST_BYTES) if wide else (0,),
            chunks=(schema.VIDEO_CHUNK, schema.DIGEST_BYTES) if wide else (schema.VIDEO_CHUNK,),
            dtype=dtype,
            fill_value=fill_value,
            dimension_names=("video", "byte") if wide else ("video",),
            compressors=(ZstdCodec(), Crc32cCodec()),
        )
    for folder in ("labels", "frames", "runs"):
        group.create_group(folder)
    keys = sorted(objects, key=lambda key: (key == "zarr.json", key))
    return {key: objects[key].to_bytes() for key in keys}


def _ensure_arrays(
    group: zarr.Group, request: schema.LabelRequest | schema.FrameRequest, length: int
) -> None:
    """Make a set's arrays, or make them as long as the frame axis."""
    shards = length // request.shard_frames
    for array in request.arrays:
        if array.name not in group:
            group.create_array(
                array.name,
                shape=(length, *array.shape),
                shards=(request.shard_frames, *array.shape),
                chunks=(array.format.chunk_frames, *array.shape),
                dtype=array.dtype,
                fill_value=array.fill_value,
                dimension_names=("frame", *array.axes),
                chunk_key_encoding={"name": "default", "separator": "."},
                **array.format.packing.codecs,
            )
        else:
            _lengthen(array_in(group, array.name), length)
    if "receipts" not in group:
        num_arrays = len(request.arrays)
        group.create_array(
            "receipts",
            shape=(shards, num_arrays, schema.DIGEST_BYTES),
            chunks=(schema.RECEIPT_CHUNK, num_arrays, schema.DIGEST_BYTES),
            dtype="uint8",
            fill_value=0,
            dimension_names=("shard", "array", "byte"),
            compressors=Crc32cCodec(),
        )
    else:
        _lengthen(array_in(group, "receipts"), shards)


def _aligned(frames: int) -> int:
    return -(-frames // schema.FRAME_ALIGNMENT) * schema.FRAME_ALIGNMENT


def _lengthen(array: zarr.Array[Any], length: int) -> None:
    if array.shape[0] < length:
        array.resize((length, *array.shape[1:]))
