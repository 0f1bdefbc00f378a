"""Metadata of a store's groups and arrays: made by zarr in memory, read and written whole.

An object is written once, with all that belongs to it: what zarr itself writes attribute by
attribute could be cut off in the middle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from stores import schema
from stores.codec import silence_codec_remark
from stores.errors import (
    DamagedStoreError,
    FormatVersionError,
    NotATargetStoreError,
    TargetStoreError,
)
from stores.places import Place
from stores.shard_file import ZSTD_LEVEL

METADATA: Final = "zarr.json"
Metadata = dict[str, Any]


def read_metadata(place: Place, key: str) -> Metadata:
    """Return the metadata object ``key``.

    Raises:
        DamagedStoreError: If it is not there, or is none.
        TargetStoreError: If the place cannot be read, which says nothing of the object.
    """
    try:
        metadata = json.loads(place.read(key))
    except FileNotFoundError as error:
        raise DamagedStoreError(place.url, key, "is gone") from error
    except OSError as error:
        raise TargetStoreError(f"cannot read {key} in {place.url}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedStoreError(place.url, key, f"is damaged: {error}") from error
    if not isinstance(metadata, dict):
        raise DamagedStoreError(place.url, key, "is no Zarr metadata")
    return metadata


def encode_metadata(metadata: Mapping[str, Any]) -> bytes:
    """Return a metadata object's bytes."""
    return json.dumps(metadata, indent=2).encode()


def write_metadata(place: Place, key: str, metadata: Metadata) -> None:
    """Write a metadata object."""
    place.write(key, encode_metadata(metadata))


def read_attributes(place: Place, key: str) -> dict[str, Any]:
    """Return the attributes of the group ``key``.

    Raises:
        DamagedStoreError: If there is no such group.
    """
    attributes = read_metadata(place, f"{key}/{METADATA}").get("attributes")
    if not isinstance(attributes, dict):
        raise DamagedStoreError(place.url, f"{key}/{METADATA}", "has no attributes")
    return attributes


def read_length(place: Place, key: str) -> int:
    """Return the length of the array ``key``, that of its first dimension.

    Raises:
        DamagedStoreError: If there is no such array.
    """
    shape = read_metadata(place, f"{key}/{METADATA}").get("shape")
    if not (isinstance(shape, list) and shape and type(shape[0]) is int and shape[0] >= 0):
        raise DamagedStoreError(place.url, f"{key}/{METADATA}", f"has the shape {shape}")
    return int(shape[0])


def write_length(place: Place, key: str, length: int) -> None:
    """Make an array longer, if it is shorter."""
    if read_length(place, key) < length:
        metadata = read_metadata(place, f"{key}/{METADATA}")
        metadata["shape"][0] = length
        write_metadata(place, f"{key}/{METADATA}", metadata)


def check_root(place: Place) -> None:
    """Make sure that a place holds a target store that this program reads.

    Raises:
        NotATargetStoreError: If there is no store.
        FormatVersionError: If it is of another version of the format.
        TargetStoreError: If the place cannot be read.
    """
    where = place.url
    try:
        metadata = json.loads(place.read(METADATA))
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
    except (ValueError, RecursionError) as error:
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


def empty_store() -> dict[str, Metadata]:
    """Return the objects of a store without videos, its root last."""
    objects: dict[str, Buffer] = {}
    group = zarr.create_group(
        MemoryStore(objects), attributes={"format": schema.FORMAT, "version": schema.VERSION}
    )
    videos = group.create_group("videos")
    for name in schema.VIDEO_COLUMNS:
        create_column(videos, name, 0)
    for folder in ("labels", "frames", "runs"):
        group.create_group(folder)
    keys = sorted(objects, key=lambda key: (key == METADATA, key))
    return {key: json.loads(objects[key].to_bytes()) for key in keys}


def create_column(videos: zarr.Group, name: str, rows: int) -> zarr.Array[Any]:
    """Make a column of the table of videos."""
    dtype, fill_value = schema.VIDEO_COLUMNS[name]
    wide = name == "content_hash"
    return videos.create_array(
        name,
        shape=(rows, schema.DIGEST_BYTES) if wide else (rows,),
        chunks=(schema.VIDEO_CHUNK, schema.DIGEST_BYTES) if wide else (schema.VIDEO_CHUNK,),
        dtype=dtype,
        fill_value=fill_value,
        dimension_names=("video", "byte") if wide else ("video",),
        compressors=(ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()),
        config={"write_empty_chunks": True},  # a chunk that is gone is damage
    )


def empty_set(
    request: schema.LabelRequest | schema.FrameRequest, attributes: Mapping[str, Any]
) -> dict[str, Metadata]:
    """Return the objects of a set without shards by their keys in a store, its group last."""
    silence_codec_remark()
    objects: dict[str, Buffer] = {}
    path = f"{request.folder}/{request.name}"
    group = zarr.create_group(MemoryStore(objects), path=path, attributes=dict(attributes))
    for array in request.arrays:
        group.create_array(
            array.name,
            shape=(0, *array.shape),
            shards=(request.shard_frames, *array.shape),
            chunks=(array.format.chunk_frames, *array.shape),
            dtype=array.dtype,
            fill_value=array.fill_value,
            dimension_names=("frame", *array.axes),
            chunk_key_encoding={"name": "default", "separator": "."},
            **array.format.packing.codecs,
        )
    num_arrays = len(request.arrays)
    group.create_array(
        "receipts",
        shape=(0, num_arrays, schema.DIGEST_BYTES),
        chunks=(schema.RECEIPT_CHUNK, num_arrays, schema.DIGEST_BYTES),
        dtype="uint8",
        fill_value=0,
        dimension_names=("shard", "array", "byte"),
        compressors=(ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()),
    )
    root = f"{path}/{METADATA}"
    keys = [key for key in objects if key.startswith(f"{path}/")]
    keys.sort(key=lambda key: (key == root, key))
    return {key: json.loads(objects[key].to_bytes()) for key in keys}
