"""The one block that the encoder and all decoders are made of, and the ways to double a size."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Temporal(NamedTuple):
    """How a depthwise convolution treats time."""

    kernel: int
    stride: int
    padding: int


FRAMEWISE = Temporal(1, 1, 0)
MIX = Temporal(3, 1, 1)
HALVE = Temporal(3, 2, 1)


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
    """A 3-D convolution without bias, batch norm and, if wanted, ReLU6."""

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
        conv = nn.Conv3d(
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


def shuffle_up(features: Tensor) -> Tensor:
    """Double height and width, frame by frame, by taking four channels apart (pixel shuffle).

    Shape:
        - features: ``(B, 4 * C, T, H, W)``
        - returns: ``(B, C, T, 2 * H, 2 * W)``
    """
    batch, channels, frames, height, width = features.shape
    # Channels-last all the way: the network keeps that memory format, and so no copy is added.
    taken = features.permute(0, 2, 3, 4, 1).reshape(
        batch, frames, height, width, channels // 4, 2, 2
    )  # B T H W C dy dx
    placed = taken.permute(0, 1, 2, 5, 3, 6, 4).reshape(
        batch, frames, 2 * height, 2 * width, channels // 4
    )
    return placed.permute(0, 4, 1, 2, 3)


def interpolate_up(features: Tensor) -> Tensor:
    """Double height and width bilinearly, corners aligned; channels are kept.

    Shape:
        - features: ``(B, C, T, H, W)``
        - returns: ``(B, C, T, 2 * H, 2 * W)``
    """
    return F.interpolate(features, scale_factor=(1, 2, 2), mode="trilinear", align_corners=True)
