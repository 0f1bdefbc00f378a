"""The three decoders, each reading the levels in its own way (Hu et al., WACV 2023).

A decoder either makes one map for the whole clip, halving the frames on its way, or one map for
each frame, doubling them. The tables tell how a TinyHD-S halves them; :class:`Role` tells the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from student.blocks import FRAMEWISE, HALVE, MIX, InvertedResidual, Temporal
from student.layers import double_frames, interpolate_up, shuffle_up

Levels = Sequence[Tensor]


class Role(Enum):
    """What a decoder is for, which decides how its blocks treat time."""

    SINGLE = "one map, in a TinyHD-S"
    SINGLE_IN_MULTI = "one map, in a TinyHD-M"
    MULTI = "a map for each frame"

    def temporal(self, in_single: Temporal) -> Temporal:
        """Return a block's way through time, given the one it has in a TinyHD-S."""
        if self is Role.MULTI or (self is Role.SINGLE_IN_MULTI and in_single == FRAMEWISE):
            return MIX
        return in_single

    def block(self, in_channels: int, out_channels: int, in_single: Temporal) -> InvertedResidual:
        """Return the decoders' block: hidden channels doubled, nothing added to the result."""
        temporal = self.temporal(in_single)
        return InvertedResidual(in_channels, out_channels, expansion=2, temporal=temporal)

    def stretch(self, features: Tensor) -> Tensor:
        """Double the frames where the decoder makes a map for each."""
        return double_frames(features) if self is Role.MULTI else features


class Step(NamedTuple):
    """A block of a branch: its output channels and its way through time."""

    channels: int
    temporal: Temporal


DOUBLE: Final = "double"
"""Stands in a branch where height and width, and in a TinyHD-M frames, are doubled."""
Branch = tuple[Step | Literal["double"], ...]

