"""Windows that share what they have in common give what each gives alone."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import nn

from teachers.hd2s import Hd2sTeacher
from teachers.network import NetworkTeacher
from teachers.s3d import S3d
from teachers.shared import Features, WindowRun, join, through, whole
from teachers.tased import TasedTeacher
from teachers.vinet import VinetTeacher
from teachers.vinet_s import VinetSTeacher

LAYERS = (
    nn.Conv3d(3, 4, (1, 3, 3), (1, 2, 2), (0, 1, 1)),
    nn.Conv3d(4, 4, (7, 1, 1), (2, 1, 1), (3, 0, 0)),
    nn.ReLU(),
    nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
    nn.Conv3d(4, 5, (3, 1, 1), 1, (1, 0, 0)),
    nn.MaxPool3d(3, 1, 1),
    nn.Conv3d(5, 5, 3, 1, 1),
    nn.MaxPool3d(3, 2, 1),
    nn.Conv3d(5, 5, (3, 1, 1), 1, (1, 0, 0)),
)
CLEAN = {
    16: [range(16), range(2, 7), range(2, 7), range(2, 7), range(3, 6), None, None, None, None],
    32: [
        *(range(32), range(2, 15), range(2, 15), range(2, 15), range(3, 14), range(4, 13)),
        *(range(5, 12), range(3, 6), None),
    ],
}
"""Shared positions behind each layer, from the receptive fields."""


@pytest.mark.parametrize("length", [16, 32])
@pytest.mark.parametrize("windows", [1, 2, 3, 7, 16])
@torch.inference_mode()
def test_every_layer_gives_what_whole_windows_give(length: int, windows: int) -> None:
    frames = torch.randn(length + windows - 1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plain: Features = torch.stack([frames[i : i + length] for i in range(windows)]).transpose(1, 2)
    run: Features = WindowRun.of(frames, length)
    for layer, clean in zip(LAYERS, CLEAN[length], strict=True):
        plain, run = through(layer, plain), through(layer, run)
        torch.testing.assert_close(whole(run), whole(plain), rtol=1e-5, atol=1e-5)
        if windows >= 7:  # fewer have less in common than their borders cost
            assert (run.clean if isinstance(run, WindowRun) else None) == clean
        assert run.shape == plain.shape


@torch.inference_mode()
def test_what_is_shared_is_computed_once() -> None:
    frames = torch.randn(32 + 9, 3, 8, 8)
    seen = 0

    class Counting(nn.Identity):
        def forward(self, features: torch.Tensor) -> torch.Tensor:
            nonlocal seen
            seen += features.shape[0] * features.shape[2]
            return features

    run = WindowRun.of(frames, 32)
    through(Counting(), run)
    assert seen == 41  # frames, not 10 windows of 32
    later = through(LAYERS[1], through(LAYERS[0], run))
    seen = 0
    through(Counting(), later)
    assert seen == 9 + 2 * 12 + 1 + 10 * 3  # a frame for each position, and three for each window


def test_parts_are_joined_at_the_positions_that_all_share() -> None:
    frames = torch.randn(20, 2, 4, 4)
    run = WindowRun.of(frames, 16)
    wide = run.narrow(range(1, 14))
    joined = join([run, wide, run.narrow(range(3, 16))])
    assert isinstance(joined, WindowRun)
    assert joined.clean == range(3, 14)
    torch.testing.assert_close(whole(joined), torch.cat([run.whole()] * 3, 1))
    apart = join([run.narrow(range(0, 3)), run.narrow(range(5, 9))])
    torch.testing.assert_close(apart, torch.cat([run.whole()] * 2, 1))


@torch.inference_mode()
def test_backbone_shares_to_the_numbers_of_whole_windows() -> None:
    network = S3d().eval()
    frames = torch.randn(20, 3, 32, 64)
    plain = torch.stack([frames[i : i + 16] for i in range(5)]).transpose(1, 2)
    for shared, alone in zip(network(WindowRun.of(frames, 16)), network(plain), strict=True):
        torch.testing.assert_close(whole(shared), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [
        (Hd2sTeacher, torch.float32, 1e-4),
        (Hd2sTeacher, torch.float64, 1e-6),
        # TASED-Net puts maxima back to where they were. Of two that are almost alike, rounding
        # decides; in float64 none are.
        (TasedTeacher, torch.float64, 1e-6),
        (VinetTeacher, torch.float32, 1e-4),
        (VinetSTeacher, torch.float32, 1e-4),
    ],
)
def test_spans_are_labelled_as_without_sharing(
    make: Callable[..., NetworkTeacher], dtype: torch.dtype, tolerance: float
) -> None:
    """Head frames, whose windows may run backwards, and short videos among them."""
    teacher = make(height=32, width=64)
    teacher.network.to(dtype)
    length = teacher.spec.window
    rng = torch.Generator().manual_seed(4)
    frames = teacher.normalise(torch.rand(3 * length, 3, 32, 64, dtype=dtype, generator=rng))
    spans = (range(3, 9), range(length - 4, length + 6), range(2 * length, 2 * length + 9))
    cases = [(len(frames), span) for span in spans]
    short = length + 5
    for num_frames, span in (*cases, (short, range(short - 8, short)), (length - 2, range(8))):
        planes = {}
        for teacher.shares_windows in (False, True):
            seen = frames[:num_frames]
            planes[teacher.shares_windows] = teacher.label(
                seen, first=0, span=span, num_frames=num_frames
            )
        for name, values in planes[False].items():
            off = (planes[True][name] - values).abs()
            assert off.max() <= tolerance, (num_frames, span)


def test_windows_of_a_span_that_have_much_in_common_are_seen_together() -> None:
    teacher = Hd2sTeacher(height=32, width=64)
    frames, seen = torch.rand(64, 3, 32, 64), []

    def logits(windows: Features) -> dict[str, torch.Tensor]:
        seen.append((type(windows).__name__, windows.shape[0]))
        return {"maps_16x32": torch.zeros(windows.shape[0], 4, 16, 32)}

    with patch.object(teacher, "logits", logits):
        teacher.label(frames, first=0, span=range(12, 22), num_frames=64)
        teacher.label(frames[:20], first=0, span=range(20), num_frames=20)
    assert seen == [
        *(("WindowRun", 3), ("WindowRun", 7)),  # before and after the head's end
        *(("WindowRun", 5), ("Tensor", 10), ("WindowRun", 5)),  # some go on backwards at the end
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "dtype", "tolerance"),
    [
        (Hd2sTeacher, torch.float32, 1e-4),
        (TasedTeacher, torch.float64, 1e-9),
        (VinetTeacher, torch.float32, 1e-4),
    ],
)
@torch.no_grad()
def test_both_forms_of_a_network_are_one_graph_each(
    make: Callable[..., NetworkTeacher], dtype: torch.dtype, tolerance: float
) -> None:
    """As compilers want it; only what they see is looked at, nothing is generated."""
    teacher = make(height=32, width=64)
    teacher.network.to(dtype)
    length = teacher.spec.window
    frames = teacher.normalise(torch.rand(length + 9, 3, 32, 64, dtype=dtype))
    plain = torch.stack([frames[i : i + length] for i in range(10)]).transpose(1, 2)
    (wanted,) = teacher.logits(plain).values()
    compiled = torch.compile(teacher.logits, backend="eager", fullgraph=True)
    for windows in (plain, WindowRun.of(frames, length)):
        (given,) = compiled(windows).values()
        torch.testing.assert_close(given, wanted, rtol=0, atol=tolerance)


def test_a_single_thread_convolves_as_many_do() -> None:
    """With one thread PyTorch would use a slow convolution of its own for kernels over time."""
    teacher = Hd2sTeacher(height=32, width=64)
    frames = teacher.normalise(torch.rand(60, 3, 32, 64))
    planes, used = [], []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            labelled = teacher.label(frames, first=0, span=range(40, 48), num_frames=60)
        planes.append(labelled["maps_16x32"])
        used.append({event.key for event in profile.key_averages()})
    torch.testing.assert_close(planes[1], planes[0], rtol=1e-4, atol=1e-4)
    assert "aten::slow_conv3d_forward" not in used[1]
    assert "aten::mkldnn_convolution" in used[1]


@pytest.mark.parametrize(
    "layer",
    [
        nn.AvgPool3d(3, 1, 1),
        nn.InstanceNorm3d(3),
        nn.MaxPool3d(3, 2, 1, ceil_mode=True),
        nn.MaxPool3d(3, dilation=(2, 1, 1)),
        nn.Conv3d(3, 3, 3, padding=1, padding_mode="replicate"),
        nn.Conv3d(3, 3, 3, padding="same"),
        nn.Conv3d(3, 3, 3, dilation=(2, 1, 1)),
    ],
)
def test_a_layer_that_windows_cannot_share_is_refused(layer: nn.Module) -> None:
    run = WindowRun.of(torch.randn(20, 3, 8, 8), 12)
    with pytest.raises(TypeError, match="windows"):
        through(layer, run)


@torch.inference_mode()
def test_a_kernel_of_one_frame_that_pads_time_adds_frames() -> None:
    frames, layer = torch.randn(20, 3, 8, 8), nn.Conv3d(3, 4, 1, padding=(1, 0, 0))
    plain = torch.stack([frames[i : i + 12] for i in range(9)]).transpose(1, 2)
    torch.testing.assert_close(whole(through(layer, WindowRun.of(frames, 12))), layer(plain))
