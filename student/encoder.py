"""The student's encoder: MobileNetV2 inflated to three dimensions, its features as four levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from student.blocks import FRAMEWISE, HALVE, JOIN, MIX, ConvNorm, InvertedResidual, Temporal
from student.layers import interpolate_up, shuffle_up


class EncoderBlock(NamedTuple):
    """One row of the encoder's table; channels are those of channel reduction 1."""

    channels: int
    expansion: int
    spatial_stride: int
    temporal: Temporal
    temporal_multi: Temporal
    """In TinyHD-M, whose coarsest features have one frame, not two."""


def _row(channels: int, expansion: int, spatial_stride: int, *temporal: Temporal) -> EncoderBlock:
    return EncoderBlock(channels, expansion, spatial_stride, temporal[0], temporal[-1])


STEM: Final = _row(32, 1, 2, HALVE)
BLOCKS: Final = (  # numbered from 1
    _row(16, 1, 1, MIX),
    _row(24, 6, 2, MIX),
    _row(24, 6, 1, MIX),
    _row(32, 6, 2, HALVE),
    _row(32, 6, 1, MIX),
    _row(32, 6, 1, MIX),
    _row(64, 6, 2, HALVE),
    _row(64, 6, 1, MIX),
    _row(64, 6, 1, MIX),
    _row(64, 6, 1, MIX),
    _row(96, 6, 1, MIX),
    _row(96, 6, 1, MIX),
    _row(96, 6, 1, MIX),
    _row(160, 6, 2, MIX, JOIN),
    _row(160, 6, 1, MIX, FRAMEWISE),
    _row(160, 6, 1, MIX, FRAMEWISE),
    _row(320, 6, 1, MIX, FRAMEWISE),
)
LAST: Final = _row(1280, 1, 1, FRAMEWISE)
GROUPS: Final = ((1, 1), (2, 3), (4, 6), (7, 13), (14, 18))
"""First and last block of each run of blocks with one resolution, whose outputs are joined."""


def level_channels(channel_reduction: int) -> tuple[int, ...]:
    """Channels of the four feature levels, from the finest to the coarsest."""
    widths = [row.channels // channel_reduction for row in (*BLOCKS, LAST)]
    groups = [sum(widths[first - 1 : last]) for first, last in GROUPS]
    raised = [channels if channel_reduction == 8 else channels // 4 for channels in groups[1:]]
    return (groups[0] + raised[0], *raised[1:])


class Encoder(nn.Module):
    """See a clip at four resolutions (Hu et al., WACV 2023).

    Args:
        channel_reduction: Divisor of every channel count but the clip's three.
        multi: Whether the network is a TinyHD-M.

    Shape:
        - clip: ``(B, 3, 16, H, W)``
        - returns: four levels; level *i* is ``(B, C_i, T_i, H / 2**(i + 1), W / 2**(i + 1))`` with
          ``C_i`` from :func:`level_channels` and ``T_i`` 8, 4, 2, 2; multi: 8, 4, 2, 1
    """

    def __init__(self, *, channel_reduction: int, multi: bool) -> None:
        super().__init__()
        channels = STEM.channels // channel_reduction
        self.stem = ConvNorm(
            3,
            channels,
            temporal=STEM.temporal,
            spatial_kernel=3,
            spatial_stride=STEM.spatial_stride,
            activation=True,
        )
        blocks: list[nn.Module] = []
        for row in BLOCKS:
            width = row.channels // channel_reduction
            blocks.append(
                InvertedResidual(
                    channels,
                    width,
                    expansion=row.expansion,
                    temporal=row.temporal_multi if multi else row.temporal,
                    spatial_stride=row.spatial_stride,
                    residual=row.spatial_stride == 1 and channels == width,
                )
            )
            channels = width
        blocks.append(ConvNorm(channels, LAST.channels // channel_reduction, activation=True))
        self.blocks = nn.ModuleList(blocks)
        # At reduction 8 there are too few channels to take apart; they are interpolated instead.
        self.raise_resolution = interpolate_up if channel_reduction == 8 else shuffle_up

    def forward(self, clip: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.continue_from([self.blocks[0](self.stem(clip))])

    def continue_from(
        self, first_outputs: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the levels, given the outputs of the first blocks, at least of one."""
        outputs = list(first_outputs)
        for block in self.blocks[len(outputs) :]:
            outputs.append(block(outputs[-1]))
        finest, *coarser = (torch.cat(outputs[first - 1 : last], 1) for first, last in GROUPS)
        raised = [self.raise_resolution(group) for group in coarser]
        return (torch.cat([finest, raised[0]], 1), raised[1], raised[2], raised[3])