# One per level, the finest first.
HIERARCHICAL_BRANCHES: Final[tuple[Branch, ...]] = (
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
        role: What the decoder is for.
        first_double: The way that the first doubling is done; the later ones shuffle.

    Shape:
        - level: ``(B, in_channels, T, h, w)``
        - returns: ``(B, 1, T', H, W)``, logits; ``T'`` is 16 if ``role`` is multi, else 1
    """

    def __init__(
        self,
        in_channels: int,
        branch: Branch,
        *,
        role: Role,
        first_double: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.branch, self.role, self.first_double = branch, role, first_double
        self.blocks = nn.ModuleList()
        double, channels = first_double, in_channels
        for step in branch:
            if step == DOUBLE:
                channels = channels // 4 if double is shuffle_up else channels
                double = shuffle_up
            else:
                self.blocks.append(role.block(channels, step.channels, step.temporal))
                channels = step.channels

    def forward(self, level: Tensor) -> Tensor:
        features, double, blocks = level, self.first_double, iter(self.blocks)
        for step in self.branch:
            if step == DOUBLE:
                features, double = double(self.role.stretch(features)), shuffle_up
            else:
                features = next(blocks)(features)
        return features


class HierarchicalDecoder(nn.Module):
    """D1: every level for itself, to be held against the teacher's hierarchical maps.

    Shape:
        - levels: see :class:`student.encoder.Encoder`
        - returns: ``(B, 4, T', H, W)``, logits, map 0 from the finest level; ``T'`` is 16 if
          ``role`` is multi, else 1
    """

    num_maps: Final = 4

    def __init__(
        self,
        level_channels: Sequence[int],
        *,
        channel_reduction: int,
        role: Role,
        output_frames: int,  # a multi d1 makes 16, whatever else there is
    ) -> None:
        super().__init__()
        # At reduction 4 the coarsest level is too narrow to be shuffled before its first block.
        firsts = [shuffle_up] * 3 + [interpolate_up if channel_reduction == 4 else shuffle_up]
        self.branches = nn.ModuleList(
            ConspicuityBranch(channels, branch, role=role, first_double=first)
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
        - returns: ``(B, 1, T', H, W)``, logits; ``T'`` is ``output_frames`` if ``role`` is multi,
          else 1
    """

    num_maps: Final = 1

    def __init__(
        self,
        level_channels: Sequence[int],
        *,
        channel_reduction: int,
        role: Role,
        output_frames: int,
    ) -> None:
        super().__init__()
        c0, c1, c2, c3 = level_channels
        self.role = role
        self.top3 = role.block(c3, 4 * c2, FRAMEWISE)
        self.top2 = role.block(c2, 4 * c1, FRAMEWISE)
        self.lateral1 = role.block(c1, c1, HALVE)
        self.top1 = role.block(c1, 4 * c0, FRAMEWISE)
        self.lateral0 = nn.Sequential(role.block(c0, c0, HALVE), role.block(c0, c0, HALVE))
        self.refine = role.block(c0, c0, HALVE)
        shuffled = channel_reduction == 1
        self.last_double = shuffle_up if shuffled else interpolate_up
        self.stretches_last = output_frames == 16
        self.head = role.block(c0 // 4 if shuffled else c0, 1, HALVE)

    def forward(self, levels: Levels) -> Tensor:
        stretch = self.role.stretch
        p3 = stretch(shuffle_up(self.top3(levels[3]))) + levels[2]
        p2 = stretch(shuffle_up(self.top2(p3))) + self.lateral1(levels[1])
        p1 = stretch(shuffle_up(self.top1(p2))) + self.lateral0(levels[0])
        fine = self.last_double(self.refine(p1))
        out: Tensor = self.head(stretch(fine) if self.stretches_last else fine)
        return out


class GridDecoder(nn.Module):
    """D3: neighbouring resolutions are joined, again and again, until one is left.

    Column A holds the four levels at doubled size, B three sums of neighbours, C two, E one.

    Shape:
        - levels: see :class:`student.encoder.Encoder`
        - returns: ``(B, 1, T', H, W)``, logits; ``T'`` is ``output_frames`` if ``role`` is multi,
          else 1
    """

    num_maps: Final = 1

    def __init__(
        self,
        level_channels: Sequence[int],
        *,
        channel_reduction: int,
        role: Role,
        output_frames: int,
    ) -> None:
        super().__init__()
        self.role = role
        shuffled = channel_reduction == 1
        self.first_double = shuffle_up if shuffled else interpolate_up
        self.stretches_levels = output_frames == 16
        a0, a1, a2, a3 = (c // 4 if shuffled else c for c in level_channels)
        c0, c1, c2, _ = level_channels
        # With 8 maps the levels keep their frames, and so their neighbours have to halve them.
        if role is Role.MULTI and not self.stretches_levels:
            to_a = [_halving_block(c, a) for c, a in zip((c0, c1, c2), (a1, a2, a3), strict=True)]
        else:
            to_a = list(map(role.block, (c0, c1, c2), (a1, a2, a3), (HALVE, HALVE, FRAMEWISE)))
        self.level_to_a = nn.ModuleList(to_a)  # level i joins row i + 1
        self.a_up = nn.ModuleList(
            map(role.block, (a1, a2, a3), (8, 32, 128), (FRAMEWISE, FRAMEWISE, HALVE))
        )  # row i + 1 of A rises to row i of B
        self.a_across = nn.ModuleList(map(role.block, (a0, a1, a2), (2, 8, 32), [HALVE] * 3))
        self.b_across = nn.ModuleList(map(role.block, (2, 8), (2, 8), [HALVE] * 2))
        self.c_across = role.block(2, 2, HALVE)
        self.head = role.block(2, 1, FRAMEWISE)

    def forward(self, levels: Levels) -> Tensor:
        a = [self._to_a(level) for level in levels]
        a = [a[0], *(a[i + 1] + block(levels[i]) for i, block in enumerate(self.level_to_a))]
        b = [
            self._rise(up(a[i + 1])) + across(a[i])
            for i, (up, across) in enumerate(zip(self.a_up, self.a_across, strict=True))
        ]
        c = [self._rise(b[i + 1]) + across(b[i]) for i, across in enumerate(self.b_across)]
        e = self._rise(c[1]) + self.c_across(c[0])
        out: Tensor = self.head(e)
        return out

    def _to_a(self, level: Tensor) -> Tensor:
        doubled = self.first_double(level)
        return self.role.stretch(doubled) if self.stretches_levels else doubled

    def _rise(self, features: Tensor) -> Tensor:
        return self.role.stretch(shuffle_up(features))


def _halving_block(in_channels: int, out_channels: int) -> InvertedResidual:
    return InvertedResidual(in_channels, out_channels, expansion=2, temporal=HALVE)
