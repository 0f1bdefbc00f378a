"""S3D, a network that recognises actions, as the backbone of video saliency teachers.

Xie et al., "Rethinking spatiotemporal feature learning: speed-accuracy trade-offs in video
classification", ECCV 2018. Most three-dimensional kernels are taken apart into a picture's kernel
and one over time. The classifier is left out; what counts are the feature levels.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from torch import Tensor, nn

from teachers.shared import Features, Sharing, convolve_norm, join, through, whole

NORM_EPS: Final = 1e-3
NORM_MOMENTUM: Final = 0.001

# Shapes: B clips, C channels, T frames, H height, W width.


class S3dLevels(NamedTuple):
    """What S3D sees in a clip ``(B, 3, T, H, W)``, from the finest level to the coarsest."""

    f1: Features
    """``(B, 64, T / 2, H / 4, W / 4)``"""
    f2: Tensor
    """``(B, 192, T / 2, H / 8, W / 8)``"""
    f3: Tensor
    """``(B, 480, T / 4, H / 16, W / 16)``"""
    f4: Tensor
    """``(B, 832, T / 8, H / 32, W / 32)``"""
    f5: Tensor
    """``(B, 1024, T / 8, H / 32, W / 32)``"""


class Basic3d(Sharing):
    """A three-dimensional convolution, its norm and a ReLU.

    Args:
        in_channels: Channels of the features.
        out_channels: Channels of the result.
        kernel: Its extent in frames, rows and columns.
        stride: Its steps.
        padding: Zeros on either side.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: tuple[int, int, int] = (1, 1, 1),
        stride: tuple[int, int, int] = (1, 1, 1),
        padding: tuple[int, int, int] = (0, 0, 0),
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = _norm(out_channels)

    def forward(self, features: Features) -> Features:
        return convolve_norm(features, self.conv, self.bn)


class Sep3d(Sharing):
    """A convolution of pictures and one over time, each with its norm and a ReLU.

    Args:
        in_channels: Channels of the features.
        out_channels: Channels of both results.
        kernel: Extent of both kernels, in pixels and in frames.
        stride: Steps of both.
        padding: Zeros on either side, for both.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, kernel: int, stride: int, padding: int
    ) -> None:
        super().__init__()
        self.conv_s = nn.Conv3d(
            in_channels,
            out_channels,
            (1, kernel, kernel),
            (1, stride, stride),
            (0, padding, padding),
            bias=False,
        )
        self.bn_s = _norm(out_channels)
        self.conv_t = nn.Conv3d(
            out_channels,
            out_channels,
            (kernel, 1, 1),
            (stride, 1, 1),
            (padding, 0, 0),
            bias=False,
        )
        self.bn_t = _norm(out_channels)

    def forward(self, features: Features) -> Features:
        features = convolve_norm(features, self.conv_s, self.bn_s)
        return convolve_norm(features, self.conv_t, self.bn_t)


class Mixed(Sharing):
    """Four looks at the same features, laid side by side: the block of an Inception network.

    Args:
        in_channels: Channels of the features.
        pointwise: Channels of the look at single pixels.
        first: Channels of a look at neighbourhoods: those that it is reduced to, and its result's.
        second: The same for another one.
        pooled: Channels of the look at the neighbourhoods' maxima.
    """

    def __init__(
        self,
        in_channels: int,
        pointwise: int,
        first: tuple[int, int],
        second: tuple[int, int],
        pooled: int,
    ) -> None:
        super().__init__()
        self.branch0 = nn.Sequential(Basic3d(in_channels, pointwise))
        self.branch1 = _neighbourhood(in_channels, *first)
        self.branch2 = _neighbourhood(in_channels, *second)
        self.branch3 = nn.Sequential(nn.MaxPool3d(3, 1, 1), Basic3d(in_channels, pooled))

    def forward(self, features: Features) -> Features:
        branches = (self.branch0, self.branch1, self.branch2, self.branch3)
        return join([through(branch, features) for branch in branches])


class S3d(Sharing):
    """The backbone.

    Shape:
        - clip: ``(B, 3, T, H, W)``, T a multiple of 8, H and W multiples of 32
        - returns: five feature levels
    """

    def __init__(self) -> None:
        super().__init__()
        self.block1 = nn.Sequential(
            Sep3d(3, 64, kernel=7, stride=2, padding=3),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        self.block2 = nn.Sequential(
            Basic3d(64, 64),
            Sep3d(64, 192, kernel=3, stride=1, padding=1),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
        )
        self.block3 = nn.Sequential(
            Mixed(192, 64, (96, 128), (16, 32), 32),  # 3b: 256 channels
            Mixed(256, 128, (128, 192), (32, 96), 64),  # 3c: 480
            nn.MaxPool3d(3, 2, 1),
        )
        self.block4 = nn.Sequential(
            Mixed(480, 192, (96, 208), (16, 48), 64),  # 4b: 512
            Mixed(512, 160, (112, 224), (24, 64), 64),  # 4c: 512
            Mixed(512, 128, (128, 256), (24, 64), 64),  # 4d: 512
            Mixed(512, 112, (144, 288), (32, 64), 64),  # 4e: 528
            Mixed(528, 256, (160, 320), (32, 128), 128),  # 4f: 832
            nn.MaxPool3d(2, 2),
        )
        self.block5 = nn.Sequential(
            Mixed(832, 256, (160, 320), (32, 128), 128),  # 5b: 832
            Mixed(832, 384, (192, 384), (48, 128), 128),  # 5c: 1024
        )

    def forward(self, clip: Features) -> S3dLevels:
        f1 = through(self.block1, clip)
        f2 = through(self.block2, f1)
        f3 = through(self.block3, f2)
        f4 = through(self.block4, f3)
        f5 = through(self.block5, f4)
        return S3dLevels(f1, whole(f2), whole(f3), whole(f4), whole(f5))


def _norm(channels: int) -> nn.BatchNorm3d:
    return nn.BatchNorm3d(channels, NORM_EPS, NORM_MOMENTUM)


def _neighbourhood(in_channels: int, reduced: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        Basic3d(in_channels, reduced),
        Sep3d(reduced, out_channels, kernel=3, stride=1, padding=1),
    )
