from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stores.frames import resize_frames
from stores.maps import MapLayout, render_maps
from student.reference import WeightsError
from teachers.tased import Switches, Tased, TasedTeacher, unpool
from tests.teachers.goldens import KEPT, filled

GAINS = {"convtsp4.13.weight": 0.1}

STEPS = {"y3": 8, "y2": 8, "y1": 4, "y0": 4, "z1": 4, "i2": 8, "i1": 8, "i0": 8} | {
    name: 8 for name in ("u1", "z2", "u2", "z3", "u3", "z4_half")
}
"""Every how many rows and columns the goldens keep of an array; of the maps it is 4."""
NEAR = 1e-5
"""Difference of two values, relative to them, that rounding may turn around."""


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return filled(Tased, gains=GAINS, lifts_few=True)


def imported(weights: Mapping[str, Any]) -> TasedTeacher:
    teacher = TasedTeacher(height=32, width=64)
    teacher.import_weights(weights)
    return teacher


@pytest.fixture(scope="module")
def teacher(weights: dict[str, Tensor]) -> TasedTeacher:
    return imported(weights)


@pytest.fixture(scope="module")
def network(teacher: TasedTeacher) -> Tased:
    return teacher.network


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.mark.shared
def test_names_shapes_types_and_order_are_the_published_ones(shared: Path) -> None:
    listed = json.loads((shared / "specs" / "teacher_tased_keys.json").read_text())["keys"]
    with torch.device("meta"):
        ours = Tased().state_dict()
    described = [
        [key, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in ours.items()
    ]
    assert described == listed


@pytest.mark.shared
def test_weights_of_the_goldens_are_those_that_their_rule_gives(
    shared: Path, weights: dict[str, Tensor]
) -> None:
    text = (shared / "goldens" / "teachers" / "fill_rule_hd2s_tased.json").read_text()
    rule = json.loads(text)
    spots = {key: spot for key, spot in rule["spot_checks"].items() if key in weights}
    assert len(spots) == 6
    for key, spot in spots.items():
        assert rule["gain"].get(key, 1.0) == GAINS.get(key, 1.0)
        assert weights[key].flatten()[:3].tolist() == spot["first3"][:3]
        assert weights[key].double().sum().item() == pytest.approx(spot["sum_float64"])


@pytest.mark.shared
@pytest.mark.parametrize("size", ["128x192", pytest.param("224x384", marks=pytest.mark.slow)])
@torch.inference_mode()
def test_features_switches_and_maps_are_those_of_the_original(
    shared: Path, network: Tased, size: str
) -> None:
    golden = np.load(shared / "goldens" / "teachers" / f"tased_{size}_b1_seed1.npz")
    rng = np.random.default_rng(int(golden["meta__seed"]))
    clip = torch.from_numpy(rng.standard_normal(golden["meta__shape"]).astype(np.float32))
    bases = [network.base1, network.base2, network.base3, network.base4]
    pool, last_pool = network.find_maxima[1], network.maxp4

    with watched(*bases, pool, last_pool) as calls:
        features, switches = network.encode(clip)
    for name, base in zip(("y3", "y2", "y1", "y0"), bases, strict=True):
        check(calls[base][0][1], golden, name, tolerance=1e-4)
    for name, found in zip(("i2", "i1", "i0"), switches, strict=True):
        check_switches(found, golden, name)

    # A maximum that is so by rounding alone may be elsewhere on other hardware, and then so are
    # the edges of the map.
    pooled = [values for values, _ in (*calls[pool], *calls[last_pool])]
    settled = settle(network, features, switches, find_ties(switches, pooled), golden["out__sub"])
    for name, values in decode(network, features, settled).items():
        tolerance = 5e-5 / float(golden["out__max"]) if name == "out" else 1e-4
        check(values, golden, name, tolerance=tolerance)


Calls = dict[nn.Module, list[tuple[Tensor, Any]]]


@contextmanager
def watched(*modules: nn.Module) -> Iterator[Calls]:
    """Keep what goes into modules and what comes out."""
    calls: Calls = {module: [] for module in modules}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        calls[module].append((inputs[0], output))

    handles = [module.register_forward_hook(keep) for module in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def decode(network: Tased, features: Tensor, switches: Switches) -> dict[str, Tensor]:
    """All that the decoder makes, by the goldens' names."""
    parts = (network.convtsp1, network.convtsp2, network.convtsp3, network.convtsp4)
    last_norm = network.convtsp4[11]
    with watched(*parts, last_norm) as calls:
        logit = network.decode(features, switches)[:, 0]
    (_, z1), (u1, z2), (u2, z3), (u3, _) = (calls[part][0] for part in parts)
    made = {"z1": z1, "u1": u1, "z2": z2, "u2": u2, "z3": z3, "u3": u3}
    return made | {"z4_half": calls[last_norm][0][1], "logit": logit, "out": logit.sigmoid()}


class Tie(NamedTuple):
    """A maximum that is so by rounding alone."""

    margin: float
    """How much larger it is than its rival, relative to itself."""
    level: int
    """Which switches it belongs to."""
    place: tuple[int, ...]
    rival: int
    """Position of the second largest value."""


def find_ties(switches: Switches, pooled: Sequence[Tensor]) -> list[Tie]:
    """Find the maxima that other hardware might see elsewhere, the closest ones first."""
    ties = []
    for level, (found, values) in enumerate(zip(switches, pooled, strict=True)):
        kernel, padding = (2, 0) if level == 2 else (3, 1)

        def windows(values: Tensor, kernel: int = kernel, padding: int = padding) -> Tensor:
            padded = F.pad(values, [padding] * 4, value=-torch.inf)
            return padded.unfold(3, kernel, 2).unfold(4, kernel, 2).flatten(-2)

        (best, second), order = (both.unbind(-1) for both in windows(values).topk(2))
        margins = (best - second) / best  # nothing in a window of zeros
        cells = torch.arange(values[0, 0].numel(), dtype=torch.float32).view(values.shape[2:])
        seen = windows(cells.expand_as(values)).gather(-1, torch.stack(order, -1)).long()
        rivals = seen.sum(-1) - found
        for place in map(tuple, (margins < NEAR).nonzero().tolist()):
            ties.append(Tie(margins[place].item(), level, place, int(rivals[place])))
    return sorted(ties)


def settle(
    network: Tased,
    features: Tensor,
    switches: Switches,
    ties: Sequence[Tie],
    wanted: npt.NDArray[np.float32],
) -> Switches:
    """Decide ties as the original did: a wrong one shows in a part of the map."""

    def count_faults(switches: Switches) -> int:
        saliency = decode(network, features, switches)["out"].numpy()
        return int((np.abs(kept_part(saliency, "out") - wanted) > 5e-5).sum())

    faults = count_faults(switches)
    for tie in ties:
        if not faults:
            break
        changed = [found.clone() for found in switches]
        changed[tie.level][tie.place] = tie.rival
        fewer = count_faults(Switches(*changed))
        if fewer < faults:
            faults, switches = fewer, Switches(*changed)
    return switches


def kept_part(values: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
    step = STEPS.get(name, 4)
    channels = 64 if values.ndim == 5 and name != "z4_half" else 1
    part = values[..., ::step, ::step]
    return part[:, ::channels] if values.ndim == 5 else part


def check(values: Tensor, golden: Mapping[str, Any], name: str, *, tolerance: float) -> None:
    """Compare with what is kept of an array; the tolerance is relative to its largest value."""
    given, kept = values.numpy(), {key: golden[f"{name}__{key}"] for key in KEPT}
    allowed = tolerance * max(abs(kept["min"]), abs(kept["max"]))
    assert given.shape == tuple(kept["shape"]), name
    part = kept_part(given, name)
    np.testing.assert_allclose(part, kept["sub"], rtol=0, atol=allowed, err_msg=name)
    for statistic, found in {"min": given.min(), "max": given.max(), "std": given.std()}.items():
        assert abs(found - kept[statistic]) <= allowed, (name, statistic)
    assert abs(given.sum(dtype=np.float64) - kept["sum"]) <= allowed * given.size, name
    assert abs(abs(given).sum(dtype=np.float64) - kept["abssum"]) <= allowed * given.size, name


def check_switches(switches: Tensor, golden: Mapping[str, Any], name: str) -> None:
    """Compare positions: all but those that rounding may decide are equal."""
    given = switches.numpy()
    assert given.shape == tuple(golden[f"{name}__shape"]), name
    assert given.max() == golden[f"{name}__max"], name
    assert (kept_part(given, name) == golden[f"{name}__sub"]).mean() >= 0.999, name
    assert given.sum() == pytest.approx(float(golden[f"{name}__sum"]), rel=1e-5), name


@torch.inference_mode()
def test_a_batch_of_another_size_gives_what_single_windows_give(network: Tased) -> None:
    exact = copy.deepcopy(network).double()  # no rounding decides where a maximum is
    windows = noise(2, 3, 32, 32, 96, seed=2).double()
    maps = exact(windows)
    assert maps.shape == (2, 32, 96)
    for index, saliency in enumerate(maps):
        alone = exact(windows[index : index + 1])[0]
        torch.testing.assert_close(alone, saliency, rtol=0, atol=1e-9)
        assert saliency.std() > 1e-2
    assert (maps[0] - maps[1]).abs().mean() > 1e-2


def test_maps_rendered_from_stored_planes_are_those_of_the_network(teacher: TasedTeacher) -> None:
    windows = noise(2, 3, 32, 32, 64)
    layout = MapLayout.from_dict(json.loads(json.dumps(teacher.spec.layout.to_dict())))
    with torch.inference_mode():
        planes = teacher.logits(windows)
    assert {name: tuple(values.shape) for name, values in planes.items()} == {
        "maps_32x64": (2, 1, 32, 64)
    }
    rendered = render_maps(planes, layout, layout.names, height=32, width=64)
    predicted = teacher.predict(windows)
    assert list(rendered) == list(predicted) == [layout.saliency] == ["map"]
    assert layout.hierarchical == ()
    torch.testing.assert_close(rendered["map"], predicted["map"], rtol=0, atol=1e-6)


def place_one_by_one(features: Tensor, switches: Tensor) -> Tensor:
    batch, channels, frames, height, width = features.shape
    placed = np.zeros((batch, channels, frames * 4 * height * width), np.float32)
    for index in np.ndindex(*features.shape):  # frames, rows and columns in their order
        placed[(*index[:2], int(switches[index]))] = features[index]
    return torch.from_numpy(placed).view(batch, channels, frames, 2 * height, 2 * width)


@pytest.fixture(scope="module")
def claimed_twice() -> tuple[Tensor, Tensor]:
    """Features and switches of a pool whose windows overlap and are often zero throughout."""
    _, switches = F.max_pool3d(
        noise(2, 3, 4, 12, 16, seed=3).sub(1.2).relu(),
        (1, 3, 3),
        (1, 2, 2),
        (0, 1, 1),
        return_indices=True,
    )
    rows = switches.flatten(2).flatten(0, 1)
    assert sum(len(row) - len(row.unique()) for row in rows) > 0.2 * rows.numel()
    return noise(2, 3, 4, 6, 8, seed=4), switches


def test_the_last_of_several_features_for_one_position_stays(
    claimed_twice: tuple[Tensor, Tensor],
) -> None:
    features, switches = claimed_twice
    assert torch.equal(unpool(features, switches), place_one_by_one(features, switches))
    first_cell = unpool(features, torch.zeros_like(switches)).flatten(2)
    assert torch.equal(first_cell[..., 0], features[:, :, -1, -1, -1])
    assert not first_cell[..., 1:].any()
    half = unpool(features.bfloat16(), switches)
    assert torch.equal(half, place_one_by_one(features.bfloat16().float(), switches).bfloat16())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_the_same_feature_stays_on_a_gpu(claimed_twice: tuple[Tensor, Tensor]) -> None:
    features, switches = claimed_twice
    there = unpool(features.cuda(), switches.cuda()).cpu()
    assert torch.equal(there, unpool(features, switches))


def test_zeros_and_equal_values_are_found_at_their_first_place(network: Tased) -> None:
    features = torch.zeros(1, 192, 16, 8, 8)
    features[0, 0, 9, 3, 3] = features[0, 0, 10, 3, 4] = 1  # frames 8 to 11 are reduced to one
    _, switches = network.find_maxima(features)
    firsts = torch.tensor([0, 1, 3, 5])  # windows at the border have no row or column before it
    grid = firsts[:, None] * 8 + firsts
    for frame in (0, 1, 3):
        assert torch.equal(switches[0, 0, frame], 64 * frame + grid)
    expected = 64 * 2 + grid
    expected[1:3, 1] = 64 * 2 + 3 * 8 + 3
    expected[1:3, 2] = 64 * 2 + 3 * 8 + 3
    assert torch.equal(switches[0, 0, 2], expected)


@pytest.mark.shared
def test_windows_are_those_of_the_published_program(shared: Path, teacher: TasedTeacher) -> None:
    text = (shared / "goldens" / "teachers" / "window_protocol_hd2s_tased.json").read_text()
    entries = json.loads(text)["tased_video_63_frames"]
    assert [entry["frame"] for entry in entries] == list(range(63))
    for entry in entries:
        for num_frames in (63, 62 if entry["frame"] < 62 else 63, 1000):
            assert list(teacher.window(entry["frame"], num_frames)) == entry["fed"]


@pytest.mark.parametrize("num_frames", [1, 2, 20, 31, 32, 33, 45, 61, 62, 63, 90])
def test_windows_lie_in_their_video_and_end_on_their_frame(
    teacher: TasedTeacher, num_frames: int
) -> None:
    windows = [teacher.window(frame, num_frames) for frame in range(num_frames)]
    assert {len(window) for window in windows} == {32}
    assert [window[-1] for window in windows] == list(range(num_frames))
    assert {index for window in windows for index in window} == set(range(num_frames))


@pytest.mark.parametrize("num_frames", [1, 7, 32, 50, 61])
def test_videos_too_short_go_on_backwards_then_repeat_their_first_frame(
    teacher: TasedTeacher, num_frames: int
) -> None:
    padded = [*range(num_frames), *reversed(range(num_frames)), *[0] * 62][:62]
    for frame in range(min(num_frames, 31)):
        assert list(teacher.window(frame, num_frames)) == padded[frame : frame + 32][::-1]
    for frame in range(31, num_frames):
        assert list(teacher.window(frame, num_frames)) == list(range(frame - 31, frame + 1))


def video(num_frames: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (num_frames, 32, 64, 3), np.uint8)


def by_hand(network: Tased, windows: Sequence[Tensor]) -> Tensor:
    """Planes of windows of prepared frames, oldest first."""
    with torch.inference_mode():
        return network.logits(torch.stack(list(windows)).transpose(1, 2))


def test_head_is_labelled_backwards_in_time(teacher: TasedTeacher, network: Tased) -> None:
    frames, span = video(70), range(29, 33)
    context = teacher.context_of(span, 70)
    assert context == range(62)
    prepared = teacher.prepare(frames[context.start : context.stop]).contiguous()
    given = teacher.label(prepared, first=context.start, span=span, num_frames=70)["maps_32x64"]
    back = [prepared[29:61].flip(0), prepared[30:62].flip(0)]
    wanted = by_hand(network, [*back, prepared[0:32], prepared[1:33]])
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-4)
    assert (given[1:] - given[:-1]).abs().flatten(1).mean(1).min() > 1e-2


def test_short_videos_are_labelled(teacher: TasedTeacher, network: Tased) -> None:
    prepared = teacher.prepare(video(3)).contiguous()
    assert teacher.context_of(range(3), 3) == range(3)
    given = teacher.label(prepared, first=0, span=range(3), num_frames=3)["maps_32x64"]
    padded = torch.cat([prepared, prepared.flip(0), prepared[:1].expand(28, -1, -1, -1)])
    wanted = by_hand(network, [padded[frame : frame + 32].flip(0) for frame in range(3)])
    torch.testing.assert_close(given, wanted, rtol=0, atol=1e-4)


def test_frames_are_brought_to_minus_one_to_one(teacher: TasedTeacher) -> None:
    frames = video(2)
    wanted = torch.from_numpy((2 * frames.astype(np.float64) - 255) / 255).permute(0, 3, 1, 2)
    torch.testing.assert_close(teacher.prepare(frames), wanted.float(), rtol=0, atol=1e-6)


def test_frames_are_resized_without_antialiasing(teacher: TasedTeacher) -> None:
    frame = np.random.default_rng(9).integers(0, 256, (100, 150, 3), np.uint8)
    given = teacher.resize(frame)
    assert given.shape == (32, 64, 3)
    rows, columns = interpolation(100, 32), interpolation(150, 64)
    wanted = np.einsum("yi,xj,ijc->yxc", rows, columns, frame.astype(np.float64))
    assert np.abs(given - wanted).max() <= 1
    smooth = resize_frames(frame[None], 32, 64, antialias=True)[0]
    assert np.abs(smooth - wanted).mean() > 10


def interpolation(old: int, new: int) -> npt.NDArray[np.float64]:
    """Weights ``(new, old)`` of linear interpolation between the centres of pixels."""
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(old)))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_wrapped_weights_and_those_of_parallel_training_are_taken(
    weights: dict[str, Tensor], wrapper: str | None
) -> None:
    prefixed = {f"module.{key}": tensor for key, tensor in weights.items()}
    loaded = imported(prefixed if wrapper is None else {wrapper: prefixed, "epoch": 3}).network
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, weights[key]), key


