"""Sets of pixels, as the fixated ones, of a batch of frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PixelSets:
    """A set of pixels for each frame, as indices into rows of pixels; every pixel counts once.

    Shape:
        - pixels: ``(B, n)``, int64, ascending; padded with 0 to the largest set, at least 1
        - padding: ``(B, n)``, bool; True for padding
        - counts: ``(B,)``, int64
    """

    pixels: Tensor
    padding: Tensor
    counts: Tensor

    @classmethod
    def from_masks(cls, masks: Tensor) -> PixelSets:
        """Take what is positive in masks ``(B, H, W)`` of any real type."""
        flat = (masks if masks.dtype == torch.bool else masks > 0).flatten()
        return cls.from_flat(find_true(flat), len(masks), masks.shape[1] * masks.shape[2])

    @classmethod
    def from_points(
        cls, points: Sequence[Tensor], height: int, width: int, *, device: torch.device
    ) -> PixelSets:
        """Take points (row, column), an int64 tensor ``(n, 2)`` for each frame.

        Raises:
            ValueError: If points are no pairs of integers or lie outside of the frame.
        """
        flat = []
        for frame, pairs in enumerate(points):
            if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
                raise ValueError(
                    f"fixations of frame {frame} of the batch must be (n, 2) integers, row and "
                    f"column, got {tuple(pairs.shape)} {pairs.dtype}"
                )
            flat.append((frame * height + pairs[:, 0].long()) * width + pairs[:, 1])
        counts = torch.tensor([len(pairs) for pairs in points])
        pairs = torch.cat(list(points)) if len(points) else torch.zeros(0, 2)
        size = torch.tensor([height, width], device=pairs.device)
        outside = ((pairs < 0) | (pairs >= size)).any(1)
        if outside.any():
            first = int(outside.nonzero()[0])
            frame = int((counts.cumsum(0) <= first).sum())
            raise ValueError(
                f"a fixation at {tuple(pairs[first].tolist())} (row, column) lies outside of frame "
                f"{frame} of the batch, which is {height}x{width}"
            )
        return cls.from_flat(torch.unique(torch.cat(flat)).to(device), len(points), height * width)

    @classmethod
    def from_flat(cls, flat: Tensor, frames: int, size: int) -> PixelSets:
        """Take ascending indices into the pixels of all frames, each of ``size`` pixels."""
        starts = torch.arange(frames + 1, device=flat.device) * size
        bounds = torch.searchsorted(flat, starts)
        counts = bounds.diff()
        column = torch.arange(_columns(counts), device=flat.device)
        padding = column >= counts[:, None]
        pixels = flat.new_zeros(padding.shape)
        pixels[~padding] = flat
        return cls(pixels - starts[:-1, None].where(~padding, 0), padding, counts)

    def __getitem__(self, frames: slice) -> PixelSets:
        counts = self.counts[frames]
        longest = _columns(counts)
        return PixelSets(self.pixels[frames, :longest], self.padding[frames, :longest], counts)

    def read(self, values: Tensor, *, padding: float) -> Tensor:
        """Return the values ``(B, n)`` at the pixels of rows ``(B, N)``, or ``(1, N)`` for all."""
        if len(values) != len(self.pixels):
            values = values.expand(len(self.pixels), -1)
        return values.gather(1, self.pixels).masked_fill_(self.padding, padding)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean ``(B,)`` of values ``(B, n)``; NaN for an empty set."""
        return values.masked_fill(self.padding, 0.0).sum(1) / self.counts


def find_true(flags: Tensor) -> Tensor:
    """Return the ascending indices of what is True in ``(N,)``, where little is.

    Eight flags are looked at together: PyTorch's own search takes as long as all else here.
    """
    if len(flags) % 8 or flags.storage_offset() % 8:
        return flags.nonzero()[:, 0]
    eights = flags.view(torch.int64)
    places = eights.nonzero()[:, 0]
    within = eights[places].view(torch.bool).nonzero()[:, 0]
    return places[within >> 3] * 8 + (within & 7)


def _columns(counts: Tensor) -> int:
    return max(1, int(counts.max())) if len(counts) else 1
