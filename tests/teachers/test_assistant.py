from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distill import Budget, DistillSettings, label_videos
from stores.decode import decode_video
from stores.frames import resize_frames
from stores.maps import render_maps
from stores.targets import TargetStore
from student import (
    TinyHD,
    TinyHDConfig,
    build_config,
    import_weights,
    normalise_frames,
    read_weights,
    save_checkpoint,
)
from student.checkpoints import CheckpointError, load_model
from teachers.assistant import AssistantTeacher
from teachers.registry import build

SIZE = {"height": 32, "width": 64}


def checkpoint(path: Path, config: TinyHDConfig) -> Path:
    torch.manual_seed(3)
    model = TinyHD(config)
    for module in model.modules():  # statistics that are not those of a new network
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.normal_(module.get_buffer("running_mean"), 0, 0.1)
            torch.nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
    save_checkpoint(path, model.eval())
    return path


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("assistant") / "s.pt"
    return checkpoint(path, build_config("tinyhd-s-rc4", **SIZE))


@pytest.fixture(scope="module")
def multi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("assistant") / "m.pt"
    return checkpoint(path, build_config("tinyhd-m-rc4", **SIZE))


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (40, 32, 64, 3), np.uint8)


def clip_of(frames: np.ndarray, indices: list[int]) -> torch.Tensor:
    return normalise_frames(torch.from_numpy(frames[indices])[None])


@torch.inference_mode()
def test_maps_of_a_tinyhd_s_are_those_of_the_network(single: Path, frames: np.ndarray) -> None:
    teacher = AssistantTeacher(weights=single)
    layout = teacher.spec.layout
    planes = teacher.label(teacher.prepare(frames), first=0, span=range(2, 21), num_frames=40)
    maps = render_maps(planes, layout, layout.names, **SIZE)
    model = load_model(single)
    for frame in (2, 15, 20):
        clip = clip_of(frames, [max(0, frame - 15 + i) for i in range(16)])
        output = model(clip)
        torch.testing.assert_close(
            maps["saliency"][frame - 2], output.saliency[0, 0], rtol=0, atol=2e-5
        )
        for level, name in enumerate(layout.hierarchical):
            expected = output.maps["d1"][0, level, 0]
            torch.testing.assert_close(maps[name][frame - 2], expected, rtol=0, atol=2e-5)
    assert set(layout.names) == {"d1_0", "d1_1", "d1_2", "d1_3", "d2", "d3", "saliency"}


@torch.inference_mode()
def test_tinyhd_m_labels_blocks_from_frame_0_and_the_last_overlaps(
    multi: Path, frames: np.ndarray
) -> None:
    teacher = AssistantTeacher(weights=multi)
    assert teacher.context_of(range(33, 35), 40) == range(24, 40)
    planes = teacher.label(teacher.prepare(frames), first=0, span=range(40), num_frames=40)
    labelled = planes["maps_32x64"]
    assert labelled.shape == (40, 1, 32, 64)
    model = load_model(multi)
    for start, kept in ((0, range(16)), (16, range(16, 32)), (24, range(32, 40))):
        logits = model(clip_of(frames, list(range(start, start + 16)))).saliency_logits[0, 0]
        for frame in kept:
            torch.testing.assert_close(labelled[frame, 0], logits[frame - start], rtol=0, atol=5e-5)
    part = teacher.label(teacher.prepare(frames[24:]), first=24, span=range(33, 36), num_frames=40)
    torch.testing.assert_close(part["maps_32x64"], labelled[33:36], rtol=0, atol=5e-5)


@torch.inference_mode()
def test_video_shorter_than_a_clip_begins_with_copies_of_frame_0(
    multi: Path, frames: np.ndarray
) -> None:
    teacher = AssistantTeacher(weights=multi)
    planes = teacher.label(teacher.prepare(frames[:5]), first=0, span=range(5), num_frames=5)
    logits = load_model(multi)(clip_of(frames, [0] * 12 + [1, 2, 3, 4])).saliency_logits[0, 0]
    torch.testing.assert_close(planes["maps_32x64"][:, 0], logits[11:], rtol=0, atol=5e-5)


def test_assistant_fills_a_store_in_blocks_as_at_once(
    multi: Path, video_folder: Path, tmp_path: Path
) -> None:
    settings = DistillSettings(
        teacher="assistant", weights=multi, executor="inline", shard_frames=16
    )
    label_videos([video_folder], tmp_path / "whole.zarr", settings)
    label_videos(
        [video_folder],
        tmp_path / "part.zarr",
        DistillSettings(
            teacher="assistant",
            weights=multi,
            executor="inline",
            shard_frames=16,
            budget=Budget(2, seed=1),
        ),
    )
    whole, part = (TargetStore.open(tmp_path / f"{n}.zarr").label_set() for n in ("whole", "part"))
    assert (whole.name, whole.grid.head_frames) == (part.name, 0)
    (span,) = part.coverage("short")
    for name, values in part.read("short", span.start, span.stop).items():
        np.testing.assert_array_equal(values, whole.read("short", span.start, span.stop)[name])
    # Frames as a student sees them: not antialiased.
    teacher = AssistantTeacher(weights=multi)
    video = list(decode_video(video_folder / "short.avi"))
    seen = np.stack([resize_frames(frame[None], 32, 64)[0] for frame in video])
    logits = teacher.label(teacher.prepare(seen), first=0, span=range(24), num_frames=24)
    stored = whole.read("short", 0, 24)
    assert np.abs(stored["maps_32x64"] - logits["maps_32x64"].numpy()).max() <= 1 / 64 + 1e-4


def test_assistant_needs_its_checkpoint(tmp_path: Path, single: Path) -> None:
    with pytest.raises(ValueError, match="needs its weights; give them with --weights"):
        build("assistant")
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"no\.pt is not a checkpoint"):
        build("assistant", weights=tmp_path / "no.pt")
    with pytest.raises(ValueError, match="multiples of 32, got 40x64"):
        build("assistant", weights=single, size=(40, 64))


@pytest.mark.shared
def test_stored_maps_of_a_published_student_give_its_fused_map(
    shared: Path, tmp_path: Path
) -> None:
    """The fused map that follows from the stored ones is the student's own."""
    weights = read_weights(shared / "weights" / "d123s_rc4_rc1T.pth")
    model = import_weights(
        weights,
        channel_reduction=4,
        decoders=("d1", "d2", "d3"),
        single=(True, True, True),
        output_frames=1,
    )
    save_checkpoint(tmp_path / "s.pt", model)
    teacher = AssistantTeacher(weights=tmp_path / "s.pt")
    assert (teacher.spec.layout.height, teacher.spec.layout.width) == (192, 256)
    noise = np.random.default_rng(1).integers(0, 255, (16, 192, 256, 3), np.uint8)
    planes = teacher.label(teacher.prepare(noise), first=0, span=range(15, 16), num_frames=16)
    saliency = render_maps(planes, teacher.spec.layout, ["saliency"], height=192, width=256)
    with torch.inference_mode():
        expected = model.eval()(clip_of(noise, list(range(16)))).saliency[0]
    torch.testing.assert_close(saliency["saliency"], expected, rtol=0, atol=2e-5)
