"""The target store: a teacher's soft targets, written once, read by every experiment."""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from filelock import FileLock, Timeout

from stores import schema
from stores.codec import silence_codec_remark
from stores.errors import (
    FormatVersionError,
    LabelSetNotFoundError,
    NotATargetStoreError,
    StoreBusyError,
    TargetStoreError,
    VideoChangedError,
    VideoNotFoundError,
)
from stores.shards import FrameSet, LabelSet, VideoRow, array_in, group_in, token_path
from stores.videos import VideoRecord

Mode = Literal["r", "r+"]


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
        if building.exists():  # of a killed process that had this number
            shutil.rmtree(building)
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
        try:
            building.rename(path)
        except OSError:  # another process was faster
            shutil.rmtree(building)
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
        except Exception as error:  # zarr fails in any way on metadata that is not its own
            raise NotATargetStoreError(f"{path} is not a target store") from error
        if group.attrs.get("format") != schema.FORMAT:
            raise NotATargetStoreError(f"{path} is a Zarr group, but not a target store")
        if (version := group.attrs.get("version")) != schema.VERSION:
            raise FormatVersionError(
                f"{path} has format version {version}, this program reads version "
                f"{schema.VERSION}; use the tinyhd release that wrote it, or a newer one"
            )
        try:
            return cls(path, group)
        except TargetStoreError:
            raise
        except Exception as error:  # damaged chunks make a codec fail in any way
            raise TargetStoreError(f"the table of videos in {path} is damaged: {error}") from error

    @classmethod
    def open_if_there(cls, path: Path, *, mode: Mode = "r") -> TargetStore | None:
        """Open a store, or return nothing if there is only an empty folder or less."""
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return None
        return cls.open(path, mode=mode)

    @classmethod
    def open_or_create(cls, path: Path) -> TargetStore:
        """Open a store for writing; make it if there is none."""
        return cls.open_if_there(path, mode="r+") or cls.create(path)

    @contextmanager
    def writer(self) -> Iterator[str]:
        """Be the store's one driver, and tidy up after one that was killed.

        Yields:
            A token for :meth:`ShardSet.write_only_for`: workers of a driver that was killed stop
            writing when the next one takes over.

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
            token = uuid.uuid4().hex
            token_path(self.path).write_text(token)
            for leftover in self.path.rglob("*.partial"):
                leftover.unlink(missing_ok=True)
            self.refresh()
            yield token

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
            if superseded_by == schema.LIVE:
                self.videos.append(video)
        self._by_id = {video.id: video for video in self.videos}
        self._by_content = {video.content_hash: video for video in self.videos}

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

    def find_content(self, content_hash: bytes) -> VideoRow | None:
        """Return a row with the given content, under whatever id."""
        return self._by_content.get(content_hash)

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

    def frame_set(self, name: str) -> FrameSet:
        """Open a frame set by its name or the beginning of it.

        Raises:
            LabelSetNotFoundError: If none or several match.
        """
        return FrameSet(self, self._find_group("frames", name))

    def find_frame_set(self, *, height: int, width: int) -> FrameSet | None:
        """Return the fullest frame set of a size, or nothing if there is none."""
        sets = [FrameSet(self, group) for _, group in self._groups("frames")]
        fitting = [frames for frames in sets if (frames.height, frames.width) == (height, width)]
        return max(fitting, key=lambda frames: frames.num_committed, default=None)

    def log_run(self, **entry: Any) -> None:  # noqa: ANN401 - any JSON value
        """Add a line to the store's log of runs, which is not part of its content."""
        line = json.dumps({"time": time.time(), "pid": os.getpid(), **entry})
        with (self.path / "runs" / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    @property
    def _video_table(self) -> Mapping[str, Any]:
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
        length, shards = self._num_frames, self._num_frames // request.shard_frames
        if request.name not in folder:
            folder.create_group(request.name)
        group = group_in(folder, request.name)
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
                compressors=None,
            )
        else:
            _lengthen(array_in(group, "receipts"), shards)
        if group.attrs.get("dropped"):
            raise TargetStoreError(f"{request.name} is being dropped from {self.path}")
        found = group.attrs.get("fingerprint", request.attributes["fingerprint"])
        if found != request.attributes["fingerprint"]:
            raise TargetStoreError(f"{group.path} in {self.path} was made for another request")
        if "fingerprint" not in group.attrs:  # written last: a set without it is not one yet
            names = [array.name for array in request.arrays]
            group.attrs.update(
                {**request.attributes, "arrays": names, "environment": dict(environment)}
            )
        return group

    def _groups(self, folder: str) -> list[tuple[str, zarr.Group]]:
        members = group_in(self._group, folder).groups()
        return sorted(
            (name, group)
            for name, group in members
            if "fingerprint" in group.attrs and not group.attrs.get("dropped")
        )

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
        raise LabelSetNotFoundError(f"{self.path} holds these {folder}: {there}; {wanted}")


def _aligned(frames: int) -> int:
    return -(-frames // schema.FRAME_ALIGNMENT) * schema.FRAME_ALIGNMENT


def _lengthen(array: zarr.Array[Any], length: int) -> None:
    if array.shape[0] < length:
        array.resize((length, *array.shape[1:]))