def test_counters_of_batches_may_be_missing(weights: dict[str, Tensor]) -> None:
    kept = {key: value for key, value in weights.items() if "num_batches" not in key}
    assert len(kept) < len(weights)
    loaded = imported(kept).network
    assert list(loaded.state_dict()) == list(weights)
    assert loaded.state_dict()["convtsp1.4.num_batches_tracked"] == 0


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.pop("convtsp4.13.bias"), "1 missing: convtsp4.13.bias"),
        (lambda given: given.update({"fc.0.bias": torch.ones(2)}), "1 not expected: fc.0.bias"),
        (
            lambda given: given.update({"convtsp2.0.weight": torch.ones(480, 832, 1, 3, 3)}),
            "1 misshaped: convtsp2.0.weight of 480x832x1x3x3 instead of 832x480x1x3x3",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    weights: dict[str, Tensor], change: Change, message: str
) -> None:
    given = dict(weights)
    change(given)
    with pytest.raises(WeightsError, match=f"weights of TASED-Net: {message}$"):
        imported(given)


def test_a_file_of_weights_is_read_and_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "tased.pt"
    torch.save(weights, path)
    teacher = TasedTeacher(height=32, width=32, weights=path)
    path.unlink()  # it is large
    assert teacher.provenance["weights_sha256"] is not None
    assert teacher.provenance["head_policy"] == "time_reversed"
    assert teacher.provenance["window"] == 32
    key = "convtsp4.13.bias"
    assert torch.equal(teacher.network.state_dict()[key], weights[key])


