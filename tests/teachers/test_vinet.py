from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stores.maps import MapLayout, render_maps
from student.checkpoints import CheckpointError
from student.reference import WeightsError
from teachers.base import Teacher
from teachers.network import NetworkTeacher
from teachers.s3d import S3d
from teachers.vinet import Double, Levels, Vinet, VinetTeacher
from tests.teachers.goldens import filled

GAINS = {"decoder.convtsp4.8.weight": 0.25, "decoder.convtsp6.7.weight": 0.002}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def described(network: nn.Module) -> list[list[object]]:
    """Names, shapes and types of a state dict, as the lists of published ones have them."""
    return [
        [key, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in network.state_dict().items()
    ]


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


@contextmanager
def watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Collect by name what layers give while a network runs."""
    given: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda _layer, _features, output: given.update({name: output})

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    yield given
    for handle in handles:
        handle.remove()


def golden_clip(golden: Mapping[str, Any]) -> Tensor:
    rng = np.random.default_rng(int(golden["input_seed"]))
    return torch.from_numpy(rng.standard_normal(golden["input_shape"]).astype(np.float32))


def check_maps(golden: Mapping[str, Any], planes: Tensor) -> None:
    """Compare planes ``(B, 1, H, W)`` and the maps that they make with what is kept of them."""
    logits = planes.squeeze(1)
    check_map(golden, "logit", logits.numpy(), atol=1e-4, rtol=1e-4)
    check_map(golden, "map", logits.sigmoid().numpy(), atol=2e-5)


def check_map(
    golden: Mapping[str, Any],
    name: str,
    values: npt.NDArray[np.float32],
    *,
    atol: float,
    rtol: float = 0.0,
) -> None:
    assert values.shape == tuple(golden[f"{name}_shape"]), name
    kept = golden[f"{name}_sub"]
    step = values.shape[-1] // kept.shape[-1]
    np.testing.assert_allclose(values[..., ::step, ::step], kept, rtol=rtol, atol=atol)
    flat = values.reshape(len(values), -1).astype(np.float64)
    at_peak = np.take_along_axis(flat, golden[f"{name}_argmax"][:, None], 1)[:, 0]
    allowed = atol + rtol * abs(flat).max()
    for found, statistic in [
        (flat.min(1), "min"),
        (flat.max(1), "max"),
        (at_peak, "max"),
        (flat.std(1), "std"),
        (flat.sum(1), "mapsum"),
    ]:
        scale = flat.shape[1] if statistic == "mapsum" else 1
        wanted = golden[f"{name}_{statistic}"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=allowed * scale, err_msg=statistic)


def check_features(golden: Mapping[str, Any], features: Mapping[str, Tensor]) -> None:
    """Compare what layers give with what is kept of it."""
    for name, values in features.items():
        kept = {
            key: golden[f"tap_{name}_{key}"] for key in ("shape", "abssum", "sum", "idx", "val")
        }
        assert tuple(values.shape) == tuple(kept["shape"]), name
        flat = values.numpy().ravel()
        mean = kept["abssum"] / flat.size
        np.testing.assert_allclose(
            flat[kept["idx"]], kept["val"], rtol=1e-4, atol=1e-4 * mean, err_msg=name
        )
        assert abs(flat.sum(dtype=np.float64) - kept["sum"]) <= 1e-4 * kept["abssum"], name
        assert abs(abs(flat).sum(dtype=np.float64) - kept["abssum"]) <= 1e-4 * kept["abssum"], name


def check_composed(teacher: NetworkTeacher, *, height: int, width: int) -> None:
    """Maps made of stored planes are those that the teacher predicts, one by one or together."""
    windows = noise(2, 3, 32, height, width)
    layout = MapLayout.from_dict(json.loads(json.dumps(teacher.spec.layout.to_dict())))
    assert [spec.order for spec in layout.maps] == ["activate_first"]
    with torch.inference_mode():
        planes = dict(teacher.logits(windows))
    assert {name: tuple(values.shape) for name, values in planes.items()} == {
        f"maps_{height}x{width}": (2, 1, height, width)
    }
    composed = render_maps(planes, layout, layout.names, height=height, width=width)
    predicted = teacher.predict(windows)
    assert list(composed) == list(predicted) == ["map"]
    assert predicted["map"].std() > 1e-3
    assert torch.equal(composed["map"], predicted["map"])
    single = torch.cat([teacher.predict(window[None])["map"] for window in windows])
    torch.testing.assert_close(single, predicted["map"], rtol=0, atol=1e-5)
    smaller = render_maps(planes, layout, ["map"], height=height // 2, width=width // 2)["map"]
    averaged = F.interpolate(
        predicted["map"][:, None], (height // 2, width // 2), mode="bilinear", antialias=True
    )
    torch.testing.assert_close(smaller, averaged[:, 0])


def video(num_frames: int, *, height: int = 32, width: int = 64) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (num_frames, height, width, 3), np.uint8)


def label(teacher: Teacher, frames: npt.NDArray[np.uint8], span: range) -> Tensor:
    """Label a span of a video from no more frames than the teacher asks for."""
    context = teacher.context_of(span, len(frames))
    prepared = teacher.prepare(frames[context.start : context.stop])
    planes = teacher.label(prepared, first=context.start, span=span, num_frames=len(frames))
    (array,) = teacher.spec.layout.arrays
    return planes[array][:, 0]


def by_hand(
    network: nn.Module,
    pictures: npt.NDArray[np.uint8],
    *,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> Tensor:
    """The plane of one window of pictures, in the order in which they are seen."""
    clip = (pictures / 255 - np.array(mean)) / np.array(std)
    windows = torch.from_numpy(clip.astype(np.float32)).permute(3, 0, 1, 2)[None]
    with torch.inference_mode():
        return network(windows)[0, 0]


def close(given: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(given, wanted, rtol=1e-4, atol=1e-4)


def imported(weights: Mapping[str, Any]) -> Vinet:
    teacher = VinetTeacher(height=32, width=64)
    teacher.import_weights(weights)
    return teacher.network


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return filled(Vinet, gains=GAINS)


@pytest.fixture(scope="module")
def weights_file(
    weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("vinet") / "vinet.pt"
    torch.save(weights, path)
    yield path
    path.unlink()  # it is large


@pytest.fixture(scope="module")
def teacher(weights_file: Path) -> VinetTeacher:
    return VinetTeacher(height=32, width=64, weights=weights_file)


@pytest.fixture(scope="module")
def network(teacher: VinetTeacher) -> Vinet:
    return teacher.network


def layers_of(network: Vinet) -> dict[str, nn.Module]:
    """Layers of which the goldens keep something."""
    backbone, decoder = network.backbone, network.decoder
    levels = {
        "y3": backbone.base1,
        "y2": backbone.base2,
        "y1": backbone.base3,
        "y0": backbone.base4,
    }
    return levels | {"z1": decoder.convtsp1, "z2": decoder.convtsp2, "z3": decoder.convtsp3}


@pytest.mark.shared
def test_names_shapes_types_and_order_are_the_published_ones(shared: Path) -> None:
    listed = json.loads((shared / "specs" / "teacher_vinet_keys.json").read_text())
    with torch.device("meta"):
        assert described(Vinet()) == listed


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["vinet_small", "vinet_batch2", pytest.param("vinet_native", marks=pytest.mark.slow)]
)
@torch.inference_mode()
def test_levels_and_maps_are_those_of_the_original(shared: Path, network: Vinet, name: str) -> None:
    golden = np.load(shared / "goldens" / "teachers" / f"{name}.npz")
    with watched(layers_of(network)) as features:
        logits = network(golden_clip(golden))
    assert len(features) == 7
    check_features(golden, features)
    check_maps(golden, logits)


@torch.inference_mode()
def test_levels_are_those_of_s3d_before_it_pools_them(network: Vinet) -> None:
    s3d = S3d().eval()
    s3d.load_state_dict(
        dict(zip(s3d.state_dict(), network.backbone.state_dict().values(), strict=True))
    )
    clip = noise(1, 3, 32, 64, 32)
    ours, theirs = network.backbone(clip), s3d(clip)
    pooled = [
        F.max_pool3d(ours.y3, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
        F.max_pool3d(ours.y2, 3, 2, 1),
        F.max_pool3d(F.max_pool3d(ours.y1, (2, 1, 1)), (1, 2, 2)),
        ours.y0,
    ]
    for given, wanted in zip(pooled, theirs[1:], strict=True):
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("double", "align_corners"), [(Double(), False), (Double(align_corners=True), True)]
)
def test_doubling_is_that_of_pictures(double: Double, *, align_corners: bool) -> None:
    features = noise(2, 3, 4, 5, 7)
    wanted = F.interpolate(features, (4, 10, 14), mode="trilinear", align_corners=align_corners)
    torch.testing.assert_close(double(features), wanted)


@pytest.mark.parametrize(("level", "stage", "at_once"), [("y1", "z2", 3), ("y2", "z3", 5)])
@torch.inference_mode()
def test_levels_lie_behind_the_four_decoded_frames_in_time(
    network: Vinet, level: str, stage: str, at_once: int
) -> None:
    levels = Levels(
        noise(1, 1024, 4, 1, 1).abs(),
        noise(1, 832, 8, 2, 2).abs(),
        noise(1, 480, 16, 4, 4).abs(),
        noise(1, 192, 16, 8, 8).abs(),
    )
    with watched(layers_of(network)) as features:
        network.decoder(levels)
        before = features[stage]
        for frame in (0, 1, 2, 7):
            changed = getattr(levels, level).clone()
            changed[:, :, frame] = 0
            network.decoder(levels._replace(**{level: changed}))
            moved = (features[stage] - before).abs().amax((0, 1, 3, 4)) > 0
            assert moved.nonzero().tolist() == [[(4 + frame) // at_once]], frame


def test_maps_of_stored_planes_and_of_batches_are_those_of_the_network(
    teacher: VinetTeacher, weights: dict[str, Tensor]
) -> None:
    check_composed(teacher, height=32, width=64)
    other = VinetTeacher(height=96, width=32)
    other.import_weights(weights)
    check_composed(other, height=96, width=32)


@pytest.mark.shared
def test_windows_are_those_of_the_published_programs(shared: Path, teacher: VinetTeacher) -> None:
    text = (shared / "goldens" / "teachers" / "window_protocol_vinet_unisal.json").read_text()
    videos = json.loads(text)["vinet_short_or_long"]
    assert {"1", "31", "32", "33", "62", "63", "100"} <= set(videos)
    for num_frames, windows in videos.items():
        for frame, fed in windows.items():
            assert list(teacher.window(int(frame), int(num_frames))) == fed, (num_frames, frame)


@pytest.mark.parametrize("num_frames", [1, 2, 31, 32, 33, 62, 63, 64, 90])
def test_windows_lie_in_their_video_and_end_on_their_frame(
    teacher: VinetTeacher, num_frames: int
) -> None:
    windows = [list(teacher.window(frame, num_frames)) for frame in range(num_frames)]
    assert {len(window) for window in windows} == {32}
    assert [window[-1] for window in windows] == list(range(num_frames))
    assert {index for window in windows for index in window} == set(range(num_frames))
    padded = [frame for frame, window in enumerate(windows) if len(set(window)) < 32]
    assert padded == list(range(max(0, num_frames - 32), min(31, num_frames)))


def test_frames_are_labelled_forwards_and_those_of_the_head_backwards(
    teacher: VinetTeacher, network: Vinet
) -> None:
    frames = video(64)
    planes = label(teacher, frames, range(30, 33))
    assert close(planes[0], by_hand(network, frames[30:62][::-1]))
    assert close(planes[1], by_hand(network, frames[:32]))
    assert close(planes[2], by_hand(network, frames[1:33]))
    assert not close(planes[1], by_hand(network, frames[:32][::-1]))
    assert not close(planes[1], by_hand(network, frames[:32, ..., ::-1]))


def test_short_videos_are_labelled_with_copies_of_their_first_frame(
    teacher: VinetTeacher, network: Vinet
) -> None:
    frames = video(3)
    assert teacher.context_of(range(3), 3) == range(3)
    planes = label(teacher, frames, range(3))
    padded = np.concatenate([frames[:1]] * 31 + [frames])
    for frame, values in enumerate(planes):
        assert close(values, by_hand(network, padded[frame : frame + 32]))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_wrapped_weights_and_those_of_parallel_training_are_taken(
    weights: dict[str, Tensor], wrapper: str | None
) -> None:
    prefixed = {f"module.{key}": tensor for key, tensor in weights.items()}
    loaded = imported(prefixed if wrapper is None else {wrapper: prefixed, "epoch": 3})
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


def test_counters_of_batches_may_be_missing(weights: dict[str, Tensor]) -> None:
    kept = {key: value for key, value in weights.items() if "num_batches" not in key}
    assert len(kept) < len(weights)
    assert list(imported(kept).state_dict()) == list(weights)


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda given: given.pop("backbone.base1.0.bn_t.bias"),
            r"1 missing: backbone\.base1\.0\.bn_t\.bias$",
        ),
        (lambda given: given.update({"fc.0": torch.ones(2)}), r"1 not expected: fc\.0$"),
        (
            lambda given: given.update({"decoder.convtsp1.0.weight": torch.ones(832, 32, 1, 3, 3)}),
            r"1 misshaped: decoder\.convtsp1\.0\.weight of 832x32x1x3x3 instead of 832x1024x1x3x3$",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    weights: dict[str, Tensor], change: Change, message: str
) -> None:
    given = dict(weights)
    change(given)
    with pytest.raises(WeightsError, match=f"not the weights of ViNet: {message}"):
        imported(given)


def test_files_without_weights_of_vinet_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    with pytest.raises(CheckpointError, match=r"odd\.pt does not exist"):
        VinetTeacher(weights=path)
    torch.save({"state_dict": {"layer": torch.ones(3)}}, path)
    with pytest.raises(WeightsError, match=r"odd\.pt does not fit: .* 1 not expected: layer"):
        VinetTeacher(weights=path)


def test_what_decides_the_targets_names_the_weights_and_the_head(
    teacher: VinetTeacher, weights_file: Path
) -> None:
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    assert teacher.provenance["weights_sha256"] == digest
    assert teacher.provenance["head_policy"] == "time_reversed"
    assert teacher.provenance["input_size"] == [32, 64]
    assert VinetTeacher().provenance["input_size"] == [224, 384]


def check_random_weights(build: Callable[[], NetworkTeacher], *, height: int, width: int) -> None:
    """Weights that nobody gave are always the same, and maps depend on the frames."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = build()
    assert first.weights_sha256 is None
    assert first.spec == second.spec
    for key, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[key]), key
    windows = [noise(3, 32, height, width), -torch.ones(3, 32, height, width)]
    maps = first.predict(torch.stack(windows))["map"]
    assert (maps[0] - maps[1]).abs().max() > 1e-2
    assert maps[0].std() > 1e-2
    assert maps.min() > 0.001
    assert maps.max() < 0.999


def test_weights_that_nobody_gave_are_always_the_same_and_look_at_the_frames() -> None:
    check_random_weights(lambda: VinetTeacher(height=64, width=96), height=64, width=96)


@pytest.mark.parametrize(("height", "width"), [(100, 128), (32, 48), (0, 64), (64, -32)])
def test_sizes_that_cannot_be_halved_five_times_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"ViNet needs .* multiples of 32, got {height}x{width}"):
        VinetTeacher(height=height, width=width)


def test_windows_of_another_length_or_size_are_refused(teacher: VinetTeacher) -> None:
    with pytest.raises(ValueError, match="sees 32 frames at once, got 33"):
        teacher.predict(torch.zeros(1, 3, 33, 32, 64))
    with pytest.raises(ValueError, match="multiples of 32, got 48x64"):
        teacher.predict(torch.zeros(1, 3, 32, 48, 64))
