from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image

from cli import cli
from stores.decode import decode_video, read_header
from student.checkpoints import save_checkpoint
from student.inference import clip_windows
from student.pictures import finish_map, gray_map, resize_map
from student.predict import (
    PredictReport,
    PredictSettings,
    _NamedFrames,
    _Writer,
    predict_videos,
)
from student.reference import import_weights
from student.runtimes import Runtime, TorchRuntime
from student.tinyhd import TinyHD
from tests.conftest import MakeVideo
from tests.student.networks import fill_weights


def network(output_frames: int) -> TinyHD:
    flags: dict[str, Any] = {
        **{"channel_reduction": 8, "decoders": ["d3"], "single": [output_frames == 1]},
        "output_frames": output_frames,
    }
    return import_weights(fill_weights(flags), **flags, height=32, width=32)


def predict(
    videos: Path,
    out: Path,
    runtime: Runtime | TinyHD,
    settings: PredictSettings = PredictSettings(),  # noqa: B008 - frozen
) -> PredictReport:
    student = TorchRuntime(runtime) if isinstance(runtime, TinyHD) else runtime
    return predict_videos([videos], out, student, settings, weights_hash="w")


def read_maps(folder: Path) -> list[npt.NDArray[np.uint8]]:
    return [np.asarray(Image.open(file)) for file in sorted((folder / "maps").iterdir())]


@pytest.mark.parametrize("output_frames", [1, 8, 16])
@pytest.mark.parametrize("length", [1, 5, 8, 15, 16, 17, 24, 40, 48])
def test_every_frame_is_mapped_by_the_last_window_that_sees_it_new(
    length: int, output_frames: int
) -> None:
    windows = list(clip_windows(range(length), output_frames=output_frames))
    ends = sorted({*range(output_frames - 1, length, output_frames), length - 1})
    assert [window.newest for window in windows] == ends
    for window in windows:
        assert window.frames == tuple(max(0, window.newest - back) for back in range(15, -1, -1))
    mapped = {window.newest - back for window in windows for back in range(output_frames)}
    assert set(range(length)) <= mapped


def test_no_frames_give_no_window() -> None:
    assert list(clip_windows([], output_frames=16)) == []


@pytest.mark.parametrize("length", [5, 20, 35])
@pytest.mark.parametrize("output_frames", [1, 8, 16])
def test_maps_are_those_of_the_network(
    tmp_path: Path, make_video: MakeVideo, length: int, output_frames: int
) -> None:
    """Computed here window by window, the last one over the one before."""
    video = make_video(tmp_path / "videos" / "v.avi", frames=length, height=38, width=46)
    model = network(output_frames)
    report = predict(tmp_path / "videos", tmp_path / "out", model)
    assert (report.videos, report.frames, report.failures) == (1, length, [])
    decoded = list(decode_video(video))
    pictures = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float()
    frames = F.interpolate(pictures, (32, 32), mode="bilinear") / 255
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    frames = (frames - mean) / std
    expected: dict[int, npt.NDArray[np.float32]] = {}
    for end in sorted({*range(output_frames - 1, length, output_frames), length - 1}):
        picked = frames[np.maximum(np.arange(end - 15, end + 1), 0)]
        with torch.inference_mode():
            saliency = model(picked.transpose(0, 1)[None]).saliency
        for back, saliency_map in enumerate(reversed(saliency.reshape(-1, 32, 32).numpy())):
            expected[end - back] = saliency_map
    maps = read_maps(tmp_path / "out" / "v")
    assert len(maps) == length
    for index, found in enumerate(maps):
        wanted = gray_map(resize_map(expected[index], 38, 46))
        assert np.abs(found.astype(int) - wanted).max() <= 1
    overlay = list(decode_video(tmp_path / "out" / "v" / "overlay.mp4"))
    assert len(overlay) == length
    assert overlay[0].shape == (38, 46, 3)
    assert read_header(tmp_path / "out" / "v" / "overlay.mp4").fps == read_header(video).fps == 25


