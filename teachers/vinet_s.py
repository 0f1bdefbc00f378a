"""ViNet-S and ViNet-A: ViNet with a light decoder, and one that sees actions.

Girmaji et al., "Minimalistic video saliency prediction via efficient decoder & spatio temporal
action cues", ICASSP 2025. The decoders' convolutions look at groups of channels. ViNet-S is
otherwise ViNet; ViNet-A has a backbone of its own, which was trained to tell where actions happen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.base import TeacherSpec, window_of
from teachers.shared import Conv3d, convolve_norm
from teachers.vinet import WINDOW, Decoder, Double, MapTeacher, Vinet, VinetTeacher, stretch

Upsampling = Literal["half_pixel", "align_corners"]

GROUPS: Final = (32, 16, 8, 4, 2)
"""Of the channels, in the convolutions of ViNet-S's decoder."""
PAPER: Final = (
    "Girmaji et al., Minimalistic Video Saliency Prediction via Efficient Decoder & Spatio "
    "Temporal Action Cues, ICASSP 2025"
)
FRAMES_PER_SLOW: Final = 4
"""Frames of which the slow pathway sees one."""

# Shapes: B windows, C channels, T frames, H height, W width.


class VinetS(Vinet):
    """ViNet with a decoder that looks at groups of channels; names are the published ones.

    Args:
        align_corners: How height and width are doubled; see :class:`teachers.vinet.Double`.

    Shape:
        - clip: ``(B, 3, 32, H, W)``, H and W multiples of 32
        - returns: the last frame's map, ``(B, 1, H, W)``, logits
    """

    def __init__(self, *, align_corners: bool = False) -> None:
        super().__init__(Decoder(groups=GROUPS, align_corners=align_corners))


class VinetSTeacher(VinetTeacher):
    """ViNet-S, labelling the last frame of each window of 32.

    Before the first frame of a video there are copies of it. The published weights do not tell how
    the decoder doubles height and width: the program that was published to use them does it with
    half-pixel centres, the one that trains such networks with aligned corners, unless asked
    otherwise.

    Args:
        height: Rows of the input, in pixels; a multiple of 32. The published program takes no size
            but 224x384.
        width: Columns of the input.
        upsampling: How height and width are doubled.
        options: As of :class:`teachers.network.NetworkTeacher`.

    Raises:
        ValueError: If the size is not a multiple of 32 or there is no such ``upsampling``.
    """

    title = "ViNet-S"
    network: VinetS

    def __init__(
        self,
        *,
        height: int = 224,
        width: int = 384,
        upsampling: Upsampling = "half_pixel",
        **options: Any,  # noqa: ANN401 - device, precision, weights
    ) -> None:
        if upsampling not in get_args(Upsampling):
            raise ValueError(
                f"upsampling must be one of {get_args(Upsampling)}, got {upsampling!r}"
            )
        self.upsampling = upsampling
        super().__init__(height=height, width=width, **options)

    @property
    def provenance(self) -> dict[str, Any]:
        """All that decides the targets, with how height and width are doubled."""
        return {**super().provenance, "upsampling": self.upsampling}

    def build_network(self) -> VinetS:
        return VinetS(align_corners=self.upsampling == "align_corners")

    def make_spec(self) -> TeacherSpec:
        return replace(
            super().make_spec(),
            name="vinet-s",
            paper=PAPER,
            licence="CC BY-NC-SA (published weights)",
            head_policy="repeat_first",
            batch=8,
        )

    def window(self, frame: int, num_frames: int) -> Sequence[int]:
        return [max(0, index) for index in window_of(frame, length=WINDOW)]


class SlowFastLevels(NamedTuple):
    """What both pathways see in a clip ``(B, 3, 32, H, W)``.

    The skips are what goes into the slow pathway's stages: what it has seen so far and, beside it,
    what the fast one has.
    """

    skip1: Tensor
    """``(B, 80, 8, H / 4, W / 4)``"""
    skip2: Tensor
    """``(B, 320, 8, H / 4, W / 4)``"""
    skip3: Tensor
    """``(B, 640, 8, H / 8, W / 8)``"""
    skip4: Tensor
    """``(B, 1280, 8, H / 16, W / 16)``, rounded up"""
    slow: Tensor
    """``(B, 2048, 8, H / 16, W / 16)``, rounded up"""
    fast: Tensor
    """``(B, 256, 32, H / 16, W / 16)``, rounded up"""


