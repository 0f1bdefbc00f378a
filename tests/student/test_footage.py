"""Clips that are decoded from the middle of a video are those of decoding all of it."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stores import decode
from stores.decode import decode_video
from stores.errors import VideoError
from stores.frames import resize_frames
from stores.probing import Probe, probe_videos
from stores.table import VideoRow
from stores.videos import VideoFile
from student.footage import Footage
from tests.conftest import MakeVideo
from tests.miniature import write_png, write_video

FRAMES = 90
KINDS = ("b-frames.avi", "h264.mp4", "images")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_video: MakeVideo) -> Path:
    """The same frames as MPEG-4 with B-frames, as H.264, and as a folder of images."""
    folder = tmp_path_factory.mktemp("footage")
    path = make_video(folder / "b-frames.avi", frames=FRAMES)
    frames = np.stack(list(decode_video(path)))
    write_video(folder / "h264.mp4", frames, rate=Fraction(25))
    for number, frame in enumerate(frames):
        write_png(folder / "images" / f"{number}.png", frame)
    return folder


def row_of(folder: Path, name: str) -> VideoRow:
    (probe,) = probe_videos([VideoFile(Path(name).stem, folder, name)])
    assert isinstance(probe, Probe)
    return VideoRow(**asdict(probe.record), first=0)


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


@pytest.mark.parametrize("size", [(48, 64), (32, 40)])
@pytest.mark.parametrize("name", KINDS)
def test_clips_are_those_of_decoding_all(
    folder: Path, name: str, size: tuple[int, int], decoded: list[int]
) -> None:
    row = row_of(folder, name)
    every = resize_frames(np.stack(list(decode_video(folder / name))), *size)
    footage = Footage(height=size[0], width=size[1])
    footage.find([row])
    footage = pickle.loads(pickle.dumps(footage))  # as loader workers get it
    late = [40, 59, 60, 61, 71, FRAMES - 16]
    for start in [0, 1, 11, 12, 13, *late]:
        if start == late[0]:
            decoded.clear()
        clip = footage.read(row, range(start, start + 16))
        np.testing.assert_array_equal(clip, every[start : start + 16])
    # Some frames since a key frame, and the clip; from the beginning it would be 76 on average.
    assert len(decoded) / len(late) < (17 if name == "images" else 30)


@pytest.mark.parametrize("name", KINDS)
def test_videos_that_were_not_looked_at_can_be_read(folder: Path, name: str) -> None:
    every = np.stack(list(decode_video(folder / name)))
    clip = Footage(height=48, width=64).read(row_of(folder, name), range(50, 66))
    np.testing.assert_array_equal(clip, every[50:66])


@pytest.mark.parametrize("name", KINDS)
def test_videos_that_are_not_those_that_were_labelled_are_named(
    folder: Path, name: str, tmp_path: Path
) -> None:
    row = row_of(folder, name)
    footage = Footage(height=48, width=64, root=tmp_path)
    with pytest.raises(VideoError, match=rf"{name} is not there; .* --videos-root"):
        footage.find([row])
    if name == "images":
        shutil.copytree(folder / name, tmp_path / name)
        (tmp_path / name / "7.png").unlink()
    else:
        shutil.copy(folder / name, tmp_path / name)
        with (tmp_path / name).open("ab") as file:
            file.write(b"more")
    with pytest.raises(VideoError, match=rf"{name} is not the video that was labelled as '.*'"):
        footage.find([row])


def test_other_decoders_are_noticed(folder: Path) -> None:
    row = row_of(folder, "h264.mp4")
    with pytest.raises(VideoError, match=f"has {FRAMES} frames here, and had {FRAMES + 1} when"):
        Footage(height=48, width=64).find([replace(row, frames=FRAMES + 1)])


def test_all_faults_are_counted(folder: Path, tmp_path: Path) -> None:
    rows = [row_of(folder, name) for name in KINDS]
    shutil.copy(folder / "h264.mp4", tmp_path)
    with pytest.raises(VideoError, match=r"b-frames\.avi is not there.* \(2 videos of 3 are"):
        Footage(height=48, width=64, root=tmp_path).find(rows)
    (tmp_path / "h264.mp4").write_bytes(b"nothing")
    with pytest.raises(VideoError, match=r"h264\.mp4.* --videos-root"):
        Footage(height=48, width=64, root=tmp_path).find(rows[1:2])


@pytest.mark.parametrize("name", KINDS)
def test_video_that_changes_later_is_not_read(folder: Path, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    (shutil.copytree if name == "images" else shutil.copy)(folder / name, path)
    row = row_of(tmp_path, name)
    footage = Footage(height=48, width=64)
    footage.find([row])
    footage.read(row, range(16))
    os.utime(path, ns=(0, 0))
    if name == "images":  # whichever of them changes
        write_png(path / "3.png", np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(VideoError, match="changed after training began"):
        footage.read(row, range(16))