def test_batches_and_odd_sizes(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "even" / "v.avi", frames=9, height=34, width=50)
    frames = [frame[:33, :49] for frame in decode_video(tmp_path / "even" / "v.avi")]
    import av

    (tmp_path / "odd").mkdir()
    with av.open(str(tmp_path / "odd" / "v.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.height, stream.width, stream.pix_fmt = 33, 49, "bgr0"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    model = network(1)
    predict(tmp_path / "odd", tmp_path / "one", TorchRuntime(model))
    predict(tmp_path / "odd", tmp_path / "four", TorchRuntime(model, batch=4))
    one, four = read_maps(tmp_path / "one" / "v"), read_maps(tmp_path / "four" / "v")
    assert {picture.shape for picture in one} == {(33, 49)}
    assert len(one) == len(four) == 9
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(one, four, strict=True)) <= 1
    overlay = list(decode_video(tmp_path / "one" / "v" / "overlay.mp4"))
    assert (len(overlay), overlay[0].shape) == (9, (32, 48, 3))


class Stopping(TorchRuntime):
    """Counts clips, and is interrupted before one of them."""

    def __init__(self, model: TinyHD, *, stop_at: int | None = None) -> None:
        super().__init__(model)
        self.clips, self.stop_at = 0, stop_at

    def predict(
        self, clips: npt.NDArray[np.float32], *, newest: Sequence[int] | None = None
    ) -> npt.NDArray[np.float32]:
        if self.clips == self.stop_at:
            raise KeyboardInterrupt
        self.clips += len(clips)
        return super().predict(clips, newest=newest)


@pytest.mark.parametrize("output_frames", [1, 16])
def test_a_stopped_run_continues_to_the_same_files(
    tmp_path: Path, make_video: MakeVideo, output_frames: int
) -> None:
    make_video(tmp_path / "videos" / "v.avi", frames=75)
    model = network(output_frames)
    whole = Stopping(model)
    predict(tmp_path / "videos", tmp_path / "whole", whole)
    half = whole.clips - 1
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path / "videos", tmp_path / "out", Stopping(model, stop_at=half))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["v.partial"]
    rest = Stopping(model)
    predict(tmp_path / "videos", tmp_path / "out", rest)
    assert 0 < rest.clips < whole.clips
    files = [sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("whole", "out")]
    assert len(files[0]) == 75 + 2
    for first, second in zip(*files, strict=True):
        assert first.name == second.name
        assert first.read_bytes() == second.read_bytes(), first.name
    again = Stopping(model)
    report = predict(tmp_path / "videos", tmp_path / "out", again)
    assert (report.skipped, report.videos, again.clips) == (1, 0, 0)


def test_other_predictions_are_not_written_over(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "videos" / "v.avi", frames=3)
    model = network(1)
    predict(tmp_path / "videos", tmp_path / "out", model)
    before = read_maps(tmp_path / "out" / "v")
    make_video(tmp_path / "videos" / "w.avi", frames=3)
    report = predict(tmp_path / "videos", tmp_path / "out", model, PredictSettings(overlay=False))
    ((name, reason),) = report.failures
    assert (name, report.videos) == ("v", 1)
    assert "holds something else" in reason
    np.testing.assert_array_equal(read_maps(tmp_path / "out" / "v"), before)


def test_what_a_stopped_run_of_other_weights_left_is_not_used(
    tmp_path: Path, make_video: MakeVideo
) -> None:
    make_video(tmp_path / "videos" / "v.avi", frames=12)
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path / "videos", tmp_path / "out", Stopping(network(1), stop_at=9))
    assert list((tmp_path / "out" / "v.partial" / "maps").glob("*.png"))
    rest = Stopping(network(1))
    predict_videos(
        [tmp_path / "videos"], tmp_path / "out", rest, PredictSettings(), weights_hash="others"
    )
    assert rest.clips == 12


def test_only_what_is_wanted_is_written(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "videos" / "sub" / "v.avi", frames=3)
    for name, settings, expected in (
        ("maps", PredictSettings(overlay=False), {"maps", "prediction.json"}),
        ("overlay", PredictSettings(maps=False), {"overlay.mp4", "prediction.json"}),
    ):
        predict(tmp_path / "videos", tmp_path / name, network(1), settings)
        assert {path.name for path in (tmp_path / name / "sub" / "v").iterdir()} == expected
        record = json.loads((tmp_path / name / "sub" / "v" / "prediction.json").read_text())
        assert record["frames"] == 3
    with pytest.raises(ValueError, match="nothing would be written"):
        PredictSettings(maps=False, overlay=False)


@pytest.mark.parametrize("content", [b"", b"%!PS-Adobe-3.0 EPSF-3.0", None])
def test_damaged_maps_of_a_stopped_run_are_named(
    tmp_path: Path, make_video: MakeVideo, content: bytes | None
) -> None:
    make_video(tmp_path / "videos" / "v.avi", frames=12)
    with pytest.raises(KeyboardInterrupt):
        predict(tmp_path / "videos", tmp_path / "out", Stopping(network(1), stop_at=9))
    maps = tmp_path / "out" / "v.partial" / "maps"
    (maps / "1notes.png").write_text("not ours")
    if content is None:
        Image.new("L", (3, 3)).save(maps / "000002.png")
    else:
        (maps / "000002.png").write_bytes(content)
    report = predict(tmp_path / "videos", tmp_path / "out", Stopping(network(1)))
    assert "000002.png is not the map" in report.failures[0][1]
    (maps / "000002.png").unlink()
    (maps / "1notes.png").unlink()
    assert predict(tmp_path / "videos", tmp_path / "out", Stopping(network(1))).failures == []


def test_another_video_or_runtime_is_another_prediction(
    tmp_path: Path, make_video: MakeVideo
) -> None:
    make_video(tmp_path / "videos" / "v.avi", frames=3)
    predict(tmp_path / "videos", tmp_path / "out", TorchRuntime(network(1)))
    assert len(predict(tmp_path / "videos", tmp_path / "out", Stopping(network(1))).failures) == 1
    make_video(tmp_path / "videos" / "v.avi", frames=3, seed=9)
    assert len(predict(tmp_path / "videos", tmp_path / "out", network(1)).failures) == 1


