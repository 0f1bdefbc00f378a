from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from student.reference import WeightsError
from teachers.vinet import VinetTeacher
from teachers.vinet_s import (
    Bottleneck,
    Neck,
    SlowFastLevels,
    Upsampling,
    VinetA,
    VinetATeacher,
    VinetS,
    VinetSTeacher,
)
from tests.teachers.goldens import filled
from tests.teachers.test_vinet import (
    GAINS,
    by_hand,
    check_composed,
    check_features,
    check_maps,
    check_random_weights,
    close,
    described,
    golden_clip,
    label,
    layers_of,
    noise,
    video,
    watched,
)

PROTOCOL = "window_protocol_vinet_unisal.json"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return filled(VinetS, gains=GAINS)


def teacher_of(
    weights: dict[str, Tensor], upsampling: Upsampling = "half_pixel", *, height: int = 32
) -> VinetSTeacher:
    teacher = VinetSTeacher(height=height, width=64, upsampling=upsampling)
    teacher.import_weights(weights)
    return teacher


@pytest.fixture(scope="module")
def teacher(weights: dict[str, Tensor]) -> VinetSTeacher:
    return teacher_of(weights)


@pytest.fixture(scope="module")
def aligned(weights: dict[str, Tensor]) -> VinetSTeacher:
    return teacher_of(weights, "align_corners")


@pytest.fixture(scope="module")
def action_weights() -> dict[str, Tensor]:
    return filled(VinetA, gains=GAINS)


@pytest.fixture(scope="module")
def action_teacher(action_weights: dict[str, Tensor]) -> VinetATeacher:
    teacher = VinetATeacher(height=48, width=72)
    teacher.import_weights(action_weights)
    return teacher


@pytest.mark.shared
@pytest.mark.parametrize(("build", "name"), [(VinetS, "vinet_s"), (VinetA, "vinet_a")])
def test_names_shapes_types_and_order_are_the_published_ones(
    shared: Path, build: Callable[[], VinetS | VinetA], name: str
) -> None:
    listed = json.loads((shared / "specs" / f"teacher_{name}_keys.json").read_text())
    with torch.device("meta"):
        assert described(build()) == listed


