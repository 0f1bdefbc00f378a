"""Videos on disk: find, probe and decode them. A frame is known by its 0-based decoded index."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from stores.errors import VideoError

Frame = npt.NDArray[np.uint8]
"""A decoded frame, ``(height, width, 3)`` RGB."""

Reader = Literal["pyav", "skvideo"]
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


class VideoHeader(NamedTuple):
    """What a container tells of its video; it may be wrong."""

    frames: int
    """0 when it does not tell."""
    fps: Fraction
    """Average frames per second; 0 when it does not tell."""
    height: int
    width: int


def read_header(path: Path) -> VideoHeader:
    """Read what a container tells of its video, without decoding.

    Raises:
        VideoError: If it cannot be opened as a video.
    """
    with _open_container(path) as container:
        stream = _video_stream(container, path)
        fps = Fraction(stream.average_rate or 0)
        seconds = float((stream.duration or 0) * (stream.time_base or 0))
        frames = stream.frames or round(seconds * fps)
        return VideoHeader(frames, fps, stream.height or 0, stream.width or 0)


def find_videos(paths: Sequence[Path]) -> list[VideoFile]:
    """Return the videos in files and folders, folders searched to their bottom, ordered by id.

    A folder's videos are named by their path below it, a file by its name.

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
            relative = file.relative_to(root)
            video = VideoFile(
                id=relative.with_suffix("").as_posix(),
                root=root.resolve(),
                path=relative.as_posix(),
            )
            other = found.setdefault(video.id, video)
            if other.absolute != video.absolute:
                raise VideoError(
                    f"{other.absolute} and {video.absolute} would both be called {video.id!r}; "
                    "rename one or label them into different stores"
                )
    return [found[id_] for id_ in sorted(found)]


def hash_file(path: Path) -> bytes:
    """Return the SHA-256 of a file.

    Raises:
        VideoError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise VideoError(f"cannot read {path}: {error.strerror}") from error


def probe_video(
    video: VideoFile, *, content_hash: bytes | None = None, reader: Reader = "pyav"
) -> VideoRecord:
    """Decode a video once to learn its true number of frames.

    Headers and indices of containers are not believed: they are wrong for cut and damaged files.

    Raises:
        VideoError: If there is not one frame that can be decoded.
    """
    digest = content_hash or hash_file(video.absolute)
    frames = height = width = 0
    for frame in decode_video(video.absolute, reader=reader):
        frames += 1
        height, width = frame.shape[:2]
    return VideoRecord(
        id=video.id,
        root=str(video.root),
        path=video.path,
        content_hash=digest,
        frames=frames,
        height=height,
        width=width,
        fps=float(read_header(video.absolute).fps),
    )


def decode_video(path: Path, *, reader: Reader = "pyav") -> Iterator[Frame]:
    """Yield all frames of a video in order.

    Damaged packets are passed over, as players do; rotation tags are ignored; a frame of another
    size than the first is scaled to it.

    Args:
        path: The video.
        reader: ``pyav``, or ``skvideo`` where ffmpeg and ffprobe are installed.

    Raises:
        VideoError: If the file cannot be opened or holds no frame that can be decoded.
    """
    if reader == "skvideo":
        from stores.skvideo_reader import decode_frames as decode_with_skvideo

        frames = decode_with_skvideo(path)
    else:
        frames = _decode_with_pyav(path)
    is_empty = True
    for frame in frames:
        is_empty = False
        yield frame
    if is_empty:
        raise VideoError(f"no frame of {path} can be decoded; is the file damaged?")


def decoder_version(reader: Reader) -> dict[str, str]:
    """Return the names and versions that decide a decoded frame's pixels."""
    import av

    if reader == "skvideo":
        from stores.skvideo_reader import ffmpeg_version

        return {"reader": reader, "ffmpeg": ffmpeg_version()}
    libraries = ("libavcodec", "libavformat", "libswscale")
    versions = {name: ".".join(map(str, av.library_versions[name])) for name in libraries}
    return {"reader": reader, **versions}


def _video_files(folder: Path) -> Iterator[Path]:
    for where, _, names in os.walk(folder):
        for name in names:
            # "._name" are resource forks that some archives leave beside the real files.
            if name.lower().endswith(VIDEO_SUFFIXES) and not name.startswith("._"):
                yield Path(where) / name


def _decode_with_pyav(path: Path) -> Iterator[Frame]:
    import av

    with _open_container(path) as container:
        stream = _video_stream(container, path)
        # One thread: with more, what a damaged file gives depends on their number.
        stream.codec_context.thread_count = 1
        width = height = 0
        try:
            for packet in container.demux(stream):
                try:
                    decoded = packet.decode()
                except av.error.InvalidDataError:
                    continue
                for frame in decoded:
                    width, height = width or frame.width, height or frame.height
                    yield frame.to_ndarray(format="rgb24", width=width, height=height)
        except av.error.FFmpegError as error:
            # The end of a cut file: what was decoded stands; nothing decoded is an error.
            if not width:
                raise VideoError(f"cannot decode {path}: {error.strerror}") from error


def _open_container(path: Path) -> Any:  # noqa: ANN401 - PyAV's input container
    import av

    try:
        return av.open(str(path), mode="r")
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"cannot open {path} as a video: {error.strerror}") from error


def _video_stream(container: Any, path: Path) -> Any:  # noqa: ANN401 - PyAV's video stream
    if not container.streams.video:
        raise VideoError(f"{path} has no video stream")
    return container.streams.video[0]
