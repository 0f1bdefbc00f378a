"""A shard as bytes: chunks of frames, one after the other, and an index of them at its end.

The layout is that of Zarr's ``sharding_indexed`` codec with its index at the end, guarded by a
CRC-32C. Shards are packed and unpacked here and not by zarr: zarr 3.1 cannot encode numcodecs'
``delta`` between two transposes (it decodes it), and reading chunks without its machinery is
several times faster (``benchmarks/store.py``).
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import google_crc32c
import numpy as np
import numpy.typing as npt

from stores.codec import PCODEC_LEVEL, check_grid_step

ENTRY_BYTES: Final = 16
CHECKSUM_BYTES: Final = 4
ZSTD_LEVEL: Final = 3


class Packing(ABC):
    """How the frames of a chunk become bytes; a CRC-32C behind them tells damage.

    Args:
        shape: Of one frame.
        dtype: Of the values that are read.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)

    def pack(self, values: npt.NDArray[Any]) -> bytes:
        """Return the bytes of a chunk, ``(frame, *shape)``."""
        packed = self._pack(values)
        return packed + _checksum(packed)

    def unpack_into(self, data: bytes, out: npt.NDArray[Any]) -> None:
        """Fill ``out``, ``(frame, *shape)`` and contiguous, from a chunk's bytes.

        Raises:
            ValueError: If the bytes are not those of such a chunk.
        """
        packed, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
        if _checksum(packed) != checksum:
            raise ValueError("a chunk is damaged")
        self._unpack_into(packed, out)

    @abstractmethod
    def _pack(self, values: npt.NDArray[Any]) -> bytes: ...

    @abstractmethod
    def _unpack_into(self, data: bytes, out: npt.NDArray[Any]) -> None: ...

    @property
    @abstractmethod
    def codecs(self) -> Mapping[str, Any]:
        """The same for zarr, as arguments of ``Group.create_array``."""


class GridPacking(Packing):
    """Maps: multiples of the grid step, differences in time, then PCodec with differences in x.

    A teacher's maps change little from frame to frame; the differences in time save up to three
    tenths of the bytes (``benchmarks/store.py``).

    Raises:
        ValueError: If the grid step cannot be held, or the maps are a single line: numcodecs' delta
            takes the values of such arrays in another order.
    """

    def __init__(self, shape: tuple[int, int, int], grid_step: float) -> None:
        from pcodec import ChunkConfig, DeltaSpec, ModeSpec

        super().__init__(shape, "float32")
        check_grid_step(grid_step)
        if sum(length > 1 for length in shape) == 1:
            raise ValueError(f"maps of the shape {shape} are a single line, and cannot be packed")
        self._step = np.float32(grid_step)
        self._config = ChunkConfig(
            compression_level=PCODEC_LEVEL,
            delta_spec=DeltaSpec.try_consecutive(1),
            mode_spec=ModeSpec.classic(),
        )

    def _pack(self, values: npt.NDArray[Any]) -> bytes:
        from pcodec import standalone

        steps = np.round(values / self._step).astype(np.int16).reshape(len(values), -1)
        # numcodecs' delta runs through all frames of a pixel before it comes to the next pixel.
        differences = np.diff(steps, axis=0, prepend=np.int16(0))
        differences[0, 0] = steps[0, 0]
        differences[0, 1:] = steps[0, 1:] - steps[-1, :-1]
        packed: bytes = standalone.simple_compress(differences.ravel(), self._config)
        return packed

    def _unpack_into(self, data: bytes, out: npt.NDArray[Any]) -> None:
        from pcodec import standalone

        steps = np.empty((len(out), out[0].size), np.int16)
        try:
            progress = standalone.simple_decompress_into(data, steps.reshape(-1))
        except (RuntimeError, TypeError) as error:
            raise ValueError(str(error)) from error
        if progress.n_processed != steps.size or not progress.finished:
            raise ValueError(f"a chunk holds {progress.n_processed} values, not {steps.size}")
        whole = steps.sum(0, dtype=np.int16)
        steps[0, 1:] += np.cumsum(whole[:-1], dtype=np.int16)
        for before, after in pairwise(steps):
            after += before
        np.multiply(steps, self._step, out=out.reshape(len(out), -1))

    @property
    def codecs(self) -> Mapping[str, Any]:
        from zarr.codecs import Crc32cCodec, TransposeCodec
        from zarr.codecs.numcodecs import Delta, FixedScaleOffset, PCodec

        axes = tuple(range(len(self.shape) + 1))
        scale = round(1 / float(self._step))
        return {
            "filters": [
                FixedScaleOffset(offset=0, scale=scale, dtype="<f4", astype="<i2"),
                TransposeCodec(order=(*axes[1:], 0)),
                Delta(dtype="<i2"),
                TransposeCodec(order=(axes[-1], *axes[:-1])),
            ],
            "serializer": PCodec(
                level=PCODEC_LEVEL,
                mode_spec="classic",
                delta_spec="try_consecutive",
                delta_encoding_order=1,
            ),
            "compressors": Crc32cCodec(),
        }


