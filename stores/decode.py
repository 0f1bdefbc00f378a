"""Decode videos, whole or from any frame on. A frame is known by its 0-based decoded index.

A video is a file, or a folder of images in natural order.

Frame *t* of a video is the *t*-th frame that a decoder gives that begins at the file's beginning.
Beginning later is a shortcut to the same frames, and checked: :class:`FrameIndex` knows each
frame's timestamp and a checksum of its pixels; where either differs, decoding begins anew at an
earlier place, at last at the file's beginning.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt

from stores.errors import ImageError, VideoError
from stores.images import list_images, read_sequence, read_size

Frame = npt.NDArray[np.uint8]
"""A decoded frame, ``(height, width, 3)`` RGB."""

Reader = Literal["pyav", "skvideo"]
PLANAR: Final = frozenset(
    f"yuv{j}{sampling}p" for j in ("", "j") for sampling in ("420", "422", "444")
)
"""Formats of a byte per sample, whose planes need not be turned into RGB to be compared."""
INDEX_VERSION: Final = 2
"""Of what is kept of a video's frames; raised when it is made in another way."""
SEEKS_TRIED: Final = (0.45, 0.9)
"""Where in a video it is tried whether decoding can begin in the middle."""
SHORT_FRAMES: Final = 300
"""Videos of so few frames are decoded from their beginning as fast."""
KEYS_TRIED: Final = 4
"""Key frames before a frame, from the last one back, at which decoding is tried to begin."""


class VideoHeader(NamedTuple):
    """What a container tells of its video; it may be wrong."""

    frames: int
    """0 when it does not tell."""
    fps: Fraction
    """Average frames per second; 0 when it does not tell."""
    height: int
    width: int


@dataclass(frozen=True)
class FrameIndex:
    """Where frames of a video lie in its file, and how they are known again."""

    first: int
    """The frame that entry 0 is about."""
    timestamps: npt.NDArray[np.int64]
    """Of each frame, in the time base of the stream; no two are equal. Of an image its rank."""
    checksums: npt.NDArray[np.uint32]
    """CRC-32C of each frame's pixels, as the decoder gives them."""
    is_key: npt.NDArray[np.bool_]
    """Whether decoding can begin at a frame."""

    def keys_before(self, frame: int) -> list[int]:
        """Return the last few frames up to ``frame`` at which decoding can begin, last first."""
        keys = np.flatnonzero(self.is_key[: max(0, frame - self.first + 1)])
        return [self.first + int(key) for key in reversed(keys[-KEYS_TRIED:])]

    def part(self, span: range) -> FrameIndex:
        """Return what is needed to decode ``span``: from some key frames before it on."""
        start = min([span.start, *self.keys_before(span.start)])
        rows = slice(start - self.first, span.stop - self.first)
        return FrameIndex(
            start,
            self.timestamps[rows].copy(),
            self.checksums[rows].copy(),
            self.is_key[rows].copy(),
        )

    def pack(self) -> bytes:
        """Return the index of a whole video as bytes."""
        steps = np.diff(self.timestamps, prepend=0).astype("<i8").tobytes()
        checksums = self.checksums.astype("<u4").tobytes()
        return zlib.compress(steps + checksums + np.packbits(self.is_key).tobytes(), 6)

    @classmethod
    def unpack(cls, packed: bytes, frames: int) -> FrameIndex:
        """Return what :meth:`pack` was given.

        Raises:
            ValueError: If these are no such bytes.
        """
        try:
            data = zlib.decompress(packed)
        except zlib.error as error:
            raise ValueError(f"no index of frames: {error}") from error
        steps, checksums, keys = 8 * frames, 4 * frames, -(-frames // 8)
        if len(data) != steps + checksums + keys:
            raise ValueError(f"no index of {frames} frames")
        bits = np.frombuffer(data, np.uint8, offset=steps + checksums)
        return cls(
            0,
            np.cumsum(np.frombuffer(data, "<i8", frames)),
            np.frombuffer(data, "<u4", frames, offset=steps).copy(),
            np.unpackbits(bits, count=frames).astype(np.bool_),
        )


class IndexedVideo(NamedTuple):
    """What decoding a whole video tells of it."""

    frames: int
    height: int
    width: int
    frame_index: FrameIndex | None
    """Nothing where decoding can only begin at the beginning."""


def read_header(path: Path) -> VideoHeader:
    """Read what a container tells of its video, without decoding.

    Raises:
        VideoError: If it cannot be opened as a video.
    """
    if path.is_dir():
        names = list_images(path)
        for name in names:
            with suppress(ImageError):  # it is no frame
                return VideoHeader(len(names), Fraction(0), *read_size(path / name))
        return VideoHeader(len(names), Fraction(0), 0, 0)
    with _open_container(path) as container:
        stream = _video_stream(container, path)
        fps = Fraction(stream.average_rate or 0)
        seconds = float((stream.duration or 0) * (stream.time_base or 0))
        frames = stream.frames or round(seconds * fps)
        return VideoHeader(frames, fps, stream.height or 0, stream.width or 0)


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
    is_empty = True
    with_skvideo = reader == "skvideo" and not path.is_dir()
    for frame in _decode_with_skvideo(path) if with_skvideo else _decode_with_pyav(path):
        is_empty = False
        yield frame
    if is_empty:
        raise VideoError(f"no frame of {path} can be decoded; is the file damaged?")


def decode_images(folder: Path) -> Iterator[tuple[str, Frame]]:
    """Yield a folder's images, as :func:`decode_video` does, each with its name.

    Raises:
        VideoError: If the folder cannot be looked into or holds no image that can be decoded.
    """
    names = list_images(folder)
    width = height = 0
    for frame in _raw_frames(folder):
        width, height = width or frame.width, height or frame.height
        yield names[frame.pts], frame.to_ndarray(format="rgb24", width=width, height=height)
    if not width:
        raise VideoError(f"no image in {folder} can be decoded")


def decode_spans(
    path: Path,
    spans: Sequence[range],
    *,
    size: tuple[int, int],
    index: FrameIndex | None = None,
    reader: Reader = "pyav",
    on_frame: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, Frame]]:
    """Yield frames of some spans of a video, each with its number, the same as decoding all would.

    Args:
        path: The video.
        spans: In ascending order, none touching another.
        size: Height and width of the video's first frame.
        index: At least of the spans, by which what lies between them need not be decoded.
        reader: As in :func:`decode_video`; ``skvideo`` always decodes from the beginning.
        on_frame: Called for every frame that is decoded, wanted or not: a sign of life.

    Raises:
        VideoError: If the file cannot be opened, or ends before the spans do.
    """
    if reader == "skvideo" and not path.is_dir():
        frames = enumerate(_decode_with_skvideo(path))
        for span in spans:
            for number in span:
                yield number, _next_frame(frames, number, path, on_frame)
        return
    height, width = size
    source = enumerate(_raw_frames(path))
    number = -1  # of the last frame that came
    is_checked = False
    for span in spans:
        keys = index.keys_before(span.start) if index is not None else []
        if index is not None and keys and keys[0] > number + 1:
            found = _seek(path, index, span.start)
            if found is None:
                index = None
                if is_checked:
                    is_checked, source = False, enumerate(_raw_frames(path))
            else:
                source, is_checked = enumerate(found, span.start), True
        for wanted in span:
            frame = _next_frame(source, wanted, path, on_frame)
            if is_checked and index is not None and not _is_frame(frame, index, wanted):
                index, is_checked = None, False
                source = enumerate(_raw_frames(path))
                frame = _next_frame(source, wanted, path, on_frame)
            number = wanted
            yield wanted, frame.to_ndarray(format="rgb24", width=width, height=height)