def test_weights_that_give_no_numbers_are_refused(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "videos" / "v.avi", frames=3)
    model = network(1)
    model.fusion.get_parameter("bias").data.fill_(torch.nan)
    report = predict(tmp_path / "videos", tmp_path / "out", model)
    assert "not finite" in report.failures[0][1]
    assert not (tmp_path / "out" / "v").exists()


def test_what_was_predicted_is_no_video_to_predict(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "videos" / "v.avi", frames=3)
    for out in (tmp_path / "videos" / "saliency", tmp_path / "videos"):
        report = predict(tmp_path / "videos", out, network(1))
        assert (report.videos, report.skipped) == (1, 0)
        report = predict(tmp_path / "videos", out, network(1))
        assert (report.videos, report.skipped) == (0, 1)


def test_frames_wait_in_a_short_line(tmp_path: Path, make_video: MakeVideo) -> None:
    """However slow drawing is, few frames are held at once."""
    make_video(tmp_path / "v.avi", frames=60)
    named = _NamedFrames(tmp_path / "v.avi")
    writer = _Writer(tmp_path, PredictSettings(overlay=False), None, line=3, named=named)
    for index, frame in enumerate(decode_video(tmp_path / "v.avi")):
        writer.write(index, frame, np.full((8, 8), 0.1, np.float32))
        assert len(writer._waiting) <= 3
    writer.finish()
    writer.close()
    assert len(list((tmp_path / "maps").iterdir())) == 60


@pytest.mark.parametrize("settings", [PredictSettings(), PredictSettings(post_processing="paper")])
def test_the_smallest_videos_have_maps(
    tmp_path: Path, make_video: MakeVideo, settings: PredictSettings
) -> None:
    import av

    (tmp_path / "videos").mkdir()
    for name, (height, width) in {"dot": (2, 2), "line": (1, 64)}.items():
        with av.open(str(tmp_path / "videos" / f"{name}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=24)
            stream.height, stream.width, stream.pix_fmt = height, width, "bgr0"
            picture = np.zeros((height, width, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    report = predict(tmp_path / "videos", tmp_path / "out", network(1), settings)
    assert report.videos == 1
    assert [name for name, _ in report.failures] == ["line"]
    assert "--no-overlay" in report.failures[0][1]
    without = replace(settings, overlay=False)
    assert predict(tmp_path / "videos", tmp_path / "maps", network(1), without).videos == 2


def cubic_rows(source: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """Resize the first axis with Keys' cubic kernel, a = -0.75, edges repeated."""
    a, length = -0.75, len(source)
    rows = []
    for index in range(size):
        centre = (index + 0.5) * length / size - 0.5
        base = int(np.floor(centre))
        total = np.zeros(source.shape[1:])
        for tap in range(base - 1, base + 3):
            x = abs(centre - tap)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            total += (near if x <= 1 else far) * source[min(max(tap, 0), length - 1)]
        rows.append(total)
    return np.stack(rows)


def test_paper_post_processing_is_the_published_one() -> None:
    saliency = scipy.ndimage.gaussian_filter(np.random.default_rng(0).random((24, 32)), 2)
    low, high = saliency.min(), saliency.max()
    gray = ((saliency - low) / (high - low) * 255).astype(np.uint8).astype(float)
    resized = cubic_rows(cubic_rows(gray, 50).T, 70).T.round().clip(0, 255)
    kernel = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 1.1**2))
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    expected = scipy.ndimage.convolve(resized, kernel, mode="mirror").round().clip(0, 255)
    found = finish_map(saliency.astype(np.float32), 50, 70, "paper")
    assert found.dtype == np.uint8
    assert np.abs(found.astype(float) - expected).max() <= 1
    assert np.abs(found.astype(float) - expected).mean() < 0.02
    constant = np.full((24, 32), 0.2, np.float32)
    assert finish_map(constant, 50, 70, "paper").max() == 0


def test_command_goes_on_after_a_video_that_fails(tmp_path: Path, make_video: MakeVideo) -> None:
    make_video(tmp_path / "videos" / "a.avi", frames=4)
    (tmp_path / "videos" / "b.avi").write_text("no video")
    save_checkpoint(tmp_path / "model.pt", network(1))
    arguments = ["predict", str(tmp_path / "videos"), "--checkpoint", str(tmp_path / "model.pt")]
    result = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert "1 videos, 4 frames" in result.stdout
    assert "failed: b: cannot open" in result.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_command_refuses_what_is_no_checkpoint(tmp_path: Path, make_video: MakeVideo) -> None:
    video = make_video(tmp_path / "a.avi", frames=2)
    (tmp_path / "text.pt").write_text("no checkpoint")
    arguments = ["predict", str(video), "--checkpoint", str(tmp_path / "text.pt"), "--out", "x"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "is not a checkpoint" in result.stderr
