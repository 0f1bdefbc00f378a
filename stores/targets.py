"""The target store: a teacher's soft targets, written once, read by every experiment."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import zarr
from filelock import FileLock, Timeout
from zarr.errors import GroupNotFoundError, NodeTypeValidationError

from stores import schema
from stores.codec import check_planes, silence_codec_remark
from stores.errors import (
    FormatVersionError,
    LabelSetNotFoundError,
    NotATargetStoreError,
    StoreBusyError,
    TargetStoreError,
    VideoChangedError,
    VideoNotFoundError,
    VideoNotLabelledError,
)
from stores.maps import MapLayout
from stores.videos import VideoRecord

NO_RECEIPT: Final = bytes(schema.DIGEST_BYTES)
Mode = Literal["r", "r+"]


@dataclass(frozen=True, kw_only=True)
class VideoRow(VideoRecord):
    """A video of a store: its record and its place on the frame axis."""

    first: int
    """Offset of the video's frame 0 on the frame axis of every label set."""


@dataclass(frozen=True)
class Receipt:
    """Proof that a shard is on the disk, whole: a SHA-256 for each of the shard set's arrays."""

    shard: int
    digests: tuple[bytes, ...]


class TargetStore:
    """A folder of soft targets in Zarr format 3; see ``docs/store-format.md``.

    Use :meth:`open` or :meth:`create`. A store that is open for writing (mode ``r+``) has one
    driver, which holds :meth:`writer`; workers write shards and commit nothing.
    """

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self._group = group
        self.videos: list[VideoRow] = []
        """Rows of videos that are not superseded, in the order of the store."""
        self.refresh()

    @classmethod
    def create(cls, path: Path) -> TargetStore:
        """Make an empty store.

        Raises:
            NotATargetStoreError: If something else lies at ``path``.
        """
        silence_codec_remark()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise NotATargetStoreError(f"{path} is there already and is no target store")
        # Made beside its place and then renamed, so that a store is there whole or not at all.
        building = path.with_name(f".{path.name}.{os.getpid()}.partial")
        attributes = {"format": schema.FORMAT, "version": schema.VERSION}
        group = zarr.create_group(building, attributes=attributes)
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
            )
        for folder in ("labels", "frames", "runs"):
            group.create_group(folder)
        building.rename(path)
        return cls.open(path, mode="r+")

    @classmethod
    def open(cls, path: Path, *, mode: Mode = "r") -> TargetStore:
        """Open a store.

        Raises:
            NotATargetStoreError: If there is no store at ``path``.
            FormatVersionError: If the store is of another version of the format.
        """
        silence_codec_remark()
        if not path.exists():
            raise NotATargetStoreError(
                f"{path} does not exist; make it with: tinyhd distill VIDEOS --teacher pqft "
                f"--store {path}"
            )
        try:
            group = zarr.open_group(path, mode=mode, zarr_format=3)
        except (GroupNotFoundError, NodeTypeValidationError, ValueError, OSError) as error:
            raise NotATargetStoreError(f"{path} is not a target store") from error
        if group.attrs.get("format") != schema.FORMAT:
            raise NotATargetStoreError(f"{path} is a Zarr group, but not a target store")
        if (version := group.attrs.get("version")) != schema.VERSION:
            raise FormatVersionError(
                f"{path} has format version {version}, this program reads version "
                f"{schema.VERSION}; use the tinyhd release that wrote it, or a newer one"
            )
        return cls(path, group)

    @classmethod
    def open_or_create(cls, path: Path) -> TargetStore:
        """Open a store for writing; make it if there is none."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            return cls.open(path, mode="r+")
        return cls.create(path)

    @contextmanager
    def writer(self) -> Iterator[None]:
        """Be the store's one driver, and tidy up after one that was killed.

        Raises:
            StoreBusyError: If another process is the driver.
        """
        lock = FileLock(self.path / "runs" / "lease")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreBusyError(
                f"{self.path} is being written by another process; wait for it or stop it"
            ) from error
        with lock:
            for leftover in self.path.rglob("*.partial"):
                leftover.unlink(missing_ok=True)
            self.refresh()
            yield

    def refresh(self) -> None:
        """Read the table of videos again."""
        table = self._video_table
        first: npt.NDArray[np.int64] = np.asarray(table["first"][:])
        rows = int((first >= 0).sum())
        columns = {name: np.asarray(table[name][:rows]) for name in schema.VIDEO_COLUMNS}
        self._num_rows = rows
        self._num_frames = 0
        self.videos = []
        for row in range(rows):
            values = {name: column[row] for name, column in columns.items()}
            values["content_hash"] = values["content_hash"].tobytes()
            plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()}
            superseded_by = plain.pop("superseded_by")
            video = VideoRow(**plain)
            self._num_frames = max(self._num_frames, video.first + _aligned(video.frames))
            if superseded_by < 0:
                self.videos.append(video)
        self._by_id = {video.id: video for video in self.videos}

    def video(self, video_id: str) -> VideoRow:
        """Return the row of a video.

        Raises:
            VideoNotFoundError: If the store has no such video.
        """
        if video_id not in self._by_id:
            raise VideoNotFoundError(f"{self.path} has no video {video_id!r}")
        return self._by_id[video_id]

    def find_video(self, video_id: str) -> VideoRow | None:
        """Return the row of a video, or nothing if the store does not know it."""
        return self._by_id.get(video_id)

    def frames_of(self, content_hash: bytes) -> VideoRow | None:
        """Return a row with the given content, under whatever id."""
        return next((row for row in self.videos if row.content_hash == content_hash), None)

    def add_videos(self, records: Sequence[VideoRecord]) -> None:
        """Append rows for videos that the store does not know; known ones are passed over.

        Videos with equal content share a range of the frame axis.

        Raises:
            VideoChangedError: If the store knows an id with other content.
        """
        new: list[VideoRow] = []
        end = self._num_frames
        first_of = {row.content_hash: row.first for row in self.videos}
        for record in records:
            known = self._by_id.get(record.id)
            if known is not None:
                if known.content_hash != record.content_hash:
                    raise VideoChangedError(
                        f"{record.absolute} is not the video {record.id!r} that {self.path} was "
                        "labelled from: its content has changed; give it another name"
                    )
                continue
            first = first_of.setdefault(record.content_hash, end)
            if first == end:
                end += _aligned(record.frames)
            values = {field.name: getattr(record, field.name) for field in fields(VideoRecord)}
            new.append(VideoRow(**values, first=first))
        if new:
            self._append_rows(new)
            self.refresh()

    def ensure_label_set(
        self, request: schema.LabelRequest, environment: Mapping[str, str | int]
    ) -> LabelSet:
        """Return the label set of a request, made if it is not there, as long as the frame axis."""
        return LabelSet(self, self._ensure_group(request, environment))

    def ensure_frame_set(
        self, request: schema.FrameRequest, environment: Mapping[str, str | int]
    ) -> FrameSet:
        """Return the frame set of a request, made if it is not there, as long as the frame axis."""
        return FrameSet(self, self._ensure_group(request, environment))

    def label_set(self, name: str | None = None) -> LabelSet:
        """Open a label set by its name or the beginning of it; without a name, the only one.

        Raises:
            LabelSetNotFoundError: If none or several match.
        """
        return LabelSet(self, self._find_group("labels", name))

    def frame_set(self, *, height: int, width: int) -> FrameSet | None:
        """Open the frame set of a size, or return nothing if there is none."""
        groups = [g for n, g in self._groups("frames") if n.startswith(f"rgb-{height}x{width}-")]
        return FrameSet(self, groups[-1]) if groups else None

    def log_run(self, **entry: Any) -> None:  # noqa: ANN401 - any JSON value
        """Add a line to the store's log of runs, which is not part of its content."""
        line = json.dumps({"time": time.time(), "pid": os.getpid(), **entry})
        with (self.path / "runs" / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    @property
    def num_frames(self) -> int:
        """Length of the frame axis."""
        return self._num_frames

    @property
    def _video_table(self) -> Mapping[str, Any]:
        group = self._group["videos"]
        return {name: group[name] for name in schema.VIDEO_COLUMNS}

    def _append_rows(self, rows: Sequence[VideoRow]) -> None:
        start, stop = self._num_rows, self._num_rows + len(rows)
        for name, array in self._video_table.items():
            array.resize((stop, *array.shape[1:]))
            if name == "superseded_by":
                values = np.full(len(rows), -1)
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
        folder = self._group[request.folder]
        assert isinstance(folder, zarr.Group)
        length, shards = self._num_frames, self._num_frames // request.shard_frames
        if request.name not in folder:
            folder.create_group(request.name)
        group = folder[request.name]
        assert isinstance(group, zarr.Group)
        for array in request.arrays:
            if array.name not in group:
                group.create_array(
                    array.name,
                    shape=(length, *array.shape),
                    shards=(request.shard_frames, *array.shape),
                    chunks=(array.chunk_frames, *array.shape),
                    dtype=array.dtype,
                    fill_value=array.fill_value,
                    dimension_names=("frame", *array.axes),
                    chunk_key_encoding={"name": "default", "separator": "."},
                    **array.codecs,
                )
            elif group[array.name].shape[0] < length:
                group[array.name].resize((length, *array.shape))
        if "receipts" not in group:
            num_arrays = len(request.arrays)
            group.create_array(
                "receipts",
                shape=(shards, num_arrays, schema.DIGEST_BYTES),
                chunks=(schema.RECEIPT_CHUNK, num_arrays, schema.DIGEST_BYTES),
                dtype="uint8",
                fill_value=0,
                dimension_names=("shard", "array", "byte"),
                compressors=None,
            )
        elif group["receipts"].shape[0] < shards:
            group["receipts"].resize((shards, *group["receipts"].shape[1:]))
        if "fingerprint" not in group.attrs:  # written last: a set without it is not one yet
            names = [array.name for array in request.arrays]
            group.attrs.update(
                {**request.attributes, "arrays": names, "environment": dict(environment)}
            )
        return group

    def _groups(self, folder: str) -> list[tuple[str, zarr.Group]]:
        members = self._group[folder].groups()
        return sorted((name, group) for name, group in members if "fingerprint" in group.attrs)

    def _find_group(self, folder: str, name: str | None) -> zarr.Group:
        groups = self._groups(folder)
        exact = [group for n, group in groups if n == name]
        matches = exact or [group for n, group in groups if name is None or n.startswith(name)]
        if len(matches) == 1:
            return matches[0]
        there = ", ".join(n for n, _ in groups) or "none at all"
        wanted = "one label set is needed" if name is None else f"{name!r} was asked for"
        raise LabelSetNotFoundError(f"{self.path}: {wanted}, there are: {there}")


class ShardSet:
    """Arrays along the frame axis that are filled shard by shard, with a receipt for each shard."""

    def __init__(self, store: TargetStore, group: zarr.Group) -> None:
        self.store = store
        self.name: str = group.basename
        self.attributes = dict(group.attrs)
        self.fingerprint = str(self.attributes["fingerprint"])
        self.shard_frames = int(self.attributes["shard_frames"])  # type: ignore[call-overload]
        self.array_names: list[str] = list(self.attributes["arrays"])  # type: ignore[call-overload]
        self._group = group
        # A shard of black frames equals the fill value, and must be written all the same.
        write_all = {"write_empty_chunks": True}
        self._arrays = {name: _array(group, name).with_config(write_all) for name in self.array_names}
        self._receipts = _array(group, "receipts")
        self.refresh()

    def refresh(self) -> None:
        """Read the receipts again."""
        self._committed = np.asarray(self._receipts[:])
        self._has_receipt = self._committed.any(axis=(1, 2))

    def shards(self, video: VideoRow) -> range:
        """Return the shards, counted along the whole frame axis, that hold a video's frames."""
        start = video.first // self.shard_frames
        return range(start, start + -(-video.frames // self.shard_frames))

    def frames_of(self, shard: int, video: VideoRow) -> range:
        """Return the frames of a video that lie in a shard."""
        start = shard * self.shard_frames - video.first
        return range(start, min(start + self.shard_frames, video.frames))

    def missing(self, video: VideoRow) -> list[int]:
        """Return the shards of a video that are not committed."""
        return [shard for shard in self.shards(video) if not self.is_committed(shard)]

    def is_committed(self, shard: int) -> bool:
        """Return whether a shard has a receipt."""
        return shard < len(self._has_receipt) and bool(self._has_receipt[shard])

    def coverage(self, video: VideoRow) -> list[range]:
        """Return the spans of a video's frames that are there, in order and as long as can be."""
        spans: list[range] = []
        for shard in self.shards(video):
            if self.is_committed(shard):
                span = self.frames_of(shard, video)
                if spans and spans[-1].stop == span.start:
                    span = range(spans.pop().start, span.stop)
                spans.append(span)
        return spans

    def write_shard(
        self, shard: int, data: Mapping[str, npt.NDArray[Any]], video: VideoRow
    ) -> Receipt:
        """Write a whole shard; it is not readable until its receipt is committed.

        Args:
            shard: Which one.
            data: For each array, the values of the video's frames in the shard, in order. A last
                shard is filled up by repeating its last frame.
            video: The video.

        Raises:
            TargetValueError: If a value cannot be stored.
            ValueError: If arrays or frames are missing.
        """
        span = self.frames_of(shard, video)
        if set(data) != set(self.array_names):
            raise ValueError(f"shard of {self.name} needs {self.array_names}, got {sorted(data)}")
        start = shard * self.shard_frames
        digests = []
        for name in self.array_names:
            values = data[name]
            if len(values) != len(span):
                raise ValueError(f"{name} needs {len(span)} frames, got {len(values)}")
            self._check(values, video, span)
            if filling := self.shard_frames - len(values):
                values = np.concatenate([values, np.repeat(values[-1:], filling, axis=0)])
            array = self._arrays[name]
            array[start : start + self.shard_frames] = values
            digests.append(_flush_and_hash(self._object_path(name, shard)))
        return Receipt(shard, tuple(digests))

    def commit(self, receipts: Iterable[Receipt]) -> None:
        """Make shards readable; only the store's driver does it."""
        touched = set()
        for receipt in receipts:
            digests = np.frombuffer(b"".join(receipt.digests), np.uint8)
            self._committed[receipt.shard] = digests.reshape(self._committed.shape[1:])
            self._has_receipt[receipt.shard] = True
            touched.add(receipt.shard // schema.RECEIPT_CHUNK)
        for chunk in sorted(touched):
            rows = slice(chunk * schema.RECEIPT_CHUNK, (chunk + 1) * schema.RECEIPT_CHUNK)
            self._receipts[rows] = self._committed[rows]

    def read_arrays(
        self, video: VideoRow, start: int, stop: int
    ) -> dict[str, npt.NDArray[Any]]:
        """Return the values of frames ``start`` to ``stop`` (exclusive), keyed by array.

        Raises:
            VideoNotLabelledError: If a frame of the span is outside the video or in a shard
                without a receipt.
        """
        if not 0 <= start < stop <= video.frames:
            raise VideoNotLabelledError(
                f"frames {start}-{stop} were asked of {video.id!r}, which has {video.frames}"
            )
        first, last = video.first + start, video.first + stop
        shards = range(first // self.shard_frames, -(-last // self.shard_frames))
        if not all(self.is_committed(shard) for shard in shards):
            raise VideoNotLabelledError(
                f"frames {start}-{stop} of {video.id!r} are not in {self.name} of "
                f"{self.store.path}; add them with: tinyhd distill VIDEOS --store {self.store.path}"
            )
        return {name: np.asarray(array[first:last]) for name, array in self._arrays.items()}

    def _check(self, values: npt.NDArray[Any], video: VideoRow, span: range) -> None:
        """Refuse values that the arrays cannot hold."""

    def _object_path(self, name: str, shard: int) -> Path:
        array = self._arrays[name]
        key = array.metadata.encode_chunk_key((shard,) + (0,) * (array.ndim - 1))
        return self.store.path / array.path / key


class LabelSet(ShardSet):
    """A teacher's stored soft targets."""

    def __init__(self, store: TargetStore, group: zarr.Group) -> None:
        super().__init__(store, group)
        try:
            self.layout = MapLayout.from_dict(self.attributes["maps"])  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise TargetStoreError(
                f"the attributes of {self.name} in {store.path} are damaged: {error}"
            ) from error

    @property
    def teacher(self) -> str:
        """Name of the teacher."""
        return str(self.attributes["teacher"])

    @property
    def window(self) -> int:
        """Frames that the teacher looks at to label one."""
        return int(self.attributes["provenance"]["window"])  # type: ignore[call-overload,index]

    def read(self, video: str, start: int, stop: int) -> dict[str, npt.NDArray[np.float32]]:
        """Return the native planes of frames ``start`` to ``stop`` (exclusive), keyed by array.

        Shape:
            each ``(stop - start, map, y, x)``, float32 logits or log-densities

        Raises:
            VideoNotFoundError: If the store does not know the video.
            VideoNotLabelledError: If a frame of the span has no committed targets.
        """
        return self.read_arrays(self.store.video(video), start, stop)

    def _check(self, values: npt.NDArray[Any], video: VideoRow, span: range) -> None:
        check_planes(values, video=video.id, first_frame=span.start)


class FrameSet(ShardSet):
    """Decoded frames of the videos at one size."""

    def read(self, video: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return frames ``start`` to ``stop`` (exclusive), ``(frame, y, x, channel)`` RGB.

        Raises:
            VideoNotFoundError: If the store does not know the video.
            VideoNotLabelledError: If a frame of the span is not kept.
        """
        return self.read_arrays(self.store.video(video), start, stop)[self.array_names[0]]


def _aligned(frames: int) -> int:
    return -(-frames // schema.FRAME_ALIGNMENT) * schema.FRAME_ALIGNMENT


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise TargetStoreError(f"{group.path}/{name} is not an array; the store is damaged")
    return array


def _flush_and_hash(path: Path) -> bytes:
    """Bring a file to the disk, so that a receipt never outlives its shard in a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").digest()
