"""Arrays along the frame axis that are filled shard by shard, with a receipt for each shard."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import zarr

from stores import schema
from stores.codec import check_planes
from stores.errors import StoreBusyError, TargetStoreError, VideoNotLabelledError
from stores.maps import MapLayout
from stores.videos import VideoRecord

if TYPE_CHECKING:
    from stores.targets import TargetStore


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


class ShardSet:
    """Arrays of one group, all along the frame axis, and their receipts."""

    def __init__(self, store: TargetStore, group: zarr.Group) -> None:
        self.store = store
        self.name: str = group.basename
        self.attributes: dict[str, Any] = dict(group.attrs)
        try:
            self.fingerprint = str(self.attributes["fingerprint"])
            self.shard_frames = int(self.attributes["shard_frames"])
            self.array_names = [str(name) for name in self.attributes["arrays"]]
            if self.shard_frames < 1:
                raise ValueError(f"shard_frames is {self.shard_frames}")
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(store, group, error) from error
        self._group = group
        # A shard of black frames equals the fill value, and must be written all the same.
        with zarr.config.set({"array.write_empty_chunks": True}):
            self._arrays = {name: array_in(group, name) for name in self.array_names}
        self._receipts = array_in(group, "receipts")
        self._token: str | None = None
        self._found: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read the receipts again.

        Raises:
            TargetStoreError: If they are damaged.
        """
        try:
            self._committed = np.asarray(self._receipts[:])
        except Exception as error:  # damaged chunks make a codec fail in any way
            raise TargetStoreError(
                f"the receipts of {self.name} in {self.store.path} are damaged: {error}"
            ) from error
        self._has_receipt: npt.NDArray[np.bool_] = np.any(self._committed, axis=(1, 2))

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

    @property
    def num_committed(self) -> int:
        """Shards that have a receipt."""
        return int(self._has_receipt.sum())

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
            StoreBusyError: If another driver has taken over the store.
            ValueError: If arrays or frames are missing.
        """
        if self._token is not None and token_path(self.store.path).read_text() != self._token:
            raise StoreBusyError(f"another process has taken over {self.store.path}")
        span = self.frames_of(shard, video)
        if set(data) != set(self.array_names):
            raise ValueError(f"shard of {self.name} needs {self.array_names}, got {sorted(data)}")
        for name, values in data.items():  # all are looked at before the first is written
            if len(values) != len(span):
                raise ValueError(f"{name} needs {len(span)} frames, got {len(values)}")
            self._check(values, video, span)
        rows = slice(shard * self.shard_frames, (shard + 1) * self.shard_frames)
        digests = []
        for name in self.array_names:
            values = data[name]
            if filling := self.shard_frames - len(values):
                values = np.concatenate([values, np.repeat(values[-1:], filling, axis=0)])
            self._arrays[name][rows] = values
            digests.append(_flush_and_hash(self._object_path(name, shard)))
        return Receipt(shard, tuple(digests))

    def write_only_for(self, token: str) -> None:
        """Refuse to write as soon as another driver than that of ``token`` has the store."""
        self._token = token

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

    def read_arrays(self, video: VideoRow, start: int, stop: int) -> dict[str, npt.NDArray[Any]]:
        """Return the values of frames ``start`` to ``stop`` (exclusive), keyed by array.

        Raises:
            VideoNotLabelledError: If a frame of the span is outside the video or in a shard
                without a receipt.
            TargetStoreError: If a shard that has a receipt is gone or damaged.
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
        for shard in set(shards) - self._found:
            for name in self.array_names:
                if not (path := self._object_path(name, shard)).is_file():
                    raise TargetStoreError(
                        f"{path} is gone, though its receipt is there; restore the store"
                    )
            self._found.add(shard)
        try:
            return {name: np.asarray(array[first:last]) for name, array in self._arrays.items()}
        except Exception as error:  # damaged chunks make a codec fail in any way
            raise TargetStoreError(
                f"frames {start}-{stop} of {video.id!r} in {self.name} of {self.store.path} are "
                f"damaged ({error}); restore the store"
            ) from error

    def _check(self, values: npt.NDArray[Any], video: VideoRow, span: range) -> None:
        """Refuse values that the arrays cannot hold."""

    def _object_path(self, name: str, shard: int) -> Path:
        array = self._arrays[name]
        key: str = array.metadata.encode_chunk_key((shard,) + (0,) * (array.ndim - 1))
        return Path(self.store.path, array.path, key)


class LabelSet(ShardSet):
    """A teacher's stored soft targets.

    Attributes:
        layout: The maps it holds.
        teacher: The teacher's name.
        window: Frames that the teacher looks at to label one.
    """

    def __init__(self, store: TargetStore, group: zarr.Group) -> None:
        super().__init__(store, group)
        try:
            self.layout = MapLayout.from_dict(self.attributes["maps"])
            self.teacher = str(self.attributes["teacher"])
            self.window = int(self.attributes["provenance"]["window"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(store, group, error) from error

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

    def __init__(self, store: TargetStore, group: zarr.Group) -> None:
        super().__init__(store, group)
        try:
            self.height = int(self.attributes["height"])
            self.width = int(self.attributes["width"])
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(store, group, error) from error

    def read(self, video: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return frames ``start`` to ``stop`` (exclusive), ``(frame, y, x, channel)`` RGB.

        Raises:
            VideoNotFoundError: If the store does not know the video.
            VideoNotLabelledError: If a frame of the span is not kept.
        """
        return self.read_arrays(self.store.video(video), start, stop)[self.array_names[0]]


def token_path(store: Path) -> Path:
    """Return the file that names the driver that has a store."""
    return store / "runs" / "driver"


def array_in(group: zarr.Group, name: str) -> zarr.Array[Any]:
    """Return an array of a group.

    Raises:
        TargetStoreError: If there is none.
    """
    array = group.get(name)
    if not isinstance(array, zarr.Array):
        raise TargetStoreError(f"the store is damaged: {group.path}/{name} is not an array")
    return array


def group_in(group: zarr.Group, name: str) -> zarr.Group:
    """Return a group of a group.

    Raises:
        TargetStoreError: If there is none.
    """
    member = group.get(name)
    if not isinstance(member, zarr.Group):
        raise TargetStoreError(f"the store is damaged: {group.path}/{name} is not a group")
    return member


def _damaged(store: TargetStore, group: zarr.Group, error: Exception) -> TargetStoreError:
    return TargetStoreError(f"the attributes of {group.path} in {store.path} are damaged: {error}")


def _flush_and_hash(path: Path) -> bytes:
    """Bring a file to the disk, so that a receipt never outlives its shard in a power cut."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").digest()
