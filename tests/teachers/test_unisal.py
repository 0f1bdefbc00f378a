from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill import Budget, DistillSettings, label_videos
from stores.codec import LOG_DENSITY_FLOOR
from stores.decode import decode_video
from stores.maps import MapLayout, render_maps
from stores.targets import TargetStore
from student.reference import WeightsError
from teachers.base import Precision
from teachers.unisal import PROTOCOLS, Domain, Unisal, UnisalTeacher, smooth
from tests.teachers.goldens import filled

GOLDENS = (
    "dhf1k_native",
    "salicon_native",
    "ucf_small_b2",
    "dhf1k_small_whole",
    "dhf1k_small_chunked",
    "dhf1k_small_single_infer",
    "dhf1k_small_single_dynamic",
)
TOLERANCE = 2e-3
"""Of log-probabilities and states; the goldens' own float32 noise is up to 7.2e-4."""


@pytest.fixture(autouse=True)
def one_thread(threads_of_the_process: None) -> None:
    """Such small pictures are not worth sharing out."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return filled(Unisal)


@pytest.fixture(scope="module")
def weights_file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unisal") / "weights_best.pth"
    torch.save(weights, path)
    return path


def build(weights_file: Path, domain: Domain = "DHF1K") -> UnisalTeacher:
    return UnisalTeacher(height=64, width=96, domain=domain, weights=weights_file)


@pytest.fixture
def teacher(weights_file: Path) -> UnisalTeacher:
    return build(weights_file)


@pytest.fixture(scope="module")
def network(weights_file: Path) -> Unisal:
    return build(weights_file).network


def imported(weights: Mapping[str, Any]) -> Unisal:
    teacher = UnisalTeacher(height=32, width=32)
    teacher.import_weights(weights)
    return teacher.network


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def close(given: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> bool:
    return given.shape == wanted.shape and bool((given - wanted).abs().max() <= tolerance)


@pytest.mark.shared
def test_names_shapes_types_and_order_are_the_published_ones(shared: Path) -> None:
    listed = json.loads((shared / "specs" / "teacher_unisal_keys.json").read_text())
    with torch.device("meta"):
        ours = Unisal()
    described = [
        [key, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in ours.state_dict().items()
    ]
    assert described == listed
    assert len(listed) == 835
    assert sum(parameter.numel() for parameter in ours.parameters()) == 3_714_872


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDENS)
def test_stages_maps_and_states_are_those_of_the_original(
    shared: Path, weights_file: Path, name: str
) -> None:
    golden = np.load(shared / "goldens" / "teachers" / f"unisal_{name}.npz")
    rng = np.random.default_rng(int(golden["input_seed"]))
    x = torch.from_numpy(rng.standard_normal(golden["input_shape"]).astype(np.float32))
    domain: Any = str(golden["source"])
    static = {"infer": None, "True": True, "False": False}[str(golden["static"])]
    teacher = build(weights_file)  # of another size and domain than most: predict does not mind
    stages = record_stages(teacher.network, x, domain) if len(golden["chunks"]) == 1 else {}
    maps, state = [], None
    for chunk in x.split(golden["chunks"].tolist(), 1):
        predicted = teacher.predict(
            chunk.transpose(1, 2),
            source=domain,
            static=static,
            target_size=tuple(golden["target_size"].tolist()),
            state=state,
        )
        maps.append(predicted["map"])
        state = predicted.get("state")
    check(torch.cat(maps, 1), golden, "map")
    assert (state is not None) == ("hidden_sub" in golden)
    if state is not None:
        check(state, golden, "hidden")
    assert len(stages) in (0, 10)
    for stage, value in stages.items():
        check_stage(value, golden, f"tap_{stage}" if stage == "priors" else f"tap_{stage}_t0")


def record_stages(network: Unisal, x: Tensor, domain: Domain) -> dict[str, Tensor]:
    """Return what will hold the values of some stages for the first frames, by their names."""
    height, width = x.shape[-2:]
    priors = network.priors(height // 32, width // 32, domain)
    stages = {"priors": priors.expand(len(x), -1, -1, -1)}

    def keep(name: str, values: Tensor) -> None:
        stages[name] = values.view(*x.shape[:2], *values.shape[1:])[:, 0]

    def watch(name: str, module: str) -> None:
        network.get_submodule(module).register_forward_hook(
            lambda _module, _given, values: keep(name, values)
        )

    def keep_levels(_module: object, _given: object, levels: tuple[Tensor, ...]) -> None:
        for name, values in zip(("cnn_4x", "cnn_2x", "cnn_1x"), levels, strict=True):
            keep(name, values)

    network.cnn.register_forward_hook(keep_levels)
    watch("post_cnn", "post_cnn.inv_res")
    watch("skip_2x", "skip_2x")
    watch("skip_4x", "skip_4x")
    network.get_submodule("post_upsampling_2.inv_res").register_forward_pre_hook(
        lambda _module, given: keep("us2", given[0][:, :128])
    )
    watch("post_us2", "post_upsampling_2.inv_res")
    watch("adaptation", f"adaptation_{domain.lower()}")
    return stages


def check_stage(values: Tensor, golden: Mapping[str, Any], name: str) -> None:
    """Compare with the few values that are kept of a stage."""
    given, allowed = values.numpy(), 1e-4 * float(golden[f"{name}_abssum"])
    assert given.shape == tuple(golden[f"{name}_shape"]), name
    sample, kept = given.flatten()[golden[f"{name}_idx"]], golden[f"{name}_val"]
    np.testing.assert_allclose(
        sample, kept, rtol=1e-3, atol=10 * allowed / given.size, err_msg=name
    )
    assert abs(given.sum(dtype=np.float64) - golden[f"{name}_sum"]) <= allowed, name
    assert abs(abs(given).sum(dtype=np.float64) - golden[f"{name}_abssum"]) <= allowed, name


def check(values: Tensor, golden: Mapping[str, Any], name: str) -> None:
    """Compare with what is kept of log-probabilities or states."""
    given = values.numpy()
    assert given.shape == tuple(golden[f"{name}_shape"]), name
    sub = given if golden[f"{name}_sub"].shape == given.shape else given[..., ::4, ::4]
    np.testing.assert_allclose(sub, golden[f"{name}_sub"], rtol=0, atol=TOLERANCE, err_msg=name)
    pixels = given.reshape(*given.shape[:-2], -1).astype(np.float64)
    for statistic in ("max", "min", "std"):
        found, wanted = getattr(pixels, statistic)(-1), golden[f"{name}_{statistic}"]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE, err_msg=statistic)
    allowed = TOLERANCE * pixels.shape[-1]
    np.testing.assert_allclose(pixels.sum(-1), golden[f"{name}_mapsum"], rtol=0, atol=allowed)
    assert abs(pixels.sum() - golden[f"{name}_sum"]) <= TOLERANCE * pixels.size
    assert abs(abs(pixels).sum() - golden[f"{name}_abssum"]) <= TOLERANCE * pixels.size
    best = np.take_along_axis(pixels, golden[f"{name}_argmax"][..., None], -1)[..., 0]
    assert (pixels.max(-1) - best <= TOLERANCE).all()


@torch.inference_mode()
def test_smoothing_is_a_convolution_of_the_enlarged_picture() -> None:
    pixels, kernel = noise(2, 1, 5, 9).double(), noise(1, 1, 41, 41, seed=2).double()
    enlarged = F.interpolate(pixels, scale_factor=8, mode="nearest")
    published = F.conv2d(F.pad(enlarged, [20] * 4, mode="replicate"), kernel)
    assert close(smooth(pixels, kernel), published, 1e-9)


@torch.inference_mode()
def test_maps_are_log_probabilities_of_each_frame(network: Unisal) -> None:
    output = network(noise(2, 3, 3, 32, 64), target_size=(20, 33))
    assert output.log_probabilities.shape == (2, 3, 1, 20, 33)
    total = output.log_probabilities.exp().sum((-1, -2))
    assert close(total, torch.ones(2, 3, 1), 1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("target_size", [(20, 33), (77, 150)])
def test_maps_are_resized_without_antialias_before_they_are_normalised(
    network: Unisal, target_size: tuple[int, int]
) -> None:
    x = noise(1, 2, 3, 32, 64)
    native, _ = network(x)
    given, _ = network(x, target_size=target_size)
    resized = F.interpolate(native[0], target_size, mode="bilinear", align_corners=False)
    wanted = resized.flatten(1).log_softmax(1).view(1, 2, 1, *target_size)
    assert close(given, wanted)


@torch.inference_mode()
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 160), (96, 64)])
def test_a_batch_gives_what_single_sequences_give_at_any_size(
    network: Unisal, height: int, width: int
) -> None:
    x, hidden = noise(3, 4, 3, height, width), noise(3, 256, height // 32, width // 32)
    maps, after = network(x, hidden=[hidden], source="Hollywood")
    assert maps.shape == (3, 4, 1, height, width)
    assert after is not None
    for i in range(3):
        alone, state = network(x[i : i + 1], hidden=[hidden[i : i + 1]], source="Hollywood")
        assert state is not None
        assert close(alone, maps[i : i + 1])
        assert close(state[0], after[0][i : i + 1])


@torch.inference_mode()
def test_what_is_remembered_continues_a_sequence_and_is_not_changed(network: Unisal) -> None:
    x = noise(1, 5, 3, 32, 64)
    whole, last = network(x)
    begun, hidden = network(x[:, :2])
    assert hidden is not None
    assert last is not None
    kept = hidden[0].clone()
    rest, after = network(x[:, 2:], hidden=hidden)
    assert after is not None
    assert torch.equal(hidden[0], kept)
    assert close(torch.cat([begun, rest], 1), whole)
    assert close(after[0], last[0])
    assert not close(network(x[:, 2:])[0], rest)


@torch.inference_mode()
def test_pictures_have_no_past_and_a_frame_alone_is_taken_for_one(network: Unisal) -> None:
    x, hidden = noise(1, 3, 3, 32, 64), [noise(1, 256, 1, 2)]
    maps, after = network(x, hidden=hidden, static=True)
    assert after is None
    for i in range(3):
        alone, after = network(x[:, i : i + 1], hidden=hidden)
        assert after is None
        assert close(alone, maps[:, i : i + 1])
    remembering, after = network(x[:, :1], hidden=hidden, static=False)
    assert after is not None
    assert not close(remembering, maps[:, :1])


def test_every_domain_has_parts_of_its_own(
    teacher: UnisalTeacher, weights: dict[str, Tensor]
) -> None:
    windows = noise(1, 3, 2, 64, 96)
    maps = {domain: teacher.predict(windows, source=domain)["map"] for domain in PROTOCOLS}
    assert close(teacher.predict(windows)["map"], maps["DHF1K"])
    domains = list(PROTOCOLS)
    for i, domain in enumerate(domains):
        for other in domains[:i]:
            assert not close(maps[domain], maps[other], 0.1), (domain, other)
    others = ("bn_SALICON", "_salicon")
    changed = {
        key: value + 1 if any(part in key for part in others) else value
        for key, value in weights.items()
    }
    teacher.import_weights(changed)
    for domain in PROTOCOLS:
        is_same = close(teacher.predict(windows, source=domain)["map"], maps[domain])
        assert is_same == (domain != "SALICON"), domain


def test_rendered_planes_are_the_maps_relative_to_the_uniform_one(
    weights_file: Path,
) -> None:
    teacher = build(weights_file, "Hollywood")
    windows = noise(2, 3, 3, 64, 96)
    layout = MapLayout.from_dict(json.loads(json.dumps(teacher.spec.layout.to_dict())))
    with torch.inference_mode():
        planes = teacher.logits(windows)
    assert {name: tuple(values.shape) for name, values in planes.items()} == {
        "maps_64x96": (2, 1, 64, 96)
    }
    rendered = render_maps(planes, layout, layout.names, height=64, width=96)
    predicted = teacher.predict(windows)["map"][:, -1, 0].exp() * 64 * 96
    assert list(rendered) == ["map"]
    assert layout.saliency == "map"
    assert layout.hierarchical == ()
    torch.testing.assert_close(rendered["map"], predicted, rtol=TOLERANCE, atol=1e-6)
    mean = rendered["map"].mean((-1, -2))
    torch.testing.assert_close(mean, torch.ones(2), rtol=0, atol=1e-4)


def test_planes_have_a_floor_and_nothing_else_is_cut(
    teacher: UnisalTeacher, weights: dict[str, Tensor]
) -> None:
    key = "smoothing_dhf1k.weight"
    teacher.import_weights({**weights, key: 5 * weights[key]})
    (planes,) = teacher.label(noise(5, 3, 64, 96), first=0, span=range(5), num_frames=5).values()
    wanted = teacher.predict(noise(5, 3, 64, 96)[:, :, None], static=False)["map"][:, 0]
    wanted = wanted + np.log(64 * 96)
    assert wanted.min() < LOG_DENSITY_FLOOR - 10
    assert planes.min() == LOG_DENSITY_FLOOR
    assert close(planes, wanted.clamp(min=LOG_DENSITY_FLOOR), 5 * TOLERANCE)


def label(
    teacher: UnisalTeacher, frames: Tensor, cuts: Sequence[int], *, margin: int = 0
) -> Tensor:
    """Label a video in spans of some lengths, given only their frames and perhaps some before."""
    teacher.reset()
    planes, start = [], 0
    for length in cuts:
        span, first = range(start, start + length), max(0, start - margin)
        labelled = teacher.label(
            frames[first : span.stop], first=first, span=span, num_frames=len(frames)
        )
        planes.append(labelled["maps_64x96"])
        start += length
    assert start == len(frames)
    return torch.cat(planes)


def by_hand(
    network: Unisal,
    frames: Tensor,
    passes: Sequence[Sequence[int]],
    domain: Domain = "DHF1K",
) -> Tensor:
    """The planes of a video whose frames go through the network in some passes."""
    planes = torch.full((len(frames), 1, 64, 96), torch.nan)
    for indices in passes:
        with torch.inference_mode():
            maps, _ = network(frames[list(indices)][None], source=domain, static=False)
        planes[list(indices)] = maps[0] + np.log(64 * 96)
    return planes.clamp(min=LOG_DENSITY_FLOOR)


@pytest.mark.shared
def test_passes_through_a_video_are_those_of_the_published_program(
    shared: Path, teacher: UnisalTeacher, network: Unisal
) -> None:
    text = (shared / "goldens" / "teachers" / "window_protocol_vinet_unisal.json").read_text()
    passes = json.loads(text)["unisal_N13_mod5_seqlen_generate6"]["order_of_passes"]
    frames = noise(13, 3, 64, 96)
    labelled = label(teacher, frames, [13])
    assert close(labelled, by_hand(network, frames, passes))
    neighbours = by_hand(network, frames, [range(13)])
    assert not close(labelled[1:], neighbours[1:], 0.1)


@pytest.mark.parametrize(
    "cuts", [[1] * 23, [5, 5, 5, 5, 3], [3, 7, 13], [2, 4, 6, 11], [16, 7], [22, 1]]
)
@pytest.mark.parametrize("domain", ["DHF1K", "UCFSports"])
def test_planes_do_not_depend_on_how_a_video_is_cut(
    weights_file: Path, domain: Domain, cuts: list[int]
) -> None:
    teacher = build(weights_file, domain)
    frames = noise(23, 3, 64, 96)
    assert close(label(teacher, frames, cuts, margin=2), label(teacher, frames, [23]), 1e-5)


@pytest.mark.parametrize(
    ("domain", "num_frames"), [("DHF1K", 1), ("DHF1K", 3), ("UCFSports", 6), ("Hollywood", 9)]
)
def test_short_videos_are_labelled(
    weights_file: Path, network: Unisal, domain: Domain, num_frames: int
) -> None:
    teacher = build(weights_file, domain)
    assert [list(teacher.window(frame, num_frames)) for frame in range(num_frames)] == [
        [frame] for frame in range(num_frames)
    ]
    assert teacher.context_of(range(num_frames), num_frames) == range(num_frames)
    frames, stride = noise(num_frames, 3, 64, 96), 5 if domain == "DHF1K" else 4
    passes = [range(offset, num_frames, stride) for offset in range(min(stride, num_frames))]
    wanted = by_hand(network, frames, passes, domain)
    assert close(label(teacher, frames, [num_frames]), wanted)


def test_spans_out_of_order_are_refused_and_do_no_harm(teacher: UnisalTeacher) -> None:
    frames = noise(9, 3, 64, 96)
    wanted = label(teacher, frames, [4, 5])
    teacher.reset()
    with pytest.raises(ValueError, match=r"frame 0 is next, got frames 4-9; .* with reset\(\)"):
        teacher.label(frames, first=0, span=range(4, 9), num_frames=9)
    teacher.label(frames, first=0, span=range(4), num_frames=9)
    for span in (range(4), range(5, 9), range(3, 6)):
        with pytest.raises(ValueError, match="frame 4 is next"):
            teacher.label(frames, first=0, span=span, num_frames=9)
    teacher.predict(noise(1, 3, 2, 64, 96, seed=3))
    labelled = teacher.label(frames[4:], first=4, span=range(4, 9), num_frames=9)
    assert close(labelled["maps_64x96"], wanted[4:], 1e-5)
    with pytest.raises(ValueError, match="frame 9 is next"):
        teacher.label(frames, first=0, span=range(9), num_frames=9)


def test_a_span_that_failed_can_be_tried_again(
    teacher: UnisalTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = noise(17, 3, 64, 96)
    wanted = label(teacher, frames, [17])
    teacher.reset()
    teacher.label(frames[:4], first=0, span=range(4), num_frames=17)
    fails, forward = iter([False, True]), teacher.network.forward

    def fail_at_second(x: Tensor, **options: Any) -> object:  # noqa: ANN401 - as of the network
        if next(fails):
            raise torch.OutOfMemoryError("no memory left")
        return forward(x, **options)

    with monkeypatch.context() as patch:
        patch.setattr(teacher.network, "forward", fail_at_second)
        with pytest.raises(torch.OutOfMemoryError):
            teacher.label(frames[4:], first=4, span=range(4, 17), num_frames=17)
    labelled = teacher.label(frames[4:], first=4, span=range(4, 17), num_frames=17)
    assert close(labelled["maps_64x96"], wanted[4:], 1e-5)


def test_new_weights_and_a_reset_forget_the_video_before(
    teacher: UnisalTeacher, weights: dict[str, Tensor]
) -> None:
    frames = noise(7, 3, 64, 96)
    wanted = label(teacher, frames, [7])
    assert close(label(teacher, frames, [7]), wanted, 1e-5)
    teacher.import_weights(weights)
    labelled = teacher.label(frames, first=0, span=range(7), num_frames=7)
    assert close(labelled["maps_64x96"], wanted, 1e-5)


def test_pictures_are_labelled_in_any_order_each_by_itself(
    weights_file: Path, network: Unisal
) -> None:
    pictures = build(weights_file, "SALICON")
    assert not pictures.is_recurrent
    assert pictures.frame_stride == 1
    frames = noise(4, 3, 64, 96)
    for span in (range(2, 4), range(2), range(1, 4)):
        labelled = pictures.label(frames, first=0, span=span, num_frames=4)["maps_64x96"]
        with torch.inference_mode():
            maps, _ = network(frames[list(span)][None], source="SALICON", static=True)
        wanted = (maps[0] + np.log(64 * 96)).clamp(min=LOG_DENSITY_FLOOR)
        assert close(labelled, wanted)
    assert "state" not in pictures.predict(frames[:, :, None])


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_store_holds_whole_passes_however_little_of_a_video_is_labelled(
    weights_file: Path, network: Unisal, video_folder: Path, tmp_path: Path
) -> None:
    settings = DistillSettings(
        teacher="unisal", weights=weights_file, size=(64, 96), shard_frames=16, actors=2
    )
    label_videos([video_folder], tmp_path / "whole.zarr", settings)
    few = replace(settings, budget=Budget(1, seed=3), executor="inline")
    label_videos([video_folder], tmp_path / "part.zarr", few)
    whole, part = (TargetStore.open(tmp_path / f"{n}.zarr").label_set() for n in ("whole", "part"))
    (span,) = part.coverage("long")
    assert span.start >= 5, "the block must have frames before it"
    planes = whole.read("long", 0, 70)["maps_64x96"]
    again = part.read("long", span.start, span.stop)["maps_64x96"]

    teacher = build(weights_file)
    decoded = decode_video(video_folder / "long.avi")
    frames = teacher.prepare(np.stack([teacher.resize(frame) for frame in decoded]))
    wanted = by_hand(network, frames, [range(offset, 70, 5) for offset in range(5)]).numpy()
    assert np.abs(planes - wanted).max() <= 1 / 64 + TOLERANCE
    np.testing.assert_array_equal(again, planes[span.start : span.stop])


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_states_and_planes_are_float32_whatever_is_computed_in(precision: Precision) -> None:
    exact = UnisalTeacher(height=64, width=96)
    teacher = UnisalTeacher(height=64, width=96, precision=precision)
    frames = noise(7, 3, 64, 96)
    planes = label(teacher, frames, [4, 3])
    assert planes.dtype == torch.float32
    assert teacher.predict(frames[:, :, None], static=False)["state"].dtype == torch.float32
    difference = (planes - label(exact, frames, [4, 3])).abs().mean()
    assert difference < (1e-6 if precision == "float32" else 0.1)


def test_frames_are_normalised_as_imagenet_networks_want_it(teacher: UnisalTeacher) -> None:
    frames = np.random.default_rng(7).integers(0, 256, (2, 64, 96, 3), np.uint8)
    wanted = (frames / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    given = teacher.prepare(frames).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(given, wanted, rtol=0, atol=1e-5)


def lanczos(values: np.ndarray, size: int) -> np.ndarray:
    """Resize the first axis with a Lanczos kernel of three lobes, widened to not alias."""
    scale = len(values) / size
    widening = max(scale, 1.0)
    centres = (np.arange(size) + 0.5) * scale
    distances = (np.arange(len(values)) + 0.5 - centres[:, None]) / widening
    kernel = np.sinc(distances) * np.sinc(distances / 3) * (abs(distances) < 3)
    resized = np.tensordot(kernel / kernel.sum(1, keepdims=True), values, 1)
    return np.clip(np.round(resized), 0, 255)


@pytest.mark.parametrize(("height", "width"), [(150, 201), (40, 50), (64, 96)])
def test_frames_are_resized_with_a_lanczos_kernel(
    teacher: UnisalTeacher, height: int, width: int
) -> None:
    frame = np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)
    across = lanczos(frame.transpose(1, 0, 2).astype(np.float64), 96)
    wanted = lanczos(across.transpose(1, 0, 2), 64)
    given = teacher.resize(frame)
    assert given.dtype == np.uint8
    assert given.flags.writeable
    np.testing.assert_allclose(given.astype(np.float64), wanted, rtol=0, atol=1)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict"])
def test_wrapped_weights_and_those_of_parallel_training_are_taken(
    weights: dict[str, Tensor], wrapper: str | None
) -> None:
    prefixed = {f"module.{key}": tensor for key, tensor in weights.items()}
    loaded = imported(prefixed if wrapper is None else {wrapper: prefixed, "epoch": 3})
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


def test_counters_and_the_dropout_mask_may_be_missing(weights: dict[str, Tensor]) -> None:
    ends = ("num_batches_tracked", "drop_mask_1")
    kept = {key: value for key, value in weights.items() if not key.endswith(ends)}
    assert len(kept) < len(weights)
    assert list(imported(kept).state_dict()) == list(weights)


def test_the_dropout_mask_has_no_effect(teacher: UnisalTeacher, weights: dict[str, Tensor]) -> None:
    windows = noise(1, 3, 2, 64, 96)
    before = teacher.predict(windows)["map"]
    teacher.import_weights({**weights, "rnn.cell_list.0.drop_mask_1": torch.zeros(3, 256)})
    assert close(teacher.predict(windows)["map"], before, 1e-5)


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda given: given.pop("skip_2x.reduction.0.bias"),
            "1 missing: skip_2x.reduction.0.bias",
        ),
        (lambda given: given.update({"fc.0": torch.ones(2)}), "1 not expected: fc.0"),
        (
            lambda given: given.update({"rnn.cell_list.0.b_r": torch.ones(256)}),
            "1 misshaped: rnn.cell_list.0.b_r of 256 instead of 256x1x1",
        ),
        (
            lambda given: [given.pop(key) for key in list(given) if "post_rnn.1.bn_SAL" in key],
            "4 missing: post_rnn.1.bn_SALICON.weight, .*bias, .*running_mean, .*running_var$",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    weights: dict[str, Tensor], change: Change, message: str
) -> None:
    given = dict(weights)
    change(given)
    with pytest.raises(WeightsError, match=message):
        imported(given)


@pytest.mark.parametrize(
    ("domain", "height", "width", "frame_stride"),
    [
        ("DHF1K", 224, 384, 5),
        ("Hollywood", 224, 416, 4),
        ("UCFSports", 256, 384, 4),
        ("SALICON", 288, 384, 1),
    ],
)
def test_what_decides_the_targets_names_domain_stride_and_size(
    domain: Domain, height: int, width: int, frame_stride: int
) -> None:
    teacher = UnisalTeacher(domain=domain)
    wanted = {
        "domain": domain,
        "frame_stride": frame_stride,
        "input_size": [height, width],
        "window": 1,
        "labelled_frame": "last",
        "head_policy": "repeat_first",
        "weights_sha256": None,
    }
    assert {key: teacher.provenance[key] for key in wanted} == wanted
    assert teacher.is_recurrent == (domain != "SALICON")
    assert UnisalTeacher.is_recurrent
    (plane,) = teacher.spec.layout.maps
    assert (plane.height, plane.width) == (height, width)


def test_what_decides_the_targets_names_the_weights(
    teacher: UnisalTeacher, weights_file: Path
) -> None:
    digest = hashlib.sha256(weights_file.read_bytes()).hexdigest()
    assert teacher.provenance["weights_sha256"] == digest
    assert teacher.provenance["input_size"] == [64, 96]


def test_weights_that_nobody_gave_are_always_the_same_and_look_at_the_frames() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = UnisalTeacher(height=64, width=96)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = UnisalTeacher(height=64, width=96)
    assert first.weights_sha256 is None
    assert first.spec == second.spec
    for key, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[key]), key
    frames = torch.stack([noise(3, 2, 64, 96), -torch.ones(3, 2, 64, 96)])
    maps = first.predict(frames)["map"]
    assert (maps[0] - maps[1]).abs().max() > 0.5
    assert 0.1 < maps.std((-1, -2)).mean() < 5
    forgetting = first.predict(frames[:, :, 1:], static=False)["map"]
    assert (maps[:, 1:] - forgetting).abs().max() > 1e-2


def test_priors_begin_as_a_grid_of_spots_and_bands() -> None:
    priors = UnisalTeacher(height=32, width=32).network.priors(41, 41, "Hollywood")[0]
    assert priors.shape == (16, 41, 41)
    peaks = [divmod(int(prior.argmax()), 41) for prior in priors]
    spots = [(y, x) for y in (10, 20, 30) for x in (10, 20, 30)]
    columns, rows = [(20, x) for x in (10, 20, 30)], [(y, 20) for y in (10, 20, 30)]
    assert peaks == [*spots, *columns, *rows, (20, 20)]
    assert close(priors.amax((-1, -2)), torch.full((16,), 6.0), 1e-5)
    far, near = 6 * np.exp(-0.5 * 0.5**2), 6 * np.exp(-0.5 * (0.5 / np.exp(-1.5)) ** 2)
    ends = [[float(priors[i, 20, 0]), float(priors[i, 0, 20])] for i in (4, 10, 13, 15)]
    np.testing.assert_allclose(ends, [[near, near], [near, far], [far, near], [far, far]], 1e-4)


@pytest.mark.parametrize(("height", "width"), [(100, 128), (32, 48), (0, 64)])
def test_sizes_that_cannot_be_halved_five_times_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 32, got {height}x{width}"):
        UnisalTeacher(height=height, width=width)


def test_windows_of_another_length_or_size_are_refused(teacher: UnisalTeacher) -> None:
    with pytest.raises(ValueError, match="at least one frame at once, got none"):
        teacher.predict(torch.zeros(1, 3, 0, 64, 96))
    with pytest.raises(ValueError, match="multiples of 32, got 48x64"):
        teacher.predict(torch.zeros(1, 3, 2, 48, 64))
    with pytest.raises(ValueError, match="labels frames of 64x96, got 64x64"):
        teacher.logits(torch.zeros(1, 3, 1, 64, 64))
    with pytest.raises(ValueError, match="labels frames of 64x96, got 64x64"):
        teacher.label(torch.zeros(2, 3, 64, 64), first=0, span=range(2), num_frames=2)


def test_states_of_other_sequences_are_refused(teacher: UnisalTeacher) -> None:
    with pytest.raises(ValueError, match=r"a state of \(2, 256, 2, 3\) is wanted, got \(1, 256"):
        teacher.predict(torch.zeros(2, 3, 2, 64, 96), state=torch.zeros(1, 256, 2, 3))


def test_unknown_domains_are_refused(teacher: UnisalTeacher) -> None:
    with pytest.raises(ValueError, match=r"domain must be one of .*, got 'dhf1k'"):
        UnisalTeacher(domain="dhf1k")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"domain must be one of .*, got 'MIT300'"):
        teacher.predict(torch.zeros(1, 3, 1, 64, 96), source="MIT300")  # type: ignore[arg-type]
