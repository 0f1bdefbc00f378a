"""The one block that the encoder and all decoders are made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from student.layers import Conv


class Temporal(NamedTuple):
    """How a convolution treats time."""

    kernel: int
    stride: int
    padding: int


FRAMEWISE = Temporal(1, 1, 0)
MIX = Temporal(3, 1, 1)
HALVE = Temporal(3, 2, 1)
JOIN = Temporal(2, 1, 0)
"""Two frames become one."""


class InvertedResidual(nn.Module):
    """MobileNetV2's block with a 3-D depthwise convolution (Hu et al., WACV 2023).

    A 1x1x1 convolution widens the features, a depthwise one mixes space and time, a 1x1x1 one
    projects them to ``out_channels`` without an activation.

    Args:
        in_channels: Channels of the features.
        out_channels: Channels of the result.
        expansion: Hidden channels per input channel; 1 leaves the widening layer out.
        temporal: The depthwise convolution's way through time; its spatial kernel is 3x3.
        spatial_stride: 1, or 2 to halve height and width.
        residual: Add the input; only where shape and channels stay the same.

    Shape:
        - features: ``(B, in_channels, T, H, W)``
        - returns: ``(B, out_channels, T', H / spatial_stride, W / spatial_stride)``
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        temporal: Temporal,
        spatial_stride: int = 1,
        residual: bool = False,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = (
            nn.Identity() if expansion == 1 else ConvNorm(in_channels, hidden, activation=True)
        )
        self.depthwise = ConvNorm(
            hidden,
            hidden,
            temporal=temporal,
            spatial_kernel=3,
            spatial_stride=spatial_stride,
            groups=hidden,
            activation=True,
        )
        self.project = ConvNorm(hidden, out_channels, activation=False)
        self.residual = residual

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.project(self.depthwise(self.expand(features)))
        return features + out if self.residual else out


class ConvNorm(nn.Sequential):
    """A 3-D convolution without bias, batch norm and, if wanted, ReLU6.

    After :meth:`fold` the convolution has the norm in it: the form for inference.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temporal: Temporal = FRAMEWISE,
        spatial_kernel: int = 1,
        spatial_stride: int = 1,
        groups: int = 1,
        activation: bool,
    ) -> None:
        spatial_padding = spatial_kernel // 2
        conv = Conv(
            in_channels,
            out_channels,
            kernel_size=(temporal.kernel, spatial_kernel, spatial_kernel),
            stride=(temporal.stride, spatial_stride, spatial_stride),
            padding=(temporal.padding, spatial_padding, spatial_padding),
            groups=groups,
            bias=False,
        )
        norm = nn.BatchNorm3d(out_channels, eps=1e-5, momentum=0.1)
        super().__init__(conv, norm, *([nn.ReLU6(inplace=True)] if activation else []))

    def fold(self) -> None:
        """Put the norm's running statistics into the convolution; for inference only."""
        conv, norm = self[0], self[1]
        if isinstance(conv, Conv) and isinstance(norm, nn.BatchNorm3d):
            self[0], self[1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
