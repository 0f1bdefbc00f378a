"""The layout of a target store: names, axes, types, format version, provenance, fingerprints.

``docs/store-format.md`` says the same to those who read a store without this code.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Literal

from stores.codec import GRID_STEP
from stores.frames import RESIZE_RULE, RESIZE_VERSION
from stores.grid import ShardGrid
from stores.maps import MAX_SIDE, MapLayout, error_bounds
from stores.shard_file import GridPacking, ShardFormat, ZstdPacking

FORMAT: Final = "tinyhd-targets"
VERSION: Final = 1

FRAME_ALIGNMENT: Final = 256
"""Every video starts at a multiple of this on the frame axis, so that no shard holds two videos."""
CHUNK_FRAMES: Final = 8
GRID_PACKING: Final = "grid, differences in time, pcodec, crc32c"
ZSTD_PACKING: Final = "zstd, crc32c"
RECEIPT_CHUNK: Final = 4096
MAX_FRAMES: Final = 10**8
"""Of a video: 46 days at 25 frames per second; more is damage."""
VIDEO_CHUNK: Final = 4096
DIGEST_BYTES: Final = 32

VIDEO_COLUMNS: Final[Mapping[str, tuple[str, Any]]] = {  # name -> Zarr type, fill value
    "id": ("string", ""),
    "content_hash": ("uint8", 0),
    "root": ("string", ""),
    "path": ("string", ""),
    "frames": ("int64", 0),
    "height": ("int64", 0),
    "width": ("int64", 0),
    "fps": ("float64", 0.0),
    "superseded_by": ("int64", -1),
    "first": ("int64", -1),
}
"""Columns of ``videos/`` in the order they are written: a row with a ``first`` is complete."""
LIVE: Final = -1
"""``superseded_by`` of a row that counts; other numbers but -2 are those of its successor."""
DROPPED: Final = -2

Variant = Literal["identity", "hflip"]


@dataclass(frozen=True)
class ArraySpec:
    """One array of a shard set, without its frame axis."""

    name: str
    dtype: str
    fill_value: float
    axes: tuple[str, ...]
    format: ShardFormat

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one frame."""
        return self.format.packing.shape