class ZstdPacking(Packing):
    """Frames: bytes, and Zstandard."""

    def _pack(self, values: npt.NDArray[Any]) -> bytes:
        from numcodecs.zstd import Zstd

        return bytes(Zstd(ZSTD_LEVEL).encode(np.ascontiguousarray(values)))

    def _unpack_into(self, data: bytes, out: npt.NDArray[Any]) -> None:
        from numcodecs.zstd import Zstd

        # Before anything is unpacked: a few bytes may claim to be gigabytes.
        if (size := _zstd_content_bytes(data)) != out.nbytes:
            raise ValueError(f"a chunk holds {size} bytes, not {out.nbytes}")
        try:
            Zstd(ZSTD_LEVEL).decode(data, out.reshape(-1))
        except (RuntimeError, MemoryError) as error:
            raise ValueError(str(error)) from error

    @property
    def codecs(self) -> Mapping[str, Any]:
        from zarr.codecs import Crc32cCodec, ZstdCodec

        return {"compressors": (ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec())}


@dataclass(frozen=True)
class ShardFormat:
    """The shards of an array."""

    packing: Packing
    shard_frames: int
    chunk_frames: int

    @property
    def num_chunks(self) -> int:
        return self.shard_frames // self.chunk_frames

    @property
    def index_bytes(self) -> int:
        """Length of the index, which is the end of a shard."""
        return self.num_chunks * ENTRY_BYTES + CHECKSUM_BYTES

    def pack(self, values: npt.NDArray[Any]) -> bytes:
        """Return a shard's bytes; frames that are missing at its end repeat the last one.

        Args:
            values: ``(frame, *shape)``, at least one frame and at most ``shard_frames``.
        """
        if filling := self.shard_frames - len(values):
            values = np.concatenate([values, np.repeat(values[-1:], filling, axis=0)])
        chunks = np.split(values, self.num_chunks)
        packed = [self.packing.pack(chunk) for chunk in chunks]
        ends = np.cumsum([len(chunk) for chunk in packed])
        entries = np.stack([ends - [len(chunk) for chunk in packed], [*map(len, packed)]], axis=1)
        index = entries.astype("<u8").tobytes()
        return b"".join([*packed, index, _checksum(index)])

    def read_index(self, end: bytes, size: int) -> npt.NDArray[np.int64]:
        """Return offset and length of each chunk, ``(chunk, 2)``.

        Args:
            end: The last ``index_bytes`` of the shard.
            size: Bytes of the whole shard.

        Raises:
            ValueError: If they are no index of such a shard.
        """
        entries, checksum = end[:-CHECKSUM_BYTES], end[-CHECKSUM_BYTES:]
        if len(end) != self.index_bytes:
            raise ValueError(f"a shard has {size} bytes, less than its index")
        if _checksum(entries) != checksum:
            raise ValueError("the index of the shard is damaged")
        index = np.frombuffer(entries, "<u8").reshape(-1, 2)
        limit = np.uint64(size - self.index_bytes)
        if (index > limit).any() or (index.sum(1) > limit).any():
            raise ValueError("the index of the shard points outside of it")
        return index.astype(np.int64)

    def unpack(self, data: bytes) -> npt.NDArray[Any]:
        """Return all frames of a shard, ``(shard_frames, *shape)``.

        Raises:
            ValueError: If the bytes are not those of such a shard.
        """
        index = self.read_index(data[-self.index_bytes :], len(data))
        values = np.empty((self.shard_frames, *self.packing.shape), self.packing.dtype)
        for chunk, (offset, length) in enumerate(index.tolist()):
            rows = slice(chunk * self.chunk_frames, (chunk + 1) * self.chunk_frames)
            self.packing.unpack_into(data[offset : offset + length], values[rows])
        return values


def _zstd_content_bytes(frame: bytes) -> int | None:
    """Return what a Zstandard frame says of its content's size (RFC 8878, section 3.1.1.1)."""
    if len(frame) < 6 or frame[:4] != b"\x28\xb5\x2f\xfd":
        raise ValueError("a chunk is no Zstandard frame")
    flag, is_single, dictionary = frame[4] >> 6, frame[4] >> 5 & 1, frame[4] & 3
    start = 5 + (not is_single) + (0, 1, 2, 4)[dictionary]
    length = (is_single, 2, 4, 8)[flag]
    size = int.from_bytes(frame[start : start + length], "little")
    return size + (256 if length == 2 else 0) if length else None


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", google_crc32c.value(data))