class Bottleneck(nn.Module):
    """Add to features what a 3x3 kernel sees in a narrower version of them.

    Args:
        in_channels: Channels of the features.
        width: Channels of the narrower version; the result has four times as many.
        is_temporal: Whether narrowing looks at the frames before and after.
        stride: Steps of the kernel, in rows and columns.
        dilation: Distance of the pixels that it sees.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        is_temporal: bool,
        stride: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        out_channels, steps = 4 * width, (1, stride, stride)
        frames = 3 if is_temporal else 1
        self.conv1 = nn.Conv3d(
            in_channels, width, (frames, 1, 1), padding=(frames // 2, 0, 0), bias=False
        )
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(
            width,
            width,
            (1, 3, 3),
            steps,
            padding=(0, dilation, dilation),
            dilation=(1, dilation, dilation),
            bias=False,
        )
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(out_channels)
        self.projects = in_channels != out_channels
        if self.projects:
            self.downsample = nn.Sequential(
                nn.Conv3d(in_channels, out_channels, 1, steps, bias=False)
            )
            self.downsample_bn = nn.BatchNorm3d(out_channels)

    def forward(self, features: Tensor) -> Tensor:
        seen = convolve_norm(features, self.conv1, self.bn1)
        seen = convolve_norm(seen, self.conv2, self.bn2)
        seen = convolve_norm(seen, self.conv3, self.bn3, relu=False)
        if self.projects:
            project = self.downsample[0]
            assert isinstance(project, nn.Conv3d)
            features = convolve_norm(features, project, self.downsample_bn, relu=False)
        return F.relu(features + seen)


class SlowFast(nn.Module):
    """Two residual networks: one sees every frame with few channels, one each fourth with many.

    Feichtenhofer et al., "SlowFast networks for video recognition", ICCV 2019. Before each stage of
    the slow pathway, what the fast one has seen is laid beside its features.

    Shape:
        - clip: ``(B, 3, 32, H, W)``, H and W multiples of 8
        - returns: the feature levels
    """

    def __init__(self) -> None:
        super().__init__()
        self.fast_conv1 = nn.Conv3d(3, 8, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False)
        self.fast_bn1 = nn.BatchNorm3d(8)
        self.fast_res1 = _stage(8, 8, 3, is_temporal=True)
        self.fast_res2 = _stage(32, 16, 4, is_temporal=True, stride=2)
        self.fast_res3 = _stage(64, 32, 6, is_temporal=True, stride=2)
        self.fast_res4 = _stage(128, 64, 3, is_temporal=True, dilation=2)
        self.slow_conv1 = nn.Conv3d(3, 64, (1, 7, 7), (1, 2, 2), (0, 3, 3), bias=False)
        self.slow_bn1 = nn.BatchNorm3d(64)
        self.slow_res1 = _stage(80, 64, 3, is_temporal=False)
        self.slow_res2 = _stage(320, 128, 4, is_temporal=False, stride=2)
        self.slow_res3 = _stage(640, 256, 6, is_temporal=True, stride=2)
        self.slow_res4 = _stage(1280, 512, 3, is_temporal=True, dilation=2)
        self.Tconv1 = _lateral(8, 16)
        self.Tconv2 = _lateral(32, 64)
        self.Tconv3 = _lateral(64, 128)
        self.Tconv4 = _lateral(128, 256)

    def forward(self, clip: Tensor) -> SlowFastLevels:
        fast = _halve(convolve_norm(clip, self.fast_conv1, self.fast_bn1))
        seldom = clip[:, :, ::FRAMES_PER_SLOW]
        slow = _halve(convolve_norm(seldom, self.slow_conv1, self.slow_bn1))
        skip1 = torch.cat([slow, self.Tconv1(fast)], 1)
        slow, fast = self.slow_res1(skip1), self.fast_res1(fast)
        skip2 = torch.cat([slow, self.Tconv2(fast)], 1)
        slow, fast = self.slow_res2(skip2), self.fast_res2(fast)
        skip3 = torch.cat([slow, self.Tconv3(fast)], 1)
        slow, fast = self.slow_res3(skip3), self.fast_res3(fast)
        skip4 = torch.cat([slow, self.Tconv4(fast)], 1)
        slow, fast = self.slow_res4(skip4), self.fast_res4(fast)
        return SlowFastLevels(skip1, skip2, skip3, skip4, slow, fast)


class NeckLevels(NamedTuple):
    """What the decoder is given, from the coarsest level to the finest."""

    both: Tensor
    """Both pathways side by side, ``(B, 1536, 8, h, w)``"""
    skip4: Tensor
    skip3: Tensor
    skip2: Tensor
    skip1: Tensor
    """Each with half the channels of that of the backbone"""


class Neck(nn.Module):
    """Bring the backbone's levels to eight frames and fewer channels.

    Shape:
        - levels: those of the backbone
        - returns: those for the decoder
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_slow = _pointwise(2048, 1024)
        self.conv_skip1 = _pointwise(80, 40)
        self.conv_skip2 = _pointwise(320, 160)
        self.conv_skip3 = _pointwise(640, 320)
        self.conv_skip4 = _pointwise(1280, 640)

    def forward(self, levels: SlowFastLevels) -> NeckLevels:
        batch, _, _, height, width = levels.fast.shape
        folded = levels.fast.reshape(batch, 512, 16, height, width)  # channels now hold half a clip
        fast = F.max_pool3d(folded, (2, 1, 1))  # B 512 8 h w
        return NeckLevels(
            torch.cat([self.conv_slow(levels.slow), fast], 1),
            self.conv_skip4(levels.skip4),
            self.conv_skip3(levels.skip3),
            self.conv_skip2(levels.skip2),
            self.conv_skip1(levels.skip1),
        )