@dataclass(frozen=True, kw_only=True)
class LabelRequest:
    """What a teacher's soft targets are asked to be; equal requests find the same label set."""

    folder: ClassVar[str] = "labels"
    identity_names: ClassVar[tuple[str, ...]] = (
        *("teacher", "provenance", "maps", "variant", "grid_step", "shard_frames", "packing"),
    )
    """Attributes that the fingerprint covers."""

    teacher: str
    provenance: Mapping[str, Any]
    """What decides the values beside the fields here: weights, preprocessing, window, decoder."""
    layout: MapLayout
    description: Mapping[str, str] = field(default_factory=dict)
    """What is good to know but decides nothing: paper, licence, rules in words."""
    variant: Variant = "identity"
    """``hflip``: the teacher saw mirrored frames; maps are in the mirrored frame's coordinates."""
    grid_step: float = GRID_STEP
    shard_frames: int = FRAME_ALIGNMENT
    chunk_frames: int = CHUNK_FRAMES

    def __post_init__(self) -> None:
        _check_shard_frames(self.shard_frames, self.chunk_frames)
        if self.variant not in ("identity", "hflip"):
            raise ValueError(f"variant must be identity or hflip, got {self.variant!r}")
        if type(self.provenance["window"]) is not int or self.provenance["window"] < 1:
            raise ValueError(f"a window of {self.provenance['window']} frames")
        _ = self.arrays  # grid steps and maps that cannot be packed are refused before any work

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> LabelRequest:
        """Build the request of a group from its attributes.

        Raises:
            Exception: Of any kind, if they are not such attributes.
        """
        return cls(
            teacher=attributes["teacher"],
            provenance=attributes["provenance"],
            layout=MapLayout.from_dict(attributes["maps"]),
            description=attributes["description"],
            variant=attributes["variant"],
            grid_step=attributes["grid_step"],
            shard_frames=attributes["shard_frames"],
            chunk_frames=_chunk_frames(attributes["packing"], GRID_PACKING),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the fingerprint covers."""
        return {
            "teacher": self.teacher,
            "provenance": dict(self.provenance),
            "maps": self.layout.to_dict(),
            "variant": self.variant,
            "grid_step": self.grid_step,
            "shard_frames": self.shard_frames,
            "packing": _packing(GRID_PACKING, self.chunk_frames),
        }

    @property
    def name(self) -> str:
        return f"{self.teacher}-{self.variant}-{fingerprint(self.identity)[:8]}"

    @property
    def key(self) -> str:
        """Key of the label set's group."""
        return f"{self.folder}/{self.name}"

    @property
    def grid(self) -> ShardGrid:
        labelled = self.provenance.get("labelled_frame", "last")
        others = self.provenance["window"] - 1
        head_frames = 0 if labelled == "each" else others
        tail_frames = others if labelled == "middle" else 0
        return ShardGrid(self.shard_frames, head_frames, tail_frames)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the label set's group."""
        return {
            **self.identity,
            "fingerprint": fingerprint(self.identity),
            "arrays": [array.name for array in self.arrays],
            "error_bounds": error_bounds(self.layout, self.grid_step),
            "description": dict(self.description),
        }

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        arrays = self.layout.arrays
        return tuple(
            ArraySpec(
                name=name,
                dtype="float32",
                fill_value=float("nan"),
                axes=_map_axes(specs[0].height, specs[0].width, is_only=len(arrays) == 1),
                format=ShardFormat(
                    GridPacking((len(specs), specs[0].height, specs[0].width), self.grid_step),
                    self.shard_frames,
                    self.chunk_frames,
                ),
            )
            for name, specs in arrays.items()
        )


@dataclass(frozen=True, kw_only=True)
class FrameRequest:
    """Decoded frames at a student's size, kept so that training decodes no video."""

    folder: ClassVar[str] = "frames"
    identity_names: ClassVar[tuple[str, ...]] = (
        *("height", "width", "decoder", "resize_version", "shard_frames", "packing"),
    )
    """Attributes that the fingerprint covers."""

    height: int
    width: int
    decoder: Mapping[str, str]
    shard_frames: int = FRAME_ALIGNMENT
    chunk_frames: int = CHUNK_FRAMES
    resize_version: int = RESIZE_VERSION
    description: Mapping[str, str] = field(default_factory=lambda: {"resize_rule": RESIZE_RULE})
    """What is good to know but decides nothing."""

    def __post_init__(self) -> None:
        _check_shard_frames(self.shard_frames, self.chunk_frames)
        if not (1 <= self.height <= MAX_SIDE and 1 <= self.width <= MAX_SIDE):
            raise ValueError(
                f"frames need a size from 1 to {MAX_SIDE}, got {self.height}x{self.width}"
            )

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any]) -> FrameRequest:
        """Build the request of a group from its attributes.

        Raises:
            Exception: Of any kind, if they are not such attributes.
        """
        return cls(
            height=attributes["height"],
            width=attributes["width"],
            decoder=attributes["decoder"],
            shard_frames=attributes["shard_frames"],
            chunk_frames=_chunk_frames(attributes["packing"], ZSTD_PACKING),
            resize_version=attributes["resize_version"],
            description=attributes["description"],
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the fingerprint covers."""
        return {
            "height": self.height,
            "width": self.width,
            "decoder": dict(self.decoder),
            "resize_version": self.resize_version,
            "shard_frames": self.shard_frames,
            "packing": _packing(ZSTD_PACKING, self.chunk_frames),
        }

    @property
    def name(self) -> str:
        return f"rgb-{self.height}x{self.width}-{fingerprint(self.identity)[:8]}"

    @property
    def key(self) -> str:
        """Key of the frame set's group."""
        return f"{self.folder}/{self.name}"

    @property
    def grid(self) -> ShardGrid:
        return ShardGrid(self.shard_frames)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the frame set's group."""
        return {
            **self.identity,
            "fingerprint": fingerprint(self.identity),
            "arrays": [array.name for array in self.arrays],
            "description": dict(self.description),
        }

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        packing = ZstdPacking((self.height, self.width, 3), "uint8")
        return (
            ArraySpec(
                name=f"rgb_{self.height}x{self.width}",
                dtype="uint8",
                fill_value=0,
                axes=("y", "x", "channel"),
                format=ShardFormat(packing, self.shard_frames, self.chunk_frames),
            ),
        )


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hexadecimal, of a request's canonical JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest(attributes: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a group's attributes, by which damage is found."""
    covered = {key: attributes[key] for key in attributes if key not in ("digest", "dropped")}
    return fingerprint(covered)


def environment(**values: str | int) -> dict[str, str | int]:
    """Return what equal bytes depend on beside the request: the machine, torch, and ``values``."""
    import torch

    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **values,
    }


def _packing(name: str, chunk_frames: int) -> dict[str, str | int]:
    return {"name": name, "chunk_frames": chunk_frames}


def _chunk_frames(packing: Mapping[str, Any], name: str) -> int:
    if packing["name"] != name:
        raise ValueError(f"packed by {packing['name']!r}, which this program does not know")
    return int(packing["chunk_frames"])


def _map_axes(height: int, width: int, *, is_only: bool) -> tuple[str, ...]:
    # xarray wants one length per name in a group, so names carry the size where sizes differ.
    suffix = "" if is_only else f"_{height}x{width}"
    return tuple(axis + suffix for axis in ("map", "y", "x"))


def _check_shard_frames(shard_frames: int, chunk_frames: int) -> None:
    if not 1 <= chunk_frames <= shard_frames or shard_frames % chunk_frames:
        raise ValueError(f"{shard_frames} frames per shard cannot be {chunk_frames} per chunk")
    if shard_frames < CHUNK_FRAMES or FRAME_ALIGNMENT % shard_frames:
        raise ValueError(
            f"frames per shard must be one of 8, 16, 32, 64, 128, 256, got {shard_frames}"
        )