def index_video(
    path: Path, *, reader: Reader = "pyav", on_frame: Callable[[int], None] | None = None
) -> IndexedVideo:
    """Decode a whole video once to learn its true number of frames and where they lie.

    Headers and indices of containers are not believed: they are wrong for cut and damaged files.

    Args:
        path: The video.
        reader: As in :func:`decode_video`; ``skvideo`` gives no index.
        on_frame: Called with the number of frames so far.

    Raises:
        VideoError: If there is not one frame that can be decoded.
    """
    is_sequence = path.is_dir()
    with_skvideo = reader == "skvideo" and not is_sequence
    count = height = width = 0
    timestamps: list[int | None] = []
    checksums: list[int] = []
    keys: list[bool] = []
    frames: Iterator[Any] = decode_video(path, reader=reader) if with_skvideo else _raw_frames(path)
    for frame in frames:
        if not count:
            height, width = frame.shape[:2] if with_skvideo else (frame.height, frame.width)
        count += 1
        if not with_skvideo:
            timestamps.append(_timestamp(frame))
            checksums.append(_checksum(frame))
            keys.append(is_sequence or frame.key_frame)
        if on_frame is not None:
            on_frame(count)
    if not count:
        raise VideoError(f"no frame of {path} can be decoded; is the file damaged?")
    known = [value for value in timestamps if value is not None]
    if not timestamps or len(set(known)) != count:
        return IndexedVideo(count, height, width, None)
    index = FrameIndex(
        0, np.array(known, np.int64), np.array(checksums, np.uint32), np.array(keys, np.bool_)
    )
    return IndexedVideo(count, height, width, index if _can_seek(path, index, count) else None)


def decoder_version(reader: Reader) -> dict[str, str]:
    """Return the names and versions that decide a decoded frame's pixels."""
    import av

    if reader == "skvideo":
        from stores.skvideo_reader import ffmpeg_version

        return {"reader": reader, "ffmpeg": ffmpeg_version()}
    libraries = ("libavcodec", "libavformat", "libswscale")
    versions = {name: ".".join(map(str, av.library_versions[name])) for name in libraries}
    return {"reader": reader, **versions}


def _decode_with_skvideo(path: Path) -> Iterator[Frame]:
    from stores.skvideo_reader import decode_frames

    return decode_frames(path)


