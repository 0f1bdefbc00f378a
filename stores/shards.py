"""Arrays along the frame axis that are filled shard by shard, with a receipt for each shard."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch
import zarr

from stores import schema
from stores.codec import check_planes
from stores.errors import TargetStoreError, VideoNotLabelledError
from stores.lease import check_token
from stores.maps import MapLayout, render_maps
from stores.places import writing
from stores.shard_file import GridPacking, Packing, ShardFormat, ZstdPacking
from stores.videos import VideoRecord

if TYPE_CHECKING:
    from stores.targets import TargetStore

COMMIT_SECONDS: Final = 2.0
COMMIT_SHARDS: Final = 256
RECEIPTS_AT_ONCE: Final = 64 * schema.RECEIPT_CHUNK
CACHED_INDICES: Final = 65536
"""Indices of shards that a label set keeps: some 10 MB where shards are of 16 frames."""


@dataclass(frozen=True, kw_only=True)
class VideoRow(VideoRecord):
    """A video of a store: its record and its place on the frame axis."""

    first: int
    """Offset of the video's frame 0 on the frame axis of every label set."""
    superseded_by: int = schema.LIVE
    """-1: the row counts; -2: it was dropped; else the number of the row that replaces it."""


@dataclass(frozen=True)
class Receipt:
    """Proof that a shard is on the disk, whole: a SHA-256 for each of the shard set's arrays."""

    shard: int
    digests: tuple[bytes, ...]


class Committer:
    """Commit receipts in batches, so that many small shards cost few writes."""

    def __init__(self, shard_set: ShardSet) -> None:
        self._set = shard_set
        self._pending: list[Receipt] = []
        self._committed_at = time.monotonic()

    def add(self, receipt: Receipt) -> None:
        """Remember a receipt for the next commit."""
        self._pending.append(receipt)

    def commit_if_due(self) -> None:
        """Commit when enough receipts or enough seconds have come together."""
        is_late = time.monotonic() - self._committed_at >= COMMIT_SECONDS
        if is_late or len(self._pending) >= COMMIT_SHARDS:
            self.commit()

    def commit(self) -> None:
        """Commit all receipts that are remembered."""
        if self._pending:
            self._set.commit(self._pending)
            self._pending.clear()
        self._committed_at = time.monotonic()


