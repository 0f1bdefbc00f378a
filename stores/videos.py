"""Videos on disk: what they are called, where they lie, what they hold.

A video is a file, or a folder whose images are its frames.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stores.errors import VideoError
from stores.images import list_images, stamp_images

HASHED_BYTES: Final = 4 * 2**20
VIDEO_SUFFIXES: Final = (".avi", ".mp4", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v")


@dataclass(frozen=True)
class VideoFile:
    """A video that was found but not yet opened."""

    id: str
    """Path relative to ``root`` without its suffix, with ``/`` between folders."""
    root: Path
    path: str
    """Relative to ``root``, with ``/`` between folders."""

    @property
    def absolute(self) -> Path:
        return self.root / self.path


@dataclass(frozen=True)
class FileStamp:
    """By what a file is taken to be the same as before, without reading it."""

    num_bytes: int
    modified_ns: int
    """Time of the last modification, in nanoseconds since 1970."""

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """Look at a file.

        Raises:
            VideoError: If it is not there, or no file that can be read twice.
        """
        try:
            status = path.stat()
        except OSError as error:
            raise VideoError(f"cannot read {path}: {error.strerror}") from error
        if stat.S_ISDIR(status.st_mode):
            return cls(*stamp_images(path))
        if not stat.S_ISREG(status.st_mode):  # a pipe would be read for ever
            raise VideoError(f"{path} is no regular file")
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class VideoRecord:
    """A video that was opened: what the store keeps of it."""

    id: str
    root: str
    path: str
    content_hash: bytes
    """SHA-256 of the file; of a sequence of images, of their hashes in order."""
    frames: int
    """Frames that the decoder gives, whatever the container says."""
    height: int
    width: int
    fps: float
    """Average frames per second; 0 when the container does not tell."""

    @property
    def absolute(self) -> Path:
        return Path(self.root) / self.path


def hash_file(path: Path, on_chunk: Callable[[], None] = lambda: None) -> bytes:
    """Return the SHA-256 of a file; of a folder of images, that of their hashes in order.

    Args:
        path: The file, or the folder.
        on_chunk: Called now and then, while there is more to read.

    Raises:
        VideoError: If it cannot be read.
    """
    digest = hashlib.sha256()
    if path.is_dir():
        for name in list_images(path):
            digest.update(hash_file(path / name, on_chunk))
        return digest.digest()
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise VideoError(f"{path} is no regular file")
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(HASHED_BYTES):
                digest.update(chunk)
                on_chunk()
            return digest.digest()
    except OSError as error:
        raise VideoError(f"cannot read {path}: {error.strerror}") from error
