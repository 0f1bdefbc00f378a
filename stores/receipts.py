"""Receipts: which shards of a set are there, each with the SHA-256 of its objects."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from stores.errors import DamagedStoreError, TargetStoreError
from stores.metadata import read_length, write_length
from stores.places import Place
from stores.schema import DIGEST_BYTES, RECEIPT_CHUNK
from stores.shard_file import ZstdPacking

AT_ONCE: Final = 16
"""Objects in flight: an object store is slow to answer."""
Digests = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Receipt:
    """Proof that a shard is on the disk, whole: a SHA-256 for each of the shard set's arrays."""

    shard: int
    digests: tuple[bytes, ...]


class Receipts:
    """The array ``receipts`` of a set. All its chunks are there: one that is gone is damage.

    Only whether a receipt is there is kept in memory: the receipts of a large collection are half a
    gigabyte.

    Args:
        place: Where the store lies.
        key: Of the array.
        num_arrays: Arrays of the set.

    Raises:
        DamagedStoreError: If receipts are damaged or gone.
    """

    def __init__(self, place: Place, key: str, num_arrays: int) -> None:
        self._place, self.key = place, key
        self._num_arrays = num_arrays
        self.refresh()

    def refresh(self) -> None:
        """Read again what is there; see :class:`Receipts`."""
        length = read_length(self._place, self.key)
        chunks = range(-(-length // RECEIPT_CHUNK))
        found = [np.zeros(0, np.bool_)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for begin in chunks[::AT_ONCE]:  # in steps: a damaged length may be any
                batch = chunks[begin : begin + AT_ONCE]
                found += pool.map(lambda chunk: _is_there(self._read(chunk)), batch)
        self._is_there: npt.NDArray[np.bool_] = np.concatenate(found)[:length]
        self._known: tuple[int, Digests] | None = None

    def __len__(self) -> int:
        return int(self._is_there.sum())

    def __contains__(self, shard: int) -> bool:
        return 0 <= shard < len(self._is_there) and bool(self._is_there[shard])

    def shards(self, within: range | None = None) -> list[int]:
        """Return the shards that have a receipt, all or those of a range."""
        start, stop = (0, None) if within is None else (within.start, within.stop)
        return [start + int(shard) for shard in np.flatnonzero(self._is_there[start:stop])]

    def __getitem__(self, shard: int) -> Receipt:
        """Return the receipt of a shard.

        Raises:
            KeyError: If it has none.
            DamagedStoreError: If it cannot be read.
        """
        if shard not in self:
            raise KeyError(shard)
        chunk, row = divmod(shard, RECEIPT_CHUNK)
        known = self._known  # taken once: other threads may exchange it
        if known is None or known[0] != chunk:
            known = self._known = (chunk, self._read(chunk))
        return Receipt(shard, tuple(digest.tobytes() for digest in known[1][row]))

    def write(self, receipts: Iterable[Receipt]) -> None:
        """Write receipts; one whose digests are all zero takes that of its shard back.

        Raises:
            ValueError: If a shard lies beyond the end of the array.
            DamagedStoreError: If those beside them are damaged.
            StoreWriteError: If they cannot be written.
        """
        by_chunk: dict[int, list[Receipt]] = {}
        for receipt in receipts:
            if not 0 <= receipt.shard < len(self._is_there):
                raise ValueError(f"shard {receipt.shard} lies beyond the end of {self.key}")
            by_chunk.setdefault(receipt.shard // RECEIPT_CHUNK, []).append(receipt)
        self._known = None
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._update, by_chunk, by_chunk.values()))

    def _update(self, chunk: int, receipts: Iterable[Receipt]) -> None:
        digests = self._read(chunk)
        for receipt in receipts:
            row = digests[receipt.shard % RECEIPT_CHUNK]
            row[...] = np.frombuffer(b"".join(receipt.digests), np.uint8).reshape(row.shape)
        write_receipts(self._place, self.key, chunk, digests)
        start = chunk * RECEIPT_CHUNK
        here = self._is_there[start : start + RECEIPT_CHUNK]
        here[...] = _is_there(digests)[: len(here)]

    def _read(self, chunk: int) -> Digests:
        return read_receipts(self._place, self.key, self._num_arrays, chunk)


def receipts_key(key: str, chunk: int) -> str:
    """Return the key of a chunk's object of the array ``key``."""
    return f"{key}/c/{chunk}/0/0"


def read_receipts(place: Place, key: str, num_arrays: int, chunk: int) -> Digests:
    """Return a chunk of receipts, ``(shard, array, 32)``.

    Raises:
        DamagedStoreError: If it is damaged or gone.
        TargetStoreError: If the place cannot be read, which says nothing of the chunk.
    """
    name = receipts_key(key, chunk)
    digests = np.empty((RECEIPT_CHUNK, num_arrays, DIGEST_BYTES), np.uint8)
    try:
        _packing(num_arrays).unpack_into(place.read(name), digests)
    except FileNotFoundError as error:
        raise DamagedStoreError(place.url, name, "is gone") from error
    except OSError as error:
        raise TargetStoreError(f"cannot read {name} in {place.url}: {error}") from error
    except ValueError as error:
        raise DamagedStoreError(place.url, name, f"is damaged: {error}") from error
    return digests


def write_receipts(place: Place, key: str, chunk: int, digests: Digests) -> None:
    """Write a chunk of receipts, ``(shard, array, 32)``."""
    place.write(receipts_key(key, chunk), _packing(digests.shape[1]).pack(digests))


def lengthen_receipts(place: Place, key: str, num_arrays: int, length: int) -> None:
    """Make room for the receipts of more shards."""
    chunks = range(-(-read_length(place, key) // RECEIPT_CHUNK), -(-length // RECEIPT_CHUNK))
    # Not over what is there: it may have been begun by a process that was cut off.
    there = {name for name, _ in place.walk(key)} if chunks else set()
    missing = [chunk for chunk in chunks if receipts_key(key, chunk) not in there]
    nothing = np.zeros((RECEIPT_CHUNK, num_arrays, DIGEST_BYTES), np.uint8)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda chunk: write_receipts(place, key, chunk, nothing), missing))
    write_length(place, key, length)


def _is_there(digests: Digests) -> npt.NDArray[np.bool_]:
    return np.asarray(np.any(digests, axis=(1, 2)))


def _packing(num_arrays: int) -> ZstdPacking:
    return ZstdPacking((num_arrays, DIGEST_BYTES), "uint8")