@pytest.mark.shared
@pytest.mark.parametrize(
    "name",
    [
        "vinet_s_small",
        "vinet_s_batch2",
        "vinet_s_aligncorners_small",
        pytest.param("vinet_s_native", marks=pytest.mark.slow),
        pytest.param("vinet_s_aligncorners_native", marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_levels_and_maps_are_those_of_the_original(
    shared: Path, teacher: VinetSTeacher, aligned: VinetSTeacher, name: str
) -> None:
    golden = np.load(shared / "goldens" / "teachers" / f"{name}.npz")
    network = (aligned if "aligncorners" in name else teacher).network
    with watched(layers_of(network)) as features:
        logits = network(golden_clip(golden))
    assert len(features) == 7
    check_features(golden, features)
    check_maps(golden, logits)


@pytest.mark.shared
@pytest.mark.slow
@torch.inference_mode()
def test_levels_and_maps_of_vinet_a_are_those_of_the_original(
    shared: Path, action_teacher: VinetATeacher
) -> None:
    golden = np.load(shared / "goldens" / "teachers" / "vinet_a_native.npz")
    network = action_teacher.network
    numbers = range(1, 6)
    stages = {f"convtsp{n}": network.decoder.get_submodule(f"convtsp{n}") for n in numbers}
    with watched({"backbone": network.backbone, "neck": network.neck, **stages}) as given:
        logits = network(golden_clip(golden))
    (levels, neck), features = (given.pop("backbone"), given.pop("neck")), given
    assert isinstance(levels, SlowFastLevels)
    features |= levels._asdict() | {"neck": neck[0]}
    assert len(features) == 12
    for name, factor in {"convtsp2": (1, 2, 57 / 29), "convtsp3": (1, 2, 2)}.items():
        features[name] = F.interpolate(features[name], scale_factor=factor, mode="trilinear")
    check_features(golden, features)
    check_maps(golden, logits)


@torch.inference_mode()
def test_half_a_clip_of_the_fast_pathway_becomes_channels(action_teacher: VinetATeacher) -> None:
    numbers = torch.arange(256 * 32.0).reshape(1, 256, 32, 1, 1).expand(1, 256, 32, 3, 5)
    empty = torch.zeros(1, 1, 8, 3, 5)
    others = [empty.expand(-1, channels, -1, -1, -1) for channels in (80, 320, 640, 1280, 2048)]
    levels = SlowFastLevels._make([*others, numbers])
    neck: Neck = action_teacher.network.neck
    both = neck(levels).both
    assert both.shape == (1, 1536, 8, 3, 5)
    assert not both[:, :1024].any()
    last_of_two = 16 * torch.arange(512.0)[:, None] + 2 * torch.arange(8.0) + 1
    wanted = last_of_two[None, :, :, None, None].expand(1, 512, 8, 3, 5)
    assert torch.equal(both[:, 1024:], wanted)


def test_maps_of_stored_planes_and_of_batches_are_those_of_the_network(
    teacher: VinetSTeacher,
    aligned: VinetSTeacher,
    action_teacher: VinetATeacher,
    weights: dict[str, Tensor],
    action_weights: dict[str, Tensor],
) -> None:
    check_composed(teacher, height=32, width=64)
    check_composed(aligned, height=32, width=64)
    check_composed(teacher_of(weights, height=96), height=96, width=64)
    check_composed(action_teacher, height=48, width=72)  # the coarsest level has 3x5 pixels
    other = VinetATeacher(height=64, width=32)
    other.import_weights(action_weights)
    check_composed(other, height=64, width=32)


@pytest.mark.shared
def test_windows_are_those_of_the_published_programs(
    shared: Path, teacher: VinetSTeacher, action_teacher: VinetATeacher
) -> None:
    protocol = json.loads((shared / "goldens" / "teachers" / PROTOCOL).read_text())
    assert len(protocol["vinet_s_any_length"]) == 6
    for frame, fed in protocol["vinet_s_any_length"].items():
        for num_frames in (int(frame) + 1, 100, 200):
            assert list(teacher.window(int(frame), num_frames)) == fed
    assert len(protocol["vinet_a_len64_N100"]) == 5
    for frame, fed in protocol["vinet_a_len64_N100"].items():
        assert list(action_teacher.window(int(frame), 100)) == fed


@pytest.mark.parametrize("num_frames", [1, 2, 31, 32, 33, 63, 90])
def test_windows_lie_in_their_video(
    teacher: VinetSTeacher, action_teacher: VinetATeacher, num_frames: int
) -> None:
    for frame in range(num_frames):
        window = teacher.window(frame, num_frames)
        assert list(window) == [max(0, frame - 31 + k) for k in range(32)]
        window = action_teacher.window(frame, num_frames)
        assert len(window) == 32
        assert window == sorted(window)
        assert {max(0, frame - 1), min(num_frames - 1, frame + 1)} <= set(window)
        assert set(window) <= set(range(num_frames))


def test_frames_are_labelled_with_copies_of_the_first_one_before_the_video(
    teacher: VinetSTeacher,
) -> None:
    frames = video(40)
    planes = label(teacher, frames, range(29, 33))
    padded = np.concatenate([frames[:1]] * 31 + [frames])
    for values, frame in zip(planes, range(29, 33), strict=True):
        assert close(values, by_hand(teacher.network, padded[frame : frame + 32]))
    assert not close(planes[3], by_hand(teacher.network, frames[1:33][::-1]))
    short = label(teacher, frames[:2], range(2))
    padded = np.concatenate([frames[:1]] * 31 + [frames[:2]])
    assert close(short[1], by_hand(teacher.network, padded[1:]))


def test_vinet_a_labels_the_frame_amid_its_window(action_teacher: VinetATeacher) -> None:
    frames = video(70, height=48, width=72)
    network = partial(by_hand, action_teacher.network, mean=(0.45,), std=(0.225,))
    assert action_teacher.context_of(range(33, 35), 70) == range(2, 66)
    planes = label(action_teacher, frames, range(33, 35))
    assert close(planes[0], network(frames[2:65:2]))
    assert close(planes[1], network(frames[3:66:2]))
    assert not close(planes[0], network(frames[2:65:2][::-1]))
    short = label(action_teacher, frames[:2], range(2))
    assert close(short[0], network(np.concatenate([frames[:1]] * 16 + [frames[1:2]] * 16)))
    assert close(short[0], short[1])


def test_upsampling_decides_the_targets(teacher: VinetSTeacher, aligned: VinetSTeacher) -> None:
    windows = noise(1, 3, 32, 32, 64)
    maps = [labelling.predict(windows)["map"] for labelling in (teacher, aligned)]
    assert not close(*maps)
    assert VinetSTeacher(height=32, width=32).upsampling == "half_pixel"
    assert teacher.provenance["upsampling"] == "half_pixel"
    assert aligned.provenance["upsampling"] == "align_corners"
    assert teacher.provenance | {"upsampling": "align_corners"} == aligned.provenance
    assert teacher.weights_sha256 is not None


def test_what_decides_the_targets_names_the_windows() -> None:
    assert VinetSTeacher().provenance | {"upsampling": "", "compute": ""} == {
        "adapter_version": 1,
        "input_size": [224, 384],
        "window": 32,
        "labelled_frame": "last",
        "head_policy": "repeat_first",
        "upsampling": "",
        "compute": "",
        "weights_sha256": None,
    }
    provenance = VinetATeacher().provenance
    assert provenance["input_size"] == [256, 456]
    assert provenance["labelled_frame"] == "middle"
    assert (provenance["head_policy"], provenance["tail_policy"]) == ("repeat_first", "repeat_last")


def test_the_three_networks_do_not_take_each_others_weights(
    weights: dict[str, Tensor], action_weights: dict[str, Tensor]
) -> None:
    with pytest.raises(
        WeightsError, match=r"of ViNet-S: 5 misshaped: .* of 832x1024x1x3x3 instead of 832x32x1x3x3"
    ):
        VinetSTeacher(height=32, width=32).import_weights(VinetTeacher().network.state_dict())
    with pytest.raises(
        WeightsError, match=r"of ViNet: 5 misshaped: .* of 832x32x1x3x3 instead of 832x1024x1x3x3"
    ):
        VinetTeacher(height=32, width=32).import_weights(weights)
    with pytest.raises(WeightsError, match=r"of ViNet-A: 545 missing: .*; 466 not expected: "):
        VinetATeacher(height=32, width=32).import_weights(weights)


def test_missing_and_unknown_weights_are_named(
    weights: dict[str, Tensor], action_weights: dict[str, Tensor]
) -> None:
    given = {key: value for key, value in weights.items() if key != "decoder.convtsp4.8.bias"}
    with pytest.raises(WeightsError, match=r"ViNet-S: 1 missing: decoder\.convtsp4\.8\.bias$"):
        teacher_of(given)
    with pytest.raises(WeightsError, match=r"ViNet-A: 1 not expected: fc\.bias$"):
        VinetATeacher(height=32, width=32).import_weights(
            action_weights | {"fc.bias": torch.ones(3)}
        )


def test_wrapped_weights_and_those_of_parallel_training_are_taken(
    weights: dict[str, Tensor], action_weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "vinet_s.pt"
    torch.save({"state_dict": {f"module.{key}": value for key, value in weights.items()}}, path)
    action_path = tmp_path / "vinet_a.pt"
    torch.save({f"module.{key}": value for key, value in action_weights.items()}, action_path)
    loaded = [
        (VinetSTeacher(height=32, width=32, weights=path), weights),
        (VinetATeacher(height=32, width=32, weights=action_path), action_weights),
    ]
    for labelling, wanted in loaded:
        for key, tensor in labelling.network.state_dict().items():
            assert torch.equal(tensor, wanted[key]), key
    path.unlink()  # they are large
    action_path.unlink()


@pytest.mark.parametrize("build", [VinetSTeacher, VinetATeacher])
def test_weights_that_nobody_gave_are_always_the_same_and_look_at_the_frames(
    build: Callable[..., VinetSTeacher | VinetATeacher],
) -> None:
    check_random_weights(lambda: build(height=64, width=96), height=64, width=96)


def test_residual_blocks_add_to_their_features() -> None:
    block = Bottleneck(16, 4, is_temporal=True).eval()
    torch.nn.init.zeros_(block.bn3.weight)
    features = noise(1, 16, 2, 3, 4)
    assert torch.equal(block(features), features.relu())


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="ViNet-S needs a size in multiples of 32, got 48x64"):
        VinetSTeacher(height=48, width=64)
    with pytest.raises(ValueError, match="ViNet-A needs a size in multiples of 8, got 256x450"):
        VinetATeacher(height=256, width=450)


def test_windows_of_another_length_or_size_are_refused(
    teacher: VinetSTeacher, action_teacher: VinetATeacher
) -> None:
    with pytest.raises(ValueError, match="ViNet-S sees 32 frames at once, got 16"):
        teacher.predict(torch.zeros(1, 3, 16, 32, 64))
    with pytest.raises(ValueError, match="ViNet-A sees 32 frames at once, got 64"):
        action_teacher.predict(torch.zeros(1, 3, 64, 48, 72))
    with pytest.raises(ValueError, match=r"ViNet-A needs .* multiples of 8, got 48x76"):
        action_teacher.predict(torch.zeros(1, 3, 32, 48, 76))


def test_unknown_upsampling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"upsampling must be one of .*, got 'nearest'"):
        VinetSTeacher(upsampling="nearest")  # type: ignore[arg-type]