class ActionDecoder(nn.Module):
    """Read the neck's levels as one map.

    Shape:
        - levels: those of the neck
        - returns: ``(B, 1, H, W)``, logits
    """

    def __init__(self) -> None:
        super().__init__()
        self.convtsp1 = nn.Sequential(*_grouped(1536, 640, 32))
        self.convtsp2 = nn.Sequential(*_grouped(1280, 320, 16))
        self.convtsp3 = nn.Sequential(*_grouped(640, 160, 8))
        self.convtsp4 = nn.Sequential(*_grouped(320, 40, 8))
        self.convtsp5 = nn.Sequential(*_merging(80, 64, 4), Double())
        self.convtsp6 = nn.Sequential(
            *_merging(64, 32, 2),
            Double(),
            *_merging(32, 16, 1),
            Conv3d(16, 16, 1, bias=False),
            nn.ReLU(),
            Conv3d(16, 1, 1),
        )

    def forward(self, levels: NeckLevels) -> Tensor:
        features = _join(self.convtsp1(levels.both), levels.skip4)  # B 1280 8 H/16 W/16
        features = self.convtsp2(F.channel_shuffle(features, 32))
        features = _join(features, levels.skip3)  # B 640 8 H/8 W/8
        features = self.convtsp3(F.channel_shuffle(features, 16))
        features = _join(features, levels.skip2)  # B 320 8 H/4 W/4
        features = self.convtsp4(F.channel_shuffle(features, 8))
        features = _join(features, levels.skip1)  # B 80 8 H/4 W/4
        features = self.convtsp5(features)  # B 64 4 H/2 W/2
        logits: Tensor = self.convtsp6(features)  # B 1 1 H W
        return logits.squeeze(2)


