"""The three decoders, each reading the levels in its own way (Hu et al., WACV 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from student.blocks import (
    FRAMEWISE,
    HALVE,
    InvertedResidual,
    Temporal,
    interpolate_up,
    shuffle_up,
)

Levels = Sequence[Tensor]


class Step(NamedTuple):
    """A block of a branch: its output channels and its way through time."""

    channels: int
    temporal: Temporal


DOUBLE: Final = "double"
"""Stands in a branch where height and width are doubled."""
Branch = tuple[Step | Literal["double"], ...]

HIERARCHICAL_BRANCHES: Final[tuple[Branch, ...]] = (  # one per level, the finest first
    (Step(24, HALVE), Step(48, FRAMEWISE), DOUBLE, Step(24, HALVE), Step(1, HALVE)),
    (Step(56, HALVE), DOUBLE, Step(56, FRAMEWISE), DOUBLE, Step(28, HALVE), Step(1, FRAMEWISE)),
    (
        *(Step(56, HALVE), DOUBLE, Step(56, FRAMEWISE), DOUBLE),
        *(Step(56, FRAMEWISE), DOUBLE, Step(1, FRAMEWISE)),
    ),
    (
        *(DOUBLE, Step(136, HALVE), DOUBLE, Step(136, FRAMEWISE)),
        *(DOUBLE, Step(136, FRAMEWISE), DOUBLE, Step(1, FRAMEWISE)),
    ),
)


class ConspicuityBranch(nn.Module):
    """Read one feature level as one hierarchical map.

    Args:
        in_channels: Channels of the level.
        branch: Blocks and doublings in order.
        first_double: The way that the first doubling is done; the later ones shuffle.

    Shape:
        - level: ``(B, in_channels, T, h, w)``
        - returns: ``(B, 1, 1, H, W)``, logits
    """

    def __init__(
        self, in_channels: int, branch: Branch, *, first_double: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.branch, self.first_double = branch, first_double
        self.blocks = nn.ModuleList()
        double, channels = first_double, in_channels
        for step in branch:
            if step == DOUBLE:
                channels = channels // 4 if double is shuffle_up else channels
                double = shuffle_up
            else:
                self.blocks.append(_decoder_block(channels, step.channels, step.temporal))
                channels = step.channels

    def forward(self, level: Tensor) -> Tensor:
        features, double, blocks = level, self.first_double, iter(self.blocks)
        for step in self.branch:
            if step == DOUBLE:
                features, double = double(features), shuffle_up
            else:
                features = next(blocks)(features)
        return features


class HierarchicalDecoder(nn.Module):
    """D1: every level for itself, to be held against the teacher's hierarchical maps.

    Shape:
        - levels: see :class:`student.encoder.Encoder`
        - returns: ``(B, 4, 1, H, W)``, logits; map 0 from the finest level
    """

    num_maps: Final = 4

    def __init__(self, level_channels: Sequence[int], *, channel_reduction: int) -> None:
        super().__init__()
        # At reduction 4 the coarsest level is too narrow to be shuffled before its first block.
        firsts = [shuffle_up] * 3 + [interpolate_up if channel_reduction == 4 else shuffle_up]
        self.branches = nn.ModuleList(
            ConspicuityBranch(channels, branch, first_double=first)
            for channels, branch, first in zip(
                level_channels, HIERARCHICAL_BRANCHES, firsts, strict=True
            )
        )

    def forward(self, levels: Levels) -> Tensor:
        maps = [branch(level) for branch, level in zip(self.branches, levels, strict=True)]
        return torch.cat(maps, 1)


class PyramidDecoder(nn.Module):
    """D2: from the coarsest level down, adding each finer one on the way.

    Shape:
        - levels: see :class:`student.encoder.Encoder`
        - returns: ``(B, 1, 1, H, W)``, logits
    """

    num_maps: Final = 1

    def __init__(self, level_channels: Sequence[int], *, channel_reduction: int) -> None:
        super().__init__()
        c0, c1, c2, c3 = level_channels
        self.top3 = _decoder_block(c3, 4 * c2, FRAMEWISE)
        self.top2 = _decoder_block(c2, 4 * c1, FRAMEWISE)
        self.lateral1 = _decoder_block(c1, c1, HALVE)
        self.top1 = _decoder_block(c1, 4 * c0, FRAMEWISE)
        self.lateral0 = nn.Sequential(_decoder_block(c0, c0, HALVE), _decoder_block(c0, c0, HALVE))
        self.refine = _decoder_block(c0, c0, HALVE)
        self.last_double = shuffle_up if channel_reduction == 1 else interpolate_up
        self.head = _decoder_block(c0 // 4 if channel_reduction == 1 else c0, 1, HALVE)

    def forward(self, levels: Levels) -> Tensor:
        p3 = shuffle_up(self.top3(levels[3])) + levels[2]
        p2 = shuffle_up(self.top2(p3)) + self.lateral1(levels[1])
        p1 = shuffle_up(self.top1(p2)) + self.lateral0(levels[0])
        out: Tensor = self.head(self.last_double(self.refine(p1)))
        return out


class GridDecoder(nn.Module):
    """D3: neighbouring resolutions are joined, again and again, until one is left.

    Column A holds the four levels at doubled size, B three sums of neighbours, C two, E one.

    Shape:
        - levels: see :class:`student.encoder.Encoder`
        - returns: ``(B, 1, 1, H, W)``, logits
    """

    num_maps: Final = 1

    def __init__(self, level_channels: Sequence[int], *, channel_reduction: int) -> None:
        super().__init__()
        shuffled = channel_reduction == 1
        self.first_double = shuffle_up if shuffled else interpolate_up
        a0, a1, a2, a3 = (c // 4 if shuffled else c for c in level_channels)
        c0, c1, c2, _ = level_channels
        times = (HALVE, HALVE, FRAMEWISE)
        self.level_to_a = nn.ModuleList(
            map(_decoder_block, (c0, c1, c2), (a1, a2, a3), times)
        )  # level i joins row i + 1
        self.a_up = nn.ModuleList(
            map(_decoder_block, (a1, a2, a3), (8, 32, 128), (FRAMEWISE, FRAMEWISE, HALVE))
        )  # row i + 1 of A rises to row i of B
        self.a_across = nn.ModuleList(map(_decoder_block, (a0, a1, a2), (2, 8, 32), [HALVE] * 3))
        self.b_across = nn.ModuleList(map(_decoder_block, (2, 8), (2, 8), [HALVE] * 2))
        self.c_across = _decoder_block(2, 2, HALVE)
        self.head = _decoder_block(2, 1, FRAMEWISE)

    def forward(self, levels: Levels) -> Tensor:
        a = [self.first_double(level) for level in levels]
        a = [a[0], *(a[i + 1] + block(levels[i]) for i, block in enumerate(self.level_to_a))]
        b = [
            shuffle_up(up(a[i + 1])) + across(a[i])
            for i, (up, across) in enumerate(zip(self.a_up, self.a_across, strict=True))
        ]
        c = [shuffle_up(b[i + 1]) + across(b[i]) for i, across in enumerate(self.b_across)]
        e = shuffle_up(c[1]) + self.c_across(c[0])
        out: Tensor = self.head(e)
        return out


def _decoder_block(in_channels: int, out_channels: int, temporal: Temporal) -> InvertedResidual:
    """Return the decoders' block: hidden channels doubled, nothing added to the result."""
    return InvertedResidual(in_channels, out_channels, expansion=2, temporal=temporal)
