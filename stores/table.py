"""The table of videos: read as a whole, written chunk by chunk in an order that a kill may cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import zarr
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from stores import schema
from stores.errors import DamagedStoreError
from stores.metadata import METADATA, create_column, read_length, write_length
from stores.places import Place
from stores.videos import VideoRecord

LENGTH: Final = "first"
"""The column that is lengthened last: the table has as many rows as it is long."""
MAX_FIRST: Final = 2**62


@dataclass(frozen=True, kw_only=True)
class VideoRow(VideoRecord):
    """A video of a store: its record and its place on the frame axis."""

    first: int
    """Offset of the video's frame 0 on the frame axis of every label set."""
    superseded_by: int = schema.LIVE
    """-1: the row counts; -2: it was dropped; else the number of the row that replaces it."""


def read_table(place: Place) -> list[VideoRow]:
    """Return all rows, also those that do not count any more.

    Raises:
        DamagedStoreError: If an object is gone or damaged, or holds what cannot be.
    """
    num_rows = read_length(place, f"videos/{LENGTH}")
    # Looked for after the length is known, as another process may be adding rows.
    there = {key for key, _ in place.walk("videos")}
    if num_rows > len(there) * schema.VIDEO_CHUNK:
        key = f"videos/{LENGTH}/{METADATA}"
        raise DamagedStoreError(place.url, key, f"says that there are {num_rows} rows")
    columns: dict[str, list[Any]] = {}
    for name in schema.VIDEO_COLUMNS:
        for key in chunk_keys(name, num_rows):
            if key not in there:
                raise DamagedStoreError(place.url, key, "is gone")
        columns[name] = _read_column(place, name, num_rows)
    rows = [
        VideoRow(**dict(zip(columns, values, strict=True)))
        for values in zip(*columns.values(), strict=True)
    ]
    for number, row in enumerate(rows):
        if what := _problem(row, num_rows):
            raise DamagedStoreError(place.url, f"videos, row {number} ({row.id!r}),", what)
    return rows


def write_rows(
    place: Place, rows: Sequence[VideoRow], start: int, columns: Iterable[str]
) -> Iterator[str]:
    """Write those chunks of columns that hold rows from ``start`` on, and then their length.

    Args:
        place: Where the store lies.
        rows: The whole table.
        start: Its first row that is new or changed.
        columns: Names, in the order in which they are written.

    Yields:
        Before an object is written, its key.
    """
    begin = start - start % schema.VIDEO_CHUNK
    for name in columns:
        objects: dict[str, Buffer] = {}
        # By zarr in memory, so that the order on the disk and its flushing are ours.
        column = create_column(zarr.create_group(MemoryStore(objects)), name, len(rows))
        column[begin : len(rows)] = _column_values(name, rows[begin:])
        for key in chunk_keys(name, len(rows), begin):
            yield key
            place.write(key, objects[key.removeprefix("videos/")].to_bytes())
        yield f"videos/{name}/{METADATA}"
        write_length(place, f"videos/{name}", len(rows))


def chunk_keys(name: str, num_rows: int, start: int = 0) -> list[str]:
    """Return the keys of a column's chunks that hold the rows from ``start`` on."""
    chunks = range(start // schema.VIDEO_CHUNK, -(-num_rows // schema.VIDEO_CHUNK))
    end = "/0" if name == "content_hash" else ""
    return [f"videos/{name}/c/{chunk}{end}" for chunk in chunks]


def _read_column(place: Place, name: str, num_rows: int) -> list[Any]:
    try:
        column: Any = zarr.open_array(
            place.zarr_store(read_only=True), path=f"videos/{name}", mode="r", zarr_format=3
        )
        dtype, _ = schema.VIDEO_COLUMNS[name]
        is_text = column.dtype.kind in "OTU"
        if is_text != (dtype == "string") or not (is_text or column.dtype == dtype):
            raise ValueError(f"has the type {column.dtype}, not {dtype}")
        if column.shape[0] < num_rows:
            raise ValueError(f"holds {column.shape[0]} rows of {num_rows}")
    except Exception as error:  # zarr fails in any way on metadata that is damaged
        raise DamagedStoreError(
            place.url, f"videos/{name}/{METADATA}", f"is damaged: {error}"
        ) from error
    try:
        values = np.asarray(column[:num_rows])
    except Exception as error:  # damaged chunks make a codec fail in any way
        raise DamagedStoreError(
            place.url, _damaged_chunk(column, name, num_rows), f"is damaged: {error}"
        ) from error
    if name == "content_hash":
        return [row.tobytes() for row in values]
    return list(values.tolist())


def _damaged_chunk(column: Any, name: str, num_rows: int) -> str:  # noqa: ANN401 - of zarr
    """Return the key of the first chunk that cannot be read."""
    starts = range(0, num_rows, schema.VIDEO_CHUNK)
    for start, key in zip(starts, chunk_keys(name, num_rows), strict=True):
        try:
            column[start : min(start + schema.VIDEO_CHUNK, num_rows)]
        except Exception:  # as above; the error is known already
            return key
    return f"videos/{name}"


def _column_values(name: str, rows: Sequence[VideoRow]) -> npt.NDArray[Any]:
    if name == "content_hash":
        digests = b"".join(row.content_hash for row in rows)
        return np.frombuffer(digests, np.uint8).reshape(len(rows), -1)
    dtype, _ = schema.VIDEO_COLUMNS[name]
    return np.array([getattr(row, name) for row in rows], object if dtype == "string" else dtype)


def _problem(row: VideoRow, num_rows: int) -> str:
    """Return what of a row cannot be, or nothing."""
    if not (row.id and row.root and row.path):
        return "has no name or no path"
    if len(row.content_hash) != schema.DIGEST_BYTES or not any(row.content_hash):
        return "has no content hash"
    if not 1 <= row.frames <= schema.MAX_FRAMES:
        return f"has {row.frames} frames"
    if row.height < 1 or row.width < 1 or not (math.isfinite(row.fps) and row.fps >= 0):
        return f"is of {row.width}x{row.height} pixels and {row.fps} frames per second"
    if row.first < 0 or row.first % schema.FRAME_ALIGNMENT or row.first > MAX_FIRST:
        return f"begins at {row.first}, no multiple of {schema.FRAME_ALIGNMENT}"
    if not schema.DROPPED <= row.superseded_by < num_rows:
        return f"is superseded by row {row.superseded_by}, which is not there"
    return ""