class VinetA(nn.Module):
    """Backbone, neck and decoder, joined; names are the published ones.

    Shape:
        - clip: ``(B, 3, 32, H, W)``, H and W multiples of 8
        - returns: the map, ``(B, 1, H, W)``, logits
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = SlowFast()
        self.neck = Neck()
        self.decoder = ActionDecoder()

    def forward(self, clip: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.neck(self.backbone(clip)))
        return logits


class VinetATeacher(MapTeacher):
    """ViNet-A, labelling the frame in the middle of 63.

    Of those it sees each second one, so not the frame itself but both its neighbours. Beyond the
    ends of a video there are copies of its first and of its last frame.

    Args:
        height: Rows of the input, in pixels; a multiple of 8. The published program takes no size
            but 256x456.
        width: Columns of the input.
        options: As of :class:`teachers.network.NetworkTeacher`.

    Raises:
        ValueError: If the size is not a multiple of 8.
    """

    title = "ViNet-A"
    stride = 8
    network: VinetA

    def __init__(
        self,
        *,
        height: int = 256,
        width: int = 456,
        **options: Any,  # noqa: ANN401 - device, precision, weights
    ) -> None:
        super().__init__(height=height, width=width, **options)

    @property
    def provenance(self) -> dict[str, Any]:
        """All that decides the targets, with what stands in for frames after the last one."""
        return {**super().provenance, "tail_policy": "repeat_last"}

    def build_network(self) -> VinetA:
        return VinetA()

    def initialise(self, network: nn.Module) -> None:
        super().initialise(network)
        for module in network.modules():
            if isinstance(module, Bottleneck):
                nn.init.constant_(module.bn3.weight, 0.2)  # or sums would grow with every block

    def make_spec(self) -> TeacherSpec:
        return TeacherSpec(
            name="vinet-a",
            paper=PAPER,
            licence="see the weights' publisher",
            adapter_version=1,
            normalisation="(RGB / 255 - 0.45) / 0.225",
            resize_rule="bilinear, antialiased, aspect not kept, rounded to uint8",
            window=WINDOW,
            labelled_frame="middle",
            head_policy="repeat_first",
            layout=self.make_layout(),
            batch=1,
        )

    def normalise(self, frames: Tensor) -> Tensor:
        return (frames - 0.45) / 0.225

    def window(self, frame: int, num_frames: int) -> Sequence[int]:
        seen = range(frame - WINDOW + 1, frame + WINDOW, 2)
        return [min(max(0, index), num_frames - 1) for index in seen]


def _stage(
    in_channels: int,
    width: int,
    num_blocks: int,
    *,
    is_temporal: bool,
    stride: int = 1,
    dilation: int = 1,
) -> nn.Sequential:
    first = Bottleneck(
        in_channels, width, is_temporal=is_temporal, stride=stride, dilation=dilation
    )
    others = [
        Bottleneck(4 * width, width, is_temporal=is_temporal, dilation=dilation)
        for _ in range(num_blocks - 1)
    ]
    return nn.Sequential(first, *others)


def _lateral(in_channels: int, out_channels: int) -> nn.Conv3d:
    return Conv3d(
        in_channels, out_channels, (5, 1, 1), (FRAMES_PER_SLOW, 1, 1), (2, 0, 0), bias=False
    )


def _halve(features: Tensor) -> Tensor:
    return F.max_pool3d(features, (1, 3, 3), (1, 2, 2), (0, 1, 1))


def _pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(Conv3d(in_channels, out_channels, 1, bias=False), nn.ReLU())


def _grouped(in_channels: int, out_channels: int, groups: int) -> tuple[nn.Module, nn.Module]:
    convolution = Conv3d(in_channels, out_channels, 3, padding=1, groups=groups, bias=False)
    return convolution, nn.ReLU()


def _merging(in_channels: int, out_channels: int, groups: int) -> tuple[nn.Module, nn.Module]:
    """Make one frame of two."""
    convolution = Conv3d(
        in_channels,
        out_channels,
        (2, 3, 3),
        (2, 1, 1),
        (0, 1, 1),
        groups=groups,
        bias=False,
    )
    return convolution, nn.ReLU()


def _join(features: Tensor, skip: Tensor) -> Tensor:
    """Bring features to the size of a skip and lay it beside them."""
    height, width = skip.shape[-2:]
    return torch.cat([stretch(features, height, width), skip], 1)
