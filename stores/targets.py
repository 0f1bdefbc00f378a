"""The target store: a teacher's soft targets, written once, read by every experiment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, overload

from stores import schema
from stores.codec import silence_codec_remark
from stores.errors import (
    DamagedStoreError,
    LabelSetNotFoundError,
    NotATargetStoreError,
    TargetStoreError,
    VideoChangedError,
    VideoNotFoundError,
)
from stores.lease import Lease, take_lease
from stores.metadata import (
    METADATA,
    check_root,
    empty_set,
    empty_store,
    encode_metadata,
    read_attributes,
    read_metadata,
    write_length,
    write_metadata,
)
from stores.places import Place, open_place
from stores.receipts import lengthen_receipts
from stores.run_log import RunLog
from stores.shards import FrameSet, LabelSet, Request, ShardSet, is_dropped
from stores.table import LENGTH, VideoRow, read_table, write_rows
from stores.videos import VideoRecord

Mode = Literal["r", "r+"]


class TargetStore:
    """A folder of soft targets in Zarr format 3; see ``docs/store-format.md``.

    Use :meth:`open` or :meth:`create`. A store that is open for writing (mode ``r+``) has one
    driver, which holds :meth:`writer`; workers write shards and commit nothing.
    """

    def __init__(self, place: Place, *, mode: Mode, with_videos: bool = True) -> None:
        self.place = place
        self.url = place.url
        self._mode = mode
        self._lease: Lease | None = None
        self._log = RunLog(place)
        self.videos: list[VideoRow] = []
        """Rows of videos that count, in the order of the store."""
        self.rows: list[VideoRow] = []
        """All rows, also of videos that were dropped or replaced."""
        self._take_rows(read_table(place) if with_videos else [])

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
        place.create({key: encode_metadata(data) for key, data in empty_store().items()})
        return cls.open(where, mode="r+")

    @classmethod
    def open(cls, where: str | Path, *, mode: Mode = "r", with_videos: bool = True) -> TargetStore:
        """Open a store.

        Args:
            where: A path, or a URL of an object store.
            mode: ``r`` to read, ``r+`` to write, too.
            with_videos: Whether the table of videos is read, which a worker does not need.

        Raises:
            NotATargetStoreError: If there is no store.
            FormatVersionError: If the store is of another version of the format.
            DamagedStoreError: If its table of videos is damaged.
        """
        silence_codec_remark()
        place = open_place(where)
        check_root(place)
        return cls(place, mode=mode, with_videos=with_videos)

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
                self._mark({})
                yield lease.token
            finally:
                self._log.write()
                self._lease = None

    def check_driver(self) -> None:
        """Make sure that this process may write; inside :meth:`writer`, still is the driver.

        Raises:
            TargetStoreError: If the store was opened for reading.
            StoreBusyError: If another process has taken over.
        """
        if self._mode == "r":
            raise TargetStoreError(f"{self.url} was opened for reading, not for writing")
        if self._lease is not None:
            self._lease.check()

    def refresh(self) -> None:
        """Read the table of videos again.

        Raises:
            DamagedStoreError: If it is damaged.
        """
        self._take_rows(read_table(self.place))

    def _take_rows(self, rows: list[VideoRow]) -> None:
        self.rows = rows
        # Of several rows with one id the last counts: a process may have died before it could mark
        # the one that it replaced.
        self._unmarked: dict[int, int] = {}
        last: dict[str, int] = {}
        for number in reversed(range(len(self.rows))):
            row = self.rows[number]
            later = last.setdefault(row.id, number)
            if later != number and row.superseded_by == schema.LIVE:
                self.rows[number] = replace(row, superseded_by=later)
                self._unmarked[number] = later
        self._num_frames = max((row.first + _aligned(row.frames) for row in self.rows), default=0)
        self._number_of = {
            row.id: number
            for number, row in enumerate(self.rows)
            if row.superseded_by == schema.LIVE
        }
        self.videos = [self.rows[number] for number in self._number_of.values()]
        self._by_content = {video.content_hash: video for video in self.videos}

    @property
    def num_frames(self) -> int:
        """Length of the frame axis: where the next video will begin."""
        return self._num_frames

    def video(self, video_id: str) -> VideoRow:
        """Return the row of a video.

        Raises:
            VideoNotFoundError: If the store has no such video.
        """
        if video_id not in self._number_of:
            raise VideoNotFoundError(f"{self.url} has no video {video_id!r}")
        return self.rows[self._number_of[video_id]]

    def find_video(self, video_id: str) -> VideoRow | None:
        """Return the row of a video, or nothing if the store does not know it."""
        number = self._number_of.get(video_id)
        return None if number is None else self.rows[number]

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
            TargetStoreError: If equal content has another number of frames in the store.
        """
        new: list[VideoRow] = []
        replaced: dict[int, int] = {}
        end = self._num_frames
        same = dict(self._by_content)
        for record in records:
            known = self.find_video(record.id)
            if known is not None and known.content_hash == record.content_hash:
                continue
            if known is not None:
                if not replace_changed:
                    raise VideoChangedError(
                        f"{record.absolute} is not the video {record.id!r} that {self.url} was "
                        "labelled from: its content has changed; give it another name"
                    )
                replaced[self._number_of[record.id]] = len(self.rows) + len(new)
            values = {field.name: getattr(record, field.name) for field in fields(VideoRecord)}
            twin = same.get(record.content_hash)
            if twin is not None and twin.frames != record.frames:
                raise TargetStoreError(
                    f"{record.absolute} has {record.frames} frames here, and {twin.frames} in "
                    f"{self.url}: another decoder; use the same --reader for all runs"
                )
            row = VideoRow(**values, first=end if twin is None else twin.first)
            if twin is None:
                end += _aligned(record.frames)
                same[record.content_hash] = row
            new.append(row)
        if new:
            columns = [name for name in schema.VIDEO_COLUMNS if name != LENGTH]
            self._write_rows([*self.rows, *new], len(self.rows), [*columns, LENGTH])
            self._mark(replaced)

    def drop_videos(self, video_ids: Sequence[str]) -> None:
        """Take videos out of the store; what was stored of them is deleted by :func:`sweep`.

        Those that were dropped before are passed over.

        Raises:
            VideoNotFoundError: If the store never had such a video.
        """
        dropped = {row.id for row in self.rows if row.superseded_by == schema.DROPPED}
        wanted = [name for name in video_ids if name in self._number_of or name not in dropped]
        for name in wanted:
            self.video(name)
        self.drop_rows([self._number_of[name] for name in wanted])

    def drop_rows(self, numbers: Sequence[int]) -> None:
        """Take rows out of the store, whether they count or were replaced."""
        self._mark(dict.fromkeys(numbers, schema.DROPPED))

    def _mark(self, changes: Mapping[int, int]) -> None:
        """Change ``superseded_by`` of rows, and of those that a process left without their mark."""
        changes = {**self._unmarked, **changes}
        if not changes:
            return
        rows = list(self.rows)
        for number, value in changes.items():
            rows[number] = replace(rows[number], superseded_by=value)
        self._write_rows(rows, min(changes), ["superseded_by"])

    def _write_rows(self, rows: Sequence[VideoRow], start: int, columns: Sequence[str]) -> None:
        self.check_driver()
        for _ in write_rows(self.place, rows, start, columns):
            self.check_driver()
        self.refresh()

    def drop_set(self, key: str) -> None:
        """Take a label set or frame set out of the store; :func:`sweep` deletes it.

        Args:
            key: Of its group, which may be damaged.
        """
        self.check_driver()
        try:
            metadata = read_metadata(self.place, f"{key}/{METADATA}")
            metadata["attributes"]["dropped"] = True
        except (DamagedStoreError, KeyError, TypeError):
            metadata = {"zarr_format": 3, "node_type": "group", "attributes": {"dropped": True}}
        write_metadata(self.place, f"{key}/{METADATA}", metadata)

    def adopt_set(self, other: ShardSet) -> LabelSet | FrameSet:
        """Return this store's set of the same fingerprint; made, without shards, if need be.

        Args:
            other: A set of another store.

        Raises:
            TargetStoreError: If the set is being dropped, or is damaged.
        """
        return self.ensure_set(other.request, other.attributes["environment"])

    def open_set(self, key: str) -> LabelSet | FrameSet:
        """Open the set whose group has a key.

        Raises:
            DamagedStoreError: If there is none, or it is damaged.
        """
        folder, _, name = key.partition("/")
        return LabelSet(self, name) if folder == LabelSet.folder else FrameSet(self, name)

    @property
    def label_sets(self) -> list[LabelSet]:
        """All label sets, ordered by name, but those that are damaged; see :attr:`damaged_sets`."""
        return [item for item in self._sets(LabelSet.folder) if isinstance(item, LabelSet)]

    @property
    def frame_sets(self) -> list[FrameSet]:
        """All frame sets, ordered by name, but those that are damaged; see :attr:`damaged_sets`."""
        return [item for item in self._sets(FrameSet.folder) if isinstance(item, FrameSet)]

    @property
    def damaged_sets(self) -> list[DamagedStoreError]:
        """What is wrong with the sets that cannot be opened."""
        return [
            item
            for folder in (LabelSet.folder, FrameSet.folder)
            for item in self._sets(folder)
            if isinstance(item, DamagedStoreError)
        ]

    @property
    def dropped_sets(self) -> list[str]:
        """Keys of sets that were dropped and are not yet deleted."""
        return [
            key
            for folder in (LabelSet.folder, FrameSet.folder)
            for key in self._keys(folder)
            if self._is_dropped(key)
        ]

    def label_set(self, name: str | None = None) -> LabelSet:
        """Open a label set by its name or the beginning of it; without a name, the only one.

        Raises:
            LabelSetNotFoundError: If none or several match.
            DamagedStoreError: If it is damaged.
        """
        keys = self.find_sets(LabelSet.folder, name)
        if name is None and len(keys) > 1:  # sets that no run has put anything into do not count
            keys = [item.key for item in self.label_sets if len(item.receipts)]
        return LabelSet(self, self._only(LabelSet.folder, name, keys))

    def frame_set(self, name: str) -> FrameSet:
        """Open a frame set by its name or the beginning of it.

        Raises:
            LabelSetNotFoundError: If none or several match.
            DamagedStoreError: If it is damaged.
        """
        keys = self.find_sets(FrameSet.folder, name)
        return FrameSet(self, self._only(FrameSet.folder, name, keys))

    def find_sets(self, folder: str, name: str | None) -> list[str]:
        """Return the keys of sets, damaged ones too, by their name or its beginning.

        Args:
            folder: ``labels`` or ``frames``.
            name: All if not given.
        """
        keys = [key for key in self._keys(folder) if not self._is_dropped(key)]
        exact = [key for key in keys if key == f"{folder}/{name}"]
        return exact or [key for key in keys if key.startswith(f"{folder}/{name or ''}")]

    def find_frame_set(self, *, height: int, width: int) -> FrameSet | None:
        """Return the fullest frame set of a size, or nothing if there is none."""
        fitting = [
            frames for frames in self.frame_sets if (frames.height, frames.width) == (height, width)
        ]
        return max(fitting, key=lambda frames: len(frames.receipts), default=None)

    def log_run(self, **entry: Any) -> None:  # noqa: ANN401 - any JSON value
        """Add a line to the log of this run, which is not part of the store's content."""
        self._log.add(entry)

    @overload
    def ensure_set(
        self, request: schema.LabelRequest, environment: Mapping[str, str | int]
    ) -> LabelSet: ...
    @overload
    def ensure_set(
        self, request: schema.FrameRequest, environment: Mapping[str, str | int]
    ) -> FrameSet: ...
    @overload
    def ensure_set(
        self, request: Request, environment: Mapping[str, str | int]
    ) -> LabelSet | FrameSet: ...
    def ensure_set(
        self,
        request: Request,
        environment: Mapping[str, str | int],
    ) -> LabelSet | FrameSet:
        """Return the set of a request, made if it is not there, as long as the frame axis.

        Raises:
            TargetStoreError: If the set is being dropped, or is damaged.
        """
        self.check_driver()
        key = f"{request.folder}/{request.name}"
        attributes = {**request.attributes, "environment": dict(environment)}
        objects = empty_set(request, {**attributes, "digest": schema.digest(attributes)})
        there = {name for name in objects if self._is_there(name)}
        if f"{key}/{METADATA}" in there:
            if self._is_dropped(key):
                raise TargetStoreError(
                    f"{request.name} is being dropped from {self.url}; finish that with: tinyhd "
                    f"store drop {self.url}"
                )
            found = read_attributes(self.place, key).get("fingerprint")
            if found != request.attributes["fingerprint"]:
                raise TargetStoreError(f"{key} in {self.url} was made for another request")
        *arrays, group = objects
        for name in arrays:
            if name not in there:
                self.check_driver()
                write_metadata(self.place, name, objects[name])
        self.check_driver()
        shards = self._num_frames // request.shard_frames
        lengthen_receipts(self.place, f"{key}/receipts", len(request.arrays), shards)
        for array in request.arrays:
            write_length(self.place, f"{key}/{array.name}", self._num_frames)
        if group not in there:  # the last: without it, there is no set
            write_metadata(self.place, group, objects[group])
        return self.open_set(key)

    def _is_there(self, key: str) -> bool:
        try:
            self.place.read(key)
        except FileNotFoundError:
            return False
        return True

    def _keys(self, folder: str) -> list[str]:
        """Return the keys of sets, of those being dropped too, but of none in the making."""
        keys = (f"{folder}/{name}" for name in sorted(self.place.folders(folder)))
        return [key for key in keys if self._has_group(key)]

    def _has_group(self, key: str) -> bool:
        try:
            self.place.read(f"{key}/{METADATA}")
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return True

    def _is_dropped(self, key: str) -> bool:
        try:
            return is_dropped(read_attributes(self.place, key))
        except DamagedStoreError:
            return False

    def _sets(self, folder: str) -> Iterator[LabelSet | FrameSet | DamagedStoreError]:
        for key in self.find_sets(folder, None):
            try:
                yield self.open_set(key)
            except DamagedStoreError as error:
                yield error

    def _only(self, folder: str, name: str | None, keys: Sequence[str]) -> str:
        """Return the name of the only set of several, or raise an error that lists them."""
        if len(keys) == 1:
            return keys[0].removeprefix(f"{folder}/")
        there = [key.removeprefix(f"{folder}/") for key in self.find_sets(folder, None)]
        wanted = "say which one with --labels" if name is None else f"{name!r} was asked for"
        raise LabelSetNotFoundError(
            f"{self.url} holds these {folder}: {', '.join(there) or 'none at all'}; {wanted}"
        )


def _aligned(frames: int) -> int:
    return -(-frames // schema.FRAME_ALIGNMENT) * schema.FRAME_ALIGNMENT
