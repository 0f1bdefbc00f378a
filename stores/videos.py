"""Videos on disk: what they are called, where they lie, what they hold."""

from __future__ import annotations

import csv
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from stores.errors import VideoError

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
    """SHA-256 of the file."""
    frames: int
    """Frames that the decoder gives, whatever the container says."""
    height: int
    width: int
    fps: float
    """Average frames per second; 0 when the container does not tell."""

    @property
    def absolute(self) -> Path:
        return Path(self.root) / self.path


def find_videos(paths: Sequence[Path], lists: Sequence[Path] = ()) -> list[VideoFile]:
    """Return the videos in files, folders and lists, folders searched to their bottom, by id.

    A folder's videos are named by their path below it, a file by its name. A list names a video in
    each line; one that ends in ``.csv`` has a column ``path`` and may have a column ``id``. Paths
    in a list are relative to its folder, and without an id name the video.

    Raises:
        VideoError: If a path is not there, holds no video, or two videos would get one id.
    """
    found: dict[str, VideoFile] = {}
    for path in paths:
        if not path.exists():
            raise VideoError(f"{path} does not exist; give a video file or a folder of videos")
        root = path if path.is_dir() else path.parent
        files = sorted(_video_files(path)) if path.is_dir() else [path]
        if not files:
            raise VideoError(
                f"no videos in {path}; files ending in {' '.join(VIDEO_SUFFIXES)} are looked for"
            )
        for file in files:
            relative = file.relative_to(root).as_posix()
            _add(found, VideoFile(_id_of(relative), root.resolve(), relative))
    for list_file in lists:
        for video in _listed_videos(list_file):
            _add(found, video)
    return [found[id_] for id_ in sorted(found)]


def _add(found: dict[str, VideoFile], video: VideoFile) -> None:
    other = found.setdefault(video.id, video)
    if other.absolute != video.absolute:
        raise VideoError(
            f"{other.absolute} and {video.absolute} would both be called {video.id!r}; "
            "rename one, give ids in a .csv list, or label them into different stores"
        )


def _id_of(relative: str) -> str:
    """Return what a video is called whose path below its root is given."""
    return PurePosixPath(relative).with_suffix("").as_posix()


def _listed_videos(list_file: Path) -> Iterator[VideoFile]:
    root = list_file.parent.resolve()
    count = 0
    for number, name, own_id in _entries(list_file):
        path = Path(name)
        where = root / path
        if not where.is_file():
            raise VideoError(f"{list_file}, line {number}: {where} is no file")
        count += 1
        is_below = not path.is_absolute() and ".." not in path.parts
        if is_below:
            relative = path.as_posix()
            yield VideoFile(own_id or _id_of(relative), root, relative)
        else:
            yield VideoFile(own_id or path.stem, where.parent.resolve(), path.name)
    if not count:
        raise VideoError(f"{list_file} names no video")


def _entries(list_file: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, path and, if there is one, id of a list's entries."""
    try:
        with list_file.open(encoding="utf-8-sig", newline="") as file:
            if list_file.suffix.lower() != ".csv":
                for number, line in enumerate(file, 1):
                    if line.strip() and not line.startswith("#"):
                        yield number, line.strip(), ""
                return
            table = csv.DictReader(file)
            if "path" not in (table.fieldnames or ()):
                raise VideoError(
                    f"{list_file} has no column 'path'; its columns are: "
                    f"{', '.join(table.fieldnames or ()) or 'none'}"
                )
            for row in table:
                if path := (row["path"] or "").strip():
                    yield table.line_num, path, (row.get("id") or "").strip()
    except OSError as error:
        raise VideoError(f"cannot read {list_file}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise VideoError(f"{list_file} is no list of videos: {error}") from error


def hash_file(path: Path, on_chunk: Callable[[], None] = lambda: None) -> bytes:
    """Return the SHA-256 of a file.

    Args:
        path: The file.
        on_chunk: Called now and then, while there is more to read.

    Raises:
        VideoError: If it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(HASHED_BYTES):
                digest.update(chunk)
                on_chunk()
            return digest.digest()
    except OSError as error:
        raise VideoError(f"cannot read {path}: {error.strerror}") from error


def _video_files(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise VideoError(f"cannot look into {error.filename}: {error.strerror}") from error

    seen: set[str] = set()  # links may lead back
    for where, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(where)) in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            # "._name" are resource forks that some archives leave beside the real files.
            if name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith("._"):
                yield Path(where) / name
