"""Beginning in the middle of a video gives the frames of decoding all of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from stores import decode
from stores.decode import FrameIndex, decode_spans, decode_video, index_video
from stores.errors import VideoError

FRAMES = 150
OPEN_GOP = {"x264-params": "open-gop=1:keyint=24:min-keyint=24:bframes=3:scenecut=0"}
INTRA_REFRESH = {"x264-params": "intra-refresh=1:keyint=24:bframes=2"}
VIDEOS: dict[str, tuple[str, dict[str, str], str]] = {
    "mpeg4-b-frames.avi": ("mpeg4", {"g": "12", "bf": "2"}, "yuv420p"),
    "mpeg4-b-frames.mp4": ("mpeg4", {"g": "12", "bf": "2"}, "yuv420p"),
    "h264-open-gop.mp4": ("libx264", OPEN_GOP, "yuv420p"),
    "h264-open-gop.mkv": ("libx264", OPEN_GOP, "yuv420p"),
    "h264-open-gop.avi": ("libx264", OPEN_GOP, "yuv420p"),
    "h264-10-bit.mp4": ("libx264", {"g": "24"}, "yuv420p10le"),
    "h264-intra-refresh.mp4": ("libx264", INTRA_REFRESH, "yuv420p"),
    "mpeg2.mpg": ("mpeg2video", {"g": "12", "bf": "2"}, "yuv420p"),
    "mjpeg.avi": ("mjpeg", {}, "yuvj420p"),
    "vp9.webm": ("libvpx-vp9", {"g": "30", "lag-in-frames": "16", "cpu-used": "8"}, "yuv420p"),
}
CANNOT_BE_SOUGHT = {"h264-intra-refresh.mp4", "mpeg2.mpg"}
"""No key frames but the first; timestamps that are not all different."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of noise that moves, so that every frame is another and hard to predict."""
    folder = tmp_path_factory.mktemp("codecs")
    for name, (codec, options, pixels) in VIDEOS.items():
        rng = np.random.default_rng(1)
        ground = rng.integers(0, 255, (64, 96, 3), np.uint8)
        with av.open(str(folder / name), "w") as container:
            stream: Any = container.add_stream(codec, rate=25, options=options)
            stream.height, stream.width, stream.pix_fmt = 64, 96, pixels
            for number in range(FRAMES):
                picture = np.roll(ground, 2 * number, 1)
                picture[:, :8] = rng.integers(0, 255, (64, 8, 3))
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the frames that come out of decoders."""
    counter: list[int] = []
    raw_frames = decode._raw_frames

    def count(*arguments: Any) -> Iterator[Any]:  # noqa: ANN401
        for frame in raw_frames(*arguments):
            counter.append(1)
            yield frame

    monkeypatch.setattr(decode, "_raw_frames", count)
    return counter


def frames_of(path: Path, spans: list[range], index: FrameIndex | None) -> dict[int, Any]:
    seen = index_video(path)
    size = (seen.height, seen.width)
    return dict(decode_spans(path, spans, size=size, index=index))


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_that_are_sought_are_those_of_decoding_all(
    folder: Path, name: str, decoded: list[int]
) -> None:
    path = folder / name
    every = list(decode_video(path))
    seen = index_video(path)
    assert seen.frames == len(every) == FRAMES
    rng = np.random.default_rng(0)
    decoded.clear()
    for _ in range(12):
        start = int(rng.integers(60, FRAMES - 8))
        span = range(start, int(rng.integers(start + 1, min(start + 12, FRAMES))))
        index = seen.frame_index.part(span) if seen.frame_index is not None else None
        found = dict(decode_spans(path, [span], size=(64, 96), index=index))
        assert list(found) == list(span)
        for number, frame in found.items():
            np.testing.assert_array_equal(frame, every[number])
    average = len(decoded) / 12
    if name in CANNOT_BE_SOUGHT:
        assert average > 60
    else:  # a few groups of pictures, instead of all before the span
        assert average < 60


@pytest.mark.parametrize("name", ["mpeg4-b-frames.avi", "h264-open-gop.mp4", "vp9.webm"])
def test_several_spans_are_found_one_after_the_other(
    folder: Path, name: str, decoded: list[int]
) -> None:
    path = folder / name
    every, index = list(decode_video(path)), index_video(path).frame_index
    spans = [range(3), range(5, 9), range(70, 71), range(72, 80), range(140, FRAMES)]
    decoded.clear()
    found = dict(decode_spans(path, spans, size=(64, 96), index=index))
    assert list(found) == [number for span in spans for number in span]
    for number, frame in found.items():
        np.testing.assert_array_equal(frame, every[number])
    assert len(decoded) < FRAMES


def test_index_that_is_wrong_is_noticed(folder: Path) -> None:
    """Frames are known by their pixels, not by what a container says of them."""
    path = folder / "h264-open-gop.mp4"
    every, index = list(decode_video(path)), index_video(path).frame_index
    assert index is not None
    shifted = replace(index, timestamps=np.roll(index.timestamps, 24))
    other = replace(index, checksums=index.checksums + 1)
    late = replace(index, checksums=np.where(np.arange(FRAMES) > 103, 0, index.checksums))
    for wrong in (shifted, other, late):
        found = dict(decode_spans(path, [range(100, 110)], size=(64, 96), index=wrong))
        assert list(found) == list(range(100, 110))
        for number, frame in found.items():
            np.testing.assert_array_equal(frame, every[number])


def test_colours_are_looked_at_too(folder: Path, tmp_path: Path) -> None:
    """A palette that came before the key frame is gone after a seek, and with it the picture."""
    path = tmp_path / "palette.avi"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("rawvideo", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "pal8"
        rng = np.random.default_rng(0)
        palette = rng.integers(0, 255, (256, 4), np.uint8)
        palette[:, 3] = 255
        for number in range(60):
            picture = np.full((64, 96), number, np.uint8)
            planes: Any = (picture, palette)
            frame = av.VideoFrame.from_ndarray(planes, format="pal8")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    every, seen = list(decode_video(path)), index_video(path)
    found = dict(decode_spans(path, [range(40, 50)], size=(64, 96), index=seen.frame_index))
    for number, shown in found.items():
        np.testing.assert_array_equal(shown, every[number])


@pytest.mark.parametrize(
    "name", ["mpeg4-b-frames.avi", "h264-open-gop.mp4", "h264-10-bit.mp4", "mpeg2.mpg"]
)
def test_damaged_videos_have_the_same_frames_from_wherever_they_are_decoded(
    folder: Path, name: str, tmp_path: Path
) -> None:
    data = bytearray((folder / name).read_bytes())
    rng = np.random.default_rng(4)
    for place in rng.integers(len(data) // 4, 3 * len(data) // 4, 40):
        data[place] ^= 0xFF
    path = tmp_path / name
    path.write_bytes(data)
    every, seen = list(decode_video(path)), index_video(path)
    assert seen.frames == len(every) > 40
    for start in range(30, len(every) - 5, 17):
        span = range(start, start + 5)
        found = dict(
            decode_spans(path, [span], size=(seen.height, seen.width), index=seen.frame_index)
        )
        for number, frame in found.items():
            np.testing.assert_array_equal(frame, every[number])


def test_index_survives_packing_and_no_other_bytes_do(folder: Path) -> None:
    index = index_video(folder / "mpeg4-b-frames.avi").frame_index
    assert index is not None
    again = FrameIndex.unpack(index.pack(), FRAMES)
    for name in ("timestamps", "checksums", "is_key"):
        np.testing.assert_array_equal(getattr(again, name), getattr(index, name))
    for packed, frames in ((b"nothing", FRAMES), (index.pack(), FRAMES + 1), (b"", 0)):
        with pytest.raises(ValueError, match="no index"):
            FrameIndex.unpack(packed, frames)


def test_span_beyond_the_end_is_an_error(folder: Path) -> None:
    path = folder / "mjpeg.avi"
    with pytest.raises(VideoError, match=f"ended before frame {FRAMES}"):
        frames_of(path, [range(FRAMES - 2, FRAMES + 2)], None)


@pytest.mark.shared
def test_real_video_is_sought_exactly(shared: Path, decoded: list[int]) -> None:
    path = shared / "video" / "0068.AVI"
    seen = index_video(path)
    assert seen.frames == 540
    every = list(decode_video(path))
    decoded.clear()
    span = range(400, 410)
    for number, frame in frames_of(path, [span], seen.frame_index).items():
        np.testing.assert_array_equal(frame, every[number])
    assert len(decoded) - 540 < 40  # frames_of looks at its size first
