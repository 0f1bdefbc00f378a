"""Arrays along the frame axis that are filled shard by shard, with a receipt for each shard."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch

from stores import schema
from stores.codec import check_planes
from stores.errors import DamagedStoreError, TargetStoreError, VideoNotLabelledError
from stores.lease import check_token
from stores.maps import MapLayout, render_maps
from stores.metadata import METADATA, read_attributes
from stores.places import Place
from stores.receipts import Receipt, Receipts
from stores.table import VideoRow

if TYPE_CHECKING:
    from stores.targets import TargetStore

Request = schema.LabelRequest | schema.FrameRequest
COMMIT_SECONDS: Final = 2.0
COMMIT_SHARDS: Final = 256
CACHED_INDICES: Final = 65536
"""Indices of shards that a label set keeps: some 10 MB where shards are of 16 frames."""


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
    """Arrays of one group, all along the frame axis, and their receipts.

    Raises:
        DamagedStoreError: If its attributes or receipts are not what was written.
    """

    request: Request

    folder: ClassVar[str]

    def __init__(self, store: TargetStore, name: str) -> None:
        self.store = store
        self.name = name
        self.key = f"{self.folder}/{name}"
        request: Any  # of the kind that the subclass declares
        self.attributes, request = read_set(store.place, self.key)
        self.request = request
        self.fingerprint = str(self.attributes["fingerprint"])
        self.grid = self.request.grid
        self.shard_frames = self.grid.shard_frames
        self.formats = {array.name: array.format for array in self.request.arrays}
        self.array_names = list(self.formats)
        self.receipts = Receipts(store.place, f"{self.key}/receipts", len(self.array_names))
        self._token: str | None = None
        self._indices: dict[tuple[str, int], npt.NDArray[np.int64]] = {}

    def refresh(self) -> None:
        """Read again which shards are there.

        Raises:
            DamagedStoreError: If the receipts are damaged.
        """
        self.receipts.refresh()
        self._indices.clear()

    def shards(self, video: VideoRow) -> range:
        """Return the shards, counted along the whole frame axis, that hold a video's frames."""
        return self.grid.shards(video)

    def frames_of(self, shard: int, video: VideoRow) -> range:
        """Return the frames of a video that lie in a shard."""
        return self.grid.frames_of(shard, video)

    def missing(self, video: VideoRow) -> list[int]:
        """Return the shards of a video that are not committed."""
        return [shard for shard in self.shards(video) if shard not in self.receipts]

    def coverage(self, video: str) -> list[range]:
        """Return the spans of a video's frames that are there, in order and as long as can be.

        Raises:
            VideoNotFoundError: If the store does not know the video.
        """
        row = self.store.video(video)
        spans: list[range] = []
        for shard in self.receipts.shards(self.shards(row)):
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
        """Make shards readable; only the store's driver does it.

        Raises:
            StoreBusyError: If another driver has taken over the store.
            StoreWriteError: If the receipts cannot be written.
        """
        self.store.check_driver()
        receipts = list(receipts)
        self.receipts.write(receipts)
        for receipt in receipts:
            for name in self.array_names:
                self._indices.pop((name, receipt.shard), None)

    def clear(self, shards: Iterable[int]) -> None:
        """Take back the receipts of shards, which are then not there any more."""
        nothing = (bytes(schema.DIGEST_BYTES),) * len(self.array_names)
        self.commit(Receipt(shard, nothing) for shard in shards if shard in self.receipts)

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
        if not all(shard in self.receipts for shard in shards):
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


class LabelSet(ShardSet):
    """A teacher's stored soft targets.

    Attributes:
        request: What it was asked to be.
        layout: The maps it holds.
        teacher: The teacher's name.
        window: Frames that the teacher looks at to label one.
    """

    folder = schema.LabelRequest.folder
    request: schema.LabelRequest

    @property
    def layout(self) -> MapLayout:
        return self.request.layout

    @property
    def teacher(self) -> str:
        return self.request.teacher

    @property
    def window(self) -> int:
        return int(self.request.provenance["window"])

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

    def _check(self, values: npt.NDArray[Any], video: VideoRow, span: range) -> None:
        check_planes(values, video=video.id, first_frame=span.start)


class FrameSet(ShardSet):
    """Decoded frames of the videos at one size."""

    folder = schema.FrameRequest.folder
    request: schema.FrameRequest

    @property
    def height(self) -> int:
        return self.request.height

    @property
    def width(self) -> int:
        return self.request.width

    def read(self, video: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Return frames ``start`` to ``stop`` (exclusive), ``(frame, y, x, channel)`` RGB.

        Raises:
            VideoNotFoundError: If the store does not know the video.
            VideoNotLabelledError: If a frame of the span is not kept.
        """
        return self.read_arrays(self.store.video(video), start, stop)[self.array_names[0]]

    def _check(self, values: npt.NDArray[Any], video: VideoRow, span: range) -> None:
        """Any byte can be held."""


def read_set(place: Place, key: str) -> tuple[dict[str, Any], Request]:
    """Return the attributes of a set and the request that it was made for.

    Raises:
        DamagedStoreError: If they are gone, or are not those that were written.
    """
    attributes = read_attributes(place, key)
    folder, _, name = key.partition("/")
    kind = schema.LabelRequest if folder == LabelSet.folder else schema.FrameRequest
    try:
        request = kind.from_attributes(attributes)
        _check_attributes(name, attributes, request)
    except Exception as error:  # damaged attributes make it fail in any way
        raise DamagedStoreError(
            place.url, f"{key}/{METADATA}", f"is damaged: {_said(error)}"
        ) from error
    return attributes, request


def is_dropped(attributes: Mapping[str, Any]) -> bool:
    """Return whether a set is being deleted."""
    return bool(attributes.get("dropped"))


def _check_attributes(
    name: str,
    attributes: Mapping[str, Any],
    request: Request,
) -> None:
    """Raise a ValueError unless attributes are those that a request has."""
    if schema.digest(attributes) != attributes["digest"]:
        raise ValueError("the attributes are not those that were written")
    if not isinstance(attributes["environment"], dict):
        raise ValueError("the environment is no dictionary")
    if name != request.name:
        raise ValueError(f"the attributes are those of {request.name}")
    for key, value in json.loads(json.dumps(request.attributes)).items():
        if attributes.get(key) != value:
            raise ValueError(f"the attribute {key!r} does not follow from the others")


def _said(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
