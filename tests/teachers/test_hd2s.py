from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stores.maps import MapLayout, render_maps
from student.checkpoints import CheckpointError
from student.reference import WeightsError
from teachers.hd2s import MAPS, Hd2s, Hd2sTeacher
from tests.teachers.goldens import KEPT, filled

GAINS = {f"decoder{level}.last_conv{level}.weight": 2.0 for level in (2, 3, 4, 5)} | {
    "last_conv.weight": 4.0
}


def imported(weights: Mapping[str, Any]) -> Hd2s:
    teacher = Hd2sTeacher(height=32, width=64)
    teacher.import_weights(weights)
    return teacher.network


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return filled(Hd2s, gains=GAINS, lifts_few=True)


@pytest.fixture(scope="module")
def network(weights: dict[str, Tensor]) -> Hd2s:
    return imported(weights)


@pytest.fixture(scope="module")
def weights_file(
    weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("hd2s") / "hd2s.pt"
    torch.save(weights, path)
    yield path
    path.unlink()  # it is large


@pytest.fixture(scope="module")
def teacher(weights_file: Path) -> Hd2sTeacher:
    return Hd2sTeacher(height=32, width=64, weights=weights_file)


@pytest.fixture(scope="module")
def released(weights_file: Path) -> Hd2sTeacher:
    return Hd2sTeacher(height=32, width=64, weights=weights_file, head_mode="released")


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.mark.shared
def test_names_shapes_types_and_order_are_the_published_ones(shared: Path) -> None:
    listed = json.loads((shared / "specs" / "teacher_hd2s_keys.json").read_text())["keys"]
    with torch.device("meta"):
        ours = Hd2s().state_dict()
    described = [
        [key, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in ours.items()
    ]
    assert described == listed


@pytest.mark.shared
@pytest.mark.parametrize("size", ["192x256", "128x192"])
@torch.inference_mode()
def test_levels_planes_and_maps_are_those_of_the_original(
    shared: Path, network: Hd2s, size: str
) -> None:
    golden = np.load(shared / "goldens" / "teachers" / f"hd2s_{size}_b1_seed1.npz")
    rng = np.random.default_rng(int(golden["meta__seed"]))
    clip = torch.from_numpy(rng.standard_normal(golden["meta__shape"]).astype(np.float32))

    levels = network.featureExtractor(clip)
    reduced = network.reduce(levels)
    planes = network.decode(*reduced)
    maps = network(clip)
    conspicuity = torch.stack([maps.sal5, maps.sal4, maps.sal3, maps.sal2], 1)

    features = levels._asdict() | {f"r{level}": value for level, value in enumerate(reduced, 2)}
    for name, values in features.items():
        check(values, golden, name, tolerance=1e-4)
    logits = {f"logit{level}_half": planes[:, level - 2] for level in (2, 3, 4, 5)}
    logits["fused_logit"] = network.last_conv(conspicuity)[:, 0]
    for name, values in logits.items():
        check(values, golden, name, tolerance=1e-4)
    for name, values in maps._asdict().items():
        largest = float(golden[f"{name}__max"])
        check(values, golden, name, tolerance=5e-5 / largest)


def check(values: Tensor, golden: Mapping[str, Any], name: str, *, tolerance: float) -> None:
    """Compare with what is kept of an array; the tolerance is relative to its largest value."""
    given, kept = values.numpy(), {key: golden[f"{name}__{key}"] for key in KEPT}
    allowed = tolerance * max(abs(kept["min"]), abs(kept["max"]))
    assert given.shape == tuple(kept["shape"]), name
    sub = np.s_[:, ::32, :, ::4, ::4] if given.ndim == 5 else np.s_[:, ::4, ::4]
    np.testing.assert_allclose(given[sub], kept["sub"], rtol=0, atol=allowed, err_msg=name)
    for statistic, found in {"min": given.min(), "max": given.max(), "std": given.std()}.items():
        assert abs(found - kept[statistic]) <= allowed, (name, statistic)
    assert abs(given.sum(dtype=np.float64) - kept["sum"]) <= allowed * given.size, name
    assert abs(abs(given).sum(dtype=np.float64) - kept["abssum"]) <= allowed * given.size, name


@torch.inference_mode()
def test_a_decoder_that_doubles_before_it_joins_gives_the_same_map(network: Hd2s) -> None:
    decoder = network.decoder2
    features = reduced = noise(2, 192, 4, 8)
    for left in (3, 2, 1):
        features = decoder.get_submodule(f"deconvlayer2_{left}")(features)
        features = F.interpolate(features, scale_factor=2, mode="bilinear")
    published = decoder.get_submodule("last_conv2")(features)
    plane = decoder(reduced)
    assert plane.shape == (2, 1, 16, 32)
    doubled = F.interpolate(plane, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(doubled, published, rtol=1e-5, atol=1e-5)


def test_maps_composed_of_stored_planes_are_those_of_the_network(teacher: Hd2sTeacher) -> None:
    windows = noise(2, 3, 16, 32, 64)
    layout = MapLayout.from_dict(json.loads(json.dumps(teacher.spec.layout.to_dict())))
    with torch.inference_mode():
        planes = teacher.logits(windows)
    assert {name: tuple(values.shape) for name, values in planes.items()} == {
        "maps_16x32": (2, 4, 16, 32)
    }
    composed = render_maps(planes, layout, layout.names, height=32, width=64)
    predicted = teacher.predict(windows)
    assert list(composed) == list(predicted) == [*MAPS, "out"]
    for name, values in predicted.items():
        assert values.std() > 1e-3, name
        torch.testing.assert_close(composed[name], values, rtol=0, atol=1e-6)


@pytest.mark.shared
def test_windows_are_those_of_the_published_program(
    shared: Path, teacher: Hd2sTeacher, released: Hd2sTeacher
) -> None:
    text = (shared / "goldens" / "teachers" / "window_protocol_hd2s_tased.json").read_text()
    protocol = json.loads(text)
    for entry in protocol["hd2s_video_31_frames"]:
        frame, fed = entry["frame"], entry["fed"]
        assert list(released.window(frame, 31)) == fed
        assert list(teacher.window(frame, 31)) == (fed[::-1] if frame < 15 else fed)
    for length, padded in protocol["hd2s_source_index_after_padding"].items():
        for frame in range(min(15, int(length))):
            fed = padded[frame : frame + 16]
            assert list(released.window(frame, int(length))) == fed
            assert list(teacher.window(frame, int(length))) == fed[::-1]


@pytest.mark.parametrize("num_frames", [1, 2, 15, 16, 30, 31, 60])
def test_windows_lie_in_their_video_and_end_on_their_frame(
    teacher: Hd2sTeacher, num_frames: int
) -> None:
    windows = [teacher.window(frame, num_frames) for frame in range(num_frames)]
    assert {len(window) for window in windows} == {16}
    assert [window[-1] for window in windows] == list(range(num_frames))
    assert {index for window in windows for index in window} == set(range(num_frames))


def video(num_frames: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (num_frames, 32, 64, 3), np.uint8)


def by_hand(network: Hd2s, frames: list[np.ndarray]) -> Tensor:
    """The planes of one window of pictures, oldest first."""
    clip = (2 * np.stack(frames).astype(np.float64) - 255) / 255
    windows = torch.from_numpy(clip.astype(np.float32)).permute(3, 0, 1, 2)[None]
    with torch.inference_mode():
        return network.logits(windows)[0]


def close(given: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(given, wanted, rtol=1e-4, atol=1e-4)


def test_head_is_labelled_backwards_in_time_or_with_colours_turned_around(
    teacher: Hd2sTeacher, released: Hd2sTeacher, network: Hd2s
) -> None:
    frames, span = video(24), range(13, 17)
    planes = {}
    for labelling in (teacher, released):
        context = labelling.context_of(span, 24)
        prepared = labelling.prepare(frames[context.start : context.stop])
        given = labelling.label(prepared, first=context.start, span=span, num_frames=24)
        planes[labelling.spec.head_policy] = given["maps_16x32"]
    ahead = [*frames[13:24], *frames[23:18:-1]]  # past its end the video goes backwards
    assert close(planes["time_reversed"][0], by_hand(network, ahead[::-1]))
    assert close(planes["released"][0], by_hand(network, [frame[..., ::-1] for frame in ahead]))
    assert not close(planes["time_reversed"][0], planes["released"][0])
    for values in planes.values():
        assert close(values[2], by_hand(network, list(frames[:16])))
        assert close(values[3], by_hand(network, list(frames[1:17])))


def test_short_videos_are_labelled(teacher: Hd2sTeacher, network: Hd2s) -> None:
    frames = video(3)
    assert teacher.context_of(range(3), 3) == range(3)
    planes = teacher.label(teacher.prepare(frames), first=0, span=range(3), num_frames=3)
    padded = [*frames, *frames[::-1], *[frames[0]] * 12]
    for frame, values in enumerate(planes["maps_16x32"]):
        assert close(values, by_hand(network, padded[frame : frame + 16][::-1]))


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
    loaded = imported(kept)
    assert list(loaded.state_dict()) == list(weights)
    assert loaded.state_dict()["conv_t5.bn.num_batches_tracked"] == 0


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.pop("conv_t4.bn.bias"), "1 missing: conv_t4.bn.bias"),
        (lambda given: given.update({"fc.0": torch.ones(2)}), "1 not expected: fc.0"),
        (
            lambda given: given.update({"last_conv.weight": torch.ones(1, 5, 1, 1)}),
            "1 misshaped: last_conv.weight of 1x5x1x1 instead of 1x4x1x1",
        ),
        (
            lambda given: given.update({"last_conv.bias": torch.ones(1, dtype=torch.int64)}),
            "1 not of numbers of the right kind: last_conv.bias",
        ),
        (
            lambda given: [given.pop(key) for key in list(given) if "deconvlayer5_5.0" in key],
            "5 missing: decoder5.deconvlayer5_5.0.conv.weight, .*bn.weight, .*bn.bias, "
            ".*bn.running_mean, .*bn.running_var$",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    weights: dict[str, Tensor], change: Change, message: str
) -> None:
    given = dict(weights)
    change(given)
    with pytest.raises(WeightsError, match=message) as caught:
        imported(given)
    assert "\n" not in str(caught.value)


def test_files_without_weights_of_hd2s_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    with pytest.raises(CheckpointError, match=r"odd\.pt does not exist"):
        Hd2sTeacher(weights=path)
    path.write_bytes(b"no weights at all")
    with pytest.raises(CheckpointError, match=r"odd\.pt is not weights of HD2S"):
        Hd2sTeacher(weights=path)
    torch.save([1, 2], path)
    with pytest.raises(WeightsError, match=r"odd\.pt holds no weights by name"):
        Hd2sTeacher(weights=path)
    torch.save({"state_dict": {"layer": torch.ones(3)}}, path)
    with pytest.raises(WeightsError, match=r"odd\.pt does not fit: .* 1 not expected: layer"):
        Hd2sTeacher(weights=path)


def test_what_decides_the_targets_names_the_weights_and_the_head(
    released: Hd2sTeacher, weights_file: Path
) -> None:
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    assert released.provenance["weights_sha256"] == digest
    assert released.provenance["head_policy"] == "released"
    assert released.provenance["input_size"] == [32, 64]


def test_weights_that_nobody_gave_are_always_the_same_and_look_at_the_frames() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = Hd2sTeacher(height=32, width=32)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = Hd2sTeacher(height=32, width=32)
    assert first.weights_sha256 is None
    assert first.spec == second.spec
    for key, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[key]), key
    maps = first.predict(torch.stack([noise(3, 16, 32, 32), -torch.ones(3, 16, 32, 32)]))
    for name, values in maps.items():
        assert (values[0] - values[1]).abs().max() > 1e-3, name


@pytest.mark.parametrize(("height", "width"), [(100, 128), (32, 48), (0, 64)])
def test_sizes_that_cannot_be_halved_five_times_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 32, got {height}x{width}"):
        Hd2sTeacher(height=height, width=width)


def test_windows_of_another_length_or_size_are_refused(teacher: Hd2sTeacher) -> None:
    with pytest.raises(ValueError, match="sees 16 frames at once, got 8"):
        teacher.predict(torch.zeros(1, 3, 8, 32, 64))
    with pytest.raises(ValueError, match="multiples of 32, got 48x64"):
        teacher.predict(torch.zeros(1, 3, 16, 48, 64))


def test_unknown_head_modes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"head_mode must be one of .*, got 'mirrored'"):
        Hd2sTeacher(head_mode="mirrored")  # type: ignore[arg-type]
