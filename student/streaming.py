"""Share work between the overlapping clips of a TinyHD-S that maps every frame of a video.

Its clips begin one frame after another, and its first layer strides two frames: what a layer made
of a clip, it makes of the clip two frames later again, one position earlier. That holds where no
kernel has reached, through the layers below, beyond the clip's ends, where zeros stand for frames.
Each layer that mixes frames loses a position at both ends. So it holds for 6 of the stem's 8
positions, for 4 of block 1's, for 2 of block 2's, and from block 3 on for none: every later
feature depends on where its clip begins and ends. Stem and block 1 are shared here; of block 2 the
costly part, its expansion, is needed at all positions by those that are not shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from student.blocks import ConvNorm, InvertedResidual
from student.tinyhd import StudentOutput, TinyHD

PASSED_BY: Final = 24
"""Clips after which nothing is kept of what was made for a whole clip at once."""


class _Kept(NamedTuple):
    """What the layers made of a clip, position by position, each ``(1, C, 1, h, w)``."""

    stem: Sequence[Tensor]
    block1: Sequence[Tensor]


class StreamingStudent:
    """A TinyHD-S that is shown the clips of a video one after the other.

    Args:
        model: The network, not in training mode; maps are its own, up to rounding.

    Raises:
        ValueError: If the network is a TinyHD-M, whose clips do not overlap, or is in training.
    """

    def __init__(self, model: TinyHD) -> None:
        if model.config.is_multi:
            raise ValueError("only the clips of a TinyHD-S overlap; this is a TinyHD-M")
        if model.training:
            raise ValueError("a network in training mode depends on its whole batch")
        block1 = model.encoder.blocks[0]
        if not isinstance(block1, InvertedResidual):
            raise TypeError("the encoder does not begin as a TinyHD's does")
        self._model, self._block1 = model, block1
        self._kept: dict[int, _Kept] = {}

    def forget(self) -> None:
        """Begin another video."""
        self._kept.clear()

    @torch.inference_mode()
    def see(self, clip: Tensor, newest: int) -> StudentOutput:
        """Say what the network says of a clip.

        Args:
            clip: ``(1, 3, 16, H, W)``, frames ``newest - 15`` to ``newest``.
            newest: Index of its newest frame in the video; any order will do.
        """
        kept = self._look(clip, newest)
        levels = self._model.encoder.continue_from([torch.cat(list(kept.block1), 2)])
        return self._model.decode(levels)

    @torch.inference_mode()
    def pass_by(self, clip: Tensor, newest: int) -> None:
        """Be shown a clip whose maps are not wanted.

        After the :data:`PASSED_BY` clips before one, it is seen as if all before it had been, bit
        for bit: by then every kept value has been replaced by one that a clip's end made.
        """
        self._look(clip, newest)

    def _look(self, clip: Tensor, newest: int) -> _Kept:
        before = self._kept.get(newest - 2)
        kept = self._advance(clip, before) if before else self._begin(clip)
        self._kept = {index: self._kept[index] for index in (newest - 1,) if index in self._kept}
        self._kept[newest] = kept
        return kept

    def _begin(self, clip: Tensor) -> _Kept:
        stem = self._model.encoder.stem(clip)
        return _Kept(torch.split(stem, 1, 2), torch.split(self._block1(stem), 1, 2))

    def _advance(self, clip: Tensor, before: _Kept) -> _Kept:
        frames = torch.split(clip, 1, 2)
        stem = _join(_mix_ends(self._model.encoder.stem, frames, 1), before.stem)
        mixed = _mix_ends(self._block1.depthwise, stem, 2)
        return _Kept(stem, _join(self._block1.project(mixed), before.block1))


def _mix_ends(layer: ConvNorm, positions: Sequence[Tensor], number: int) -> Tensor:
    """Return the first and the last ``number`` positions of a layer's result.

    The kernel spans three positions and sees zeros beyond the clip's ends.

    Shape:
        - positions: each ``(1, C, 1, H, W)``
        - returns: ``(2, C', number, H', W')``
    """
    conv, *rest = layer
    if not isinstance(conv, torch.nn.Conv3d):
        raise TypeError(f"a layer begins with its convolution, got {conv}")
    spanned = conv.stride[0] * (number - 1) + 3
    outside = torch.zeros_like(positions[0])
    padded = [outside, *positions, outside]
    # A stride of two over an even number of frames does not reach the zeros at their end.
    last = padded[-spanned:] if conv.stride[0] == 1 else padded[-spanned - 1 : -1]
    ends = torch.cat([torch.cat(padded[:spanned], 2), torch.cat(last, 2)])
    ends = ends.contiguous(memory_format=torch.channels_last_3d)
    padding = (0, *conv.padding[1:])
    mixed = F.conv3d(ends, conv.weight, conv.bias, conv.stride, padding, 1, conv.groups)
    for part in rest:
        mixed = part(mixed)
    return mixed


def _join(ends: Tensor, before: Sequence[Tensor]) -> Sequence[Tensor]:
    """Put new ends around what the clip two frames earlier has one position later."""
    first, last = (torch.split(end, 1, 2) for end in torch.split(ends, 1))
    number = len(first)
    return (*first, *before[number + 1 : len(before) + 1 - number], *last)
