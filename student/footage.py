"""Frames of clips from the videos themselves, where a store keeps none of the wanted size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stores.decode import Frame, FrameIndex, decode_spans
from stores.errors import TargetStoreError, VideoError
from stores.frames import resize_frames
from stores.probing import ProbeFailure, probe_videos
from stores.progress import Progress
from stores.table import VideoRow
from stores.videos import FileStamp, VideoFile, VideoRecord


class _Found(NamedTuple):
    """What a look at a video gave."""

    stamp: FileStamp
    packed: bytes | None
    """Its :class:`~stores.decode.FrameIndex`, packed; some four bytes per frame."""


class Footage:
    """Videos that were labelled, decoded from a key frame before the frames that are asked for.

    It can be sent to other processes, which then need not look at the videos again.

    Args:
        height: Rows of the frames.
        width: Columns of the frames.
        root: Where the videos lie now, if not where they were labelled.
    """

    def __init__(self, *, height: int, width: int, root: Path | None = None) -> None:
        self._height, self._width, self._root = height, width, root
        self._found: dict[str, _Found] = {}

    def path_of(self, row: VideoRow) -> Path:
        """Return where a video lies now: a file, or a folder of images."""
        return self._file(row).absolute

    def find(self, rows: Sequence[VideoRow]) -> None:
        """Learn where frames lie in videos, and make sure that the videos are the labelled ones.

        Each is decoded once, unless it was before: what is learnt of a file is kept in the user's
        cache. Videos that are not looked at can be read, too, each time from their beginning.

        Raises:
            VideoError: If a video is gone, cannot be decoded, or is another than was labelled.
        """
        faults = [self._hint(f"{path} is not there") for path in self._missing(rows)]
        if not faults:
            by_id = {row.id: row for row in rows}
            with Progress(len(rows), unit="videos", label="probing") as progress:
                for probe in probe_videos([self._file(row) for row in rows]):
                    if isinstance(probe, ProbeFailure):
                        faults.append(self._hint(probe.reason))
                    elif fault := self._difference(by_id[probe.record.id], probe.record):
                        faults.append(fault)
                    else:
                        packed = probe.index.pack() if probe.index is not None else None
                        self._found[probe.record.id] = _Found(probe.stamp, packed)
                    progress.advance()
        if faults:
            more = f" ({len(faults)} videos of {len(rows)} are at fault)" if faults[1:] else ""
            raise VideoError(min(faults) + more)

    def read(self, row: VideoRow, span: range) -> npt.NDArray[np.uint8]:
        """Return frames of a video at the student's size, ``(frame, y, x, channel)`` RGB.

        Raises:
            VideoError: As :meth:`decode`.
        """
        return np.stack([self.resize(frame) for _, frame in self.decode(row, span)])

    def resize(self, frame: Frame) -> Frame:
        """Bring a frame to the student's size."""
        resized = resize_frames(frame[None], self._height, self._width)
        return resized.reshape(resized.shape[1:])

    def decode(self, row: VideoRow, span: range) -> Iterator[tuple[int, Frame]]:
        """Yield frames of a video with their numbers, ``(y, x, channel)`` RGB, at its own size.

        Raises:
            VideoError: If they cannot be decoded, or the video changed after it was looked at.
        """
        path, found, index = self.path_of(row), self._found.get(row.id), None
        if found is not None:
            if FileStamp.of(path) != found.stamp:
                raise VideoError(f"{path} changed after training began; bring back the old one")
            if found.packed is not None:
                index = FrameIndex.unpack(found.packed, row.frames).part(span)
        try:
            yield from decode_spans(path, [span], size=(row.height, row.width), index=index)
        except (TargetStoreError, MemoryError):
            raise
        except Exception as error:  # a damaged file makes a decoder fail in any way
            raise VideoError(
                f"{path} cannot be decoded: {type(error).__name__}: {error}"
            ) from error

    def _file(self, row: VideoRow) -> VideoFile:
        return VideoFile(row.id, self._root or Path(row.root), row.path)

    def _missing(self, rows: Sequence[VideoRow]) -> list[Path]:
        return [path for path in map(self.path_of, rows) if not path.exists()]

    def _difference(self, row: VideoRow, seen: VideoRecord) -> str:
        """Return in what a video is not the one that was labelled, or nothing."""
        path = self.path_of(row)
        if seen.content_hash != row.content_hash:
            return (
                f"{path} is not the video that was labelled as {row.id!r}: its content is another; "
                "bring back the old one, say where it lies with --videos-root, or label this one "
                "with: tinyhd distill --replace-changed"
            )
        if seen.frames != row.frames:
            return (
                f"{path} has {seen.frames} frames here, and had {row.frames} when it was labelled: "
                f"another decoder; keep its frames with: tinyhd distill --with-frames {self._size}"
            )
        return ""

    @property
    def _size(self) -> str:
        return f"{self._height}x{self._width}"

    def _hint(self, reason: str) -> str:
        return (
            f"{reason}; the store keeps no frames of it at {self._size}: say where videos lie with "
            f"--videos-root, or add frames with: tinyhd distill --with-frames {self._size}"
        )