class ShardSet(ABC):
    """Arrays of one group, all along the frame axis, and their receipts."""

    packing_name: ClassVar[str]

    def __init__(self, store: TargetStore, group: zarr.Group) -> None:
        self.store = store
        self.name: str = group.basename
        self.key: str = group.path
        self.attributes: dict[str, Any] = dict(group.attrs)
        try:
            self.fingerprint = str(self.attributes["fingerprint"])
            self.shard_frames = int(self.attributes["shard_frames"])
            self.array_names = [str(name) for name in self.attributes["arrays"]]
            packing = self.attributes["packing"]
            if packing["name"] != self.packing_name:
                raise ValueError(f"packed by {packing['name']!r}, which this program does not know")
            chunk_frames = int(packing["chunk_frames"])
            if not 1 <= chunk_frames <= self.shard_frames or self.shard_frames % chunk_frames:
                raise ValueError(f"{self.shard_frames} frames per shard, {chunk_frames} per chunk")
            self.formats = {
                name: ShardFormat(
                    self._packing(array_in(group, name).shape[1:]), self.shard_frames, chunk_frames
                )
                for name in self.array_names
            }
        except (KeyError, TypeError, ValueError) as error:
            raise _damaged(store, group, error) from error
        self.group = group
        self._token: str | None = None
        self._indices: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the receipts again.

        Raises:
            TargetStoreError: If they are damaged.
        """
        self._receipts = array_in(self.group, "receipts")  # opened again: it may have grown
        # Only whether a receipt is there is kept: those of a large collection are half a gigabyte.
        self._has_receipt: npt.NDArray[np.bool_] = np.zeros(self._receipts.shape[0], np.bool_)
        for start in range(0, len(self._has_receipt), RECEIPTS_AT_ONCE):
            rows = slice(start, start + RECEIPTS_AT_ONCE)
            self._has_receipt[rows] = self._read_receipts(rows).any(axis=(1, 2))
        self._chunk: tuple[int, npt.NDArray[np.uint8]] | None = None
        self._indices.clear()

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

    def sample(self, video: VideoRow, *, blocks: int, seed: int) -> list[int]:
        """Return some of a video's shards, for a collection that is too large to label whole.

        The first blocks of a larger number are those of a smaller one, whatever else is in the
        store: each block's place in the order comes from seed, content and block alone. Blocks
        that are not full, or whose windows begin before the video, come last.
        """
        full_from = self.head_frames

        def order(shard: int) -> tuple[bool, bytes]:
            span = self.frames_of(shard, video)
            is_poor = span.start < full_from or len(span) < self.shard_frames
            block = shard - self.shards(video).start
            key = video.content_hash + seed.to_bytes(8, "little") + block.to_bytes(8, "little")
            return is_poor, hashlib.sha256(key).digest()

        return sorted(sorted(self.shards(video), key=order)[:blocks])

    @property
    def head_frames(self) -> int:
        """Frames at a video's beginning that are made from less than a full window."""
        return 0

    def is_committed(self, shard: int) -> bool:
        """Return whether a shard has a receipt."""
        return shard < len(self._has_receipt) and bool(self._has_receipt[shard])

    @property
    def committed_shards(self) -> list[int]:
        """Shards that have a receipt."""
        return [int(shard) for shard in np.flatnonzero(self._has_receipt)]

    @property
    @abstractmethod
    def request(self) -> schema.LabelRequest | schema.FrameRequest:
        """What the set was asked to be."""

    @property
    def num_committed(self) -> int:
        """Shards that have a receipt."""
        return int(self._has_receipt.sum())

    def receipt(self, shard: int) -> Receipt | None:
        """Return the receipt of a shard, or nothing if it is not committed."""
        if not self.is_committed(shard):
            return None
        chunk, row = divmod(shard, schema.RECEIPT_CHUNK)
        known = self._chunk  # taken once: other threads may exchange it
        if known is None or known[0] != chunk:
            known = self._chunk = (chunk, self._read_receipts(_chunk_rows(chunk)))
        return Receipt(shard, tuple(digest.tobytes() for digest in known[1][row]))

    def coverage(self, video: str) -> list[range]:
        """Return the spans of a video's frames that are there, in order and as long as can be.

        Raises:
            VideoNotFoundError: If the store does not know the video.
        """
        row = self.store.video(video)
        spans: list[range] = []
        for shard in self.shards(row):
            if self.is_committed(shard):
                span = self.frames_of(shard, row)
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
            StoreWriteError: If the shard cannot be written.
            StoreBusyError: If another driver has taken over the store.
            ValueError: If arrays or frames are missing.
        """
        if self._token is not None:
            check_token(self.store.place, self._token)
        span = self.frames_of(shard, video)
        if set(data) != set(self.array_names):
            raise ValueError(f"shard of {self.name} needs {self.array_names}, got {sorted(data)}")
        for name, values in data.items():  # all are looked at before the first is written
            shape = (len(span), *self.formats[name].packing.shape)
            if values.shape != shape:
                raise ValueError(f"{name} needs the shape {shape}, got {values.shape}")
            self._check(values, video, span)
        digests = []
        for name in self.array_names:
            packed = self.formats[name].pack(data[name])
            self.store.place.write(self.shard_key(name, shard), packed)
            digests.append(hashlib.sha256(packed).digest())
        return Receipt(shard, tuple(digests))

    def write_only_for(self, token: str) -> None:
        """Refuse to write as soon as another driver than that of ``token`` has the store."""
        self._token = token

    def commit(self, receipts: Iterable[Receipt]) -> None:
        """Make shards readable; only the store's driver does it."""
        self._write_receipts({receipt.shard: b"".join(receipt.digests) for receipt in receipts})

    def clear(self, shards: Iterable[int]) -> None:
        """Take back the receipts of shards, which are then not there any more."""
        nothing = bytes(len(self.array_names) * schema.DIGEST_BYTES)
        self._write_receipts({shard: nothing for shard in shards if self.is_committed(shard)})

    def _write_receipts(self, digests: Mapping[int, bytes]) -> None:
        self.store.check_driver()
        self._chunk = None
        by_chunk: dict[int, list[int]] = {}
        for shard in sorted(digests):
            by_chunk.setdefault(shard // schema.RECEIPT_CHUNK, []).append(shard)
        for chunk, shards in by_chunk.items():
            rows = _chunk_rows(chunk)
            receipts = self._read_receipts(rows)
            for shard in shards:
                row = receipts[shard - rows.start]
                row[...] = np.frombuffer(digests[shard], np.uint8).reshape(row.shape)
            with writing(self.store.url):
                self._receipts[rows] = receipts
            self._has_receipt[rows] = receipts.any(axis=(1, 2))
        for shard in digests:
            for name in self.array_names:
                self._indices.pop((name, shard), None)

    def _read_receipts(self, rows: slice) -> npt.NDArray[np.uint8]:
        try:
            return np.array(self._receipts[rows])
        except Exception as error:  # damaged chunks make a codec fail in any way
            raise TargetStoreError(
                f"the receipts of {self.name} in {self.store.url} are damaged ({error}); find out "
                f"more with: tinyhd store verify {self.store.url}"
            ) from error

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
                f"{self.store.url}; add them with: tinyhd distill VIDEOS --store {self.store.url}"
            )
        return {name: self._read(name, first, last) for name in self.array_names}

    def shard_key(self, name: str, shard: int) -> str:
        """Return the key of a shard's object."""
        return f"{self.key}/{name}/c.{shard}" + ".0" * len(self.formats[name].packing.shape)

    def _read(self, name: str, first: int, last: int) -> npt.NDArray[Any]:
        """Read entries ``first`` to ``last`` (exclusive) of the frame axis."""
        form = self.formats[name]
        values = np.empty((last - first, *form.packing.shape), form.packing.dtype)
        chunk_frames = form.chunk_frames
        for shard in range(first // self.shard_frames, -(-last // self.shard_frames)):
            begin = shard * self.shard_frames
            start, stop = max(first - begin, 0), min(last - begin, self.shard_frames)
            chunks = range(start // chunk_frames, -(-stop // chunk_frames))
            key = self.shard_key(name, shard)
            try:
                index = self._index(name, shard)[chunks.start : chunks.stop].tolist()
                parts = self.store.place.read_ranges(key, index)
                for chunk, part in zip(chunks, parts, strict=True):
                    rows = range(chunk * chunk_frames, (chunk + 1) * chunk_frames)
                    wanted = range(max(rows.start, start), min(rows.stop, stop))
                    place = values[wanted.start + begin - first : wanted.stop + begin - first]
                    if len(wanted) == chunk_frames:
                        form.packing.unpack_into(part, place)
                    else:
                        whole = np.empty((chunk_frames, *form.packing.shape), values.dtype)
                        form.packing.unpack_into(part, whole)
                        place[...] = whole[wanted.start - rows.start : wanted.stop - rows.start]
            except FileNotFoundError as error:
                raise self._damaged_shard(key, "is gone, though its receipt is there") from error
            except (OSError, ValueError) as error:
                self._indices.pop((name, shard), None)
                raise self._damaged_shard(key, f"is damaged or cannot be read ({error})") from error
        return values

    def _index(self, name: str, shard: int) -> npt.NDArray[np.int64]:
        index = self._indices.get((name, shard))
        if index is None:
            if len(self._indices) >= CACHED_INDICES:
                self._indices.clear()
            form, key = self.formats[name], self.shard_key(name, shard)
            end, size = self.store.place.read_end(key, form.index_bytes)
            index = self._indices[name, shard] = form.read_index(end, size)
        return index

    def _damaged_shard(self, key: str, what: str) -> TargetStoreError:
        return TargetStoreError(
            f"{key} in {self.store.url} {what}; clear what is damaged with: tinyhd store verify "
            f"{self.store.url} --repair, and label it again"
        )

    @abstractmethod
    def _check(self, values: npt.NDArray[Any], video: VideoRow, span: range) -> None:
        """Refuse values that the arrays cannot hold."""

    @abstractmethod
    def _packing(self, shape: tuple[int, ...]) -> Packing:
        """Return how an array's frames of a shape are packed."""


class LabelSet(ShardSet):
    """A teacher's stored soft targets.

    Attributes:
        layout: The maps it holds.
        teacher: The teacher's name.
        window: Frames that the teacher looks at to label one.
    """

    packing_name = schema.GRID_PACKING

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

    def read_maps(
        self,
        video: str,
        start: int,
        stop: int,
        names: Sequence[str] | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Return maps of frames ``start`` to ``stop`` (exclusive), composed where they are derived.

        Args:
            video: Its id.
            start: First frame.
            stop: Frame after the last.
            names: Maps of the layout; all, derived ones too, if not given.
            size: Height and width of the result; the teacher's input size if not given.

        Shape:
            each ``(stop - start, height, width)``, non-negative, meaningful up to its sum

        Raises:
            VideoNotFoundError: If the store does not know the video.
            VideoNotLabelledError: If a frame of the span has no committed targets.
            KeyError: If the layout has no such map.
        """
        layout = self.layout
        height, width = size or (layout.height, layout.width)
        planes = {
            name: torch.from_numpy(values) for name, values in self.read(video, start, stop).items()
        }
        wanted = layout.names if names is None else names
        maps = render_maps(planes, layout, wanted, height=height, width=width)
        return {name: values.numpy() for name, values in maps.items()}

    @property
    def head_frames(self) -> int:
        return self.window - 1

    @property
    def request(self) -> schema.LabelRequest:
        values = self.attributes
        return schema.LabelRequest(
            teacher=self.teacher,
            provenance=values["provenance"],
            layout=self.layout,
            description=values.get("description", {}),
            variant=values["variant"],
            grid_step=values["grid_step"],
            shard_frames=self.shard_frames,
        )

    def _check(self, values: npt.NDArray[Any], video: VideoRow, span: range) -> None:
        check_planes(values, video=video.id, first_frame=span.start)

    def _packing(self, shape: tuple[int, ...]) -> Packing:
        maps, height, width = shape
        return GridPacking((maps, height, width), float(self.attributes["grid_step"]))


class FrameSet(ShardSet):
    """Decoded frames of the videos at one size."""

    packing_name = schema.ZSTD_PACKING

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

    def _check(self, values: npt.NDArray[Any], video: VideoRow, span: range) -> None:
        """Any byte can be held."""

    def _packing(self, shape: tuple[int, ...]) -> Packing:
        return ZstdPacking(shape, "uint8")

    @property
    def request(self) -> schema.FrameRequest:
        return schema.FrameRequest(
            height=self.height,
            width=self.width,
            decoder=self.attributes["decoder"],
            shard_frames=self.shard_frames,
        )


def _chunk_rows(chunk: int) -> slice:
    """Return the shards whose receipts are in a chunk of the array ``receipts``."""
    return slice(chunk * schema.RECEIPT_CHUNK, (chunk + 1) * schema.RECEIPT_CHUNK)


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
    return TargetStoreError(f"the attributes of {group.path} in {store.url} are damaged: {error}")