def test_weights_that_nobody_gave_are_always_the_same_and_look_at_the_frames() -> None:
    torch.manual_seed(5)
    first = TasedTeacher(height=32, width=32)
    torch.manual_seed(6)
    second = TasedTeacher(height=32, width=32)
    assert first.weights_sha256 is None
    for key, tensor in first.network.state_dict().items():
        assert torch.equal(tensor, second.network.state_dict()[key]), key
    maps = first.predict(torch.stack([noise(3, 32, 32, 32), -torch.ones(3, 32, 32, 32)]))["map"]
    assert (maps[0] - maps[1]).abs().max() > 1e-2
    assert maps[0].std() > 1e-2
    assert 0.01 < maps[0].mean() < 0.99


def test_it_is_declared_at_the_published_size() -> None:
    spec = TasedTeacher().spec
    (plane,) = spec.layout.maps
    assert (spec.name, spec.window, spec.labelled_frame) == ("tased", 32, "last")
    assert (spec.layout.height, spec.layout.width) == (plane.height, plane.width) == (224, 384)


@pytest.mark.parametrize(("height", "width"), [(100, 128), (32, 48), (0, 64)])
def test_sizes_that_cannot_be_halved_five_times_are_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"multiples of 32, got {height}x{width}"):
        TasedTeacher(height=height, width=width)


def test_windows_of_another_length_or_size_are_refused(teacher: TasedTeacher) -> None:
    for frames in (31, 33, 16, 40):  # of some of these lengths the arithmetic would go through
        with pytest.raises(ValueError, match=f"sees 32 frames at once, got {frames}"):
            teacher.predict(torch.zeros(1, 3, frames, 32, 64))
    with pytest.raises(ValueError, match="multiples of 32, got 48x64"):
        teacher.logits(torch.zeros(1, 3, 32, 48, 64))