def _decode_with_pyav(path: Path) -> Iterator[Frame]:
    width = height = 0
    for frame in _raw_frames(path):
        width, height = width or frame.width, height or frame.height
        yield frame.to_ndarray(format="rgb24", width=width, height=height)


def _raw_frames(path: Path, seek_to: int | None = None) -> Iterator[Any]:
    """Yield PyAV's frames, from the beginning or from the key frame at a timestamp on."""
    import av

    if path.is_dir():
        for rank, picture in read_sequence(path, seek_to or 0):
            image = av.VideoFrame.from_ndarray(picture, format="rgb24")
            image.pts = rank
            yield image
        return
    with _open_container(path) as container:
        stream = _video_stream(container, path)
        # One thread: with more, what a damaged file gives depends on their number.
        stream.codec_context.thread_count = 1
        count = 0
        try:
            if seek_to is not None:
                container.seek(seek_to, stream=stream, backward=True)
            for packet in container.demux(stream):
                try:
                    decoded = packet.decode()
                except av.error.InvalidDataError:
                    continue
                for frame in decoded:
                    count += 1
                    yield frame
        except (av.error.FFmpegError, IndexError) as error:
            # The end of a cut file: what was decoded stands; nothing decoded is an error. Damage
            # may also invent a stream that PyAV does not know.
            if not count:
                raise VideoError(f"cannot decode {path}: {error}") from error


def _can_seek(path: Path, index: FrameIndex, frames: int) -> bool:
    """Return whether decoding can begin in the middle; a container without an index may not let it.

    A long video whose parts are each decoded from its beginning would take ages.
    """
    if frames <= SHORT_FRAMES:
        return True
    wanted = [int(frames * share) for share in SEEKS_TRIED]
    tried = [frame for frame in wanted if any(key > 0 for key in index.keys_before(frame))]
    return bool(tried) and all(_seek(path, index, frame) is not None for frame in tried)


def _seek(path: Path, index: FrameIndex, wanted: int) -> Iterator[Any] | None:
    """Return frames from ``wanted`` on, decoded from a key frame before; nothing if that fails.

    Earlier key frames are tried when the last one does not do: what follows it may look back to
    what was before it (open groups of pictures), and where B-frames delay the pictures, some
    containers come out at the key frame after the one that was sought.
    """
    number_at = {int(time): index.first + row for row, time in enumerate(index.timestamps)}
    for key in index.keys_before(wanted):
        frames = _raw_frames(path, int(index.timestamps[key - index.first]))
        try:
            for frame in frames:
                time = _timestamp(frame)
                number = wanted + 1 if time is None else number_at.get(time, wanted + 1)
                if number == wanted and _is_frame(frame, index, wanted):
                    return _chain(frame, frames)
                if number >= wanted:  # beyond it, or at a place where numbers cannot be told
                    break
        except VideoError:
            pass
        frames.close()  # type: ignore[attr-defined]
    return None


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:  # noqa: ANN401 - PyAV's frames
    with closing(rest):  # type: ignore[type-var]
        yield first
        yield from rest


def _next_frame(
    frames: Iterator[tuple[int, Any]], wanted: int, path: Path, on_frame: Callable[[], None]
) -> Any:  # noqa: ANN401 - PyAV's frame, or pixels
    """Return the frame of a number; those before it are passed."""
    for number, frame in frames:
        on_frame()
        if number == wanted:
            return frame
    raise VideoError(f"{path} ended before frame {wanted}; it had more when it was probed")


def _is_frame(frame: Any, index: FrameIndex, number: int) -> bool:  # noqa: ANN401
    """Return whether PyAV's frame is that of a number."""
    row = number - index.first
    if not 0 <= row < len(index.timestamps):
        return False
    return bool(
        _timestamp(frame) == index.timestamps[row] and _checksum(frame) == index.checksums[row]
    )


def _timestamp(frame: Any) -> int | None:  # noqa: ANN401 - PyAV's frame
    time = frame.pts if frame.pts is not None else frame.dts
    return None if time is None else int(time)


def _checksum(frame: Any) -> int:  # noqa: ANN401 - PyAV's frame
    """Return the CRC-32C of all that decides a frame's pixels, less what pads its lines."""
    name = frame.format.name
    checksum = google_crc32c.value(f"{name} {frame.colorspace} {frame.color_range}".encode())
    if name not in PLANAR:
        return int(google_crc32c.extend(checksum, frame.to_ndarray(format="rgb24").tobytes()))
    for plane in frame.planes:
        lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: plane.height]
        checksum = google_crc32c.extend(checksum, lines[:, : plane.width].tobytes())
    return int(checksum)


def _open_container(path: Path) -> Any:  # noqa: ANN401 - PyAV's input container
    import av

    try:
        return av.open(str(path), mode="r")
    except (av.error.FFmpegError, OSError) as error:
        raise VideoError(f"cannot open {path} as a video: {error.strerror}") from error


def _video_stream(container: Any, path: Path) -> Any:  # noqa: ANN401 - PyAV's video stream
    for stream in container.streams.video:
        if "attached_pic" not in str(stream.disposition):  # a cover is no video
            return stream
    raise VideoError(f"{path} has no video stream")
